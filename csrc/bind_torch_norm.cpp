// torch.ops.roro_fast: norm_rope_store, add_rms_norm, silu_mul.
#include "bind_torch.h"
#include "bind_torch_paged.h"

#include <tuple>

#include "cpu/norm_rope_store.h"

namespace roro {
namespace {

const void* weight_of(const char* name, const Tensor& t, std::int64_t n, cpu::DType& type) {
  type = float_type(name, t);
  return vector_of<char>(name, t, n, t.scalar_type());
}

cpu::PagedTensor pages_of(const char* name, const Tensor& t, std::int64_t page_size, std::int64_t heads,
                          std::int64_t dim) {
  check_shape(name, t, {-1, page_size, heads, dim});
  check_cpu(name, t);
  check_rows(name, t);
  return {t.data_ptr(), float_type(name, t), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor norm_rope_store_meta(const Tensor& qkv, std::int64_t heads, std::int64_t, const MaybeTensor&,
                            const MaybeTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor& k_pages,
                            const Tensor&, const Tensor&, double) {
  return torch::stable::new_empty(qkv, {qkv.size(0), heads, k_pages.size(3)});
}

Tensor norm_rope_store(const Tensor& qkv, std::int64_t heads, std::int64_t kv_heads, const MaybeTensor& q_norm,
                       const MaybeTensor& k_norm, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                       Tensor k_pages, Tensor v_pages, const Tensor& slots, double eps) {
  cpu::NormRopeArgs a{};
  RORO_CHECK(k_pages.dim() == 4, "k_pages: shape ", shape_of(k_pages), " but [pages, page_size, heads, dim] is needed");
  a.dim = k_pages.size(3);
  a.page_size = k_pages.size(1);
  a.heads = heads;
  a.kv_heads = kv_heads;
  RORO_CHECK(heads >= 0 && kv_heads >= 0, "heads: ", heads, " and ", kv_heads, " key heads");
  RORO_CHECK(a.dim > 0 && a.dim % 2 == 0, "k_pages: head dimension ", a.dim, " is not even");
  RORO_CHECK(a.page_size > 0, "k_pages: pages of size 0");
  check_shape("qkv", qkv, {-1, (heads + 2 * kv_heads) * a.dim});
  check_cpu("qkv", qkv);
  check_rows("qkv", qkv);
  const std::int64_t n = qkv.size(0);
  a.qkv = qkv.data_ptr();
  a.type = float_type("qkv", qkv);
  a.qkv_stride = qkv.stride(0);
  a.k = pages_of("k_pages", k_pages, a.page_size, kv_heads, a.dim);
  a.v = pages_of("v_pages", v_pages, a.page_size, kv_heads, a.dim);
  RORO_CHECK(a.k.type == a.v.type, "v_pages: another dtype than k_pages");
  if (q_norm) a.q_norm = weight_of("q_norm", *q_norm, a.dim, a.norm_type);
  if (k_norm) {
    cpu::DType type{};
    a.k_norm = weight_of("k_norm", *k_norm, a.dim, type);
    RORO_CHECK(!q_norm || type == a.norm_type, "k_norm: another dtype than q_norm");
    a.norm_type = type;
  }
  a.cos = rotary("cos", cos, a.dim, a.cos_stride);
  a.sin = rotary("sin", sin, a.dim, a.sin_stride);
  a.positions = indices("positions", positions, n);
  a.slots = indices("slots", slots, n);
  const std::int64_t table = std::min(cos.size(0), sin.size(0));
  const std::int64_t room = std::min(k_pages.size(0), v_pages.size(0)) * a.page_size;
  for (std::int64_t i = 0; i < n; ++i) {
    RORO_CHECK(a.positions[i] >= 0 && a.positions[i] < table, "positions: ", a.positions[i], " at ", i,
               ", but cos and sin have ", table);
    RORO_CHECK(a.slots[i] >= 0 && a.slots[i] < room, "slots: ", a.slots[i], " at ", i, ", but the pages hold ", room);
  }
  a.eps = static_cast<float>(eps);
  Tensor q = new_tensor({n, heads, a.dim}, qkv.scalar_type());
  a.q = q.data_ptr();
  cpu::norm_rope_store(a, n, threads());
  return q;
}

using AddedNorm = std::tuple<Tensor, Tensor>;

AddedNorm add_rms_norm_meta(const Tensor& x, const Tensor&, const Tensor&, double) {
  return {torch::stable::new_empty(x, {x.size(0), x.size(1)}), torch::stable::new_empty(x, {x.size(0), x.size(1)})};
}

AddedNorm add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  cpu::AddNormArgs a{};
  check_shape("x", x, {-1, -1});
  const std::int64_t n = x.size(0);
  a.width = x.size(1);
  check_shape("residual", residual, {n, a.width});
  check_type("residual", residual, x.scalar_type());
  for (const auto& [name, t] : {std::pair{"x", &x}, std::pair{"residual", &residual}}) {
    check_cpu(name, *t);
    check_rows(name, *t);
  }
  a.x = x.data_ptr();
  a.residual = residual.data_ptr();
  a.type = float_type("x", x);
  a.x_stride = x.stride(0);
  a.residual_stride = residual.stride(0);
  a.weight = weight_of("weight", weight, a.width, a.weight_type);
  a.eps = static_cast<float>(eps);
  AddedNorm out{new_tensor({n, a.width}, x.scalar_type()), new_tensor({n, a.width}, x.scalar_type())};
  a.normed = std::get<0>(out).data_ptr();
  a.total = std::get<1>(out).data_ptr();
  cpu::add_rms_norm(a, n, threads());
  return out;
}

Tensor silu_mul_meta(const Tensor& gate_up) {
  return torch::stable::new_empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2});
}

Tensor silu_mul(const Tensor& gate_up) {
  cpu::SiluMulArgs a{};
  check_shape("gate_up", gate_up, {-1, -1});
  RORO_CHECK(gate_up.size(1) % 2 == 0, "gate_up: ", gate_up.size(1), " columns; an even number is needed");
  check_cpu("gate_up", gate_up);
  check_rows("gate_up", gate_up);
  a.gate_up = gate_up.data_ptr();
  a.type = float_type("gate_up", gate_up);
  a.stride = gate_up.stride(0);
  a.width = gate_up.size(1) / 2;
  Tensor out = new_tensor({gate_up.size(0), a.width}, gate_up.scalar_type());
  a.out = out.data_ptr();
  cpu::silu_mul(a, gate_up.size(0), threads());
  return out;
}

}  // namespace
}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def(
      "norm_rope_store(Tensor qkv, int heads, int kv_heads, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, "
      "Tensor positions, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_mul(Tensor gate_up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) {
  m.impl("norm_rope_store", TORCH_BOX(&roro::norm_rope_store));
  m.impl("add_rms_norm", TORCH_BOX(&roro::add_rms_norm));
  m.impl("silu_mul", TORCH_BOX(&roro::silu_mul));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) {
  m.impl("norm_rope_store", TORCH_BOX(&roro::norm_rope_store_meta));
  m.impl("add_rms_norm", TORCH_BOX(&roro::add_rms_norm_meta));
  m.impl("silu_mul", TORCH_BOX(&roro::silu_mul_meta));
}
