// The engine as the agent uses it: pools, volumes, and what happens to them when the process dies. No N-API in here;
// src/addon puts these calls on threads of their own and their answers into promises.
//
// Three sorts of threads: workers (the data path; they never block), one lease thread per pool, and control threads,
// on which every call below runs and may block. The calls are thread-safe; those on one volume wait for each other.
//
// What must survive a kill stands in the keeper before it is needed: "pool/<uuid>" with the stock of slabs, and
// "volume/<uuid>/<volume id>" with the FUSE connection, the page images and the grant (DESIGN 5.3).
#pragma once

#include <atomic>
#include <deque>
#include <condition_variable>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/gate.h"
#include "core/lease.h"
#include "core/page_arena.h"
#include "core/pages.h"
#include "core/pool.h"
#include "core/records.h"
#include "core/sync_device.h"
#include "core/volume.h"
#include "io/fuse_session.h"
#include "io/keeper_client.h"
#include "io/shared_memory.h"
#include "io/spec_codec.h"
#include "io/stock.h"
#include "io/uring_device.h"
#include "io/worker.h"

namespace holdfast {

struct EngineEvent {
  enum class Type { kSlabsLow, kSlabClaimed, kSlabEmptied, kLease, kVolume };
  Type type = Type::kLease;
  format::Uuid pool{};
  uint64_t volume_id = 0;
  uint64_t layer_id = 0;
  uint64_t slab = 0;
  uint64_t generation = 0;
  uint32_t wanted = 0;
  LeaseState lease = LeaseState::kHeld;
  Code code = Code::kOk;
  std::string message;
};
// Any thread; must not block.
using EventSink = std::function<void(EngineEvent)>;

class Engine;
class EnginePool;

class EngineVolume : public std::enable_shared_from_this<EngineVolume> {
 public:
  // Without a device it can't be taken over from: for maintenance, when nobody else has it open.
  EngineVolume(std::shared_ptr<EnginePool> pool, VolumeSpec spec, bool with_device = true);
  ~EngineVolume();

  Status grow(uint64_t size_bytes);
  Status close();
  Status revoke();
  Status detach();
  // See Volume. hold() and cut() give way to a revocation.
  Status hold(uint32_t timeout_ms);
  Status release();
  Result<CutReport> cut(LayerSpec top, const SnapshotInfo& snapshot, uint32_t timeout_ms);
  Status forget(const std::vector<SlabRun>& slabs, const std::vector<uint64_t>& layers);
  Status learn(const LayerSlabs& layer);
  // Nobody waits for it: hold(), cut(), close() and a revocation end it.
  Result<CompactReport> compact(const std::vector<LayerSlabs>& sources, uint32_t skip_above_permille,
                                uint64_t max_blocks);
  VolumeStats stats() const;
  VolumeSpec spec() const;         // size as grown, layers as cut
  std::string device_path() const;
  std::string reason() const;      // why this frontend, and what is not as it should be

 private:
  friend class EnginePool;
  friend class Engine;
  // kOpen serves. kDetached: the device is gone, the volume could not be closed yet. kDead answers EIO until the
  // device is detached. kGone: nothing is left.
  enum class State { kOpen, kDetached, kDead, kGone };

  Status open();
  // `entry` is what the keeper has; its descriptors are taken. Never fails for the volume's sake: what can't be
  // served answers EIO.
  Status adopt(KeptEntry entry);
  Status open_volume(bool taking_over);
  Status attach();
  bool learn_record();
  Status settle_device(bool grown, bool changed);
  Status keep();                   // all of it to the keeper
  Status keep_spec();              // the same, with the spec as it is now
  template <typename T>
  T begin_and_wait(const std::function<void(Volume&, std::function<void(T)>)>& begin);
  template <typename T>
  Result<std::future<std::shared_ptr<T>>> begin(const std::function<void(Volume&, std::function<void(T)>)>& call);
  Status note();                   // the keeper's blob only
  std::string entry_name() const;
  std::string export_blob() const;
  KeeperLoop loop(bool ignore_sync) const;
  // Gate shut, EIO to everything, nothing in flight. From any thread but a worker's. No record is written.
  void kill(const std::string& why);
  State state() const;
  Status not_open() const;
  Status close_volume();
  Status finish();
  void drop_volume();              // destroys the Volume; nothing may be in flight
  void drop_volume_after_abort();
  void stop_session();
  void drop_session();
  void release_memory();
  bool still_ours(Status* held);   // after a lease gap
  Status let_go(unsigned timeout_ms);
  Worker& home() const;
  std::vector<Worker*> workers_in_turn() const;

  std::shared_ptr<EnginePool> pool_;
  const unsigned home_;            // its own worker, by number
  const bool with_device_;
  std::mutex control_;             // one control call at a time; before volume_calls_
  std::mutex volume_calls_;        // Volume::grow, close and abort exclude each other
  mutable std::mutex state_mutex_; // the fields below it
  VolumeSpec spec_;
  State state_ = State::kOpen;
  int loop_number_ = -1;
  std::string note_;               // of the loop device's queue
  std::string dead_why_;
  std::shared_ptr<FuseSession> session_;
  std::unique_ptr<SharedMemory> arena_memory_;
  std::unique_ptr<PageArena> arena_;
  std::unique_ptr<SharedMemory> spec_memory_;
  std::vector<PageArena::Claim> adopted_claims_;  // as a dead engine left them
  std::unique_ptr<VolumeGate> gate_;
  std::unique_ptr<GatedDevice> device_;
  std::unique_ptr<Volume> volume_;
};

// A pool, and how much of its device is not used yet.
struct PoolRoom {
  PoolInfo info;
  uint64_t device_bytes = 0;       // of the device, now
  uint64_t slabs_possible = 0;     // if the pool grew into it
};

class EnginePool final : public std::enable_shared_from_this<EnginePool>, private VolumeObserver {
 public:
  EnginePool(std::shared_ptr<Engine> engine, PoolSpec spec);
  ~EnginePool() override;

  // As it is now. References stay good for as long as the pool: what a pool was before it grew is kept.
  const PoolInfo& info() const { return *info_.load(std::memory_order_acquire); }
  // Measures the device and reads the superblock again, so that slabs which some host has added are usable here too.
  // kTooSmall: the device is smaller than the pool.
  Result<PoolRoom> look();
  // Adds the slabs for which the device has room, as far as `limit_bytes` of it. Needs the lease. One host at a time:
  // it writes pages of slabs that nobody has.
  Result<PoolRoom> grow(uint64_t limit_bytes);
  const PoolSpec& spec() const { return spec_; }
  LeaseState lease_state() const;
  std::vector<std::shared_ptr<EngineVolume>> volumes() const;
  Result<std::shared_ptr<EngineVolume>> open_volume(VolumeSpec spec, bool with_device = true);
  Status add_slabs(const std::vector<SlabRun>& runs);
  Stock& stock() { return *stock_; }
  // While somebody holds one, close() waits and device() stands. Null: closed.
  struct Use;
  std::shared_ptr<Use> use();
  // Reads need no lease; writes through it do.
  SyncDevice& device() { return *gated_; }
  // All volumes closed or detached (kBusy). stopped(generation) on disk.
  Status close();
  // Every volume dead, zero in flight, stopped(generation) on disk.
  Status stop();

 private:
  friend class Engine;
  friend class EngineVolume;
  enum class Ask { kNothing, kStop, kLeave };

  Status open(bool taking_over);
  Status open_node(bool wait);
  void close_device();             // when nobody uses it
  void close_fd();
  Status join(bool taking_over);
  Status keep();
  void start_lease_thread();
  void lease_loop();
  Status apply(const LeaseOutcome& outcome);
  Status after_gap();
  Status end_life(LeaseState state, const std::string& why);  // lease thread, or before it runs
  Status ask_lease_thread(Ask ask);
  void adopt_volumes();
  void learn(PoolInfo info);
  void watch_lease();              // housekeeping: tells when the lease state changes
  Status let_go(unsigned timeout_ms);
  void remove(EngineVolume* volume);
  void emit(EngineEvent event) const;
  void emit_volume(uint64_t volume_id, Code code, std::string message) const;

  void slab_claimed(uint64_t volume_id, uint64_t layer_id, uint64_t slab, uint64_t generation) override;
  void slab_emptied(uint64_t volume_id, uint64_t layer_id, uint64_t slab, uint64_t generation) override;
  void volume_event(uint64_t volume_id, Code code, const std::string& message) override;

  std::shared_ptr<Engine> engine_;
  PoolSpec spec_;
  mutable std::mutex infos_mutex_;
  std::deque<PoolInfo> infos_;     // each that ever was info(): volumes point into them
  std::atomic<const PoolInfo*> info_{nullptr};
  int fd_ = -1;                    // carries the flock and all I/O
  std::unique_ptr<FdDevice> sync_;
  std::unique_ptr<UringDevice> uring_;
  std::unique_ptr<PoolGate> gate_;
  std::unique_ptr<GatedSyncDevice> gated_;
  std::unique_ptr<Lease> lease_;   // lease thread
  std::unique_ptr<Stock> stock_;

  std::mutex use_mutex_;
  std::condition_variable unused_;
  unsigned uses_ = 0;
  bool closed_ = false;

  mutable std::mutex volumes_mutex_;
  std::map<uint64_t, std::shared_ptr<EngineVolume>> volumes_;
  bool closing_ = false;

  std::mutex lease_mutex_;
  std::condition_variable lease_wake_;
  Ask ask_ = Ask::kNothing;
  bool lease_done_ = false;
  Status end_status_;
  std::thread lease_thread_;
  std::atomic<LeaseState> life_{LeaseState::kHeld};  // kFenced and kStopped are for good
  std::string lease_message_;      // why it is held; under lease_mutex_
  LeaseState told_ = LeaseState::kHeld;  // housekeeping
};

struct EngineOptions {
  std::string keeper_socket;
  unsigned workers = 0;            // 0: the number of CPUs, at least 2, at most 8
  // The longest that a worker polls before it sleeps (worker.h); 0: never.
  uint64_t poll_ns = kDefaultPollNs;
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  static Result<std::shared_ptr<Engine>> create(const EngineOptions& options, EventSink sink);
  ~Engine();

  Result<std::vector<std::shared_ptr<EnginePool>>> adopt();
  Result<std::shared_ptr<EnginePool>> open_pool(const PoolSpec& spec);
  std::vector<std::shared_ptr<EnginePool>> pools() const;
  // Stops reading requests, drains, lets go; the keeper keeps the devices. kBusy: something could not be drained on a
  // kernel that cannot send requests again; nothing has changed then.
  Status hand_over(unsigned timeout_ms = 30'000);
  // kBusy while a pool is open. Threads joined.
  Status destroy();

 private:
  friend class EnginePool;
  friend class EngineVolume;
  Engine() = default;
  void housekeep();
  void check_keeper();

  EventSink sink_;
  std::unique_ptr<KeeperClient> keeper_;
  std::vector<std::unique_ptr<Worker>> workers_;
  mutable std::mutex pools_mutex_;
  std::map<format::Uuid, std::shared_ptr<EnginePool>> pools_;
  std::atomic<unsigned> next_worker_{0};

  std::thread housekeeper_;
  std::mutex housekeeping_mutex_;
  std::condition_variable housekeeping_wake_;
  bool housekeeping_stop_ = false;
};

uint64_t boottime_ns();

}  // namespace holdfast
