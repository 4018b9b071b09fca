// One open volume of an engine: the volume, its FUSE session, its loop device and its entry at the keeper, in the
// order that makes each step safe to be killed after. See engine.h.
#include <linux/loop.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <future>
#include <string>
#include <utility>

#include "io/await.h"
#include "io/engine.h"

namespace holdfast {

namespace {

constexpr unsigned kAgreeMs = 10'000;
constexpr unsigned kIdleMs = 10'000;  // between two looks
constexpr unsigned kDrainMs = 2000;   // at a hand-over: what is held longer is sent again to the successor
constexpr const char* kReason =
    "fuse: a loop device over the engine's FUSE file, which works on every kernel and in containers";

// Names this opening of the volume: the dead device of an earlier owner may still be attached to the same machine.
std::string volume_label(const VolumeSpec& spec) {
  char label[LO_NAME_SIZE];
  std::string uuid = uuid_text(spec.uuid);
  std::erase(uuid, '-');
  std::snprintf(label, sizeof label, "holdfast:%s:%" PRIx64 ":%" PRIx32, uuid.c_str(), spec.epoch, spec.host_id);
  return label;
}

Result<std::unique_ptr<SharedMemory>> share_spec(const VolumeSpec& spec) {
  const std::string bytes = encode(spec);
  Result<std::unique_ptr<SharedMemory>> memory = SharedMemory::create("holdfast-spec", bytes.size());
  if (memory.ok()) std::memcpy((*memory)->data(), bytes.data(), bytes.size());
  return memory;
}

}  // namespace

EngineVolume::EngineVolume(std::shared_ptr<EnginePool> pool, VolumeSpec spec, bool with_device)
    : pool_(std::move(pool)),
      home_(pool_->engine_->next_worker_.fetch_add(1)),
      with_device_(with_device),
      spec_(std::move(spec)) {}

EngineVolume::~EngineVolume() {
  HF_ASSERT(volume_ == nullptr);
  HF_ASSERT(session_ == nullptr);
}

Worker& EngineVolume::home() const {
  const auto& workers = pool_->engine_->workers_;
  return *workers[home_ % workers.size()];
}

// Its own worker first: that one is woken first, so volumes spread over the workers.
std::vector<Worker*> EngineVolume::workers_in_turn() const {
  const auto& workers = pool_->engine_->workers_;
  std::vector<Worker*> turn;
  for (size_t i = 0; i < workers.size(); ++i) turn.push_back(workers[(home_ + i) % workers.size()].get());
  return turn;
}

std::string EngineVolume::entry_name() const {
  return "volume/" + uuid_text(pool_->spec_.uuid) + "/" + std::to_string(spec().volume_id);
}

VolumeSpec EngineVolume::spec() const {
  std::lock_guard lock(state_mutex_);
  return spec_;
}

std::string EngineVolume::device_path() const {
  std::lock_guard lock(state_mutex_);
  return loop_number_ < 0 ? "" : "/dev/loop" + std::to_string(loop_number_);
}

std::string EngineVolume::reason() const {
  std::lock_guard lock(state_mutex_);
  if (!with_device_) return "no device: open for maintenance";
  return note_.empty() ? kReason : std::string(kReason) + "; " + note_;
}

VolumeStats EngineVolume::stats() const {
  std::lock_guard lock(state_mutex_);
  if (volume_ != nullptr) return volume_->stats();
  VolumeStats stats;
  stats.size_bytes = spec_.size_bytes;
  return stats;
}

KeeperLoop EngineVolume::loop(bool ignore_sync) const {
  std::lock_guard lock(state_mutex_);
  KeeperLoop loop{};
  loop.number = loop_number_;
  loop.ignore_sync = ignore_sync ? 1 : 0;
  volume_label(spec_).copy(loop.label, sizeof loop.label - 1);
  return loop;
}

// --- the keeper's entry ------------------------------------------------------------------------------------------

std::string EngineVolume::export_blob() const {
  std::lock_guard lock(state_mutex_);
  ExportState state;
  if (session_ != nullptr) state.agreement = session_->agreement();
  state.loop_number = loop_number_;
  state.dead = state_ == State::kDead;
  state.label = volume_label(spec_);
  return encode(state);
}

Status EngineVolume::keep() {
  std::vector<int> fds;
  int64_t flags = 0;
  {
    std::lock_guard lock(state_mutex_);
    if (session_ == nullptr || arena_memory_ == nullptr || spec_memory_ == nullptr) return {};
    fds = {arena_memory_->fd(), spec_memory_->fd()};
    const std::vector<int> fuse = session_->fuse_fds();
    fds.insert(fds.end(), fuse.begin(), fuse.end());
    fds.push_back(session_->mount_fd());
    if (session_->agreement().can_resend == 0) flags = kKeeperAbortWhenOrphaned;
  }
  return pool_->engine_->keeper_->put(entry_name(), export_blob(), fds, flags);
}

Status EngineVolume::keep_spec() {
  if (!with_device_) return {};
  Result<std::unique_ptr<SharedMemory>> memory = share_spec(spec());
  if (!memory.ok()) return memory.status;
  {
    std::lock_guard lock(state_mutex_);
    spec_memory_ = std::move(*memory);
  }
  return keep();
}

Status EngineVolume::note() {
  if (!with_device_) return {};
  int64_t flags = 0;
  {
    std::lock_guard lock(state_mutex_);
    if (session_ != nullptr && session_->agreement().can_resend == 0) flags = kKeeperAbortWhenOrphaned;
  }
  return pool_->engine_->keeper_->update(entry_name(), export_blob(), flags);
}

// --- opening -----------------------------------------------------------------------------------------------------

Status EngineVolume::open_volume(bool taking_over) {
  VolumeEnvironment environment;
  if (gate_ == nullptr) {
    gate_ = std::make_unique<VolumeGate>(*pool_->gate_);
    device_ = std::make_unique<GatedDevice>(*pool_->uring_, *gate_);
  }
  environment.device = device_.get();
  environment.pool = pool_->spec_.uuid;
  environment.superblock = &pool_->info().superblock;
  environment.stock = pool_->stock_.get();
  environment.observer = pool_.get();
  environment.arena = arena_.get();
  const VolumeSpec spec = this->spec();
  using Opened = Result<std::unique_ptr<Volume>>;
  Opened opened = await_on<Opened>(home(), [&](const std::function<void(Opened)>& done) {
    Volume::open(environment, spec, taking_over, done);
  });
  if (!opened.ok()) return opened.status;
  std::lock_guard lock(state_mutex_);
  volume_ = std::move(*opened);
  return {};
}

Status EngineVolume::open() {
  const VolumeSpec wanted = spec();
  if (wanted.size_bytes == 0 || wanted.size_bytes % kSectorSize != 0 || wanted.layers.empty()) {
    return {Code::kInvalidArgument, "volume " + std::to_string(wanted.volume_id) +
                                        ": the size must be a multiple of 4096 and not zero, and a grant has at "
                                        "least one layer"};
  }
  Result<std::unique_ptr<SharedMemory>> arena = SharedMemory::create("holdfast-pages", PageArena::kDefaultBytes);
  if (!arena.ok()) return arena.status;
  Result<std::unique_ptr<SharedMemory>> spec_memory = share_spec(wanted);
  if (!spec_memory.ok()) return spec_memory.status;
  Result<std::unique_ptr<PageArena>> pages =
      PageArena::format((*arena)->data(), (*arena)->size(), wanted.volume_id, wanted.epoch);
  if (!pages.ok()) return pages.status;
  {
    std::lock_guard lock(state_mutex_);
    arena_memory_ = std::move(*arena);
    spec_memory_ = std::move(*spec_memory);
    arena_ = std::move(*pages);
  }
  std::lock_guard control(control_);
  Status status = open_volume(false);
  if (!status.ok() || !with_device_) return status;

  const auto make_device = [&]() -> Status {
    Result<std::unique_ptr<FuseSession>> session = FuseSession::create(workers_in_turn(), wanted.size_bytes);
    if (!session.ok()) return session.status;
    {
      std::lock_guard lock(state_mutex_);
      session_ = std::move(*session);
    }
    session_->start(volume_.get(), FuseSession::Mode::kServe);
    if (!session_->wait_agreed(kAgreeMs)) {
      return {Code::kIo, "the kernel did not begin to speak FUSE within " + std::to_string(kAgreeMs / 1000) + " s"};
    }
    // First the keeper, then the loop device: a device without somebody to answer for it must never be.
    Status kept = keep();
    if (!kept.ok()) return kept;
    Status attached = attach();
    if (!attached.ok()) return attached;
    return note();
  };
  status = make_device();
  if (status.ok()) return {};

  if (loop(true).number >= 0) {
    [[maybe_unused]] Status detached = pool_->engine_->keeper_->detach(loop(true));
  }
  drop_session();
  [[maybe_unused]] Status dropped = pool_->engine_->keeper_->drop(entry_name());
  [[maybe_unused]] Status closed = close_volume();
  drop_volume();
  return status;
}

Status EngineVolume::attach() {
  const VolumeSpec wanted = spec();
  KeeperAttach attach{};
  volume_label(wanted).copy(attach.label, sizeof attach.label - 1);
  attach.sector_size = kSectorSize;
  attach.requests = kLoopRequests;
  attach.async_depth = kLoopAsyncDepth;
  attach.read_only = wanted.read_only ? 1 : 0;
  std::string text;
  Result<int> number = pool_->engine_->keeper_->attach(session_->mount_fd(), attach, &text);
  if (!number.ok()) return number.status;
  std::lock_guard lock(state_mutex_);
  loop_number_ = *number;
  note_ = text;
  return {};
}

// --- take-over ---------------------------------------------------------------------------------------------------

Status EngineVolume::adopt(KeptEntry entry) {
  // Order of the descriptors: keep().
  std::vector<int> fds = std::move(entry.fds);
  const auto close_rest = [&fds] {
    for (int fd : fds) ::close(fd);
    fds.clear();
  };
  Result<ExportState> kept = decode_export(entry.blob);
  if (!kept.ok() || fds.size() < 4) {
    close_rest();
    return kept.ok() ? Status{Code::kCorrupt, "the keeper's entry lacks descriptors"} : kept.status;
  }
  Result<std::unique_ptr<SharedMemory>> arena = SharedMemory::adopt(fds[0]);
  Result<std::unique_ptr<SharedMemory>> spec_memory = SharedMemory::adopt(fds[1]);
  fds.erase(fds.begin(), fds.begin() + 2);
  if (!arena.ok() || !spec_memory.ok()) {
    close_rest();
    return arena.ok() ? spec_memory.status : arena.status;
  }
  Result<VolumeSpec> decoded =
      decode_volume(std::string(static_cast<const char*>((*spec_memory)->data()), (*spec_memory)->size()));
  if (!decoded.ok()) {
    close_rest();
    return decoded.status;
  }
  const uint64_t kept_size = decoded->size_bytes;
  bool changed = false;
  {
    std::lock_guard lock(state_mutex_);
    spec_ = std::move(*decoded);
    arena_memory_ = std::move(*arena);
    spec_memory_ = std::move(*spec_memory);
    loop_number_ = kept->loop_number;
  }
  std::lock_guard control(control_);

  Status served = kept->dead ? Status{Code::kFenced, "revoked before"} : Status{};
  if (served.ok() && pool_->gate_->fenced()) served = {Code::kFenced, "the pool is fenced"};
  if (served.ok()) {
    Result<std::unique_ptr<PageArena>> pages = PageArena::attach(arena_memory_->data(), arena_memory_->size());
    if (pages.ok()) {
      arena_ = std::move(*pages);
      changed = learn_record();
      for (uint32_t i = 0; i < arena_->claim_count(); ++i) adopted_claims_.push_back(arena_->claim(i));
      served = open_volume(true);
    } else {
      served = pages.status;
    }
  }
  const uint64_t size = spec().size_bytes;
  const int mount_fd = fds.back();
  fds.pop_back();
  const size_t kept_fds = fds.size();
  Result<std::unique_ptr<FuseSession>> session =
      FuseSession::adopt(workers_in_turn(), size, std::move(fds), mount_fd, kept->agreement);
  if (!session.ok()) {
    drop_volume_after_abort();
    return session.status;
  }
  {
    std::lock_guard lock(state_mutex_);
    session_ = std::move(*session);
    if (!served.ok()) state_ = State::kDead;
    dead_why_ = served.message;
  }
  if (session_->fuse_fds().size() > kept_fds) {
    // More workers than the engine before had: what is read from a descriptor that dies with this engine ends with EIO.
    if (Status known = keep(); !known.ok()) pool_->emit_volume(spec().volume_id, known.code, known.message);
  }
  session_->start(volume_.get(), served.ok() ? FuseSession::Mode::kServe : FuseSession::Mode::kFail);
  if (kept->agreement.can_resend != 0) {
    Status resent = session_->resend();
    if (!resent.ok()) pool_->emit_volume(spec().volume_id, resent.code, resent.message);
  }
  if (!served.ok()) {
    if (!kept->dead) {
      pool_->emit_volume(spec().volume_id, served.code,
                         "the volume cannot be served after a take-over and answers EIO: " + served.message);
    }
    return note();
  }
  return settle_device(kept_size != size, changed);
}

// The record on disk is what counts: a growth or a cut may have been done when the keeper did not know yet. True: the
// spec is another one now.
bool EngineVolume::learn_record() {
  std::lock_guard lock(state_mutex_);
  const auto record = read_volume_record(*pool_->sync_, pool_->info().superblock, spec_.slot);
  if (!record.ok() || !record.value->has_value()) return false;  // open() says what is wrong
  const VolumeRecordInfo& info = **record.value;
  if (info.volume_id != spec_.volume_id || info.epoch != spec_.epoch || spec_.layers.empty()) return false;
  bool changed = false;
  if (spec_.next_top.has_value() && spec_.next_top->layer_id == info.top_layer_id &&
      spec_.layers[0].layer_id != info.top_layer_id) {
    LayerSpec& frozen = spec_.layers[0];
    frozen.frozen = true;
    const auto layer = read_layer_record(*pool_->sync_, pool_->info().superblock, frozen.slot);
    const bool known = layer.ok() && layer.value->has_value() && (**layer.value).layer_id == frozen.layer_id;
    frozen.size_bytes = known ? (**layer.value).size_bytes : spec_.size_bytes;
    spec_.layers.insert(spec_.layers.begin(), *spec_.next_top);
    changed = true;
  }
  spec_.next_top.reset();
  if (info.size_bytes > spec_.size_bytes) {
    spec_.size_bytes = info.size_bytes;
    if (!spec_.layers[0].frozen) spec_.layers[0].size_bytes = info.size_bytes;
    changed = true;
  }
  return changed;
}

// After a take-over: the loop device is there, of the right size, and the keeper has the descriptors of this engine.
Status EngineVolume::settle_device(bool grown, bool changed) {
  const std::string label = volume_label(spec());
  Result<int> found = pool_->engine_->keeper_->find(label);
  if (!found.ok()) return found.status;
  {
    std::lock_guard lock(state_mutex_);
    loop_number_ = *found;
  }
  if (*found < 0) {
    Status attached = attach();
    if (!attached.ok()) return attached;
  }
  if (grown) {
    session_->set_size(spec().size_bytes);
    Status resized = pool_->engine_->keeper_->resize(session_->mount_fd(), loop(false));
    if (!resized.ok()) pool_->emit_volume(spec().volume_id, resized.code, resized.message);
  }
  return changed ? keep_spec() : keep();
}

// --- changes -----------------------------------------------------------------------------------------------------

Status EngineVolume::grow(uint64_t size_bytes) {
  std::lock_guard control(control_);
  const VolumeSpec before = spec();
  if (state() != State::kOpen) return not_open();
  if (size_bytes % kSectorSize != 0 || size_bytes < before.size_bytes) {
    return {Code::kInvalidArgument, "volume " + before.name + " has " + std::to_string(before.size_bytes) +
                                        " bytes and can only grow, in steps of 4096; " + std::to_string(size_bytes) +
                                        " was asked for"};
  }
  if (size_bytes > before.size_bytes) {
    std::lock_guard calls(volume_calls_);
    if (volume_ == nullptr) return not_open();
    Status grown = await_on<Status>(
        home(), [&](const std::function<void(Status)>& done) { volume_->grow(size_bytes, done); });
    if (!grown.ok()) return grown;
    std::lock_guard lock(state_mutex_);
    spec_.size_bytes = size_bytes;
    if (!spec_.layers[0].frozen) spec_.layers[0].size_bytes = size_bytes;
  }
  if (!with_device_) return {};
  // Also when the size is there already: what failed half-way is finished by asking again.
  session_->set_size(size_bytes);
  Status kept = keep_spec();
  if (!kept.ok()) return kept;
  return pool_->engine_->keeper_->resize(session_->mount_fd(), loop(false));
}

// Begins a call of the volume. kill() is not kept waiting: what it aborts is answered first.
template <typename T>
Result<std::future<std::shared_ptr<T>>> EngineVolume::begin(
    const std::function<void(Volume&, std::function<void(T)>)>& call) {
  auto promise = std::make_shared<std::promise<std::shared_ptr<T>>>();
  std::future<std::shared_ptr<T>> answer = promise->get_future();
  std::lock_guard calls(volume_calls_);
  if (volume_ == nullptr) return not_open();
  run_on(home(), [&] {
    call(*volume_, [promise](T value) { promise->set_value(std::make_shared<T>(std::move(value))); });
  });
  return answer;
}

template <typename T>
T EngineVolume::begin_and_wait(const std::function<void(Volume&, std::function<void(T)>)>& call) {
  Result<std::future<std::shared_ptr<T>>> answer = begin<T>(call);
  if (!answer.ok()) return answer.status;
  return std::move(*answer->get());
}

Status EngineVolume::hold(uint32_t timeout_ms) {
  std::lock_guard control(control_);
  if (state() != State::kOpen) return not_open();
  return begin_and_wait<Status>([&](Volume& volume, const std::function<void(Status)>& done) {
    volume.hold(uint64_t{timeout_ms} * 1'000'000, done);
  });
}

Status EngineVolume::release() {
  std::lock_guard control(control_);
  if (state() != State::kOpen) return {};  // nothing is held
  return begin_and_wait<Status>(
      [&](Volume& volume, const std::function<void(Status)>& done) { volume.release(done); });
}

// The keeper hears of the new top before the disk does, so that a successor knows where its record is; and of what came
// of it afterwards.
Result<CutReport> EngineVolume::cut(LayerSpec top, const SnapshotInfo& snapshot, uint32_t timeout_ms) {
  std::lock_guard control(control_);
  if (state() != State::kOpen) return not_open();
  top.frozen = false;
  top.slabs.clear();
  const bool repeated = spec().layers[0].layer_id == top.layer_id;
  if (!repeated) {
    {
      std::lock_guard lock(state_mutex_);
      spec_.next_top = top;
    }
    if (Status kept = keep_spec(); !kept.ok()) return kept;
  }
  Result<CutReport> report = begin_and_wait<Result<CutReport>>(
      [&](Volume& volume, const std::function<void(Result<CutReport>)>& done) {
        volume.cut(top, snapshot, uint64_t{timeout_ms} * 1'000'000, done);
      });
  if (!report.ok()) return report;
  {
    std::lock_guard lock(state_mutex_);
    if (!repeated) {
      top.size_bytes = spec_.size_bytes;
      spec_.layers.insert(spec_.layers.begin(), top);
    }
    spec_.layers[1] = report->frozen;
    spec_.next_top.reset();
  }
  // What the keeper has is good enough for a successor in any case.
  if (Status kept = keep_spec(); !kept.ok()) pool_->emit_volume(spec().volume_id, kept.code, kept.message);
  return report;
}

namespace {

// What is left of `runs` without `gone`, of the same generation.
std::vector<SlabRun> without(const std::vector<SlabRun>& runs, const std::vector<SlabRun>& gone) {
  std::vector<SlabRun> left = runs;
  for (const SlabRun& one : gone) {
    std::vector<SlabRun> next;
    for (const SlabRun& run : left) {
      const uint64_t end = run.first + run.count;
      const uint64_t from = std::max(run.first, one.first);
      const uint64_t to = std::min(end, one.first + one.count);
      if (run.generation != one.generation || from >= to) {
        next.push_back(run);
        continue;
      }
      if (run.first < from) next.push_back({run.first, uint32_t(from - run.first), run.generation});
      if (to < end) next.push_back({to, uint32_t(end - to), run.generation});
    }
    left = std::move(next);
  }
  return left;
}

bool any_of_runs(const std::vector<SlabRun>& runs, uint64_t slab, uint64_t generation) {
  return std::any_of(runs.begin(), runs.end(), [&](const SlabRun& run) {
    return slab >= run.first && slab - run.first < run.count && generation == run.generation;
  });
}

}  // namespace

// Answered when nothing here resolves to the slabs any more, and nothing that the keeper has would bring them back, or the layers.
Status EngineVolume::forget(const std::vector<SlabRun>& slabs, const std::vector<uint64_t>& layers) {
  std::lock_guard control(control_);
  if (state() == State::kDead || state() == State::kGone) return {};  // nothing is in flight, nothing will be
  bool open = false;
  {
    std::lock_guard calls(volume_calls_);
    open = volume_ != nullptr;
  }
  if (open) {
    Status forgotten = begin_and_wait<Status>([&](Volume& volume, const std::function<void(Status)>& done) {
      volume.forget(slabs, layers, done);
    });
    if (!forgotten.ok()) return state() == State::kDead ? Status{} : forgotten;
  }
  const auto leaves = [&](uint64_t layer_id) { return std::find(layers.begin(), layers.end(), layer_id) != layers.end(); };
  {
    std::lock_guard lock(state_mutex_);
    if (!open && arena_ != nullptr) {
      for (uint32_t i = 0; i < arena_->claim_count(); ++i) {
        const PageArena::Claim claim = arena_->claim(i);
        if (claim.state == PageArena::ClaimState::kFree || claim.layer_id == spec_.layers[0].layer_id) continue;
        const bool left = claim.state == PageArena::ClaimState::kClaimed && leaves(claim.layer_id);
        if (left || any_of_runs(slabs, claim.slab, claim.generation)) {
          arena_->set_claim_state(i, PageArena::ClaimState::kFree);
        }
      }
    }
    for (LayerSpec& layer : spec_.layers) {
      if (layer.frozen) layer.slabs = without(layer.slabs, slabs);
    }
    std::erase_if(spec_.layers, [&](const LayerSpec& layer) { return layer.frozen && leaves(layer.layer_id); });
  }
  return keep_spec();
}

// A successor reads all of these slabs: only after this may what they show be taken from older layers.
Status EngineVolume::learn(const LayerSlabs& layer) {
  std::lock_guard control(control_);
  if (state() == State::kDead || state() == State::kGone) return {};
  bool open = false;
  {
    std::lock_guard calls(volume_calls_);
    open = volume_ != nullptr;
  }
  if (open) {
    Status learned = begin_and_wait<Status>(
        [&](Volume& volume, const std::function<void(Status)>& done) { volume.learn(layer, done); });
    if (!learned.ok()) return state() == State::kDead ? Status{} : learned;
  }
  {
    std::lock_guard lock(state_mutex_);
    for (LayerSpec& one : spec_.layers) {
      if (one.frozen && one.layer_id == layer.layer_id) one.slabs = layer.slabs;
    }
  }
  return keep_spec();
}

Result<CompactReport> EngineVolume::compact(const std::vector<LayerSlabs>& sources, uint32_t skip_above_permille,
                                            uint64_t max_blocks) {
  using Compacted = Result<CompactReport>;
  std::unique_lock control(control_);
  if (state() != State::kOpen) return not_open();
  Result<std::future<std::shared_ptr<Compacted>>> answer =
      begin<Compacted>([&](Volume& volume, const std::function<void(Compacted)>& done) {
        volume.compact(sources, skip_above_permille, max_blocks, done);
      });
  control.unlock();
  if (!answer.ok()) return answer.status;
  return std::move(*answer->get());
}

EngineVolume::State EngineVolume::state() const {
  std::lock_guard lock(state_mutex_);
  return state_;
}

Status EngineVolume::not_open() const {
  std::lock_guard lock(state_mutex_);
  switch (state_) {
    case State::kDead:
      return {Code::kFenced, "volume " + spec_.name + " answers EIO (" + dead_why_ + "); unmount and detach it"};
    case State::kDetached:
      return {Code::kBusy, "volume " + spec_.name + " is being closed; close it again"};
    case State::kGone:
    case State::kOpen:
      break;
  }
  return {Code::kNotFound, "volume " + spec_.name + " is not open any more"};
}

Status EngineVolume::close_volume() {
  std::lock_guard calls(volume_calls_);
  if (volume_ == nullptr) return not_open();
  return await_on<Status>(home(), [&](const std::function<void(Status)>& done) { volume_->close(done); });
}

Status EngineVolume::close() {
  std::lock_guard control(control_);
  if (state() == State::kGone) return {};
  if (state() == State::kDead) return not_open();
  if (state() == State::kOpen && with_device_) {
    Status detached = pool_->engine_->keeper_->detach(loop(false));
    if (!detached.ok()) return detached;
    while (!session_->wait_idle(kIdleMs)) {
    }
    {
      std::lock_guard lock(state_mutex_);
      if (state_ == State::kOpen) state_ = State::kDetached;
      loop_number_ = -1;
    }
    // The session goes before the volume that it talks to. The keeper's copies keep the connection for a successor.
    stop_session();
  }
  if (state() == State::kDead) return not_open();
  if (volume_ == nullptr) {
    // An earlier close() failed; the page images have all that it did not get to the disk.
    Status opened = open_volume(true);
    if (!opened.ok()) return opened;
  }
  Status closed = close_volume();
  if (state() == State::kDead) return not_open();
  drop_volume();
  if (!closed.ok()) return closed;
  return finish();
}

// Nothing of the volume is left here.
Status EngineVolume::finish() {
  drop_session();
  Status dropped = with_device_ ? pool_->engine_->keeper_->drop(entry_name()) : Status{};
  release_memory();
  pool_->remove(this);
  return dropped;
}

void EngineVolume::kill(const std::string& why) {
  std::shared_ptr<FuseSession> session;
  {
    std::lock_guard lock(state_mutex_);
    if (state_ == State::kGone) return;
    if (state_ != State::kDead) {
      state_ = State::kDead;
      dead_why_ = why;
    }
    session = session_;
  }
  if (gate_ != nullptr) gate_->revoke();
  if (session != nullptr) session->set_mode(FuseSession::Mode::kFail);
  {
    std::lock_guard calls(volume_calls_);
    if (volume_ != nullptr) {
      // The answer is that nothing is in flight; there is no other.
      [[maybe_unused]] Status aborted = await_on<Status>(
          home(), [&](const std::function<void(Status)>& done) { volume_->abort(done); });
    }
    while (gate_ != nullptr && !gate_->wait_idle(kIdleMs)) {
    }
    while (session != nullptr && !session->wait_idle(kIdleMs)) {
    }
    drop_volume();
  }
  // A keeper that is away learns it when it is back (check_keeper), and a successor sees the record or the fence page.
  [[maybe_unused]] Status noted = note();
}

Status EngineVolume::revoke() {
  kill("revoked");
  std::lock_guard control(control_);
  if (state() == State::kGone) return {};
  const VolumeSpec spec = this->spec();
  if (spec.read_only) return {};  // a reader has no part in the record
  return write_volume_closed(*pool_->gated_, pool_->info().superblock, spec.slot, spec.volume_id, spec.epoch);
}

Status EngineVolume::detach() {
  std::lock_guard control(control_);
  if (state() == State::kGone) return {};
  if (state() != State::kDead) {
    return {Code::kBusy, "volume " + spec().name + " is open and serves; close it, or revoke it first"};
  }
  if (loop(true).number >= 0) {
    Status detached = pool_->engine_->keeper_->detach(loop(true));
    if (!detached.ok()) return detached;
  }
  while (session_ != nullptr && !session_->wait_idle(kIdleMs)) {
  }
  return finish();
}

bool EngineVolume::still_ours(Status* held) {
  if (state() != State::kOpen) return true;
  const VolumeSpec spec = this->spec();
  if (spec.read_only) {
    // Readers write no record: one of a later epoch is a writer's, who was granted when this reader counted as dead.
    const auto record = read_volume_record(*pool_->sync_, pool_->info().superblock, spec.slot);
    *held = record.status;
    if (!record.ok() || !record.value->has_value()) return true;
    const VolumeRecordInfo& info = **record.value;
    if (info.volume_id != spec.volume_id || info.epoch <= spec.epoch) return true;
    *held = {Code::kStale, "its record is of epoch " + std::to_string(info.epoch)};
    return false;
  }
  *held = check_volume_still_ours(*pool_->sync_, pool_->info().superblock, spec.slot, spec.volume_id, spec.epoch,
                                  spec.host_id, spec.generation);
  return held->code != Code::kStale;
}

// --- the end -----------------------------------------------------------------------------------------------------

Status EngineVolume::let_go(unsigned timeout_ms) {
  std::lock_guard control(control_);
  if (state() == State::kGone) return {};
  if (session_ != nullptr && state() == State::kOpen) {
    session_->stop_reading();
    const bool can_resend = session_->agreement().can_resend != 0;
    if (!session_->wait_idle(can_resend ? std::min(timeout_ms, kDrainMs) : timeout_ms)) {
      if (!can_resend) {
        session_->resume_reading();
        return {Code::kBusy, "writes to volume " + spec().name +
                                 " are held, and this kernel (before 6.9) cannot send them to a successor; give the "
                                 "pool slabs or free space, then hand over again"};
      }
      // They stay in the kernel, unanswered, for the successor.
      session_->set_mode(FuseSession::Mode::kSilent);
    }
  }
  drop_volume_after_abort();
  // The keeper's entry stays, and must not end with this engine's connection.
  if (with_device_) {
    [[maybe_unused]] Status noted = pool_->engine_->keeper_->update(entry_name(), export_blob(), 0);
  }
  drop_session();
  release_memory();
  return {};
}

// Gone: what a JS object may still point to for a while holds no descriptor and no page images any more.
void EngineVolume::release_memory() {
  std::lock_guard lock(state_mutex_);
  HF_ASSERT(volume_ == nullptr);
  state_ = State::kGone;
  arena_.reset();
  arena_memory_.reset();
  spec_memory_.reset();
}

void EngineVolume::drop_volume_after_abort() {
  std::lock_guard calls(volume_calls_);
  if (volume_ == nullptr) return;
  [[maybe_unused]] Status aborted =
      await_on<Status>(home(), [&](const std::function<void(Status)>& done) { volume_->abort(done); });
  drop_volume();
}

void EngineVolume::drop_volume() {
  std::unique_ptr<Volume> dropped;
  {
    std::lock_guard lock(state_mutex_);
    dropped = std::move(volume_);
  }
  if (dropped == nullptr) return;
  // Whatever was posted on its behalf has run when each worker has gone round once more.
  for (const auto& worker : pool_->engine_->workers_) run_on(*worker, [] {});
  run_on(home(), [&] { dropped.reset(); });
}

void EngineVolume::stop_session() {
  std::shared_ptr<FuseSession> session;
  {
    std::lock_guard lock(state_mutex_);
    session = session_;
  }
  if (session == nullptr) return;
  session->stop_reading();
  while (!session->wait_idle(kIdleMs)) {
  }
  session->shut_down();
}

void EngineVolume::drop_session() {
  stop_session();
  std::lock_guard lock(state_mutex_);
  session_.reset();
}

}  // namespace holdfast
