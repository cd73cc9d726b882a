// Tokens [begin, end), compiled per instruction set; see foreach_isa.h.

template <typename T>
RORO_INLINE vf get(const T* p, std::int64_t left) {
  return left >= W ? load(p) : load_some(p, left);
}

template <typename T>
RORO_INLINE void put(T* p, vf v, std::int64_t left) {
  left >= W ? store(p, v) : store_some(p, v, left);
}

RORO_INLINE vf get(const void* p, DType type, std::int64_t at, std::int64_t left) {
  return type == DType::f32 ? get(static_cast<const float*>(p) + at, left) : get(static_cast<const bf16*>(p) + at, left);
}

template <typename T>
RORO_INLINE float inverse_rms(const T* x, std::int64_t n, float eps) {
  return 1.0f / __builtin_sqrtf(dot(x, x, n) / n + eps);
}

// One head: norm (unless norm is nullptr) and rotate.
template <bool kNorm, typename From, typename To>
RORO_INLINE void head(const NormRopeArgs& a, const From* x, const float* norm, const float* cos, const float* sin,
                      To* to) {
  const std::int64_t half = a.dim / 2;
  const float scale = kNorm ? inverse_rms(x, a.dim, a.eps) : 1.0f;
  for (std::int64_t j = 0; j < half; j += W) {
    const std::int64_t left = half - j;
    vf p = get(x + j, left), q = get(x + half + j, left);
    if (kNorm) {
      p = p * scale * get(norm + j, left);
      q = q * scale * get(norm + half + j, left);
    }
    put(to + j, p * get(cos + j, left) - q * get(sin + j, left), left);
    put(to + half + j, q * get(cos + half + j, left) + p * get(sin + half + j, left), left);
  }
}

template <typename From, typename To>
RORO_INLINE void heads(const NormRopeArgs& a, std::int64_t n, const From* x, const float* norm, const float* cos,
                       const float* sin, To* to, std::int64_t step) {
  for (std::int64_t h = 0; h < n; ++h, x += a.dim, to += step) {
    norm ? head<true>(a, x, norm, cos, sin, to) : head<false>(a, x, norm, cos, sin, to);
  }
}

template <typename From, typename To>
RORO_INLINE void move(const From* from, To* to, std::int64_t n) {
  for (std::int64_t j = 0; j < n; j += W) put(to + j, get(from + j, n - j), n - j);
}

template <typename From, typename To>
RORO_INLINE void token(const NormRopeArgs& a, const float* q_norm, const float* k_norm, std::int64_t t) {
  const From* x = static_cast<const From*>(a.qkv) + t * a.qkv_stride;
  From* q = static_cast<From*>(a.q) + t * a.heads * a.dim;
  const float *cos = a.cos + a.positions[t] * a.cos_stride, *sin = a.sin + a.positions[t] * a.sin_stride;
  const std::int64_t page = a.slots[t] / a.page_size, offset = a.slots[t] % a.page_size;
  const auto place = [&](const PagedTensor& p) {
    return static_cast<To*>(const_cast<void*>(p.data)) + page * p.page_stride + offset * p.token_stride;
  };
  To *k = place(a.k), *v = place(a.v);
  heads(a, a.heads, x, q_norm, cos, sin, q, a.dim);
  x += a.heads * a.dim;
  heads(a, a.kv_heads, x, k_norm, cos, sin, k, a.k.head_stride);
  x += a.kv_heads * a.dim;
  for (std::int64_t h = 0; h < a.kv_heads; ++h, x += a.dim) move(x, v + h * a.v.head_stride, a.dim);
}

// Weights as float, in `to` if they are not.
[[maybe_unused]] static const float* wide_norm(const NormRopeArgs& a, const void* norm, float* to) {
  if (!norm || a.norm_type == DType::f32) return static_cast<const float*>(norm);
  move(static_cast<const bf16*>(norm), to, a.dim);
  return to;
}

[[maybe_unused]] static void norm_rope(const NormRopeArgs& a, std::int64_t begin, std::int64_t end) {
  auto* memory = reinterpret_cast<float*>(scratch(2 * a.dim * sizeof(float)));
  const float *q = wide_norm(a, a.q_norm, memory), *k = wide_norm(a, a.k_norm, memory + a.dim);
  const bool from = a.type == DType::f32, to = a.k.type == DType::f32;
  for (std::int64_t t = begin; t < end; ++t) {
    from ? to ? token<float, float>(a, q, k, t) : token<float, bf16>(a, q, k, t)
         : to ? token<bf16, float>(a, q, k, t) : token<bf16, bf16>(a, q, k, t);
  }
}

// The norm is that of the sum as it was rounded, which is what the next layer reads too.
template <typename T>
RORO_INLINE void add_norm_rows(const AddNormArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    const T *x = static_cast<const T*>(a.x) + t * a.x_stride;
    const T *r = static_cast<const T*>(a.residual) + t * a.residual_stride;
    T *total = static_cast<T*>(a.total) + t * a.width, *normed = static_cast<T*>(a.normed) + t * a.width;
    for (std::int64_t j = 0; j < a.width; j += W) {
      const std::int64_t left = a.width - j;
      put(total + j, get(x + j, left) + get(r + j, left), left);
    }
    const float scale = inverse_rms(total, a.width, a.eps);
    for (std::int64_t j = 0; j < a.width; j += W) {
      const std::int64_t left = a.width - j;
      put(normed + j, get(total + j, left) * scale * get(a.weight, a.weight_type, j, left), left);
    }
  }
}

[[maybe_unused]] static void add_norm(const AddNormArgs& a, std::int64_t begin, std::int64_t end) {
  a.type == DType::f32 ? add_norm_rows<float>(a, begin, end) : add_norm_rows<bf16>(a, begin, end);
}

template <typename T>
RORO_INLINE void silu_mul_rows(const SiluMulArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(a.gate_up) + t * a.stride;
    T* out = static_cast<T*>(a.out) + t * a.width;
    for (std::int64_t j = 0; j < a.width; j += W) {
      const std::int64_t left = a.width - j;
      put(out + j, silu(get(x + j, left)) * get(x + a.width + j, left), left);
    }
  }
}

[[maybe_unused]] static void gated(const SiluMulArgs& a, std::int64_t begin, std::int64_t end) {
  a.type == DType::f32 ? silu_mul_rows<float>(a, begin, end) : silu_mul_rows<bf16>(a, begin, end);
}
