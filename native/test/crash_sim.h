// The crash test of the format: several volumes of one host on one simulated disk, random operations, crashes of the
// engine and power cuts at any moment, and a model that knows what each block may hold. Everything follows from the
// seed: a failure is repeated by running its seed again.
//
// Checked, all the time or after each crash (DESIGN section 9, the data invariants):
//   2. what was flushed before a crash reads back; what was acknowledged survives a killed engine
//   3. what was never written reads as zeros; nothing of another volume, and nothing from before a discard, shows up
//   4. a frozen layer shows what it showed
//   5. no chunk is mapped twice in a layer, no slab is in two layers
//   8. a torn page is never followed, and never stops the volume from opening
// and: every request is answered once; abort leaves nothing in flight; a clean close leaves both copies of every page
// equal.
#pragma once

#include <cstdint>
#include <string>

namespace holdfast::test {

struct CrashResult {
  bool ok = true;
  std::string failure;     // what was wrong, with the seed and the step
  uint64_t operations = 0;
  uint64_t cuts = 0;
  uint64_t kills = 0;
  uint64_t snapshots = 0;  // of open volumes, answered
  uint64_t emptied = 0;    // slabs given back
  uint64_t compacted = 0;  // blocks copied up into tops
  uint64_t checks = 0;     // blocks compared
};

CrashResult run_crash_seed(uint64_t seed, bool verbose = false);

}  // namespace holdfast::test
