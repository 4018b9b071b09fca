// A layer that has just been frozen. All that its newest page copies say is durable; nothing is ever added to them.
// While writes go on in the new top, and before the cut is answered:
//
//   images and chunks in limbo are let go → reads that may know those chunks end → slabs that are empty go back → the older copy of each page that differs is
//   made equal to the newer one → the layer's record says so → its slabs are counted for the report
//
// Equal copies are what lets either one stand for the snapshot. They are made before the answer, and never later: only
// after it may others strip or free those pages.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "volume_impl.h"

namespace holdfast {

using format::kChunksPerSlab;
using format::kNoChunk;
using format::kPageSize;
using format::LayerRecord;
using format::SlabEntry;
using format::SlabPage;

namespace {
constexpr uint32_t kHotBatch = 16;
constexpr uint32_t kSlabBatch = 2048;
}  // namespace

void VolumeImpl::frozen_begin() {
  HF_ASSERT(stage_ == HoldStage::kFrozen && cut_ != nullptr);
  if (cut_->repeated) cut_->report.frozen = spec_.layers[1];
  cut_->report.frozen.slabs.clear();
  cut_->cursor = 0;
  if (!cut_->repeated) return frozen_post();
  // What was done when the cut was made is not done again: others may be at those pages by now.
  cut_->step = kRecordLook;
  frozen_read_record();
}

void VolumeImpl::frozen_read_record() {
  cut_io(0, IoOp::kRead, layer_address(cut_->slot), 0, 2 * kPageSize, [](IoRequest* request, int error) {
    static_cast<PageIo*>(request->user)->volume->frozen_io_done(error);
  });
  device_.submit(&cut_->io[0].io);
}

// Batches, each in a turn of its own, so that requests get the lock in between.
void VolumeImpl::frozen_post() {
  start_background();
  frozen_task_.run = [](Task* task) {
    VolumeImpl* self = static_cast<FrozenTask*>(task)->volume;
    std::unique_lock lock(self->mu_);
    self->frozen_step();
    self->end_background();
    self->unlock(lock);
  };
  control_.home->post(&frozen_task_);
}

void VolumeImpl::frozen_step() {
  HF_ASSERT(cut_->outstanding == 0);
  if (state_ == State::kAborted) return hold_end(stopped_status("it was cut, and stopped before that was answered"));
  const auto next = [this](uint32_t step) {
    cut_->step = step;
    cut_->cursor = 0;
    frozen_post();
  };
  switch (cut_->step) {
    case kRetire:
      if (!retire_some()) return frozen_post();
      // Reads that are at the device may know places that have become free just now: until they have ended no slab goes.
      cut_->step = kRelease;
      cut_->cursor = 0;
      cut_->waits_grace = true;
      cut_->grace = epoch_;
      start_background();
      return bump_epoch();  // goes on at once if there are none
    case kRelease:
      if (!release_some()) return frozen_post();
      cut_->waits_release = release_.stage != Release::Stage::kIdle;
      if (cut_->waits_release) return;  // goes on when they are back: release_step()
      return next(kEqualise);
    case kEqualise:
      if (!equalise_some()) return;  // goes on when its I/O is done
      cut_->step = kBarrier;
      cut_io(0, IoOp::kFlush, 0, 0, 0, [](IoRequest* request, int error) {
        static_cast<PageIo*>(request->user)->volume->frozen_io_done(error);
      });
      device_.submit(&cut_->io[0].io);
      return;
    case kReport: return report_some() ? hold_end({}) : frozen_post();
    default: break;
  }
  HF_ASSERT(!"an unknown step of a frozen layer");
}

// Whenever the grace period has moved on.
void VolumeImpl::frozen_grace() {
  if (!leave_epoch(cut_->grace)) return;
  cut_->waits_grace = false;
  frozen_post();
  end_background();
}

// ---- images and limbo

bool VolumeImpl::retire_some() {
  for (uint32_t seen = 0; cut_->cursor < hot_size_; cut_->cursor++) {
    if (seen == kHotBatch) return false;
    const HotSlab& one = hot(cut_->cursor);
    if (one.slab == kNoIndex || slabs_[one.slab].layer != cut_->layer) continue;
    retire(cut_->cursor);
    seen++;
  }
  return true;
}

void VolumeImpl::retire(uint32_t hot_index) {
  HotSlab& one = hot(hot_index);
  HF_ASSERT(one.pins == 0 && !one.flushing && !one.queued && !one.reclaim_listed);
  const uint32_t index = one.slab;
  Slab& slab = slabs_[index];
  if (one.slot != PageArena::kNone) arena_->release(one.slot);
  one.slot = PageArena::kNone;
  one.slab = kNoIndex;
  slab.hot = kNoIndex;
  hot_free_.push_back(hot_index);
  hot_live_--;
  for (uint32_t c = 0; c < kChunksPerSlab; c++) {
    const SlabEntry entry = slabs_.entry(index, c);
    if (entry.logical_chunk == kNoChunk || (entry.data | entry.zero) != 0) continue;
    layers_[slab.layer].map.erase(entry.logical_chunk);
    set_entry(index, c, kFreeEntry);
    slab.free_chunks++;
  }
  slabs_.pack(index);
  if (slot_waiters_ != nullptr) wake(slot_waiters_, slot_waiters_tail_);
}

// ---- empty slabs

// Nobody else knows of the layer yet, so its empty slabs can go back like any of the top's.
bool VolumeImpl::release_some() {
  for (uint32_t seen = 0; cut_->cursor < slabs_.size(); cut_->cursor++) {
    if (seen++ == kSlabBatch) return false;
    Slab& slab = slabs_[cut_->cursor];
    if (slab.state != SlabState::kLive || slab.layer != cut_->layer) continue;
    HF_ASSERT(slab.hot == kNoIndex);
    slabs_.pack(cut_->cursor);  // those with room were kept ready for more
    if (slab.holes || slab.free_chunks != kChunksPerSlab) continue;
    slab.state = SlabState::kReleasing;
    release_queue_.push_back(cut_->cursor);
  }
  start_release();
  return true;
}

// ---- equal copies

// Reads the newer copy, so that the older one becomes it to the byte, whoever wrote it.
bool VolumeImpl::equalise_some() {
  uint32_t used = 0;
  uint32_t seen = 0;
  for (; cut_->cursor < slabs_.size() && used < cut_->io.size(); cut_->cursor++) {
    if (seen++ == kSlabBatch) break;
    const Slab& slab = slabs_[cut_->cursor];
    if (slab.state != SlabState::kLive || slab.layer != cut_->layer || !slab.unequal) continue;
    cut_io(used, IoOp::kRead, page_offset(slab.number, slab.newest), size_t{used} * kPageSize, kPageSize,
           [](IoRequest* request, int error) {
             auto* io = static_cast<PageIo*>(request->user);
             io->volume->equalise_read(*io, error);
           });
    cut_->io[used++].tag = cut_->cursor;
  }
  if (used == 0 && cut_->cursor == slabs_.size()) return true;
  if (used == 0) frozen_post();
  for (uint32_t i = 0; i < used; i++) device_.submit(&cut_->io[i].io);
  return false;
}

void VolumeImpl::equalise_read(PageIo& io, int error) {
  std::unique_lock lock(mu_);
  const Slab& slab = slabs_[io.tag];
  auto& page = *static_cast<SlabPage*>(io.iov.iov_base);
  const uint64_t from = page_offset(slab.number, slab.newest);
  const bool good = error == 0 && state_ != State::kAborted && verify(page, environment_.pool, from) == PageState::kOk &&
                    page.layer_id == layers_[slab.layer].id && page.generation == slab.generation &&
                    page.header.sequence == slab.sequence;
  if (!good) {
    lock.unlock();
    return equalise_written(io, error != 0 ? error : EIO);
  }
  const uint64_t to = page_offset(slab.number, 1u - slab.newest);
  seal(page, environment_.pool, to, slab.sequence);
  io.io.op = IoOp::kWrite;
  io.io.fua = false;
  io.io.offset = to;
  io.io.done = [](IoRequest* request, int failed) {
    auto* one = static_cast<PageIo*>(request->user);
    one->volume->equalise_written(*one, failed);
  };
  device_.submit(&io.io);
  unlock(lock);
}

void VolumeImpl::equalise_written(PageIo& io, int error) {
  std::unique_lock lock(mu_);
  if (error != 0) cut_->settled = false;
  else slabs_[io.tag].unequal = 0;
  if (--cut_->outstanding == 0) frozen_post();
  end_background();
  unlock(lock);
}

// ---- the record

// The barrier, then the layer's record, read and written copy by copy: it gets the flag that says that copies are equal. A
// failure costs the flag, and the second copies their worth, not the snapshot.
void VolumeImpl::frozen_io_done(int error) {
  std::unique_lock lock(mu_);
  cut_->outstanding--;
  if (error != 0 || state_ == State::kAborted) cut_->settled = false;
  const auto report = [this] {
    if (!cut_->settled && state_ != State::kAborted) {
      event(Code::kIo, "volume " + std::to_string(spec_.volume_id) + ": not every page of frozen layer " +
                           std::to_string(layers_[cut_->layer].id) +
                           " has two equal copies; the snapshot is complete, with less to fall back on. Check the "
                           "pool's device");
    }
    cut_->step = kReport;
    cut_->cursor = 0;
    frozen_post();
  };
  if (!cut_->settled) {
    report();
  } else if (cut_->step == kBarrier) {
    cut_->step = kRecordRead;
    frozen_read_record();
  } else if (cut_->step == kRecordLook || cut_->step == kRecordRead) {
    auto& a = cut_->pages->at<LayerRecord>(0);
    auto& b = cut_->pages->at<LayerRecord>(kPageSize);
    const uint64_t address = layer_address(cut_->slot);
    const Copies copies = choose_record(a, b, environment_.pool, address);
    const LayerRecord record = copies.valid() ? (copies.newest == 0 ? a : b) : LayerRecord{};
    if (record.layer_id != layers_[cut_->layer].id || record.state != format::LayerState::kFrozen ||
        (record.header.flags & format::kLayerSettled) != 0) {
      report();
    } else if (cut_->step == kRecordLook) {
      cut_->step = kEqualise;
      frozen_post();
    } else {
      for (uint32_t copy = 0; copy < 2; copy++) {
        auto& page = cut_->pages->at<LayerRecord>(copy * kPageSize);
        page = record;
        page.header.flags |= format::kLayerSettled;
        seal(page, environment_.pool, address + uint64_t{copy} * kPageSize, record.header.sequence + 1);
      }
      cut_->step = kRecordWrite;
      cut_->cursor = static_cast<uint32_t>(copies.next());
      frozen_record(cut_->cursor);
    }
  } else if (cut_->step == kRecordWrite && cut_->cursor < 2) {
    frozen_record(1 - cut_->cursor);
    cut_->cursor = 2;
  } else {
    report();
  }
  end_background();
  unlock(lock);
}

void VolumeImpl::frozen_record(uint32_t copy) {
  cut_io(0, IoOp::kWrite, layer_address(cut_->slot) + uint64_t{copy} * kPageSize, size_t{copy} * kPageSize, kPageSize,
         [](IoRequest* request, int error) {
           static_cast<PageIo*>(request->user)->volume->frozen_io_done(error);
         });
  device_.submit(&cut_->io[0].io);
}

// ---- the report

bool VolumeImpl::report_some() {
  for (uint32_t seen = 0; cut_->cursor < slabs_.size(); cut_->cursor++) {
    if (seen++ == kSlabBatch) return false;
    const Slab& slab = slabs_[cut_->cursor];
    if (slab.state != SlabState::kLive || slab.layer != cut_->layer) continue;
    cut_->slabs.push_back({slab.number, 1, slab.generation});
  }
  std::sort(cut_->slabs.begin(), cut_->slabs.end(), [](const SlabRun& a, const SlabRun& b) { return a.first < b.first; });
  std::vector<SlabRun>& runs = cut_->report.frozen.slabs;
  for (const SlabRun& one : cut_->slabs) {
    if (!runs.empty() && runs.back().first + runs.back().count == one.first && runs.back().generation == one.generation) {
      runs.back().count++;
    } else {
      runs.push_back(one);
    }
  }
  return true;
}

}  // namespace holdfast
