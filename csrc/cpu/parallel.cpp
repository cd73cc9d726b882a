#include "cpu/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "cpu/scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace roro::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kAwake = std::chrono::microseconds(200);  // longer than the host needs between two forwards' loops
constexpr int kMostHelpers = 255;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// One loop at a time. `turn` is odd while a loop is open. A helper enters (inside + 1), then looks whether the turn it
// came for is still open; the caller closes the turn, then waits until nobody is inside. One of the two sees the other.
class Pool {
 public:
  bool run(std::int64_t chunks, int helpers, Chunk chunk, void* context) {
    std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock() || !grow(std::min(helpers, kMostHelpers))) return false;
    chunk_ = chunk;
    context_ = context;
    chunks_ = chunks;
    helpers_ = helpers;
    next_.store(0, std::memory_order_relaxed);
    turn_.fetch_add(1);
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(beds_); }
      wake_.notify_all();
    }
    work();
    turn_.fetch_add(1);
    for (int spins = 0; inside_.load() > 0; ++spins) {
      relax();
      if (spins > 2000) sched_yield();  // whoever is inside may need this very core to get on
    }
    return true;
  }

 private:
  bool grow(int helpers) {
    try {
      while (threads_ < helpers) {
        std::thread([this, index = threads_] { help(index); }).detach();
        ++threads_;
      }
    } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
    }
    return threads_ > 0;
  }

  void work() {
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < chunks_;) chunk_(context_, i);
  }

  void help(int index);

  std::uint64_t await(std::uint64_t done);

  std::mutex callers_, beds_;
  std::condition_variable wake_;
  Chunk chunk_ = nullptr;
  void* context_ = nullptr;
  std::int64_t chunks_ = 0;
  int helpers_ = 0, threads_ = 0;
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<std::uint64_t> turn_{0};
  alignas(64) std::atomic<int> inside_{0}, sleeping_{0};
};

bool forked = false;
thread_local bool working = false;

void Pool::help(int index) {
  working = true;
  for (std::uint64_t done = 0;;) {
    const std::uint64_t turn = await(done);
    inside_.fetch_add(1);
    if (turn_.load() == turn && index < helpers_) work();
    inside_.fetch_sub(1);
    done = turn;
  }
}

// The next open turn after `done`: waits awake for a while, then asleep.
std::uint64_t Pool::await(std::uint64_t done) {
  const auto is_new = [&](std::uint64_t t) { return t % 2 == 1 && t != done; };
  const auto tired = Clock::now() + kAwake;
  for (int spins = 1;; ++spins) {
    if (const std::uint64_t t = turn_.load(); is_new(t)) return t;
    relax();
    if (spins % 256 == 0 && Clock::now() > tired) break;
  }
  std::unique_lock<std::mutex> lock(beds_);
  sleeping_.fetch_add(1);
  std::uint64_t t = 0;
  wake_.wait(lock, [&] { return is_new(t = turn_.load()); });
  sleeping_.fetch_sub(1);
  return t;
}

// Never destroyed: helpers may outlive static destructors.
Pool& pool() {
  static Pool& the = *new Pool;
  return the;
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool run_chunks(std::int64_t chunks, int helpers, Chunk chunk, void* context) {
  if (forked || working) return false;
  working = true;
  const bool ran = pool().run(chunks, helpers, chunk, context);
  working = false;
  return ran;
}

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
