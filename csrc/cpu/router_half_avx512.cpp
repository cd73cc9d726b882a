#include "cpu/router_half.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define RORO_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

namespace roro::cpu {
namespace {

template <int MR>
RORO_BF16 void tile(const HalfProduct& p, std::int64_t row) {
  __m512 c[MR][4];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < 4; ++j) {
      c[i][j] = p.first ? _mm512_setzero_ps() : _mm512_loadu_ps(p.acc + (row + i) * p.acc_stride + j * 16);
    }
  }
  for (std::int64_t k = 0; k < p.depth; k += 2) {
    const bf16* w = p.w + k * 64;
    __m512bh b[4];
    for (int j = 0; j < 4; ++j) b[j] = (__m512bh)_mm512_loadu_si512(w + j * 32);
    for (int i = 0; i < MR; ++i) {
      int pair;
      __builtin_memcpy(&pair, p.x + (row + i) * p.x_stride + k, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < 4; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], x, b[j]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(p.acc + (row + i) * p.acc_stride + j * 16, c[i][j]);
  }
}

}  // namespace

void half_product_avx512(const HalfProduct& p) {
  std::int64_t row = 0;
  for (; row + 6 <= p.rows; row += 6) tile<6>(p, row);
  switch (p.rows - row) {
    case 5: return tile<5>(p, row);
    case 4: return tile<4>(p, row);
    case 3: return tile<3>(p, row);
    case 2: return tile<2>(p, row);
    case 1: return tile<1>(p, row);
    default: return;
  }
}

}  // namespace roro::cpu

#else

namespace roro::cpu {
void half_product_avx512(const HalfProduct&) {}
}  // namespace roro::cpu

#endif
