// Products of bf16 rows and packed bf16 columns with float sums, by instruction set.
//
// Every element of the result is one chain of sums along the depth, the same whatever rows and columns are beside it.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace roro::cpu {

constexpr std::int64_t kTileRows = 32;  // the tile instructions take rows, depth and columns in these steps

struct HalfProduct {
  const bf16* const* x;   // rows of `depth`; for tiles x_stride apart, and padded to kTileRows rows
  std::int64_t x_stride;
  const bf16* w;          // [depth / 2][panel][2]
  std::int64_t panel;     // 16, 32, 48 or 64; for tiles 32 or 64
  std::int64_t rows, depth;  // depth is even; for tiles a multiple of 32
  float* acc;             // [rows][acc_stride], for tiles padded like x
  std::int64_t acc_stride;
  bool first;             // acc holds nothing yet
  std::int64_t w_panel = 0;  // of w as it lies, when it has more columns than `panel`, which are the first ones
  std::int64_t w_step() const { return 2 * (w_panel ? w_panel : panel); }  // from one pair of rows to the next
};

void half_product_avx512(const HalfProduct& p);
void half_product_amx(const HalfProduct& p);
void half_product_amx_emulated(const HalfProduct& p);

// Sum over n elements of x[i]^2, by the instruction of half_product_avx512.
float half_squares(const bf16* x, std::int64_t n);

// Around all products of a block, on the thread that runs them.
void amx_begin();
void amx_end();

inline bool has_half_product() { return isa() >= Isa::avx512_bf16; }
inline bool half_product_has_tiles() { return isa() >= Isa::amx; }

// The one for isa(), which must have one.
inline auto half_product() {
  return isa() == Isa::amx ? half_product_amx
                           : isa() == Isa::amx_emulated ? half_product_amx_emulated : half_product_avx512;
}

// Loads the tile configuration, where there are tiles, until the end of the scope.
class TileScope {
 public:
  explicit TileScope(bool wanted = true) : on_(wanted && isa() == Isa::amx) {
    if (on_) amx_begin();
  }
  ~TileScope() {
    if (on_) amx_end();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  bool on_;
};

}  // namespace roro::cpu
