// Working memory of a thread: 64-byte aligned, grows, and is kept for the next call.
#pragma once

#include <cstddef>

namespace roro::cpu {

char* scratch(std::size_t bytes);

}  // namespace roro::cpu
