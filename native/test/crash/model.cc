#include "model.h"

#include <algorithm>

namespace holdfast::test::crash {

std::vector<uint64_t> current_values(const Cell& cell, uint64_t at) {
  std::vector<uint64_t> values;
  for (const Candidate& c : cell) {
    const bool superseded = std::any_of(cell.begin(), cell.end(), [&](const Candidate& later) {
      return !later.maybe && later.end != kOpenEnded && later.end < at && c.end < later.start;
    });
    if (!superseded) values.push_back(c.value);
  }
  return values;
}

bool is_durable(const Candidate& candidate, uint64_t flushed_upto) {
  return !candidate.maybe && candidate.end != kOpenEnded && (candidate.durable || candidate.end < flushed_upto);
}

Cell after_cut(const Cell& cell, uint64_t flushed_upto) {
  Cell left;
  for (const Candidate& c : cell) {
    const bool superseded = std::any_of(cell.begin(), cell.end(), [&](const Candidate& later) {
      return is_durable(later, flushed_upto) && c.end < later.start;
    });
    if (!superseded) left.push_back(c);
  }
  return left;
}

}  // namespace holdfast::test::crash
