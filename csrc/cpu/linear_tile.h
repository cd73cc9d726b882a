// Products of a few rows with a few panels, by instruction set.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace roro::cpu {

constexpr std::int64_t kTileColumns = 64;  // row stride of sums

struct LinearTile {
  const void* x;            // [rows][x_stride]
  const void* w;            // [panels][panel_stride], from the first k on
  std::int64_t x_stride, panel_stride, depth;  // in elements
  float* sums;              // [rows][kTileColumns]
  bool first;               // sums holds nothing yet
  const char* ahead;        // weights to prefetch, panel by panel; nullptr: none
  std::int64_t ahead_lines; // cache lines of each panel per four lines read
};

using LinearKernel = void (*)(const LinearTile& tile, std::int64_t rows, std::int64_t panels);

void linear_tile_avx512_bf16(const LinearTile& tile, std::int64_t rows, std::int64_t panels);
// 16 rows must be readable; sums of all 16 are written.
void linear_tile_amx(const LinearTile& tile, std::int64_t rows, std::int64_t panels);
void linear_tile_amx_emulated(const LinearTile& tile, std::int64_t rows, std::int64_t panels);

inline void prefetch_panels(const LinearTile& t, const char*& ahead, std::int64_t panels, std::int64_t bytes) {
  for (std::int64_t j = 0; j < panels; ++j) {
    for (std::int64_t l = 0; l < t.ahead_lines; ++l) {
      __builtin_prefetch(ahead + j * t.panel_stride * bytes + l * 64, 0, 2);
    }
  }
  ahead += t.ahead_lines * 64;
}

}  // namespace roro::cpu
