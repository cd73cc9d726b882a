#include "cpu/decoder.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/norm_rope_store.h"
#include "cpu/parallel.h"

namespace roro::cpu {
namespace {

const DecoderSizes& sizes_of(const DecoderArgs& a) { return reinterpret_cast<const DecoderHeader*>(a.packed)->sizes; }

// Activations of one call. A calling thread keeps its memory for the next one unless it is large.
class Arena {
 public:
  explicit Arena(std::int64_t bytes) {
    if (size < bytes) {
      memory.reset();
      memory.reset(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64))));
      size = bytes;
    }
    next_ = memory.get();
  }
  ~Arena() {
    if (size > kKept) memory.reset(), size = 0;
  }
  char* take(std::int64_t bytes) {
    char* here = next_;
    next_ += round_up(bytes, 64);
    return here;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static constexpr std::int64_t kKept = 64 << 20;
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local std::int64_t size;
  char* next_;
};

thread_local std::unique_ptr<char, Arena::Free> Arena::memory;
thread_local std::int64_t Arena::size = 0;

class Runner {
 public:
  Runner(const DecoderArgs& a, const AttentionPlan& plan, int threads)
      : a_(a),
        s_(sizes_of(a)),
        at_(decoder_layout(s_)),
        plan_(plan),
        threads_(threads),
        bytes_(bytes_of(s_.type())),
        rows_(a.tokens),
        arena_(room()),
        zeros_(arena_.take(s_.hidden * bytes_)),
        total_(rows(s_.hidden)),
        normed_(rows(s_.hidden)),
        delta_(rows(s_.hidden)),
        qkv_(rows(s_.qkv_width())),
        q_(rows(s_.q_width())),
        seen_(rows(s_.q_width())),
        inner_(rows(s_.inner)) {}

  void run() {
    std::memset(zeros_, 0, s_.hidden * bytes_);
    begin();
    if (!s_.layers) {
      keep_wanted(delta_, s_.hidden);
      rows_ = a_.num_wanted;
    }
    add_norm(zeros_, 0, s_.layers ? layer(0) + at_.input_norm : a_.packed + at_.norm,
             s_.layers ? normed_ : static_cast<char*>(a_.out));
    for (std::int64_t l = 0; l < s_.layers; ++l) {
      const char* w = layer(l);
      const bool last = l + 1 == s_.layers;
      product(s_.qkv(), w + at_.qkv, s_.qkv_bias, normed_, qkv_, s_.o(), w + at_.o);
      const NormRopeArgs rope = rotation(l, w);
      if (last && !a_.below && !a_.num_wanted) return norm_rope_store(rope, a_.tokens, threads_);
      attend(l, rope);
      if (last && !a_.below) {  // of the other rows nobody needs more than their keys and values
        keep_wanted(total_, s_.hidden);
        keep_wanted(seen_, s_.q_width());
        rows_ = a_.num_wanted;
      }
      product(s_.o(), w + at_.o, s_.o_bias, seen_, delta_, s_.gate_up(), w + at_.gate_up);
      add_norm(total_, s_.hidden, w + at_.post_norm, normed_);
      product(s_.gate_up(), w + at_.gate_up, s_.mlp_bias, normed_, inner_, s_.down(), w + at_.down);
      product(s_.down(), w + at_.down, s_.mlp_bias, inner_, delta_, s_.qkv(), last ? nullptr : layer(l + 1) + at_.qkv);
      add_norm(total_, s_.hidden, last ? a_.packed + at_.norm : layer(l + 1) + at_.input_norm,
               last && !a_.below ? static_cast<char*>(a_.out) : normed_);
    }
    if (a_.below) leave();
  }

 private:
  // delta = what comes before the first layer
  void begin() {
    const std::int64_t width = s_.hidden * bytes_;
    for (std::int64_t t = 0; t < a_.tokens; ++t) {
      const char* from = a_.states && !a_.below
                             ? state(t)
                             : static_cast<const char*>(a_.embed) + a_.ids[t] * a_.embed_stride * bytes_;
      std::memcpy(delta_ + t * width, from, width);
    }
  }

  void leave() {
    const std::int64_t width = s_.hidden * bytes_;
    for (std::int64_t t = 0; t < a_.tokens; ++t) std::memcpy(state(t), total_ + t * width, width);
  }

  char* state(std::int64_t t) const {
    const std::int64_t page = a_.state_slots[t] / a_.page_size, offset = a_.state_slots[t] % a_.page_size;
    return a_.states + (page * a_.state_page_stride + offset * a_.state_token_stride) * bytes_;
  }

  // Moves the wanted rows to the front; they ascend, so none is overwritten before it was moved.
  void keep_wanted(char* x, std::int64_t width) const {
    if (!a_.wanted) return;
    for (std::int64_t i = 0; i < a_.num_wanted; ++i) {
      if (a_.wanted[i] != i) std::memcpy(x + i * width * bytes_, x + a_.wanted[i] * width * bytes_, width * bytes_);
    }
  }

  std::int64_t room() const {
    const std::int64_t row = 3 * s_.hidden + s_.qkv_width() + 2 * s_.q_width() + s_.inner;
    return (row * a_.tokens + s_.hidden) * bytes_ + 8 * 64;
  }

  char* rows(std::int64_t width) { return arena_.take(a_.tokens * width * bytes_); }

  const char* layer(std::int64_t l) const { return a_.packed + at_.layers + l * at_.layer_bytes; }

  void product(const LinearSizes& sizes, const char* w, bool bias, const char* x, char* out, const LinearSizes& next,
               const char* next_w) {
    const std::int64_t width = sizes.columns / (sizes.gated ? 2 : 1);
    linear({sizes, w, bias, x, rows_, sizes.depth, out, s_.type(), width, next_w, next}, threads_);
  }

  // normed = norm(total = delta + residual)
  void add_norm(const char* residual, std::int64_t stride, const char* weight, char* normed) {
    add_rms_norm({delta_, residual, weight, normed, total_, s_.type(), s_.type(), s_.hidden, stride, s_.hidden,
                  static_cast<float>(s_.eps)},
                 rows_, threads_);
  }

  PagedTensor of_layer(PagedTensor p, std::int64_t l) const {
    p.data = static_cast<const char*>(p.data) + l * a_.layer_stride * bytes_of(p.type);
    return p;
  }

  NormRopeArgs rotation(std::int64_t l, const char* w) const {
    NormRopeArgs n{};
    n.qkv = qkv_;
    n.q = q_;
    n.type = n.norm_type = s_.type();
    n.qkv_stride = s_.qkv_width();
    n.heads = s_.heads;
    n.kv_heads = s_.kv_heads;
    n.dim = s_.dim;
    if (s_.qk_norm) {
      n.q_norm = w + at_.q_norm;
      n.k_norm = w + at_.k_norm;
    }
    n.cos = a_.cos;
    n.sin = a_.sin;
    n.cos_stride = a_.cos_stride;
    n.sin_stride = a_.sin_stride;
    n.positions = a_.positions;
    n.slots = a_.slots;
    n.k = of_layer(a_.k, l);
    n.v = of_layer(a_.v, l);
    n.page_size = a_.page_size;
    n.eps = static_cast<float>(s_.eps);
    return n;
  }

  void attend(std::int64_t l, const NormRopeArgs& rope) {
    AttentionArgs t = decoder_attention(a_);
    t.q = q_;
    t.out = seen_;
    t.k = of_layer(a_.k, l);
    t.v = of_layer(a_.v, l);
    paged_attention(t, plan_, threads_, &rope);
  }

  const DecoderArgs& a_;
  const DecoderSizes& s_;
  const DecoderLayout at_;
  const AttentionPlan& plan_;
  const int threads_;
  const std::int64_t bytes_;
  std::int64_t rows_;
  Arena arena_;
  char *zeros_, *total_, *normed_, *delta_, *qkv_, *q_, *seen_, *inner_;
};

}  // namespace

DecoderLayout decoder_layout(const DecoderSizes& s) {
  DecoderLayout l{};
  std::int64_t at = 0;
  const auto take = [&](std::int64_t bytes) {
    const std::int64_t here = at;
    at = round_up(at + bytes, 64);
    return here;
  };
  const std::int64_t element = bytes_of(s.type());
  l.filled = take(8);
  l.input_norm = take(s.hidden * element);
  l.post_norm = take(s.hidden * element);
  l.q_norm = take(s.dim * element);
  l.k_norm = take(s.dim * element);
  l.qkv = take(linear_packed_bytes(s.qkv()));
  l.o = take(linear_packed_bytes(s.o()));
  l.gate_up = take(linear_packed_bytes(s.gate_up()));
  l.down = take(linear_packed_bytes(s.down()));
  l.layer_bytes = at;
  at = round_up(sizeof(DecoderHeader), 64);
  l.norm = take(s.hidden * element);
  l.layers = take(s.layers * l.layer_bytes);
  l.bytes = at;
  return l;
}

AttentionArgs decoder_attention(const DecoderArgs& a) {
  const DecoderSizes& s = sizes_of(a);
  AttentionArgs t{};
  t.type = s.type();
  t.q_token_stride = s.q_width();
  t.q_head_stride = t.dim = s.dim;
  t.heads = s.heads;
  t.kv_heads = s.kv_heads;
  t.k = a.k;
  t.v = a.v;
  t.page_size = a.page_size;
  t.table = a.table;
  t.table_stride = a.table_stride;
  t.kv_lens = a.kv_lens;
  t.cu_seqlens = a.cu_seqlens;
  t.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.dim)));
  return t;
}

void decoder_forward(const DecoderArgs& args, const AttentionPlan& plan, int threads) {
  if (args.tokens) Runner(args, plan, threads).run();
}

}  // namespace roro::cpu
