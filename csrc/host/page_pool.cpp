#include "page_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace roro {

namespace {

[[noreturn]] void bad(const std::string& message) { throw std::invalid_argument(message); }

std::string name(std::int64_t model, std::int64_t page) {
  return "page " + std::to_string(page) + " of model " + std::to_string(model);
}

}  // namespace

PagePool::PagePool(std::int64_t num_slabs, std::vector<std::int64_t> pages_per_slab) {
  if (num_slabs < 0) bad("num_slabs: " + std::to_string(num_slabs) + " is negative");
  if (pages_per_slab.empty()) bad("pages_per_slab: empty; give one page count per model");
  for (std::size_t m = 0; m < pages_per_slab.size(); ++m) {
    const std::int64_t capacity = pages_per_slab[m];
    if (capacity < 1) {
      bad("pages_per_slab[" + std::to_string(m) + "]: " + std::to_string(capacity) +
          "; a slab must hold at least one page");
    }
    Model model;
    model.capacity = capacity;
    model.head.assign(capacity, kNone);
    model.above.assign(capacity, kNone);
    model.below.assign(capacity, kNone);
    model.refs.assign(num_slabs * capacity, 0);
    models_.push_back(std::move(model));
  }
  slabs_.resize(num_slabs);
  for (std::int64_t s = num_slabs - 1; s >= 0; --s) free_.push_back(s);
}

const PagePool::Model& PagePool::model_at(std::int64_t model) const {
  if (model < 0 || model >= static_cast<std::int64_t>(models_.size())) {
    bad("model " + std::to_string(model) + ": the pool has models 0.." + std::to_string(models_.size() - 1));
  }
  return models_[model];
}

void PagePool::check_page(const Model& m, std::int64_t model, std::int64_t page) const {
  if (page < 0 || page >= static_cast<std::int64_t>(m.refs.size())) {
    bad(name(model, page) + ": out of range, ids are 0.." + std::to_string(m.refs.size()) + " exclusive");
  }
}

std::vector<std::int64_t> PagePool::alloc(std::int64_t model, std::int64_t n) {
  model_at(model);
  if (n < 0) bad("n: " + std::to_string(n) + " pages asked for; it must not be negative");
  std::vector<std::int64_t> pages;
  if (n > available(model)) return pages;
  Model& m = models_[model];
  pages.reserve(n);
  while (n > 0) {
    std::int64_t slab;
    if (m.top != kNone) {
      slab = m.head[m.top];
      remove(m, slab, m.top);
    } else {
      slab = free_.back();
      free_.pop_back();
      ++m.owned;
    }
    Slab& s = slabs_[slab];
    const std::int64_t take = std::min(n, m.capacity - s.used);
    const std::int64_t base = slab * m.capacity;
    for (std::int64_t i = 0; i < take; ++i) {
      std::int64_t k;
      if (s.returned.empty()) {
        k = s.fresh++;
      } else {
        k = s.returned.back();
        s.returned.pop_back();
      }
      m.refs[base + k] = 1;
      pages.push_back(base + k);
    }
    s.used += take;
    m.used += take;
    n -= take;
    if (s.used < m.capacity) {  // it was the fullest, so it stays on top
      link_top(m, s.used);
      insert(m, slab, s.used);
    }
  }
  return pages;
}

void PagePool::incref(std::int64_t model, const std::vector<std::int64_t>& pages) {
  const Model& m = model_at(model);
  for (const std::int64_t page : pages) {
    check_page(m, model, page);
    if (m.refs[page] == 0) bad(name(model, page) + ": not allocated, cannot be shared");
  }
  for (const std::int64_t page : pages) ++models_[model].refs[page];
}

void PagePool::decref(std::int64_t model, const std::vector<std::int64_t>& pages) {
  model_at(model);
  Model& m = models_[model];
  for (const std::int64_t page : pages) check_page(m, model, page);
  std::vector<std::int64_t> freed;
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (m.refs[pages[i]] == 0) {
      for (std::size_t j = 0; j < i; ++j) ++m.refs[pages[j]];
      bad(name(model, pages[i]) + ": not allocated, freed twice?");
    }
    if (--m.refs[pages[i]] == 0) freed.push_back(pages[i]);
  }
  for (const std::int64_t page : freed) release(m, page);
}

void PagePool::release(Model& m, std::int64_t page) {
  const std::int64_t slab = page / m.capacity;
  Slab& s = slabs_[slab];
  const std::int64_t count = s.used--;
  --m.used;
  s.returned.push_back(page % m.capacity);
  if (s.used > 0) {
    if (count == m.capacity) {
      link_top(m, s.used);
    } else {
      link_below(m, s.used, count);
    }
  }
  if (count < m.capacity) remove(m, slab, count);
  if (s.used > 0) {
    insert(m, slab, s.used);
    return;
  }
  s.fresh = 0;
  s.returned.clear();
  --m.owned;
  free_.push_back(slab);
}

void PagePool::insert(Model& m, std::int64_t slab, std::int64_t count) {
  Slab& s = slabs_[slab];
  s.prev = kNone;
  s.next = m.head[count];
  if (s.next != kNone) slabs_[s.next].prev = slab;
  m.head[count] = slab;
}

void PagePool::remove(Model& m, std::int64_t slab, std::int64_t count) {
  Slab& s = slabs_[slab];
  if (s.next != kNone) slabs_[s.next].prev = s.prev;
  if (s.prev != kNone) {
    slabs_[s.prev].next = s.next;
    return;
  }
  m.head[count] = s.next;
  if (s.next != kNone) return;
  const std::int64_t up = m.above[count], down = m.below[count];
  (up == kNone ? m.top : m.below[up]) = down;
  if (down != kNone) m.above[down] = up;
}

void PagePool::link_top(Model& m, std::int64_t count) {
  if (m.head[count] != kNone) return;
  m.above[count] = kNone;
  m.below[count] = m.top;
  if (m.top != kNone) m.above[m.top] = count;
  m.top = count;
}

void PagePool::link_below(Model& m, std::int64_t count, std::int64_t upper) {
  if (m.head[count] != kNone) return;
  const std::int64_t down = m.below[upper];
  m.above[count] = upper;
  m.below[count] = down;
  m.below[upper] = count;
  if (down != kNone) m.above[down] = count;
}

std::int64_t PagePool::refcount(std::int64_t model, std::int64_t page) const {
  const Model& m = model_at(model);
  check_page(m, model, page);
  return m.refs[page];
}

std::int64_t PagePool::available(std::int64_t model) const {
  const Model& m = model_at(model);
  return (m.owned + free_slabs()) * m.capacity - m.used;
}

std::int64_t PagePool::used(std::int64_t model) const { return model_at(model).used; }

std::vector<std::int64_t> PagePool::pages_per_slab() const {
  std::vector<std::int64_t> out;
  for (const Model& m : models_) out.push_back(m.capacity);
  return out;
}

}  // namespace roro
