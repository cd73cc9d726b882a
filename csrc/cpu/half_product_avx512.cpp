#include "cpu/half_product.h"

#include "cpu/target.h"

#if defined(__x86_64__)

RORO_BEGIN_TARGET(RORO_AVX512_BF16)

namespace roro::cpu {
namespace {

template <int MR, int NV>
void tile(const HalfProduct& p, std::int64_t row) {
  __m512 c[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      c[i][j] = p.first ? _mm512_setzero_ps() : _mm512_loadu_ps(p.acc + (row + i) * p.acc_stride + j * 16);
    }
  }
  const bf16* const* x = p.x + row;
  const std::int64_t step = p.w_step();
  const bf16* w = p.w;
  for (std::int64_t k = 0; k < p.depth; k += 2, w += step) {
    __m512bh b[NV];
    for (int j = 0; j < NV; ++j) b[j] = (__m512bh)_mm512_loadu_si512(w + j * 32);
    for (int i = 0; i < MR; ++i) {
      int pair;
      __builtin_memcpy(&pair, x[i] + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < NV; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], both, b[j]);
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(p.acc + (row + i) * p.acc_stride + j * 16, c[i][j]);
  }
}

template <int NV>
void tiles(const HalfProduct& p) {
  std::int64_t row = 0;
  for (; row + 6 <= p.rows; row += 6) tile<6, NV>(p, row);
  switch (p.rows - row) {
    case 5: return tile<5, NV>(p, row);
    case 4: return tile<4, NV>(p, row);
    case 3: return tile<3, NV>(p, row);
    case 2: return tile<2, NV>(p, row);
    case 1: return tile<1, NV>(p, row);
    default: return;
  }
}

}  // namespace

void half_product_avx512(const HalfProduct& p) {
  switch (p.panel) {
    case 64: return tiles<4>(p);
    case 48: return tiles<3>(p);
    case 32: return tiles<2>(p);
    default: return tiles<1>(p);
  }
}

float half_squares(const bf16* x, std::int64_t n) {
  __m512 a = _mm512_setzero_ps(), b = a;
  std::int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512bh p = (__m512bh)_mm512_loadu_si512(x + i), q = (__m512bh)_mm512_loadu_si512(x + i + 32);
    a = _mm512_dpbf16_ps(a, p, p);
    b = _mm512_dpbf16_ps(b, q, q);
  }
  for (; i < n; i += 32) {
    const __mmask32 some = n - i < 32 ? (1u << (n - i)) - 1 : ~0u;
    const __m512bh p = (__m512bh)_mm512_maskz_loadu_epi16(some, x + i);
    a = _mm512_dpbf16_ps(a, p, p);
  }
  float part[16];
  _mm512_storeu_ps(part, _mm512_add_ps(a, b));
  for (int half = 8; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) part[j] += part[j + half];
  }
  return part[0];
}

}  // namespace roro::cpu

RORO_END_TARGET

#else

namespace roro::cpu {
void half_product_avx512(const HalfProduct&) {}
float half_squares(const bf16*, std::int64_t) { return 0; }
}  // namespace roro::cpu

#endif
