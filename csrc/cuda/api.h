// What the CUDA kernels offer to a binding: plain structs and extern "C" launchers, no framework.
//
// A launcher checks nothing but what it needs to choose a kernel: shapes and ranges are the binding's to check. It
// returns 0, or a CUDA error code that `roro_cuda_error` puts in words. Pointers are device pointers; row strides are
// in elements and the last dimension of every tensor is contiguous.
#pragma once
#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

enum RoroDtype { RORO_F32 = 0, RORO_F16 = 1, RORO_BF16 = 2 };

const char* roro_cuda_error(int code);
int roro_stream_capturing(void* stream, int* capturing);
int roro_stream_synchronize(void* stream);

// hidden [T, H]; rows [N] or null for the first N rows; signals [N, S]; w1 [D, H + S]; b1 [D]; w2 [K, D]; b2 [K];
// norm [H]; bias [N, K] or null; uniforms [N]. One weight dtype, one hidden dtype; everything else is float32.
// An index outside [0, T) is never read through: that row's probabilities are NaN and its action is 0.
struct RoroRouterScore {
  const void* hidden;
  const int64_t* rows;
  const float *signals, *uniforms, *bias;
  const void *norm, *w1, *b1, *w2, *b2;
  int64_t* action;
  float *logprob, *entropy, *probs, *logits;
  float* workspace;   // roro_router_score_workspace() floats; not initialised (one-launch path only)
  unsigned* tickets;  // roro_router_score_tickets() counters, zero before and after (one-launch path only)
  void* x;            // [N, H + S] of the weight dtype, rows x_stride apart (large path only)
  const void* z;      // x w1^T, [N, D] of the weight dtype (epilogue only)
  int64_t T, N, hidden_stride, w1_stride, x_stride;
  int H, S, D, K;
  int hidden_dtype, weight_dtype;
  float temperature, eps;
};

enum { RORO_ROUTER_MAX_ROWS = 256, RORO_ROUTER_MAX_SIGNALS = 256, RORO_ROUTER_MAX_ACTIONS = 8 };

int64_t roro_router_score_workspace(int64_t N, int H, int D, int K);
int64_t roro_router_score_tickets(int D);
// N <= 256, S <= 256: everything in one launch.
int roro_router_score(const RoroRouterScore* args, void* stream);
// Any N: x = [rms_norm(hidden) * norm, signals]; the caller multiplies; then the rest.
int roro_router_inputs(const RoroRouterScore* args, void* stream);
int roro_router_epilogue(const RoroRouterScore* args, void* stream);

// hidden [T, H]; rows [M]; label_weight [K, H]; criterion_weight [M]; offsets [S + 1]; valence [K]; group_offsets
// [G + 1] or null. label_weight is float32 or of hidden's dtype. A row outside [0, T) makes its probabilities NaN;
// offsets are clamped to what exists.
struct RoroJudgeScore {
  const void* hidden;
  const int64_t* rows;
  const void* label_weight;
  const float* criterion_weight;
  const int64_t* offsets;
  const float* valence;
  const int64_t* group_offsets;
  float *probs, *value, *scores, *advantages;  // [M, K], [M] (scratch), [S], [S]
  int64_t T, M, S, G, hidden_stride, label_stride;
  int H, K;
  int hidden_dtype, label_dtype;
  float eps;
};

enum { RORO_JUDGE_MAX_LABELS = 32 };

int roro_judge_score(const RoroJudgeScore* args, void* stream);

enum { RORO_KV_INNER = 4 };

// [pages, inner..., page_size, heads, dim], dim contiguous; strides in elements, 0 where the size is 1.
struct RoroKvPool {
  void* data;
  int64_t pages, page_size, page_stride, token_stride, head_stride, inner_stride[RORO_KV_INNER];
};

// Span i: tokens[i] (null: 1) tokens from source_slot[i * slot_stride] to target_slot[i * slot_stride], where
// slot = page * page_size + offset. Spans outside a pool are skipped. A pool has fewer than 2^31 slots.
struct RoroKvCopy {
  RoroKvPool source, target;
  const int64_t *source_slot, *target_slot, *tokens;
  int64_t slot_stride, n;
  int64_t inner_size[RORO_KV_INNER], heads, dim;  // inner sizes are 1 where there is no such dimension
  int source_dtype, target_dtype, element_size;   // equal dtypes may be any; element_size is the source's
};

int roro_kv_copy(const RoroKvCopy* args, void* stream);

#ifdef __cplusplus
}
#endif
