// Reading the page pairs of many slabs, for whoever works through them slab by slab with blocking calls.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "format.h"
#include "pages.h"
#include "pool.h"
#include "status.h"
#include "sync_device.h"
#include "volume.h"

namespace holdfast {

inline constexpr uint32_t kPairsPerRead = 512;  // 4 MiB

inline Status check_run(const format::Superblock& s, const SlabRun& run) {
  if (run.first < s.slab_count && run.count <= s.slab_count - run.first) return {};
  return {Code::kInvalidArgument, "slabs " + std::to_string(run.first) + " to " +
                                      std::to_string(run.first + run.count - 1) + " are past the pool's " +
                                      std::to_string(s.slab_count) + " slabs"};
}

// Reads the page pairs of a run, as many at once as lie side by side, hands each to `visit(slab, a, b, copies)` and calls
// `batch()`, which may end it, after each reading. `buffer` holds kPairsPerRead pairs.
template <typename Visit, typename Batch>
Status for_each_pair(SyncDevice& device, const format::Superblock& s, const SlabRun& run, PageBuffer* buffer,
                     Visit visit, Batch batch) {
  uint64_t slab = run.first;
  const uint64_t end = run.first + run.count;
  while (slab < end) {
    const uint64_t in_region = format::kSlabsPerRegion - slab % format::kSlabsPerRegion;
    const uint64_t count = std::min({end - slab, in_region, uint64_t{kPairsPerRead}});
    const uint64_t offset = slab_page_offset(s, slab);
    if (Status status = device.read(offset, buffer->data(), count * format::kSlabPairSize); !status.ok()) return status;
    for (uint64_t i = 0; i < count; i++) {
      auto& a = buffer->at<format::SlabPage>(i * format::kSlabPairSize);
      auto& b = buffer->at<format::SlabPage>(i * format::kSlabPairSize + format::kPageSize);
      visit(slab + i, a, b, choose_slab(a, b, s.header.pool, offset + i * format::kSlabPairSize));
    }
    if (Status status = batch(); !status.ok()) return status;
    slab += count;
  }
  return {};
}

template <typename Visit>
Status for_each_pair(SyncDevice& device, const format::Superblock& s, const SlabRun& run, PageBuffer* buffer,
                     Visit visit) {
  return for_each_pair(device, s, run, buffer, visit, [] { return Status{}; });
}

// A slab whose page is to say "free", under the generation that it has.
struct Freeing {
  uint64_t slab = 0;
  uint64_t generation = 0;
  uint32_t first = 0;     // the copy that does not serve
  uint64_t sequence = 0;  // larger than that of either copy
};
inline Freeing freeing(uint64_t slab, uint64_t generation, const format::SlabPage& a, const format::SlabPage& b,
                       const Copies& copies) {
  const uint64_t sequence = !copies.valid() ? 0 : (copies.newest == 0 ? a : b).header.sequence;
  return {slab, generation, static_cast<uint32_t>(copies.next()), sequence + 1};
}
// Writes both copies of each page, durably. One copy serves all the time: torn both by a power cut, they would be damage
// that nobody may write over.
Status free_pages(SyncDevice& device, const format::Superblock& s, const std::vector<Freeing>& pages);

}  // namespace holdfast
