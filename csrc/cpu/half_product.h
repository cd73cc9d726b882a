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

// Rows that are read next, of `parts` pieces each, asked for bit by bit at `steps` steps: all at once they would hold
// up what is being read, and a memory that nobody asks stands still.
class RowsAhead {
 public:
  RowsAhead(const char* const* rows, std::int64_t n, std::int64_t parts, std::int64_t part_step,
            std::int64_t part_bytes, std::int64_t steps)
      : row_(rows),
        end_(rows + n),
        parts_(part_step == part_bytes ? 1 : parts),
        part_step_(part_step),
        part_bytes_(part_step == part_bytes ? parts * part_bytes : part_bytes),
        each_(steps ? static_cast<int>((n * kUnit + steps - 1) / steps) : 0) {}

  void step(int steps = 1) {
    for (due_ += each_ * steps; due_ >= kUnit && row_ < end_; due_ -= kUnit, ++row_) {
      const char* part = *row_;
      for (std::int64_t i = 0; i < parts_; ++i, part += part_step_) {
        for (std::int64_t b = 0; b < part_bytes_; b += 64) __builtin_prefetch(part + b, 0, 2);
      }
    }
  }

 private:
  static constexpr int kUnit = 1024;
  const char* const* row_;
  const char* const* const end_;
  const std::int64_t parts_, part_step_, part_bytes_;
  const int each_;
  int due_ = 0;
};

// Products of up to kHalfRows rows with w where it lies, with the sums of half_product_avx512.
struct HalfRows {
  const bf16* const* x;        // rows of `depth`
  const char* const* w;        // rows of bf16: one per column of `depth` each, or one per step of the depth
  std::int64_t w_offset;       // of what is meant in each, in bytes
  std::int64_t depth, columns; // in steps of 16 and 16; by depth: of 2 and 32
  float* acc;                  // [rows][acc_stride]
  std::int64_t acc_stride;
  RowsAhead* ahead;
};

constexpr std::int64_t kHalfRows = 4;
constexpr int kColumnSteps = 2;

// acc = x w^T, one row of w per column. Takes kColumnSteps of `ahead` for 16 columns and 16 of their depth.
void half_rows_by_columns(const HalfRows& p, std::int64_t rows);
// acc += x w, one row of w per step of the depth. Takes one step of `ahead` for 2 of them
// and 64 columns.
void half_rows_by_depth(const HalfRows& p, std::int64_t rows);

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
