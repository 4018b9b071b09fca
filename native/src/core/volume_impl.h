// The inside of an open volume. One class, one lock; each of the .cc files named below holds one idea of it.
//
//   volume.cc           requests as such: submit, finish, waiting lists, grace periods, statistics
//   volume_open.cc      the grant and the records; volume_load.cc: slab pages and the arena images, made into the map
//   volume_read.cc      from logical blocks to extents on disk through the chain of layers
//   volume_write.cc     places for new chunks; data first, then the bits of the page image, then the acknowledgement
//   volume_discard.cc   clearing bits, zero masks and hole ranges
//   volume_flush.cc     making the map durable, and the reuse of freed chunks that hangs on it
//   volume_slabs.cc     claiming slabs, giving them back, waiting for them
//   volume_hold.cc      holding new writes until the map is durable and stands still
//   volume_cut.cc       the cut: records, commit, a new top
//   volume_frozen.cc    what is left to do for a layer that has just been frozen
//   volume_forget.cc    slabs and layers that have left the chain
//   volume_learn.cc     what others have copied into a frozen layer
//   volume_compact.cc   copying what still shows of old layers up into the top
//   volume_close.cc     grow, close, abort
//
// Threads: everything below is guarded by mu_, which is held for lookups and bit changes only, never across I/O or a
// call to the outside (posting a task and asking the slab stock excepted: both are leaves in the lock order). A
// request's own state is touched by the executor that submitted it and by nobody else, save while the request stands
// in a waiting list (then: under mu_).
//
// Why no lock per chunk is needed. (1) Places are given out under mu_ and stand in the map at once, so two first
// writes to a chunk agree on its place. (2) A place that a request has seen can't be given to other data while the
// request lives: a freed chunk waits, besides for both durable copies, for a grace period, until every request that
// was there when it was freed has ended. (3) What two requests do to the same block at the same time has no order. Only
// a copy made by the volume itself must not meet a write: while one is under way, writes to its few chunks wait.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "chain_index.h"
#include "hole_set.h"
#include "layer_map.h"
#include "page_arena.h"
#include "pages.h"
#include "slab_table.h"
#include "volume.h"

namespace holdfast {

class VolumeImpl;
class VolumeOpener;
struct RequestState;

inline constexpr uint16_t kAllBlocks = 0xffff;

// Bits [from, to) of a block mask.
constexpr uint16_t block_mask(uint32_t from, uint32_t to) {
  return static_cast<uint16_t>(((1u << (to - from)) - 1u) << from);
}

// A contiguous piece of a request at the device. Never crosses a slab.
struct Extent {
  IoRequest io;
  iovec iov{};
  uint32_t slab = 0;
  uint32_t chunk = 0;         // first logical chunk
  uint16_t index = 0;         // first chunk in the slab
  uint16_t chunks = 0;
  uint8_t first_block = 0;    // in the first chunk
  uint8_t end_block = 0;      // in the last chunk, 1..16
  bool busy = false;
  bool pinned = false;        // holds a pin on the slab's image
  bool unapplied = false;     // written, but its bits wait for a free slot
};

static_assert(offsetof(Extent, io) == 0);

struct FlushWaiter : Task {
  FlushWaiter* next_waiter = nullptr;
  Executor* home = nullptr;
  int error = 0;
  void (*done)(FlushWaiter* self, int error) = nullptr;
  void* user = nullptr;
};

// Lives in VolumeRequest::scratch.
struct RequestState : Task {
  static constexpr uint32_t kExtents = 4;
  // kPosted: woken, its task has not run yet.
  enum class Wait : uint8_t { kNone, kSlot, kSlab, kCopy, kHold, kPosted };

  VolumeRequest* request = nullptr;
  VolumeImpl* volume = nullptr;
  Executor* home = nullptr;
  RequestState* next_waiting = nullptr;
  uint64_t cursor = 0;        // bytes of the request that have been given to extents (or, discard: that are done)
  uint64_t held_since = 0;    // ns; while waiting for a slab
  uint32_t epoch = 0;
  int error = 0;
  uint8_t outstanding = 0;    // extents at the device
  Wait wait = Wait::kNone;
  bool in_epoch = false;      // counted in its grace period
  bool changed = false;       // a write or discard that may have touched anything
  bool changing = false;      // counted in changing_
  FlushWaiter flush;
  Extent extents[kExtents];
};
static_assert(sizeof(RequestState) <= sizeof(VolumeRequest::scratch));
static_assert(alignof(RequestState) <= 16);

// 256 bits, one per chunk of a slab.
struct ChunkSet {
  std::array<uint64_t, 4> words{};
  bool empty() const { return (words[0] | words[1] | words[2] | words[3]) == 0; }
  bool has(uint32_t i) const { return (words[i / 64] >> (i % 64) & 1) != 0; }
  void add(uint32_t i) { words[i / 64] |= uint64_t{1} << (i % 64); }
  void drop(uint32_t i) { words[i / 64] &= ~(uint64_t{1} << (i % 64)); }
  void clear() { words = {}; }
};

// A slab whose page has changes that are not durable, or chunks on their way to be free again ("limbo"). A limbo chunk
// still belongs to its logical chunk, entry {chunk, 0, 0}: a new write to that chunk takes the same place again. It
// becomes free when two page writes in a row, so both copies, stood without it, and its grace period is over.
struct HotSlab {
  uint32_t slab = kNoIndex;
  uint32_t slot = PageArena::kNone;
  uint32_t pins = 0;            // writes under way that will set bits
  bool dirty = false;           // has changes that no frozen page has
  bool queued = false;          // in dirty_
  bool flushing = false;        // frozen; the page write has not yet been made durable
  bool reclaim_listed = false;
  bool uncertain = false;       // a page write failed: the copy it went to may be whole all the same
  uint32_t frozen_epoch = 0;
  uint32_t reclaim_epoch = 0;   // limbo_both is free once every request of this epoch and before has ended
  uint64_t frozen_sequence = 0;
  ChunkSet frozen_limbo;        // empty chunks in the frozen page, not taken again since
  ChunkSet limbo_one;           // absent from the newest durable copy
  ChunkSet limbo_both;          // absent from both durable copies
};

class VolumeImpl final : public Volume {
 public:
  VolumeImpl(const VolumeEnvironment& environment, const VolumeSpec& spec);
  ~VolumeImpl() override;

  void submit(VolumeRequest* request) override;
  void grow(uint64_t size_bytes, Done done) override;
  void hold(uint64_t timeout_ns, Done done) override;
  void release(Done done) override;
  void cut(const LayerSpec& top, const SnapshotInfo& snapshot, uint64_t timeout_ns, CutDone done) override;
  void forget(const std::vector<SlabRun>& slabs, const std::vector<uint64_t>& layers, Done done) override;
  void learn(const LayerSlabs& layer, Done done) override;
  void compact(const std::vector<LayerSlabs>& sources, uint32_t skip_above_permille, uint64_t max_blocks,
               CompactDone done) override;
  void close(Done done) override;
  void abort(Done done) override;
  VolumeStats stats() const override;

 private:
  friend class VolumeOpener;

  enum class State : uint8_t { kOpening, kOpen, kClosing, kClosed, kAborted };
  enum class Need : uint8_t { kNothing, kSlot, kSlab, kCopy };  // kCopy: that a copy of the chunk ends
  static constexpr uint32_t kGraceRing = 64;
  static constexpr uint32_t kFlushPagesMax = 256;
  static constexpr uint32_t kFlushPagesMin = 8;
  static constexpr uint32_t kFlushDepth = 16;
  static constexpr uint32_t kAffinityChunks = 64;
  static constexpr uint32_t kClaims = 8;  // at once
  static constexpr uint64_t kStreamGapNs = 10'000'000'000;  // without a claim, and no stream of first writes goes on
  static constexpr uint64_t kDiscardBatch = 2048;  // chunks looked at under one hold of the lock

  struct Layer {
    uint64_t id = 0;
    LayerMap map;
    HoleSet holes;
  };

  // A page or record I/O of the volume itself.
  struct PageIo {
    IoRequest io;
    iovec iov{};
    VolumeImpl* volume = nullptr;
    uint32_t tag = 0;
  };

  // ---- volume.cc
  Layer& top() { return layers_.back(); }
  const Layer& top() const { return layers_.back(); }
  bool in_top(const Slab& slab) const { return slab.layer + size_t{1} == layers_.size(); }
  // In the list of slabs with free chunks: those of a layer that was the top once only seem to be.
  bool listed(const Slab& slab) const { return slab.listed && in_top(slab); }
  uint64_t data_offset(uint32_t slab, uint32_t chunk) const {
    return format::slab_data_offset(first_region_, slabs_[slab].number) + uint64_t{chunk} * format::kChunkSize;
  }
  uint64_t page_offset(uint64_t slab_number, uint32_t copy) const {
    return format::slab_page_offset(first_region_, slab_number) + uint64_t{copy} * format::kPageSize;
  }
  static RequestState* state_of(VolumeRequest* request) {
    return std::launder(reinterpret_cast<RequestState*>(request->scratch));
  }
  static void finish_later(RequestState* state, int error);  // without the volume
  bool enter(RequestState* state);     // locked: registers; false: the volume does not serve
  void leave(RequestState* state);     // locked: the request no longer needs the volume
  // Locked. A request holds its grace period while it may know places. One that waits for space must not: the space
  // may hang on that very period.
  void hold_epoch(RequestState* state);
  void drop_epoch(RequestState* state);
  static void complete(RequestState* state);  // unlocked: after leave(); runs done()
  static void run_request(Task* task);
  void resume(RequestState* state);
  void park(RequestState* state, Need need);            // locked
  void wake(RequestState*& head, RequestState*& tail);  // locked: posts all of them
  void fail_waiting(RequestState*& head, RequestState*& tail, int error);
  void bump_epoch();
  void advance_grace();
  void skip_empty_epochs();
  // For who waits until every request of `epoch` has ended, asked whenever the grace period has moved on: whether it has.
  bool leave_epoch(uint32_t epoch);
  bool grace_over(uint32_t epoch) const { return static_cast<int32_t>(oldest_epoch_ - epoch) > 0; }
  void event(Code code, std::string message);  // locked: told after the lock is released
  void unlock(std::unique_lock<std::mutex>& lock);  // and tells the observer what has come up meanwhile
  void idle_check();                           // locked: finishes an abort or a close that waits for quiet
  void start_background() { background_++; }
  void end_background();

  // ---- volume_read.cc
  struct Piece {
    uint64_t length = 0;  // bytes
    uint64_t disk = 0;    // byte offset; kZeroes: reads as zeros
  };
  static constexpr uint64_t kZeroes = ~uint64_t{0};
  void read(RequestState* state, bool inside_submit);
  // Locked. The pieces of [offset, end) in order, contiguous ones joined; at most `count`, with at most `data` of data.
  uint32_t resolve(uint64_t offset, uint64_t end, Piece* out, uint32_t count, uint32_t data) const;
  static void read_done(IoRequest* io, int error);
  struct LayerView {
    uint16_t data = 0;
    uint16_t zero = 0;  // of the entry or a hole
    Place place = kNoPlace;
  };
  LayerView view(const Layer& layer, uint32_t chunk) const;
  static constexpr size_t kIndexedDepth = 4;  // layers: from so many on chain_ is worth its memory
  uint64_t& hints(uint32_t chunk) const;      // locked: of chain_, with every frozen layer in them
  // Locked. Asks the top, if `with_top`, and then those below for `blocks` of the chunk: each block is asked of the layers
  // that may say something about it, newest first, until one answers. `each` gets a layer and the blocks that it is asked
  // for, and returns those that it answers.
  template <typename F>
  void through_layers(uint32_t chunk, uint16_t blocks, bool with_top, F&& each) const {
    uint16_t open = blocks;
    const auto ask = [&](size_t layer, uint16_t asked) {
      const uint16_t answered = each(layers_[layer], asked);
      HF_ASSERT((answered & ~asked) == 0);
      open = static_cast<uint16_t>(open & ~answered);
      return static_cast<uint16_t>(asked & ~answered);
    };
    if (layers_.size() < kIndexedDepth || state_ == State::kOpening) {
      for (size_t i = layers_.size() - !with_top; i-- > 0 && open != 0;) ask(i, open);
      return;
    }
    if (with_top && ask(layers_.size() - 1, open) == 0) return;
    uint64_t& known = hints(chunk);
    while (open != 0) {
      uint16_t asked = open;
      const uint32_t group = ChainIndex::newest(known, asked);
      if (group == 0) return;
      const size_t end = std::min(chain_.first(group + 1), layers_.size() - 1);
      for (size_t i = end; i-- > chain_.first(group) && asked != 0;) asked = ask(i, asked);
      ChainIndex::set_hint(known, asked, group - 1);  // stripped since: older groups are next
    }
  }
  // Below the top: blocks that show data when the top says nothing, and blocks that any layer says anything about.
  uint16_t older_data(uint32_t chunk, uint16_t* mentioned = nullptr) const;

  // ---- volume_write.cc
  void write(RequestState* state, bool inside_submit);
  Need plan_extent(RequestState* state, Extent& extent, uint64_t end);  // locked
  Need place_for(uint32_t chunk, Place* out);                           // locked: allocates
  void take_chunk(uint32_t slab, uint32_t index, uint32_t chunk);       // locked
  bool apply(RequestState* state, Extent& extent);                      // locked: sets the bits; false: needs a slot
  void write_on(RequestState* state, std::unique_lock<std::mutex>& lock, bool inside_submit);
  static void write_done(IoRequest* io, int error);
  static void fua_done(FlushWaiter* waiter, int error);
  bool chunk_usable(uint32_t slab, uint32_t index) const;

  // ---- volume_discard.cc
  void discard(RequestState* state, bool inside_submit);
  Need discard_chunk(uint32_t chunk, uint16_t blocks);                          // locked
  Need discard_mapped(uint32_t chunk, uint16_t blocks, Place place);            // locked
  Need discard_hidden(uint32_t chunk, uint16_t blocks);                         // locked
  Need cover_with_zeros(uint32_t chunk, uint16_t zero, bool whole);             // locked
  enum class HoleResult : uint8_t { kAdded, kNoRoom, kNoSlot };
  bool hole_in_page(uint32_t slab, uint32_t chunk) const;                       // locked
  HoleResult add_hole(uint32_t slab, uint32_t chunk, uint32_t clear_index);     // locked

  // ---- volume_flush.cc
  HotSlab& hot(uint32_t index) { return hot_blocks_[index / kHotBlock][index % kHotBlock]; }
  HotSlab* ensure_hot(uint32_t slab);  // locked; null: no slot is free (a flush has been asked for)
  // The page of a slab as it stands in memory; `limbo`: chunks without any bit appear as free, and are noted there.
  void fill_page(uint32_t slab, format::SlabPage* page, ChunkSet* limbo) const;
  void set_entry(uint32_t slab, uint32_t index, format::SlabEntry entry);
  void touch_limbo(uint32_t slab, uint32_t index);  // the chunk is wanted again
  void mark_dirty(HotSlab& hot);
  void cool(uint32_t hot_index);  // locked: lets the image go if nothing needs it any more
  void reclaim();                 // locked: limbo chunks whose time has come
  void request_flush(FlushWaiter* waiter);  // locked: joins, starts or finds it needless
  void want_flush();              // locked: for the volume's own needs
  void start_flush();             // locked
  void flush_round();             // locked: freezes
  void flush_submit_barrier();
  void flush_barrier_done(int error);
  void flush_write_more();
  void flush_submit_page(PageIo& io);  // locked
  void flush_looked(PageIo& io, int error);
  void flush_kept(PageIo& io, int error);
  void flush_page_done(int error);
  void flush_finish(int error);
  static void finish_waiters(FlushWaiter* list, int error);
  static void flush_barrier_io(IoRequest* io, int error);
  static void flush_page_io(IoRequest* io, int error);
  static void request_flush_done(FlushWaiter* waiter, int error);

  // ---- volume_slabs.cc
  struct Claim {
    enum class Stage : uint8_t { kIdle, kRead, kWriteFirst, kWriteSecond };
    VolumeImpl* volume = nullptr;
    Stage stage = Stage::kIdle;
    uint32_t first = 0;  // the copy that is written first: never the one that serves
    SlabStock::Slab slab;
    uint32_t directory = PageArena::kNone;
    bool known = false;
    PageIo io;
    std::unique_ptr<PageBuffer> pages;
  };
  struct Unclaimed {
    SlabStock::Slab slab;
    uint32_t directory = PageArena::kNone;  // if the arena knows of it
    bool known = false;  // the metadata service has it as the top layer's: a cut leaves it with that layer
  };
  struct Release {
    enum class Stage : uint8_t { kIdle, kWriteFirst, kWriteSecond, kDiscard };
    Stage stage = Stage::kIdle;
    uint32_t slab = kNoIndex;
    PageIo io;
    std::unique_ptr<PageBuffer> page;
  };
  void add_to_top(uint32_t slab);  // locked: a live slab that the top layer has gained
  void list_slab(uint32_t slab);
  void unlist_slab(uint32_t slab);
  uint32_t usable_free(const Slab& slab) const { return slab.free_chunks - (format::kChunksPerSlab - usable_chunks_); }
  // Slabs that the top layer lacks for a volume that is written all over.
  uint64_t slabs_lacking() const {
    const uint64_t slab_bytes = usable_chunks_ * format::kChunkSize;
    const uint64_t room = top_slabs_ * slab_bytes;
    return room >= size_bytes_ ? 0 : (size_bytes_ - room + slab_bytes - 1) / slab_bytes;
  }
  // Slabs that are claimed together: one, and twice as many each time that they came late, up to those in use.
  uint64_t claim_batch() const {
    const uint64_t in_use = top_slabs_ - free_total_ / usable_chunks_;
    return std::max<uint64_t>(std::min({in_use, ahead_, slabs_lacking()}), 1);
  }
  // When fewer chunks are free, more slabs are claimed, so that a stream of first writes need not wait for them: a
  // quarter of a slab while the volume is small, then as much as is claimed together.
  uint64_t room_ahead() const {
    if (slabs_lacking() == 0) return 0;
    return top_slabs_ < 2 ? std::max(1u, usable_chunks_ / 4) : claim_batch() * usable_chunks_;
  }
  void want_slab();    // locked: starts claims if none run
  void claim_ahead();  // locked: starts claims if none run and less than room_ahead() is free
  void start_claims();            // locked
  bool start_claim();             // locked
  void claim_step(Claim& claim, int error);
  void claim_failed(Claim& claim, int error);  // locked
  void claim_ended(Claim& claim);              // locked
  bool claim_looked(Claim& claim);             // locked
  void claims_on();                            // locked
  void claims_flushed(int error);
  void claim_done(Claim& claim);               // locked
  void claim_submit(Claim& claim, IoOp op, uint32_t copy, uint32_t pages);
  std::string claim_objection(const Claim& claim, const format::SlabPage& page, PageState state) const;
  static void stock_has_some(Task* task);
  void slab_waiters_timeout();
  void arm_full_timer();
  static void full_timer_run(Task* task);
  void drop_full_timer();
  void maybe_release(uint32_t slab);  // locked: an empty, settled slab that is not needed goes back
  void release_spare();           // locked
  void start_release();
  void release_submit_page(uint32_t copy);
  void release_step(int error);
  void keep_empty(uint32_t slab);  // locked
  format::SlabPage& seal_empty_page(std::byte* memory, const SlabStock::Slab& slab, uint64_t layer_id, uint32_t copy,
                                    uint64_t sequence);
  void settle_for_space();        // locked: flushes so that limbo and unsettled chunks become usable

  // ---- volume_close.cc
  struct Control {
    enum class Kind : uint8_t { kNone, kGrow, kClose, kHold, kCut, kForget, kLearn };
    Kind kind = Kind::kNone;
    uint32_t step = 0;
    Executor* home = nullptr;
    Done done;
    uint64_t size_bytes = 0;
    uint64_t old_size_bytes = 0;
    uint32_t next_slab = 0;
    uint32_t outstanding = 0;
    int error = 0;
    FlushWaiter flush;
  };
  struct Finisher;
  // Locked, and so are both calls back. `half`: one copy is durable, so the record counts.
  void write_record(void (*then)(VolumeImpl* self, int error), void (*half)(VolumeImpl* self) = nullptr);
  void record_submit(uint32_t copy);
  void record_step(int error);
  void control_end(Status status);
  void close_flush();
  void close_flushed(int error);
  void close_failed(const std::string& why);
  void close_equalise();
  void close_page_done(int error);
  void close_barrier_done(int error);
  void post_done(Executor* home, Done done, Status status);  // locked: sent when the lock is released
  static void send_finishers(const std::vector<Finisher*>& finishers);

  // ---- volume_hold.cc
  enum class HoldStage : uint8_t {
    kNone,
    kFlush,        // writes go on
    kDrain,        // from here on new ones are held
    kFlushHeld,
    kHeld,         // everything durable, nothing moves: quiet()
    kRecords,      // the cut's layer records are being written
    kCommit,       // the volume record: of unknown outcome until it is durable
    kRetry,        // waiting to write it again
    kFrozen,       // cut: writes go on in the new top
  };
  struct TimerLink;
  struct HoldTimer;
  bool begin_change(RequestState* state);  // locked; false: it has to wait
  void end_change(RequestState* state);    // locked: it knows no place and will set no bit any more
  void park_held(RequestState* state);     // locked
  bool quiet() const { return stage_ >= HoldStage::kHeld && stage_ <= HoldStage::kRetry; }
  bool can_hold(const char* what, Status* refusal) const;
  void hold_begin(uint64_t timeout_ns);    // locked
  void hold_flush();                       // locked
  void hold_flushed(int error);
  void hold_drained();                     // locked: whenever it may have become true
  void hold_end(Status status);            // locked: writes go on, the control call is over
  void resume_writes();                    // locked
  void set_timer(uint64_t after_ns);       // locked; the one before is void
  void timer_fired(uint64_t number);
  // `fired(number)` runs on `home`, unless the volume is gone by then. For compaction too.
  void post_timer(Executor* home, uint64_t after_ns, uint64_t number, void (VolumeImpl::*fired)(uint64_t number));
  void drop_timers();
  bool waits_idly() const {                // for a timer, a drain or the next call: nothing else would end it
    return stage_ == HoldStage::kDrain || (stage_ == HoldStage::kHeld && control_.kind == Control::Kind::kHold) ||
           stage_ == HoldStage::kRetry;
  }
  Status stopped_status(const char* what) const;

  // ---- volume_cut.cc
  struct Cut {
    LayerSpec top;
    SnapshotInfo snapshot;
    CutReport report;
    CutDone done;
    uint64_t timeout_ns = 0;
    uint64_t retry_ns = 0;       // before the next try of the commit
    bool told = false;           // that it is being tried again
    uint16_t layer = 0;          // the one that freezes, or is frozen
    uint32_t slot = 0;           // its record's
    uint32_t step = 0;
    uint32_t outstanding = 0;
    int error = 0;
    std::array<bool, 2> torn{};  // of the new layer's record and the freezing one's: the copy that is written first
    bool repeated = false;       // it happened before
    bool waits_release = false;  // for empty slabs to be back
    bool waits_grace = false;    // for reads to end: until every request of epoch `grace` and before has
    uint32_t grace = 0;
    // volume_frozen.cc
    uint32_t cursor = 0;
    bool settled = true;         // every page's copies are equal, as far as known
    std::unique_ptr<PageBuffer> pages;
    std::array<PageIo, 8> io;
    std::vector<SlabRun> slabs;
  };
  uint64_t layer_address(uint32_t slot) const {
    return environment_.superblock->layer_table_offset + uint64_t{slot} * 2 * format::kPageSize;
  }
  void cut_io(uint32_t io, IoOp op, uint64_t offset, size_t at, size_t length, void (*done)(IoRequest*, int));
  Status cut_refusal(const LayerSpec& top, const SnapshotInfo& snapshot) const;  // locked
  void cut_read();               // locked
  void cut_have_records(int error);
  Status cut_prepare();          // locked
  void cut_blot();               // locked
  void cut_blotted(int error);
  void cut_hold();               // locked
  void cut_write_records();      // locked
  void cut_record_written(int error);
  void cut_commit();             // locked
  void cut_committed();          // locked: one copy of the record is durable
  void cut_end(Status status);   // locked

  // ---- volume_frozen.cc
  enum FrozenStep : uint32_t { kRecordLook, kRetire, kRelease, kEqualise, kBarrier, kRecordRead, kRecordWrite, kReport };
  struct FrozenTask : Task {
    VolumeImpl* volume = nullptr;
  };
  void frozen_begin();           // locked
  void frozen_read_record();     // locked
  void frozen_post();            // locked: the next batch
  void frozen_step();            // locked
  void frozen_grace();           // locked
  bool retire_some();            // locked: images and limbo of the frozen layer; false: more to do
  void retire(uint32_t hot_index);
  bool release_some();
  bool equalise_some();
  void equalise_read(PageIo& io, int error);
  void equalise_written(PageIo& io, int error);
  bool report_some();
  void frozen_record(uint32_t copy);
  void frozen_io_done(int error);
  // ---- volume_forget.cc
  struct Forget {
    uint32_t epoch = 0;
    bool waiting = false;
  };
  using IsWanted = std::function<bool(uint64_t number, uint64_t generation)>;
  Status find_forgotten(const IsWanted& is_wanted, const std::vector<bool>& leaving, std::vector<uint32_t>* found) const;
  void forget_found(const std::vector<uint32_t>& found);  // locked
  void forget_slab(uint32_t slab);                        // locked
  void forget_claims(const IsWanted& is_wanted, const std::vector<uint64_t>& layers);  // locked
  void drop_layers(const std::vector<bool>& leaving);     // locked: they have no slab
  void forget_check();                                    // locked

  // ---- volume_learn.cc
  struct Learn {
    struct One {
      uint64_t number;
      uint64_t generation;
    };
    size_t layer = 0;
    std::vector<One> slabs;
    size_t next = 0;
    size_t reading = 0;
    std::unordered_map<uint64_t, uint32_t> known;  // by number: index of the layer's slabs
    PageIo io;
    std::unique_ptr<PageBuffer> pages;
  };
  void learn_read();                                       // locked
  void learn_have(int error);
  Status learn_pair(const Learn::One& one, const format::SlabPage& a, const format::SlabPage& b);  // locked
  Status learn_refusal(const Learn::One& one, const format::SlabPage& page, uint32_t index) const;  // locked

  // ---- volume_compact.cc
  static constexpr uint32_t kCopyDepth = 8;
  static constexpr uint32_t kCopyChunks = 32;
  struct Compact {
    enum class Stage : uint8_t {
      kLook,   // its task is posted: what comes next
      kGrace,  // chunks are marked; requests that came before may still be at them
      kPlan,   // its task is posted: they have ended
      kRead,
      kWrite,
      kRest,   // until its timer
      kFlush,  // nothing is moved any more
    };
    struct Source {
      uint32_t slab;
      uint64_t number;
      uint64_t generation;
    };
    struct Copy {
      uint32_t chunk;
      uint16_t blocks;
      uint16_t zeros;
      Place place;            // in the top; its slab's image is pinned
    };
    struct Piece {            // blocks in a row, on the disk and in the buffer
      uint64_t disk;
      uint32_t at;
      uint32_t length;
      uint32_t slab;
    };
    Stage stage = Stage::kLook;
    Executor* home = nullptr;
    CompactDone done;
    CompactReport report;
    uint64_t max_blocks = 0;
    uint64_t needed_max = 0;        // chunks that a slab may cost
    bool stop = false;
    std::vector<bool> from;         // by layer
    std::vector<Source> sources;
    size_t source = 0;              // the one that is looked at: its entries, then the chunks of its holes
    uint32_t entry = 0;
    size_t hole = 0;
    uint32_t hole_chunk = 0;        // of that range
    uint32_t needed = 0;
    std::vector<uint32_t> chunks;   // of that slab, with blocks that show
    size_t next_chunk = 0;          // to be moved; at the end while it is still looked for more
    std::vector<Copy> copies;       // of this batch
    std::vector<Piece> pieces;
    size_t next_piece = 0;
    uint32_t outstanding = 0;
    uint32_t depth = 0;
    int error = 0;
    uint32_t grace = 0;
    uint32_t epoch = 0;             // held while places are
    uint64_t begun_ns = 0;
    uint64_t requests = 0;          // that had come when the batch began
    bool users = false;
    uint64_t lacking_since_ns = 0;
    std::unique_ptr<PageBuffer> buffer;
    std::array<PageIo, kCopyDepth> io;
    FlushWaiter flush;
  };
  struct CompactTask : Task {
    VolumeImpl* volume = nullptr;
  };
  bool copying(uint32_t chunk) const {  // locked: writes to it have to wait
    for (uint32_t one : copying_) {
      if (one == chunk) return true;
    }
    return false;
  }
  uint16_t still_shown(uint32_t layer, uint32_t chunk, uint16_t blocks, uint64_t* looked) const;  // locked
  bool moving() const { return compact_ != nullptr && compact_->stage != Compact::Stage::kFlush; }
  void compact_post(Compact::Stage stage);  // locked
  void compact_look();                      // locked, like all of these
  bool compact_look_entries(uint64_t* looked);  // false: not yet through
  bool compact_look_holes(uint64_t* looked);
  bool compact_skips(uint32_t needed);
  Need compact_plan_chunk(uint32_t chunk);
  void compact_mark();
  void compact_grace();                     // whenever the grace period has moved on
  void compact_plan();
  void compact_piece(Place place, uint16_t blocks, uint32_t at);
  void compact_leave_epoch();
  void compact_lacks(Need need);
  void compact_submit();
  void compact_io_done(int error);          // unlocked
  void compact_apply();
  void compact_unmark();
  void compact_unmarked();                  // goes on after a batch
  void compact_rest(uint64_t ns);
  void compact_rested(uint64_t number);     // unlocked
  void compact_stop();                      // it ends soon
  void compact_moved();                     // nothing is moved any more: flushed, then answered
  void compact_flushed(int error);          // unlocked
  void compact_end(Status status);
  void hold_moved();                        // a hold may have waited for it
  uint64_t request_count() const { return counters_.reads + counters_.writes + counters_.flushes + counters_.discards; }

  const VolumeEnvironment environment_;
  VolumeSpec spec_;
  BlockDevice& device_;
  PageArena* arena_;
  const uint64_t first_region_;
  const uint32_t usable_chunks_;

  mutable std::mutex mu_;
  State state_ = State::kOpening;
  uint64_t size_bytes_ = 0;
  bool read_only_ = false;
  std::vector<Layer> layers_;  // oldest first; the last one is the writable top
  mutable ChainIndex chain_;
  SlabTable slabs_;
  std::unordered_map<uint32_t, std::vector<format::HoleRange>> slab_holes_;
  uint64_t flush_number_ = 0;
  format::VolumeRecord record_{};
  int record_newest_ = 0;

  // Requests.
  uint64_t active_ = 0;      // registered and not yet finished
  uint64_t background_ = 0;  // the volume's own operations under way
  std::atomic<uint64_t> in_flight_{0};  // I/Os of requests at the device
  RequestState* slot_waiters_ = nullptr;
  RequestState* slot_waiters_tail_ = nullptr;
  RequestState* slab_waiters_ = nullptr;
  RequestState* slab_waiters_tail_ = nullptr;
  uint64_t held_ = 0;

  // Holding writes, and cutting.
  HoldStage stage_ = HoldStage::kNone;
  bool holding_ = false;     // writes and discards that have not begun wait
  bool hold_expired_ = false;  // the time-out came; whoever is under way sees it
  bool hold_lost_ = false;   // hold() had succeeded, and its time is over
  uint64_t changing_ = 0;    // writes and discards that may know a place or will set bits
  RequestState* hold_waiters_ = nullptr;
  RequestState* hold_waiters_tail_ = nullptr;
  uint64_t hold_timeout_ns_ = 0;
  uint64_t hold_since_ = 0;  // ns
  uint64_t held_ns_ = 0;
  uint64_t timer_number_ = 0;
  bool hold_waits_ = false;  // for a compaction to stop moving
  std::shared_ptr<TimerLink> timer_link_;
  std::unique_ptr<Cut> cut_;
  FrozenTask frozen_task_;
  Forget forget_;
  std::unique_ptr<Learn> learn_;

  // Compaction.
  std::unique_ptr<Compact> compact_;
  CompactTask compact_task_;
  uint64_t compact_rests_ = 0;          // the number of its newest timer
  std::vector<uint32_t> copying_;       // chunks whose blocks are being copied, or are about to be
  RequestState* copy_waiters_ = nullptr;
  RequestState* copy_waiters_tail_ = nullptr;

  std::array<uint32_t, kGraceRing> epoch_counts_{};
  uint32_t epoch_ = 1;
  uint32_t oldest_epoch_ = 1;
  VolumeStats counters_;
  uint64_t data_chunks_ = 0;

  // Changed pages.
  static constexpr uint32_t kHotBlock = 32;
  std::vector<std::unique_ptr<HotSlab[]>> hot_blocks_;
  std::vector<uint32_t> hot_free_;
  uint32_t hot_size_ = 0;
  uint32_t hot_live_ = 0;
  std::vector<uint32_t> dirty_;
  std::vector<uint32_t> reclaim_list_;
  std::unique_ptr<PageBuffer> scratch_page_;  // to build images in

  // Flush.
  uint64_t modified_ = 1;  // grows with every completed write or discard
  uint64_t flushed_ = 0;   // its value when the last successful flush started
  bool flush_running_ = false;
  bool flush_wanted_ = false;
  Executor* flush_home_ = nullptr;
  uint64_t flush_start_ = 0;
  FlushWaiter* flush_waiters_ = nullptr;
  FlushWaiter* flush_next_ = nullptr;
  std::vector<uint32_t> flush_queue_;    // dirty when the flush began, not yet frozen
  std::vector<uint32_t> flush_frozen_;   // all that were frozen in this flush
  uint32_t flush_round_first_ = 0;       // of flush_frozen_: this round's
  uint32_t flush_next_write_ = 0;
  uint32_t flush_outstanding_ = 0;
  bool flush_final_ = false;
  int flush_error_ = 0;
  std::unique_ptr<PageBuffer> flush_pages_;
  std::unique_ptr<PageBuffer> flush_found_;  // what stands where a page write failed
  uint32_t flush_capacity_ = 0;
  PageIo flush_barrier_;
  std::array<PageIo, kFlushDepth> flush_io_;

  // Slabs.
  uint32_t list_head_ = kNoIndex;  // live slabs of the top layer with free chunks
  uint32_t current_ = kNoIndex;    // where the next chunk comes from
  uint32_t current_cursor_ = 0;
  uint64_t free_total_ = 0;        // chunks that can be given out at once
  uint64_t top_slabs_ = 0;
  // Slabs of the top layer, for holes; may name some that no longer are, or one twice.
  std::vector<uint32_t> top_list_;
  uint32_t hole_slab_ = 0;         // in top_list_: where the last hole found room
  uint32_t unsettled_ = 0;
  uint32_t unsettled_cursor_ = 0;
  std::vector<Unclaimed> unclaimed_;  // granted or taken, but not claimed
  std::array<Claim, kClaims> claims_;
  uint32_t claiming_ = 0;             // of claims_, those under way
  uint32_t claim_ios_ = 0;            // of theirs, at the device
  PageIo claim_flush_;                // for all of them
  uint64_t ahead_ = 1;                // slabs: see claim_batch()
  uint64_t claimed_ns_ = 0;           // when the last ones were
  Release release_;
  std::deque<uint32_t> release_queue_;
  struct StockTask : Task {
    VolumeImpl* volume = nullptr;
  } stock_task_;
  bool stock_waiting_ = false;
  uint64_t full_since_ = 0;
  struct FullTimer;
  FullTimer* full_timer_ = nullptr;

  // Control.
  Control control_;
  PageIo record_io_;
  std::unique_ptr<PageBuffer> record_page_;
  uint32_t record_stage_ = 0;
  void (*record_then_)(VolumeImpl* self, int error) = nullptr;
  void (*record_half_)(VolumeImpl* self) = nullptr;
  VolumeOpener* opener_ = nullptr;  // while it is being opened
  struct AbortWaiter {
    Executor* home;
    Done done;
  };
  std::vector<AbortWaiter> abort_waiters_;
  std::vector<Finisher*> finishers_;

  // Told outside the lock.
  struct Event {
    Code code;
    std::string message;
  };
  std::vector<Event> events_;
  struct Notice {
    bool claimed;
    uint64_t layer_id;
    uint64_t slab;
    uint64_t generation;
  };
  std::vector<Notice> notices_;
};

}  // namespace holdfast
