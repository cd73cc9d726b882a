// Products of bf16 rows and weights with float sums, by instruction set.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace roro::cpu {

struct HalfProduct {
  const bf16* x;  // [rows padded to 32][stride], zero where padded
  std::int64_t x_stride;
  const bf16* w;  // [depth / 2][panel][2]
  std::int64_t panel, rows, depth;  // depth is a multiple of 32
  float* acc;     // [rows padded to 32][stride]
  std::int64_t acc_stride;
  bool first;     // acc holds nothing yet
};

void half_product_avx512(const HalfProduct& p);
void half_product_amx(const HalfProduct& p);
void half_product_amx_emulated(const HalfProduct& p);

// Around all products of a block, on the thread that runs them.
void amx_begin();
void amx_end();

}  // namespace roro::cpu
