// Move token spans between page pools of different page size, layout and element type.
#pragma once

#include <cstdint>

namespace roro::cpu {

enum class Element { f32, bf16, f16 };

constexpr int kMaxInner = 4;

// One pool seen as [pages, inner..., page_size, heads, dim]; strides in bytes, dim side by side.
struct Pool {
  char* data;
  std::int64_t pages, page_size;
  std::int64_t page_stride, token_stride, head_stride, inner_stride[kMaxInner];
};

struct Span {
  std::int64_t source, target, count;  // token slots: page * page_size + offset
};

struct CopyArgs {
  Pool source, target;
  std::int64_t inner_size[kMaxInner], heads, dim;
  std::int64_t source_bytes, target_bytes;  // of an element
  void (*convert)(const char* from, char* to, std::int64_t n);  // nullptr: bytes are moved as they are
  const Span* spans;
  std::int64_t n;
};

void set_conversion(CopyArgs& args, Element from, Element to);

// Throws std::runtime_error for spans outside a pool or overlapping.
void check_spans(const CopyArgs& args);

void kv_copy(const CopyArgs& args, int threads);

// n pages of `bytes` bytes each, from one place of a pool to another.
void copy_pages(char* pool, std::int64_t stride, std::int64_t bytes, const std::int64_t* source,
                const std::int64_t* target, std::int64_t n, int threads);

}  // namespace roro::cpu
