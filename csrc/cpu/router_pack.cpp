#include "cpu/router_pack.h"

#include <cstring>
#include <stdexcept>

#include "cpu/half_product.h"
#include "cpu/isa.h"

namespace roro::cpu {
namespace {

constexpr std::int64_t kMagic = 0x31726f7475726f72;

bool half_products(bool asked) { return asked && has_half_product(); }

// What the kernels keep in registers for one row.
std::int64_t panel_of(bool half) { return half_products(half) ? 64 : pick(8, 16, 64); }

}  // namespace

RouterLayout router_layout(const RouterSizes& s, std::int64_t panel, bool half) {
  RouterLayout l{};
  l.panel = panel;
  l.half = half;
  l.padded_width = round_up(s.width, panel);
  l.padded_hidden = half ? round_up(s.hidden, 32) : s.hidden;
  std::int64_t at = round_up(sizeof(RouterHeader), 64);
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t here = at;
    at = round_up(at + bytes, 64);
    return here;
  };
  l.hidden_at = take(l.padded_width * l.padded_hidden * (half ? 2 : 4));
  l.signals_at = take(l.padded_width * s.signals * 4);
  l.b1_at = take(l.padded_width * 4);
  l.w2_at = take(l.padded_width * s.actions * 4);
  l.b2_at = take(s.actions * 4);
  l.bytes = at;
  return l;
}

std::int64_t router_packed_bytes(const RouterSizes& sizes, bool half) {
  return router_layout(sizes, panel_of(half), half_products(half)).bytes;
}

void router_pack(const RouterTensors& w, const RouterSizes& s, bool half, void* packed) {
  const RouterLayout l = router_layout(s, panel_of(half), half_products(half));
  char* base = static_cast<char*>(packed);
  std::memset(base, 0, l.bytes);
  const RouterHeader header{kMagic, l.bytes, l.panel, l.half, s};
  std::memcpy(base, &header, sizeof header);
  auto* hidden = reinterpret_cast<float*>(base + l.hidden_at);
  auto* hidden_half = reinterpret_cast<bf16*>(base + l.hidden_at);
  auto* signals = reinterpret_cast<float*>(base + l.signals_at);
  auto* b1 = reinterpret_cast<float*>(base + l.b1_at);
  auto* w2 = reinterpret_cast<float*>(base + l.w2_at);
  auto* b2 = reinterpret_cast<float*>(base + l.b2_at);
  for (std::int64_t d = 0; d < s.width; ++d) {
    const std::int64_t panel = d / l.panel, column = d % l.panel;
    for (std::int64_t h = 0; h < s.hidden; ++h) {
      const float x = w.w1.at(d, h) * w.norm.at(0, h);
      if (l.half) {
        hidden_half[((panel * l.padded_hidden + h / 2 * 2) * l.panel) + column * 2 + h % 2] = to_bf16(x);
      } else {
        hidden[(panel * s.hidden + h) * l.panel + column] = x;
      }
    }
    for (std::int64_t j = 0; j < s.signals; ++j) {
      signals[(panel * s.signals + j) * l.panel + column] = w.w1.at(d, s.hidden + j);
    }
    b1[d] = w.b1.at(0, d);
    for (std::int64_t k = 0; k < s.actions; ++k) w2[k * l.padded_width + d] = w.w2.at(k, d);
  }
  for (std::int64_t k = 0; k < s.actions; ++k) b2[k] = w.b2.at(0, k);
}

RouterSizes router_packed_sizes(const void* packed, std::int64_t bytes) {
  RouterHeader header{};
  if (bytes >= static_cast<std::int64_t>(sizeof header)) std::memcpy(&header, packed, sizeof header);
  if (header.magic != kMagic || header.bytes != bytes) {
    throw std::runtime_error("weights: these are no packed router weights; make them with pack_router");
  }
  if (header.panel != panel_of(header.half) || (header.half && !half_products(true))) {
    throw std::runtime_error("weights: packed for another instruction set than " + isa_name(isa()) + "; pack again");
  }
  return header.sizes;
}

}  // namespace roro::cpu
