// An open volume: thin block storage on slabs of a pool. This is the seam between the frontends (FUSE, later ublk),
// the crash simulation, and the engine core.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "block_device.h"
#include "executor.h"
#include "format.h"
#include "status.h"

namespace holdfast {

enum class VolumeOp : uint8_t { kRead, kWrite, kFlush, kDiscard, kWriteZeroes };

// One request of a frontend. Caller-owned until done() ran. Discard and write zeroes both read back as zeros.
struct VolumeRequest {
  VolumeOp op = VolumeOp::kRead;
  bool fua = false;              // kWrite: durable, map included, when done() runs
  uint64_t offset = 0;           // bytes, multiple of 4096
  uint64_t length = 0;           // bytes, multiple of 4096; 0 for kFlush
  std::byte* buffer = nullptr;   // 4096-aligned, `length` bytes: reads and writes
  // Runs exactly once, on the executor of the submitting thread, never inside submit(). error: 0 or positive errno
  // (EIO: device, fenced or metadata damage; EINVAL: past the end or misaligned; ENOSPC: pool full).
  void (*done)(VolumeRequest* self, int error) = nullptr;
  void* user = nullptr;
  // The volume's, while the request is with it. The implementation static_asserts that its state fits.
  alignas(16) std::byte scratch[832];
};

// A run of slabs of one generation.
struct SlabRun {
  uint64_t first = 0;
  uint32_t count = 0;
  uint64_t generation = 0;
};

struct LayerSpec {
  uint64_t layer_id = 0;
  uint32_t slot = 0;              // in the layer table
  uint64_t parent_layer_id = 0;
  uint64_t birth = 0;
  uint64_t size_bytes = 0;
  bool frozen = false;
  std::vector<SlabRun> slabs;
};

// How long a chain may be. The metadata service refuses the cut that would make it longer.
inline constexpr uint32_t kMaxLayers = 1024;

// What the metadata service grants. layers: newest (the writable top) first.
struct VolumeSpec {
  uint64_t volume_id = 0;
  uint32_t slot = 0;              // in the volume table
  format::Uuid uuid{};
  std::string name;
  uint64_t size_bytes = 0;
  uint64_t epoch = 0;
  uint32_t host_id = 0;
  uint64_t generation = 0;        // of the host slot
  bool read_only = false;
  std::string parameters_json;
  std::vector<LayerSpec> layers;
  // Kept for a successor only: the top of a cut that may be under way. Whether it happened is the record's to say.
  std::optional<LayerSpec> next_top;
};

// Slabs ahead, one stock per pool and node, shared by its volumes. Thread-safe.
class SlabStock {
 public:
  virtual ~SlabStock() = default;
  struct Slab {
    uint64_t slab = 0;
    uint64_t generation = 0;
  };
  // Takes one, preferring the neighbour of `near` (pages are then read in runs at open). False: none left; `waiter`
  // is posted to `executor` when there is one again or when the pool is declared full.
  // `waiter` may be null: then nobody is told.
  virtual bool take(uint64_t near, Slab* out, Task* waiter, Executor* executor) = 0;
  // Takes a waiter back, so that a volume can go away. True: it will not be posted. False: it has been posted already
  // and runs (or ran).
  virtual bool cancel(Task* waiter) = 0;
  // Puts an unclaimed slab back.
  virtual void put_back(Slab slab) = 0;
  // The metadata service said: no slabs left. Cleared by the next add().
  virtual bool known_full() const = 0;
};

// What the cut writes into the record of the layer that freezes.
struct SnapshotInfo {
  std::string name;               // empty: none
  uint64_t unix_ms = 0;
};

struct CutReport {
  LayerSpec frozen;               // as it is now, with all its slabs
  uint64_t held_ns = 0;           // how long writes waited
};

// Slabs of one layer.
struct LayerSlabs {
  uint64_t layer_id = 0;
  std::vector<SlabRun> slabs;
};

struct CompactReport {
  uint64_t moved_blocks = 0;
  bool complete = false;          // nothing is left that the rule would move
  bool no_space = false;          // the rule would move more, but there is no slab to spare
};

struct VolumeStats {
  uint64_t size_bytes = 0;
  uint64_t mapped_bytes = 0;      // chunks with any data x chunk size
  uint64_t allocated_bytes = 0;   // slabs of the top layer x slab size
  uint64_t reads = 0, writes = 0, flushes = 0, discards = 0;
  uint64_t read_bytes = 0, written_bytes = 0;
  uint64_t held = 0;              // requests waiting for a slab
  uint64_t dirty_pages = 0;
  uint64_t in_flight = 0;         // at the device
  uint64_t memory_bytes = 0;      // map, page images, request pools
};

// Told by the volume; called on an executor thread, must not block, must not call back into the volume.
class VolumeObserver {
 public:
  virtual ~VolumeObserver() = default;
  virtual void slab_claimed(uint64_t volume_id, uint64_t layer_id, uint64_t slab, uint64_t generation) = 0;
  // Empty, page durable, drained and discarded: may be returned to the metadata service.
  virtual void slab_emptied(uint64_t volume_id, uint64_t layer_id, uint64_t slab, uint64_t generation) = 0;
  // A fault that a person should see; the sentence names slab, page and logical range.
  virtual void volume_event(uint64_t volume_id, Code code, const std::string& message) = 0;
};

// The page images that are not yet durable (DESIGN 5.3): shared memory that outlives the process. The keeper has
// the memfd. Layout and recovery belong to the implementation (page_arena.h).
class PageArena;

struct VolumeEnvironment {
  BlockDevice* device = nullptr;         // gated by the caller: lease and revocation are not the volume's business
  format::Uuid pool{};
  const format::Superblock* superblock = nullptr;
  SlabStock* stock = nullptr;
  VolumeObserver* observer = nullptr;
  PageArena* arena = nullptr;            // one per volume
  uint64_t full_timeout_ns = 60'000'000'000;
  // How many chunks of each slab are put to use. Fewer than all only in simulations, so that slabs turn over quickly.
  uint32_t chunks_per_slab = format::kChunksPerSlab;
};

class Volume {
 public:
  virtual ~Volume() = default;

  using Opened = std::function<void(Result<std::unique_ptr<Volume>>)>;
  // Reads the volume record, refuses it unless its epoch is older than the grant's (equal is right only for a
  // take-over: `taking_over`, arena holds images), writes {epoch, host id, generation} durably, reads the slab pages
  // in runs, lays the arena's images over them, and starts dirty. `opened` runs on the calling executor.
  static void open(const VolumeEnvironment& environment, const VolumeSpec& spec, bool taking_over, Opened opened);

  // Any executor thread.
  virtual void submit(VolumeRequest* request) = 0;

  // Control calls: from any executor thread; `done` runs on the caller's executor.
  using Done = std::function<void(Status)>;
  virtual void grow(uint64_t size_bytes, Done done) = 0;   // record durable before the new size is served
  // Flushes, holds new writes and discards, drains, flushes again. They stay held until cut(), release() or, counted from
  // when they are first held, `timeout_ns`. Reads and flushes go on. kHoldExpired: not drained and flushed in time.
  virtual void hold(uint64_t timeout_ns, Done done) = 0;
  // Lets held writes go on. Nothing held: no-op.
  virtual void release(Done done) = 0;
  // Freezes the top layer under `top`, whose parent it must be. The volume record that names `top` is the commit; before
  // it writes go on in the old top when something fails, after it they go on in the new one. A commit whose outcome is
  // not known is written again until it is: writes stay held meanwhile, whatever the time-out. Holds by itself, or takes
  // over what hold() held; kHoldExpired when that is over, until release() or hold() is called. `top` on top already: success.
  using CutDone = std::function<void(Result<CutReport>)>;
  virtual void cut(const LayerSpec& top, const SnapshotInfo& snapshot, uint64_t timeout_ns, CutDone done) = 0;
  // Takes slabs of frozen layers, which nothing resolves to any more, out of the map, and `layers`, which hold no other slab, out of
  // the chain. `done` runs when no request is left that may know a place in the slabs; they may be somebody else's then. Slabs and
  // layers that are not there are no error. kInvalidArgument, and nothing changed: a layer has more slabs, or is the top.
  virtual void forget(const std::vector<SlabRun>& slabs, const std::vector<uint64_t>& layers, Done done) = 0;
  // Reads the pages of a frozen layer's slabs again: others have copied blocks into the layer that show from older ones now
  // (layer_merge.h). When `done` runs the volume would show the same without those. Nothing that anybody reads changes. kCorrupt: a page
  // says less than it did, or nonsense.
  virtual void learn(const LayerSlabs& layer, Done done) = 0;
  // Copies, into the top, the blocks that still show from these slabs of frozen layers of the chain, so that stripping can empty
  // them. Unknown slabs and layers are skipped; so is a slab for whose blocks the top would need chunks for more than
  // `skip_above_permille` / 1000 of a slab's. Ends after about `max_blocks` (0: no limit). Beside requests, at full speed when there
  // are none. What was moved is durable when `done` runs, and nothing that anybody reads has changed. One at a time, and not while
  // writes are held (kBusy). hold(), cut() and close() end it first, early: `complete` is false then. kIo: the data stays where it was.
  using CompactDone = std::function<void(Result<CompactReport>)>;
  virtual void compact(const std::vector<LayerSlabs>& sources, uint32_t skip_above_permille, uint64_t max_blocks,
                       CompactDone done) = 0;
  // Flush, make both copies of every page equal, write the record as closed (epoch kept), stop. No request may be
  // outstanding. After it only the destructor may be called.
  virtual void close(Done done) = 0;
  // From now on every request, held ones included, fails with EIO; what is at the device is waited for; no page or
  // record is written. `done` runs with nothing in flight. Idempotent.
  virtual void abort(Done done) = 0;
  virtual VolumeStats stats() const = 0;
};

}  // namespace holdfast
