// What the AMX tile instructions do, one element at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/types.h"

namespace roro::cpu {

struct SoftwareTile {
  char row[16][64];

  void zero() { std::memset(row, 0, sizeof row); }
  void load(const void* p, std::int64_t bytes) {
    for (int i = 0; i < 16; ++i) std::memcpy(row[i], static_cast<const char*>(p) + i * bytes, 64);
  }
  void save(void* p, std::int64_t bytes) const {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(p) + i * bytes, row[i], 64);
  }
  template <typename T>
  T at(int i, int j) const {
    T x;
    std::memcpy(&x, row[i] + j * sizeof(T), sizeof x);
    return x;
  }
  void add_product(const SoftwareTile& a, const SoftwareTile& b) {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        float c = at<float>(m, n);
        for (int k = 0; k < 16; ++k) {
          c += to_float(a.at<bf16>(m, 2 * k)) * to_float(b.at<bf16>(k, 2 * n));
          c += to_float(a.at<bf16>(m, 2 * k + 1)) * to_float(b.at<bf16>(k, 2 * n + 1));
        }
        std::memcpy(row[m] + n * 4, &c, 4);
      }
    }
  }
};

}  // namespace roro::cpu
