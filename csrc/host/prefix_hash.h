// Keys of prefix-cache pages. The specification is roro_fast/engine/pages.py; both give the same values.
#pragma once

#include <cstdint>
#include <vector>

namespace roro {

// Key of the page that holds tokens[0, n) and follows the page whose key is `parent`.
std::uint64_t chain_hash(std::uint64_t parent, const std::int64_t* tokens, std::int64_t n);

// Keys of all full pages of tokens[0, n); a trailing partial page has none.
std::vector<std::uint64_t> chain_hashes(std::uint64_t root, const std::int64_t* tokens, std::int64_t n,
                                        std::int64_t page_size);

}  // namespace roro
