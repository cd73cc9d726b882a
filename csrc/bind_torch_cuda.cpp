// torch.ops.roro_cuda: the CUDA kernels as torch ops, a shared library of its own (roro_fast/ops/cuda/build.py).
// No CUDA headers: kernels are reached through csrc/cuda/api.h. Through torch's stable ABI and a weak symbol for the
// current stream the same binary also loads where torch has no CUDA.
#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_torch.h"
#include "cuda/api.h"

#pragma weak aoti_torch_get_current_cuda_stream

// The emulated build of the tests registers the same code under another name, for CPU tensors.
#ifndef RORO_OPS
#define RORO_OPS roro_cuda
#define RORO_KEY CUDA
#endif

namespace roro {
namespace {

using Sizes = std::vector<std::int64_t>;

struct Place {
  std::int32_t type = 0, index = 0;
  bool operator==(const Place& other) const { return type == other.type && index == other.index; }
};

Place place_of(const Tensor& t) {
  Place p;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &p.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &p.index));
  return p;
}

/// One call: the device that its tensors must share, made current, and that device's current stream.
class Call {
 public:
  Call(const char* op, const Tensor& leader) : op_(op), place_(place_of(leader)) {
    if (place_.type != aoti_torch_device_type_cuda()) return;
    guard_.emplace(place_.index);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place_.index, &stream_));
  }

  void* stream() const { return stream_; }
  Place place() const { return place_; }

  /// A tensor of this dtype, shape (-1: any) and device; its last dimension is contiguous.
  void check(const char* name, const Tensor& t, ScalarType type, std::initializer_list<std::int64_t> sizes) const {
    check_type(name, t, type);
    check_shape(name, t, sizes);
    RORO_CHECK(place_of(t) == place_, name, ": not on the same device as the other arguments of ", op_);
    check_rows(name, t);
  }

  /// Like `check`, and contiguous.
  void check_dense(const char* name, const Tensor& t, ScalarType type,
                   std::initializer_list<std::int64_t> sizes) const {
    check(name, t, type, sizes);
    RORO_CHECK(t.is_contiguous(), name, ": not contiguous; call .contiguous()");
  }

  Tensor empty(const Sizes& sizes, ScalarType type, std::int64_t row_stride = 0) const {
    Sizes strides(sizes.size(), 1);
    for (int i = int(sizes.size()) - 2; i >= 0; --i) strides[i] = strides[i + 1] * (sizes[i + 1] ? sizes[i + 1] : 1);
    if (row_stride) strides[0] = row_stride;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        sizes.size(), sizes.data(), strides.data(), code_of(type), place_.type, place_.index, &handle));
    Tensor t(handle);
    if (poisoned() && t.is_cpu() && t.numel()) std::memset(t.data_ptr(), 0xff, t.numel() * t.element_size());
    return t;
  }

  void launched(int error) const {
    RORO_CHECK(error == 0, op_, ": CUDA error ", error, ": ", roro_cuda_error(error));
  }

 private:
  static std::int32_t code_of(ScalarType type) {
    switch (type) {
      case ScalarType::Long: return aoti_torch_dtype_int64();
      case ScalarType::Half: return aoti_torch_dtype_float16();
      case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
      default: return aoti_torch_dtype_float32();
    }
  }

  const char* op_;
  Place place_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

int dtype_of(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return RORO_F32;
  if (type == ScalarType::Half) return RORO_F16;
  RORO_CHECK(type == ScalarType::BFloat16, name, ": ", name_of(type), " but float32, float16 or bfloat16 is needed");
  return RORO_BF16;
}

template <typename T>
T* maybe(const MaybeTensor& t) {
  return t ? pointer<T>(*t) : nullptr;
}

/// Zeroed counters for launches whose last block continues. Launches of one stream follow each other and share theirs;
/// a launch captured in a graph may run on any stream later and keeps its own.
class Tickets {
 public:
  unsigned* get(const Call& call, const Tensor& like, std::int64_t count) {
    int capturing = 0;
    call.launched(roro_stream_capturing(call.stream(), &capturing));
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto key = std::make_tuple(call.place().type, call.place().index, call.stream());
    if (!capturing) {
      auto& found = by_stream_[key];
      if (found.second < count) found = {take(call, like, count, false), count};
      return found.first;
    }
    return take(call, like, count, true);
  }

 private:
  static constexpr std::int64_t kArena = 1 << 16, kLine = 32;

  unsigned* take(const Call& call, const Tensor& like, std::int64_t count, bool capturing) {
    count = (count + kLine - 1) / kLine * kLine;
    Arena& arena = arenas_[std::make_pair(call.place().type, call.place().index)];
    if (arena.left < count) {
      // Memory zeroed inside a capture is zeroed again by each replay: such a launch may share with none.
      const std::int64_t size = capturing ? count : std::max(count, kArena);
      Tensor zeros = torch::stable::new_zeros(like, {size}, ScalarType::Int);
      kept_.push_back(zeros);
      if (capturing) return pointer<unsigned>(zeros);
      call.launched(roro_stream_synchronize(call.stream()));
      arena = {pointer<unsigned>(zeros), size};
    }
    unsigned* out = arena.next;
    arena.next += count;
    arena.left -= count;
    return out;
  }

  struct Arena {
    unsigned* next = nullptr;
    std::int64_t left = 0;
  };

  std::mutex mutex_;
  std::vector<Tensor> kept_;
  std::map<std::pair<std::int32_t, std::int32_t>, Arena> arenas_;
  std::map<std::tuple<std::int32_t, std::int32_t, void*>, std::pair<unsigned*, std::int64_t>> by_stream_;
};

Tickets& tickets() {
  static Tickets* const one = new Tickets;  // never freed: at exit the CUDA context may be gone first
  return *one;
}

// -- router_score -----------------------------------------------------------------------------------------------------

using Router = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Router router_outputs(const Tensor& like, std::int64_t n, std::int64_t k) {
  const Call call("router_score", like);
  return {call.empty({n}, ScalarType::Long), call.empty({n}, ScalarType::Float), call.empty({n}, ScalarType::Float),
          call.empty({n, k}, ScalarType::Float), call.empty({n, k}, ScalarType::Float)};
}

Router router_score(const Tensor& hidden, const MaybeTensor& rows, const Tensor& signals, const Tensor& norm,
                    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& uniforms,
                    const MaybeTensor& bias, double temperature, double eps) {
  const Call call("router_score", signals);
  RoroRouterScore a{};
  a.hidden_dtype = dtype_of("hidden", hidden);
  a.weight_dtype = dtype_of("weights.w1", w1);
  const ScalarType type = w1.scalar_type();
  RORO_CHECK(type == ScalarType::Float || type == hidden.scalar_type(), "weights.w1: ", name_of(type), " with ",
             name_of(hidden.scalar_type()), " hidden; weights are float32 or of the dtype of hidden");
  call.check_dense("signals", signals, ScalarType::Float, {-1, -1});
  call.check("hidden", hidden, hidden.scalar_type(), {-1, -1});
  const std::int64_t N = signals.size(0), S = signals.size(1), H = hidden.size(1);
  call.check("weights.w1", w1, type, {-1, H + S});
  const std::int64_t D = w1.size(0);
  call.check_dense("weights.norm", norm, type, {H});
  call.check_dense("weights.b1", b1, type, {D});
  call.check_dense("weights.w2", w2, type, {-1, D});
  const std::int64_t K = w2.size(0);
  RORO_CHECK(K >= 1 && K <= RORO_ROUTER_MAX_ACTIONS, "weights.w2: ", K, " actions; the CUDA kernel takes 1 to ",
             int(RORO_ROUTER_MAX_ACTIONS));
  RORO_CHECK(D >= 1 && D <= 65536 && H <= 65536 && S <= 65536, "weights.w1: shape ", shape_of(w1), " is too large");
  call.check_dense("weights.b2", b2, type, {K});
  call.check_dense("uniforms", uniforms, ScalarType::Float, {N});
  if (rows) call.check_dense("rows", *rows, ScalarType::Long, {N});
  else RORO_CHECK(hidden.size(0) == N, "hidden: ", hidden.size(0), " rows for ", N, " rows of signals; pass rows");
  if (bias) call.check_dense("bias", *bias, ScalarType::Float, {N, K});

  Router out = router_outputs(signals, N, K);
  if (N == 0) return out;
  a.hidden = hidden.data_ptr();
  a.rows = maybe<const std::int64_t>(rows);
  a.signals = pointer<const float>(signals);
  a.uniforms = pointer<const float>(uniforms);
  a.bias = maybe<const float>(bias);
  a.norm = norm.data_ptr(), a.w1 = w1.data_ptr(), a.b1 = b1.data_ptr(), a.w2 = w2.data_ptr(), a.b2 = b2.data_ptr();
  a.action = pointer<std::int64_t>(std::get<0>(out));
  a.logprob = pointer<float>(std::get<1>(out));
  a.entropy = pointer<float>(std::get<2>(out));
  a.probs = pointer<float>(std::get<3>(out));
  a.logits = pointer<float>(std::get<4>(out));
  a.T = hidden.size(0), a.N = N, a.hidden_stride = hidden.stride(0), a.w1_stride = w1.stride(0);
  a.H = int(H), a.S = int(S), a.D = int(D), a.K = int(K);
  a.temperature = float(temperature), a.eps = float(eps);
  if (N <= RORO_ROUTER_MAX_ROWS && S <= RORO_ROUTER_MAX_SIGNALS) {
    const Tensor workspace = call.empty({roro_router_score_workspace(N, a.H, a.D, a.K)}, ScalarType::Float);
    a.workspace = pointer<float>(workspace);
    a.tickets = tickets().get(call, signals, roro_router_score_tickets(a.D));
    call.launched(roro_router_score(&a, call.stream()));
    return out;
  }
  a.x_stride = (H + S + 7) / 8 * 8;
  const Tensor x = call.empty({N, H + S}, type, a.x_stride);
  a.x = x.data_ptr();
  call.launched(roro_router_inputs(&a, call.stream()));
  const Tensor z = torch::stable::matmul(x, torch::stable::transpose(w1, 0, 1));
  a.z = z.data_ptr();
  call.launched(roro_router_epilogue(&a, call.stream()));
  return out;
}

Router router_score_meta(const Tensor&, const MaybeTensor&, const Tensor& signals, const Tensor&, const Tensor&,
                         const Tensor&, const Tensor& w2, const Tensor&, const Tensor&, const MaybeTensor&, double,
                         double) {
  const auto like = [&](Sizes sizes, ScalarType type) { return torch::stable::new_empty(signals, sizes, type); };
  const std::int64_t n = signals.size(0), k = w2.size(0);
  return {like({n}, ScalarType::Long), like({n}, ScalarType::Float), like({n}, ScalarType::Float),
          like({n, k}, ScalarType::Float), like({n, k}, ScalarType::Float)};
}

// -- judge_score ------------------------------------------------------------------------------------------------------

using Judge = std::tuple<Tensor, Tensor, Tensor>;

/// The advantages are empty without group_offsets.
Judge judge_score(const Tensor& hidden, const Tensor& rows, const Tensor& label_weight, const Tensor& criterion_weight,
                  const Tensor& offsets, const Tensor& valence, const MaybeTensor& group_offsets, double eps) {
  const Call call("judge_score", hidden);
  RoroJudgeScore a{};
  a.hidden_dtype = dtype_of("hidden", hidden);
  a.label_dtype = dtype_of("label_weight", label_weight);
  const ScalarType type = label_weight.scalar_type();
  RORO_CHECK(type == ScalarType::Float || type == hidden.scalar_type(), "label_weight: ", name_of(type), " with ",
             name_of(hidden.scalar_type()), " hidden; it is float32 or of the dtype of hidden");
  call.check("hidden", hidden, hidden.scalar_type(), {-1, -1});
  call.check_dense("rows", rows, ScalarType::Long, {-1});
  const std::int64_t M = rows.size(0), H = hidden.size(1);
  call.check("label_weight", label_weight, type, {-1, H});
  const std::int64_t K = label_weight.size(0);
  RORO_CHECK(K >= 1 && K <= RORO_JUDGE_MAX_LABELS, "label_weight: ", K, " labels; the CUDA kernel takes 1 to ",
             int(RORO_JUDGE_MAX_LABELS));
  RORO_CHECK(H <= 65536, "hidden: ", H, " columns; the CUDA kernel takes at most 65536");
  call.check_dense("criterion_weight", criterion_weight, ScalarType::Float, {M});
  call.check_dense("valence", valence, ScalarType::Float, {K});
  call.check_dense("offsets", offsets, ScalarType::Long, {-1});
  RORO_CHECK(offsets.size(0) >= 1, "offsets: empty; S trajectories have S + 1 offsets");
  const std::int64_t S = offsets.size(0) - 1;
  if (group_offsets) {
    call.check_dense("group_offsets", *group_offsets, ScalarType::Long, {-1});
    RORO_CHECK(group_offsets->size(0) >= (S ? 2 : 1), "group_offsets: ", group_offsets->size(0), " elements for ", S,
               " trajectories; G groups have G + 1 offsets, the last of them ", S);
  }
  const Tensor probs = call.empty({M, K}, ScalarType::Float), scores = call.empty({S}, ScalarType::Float);
  const Tensor advantages = call.empty({group_offsets ? S : 0}, ScalarType::Float);
  const Tensor value = call.empty({M}, ScalarType::Float);
  a.hidden = hidden.data_ptr(), a.label_weight = label_weight.data_ptr();
  a.rows = pointer<const std::int64_t>(rows);
  a.criterion_weight = pointer<const float>(criterion_weight);
  a.offsets = pointer<const std::int64_t>(offsets);
  a.valence = pointer<const float>(valence);
  a.group_offsets = maybe<const std::int64_t>(group_offsets);
  a.probs = pointer<float>(probs), a.value = pointer<float>(value);
  a.scores = pointer<float>(scores), a.advantages = pointer<float>(advantages);
  a.T = hidden.size(0), a.M = M, a.S = S, a.G = group_offsets ? group_offsets->size(0) - 1 : 0;
  a.hidden_stride = hidden.stride(0), a.label_stride = label_weight.stride(0);
  a.H = int(H), a.K = int(K), a.eps = float(eps);
  call.launched(roro_judge_score(&a, call.stream()));
  return {probs, scores, advantages};
}

Judge judge_score_meta(const Tensor& hidden, const Tensor& rows, const Tensor& label_weight, const Tensor&,
                       const Tensor& offsets, const Tensor&, const MaybeTensor& group_offsets, double) {
  const auto floats = [&](Sizes sizes) { return torch::stable::new_empty(hidden, sizes, ScalarType::Float); };
  const std::int64_t s = offsets.size(0) - 1;
  return {floats({rows.size(0), label_weight.size(0)}), floats({s}), floats({group_offsets ? s : 0})};
}

// -- kv_handoff -------------------------------------------------------------------------------------------------------

constexpr std::int64_t kSlots = std::int64_t(1) << 31;

/// dims [pages, inner..., page_size, heads, dim] of `t`.
RoroKvPool pool_of(const char* name, const Tensor& t) {
  RoroKvPool p{};
  const std::int64_t dims = t.dim();
  const auto stride = [&](std::int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; };
  p.data = t.data_ptr();
  p.pages = t.size(0), p.page_stride = stride(0);
  p.page_size = t.size(dims - 3), p.token_stride = stride(dims - 3), p.head_stride = stride(dims - 2);
  for (std::int64_t d = 0; d < dims - 4; ++d) p.inner_stride[d] = stride(d + 1);
  check_rows(name, t);
  RORO_CHECK(p.pages * p.page_size < kSlots, name, ": ", p.pages * p.page_size, " slots; at most 2^31 - 1");
  return p;
}

void kv_copy(const Tensor& source, const Tensor& target, const Tensor& spans) {
  const Call call("kv_handoff.copy", source);
  const std::int64_t dims = source.dim();
  RORO_CHECK(dims >= 4 && dims <= 4 + RORO_KV_INNER, "source: ", dims, " dimensions; a pool has 4 to ",
             4 + RORO_KV_INNER);
  bool fits = target.dim() == dims;
  for (std::int64_t d = 1; fits && d < dims; ++d) fits = d == dims - 3 || source.size(d) == target.size(d);
  RORO_CHECK(fits, "target: shape ", shape_of(target), " does not fit source ", shape_of(source));
  RORO_CHECK(place_of(target) == call.place(), "target: not on the same device as source");
  call.check_dense("spans", spans, ScalarType::Long, {-1, 3});
  RoroKvCopy a{};
  const ScalarType from = source.scalar_type(), to = target.scalar_type();
  if (from != to) a.source_dtype = dtype_of("source", source), a.target_dtype = dtype_of("target", target);
  a.source = pool_of("source", source), a.target = pool_of("target", target);
  a.source_slot = pointer<const std::int64_t>(spans);
  a.target_slot = a.source_slot + 1, a.tokens = a.source_slot + 2;
  a.slot_stride = 3, a.n = spans.size(0);
  std::int64_t inner = 1;
  for (int d = 0; d < RORO_KV_INNER; ++d) inner *= a.inner_size[d] = d < dims - 4 ? source.size(d + 1) : 1;
  a.heads = source.size(dims - 2), a.dim = source.size(dims - 1), a.element_size = int(source.element_size());
  RORO_CHECK(inner <= 65535, "source: ", inner, " inner slices; at most 65535");
  const std::int64_t slice = a.source.pages * a.source.page_size * a.heads * a.dim * a.element_size;
  RORO_CHECK(slice < kSlots * 16, "source: ", slice, " bytes per inner slice; at most 2^35");
  if (!a.n || !source.numel() || !target.numel()) return;
  call.launched(roro_kv_copy(&a, call.stream()));
}

void kv_copy_pages(const Tensor& pool, const Tensor& source, const Tensor& target) {
  const Call call("kv_handoff.copy_pages", pool);
  RORO_CHECK(pool.dim() >= 1, "pool: has no pages");
  std::int64_t size = 1;
  for (std::int64_t d = pool.dim() - 1; d > 0; --d) {
    RORO_CHECK(pool.size(d) <= 1 || pool.stride(d) == size, "pool: pages are not contiguous");
    size *= pool.size(d);
  }
  call.check_dense("source", source, ScalarType::Long, {-1});
  call.check_dense("target", target, ScalarType::Long, {source.size(0)});
  RORO_CHECK(pool.size(0) < kSlots && size < kSlots, "pool: ", pool.size(0), " pages of ", size,
             " elements are too many");
  if (!source.numel() || !pool.numel()) return;
  RoroKvCopy a{};
  a.source.data = pool.data_ptr();
  a.source.pages = pool.size(0), a.source.page_size = 1, a.source.page_stride = pool.size(0) > 1 ? pool.stride(0) : 0;
  a.target = a.source;
  a.source_slot = pointer<const std::int64_t>(source), a.target_slot = pointer<const std::int64_t>(target);
  a.slot_stride = 1, a.n = source.numel();
  for (auto& n : a.inner_size) n = 1;
  a.heads = 1, a.dim = size, a.element_size = int(pool.element_size());
  call.launched(roro_kv_copy(&a, call.stream()));
}

void kv_copy_meta(const Tensor&, const Tensor&, const Tensor&) {}

}  // namespace
}  // namespace roro

#ifndef RORO_FINGERPRINT
#define RORO_FINGERPRINT ""
#endif
extern "C" __attribute__((visibility("default"), used)) const char roro_cuda_fingerprint[];
const char roro_cuda_fingerprint[] = "roro_cuda_fingerprint=" RORO_FINGERPRINT ";";  // read from the file, unloaded

STABLE_TORCH_LIBRARY(RORO_OPS, m) {
  m.def(
      "router_score(Tensor hidden, Tensor? rows, Tensor signals, Tensor norm, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor b2, Tensor uniforms, Tensor? bias, float temperature, float eps) -> "
      "(Tensor action, Tensor logprob, Tensor entropy, Tensor probs, Tensor logits)");
  m.def(
      "judge_score(Tensor hidden, Tensor rows, Tensor label_weight, Tensor criterion_weight, Tensor offsets, "
      "Tensor valence, Tensor? group_offsets, float eps) -> (Tensor probs, Tensor scores, Tensor advantages)");
  m.def("kv_copy(Tensor source, Tensor(a!) target, Tensor spans) -> ()");
  m.def("kv_copy_pages(Tensor(a!) pool, Tensor source, Tensor target) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(RORO_OPS, RORO_KEY, m) {
  m.impl("router_score", TORCH_BOX(&roro::router_score));
  m.impl("judge_score", TORCH_BOX(&roro::judge_score));
  m.impl("kv_copy", TORCH_BOX(&roro::kv_copy));
  m.impl("kv_copy_pages", TORCH_BOX(&roro::kv_copy_pages));
}

STABLE_TORCH_LIBRARY_IMPL(RORO_OPS, Meta, m) {
  m.impl("router_score", TORCH_BOX(&roro::router_score_meta));
  m.impl("judge_score", TORCH_BOX(&roro::judge_score_meta));
  m.impl("kv_copy", TORCH_BOX(&roro::kv_copy_meta));
  m.impl("kv_copy_pages", TORCH_BOX(&roro::kv_copy_meta));
}

#endif  // USE_CUDA
