// Fused routing decision: gather rows, RMS-norm, two-layer MLP, softmax, sample.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace roro::cpu {

struct RouterSizes {
  std::int64_t hidden, signals, width, actions;  // H, S, D, K
};

constexpr std::int64_t kMaxActions = 64;

struct Strided {
  Elements elements;
  std::int64_t row = 0, column = 1;  // strides in elements
  float at(std::int64_t i, std::int64_t j) const { return elements[i * row + j * column]; }
};

struct RouterTensors {
  Strided norm, w1, b1, w2, b2;  // [H], [D, H + S], [D], [K, D], [K]; vectors use `column`
};

// Bytes of the packed weights; `half` asks for bf16 products where the CPU has an instruction for them.
std::int64_t router_packed_bytes(const RouterSizes& sizes, bool half);

// `packed` must be 64-byte aligned.
void router_pack(const RouterTensors& weights, const RouterSizes& sizes, bool half, void* packed);

// Sizes of packed weights; throws std::runtime_error when they are damaged or were packed for another instruction set.
RouterSizes router_packed_sizes(const void* packed, std::int64_t bytes);

struct RouterArgs {
  const void* packed;
  RouterSizes sizes;
  const void* hidden;  // rows of H elements
  DType hidden_type;
  std::int64_t hidden_stride;
  const std::int64_t* rows;  // nullptr: row i is i
  const float* signals;
  std::int64_t signals_stride;
  const float* uniforms;
  const float* bias;  // nullptr: none
  std::int64_t bias_stride;
  float temperature, eps;
  std::int64_t* action;
  float *logprob, *entropy, *probs, *logits;
};

// Rows [0, n).
void router_score(const RouterArgs& args, std::int64_t n, int threads);

}  // namespace roro::cpu
