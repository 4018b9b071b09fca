// One pool of an engine: the private device node with its flock, the lease thread, the end of a life. See engine.h.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>
#include <utility>

#include "io/await.h"
#include "io/engine.h"

namespace holdfast {

namespace {

constexpr uint64_t kIdleWaitMs = 10'000;  // between two looks while waiting for the last I/O
constexpr int kStoppedTries = 5;

uint64_t unix_ms() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return uint64_t(now.tv_sec) * 1000 + uint64_t(now.tv_nsec) / 1'000'000;
}

uint64_t random_u64() {
  uint64_t value = 0;
  const ssize_t got = getrandom(&value, sizeof value, 0);
  HF_ASSERT(got == ssize_t(sizeof value));
  return value;
}

std::string with_errno(const std::string& what) { return what + ": " + std::strerror(errno); }

std::string pool_entry_name(const format::Uuid& uuid) { return "pool/" + uuid_text(uuid); }

}  // namespace

EnginePool::EnginePool(std::shared_ptr<Engine> engine, PoolSpec spec)
    : engine_(std::move(engine)), spec_(std::move(spec)) {
  learn({});
}

EnginePool::~EnginePool() {
  HF_ASSERT(!lease_thread_.joinable());
  HF_ASSERT(volumes_.empty());
  if (fd_ >= 0) close_fd();
}

void EnginePool::emit(EngineEvent event) const {
  event.pool = spec_.uuid;
  engine_->sink_(std::move(event));
}

void EnginePool::emit_volume(uint64_t volume_id, Code code, std::string message) const {
  EngineEvent event;
  event.type = EngineEvent::Type::kVolume;
  event.volume_id = volume_id;
  event.code = code;
  event.message = std::move(message);
  emit(std::move(event));
}

void EnginePool::slab_claimed(uint64_t volume_id, uint64_t layer_id, uint64_t slab, uint64_t generation) {
  EngineEvent event;
  event.type = EngineEvent::Type::kSlabClaimed;
  event.volume_id = volume_id;
  event.layer_id = layer_id;
  event.slab = slab;
  event.generation = generation;
  emit(std::move(event));
}

void EnginePool::slab_emptied(uint64_t volume_id, uint64_t layer_id, uint64_t slab, uint64_t generation) {
  EngineEvent event;
  event.type = EngineEvent::Type::kSlabEmptied;
  event.volume_id = volume_id;
  event.layer_id = layer_id;
  event.slab = slab;
  event.generation = generation;
  emit(std::move(event));
}

void EnginePool::volume_event(uint64_t volume_id, Code code, const std::string& message) {
  emit_volume(volume_id, code, message);
}

// --- opening -----------------------------------------------------------------------------------------------------

void EnginePool::close_fd() {
  ::close(fd_);  // the flock goes with the last I/O on it
  fd_ = -1;
}

// The engine's own node of the device. flock belongs to the node's inode, so a node of one's own makes the lock say
// "this node's engine", not "anybody who has this disk open".
Status EnginePool::open_node(bool wait) {
  struct stat device{};
  if (stat(spec_.device_path.c_str(), &device) != 0) {
    return {Code::kNotFound, with_errno("pool device " + spec_.device_path)};
  }
  if (!S_ISBLK(device.st_mode)) {
    return {Code::kInvalidArgument, spec_.device_path + " is not a block device; give an image file a loop device"};
  }
  struct stat node{};
  if (lstat(spec_.lock_path.c_str(), &node) == 0) {
    if (!S_ISBLK(node.st_mode) || node.st_rdev != device.st_rdev) {
      // Another device's, from before a reboot or a re-plug. Only replaced when nobody's I/O stands behind it.
      Result<bool> is_free = S_ISBLK(node.st_mode) ? lock_is_free(spec_.lock_path) : Result<bool>(true);
      if (is_free.ok() && !*is_free) {
        return {Code::kBusy, spec_.lock_path + " is the node of another device and an engine still has it open; wait "
                                               "until that engine's I/O is over"};
      }
      if (unlink(spec_.lock_path.c_str()) != 0) return {Code::kIo, with_errno(spec_.lock_path + " cannot be replaced")};
    }
  }
  if (mknod(spec_.lock_path.c_str(), S_IFBLK | 0600, device.st_rdev) != 0 && errno != EEXIST) {
    return {Code::kIo, with_errno("device node " + spec_.lock_path + " cannot be made") +
                           "; its directory must exist, and the engine needs CAP_MKNOD"};
  }
  fd_ = ::open(spec_.lock_path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
  if (fd_ < 0) {
    return {Code::kIo, with_errno("device node " + spec_.lock_path + " cannot be opened") +
                           (errno == EACCES ? "; its file system must not be mounted nodev" : "")};
  }
  bool told = false;
  for (unsigned waited_ms = 0; flock(fd_, LOCK_EX | LOCK_NB) != 0; waited_ms += 5) {
    if (errno != EWOULDBLOCK && errno != EINTR) {
      Status status{Code::kIo, with_errno(spec_.lock_path + " cannot be locked")};
      close_fd();
      return status;
    }
    if (!wait) {
      close_fd();
      return {Code::kBusy, "an engine has pool " + uuid_text(spec_.uuid) + " open at " + spec_.lock_path +
                               ", or its last I/O is not over; end that engine and try again"};
    }
    if (waited_ms >= 3000 && !told) {
      told = true;
      EngineEvent event;
      event.type = EngineEvent::Type::kLease;
      event.lease = LeaseState::kHeld;
      event.message = "waiting until the I/O of the engine before is over (flock on " + spec_.lock_path + ")";
      emit(std::move(event));
    }
    timespec pause{0, 5'000'000};
    nanosleep(&pause, nullptr);
  }
  return {};
}

Status EnginePool::open(bool taking_over) {
  Status status = open_node(taking_over);
  if (!status.ok()) return status;
  status = join(taking_over);
  if (status.ok() && !taking_over) status = keep();
  if (!status.ok()) {
    if (lease_ != nullptr && gate_ != nullptr && !taking_over && life_ == LeaseState::kValid) {
      gate_->fence();
      // The error that is being reported says more than what this could add.
      [[maybe_unused]] Status stopped = lease_->write_stopped();
    }
    close_fd();
    return status;
  }
  start_lease_thread();
  return {};
}

Status EnginePool::join(bool taking_over) {
  Result<std::unique_ptr<FdDevice>> device = FdDevice::borrow(fd_, spec_.device_path);
  if (!device.ok()) return device.status;
  sync_ = std::move(*device);
  Result<PoolInfo> found = read_pool_at(*sync_);
  if (!found.ok()) return found.status;
  learn(std::move(*found));
  if (info().uuid != spec_.uuid) {
    return {Code::kWrongPool, spec_.device_path + " holds pool " + uuid_text(info().uuid) + ", not " +
                                  uuid_text(spec_.uuid)};
  }
  if (info().read_only) {
    return {Code::kUnsupported, "pool " + uuid_text(spec_.uuid) +
                                    " has a feature that this release may only read past; use a newer release"};
  }
  if (spec_.host_id >= info().host_slots) {
    return {Code::kInvalidArgument, "host id " + std::to_string(spec_.host_id) + " is past the pool's " +
                                        std::to_string(info().host_slots) + " host slots"};
  }
  uring_ = std::make_unique<UringDevice>(fd_, sync_->size_bytes());
  gate_ = std::make_unique<PoolGate>([] { return boottime_ns(); });
  uring_->set_gate(gate_.get());
  gated_ = std::make_unique<GatedSyncDevice>(*sync_, *gate_);
  if (stock_ == nullptr) {
    Result<std::unique_ptr<SharedMemory>> table = SharedMemory::create("holdfast-stock", Stock::kTableBytes);
    if (!table.ok()) return table.status;
    stock_ = std::make_unique<Stock>(std::move(*table), [this](uint32_t wanted) {
      EngineEvent event;
      event.type = EngineEvent::Type::kSlabsLow;
      event.wanted = wanted;
      emit(std::move(event));
    });
  }
  LeaseOptions options;
  options.superblock = info().superblock;
  options.host_id = spec_.host_id;
  options.generation = spec_.generation;
  options.node_name = spec_.node_name;
  options.machine_id = spec_.machine_id;
  options.boot_id = spec_.boot_id;
  options.taking_over = taking_over;
  LeaseEnvironment environment;
  environment.device = sync_.get();
  environment.now_ns = [] { return boottime_ns(); };
  environment.random = [] { return random_u64(); };
  environment.unix_ms = [] { return unix_ms(); };
  environment.after_gap = [this] { return after_gap(); };
  lease_ = std::make_unique<Lease>(options, environment);
  for (;;) {
    const LeaseOutcome outcome = lease_->renew();
    Status status = apply(outcome);
    if (outcome.state == LeaseState::kValid) return {};
    if (!taking_over) {
      if (outcome.state == LeaseState::kFenced || outcome.state == LeaseState::kStopped) {
        return outcome.status.ok() ? Status{Code::kFenced, "this host generation is fenced"} : outcome.status;
      }
      return outcome.status.ok() ? Status{Code::kUnavailable, "the pool gave no lease; try again"} : outcome.status;
    }
    // A successor holds the devices of running pods. Fenced: it must still answer them, with EIO. A disk that cannot
    // be read now: they wait, as they would with the engine that died.
    if (outcome.state == LeaseState::kFenced || outcome.state == LeaseState::kStopped) return {};
    EngineEvent event;
    event.type = EngineEvent::Type::kLease;
    event.lease = LeaseState::kHeld;
    event.message = outcome.status.message;
    emit(std::move(event));
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
  }
}

void EnginePool::learn(PoolInfo info) {
  std::lock_guard lock(infos_mutex_);
  infos_.push_back(std::move(info));
  info_.store(&infos_.back(), std::memory_order_release);
}

Result<PoolRoom> EnginePool::look() {
  if (Status status = sync_->measure(); !status.ok()) return status;
  Result<PoolInfo> found = read_pool_at(*sync_);
  if (!found.ok()) return found.status;
  if (found->uuid != spec_.uuid) {
    return Status{Code::kWrongPool, spec_.device_path + " holds pool " + uuid_text(found->uuid) + " now, not " +
                                        uuid_text(spec_.uuid)};
  }
  uring_->set_size(sync_->size_bytes());
  if (found->slab_count > info().slab_count) learn(*found);
  const PoolInfo& now = info();
  return PoolRoom{now, sync_->size_bytes(), slabs_after_growth(now, sync_->size_bytes())};
}

Result<PoolRoom> EnginePool::grow(uint64_t limit_bytes) {
  if (Status status = sync_->measure(); !status.ok()) return status;
  if (sync_->size_bytes() < limit_bytes) {
    return Status{Code::kTooSmall, spec_.device_path + " has " + std::to_string(sync_->size_bytes()) +
                                       " bytes here, and the pool was to grow into " + std::to_string(limit_bytes) +
                                       ". Rescan the device on this machine"};
  }
  Result<PoolInfo> grown = grow_pool(*gated_, info(), {}, limit_bytes);
  if (!grown.ok()) return grown.status;
  return look();
}

Status EnginePool::keep() {
  return engine_->keeper_->put(pool_entry_name(spec_.uuid), encode(spec_), {stock_->table_fd()}, 0);
}

void EnginePool::adopt_volumes() {
  const std::string prefix = "volume/" + uuid_text(spec_.uuid) + "/";
  Result<std::vector<std::string>> names = engine_->keeper_->list();
  if (!names.ok()) {
    emit_volume(0, names.status.code, names.status.message);
    return;
  }
  std::vector<std::thread> threads;
  for (const std::string& name : *names) {
    if (name.rfind(prefix, 0) != 0) continue;
    threads.emplace_back([this, name] {
      Result<KeptEntry> entry = engine_->keeper_->get(name);
      if (!entry.ok()) {
        emit_volume(0, entry.status.code, entry.status.message);
        return;
      }
      auto volume = std::make_shared<EngineVolume>(shared_from_this(), VolumeSpec{});
      Status status = volume->adopt(std::move(*entry));
      if (!status.ok()) {
        emit_volume(0, status.code, name + " cannot be taken over: " + status.message);
        return;
      }
      std::lock_guard lock(volumes_mutex_);
      volumes_[volume->spec().volume_id] = volume;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& volume : volumes()) {
    // A slab that a volume has is not ahead any more, whatever the table still said at the kill.
    for (const PageArena::Claim& claim : volume->adopted_claims_) stock_->forget(claim.slab);
    volume->adopted_claims_.clear();
  }
}

struct EnginePool::Use {
  explicit Use(std::shared_ptr<EnginePool> used) : pool(std::move(used)) {}
  ~Use() {
    std::lock_guard lock(pool->use_mutex_);
    if (--pool->uses_ == 0) pool->unused_.notify_all();
  }
  std::shared_ptr<EnginePool> pool;
};

std::shared_ptr<EnginePool::Use> EnginePool::use() {
  std::lock_guard lock(use_mutex_);
  if (closed_) return nullptr;
  ++uses_;
  return std::make_shared<Use>(shared_from_this());
}

void EnginePool::close_device() {
  std::unique_lock lock(use_mutex_);
  closed_ = true;
  unused_.wait(lock, [this] { return uses_ == 0; });
  close_fd();
}

// --- lease -------------------------------------------------------------------------------------------------------

LeaseState EnginePool::lease_state() const {
  const LeaseState life = life_.load(std::memory_order_acquire);
  if (life == LeaseState::kFenced || life == LeaseState::kStopped) return life;
  return gate_ != nullptr && gate_->open_at(gate_->now_ns()) ? LeaseState::kValid : LeaseState::kHeld;
}

void EnginePool::watch_lease() {
  const LeaseState state = lease_state();
  if (state == told_) return;
  told_ = state;
  EngineEvent event;
  event.type = EngineEvent::Type::kLease;
  event.lease = state;
  {
    std::lock_guard lock(lease_mutex_);
    event.message = state == LeaseState::kValid ? "" : lease_message_;
  }
  if (state == LeaseState::kHeld && event.message.empty()) {
    event.message = "the lease was not renewed in time: I/O is held until the disk answers";
  }
  emit(std::move(event));
}

Status EnginePool::apply(const LeaseOutcome& outcome) {
  {
    std::lock_guard lock(lease_mutex_);
    lease_message_ = outcome.status.message;
  }
  switch (outcome.state) {
    case LeaseState::kValid:
      life_.store(LeaseState::kValid, std::memory_order_release);
      if (outcome.status.ok()) gate_->renew(outcome.deadline_ns);
      return {};
    case LeaseState::kHeld:
      return outcome.status;
    case LeaseState::kFenced:
    case LeaseState::kStopped:
      return end_life(outcome.state, outcome.status.message);
  }
  return {};
}

// After a gap somebody may have fenced single volumes, or granted them anew (DESIGN 6.1).
Status EnginePool::after_gap() {
  for (const auto& volume : volumes()) {
    Status held;
    if (!volume->still_ours(&held)) {
      volume->kill(held.message);
      emit_volume(volume->spec().volume_id, Code::kFenced,
                  "the volume was granted to somebody else while the lease was out: " + held.message);
    } else if (!held.ok()) {
      return held;
    }
  }
  return {};
}

Status EnginePool::end_life(LeaseState state, const std::string& why) {
  const LeaseState before = life_.exchange(state, std::memory_order_acq_rel);
  if (before == LeaseState::kFenced || before == LeaseState::kStopped) {
    life_.store(before, std::memory_order_release);
    return {};
  }
  gate_->fence();
  for (const auto& volume : volumes()) volume->kill(why);
  while (!gate_->wait_idle(kIdleWaitMs)) {
    // The device holds I/O back. stopped(generation) is a proof, so it waits for as long as it takes.
  }
  Status status;
  for (int i = 0; i < kStoppedTries; ++i) {
    status = lease_->write_stopped();
    if (status.ok() || status.code == Code::kStale) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  return status;
}

void EnginePool::start_lease_thread() {
  lease_done_ = false;
  lease_thread_ = std::thread([this] { lease_loop(); });
}

void EnginePool::lease_loop() {
  pthread_setname_np(pthread_self(), "hf-lease");
  setpriority(PRIO_PROCESS, 0, -15);  // of this thread; without CAP_SYS_NICE it stays as it is
  const auto interval = std::chrono::milliseconds(info().renew_interval_ms);
  std::unique_lock lock(lease_mutex_);
  auto next = std::chrono::steady_clock::now() + interval;
  for (;;) {
    lease_wake_.wait_until(lock, next, [this] { return ask_ != Ask::kNothing; });
    const Ask ask = ask_;
    lock.unlock();
    Status status;
    bool over = false;
    if (ask == Ask::kStop) {
      status = end_life(LeaseState::kStopped, "the pool was stopped");
      over = true;
    } else if (ask == Ask::kLeave) {
      over = true;  // the heartbeat stands; a successor goes on with it
    } else {
      const auto begun = std::chrono::steady_clock::now();
      const LeaseOutcome outcome = lease_->renew();
      status = apply(outcome);
      over = outcome.state == LeaseState::kFenced || outcome.state == LeaseState::kStopped;
      // A renewal that failed is tried again soon: the rest of the lease is for that.
      next = begun + (status.ok() && outcome.status.ok() ? interval : interval / 4);
    }
    lock.lock();
    if (over) {
      lease_done_ = true;
      end_status_ = status;
      lease_wake_.notify_all();
      return;
    }
  }
}

Status EnginePool::ask_lease_thread(Ask ask) {
  std::unique_lock lock(lease_mutex_);
  ask_ = ask;
  lease_wake_.notify_all();
  lease_wake_.wait(lock, [this] { return lease_done_; });
  Status status = end_status_;
  lock.unlock();
  if (lease_thread_.joinable()) lease_thread_.join();
  return status;
}

// --- volumes -----------------------------------------------------------------------------------------------------

std::vector<std::shared_ptr<EngineVolume>> EnginePool::volumes() const {
  std::lock_guard lock(volumes_mutex_);
  std::vector<std::shared_ptr<EngineVolume>> volumes;
  for (const auto& [id, volume] : volumes_) {
    if (volume != nullptr) volumes.push_back(volume);
  }
  return volumes;
}

Status EnginePool::add_slabs(const std::vector<SlabRun>& runs) {
  for (const SlabRun& run : runs) {
    if (run.generation == 0 || run.first >= info().slab_count || run.count > info().slab_count - run.first) {
      return {Code::kInvalidArgument, "slabs " + std::to_string(run.first) + " to " +
                                          std::to_string(run.first + run.count) + " (generation " +
                                          std::to_string(run.generation) + ") are not slabs of this pool, which has " +
                                          std::to_string(info().slab_count)};
    }
  }
  return stock_->add(runs);
}

Result<std::shared_ptr<EngineVolume>> EnginePool::open_volume(VolumeSpec spec, bool with_device) {
  spec.host_id = spec_.host_id;
  spec.generation = spec_.generation;
  const uint64_t id = spec.volume_id;
  const LeaseState lease = lease_state();
  if (lease == LeaseState::kFenced || lease == LeaseState::kStopped) {
    return Status{Code::kFenced, "this host generation is " + std::string(lease_state_name(lease)) + " on pool " +
                                     info().name + "; join it again"};
  }
  if (lease != LeaseState::kValid) {
    return Status{Code::kLeaseExpired, "the lease on pool " + info().name + " is held; try again when it is valid"};
  }
  auto volume = std::make_shared<EngineVolume>(shared_from_this(), std::move(spec), with_device);
  {
    std::lock_guard lock(volumes_mutex_);
    if (closing_) return Status{Code::kBusy, "pool " + info().name + " is being closed"};
    if (volumes_.count(id) != 0) {
      return Status{Code::kAlreadyExists, "volume " + std::to_string(id) + " is open here already"};
    }
    volumes_[id] = nullptr;
  }
  Status status = volume->open();
  {
    std::lock_guard lock(volumes_mutex_);
    if (status.ok()) {
      volumes_[id] = volume;
    } else {
      volumes_.erase(id);
    }
  }
  if (!status.ok()) return status;
  // A fence that came between the look above and the entry in the map.
  const LeaseState now = lease_state();
  if (now == LeaseState::kFenced || now == LeaseState::kStopped) volume->kill("the pool was fenced");
  return volume;
}

void EnginePool::remove(EngineVolume* volume) {
  std::lock_guard lock(volumes_mutex_);
  for (auto position = volumes_.begin(); position != volumes_.end(); ++position) {
    if (position->second.get() == volume) {
      volumes_.erase(position);
      return;
    }
  }
}

// --- the end -----------------------------------------------------------------------------------------------------

Status EnginePool::close() {
  {
    std::lock_guard lock(volumes_mutex_);
    if (closing_) return {};
    if (!volumes_.empty()) {
      return {Code::kBusy, std::to_string(volumes_.size()) + " volumes of pool " + info().name +
                               " are open; close or detach them first"};
    }
    closing_ = true;
  }
  Status stopped = ask_lease_thread(Ask::kStop);
  const LeaseState life = life_.load();
  HF_ASSERT(life == LeaseState::kStopped || life == LeaseState::kFenced);
  Status dropped = engine_->keeper_->drop(pool_entry_name(spec_.uuid));
  close_device();
  {
    std::lock_guard lock(engine_->pools_mutex_);
    engine_->pools_.erase(spec_.uuid);
  }
  if (!stopped.ok() && stopped.code != Code::kStale && life == LeaseState::kStopped) return stopped;
  return dropped;
}

Status EnginePool::stop() {
  {
    std::lock_guard lock(volumes_mutex_);
    if (closing_) return {Code::kNotFound, "the pool is closed"};
  }
  return ask_lease_thread(Ask::kStop);
}

Status EnginePool::let_go(unsigned timeout_ms) {
  for (const auto& volume : volumes()) {
    Status status = volume->let_go(timeout_ms);
    if (!status.ok()) return status;
  }
  [[maybe_unused]] Status left = ask_lease_thread(Ask::kLeave);
  {
    std::lock_guard lock(volumes_mutex_);
    volumes_.clear();
    closing_ = true;
  }
  close_device();
  return {};
}

}  // namespace holdfast
