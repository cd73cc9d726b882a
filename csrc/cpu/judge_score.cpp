#include "cpu/judge_score.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/parallel.h"

#define RORO_KERNEL "cpu/judge_score_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

constexpr std::int64_t kChunkElements = 32768;

float score_of(const JudgeArgs& a, std::int64_t begin, std::int64_t end) {
  double total = 0, mass = 0;
  for (std::int64_t m = begin; m < end; ++m) {
    total += static_cast<double>(a.criterion_weight[m]) * a.value[m];
    mass += a.criterion_weight[m];
  }
  return mass > 0 ? static_cast<float>(total / mass) : 0.0f;
}

void normalise(const float* scores, std::int64_t n, float eps, float* advantages) {
  double mean = 0, square = 0;
  for (std::int64_t i = 0; i < n; ++i) mean += scores[i];
  mean /= n;
  for (std::int64_t i = 0; i < n; ++i) square += (scores[i] - mean) * (scores[i] - mean);
  const double spread = std::sqrt(square / n) + eps;
  for (std::int64_t i = 0; i < n; ++i) advantages[i] = static_cast<float>((scores[i] - mean) / spread);
}

}  // namespace

void judge_score(const JudgeArgs& a, int threads) {
  const auto verdicts = pick(scalar::verdicts, avx2::verdicts, avx512::verdicts);
  const std::int64_t work = std::max<std::int64_t>(1, a.width * a.labels);
  const std::int64_t grain = std::max<std::int64_t>(1, kChunkElements / work);
  parallel_for(a.slots, grain, threads, [&](std::int64_t begin, std::int64_t end) { verdicts(a, begin, end); });
  for (std::int64_t s = 0; s < a.trajectories; ++s) a.scores[s] = score_of(a, a.offsets[s], a.offsets[s + 1]);
  for (std::int64_t g = 0; g < a.groups; ++g) {
    const std::int64_t begin = a.group_offsets[g], n = a.group_offsets[g + 1] - begin;
    if (n > 0) normalise(a.scores + begin, n, a.eps, a.advantages + begin);
  }
}

}  // namespace roro::cpu
