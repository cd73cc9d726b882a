// Verdict rows against the K verdict words only, softmax, weighted valence, and sums per trajectory and group.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace roro::cpu {

constexpr std::int64_t kMaxLabels = 64;

struct JudgeArgs {
  const void *hidden, *label_weight;  // rows of `width` elements
  DType hidden_type, label_type;
  std::int64_t hidden_stride, label_stride, width, labels;
  const std::int64_t* rows;                            // [slots]
  const float *criterion_weight, *valence;             // [slots], [labels]
  const std::int64_t *offsets, *group_offsets;         // [trajectories + 1], [groups + 1] or nullptr
  std::int64_t slots, trajectories, groups;
  float eps;
  float *probs, *value, *scores, *advantages;  // [slots, labels], [slots] scratch, [trajectories] twice
};

void judge_score(const JudgeArgs& args, int threads);

}  // namespace roro::cpu
