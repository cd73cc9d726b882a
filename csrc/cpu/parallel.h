// Loop over chunks of work on a few threads of our own.
//
// Threads take chunks as they come, and the caller takes them all if nobody helps: it waits for threads that are inside
// a chunk, never for one that has not begun. On a busy machine a thread that is not running costs nothing, where a
// barrier of all threads costs a time slice per loop.
#pragma once

#include <algorithm>
#include <cstdint>

namespace roro::cpu {

using Chunk = void (*)(void* context, std::int64_t index);

// chunk(context, i) for each i in [0, chunks), on the caller and up to `helpers` other threads. Returns false, having
// done nothing, when other threads cannot help now: in a forked child, inside another loop, or while one is running.
bool run_chunks(std::int64_t chunks, int helpers, Chunk chunk, void* context);

// body(begin, end) for chunks of `grain` out of [0, n), on up to `threads` threads. body must not throw.
template <typename F>
void parallel_for(std::int64_t n, std::int64_t grain, int threads, F&& body) {
  const std::int64_t chunks = grain > 0 ? (n + grain - 1) / grain : 0;
  auto one = [&](std::int64_t i) { body(i * grain, std::min(n, (i + 1) * grain)); };
  const auto call = [](void* context, std::int64_t i) { (*static_cast<decltype(one)*>(context))(i); };
  const auto helpers = static_cast<int>(std::min<std::int64_t>(threads, chunks)) - 1;
  if (helpers > 0 && run_chunks(chunks, helpers, call, &one)) return;
  for (std::int64_t i = 0; i < chunks; ++i) one(i);
}

}  // namespace roro::cpu
