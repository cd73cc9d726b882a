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

inline float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = std::uint32_t{h & 0x8000u} << 16, rest = h & 0x7fffu;
  std::uint32_t bits;
  float f;
  if (rest >= 0x7c00) {  // infinity or NaN
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {  // subnormal: an integer times 2^-24
    f = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; NaN stays NaN.
inline std::uint16_t float_to_half(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits >= 0x38800000) return sign | static_cast<std::uint16_t>((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
  float f;
  std::memcpy(&f, &bits, 4);
  f += 0.5f;  // the addition aligns the mantissa to 2^-24 and rounds
  std::memcpy(&bits, &f, 4);
  return sign | static_cast<std::uint16_t>(bits - 0x3f000000);
}

struct f16 {
  std::uint16_t bits;
};

inline float to_float(f16 x) { return half_to_float(x.bits); }

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) { return to_bf16(x); }
template <>
inline f16 from_float<f16>(float x) { return {float_to_half(x)}; }

enum class DType { f32, bf16 };

constexpr std::int64_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

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
