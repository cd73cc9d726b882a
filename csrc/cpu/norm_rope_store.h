// The memory-bound steps around a decoder's products, each in one pass.
#pragma once

#include <cstdint>

#include "cpu/paged_attention.h"
#include "cpu/types.h"

namespace roro::cpu {

struct NormRopeArgs {
  const void* qkv;  // [tokens][qkv_stride]: heads of q, of k, of v, `dim` elements each
  void* q;          // [tokens, heads, dim]
  DType type;       // of both
  std::int64_t qkv_stride, heads, kv_heads, dim;
  const void *q_norm, *k_norm;  // [dim], nullptr: none
  DType norm_type;
  const float *cos, *sin;       // [positions][dim]
  std::int64_t cos_stride, sin_stride;
  const std::int64_t *positions, *slots;
  PagedTensor k, v;
  std::int64_t page_size;
  float eps;
};

void norm_rope_store(const NormRopeArgs& args, std::int64_t tokens, int threads);

// Tokens [begin, end), on this thread, in its scratch memory.
void norm_rope_store_some(const NormRopeArgs& args, std::int64_t begin, std::int64_t end);

struct AddNormArgs {
  const void *x, *residual, *weight;
  void *normed, *total;
  DType type, weight_type;  // of all but weight
  std::int64_t x_stride, residual_stride, width;
  float eps;
};

void add_rms_norm(const AddNormArgs& args, std::int64_t tokens, int threads);

struct SiluMulArgs {
  const void* gate_up;
  void* out;
  DType type;
  std::int64_t stride, width;  // of gate and of up
};

void silu_mul(const SiluMulArgs& args, std::int64_t tokens, int threads);

}  // namespace roro::cpu
