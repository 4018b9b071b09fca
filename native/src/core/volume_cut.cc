// The cut: the top layer freezes under a new one.
//
//   held (volume_hold.cc) → the new layer's record and the old one's, now frozen, each to both copies → the volume's
//   record naming the new top: that is the commit → writes go on → the rest (volume_frozen.cc) → answered
//
// Before the commit everything can be given up: the old top goes on, and records that speak of a cut which did not
// happen are harmless, for only the volume's record says which layer is the top. An error of the commit leaves unknown
// whether it is on the disk. Then neither may be assumed: a write to the old top would change a snapshot, one to the
// new top would be lost. So it is written again, to the same copy, until it is durable or the volume is stopped.
//
// Nothing here depends on how large the volume is: slabs know their layer by an index that counts from the oldest, so a
// new top is one more at the end, and lists of the old top's slabs are dropped, not walked.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "volume_impl.h"

namespace holdfast {

using format::kPageSize;
using format::LayerRecord;
using format::LayerState;

namespace {
constexpr uint64_t kFirstRetryNs = 10'000'000;
constexpr uint64_t kLastRetryNs = 1'000'000'000;
// Where the cut's buffer keeps what: the new layer's pair, then the freezing one's.
constexpr size_t kNewAt = 0;
constexpr size_t kOldAt = 2 * kPageSize;
constexpr size_t kBlotAt = 4 * kPageSize;
}  // namespace

void VolumeImpl::cut(const LayerSpec& new_top, const SnapshotInfo& snapshot, uint64_t timeout_ns, CutDone done) {
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  const bool held = stage_ == HoldStage::kHeld && control_.kind == Control::Kind::kHold;
  Status refusal;
  const bool repeated = top().id == new_top.layer_id;
  if (held || can_hold("cut it", &refusal)) {
    if (hold_lost_ && !repeated) {
      refusal = {Code::kHoldExpired, "volume " + std::to_string(spec_.volume_id) +
                                         ": its writes were held, but not cut in time, and go on; nothing was cut. "
                                         "Release it, then hold it again"};
    } else if (!repeated || layers_.size() == 1) {
      refusal = cut_refusal(new_top, snapshot);
    }
  }
  if (!refusal.ok()) {
    post_done(home, [done = std::move(done)](Status status) { done(std::move(status)); }, std::move(refusal));
    return unlock(lock);
  }
  if (held && repeated) hold_end({});
  control_.kind = Control::Kind::kCut;
  control_.home = home;
  cut_ = std::make_unique<Cut>();
  cut_->top = new_top;
  cut_->snapshot = snapshot;
  cut_->timeout_ns = timeout_ns;
  cut_->done = std::move(done);
  cut_->repeated = repeated;
  cut_->layer = static_cast<uint16_t>(layers_.size() - (repeated ? 2 : 1));
  cut_->slot = spec_.layers[repeated ? 1 : 0].slot;
  cut_->pages = std::make_unique<PageBuffer>(cut_->io.size() * kPageSize);
  for (PageIo& io : cut_->io) io.volume = this;
  if (repeated) {
    stage_ = HoldStage::kFrozen;
    frozen_begin();
  } else {
    cut_read();
  }
  unlock(lock);
}

Status VolumeImpl::cut_refusal(const LayerSpec& new_top, const SnapshotInfo& snapshot) const {
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  const std::string layer = "layer " + std::to_string(new_top.layer_id);
  const LayerSpec& old = spec_.layers[0];
  const uint32_t slots = environment_.superblock->layer_slots;
  for (const Layer& one : layers_) {
    if (one.id == new_top.layer_id) return {Code::kStale, name + " has " + layer + " already, and not as a new top"};
  }
  if (new_top.layer_id == 0 || new_top.slot >= slots || old.slot >= slots || new_top.slot == old.slot) {
    return {Code::kInvalidArgument, name + " can't be cut: " + layer + " has no id, or no record slot of its own"};
  }
  if (new_top.parent_layer_id != top().id) {
    return {Code::kStale, name + " has layer " + std::to_string(top().id) + " as its top; " + layer +
                              " would rest on layer " + std::to_string(new_top.parent_layer_id) +
                              ". The metadata service must read the record first"};
  }
  if (new_top.birth <= old.birth) {
    return {Code::kInvalidArgument, name + " can't be cut: " + layer + " would not be newer than its parent"};
  }
  if (layers_.size() >= kMaxLayers) {
    return {Code::kNoSpace, name + " has " + std::to_string(layers_.size()) +
                                " layers, the most that can be opened; delete snapshots and let them be folded"};
  }
  if (snapshot.name.size() > sizeof LayerRecord::snapshot_name) {
    return {Code::kInvalidArgument, "the name of a snapshot has at most " +
                                        std::to_string(sizeof LayerRecord::snapshot_name) + " bytes"};
  }
  return {};
}

void VolumeImpl::cut_io(uint32_t index, IoOp op, uint64_t offset, size_t at, size_t length,
                        void (*done)(IoRequest*, int)) {
  PageIo& io = cut_->io[index];
  io.iov = {cut_->pages->data() + at, length};
  io.io.op = op;
  io.io.fua = op == IoOp::kWrite;
  io.io.offset = offset;
  io.io.length = length;
  io.io.iov = length > 0 ? &io.iov : nullptr;
  io.io.iov_count = length > 0 ? 1 : 0;
  io.io.user = &io;
  io.io.done = done;
  cut_->outstanding++;
  start_background();
}

// ---- the layers' records

void VolumeImpl::cut_read() {
  const auto done = [](IoRequest* request, int error) {
    static_cast<PageIo*>(request->user)->volume->cut_have_records(error);
  };
  cut_io(0, IoOp::kRead, layer_address(cut_->top.slot), kNewAt, 2 * kPageSize, done);
  cut_io(1, IoOp::kRead, layer_address(cut_->slot), kOldAt, 2 * kPageSize, done);
  device_.submit(&cut_->io[0].io);
  device_.submit(&cut_->io[1].io);
}

void VolumeImpl::cut_have_records(int error) {
  std::unique_lock lock(mu_);
  if (error != 0) cut_->error = error;
  if (--cut_->outstanding == 0) {
    Status status;
    if (state_ == State::kAborted) status = stopped_status("it was stopped before it was cut");
    else if (cut_->error != 0) {
      status = {Code::kIo, "volume " + std::to_string(spec_.volume_id) +
                               " was not cut: its layers' records can't be read. Check the pool's device and try again"};
    } else {
      status = cut_prepare();
    }
    if (!status.ok()) hold_end(std::move(status));
    else cut_blot();
  }
  end_background();
  unlock(lock);
}

// A torn copy of a record must not be made whole by the next one (pages.h).
void VolumeImpl::cut_blot() {
  const auto done = [](IoRequest* request, int error) {
    static_cast<PageIo*>(request->user)->volume->cut_blotted(error);
  };
  blot(cut_->pages->data() + kBlotAt, format::kMagicLayer);
  for (uint32_t i = 0; i < 2; i++) {
    if (!cut_->torn[i]) continue;
    const uint64_t address = layer_address(i == 0 ? cut_->top.slot : cut_->slot);
    cut_io(i, IoOp::kWrite, address + uint64_t{cut_->io[i].tag} * kPageSize, kBlotAt, kPageSize, done);
  }
  if (cut_->outstanding == 0) return cut_hold();
  for (uint32_t i = 0; i < 2; i++) {
    if (cut_->torn[i]) device_.submit(&cut_->io[i].io);
  }
}

void VolumeImpl::cut_blotted(int error) {
  std::unique_lock lock(mu_);
  if (error != 0) cut_->error = error;
  if (--cut_->outstanding == 0) {
    if (state_ == State::kAborted) {
      hold_end(stopped_status("it was stopped before it was cut"));
    } else if (cut_->error != 0) {
      hold_end({Code::kIo, "volume " + std::to_string(spec_.volume_id) +
                               " was not cut: a torn copy of its layers' records can't be written over. Check the pool's device and "
                               "try again"});
    } else {
      cut_hold();
    }
  }
  end_background();
  unlock(lock);
}

void VolumeImpl::cut_hold() {
  if (stage_ == HoldStage::kHeld) cut_write_records();
  else hold_begin(cut_->timeout_ns);
}

// Makes the two records out of what stands in their slots. Both copies of each get the same sequence, one by one.
Status VolumeImpl::cut_prepare() {
  const std::string name = "volume " + std::to_string(spec_.volume_id) + " was not cut: ";
  for (const size_t at : {kNewAt, kOldAt}) {
    const bool fresh = at == kNewAt;
    const uint64_t address = layer_address(fresh ? cut_->top.slot : cut_->slot);
    const uint64_t id = fresh ? cut_->top.layer_id : top().id;
    auto& a = cut_->pages->at<LayerRecord>(at);
    auto& b = cut_->pages->at<LayerRecord>(at + kPageSize);
    const Copies copies = choose_record(a, b, environment_.pool, address);
    if (copies.bad()) {
      return {Code::kCorrupt, name + "both copies of the record of layer " + std::to_string(id) +
                                  " are damaged. Run `holdfast pool check`"};
    }
    LayerRecord record{};
    uint64_t sequence = 0;
    if (copies.valid()) {
      const LayerRecord& found = copies.newest == 0 ? a : b;
      sequence = found.header.sequence;
      const bool gone = found.layer_id == 0 || found.state == LayerState::kFree || found.state == LayerState::kDeleted;
      if (found.layer_id != id && !gone) {
        return {Code::kStale, name + "the record slot of layer " + std::to_string(id) + " belongs to layer " +
                                  std::to_string(found.layer_id)};
      }
      if (found.layer_id == id) record = found;
    }
    const bool known = record.layer_id == id;
    record.header.flags = 0;
    record.layer_id = id;
    record.size_bytes = size_bytes_;
    record.folded_into = 0;
    if (fresh) {
      record.parent_layer_id = cut_->top.parent_layer_id;
      record.volume_id = spec_.volume_id;
      record.birth = cut_->top.birth;
      record.state = LayerState::kWritable;
    } else {
      const LayerSpec& old = spec_.layers[0];
      if (record.volume_id == 0) record.volume_id = spec_.volume_id;
      // As it stands: a layer in between may have left the chain since, and the slots of those below hang on what records name.
      if (!known) record.parent_layer_id = old.parent_layer_id;
      record.birth = old.birth;
      record.state = LayerState::kFrozen;
      record.created_unix_ms = cut_->snapshot.unix_ms;
      std::memset(record.snapshot_name, 0, sizeof record.snapshot_name);
      if (!set_field(record.snapshot_name, cut_->snapshot.name)) {
        return {Code::kInvalidArgument, name + "the snapshot's name does not fit its record"};
      }
    }
    for (uint32_t copy = 0; copy < 2; copy++) {
      auto& page = cut_->pages->at<LayerRecord>(at + copy * kPageSize);
      page = record;
      seal(page, environment_.pool, address + uint64_t{copy} * kPageSize, sequence + 1);
    }
    // The copy that does not serve comes first.
    cut_->io[fresh ? 0 : 1].tag = static_cast<uint32_t>(copies.next());
    cut_->torn[fresh ? 0 : 1] = copies.state[copies.next()] == PageState::kBadCrc;
  }
  return {};
}

void VolumeImpl::cut_write_records() {
  HF_ASSERT(quiet() && holding_ && changing_ == 0);
  stage_ = HoldStage::kRecords;
  const auto done = [](IoRequest* request, int error) {
    static_cast<PageIo*>(request->user)->volume->cut_record_written(error);
  };
  for (uint32_t i = 0; i < 2; i++) {
    const uint32_t copy = cut_->io[i].tag;
    const uint64_t address = layer_address(i == 0 ? cut_->top.slot : cut_->slot) + uint64_t{copy} * kPageSize;
    cut_io(i, IoOp::kWrite, address, (i == 0 ? kNewAt : kOldAt) + size_t{copy} * kPageSize, kPageSize, done);
  }
  device_.submit(&cut_->io[0].io);
  device_.submit(&cut_->io[1].io);
}

void VolumeImpl::cut_record_written(int error) {
  std::unique_lock lock(mu_);
  if (error != 0) cut_->error = error;
  if (--cut_->outstanding == 0) {
    const std::string name = "volume " + std::to_string(spec_.volume_id) + " was not cut: ";
    if (state_ == State::kAborted) {
      hold_end(stopped_status("it was stopped before it was cut"));
    } else if (cut_->error != 0) {
      hold_end({Code::kIo, name + "its layers' records can't be written, and writes go on in the old top. Check the "
                                  "pool's device and try again"});
    } else if (hold_expired_) {
      hold_end({Code::kHoldExpired, name + "its records were not written within " +
                                        std::to_string(hold_timeout_ns_ / 1'000'000) +
                                        " ms, and writes go on in the old top; try again, or allow more time"});
    } else if (cut_->step == 0) {
      cut_->step = 1;
      for (uint32_t i = 0; i < 2; i++) cut_->io[i].tag = 1 - cut_->io[i].tag;
      cut_write_records();
    } else {
      cut_->retry_ns = kFirstRetryNs;
      cut_commit();
    }
  }
  end_background();
  unlock(lock);
}

// ---- the commit

void VolumeImpl::cut_commit() {
  stage_ = HoldStage::kCommit;
  timer_number_++;  // no way back from here
  record_.top_layer_id = cut_->top.layer_id;
  write_record(
      [](VolumeImpl* self, int error) {
        if (self->stage_ == HoldStage::kFrozen) return self->frozen_begin();
        HF_ASSERT(error != 0);
        if (self->state_ == State::kAborted) {
          return self->hold_end(self->stopped_status("it was stopped while it was being cut"));
        }
        self->stage_ = HoldStage::kRetry;
        self->set_timer(self->cut_->retry_ns);
        self->cut_->retry_ns = std::min(2 * self->cut_->retry_ns, kLastRetryNs);
        if (std::exchange(self->cut_->told, true)) return;
        self->event(Code::kIo, "volume " + std::to_string(self->spec_.volume_id) +
                                   ": the record of its new snapshot got an I/O error, so whether it is on the disk is "
                                   "not known. It is written again until it is, and writes are held meanwhile. Check "
                                   "the pool's device");
      },
      [](VolumeImpl* self) { self->cut_committed(); });
}

void VolumeImpl::cut_committed() {
  HF_ASSERT(holding_ && changing_ == 0 && !flush_running_ && claiming_ == 0);
  HF_ASSERT(cut_->layer + size_t{1} == layers_.size());
  spec_.layers[0].frozen = true;
  spec_.layers[0].size_bytes = size_bytes_;
  cut_->report.frozen = spec_.layers[0];
  spec_.layers.insert(spec_.layers.begin(), cut_->top);
  spec_.layers[0].frozen = false;
  spec_.layers[0].size_bytes = size_bytes_;
  spec_.layers[0].slabs.clear();
  layers_.emplace_back();
  top().id = cut_->top.layer_id;
  top().map.resize((size_bytes_ + format::kChunkSize - 1) / format::kChunkSize);
  // Slabs that count as the old layer's, though nothing is in them.
  for (const Unclaimed& one : unclaimed_) {
    if (!one.known) continue;
    cut_->slabs.push_back({one.slab.slab, 1, one.slab.generation});
    if (one.directory != PageArena::kNone) arena_->set_claim_state(one.directory, PageArena::ClaimState::kFree);
  }
  std::erase_if(unclaimed_, [](const Unclaimed& one) { return one.known; });
  // What stood in these is the old layer's business, and looked after by volume_frozen.cc.
  list_head_ = current_ = kNoIndex;
  current_cursor_ = 0;
  free_total_ = 0;
  top_slabs_ = 0;
  ahead_ = 1;
  top_list_.clear();
  hole_slab_ = 0;
  unsettled_ = 0;
  unsettled_cursor_ = 0;
  for (uint32_t at : dirty_) hot(at).queued = false;
  dirty_.clear();
  for (uint32_t at : reclaim_list_) hot(at).reclaim_listed = false;
  reclaim_list_.clear();
  stage_ = HoldStage::kFrozen;
  resume_writes();
  cut_->report.held_ns = held_ns_;
  if (flush_next_ != nullptr && !flush_running_) start_flush();
  cut_->step = kRetire;
}

void VolumeImpl::cut_end(Status status) {
  HF_ASSERT(cut_ != nullptr && cut_->outstanding == 0);
  const auto cut = std::shared_ptr<Cut>(std::move(cut_));
  Executor* home = control_.home;
  control_ = Control{};
  post_done(
      home,
      [cut](Status result) {
        if (result.ok()) cut->done(std::move(cut->report));
        else cut->done(std::move(result));
      },
      std::move(status));
}

}  // namespace holdfast
