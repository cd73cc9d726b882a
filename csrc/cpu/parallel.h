// Loop over chunks of work on OpenMP threads.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace roro::cpu {

// libgomp's threads do not survive fork(): a child runs on its own thread alone instead of hanging.
bool in_forked_child();

// body(begin, end) for chunks of `grain` out of [0, n), on up to `threads` threads. body must not throw.
template <typename F>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, F&& body) {
  const std::int64_t chunks = grain > 0 ? (n + grain - 1) / grain : 0;
#if defined(_OPENMP)
  threads = static_cast<int>(std::min<std::int64_t>(threads, chunks));
  if (threads > 1 && !omp_in_parallel() && !in_forked_child()) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t i = 0; i < chunks; ++i) body(i * grain, std::min(n, (i + 1) * grain));
    return;
  }
#endif
  for (std::int64_t i = 0; i < chunks; ++i) body(i * grain, std::min(n, (i + 1) * grain));
}

}  // namespace roro::cpu
