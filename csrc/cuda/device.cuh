// Shared by all kernels here: number types, 16-byte loads, warp sums, tensor-core products, checked launches.
#pragma once
#ifdef RORO_EMULATOR
#include "cuda_on_cpu.h"
#define RORO_DYNAMIC_SHARED(name) unsigned char* name = emu::shared_memory
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define RORO_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/api.h"

namespace roro {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half(x); }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

/// N elements that move together: 16 bytes when N * sizeof(T) is 16.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  T v[N];
};

/// x[k .. k + N) with zeros from `end` on. WIDE: x + k is aligned to the vector and end is a multiple of N.
template <int N, bool WIDE, class T>
__device__ __forceinline__ Vec<T, N> load(const T* x, int k, int end) {
  Vec<T, N> out;
  if (WIDE) {
    if (k < end) return *reinterpret_cast<const Vec<T, N>*>(x + k);
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = from_float<T>(0.0f);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = k + i < end ? x[k + i] : from_float<T>(0.0f);
  }
  return out;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

/// d += A B of one warp on tensor cores: A [16, 16], B [16, 8], float32 accumulation.
/// Lane 4 g + t holds A[g, 2t..], A[g + 8, 2t..], A[g, 2t + 8..], A[g + 8, 2t + 8..]; B[2t.., g], B[2t + 8.., g];
/// d[g, 2t], d[g, 2t + 1], d[g + 8, 2t], d[g + 8, 2t + 1].
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, bf16>::value || std::is_same<T, f16>::value, "tensor cores take 16-bit floats here");
#ifdef RORO_EMULATOR
  emu::mma_m16n8k16(d, a, b, [](uint16_t bits) {
    T x;
    std::memcpy(&x, &bits, 2);
    return to_float(x);
  });
#else
  if (std::is_same<T, bf16>::value) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

/// x = big + small, both TF32 (11 significant bits); what is lost is below 2^-22 |x|.
__device__ __forceinline__ void split_tf32(float x, uint32_t& big, uint32_t& small) {
#ifdef RORO_EMULATOR
  big = emu::to_tf32(x);
  small = emu::to_tf32(x - emu::from_tf32(big));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(big) : "f"(x));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(small) : "f"(x - __uint_as_float(big)));
#endif
}

/// d += A B of one warp on tensor cores: A [16, 8], B [8, 8] in TF32.
/// Lane 4 g + t holds A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4]; B[t, g], B[t + 4, g]; d as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef RORO_EMULATOR
  emu::mma_m16n8k8(d, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/// Orders this thread's memory accesses, and those it knows of, for the whole device.
__device__ __forceinline__ void fence() {
#ifndef RORO_EMULATOR
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

/// True in every thread of exactly one block: the last of `count` blocks to come here with this ticket. What the
/// other blocks wrote before is then visible (read it with __ldcg). The ticket is zero again afterwards.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned count) {
  __shared__ unsigned arrived;
  __syncthreads();
  if (count == 1) return true;
  if (threadIdx.x == 0) {  // between the barriers it speaks for the whole block
    fence();
    arrived = atomicInc(ticket, count - 1);
    fence();
  }
  __syncthreads();
  return arrived == count - 1;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, unsigned block, size_t shared_bytes, void* stream, A... args) {
#ifdef RORO_EMULATOR
  (void)stream;
  return emu::launch(grid, dim3(block), shared_bytes, [=] { kernel(static_cast<P>(args)...); });
#else
  if (shared_bytes > 47 * 1024) {  // kernels have a little static shared memory besides
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (e != cudaSuccess) return int(e);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
  return int(cudaGetLastError());
#endif
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace roro
