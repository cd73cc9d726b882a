// What the step of one model is put together from: its forward, the product with the head, and the draw.
#pragma once

#include "bind_torch.h"
#include "bind_torch_paged.h"

namespace roro {

struct DecoderBatch {
  const std::int64_t *ids, *positions, *slots;
  std::int64_t tokens;
  Paging paging;
  MaybeTensor members, offsets, lengths;  // of prefix groups
  const std::int64_t* wanted;             // nullptr: all
  std::int64_t num_wanted;
  const std::int64_t* state_slots;  // nullptr: the forward is whole
};

// The forward over the batch, whose values are checked; [num_wanted, hidden], [0, hidden] below a cut.
Tensor run_decoder(const Tensor& packed, const Tensor& embed, const Tensor& cos, const Tensor& sin, const Tensor& pages,
                   const DecoderBatch& batch, const MaybeTensor& states, bool below);

Tensor linear(const Tensor& x, const Tensor& packed, std::int64_t columns, bool float_out);

struct Draws {
  const float *uniforms, *temperature;
  const std::int64_t* top_k;  // nullptr: off
  const float* top_p;         // nullptr: off
};

struct SampledRows {
  std::int64_t* token;
  float *logprob, *entropy, *max_prob;
  bool* finite;
};

// The first `vocab` columns of logits count.
void sample(const Tensor& logits, std::int64_t vocab, const Draws& draws, const SampledRows& out);

}  // namespace roro
