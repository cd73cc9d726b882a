#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/linear.h"
#include "cpu/parallel.h"

namespace roro::cpu {
namespace {

template <typename T>
void pack_panel(const LinearSizes& s, const T* weight, std::int64_t stride, std::int64_t panel, T* packed) {
  const std::int64_t depth = linear_padded_depth(s.type, s.depth), pair = sizeof(T) == 2 ? 2 : 1;
  const std::int64_t first = panel / kGroup * kGroup, panels = std::min(kGroup, linear_panels(s) - first);
  const std::int64_t width = s.gated ? s.columns / 2 : s.columns;
  const std::int64_t row = (s.gated ? panel / 2 : panel) * kPanel, base = s.gated && panel % 2 ? width : 0;
  T* to = packed + (first * depth + (panel - first) * pair) * kPanel;
  for (std::int64_t j = 0; j < kPanel; ++j) {
    const T* from = row + j < width ? weight + (base + row + j) * stride : nullptr;
    for (std::int64_t k = 0; k < depth; ++k) {
      to[k / pair * pair * panels * kPanel + j * pair + k % pair] = from && k < s.depth ? from[k] : T{};
    }
  }
}

}  // namespace

std::int64_t linear_padded_depth(DType type, std::int64_t depth) {
  return round_up(depth, type == DType::f32 ? 4 : 32);
}

std::int64_t linear_panels(const LinearSizes& s) {
  return s.gated ? round_up(s.columns / 2, kPanel) / kPanel * 2 : round_up(s.columns, kPanel) / kPanel;
}

std::int64_t linear_packed_bytes(const LinearSizes& s) {
  const std::int64_t depth = linear_padded_depth(s.type, s.depth);
  return round_up(linear_panels(s) * kPanel * (depth * (s.type == DType::f32 ? 4 : 2) + 4), 64);
}

void linear_pack(const LinearSizes& s, const void* weight, std::int64_t stride, const Elements& bias, void* packed,
                 int threads) {
  const std::int64_t panels = linear_panels(s), panel = linear_padded_depth(s.type, s.depth) * kPanel;
  parallel_for(panels, 8, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      s.type == DType::f32
          ? pack_panel(s, static_cast<const float*>(weight), stride, p, static_cast<float*>(packed))
          : pack_panel(s, static_cast<const bf16*>(weight), stride, p, static_cast<bf16*>(packed));
    }
  });
  auto* sums = reinterpret_cast<float*>(static_cast<char*>(packed) + panels * panel * (s.type == DType::f32 ? 4 : 2));
  const std::int64_t width = s.gated ? s.columns / 2 : s.columns;
  for (std::int64_t i = 0; i < panels * kPanel; ++i) {
    const std::int64_t p = i / kPanel, column = (s.gated ? p / 2 : p) * kPanel + i % kPanel;
    sums[i] = bias.data && column < width ? bias[column + (s.gated && p % 2 ? width : 0)] : 0.0f;
  }
}

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kLarge = 2 << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kLarge - 1) / kLarge * kLarge;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kLarge * kLarge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace roro::cpu
