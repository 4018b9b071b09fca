// Chunk ranges of one layer that read as zeros where no entry says otherwise: the union over all its slab pages. Ranges
// are only ever added while a volume is open (data written later beats the hole), so a union is enough to answer reads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

namespace holdfast {

class HoleSet {
 public:
  bool empty() const { return ranges_.empty(); }
  bool covers(uint32_t chunk) const {
    auto after = ranges_.upper_bound(chunk);
    return after != ranges_.begin() && chunk < std::prev(after)->second;
  }
  // Adds [start, end).
  void add(uint64_t start, uint64_t end) {
    auto at = ranges_.upper_bound(start);
    if (at != ranges_.begin() && std::prev(at)->second >= start) {
      --at;
      start = at->first;
    }
    while (at != ranges_.end() && at->first <= end) {
      end = std::max(end, at->second);
      at = ranges_.erase(at);
    }
    ranges_.emplace(start, end);
  }
  // Calls `each` with every chunk of [from, end) that is covered.
  template <typename F>
  void for_each(uint64_t from, uint64_t end, F&& each) const {
    auto at = ranges_.upper_bound(from);
    if (at != ranges_.begin()) --at;
    for (; at != ranges_.end() && at->first < end; ++at) {
      for (uint64_t chunk = std::max(from, at->first); chunk < std::min(end, at->second); chunk++) each(chunk);
    }
  }
  size_t memory_bytes() const { return ranges_.size() * 64; }

 private:
  std::map<uint64_t, uint64_t> ranges_;
};

}  // namespace holdfast
