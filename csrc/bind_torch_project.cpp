// torch.ops.roro_fast: kv_unrotate and kv_rotate_store, the two ends of kv_handoff.project.
#include "bind_torch.h"

#include "cpu/kv_project.h"

namespace roro {
namespace {

cpu::PagedModel model_of(const char* name, const Tensor& t) {
  RORO_CHECK(t.dim() == 6 && t.size(2) == 2, name, ": shape ", shape_of(t),
             " but [pages, layers, 2, page_size, heads, dim] is needed");
  check_cpu(name, t);
  check_rows(name, t);
  RORO_CHECK(t.size(5) > 0 && t.size(5) % 2 == 0, name, ": head dimension ", t.size(5), " is not even");
  RORO_CHECK(t.size(3) > 0, name, ": pages of size 0");
  return {t.data_ptr(), float_type(name, t), t.size(1),   t.size(3),   t.size(4),  t.size(5),
          t.stride(0),  t.stride(1),         t.stride(2), t.stride(3), t.stride(4)};
}

cpu::Turn turn_of(const Tensor& cos, const Tensor& sin, const Tensor& positions, std::int64_t n, std::int64_t dim) {
  cpu::Turn turn{};
  for (const auto& [name, t] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}}) {
    check_type(name, *t, ScalarType::Float);
    check_shape(name, *t, {-1, dim});
    check_cpu(name, *t);
    check_rows(name, *t);
  }
  turn.cos = pointer<float>(cos);
  turn.sin = pointer<float>(sin);
  turn.cos_stride = cos.stride(0);
  turn.sin_stride = sin.stride(0);
  turn.positions = indices("positions", positions, n);
  const std::int64_t table = std::min(cos.size(0), sin.size(0));
  for (std::int64_t i = 0; i < n; ++i) {
    RORO_CHECK(turn.positions[i] >= 0 && turn.positions[i] < table, "positions: ", turn.positions[i], " at ", i,
               ", but cos and sin have ", table);
  }
  return turn;
}

const std::int64_t* slots_of(const char* name, const Tensor& slots, std::int64_t room) {
  check_shape(name, slots, {-1});
  const std::int64_t n = slots.size(0), *at = indices(name, slots, n);
  for (std::int64_t i = 0; i < n; ++i) {
    RORO_CHECK(at[i] >= 0 && at[i] < room, name, ": ", at[i], " at ", i, ", but the pages hold ", room);
  }
  return at;
}

Tensor kv_unrotate_meta(const Tensor& source, const Tensor& slots, const Tensor&, const Tensor&, const Tensor&,
                        const Tensor& layers, bool half) {
  return torch::stable::new_empty(
      source, {layers.size(0), 2, slots.size(0), layers.size(1) * source.size(4) * source.size(5)},
      half ? ScalarType::BFloat16 : ScalarType::Float);
}

Tensor kv_unrotate(const Tensor& source, const Tensor& slots, const Tensor& positions, const Tensor& cos,
                   const Tensor& sin, const Tensor& layers, bool half) {
  cpu::UnrotateArgs a{};
  a.source = model_of("source", source);
  a.slots = slots_of("source_slots", slots, source.size(0) * a.source.page_size);
  a.tokens = slots.size(0);
  a.turn = turn_of(cos, sin, positions, a.tokens, a.source.dim);
  check_type("layers", layers, ScalarType::Long);
  check_shape("layers", layers, {-1, -1});
  check_cpu("layers", layers);
  RORO_CHECK(layers.is_contiguous(), "layers: not contiguous; call .contiguous()");
  a.layers = pointer<std::int64_t>(layers);
  a.receivers = layers.size(0);
  a.chosen = layers.size(1);
  for (std::int64_t i = 0; i < a.receivers * a.chosen; ++i) {
    RORO_CHECK(a.layers[i] >= 0 && a.layers[i] < a.source.layers, "layers: ", a.layers[i], ", but the source has ",
               a.source.layers);
  }
  a.type = half ? cpu::DType::bf16 : cpu::DType::f32;
  Tensor out = new_tensor({a.receivers, 2, a.tokens, a.chosen * a.source.heads * a.source.dim},
                          half ? ScalarType::BFloat16 : ScalarType::Float);
  a.out = out.data_ptr();
  cpu::kv_unrotate(a, threads());
  return out;
}

void kv_rotate_store(const Tensor& mapped, const Tensor& bias, Tensor target, const Tensor& slots,
                     const Tensor& positions, const Tensor& cos, const Tensor& sin) {
  cpu::RotateStoreArgs a{};
  a.target = model_of("target", target);
  a.slots = slots_of("target_slots", slots, target.size(0) * a.target.page_size);
  a.tokens = slots.size(0);
  a.turn = turn_of(cos, sin, positions, a.tokens, a.target.dim);
  const std::int64_t width = a.target.heads * a.target.dim;
  check_shape("mapped", mapped, {a.target.layers, 2, a.tokens, width});
  check_cpu("mapped", mapped);
  RORO_CHECK(mapped.is_contiguous(), "mapped: not contiguous; call .contiguous()");
  a.mapped = mapped.data_ptr();
  a.type = float_type("mapped", mapped);
  check_type("bias", bias, ScalarType::Float);
  check_shape("bias", bias, {a.target.layers, 2, width});
  check_cpu("bias", bias);
  RORO_CHECK(bias.is_contiguous(), "bias: not contiguous; call .contiguous()");
  a.bias = pointer<float>(bias);
  cpu::kv_rotate_store(a, threads());
}

void kv_rotate_store_meta(const Tensor&, const Tensor&, Tensor, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&) {}

}  // namespace
}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def(
      "kv_unrotate(Tensor source, Tensor slots, Tensor positions, Tensor cos, Tensor sin, Tensor layers, bool half) -> "
      "Tensor");
  m.def(
      "kv_rotate_store(Tensor mapped, Tensor bias, Tensor(a!) target, Tensor slots, Tensor positions, Tensor cos, "
      "Tensor sin) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) {
  m.impl("kv_unrotate", TORCH_BOX(&roro::kv_unrotate));
  m.impl("kv_rotate_store", TORCH_BOX(&roro::kv_rotate_store));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) {
  m.impl("kv_unrotate", TORCH_BOX(&roro::kv_unrotate_meta));
  m.impl("kv_rotate_store", TORCH_BOX(&roro::kv_rotate_store_meta));
}
