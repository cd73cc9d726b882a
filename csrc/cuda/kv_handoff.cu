// kv_handoff copies: runs of tokens between pools of other page size, layout and dtype, or whole pages within one.
//
// Block (i, j, z) moves a share of span i of inner index j (layer, k or v). A thread takes 16 bytes at a time, four
// in flight; where both pools lie well enough that is any run of heads and tokens, else as many bytes as always fit.
// A kept dtype is moved as bits. A span that leaves a pool is skipped.
#include "cuda/device.cuh"

namespace roro {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;
constexpr int64_t kBlocks = 2112;  // at least, so that few long spans still fill the device
constexpr int64_t kMaxShares = 1024;

/// Quotient and remainder by a number known to the host, for dividends below 2^31.
struct Divider {
  uint32_t divisor, multiplier, shift;

  explicit Divider(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t(1) << shift) < d) ++shift;
    multiplier = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

/// Where a pool's vectors lie, in elements.
struct Pool {
  Divider page;
  int64_t slots, page_stride, token_stride, head_stride, inner_stride[RORO_KV_INNER];

  __device__ __forceinline__ int64_t at(uint32_t slot, uint32_t head) const {
    const uint32_t p = page.divide(slot);
    return p * page_stride + (slot - p * page.divisor) * token_stride + head * head_stride;
  }
};

struct Plan {
  const int64_t *source_slot, *target_slot, *tokens;  // tokens null: one each
  int64_t slot_stride;
  Pool source, target;
  Divider vectors, heads;  // of one head, of one token
  uint32_t inner_size[RORO_KV_INNER];
};

template <class To, class From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (std::is_same<To, From>::value) return x;
  else return from_float<To>(to_float(x));
}

/// N elements per vector.
template <class From, class To, int N>
__global__ void __launch_bounds__(kThreads, 3) kv_copy_kernel(const From* __restrict__ source, To* __restrict__ target,
                                                             const Plan plan) {
  const int64_t i = blockIdx.x * plan.slot_stride;
  const int64_t first = plan.source_slot[i], to = plan.target_slot[i], tokens = plan.tokens ? plan.tokens[i] : 1;
  if (tokens <= 0 || first < 0 || to < 0) return;
  if (first > plan.source.slots - tokens || to > plan.target.slots - tokens) return;
  uint32_t inner = blockIdx.y;
#pragma unroll
  for (int d = RORO_KV_INNER - 1; d >= 0; --d) {
    const uint32_t index = inner % plan.inner_size[d];
    inner /= plan.inner_size[d];
    source += index * plan.source.inner_stride[d];
    target += index * plan.target.inner_stride[d];
  }
  const uint32_t total = uint32_t(tokens) * plan.heads.divisor * plan.vectors.divisor, step = gridDim.z * kThreads;
  for (uint32_t base = blockIdx.z * kThreads + threadIdx.x; base < total; base += kInFlight * step) {
    Vec<From, N> x[kInFlight];
    int64_t out[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const uint32_t v = base + j * step;
      if (v < total) {
        const uint32_t row = plan.vectors.divide(v), token = plan.heads.divide(row);
        const uint32_t head = row - token * plan.heads.divisor, element = (v - row * plan.vectors.divisor) * N;
        out[j] = plan.target.at(uint32_t(to) + token, head) + element;
        x[j] = *reinterpret_cast<const Vec<From, N>*>(source + plan.source.at(uint32_t(first) + token, head) + element);
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (base + j * step < total) {
        Vec<To, N> y;
#pragma unroll
        for (int e = 0; e < N; ++e) y.v[e] = convert<To>(x[j].v[e]);
        *reinterpret_cast<Vec<To, N>*>(target + out[j]) = y;
      }
    }
  }
}

template <class From, class To, int N>
int launch_copy(const RoroKvCopy& a, int64_t scale, void* stream) {
  // Strides counted in `From` and `To`, which stand for 1 / scale elements.
  const auto pool = [&](const RoroKvPool& p) {
    Pool out{Divider(uint32_t(p.page_size)), p.pages * p.page_size, p.page_stride / scale, p.token_stride / scale,
             p.head_stride / scale, {}};
    for (int d = 0; d < RORO_KV_INNER; ++d) out.inner_stride[d] = p.inner_stride[d] / scale;
    return out;
  };
  Plan plan{a.source_slot, a.target_slot, a.tokens, a.slot_stride, pool(a.source), pool(a.target),
            Divider(uint32_t(a.dim / scale / N)), Divider(uint32_t(a.heads)), {}};
  const int64_t longest = !a.tokens ? 1 : plan.source.slots < plan.target.slots ? plan.source.slots : plan.target.slots;
  if (longest * a.heads * plan.vectors.divisor >= int64_t(1) << 31) return int(cudaErrorInvalidValue);
  int64_t inner = 1;
  for (int d = 0; d < RORO_KV_INNER; ++d) inner *= plan.inner_size[d] = uint32_t(a.inner_size[d]);
  const int64_t shares = (kBlocks + a.n * inner - 1) / (a.n * inner);
  const dim3 grid(unsigned(a.n), unsigned(inner), unsigned(shares < kMaxShares ? shares : kMaxShares));
  return launch(kv_copy_kernel<From, To, N>, grid, kThreads, 0, stream, static_cast<const From*>(a.source.data),
                static_cast<To*>(a.target.data), plan);
}

/// Every address of the pool is a multiple of `bytes`.
bool lies_on(const RoroKvPool& p, int64_t bytes, int64_t size) {
  bool ok = reinterpret_cast<uintptr_t>(p.data) % bytes == 0 && p.page_stride * size % bytes == 0 &&
            p.token_stride * size % bytes == 0 && p.head_stride * size % bytes == 0;
  for (int d = 0; d < RORO_KV_INNER; ++d) ok &= p.inner_stride[d] * size % bytes == 0;
  return ok;
}

template <class From, class To>
int launch_conversion(const RoroKvCopy& a, void* stream) {
  const bool wide = a.dim % 8 == 0 && lies_on(a.source, 8 * sizeof(From), sizeof(From)) &&
                    lies_on(a.target, 8 * sizeof(To), sizeof(To));
  return wide ? launch_copy<From, To, 8>(a, 1, stream) : launch_copy<From, To, 1>(a, 1, stream);
}

int launch_move(const RoroKvCopy& a, void* stream) {
  const int64_t size = a.element_size;
  const auto fits = [&](int64_t bytes) {
    return a.dim * size % bytes == 0 && lies_on(a.source, bytes, size) && lies_on(a.target, bytes, size);
  };
  const auto bits = [&](auto unit) {  // strides and sizes in bytes, then in units
    RoroKvCopy b = a;
    for (RoroKvPool* p : {&b.source, &b.target}) {
      p->page_stride *= size, p->token_stride *= size, p->head_stride *= size;
      for (int64_t& s : p->inner_stride) s *= size;
    }
    b.dim *= size;
    return launch_copy<decltype(unit), decltype(unit), 1>(b, sizeof(unit), stream);
  };
  if (fits(16)) return bits(uint4{});
  if (fits(8)) return bits(uint2{});
  if (fits(4)) return bits(uint32_t{});
  if (fits(2)) return bits(uint16_t{});
  return bits(uint8_t{});
}

}  // namespace
}  // namespace roro

using namespace roro;

extern "C" int roro_kv_copy(const RoroKvCopy* args, void* stream) {
  RoroKvCopy a = *args;
  if (a.heads > 1 && a.source.head_stride == a.dim && a.target.head_stride == a.dim) {
    a.dim *= a.heads;  // heads side by side in both pools are one wide head
    a.heads = 1;
    a.source.head_stride = a.target.head_stride = 0;
  }
  if (a.source_dtype == a.target_dtype) return launch_move(a, stream);
  switch (a.source_dtype * 3 + a.target_dtype) {
    case RORO_F32 * 3 + RORO_F16: return launch_conversion<float, f16>(a, stream);
    case RORO_F32 * 3 + RORO_BF16: return launch_conversion<float, bf16>(a, stream);
    case RORO_F16 * 3 + RORO_F32: return launch_conversion<f16, float>(a, stream);
    case RORO_F16 * 3 + RORO_BF16: return launch_conversion<f16, bf16>(a, stream);
    case RORO_BF16 * 3 + RORO_F32: return launch_conversion<bf16, float>(a, stream);
    default: return launch_conversion<bf16, f16>(a, stream);
  }
}
