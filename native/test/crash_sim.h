// The crash test of the format: several volumes of one host on one simulated disk, their snapshots, copies and readers, the
// jobs on their layers, random operations, crashes of the engine and power cuts at any moment, and a model that knows what
// each block of each of them may hold. Everything follows from the seed: a failure is repeated by running its seed again.
// The world is made in crash/ (world.h is its map).
//
// What happens to the volumes (what happens to single writes: core/sim_disk.h):
//   - the engine is killed and taken over from, or the power is cut: at any step; aimed by a fuse at any boundary of the
//     I/O of flushes, cuts, growths, strips, merges and wipes; and again and again in the middle of opening the volumes after that
//   - requests fail, writes with an unknown outcome; in a storm, a flush fails at its pages and the power goes while it
//     is tried again
//   - a volume is revoked, also while it is being closed, and closed on its record by the agent; a snapshot is made by
//     changing the record; the power may go in the middle of either
//   - open volumes are cut and grown under load; a cut that was not answered is asked for again, with the same layer
//   - snapshots are deleted: folded layers are stripped, of several at a time, while their volumes are written, cut, closed,
//     stopped and opened; emptied slabs are forgotten by every holder, wiped and handed on; emptied layers leave their chains, on the
//     disk and in engines that go on, which have room for more cuts then; and their records' slots come back
//   - below a snapshot that is kept, or shared, what shows of folded layers is merged into it; holders learn that, and are killed
//     and taken over from before they do
//   - volumes are made from snapshots, share their layers, and are deleted, sources and copies in any order; slots of
//     records are used again as soon as the format allows
//   - closed volumes and copies that nobody ever opened have readers, who read all the while, through kills too
//   - slabs that were given back are handed on at once, with stale pages of earlier owners in them, of any flush number;
//     after a kill a slab may be handed out whose page still names a layer that never came to use it
//   - the chunks of a slab, the slabs of the pool and the slots of the arena are scarce
//   - at the end, one copy of some slab pages is damaged
//
// Checked, all the time or after each crash (DESIGN section 9, the data invariants):
//   2. what was flushed before a crash reads back; what was acknowledged survives a killed engine
//   3. what was never written reads as zeros; nothing of another volume, and nothing from before a discard, shows up
//   4. a frozen layer shows what it showed, and so does a volume to each of its readers, whatever is stripped below
//   5. no chunk is mapped twice in a layer, no slab is in two layers, and nothing is handed on while somebody can map it
//   8. a torn page is never followed, and never stops the volume from opening; damage is told of
//   9. the epoch in a volume's record only grows, and a size that was acknowledged stays
// and: every request is answered once; abort leaves nothing in flight; a clean close leaves both copies of every page
// equal; data goes only into slabs that are claimed in both copies, durably; a slab that is given back is free in both;
// the copy of a page that serves is never written over; a slab is discarded when no copy names its layer and before it is
// anybody else's; a strip leaves nothing that was covered, and takes only what durable pages cover; what a merge says is there is
// durable; who has forgotten a slab keeps no claim of it; jobs come to an end; `pool check` has nothing to say after all
// of it. The records on the disk lead from each volume to the layers that the books say.
#pragma once

#include <cstdint>
#include <string>

namespace holdfast::test {

// A crash at one certain place: at the `boundary`-th boundary of the I/O of the `nth` strip (wipe, cut, growth, merge) of the run.
struct CrashAim {
  enum class At { kNowhere, kStrip, kWipe, kCut, kGrowth, kMerge };
  At at = At::kNowhere;
  uint32_t nth = 1;
  uint32_t boundary = 1;
  bool power = true;  // else the engine is killed
};

struct CrashResult {
  enum class Aimed { kNotReached, kCrashed, kOver };  // kOver: it had no such boundary any more
  bool ok = true;
  std::string failure;  // what was wrong, with the seed and the step
  Aimed aimed = Aimed::kNotReached;
  uint64_t operations = 0;
  uint64_t cuts = 0;
  uint64_t kills = 0;
  uint64_t snapshots = 0;  // of open volumes, answered
  uint64_t growths = 0;
  uint64_t clones = 0;
  uint64_t readers = 0;
  uint64_t strips = 0;
  uint64_t stripped_blocks = 0;
  uint64_t merges = 0;
  uint64_t merged_blocks = 0;
  uint64_t learned = 0;       // acknowledgements of holders that they know what was merged
  uint64_t forgotten = 0;     // acknowledgements of holders that they know slabs no more
  uint64_t wipes = 0;         // of slabs, layers and volumes
  uint64_t jobs_cut_off = 0;  // strips and wipes, by a crash
  uint64_t wiped_slabs = 0;
  uint64_t unchained = 0;     // layers removed from their chains
  uint64_t layers_forgotten = 0;  // acknowledgements of holders that such a layer is not in theirs any more
  uint64_t relinked = 0;      // records made to name the living layer below
  uint64_t compacted = 0;     // blocks copied up into tops
  uint64_t emptied = 0;       // slabs given back by volumes
  uint64_t checks = 0;        // blocks compared

  void add(const CrashResult& other);
  std::string counts() const;
};

CrashResult run_crash_seed(uint64_t seed, bool verbose = false, const CrashAim& aim = {});

}  // namespace holdfast::test
