// Element types and small helpers that kernels and bindings share.
#pragma once

#include <cstdint>
#include <cstring>

namespace roro::cpu {

struct bf16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline bf16 to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

enum class DType { f32, bf16 };

// A strided view of elements of either type.
struct Elements {
  const void* data;
  DType dtype;
  float operator[](std::int64_t i) const {
    return dtype == DType::f32 ? static_cast<const float*>(data)[i] : to_float(static_cast<const bf16*>(data)[i]);
  }
};

constexpr std::int64_t round_up(std::int64_t n, std::int64_t m) { return (n + m - 1) / m * m; }

}  // namespace roro::cpu
