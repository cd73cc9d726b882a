// What both paths of router_score share: the decision, alignments, the choice of types.
#pragma once
#include "cuda/device.cuh"

namespace roro {

constexpr int kActions = RORO_ROUTER_MAX_ACTIONS;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// From one row's sums over hidden units to everything router_score returns. One thread.
template <class W>
__device__ __forceinline__ void decide(const RoroRouterScore& a, int64_t n, const float (&sum)[kActions]) {
  float logit[kActions], x[kActions], top = -INFINITY, mass = 0.0f;
  const float u = a.uniforms[n];
#pragma unroll
  for (int k = 0; k < kActions; ++k) {  // all loads before the first store
    if (k >= a.K) break;
    logit[k] = sum[k] + to_float(static_cast<const W*>(a.b2)[k]);
    if (a.bias) logit[k] += a.bias[n * a.K + k];
    x[k] = a.temperature > 0.0f ? logit[k] / a.temperature : logit[k];
    top = fmaxf(top, x[k]);
  }
#pragma unroll
  for (int k = 0; k < kActions; ++k) {
    if (k >= a.K) break;
    a.logits[n * a.K + k] = logit[k];
    mass += expf(x[k] - top);
  }
  const float log_mass = logf(mass);
  float below = 0.0f, entropy = 0.0f, best = 0.0f, taken = 0.0f;
  int passed = 0, greedy = 0;
#pragma unroll
  for (int k = 0; k < kActions; ++k) {
    if (k >= a.K) break;
    const float logp = x[k] - top - log_mass, p = expf(logp);
    a.probs[n * a.K + k] = p;
    entropy -= p > 0.0f ? p * logp : p;  // 0 log 0 = 0; NaN stays
    below += p;
    passed += below <= u;
    if (p > best) best = p, greedy = k;
  }
  const int action = a.temperature > 0.0f ? min(passed, a.K - 1) : greedy;
#pragma unroll
  for (int k = 0; k < kActions; ++k) {
    if (k == action) taken = x[k] - top - log_mass;
  }
  a.action[n] = action;
  a.logprob[n] = taken;
  a.entropy[n] = entropy;
}

/// Elements, at most 16 bytes of them, that every row of this width is a whole, aligned number of.
template <class T>
int grain_of(const void* p, int64_t stride, int width) {
  int grain = 16 / sizeof(T);
  while (reinterpret_cast<uintptr_t>(p) % (grain * sizeof(T)) || stride % grain || width % grain) grain /= 2;
  return grain;
}

template <class T>
bool wide(const void* p, int64_t stride, int width) { return grain_of<T>(p, stride, width) == 16 / sizeof(T); }

/// f(T(), W()) for the dtypes of hidden and of the weights: equal, or float32 weights.
template <class F>
int by_dtypes(const RoroRouterScore& a, F f) {
  if (a.weight_dtype == RORO_F16) return f(f16(), f16());
  if (a.weight_dtype == RORO_BF16) return f(bf16(), bf16());
  if (a.hidden_dtype == RORO_F16) return f(f16(), float());
  if (a.hidden_dtype == RORO_BF16) return f(bf16(), float());
  return f(float(), float());
}

}  // namespace roro
