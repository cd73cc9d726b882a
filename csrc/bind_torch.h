// Helpers of the bindings: checks that name the argument, and tensors of the stable ABI as raw pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "cpu/types.h"

namespace roro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define RORO_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) roro::fail(__VA_ARGS__)

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    default: return "another type";
  }
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (std::int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

// A size of -1 allows any.
inline void check_shape(const char* name, const Tensor& t, std::initializer_list<std::int64_t> sizes) {
  bool same = t.dim() == static_cast<std::int64_t>(sizes.size());
  std::int64_t i = 0;
  if (same) {
    const auto have = t.sizes();
    for (const std::int64_t n : sizes) same &= n < 0 || have[i] == n, ++i;
  }
  if (same) return;
  std::ostringstream want;
  i = 0;
  for (const std::int64_t n : sizes) {
    want << (i++ ? ", " : "");
    n < 0 ? want << "any" : want << n;
  }
  fail(name, ": shape ", shape_of(t), " but [", want.str(), "] is needed");
}

inline void check_type(const char* name, const Tensor& t, ScalarType type) {
  RORO_CHECK(t.scalar_type() == type, name, ": ", name_of(t.scalar_type()), " but ", name_of(type), " is needed");
}

inline void check_cpu(const char* name, const Tensor& t) {
  RORO_CHECK(t.is_cpu(), name, ": not on the CPU; move it there, or use another implementation");
}

// Rows may lie apart, their elements must not.
inline void check_rows(const char* name, const Tensor& t) {
  RORO_CHECK(t.size(-1) <= 1 || t.stride(t.dim() - 1) == 1, name,
             ": elements of the last dimension are apart; call .contiguous()");
}

inline cpu::DType float_type(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  RORO_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, ": ", name_of(type),
             " but float32 or bfloat16 is needed");
  return type == ScalarType::Float ? cpu::DType::f32 : cpu::DType::bf16;
}

template <typename T>
const T* vector_of(const char* name, const Tensor& t, std::int64_t n, ScalarType type) {
  check_type(name, t, type);
  check_shape(name, t, {n});
  check_cpu(name, t);
  RORO_CHECK(n <= 1 || t.stride(0) == 1, name, ": not contiguous; call .contiguous()");
  return static_cast<const T*>(t.data_ptr());
}

inline const float* floats(const char* name, const Tensor& t, std::int64_t n) {
  return vector_of<float>(name, t, n, ScalarType::Float);
}

inline const std::int64_t* indices(const char* name, const Tensor& t, std::int64_t n) {
  return vector_of<std::int64_t>(name, t, n, ScalarType::Long);
}

inline bool poisoned() {
  static const bool on = std::getenv("RORO_POISON") != nullptr;
  return on;
}

// Uninitialised, contiguous, on the CPU; NaN or a wild number when RORO_POISON is set (tests).
inline Tensor new_tensor(std::initializer_list<std::int64_t> sizes, ScalarType type) {
  std::int64_t strides[8], n = 1;
  for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = n;
    n *= sizes.begin()[i] > 0 ? sizes.begin()[i] : 1;
  }
  static const std::int32_t f32 = aoti_torch_dtype_float32(), i64 = aoti_torch_dtype_int64(),
                            b16 = aoti_torch_dtype_bfloat16(), u8 = aoti_torch_dtype_uint8(),
                            boolean = aoti_torch_dtype_bool(), cpu = aoti_torch_device_type_cpu();
  const std::int32_t dtype = type == ScalarType::Float      ? f32
                             : type == ScalarType::Long     ? i64
                             : type == ScalarType::BFloat16 ? b16
                             : type == ScalarType::Bool     ? boolean
                                                            : u8;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, dtype, cpu, 0, &handle));
  Tensor t(handle);
  if (poisoned() && t.numel()) {
    const std::int64_t bytes = t.numel() * (type == ScalarType::Long      ? 8
                                            : type == ScalarType::Float    ? 4
                                            : type == ScalarType::BFloat16 ? 2
                                                                           : 1);
    std::memset(t.data_ptr(), type == ScalarType::Bool ? 1 : 0xff, bytes);
  }
  return t;
}

template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace roro
