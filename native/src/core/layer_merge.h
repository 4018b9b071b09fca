// Merging upwards below a snapshot that is kept: what still shows of folded layers is copied into the frozen layer right above
// them, the head, so that stripping finds it covered and empties their slabs.
//
// Nothing that anybody reads changes. Every chain that has one of the victims has the head too, and goes from it straight to them;
// a block is copied only where neither the head nor a newer victim says anything about it. So it is the same bytes at a place that
// is asked earlier, and a block that was nobody's place before: of a chunk that the head has, those that its masks leave out; else a
// chunk that is free in both copies of its page, or a slab that has been given to the head for this and is claimed first.
//
// A holder of the chain does not know those places. Before the victims are stripped it has to learn them (volume.h, learn()): a
// successor of its engine reads the stripped pages from the disk.
#pragma once

#include "layer_jobs.h"

namespace holdfast {

struct MergeReport {
  uint64_t moved_blocks = 0;
  bool complete = false;         // nothing is left that the rule would move
  bool no_space = false;         // it would move more, but the head has no chunk left for it
  std::vector<SlabRun> spare;    // of the head's slabs, those that no page says are its own: unused so far
};

// `victims` (folded, newest first) lie right below `head` (frozen, and never stripped itself). A slab of theirs stays as it is when its
// blocks would cost the head more than `skip_above_permille` / 1000 of a slab's chunks. Ends after about `max_blocks` (0: no limit).
// What was moved is durable. May be repeated, and cut off anywhere. kStale, or kInvalidArgument where the head
// was stripped, and nothing changed: a record says otherwise.
Result<MergeReport> merge_layers(SyncDevice& device, const format::Superblock& superblock,
                                 const std::vector<LayerSpec>& victims, const LayerSpec& head,
                                 uint32_t skip_above_permille, uint64_t max_blocks, const Pause& pause = {});

}  // namespace holdfast
