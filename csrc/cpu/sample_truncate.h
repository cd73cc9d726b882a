// Top-k and top-p without sorting the vocabulary: candidates above a bound, then weighted selection.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace roro::cpu {

struct Candidate {
  float value, mass;  // logit over temperature; exp(value - highest value)
  std::int32_t id;
};

// Sorting order of truncation: higher value first, lower id first among equals.
inline bool before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

inline bool lower_id(const Candidate& a, const Candidate& b) { return a.id < b.id; }

// The element of [first, last) at which the sum of masses, in the order of `less`, first exceeds `target`, in expected
// linear time; all that come before it are moved to its left. `last` when the whole sum does not exceed it.
template <typename Less>
Candidate* weighted_select(Candidate* first, Candidate* last, double target, Less less) {
  double sum = 0;
  Candidate* const end = last;
  while (first < last) {
    Candidate *middle = first + (last - first) / 2, *tail = last - 1;
    if (less(*middle, *first)) std::swap(*middle, *first);
    if (less(*tail, *first)) std::swap(*tail, *first);
    if (less(*middle, *tail)) std::swap(*middle, *tail);  // the median is now at the tail
    const Candidate pivot = *tail;
    Candidate* split = first;
    double left = 0;
    for (Candidate* c = first; c < tail; ++c) {
      if (!less(*c, pivot)) continue;
      left += c->mass;
      std::swap(*c, *split++);
    }
    std::swap(*split, *tail);
    if (sum + left > target) {
      last = split;
    } else if (sum + left + split->mass > target) {
      return split;
    } else {
      sum += left + split->mass;
      first = split + 1;
    }
  }
  return last < end ? last : end;
}

}  // namespace roro::cpu
