// Ragged causal attention over paged keys and values: decode, catch-up and prefill rows in one call.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/types.h"

namespace roro::cpu {

constexpr std::int64_t kAttentionRows = 192;  // most query rows (tokens x query heads of one key head) of an item
constexpr std::int64_t kMaxHeadDim = 512;

struct PagedTensor {
  const void* data;
  DType type;
  std::int64_t page_stride, token_stride, head_stride;  // in elements; those of a head lie side by side
};

struct AttentionArgs {
  const void* q;  // [tokens, query heads, dim], strides in elements
  void* out;      // likewise, contiguous
  DType type;     // of q and out
  std::int64_t q_token_stride, q_head_stride, heads, kv_heads, dim;
  PagedTensor k, v;
  std::int64_t page_size;
  const std::int64_t* table;  // [sequences][table_stride]
  std::int64_t table_stride;
  const std::int64_t *kv_lens, *cu_seqlens;
  float scale;
};

// Query tokens [begin, end) of one sequence, as rows of q.
struct Segment {
  std::int64_t sequence, begin, end;
};

// Segments whose sequences share the pages of their first `prefix` tokens; whole blocks of them are read once for all.
// Together they have at most kAttentionRows query rows per key head.
struct AttentionItem {
  std::int64_t first, last, prefix;  // segments [first, last)
};

struct AttentionPlan {
  std::vector<Segment> segments;
  std::vector<AttentionItem> items;
};

// members [offsets[g] .. offsets[g + 1]) of group g share their first lengths[g] tokens; no groups when n_groups is 0.
AttentionPlan plan_attention(const AttentionArgs& args, std::int64_t sequences, const std::int64_t* members,
                             const std::int64_t* offsets, const std::int64_t* lengths, std::int64_t n_groups);

struct NormRopeArgs;

// `rope`: what makes q, keys and values of the same tokens, to be done before; decode rows go through both in one loop.
// The result of a row depends on its own query and context alone, bit for bit: not on the plan, nor on `threads`.
void paged_attention(const AttentionArgs& args, const AttentionPlan& plan, int threads,
                     const NormRopeArgs* rope = nullptr);

}  // namespace roro::cpu
