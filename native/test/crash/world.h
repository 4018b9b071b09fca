// The world of the crash test: one host, its engine and its agent, the disk, and the books that the metadata service
// would keep. What is checked and why: crash_sim.h. One idea a file:
//   model.h      what a block may hold
//   volumes.cc   volumes and readers: made, opened, closed, stopped, grown; their requests and answers
//   layers.cc    the books of layers and slabs; cuts, clones, deletions
//   jobs.cc      the agent: its way to the disk, strips, forgetting, wipes
//   checks.cc    what the disk must hold, whoever writes it
//   world.cc     crashes, storms and the whole run
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "../crash_sim.h"
#include "../volume_fixture.h"
#include "core/layer_jobs.h"
#include "core/page_arena.h"
#include "core/records.h"
#include "model.h"

namespace holdfast::test::crash {

inline constexpr uint32_t kBlocksPerChunk = format::kBlocksPerChunk;

struct Failure {
  std::string what;
};

struct World;
struct SimVolume;

// The right to open a volume, to write it or to read it; every one has its own epoch.
struct GrantRef {
  uint64_t volume = 0;
  uint64_t epoch = 0;
  bool operator==(const GrantRef&) const = default;
};

// Somebody who has a closed volume open read-only.
struct Reader {
  SimVolume* of = nullptr;
  VolumeSpec spec;  // as it was granted, less what it has forgotten
  std::unique_ptr<Volume> volume;
  bool opening = false;
  bool stopping = false;
  uint64_t outstanding = 0;
  std::map<uint64_t, uint64_t> seen;  // nobody writes: a block shows for ever what it showed first
};

struct Operation {
  VolumeRequest request;
  std::unique_ptr<PageBuffer> buffer;
  World* world = nullptr;
  SimVolume* volume = nullptr;
  Reader* reader = nullptr;
  uint64_t id = 0;
  uint64_t start = 0;
  bool lost = false;  // its engine was killed: nobody hears the answer
  bool answered = false;
  std::vector<std::vector<uint64_t>> readable;  // reads: what each block might hold when it began
};

// A cut that has not been answered, or whose answer is not known. Until it is, any value that a block had when it began,
// or that was written since, may be the snapshot's. The record decides.
struct PendingCut {
  LayerSpec top;
  bool named = false;
  FrozenView view;
};

struct SimVolume {
  enum class State { kClosed, kOpening, kOpen, kStopping, kDeleting };
  uint64_t id = 0;
  uint64_t top = 0;  // its writable layer, by the books
  VolumeSpec spec;
  State state = State::kClosed;
  bool must_take_over = false;
  VolumeSpec opened_spec;  // what the keeper has: as it was opened, with the cuts and without the slabs forgotten since
  std::unique_ptr<Volume> volume;
  std::unique_ptr<PageBuffer> arena_memory;
  std::unique_ptr<PageArena> arena;
  std::list<Reader> readers;
  std::vector<Cell> cells;
  std::set<uint64_t> lineage;  // ids of the volumes whose values it may show
  uint64_t flushed_upto = 0;
  uint64_t outstanding = 0;
  uint64_t outstanding_reads = 0;
  uint64_t size_blocks = 0;    // what has been acknowledged
  uint64_t may_be_blocks = 0;  // what a cut-off growth may have made it
  bool growing = false;
  uint32_t forgetting = 0;
  uint64_t recorded_epoch = 0;   // its record has had this epoch durably: no crash may take it back
  uint64_t recorded_blocks = 0;  // nor this size, once somebody has been told of it
  std::unique_ptr<PendingCut> cut;
  bool cutting = false;                // the engine lives that was asked
  bool compacting = false;             // likewise
  std::optional<LayerSpec> retry;      // the top of a cut that did not happen: the same is asked for again
  std::optional<LayerSpec> repeat;     // the top of a cut that did, though nobody was told: asked for once more
  uint64_t cursor = 0;                 // of its sequential stream

  uint64_t take_cursor(uint64_t blocks) {
    const uint64_t at = cursor % size_blocks;
    cursor = at + blocks;
    return at;
  }
};

struct Layer {
  LayerSpec spec;            // parent: by the books
  uint64_t disk_parent = 0;  // by its record
  std::optional<uint64_t> next_disk_parent;  // what its record may name instead, since a relink was begun
  uint64_t above = 0;        // removed: what was right above it
  bool is_top = false;       // of some volume: it may be written
  bool settled = false;      // frozen, and its cut answered: no engine writes its pages any more
  bool named = false;
  uint32_t children = 0;
  uint32_t disk_children = 0;  // records that name it as their parent
  bool removed = false;        // from its chain
  bool wiped = false;
  std::vector<GrantRef> waiting;  // removed: grants that know it
  std::unique_ptr<FrozenView> view;
  std::set<uint64_t> lineage;  // ids of the volumes whose values it and those below may show
};

// A frozen layer into which blocks were merged. What it shows is not taken from the layers below before every holder has learned it.
struct Learning {
  uint64_t head = 0;
  bool cut_off = true;  // the merge is done once more, and then it is learned
  std::vector<GrantRef> waiting;
};

// Slabs that have left a layer and are wiped when nobody can map them any more.
struct Leaving {
  uint64_t number = 0;
  uint64_t layer = 0;
  std::vector<SlabRun> runs;
  std::vector<GrantRef> waiting;
};

struct SlabInfo {
  enum class Where { kFree, kStock, kLayer, kLeaving, kQuarantine };
  Where where = Where::kFree;
  uint64_t generation = 0;
  uint64_t layer = 0;
};

// The agent's way to the disk: blocking calls, while which everything else goes on. If the power fails meanwhile the
// call ends with an error, and a crash is due.
class AgentDevice final : public SyncDevice {
 public:
  explicit AgentDevice(World& in) : world_(in) {}
  uint64_t size_bytes() const override;
  const std::string& name() const override { return name_; }
  Status read(uint64_t offset, void* buffer, size_t length) override;
  Status write(uint64_t offset, const void* buffer, size_t length) override;
  Status write_durable(uint64_t offset, const void* buffer, size_t length) override;
  Status flush() override;
  Status discard(uint64_t offset, uint64_t length) override;
  Status zero(uint64_t offset, uint64_t length) override;

 private:
  struct Call;
  Status begin(IoOp op, bool fua, uint64_t offset, const void* from, size_t length);
  Status carry_out(std::unique_ptr<Call> call, void* to);

  World& world_;
  std::string name_ = "simulated";
};

struct World final : VolumeObserver {
  World(uint64_t seed_, bool verbose_, const CrashAim& aim_);
  void run();

  [[noreturn]] void fail(const std::string& what) const { throw Failure{what}; }
  void log(const char* format, ...) const __attribute__((format(printf, 2, 3)));
  bool is_page(uint64_t offset) const {
    return offset < superblock.first_region_offset + format::kRegionPagesSize;
  }
  uint64_t page_address(uint64_t slab) const { return format::slab_page_offset(superblock.first_region_offset, slab); }
  uint64_t record_address(const SimVolume& one) const {
    return superblock.volume_table_offset + uint64_t{one.spec.slot} * 2 * kBlock;
  }
  // The copy of a slab's page that serves, as a read would see it now. Not valid: neither.
  Copies newest_page(uint64_t slab, format::SlabPage* page) const;
  // The one that is certain to serve after a power cut, or one that says no less.
  Copies durable_page(uint64_t slab, format::SlabPage* page) const;

  // ---- volumes.cc
  SimVolume& add_volume(uint64_t size_blocks, uint64_t parent);
  void make_volume();
  void open_volume(SimVolume& one);
  void opened(SimVolume& one, bool taking_over, Result<std::unique_ptr<Volume>> result);
  void close_volume(SimVolume& one);
  void stop_volume(SimVolume& one);
  void stop_volume(SimVolume& one, bool closed);
  void grow_volume(SimVolume& one);
  void wait_for(SimVolume& one);
  VolumeEnvironment environment(PageArena* arena);
  Operation& start(SimVolume& one, VolumeOp op, uint64_t block, uint64_t blocks, bool fua);
  void start_reading(Reader& reader, uint64_t block, uint64_t blocks);
  Operation& submit(SimVolume& one, Reader* reader, std::unique_ptr<Operation> owned);
  void answered(Operation& o, int error);
  void read_answered(Operation& o);
  void random_operation(SimVolume& one);
  void random_read(Reader& reader);
  [[noreturn]] void wrong(const SimVolume& one, uint64_t block, uint64_t value, const char* when) const;
  uint64_t value_of(const std::byte* memory, uint64_t block) const;
  void prune(SimVolume& one, Cell& cell) const;
  void verify_all(SimVolume& one);
  void read_now(Volume& volume, uint64_t first, uint64_t count, std::byte* to);
  std::vector<SimVolume*> in_state(SimVolume::State state);
  std::vector<Reader*> open_readers();
  void add_reader(SimVolume& one);
  void open_reader(Reader& reader);
  void drop_reader(Reader& reader);
  void drop_readers(SimVolume& one);
  bool may_open(const SimVolume& one) const {
    return one.state == SimVolume::State::kClosed && one.readers.empty();
  }

  // ---- layers.cc: slabs
  void slab_claimed(uint64_t volume_id, uint64_t layer, uint64_t slab, uint64_t generation) override;
  void slab_emptied(uint64_t volume_id, uint64_t layer, uint64_t slab, uint64_t generation) override;
  void volume_event(uint64_t volume_id, Code, const std::string& message) override;
  void grant(uint64_t slab);
  void refill(uint64_t count);
  void sort_by_page(uint64_t slab);
  void sort_slabs_by_pages();
  void release_stock_of_the_dead();
  std::vector<SlabRun> slabs_of(uint64_t layer) const;
  // ---- layers.cc: layers
  Layer& layer(uint64_t id);
  LayerSpec new_layer(uint64_t parent);
  void attach(const LayerSpec& spec);
  std::vector<LayerSpec> chain_of(uint64_t id);
  std::vector<GrantRef> grants_over(uint64_t id);
  bool still_out(const GrantRef& ref);
  void layer_gone(uint64_t id);
  void forget_tombstones(uint64_t id);
  void begin_cut(SimVolume& one);
  void snapshot(SimVolume& one);
  Status write_cut(SimVolume& one);
  void cut_volume(SimVolume& one);
  void compact_volume(SimVolume& one);
  void repeat_cut(SimVolume& one);
  void cut_happened(SimVolume& one, bool answered);
  void cut_failed(SimVolume& one);
  void set_top(SimVolume& one, bool there);
  bool resolve_cut(SimVolume& one);
  void check_view(Layer& one);
  void check_views();
  void make_clone();
  void drop_name();
  void delete_volume();

  // ---- jobs.cc
  struct Work {
    enum Kind { kForget, kForgetLayer, kLearn, kWipeSlabs, kWipeVolume, kWipeLayer, kRemove, kStrip, kMerge } kind;
    uint64_t id;
  };
  std::vector<Work> reclaimable(bool strips);
  void carry_out(const Work& work);
  void reclaim();
  void finish_reclaim();
  void strip(uint64_t newest);
  void strip_in_a_storm();
  void strip_ended(const std::vector<LayerSpec>& victims, const StripReport& report);
  bool is_folded(const Layer& one) const;
  bool may_strip(const Layer& one) const;
  const Layer& child_of(const Layer& one) const;
  void ask_to_forget(const std::vector<GrantRef>& waiting, const std::vector<SlabRun>& runs,
                     const std::vector<uint64_t>& gone, void (World::*then)(uint64_t id, GrantRef ref), uint64_t id);
  void forgotten(uint64_t number, GrantRef ref);
  void layer_forgotten(uint64_t id, GrantRef ref);
  std::vector<LayerSpec> segment_from(uint64_t newest);
  void merge(uint64_t id);
  void give_slabs(uint64_t id, uint64_t count);
  void ask_to_learn(const Learning& one);
  void learned(uint64_t head, GrantRef ref, const std::vector<SlabRun>& slabs);
  bool being_learned(uint64_t newest);
  void drop_from_specs(const GrantRef& ref, const std::function<void(VolumeSpec&)>& drop);
  uint64_t living_from(uint64_t id);
  const Layer* head_above(const Layer& one);
  bool relink(uint64_t id);
  void free_slabs(const std::vector<SlabRun>& runs);
  void wipe_leaving(uint64_t number);
  void wipe_layer(uint64_t id);
  void wipe_deleted(SimVolume& one);
  void remove_from_chain(uint64_t id);
  bool job_done(const char* what, const Status& status);
  void bystander();
  void aim(CrashAim::At what);
  void aim_over(CrashAim::At what);

  // ---- checks.cc
  void submitted(const IoRequest& request);
  void check_claimed(uint64_t slab, uint64_t layer);
  void check_given_back(uint64_t slab, uint64_t generation);
  void check_overwrite(uint64_t address);
  void check_discard(uint64_t slab);
  void note_records();
  void check_records();
  void check_chain(const SimVolume& one, uint64_t top);
  void check_pages();
  void check_equal_copies(const SimVolume& one);
  void check_emptied(uint64_t slab, uint64_t generation, uint64_t layer);
  void format_pool();
  void check_whole_pool(const char* when);
  void damage_pages();
  using Coverage = std::map<uint32_t, uint16_t>;  // by chunk
  static void add_coverage(const format::SlabPage& page, Coverage* to);
  void add_coverage(const LayerSpec& of, Coverage* to, bool durable = false) const;
  void check_page_of_job(uint64_t address, const void* content);
  void check_strip_write(uint64_t slab, const format::SlabPage& before, const format::SlabPage& after) const;
  void check_merge_write(uint64_t slab, const format::SlabPage& before, const format::SlabPage& after) const;
  void check_merge_data(uint64_t slab, const IoRequest& request) const;
  void check_no_claim(const GrantRef& ref, const std::function<bool(const PageArena::Claim&)>& of) const;
  void check_stripped(const LayerSpec& victim, const Coverage& covered) const;

  // ---- world.cc
  bool step();
  bool crash_due() const { return disk.fuse_blown(); }  // whatever goes on now goes no further
  void settle();
  void settle_answers();
  void end_engine();
  void settle_dead();
  void crash(bool power);
  void kill_engine();
  void cut_power();
  void storm();
  void flush_all();
  void set_errors();
  void draw();
  bool change_layers();
  void change_volumes();

  uint64_t seed;
  bool verbose;
  CrashAim aimed;
  uint32_t aimed_seen = 0;
  bool armed = false;  // the aimed crash is due in what goes on now
  SimRandom random;
  format::Superblock superblock;
  SimExecutor executor;
  SimDisk disk;
  AgentDevice agent{*this};
  TestStock stock;
  std::map<uint64_t, SlabInfo> slabs;
  std::map<uint64_t, Layer> layers;
  std::set<uint32_t> layer_slots;
  std::set<uint32_t> volume_slots;
  std::list<Leaving> leaving;
  std::list<Learning> learning;
  uint64_t merging = 0;    // the frozen layer that a merge is writing to
  std::vector<LayerSpec> stripping;  // the head, and the victims under it, of the strip that is under way
  std::set<uint64_t> given_up;  // tops of cuts that did not happen: a record may speak of them
  std::vector<std::unique_ptr<SimVolume>> volumes;
  std::map<Operation*, std::unique_ptr<Operation>> operations;
  CrashResult result;
  uint64_t now = 1;
  uint64_t next_layer = 1;
  uint64_t next_volume = 1;
  uint64_t next_leaving = 1;
  bool ignoring = false;
  bool errors_on = false;
  bool damaged = false;
  bool job_running = false;
  uint64_t kill_due = 0;  // when the engine is killed at the latest; 0: nobody said
  uint64_t page_writes = 0;
  std::set<uint64_t> wiped;  // slabs that left a layer, were wiped, and are nobody's yet
  std::set<std::string> unnamed;  // damaged pages of which no event has spoken yet

  // Drawn for the run.
  uint64_t error_chance = 0;
  uint64_t page_error_chance = 0;
  uint32_t again_chance = 0;
  uint32_t aim_chance = 0;
  uint32_t aim_jobs_chance = 0;
  uint64_t kill_share = 0;
  uint32_t chunks_per_slab = 0;
  uint64_t max_chunks = 0;
  uint64_t slab_total = 0;
  size_t arena_bytes = 0;
  size_t max_layers = 1;
  size_t max_volumes = 1;
  uint32_t job_chance = 0;
  uint32_t bystander_chance = 0;
  uint32_t snapshot_chance = 600;
  uint64_t weight_write = 0;
  uint64_t weight_read = 0;
  uint64_t weight_flush = 0;
  uint64_t weight_discard = 0;
  uint64_t weight_total = 0;
  uint32_t fua_chance = 0;
  uint32_t wide_discards = 0;
  uint32_t wide_writes = 0;
  uint64_t hot_chunk = 0;
  uint64_t depth = 0;
  uint64_t lazy = 0;
  uint64_t crash_chance = 0;
};

inline unsigned long long ull(uint64_t number) { return number; }

}  // namespace holdfast::test::crash
