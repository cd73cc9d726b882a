// Rows times panels in plain vectors; compiled per instruction set, see foreach_isa.h.
#include "cpu/linear_finish.h"

constexpr int kLinearRows = W == 4 ? 3 : 6;
constexpr int kLinearPanels = W == 16 ? 4 : 1;
constexpr int kLinearVectors = 16 / W;  // of a panel

template <int MR, int NV>
RORO_INLINE void load_sums(const LinearTile& t, vf (&c)[MR][NV]) {
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) c[i][j] = t.first ? vf{} : load(t.sums + i * kTileColumns + j * W);
  }
}

template <int MR, int NR>
RORO_INLINE void multiply(const LinearTile& t, float) {
  constexpr int NV = NR * kLinearVectors;
  vf c[MR][NV];
  load_sums(t, c);
  const float *x = static_cast<const float*>(t.x), *w = static_cast<const float*>(t.w);
  const char* ahead = t.ahead;
  for (std::int64_t k = 0; k < t.depth; k += 4) {
    if (ahead) ahead = prefetch(ahead, t.ahead_lines);
    for (int u = 0; u < 4; ++u, w += t.w_stride) {
      vf b[NV];
      for (int j = 0; j < NV; ++j) b[j] = load(w + j * W);
      for (int i = 0; i < MR; ++i) {
        const float a = x[i * t.x_stride + k + u];
        for (int j = 0; j < NV; ++j) c[i][j] += a * b[j];
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) store(t.sums + i * kTileColumns + j * W, c[i][j]);
  }
}

template <int MR, int NR>
RORO_INLINE void multiply(const LinearTile& t, bf16) {
  constexpr int NV = NR * kLinearVectors;
  vf c[MR][NV];
  load_sums(t, c);
  const bf16 *x = static_cast<const bf16*>(t.x), *w = static_cast<const bf16*>(t.w);
  const char* ahead = t.ahead;
  for (std::int64_t k = 0; k < t.depth; k += 2, w += t.w_stride) {
    if (ahead && k % 8 == 0) ahead = prefetch(ahead, t.ahead_lines);
    vf even[NV], odd[NV];
    for (int j = 0; j < NV; ++j) {
      vu pairs;
      __builtin_memcpy(&pairs, w + j * W * 2, sizeof pairs);
      even[j] = (vf)(pairs << 16);
      odd[j] = (vf)(pairs & 0xffff0000u);
    }
    for (int i = 0; i < MR; ++i) {
      const float p = to_float(x[i * t.x_stride + k]), q = to_float(x[i * t.x_stride + k + 1]);
      for (int j = 0; j < NV; ++j) {
        c[i][j] += p * even[j];
        c[i][j] += q * odd[j];
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) store(t.sums + i * kTileColumns + j * W, c[i][j]);
  }
}

template <typename T, int MR>
RORO_INLINE void multiply_panels(const LinearTile& t, std::int64_t panels) {
  if constexpr (kLinearPanels == 4) {
    if (panels == 4) return multiply<MR, 4>(t, T{});
    if (panels == 3) return multiply<MR, 3>(t, T{});
    if (panels == 2) return multiply<MR, 2>(t, T{});
  }
  multiply<MR, 1>(t, T{});
}

template <typename T>
[[maybe_unused]] static void linear_tile(const LinearTile& t, std::int64_t rows, std::int64_t panels) {
  if constexpr (kLinearRows == 6) {
    if (rows == 6) return multiply_panels<T, 6>(t, panels);
    if (rows == 5) return multiply_panels<T, 5>(t, panels);
    if (rows == 4) return multiply_panels<T, 4>(t, panels);
  }
  if (rows == 3) return multiply_panels<T, 3>(t, panels);
  if (rows == 2) return multiply_panels<T, 2>(t, panels);
  multiply_panels<T, 1>(t, panels);
}
