// Vectors of W floats in plain C++ (GCC/Clang vector extensions). No include guard: foreach_isa.h includes it once per
// instruction set, inside a namespace and under the target pragma of that set; RORO_WIDTH is the width in floats.

constexpr int W = RORO_WIDTH;
typedef float vf __attribute__((vector_size(RORO_WIDTH * 4)));
typedef std::int32_t vi __attribute__((vector_size(RORO_WIDTH * 4)));
typedef std::uint32_t vu __attribute__((vector_size(RORO_WIDTH * 4)));
typedef std::uint16_t vh __attribute__((vector_size(RORO_WIDTH * 2)));

#ifndef RORO_INLINE
#define RORO_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#endif

RORO_INLINE vf splat(float x) { return x - vf{}; }

RORO_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// W unsigned 16-bit integers, as 32-bit ones.
RORO_INLINE vu load_wide(const bf16* p) {
#if RORO_WIDTH == 16  // gcc 12 converts halves of the vector instead
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
#endif
}

RORO_INLINE vf load(const bf16* p) { return (vf)(load_wide(p) << 16); }

// To bf16, to nearest even.
RORO_INLINE vh bf16_bits(vf v) {
#if defined(RORO_NATIVE_BF16)  // denormals become 0, which the portable code keeps
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = (vu)v;
  const vu even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((vu)(v != v ? (vi)nan : (vi)even), vh);
#endif
}

RORO_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

RORO_INLINE void store(bf16* p, vf v) {
  const vh h = bf16_bits(v);
  __builtin_memcpy(p, &h, sizeof h);
}

#if RORO_WIDTH == 16

RORO_INLINE unsigned lanes(std::int64_t n) { return (1u << n) - 1; }

// The first n <= W elements, the rest `fill`.
RORO_INLINE vf load_some(const float* p, std::int64_t n, float fill = 0.0f) {
  return (vf)_mm512_mask_loadu_ps((__m512)splat(fill), lanes(n), p);
}

RORO_INLINE vf load_some(const bf16* p, std::int64_t n, float fill = 0.0f) {
  const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16);
  return (vf)_mm512_mask_mov_ps((__m512)splat(fill), lanes(n), (__m512)wide);
}

RORO_INLINE void store_some(float* p, vf v, std::int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), (__m512)v); }

RORO_INLINE void store_some(bf16* p, vf v, std::int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes(n), (__m256i)bf16_bits(v));
}

#else

// The first n <= W elements, the rest `fill`.
RORO_INLINE vf load_some(const float* p, std::int64_t n, float fill = 0.0f) {
  float part[W];
  for (int i = 0; i < W; ++i) part[i] = fill;
  __builtin_memcpy(part, p, n * sizeof(float));
  return load(part);
}

RORO_INLINE vf load_some(const bf16* p, std::int64_t n, float fill = 0.0f) {
  float part[W];
  for (int i = 0; i < W; ++i) part[i] = i < n ? to_float(p[i]) : fill;
  return load(part);
}

template <typename T>
RORO_INLINE void store_some(T* p, vf v, std::int64_t n) {
  T part[W];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

#endif

RORO_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }

typedef float quad __attribute__((vector_size(16)));
typedef float octet __attribute__((vector_size(32)));

// Sums of neighbours W / 4 apart. All sums below are pairwise: their order is fixed.
RORO_INLINE quad fold(vf v) {
#if RORO_WIDTH == 16
  const octet o = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif RORO_WIDTH == 8
  const octet o = v;
#endif
#if RORO_WIDTH >= 8
  return __builtin_shufflevector(o, o, 0, 1, 2, 3) + __builtin_shufflevector(o, o, 4, 5, 6, 7);
#else
  return v;
#endif
}

RORO_INLINE float sum(vf v) {
  const quad q = fold(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

RORO_INLINE float largest(vf v) {
#if RORO_WIDTH == 16
  const octet a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const octet b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const octet o = a > b ? a : b;
#elif RORO_WIDTH == 8
  const octet o = v;
#endif
#if RORO_WIDTH >= 8
  const quad p = __builtin_shufflevector(o, o, 0, 1, 2, 3), q = __builtin_shufflevector(o, o, 4, 5, 6, 7);
  const quad r = p > q ? p : q;
#else
  const quad r = v;
#endif
  const float s = r[0] > r[1] ? r[0] : r[1], t = r[2] > r[3] ? r[2] : r[3];
  return s > t ? s : t;
}

// out[0..3] = the largest of a, b, c, d.
RORO_INLINE void largest4(vf a, vf b, vf c, vf d, float* out) {
#if RORO_WIDTH == 4
  const vf p = maximum(__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7));
  const vf q = maximum(__builtin_shufflevector(c, d, 0, 4, 1, 5), __builtin_shufflevector(c, d, 2, 6, 3, 7));
  store(out, maximum(__builtin_shufflevector(p, q, 0, 1, 4, 5), __builtin_shufflevector(p, q, 2, 3, 6, 7)));
#elif RORO_WIDTH == 8
  const __m256 p = _mm256_max_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
  const __m256 q = _mm256_max_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
  const __m256 r = _mm256_max_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1)));
#else
  const __m512 p = _mm512_max_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 q = _mm512_max_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 r = _mm512_max_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
  const __m256 s = _mm256_max_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#endif
}

// out[j] = four floats at byte `at` + 16 * j of rows[0], rows[4], rows[8], ... side by side.
template <int N>
RORO_INLINE void load_quads(const char* const* rows, std::int64_t at, vf (&out)[N]) {
  quad q[N][W / 4];
  for (int i = 0; i < W / 4; ++i) {
    const char* row = rows[4 * i] + at;
    for (int j = 0; j < N; ++j) __builtin_memcpy(&q[j][i], row + 16 * j, sizeof(quad));
  }
  for (int j = 0; j < N; ++j) {
#if RORO_WIDTH == 16
    const octet low = __builtin_shufflevector(q[j][0], q[j][1], 0, 1, 2, 3, 4, 5, 6, 7);
    const octet high = __builtin_shufflevector(q[j][2], q[j][3], 0, 1, 2, 3, 4, 5, 6, 7);
    out[j] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif RORO_WIDTH == 8
    out[j] = __builtin_shufflevector(q[j][0], q[j][1], 0, 1, 2, 3, 4, 5, 6, 7);
#else
    out[j] = q[j][0];
#endif
  }
}

// Of every four elements: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1, a2 a3 b2 b3.
#if RORO_WIDTH == 16
#define RORO_IN_QUADS(a, b, p, q, r, s)                                                                             \
  __builtin_shufflevector(a, b, p, q, r, s, p + 4, q + 4, r + 4, s + 4, p + 8, q + 8, r + 8, s + 8, p + 12, q + 12, \
                          r + 12, s + 12)
#elif RORO_WIDTH == 8
#define RORO_IN_QUADS(a, b, p, q, r, s) __builtin_shufflevector(a, b, p, q, r, s, p + 4, q + 4, r + 4, s + 4)
#else
#define RORO_IN_QUADS(a, b, p, q, r, s) __builtin_shufflevector(a, b, p, q, r, s)
#endif
RORO_INLINE vf low_pairs(vf a, vf b) { return RORO_IN_QUADS(a, b, 0, W, 1, W + 1); }
RORO_INLINE vf high_pairs(vf a, vf b) { return RORO_IN_QUADS(a, b, 2, W + 2, 3, W + 3); }
RORO_INLINE vf low_halves(vf a, vf b) { return RORO_IN_QUADS(a, b, 0, 1, W, W + 1); }
RORO_INLINE vf high_halves(vf a, vf b) { return RORO_IN_QUADS(a, b, 2, 3, W + 2, W + 3); }
#undef RORO_IN_QUADS

// exp to 2 ulp (Cephes' polynomial); 0 below the smallest normal number.
RORO_INLINE vf exp(vf x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.72f, kMagic = 12582912.0f;  // 1.5 * 2^23
  const vf lowest = splat(kLowest), highest = splat(kHighest);
  const vf y = x < lowest ? lowest : x > highest ? highest : x;
  const vf shifted = y * 1.44269504f + kMagic;
  const vf n = shifted - kMagic;
  vf r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const vi half = ((vi)shifted - 0x4B400000) >> 1, rest = ((vi)shifted - 0x4B400000) - half;
  const vf e = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);  // n reaches 128: 2^n in two factors
  return x < lowest ? vf{} : x != x ? x : e;
}

// 2^y to 2 ulp for y < 127.5 (Cephes' polynomial); 2^-126 below that.
RORO_INLINE vf exp2(vf y) {
  const vf lowest = splat(-126.0f);
  y = y < lowest ? lowest : y;
  const vf shifted = y + 12582912.0f;  // 1.5 * 2^23: the low bits are y, rounded
  const vf r = y - (shifted - 12582912.0f);
  vf p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  return p * (vf)(((vi)shifted << 23) + 0x3f800000);
}

// 2^y to 8e-5 for y < 127.5, a small part of what rounding to bf16 takes; 2^-126 below -126.
RORO_INLINE vf exp2_for_bf16(vf y) {
  y = maximum(y, splat(-126.0f));
  const vf shifted = y + 12582912.0f;
  const vf r = y - (shifted - 12582912.0f);
  const vf p = ((r * 0.05517177f + 0.24261137f) * r + 0.69326097f) * r + 0.99992803f;
  return (vf)((vi)p + ((vi)shifted << 23));
}

RORO_INLINE vf silu_exponent(vf x) {
  constexpr float kLog2E = 1.44269504f;
  const vf y = x * -kLog2E, highest = splat(126.0f);
  return y > highest ? highest : y;
}

RORO_INLINE vf silu(vf x) { return x / (exp2(silu_exponent(x)) + 1.0f); }

// To 2e-4.
RORO_INLINE vf silu_for_bf16(vf x) {
#if RORO_WIDTH == 16
  return x * (vf)_mm512_rcp14_ps((__m512)(exp2_for_bf16(silu_exponent(x)) + 1.0f));
#else
  return silu(x);
#endif
}

// Sum over n elements of a[i] * b[i].
template <typename A, typename B>
RORO_INLINE float dot(const A* a, const B* b, std::int64_t n) {
  vf s0{}, s1{}, s2{}, s3{};
  std::int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + W) * load(b + i + W);
    s2 += load(a + i + 2 * W) * load(b + i + 2 * W);
    s3 += load(a + i + 3 * W) * load(b + i + 3 * W);
  }
  for (; i + W <= n; i += W) s0 += load(a + i) * load(b + i);
  if (i < n) s1 += load_some(a + i, n - i) * load_some(b + i, n - i);
  return sum((s0 + s1) + (s2 + s3));
}
