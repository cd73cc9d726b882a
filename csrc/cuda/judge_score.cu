// judge_score: hidden rows -> verdict probabilities -> trajectory scores -> group-normalised advantages, two launches.
//
// The first gives every warp one verdict row at a time: it is read once, against the K label rows, which wait in shared
// memory. The second gives every group of trajectories to one block. Every sum has a fixed order.
#include "cuda/device.cuh"

namespace roro {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 1056;              // a few per multiprocessor of the largest GPU; label rows are staged by each
constexpr int kLabelBytes = 96 * 1024;     // of shared memory; more labels than fit come in several pieces
constexpr int kSlotLanes = 8;              // lanes that share a trajectory's slots
constexpr int kMaxLabels = RORO_JUDGE_MAX_LABELS;

/// label_weight[:, first .. first + count) to shared memory, zeros beyond H.
template <class W>
__device__ __forceinline__ void stage(const RoroJudgeScore& a, W* labels, int first, int count) {
  const W* source = static_cast<const W*>(a.label_weight);
  for (int i = threadIdx.x; i < a.K * count; i += blockDim.x) {
    const int k = i / count, h = first + i % count;
    labels[i] = h < a.H ? source[k * a.label_stride + h] : from_float<W>(0.0f);
  }
}

template <class W>
__device__ __forceinline__ void stage_wide(const RoroJudgeScore& a, W* labels, int first, int count) {
  constexpr int V = 16 / sizeof(W);
  const W* source = static_cast<const W*>(a.label_weight);
  for (int i = threadIdx.x; i < a.K * (count / V); i += blockDim.x) {
    const int k = i / (count / V), h = i % (count / V) * V;
    *reinterpret_cast<Vec<W, V>*>(labels + k * count + h) = load<V, true>(source + k * a.label_stride, first + h, a.H);
  }
}

/// dot[k] += hidden row . label k over this lane's share of `count` inputs from `first`.
template <class T, class W, int LABELS, bool WIDE>
__device__ __forceinline__ void add_products(const RoroJudgeScore& a, const T* row, const W* labels, int first,
                                             int count, float (&dot)[LABELS]) {
  constexpr int V = 16 / sizeof(T), VW = 16 / sizeof(W) < V ? 16 / sizeof(W) : V, kStep = 32 * V;
  constexpr int kAhead = LABELS <= 8 ? 4 : 1;  // loads in flight before the first is used
  const int end = row ? a.H - first : 0;
  for (int base = threadIdx.x % 32 * V; base < count; base += kAhead * kStep) {
    Vec<T, V> x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) x[j] = load<V, WIDE>(row + first, base + j * kStep, end);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int h = base + j * kStep;
      if (h >= count) break;
#pragma unroll
      for (int k = 0; k < LABELS; ++k) {
        if (LABELS > 2 && k >= a.K) break;
        const W* w = labels + (LABELS > 2 ? k : min(k, a.K - 1)) * count + h;
#pragma unroll
        for (int part = 0; part < V; part += VW) {
          const Vec<W, VW> y = *reinterpret_cast<const Vec<W, VW>*>(w + part);
#pragma unroll
          for (int i = 0; i < VW; ++i) dot[k] += to_float(x[j].v[part + i]) * to_float(y.v[i]);
        }
      }
    }
  }
}

// LABELS >= K. `count`, a multiple of 8, inputs at a time; all of H at once when it fits.
template <class T, class W, int LABELS, bool WIDE>
__global__ void __launch_bounds__(kThreads, LABELS <= 8 ? 2 : 1)
    judge_verdicts_kernel(const RoroJudgeScore a, const int count, const bool wide_labels) {
  RORO_DYNAMIC_SHARED(memory);
  W* labels = reinterpret_cast<W*>(memory);
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const auto fill = [&](int first) {
    if (wide_labels) stage_wide(a, labels, first, count);
    else stage(a, labels, first, count);
    __syncthreads();
  };
  const bool once = count >= a.H;
  if (once) fill(0);
  const float valence = lane < a.K ? a.valence[lane] : 0.0f;
  for (int64_t base = int64_t(blockIdx.x) * warps; base < a.M; base += int64_t(gridDim.x) * warps) {
    const int64_t m = base + threadIdx.x / 32;
    const int64_t r = m < a.M ? a.rows[m] : -1;
    const bool inside = r >= 0 && r < a.T;
    const T* row = inside ? static_cast<const T*>(a.hidden) + r * a.hidden_stride : nullptr;
    float dot[LABELS];
#pragma unroll
    for (int k = 0; k < LABELS; ++k) dot[k] = inside ? 0.0f : NAN;
    for (int first = 0; first < a.H; first += count) {
      if (!once) {
        __syncthreads();
        fill(first);
      }
      add_products<T, W, LABELS, WIDE>(a, row, labels, first, count, dot);
    }
    float logit = -INFINITY;  // of label number `lane`
#pragma unroll
    for (int k = 0; k < LABELS; ++k) {
      if (k < a.K) {
        const float total = warp_sum(dot[k]);
        if (k == lane) logit = total;
      }
    }
    float top = logit;
#pragma unroll
    for (int lanes = 16; lanes; lanes >>= 1) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
    const float e = lane < a.K ? expf(logit - top) : 0.0f, p = e / warp_sum(e);
    const float value = warp_sum(p * valence);
    if (m >= a.M) continue;
    if (lane < a.K) a.probs[m * a.K + lane] = p;
    if (lane == 0) a.value[m] = a.criterion_weight[m] * value;
  }
}

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

/// Sum over the block of one number per thread, in a fixed order; the same in every thread.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float warp[kThreads / 32];
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += warp[i];
  return sum;
}

// One block per group; without groups, one per kThreads trajectories.
__global__ void __launch_bounds__(kThreads) judge_groups_kernel(const RoroJudgeScore a) {
  const int64_t g = blockIdx.x;
  const int64_t from = a.group_offsets ? clamp(a.group_offsets[g], 0, a.S) : g * kThreads;
  const int64_t to = a.group_offsets ? clamp(a.group_offsets[g + 1], from, a.S) : clamp(from + kThreads, from, a.S);
  const int lane = threadIdx.x % kSlotLanes;
  for (int64_t base = from; base < to; base += kThreads / kSlotLanes) {
    const int64_t s = base + threadIdx.x / kSlotLanes;
    float total = 0.0f, mass = 0.0f;
    if (s < to) {
      const int64_t first = clamp(a.offsets[s], 0, a.M), last = clamp(a.offsets[s + 1], first, a.M);
      for (int64_t m = first + lane; m < last; m += kSlotLanes) total += a.value[m], mass += a.criterion_weight[m];
    }
#pragma unroll
    for (int lanes = kSlotLanes / 2; lanes; lanes >>= 1) {
      total += __shfl_xor_sync(kAllLanes, total, lanes);
      mass += __shfl_xor_sync(kAllLanes, mass, lanes);
    }
    if (lane == 0 && s < to) a.scores[s] = mass > 0.0f ? total / mass : 0.0f;
  }
  if (!a.group_offsets || from == to) return;
  __syncthreads();
  const float count = float(to - from);
  float sum = 0.0f, squares = 0.0f;
  for (int64_t s = from + threadIdx.x; s < to; s += kThreads) sum += a.scores[s];
  const float mean = block_sum(sum) / count;
  for (int64_t s = from + threadIdx.x; s < to; s += kThreads) squares += (a.scores[s] - mean) * (a.scores[s] - mean);
  const float std = sqrtf(block_sum(squares) / count);
  for (int64_t s = from + threadIdx.x; s < to; s += kThreads) a.advantages[s] = (a.scores[s] - mean) / (std + a.eps);
}

template <class T, class W>
int launch_verdicts(const RoroJudgeScore& a, void* stream) {
  constexpr int V = 16 / sizeof(T), VW = 16 / sizeof(W);
  // Few rows: narrow blocks, so that every multiprocessor gets some.
  const int threads = a.M <= 512 ? 64 : kThreads, warps = threads / 32;
  const int64_t blocks = (a.M + warps - 1) / warps;
  const int fit = int(kLabelBytes / (sizeof(W) * a.K)) / 8 * 8, whole = (a.H + 7) / 8 * 8;
  const int count = whole < fit ? whole : fit;
  const size_t bytes = sizeof(W) * a.K * size_t(count);
  const dim3 grid(unsigned(blocks < kBlocks ? blocks : kBlocks));
  const bool wide = aligned16(a.hidden) && a.hidden_stride % V == 0 && a.H % V == 0;
  const bool wide_labels = aligned16(a.label_weight) && a.label_stride % VW == 0 && a.H % VW == 0;
  if (wide && a.K <= 2)
    return launch(judge_verdicts_kernel<T, W, 2, true>, grid, threads, bytes, stream, a, count, wide_labels);
  if (wide && a.K <= 8)
    return launch(judge_verdicts_kernel<T, W, 8, true>, grid, threads, bytes, stream, a, count, wide_labels);
  return launch(judge_verdicts_kernel<T, W, kMaxLabels, false>, grid, threads, bytes, stream, a, count, wide_labels);
}

}  // namespace
}  // namespace roro

using namespace roro;

extern "C" int roro_judge_score(const RoroJudgeScore* a, void* stream) {
  if (a->M) {
    int error;
    if (a->label_dtype == RORO_F16) error = launch_verdicts<f16, f16>(*a, stream);
    else if (a->label_dtype == RORO_BF16) error = launch_verdicts<bf16, bf16>(*a, stream);
    else if (a->hidden_dtype == RORO_F16) error = launch_verdicts<f16, float>(*a, stream);
    else if (a->hidden_dtype == RORO_BF16) error = launch_verdicts<bf16, float>(*a, stream);
    else error = launch_verdicts<float, float>(*a, stream);
    if (error) return error;
  }
  if (!a->S) return 0;
  const int64_t blocks = a->group_offsets ? a->G : (a->S + kThreads - 1) / kThreads;
  return launch(judge_groups_kernel, dim3(unsigned(blocks)), kThreads, 0, stream, *a);
}
