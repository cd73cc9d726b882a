// torch.ops.roro_fast: one model's turn in an engine's iteration, on the arrays of its stage (engine/batching.py).
#include "bind_torch_step.h"

#include <tuple>

namespace roro {
namespace {

// Line `i` of a stage's array, from which `n` elements are used.
template <typename T>
const T* line(const char* name, const Tensor& t, std::int64_t i, std::int64_t n, ScalarType type) {
  check_type(name, t, type);
  check_cpu(name, t);
  RORO_CHECK(t.dim() == 2 && t.is_contiguous() && i < t.size(0) && n >= 0 && n <= t.size(1), name, ": shape ",
             shape_of(t), " has no line ", i, " of ", n, " elements");
  return pointer<T>(t) + i * t.size(1);
}

DecoderBatch batch_of(const Tensor& tokens, const Tensor& rows, const Tensor& table, std::int64_t n, std::int64_t t,
                      std::int64_t wanted, std::int64_t pages, bool cut) {
  const auto token = [&](std::int64_t i) { return line<std::int64_t>("tokens", tokens, i, t, ScalarType::Long); };
  const auto row = [&](std::int64_t i) { return line<std::int64_t>("rows", rows, i, n + 1, ScalarType::Long); };
  RORO_CHECK(n <= table.size(0) && wanted >= 0 && wanted <= n, "batch: ", n, " rows, ", wanted, " wanted");
  const Paging paging{line<std::int64_t>("table", table, 0, pages, ScalarType::Long), table.size(1), pages, row(1),
                      row(2), n};
  return {token(0), token(1), token(2), t, paging, {}, {}, {}, row(3), wanted, cut ? token(3) : nullptr};
}

std::tuple<Tensor, Tensor> decoder_step(const Tensor& packed, const Tensor& embed, const Tensor& cos, const Tensor& sin,
                                        const MaybeTensor& head, std::int64_t columns, Tensor pages,
                                        const Tensor& tokens, const Tensor& rows, const Tensor& table, std::int64_t n,
                                        std::int64_t t, std::int64_t wanted, std::int64_t width,
                                        const MaybeTensor& members, const MaybeTensor& offsets,
                                        const MaybeTensor& lengths, MaybeTensor states, bool below) {
  DecoderBatch b = batch_of(tokens, rows, table, n, t, wanted, width, states.has_value());
  b.members = members;
  b.offsets = offsets;
  b.lengths = lengths;
  if (below) b.state_slots = b.slots;
  const Tensor hidden = run_decoder(packed, embed, cos, sin, pages, b, states, below);
  if (below || !head) return {hidden, new_tensor({0, columns}, ScalarType::Float)};
  return {hidden, linear(hidden, *head, columns, true)};
}

std::tuple<Tensor, Tensor> decoder_step_meta(const Tensor&, const Tensor& embed, const Tensor&, const Tensor&,
                                             const MaybeTensor& head, std::int64_t columns, Tensor, const Tensor&,
                                             const Tensor&, const Tensor&, std::int64_t, std::int64_t,
                                             std::int64_t wanted, std::int64_t, const MaybeTensor&, const MaybeTensor&,
                                             const MaybeTensor&, MaybeTensor, bool below) {
  const std::int64_t n = below ? 0 : wanted;
  return {torch::stable::new_empty(embed, {n, embed.size(1)}),
          torch::stable::new_empty(embed, {head ? n : 0, columns}, ScalarType::Float)};
}

void sample_stage(const Tensor& logits, std::int64_t vocab, const Tensor& rows, const Tensor& numbers, bool truncated,
                  Tensor token, Tensor statistics, Tensor finite) {
  check_shape("logits", logits, {-1, -1});
  const std::int64_t n = logits.size(0);
  RORO_CHECK(vocab <= logits.size(1), "vocab: ", vocab, ", but logits has ", logits.size(1), " columns");
  const auto number = [&](std::int64_t i) { return line<float>("numbers", numbers, i, n, ScalarType::Float); };
  const auto out = [&](std::int64_t i) {
    return const_cast<float*>(line<float>("statistics", statistics, i, n, ScalarType::Float));
  };
  sample(logits, vocab,
         {number(0), number(1), truncated ? line<std::int64_t>("rows", rows, 4, n, ScalarType::Long) : nullptr,
          truncated ? number(2) : nullptr},
         {const_cast<std::int64_t*>(line<std::int64_t>("token", token, 0, n, ScalarType::Long)), out(0), out(1), out(2),
          const_cast<bool*>(line<bool>("finite", finite, 0, n, ScalarType::Bool))});
}

void sample_stage_meta(const Tensor&, std::int64_t, const Tensor&, const Tensor&, bool, Tensor, Tensor, Tensor) {}

}  // namespace
}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def(
      "decoder_step(Tensor packed, Tensor embed, Tensor cos, Tensor sin, Tensor? head, int columns, Tensor(a!) pages, "
      "Tensor tokens, Tensor rows, Tensor table, int n, int t, int wanted, int width, Tensor? members, "
      "Tensor? offsets, Tensor? lengths, Tensor(b!)? states, bool below) -> (Tensor, Tensor)");
  m.def(
      "sample_stage(Tensor logits, int vocab, Tensor rows, Tensor numbers, bool truncated, Tensor(a!) token, "
      "Tensor(b!) statistics, Tensor(c!) finite) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) {
  m.impl("decoder_step", TORCH_BOX(&roro::decoder_step));
  m.impl("sample_stage", TORCH_BOX(&roro::sample_stage));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) {
  m.impl("decoder_step", TORCH_BOX(&roro::decoder_step_meta));
  m.impl("sample_stage", TORCH_BOX(&roro::sample_stage_meta));
}
