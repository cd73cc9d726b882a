// Compiles the file RORO_KERNEL once per vector instruction set, each in a namespace of its own. No include guard.
// RORO_WITH_BF16 asks for avx512_bf16 too, whose stores of bf16 take one instruction. Standard headers must come before.

#include "cpu/target.h"

#define RORO_WIDTH 4
namespace roro::cpu::scalar {
#include "cpu/vec.h"
#include RORO_KERNEL
}  // namespace roro::cpu::scalar
#undef RORO_WIDTH

#if defined(__x86_64__)

RORO_BEGIN_TARGET(RORO_AVX2)
#define RORO_WIDTH 8
namespace roro::cpu::avx2 {
#include "cpu/vec.h"
#include RORO_KERNEL
}  // namespace roro::cpu::avx2
#undef RORO_WIDTH
RORO_END_TARGET

#define RORO_WIDTH 16
RORO_BEGIN_TARGET(RORO_AVX512)
namespace roro::cpu::avx512 {
#include "cpu/vec.h"
#include RORO_KERNEL
}  // namespace roro::cpu::avx512
RORO_END_TARGET

#if defined(RORO_WITH_BF16)
#define RORO_NATIVE_BF16
RORO_BEGIN_TARGET(RORO_AVX512_BF16)
namespace roro::cpu::avx512_bf16 {
#include "cpu/vec.h"
#include RORO_KERNEL
}  // namespace roro::cpu::avx512_bf16
RORO_END_TARGET
#undef RORO_NATIVE_BF16
#endif
#undef RORO_WIDTH

#else

namespace roro::cpu {
namespace avx2 = scalar;
namespace avx512 = scalar;
namespace avx512_bf16 = scalar;
}  // namespace roro::cpu

#endif
