// The products of half_product_avx512.cpp for a few rows of x, with w read where it lies: it is put in order in
// registers, once, where a packed copy would be written and read again.
#include "cpu/half_product.h"

#include "cpu/target.h"

#if defined(__x86_64__)

RORO_BEGIN_TARGET(RORO_AVX512_BF16)

namespace roro::cpu {
namespace {

constexpr int kWords = 8;  // pairs of bf16 that are put in order at a time

// Masks of all ones: gcc 12 warns of the plain forms in its own headers.
inline __m512 even_quads(__m512 a, __m512 b) { return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88); }
inline __m512 odd_quads(__m512 a, __m512 b) { return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd); }

// 32 bytes of `low`, then of `high`.
inline __m512 both(const char* low, const char* high) {
  const __m512 half = _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(low)));
  return _mm512_mask_broadcast_f32x8(half, 0xff00, _mm256_loadu_ps(reinterpret_cast<const float*>(high)));
}

// to[w] = word w of the 32 bytes at `at` of 16 rows.
inline void transpose(const char* const* rows, std::int64_t at, __m512bh (&to)[kWords]) {
  __m512 low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 p = both(rows[i] + at, rows[4 + i] + at), q = both(rows[8 + i] + at, rows[12 + i] + at);
    low[i] = even_quads(p, q);
    high[i] = odd_quads(p, q);
  }
  const auto order = [&](const __m512 (&a)[4], int first) {
    const __m512d p = (__m512d)_mm512_unpacklo_ps(a[0], a[1]), q = (__m512d)_mm512_unpacklo_ps(a[2], a[3]);
    const __m512d r = (__m512d)_mm512_unpackhi_ps(a[0], a[1]), s = (__m512d)_mm512_unpackhi_ps(a[2], a[3]);
    to[first] = (__m512bh)_mm512_unpacklo_pd(p, q);
    to[first + 1] = (__m512bh)_mm512_unpackhi_pd(p, q);
    to[first + 2] = (__m512bh)_mm512_unpacklo_pd(r, s);
    to[first + 3] = (__m512bh)_mm512_unpackhi_pd(r, s);
  };
  order(low, 0);
  order(high, 4);
}

inline __m512bh pair(const bf16* x) {
  int bits;
  __builtin_memcpy(&bits, x, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

// 16 * G columns from `column` on.
template <int MR, int G>
void columns(const HalfRows& p, std::int64_t column) {
  __m512 c[MR][G];
  for (int i = 0; i < MR; ++i) {
    for (int g = 0; g < G; ++g) c[i][g] = _mm512_setzero_ps();
  }
  for (std::int64_t k = 0; k < p.depth; k += 2 * kWords) {
    p.ahead->step(kColumnSteps * G);
    __m512bh b[G][kWords];
    for (int g = 0; g < G; ++g) transpose(p.w + column + 16 * g, p.w_offset + 2 * k, b[g]);
    for (int w = 0; w < kWords; ++w) {
      for (int i = 0; i < MR; ++i) {
        const __m512bh a = pair(p.x[i] + k + 2 * w);
        for (int g = 0; g < G; ++g) c[i][g] = _mm512_dpbf16_ps(c[i][g], a, b[g][w]);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(p.acc + i * p.acc_stride + column + 16 * g, c[i][g]);
  }
}

template <int MR>
void by_columns(const HalfRows& p) {
  std::int64_t c = 0;
  for (; c + 32 <= p.columns; c += 32) columns<MR, 2>(p, c);
  if (c < p.columns) columns<MR, 1>(p, c);
}

// 32 * NV columns from `column` on. Two rows of w side by side come out of the unpacking in quads: 0 2 4 6, 1 3 5 7.
template <int MR, int NV>
void depths(const HalfRows& p, std::int64_t column) {
  const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const std::int64_t at = p.w_offset + 2 * column;
  __m512 even[MR][NV], odd[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      const float* acc = p.acc + i * p.acc_stride + column + 32 * j;
      const __m512 a = _mm512_loadu_ps(acc), b = _mm512_loadu_ps(acc + 16);
      even[i][j] = even_quads(a, b);
      odd[i][j] = odd_quads(a, b);
    }
  }
  for (std::int64_t k = 0; k < p.depth; k += 2) {
    p.ahead->step();
    const char *u = p.w[k] + at, *v = p.w[k + 1] + at;
    __m512bh e[NV], o[NV];
    for (int j = 0; j < NV; ++j) {
      const __m512i a = _mm512_loadu_si512(u + 64 * j), b = _mm512_loadu_si512(v + 64 * j);
      e[j] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      o[j] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
    for (int i = 0; i < MR; ++i) {
      const __m512bh x = pair(p.x[i] + k);
      for (int j = 0; j < NV; ++j) {
        even[i][j] = _mm512_dpbf16_ps(even[i][j], x, e[j]);
        odd[i][j] = _mm512_dpbf16_ps(odd[i][j], x, o[j]);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) {
      float* acc = p.acc + i * p.acc_stride + column + 32 * j;
      _mm512_storeu_pd(acc, _mm512_permutex2var_pd((__m512d)even[i][j], lower, (__m512d)odd[i][j]));
      _mm512_storeu_pd(acc + 16, _mm512_permutex2var_pd((__m512d)even[i][j], upper, (__m512d)odd[i][j]));
    }
  }
}

template <int MR>
void by_depth(const HalfRows& p) {
  std::int64_t c = 0;
  for (; c + 64 <= p.columns; c += 64) depths<MR, 2>(p, c);
  if (c < p.columns) depths<MR, 1>(p, c);
}

}  // namespace

void half_rows_by_columns(const HalfRows& p, std::int64_t rows) {
  switch (rows) {
    case 4: return by_columns<4>(p);
    case 3: return by_columns<3>(p);
    case 2: return by_columns<2>(p);
    default: return by_columns<1>(p);
  }
}

void half_rows_by_depth(const HalfRows& p, std::int64_t rows) {
  switch (rows) {
    case 4: return by_depth<4>(p);
    case 3: return by_depth<3>(p);
    case 2: return by_depth<2>(p);
    default: return by_depth<1>(p);
  }
}

}  // namespace roro::cpu

RORO_END_TARGET

#else

namespace roro::cpu {
void half_rows_by_columns(const HalfRows&, std::int64_t) {}
void half_rows_by_depth(const HalfRows&, std::int64_t) {}
}  // namespace roro::cpu

#endif
