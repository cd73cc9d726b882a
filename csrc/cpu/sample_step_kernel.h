// The read over one row, compiled per instruction set; see foreach_isa.h.

// The same bits as exp(x), for x <= 0: what that does for large x and for NaN is left out.
RORO_INLINE vf exp_of_negative(vf x) {
  constexpr float kLowest = -87.33654f, kMagic = 12582912.0f;  // 1.5 * 2^23
  const vf y = maximum(x, splat(kLowest));
  const vf shifted = y * 1.44269504f + kMagic;
  const vf n = shifted - kMagic;
  vf r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const vf e = p * (vf)(((vi)shifted << 23) + 0x3f800000);
  return x < splat(kLowest) ? vf{} : e;
}

// One block of n vectors: its maximum, and its sums relative to that maximum. Notes NaN.
RORO_INLINE BlockSums block_sums(const vf* v, int n, float inverse_temperature, vi& nan) {
  const vf nothing = splat(-__builtin_inff()), far = splat(-200.0f);  // far: no mass, and no infinity to multiply by
  vf top[2] = {nothing, nothing};
  for (int j = 0; j < n; ++j) {
    top[j % 2] = maximum(top[j % 2], v[j]);
    nan |= v[j] != v[j];
  }
  BlockSums out{largest(maximum(top[0], top[1])), 0, 0, 0};
  const float m = out.top;
  if (!(m > -__builtin_inff() && m < __builtin_inff())) return out;
  vf mass[2] = {}, moment[2] = {}, hot[2] = {};
  for (int j = 0; j < n; ++j) {
    const vf d = maximum(v[j] - m, far), e = exp_of_negative(d);
    mass[j % 2] += e;
    moment[j % 2] += e * d;
  }
  out.hot = out.mass = sum(mass[0] + mass[1]);
  out.moment = sum(moment[0] + moment[1]);
  if (inverse_temperature != 1) {
    for (int j = 0; j < n; ++j) hot[j % 2] += exp_of_negative((v[j] - m) * inverse_temperature);
    out.hot = sum(hot[0] + hot[1]);
  }
  return out;
}

// The sums of all blocks of a row; false when it holds NaN.
template <typename T>
RORO_INLINE bool scan(const T* x, std::int64_t vocab, float inverse_temperature, BlockSums* blocks) {
  constexpr int kVectors = kSampleBlock / W;
  vi nan{};
  vf v[kVectors];
  std::int64_t at = 0;
  for (; at + kSampleBlock <= vocab; at += kSampleBlock) {
    for (int j = 0; j < kVectors; ++j) v[j] = load(x + at + j * W);
    *blocks++ = block_sums(v, kVectors, inverse_temperature, nan);
  }
  if (at < vocab) {
    int n = 0;
    for (; at + W <= vocab; at += W) v[n++] = load(x + at);
    if (at < vocab) v[n++] = load_some(x + at, vocab - at, -__builtin_inff());
    *blocks = block_sums(v, n, inverse_temperature, nan);
  }
  int any = 0;
  for (int i = 0; i < W; ++i) any |= nan[i];
  return any == 0;
}

[[maybe_unused]] static bool scan_row(const void* row, DType type, std::int64_t vocab, float inverse_temperature,
                                      BlockSums* blocks) {
  return type == DType::f32 ? scan(static_cast<const float*>(row), vocab, inverse_temperature, blocks)
                            : scan(static_cast<const bf16*>(row), vocab, inverse_temperature, blocks);
}

// e[i] = exp((x[i] - top) * scale) for n elements; e has room for whole vectors.
[[maybe_unused]] static void exps(const float* x, std::int64_t n, float top, float scale, float* e) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(e + i, exp((load(x + i) - top) * scale));
  if (i < n) store_some(e + i, exp((load_some(x + i, n - i) - top) * scale), n - i);
}
