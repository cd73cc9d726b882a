// y = x W^T + b with weights packed once, at memory bandwidth for few rows and near the peak for many.
//
// Columns of y are cut in panels of 16 and groups of 4 panels (the last group may have fewer): [group][K][64] floats, or
// for bf16 [group][K / 2][64][2], one stream of memory that dot-product and tile instructions read as it lies; depth is
// padded with zeros. Every element is one sum over ascending k, whatever the other rows, the blocking and the number of
// threads, so a row's result has the same bits alone and in any batch.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace roro::cpu {

constexpr std::int64_t kPanel = 16, kGroup = 4;

struct LinearSizes {
  std::int64_t columns, depth;  // rows of W, columns of W
  DType type;
  bool gated;  // W is [gate; up]: y = silu(x gate^T) * (x up^T), half as wide; panels of gate and up alternate
};

std::int64_t linear_padded_depth(DType type, std::int64_t depth);
std::int64_t linear_panels(const LinearSizes& sizes);
std::int64_t linear_packed_bytes(const LinearSizes& sizes);  // groups, then the bias, [panels * 16] float

// weight [columns][stride]; bias [columns] or no data.
void linear_pack(const LinearSizes& sizes, const void* weight, std::int64_t stride, const Elements& bias, void* packed,
                 int threads);

struct LinearArgs {
  LinearSizes sizes;
  const void* packed;
  bool bias;  // add it
  const void* x;  // [rows][x_stride] of sizes.type
  std::int64_t rows, x_stride;
  void* out;  // [rows][out_stride]
  DType out_type;
  std::int64_t out_stride;
  // The weights that come next, with the same type and number of rows: each thread asks for where it will begin.
  const void* next = nullptr;
  LinearSizes next_sizes{};
};

void linear(const LinearArgs& args, int threads);

// Asks for large pages under a buffer that is about to be filled: 5 % more bandwidth, fewer TLB misses.
void prefer_large_pages(void* data, std::int64_t bytes);

}  // namespace roro::cpu
