// What a block may hold, as far as anybody outside the engine can know.
#pragma once

#include <cstdint>
#include <vector>

namespace holdfast::test::crash {

inline constexpr uint64_t kOpenEnded = ~uint64_t{0};

// One value that a block may hold. Times count the simulation's steps.
//   - A value is *current* unless a later write, begun after this one had ended, was acknowledged.
//   - After a power cut it may still be there unless such a later write was also made durable: by FUA, by a flush begun
//     after it was acknowledged, or by having been read back after an earlier cut.
//   - `maybe`: the write failed or was cut off; it may have happened or not, and supersedes nothing.
struct Candidate {
  uint64_t value = 0;
  uint64_t start = 0;
  uint64_t end = kOpenEnded;
  bool durable = false;
  bool maybe = false;
};
using Cell = std::vector<Candidate>;

// A value that is certain, from before all writes: zeros, or what a volume was made from.
inline Cell settled_cell(uint64_t value) { return Cell{{value, 0, 0, true, false}}; }

std::vector<uint64_t> current_values(const Cell& cell, uint64_t at);
bool is_durable(const Candidate& candidate, uint64_t flushed_upto);
// What is left after the power was cut.
Cell after_cut(const Cell& cell, uint64_t flushed_upto);

// What a frozen layer shows, with all below it: for as long as nothing is stripped from it.
struct FrozenView {
  uint64_t size_bytes = 0;
  std::vector<std::vector<uint64_t>> values;  // per block: what it may hold for ever; fixed when read first
};

}  // namespace holdfast::test::crash
