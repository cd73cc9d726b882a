// One block of rows, compiled per instruction set; see foreach_isa.h.

constexpr int kColumns = W == 16 ? 4 : 2;  // vectors in a panel
constexpr int kRowTile = 6;                // with kColumns vectors each: fits the registers

// acc[MR][panel] (+)= x[MR][k0..k1) * w[k0..k1)[panel]
template <int MR>
RORO_INLINE void tile(const float* const* x, const float* w, std::int64_t k0, std::int64_t k1, float* acc,
                      std::int64_t stride, bool first) {
  vf c[MR][kColumns];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kColumns; ++j) c[i][j] = first ? vf{} : load(acc + i * stride + j * W);
  }
  for (std::int64_t k = k0; k < k1; ++k) {
    vf b[kColumns];
    for (int j = 0; j < kColumns; ++j) b[j] = load(w + k * kColumns * W + j * W);
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < kColumns; ++j) c[i][j] += x[i][k] * b[j];
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < kColumns; ++j) store(acc + i * stride + j * W, c[i][j]);
  }
}

[[maybe_unused]] static void tiles(const float* const* x, std::int64_t rows, const float* w, std::int64_t k0,
                                   std::int64_t k1, float* acc, std::int64_t stride, bool first) {
  std::int64_t r = 0;
  for (; r + kRowTile <= rows; r += kRowTile) tile<kRowTile>(x + r, w, k0, k1, acc + r * stride, stride, first);
  x += r;
  acc += r * stride;
  switch (rows - r) {
    case 5: return tile<5>(x, w, k0, k1, acc, stride, first);
    case 4: return tile<4>(x, w, k0, k1, acc, stride, first);
    case 3: return tile<3>(x, w, k0, k1, acc, stride, first);
    case 2: return tile<2>(x, w, k0, k1, acc, stride, first);
    case 1: return tile<1>(x, w, k0, k1, acc, stride, first);
    default: return;
  }
}

// Everything after the product with the hidden part: acc [D padded] holds it unscaled. Overwrites acc.
[[maybe_unused]] static void finish_row(const RouterArgs& a, const PackedRouter& w, std::int64_t row, float rstd,
                                        float* acc) {
  const std::int64_t width = w.layout.padded_width, panel = w.layout.panel, S = a.sizes.signals, K = a.sizes.actions;
  const float* signals = a.signals + row * a.signals_stride;
  constexpr int kStep = kColumns * W;  // divides the panel
  for (std::int64_t p = 0; p < width; p += kStep) {
    const float* ws = w.signals() + p / panel * panel * S + p % panel;
    vf h[kColumns];
    for (int c = 0; c < kColumns; ++c) h[c] = load(w.b1() + p + c * W);
    for (int c = 0; c < kColumns && a.sizes.hidden; ++c) h[c] += load(acc + p + c * W) * rstd;
    for (std::int64_t j = 0; j < S; ++j) {
      for (int c = 0; c < kColumns; ++c) h[c] += signals[j] * load(ws + j * panel + c * W);
    }
    for (int c = 0; c < kColumns; ++c) store(acc + p + c * W, silu(h[c]));
  }
  float y[kMaxActions + W], e[kMaxActions + W];
  float top = -__builtin_inff();
  float* logits = a.logits + row * K;
  const float scale = a.temperature > 0 ? a.temperature : 1.0f;
  for (std::int64_t k = 0; k < K; ++k) {
    logits[k] = w.b2()[k] + dot(acc, w.w2() + k * width, width) + (a.bias ? a.bias[row * a.bias_stride + k] : 0.0f);
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
    for (std::int64_t p = 0; p < width; p += w.layout.panel) {
      tiles(x, n, w.hidden() + p * H + k0 * w.layout.panel, 0, depth, acc + p, width, k0 == 0);
    }
  }
  for (std::int64_t i = 0; i < n; ++i) {
    finish_row(a, w, begin + i, 1.0f / __builtin_sqrtf(squares[i] / H + a.eps), acc + i * width);
  }
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
