// The two ends of kv_handoff.project: keys and values out of the source's pages, keys turned back, side by side as the
// products want them; and mapped ones, bias added, keys turned to their positions, into the receiver's pages.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace roro::cpu {

// [pages, layers, 2 (k, v), page_size, heads, dim], strides in elements; those of a head lie side by side.
struct PagedModel {
  void* data;
  DType type;
  std::int64_t layers, page_size, heads, dim;
  std::int64_t page_stride, layer_stride, kv_stride, token_stride, head_stride;
};

// Half-split rotary of each token: cos and sin [positions][dim], a scale folded in or not.
struct Turn {
  const float *cos, *sin;
  std::int64_t cos_stride, sin_stride;
  const std::int64_t* positions;
};

struct UnrotateArgs {
  PagedModel source;
  Turn turn;
  const std::int64_t *slots, *layers;  // layers [receivers, chosen]
  std::int64_t tokens, receivers, chosen;
  void* out;  // [receivers, 2, tokens, chosen * heads * dim]
  DType type;
};

void kv_unrotate(const UnrotateArgs& args, int threads);

struct RotateStoreArgs {
  PagedModel target;
  Turn turn;
  const std::int64_t* slots;
  std::int64_t tokens;
  const void* mapped;  // [layers, 2, tokens, heads * dim]
  DType type;
  const float* bias;  // [layers, 2, heads * dim]
};

void kv_rotate_store(const RotateStoreArgs& args, int threads);

}  // namespace roro::cpu
