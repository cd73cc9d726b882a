#include "cpu/sample_step.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sample_truncate.h"

namespace roro::cpu {
namespace {

constexpr int kSampleBlock = 256;

// Of one block of logits: its maximum m, sums of exp(x - m) and of exp(x - m) * (x - m), and, at the temperature, of
// exp((x - m) / t).
struct BlockSums {
  float top, mass, moment, hot;
};

}  // namespace
}  // namespace roro::cpu

#define RORO_KERNEL "cpu/sample_step_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

using ScanRow = bool (*)(const void*, DType, std::int64_t, float, BlockSums*);
using Exps = void (*)(const float*, std::int64_t, float, float, float*);

struct Row {
  Elements x;
  std::int64_t offset, vocab;
  float at(std::int64_t i) const { return x[offset + i]; }
};

struct Scratch {
  std::vector<BlockSums> blocks;
  std::vector<float> scales;  // exp of each block's maximum less the row's, over the temperature
  std::vector<Candidate> candidates;
  std::vector<float> values, masses, tops;
};

struct Draw {
  float temperature, top, uniform;
  std::int64_t top_k;
  float top_p;
};

std::int64_t first_of(const Row& row, const std::vector<BlockSums>& blocks, float top) {
  std::size_t b = 0;
  while (blocks[b].top != top) ++b;
  std::int64_t i = b * kSampleBlock;
  while (row.at(i) != top) ++i;
  return i;
}

void scale_blocks(Scratch& s, float top, float inverse_temperature, Exps exps) {
  s.tops.clear();
  for (const BlockSums& b : s.blocks) s.tops.push_back(b.top);
  s.scales.resize(s.tops.size());
  exps(s.tops.data(), s.tops.size(), top, inverse_temperature, s.scales.data());
}

// What block b weighs at the temperature that its scale is for.
double mass(const Scratch& s, std::size_t b) {
  return s.blocks[b].hot > 0 ? static_cast<double>(s.blocks[b].hot) * s.scales[b] : 0.0;
}

double total_mass(const Scratch& s) {
  double total = 0;
  for (std::size_t b = 0; b < s.blocks.size(); ++b) total += mass(s, b);
  return total;
}

// The id at which the cumulative sum over all ids first exceeds its share; ids without mass are never taken.
std::int64_t draw_plain(const Row& row, const Draw& d, const Scratch& s, Exps exps) {
  const double target = d.uniform * total_mass(s);
  double sum = 0;
  std::size_t chosen = 0;
  double below = 0;
  for (std::size_t b = 0; b < s.blocks.size(); ++b) {
    const double here = mass(s, b);
    if (here > 0) chosen = b, below = sum;
    sum += here;
    if (sum > target) break;
  }
  float x[kSampleBlock] = {}, e[kSampleBlock] = {};
  const std::int64_t begin = chosen * kSampleBlock, n = std::min<std::int64_t>(kSampleBlock, row.vocab - begin);
  for (std::int64_t i = 0; i < n; ++i) x[i] = row.at(begin + i);
  exps(x, n, d.top, 1 / d.temperature, e);
  std::int64_t last = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (e[i] > 0) last = i;
    below += e[i];
    if (e[i] > 0 && below > target) break;
  }
  return begin + last;
}

// All ids whose logit over temperature is at least `lowest`, with their masses.
void gather(const Row& row, const Draw& d, float lowest, Scratch& s, Exps exps) {
  s.candidates.clear();
  s.values.clear();
  for (std::size_t b = 0; b < s.blocks.size(); ++b) {
    if (!(s.blocks[b].top / d.temperature >= lowest)) continue;
    const std::int64_t begin = b * kSampleBlock, end = std::min<std::int64_t>(begin + kSampleBlock, row.vocab);
    for (std::int64_t i = begin; i < end; ++i) {
      const float value = row.at(i) / d.temperature;
      if (!(value >= lowest)) continue;
      s.candidates.push_back({value, 0, static_cast<std::int32_t>(i)});
      s.values.push_back(value);
    }
  }
  s.masses.resize(s.values.size());
  exps(s.values.data(), s.values.size(), d.top / d.temperature, 1, s.masses.data());
  for (std::size_t i = 0; i < s.masses.size(); ++i) s.candidates[i].mass = s.masses[i];
}

// At most this low is the top_k-th highest value: the top_k-th highest of the blocks' maxima.
float bound_of_top_k(const Draw& d, Scratch& s) {
  constexpr float kAnyFinite = std::numeric_limits<float>::lowest();
  if (static_cast<std::size_t>(d.top_k) > s.blocks.size()) return kAnyFinite;
  s.tops.clear();
  for (const BlockSums& b : s.blocks) s.tops.push_back(b.top);
  std::nth_element(s.tops.begin(), s.tops.begin() + d.top_k - 1, s.tops.end(), std::greater<float>());
  return std::max(s.tops[d.top_k - 1] / d.temperature, kAnyFinite);
}

// What lies lower cannot be in the smallest set of mass >= top_p: even all of it would weigh less than 1 - top_p.
float bound_of_top_p(const Row& row, const Draw& d, const Scratch& s) {
  const double depth = std::log(row.vocab / ((1.0 - d.top_p) * total_mass(s)));
  return static_cast<float>(d.top / d.temperature - std::max(depth, 0.0) - 0.01);
}

std::int64_t draw_truncated(const Row& row, const Draw& d, Scratch& s, Exps exps) {
  const bool use_k = d.top_k > 0 && d.top_k < row.vocab, use_p = d.top_p < 1;
  gather(row, d, use_k ? bound_of_top_k(d, s) : bound_of_top_p(row, d, s), s, exps);
  Candidate *first = s.candidates.data(), *last = first + s.candidates.size();
  if (use_k && last - first > d.top_k) {
    std::nth_element(first, first + d.top_k - 1, last, before);
    last = first + d.top_k;
  }
  if (use_p) {
    double total = 0;
    if (use_k) {
      for (Candidate* c = first; c < last; ++c) total += c->mass;
    } else {
      total = total_mass(s);
    }
    // Kept are those before which less than top_p lies: up to the one at which the sum reaches top_p.
    const double enough = std::nextafter(d.top_p * total, 0.0);
    Candidate* cut = weighted_select(first, last, enough, before);
    last = std::min(last, cut + 1);
  }
  double kept = 0;
  for (Candidate* c = first; c < last; ++c) kept += c->mass;
  const Candidate* chosen = weighted_select(first, last, d.uniform * kept, lower_id);
  if (chosen != last) return chosen->id;
  chosen = std::max_element(first, last, [](const Candidate& a, const Candidate& b) {
    return (a.mass > 0 ? a.id : -1) < (b.mass > 0 ? b.id : -1);
  });
  return chosen->id;
}

void sample_row(const SampleArgs& a, std::int64_t i, Scratch& s, ScanRow scan, Exps exps) {
  const std::int64_t bytes = a.type == DType::f32 ? 4 : 2;
  const Row row{{a.logits, a.type}, i * a.stride, a.vocab};
  Draw d{};
  const bool hot = a.temperature[i] > 0;
  d.temperature = hot ? std::max(a.temperature[i], 1e-6f) : 1.0f;
  d.uniform = a.uniforms[i];
  d.top_k = a.top_k ? a.top_k[i] : 0;
  d.top_p = a.top_p ? a.top_p[i] : 1.0f;
  s.blocks.resize((a.vocab + kSampleBlock - 1) / kSampleBlock);
  const bool numbers = scan(static_cast<const char*>(a.logits) + i * a.stride * bytes, a.type, a.vocab,
                            1 / d.temperature, s.blocks.data());
  d.top = -std::numeric_limits<float>::infinity();
  for (const BlockSums& b : s.blocks) d.top = std::max(d.top, b.top);
  a.finite[i] = numbers && std::isfinite(d.top);
  if (!a.finite[i]) {  // as if all logits were equal
    a.token[i] = 0;
    a.entropy[i] = static_cast<float>(std::log(static_cast<double>(a.vocab)));
    a.logprob[i] = -a.entropy[i];
    a.max_prob[i] = 1.0f / a.vocab;
    return;
  }
  scale_blocks(s, d.top, 1, exps);
  double z = 0, moment = 0;
  for (std::size_t j = 0; j < s.blocks.size(); ++j) {
    const BlockSums& b = s.blocks[j];
    if (!(b.mass > 0)) continue;
    const double gap = static_cast<double>(b.top) - d.top, scale = s.scales[j];
    z += b.mass * scale;
    moment += scale * (b.moment + b.mass * gap);
  }
  const double log_z = std::log(z);
  a.entropy[i] = static_cast<float>(log_z - moment / z);
  a.max_prob[i] = static_cast<float>(1 / z);
  if (hot && d.temperature != 1) scale_blocks(s, d.top, 1 / d.temperature, exps);
  const bool truncated = (d.top_k > 0 && d.top_k < a.vocab) || d.top_p < 1;
  a.token[i] = !hot ? first_of(row, s.blocks, d.top)
               : truncated ? draw_truncated(row, d, s, exps) : draw_plain(row, d, s, exps);
  a.logprob[i] = static_cast<float>(static_cast<double>(row.at(a.token[i])) - d.top - log_z);
}

}  // namespace

void sample_step(const SampleArgs& a, std::int64_t n, int threads) {
  const ScanRow scan = pick(scalar::scan_row, avx2::scan_row, avx512::scan_row);
  const Exps exps = pick(scalar::exps, avx2::exps, avx512::exps);
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(1, a.vocab));
  parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    thread_local Scratch scratch;
    for (std::int64_t i = begin; i < end; ++i) sample_row(a, i, scratch, scan, exps);
  });
}

}  // namespace roro::cpu
