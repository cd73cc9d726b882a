// router_score for more rows than one launch serves: a kernel that prepares the inputs of the first layer, torch's
// matrix product, and a kernel for the rest.
#include "cuda/router_score.cuh"

namespace roro {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ __forceinline__ const T* row_of(const RoroRouterScore& a, int64_t n) {
  const int64_t r = a.rows ? a.rows[n] : n;
  return r >= 0 && r < a.T ? static_cast<const T*>(a.hidden) + r * a.hidden_stride : nullptr;
}

// x = [rms_norm(hidden) * norm, signals] in the weights' dtype. One warp per row.
template <class T, class W, bool WIDE>
__global__ void __launch_bounds__(kThreads) router_inputs_kernel(const RoroRouterScore a) {
  constexpr int V = 16 / (sizeof(T) > sizeof(W) ? sizeof(T) : sizeof(W));
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (n >= a.N) return;
  const T* row = a.H ? row_of<T>(a, n) : nullptr;
  const int end = row ? a.H : 0;
  W* x = static_cast<W*>(a.x) + n * a.x_stride;
  float squares = row || !a.H ? 0.0f : NAN;
#pragma unroll 4
  for (int k = lane * V; k < end; k += 32 * V) {
    const Vec<T, V> h = load<V, WIDE>(row, k, end);
#pragma unroll
    for (int i = 0; i < V; ++i) squares += to_float(h.v[i]) * to_float(h.v[i]);
  }
  const float scale = rsqrtf(warp_sum(squares) / a.H + a.eps);
#pragma unroll 4
  for (int k = lane * V; k < a.H; k += 32 * V) {
    const Vec<T, V> h = load<V, WIDE>(row, k, end);
    const Vec<W, V> g = load<V, WIDE>(static_cast<const W*>(a.norm), k, a.H);
    Vec<W, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.v[i] = from_float<W>(to_float(h.v[i]) * scale * to_float(g.v[i]));
    if (WIDE) {
      *reinterpret_cast<Vec<W, V>*>(x + k) = out;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (k + i < a.H) x[k + i] = out.v[i];
      }
    }
  }
  for (int i = lane; i < a.S; i += 32) x[a.H + i] = from_float<W>(a.signals[n * a.S + i]);
}

// After the product: bias, SiLU, second layer, decision. One warp per row.
template <class W, bool WIDE>
__global__ void __launch_bounds__(kThreads) router_epilogue_kernel(const RoroRouterScore a) {
  constexpr int V = 16 / sizeof(W);
  const int lane = threadIdx.x % 32;
  const int64_t n = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (n >= a.N) return;
  const W* z = static_cast<const W*>(a.z) + n * a.D;
  float sum[kActions];
#pragma unroll
  for (int k = 0; k < kActions; ++k) sum[k] = 0.0f;
  for (int d = lane * V; d < a.D; d += 32 * V) {
    const Vec<W, V> y = load<V, WIDE>(z, d, a.D), b = load<V, WIDE>(static_cast<const W*>(a.b1), d, a.D);
    float unit[V];
#pragma unroll
    for (int i = 0; i < V; ++i) unit[i] = silu(to_float(y.v[i]) + to_float(b.v[i]));
#pragma unroll
    for (int k = 0; k < kActions; ++k) {
      if (k < a.K) {
        const Vec<W, V> w2 = load<V, WIDE>(static_cast<const W*>(a.w2) + int64_t(k) * a.D, d, a.D);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[k] += unit[i] * to_float(w2.v[i]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kActions; ++k) {
    if (k < a.K) sum[k] = warp_sum(sum[k]);
  }
  if (lane) return;
  decide<W>(a, n, sum);
}

template <class T, class W>
int launch_inputs(const RoroRouterScore& a, void* stream) {
  const dim3 grid(unsigned((a.N + kThreads / 32 - 1) / (kThreads / 32)));
  if (wide<T>(a.hidden, a.hidden_stride, a.H) && wide<W>(a.x, a.x_stride, a.H) && aligned16(a.norm))
    return launch(router_inputs_kernel<T, W, true>, grid, kThreads, 0, stream, a);
  return launch(router_inputs_kernel<T, W, false>, grid, kThreads, 0, stream, a);
}

template <class W>
int launch_epilogue(const RoroRouterScore& a, void* stream) {
  const dim3 grid(unsigned((a.N + kThreads / 32 - 1) / (kThreads / 32)));
  if (wide<W>(a.z, a.D, a.D) && aligned16(a.b1) && aligned16(a.w2))
    return launch(router_epilogue_kernel<W, true>, grid, kThreads, 0, stream, a);
  return launch(router_epilogue_kernel<W, false>, grid, kThreads, 0, stream, a);
}

}  // namespace
}  // namespace roro

using namespace roro;

extern "C" {

int roro_router_inputs(const RoroRouterScore* args, void* stream) {
  return by_dtypes(*args, [&](auto t, auto w) { return launch_inputs<decltype(t), decltype(w)>(*args, stream); });
}

int roro_router_epilogue(const RoroRouterScore* args, void* stream) {
  return by_dtypes(*args, [&](auto, auto w) { return launch_epilogue<decltype(w)>(*args, stream); });
}

}
