// Verdict slots [begin, end), compiled per instruction set; see foreach_isa.h.

// y[j] = x . w[j] for N rows of w: x is loaded once for all of them.
template <int N, typename X, typename Y>
RORO_INLINE void dots(const X* x, const Y* w, std::int64_t stride, std::int64_t width, float* y) {
  vf even[N] = {}, odd[N] = {};
  std::int64_t i = 0;
  for (; i + 2 * W <= width; i += 2 * W) {
    const vf a = load(x + i), b = load(x + i + W);
    for (int j = 0; j < N; ++j) {
      even[j] += a * load(w + j * stride + i);
      odd[j] += b * load(w + j * stride + i + W);
    }
  }
  for (; i < width; i += W) {
    const std::int64_t n = width - i < W ? width - i : W;
    const vf a = load_some(x + i, n);
    for (int j = 0; j < N; ++j) even[j] += a * load_some(w + j * stride + i, n);
  }
  for (int j = 0; j < N; ++j) y[j] = sum(even[j] + odd[j]);
}

template <typename X, typename Y>
RORO_INLINE void slots_of(const JudgeArgs& a, std::int64_t begin, std::int64_t end) {
  const Y* w = static_cast<const Y*>(a.label_weight);
  const std::int64_t K = a.labels;
  for (std::int64_t m = begin; m < end; ++m) {
    const X* x = static_cast<const X*>(a.hidden) + a.rows[m] * a.hidden_stride;
    float y[kMaxLabels + W], e[kMaxLabels + W];
    std::int64_t k = 0;
    for (; k + 4 <= K; k += 4) dots<4>(x, w + k * a.label_stride, a.label_stride, a.width, y + k);
    if (K - k >= 2) dots<2>(x, w + k * a.label_stride, a.label_stride, a.width, y + k), k += 2;
    if (K - k == 1) dots<1>(x, w + k * a.label_stride, a.label_stride, a.width, y + k);
    float top = y[0], z = 0, value = 0;
    for (k = 1; k < K; ++k) top = y[k] > top ? y[k] : top;
    for (k = K; k % W; ++k) y[k] = top;
    for (k = 0; k < K; k += W) store(e + k, exp(load(y + k) - top));
    for (k = 0; k < K; ++k) z += e[k];
    for (k = 0; k < K; ++k) {
      a.probs[m * K + k] = e[k] / z;
      value += a.valence[k] * (e[k] / z);
    }
    a.value[m] = value;
  }
}

[[maybe_unused]] static void verdicts(const JudgeArgs& a, std::int64_t begin, std::int64_t end) {
  const bool x = a.hidden_type == DType::f32, y = a.label_type == DType::f32;
  x ? y ? slots_of<float, float>(a, begin, end) : slots_of<float, bf16>(a, begin, end)
    : y ? slots_of<bf16, float>(a, begin, end) : slots_of<bf16, bf16>(a, begin, end);
}
