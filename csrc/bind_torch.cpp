// torch.ops.roro_fast: the switch of the instruction set, router_score, sample_step and judge_score.
// Registered through torch's stable ABI, so that one binary serves torch 2.11 to 2.13 and every Python.
#include "bind_torch_step.h"

#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/judge_score.h"
#include "cpu/router_score.h"
#include "cpu/sample_step.h"

namespace roro {
namespace {

std::string current_isa() { return cpu::isa_name(cpu::isa()); }
std::string usable_isas() { return cpu::usable_isas(); }
void set_isa(std::string name) { cpu::set_isa(name); }

// -- router_score -----------------------------------------------------------------------------------------------------

cpu::Strided strided(const char* name, const Tensor& t) {
  const cpu::DType type = float_type(name, t);
  const std::int64_t row = t.dim() == 2 ? t.stride(0) : 0;
  return {{t.data_ptr(), type}, row, t.stride(t.dim() - 1)};
}

cpu::RouterSizes router_sizes(const Tensor& norm, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                              const Tensor& b2) {
  check_shape("weights.norm", norm, {-1});
  check_shape("weights.w1", w1, {-1, -1});
  check_shape("weights.w2", w2, {-1, w1.size(0)});
  check_shape("weights.b1", b1, {w1.size(0)});
  check_shape("weights.b2", b2, {w2.size(0)});
  const cpu::RouterSizes s{norm.size(0), w1.size(1) - norm.size(0), w1.size(0), w2.size(0)};
  RORO_CHECK(s.signals >= 0, "weights.w1: ", w1.size(1), " columns, but weights.norm has ", s.hidden);
  RORO_CHECK(s.actions >= 1 && s.actions <= cpu::kMaxActions, "weights.w2: ", s.actions,
             " actions; the kernel takes 1 to ", cpu::kMaxActions);
  return s;
}

Tensor router_pack_meta(const Tensor& norm, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const bool half = float_type("weights.w1", w1) == cpu::DType::bf16;
  const std::int64_t n = cpu::router_packed_bytes(router_sizes(norm, w1, b1, w2, b2), half);
  return torch::stable::new_empty(w1, {n}, ScalarType::Byte);
}

Tensor router_pack(const Tensor& norm, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const cpu::RouterSizes s = router_sizes(norm, w1, b1, w2, b2);
  const bool half = float_type("weights.w1", w1) == cpu::DType::bf16;
  Tensor packed = new_tensor({cpu::router_packed_bytes(s, half)}, ScalarType::Byte);
  cpu::router_pack({strided("weights.norm", norm), strided("weights.w1", w1), strided("weights.b1", b1),
                    strided("weights.w2", w2), strided("weights.b2", b2)},
                   s, half, packed.data_ptr());
  return packed;
}

using Router = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Router router_score_meta(const Tensor& hidden, const MaybeTensor&, const Tensor& signals, const Tensor&,
                         std::int64_t actions, const Tensor&, const MaybeTensor&, double, double) {
  const std::int64_t n = signals.size(0);
  const auto floats = [&](std::vector<std::int64_t> sizes) {
    return torch::stable::new_empty(hidden, sizes, ScalarType::Float);
  };
  return {torch::stable::new_empty(hidden, {n}, ScalarType::Long), floats({n}), floats({n}), floats({n, actions}),
          floats({n, actions})};
}

Router router_score(const Tensor& hidden, const MaybeTensor& rows, const Tensor& signals, const Tensor& packed,
                    std::int64_t actions, const Tensor& uniforms, const MaybeTensor& bias, double temperature,
                    double eps) {
  cpu::RouterArgs a{};
  check_cpu("weights", packed);
  a.packed = packed.data_ptr();
  a.sizes = cpu::router_packed_sizes(a.packed, packed.numel());
  const std::int64_t K = a.sizes.actions;
  RORO_CHECK(actions == K, "weights: packed for ", K, " actions, not ", actions);
  check_shape("hidden", hidden, {-1, a.sizes.hidden});
  check_rows("hidden", hidden);
  check_cpu("hidden", hidden);
  a.hidden = hidden.data_ptr();
  a.hidden_type = float_type("hidden", hidden);
  a.hidden_stride = hidden.stride(0);
  const std::int64_t total = hidden.size(0);
  RORO_CHECK(!rows || rows->dim() == 1, "rows: shape ", shape_of(*rows), " but [any] is needed");
  const std::int64_t n = rows ? rows->size(0) : total;
  if (rows) {
    a.rows = indices("rows", *rows, n);
    for (std::int64_t i = 0; i < n; ++i) {
      RORO_CHECK(a.rows[i] >= 0 && a.rows[i] < total, "rows: row ", a.rows[i], " at ", i, ", but hidden has ", total);
    }
  }
  check_type("signals", signals, ScalarType::Float);
  check_shape("signals", signals, {n, a.sizes.signals});
  check_rows("signals", signals);
  check_cpu("signals", signals);
  a.signals = pointer<float>(signals);
  a.signals_stride = signals.stride(0);
  a.uniforms = floats("uniforms", uniforms, n);
  if (bias) {
    check_type("bias", *bias, ScalarType::Float);
    check_shape("bias", *bias, {n, K});
    check_rows("bias", *bias);
    check_cpu("bias", *bias);
    a.bias = pointer<float>(*bias);
    a.bias_stride = bias->stride(0);
  }
  RORO_CHECK(temperature >= 0, "temperature: ", temperature, " is negative or NaN; use 0 for greedy");
  a.temperature = static_cast<float>(temperature);
  a.eps = static_cast<float>(eps);
  Router out{new_tensor({n}, ScalarType::Long), new_tensor({n}, ScalarType::Float),
             new_tensor({n}, ScalarType::Float), new_tensor({n, K}, ScalarType::Float),
             new_tensor({n, K}, ScalarType::Float)};
  a.action = pointer<std::int64_t>(std::get<0>(out));
  a.logprob = pointer<float>(std::get<1>(out));
  a.entropy = pointer<float>(std::get<2>(out));
  a.probs = pointer<float>(std::get<3>(out));
  a.logits = pointer<float>(std::get<4>(out));
  cpu::router_score(a, n, threads());
  return out;
}

// -- sample_step ------------------------------------------------------------------------------------------------------

using Sampled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Sampled sample_step_meta(const Tensor& logits, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&) {
  const std::int64_t n = logits.size(0);
  const auto like = [&](ScalarType type) { return torch::stable::new_empty(logits, {n}, type); };
  return {like(ScalarType::Long), like(ScalarType::Float), like(ScalarType::Float), like(ScalarType::Float),
          like(ScalarType::Bool)};
}

Sampled sample_step(const Tensor& logits, const Tensor& uniforms, const Tensor& temperature, const MaybeTensor& top_k,
                    const MaybeTensor& top_p) {
  check_shape("logits", logits, {-1, -1});
  const std::int64_t n = logits.size(0);
  const auto make = [&](ScalarType type) { return new_tensor({n}, type); };
  Sampled out{make(ScalarType::Long), make(ScalarType::Float), make(ScalarType::Float), make(ScalarType::Float),
              make(ScalarType::Bool)};
  sample(logits, logits.size(1),
         {floats("uniforms", uniforms, n), floats("temperature", temperature, n),
          top_k ? indices("top_k", *top_k, n) : nullptr, top_p ? floats("top_p", *top_p, n) : nullptr},
         {pointer<std::int64_t>(std::get<0>(out)), pointer<float>(std::get<1>(out)), pointer<float>(std::get<2>(out)),
          pointer<float>(std::get<3>(out)), pointer<bool>(std::get<4>(out))});
  return out;
}

}  // namespace

void sample(const Tensor& logits, std::int64_t vocab, const Draws& draws, const SampledRows& out) {
  check_rows("logits", logits);
  check_cpu("logits", logits);
  const std::int64_t n = logits.size(0);
  RORO_CHECK(n == 0 || (vocab > 0 && vocab <= std::numeric_limits<std::int32_t>::max()), "logits: ", vocab,
             " tokens in the vocabulary");
  for (std::int64_t i = 0; i < n; ++i) {
    RORO_CHECK(draws.temperature[i] >= 0, "temperature: ", draws.temperature[i], " at ", i, "; use 0 for greedy");
    RORO_CHECK(!draws.top_k || draws.top_k[i] >= 0, "top_k: ", draws.top_k[i], " at ", i, "; use 0 for off");
    RORO_CHECK(!draws.top_p || draws.top_p[i] >= 0, "top_p: ", draws.top_p[i], " at ", i, "; use 1 for off");
  }
  cpu::sample_step({logits.data_ptr(), float_type("logits", logits), logits.stride(0), vocab, draws.uniforms,
                    draws.temperature, draws.top_k, draws.top_p, out.token, out.logprob, out.entropy, out.max_prob,
                    out.finite},
                   n, threads());
}

namespace {

// -- judge_score ------------------------------------------------------------------------------------------------------

using Judged = std::tuple<Tensor, Tensor, Tensor>;

Judged judge_score_meta(const Tensor& hidden, const Tensor& rows, const Tensor& label_weight, const Tensor&,
                        const Tensor& offsets, const Tensor&, const MaybeTensor& group_offsets, double) {
  const std::int64_t trajectories = offsets.size(0) - 1;
  const auto floats = [&](std::vector<std::int64_t> sizes) {
    return torch::stable::new_empty(hidden, sizes, ScalarType::Float);
  };
  return {floats({rows.size(0), label_weight.size(0)}), floats({trajectories}),
          floats({group_offsets ? trajectories : 0})};
}

const std::int64_t* offsets_of(const char* name, const Tensor& t, std::int64_t last) {
  check_shape(name, t, {-1});
  const std::int64_t n = t.size(0);
  const std::int64_t* x = indices(name, t, n);
  RORO_CHECK(n >= 1 && x[0] == 0 && x[n - 1] == last, name, ": must run from 0 to ", last);
  for (std::int64_t i = 1; i < n; ++i) RORO_CHECK(x[i] >= x[i - 1], name, ": descends at ", i);
  return x;
}

Judged judge_score(const Tensor& hidden, const Tensor& rows, const Tensor& label_weight,
                   const Tensor& criterion_weight, const Tensor& offsets, const Tensor& valence,
                   const MaybeTensor& group_offsets, double eps) {
  cpu::JudgeArgs a{};
  check_shape("hidden", hidden, {-1, -1});
  a.width = hidden.size(1);
  check_shape("label_weight", label_weight, {-1, a.width});
  check_shape("rows", rows, {-1});
  a.labels = label_weight.size(0);
  a.slots = rows.size(0);
  RORO_CHECK(a.labels >= 1 && a.labels <= cpu::kMaxLabels, "label_weight: ", a.labels,
             " verdict words; the kernel takes 1 to ", cpu::kMaxLabels);
  check_cpu("hidden", hidden);
  check_cpu("label_weight", label_weight);
  check_rows("hidden", hidden);
  check_rows("label_weight", label_weight);
  a.hidden = hidden.data_ptr();
  a.hidden_type = float_type("hidden", hidden);
  a.hidden_stride = hidden.stride(0);
  a.label_weight = label_weight.data_ptr();
  a.label_type = float_type("label_weight", label_weight);
  a.label_stride = label_weight.stride(0);
  a.rows = indices("rows", rows, a.slots);
  a.criterion_weight = floats("criterion_weight", criterion_weight, a.slots);
  const std::int64_t total = hidden.size(0);
  for (std::int64_t i = 0; i < a.slots; ++i) {
    RORO_CHECK(a.rows[i] >= 0 && a.rows[i] < total, "rows: row ", a.rows[i], " at ", i, ", but hidden has ", total);
    RORO_CHECK(a.criterion_weight[i] >= 0, "criterion_weight: ", a.criterion_weight[i], " at ", i, "; must be >= 0");
  }
  a.valence = floats("valence", valence, a.labels);
  a.offsets = offsets_of("offsets", offsets, a.slots);
  a.trajectories = offsets.size(0) - 1;
  if (group_offsets) {
    a.group_offsets = offsets_of("group_offsets", *group_offsets, a.trajectories);
    a.groups = group_offsets->size(0) - 1;
  }
  a.eps = static_cast<float>(eps);
  Judged out{new_tensor({a.slots, a.labels}, ScalarType::Float), new_tensor({a.trajectories}, ScalarType::Float),
             new_tensor({group_offsets ? a.trajectories : 0}, ScalarType::Float)};
  const Tensor value = new_tensor({a.slots}, ScalarType::Float);
  a.value = pointer<float>(value);
  a.probs = pointer<float>(std::get<0>(out));
  a.scores = pointer<float>(std::get<1>(out));
  a.advantages = pointer<float>(std::get<2>(out));
  cpu::judge_score(a, threads());
  return out;
}

}  // namespace
}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def("isa() -> str");
  m.def("usable_isas() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("router_pack(Tensor norm, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor");
  m.def(
      "router_score(Tensor hidden, Tensor? rows, Tensor signals, Tensor packed, int actions, Tensor uniforms, "
      "Tensor? bias, float temperature, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sample_step(Tensor logits, Tensor uniforms, Tensor temperature, Tensor? top_k, Tensor? top_p) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "judge_score(Tensor hidden, Tensor rows, Tensor label_weight, Tensor criterion_weight, Tensor offsets, "
      "Tensor valence, Tensor? group_offsets, float eps) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&roro::current_isa));
  m.impl("usable_isas", TORCH_BOX(&roro::usable_isas));
  m.impl("set_isa", TORCH_BOX(&roro::set_isa));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) {
  m.impl("router_pack", TORCH_BOX(&roro::router_pack));
  m.impl("router_score", TORCH_BOX(&roro::router_score));
  m.impl("sample_step", TORCH_BOX(&roro::sample_step));
  m.impl("judge_score", TORCH_BOX(&roro::judge_score));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) {
  m.impl("router_pack", TORCH_BOX(&roro::router_pack_meta));
  m.impl("router_score", TORCH_BOX(&roro::router_score_meta));
  m.impl("sample_step", TORCH_BOX(&roro::sample_step_meta));
  m.impl("judge_score", TORCH_BOX(&roro::judge_score_meta));
}
