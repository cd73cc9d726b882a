#include "host/catch_up.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace roro {
namespace {

[[noreturn]] void refuse(const char* field, std::int64_t i, std::int64_t value, const std::string& why) {
  throw std::invalid_argument(std::string(field) + "[" + std::to_string(i) + "]: " + std::to_string(value) + why);
}

}  // namespace

std::int64_t measure_catch_up(const CatchUp& c, std::int64_t* cu_seqlens) {
  if (c.page_size < 1) throw std::invalid_argument("page_size: " + std::to_string(c.page_size) + "; at least 1");
  const std::int64_t mapped = c.table_width * c.page_size;
  std::int64_t total = 0;
  cu_seqlens[0] = 0;
  for (std::int64_t i = 0; i < c.n; ++i) {
    const std::int64_t start = c.start[i], count = c.count[i];
    if (c.rows[i] < 0 || c.rows[i] >= c.sequences) {
      refuse("rows", i, c.rows[i], ", but there are " + std::to_string(c.sequences) + " sequences");
    }
    if (start < 0) refuse("start", i, start, " is negative");
    if (count < 0) refuse("count", i, count, " is negative");
    if (count > c.length - start) {
      refuse("count", i, count, " tokens from " + std::to_string(start) + ", but a row has " + std::to_string(c.length));
    }
    if (count > 0 && start + count > mapped) {
      refuse("count", i, count,
             " tokens from " + std::to_string(start) + ", but page_table maps " + std::to_string(mapped));
    }
    cu_seqlens[i + 1] = total += count;
  }
  return total;
}

void plan_catch_up(const CatchUp& c, std::int64_t* ids, std::int64_t* positions, std::int64_t* slots) {
  for (std::int64_t i = 0; i < c.n; ++i) {
    const std::int64_t* tokens = c.tokens + c.rows[i] * c.token_stride;
    const std::int64_t* table = c.table + c.rows[i] * c.table_stride;
    const std::int64_t stop = c.start[i] + c.count[i];
    std::int64_t at = c.start[i], page = at / c.page_size;
    for (; at < stop; ++page) {
      const std::int64_t first = page * c.page_size, end = std::min(stop, first + c.page_size);
      const std::int64_t base = table[page] * c.page_size - first;
      for (; at < end; ++at) {
        *ids++ = tokens[at];
        *positions++ = at;
        *slots++ = base + at;
      }
    }
  }
}

}  // namespace roro
