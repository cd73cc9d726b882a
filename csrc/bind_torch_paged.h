// Checks of paged keys and values that several bindings share.
#pragma once

#include "bind_torch.h"

#include <algorithm>
#include <vector>

#include "cpu/paged_attention.h"

namespace roro {

// A table [positions, dim] of cosines or sines.
inline const float* rotary(const char* name, const Tensor& t, std::int64_t dim, std::int64_t& stride) {
  check_type(name, t, ScalarType::Float);
  check_shape(name, t, {-1, dim});
  check_cpu(name, t);
  check_rows(name, t);
  stride = t.stride(0);
  return pointer<float>(t);
}

struct Groups {
  const std::int64_t *members = nullptr, *offsets = nullptr, *lengths = nullptr;
  std::int64_t n = 0;
};

// Every member's first lengths[g] tokens must lie in the same pages, before its queries.
inline Groups check_groups(const cpu::AttentionArgs& a, std::int64_t sequences, const Tensor& members,
                           const Tensor& offsets, const Tensor& lengths) {
  Groups g;
  check_shape("prefix.lengths", lengths, {-1});
  g.n = lengths.size(0);
  g.lengths = indices("prefix.lengths", lengths, g.n);
  g.offsets = indices("prefix.offsets", offsets, g.n + 1);
  check_shape("prefix.members", members, {-1});
  const std::int64_t m = members.size(0);
  g.members = indices("prefix.members", members, m);
  RORO_CHECK(g.offsets[0] == 0 && g.offsets[g.n] == m, "prefix.offsets: must run from 0 to ", m);
  std::vector<bool> taken(sequences, false);
  for (std::int64_t i = 0; i < g.n; ++i) {
    const std::int64_t begin = g.offsets[i], end = g.offsets[i + 1];
    RORO_CHECK(begin <= end, "prefix.offsets: group ", i, " descends");
    RORO_CHECK(g.lengths[i] >= 0, "prefix.lengths: ", g.lengths[i], " at ", i);
    for (std::int64_t j = begin; j < end && j < m; ++j) {
      const std::int64_t s = g.members[j];
      RORO_CHECK(s >= 0 && s < sequences, "prefix.members: sequence ", s, " at ", j, ", but there are ", sequences);
      RORO_CHECK(!taken[s], "prefix.members: sequence ", s, " is there twice");
      taken[s] = true;
      const std::int64_t own = a.kv_lens[s] - (a.cu_seqlens[s + 1] - a.cu_seqlens[s]);
      RORO_CHECK(g.lengths[i] <= own, "prefix.lengths: ", g.lengths[i], " at ", i, ", but sequence ", s, " has ", own,
                 " tokens before its queries");
      const std::int64_t pages = (g.lengths[i] + a.page_size - 1) / a.page_size;
      const std::int64_t *first = a.table + g.members[begin] * a.table_stride, *mine = a.table + s * a.table_stride;
      RORO_CHECK(std::equal(first, first + pages, mine), "prefix: sequence ", s, " does not share the pages of group ",
                 i);
    }
  }
  return g;
}

// Sequences and the pages that they hold.
struct Paging {
  const std::int64_t* table;
  std::int64_t table_stride, width;
  const std::int64_t *kv_lens, *cu_seqlens;
  std::int64_t n;
};

inline Paging paging_of(const Tensor& page_table, const Tensor& kv_lens, const Tensor& cu_seqlens) {
  check_shape("page_table", page_table, {-1, -1});
  check_type("page_table", page_table, ScalarType::Long);
  check_rows("page_table", page_table);
  check_cpu("page_table", page_table);
  const std::int64_t n = page_table.size(0);
  return {pointer<std::int64_t>(page_table), page_table.stride(0),  page_table.size(1),
          indices("kv_lens", kv_lens, n),    indices("cu_seqlens", cu_seqlens, n + 1), n};
}

// Fills table, kv_lens and cu_seqlens of `a`; `tokens` queries in all, `pages` pages exist. Returns the sequences.
inline std::int64_t check_paging(cpu::AttentionArgs& a, const Paging& p, std::int64_t tokens, std::int64_t pages) {
  a.table = p.table;
  a.table_stride = p.table_stride;
  a.kv_lens = p.kv_lens;
  a.cu_seqlens = p.cu_seqlens;
  RORO_CHECK(a.cu_seqlens[0] == 0 && a.cu_seqlens[p.n] == tokens, "cu_seqlens: must run from 0 to ", tokens);
  for (std::int64_t i = 0; i < p.n; ++i) {
    const std::int64_t queries = a.cu_seqlens[i + 1] - a.cu_seqlens[i], length = a.kv_lens[i];
    RORO_CHECK(queries >= 0, "cu_seqlens: descends at ", i + 1);
    RORO_CHECK(length >= queries, "kv_lens: ", length, " at ", i, ", but the sequence has ", queries, " queries");
    RORO_CHECK(length <= p.width * a.page_size, "kv_lens: ", length, " at ", i, ", but page_table maps ",
               p.width * a.page_size);
    if (!queries) continue;
    for (std::int64_t j = 0; j < (length + a.page_size - 1) / a.page_size; ++j) {
      const std::int64_t page = a.table[i * a.table_stride + j];
      RORO_CHECK(page >= 0 && page < pages, "page_table: page ", page, " at [", i, ", ", j, "], but there are ", pages);
    }
  }
  return p.n;
}

}  // namespace roro
