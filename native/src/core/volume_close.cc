// The ends of a volume: growing it, closing it cleanly, and stopping it at once.
#include <cerrno>
#include <cstring>

#include "volume_impl.h"

namespace holdfast {

using format::kPageSize;
using format::SlabPage;
using format::VolumeRecord;
using format::VolumeState;

// Carries a control call's answer to its executor. Holds nothing of the volume, which may be gone by then.
struct VolumeImpl::Finisher : Task {
  Executor* home = nullptr;
  Done done;
  Status status;
};

VolumeImpl::~VolumeImpl() {
  drop_full_timer();
  drop_timers();
  for (Finisher* one : finishers_) delete one;
}

void VolumeImpl::post_done(Executor* home, Done done, Status status) {
  auto* finisher = new Finisher;
  finisher->home = home;
  finisher->done = std::move(done);
  finisher->status = std::move(status);
  finisher->run = [](Task* task) {
    std::unique_ptr<Finisher> self(static_cast<Finisher*>(task));
    self->done(std::move(self->status));
  };
  finishers_.push_back(finisher);
}

void VolumeImpl::send_finishers(const std::vector<Finisher*>& finishers) {
  for (Finisher* one : finishers) one->home->post(one);
}

void VolumeImpl::end_background() {
  HF_ASSERT(background_ > 0);
  background_--;
  idle_check();
}

// Runs whenever something has ended: an abort, or a close, may have waited for it.
void VolumeImpl::idle_check() {
  if (background_ > 0 || active_ > 0 || stock_waiting_) return;
  if (state_ == State::kAborted && control_.kind == Control::Kind::kNone) {
    std::vector<AbortWaiter> waiters;
    waiters.swap(abort_waiters_);
    for (AbortWaiter& one : waiters) post_done(one.home, std::move(one.done), {});
  } else if (state_ == State::kClosing && control_.kind == Control::Kind::kClose && control_.step == 0) {
    control_.step = 1;
    close_flush();
  }
}

// ---- the volume record: the other copy first, durable, then this one; a torn write loses neither size nor epoch

void VolumeImpl::write_record(void (*then)(VolumeImpl* self, int error), void (*half)(VolumeImpl* self)) {
  HF_ASSERT(record_then_ == nullptr);
  record_then_ = then;
  record_half_ = half;
  record_stage_ = 0;
  record_.header.sequence++;
  start_background();
  record_submit(static_cast<uint32_t>(1 - record_newest_));
}

void VolumeImpl::record_submit(uint32_t copy) {
  const uint64_t address = environment_.superblock->volume_table_offset +
                           (uint64_t{spec_.slot} * 2 + copy) * kPageSize;
  auto& page = record_page_->at<VolumeRecord>();
  page = record_;
  seal(page, environment_.pool, address, record_.header.sequence);
  PageIo& io = record_io_;
  io.iov = {record_page_->data(), kPageSize};
  io.io.op = IoOp::kWrite;
  io.io.fua = true;
  io.io.offset = address;
  io.io.length = kPageSize;
  io.io.iov = &io.iov;
  io.io.iov_count = 1;
  io.io.user = this;
  io.io.done = [](IoRequest* request, int error) { static_cast<VolumeImpl*>(request->user)->record_step(error); };
  device_.submit(&io.io);
}

void VolumeImpl::record_step(int error) {
  std::unique_lock lock(mu_);
  if (state_ == State::kAborted) error = EIO;
  if (record_stage_ == 0 && error == 0) {
    record_newest_ = 1 - record_newest_;
    record_stage_ = 1;
    if (record_half_ != nullptr) record_half_(this);
    record_submit(static_cast<uint32_t>(1 - record_newest_));
    return unlock(lock);
  }
  if (record_stage_ == 1 && error != 0 && state_ != State::kAborted) {
    event(Code::kIo, "volume " + std::to_string(spec_.volume_id) +
                         ": one of the two copies of its record can't be written; the other one serves. Check the "
                         "pool's device");
    error = 0;
  }
  auto* then = record_then_;
  record_then_ = nullptr;
  then(this, error);
  end_background();
  unlock(lock);
}

void VolumeImpl::control_end(Status status) {
  HF_ASSERT(control_.kind != Control::Kind::kNone);
  Executor* home = control_.home;
  Done done = std::move(control_.done);
  control_ = Control{};
  post_done(home, std::move(done), std::move(status));
}

// ---- grow

void VolumeImpl::grow(uint64_t size_bytes, Done done) {
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  Status refusal;
  if (state_ != State::kOpen) {
    refusal = {Code::kUnavailable, name + " is not open; open it and grow it then"};
  } else if (read_only_) {
    refusal = {Code::kInvalidArgument, name + " is open read-only; grow it where it is open for writing"};
  } else if (size_bytes % format::kBlockSize != 0 || size_bytes > format::kMaxVolumeBytes) {
    refusal = {Code::kInvalidArgument, name + " can't grow to " + std::to_string(size_bytes) +
                                           " bytes; give a multiple of 4096, at most " +
                                           std::to_string(format::kMaxVolumeBytes)};
  } else if (size_bytes < size_bytes_) {
    refusal = {Code::kInvalidArgument, name + " has " + std::to_string(size_bytes_) +
                                           " bytes; volumes never shrink, ask for at least that"};
  } else if (control_.kind != Control::Kind::kNone) {
    refusal = {Code::kBusy, name + " is being grown, cut or closed already, or its writes are held; try again when that is done"};
  }
  if (!refusal.ok() || size_bytes == size_bytes_) {
    post_done(home, std::move(done), std::move(refusal));
    return unlock(lock);
  }
  control_.kind = Control::Kind::kGrow;
  control_.home = home;
  control_.done = std::move(done);
  control_.size_bytes = size_bytes;
  control_.old_size_bytes = record_.size_bytes;
  record_.size_bytes = size_bytes;
  write_record([](VolumeImpl* self, int error) {
    if (error != 0) {
      // Of unknown outcome: the next record goes to the same copy and says the old size again, unless grown again.
      self->record_.size_bytes = self->control_.old_size_bytes;
      return self->control_end({Code::kIo, "volume " + std::to_string(self->spec_.volume_id) +
                                               ": the new size can't be written to the pool (I/O error); the volume "
                                               "keeps its size. Check the pool's device and try again"});
    }
    self->size_bytes_ = self->control_.size_bytes;
    self->top().map.resize((self->size_bytes_ + format::kChunkSize - 1) / format::kChunkSize);
    self->control_end({});
  });
  unlock(lock);
}

// ---- close

void VolumeImpl::close(Done done) {
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  Status refusal;
  if (state_ != State::kOpen) {
    refusal = {Code::kUnavailable, name + " is not open (it was stopped, or is being closed)"};
  } else if (control_.kind != Control::Kind::kNone) {
    refusal = {Code::kBusy, name + " is being grown, cut or closed already, or its writes are held; try again when that is done"};
  } else if (active_ > 0) {
    refusal = {Code::kBusy, name + " still has " + std::to_string(active_) +
                                " requests under way; close it when they have ended"};
  }
  if (!refusal.ok()) {
    post_done(home, std::move(done), std::move(refusal));
    return unlock(lock);
  }
  state_ = State::kClosing;
  control_.kind = Control::Kind::kClose;
  control_.home = home;
  control_.done = std::move(done);
  control_.flush.home = home;
  control_.flush.user = this;
  control_.flush.done = [](FlushWaiter* waiter, int error) {
    static_cast<VolumeImpl*>(waiter->user)->close_flushed(error);
  };
  if (stock_waiting_ && environment_.stock->cancel(&stock_task_)) stock_waiting_ = false;
  for (uint32_t index : release_queue_) {  // empty slabs whose return has not begun stay
    slabs_[index].state = SlabState::kLive;
    list_slab(index);
  }
  release_queue_.clear();
  if (moving()) compact_stop();
  idle_check();  // claims, flushes and a compaction under way end first
  unlock(lock);
}

// Pages whose copies differ since before this opening are written anew first, as many as there are slots at a time;
// then both copies of every page come from this opening and one more write makes them equal.
void VolumeImpl::close_flush() {
  if (read_only_) {
    state_ = State::kClosed;
    return control_end({});
  }
  for (; control_.next_slab < slabs_.size(); control_.next_slab++) {
    const Slab& slab = slabs_[control_.next_slab];
    if (slab.state != SlabState::kLive || !in_top(slab) || (!slab.unequal && !slab.unsettled) || slab.ours) continue;
    HotSlab* image = ensure_hot(control_.next_slab);
    if (image == nullptr) break;
    mark_dirty(*image);
  }
  modified_++;  // so that this flush is never taken for a needless one
  start_background();
  request_flush(&control_.flush);
}

void VolumeImpl::close_flushed(int error) {
  std::unique_lock lock(mu_);
  if (state_ == State::kAborted) error = EIO;
  if (error != 0) {
    close_failed("its last flush failed");
  } else if (control_.next_slab < slabs_.size()) {
    close_flush();
  } else {
    control_.next_slab = 0;
    control_.step = 2;
    close_equalise();
  }
  end_background();
  unlock(lock);
}

void VolumeImpl::close_failed(const std::string& why) {
  if (state_ != State::kAborted) state_ = State::kOpen;
  control_end({Code::kIo, "volume " + std::to_string(spec_.volume_id) + " can't be closed: " + why +
                              ". It stays open; check the pool's device, then close it again or give it up"});
}

// The older copy of each page gets what the newest one says, number and all. Nothing changes any more, so the map in
// memory is that.
void VolumeImpl::close_equalise() {
  HF_ASSERT(!flush_running_ && control_.outstanding == 0);
  if (flush_capacity_ < kFlushDepth) {
    flush_capacity_ = kFlushDepth;
    flush_pages_ = std::make_unique<PageBuffer>(size_t{flush_capacity_} * kPageSize);
  }
  uint32_t used = 0;
  for (; control_.next_slab < slabs_.size() && used < kFlushDepth; control_.next_slab++) {
    Slab& slab = slabs_[control_.next_slab];
    if (slab.state != SlabState::kLive || !in_top(slab) || !slab.unequal) continue;
    HF_ASSERT(slab.ours);
    auto& page = flush_pages_->at<SlabPage>(size_t{used} * kPageSize);
    ChunkSet limbo;
    fill_page(control_.next_slab, &page, &limbo);
    const uint64_t address = page_offset(slab.number, 1u - slab.newest);
    seal(page, environment_.pool, address, slab.sequence);
    PageIo& io = flush_io_[used++];
    io.tag = control_.next_slab;
    io.volume = this;
    io.iov = {&page, kPageSize};
    io.io.op = IoOp::kWrite;
    io.io.fua = false;
    io.io.offset = address;
    io.io.length = kPageSize;
    io.io.iov = &io.iov;
    io.io.iov_count = 1;
    io.io.user = &io;
    io.io.done = [](IoRequest* request, int error) {
      auto* page_io = static_cast<PageIo*>(request->user);
      page_io->volume->close_page_done(error);
    };
    control_.outstanding++;
  }
  start_background();
  for (uint32_t i = 0; i < used; i++) device_.submit(&flush_io_[i].io);
  if (used > 0) return;
  flush_barrier_.io.op = IoOp::kFlush;
  flush_barrier_.io.offset = 0;
  flush_barrier_.io.length = 0;
  flush_barrier_.io.user = this;
  flush_barrier_.io.done = [](IoRequest* request, int error) {
    static_cast<VolumeImpl*>(request->user)->close_barrier_done(error);
  };
  device_.submit(&flush_barrier_.io);
}

void VolumeImpl::close_page_done(int error) {
  std::unique_lock lock(mu_);
  if (state_ == State::kAborted) error = EIO;
  if (error != 0) control_.error = error;
  if (--control_.outstanding == 0) {
    if (control_.error != 0) close_failed("not every page can be written");
    else close_equalise();
    end_background();
  }
  unlock(lock);
}

void VolumeImpl::close_barrier_done(int error) {
  std::unique_lock lock(mu_);
  if (state_ == State::kAborted) error = EIO;
  if (error != 0) {
    close_failed("the device's cache can't be flushed");
  } else {
    for (uint32_t i = 0; i < slabs_.size(); i++) slabs_[i].unequal = 0;
    record_.state = VolumeState::kClosed;
    record_.header.flags = 0;
    record_.flush_number = flush_number_;
    write_record([](VolumeImpl* self, int failed) {
      if (failed != 0) {
        self->record_.state = VolumeState::kOpen;
        return self->close_failed("its record can't be written");
      }
      self->state_ = State::kClosed;
      self->control_end({});
    });
  }
  end_background();
  unlock(lock);
}

// ---- abort

void VolumeImpl::abort(Done done) {
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  if (state_ == State::kClosed) {
    post_done(home, std::move(done), {});
    return unlock(lock);
  }
  abort_waiters_.push_back({home, std::move(done)});
  if (state_ != State::kAborted) {
    state_ = State::kAborted;
    if (control_.kind == Control::Kind::kClose && control_.step == 0) close_failed("it was stopped");
    fail_waiting(slot_waiters_, slot_waiters_tail_, EIO);
    fail_waiting(slab_waiters_, slab_waiters_tail_, EIO);
    fail_waiting(copy_waiters_, copy_waiters_tail_, EIO);
    if (moving()) compact_stop();
    if (control_.kind == Control::Kind::kForget || waits_idly()) {
      hold_end(stopped_status("it was stopped"));
    }
    fail_waiting(hold_waiters_, hold_waiters_tail_, EIO);
    if (stock_waiting_ && environment_.stock->cancel(&stock_task_)) stock_waiting_ = false;
    // Flushes that wait for one under way are answered when that has ended.
  }
  idle_check();
  unlock(lock);
}

}  // namespace holdfast
