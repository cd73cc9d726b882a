#include "cpu/parallel.h"

#include <pthread.h>

namespace roro::cpu {
namespace {

bool forked = false;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked; }

}  // namespace roro::cpu
