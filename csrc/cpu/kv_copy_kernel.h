// Conversions between float and bf16, and copies past the caches, compiled per instruction set; see foreach_isa.h.
// Pointers of the conversions need no alignment.

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

RORO_INLINE void stream(char* to, vf x) {
#if RORO_WIDTH == 16
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)x);
#elif RORO_WIDTH == 8
  _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)x);
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)x);
#else
  __builtin_memcpy(to, &x, sizeof x);
#endif
}

// `bytes` is a multiple of 64, `to` is aligned to 64. Lines of `to` are not read first, as ordinary stores would.
[[maybe_unused]] static void stream_lines(const char* from, char* to, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) {
    for (int j = 0; j < 64; j += 4 * W) {
      vf x;
      __builtin_memcpy(&x, from + i + j, sizeof x);
      stream(to + i + j, x);
    }
  }
}
