// torch.ops.roro_fast: a decoder's weights in one packed block, and its whole forward.
#include "bind_torch_step.h"

#include "cpu/decoder.h"

namespace roro {
namespace {

constexpr std::int64_t kDecoderMagic = 0x31636564726f6f72, kFilled = 1;

cpu::DecoderHeader decoder_header(const Tensor& norm, std::int64_t layers, std::int64_t heads, std::int64_t kv_heads,
                                  std::int64_t dim, std::int64_t inner, bool qkv_bias, bool o_bias, bool mlp_bias,
                                  bool qk_norm, double eps) {
  check_shape("norm", norm, {-1});
  RORO_CHECK(layers >= 0 && heads > 0 && kv_heads > 0 && inner > 0, "sizes: ", layers, " layers, ", heads, " heads, ",
             kv_heads, " key heads, intermediate size ", inner, "; all but layers at least 1");
  RORO_CHECK(heads % kv_heads == 0 && heads / kv_heads <= cpu::kAttentionRows, "heads: ", heads, " over ", kv_heads,
             " key heads; a whole ratio of at most ", cpu::kAttentionRows);
  RORO_CHECK(dim > 0 && dim % 2 == 0 && dim <= cpu::kMaxHeadDim, "head_dim: ", dim, "; an even number up to ",
             cpu::kMaxHeadDim);
  cpu::DecoderHeader h{kDecoderMagic, 0,
                       {layers, norm.size(0), heads, kv_heads, dim, inner, qkv_bias, o_bias, mlp_bias, qk_norm,
                        float_type("norm", norm) == cpu::DType::bf16, eps}};
  h.bytes = cpu::decoder_layout(h.sizes).bytes;
  return h;
}

Tensor decoder_new_meta(const Tensor& norm, std::int64_t layers, std::int64_t heads, std::int64_t kv_heads,
                        std::int64_t dim, std::int64_t inner, bool qkv_bias, bool o_bias, bool mlp_bias, bool qk_norm,
                        double eps) {
  const auto h = decoder_header(norm, layers, heads, kv_heads, dim, inner, qkv_bias, o_bias, mlp_bias, qk_norm, eps);
  return torch::stable::new_empty(norm, {h.bytes}, ScalarType::Byte);
}

void put_vector(const char* name, const Tensor& t, std::int64_t n, ScalarType type, char* to) {
  std::memcpy(to, vector_of<char>(name, t, n, type), n * (type == ScalarType::Float ? 4 : 2));
}

Tensor decoder_new(const Tensor& norm, std::int64_t layers, std::int64_t heads, std::int64_t kv_heads,
                   std::int64_t dim, std::int64_t inner, bool qkv_bias, bool o_bias, bool mlp_bias, bool qk_norm,
                   double eps) {
  const auto h = decoder_header(norm, layers, heads, kv_heads, dim, inner, qkv_bias, o_bias, mlp_bias, qk_norm, eps);
  const cpu::DecoderLayout at = cpu::decoder_layout(h.sizes);
  Tensor packed = new_tensor({h.bytes}, ScalarType::Byte);
  char* to = pointer<char>(packed);
  cpu::prefer_large_pages(to, h.bytes);
  std::memcpy(to, &h, sizeof h);
  put_vector("norm", norm, h.sizes.hidden, norm.scalar_type(), to + at.norm);
  for (std::int64_t l = 0; l < layers; ++l) std::memset(to + at.layers + l * at.layer_bytes + at.filled, 0, 8);
  return packed;
}

cpu::DecoderHeader read_header(const Tensor& packed) {
  check_type("packed", packed, ScalarType::Byte);
  check_shape("packed", packed, {-1});
  check_cpu("packed", packed);
  cpu::DecoderHeader h{};
  if (packed.numel() >= static_cast<std::int64_t>(sizeof h)) std::memcpy(&h, packed.data_ptr(), sizeof h);
  RORO_CHECK(h.magic == kDecoderMagic && h.bytes == packed.numel() && packed.is_contiguous(),
             "packed: this is no packed decoder; make it with pack_decoder");
  return h;
}

void put_product(const char* name, const cpu::LinearSizes& s, const Tensor& weight, const MaybeTensor& bias,
                 bool biased, char* to) {
  check_shape(name, weight, {s.columns, s.depth});
  check_type(name, weight, s.type == cpu::DType::f32 ? ScalarType::Float : ScalarType::BFloat16);
  check_cpu(name, weight);
  check_rows(name, weight);
  RORO_CHECK(bias.has_value() == biased, name, biased ? ": a bias is needed" : ": no bias is wanted");
  cpu::Elements b{nullptr, s.type};
  if (bias) b.data = vector_of<char>(name, *bias, s.columns, weight.scalar_type());
  cpu::linear_pack(s, weight.data_ptr(), weight.stride(0), b, to, threads());
}

void decoder_set_layer(Tensor packed, std::int64_t layer, const Tensor& input_norm, const Tensor& qkv,
                       const MaybeTensor& qkv_bias, const MaybeTensor& q_norm, const MaybeTensor& k_norm,
                       const Tensor& o, const MaybeTensor& o_bias, const Tensor& post_norm, const Tensor& gate_up,
                       const MaybeTensor& gate_up_bias, const Tensor& down, const MaybeTensor& down_bias) {
  const cpu::DecoderHeader h = read_header(packed);
  const cpu::DecoderSizes& s = h.sizes;
  const cpu::DecoderLayout at = cpu::decoder_layout(s);
  RORO_CHECK(layer >= 0 && layer < s.layers, "layer: ", layer, ", but there are ", s.layers);
  const ScalarType type = s.half ? ScalarType::BFloat16 : ScalarType::Float;
  char* to = pointer<char>(packed) + at.layers + layer * at.layer_bytes;
  std::memset(to + at.filled, 0, 8);
  put_vector("input_norm", input_norm, s.hidden, type, to + at.input_norm);
  put_vector("post_norm", post_norm, s.hidden, type, to + at.post_norm);
  RORO_CHECK(q_norm.has_value() == (s.qk_norm != 0) && k_norm.has_value() == (s.qk_norm != 0), "q_norm, k_norm: ",
             s.qk_norm ? "weights are needed" : "none are wanted");
  if (q_norm) put_vector("q_norm", *q_norm, s.dim, type, to + at.q_norm);
  if (k_norm) put_vector("k_norm", *k_norm, s.dim, type, to + at.k_norm);
  put_product("qkv", s.qkv(), qkv, qkv_bias, s.qkv_bias, to + at.qkv);
  put_product("o", s.o(), o, o_bias, s.o_bias, to + at.o);
  put_product("gate_up", s.gate_up(), gate_up, gate_up_bias, s.mlp_bias, to + at.gate_up);
  put_product("down", s.down(), down, down_bias, s.mlp_bias, to + at.down);
  std::memcpy(to + at.filled, &kFilled, 8);
}

void decoder_set_layer_meta(Tensor, std::int64_t, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&,
                            const MaybeTensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&,
                            const MaybeTensor&, const Tensor&, const MaybeTensor&) {}

void check_bounds(const char* name, const std::int64_t* x, std::int64_t n, std::int64_t limit, const char* what) {
  for (std::int64_t i = 0; i < n; ++i) {
    RORO_CHECK(x[i] >= 0 && x[i] < limit, name, ": ", x[i], " at ", i, ", but ", what, ' ', limit);
  }
}

Tensor decoder_forward_meta(const Tensor&, const Tensor& embed, const Tensor&, const Tensor&, const Tensor& ids,
                            const Tensor&, const Tensor&, Tensor, const Tensor&, const Tensor&, const Tensor&,
                            const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor& wanted,
                            MaybeTensor, const MaybeTensor&, bool below) {
  return torch::stable::new_empty(embed, {below ? 0 : wanted ? wanted->size(0) : ids.size(0), embed.size(1)});
}

void check_wanted(cpu::DecoderArgs& a, const DecoderBatch& b) {
  a.num_wanted = b.num_wanted;
  a.wanted = b.wanted;
  if (!b.wanted) return;
  check_bounds("wanted", a.wanted, a.num_wanted, a.tokens, "tokens:");
  for (std::int64_t i = 1; i < a.num_wanted; ++i) {
    RORO_CHECK(a.wanted[i - 1] < a.wanted[i], "wanted: ", a.wanted[i], " at ", i, " does not ascend");
  }
}

void check_states(cpu::DecoderArgs& a, const cpu::DecoderSizes& s, const MaybeTensor& states,
                  const std::int64_t* state_slots, bool below) {
  RORO_CHECK(states.has_value() == (state_slots != nullptr) && (states || !below),
             "states, state_slots: give both where a forward is cut");
  RORO_CHECK(s.layers || (states && !below), "packed: no layers, and the forward does not begin after any");
  a.below = below;
  if (!states) return;
  check_shape("states", *states, {-1, a.page_size, s.hidden});
  check_type("states", *states, s.half ? ScalarType::BFloat16 : ScalarType::Float);
  check_cpu("states", *states);
  check_rows("states", *states);
  a.states = static_cast<char*>(states->data_ptr());
  a.state_page_stride = states->stride(0);
  a.state_token_stride = states->stride(1);
  a.state_slots = state_slots;
  check_bounds("state_slots", state_slots, a.tokens, states->size(0) * a.page_size, "the states hold");
}

Tensor decoder_forward(const Tensor& packed, const Tensor& embed, const Tensor& cos, const Tensor& sin,
                       const Tensor& ids, const Tensor& positions, const Tensor& slots, Tensor pages,
                       const Tensor& page_table, const Tensor& kv_lens, const Tensor& cu_seqlens,
                       const MaybeTensor& members, const MaybeTensor& offsets, const MaybeTensor& lengths,
                       const MaybeTensor& wanted, MaybeTensor states, const MaybeTensor& state_slots, bool below) {
  check_shape("ids", ids, {-1});
  const std::int64_t n = ids.size(0);
  if (wanted) check_shape("wanted", *wanted, {-1});
  return run_decoder(packed, embed, cos, sin, pages,
                     {indices("ids", ids, n), indices("positions", positions, n), indices("slots", slots, n), n,
                      paging_of(page_table, kv_lens, cu_seqlens), members, offsets, lengths,
                      wanted ? indices("wanted", *wanted, wanted->size(0)) : nullptr, wanted ? wanted->size(0) : n,
                      state_slots ? indices("state_slots", *state_slots, n) : nullptr},
                     states, below);
}

}  // namespace

Tensor run_decoder(const Tensor& packed, const Tensor& embed, const Tensor& cos, const Tensor& sin, const Tensor& pages,
                   const DecoderBatch& b, const MaybeTensor& states, bool below) {
  const cpu::DecoderHeader h = read_header(packed);
  const cpu::DecoderSizes& s = h.sizes;
  const cpu::DecoderLayout at = cpu::decoder_layout(s);
  cpu::DecoderArgs a{};
  a.packed = pointer<char>(packed);
  for (std::int64_t l = 0; l < s.layers; ++l) {
    std::int64_t filled;
    std::memcpy(&filled, a.packed + at.layers + l * at.layer_bytes + at.filled, 8);
    RORO_CHECK(filled == kFilled, "packed: layer ", l, " has no weights yet");
  }
  const ScalarType type = s.half ? ScalarType::BFloat16 : ScalarType::Float;
  check_shape("embed", embed, {-1, s.hidden});
  check_type("embed", embed, type);
  check_cpu("embed", embed);
  check_rows("embed", embed);
  a.embed = embed.data_ptr();
  a.embed_stride = embed.stride(0);
  a.cos = rotary("cos", cos, s.dim, a.cos_stride);
  a.sin = rotary("sin", sin, s.dim, a.sin_stride);
  a.tokens = b.tokens;
  check_shape("pages", pages, {-1, s.layers, 2, -1, s.kv_heads, s.dim});
  check_cpu("pages", pages);
  check_rows("pages", pages);
  a.page_size = pages.size(3);
  RORO_CHECK(a.page_size > 0, "pages: pages of size 0");
  a.k = {pages.data_ptr(), float_type("pages", pages), pages.stride(0), pages.stride(3), pages.stride(4)};
  a.v = a.k;
  a.v.data = static_cast<char*>(pages.data_ptr()) + pages.stride(2) * (a.k.type == cpu::DType::f32 ? 4 : 2);
  a.layer_stride = pages.stride(1);
  a.ids = b.ids;
  a.positions = b.positions;
  a.slots = b.slots;
  check_bounds("ids", a.ids, a.tokens, embed.size(0), "the vocabulary has");
  check_bounds("positions", a.positions, a.tokens, std::min(cos.size(0), sin.size(0)), "cos and sin have");
  check_bounds("slots", a.slots, a.tokens, pages.size(0) * a.page_size, "the pages hold");
  cpu::AttentionArgs t = cpu::decoder_attention(a);
  const std::int64_t n = check_paging(t, b.paging, a.tokens, pages.size(0));
  Groups g;
  if (b.members && b.offsets && b.lengths) g = check_groups(t, n, *b.members, *b.offsets, *b.lengths);
  a.table = t.table;
  a.table_stride = t.table_stride;
  a.kv_lens = t.kv_lens;
  a.cu_seqlens = t.cu_seqlens;
  check_wanted(a, b);
  check_states(a, s, states, b.state_slots, below);
  Tensor out = new_tensor({below ? 0 : a.num_wanted, s.hidden}, type);
  a.out = out.data_ptr();
  cpu::decoder_forward(a, cpu::plan_attention(t, n, g.members, g.offsets, g.lengths, g.n), threads());
  return out;
}

}  // namespace roro

STABLE_TORCH_LIBRARY_FRAGMENT(roro_fast, m) {
  m.def(
      "decoder_new(Tensor norm, int layers, int heads, int kv_heads, int dim, int inner, bool qkv_bias, bool o_bias, "
      "bool mlp_bias, bool qk_norm, float eps) -> Tensor");
  m.def(
      "decoder_set_layer(Tensor(a!) packed, int layer, Tensor input_norm, Tensor qkv, Tensor? qkv_bias, "
      "Tensor? q_norm, Tensor? k_norm, Tensor o, Tensor? o_bias, Tensor post_norm, Tensor gate_up, "
      "Tensor? gate_up_bias, Tensor down, Tensor? down_bias) -> ()");
  m.def(
      "decoder_forward(Tensor packed, Tensor embed, Tensor cos, Tensor sin, Tensor ids, Tensor positions, "
      "Tensor slots, Tensor(a!) pages, Tensor page_table, Tensor kv_lens, Tensor cu_seqlens, Tensor? members=None, "
      "Tensor? offsets=None, Tensor? lengths=None, Tensor? wanted=None, Tensor(b!)? states=None, "
      "Tensor? state_slots=None, bool below=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, CPU, m) {
  m.impl("decoder_new", TORCH_BOX(&roro::decoder_new));
  m.impl("decoder_set_layer", TORCH_BOX(&roro::decoder_set_layer));
  m.impl("decoder_forward", TORCH_BOX(&roro::decoder_forward));
}

STABLE_TORCH_LIBRARY_IMPL(roro_fast, Meta, m) {
  m.impl("decoder_new", TORCH_BOX(&roro::decoder_new_meta));
  m.impl("decoder_set_layer", TORCH_BOX(&roro::decoder_set_layer_meta));
  m.impl("decoder_forward", TORCH_BOX(&roro::decoder_forward_meta));
}
