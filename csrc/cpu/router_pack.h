// Layout of packed router weights.
//
// Units are cut in panels of `panel` columns. A panel of the hidden part is [H][panel] float, or, for bf16 products,
// [H / 2][panel][2] bf16 with H padded to a multiple of 32, as the dot-product and tile instructions read it. The norm's
// weight is folded in: w1 * (x * rstd * norm) = rstd * ((w1 * norm) * x), so raw rows enter the product and each sum is
// scaled once. Signals, biases and the second layer stay float.
#pragma once

#include <cstdint>

#include "cpu/router_score.h"

namespace roro::cpu {

struct RouterHeader {
  std::int64_t magic, bytes, panel, half;
  RouterSizes sizes;
};

struct RouterLayout {
  std::int64_t panel, padded_width, padded_hidden;  // padded_width: D in whole panels
  bool half;
  std::int64_t hidden_at, signals_at, b1_at, w2_at, b2_at, bytes;  // offsets in bytes
};

RouterLayout router_layout(const RouterSizes& sizes, std::int64_t panel, bool half);

struct PackedRouter {
  RouterLayout layout;
  const char* base;
  const float* hidden() const { return reinterpret_cast<const float*>(base + layout.hidden_at); }
  const bf16* hidden_half() const { return reinterpret_cast<const bf16*>(base + layout.hidden_at); }
  const float* signals() const { return reinterpret_cast<const float*>(base + layout.signals_at); }
  const float* b1() const { return reinterpret_cast<const float*>(base + layout.b1_at); }
  const float* w2() const { return reinterpret_cast<const float*>(base + layout.w2_at); }
  const float* b2() const { return reinterpret_cast<const float*>(base + layout.b2_at); }
};

}  // namespace roro::cpu
