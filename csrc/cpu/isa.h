// Which instruction set the kernels use: chosen once by CPUID, or by name (environment variable RORO_ISA, or `set_isa`).
#pragma once

#include <string>

namespace roro::cpu {

// Ordered: each has all that those before it have. `amx_emulated` runs the AMX code on software tiles, for tests.
enum class Isa { scalar, avx2, avx512, avx512_bf16, amx, amx_emulated };

Isa isa();

// Throws std::runtime_error for an unknown name or one that this CPU lacks. "auto" is the best this CPU has.
void set_isa(const std::string& name);

std::string isa_name(Isa isa);

// Comma-separated names of all that this CPU can run.
std::string usable_isas();

// Kernels that come in one version per vector width.
template <typename F>
F pick(F scalar, F avx2, F avx512) {
  const Isa i = isa();
  return i >= Isa::avx512 && i != Isa::amx_emulated ? avx512 : i == Isa::avx2 ? avx2 : scalar;
}

// And one with the conversions of AVX512-BF16.
template <typename F>
F pick(F scalar, F avx2, F avx512, F avx512_bf16) {
  const Isa i = isa();
  return i >= Isa::avx512_bf16 && i != Isa::amx_emulated ? avx512_bf16 : pick(scalar, avx2, avx512);
}

}  // namespace roro::cpu
