// One block of keys and values for the rows of one key head, compiled per instruction set; see foreach_isa.h.
//
// Scores by a product with the transposed keys, online softmax (per row the running maximum m, the sum l of
// 2^(score - m), and the unnormalised output), output by a product with the values.

#include "cpu/float_product.h"

constexpr int kTile = kAttentionTile;
constexpr int kFewRows = 4;
constexpr int kRowSteps = 6;  // of rows ahead, while one row's scores become weights

// Keys and values of one block, where they lie or staged: n rows each of so many bytes, then zeros.
struct TokenTile {
  const char *k[kTile], *v[kTile];
  std::int64_t n, k_bytes, v_bytes;
};

// What attend<kHalf> works with: bf16 queries, keys and values as they are, or all of them as float.
template <bool kHalf>
struct Buffers {
  using T = std::conditional_t<kHalf, bf16, float>;
  std::int64_t dim, depth, columns;  // head dimension, padded as the products with keys and values need it
  T *kt, *v;                         // the block's keys and values in panels, as the products read them
  T *stage_k, *stage_v;              // [kTile][depth], [kTile][columns], for what cannot be used where it lies
  float* s;                          // scores of some rows [kSomeRows][kTile]
  T* p;                              // their weights [kSomeRows][kTile]; in the place of s for float
};

// And the rows of one head.
template <bool kHalf>
struct Work : Buffers<kHalf> {
  using T = typename Buffers<kHalf>::T;
  std::int64_t count;                    // of rows
  T* q;                                  // [rows][depth]
  float* m;                              // [rows]
  float* l;                              // [rows][W], to be added up
  float* out;                            // [rows][columns]
  std::int64_t visible[kAttentionRows];  // tokens that a row sees
  const T *q_rows[kAttentionRows], *p_rows[kSomeRows];
};

static_assert(sizeof(Work<true>) <= kWorkBytes && sizeof(Work<false>) <= kWorkBytes);

// -- one block of keys and values -------------------------------------------------------------------------------------

// to[w * step ..] = words [w .. w + W) of W rows, transposed; `words` is a multiple of 4.
template <int kQuads>
RORO_INLINE void transpose_quads(const char* const* rows, std::int64_t word, float* to, std::int64_t step) {
  vf a[4][kQuads];
  for (int i = 0; i < 4; ++i) load_quads(rows + i, word * 4, a[i]);
  for (int j = 0; j < kQuads; ++j) {
    const vf p = low_pairs(a[0][j], a[1][j]), q = low_pairs(a[2][j], a[3][j]);
    const vf r = high_pairs(a[0][j], a[1][j]), s = high_pairs(a[2][j], a[3][j]);
    float* at = to + (word + 4 * j) * step;
    store(at, low_halves(p, q));
    store(at + step, high_halves(p, q));
    store(at + 2 * step, low_halves(r, s));
    store(at + 3 * step, high_halves(r, s));
  }
}

RORO_INLINE void transpose_words(const char* const* rows, std::int64_t words, float* to, std::int64_t step) {
  std::int64_t word = 0;
  for (; word + 8 <= words; word += 8) transpose_quads<2>(rows, word, to, step);
  if (word < words) transpose_quads<1>(rows, word, to, step);
}

// Asks for W rows from `rows[at]` on, which are read next.
RORO_INLINE void ask_for(const char* const* rows, std::int64_t at, std::int64_t bytes) {
  for (std::int64_t i = at; i < at + W; ++i) {
    for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(rows[i] + b, 0, 2);
  }
}

// Keys as panels [depth in words][panel] of `panel` tokens; a word is a float or a pair of bf16. Those of the block
// `next` are asked for on the way: all at once they would hold up the reads of this one.
RORO_INLINE void pack_keys(const TokenTile& t, const TokenTile& next, std::int64_t words, std::int64_t columns,
                           std::int64_t panel, float* to) {
  for (std::int64_t c = 0; c < columns; c += panel) {
    const std::int64_t width = columns - c < panel ? columns - c : panel;
    for (std::int64_t i = 0; i < width; i += W) {
      ask_for(next.k, c + i, next.k_bytes);
      transpose_words(t.k + c + i, words, to + c * words + i, width);
    }
  }
  for (std::int64_t i = columns; i < next.n; i += W) ask_for(next.k, i, next.k_bytes);
}

RORO_INLINE void ask_for_values(const TokenTile& next) {
  for (std::int64_t i = 0; i < next.n; i += W) ask_for(next.v, i, next.v_bytes);
}

// Values as panels [tokens][panel] of floats.
RORO_INLINE void pack_values(const TokenTile& t, const TokenTile& next, std::int64_t columns, float* to) {
  ask_for_values(next);
  for (std::int64_t c = 0; c < columns; c += kPanel) {
    const std::int64_t width = columns - c < kPanel ? columns - c : kPanel;
    float* panel = to + c * kTile;
    for (std::int64_t i = 0; i < t.n; ++i) {
      const float* from = reinterpret_cast<const float*>(t.v[i]) + c;
      for (std::int64_t j = 0; j < width; j += W) store(panel + i * width + j, load(from + j));
    }
  }
}

// Values as panels [tokens / 2][panel][2] of bf16; `tokens` is even.
RORO_INLINE void pack_values(const TokenTile& t, const TokenTile& next, std::int64_t tokens, std::int64_t columns,
                             bf16* to) {
  ask_for_values(next);
  for (std::int64_t c = 0; c < columns; c += kHalfPanel) {
    const std::int64_t width = columns - c < kHalfPanel ? columns - c : kHalfPanel;
    bf16* panel = to + c * kTile;
    for (std::int64_t i = 0; i < tokens; i += 2) {
      const bf16 *p = reinterpret_cast<const bf16*>(t.v[i]) + c, *q = reinterpret_cast<const bf16*>(t.v[i + 1]) + c;
      for (std::int64_t j = 0; j < width; j += W) {
        const vu both = load_wide(p + j) | load_wide(q + j) << 16;
        __builtin_memcpy(panel + i * width + 2 * j, &both, sizeof both);
      }
    }
  }
}

// 2 * W weights, positive: rounds halves up.
RORO_INLINE void store_weights(bf16* p, vf a, vf b) {
  const vu c = (vu)a + 0x8000, d = (vu)b + 0x8000;
#if RORO_WIDTH == 16
  alignas(64) static const std::uint16_t kHigh[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)c, _mm512_load_si512(kHigh), (__m512i)d));
#else
  const vh low = __builtin_convertvector(c >> 16, vh), high = __builtin_convertvector(d >> 16, vh);
  __builtin_memcpy(p, &low, sizeof low);
  __builtin_memcpy(p + W, &high, sizeof high);
#endif
}

RORO_INLINE void store_weights(float* p, vf a, vf b) {
  store(p, a);
  store(p + W, b);
}

RORO_INLINE vf weight(float, vf y) { return exp2(y); }
RORO_INLINE vf weight(bf16, vf y) { return exp2_for_bf16(y); }

RORO_INLINE vf before(std::int64_t at, std::int64_t seen, vf yes, vf no) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane + static_cast<std::int32_t>(at) < static_cast<std::int32_t>(seen) ? yes : no;
}

// Of a row's scores, `columns` of them (a multiple of W), the first `seen` count.
RORO_INLINE vf row_top(const float* s, std::int64_t columns, std::int64_t seen) {
  vf top = splat(-__builtin_inff());
  if (seen >= columns) {
    for (std::int64_t j = 0; j < columns; j += W) top = maximum(top, load(s + j));
  } else {
    for (std::int64_t j = 0; j < seen; j += W) top = maximum(top, before(j, seen, load(s + j), top));
  }
  return top;
}

// Weights of a row from its scores; `p` has room for an even number of vectors. Returns their sums.
template <bool kMasked, typename T>
RORO_INLINE vf row_weights(const float* s, std::int64_t columns, std::int64_t seen, float scale, float top, T* p) {
  vf total{};
  for (std::int64_t j = 0; j < columns; j += 2 * W) {
    vf a = weight(T{}, load(s + j) * scale - top), b{};
    if (kMasked) a = before(j, seen, a, vf{});
    total += a;
    if (j + W < columns) {
      b = weight(T{}, load(s + j + W) * scale - top);
      if (kMasked) b = before(j + W, seen, b, vf{});
      total += b;
    }
    store_weights(p + j, a, b);
  }
  return total;
}

// Scores to weights for rows [first, last), at most kSomeRows; their sums and outputs are rescaled to the new maxima.
// kWhole: all rows see all of a whole block. `at`: where their scores and weights lie.
template <bool kWhole, bool kHalf>
RORO_INLINE void softmax(const Work<kHalf>& w, std::int64_t first, std::int64_t last, std::int64_t begin,
                         std::int64_t columns, float scale, std::int64_t at, RowsAhead* ahead) {
  const std::int64_t rows = last - first, width = w.columns, *visible = w.visible + first;
  const float* const s = w.s + at * kTile;  // members are read once: stores of vectors may change anything
  float *const m = w.m + first, *const l = w.l + first * W, *const out = w.out + first * width;
  auto* const p = w.p + at * kTile;
  float top[kSomeRows], by[kSomeRows];
  static_assert(kSomeRows % 4 == 0);
  for (std::int64_t i = 0; i < rows; i += 4) {
    const auto top_of = [&](std::int64_t j) {
      const std::int64_t r = i + j < rows ? i + j : i;
      return kWhole ? row_top(s + r * kTile, kTile, kTile) : row_top(s + r * kTile, columns, visible[r] - begin);
    };
    largest4(top_of(0), top_of(1), top_of(2), top_of(3), top + i);
  }
  for (std::int64_t i = 0; i < rows; i += W) {
    const std::int64_t n = rows - i < W ? rows - i : W;
    const vf before_it = load_some(m + i, n), now = maximum(load_some(top + i, n) * scale, before_it);
    store_some(by + i, exp2(before_it - now), n);
    store_some(m + i, now, n);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    if (ahead) ahead->step(kRowSteps);
    const float *scores = s + i * kTile, factor = by[i];
    const std::int64_t seen = visible[i] - begin;
    const vf total = kWhole            ? row_weights<false>(scores, kTile, 0, scale, m[i], p + i * kTile)
                     : seen >= columns ? row_weights<false>(scores, columns, 0, scale, m[i], p + i * kTile)
                                       : row_weights<true>(scores, columns, seen, scale, m[i], p + i * kTile);
    store(l + i * W, load(l + i * W) * factor + total);
    if (factor == 1) continue;
    float* row = out + i * width;
    for (std::int64_t j = 0; j < width; j += W) store(row + j, load(row + j) * factor);
  }
}

// Scores of rows [first, last) with the first `columns` of the block's packed keys.
RORO_INLINE void scores(const Work<false>& w, HalfProductFunction, std::int64_t first, std::int64_t last,
                        std::int64_t tokens, std::int64_t columns) {
  for (std::int64_t c = 0; c < columns; c += kPanel) {
    const std::int64_t panel = tokens - c < kPanel ? tokens - c : kPanel;
    const std::int64_t width = columns - c < kPanel ? columns - c : kPanel;
    product(w.q_rows + first, last - first, w.kt + c * w.depth, width, w.depth, w.s + c, kTile, true, panel);
  }
}

RORO_INLINE void scores(const Work<true>& w, HalfProductFunction product, std::int64_t first, std::int64_t last,
                        std::int64_t tokens, std::int64_t columns) {
  product({w.q_rows + first, w.depth, w.kt, columns, last - first, w.depth, w.s, kTile, true, tokens});
}

// acc[MR][NV vectors] += p[MR][depth] * values[depth], where they lie; as product_tile does it.
template <int MR, int NV>
RORO_INLINE void add_values(const float* const* p, const char* const* values, std::int64_t column, std::int64_t depth,
                            float* acc, std::int64_t stride) {
  vf c[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) c[i][j] = load(acc + i * stride + j * W);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    const float* v = reinterpret_cast<const float*>(values[k]) + column;
    for (int j = 0; j < NV; ++j) {
      const vf b = load(v + j * W);
      for (int i = 0; i < MR; ++i) c[i][j] += p[i][k] * b;
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) store(acc + i * stride + j * W, c[i][j]);
  }
}

// Outputs of up to kFewRows rows: too few to be worth packing the values.
template <int MR>
RORO_INLINE void few_outputs(const Work<false>& w, std::int64_t first, const TokenTile& t, std::int64_t depth) {
  float* out = w.out + first * w.columns;
  std::int64_t c = 0;
  for (; c + kPanel <= w.columns; c += kPanel) {
    add_values<MR, kColumns>(w.p_rows, t.v, c, depth, out + c, w.columns);
  }
  for (; c < w.columns; c += W) add_values<MR, 1>(w.p_rows, t.v, c, depth, out + c, w.columns);
}

RORO_INLINE void few_outputs(const Work<false>& w, std::int64_t first, std::int64_t rows, const TokenTile& t,
                             std::int64_t depth) {
  switch (rows) {
    case 1: return few_outputs<1>(w, first, t, depth);
    case 2: return few_outputs<2>(w, first, t, depth);
    case 3: return few_outputs<3>(w, first, t, depth);
    case 4: return few_outputs<4>(w, first, t, depth);
    default: return;
  }
}

RORO_INLINE void few_outputs(const Work<true>&, std::int64_t, std::int64_t, const TokenTile&, std::int64_t) {}

// Adds the weighted sums of the block's first `depth` values to the outputs of rows [first, last).
RORO_INLINE void outputs(const Work<false>& w, HalfProductFunction, std::int64_t first, std::int64_t last,
                         std::int64_t depth) {
  for (std::int64_t c = 0; c < w.columns; c += kPanel) {
    const std::int64_t width = w.columns - c < kPanel ? w.columns - c : kPanel;
    product(w.p_rows, last - first, w.v + c * kTile, width, depth, w.out + first * w.columns + c, w.columns, false);
  }
}

RORO_INLINE void outputs(const Work<true>& w, HalfProductFunction product, std::int64_t first, std::int64_t last,
                         std::int64_t depth) {
  const std::int64_t rows = last - first;
  if (half_product_has_tiles()) {  // whole tiles of rows are added to the output: those beyond `last` add nothing
    __builtin_memset(w.p + rows * kTile, 0, (round_up(rows, kTileRows) - rows) * kTile * sizeof(bf16));
  }
  for (std::int64_t c = 0; c < w.columns; c += kHalfPanel) {
    const std::int64_t width = w.columns - c < kHalfPanel ? w.columns - c : kHalfPanel;
    product({w.p_rows, kTile, w.v + c * kTile, width, rows, depth, w.out + first * w.columns + c, w.columns, false});
  }
}

// How much of the n tokens from `begin` on rows [first, last) see: the most of any, and whether all see a whole block.
struct Sight {
  std::int64_t most;
  bool whole;
};

RORO_INLINE Sight sight(const std::int64_t* visible, std::int64_t first, std::int64_t last, std::int64_t begin,
                        std::int64_t n) {
  std::int64_t least = kTile, most = 0;
  for (std::int64_t i = first; i < last; ++i) {
    const std::int64_t seen = visible[i] - begin;
    least = seen < least ? seen : least;
    most = seen > most ? seen : most;
  }
  return {most < n ? most : n, least == kTile};
}

template <bool kHalf>
RORO_INLINE void weigh(const Work<kHalf>& w, std::int64_t first, std::int64_t last, std::int64_t begin,
                       std::int64_t columns, bool whole, float scale, std::int64_t at = 0,
                       RowsAhead* ahead = nullptr) {
  whole ? softmax<true>(w, first, last, begin, columns, scale, at, ahead)
        : softmax<false>(w, first, last, begin, columns, scale, at, ahead);
}

// Rows [first, last) over one block, of which each sees at least one token. Some rows at a time, whose scores stay in
// the first cache, and of the block only what the last of them sees. `next` is the block after it.
template <bool kHalf>
RORO_INLINE void attend_block(const Work<kHalf>& w, HalfProductFunction product, std::int64_t first, std::int64_t last,
                              std::int64_t begin, const TokenTile& t, const TokenTile& next, float scale) {
  const bool tiles = kHalf && half_product_has_tiles();
  const std::int64_t column_step = tiles ? 32 : kHalf ? 16 : W, depth_step = tiles ? 32 : kHalf ? 2 : 1;
  const std::int64_t some = tiles ? kSomeRows : kSomeRows / 24 * 24;  // in whole tiles of rows
  const std::int64_t tokens = round_up(t.n, column_step);
  const bool few = !kHalf && last - first <= kFewRows;
  if constexpr (kHalf) {
    pack_keys(t, next, w.depth / 2, tokens, kHalfPanel, reinterpret_cast<float*>(w.kt));
    pack_values(t, next, round_up(t.n, depth_step), w.columns, w.v);
  } else {
    pack_keys(t, next, w.depth, tokens, kPanel, w.kt);
    few ? ask_for_values(next) : pack_values(t, next, w.columns, w.v);
  }
  for (std::int64_t after; first < last; first = after) {
    after = last - first < some ? last : first + some;
    const Sight seen = sight(w.visible, first, after, begin, t.n);
    const std::int64_t n = seen.most, columns = round_up(n, column_step);
    scores(w, product, first, after, tokens, columns);
    weigh(w, first, after, begin, columns, seen.whole, scale);
    few ? few_outputs(w, first, after - first, t, n) : outputs(w, product, first, after, round_up(n, depth_step));
  }
}
