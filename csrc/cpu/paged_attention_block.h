// One block of keys and values for the rows of one key head, compiled per instruction set; see foreach_isa.h.
//
// Scores by a product with the transposed keys, online softmax (per row the running maximum m, the sum l of
// 2^(score - m), and the unnormalised output), output by a product with the values.

#include "cpu/float_product.h"

constexpr int kTile = kAttentionTile;

// Keys and values of one block, where they lie or staged: n rows each.
struct TokenTile {
  const char *k[kTile], *v[kTile];
  std::int64_t n;
};

// What attend<kHalf> works with: bf16 queries, keys and values as they are, or all of them as float.
template <bool kHalf>
struct Work {
  using T = std::conditional_t<kHalf, bf16, float>;
  std::int64_t count, dim, depth, columns;  // rows; head dimension, padded as the products with keys and values need it
  T* q;                                     // [rows][depth]
  T *kt, *v;                                // the block's keys and values in panels, as the products read them
  T *stage_k, *stage_v;                     // [kTile][depth], [kTile][columns], for what cannot be used where it lies
  float* s;                                 // scores [rows][kTile]
  T* p;                                     // weights [rows][kTile]; in the place of s for float
  float *m, *top, *factor;                  // [rows]
  float* l;                                 // [rows][W], to be added up
  float* out;                               // [rows][columns]
  std::int64_t visible[kAttentionRows];     // tokens that a row sees
  const T *q_rows[kAttentionRows], *p_rows[kAttentionRows];
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

// Keys as panels [depth in words][panel] of `panel` tokens; a word is a float or a pair of bf16.
RORO_INLINE void pack_keys(const TokenTile& t, std::int64_t words, std::int64_t columns, std::int64_t panel,
                           float* to) {
  for (std::int64_t c = 0; c < columns; c += panel) {
    const std::int64_t width = columns - c < panel ? columns - c : panel;
    for (std::int64_t i = 0; i < width; i += W) transpose_words(t.k + c + i, words, to + c * words + i, width);
  }
}

// Values as panels [tokens][panel] of floats.
RORO_INLINE void pack_values(const TokenTile& t, std::int64_t columns, float* to) {
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
RORO_INLINE void pack_values(const TokenTile& t, std::int64_t tokens, std::int64_t columns, bf16* to) {
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

RORO_INLINE void store_weights(float* p, vf e) { store(p, e); }

// Rounds halves up: weights are positive.
RORO_INLINE void store_weights(bf16* p, vf e) {
  const vh h = __builtin_convertvector(((vu)e + 0x8000) >> 16, vh);
  __builtin_memcpy(p, &h, sizeof h);
}

RORO_INLINE vf before(std::int64_t at, std::int64_t seen, vf yes, vf no) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane + static_cast<std::int32_t>(at) < static_cast<std::int32_t>(seen) ? yes : no;
}

// Weights of one row from its scores, the first `seen` of which count.
template <bool kMasked, typename T>
RORO_INLINE vf row_weights(const float* s, std::int64_t columns, std::int64_t seen, float scale, float top, T* p) {
  vf total{};
  for (std::int64_t j = 0; j < columns; j += W) {
    vf e = exp2(load(s + j) * scale - top);
    if (kMasked) e = before(j, seen, e, vf{});
    store_weights(p + j, e);
    total += e;
  }
  return total;
}

// Scores to weights for rows [first, last); their sums and outputs are rescaled to the new maxima.
template <bool kHalf>
RORO_INLINE void softmax(const Work<kHalf>& w, std::int64_t first, std::int64_t last, std::int64_t begin,
                         std::int64_t columns, float scale) {
  const auto seen = [&](std::int64_t i) { return w.visible[i] - begin; };
  for (std::int64_t i = first; i < last; ++i) {
    const float* s = w.s + i * kTile;
    const std::int64_t n = seen(i);
    vf top = splat(-__builtin_inff());
    if (n >= columns) {
      for (std::int64_t j = 0; j < columns; j += W) top = maximum(top, load(s + j));
    } else {
      for (std::int64_t j = 0; j < n; j += W) top = maximum(top, before(j, n, load(s + j), top));
    }
    const float now = largest(top) * scale;
    w.top[i] = now > w.m[i] ? now : w.m[i];
  }
  for (std::int64_t i = first; i < last; i += W) {
    const std::int64_t n = last - i < W ? last - i : W;
    const vf top = load_some(w.top + i, n);
    store_some(w.factor + i, exp2(load_some(w.m + i, n) - top), n);
    store_some(w.m + i, top, n);
  }
  for (std::int64_t i = first; i < last; ++i) {
    const float *s = w.s + i * kTile, factor = w.factor[i];
    auto* p = w.p + i * kTile;
    const vf total = seen(i) >= columns ? row_weights<false>(s, columns, 0, scale, w.m[i], p)
                                        : row_weights<true>(s, columns, seen(i), scale, w.m[i], p);
    store(w.l + i * W, load(w.l + i * W) * factor + total);
    if (factor == 1) continue;
    float* out = w.out + i * w.columns;
    for (std::int64_t j = 0; j < w.columns; j += W) store(out + j, load(out + j) * factor);
  }
}

// Rows [first, last) over one block, of which each sees at least one token.
RORO_INLINE void attend_block(const Work<false>& w, HalfProductFunction, std::int64_t first, std::int64_t last,
                              std::int64_t begin, const TokenTile& t, float scale) {
  const std::int64_t tokens = round_up(t.n, W);
  pack_keys(t, w.depth, tokens, kPanel, w.kt);
  for (std::int64_t c = 0; c < tokens; c += kPanel) {
    const std::int64_t width = tokens - c < kPanel ? tokens - c : kPanel;
    product(w.q_rows + first, last - first, w.kt + c * w.depth, width, w.depth, w.s + first * kTile + c, kTile, true);
  }
  softmax(w, first, last, begin, tokens, scale);
  pack_values(t, w.columns, w.v);
  for (std::int64_t c = 0; c < w.columns; c += kPanel) {
    const std::int64_t width = w.columns - c < kPanel ? w.columns - c : kPanel;
    product(w.p_rows + first, last - first, w.v + c * kTile, width, t.n, w.out + first * w.columns + c, w.columns,
            false);
  }
}

RORO_INLINE void attend_block(const Work<true>& w, HalfProductFunction product, std::int64_t first, std::int64_t last,
                              std::int64_t begin, const TokenTile& t, float scale) {
  const bool tiles = half_product_has_tiles();
  const std::int64_t rows = last - first, tokens = round_up(t.n, tiles ? 32 : 16);
  const std::int64_t depth = tiles ? tokens : round_up(t.n, 2);
  pack_keys(t, w.depth / 2, tokens, kHalfPanel, reinterpret_cast<float*>(w.kt));
  product({w.q_rows + first, w.depth, w.kt, tokens, rows, w.depth, w.s + first * kTile, kTile, true});
  softmax(w, first, last, begin, tokens, scale);
  pack_values(t, depth, w.columns, w.v);
  if (tiles) {  // whole tiles of rows are added to the output: those beyond `last` add nothing
    __builtin_memset(w.p + last * kTile, 0, (round_up(rows, kTileRows) - rows) * kTile * sizeof(bf16));
  }
  for (std::int64_t c = 0; c < w.columns; c += kHalfPanel) {
    const std::int64_t width = w.columns - c < kHalfPanel ? w.columns - c : kHalfPanel;
    product({w.p_rows + first, kTile, w.v + c * kTile, width, rows, depth, w.out + first * w.columns + c, w.columns,
             false});
  }
}
