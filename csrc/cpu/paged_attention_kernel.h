// One item for one key head, compiled per instruction set; see foreach_isa.h.
//
// Rows of an item are (query token, query head) pairs that attend over the same key head. Keys are worked through in
// blocks of kTile (paged_attention_block.h), which always begin at multiples of kTile of the context. Reading a shared
// prefix first and each sequence's own tokens after it is the merge by log-sum-exp, without a second pass.
//
// A row's arithmetic depends on its own query and context alone, whatever rows are beside it: decode, prefill in chunks
// or at once, grouped or not, one thread or more give the same bits.

#include "cpu/paged_attention_block.h"

// -- where keys and values lie ----------------------------------------------------------------------------------------

alignas(64) static const char kZeros[kMaxHeadDim * 4] = {};

// Tokens [begin, begin + n) of a sequence, as they lie in the pages; zeros behind them.
RORO_INLINE void locate(const AttentionArgs& a, std::int64_t sequence, std::int64_t head, std::int64_t begin,
                        std::int64_t n, TokenTile& t) {
  const auto base = [&](const PagedTensor& p, std::int64_t page) {
    return static_cast<const char*>(p.data) + (page * p.page_stride + head * p.head_stride) * bytes_of(p.type);
  };
  const std::int64_t* page = a.table + sequence * a.table_stride + begin / a.page_size;
  const std::int64_t k_step = a.k.token_stride * bytes_of(a.k.type), v_step = a.v.token_stride * bytes_of(a.v.type);
  t.n = n;
  t.k_bytes = a.dim * bytes_of(a.k.type);
  t.v_bytes = a.dim * bytes_of(a.v.type);
  std::int64_t offset = begin % a.page_size, i = 0;
  while (i < n) {
    const char *k = base(a.k, *page) + offset * k_step, *v = base(a.v, *page) + offset * v_step;
    const std::int64_t end = n - i < a.page_size - offset ? n : i + a.page_size - offset;
    for (; i < end; ++i, k += k_step, v += v_step) t.k[i] = k, t.v[i] = v;
    offset = 0;
    ++page;
  }
  for (; i < kTile; ++i) t.k[i] = t.v[i] = kZeros;
}

// The row as `To`, zero-padded.
template <typename To, typename From>
RORO_INLINE void take_row(const From* from, std::int64_t dim, std::int64_t padded, To* to) {
  std::int64_t j = 0;
  if constexpr (std::is_same_v<To, From>) {
    __builtin_memcpy(to, from, dim * sizeof(To));
  } else {
    for (; j + W <= dim; j += W) store(to + j, load(from + j));
    if (j < dim) store_some(to + j, load_some(from + j, dim - j), dim - j);
  }
  for (j = dim; j < padded; ++j) to[j] = To{};
}

template <typename To>
RORO_INLINE void take_row(const void* from, DType type, std::int64_t dim, std::int64_t padded, To* to) {
  type == DType::f32 ? take_row(static_cast<const float*>(from), dim, padded, to)
                     : take_row(static_cast<const bf16*>(from), dim, padded, to);
}

template <typename T>
RORO_INLINE void stage_rows(const char** rows, std::int64_t n, DType type, std::int64_t dim, std::int64_t padded,
                            T* to) {
  if (bytes_of(type) == sizeof(T) && dim == padded) return;
  for (std::int64_t i = 0; i < n; ++i) {
    take_row(rows[i], type, dim, padded, to + i * padded);
    rows[i] = reinterpret_cast<const char*>(to + i * padded);
  }
}

template <typename T>
RORO_INLINE char* cut(T*& p, std::int64_t n, char* memory) {
  p = reinterpret_cast<T*>(memory);
  return memory + round_up(n * sizeof(T), 64);
}

// -- one item ---------------------------------------------------------------------------------------------------------

// Buffers that one head after another uses; returns the memory behind them.
template <bool kHalf>
RORO_INLINE char* share_buffers(const AttentionArgs& a, char* memory, Buffers<kHalf>& w) {
  const bool tiles = kHalf && half_product_has_tiles();
  w.dim = a.dim;
  w.depth = round_up(a.dim, tiles ? 32 : kHalf ? 8 : 4);
  w.columns = round_up(a.dim, tiles ? 32 : kHalf ? 16 : W);
  memory = cut(w.kt, kTile * w.depth, memory);
  memory = cut(w.v, kTile * w.columns, memory);
  memory = cut(w.stage_k, kTile * w.depth, memory);
  memory = cut(w.stage_v, kTile * w.columns, memory);
  memory = cut(w.s, kSomeRows * kTile, memory);
  if constexpr (kHalf) {
    memory = cut(w.p, kSomeRows * kTile, memory);
  } else {
    w.p = w.s;
  }
  return memory;
}

// Buffers and queries of one head; returns the memory behind them.
template <bool kHalf>
RORO_INLINE char* take_queries(const AttentionArgs& a, const Segment* segments, const AttentionItem& item,
                               std::int64_t head, char* memory, Work<kHalf>& w) {
  const bool tiles = kHalf && half_product_has_tiles();
  const std::int64_t ratio = a.heads / a.kv_heads;
  for (std::int64_t i = 0; i < kSomeRows; ++i) w.p_rows[i] = w.p + i * kTile;
  std::int64_t tokens = 0;
  for (std::int64_t s = item.first; s < item.last; ++s) tokens += segments[s].end - segments[s].begin;
  w.count = tokens * ratio;
  const std::int64_t rows = w.count + (tiles ? kTileRows : 0);  // whole tiles from any row on
  memory = cut(w.q, rows * w.depth, memory);
  memory = cut(w.m, w.count, memory);
  memory = cut(w.l, w.count * W, memory);
  memory = cut(w.out, rows * w.columns, memory);
  std::int64_t row = 0;
  for (std::int64_t s = item.first; s < item.last; ++s) {
    const Segment& g = segments[s];
    for (std::int64_t token = g.begin; token < g.end; ++token) {
      for (std::int64_t h = 0; h < ratio; ++h, ++row) {
        const std::int64_t at = token * a.q_token_stride + (head * ratio + h) * a.q_head_stride;
        take_row(static_cast<const char*>(a.q) + at * bytes_of(a.type), a.type, a.dim, w.depth, w.q + row * w.depth);
        w.visible[row] = a.kv_lens[g.sequence] - (a.cu_seqlens[g.sequence + 1] - token) + 1;
        w.q_rows[row] = w.q + row * w.depth;
        w.m[row] = -__builtin_inff();
      }
    }
  }
  __builtin_memset(w.q + w.count * w.depth, 0, (rows - w.count) * w.depth * sizeof *w.q);
  __builtin_memset(w.l, 0, w.count * W * sizeof(float));
  __builtin_memset(w.out, 0, rows * w.columns * sizeof(float));
  return memory;
}

// Rows [row, row + rows) are those of segment g.
template <bool kHalf>
RORO_INLINE void put_output(const AttentionArgs& a, const Segment& g, std::int64_t head, const Work<kHalf>& w,
                            std::int64_t row, std::int64_t rows) {
  const std::int64_t ratio = a.heads / a.kv_heads, last = row + rows;
  for (std::int64_t token = g.begin; row < last; ++token) {
    std::int64_t at = (token * a.heads + head * ratio) * a.dim;
    for (const std::int64_t end = row + ratio; row < end; ++row, at += a.dim) {
      const float scale = 1.0f / sum(load(w.l + row * W));
      for (std::int64_t j = 0; j < a.dim; j += W) {
        const vf x = load(w.out + row * w.columns + j) * scale;
        const std::int64_t n = a.dim - j < W ? a.dim - j : W;
        a.type == DType::f32 ? store_some(static_cast<float*>(a.out) + at + j, x, n)
                             : store_some(static_cast<bf16*>(a.out) + at + j, x, n);
      }
    }
  }
}

// Tokens [from, to) of a sequence, which rows [first, last) of an item attend over.
struct Reach {
  std::int64_t sequence, from, to, first, last;
};

// Number i of an item: 0 is the shared prefix in whole blocks (the rest of it is in blocks that differ), then come the
// segments' own tokens. `row`: the segment's first.
RORO_INLINE Reach reach(const AttentionArgs& a, const Segment* segments, const AttentionItem& item, std::int64_t i,
                        std::int64_t row) {
  const std::int64_t whole = item.prefix / kTile * kTile, ratio = a.heads / a.kv_heads;
  const Segment& g = segments[i ? item.first + i - 1 : item.first];
  if (!i) return {g.sequence, 0, whole, 0, 0};
  const std::int64_t seen = a.kv_lens[g.sequence] - (a.cu_seqlens[g.sequence + 1] - g.end);
  return {g.sequence, whole, seen, row, row + (g.end - g.begin) * ratio};
}

// Whether rows work with keys and values where they lie: too few of them to be worth putting these in order for all.
template <bool kHalf>
RORO_INLINE bool is_few(const AttentionArgs& a, std::int64_t rows) {
  return kHalf && rows <= kHalfRows && a.dim % 32 == 0 && !half_product_has_tiles();
}

constexpr std::int64_t kFewTokens = 32;  // of all heads, that are read together

// Key heads [0, heads) of one block, a few tokens of all heads at a time, so that pages are read from end to end.
// Meanwhile the values are asked for, then the next block's keys.
RORO_INLINE void attend_heads(const AttentionArgs& a, const Work<true>* work, std::int64_t heads, std::int64_t first,
                              std::int64_t last, std::int64_t begin, const TokenTile& t, const TokenTile& next,
                              float scale) {
  const std::int64_t k_step = a.k.head_stride * sizeof(bf16), v_step = a.v.head_stride * sizeof(bf16);
  const std::int64_t rows = last - first;
  const Sight seen = sight(work->visible, first, last, begin, t.n);
  const std::int64_t columns = round_up(seen.most, 16), depth = round_up(seen.most, 2), wide = (a.dim + 63) / 64;
  RowsAhead values(t.v, seen.most, heads, v_step, t.v_bytes, heads * (columns / 16) * (a.dim / 16) * kColumnSteps);
  for (std::int64_t c = 0; c < columns; c += kFewTokens) {
    const std::int64_t some = columns - c < kFewTokens ? columns - c : kFewTokens;
    for (std::int64_t h = 0; h < heads; ++h) {
      const Work<true>& w = work[h];
      float* s = w.s + h * kHalfRows * kTile + c;
      half_rows_by_columns({w.q_rows + first, t.k + c, h * k_step, w.depth, some, s, kTile, &values}, rows);
    }
  }
  RowsAhead keys(next.k, next.n, heads, k_step, next.k_bytes, heads * (rows * kRowSteps + depth / 2 * wide));
  for (std::int64_t h = 0; h < heads; ++h) {
    weigh(work[h], first, last, begin, columns, seen.whole, scale, h * kHalfRows, &keys);
  }
  for (std::int64_t c = 0; c < depth; c += kFewTokens) {
    const std::int64_t some = depth - c < kFewTokens ? depth - c : kFewTokens;
    for (std::int64_t h = 0; h < heads; ++h) {
      const Work<true>& w = work[h];
      const bf16* p[kHalfRows];
      for (std::int64_t i = 0; i < rows; ++i) p[i] = w.p + (h * kHalfRows + i) * kTile + c;
      half_rows_by_depth({p, t.v + c, h * v_step, some, w.columns, w.out + first * w.columns, w.columns, &keys}, rows);
    }
  }
}

RORO_INLINE void attend_heads(const AttentionArgs&, const Work<false>*, std::int64_t, std::int64_t, std::int64_t,
                              std::int64_t, const TokenTile&, const TokenTile&, float) {}

// Key heads [head, last_head) of an item: side by side, so that a page is read from end to end. `after`: the item that
// comes next, for the same heads, or nullptr.
template <bool kHalf>
RORO_INLINE void attend(const AttentionArgs& a, HalfProductFunction product, const Segment* segments,
                        const AttentionItem& item, const AttentionItem* after, std::int64_t head,
                        std::int64_t last_head, char* memory) {
  constexpr float kLog2E = 1.44269504f;
  Work<kHalf>* work = nullptr;
  memory = cut(work, last_head - head, memory);
  Buffers<kHalf> shared;
  memory = share_buffers(a, memory, shared);
  for (std::int64_t h = head; h < last_head; ++h) {
    static_cast<Buffers<kHalf>&>(work[h - head]) = shared;
    memory = take_queries(a, segments, item, h, memory, work[h - head]);
  }
  const auto find = [&](const Reach& r, std::int64_t h, std::int64_t begin, TokenTile& t) {
    locate(a, r.sequence, h, begin, r.to - begin < kTile ? r.to - begin : kTile, t);
  };
  const std::int64_t n = item.last - item.first;
  Reach r = reach(a, segments, item, 0, 0), next;
  r.last = work->count;
  TokenTile tiles[2];
  int now = 0;
  bool found = false;  // tiles[now] is
  for (std::int64_t i = 0; i <= n; ++i, r = next) {
    next = i < n ? reach(a, segments, item, i + 1, i ? r.last : 0)
           : after ? reach(a, segments, *after, after->prefix >= kTile ? 0 : 1, 0) : Reach{};
    std::int64_t first = r.first;
    const bool few = is_few<kHalf>(a, r.last - r.first);
    for (std::int64_t begin = r.from; begin < r.to; begin += kTile) {
      while (work->visible[first] <= begin) ++first;
      if (few) {
        TokenTile &t = tiles[now], &coming = tiles[now ^ 1];
        if (!found) find(r, head, begin, t);
        found = true;
        if (begin + kTile < r.to) {
          find(r, head, begin + kTile, coming);
        } else if (next.from < next.to) {
          find(next, head, next.from, coming);
        } else {
          found = false;
          coming.n = 0;
        }
        attend_heads(a, work, last_head - head, first, r.last, begin, t, coming, a.scale * kLog2E);
        now ^= 1;
        continue;
      }
      for (std::int64_t h = head; h < last_head; ++h, now ^= 1) {
        TokenTile &t = tiles[now], &coming = tiles[now ^ 1];
        if (!found) find(r, h, begin, t);
        found = true;
        if (h + 1 < last_head) {
          find(r, h + 1, begin, coming);
        } else if (begin + kTile < r.to) {
          find(r, head, begin + kTile, coming);
        } else if (next.from < next.to) {
          find(next, head, next.from, coming);
        } else {
          found = false;
          coming = t;  // which is there already
        }
        const Work<kHalf>& w = work[h - head];
        stage_rows(t.k, t.n, a.k.type, w.dim, w.depth, w.stage_k);
        stage_rows(t.v, t.n, a.v.type, w.dim, w.columns, w.stage_v);
        attend_block(w, product, first, r.last, begin, t, coming, a.scale * kLog2E);
      }
    }
    if (!i) continue;
    const Segment& g = segments[item.first + i - 1];
    for (std::int64_t h = head; h < last_head; ++h) put_output(a, g, h, work[h - head], r.first, r.last - r.first);
  }
}

[[maybe_unused]] static void attend_half(const AttentionArgs& a, HalfProductFunction product, const Segment* segments,
                                         const AttentionItem& item, const AttentionItem* after, std::int64_t head,
                                         std::int64_t last_head, char* memory) {
  attend<true>(a, product, segments, item, after, head, last_head, memory);
}

[[maybe_unused]] static void attend_float(const AttentionArgs& a, HalfProductFunction product, const Segment* segments,
                                          const AttentionItem& item, const AttentionItem* after, std::int64_t head,
                                          std::int64_t last_head, char* memory) {
  attend<false>(a, product, segments, item, after, head, last_head, memory);
}
