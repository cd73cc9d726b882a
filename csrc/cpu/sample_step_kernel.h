// The read over one row, compiled per instruction set; see foreach_isa.h.

// 2^x for -126 <= x <= 0, to 2e-7 of it (a fit of degree 5 between -1/2 and 1/2, least in relative error).
// `exp2` clamps once more and has one term more, which takes a draw of 32 rows an eighth longer.
RORO_INLINE vf exp2_of_negative(vf x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const vf shifted = x + kMagic, f = x - (shifted - kMagic);
  vf p = f * 1.32647273e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  return p * (vf)(((vi)shifted << 23) + 0x3f800000);
}

// One block of n vectors: its maximum, and its sums relative to that maximum. Notes NaN.
RORO_INLINE BlockSums block_sums(const vf* v, int n, float inverse_temperature, vi& nan) {
  constexpr float kLog2E = 1.44269504f;
  const vf nothing = splat(-__builtin_inff()), far = splat(-126.0f);  // far: a mass that no sum with a 1 in it notices
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
    const vf d = maximum((v[j] - m) * kLog2E, far), e = exp2_of_negative(d);
    mass[j % 2] += e;
    moment[j % 2] += e * d;
  }
  out.hot = out.mass = sum(mass[0] + mass[1]);
  out.moment = sum(moment[0] + moment[1]) / kLog2E;
  if (inverse_temperature != 1) {
    const float scale = inverse_temperature * kLog2E;
    for (int j = 0; j < n; ++j) hot[j % 2] += exp2_of_negative(maximum((v[j] - m) * scale, far));
    out.hot = sum(hot[0] + hot[1]);
  }
  return out;
}

// The sums of all blocks of a row; false when it holds NaN.
template <typename T>
RORO_INLINE bool scan(const T* x, std::int64_t vocab, float inverse_temperature, BlockSums* blocks) {
  constexpr int kVectors = kSampleBlock / W, kAhead = 2 * kSampleBlock;
  vi nan{};
  vf v[kVectors];
  std::int64_t at = 0;
  for (; at + kSampleBlock <= vocab; at += kSampleBlock) {
    for (int j = 0; j < kVectors; ++j) {
      __builtin_prefetch(x + at + kAhead + j * W);
      v[j] = load(x + at + j * W);
    }
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
