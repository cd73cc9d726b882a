#include "host/batcher.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

namespace roro {
namespace {

enum Phase : std::int8_t { kFree, kWrite, kScout, kDecide };

// float32 in [0, 1); engine/rng.py
float uniform(std::uint64_t key, std::uint64_t counter) {
  std::uint64_t x = key + (counter + 1) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  return static_cast<float>(static_cast<double>(x >> 40) * 0x1p-24);
}

// models/config.py
double pairs(std::int64_t tokens, std::int64_t context, std::int64_t window) {
  const double whole = static_cast<double>(tokens * context) - static_cast<double>(tokens * (tokens - 1)) / 2;
  if (!window) return whole;
  const std::int64_t first = std::max<std::int64_t>(context - tokens - window, 0);
  const std::int64_t last = std::max<std::int64_t>(context - window, 0);
  return whole - static_cast<double>(last * (last + 1) - first * (first + 1)) / 2;
}

}  // namespace

Census Batcher::census() const {
  Census c{false, 0, {}};
  for (std::int64_t slot = 0; slot < s_.num_slots; ++slot) {
    c.paused |= s_.paused[slot];
    c.free += s_.phase[slot] == kFree;
    if (s_.phase[slot] == kDecide) c.ready.push_back(slot);
  }
  return c;
}

bool Batcher::schedule(std::int64_t part) {
  check(part, nullptr, 0);
  taken_.clear();
  const bool trunk = part == s_.trunk, on_trunk = s_.trunk >= 0 && !trunk;
  const std::int64_t* kv_len = s_.kv_len + part * s_.num_slots;
  const std::int64_t* trunk_len = on_trunk ? s_.kv_len + s_.trunk * s_.num_slots : nullptr;
  const std::int64_t* num_pages = s_.num_pages + part * s_.num_slots;
  const bool* shared = s_.shared + part * s_.num_slots;
  const bool homeless = s_.home[part] != part;  // has no layers of its own: all that it needs is there or is not
  std::int64_t missing = 0, total = 0;
  bool ragged = false;
  for (std::int64_t slot = 0; slot < s_.num_slots; ++slot) {
    const std::int8_t phase = s_.phase[slot];
    if (phase != kWrite && phase != kScout) continue;
    if (!trunk && !(phase == kWrite && s_.writer[slot] == part) && !(phase == kScout && part == 0)) continue;
    if (s_.paused[slot]) return false;
    if (on_trunk && trunk_len[slot] == 0) continue;
    const std::int64_t length = s_.length[slot];
    if (homeless) {
      if (trunk_len[slot] == length) taken_.push_back({slot, length - 1, 1}), ++total;
      continue;
    }
    if (num_pages[slot] == 0) return false;
    if (kv_len[slot] == length) {
      if (trunk) continue;
      return false;
    }
    const std::int64_t end = on_trunk ? trunk_len[slot] : length, need = end - kv_len[slot];
    ragged |= need != 1;
    if (on_trunk && need <= 0) continue;  // waits for the shared layers
    if (shared[slot]) return false;
    missing += std::max<std::int64_t>((end + s_.page_size - 1) / s_.page_size - num_pages[slot], 0);
    total += need;
    taken_.push_back({slot, kv_len[slot], need});
  }
  const PartPool& from = pools_.at(part);
  if (total > out_.max_tokens || (missing && missing > from.pool->available(from.number))) return false;
  if (ragged) {  // decode rows first, longer ones by age
    std::sort(taken_.begin(), taken_.end(), [&](const Row& a, const Row& b) {
      return std::make_tuple(a.count > 1, s_.arrival[a.slot]) < std::make_tuple(b.count > 1, s_.arrival[b.slot]);
    });
  }
  if (missing == 0) return true;
  const std::vector<std::int64_t> pages = from.pool->alloc(from.number, missing);
  auto next = pages.begin();
  for (const Row& r : taken_) {
    std::int64_t& have = s_.num_pages[part * s_.num_slots + r.slot];
    std::int64_t* line = s_.table + (part * s_.num_slots + r.slot) * s_.table_width;
    for (; have * s_.page_size < r.start + r.count; ++have) line[have] = *next++;
  }
  return true;
}

BatchSizes Batcher::lay_out(std::int64_t part, const std::int64_t* rows, const std::int64_t* start,
                            const std::int64_t* count, std::int64_t n) {
  check(part, rows, n);
  std::int64_t total = 0;
  taken_.clear();
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t upto = start[i] + count[i];
    if (start[i] < 0 || count[i] < 1 || upto > s_.max_len || upto > s_.table_width * s_.page_size ||
        (total += count[i]) > out_.max_tokens) {
      throw std::invalid_argument("count[" + std::to_string(i) + "]: " + std::to_string(count[i]) + " tokens from " +
                                  std::to_string(start[i]) + " do not fit");
    }
    taken_.push_back({rows[i], start[i], count[i]});
  }
  return lay_out(part);
}

BatchSizes Batcher::lay_out(std::int64_t part) {
  const std::int64_t home = s_.home[part], states = s_.trunk >= 0 ? s_.trunk : home, size = s_.page_size;
  BatchSizes b{static_cast<std::int64_t>(taken_.size()), 0, 0, 0, false, false};
  for (const Row& r : taken_) b.pages = std::max(b.pages, (r.start + r.count + size - 1) / size);
  out_.cu_seqlens[0] = 0;
  for (std::int64_t i = 0; i < b.rows; ++i) {
    const auto [slot, start, count] = taken_[i];
    const std::int64_t context = start + count;
    const std::int64_t* pages = s_.table + (home * s_.num_slots + slot) * s_.table_width;
    const std::int64_t* state_pages = s_.table + (states * s_.num_slots + slot) * s_.table_width;
    std::copy_n(pages, b.pages, out_.table + i * s_.table_width);
    for (std::int64_t p = start; p < context; ++p, ++b.tokens) {
      out_.ids[b.tokens] = s_.tokens[slot * s_.max_len + p];
      out_.positions[b.tokens] = p;
      out_.slots[b.tokens] = pages[p / size] * size + p % size;
      out_.state_slots[b.tokens] = state_pages[p / size] * size + p % size;
    }
    out_.kv_lens[i] = context;
    out_.cu_seqlens[i + 1] = b.tokens;
    charge(part, slot, count, context);
    std::int64_t& seen = s_.kv_len[part * s_.num_slots + slot];
    s_.forward_tokens[part * s_.num_slots + slot] += context - std::min(seen, start);
    seen = context;
    if (context != s_.length[slot]) continue;
    const std::int64_t m = b.wanted++;
    out_.rows[m] = slot;
    out_.wanted[m] = b.tokens - 1;
    out_.draws[m] = uniform(s_.key[slot], context + (static_cast<std::uint64_t>(s_.rewrites[slot]) << 32));
    out_.temperature[m] = s_.temperature[slot];
    out_.top_k[m] = s_.top_k[slot];
    out_.top_p[m] = s_.top_p[slot];
    b.truncated |= s_.top_k[slot] != 0 || s_.top_p[slot] < 1;
  }
  b.alike = home == part && alike(b.rows);
  return b;
}

void Batcher::charge(std::int64_t part, std::int64_t slot, std::int64_t count, std::int64_t context) const {
  s_.flops[slot] += s_.flops_per_token[part] * count + s_.flops_per_pair[part] * pairs(count, context, 0);
  if (const std::int64_t w = s_.windows[part]) {
    s_.flops[slot] += s_.window_flops_per_pair[part] * pairs(count, context, w);
  }
}

// Whether two rows begin with the same page.
bool Batcher::alike(std::int64_t n) {
  first_pages_.clear();
  for (std::int64_t i = 0; i < n; ++i) first_pages_.push_back(out_.table[i * s_.table_width]);
  std::sort(first_pages_.begin(), first_pages_.end());
  return std::adjacent_find(first_pages_.begin(), first_pages_.end()) != first_pages_.end();
}

bool Batcher::plain(std::int64_t model, const std::int64_t* rows, const bool* finite, std::int64_t n) const {
  check(model, rows, n);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t slot = rows[i];
    if (!finite[i] || s_.phase[slot] != kWrite || s_.writer[slot] != model) return false;
    if (s_.drafting[slot] && s_.length[slot] == s_.step_start[slot]) return false;
  }
  return true;
}

std::vector<StepEnd> Batcher::append(std::int64_t model, const std::int64_t* rows, const std::int64_t* token,
                                     const float* logprob, const float* entropy, std::int64_t n) {
  check(model, rows, n);
  const Vocabulary& v = vocabularies_.at(model);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t r = rows[i];
    if (token[i] < 0 || token[i] >= v.size || s_.length[r] >= s_.max_len || s_.matched[r] >= v.states) {
      throw std::invalid_argument("token[" + std::to_string(i) + "]: " + std::to_string(token[i]) + " does not fit");
    }
  }
  std::vector<StepEnd> ends;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t r = rows[i], t = token[i];
    const bool first = s_.length[r] == s_.step_start[r];
    s_.tokens[r * s_.max_len + s_.length[r]++] = t;
    if (first) s_.first_entropy[r] = entropy[i];
    s_.min_logprob[r] = first ? logprob[i] : std::min<double>(s_.min_logprob[r], logprob[i]);
    s_.sum_logprob[r] += logprob[i];
    s_.sum_entropy[r] += entropy[i];
    ++s_.written[model * s_.num_slots + r];
    const bool heeded = !s_.ignore_eos[r];
    const bool eos = heeded && std::find(v.eos, v.eos + v.num_eos, t) != v.eos + v.num_eos;
    const bool full = s_.length[r] >= s_.max_total[r];
    s_.matched[r] = heeded ? v.delimiter[s_.matched[r] * v.size + t] : 0;
    const bool closed = eos || s_.matched[r] == v.states;
    if (closed || full || s_.length[r] - s_.step_start[r] >= s_.max_step_tokens[r]) ends.push_back({r, closed, eos, full});
  }
  return ends;
}

void Batcher::boundary(const std::int64_t* rows, std::int64_t n, bool drafts, std::int64_t* ints,
                       float* floats) const {
  check(0, rows, n);
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t r = rows[i], tokens = drafts ? s_.length[r] - s_.step_start[r] : s_.last_tokens[r];
    const double written = static_cast<double>(std::max<std::int64_t>(tokens, 1));
    std::int64_t all = 0;
    for (std::int64_t m = 0; m < s_.num_models; ++m) all += s_.written[m * s_.num_slots + r];
    const double share = static_cast<double>(all - s_.written[r]) / static_cast<double>(std::max<std::int64_t>(all, 1));
    ints[i] = s_.step_index[r];
    ints[n + i] = tokens;
    ints[2 * n + i] = drafts ? s_.writer[r] : s_.last_model[r];
    const double seen[] = {drafts ? s_.sum_logprob[r] / written : s_.last_mean_logprob[r],
                           drafts ? s_.min_logprob[r] : s_.last_min_logprob[r],
                           drafts ? s_.first_entropy[r] : s_.last_first_entropy[r],
                           drafts ? s_.sum_entropy[r] / written : s_.last_mean_entropy[r],
                           s_.run_min_conf[r], s_.run_prod_conf[r], share, s_.budget[r],
                           uniform(s_.route_key[r], s_.draws[r])};
    for (std::int64_t j = 0; j < 9; ++j) floats[j * n + i] = static_cast<float>(seen[j]);
  }
}

void Batcher::check(std::int64_t part, const std::int64_t* rows, std::int64_t n) const {
  if (part < 0 || part >= s_.num_parts) throw std::invalid_argument("part " + std::to_string(part) + " is not there");
  if (n > s_.num_slots) throw std::invalid_argument("rows: more than there are slots");
  for (std::int64_t i = 0; i < n; ++i) {
    if (rows[i] < 0 || rows[i] >= s_.num_slots) {
      throw std::invalid_argument("rows[" + std::to_string(i) + "]: " + std::to_string(rows[i]) + " is no slot");
    }
  }
}

}  // namespace roro
