// The CUDA that csrc/cuda uses, on the CPU: one fiber per thread, one block at a time, so that the same source runs,
// and its faults show, without a GPU. Included by csrc/cuda/device.cuh when RORO_EMULATOR is defined.
//
// What it catches: divergent or abandoned barriers and warp collectives (the launch returns 999 and a text); missing
// barriers (dynamic shared memory is poisoned per block and threads run in an order that `emu_set_order` changes);
// over-runs of dynamic shared memory (a guard page). It does not see missing memory fences: it has one memory.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // blocks run one after another

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t u = uint32_t(b.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return {uint16_t(0x7fff)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half(float f) { return {_Float16(f)}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorEmulated = 999 };

// Saves the callee-saved registers on this stack and continues on another.
extern "C" void emu_switch(void** from, void* to);
#if !defined(__x86_64__)
#error "the emulator's fibers are written for x86-64"
#endif
asm(R"(
.text
.weak emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emu {

enum class State { ready, at_warp, at_block, done };
enum class Kind { none, shuffle, syncwarp, mma };

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::ready;
};

struct Warp {
  unsigned arrived = 0, generation = 0;
  Kind kind = Kind::none;
  alignas(16) unsigned char slot[2][32][32];  // [parity of the generation][lane]
};

constexpr size_t kStack = 64 * 1024;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<int> ready, order;
inline char* stacks = nullptr;
inline size_t stack_count = 0;
inline void* scheduler = nullptr;
inline unsigned current = 0, threads = 0, at_barrier = 0, barriers = 0;
inline dim3 block_idx, block_dim, grid_dim, thread_idx;
inline std::function<void()> body;
inline std::string message = "no error";
inline bool failed = false;
inline unsigned seed = 0;
inline unsigned char *shared_memory = nullptr, *shared_map = nullptr;
inline size_t shared_map_size = 0;

inline void yield() { emu_switch(&fibers[current].stack_pointer, scheduler); }

inline void fault(const std::string& what) {
  char where[96];
  std::snprintf(where, sizeof where, " (block %u,%u thread %u)", block_idx.x, block_idx.y, current);
  if (!failed) message = what + where;
  failed = true;
  for (;;) yield();
}

inline void entry() {
  body();
  fibers[current].state = State::done;
  for (;;) yield();
}

inline void release(unsigned first, unsigned last) {
  for (unsigned i = first; i < last; ++i) {
    const unsigned lane = order[i];
    fibers[lane].state = State::ready;
    ready.push_back(int(lane));
  }
}

inline void wait_warp(Kind kind) {
  const unsigned w = current / 32, first = w * 32, last = std::min(first + 32, threads);
  Warp& warp = warps[w];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fault("lanes of one warp are in different collectives");
  if (++warp.arrived == last - first) {
    warp.arrived = 0;
    ++warp.generation;
    fibers[current].state = State::at_warp;
    release(first, last);
  } else {
    fibers[current].state = State::at_warp;
  }
  yield();
}

inline void wait_block() {
  fibers[current].state = State::at_block;
  if (++at_barrier == threads) {
    at_barrier = 0;
    ++barriers;
    release(0, threads);
  }
  yield();
}

/// All lanes give `value`; returns where the lanes' values lie, 32 bytes apart, until the collective after the next.
template <class T>
unsigned char (*gather(const T& value, Kind kind))[32] {
  static_assert(sizeof(T) <= 32, "a lane exchanges at most 32 bytes");
  Warp& warp = warps[current / 32];
  auto* slot = warp.slot[warp.generation & 1];
  std::memcpy(slot[current % 32], &value, sizeof(T));
  wait_warp(kind);
  return slot;
}

template <class T>
T shuffle(unsigned mask, const T& value, unsigned source) {
  if (mask != 0xffffffffu) fault("a shuffle with a partial mask is not emulated");
  T out;
  auto* slot = gather(value, Kind::shuffle);
  if (current / 32 * 32 + source >= threads) fault("a shuffle reads a lane that does not exist");
  std::memcpy(&out, slot[source], sizeof(T));
  return out;
}

inline void map_stacks(unsigned n) {
  if (stack_count >= n) return;
  if (stacks) munmap(stacks, stack_count * kStack);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  stacks = static_cast<char*>(mmap(nullptr, n * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
  stack_count = n;
}

/// `bytes` of shared memory that end (to 16 bytes) at a page nobody may touch.
inline void map_shared(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), used = (bytes + page - 1) / page * page;
  if (shared_map) munmap(shared_map, shared_map_size);
  shared_map_size = used + page;
  shared_map = static_cast<unsigned char*>(
      mmap(nullptr, shared_map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(shared_map + used, page, PROT_NONE);
  shared_memory = shared_map + used - (bytes + 15) / 16 * 16;
}

inline void start(Fiber& fiber, unsigned i) {
  void** top = reinterpret_cast<void**>(stacks + (i + 1) * kStack);
  *--top = nullptr;                            // return address of entry: never used
  *--top = reinterpret_cast<void*>(&entry);    // where emu_switch returns to
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.state = State::ready;
}

inline void run_block(size_t shared_bytes, std::mt19937& random) {
  std::memset(shared_memory, 0xff, (shared_bytes + 15) / 16 * 16);  // NaN in every float type
  at_barrier = 0;
  for (auto& w : warps) w.arrived = 0, w.generation = 0;
  for (unsigned i = 0; i < threads; ++i) order[i] = int(i), start(fibers[i], i);
  for (unsigned w = 0; seed && w < threads; w += 32) {
    const auto first = order.begin() + w, last = order.begin() + std::min(w + 32, threads);
    if (seed == 1) std::reverse(first, last);
    else std::shuffle(first, last, random);
  }
  ready.assign(order.begin(), order.end());
  if (seed == 0) std::reverse(ready.begin(), ready.end());
  if (seed > 1) std::shuffle(ready.begin(), ready.end(), random);
  while (!ready.empty() && !failed) {
    current = unsigned(ready.back());
    ready.pop_back();
    const unsigned row = current / block_dim.x;
    thread_idx = dim3(current % block_dim.x, row % block_dim.y, row / block_dim.y);
    emu_switch(&scheduler, fibers[current].stack_pointer);
  }
  if (failed) return;
  unsigned done = 0, block = 0, warp = 0;
  for (const auto& f : fibers) {
    done += f.state == State::done;
    block += f.state == State::at_block;
    warp += f.state == State::at_warp;
  }
  if (done == threads) return;
  char text[160];
  std::snprintf(text, sizeof text,
                "barrier divergence: %u threads left, %u wait in __syncthreads, %u in a warp collective (block %u,%u)",
                done, block, warp, block_idx.x, block_idx.y);
  message = text;
  failed = true;
}

inline int launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  const bool grid_fits = grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535;
  if (!grid_fits || block.x * block.y * block.z > 1024 || shared_bytes > 227 * 1024) {
    message = "invalid configuration argument";
    return cudaErrorEmulated;
  }
  failed = false;
  body = std::move(kernel);
  grid_dim = grid, block_dim = block, threads = block.x * block.y * block.z;
  map_stacks(threads);
  map_shared(shared_bytes);
  fibers.assign(threads, Fiber{});
  warps.assign((threads + 31) / 32, Warp{});
  order.resize(threads);
  std::mt19937 random(seed);
  std::vector<size_t> blocks(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  if (seed == 1) std::reverse(blocks.begin(), blocks.end());
  if (seed > 1) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const size_t i : blocks) {
    block_idx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (size_t(grid.x) * grid.y)));
    run_block(shared_bytes, random);
    if (failed) return cudaErrorEmulated;
  }
  return cudaSuccess;
}

struct Mma { uint32_t a[4], b[2]; };

/// D = A B + D of one warp, A [16, 16] row-major, B [16, 8], with the fragment layout of mma.sync.m16n8k16.
template <class F>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F to_float) {
  Mma own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  auto* slot = gather(own, Kind::mma);
  const auto of = [&](int lane) { return reinterpret_cast<const Mma*>(slot[lane]); };
  const auto half = [&](uint32_t word, int k) { return to_float(uint16_t(word >> (k & 1 ? 16 : 0))); };
  const int group = int(current % 32) / 4, pair = int(current % 4);
  for (int i = 0; i < 4; ++i) {
    const int high = i >= 2, column = 2 * pair + (i & 1);
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2, upper = k >= 8;
      d[i] += half(of(group * 4 + quad)->a[high + 2 * upper], k) * half(of(column * 4 + quad)->b[upper], k);
    }
  }
}

inline uint32_t to_tf32(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return std::isfinite(x) ? (u + 0x1000) & ~0x1fffu : u;
}

/// What a tensor core sees of a register: the lowest 13 bits do not count.
inline float from_tf32(uint32_t u) {
  u &= ~0x1fffu;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

/// D = A B + D of one warp, A [16, 8] row-major, B [8, 8], with the fragment layout of mma.sync.m16n8k8.tf32.
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  auto* slot = gather(own, Kind::mma);
  const auto of = [&](int lane) { return reinterpret_cast<const Mma*>(slot[lane]); };
  const int group = int(current % 32) / 4, pair = int(current % 4);
  for (int i = 0; i < 4; ++i) {
    const int high = i >= 2, column = 2 * pair + (i & 1);
    for (int k = 0; k < 8; ++k) {
      const int upper = k >= 4;
      d[i] += from_tf32(of(group * 4 + k % 4)->a[high + 2 * upper]) * from_tf32(of(column * 4 + k % 4)->b[upper]);
    }
  }
}

}  // namespace emu

#define threadIdx emu::thread_idx
#define blockIdx emu::block_idx
#define blockDim emu::block_dim
#define gridDim emu::grid_dim

inline void __syncthreads() { emu::wait_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emu::wait_warp(emu::Kind::syncwarp); }
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes) {
  return emu::shuffle(mask, v, (emu::current % 32) ^ unsigned(lanes));
}
template <class T>
T __shfl_sync(unsigned mask, T v, int lane) {
  return emu::shuffle(mask, v, unsigned(lane) % 32);
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  const unsigned old = *p;
  *p = old >= last ? 0 : old + 1;
  return old;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorEmulated ? emu::message.c_str() : e ? "invalid argument" : "no error";
}

extern "C" inline __attribute__((used, visibility("default"))) void emu_set_order(unsigned order) { emu::seed = order; }
