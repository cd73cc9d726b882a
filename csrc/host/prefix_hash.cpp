#include "prefix_hash.h"

#include <stdexcept>
#include <string>

namespace roro {

namespace {

constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15ull;

// Finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
inline std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace

std::uint64_t chain_hash(std::uint64_t parent, const std::int64_t* tokens, std::int64_t n) {
  std::uint64_t content = static_cast<std::uint64_t>(n);
  for (std::int64_t i = 0; i < n; ++i) {
    content += mix(mix(kGamma * static_cast<std::uint64_t>(i + 1)) ^ static_cast<std::uint64_t>(tokens[i]));
  }
  return mix(mix(parent + kGamma) + mix(content));
}

std::vector<std::uint64_t> chain_hashes(std::uint64_t root, const std::int64_t* tokens, std::int64_t n,
                                        std::int64_t page_size) {
  if (page_size < 1) throw std::invalid_argument("page_size: " + std::to_string(page_size) + " must be at least 1");
  std::vector<std::uint64_t> keys(n / page_size);
  for (std::size_t p = 0; p < keys.size(); ++p) {
    root = keys[p] = chain_hash(root, tokens + p * page_size, page_size);
  }
  return keys;
}

}  // namespace roro
