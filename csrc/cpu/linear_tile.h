// Products of a few rows with a few panels of a group, by instruction set.
#pragma once

#include <cstdint>

#include "cpu/linear.h"

namespace roro::cpu {

constexpr std::int64_t kTileColumns = 64;  // row stride of sums

struct LinearTile {
  const void* x;  // [rows][x_stride]
  const void* w;  // [depth or depth / 2][w_stride]: 16 columns per panel, side by side
  std::int64_t x_stride, w_stride, depth;  // in elements
  float* sums;               // [rows][kTileColumns]
  bool first;                // sums holds nothing yet
  const char* ahead;         // weights to prefetch; nullptr: none
  std::int64_t ahead_lines;  // 64-byte lines of them per four rows of w
};

using LinearKernel = void (*)(const LinearTile& tile, std::int64_t rows, std::int64_t panels);

// Bias, gate and rounding: from sums of rows [row, row + rows), panels [panel, panel + panels), to the result.
using LinearFinish = void (*)(const LinearArgs& args, const float* bias, std::int64_t row, std::int64_t rows,
                              std::int64_t panel, std::int64_t panels, const float* sums);

void linear_finish_avx512_bf16(const LinearArgs& args, const float* bias, std::int64_t row, std::int64_t rows,
                               std::int64_t panel, std::int64_t panels, const float* sums);
void linear_tile_avx512_bf16(const LinearTile& tile, std::int64_t rows, std::int64_t panels);
// 16 rows must be readable; sums of all 16 are written.
void linear_tile_amx(const LinearTile& tile, std::int64_t rows, std::int64_t panels);
void linear_tile_amx_emulated(const LinearTile& tile, std::int64_t rows, std::int64_t panels);

inline const char* prefetch(const char* from, std::int64_t lines) {
  for (std::int64_t l = 0; l < lines; ++l) __builtin_prefetch(from + l * 64, 0, 2);
  return from + lines * 64;
}

}  // namespace roro::cpu
