// The ragged batch of all tokens that one model has not seen yet.
#pragma once

#include <cstdint>

namespace roro {

struct CatchUp {
  const std::int64_t* tokens;  // [sequences][token_stride]
  std::int64_t sequences, length, token_stride;
  const std::int64_t* table;  // [sequences][table_stride]: pages of each sequence
  std::int64_t table_width, table_stride, page_size;
  const std::int64_t *rows, *start, *count;  // [n]: tokens [start, start + count) of sequence `rows`
  std::int64_t n;
};

// Checks the batch, writes cu_seqlens [n + 1] and returns the number of tokens. Throws std::invalid_argument.
std::int64_t measure_catch_up(const CatchUp& c, std::int64_t* cu_seqlens);

// ids, positions, slots: as many as `measure_catch_up` returned.
void plan_catch_up(const CatchUp& c, std::int64_t* ids, std::int64_t* positions, std::int64_t* slots);

}  // namespace roro
