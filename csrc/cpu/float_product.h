// acc[rows][columns] (+)= x[rows][depth] * w[depth][columns] in float, compiled per instruction set; see foreach_isa.h.
// Every element is one chain of sums along the depth: it is the same whatever rows and columns are beside it.

constexpr int kColumns = W == 16 ? 4 : 2;  // vectors in a panel of w
constexpr int kPanel = kColumns * W;
constexpr int kRowTile = 6;  // with kColumns vectors each: fits the registers

template <int MR, int NV>
RORO_INLINE void product_tile(const float* const* x, const float* w, std::int64_t step, std::int64_t depth, float* acc,
                              std::int64_t stride, bool first) {
  vf c[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) c[i][j] = first ? vf{} : load(acc + i * stride + j * W);
  }
  for (std::int64_t k = 0; k < depth; ++k, w += step) {
    vf b[NV];
    for (int j = 0; j < NV; ++j) b[j] = load(w + j * W);
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < NV; ++j) c[i][j] += x[i][k] * b[j];
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) store(acc + i * stride + j * W, c[i][j]);
  }
}

template <int NV>
RORO_INLINE void product_rows(const float* const* x, std::int64_t rows, const float* w, std::int64_t step,
                              std::int64_t depth, float* acc, std::int64_t stride, bool first) {
  for (; rows >= kRowTile; rows -= kRowTile, x += kRowTile, acc += kRowTile * stride) {
    product_tile<kRowTile, NV>(x, w, step, depth, acc, stride, first);
  }
  switch (rows) {
    case 5: return product_tile<5, NV>(x, w, step, depth, acc, stride, first);
    case 4: return product_tile<4, NV>(x, w, step, depth, acc, stride, first);
    case 3: return product_tile<3, NV>(x, w, step, depth, acc, stride, first);
    case 2: return product_tile<2, NV>(x, w, step, depth, acc, stride, first);
    case 1: return product_tile<1, NV>(x, w, step, depth, acc, stride, first);
    default: return;
  }
}

// `columns`: W to kPanel in steps of W, `step` floats from one row of w to the next.
[[maybe_unused]] static void product(const float* const* x, std::int64_t rows, const float* w, std::int64_t columns,
                                     std::int64_t depth, float* acc, std::int64_t stride, bool first,
                                     std::int64_t step) {
  if (columns == W) return product_rows<1>(x, rows, w, step, depth, acc, stride, first);
  if (columns == 2 * W) return product_rows<2>(x, rows, w, step, depth, acc, stride, first);
#if RORO_WIDTH == 16
  if (columns == 3 * W) return product_rows<3>(x, rows, w, step, depth, acc, stride, first);
  return product_rows<4>(x, rows, w, step, depth, acc, stride, first);
#endif
}

[[maybe_unused]] static void product(const float* const* x, std::int64_t rows, const float* w, std::int64_t columns,
                                     std::int64_t depth, float* acc, std::int64_t stride, bool first) {
  product(x, rows, w, columns, depth, acc, stride, first, columns);
}
