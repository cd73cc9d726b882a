// torch.ops.roro_fast: what a learned router does at the boundaries of an iteration, from the engine's own matrices.
#include "bind_torch.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/router_score.h"

namespace roro {
namespace {

constexpr std::int64_t kSignals = 14;                        // routing/state.py, which is the specification
enum Int { kIndex, kTokens, kLast, kInts };                  // rows of BoundaryBatch.ints
enum Float { kMeanLogprob, kMinLogprob, kFirstEntropy, kShare = 6, kBudget, kUniforms, kFloats };  // and of .floats

struct Boundaries {
  const std::int64_t* ints;  // [kInts, n]
  const float* floats;       // [kFloats, n]
  const float *entropy, *max_prob;  // [n] of the scout, or nullptr
  std::int64_t n, cap;
};

void signals(const Boundaries& b, std::int64_t i, float* out) {
  const auto integer = [&](Int row) { return b.ints[row * b.n + i]; };
  const auto number = [&](std::int64_t row) { return b.floats[row * b.n + i]; };
  const auto cap = static_cast<double>(std::max<std::int64_t>(b.cap, 1));
  out[0] = static_cast<float>(static_cast<double>(integer(kIndex)) / cap);
  out[1] = std::log1p(static_cast<float>(integer(kTokens))) / 5;
  out[2] = std::exp(number(kMeanLogprob));
  out[3] = std::exp(number(kMinLogprob));
  for (std::int64_t j = kFirstEntropy; j <= kShare; ++j) out[j + 2] = number(j);
  out[9] = integer(kLast) == 0;
  out[10] = integer(kLast) > 0;
  out[11] = number(kBudget);
  const bool scouted = b.entropy && b.max_prob;
  out[12] = scouted ? b.entropy[i] : 0;
  out[13] = scouted ? b.max_prob[i] : 0;
}

const void* matrix(const char* name, const Tensor& t, std::int64_t rows, std::int64_t columns, ScalarType type) {
  check_type(name, t, type);
  check_shape(name, t, {rows, columns});
  check_cpu(name, t);
  RORO_CHECK(t.is_contiguous(), name, ": not contiguous; call .contiguous()");
  return t.data_ptr();
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // action, logprob [n], probs [n, K], features [n, H + S]

Routed route(const Tensor& ints, const Tensor& floating, std::int64_t cap, const MaybeTensor& entropy,
             const MaybeTensor& max_prob, const MaybeTensor& hidden, const Tensor& packed, std::int64_t actions,
             const MaybeTensor& bias, double temperature) {
  cpu::RouterArgs a{};
  check_cpu("weights", packed);
  a.packed = packed.data_ptr();
  a.sizes = cpu::router_packed_sizes(a.packed, packed.numel());
  const std::int64_t K = a.sizes.actions, H = a.sizes.hidden, F = H + kSignals;
  RORO_CHECK(actions == K, "weights: packed for ", K, " actions, not ", actions);
  RORO_CHECK(a.sizes.signals == kSignals, "weights: packed for ", a.sizes.signals, " signals, not ", kSignals);
  check_shape("ints", ints, {kInts, -1});
  const std::int64_t n = ints.size(1);
  const Boundaries b{static_cast<const std::int64_t*>(matrix("ints", ints, kInts, n, ScalarType::Long)),
                     static_cast<const float*>(matrix("floats", floating, kFloats, n, ScalarType::Float)),
                     entropy ? floats("scout_entropy", *entropy, n) : nullptr,
                     max_prob ? floats("scout_maxprob", *max_prob, n) : nullptr, n, cap};
  RORO_CHECK(hidden.has_value() == (H > 0), "hidden: ", hidden ? "given" : "missing",
             ", but weights were packed for ", H);
  const auto* states = hidden ? static_cast<const float*>(matrix("hidden", *hidden, n, H, ScalarType::Float)) : nullptr;
  if (bias) a.bias = static_cast<const float*>(matrix("bias", *bias, n, K, ScalarType::Float));
  RORO_CHECK(temperature >= 0, "temperature: ", temperature, " is negative or NaN; use 0 for greedy");
  const Routed out{new_tensor({n}, ScalarType::Long), new_tensor({n}, ScalarType::Float),
                   new_tensor({n, K}, ScalarType::Float), new_tensor({n, F}, ScalarType::Float)};
  auto* features = pointer<float>(std::get<3>(out));
  for (std::int64_t i = 0; i < n; ++i) {
    std::copy_n(states + i * H, H, features + i * F);
    signals(b, i, features + i * F + H);
  }
  std::vector<float> unused(n * (K + 1));  // entropies and logits
  a.hidden = features;
  a.hidden_type = cpu::DType::f32;
  a.hidden_stride = a.signals_stride = F;
  a.signals = features + H;
  a.uniforms = b.floats + kUniforms * n;
  a.bias_stride = K;
  a.temperature = static_cast<float>(temperature);
  a.eps = 1e-6f;  // as `router_score` has it
  a.action = pointer<std::int64_t>(std::get<0>(out));
  a.logprob = pointer<float>(std::get<1>(out));
  a.probs = pointer<float>(std::get<2>(out));
  a.entropy = unused.data();
  a.logits = unused.data() + n;
  cpu::router_score(a, n, threads());
  return out;
}

Routed route_meta(const Tensor& ints, const Tensor& floating, std::int64_t, const MaybeTensor&, const MaybeTensor&,
                  const MaybeTensor& hidden, const Tensor&, std::int64_t actions, const MaybeTensor&, double) {
  const std::int64_t n = ints.size(1), F = (hidden ? hidden->size(1) : 0) + kSignals;
  const auto like = [&](std::initializer_list<std::int64_t> sizes) {
    return torch::stable::new_empty(floating, std::vector<std::int64_t>(sizes), ScalarType::Float);
  };
  return {torch::stable::new_empty(ints, {n}, ScalarType::Long), like({n}), like({n, actions}), like({n, F})};
}

}  // namespace
}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def(
      "route(Tensor ints, Tensor floats, int step_cap, Tensor? scout_entropy, Tensor? scout_maxprob, Tensor? hidden, "
      "Tensor packed, int actions, Tensor? bias, float temperature) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) { m.impl("route", TORCH_BOX(&roro::route)); }

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) { m.impl("route", TORCH_BOX(&roro::route_meta)); }
