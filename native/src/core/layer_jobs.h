// Work on layers that no volume writes any more, by blocking calls on the pages as they stand on the disk: stripping a
// folded layer of what newer ones cover, wiping layers that nothing needs, and listing what layers changed.
//
// Who calls sees to it that one job at a time runs on a family of layers, and that slabs are wiped only when every holder
// of a chain with them has forgotten them (volume.h). I/O goes in large batches; `pause` is called after each.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "records.h"

namespace holdfast {

using Pause = std::function<void()>;

struct LayerUse {
  uint64_t layer_id = 0;
  uint64_t live_blocks = 0;   // data and zero blocks; chunks of holes count whole
  uint64_t slabs = 0;         // with any
};

struct StripReport {
  std::vector<SlabRun> emptied;   // hold nothing of their layer any more
  uint64_t cleared_blocks = 0;
  std::vector<LayerUse> uses;     // what is left in each victim, in the victims' order
};

// Clears in the pages of `victims` (frozen, newest first) every block that `covers` or a newer victim has in a page that is
// durable: read, and the device flushed after that. A page is touched only while its newest copy names layer and generation:
// the older copy first, durable, then the other. The victims' records are made to say that they are folded into covers[0], and to name
// `parent_layer_id`: the parent that they name already, or the living layer below that the chain goes on with (then in both copies:
// the slot of the former one may be used again). May be repeated, and cut off anywhere. kStale, and nothing changed: a victim is
// writable or deleted on the disk.
Result<StripReport> strip_layers(SyncDevice& device, const format::Superblock& superblock,
                                 const std::vector<LayerSpec>& victims, const std::vector<LayerSpec>& covers,
                                 const Pause& pause = {});

// Frees both page copies of each slab that still names layer and generation, then discards it; what names anything else is left
// alone: it has been wiped before, and may be somebody else's. `tombstone`: the layers' records say deleted first; they
// keep their parent, so that a chain through them can be followed. kCorrupt: after the rest is done, slabs whose
// pages are damaged in both copies were left.
Status wipe_layers(SyncDevice& device, const format::Superblock& superblock, const std::vector<WipeLayer>& layers,
                   bool tombstone, const Pause& pause = {});

struct ByteRange {
  uint64_t offset = 0;
  uint64_t length = 0;
};

struct ChangeReading {
  std::vector<ByteRange> ranges;  // ascending, none touching the next
  uint64_t next_offset = 0;       // where to go on; 0: that was all
};

// The ranges below `size_bytes` that any of `layers` has data, zeros or holes for, from `starting_offset` on.
Result<ChangeReading> read_changes(SyncDevice& device, const format::Superblock& superblock,
                                   const std::vector<LayerSpec>& layers, uint64_t size_bytes, uint64_t starting_offset,
                                   uint32_t max_ranges, const Pause& pause = {});

}  // namespace holdfast
