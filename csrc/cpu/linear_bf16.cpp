// bf16 rows times panels by the pairwise dot product of AVX512-BF16.
#include "cpu/linear.h"
#include "cpu/linear_tile.h"
#include "cpu/target.h"

#if defined(__x86_64__)

#define RORO_WIDTH 16
#define RORO_NATIVE_BF16

RORO_BEGIN_TARGET(RORO_AVX512_BF16)

namespace roro::cpu {
namespace avx512_bf16 {

#include "cpu/vec.h"

#include "cpu/linear_finish.h"

template <int MR, int NR>
void multiply(const LinearTile& t) {
  __m512 c[MR][NR];
  const __mmask16 kept = t.first ? 0 : 0xffff;
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) c[i][j] = _mm512_maskz_loadu_ps(kept, t.sums + i * kTileColumns + j * 16);
  }
  const bf16 *x = static_cast<const bf16*>(t.x), *w = static_cast<const bf16*>(t.w);
  const char* ahead = t.ahead;
  for (std::int64_t k = 0; k < t.depth; k += 8, w += 4 * t.w_stride) {
    if (ahead) ahead = prefetch(ahead, t.ahead_lines);
    for (int u = 0; u < 8; u += 2) {
      __m512bh b[NR];
      for (int j = 0; j < NR; ++j) b[j] = (__m512bh)_mm512_loadu_si512(w + u / 2 * t.w_stride + j * 32);
      for (int i = 0; i < MR; ++i) {
        int pair;
        __builtin_memcpy(&pair, x + i * t.x_stride + k + u, 4);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
        for (int j = 0; j < NR; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], a, b[j]);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) _mm512_storeu_ps(t.sums + i * kTileColumns + j * 16, c[i][j]);
  }
}

template <int MR>
void multiply_panels(const LinearTile& t, std::int64_t panels) {
  switch (panels) {
    case 4: return multiply<MR, 4>(t);
    case 3: return multiply<MR, 3>(t);
    case 2: return multiply<MR, 2>(t);
    default: return multiply<MR, 1>(t);
  }
}

}  // namespace avx512_bf16

void linear_tile_avx512_bf16(const LinearTile& t, std::int64_t rows, std::int64_t panels) {
  switch (rows) {
    case 6: return avx512_bf16::multiply_panels<6>(t, panels);
    case 5: return avx512_bf16::multiply_panels<5>(t, panels);
    case 4: return avx512_bf16::multiply_panels<4>(t, panels);
    case 3: return avx512_bf16::multiply_panels<3>(t, panels);
    case 2: return avx512_bf16::multiply_panels<2>(t, panels);
    default: return avx512_bf16::multiply_panels<1>(t, panels);
  }
}

void linear_finish_avx512_bf16(const LinearArgs& a, const float* bias, std::int64_t row, std::int64_t rows,
                               std::int64_t panel, std::int64_t panels, const float* sums) {
  avx512_bf16::finish(a, bias, row, rows, panel, panels, sums);
}

}  // namespace roro::cpu

RORO_END_TARGET

#else

namespace roro::cpu {
void linear_tile_avx512_bf16(const LinearTile&, std::int64_t, std::int64_t) {}
void linear_finish_avx512_bf16(const LinearArgs&, const float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                               const float*) {}
}  // namespace roro::cpu

#endif
