// One block of rows, compiled per instruction set; see foreach_isa.h.

#include "cpu/float_product.h"

// Logits of a row, from the product with its hidden part, which acc [D padded] holds unscaled. Overwrites acc.
[[maybe_unused]] static void row_logits(const RouterArgs& a, const PackedRouter& w, std::int64_t row, float rstd,
                                        float* acc) {
  const std::int64_t width = w.layout.padded_width, panel = w.layout.panel, S = a.sizes.signals, K = a.sizes.actions;
  const float* signals = a.signals + row * a.signals_stride;
  for (std::int64_t p = 0; p < width; p += kPanel) {  // kPanel divides the panel
    const float* ws = w.signals() + p / panel * panel * S + p % panel;
    vf h[kColumns];
    for (int c = 0; c < kColumns; ++c) h[c] = load(w.b1() + p + c * W);
    for (int c = 0; c < kColumns && a.sizes.hidden; ++c) h[c] += load(acc + p + c * W) * rstd;
    for (std::int64_t j = 0; j < S; ++j) {
      for (int c = 0; c < kColumns; ++c) h[c] += signals[j] * load(ws + j * panel + c * W);
    }
    for (int c = 0; c < kColumns; ++c) store(acc + p + c * W, silu(h[c]));
  }
  float* logits = a.logits + row * K;
  for (std::int64_t k = 0; k < K; ++k) {
    logits[k] = w.b2()[k] + dot(acc, w.w2() + k * width, width) + (a.bias ? a.bias[row * a.bias_stride + k] : 0.0f);
  }
}

// Softmax of the row's logits and the action that its uniform number picks.
[[maybe_unused]] static void take_action(const RouterArgs& a, std::int64_t row) {
  const std::int64_t K = a.sizes.actions;
  const float scale = a.temperature > 0 ? a.temperature : 1.0f;
  const float* logits = a.logits + row * K;
  float y[kMaxActions + W], e[kMaxActions + W];
  float top = -__builtin_inff();
  for (std::int64_t k = 0; k < K; ++k) {
    y[k] = logits[k] / scale;
    top = y[k] > top ? y[k] : top;
  }
  float z = 0;
  for (std::int64_t k = 0; k < K; k += W) {
    store(e + k, exp(load(y + k) - top));
    for (std::int64_t i = k; i < K && i < k + W; ++i) z += e[i];
  }
  const float log_z = __builtin_logf(z);
  float entropy = 0, cdf = 0, u = a.uniforms[row];
  float* probs = a.probs + row * K;
  std::int64_t action = -1, last = 0;
  for (std::int64_t k = 0; k < K; ++k) {
    probs[k] = e[k] / z;
    entropy -= probs[k] == 0 ? 0.0f : probs[k] * (y[k] - top - log_z);
    cdf += probs[k];
    if (probs[k] > 0) last = k;
    if (action < 0 && (a.temperature > 0 ? cdf > u : y[k] == top)) action = k;
  }
  if (action < 0) action = last;
  a.action[row] = action;
  a.logprob[row] = y[action] - top - log_z;
  a.entropy[row] = entropy;
}

// Two loops, so that the short chains of many rows overlap. acc [end - begin][D padded], squares: of the hidden rows.
[[maybe_unused]] static void finish(const RouterArgs& a, const PackedRouter& w, std::int64_t begin, std::int64_t end,
                                    const float* squares, float* acc) {
  for (std::int64_t row = begin; row < end; ++row, acc += w.layout.padded_width) {
    row_logits(a, w, row, 1.0f / __builtin_sqrtf(squares[row - begin] / a.sizes.hidden + a.eps), acc);
  }
  for (std::int64_t row = begin; row < end; ++row) take_action(a, row);
}

// Rows [begin, end) with float products. acc: [rows][D padded]; copy: [rows][kDepth] for rows that are not float.
[[maybe_unused]] static void block(const RouterArgs& a, const PackedRouter& w, std::int64_t begin, std::int64_t end,
                                   float* acc, float* copy) {
  const std::int64_t H = a.sizes.hidden, width = w.layout.padded_width, n = end - begin;
  const float* x[kRouterRows];
  float squares[kRouterRows] = {};
  for (std::int64_t k0 = 0; k0 < H; k0 += kRouterDepth) {
    const std::int64_t depth = H - k0 < kRouterDepth ? H - k0 : kRouterDepth;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t at = (a.rows ? a.rows[begin + i] : begin + i) * a.hidden_stride + k0;
      if (a.hidden_type == DType::f32) {
        x[i] = static_cast<const float*>(a.hidden) + at;
      } else {
        const bf16* from = static_cast<const bf16*>(a.hidden) + at;
        float* to = copy + i * kRouterDepth;
        std::int64_t k = 0;
        for (; k + W <= depth; k += W) store(to + k, load(from + k));
        for (; k < depth; ++k) to[k] = to_float(from[k]);
        x[i] = to;
      }
      squares[i] += dot(x[i], x[i], depth);
    }
    for (std::int64_t p = 0; p < width; p += kPanel) {
      product(x, n, w.hidden() + p * H + k0 * kPanel, kPanel, depth, acc + p, width, k0 == 0);
    }
  }
  finish(a, w, begin, end, squares, acc);
}

// Copies `real` elements as bf16, pads with zeros to `depth`; returns the sum of their squares.
template <typename T>
RORO_INLINE float copy_half(const T* from, std::int64_t real, std::int64_t depth, bf16* to) {
  vf s0{}, s1{};
  std::int64_t k = 0;
  for (; k + 2 * W <= real; k += 2 * W) {
    const vf x = load(from + k), y = load(from + k + W);
    store(to + k, x);
    store(to + k + W, y);
    s0 += x * x;
    s1 += y * y;
  }
  for (; k < real; k += W) {
    const std::int64_t n = real - k < W ? real - k : W;
    const vf x = load_some(from + k, n);
    store_some(to + k, x, n);
    s0 += x * x;
  }
  for (k = real; k < depth; ++k) to[k] = bf16{0};
  return sum(s0 + s1);
}

[[maybe_unused]] static float take_half(const RouterArgs& a, std::int64_t at, std::int64_t real, std::int64_t depth,
                                        bf16* to) {
  if (a.hidden_type == DType::f32) return copy_half(static_cast<const float*>(a.hidden) + at, real, depth, to);
  return copy_half(static_cast<const bf16*>(a.hidden) + at, real, depth, to);
}
