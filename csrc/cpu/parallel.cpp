#include "cpu/parallel.h"

#include <pthread.h>

#include <cstdlib>
#include <memory>

#include "cpu/scratch.h"

namespace roro::cpu {
namespace {

bool forked = false;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

char* scratch(std::size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    size = (bytes + 63) / 64 * 64;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, size)));
  }
  return memory.get();
}

}  // namespace roro::cpu
