// Compiles the file RORO_KERNEL once per vector instruction set, each in a namespace of its own. No include guard.
// The target pragmas replace -march, so that one binary runs everywhere. Standard headers must come before.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define RORO_WIDTH 4
namespace roro::cpu::scalar {
#include "cpu/vec.h"
#include RORO_KERNEL
}  // namespace roro::cpu::scalar
#undef RORO_WIDTH

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define RORO_WIDTH 8
namespace roro::cpu::avx2 {
#include "cpu/vec.h"
#include RORO_KERNEL
}  // namespace roro::cpu::avx2
#undef RORO_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define RORO_WIDTH 16
namespace roro::cpu::avx512 {
#include "cpu/vec.h"
#include RORO_KERNEL
}  // namespace roro::cpu::avx512
#undef RORO_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace roro::cpu {
namespace avx2 = scalar;
namespace avx512 = scalar;
}  // namespace roro::cpu

#endif
