#include "cpu/paged_attention.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/half_product.h"
#include "cpu/isa.h"
#include "cpu/norm_rope_store.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace roro::cpu {
namespace {

constexpr std::int64_t kAttentionTile = 64;  // keys of a block
constexpr std::int64_t kHalfPanel = 64;      // columns of a bf16 product
constexpr std::int64_t kSomeRows = 32;       // that go through a block together; whole tiles of rows
constexpr std::int64_t kWorkBytes = kAttentionRows * 16 + kSomeRows * 8 + 256;  // of the bookkeeping of one head

static_assert(kSomeRows % kTileRows == 0);

using HalfProductFunction = void (*)(const HalfProduct&);

}  // namespace
}  // namespace roro::cpu

#define RORO_KERNEL "cpu/paged_attention_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

// What `heads` key heads of an item with `rows` rows each need, whatever their types and the instruction set.
std::int64_t scratch_bytes(std::int64_t dim, std::int64_t rows, std::int64_t heads) {
  constexpr std::int64_t kVectorBytes = 64, kBuffers = 8;
  const std::int64_t padded = round_up(dim, 32);
  const std::int64_t shared = 4 * (4 * kAttentionTile * padded + 2 * kSomeRows * kAttentionTile);
  const std::int64_t own = 4 * (2 * (rows + kTileRows) * padded + rows) + rows * kVectorBytes + kWorkBytes;
  return shared + heads * own + (heads + 1) * kBuffers * 64;
}

constexpr std::int64_t kReadRows = 16;        // up to here reading the pages is what takes the time
constexpr std::int64_t kItemsPerThread = 4;  // enough of them to be the unit of work
constexpr std::int64_t kMostHeads = kSomeRows / kHalfRows;  // of an item, on one thread: their scores are kept together
constexpr std::int64_t kMostInARow = 8;      // items that a thread takes at once, asking for the next one's keys

class Packer {
 public:
  Packer(const AttentionArgs& a, AttentionPlan& plan, std::int64_t tokens)
      : a_(a), plan_(plan), capacity_(a.heads ? capacity(tokens) : 1), room_(capacity_) {}

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
    room_ = capacity_;
  }

 private:
  // Tokens of an item: more of them share the packing of a block, fewer leave enough items for all threads.
  std::int64_t capacity(std::int64_t tokens) const {
    constexpr std::int64_t kItems = 8, kLeastRows = 64, kStep = 48;
    const std::int64_t ratio = a_.heads / a_.kv_heads;
    const std::int64_t rows = std::clamp(tokens * ratio / kItems / kStep * kStep, kLeastRows, kAttentionRows);
    return std::max<std::int64_t>(1, rows / ratio);
  }

  const AttentionArgs& a_;
  AttentionPlan& plan_;
  const std::int64_t capacity_;
  std::int64_t room_, prefix_ = 0, first_ = 0;
};

// So that threads that take one item after another end together.
void longest_first(const AttentionArgs& a, AttentionPlan& plan) {
  std::vector<std::pair<std::int64_t, AttentionItem>> items;
  for (const AttentionItem& item : plan.items) {
    std::int64_t work = 0;
    for (std::int64_t i = item.first; i < item.last; ++i) {
      const Segment& s = plan.segments[i];
      const std::int64_t seen = a.kv_lens[s.sequence] - (a.cu_seqlens[s.sequence + 1] - s.end);
      work += (s.end - s.begin + 1) * seen - (i > item.first ? item.prefix : 0);
    }
    items.push_back({work, item});
  }
  std::stable_sort(items.begin(), items.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
  for (std::size_t i = 0; i < items.size(); ++i) plan.items[i] = items[i].second;
}

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& a, std::int64_t sequences, const std::int64_t* members,
                             const std::int64_t* offsets, const std::int64_t* lengths, std::int64_t n_groups) {
  AttentionPlan plan;
  Packer packer(a, plan, sequences ? a.cu_seqlens[sequences] : 0);
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
  longest_first(a, plan);
  return plan;
}

void paged_attention(const AttentionArgs& a, const AttentionPlan& plan, int threads, const NormRopeArgs* rope) {
  if (!a.heads) return;
  const bool half = a.type == DType::bf16 && a.k.type == DType::bf16 && a.v.type == DType::bf16 && has_half_product();
  const auto attend = half ? pick(scalar::attend_half, avx2::attend_half, avx512::attend_half)
                           : pick(scalar::attend_float, avx2::attend_float, avx512::attend_float);
  const auto product = half_product();
  struct Unit {
    std::int64_t item, head, last_head;
  };
  std::vector<Unit> units;
  std::int64_t bytes = 0, most = 0, least = a.kv_heads, tokens = 0;
  const std::int64_t items = static_cast<std::int64_t>(plan.items.size());
  for (std::int64_t i = 0; i < items; ++i) {
    std::int64_t rows = 0;
    for (std::int64_t s = plan.items[i].first; s < plan.items[i].last; ++s) {
      rows += (plan.segments[s].end - plan.segments[s].begin) * (a.heads / a.kv_heads);
    }
    const std::int64_t parts = rows > kReadRows ? a.kv_heads : items < kItemsPerThread * threads ? threads : 1;
    const std::int64_t heads = std::min(kMostHeads, (a.kv_heads + parts - 1) / parts);
    for (std::int64_t h = 0; h < a.kv_heads; h += heads) units.push_back({i, h, std::min(h + heads, a.kv_heads)});
    bytes = std::max(bytes, scratch_bytes(a.dim, rows, heads));
    most = std::max(most, rows);
    least = std::min(least, heads);
    tokens += rows / (a.heads / a.kv_heads);
  }
  const std::int64_t n = static_cast<std::int64_t>(units.size());
  const std::int64_t grain = std::clamp<std::int64_t>(n / (kItemsPerThread * threads), 1, kMostInARow);
  const std::int64_t chunks = n < threads ? n : round_up((n + grain - 1) / grain, threads);
  // Where reading takes the time a thread goes on where it was, so that it can ask for what comes; else longest first.
  const std::int64_t shares = most <= kReadRows && n >= threads ? threads : 1, share = n ? chunks / shares : 0;
  const bool together = rope && most <= kReadRows && least == a.kv_heads;  // no item needs the keys of another's tokens
  if (rope && !together) norm_rope_store(*rope, tokens, threads);
  const auto unit_at = [&](std::int64_t chunk) { return n * chunk / chunks; };
  parallel_for(chunks, 1, threads, [&](std::int64_t turn, std::int64_t) {
    char* memory = scratch(bytes);
    const TileScope tiles(half);
    const std::int64_t c = turn % shares * share + turn / shares, own = unit_at((c / share + 1) * share);
    for (std::int64_t i = unit_at(c), end = unit_at(c + 1); i < end; ++i) {
      const Unit& u = units[i];
      const bool more = i + 1 < own && units[i + 1].head == u.head && units[i + 1].last_head == u.last_head;
      for (std::int64_t s = plan.items[u.item].first; together && s < plan.items[u.item].last; ++s) {
        norm_rope_store_some(*rope, plan.segments[s].begin, plan.segments[s].end);
      }
      attend(a, product, plan.segments.data(), plan.items[u.item], more ? &plan.items[units[i + 1].item] : nullptr,
             u.head, u.last_head, memory);
    }
  });
}

}  // namespace roro::cpu
