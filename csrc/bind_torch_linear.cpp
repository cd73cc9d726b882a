// torch.ops.roro_fast: linear with packed weights.
#include "bind_torch_step.h"

#include "cpu/linear.h"

namespace roro {
namespace {

constexpr std::int64_t kLinearMagic = 0x3172616e696c6f72;

struct LinearHeader {
  std::int64_t magic, bytes, columns, depth, half, gated, bias, unused;
  cpu::LinearSizes sizes() const { return {columns, depth, half ? cpu::DType::bf16 : cpu::DType::f32, gated != 0}; }
};

LinearHeader linear_header(const Tensor& weight, const MaybeTensor& bias, bool gated) {
  check_shape("weight", weight, {-1, -1});
  const bool half = float_type("weight", weight) == cpu::DType::bf16;
  RORO_CHECK(weight.size(1) > 0, "weight: shape ", shape_of(weight), " has no columns");
  if (bias) check_shape("bias", *bias, {weight.size(0)});
  RORO_CHECK(!gated || weight.size(0) % 2 == 0, "weight: ", weight.size(0), " rows; gate and up need an even number");
  LinearHeader h{kLinearMagic, 0, weight.size(0), weight.size(1), half, gated, bias.has_value(), 0};
  h.bytes = static_cast<std::int64_t>(sizeof h) + cpu::linear_packed_bytes(h.sizes());
  return h;
}

Tensor linear_pack_meta(const Tensor& weight, const MaybeTensor& bias, bool gated) {
  return torch::stable::new_empty(weight, {linear_header(weight, bias, gated).bytes}, ScalarType::Byte);
}

Tensor linear_pack(const Tensor& weight, const MaybeTensor& bias, bool gated) {
  const LinearHeader h = linear_header(weight, bias, gated);
  check_cpu("weight", weight);
  check_rows("weight", weight);
  cpu::Elements b{nullptr, cpu::DType::f32};
  if (bias) b = {vector_of<char>("bias", *bias, h.columns, bias->scalar_type()), float_type("bias", *bias)};
  Tensor packed = new_tensor({h.bytes}, ScalarType::Byte);
  char* to = pointer<char>(packed);
  cpu::prefer_large_pages(to, h.bytes);
  std::memcpy(to, &h, sizeof h);
  cpu::linear_pack(h.sizes(), weight.data_ptr(), weight.stride(0), b, to + sizeof h, threads());
  return packed;
}

LinearHeader read_header(const Tensor& packed) {
  check_type("packed", packed, ScalarType::Byte);
  check_shape("packed", packed, {-1});
  check_cpu("packed", packed);
  LinearHeader h{};
  if (packed.numel() >= static_cast<std::int64_t>(sizeof h)) std::memcpy(&h, packed.data_ptr(), sizeof h);
  RORO_CHECK(h.magic == kLinearMagic && h.bytes == packed.numel() && packed.is_contiguous(),
             "packed: these are no packed weights; make them with pack_linear");
  return h;
}

void prefer_large_pages(Tensor memory) {
  check_cpu("memory", memory);
  RORO_CHECK(memory.is_contiguous(), "memory: not contiguous");
  cpu::prefer_large_pages(memory.data_ptr(), memory.numel() * memory.element_size());
}

Tensor linear_meta(const Tensor& x, const Tensor&, std::int64_t columns, bool float_out) {
  return torch::stable::new_empty(x, {x.size(0), columns}, float_out ? ScalarType::Float : x.scalar_type());
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& packed, std::int64_t columns, bool float_out) {
  const LinearHeader h = read_header(packed);
  cpu::LinearArgs a{};
  a.sizes = h.sizes();
  RORO_CHECK(columns == h.columns / (h.gated ? 2 : 1), "packed: gives ", h.columns / (h.gated ? 2 : 1),
             " columns, not ", columns);
  check_shape("x", x, {-1, h.depth});
  check_cpu("x", x);
  check_rows("x", x);
  check_type("x", x, h.half ? ScalarType::BFloat16 : ScalarType::Float);
  a.packed = pointer<char>(packed) + sizeof h;
  a.bias = h.bias;
  a.x = x.data_ptr();
  a.rows = x.size(0);
  a.x_stride = x.stride(0);
  const ScalarType type = float_out ? ScalarType::Float : x.scalar_type();
  Tensor out = new_tensor({a.rows, columns}, type);
  a.out = out.data_ptr();
  a.out_type = type == ScalarType::Float ? cpu::DType::f32 : cpu::DType::bf16;
  a.out_stride = columns;
  cpu::linear(a, threads());
  return out;
}

}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def("linear_pack(Tensor weight, Tensor? bias, bool gated) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, int columns, bool float_out) -> Tensor");
  m.def("prefer_large_pages(Tensor(a!) memory) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&roro::linear_pack));
  m.impl("linear", TORCH_BOX(&roro::linear));
  m.impl("prefer_large_pages", TORCH_BOX(&roro::prefer_large_pages));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) {
  m.impl("linear_pack", TORCH_BOX(&roro::linear_pack_meta));
  m.impl("linear", TORCH_BOX(&roro::linear_meta));
}
