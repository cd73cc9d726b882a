// One item for one key head, compiled per instruction set; see foreach_isa.h.
//
// Rows of an item are (query token, query head) pairs that attend over the same key head. Softmax is online: per row the
// running maximum m, the sum l of exp(score - m), and the unnormalised output. Reading a shared prefix first and each
// sequence's own tokens after it is the merge by log-sum-exp, without a second pass.
//
// Few rows (decode): scores by dot products along the head. Many rows: scores by products with the transposed queries,
// vectorised across rows, so that keys are broadcast from where they lie and never shuffled.

constexpr int kTile = 64;  // tokens

struct Rows {
  std::int64_t count, padded_dim;
  const float *q, *qt;  // [rows][padded_dim], [padded_dim][kQueryStride]; scaled
  float *m, *l, *out;   // [rows], [rows], [rows][padded_dim]
  float* p;             // scores, then probabilities: [kTile][kQueryStride] or [rows][kTile]
};

constexpr int kQueryStride = kAttentionRows + 16;  // a vector may reach beyond the last row

struct TokenTile {
  const float *k[kTile], *v[kTile];
  std::int64_t n;
};

// out[i][..] += sum over t of p[i * row_step + t * token_step] * v[t][..], for MR rows and NV vectors of the head.
template <int MR, int NV>
RORO_INLINE void add_values(const float* p, std::int64_t row_step, std::int64_t token_step, const float* const* v,
                            std::int64_t n, std::int64_t at, float* out, std::int64_t stride) {
  vf c[MR][NV];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) c[i][j] = load(out + i * stride + at + j * W);
  }
  for (std::int64_t t = 0; t < n; ++t) {
    vf b[NV];
    for (int j = 0; j < NV; ++j) b[j] = load(v[t] + at + j * W);
    for (int i = 0; i < MR; ++i) {
      const float weight = p[i * row_step + t * token_step];
      for (int j = 0; j < NV; ++j) c[i][j] += weight * b[j];
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) store(out + i * stride + at + j * W, c[i][j]);
  }
}

template <int MR>
RORO_INLINE void add_values_rows(const float* p, std::int64_t row_step, std::int64_t token_step,
                                 const float* const* v, std::int64_t n, float* out, std::int64_t dim) {
  constexpr int kWide = W == 16 ? 4 : 2;
  std::int64_t at = 0;
  for (; at + kWide * W <= dim; at += kWide * W) {
    add_values<MR, kWide>(p, row_step, token_step, v, n, at, out, dim);
  }
  for (; at < dim; at += W) add_values<MR, 1>(p, row_step, token_step, v, n, at, out, dim);
}

[[maybe_unused]] static void add_all_values(const Rows& r, std::int64_t first, std::int64_t last, const float* p,
                                            std::int64_t row_step, std::int64_t token_step, const TokenTile& t) {
  std::int64_t i = first;
  const auto at = [&](std::int64_t row) { return r.out + row * r.padded_dim; };
  for (; i + 4 <= last; i += 4) {
    add_values_rows<4>(p + (i - first) * row_step, row_step, token_step, t.v, t.n, at(i), r.padded_dim);
  }
  for (; i < last; ++i) {
    add_values_rows<1>(p + (i - first) * row_step, row_step, token_step, t.v, t.n, at(i), r.padded_dim);
  }
}

RORO_INLINE void rescale(float* out, std::int64_t dim, float factor) {
  if (factor == 1) return;
  for (std::int64_t j = 0; j < dim; j += W) store(out + j, load(out + j) * factor);
}

// Rows [first, last) over one tile; row i sees the tile's first seen[i] tokens. Few rows.
[[maybe_unused]] static void tile_by_dots(const Rows& r, std::int64_t first, std::int64_t last, const TokenTile& t,
                                          const float* seen) {
  const std::int64_t dim = r.padded_dim;
  for (std::int64_t i = first; i < last; ++i) {
    float* s = r.p + i * kTile;
    const float* q = r.q + i * dim;
    const std::int64_t n = static_cast<std::int64_t>(seen[i]);
    vf top = splat(-__builtin_inff());
    for (std::int64_t k = 0; k < n; k += W) {
      float score[W];
      for (int w = 0; w < W; ++w) score[w] = -__builtin_inff();
      const std::int64_t here = n - k < W ? n - k : W;
      std::int64_t w = 0;
      for (; w + 4 <= here; w += 4) {
        vf a{}, b{}, c{}, d{};
        for (std::int64_t j = 0; j < dim; j += W) {
          const vf x = load(q + j);
          a += x * load(t.k[k + w] + j);
          b += x * load(t.k[k + w + 1] + j);
          c += x * load(t.k[k + w + 2] + j);
          d += x * load(t.k[k + w + 3] + j);
        }
        sum4(a, b, c, d, score + w);
      }
      for (; w < here; ++w) {
        vf a{};
        for (std::int64_t j = 0; j < dim; j += W) a += load(q + j) * load(t.k[k + w] + j);
        score[w] = sum(a);
      }
      const vf v = load(score);
      store(s + k, v);
      top = maximum(top, v);
    }
    const float old = r.m[i], now = largest(top) > old ? largest(top) : old;
    if (n == 0) {
      for (std::int64_t k = 0; k < t.n; ++k) s[k] = 0;
      continue;
    }
    vf total{};
    for (std::int64_t k = 0; k < n; k += W) {
      const vf e = exp(load(s + k) - now);
      store(s + k, e);
      total += e;
    }
    for (std::int64_t k = round_up(n, W); k < kTile; ++k) s[k] = 0;
    const float factor = __builtin_expf(old - now);
    r.l[i] = r.l[i] * factor + sum(total);
    r.m[i] = now;
    rescale(r.out + i * dim, dim, factor);
  }
  add_all_values(r, first, last, r.p + first * kTile, kTile, 1, t);
}

// scores[t][rows] for MT tokens and NV vectors of rows.
template <int MT, int NV>
RORO_INLINE void scores(const float* const* k, const float* qt, std::int64_t dim, float* s) {
  vf c[MT][NV] = {};
  for (std::int64_t d = 0; d < dim; ++d) {
    vf b[NV];
    for (int j = 0; j < NV; ++j) b[j] = load(qt + d * kQueryStride + j * W);
    for (int i = 0; i < MT; ++i) {
      const float x = k[i][d];
      for (int j = 0; j < NV; ++j) c[i][j] += x * b[j];
    }
  }
  for (int i = 0; i < MT; ++i) {
    for (int j = 0; j < NV; ++j) store(s + i * kQueryStride + j * W, c[i][j]);
  }
}

template <int NV>
RORO_INLINE void tile_by_rows(const Rows& r, std::int64_t first, std::int64_t count, const TokenTile& t,
                              const float* seen) {
  std::int64_t i = 0;
  for (; i + 4 <= t.n; i += 4) scores<4, NV>(t.k + i, r.qt + first, r.padded_dim, r.p + i * kQueryStride);
  for (; i < t.n; ++i) scores<1, NV>(t.k + i, r.qt + first, r.padded_dim, r.p + i * kQueryStride);
  const vf never = splat(-__builtin_inff());
  float factor[NV * W];
  for (int j = 0; j < NV; ++j) {
    float limits[W];
    for (int w = 0; w < W; ++w) limits[w] = j * W + w < count ? seen[first + j * W + w] : 0.0f;
    const vf limit = load(limits), old = load_some(r.m + first + j * W, count - j * W < W ? count - j * W : W);
    vf top = old;
    for (std::int64_t k = 0; k < t.n; ++k) {
      const vf s = splat(static_cast<float>(k)) < limit ? load(r.p + k * kQueryStride + j * W) : never;
      top = maximum(top, s);
      store(r.p + k * kQueryStride + j * W, s);
    }
    vf total{};
    for (std::int64_t k = 0; k < t.n; ++k) {
      const vf s = load(r.p + k * kQueryStride + j * W), e = s == never ? vf{} : exp(s - top);
      store(r.p + k * kQueryStride + j * W, e);
      total += e;
    }
    const vf f = old == top ? splat(1.0f) : exp(old - top);
    store(factor + j * W, f);
    const std::int64_t rows = count - j * W < W ? count - j * W : W;
    store_some(r.l + first + j * W, load_some(r.l + first + j * W, rows) * f + total, rows);
    store_some(r.m + first + j * W, top, rows);
  }
  for (std::int64_t k = 0; k < count; ++k) rescale(r.out + (first + k) * r.padded_dim, r.padded_dim, factor[k]);
  add_all_values(r, first, first + count, r.p, 1, kQueryStride, t);
}

[[maybe_unused]] static void attend_tile(const Rows& r, std::int64_t first, std::int64_t last, const TokenTile& t,
                                         const float* seen) {
  if (2 * (last - first) <= W || last - first < 6) return tile_by_dots(r, first, last, t, seen);
  constexpr int kVectors = 2;
  for (std::int64_t at = first; at < last; at += kVectors * W) {
    const std::int64_t n = last - at < kVectors * W ? last - at : kVectors * W;
    n <= W ? tile_by_rows<1>(r, at, n, t, seen) : tile_by_rows<kVectors>(r, at, n, t, seen);
  }
}

// -- one item -------------------------------------------------------------------------------------------------------

struct Stage {
  float *k, *v;  // [kTile][padded_dim], for what cannot be used where it lies
};

template <typename T>
RORO_INLINE const float* take(const T* from, std::int64_t dim, std::int64_t padded, float* to) {
  std::int64_t j = 0;
  for (; j + W <= dim; j += W) store(to + j, load(from + j));
  if (j < padded) store(to + j, load_some(from + j, dim - j));
  return to;
}

RORO_INLINE const float* take_row(const PagedTensor& p, std::int64_t at, std::int64_t dim, std::int64_t padded,
                                  float* to) {
  if (p.type == DType::bf16) return take(static_cast<const bf16*>(p.data) + at, dim, padded, to);
  const float* from = static_cast<const float*>(p.data) + at;
  return dim == padded ? from : take(from, dim, padded, to);
}

// Tokens [begin, begin + n) of a sequence.
RORO_INLINE void load_tile(const AttentionArgs& a, std::int64_t sequence, std::int64_t head, std::int64_t begin,
                           std::int64_t n, std::int64_t padded, const Stage& stage, TokenTile& t) {
  t.n = n;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t at = begin + i, page = a.table[sequence * a.table_stride + at / a.page_size];
    const std::int64_t offset = at % a.page_size;
    const auto where = [&](const PagedTensor& p) {
      return page * p.page_stride + offset * p.token_stride + head * p.head_stride;
    };
    t.k[i] = take_row(a.k, where(a.k), a.dim, padded, stage.k + i * padded);
    t.v[i] = take_row(a.v, where(a.v), a.dim, padded, stage.v + i * padded);
  }
}

[[maybe_unused]] static void attend(const AttentionArgs& a, const Segment* segments, const AttentionItem& item,
                                    std::int64_t head, float* memory) {
  const std::int64_t ratio = a.heads / a.kv_heads, padded = round_up(a.dim, W);
  const auto cut = [&](std::int64_t n) {
    float* here = memory;
    memory += n;
    return here;
  };
  float* q = cut(kAttentionRows * padded);
  float* qt = cut(padded * kQueryStride);
  const Stage stage{cut(kTile * padded), cut(kTile * padded)};
  Rows r{0, padded, q, qt, cut(kQueryStride), cut(kQueryStride), cut(kAttentionRows * padded),
         cut(kTile * kQueryStride)};
  float visible[kAttentionRows], seen[kAttentionRows];
  for (std::int64_t s = item.first; s < item.last; ++s) {
    const Segment& g = segments[s];
    for (std::int64_t token = g.begin; token < g.end; ++token) {
      const float tokens = static_cast<float>(a.kv_lens[g.sequence] - (a.cu_seqlens[g.sequence + 1] - token) + 1);
      for (std::int64_t h = 0; h < ratio; ++h, ++r.count) {
        const std::int64_t at = token * a.q_token_stride + (head * ratio + h) * a.q_head_stride;
        float* to = q + r.count * padded;
        a.type == DType::f32 ? take(static_cast<const float*>(a.q) + at, a.dim, padded, to)
                             : take(static_cast<const bf16*>(a.q) + at, a.dim, padded, to);
        rescale(to, padded, a.scale);
        visible[r.count] = tokens;
        r.m[r.count] = -__builtin_inff();
        r.l[r.count] = 0;
      }
    }
  }
  for (std::int64_t i = 0; i < r.count * padded; i += W) store(r.out + i, vf{});
  if (r.count >= 6) {
    for (std::int64_t d = 0; d < padded; ++d) {
      for (std::int64_t i = 0; i < kQueryStride; ++i) qt[d * kQueryStride + i] = i < r.count ? q[i * padded + d] : 0.0f;
    }
  }
  TokenTile tile;
  const auto run = [&](std::int64_t sequence, std::int64_t first, std::int64_t last, std::int64_t from,
                       std::int64_t to) {
    for (std::int64_t begin = from; begin < to; begin += kTile) {
      const std::int64_t n = to - begin < kTile ? to - begin : kTile;
      for (std::int64_t i = first; i < last; ++i) {
        const float left = visible[i] - begin;
        seen[i] = left < 0 ? 0 : left > n ? n : left;
      }
      load_tile(a, sequence, head, begin, n, padded, stage, tile);
      attend_tile(r, first, last, tile, seen);
    }
  };
  if (item.prefix) run(segments[item.first].sequence, 0, r.count, 0, item.prefix);
  std::int64_t row = 0;
  for (std::int64_t s = item.first; s < item.last; ++s) {
    const Segment& g = segments[s];
    const std::int64_t rows = (g.end - g.begin) * ratio;
    run(g.sequence, row, row + rows, item.prefix, static_cast<std::int64_t>(visible[row + rows - 1]));
    for (std::int64_t i = 0; i < rows; ++i, ++row) {
      const std::int64_t at = ((g.begin + i / ratio) * a.heads + head * ratio + i % ratio) * a.dim;
      const float scale = 1.0f / r.l[row];
      for (std::int64_t j = 0; j < a.dim; j += W) {
        const vf x = load(r.out + row * padded + j) * scale;
        const std::int64_t n = a.dim - j < W ? a.dim - j : W;
        a.type == DType::f32 ? store_some(static_cast<float*>(a.out) + at + j, x, n)
                             : store_some(static_cast<bf16*>(a.out) + at + j, x, n);
      }
    }
  }
}
