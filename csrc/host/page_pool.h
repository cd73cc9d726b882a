// Page allocator of the engine's KV arena. The specification is roro_fast/engine/pages.py; both give the same ids.
#pragma once

#include <cstdint>
#include <vector>

namespace roro {

class PagePool {
 public:
  PagePool(std::int64_t num_slabs, std::vector<std::int64_t> pages_per_slab);

  std::vector<std::int64_t> alloc(std::int64_t model, std::int64_t n);
  void incref(std::int64_t model, const std::vector<std::int64_t>& pages);
  void decref(std::int64_t model, const std::vector<std::int64_t>& pages);

  std::int64_t refcount(std::int64_t model, std::int64_t page) const;
  std::int64_t available(std::int64_t model) const;
  std::int64_t used(std::int64_t model) const;
  std::int64_t free_slabs() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t num_slabs() const { return static_cast<std::int64_t>(slabs_.size()); }
  std::vector<std::int64_t> pages_per_slab() const;

 private:
  static constexpr std::int64_t kNone = -1;

  struct Slab {
    std::int64_t used = 0;
    std::int64_t fresh = 0;             // pages below this index were handed out at least once
    std::int64_t prev = kNone, next = kNone;  // neighbours in the bucket of equally full slabs
    std::vector<std::int64_t> returned;  // freed page indices, last in first out
  };

  // Slabs used by 1 .. capacity - 1 pages hang in the bucket of their count; non-empty buckets form a sorted list.
  struct Model {
    std::int64_t capacity = 0;  // pages per slab
    std::int64_t used = 0, owned = 0;
    std::int64_t top = kNone;  // count of the fullest partially used slabs
    std::vector<std::int64_t> head, above, below;
    std::vector<std::int32_t> refs;  // by page id
  };

  const Model& model_at(std::int64_t model) const;
  void check_page(const Model& m, std::int64_t model, std::int64_t page) const;
  void insert(Model& m, std::int64_t slab, std::int64_t count);
  void remove(Model& m, std::int64_t slab, std::int64_t count);
  void link_top(Model& m, std::int64_t count);
  void link_below(Model& m, std::int64_t count, std::int64_t upper);
  void release(Model& m, std::int64_t page);

  std::vector<Slab> slabs_;
  std::vector<std::int64_t> free_;
  std::vector<Model> models_;
};

}  // namespace roro
