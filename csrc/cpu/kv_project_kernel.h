// Tokens [begin, end), compiled per instruction set; see foreach_isa.h.

template <typename T>
RORO_INLINE vf get(const T* p, std::int64_t left) {
  return left >= W ? load(p) : load_some(p, left);
}

template <typename T>
RORO_INLINE void put(T* p, vf v, std::int64_t left) {
  left >= W ? store(p, v) : store_some(p, v, left);
}

// A head times the 2 x 2 matrix [[p, q], [r, s]] of each pair of its halves, `bias` added before (nullptr: none).
template <typename From, typename To>
RORO_INLINE void turn_head(const From* x, const float* bias, const float* p, const float* q, const float* r,
                           const float* s, To* to, std::int64_t half) {
  for (std::int64_t j = 0; j < half; j += W) {
    const std::int64_t left = half - j;
    vf a = get(x + j, left), b = get(x + half + j, left);
    if (bias) {
      a += get(bias + j, left);
      b += get(bias + half + j, left);
    }
    put(to + j, a * get(p + j, left) + b * get(q + j, left), left);
    put(to + half + j, a * get(r + j, left) + b * get(s + j, left), left);
  }
}

template <typename From, typename To>
RORO_INLINE void move(const From* x, const float* bias, To* to, std::int64_t n) {
  for (std::int64_t j = 0; j < n; j += W) {
    const std::int64_t left = n - j;
    const vf v = get(x + j, left);
    put(to + j, bias ? v + get(bias + j, left) : v, left);
  }
}

// The matrices that turn a head to position t, or back from it: four rows of `half` floats.
RORO_INLINE void matrices(const Turn& turn, std::int64_t t, std::int64_t half, bool back, float* m) {
  const float *cos = turn.cos + turn.positions[t] * turn.cos_stride;
  const float *sin = turn.sin + turn.positions[t] * turn.sin_stride;
  for (std::int64_t j = 0; j < half; ++j) {
    const float c1 = cos[j], c2 = cos[half + j], s1 = sin[j], s2 = sin[half + j];
    const float scale = back ? 1.0f / (c1 * c2 + s1 * s2) : 1.0f;
    m[j] = back ? c2 * scale : c1;
    m[half + j] = back ? s1 * scale : -s1;
    m[2 * half + j] = back ? -s2 * scale : s2;
    m[3 * half + j] = back ? c1 * scale : c2;
  }
}

RORO_INLINE std::int64_t place(const PagedModel& p, std::int64_t slot) {
  return slot / p.page_size * p.page_stride + slot % p.page_size * p.token_stride;
}

template <typename From, typename To>
RORO_INLINE void unrotate_tokens(const UnrotateArgs& a, std::int64_t begin, std::int64_t end) {
  const PagedModel& src = a.source;
  const std::int64_t half = src.dim / 2, width = src.heads * src.dim, row = a.chosen * width;
  float* m = reinterpret_cast<float*>(scratch(4 * half * sizeof(float)));
  for (std::int64_t t = begin; t < end; ++t) {
    matrices(a.turn, t, half, true, m);
    const From* token = static_cast<const From*>(src.data) + place(src, a.slots[t]);
    for (std::int64_t l = 0; l < a.receivers; ++l) {
      To* k = static_cast<To*>(a.out) + (2 * l * a.tokens + t) * row;
      To* v = k + a.tokens * row;
      for (std::int64_t i = 0; i < a.chosen; ++i) {
        const From* from = token + a.layers[l * a.chosen + i] * src.layer_stride;
        for (std::int64_t h = 0; h < src.heads; ++h, k += src.dim, v += src.dim) {
          turn_head(from + h * src.head_stride, nullptr, m, m + half, m + 2 * half, m + 3 * half, k, half);
          move(from + src.kv_stride + h * src.head_stride, nullptr, v, src.dim);
        }
      }
    }
  }
}

template <typename From, typename To>
RORO_INLINE void store_tokens(const RotateStoreArgs& a, std::int64_t begin, std::int64_t end) {
  const PagedModel& dst = a.target;
  const std::int64_t half = dst.dim / 2, width = dst.heads * dst.dim;
  float* m = reinterpret_cast<float*>(scratch(4 * half * sizeof(float)));
  for (std::int64_t t = begin; t < end; ++t) {
    matrices(a.turn, t, half, false, m);
    To* token = static_cast<To*>(dst.data) + place(dst, a.slots[t]);
    for (std::int64_t l = 0; l < dst.layers; ++l, token += dst.layer_stride) {
      const From* k = static_cast<const From*>(a.mapped) + (2 * l * a.tokens + t) * width;
      const From* v = k + a.tokens * width;
      const float* bias = a.bias + 2 * l * width;
      for (std::int64_t h = 0, at = 0; h < dst.heads; ++h, at += dst.dim) {
        To* to = token + h * dst.head_stride;
        turn_head(k + at, bias + at, m, m + half, m + 2 * half, m + 3 * half, to, half);
        move(v + at, bias + width + at, to + dst.kv_stride, dst.dim);
      }
    }
  }
}

[[maybe_unused]] static void unrotate(const UnrotateArgs& a, std::int64_t begin, std::int64_t end) {
  const bool from = a.source.type == DType::f32, to = a.type == DType::f32;
  from ? to ? unrotate_tokens<float, float>(a, begin, end) : unrotate_tokens<float, bf16>(a, begin, end)
       : to ? unrotate_tokens<bf16, float>(a, begin, end) : unrotate_tokens<bf16, bf16>(a, begin, end);
}

[[maybe_unused]] static void rotate_store(const RotateStoreArgs& a, std::int64_t begin, std::int64_t end) {
  const bool from = a.type == DType::f32, to = a.target.type == DType::f32;
  from ? to ? store_tokens<float, float>(a, begin, end) : store_tokens<float, bf16>(a, begin, end)
       : to ? store_tokens<bf16, float>(a, begin, end) : store_tokens<bf16, bf16>(a, begin, end);
}
