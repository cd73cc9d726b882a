// Conversions between float and bf16, compiled per instruction set; see foreach_isa.h. Pointers need no alignment.

[[maybe_unused]] static void narrow(const char* from, char* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf x;
    __builtin_memcpy(&x, from + 4 * i, sizeof x);
    store(reinterpret_cast<bf16*>(to + 2 * i), x);
  }
  for (; i < n; ++i) {
    float x;
    __builtin_memcpy(&x, from + 4 * i, 4);
    const bf16 y = to_bf16(x);
    __builtin_memcpy(to + 2 * i, &y, 2);
  }
}

[[maybe_unused]] static void widen(const char* from, char* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf x = load(reinterpret_cast<const bf16*>(from + 2 * i));
    __builtin_memcpy(to + 4 * i, &x, sizeof x);
  }
  for (; i < n; ++i) {
    bf16 x;
    __builtin_memcpy(&x, from + 2 * i, 2);
    const float y = to_float(x);
    __builtin_memcpy(to + 4 * i, &y, 4);
  }
}
