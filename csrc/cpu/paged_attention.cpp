#include "cpu/paged_attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

#define RORO_KERNEL "cpu/paged_attention_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

constexpr std::int64_t kWidest = 16;  // floats in a vector of any instruction set

std::int64_t scratch_floats(std::int64_t dim) {
  const std::int64_t padded = round_up(dim, kWidest), stride = kAttentionRows + 16;
  return padded * (2 * kAttentionRows + stride + 2 * 64) + 2 * stride + 64 * stride + kWidest;
}

class Packer {
 public:
  Packer(const AttentionArgs& a, AttentionPlan& plan) : a_(a), plan_(plan), room_(a.heads ? capacity() : 1) {}

  void begin(std::int64_t prefix) {
    close();
    prefix_ = prefix;
  }

  void add(std::int64_t sequence) {
    std::int64_t at = a_.cu_seqlens[sequence];
    const std::int64_t end = a_.cu_seqlens[sequence + 1];
    while (at < end) {
      const std::int64_t n = std::min(end - at, room_);
      plan_.segments.push_back({sequence, at, at + n});
      at += n;
      room_ -= n;
      if (!room_) close();
    }
  }

  void close() {
    const std::int64_t now = static_cast<std::int64_t>(plan_.segments.size());
    if (now > first_) plan_.items.push_back({first_, now, prefix_});
    first_ = now;
    room_ = capacity();
  }

 private:
  std::int64_t capacity() const { return std::max<std::int64_t>(1, kAttentionRows / (a_.heads / a_.kv_heads)); }

  const AttentionArgs& a_;
  AttentionPlan& plan_;
  std::int64_t room_, prefix_ = 0, first_ = 0;
};

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& a, std::int64_t sequences, const std::int64_t* members,
                             const std::int64_t* offsets, const std::int64_t* lengths, std::int64_t n_groups) {
  AttentionPlan plan;
  Packer packer(a, plan);
  std::vector<bool> grouped(sequences, false);
  for (std::int64_t g = 0; g < n_groups; ++g) {
    packer.begin(lengths[g]);
    for (std::int64_t i = offsets[g]; i < offsets[g + 1]; ++i) {
      grouped[members[i]] = true;
      packer.add(members[i]);
    }
  }
  for (std::int64_t s = 0; s < sequences; ++s) {
    if (grouped[s]) continue;
    packer.begin(0);
    packer.add(s);
  }
  packer.close();
  return plan;
}

void paged_attention(const AttentionArgs& a, const AttentionPlan& plan, int threads) {
  const auto attend = pick(scalar::attend, avx2::attend, avx512::attend);
  const std::int64_t items = static_cast<std::int64_t>(plan.items.size());
  parallel_for(items * a.kv_heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    auto* memory = reinterpret_cast<float*>(scratch(scratch_floats(a.dim) * 4));
    for (std::int64_t i = begin; i < end; ++i) {
      attend(a, plan.segments.data(), plan.items[i / a.kv_heads], i % a.kv_heads, memory);
    }
  });
}

}  // namespace roro::cpu
