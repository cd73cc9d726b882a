#include "cpu/kv_copy.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/types.h"

#define RORO_KERNEL "cpu/kv_copy_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

constexpr std::int64_t kChunkBytes = 256 << 10;
constexpr std::int64_t kStreamBytes = 8 << 20;  // what is larger would not be in the caches when it is read
constexpr std::int64_t kStreamRun = 2048;       // memcpy streams longer runs itself

// A part of a span that lies in one page on both sides.
struct Piece {
  const char* from;
  char* to;
  std::int64_t tokens;
};

std::vector<Piece> pieces(const CopyArgs& a) {
  std::vector<Piece> out;
  for (std::int64_t i = 0; i < a.n; ++i) {
    Span s = a.spans[i];
    while (s.count > 0) {
      const std::int64_t so = s.source % a.source.page_size, to = s.target % a.target.page_size;
      const std::int64_t n = std::min({s.count, a.source.page_size - so, a.target.page_size - to});
      out.push_back({a.source.data + s.source / a.source.page_size * a.source.page_stride + so * a.source.token_stride,
                     a.target.data + s.target / a.target.page_size * a.target.page_stride + to * a.target.token_stride,
                     n});
      s.source += n;
      s.target += n;
      s.count -= n;
    }
  }
  return out;
}

template <typename From, typename To>
void convert_halves(const char* from, char* to, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    From x;
    std::memcpy(&x, from + i * sizeof x, sizeof x);
    const To y = from_float<To>(to_float(x));
    std::memcpy(to + i * sizeof y, &y, sizeof y);
  }
}

using Convert = void (*)(const char*, char*, std::int64_t);

Convert converter(Element from, Element to) {
  if (from == Element::f32 && to == Element::bf16) return pick(scalar::narrow, avx2::narrow, avx512::narrow);
  if (from == Element::bf16 && to == Element::f32) return pick(scalar::widen, avx2::widen, avx512::widen);
  if (from == Element::f32) return convert_halves<float, f16>;
  if (from == Element::bf16) return convert_halves<bf16, f16>;
  return to == Element::f32 ? convert_halves<f16, float> : convert_halves<f16, bf16>;
}

using Stream = void (*)(const char*, char*, std::int64_t);

// Elements side by side on both sides. `stream`: nullptr for ordinary stores.
void run(const CopyArgs& a, Stream stream, const char* from, char* to, std::int64_t n) {
  const std::int64_t bytes = n * a.source_bytes;
  if (a.convert) return a.convert(from, to, n);
  if (stream && bytes < kStreamRun && (reinterpret_cast<std::uintptr_t>(to) | bytes) % 64 == 0) {
    return stream(from, to, bytes);
  }
  std::memcpy(to, from, bytes);
}

void copy_piece(const CopyArgs& a, Stream stream, const char* from, char* to, std::int64_t tokens) {
  const auto side_by_side = [&](std::int64_t source, std::int64_t target, std::int64_t n) {
    return source == n * a.source_bytes && target == n * a.target_bytes;
  };
  const std::int64_t s_token = a.source.token_stride, t_token = a.target.token_stride;
  const std::int64_t s_head = a.source.head_stride, t_head = a.target.head_stride;
  if (a.heads == 1 || side_by_side(s_head, t_head, a.dim)) {
    const std::int64_t row = a.heads * a.dim;
    if (side_by_side(s_token, t_token, row)) return run(a, stream, from, to, tokens * row);
    for (std::int64_t i = 0; i < tokens; ++i) run(a, stream, from + i * s_token, to + i * t_token, row);
    return;
  }
  if (side_by_side(s_token, t_token, a.dim)) {
    for (std::int64_t h = 0; h < a.heads; ++h) run(a, stream, from + h * s_head, to + h * t_head, tokens * a.dim);
    return;
  }
  for (std::int64_t i = 0; i < tokens; ++i) {
    for (std::int64_t h = 0; h < a.heads; ++h) {
      run(a, stream, from + i * s_token + h * s_head, to + i * t_token + h * t_head, a.dim);
    }
  }
}

using Range = std::pair<std::int64_t, std::int64_t>;

void refuse_overlap(std::vector<Range>& ranges, const char* what) {
  std::sort(ranges.begin(), ranges.end());
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) {
      throw std::runtime_error("spans: slot " + std::to_string(ranges[i].first) + " of the " + what + " is in two spans");
    }
  }
}

}  // namespace

void check_spans(const CopyArgs& a) {
  const std::int64_t sources = a.source.pages * a.source.page_size, targets = a.target.pages * a.target.page_size;
  const bool in_place = a.source.data == a.target.data;
  std::vector<Range> taken;
  for (std::int64_t i = 0; i < a.n; ++i) {
    const Span& s = a.spans[i];
    const auto at = [&] { return "spans[" + std::to_string(i) + "]: "; };
    if (s.count < 0) throw std::runtime_error(at() + std::to_string(s.count) + " tokens");
    if (s.source < 0 || s.count > sources - s.source) {
      throw std::runtime_error(at() + "source slots from " + std::to_string(s.source) + ", but the pool has " +
                               std::to_string(sources));
    }
    if (s.target < 0 || s.count > targets - s.target) {
      throw std::runtime_error(at() + "target slots from " + std::to_string(s.target) + ", but the pool has " +
                               std::to_string(targets));
    }
    if (s.count > 0) taken.emplace_back(s.target, s.target + s.count);
  }
  refuse_overlap(taken, "target");
  if (!in_place) return;
  if (a.source.page_size != a.target.page_size || a.source.page_stride != a.target.page_stride) {
    throw std::runtime_error("target: shares the memory of source but has other pages; copy through a third pool");
  }
  for (std::int64_t i = 0; i < a.n; ++i) {  // a slot may be read twice, but not read and written
    const Span& s = a.spans[i];
    const auto next = std::lower_bound(taken.begin(), taken.end(), s.source,
                                       [](const Range& r, std::int64_t slot) { return r.second <= slot; });
    if (s.count > 0 && next != taken.end() && next->first < s.source + s.count) {
      throw std::runtime_error("spans[" + std::to_string(i) + "]: reads slot " +
                               std::to_string(std::max(s.source, next->first)) + " of the same pool that a span writes");
    }
  }
}

void set_conversion(CopyArgs& a, Element from, Element to) { a.convert = from == to ? nullptr : converter(from, to); }

void kv_copy(const CopyArgs& a, int threads) {
  const std::vector<Piece> work = pieces(a);
  std::int64_t inner = 1, tokens = 0;
  for (int d = 0; d < kMaxInner; ++d) inner *= a.inner_size[d];
  for (const Piece& p : work) tokens += p.tokens;
  const std::int64_t items = static_cast<std::int64_t>(work.size()) * inner;
  const std::int64_t total = tokens * inner * a.heads * a.dim * a.target_bytes;
  if (!total) return;
  const std::int64_t grain = std::max<std::int64_t>(1, kChunkBytes / std::max<std::int64_t>(1, total / items));
  const Stream stream =
      total >= kStreamBytes ? pick(scalar::stream_lines, avx2::stream_lines, avx512::stream_lines) : nullptr;
  parallel_for(items, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Piece& p = work[i / inner];
      std::int64_t rest = i % inner, from = 0, to = 0;
      for (int d = kMaxInner - 1; d >= 0; --d) {
        from += rest % a.inner_size[d] * a.source.inner_stride[d];
        to += rest % a.inner_size[d] * a.target.inner_stride[d];
        rest /= a.inner_size[d];
      }
      copy_piece(a, stream, p.from + from, p.to + to, p.tokens);
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streamed stores are ordered by no weaker one
  });
}

void copy_pages(char* pool, std::int64_t stride, std::int64_t bytes, const std::int64_t* source,
                const std::int64_t* target, std::int64_t n, int threads) {
  const std::int64_t grain = std::max<std::int64_t>(1, kChunkBytes / std::max<std::int64_t>(1, bytes));
  parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::memcpy(pool + target[i] * stride, pool + source[i] * stride, bytes);
    }
  });
}

}  // namespace roro::cpu
