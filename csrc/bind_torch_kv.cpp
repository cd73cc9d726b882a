// torch.ops.roro_fast: ops on paged keys and values.
#include "bind_torch.h"
#include "bind_torch_paged.h"

#include <algorithm>
#include <cmath>

#include "cpu/kv_copy.h"
#include "cpu/paged_attention.h"

namespace roro {
namespace {

std::int64_t element_bytes(const Tensor& t) {
  std::int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return static_cast<std::int64_t>(aoti_torch_dtype_element_size(type));
}

cpu::Element element(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cpu::Element::f32;
    case ScalarType::BFloat16: return cpu::Element::bf16;
    case ScalarType::Half: return cpu::Element::f16;
    default: fail(name, ": ", name_of(t.scalar_type()), " cannot be converted; use float32, bfloat16 or float16");
  }
}

// [pages, inner..., page_size, heads, dim]
cpu::Pool pool_of(const char* name, const Tensor& t) {
  check_cpu(name, t);
  const std::int64_t d = t.dim(), bytes = element_bytes(t);
  RORO_CHECK(d >= 4 && d - 4 <= cpu::kMaxInner, name, ": shape ", shape_of(t),
             " but [pages, up to 4 more, page_size, heads, dim] is needed");
  RORO_CHECK(t.size(d - 1) <= 1 || t.stride(d - 1) == 1, name, ": elements of a head are apart; call .contiguous()");
  cpu::Pool p{};
  p.data = static_cast<char*>(t.data_ptr());
  p.pages = t.size(0);
  p.page_size = t.size(d - 3);
  p.page_stride = t.stride(0) * bytes;
  p.token_stride = t.stride(d - 3) * bytes;
  p.head_stride = t.stride(d - 2) * bytes;
  for (std::int64_t i = 1; i < d - 3; ++i) p.inner_stride[i - 1] = t.stride(i) * bytes;
  return p;
}

void kv_copy(const Tensor& source, Tensor target, const Tensor& spans) {
  cpu::CopyArgs a{};
  a.source = pool_of("source", source);
  a.target = pool_of("target", target);
  const std::int64_t d = source.dim();
  const bool alike = target.dim() == d;
  for (std::int64_t i = 1; i < d; ++i) {
    RORO_CHECK(alike && (i == d - 3 || source.size(i) == target.size(i)), "target: shape ", shape_of(target),
               " does not fit source ", shape_of(source), "; only pages and page_size may differ");
  }
  RORO_CHECK(!source.numel() || a.source.page_size > 0, "source: pages of size 0");
  std::fill(a.inner_size, a.inner_size + cpu::kMaxInner, 1);
  for (std::int64_t i = 1; i < d - 3; ++i) a.inner_size[i - 1] = source.size(i);
  a.heads = source.size(d - 2);
  a.dim = source.size(d - 1);
  a.source_bytes = element_bytes(source);
  a.target_bytes = element_bytes(target);
  if (source.scalar_type() != target.scalar_type()) {
    cpu::set_conversion(a, element("source", source), element("target", target));
  }
  check_type("spans", spans, ScalarType::Long);
  check_shape("spans", spans, {-1, 3});
  RORO_CHECK(spans.is_contiguous(), "spans: not contiguous; call .contiguous()");
  check_cpu("spans", spans);
  a.spans = static_cast<const cpu::Span*>(spans.data_ptr());
  a.n = spans.size(0);
  cpu::check_spans(a);
  cpu::kv_copy(a, threads());
}

void kv_copy_meta(const Tensor&, Tensor, const Tensor&) {}

void kv_copy_pages(Tensor pool, const Tensor& source, const Tensor& target) {
  check_cpu("pool", pool);
  RORO_CHECK(pool.dim() >= 1, "pool: a scalar has no pages");
  std::int64_t size = 1;
  bool dense = true;
  for (std::int64_t i = pool.dim() - 1; i > 0; --i) {
    dense &= pool.size(i) <= 1 || pool.stride(i) == size;
    size *= pool.size(i);
  }
  RORO_CHECK(dense, "pool: a page must be contiguous");
  RORO_CHECK(source.dim() == 1, "source: shape ", shape_of(source), " but [any] is needed");
  const std::int64_t n = source.size(0), pages = pool.size(0);
  const std::int64_t *from = indices("source", source, n), *to = indices("target", target, n);
  for (std::int64_t i = 0; i < n; ++i) {
    RORO_CHECK(from[i] >= 0 && from[i] < pages, "source: page ", from[i], " at ", i, ", but the pool has ", pages);
    RORO_CHECK(to[i] >= 0 && to[i] < pages, "target: page ", to[i], " at ", i, ", but the pool has ", pages);
  }
  std::vector<std::int64_t> written(to, to + n);
  std::sort(written.begin(), written.end());
  for (std::int64_t i = 0; i < n; ++i) {
    RORO_CHECK(!i || written[i] != written[i - 1], "target: page ", written[i], " is there twice");
    RORO_CHECK(!std::binary_search(written.begin(), written.end(), from[i]), "source: page ", from[i],
               " is a target too");
  }
  const std::int64_t bytes = element_bytes(pool);
  cpu::copy_pages(static_cast<char*>(pool.data_ptr()), pool.stride(0) * bytes, size * bytes, from, to, n, threads());
}

void kv_copy_pages_meta(Tensor, const Tensor&, const Tensor&) {}

// -- paged_attention --------------------------------------------------------------------------------------------------

cpu::PagedTensor paged(const char* name, const Tensor& t, std::int64_t page_size, std::int64_t heads,
                       std::int64_t dim) {
  check_shape(name, t, {-1, page_size, heads, dim});
  check_cpu(name, t);
  check_rows(name, t);
  return {t.data_ptr(), float_type(name, t), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor paged_attention_meta(const Tensor& q, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const MaybeTensor&, const MaybeTensor&, const MaybeTensor&) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
}

Tensor paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& page_table,
                       const Tensor& kv_lens, const Tensor& cu_seqlens, const MaybeTensor& members,
                       const MaybeTensor& offsets, const MaybeTensor& lengths) {
  cpu::AttentionArgs a{};
  check_shape("q", q, {-1, -1, -1});
  check_rows("q", q);
  check_cpu("q", q);
  RORO_CHECK(k_pages.dim() == 4, "k_pages: shape ", shape_of(k_pages), " but [pages, page_size, heads, dim] is needed");
  a.q = q.data_ptr();
  a.type = float_type("q", q);
  a.q_token_stride = q.stride(0);
  a.q_head_stride = q.stride(1);
  a.heads = q.size(1);
  a.dim = q.size(2);
  a.page_size = k_pages.size(1);
  a.kv_heads = k_pages.size(2);
  RORO_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.heads / a.kv_heads <= cpu::kAttentionRows, "q: ",
             a.heads, " heads over ", a.kv_heads, " key heads; a whole ratio of at most ", cpu::kAttentionRows);
  RORO_CHECK(a.dim >= 1 && a.dim <= cpu::kMaxHeadDim, "q: head dimension ", a.dim, "; 1 to ", cpu::kMaxHeadDim);
  RORO_CHECK(a.page_size >= 1, "k_pages: pages of size 0");
  a.k = paged("k_pages", k_pages, a.page_size, a.kv_heads, a.dim);
  a.v = paged("v_pages", v_pages, a.page_size, a.kv_heads, a.dim);
  const std::int64_t pages = std::min(k_pages.size(0), v_pages.size(0));
  const std::int64_t n = check_paging(a, paging_of(page_table, kv_lens, cu_seqlens), q.size(0), pages);
  Groups g;
  if (members && offsets && lengths) g = check_groups(a, n, *members, *offsets, *lengths);
  a.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(a.dim)));
  Tensor out = new_tensor({q.size(0), a.heads, a.dim}, q.scalar_type());
  a.out = out.data_ptr();
  cpu::paged_attention(a, cpu::plan_attention(a, n, g.members, g.offsets, g.lengths, g.n), threads());
  return out;
}

}  // namespace
}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def("kv_copy(Tensor source, Tensor(a!) target, Tensor spans) -> ()");
  m.def("kv_copy_pages(Tensor(a!) pool, Tensor source, Tensor target) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lens, "
      "Tensor cu_seqlens, Tensor? members, Tensor? offsets, Tensor? lengths) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) {
  m.impl("kv_copy", TORCH_BOX(&roro::kv_copy));
  m.impl("kv_copy_pages", TORCH_BOX(&roro::kv_copy_pages));
  m.impl("paged_attention", TORCH_BOX(&roro::paged_attention));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) {
  m.impl("kv_copy", TORCH_BOX(&roro::kv_copy_meta));
  m.impl("kv_copy_pages", TORCH_BOX(&roro::kv_copy_pages_meta));
  m.impl("paged_attention", TORCH_BOX(&roro::paged_attention_meta));
}
