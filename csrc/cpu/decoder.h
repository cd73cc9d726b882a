// A decoder's whole forward over paged keys and values: one call per batch, weights packed in one block of memory.
//
// What is computed between roundings to the model's dtype: each product with its bias (and silu(gate) * up), each sum
// with the residual stream, each norm, rotated q and k, attention. Sums inside are float.
//
// A forward may be cut in two after any layer. The residual stream between layers is rounded, and norms are computed from
// it as it was rounded, so the two halves together have the bits of the whole.
#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "cpu/paged_attention.h"
#include "cpu/types.h"

namespace roro::cpu {

struct DecoderSizes {
  std::int64_t layers, hidden, heads, kv_heads, dim, inner;
  std::int64_t qkv_bias, o_bias, mlp_bias, qk_norm, half;  // 0 or 1
  double eps;
  DType type() const { return half ? DType::bf16 : DType::f32; }
  std::int64_t q_width() const { return heads * dim; }
  std::int64_t qkv_width() const { return (heads + 2 * kv_heads) * dim; }
  LinearSizes qkv() const { return {qkv_width(), hidden, type(), false}; }
  LinearSizes o() const { return {hidden, q_width(), type(), false}; }
  LinearSizes gate_up() const { return {2 * inner, hidden, type(), true}; }
  LinearSizes down() const { return {hidden, inner, type(), false}; }
};

// Offsets in bytes: of a layer in the packed block, and of its parts in the layer.
struct DecoderLayout {
  std::int64_t norm, layers, layer_bytes, bytes;
  std::int64_t filled, input_norm, post_norm, q_norm, k_norm, qkv, o, gate_up, down;
};

DecoderLayout decoder_layout(const DecoderSizes& sizes);

struct DecoderHeader {
  std::int64_t magic, bytes;
  DecoderSizes sizes;
};

struct DecoderArgs {
  const char* packed;  // DecoderHeader, then what decoder_layout says
  const void* embed;   // [vocabulary][embed_stride]
  std::int64_t embed_stride;
  const float *cos, *sin;
  std::int64_t cos_stride, sin_stride;
  const std::int64_t *ids, *positions, *slots;
  std::int64_t tokens;
  PagedTensor k, v;  // of layer 0
  std::int64_t layer_stride, page_size;
  const std::int64_t* table;
  std::int64_t table_stride;
  const std::int64_t *kv_lens, *cu_seqlens;
  const std::int64_t* wanted;  // ascending rows of out; nullptr: all
  std::int64_t num_wanted;
  void* out;  // [num_wanted][hidden], after the final norm
  // The residual stream where the forward is cut, row t at state_slots[t]; nullptr: it is whole.
  char* states;
  std::int64_t state_page_stride, state_token_stride;  // in elements
  const std::int64_t* state_slots;
  bool below;  // ends there, out is not written; else it begins there instead of with the embeddings
};

void decoder_forward(const DecoderArgs& args, const AttentionPlan& plan, int threads);

// What `plan_attention` needs to know of the attention of any layer.
AttentionArgs decoder_attention(const DecoderArgs& args);

}  // namespace roro::cpu
