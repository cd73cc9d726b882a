// What is done to finished sums; compiled per instruction set, see foreach_isa.h.

RORO_INLINE vf silu_as(float, vf x) { return silu(x); }
RORO_INLINE vf silu_as(bf16, vf x) { return silu_for_bf16(x); }

// kGated: panels of gate and up alternate.
template <typename T, bool kGated, bool kBias>
RORO_INLINE void finish_rows(const LinearArgs& a, const float* bias, std::int64_t row, std::int64_t rows,
                             std::int64_t panel, std::int64_t panels, const float* sums) {
  constexpr std::int64_t kPair = kGated ? 2 : 1;
  const std::int64_t width = a.sizes.columns / kPair, column = panel / kPair * 16;
  const std::int64_t n = width - column < panels / kPair * 16 ? width - column : panels / kPair * 16;
  for (std::int64_t i = 0; i < rows; ++i, sums += kTileColumns) {
    T* out = static_cast<T*>(a.out) + (row + i) * a.out_stride + column;
    for (std::int64_t j = 0; j < n; j += W) {
      const auto take = [&](std::int64_t at) {
        const vf v = load(sums + at);
        return kBias ? v + load(bias + panel * 16 + at) : v;
      };
      const vf v = kGated ? silu_as(T{}, take(j / 16 * 32 + j % 16)) * take(j / 16 * 32 + 16 + j % 16) : take(j);
      n - j >= W ? store(out + j, v) : store_some(out + j, v, n - j);
    }
  }
}

template <typename T>
RORO_INLINE void finish_typed(const LinearArgs& a, const float* bias, std::int64_t row, std::int64_t rows,
                              std::int64_t panel, std::int64_t panels, const float* sums) {
  if (a.sizes.gated) {
    bias ? finish_rows<T, true, true>(a, bias, row, rows, panel, panels, sums)
         : finish_rows<T, true, false>(a, bias, row, rows, panel, panels, sums);
  } else {
    bias ? finish_rows<T, false, true>(a, bias, row, rows, panel, panels, sums)
         : finish_rows<T, false, false>(a, bias, row, rows, panel, panels, sums);
  }
}

[[maybe_unused]] static void finish(const LinearArgs& a, const float* bias, std::int64_t row, std::int64_t rows,
                                    std::int64_t panel, std::int64_t panels, const float* sums) {
  a.out_type == DType::f32 ? finish_typed<float>(a, bias, row, rows, panel, panels, sums)
                           : finish_typed<bf16>(a, bias, row, rows, panel, panels, sums);
}
