// Sample one token per row of logits, with the statistics that routing needs, in one read of the logits.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace roro::cpu {

struct SampleArgs {
  const void* logits;  // rows of `vocab` elements
  DType type;
  std::int64_t stride, vocab;
  const float *uniforms, *temperature;
  const std::int64_t* top_k;  // nullptr: off
  const float* top_p;         // nullptr: off
  std::int64_t* token;
  float *logprob, *entropy, *max_prob;
  bool* finite;
};

void sample_step(const SampleArgs& args, std::int64_t n, int threads);

}  // namespace roro::cpu
