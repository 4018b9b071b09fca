// Requests as such: how one comes in, waits, is resumed on its own executor, and ends.
#include "volume.h"

#include <cerrno>
#include <new>

#include "volume_impl.h"

namespace holdfast {

using format::kBlockSize;

VolumeImpl::VolumeImpl(const VolumeEnvironment& environment, const VolumeSpec& spec)
    : environment_(environment),
      spec_(spec),
      device_(*environment.device),
      arena_(environment.arena),
      first_region_(environment.superblock->first_region_offset),
      usable_chunks_(environment.chunks_per_slab),
      size_bytes_(spec.size_bytes),
      read_only_(spec.read_only) {
  HF_ASSERT(environment.device != nullptr && environment.superblock != nullptr);
  HF_ASSERT(usable_chunks_ >= 1 && usable_chunks_ <= format::kChunksPerSlab);
  stock_task_.run = stock_has_some;
  stock_task_.volume = this;
  frozen_task_.volume = this;
  compact_task_.volume = this;
}

void VolumeImpl::submit(VolumeRequest* request) {
  auto* state = new (request->scratch) RequestState;
  state->request = request;
  state->volume = this;
  state->home = Executor::current();
  HF_ASSERT(state->home != nullptr && request->done != nullptr);
  for (Extent& extent : state->extents) extent.io.user = state;

  if (request->op == VolumeOp::kFlush) {
    std::unique_lock lock(mu_);
    if (!enter(state)) {
      lock.unlock();
      return finish_later(state, EIO);
    }
    counters_.flushes++;
    drop_epoch(state);
    state->flush.home = state->home;
    state->flush.done = request_flush_done;
    state->flush.user = state;
    request_flush(&state->flush);
    return unlock(lock);
  }
  const bool aligned = (request->offset | request->length) % kBlockSize == 0 && request->length > 0;
  const bool changes = request->op != VolumeOp::kRead;
  {
    std::unique_lock lock(mu_);
    const bool inside = request->offset <= size_bytes_ && request->length <= size_bytes_ - request->offset;
    const int refusal = !aligned || !inside ? EINVAL : changes && read_only_ ? EROFS : enter(state) ? 0 : EIO;
    if (refusal != 0) {
      lock.unlock();
      return finish_later(state, refusal);
    }
    switch (request->op) {
      case VolumeOp::kRead: counters_.reads++; break;
      case VolumeOp::kWrite: counters_.writes++; break;
      default: counters_.discards++; break;
    }
  }
  switch (request->op) {
    case VolumeOp::kRead: return read(state, true);
    case VolumeOp::kWrite: return write(state, true);
    default: return discard(state, true);
  }
}

// For requests that the volume has nothing to do with (any more): the task touches only the request.
void VolumeImpl::finish_later(RequestState* state, int error) {
  state->error = error;
  state->run = [](Task* task) {
    auto* self = static_cast<RequestState*>(task);
    self->request->done(self->request, self->error);
  };
  state->home->post(state);
}

bool VolumeImpl::enter(RequestState* state) {
  if (state_ != State::kOpen) return false;
  active_++;
  hold_epoch(state);
  return true;
}

void VolumeImpl::hold_epoch(RequestState* state) {
  if (state->in_epoch) return;
  state->in_epoch = true;
  state->epoch = epoch_;
  epoch_counts_[epoch_ % kGraceRing]++;
}

void VolumeImpl::drop_epoch(RequestState* state) {
  if (!state->in_epoch) return;
  state->in_epoch = false;
  uint32_t& count = epoch_counts_[state->epoch % kGraceRing];
  HF_ASSERT(count > 0);
  if (--count == 0 && oldest_epoch_ != epoch_) advance_grace();
}

void VolumeImpl::leave(RequestState* state) {
  HF_ASSERT(active_ > 0 && state->outstanding == 0);
  active_--;
  const VolumeRequest& request = *state->request;
  if (state->changed) modified_++;
  end_change(state);
  if (state->error == 0 && request.op == VolumeOp::kRead) counters_.read_bytes += request.length;
  if (state->error == 0 && request.op == VolumeOp::kWrite) counters_.written_bytes += request.length;
  drop_epoch(state);
  if (state_ != State::kOpen) {
    if (state_ == State::kAborted) state->error = EIO;
    idle_check();
  }
}

void VolumeImpl::bump_epoch() {
  // Full ring (a request that has been with the device for 64 flushes): later requests share the present epoch, which
  // only makes the grace period longer.
  if (epoch_ - oldest_epoch_ < kGraceRing - 1) epoch_++;
  advance_grace();
}

void VolumeImpl::skip_empty_epochs() {
  while (oldest_epoch_ != epoch_ && epoch_counts_[oldest_epoch_ % kGraceRing] == 0) oldest_epoch_++;
}

bool VolumeImpl::leave_epoch(uint32_t epoch) {
  if (epoch_ == epoch && epoch_ - oldest_epoch_ < kGraceRing - 1) {
    epoch_++;  // the ring was full when the wait began
    skip_empty_epochs();
  }
  return grace_over(epoch);
}

void VolumeImpl::advance_grace() {
  const uint32_t before = oldest_epoch_;
  skip_empty_epochs();
  if (forget_.waiting) forget_check();
  if (cut_ != nullptr && cut_->waits_grace) frozen_grace();
  if (compact_ != nullptr && compact_->stage == Compact::Stage::kGrace) compact_grace();
  if (oldest_epoch_ != before && !reclaim_list_.empty() && state_ == State::kOpen) reclaim();
}

void VolumeImpl::run_request(Task* task) {
  auto* state = static_cast<RequestState*>(task);
  state->volume->resume(state);
}

void VolumeImpl::resume(RequestState* state) {
  switch (state->request->op) {
    case VolumeOp::kRead: return read(state, false);
    case VolumeOp::kWrite: return write(state, false);
    case VolumeOp::kFlush: break;
    default: return discard(state, false);
  }
  HF_ASSERT(!"a flush does not wait");
}

void VolumeImpl::park(RequestState* state, Need need) {
  HF_ASSERT(need != Need::kNothing && state->wait == RequestState::Wait::kNone);
  const bool slab = need == Need::kSlab;
  const bool copy = need == Need::kCopy;
  state->wait = slab ? RequestState::Wait::kSlab : copy ? RequestState::Wait::kCopy : RequestState::Wait::kSlot;
  state->next_waiting = nullptr;
  RequestState*& head = slab ? slab_waiters_ : copy ? copy_waiters_ : slot_waiters_;
  RequestState*& tail = slab ? slab_waiters_tail_ : copy ? copy_waiters_tail_ : slot_waiters_tail_;
  if (head == nullptr) head = state;
  else tail->next_waiting = state;
  tail = state;
  // What these wait for may hang on their very grace period.
  if ((slab || copy) && state->outstanding == 0) {
    drop_epoch(state);
    end_change(state);
  }
  if (slab) {
    held_++;
    if (state->held_since == 0) state->held_since = state->home->now_ns();
    want_slab();
    if (claiming_ == 0) settle_for_space();  // none is coming
    arm_full_timer();
  } else if (!copy) {
    want_flush();
  }
}

void VolumeImpl::wake(RequestState*& head, RequestState*& tail) {
  RequestState* at = head;
  head = tail = nullptr;
  while (at != nullptr) {
    RequestState* next = at->next_waiting;
    if (at->wait == RequestState::Wait::kSlab) held_--;
    at->next_waiting = nullptr;
    at->wait = RequestState::Wait::kPosted;
    at->run = run_request;
    at->home->post(at);
    at = next;
  }
}

void VolumeImpl::fail_waiting(RequestState*& head, RequestState*& tail, int error) {
  for (RequestState* at = head; at != nullptr; at = at->next_waiting) {
    if (at->error == 0) at->error = error;
  }
  wake(head, tail);
}

void VolumeImpl::complete(RequestState* state) {
  VolumeRequest* request = state->request;
  request->done(request, state->error);
}

void VolumeImpl::event(Code code, std::string message) { events_.push_back({code, std::move(message)}); }

void VolumeImpl::unlock(std::unique_lock<std::mutex>& lock) {
  if (events_.empty() && notices_.empty() && finishers_.empty()) {
    lock.unlock();
    return;
  }
  // After the lock is released the volume may be gone: the observer and the names it needs are kept here.
  std::vector<Event> events;
  std::vector<Notice> notices;
  events.swap(events_);
  notices.swap(notices_);
  std::vector<Finisher*> finishers;
  finishers.swap(finishers_);
  VolumeObserver* observer = environment_.observer;
  const uint64_t volume_id = spec_.volume_id;
  lock.unlock();
  if (observer != nullptr) {
    for (const Notice& notice : notices) {
      if (notice.claimed) observer->slab_claimed(volume_id, notice.layer_id, notice.slab, notice.generation);
      else observer->slab_emptied(volume_id, notice.layer_id, notice.slab, notice.generation);
    }
    for (const Event& one : events) observer->volume_event(volume_id, one.code, one.message);
  }
  send_finishers(finishers);
}

VolumeStats VolumeImpl::stats() const {
  std::lock_guard lock(mu_);
  VolumeStats all = counters_;
  all.size_bytes = size_bytes_;
  all.mapped_bytes = data_chunks_ * format::kChunkSize;
  all.allocated_bytes = (top_slabs_ + unclaimed_.size()) * format::kSlabSize;
  all.held = held_;
  all.dirty_pages = 0;
  for (uint32_t i = 0; i < hot_size_; i++) {
    const HotSlab& one = hot_blocks_[i / kHotBlock][i % kHotBlock];
    all.dirty_pages += one.slab != kNoIndex && (one.dirty || one.flushing);
  }
  all.in_flight = in_flight_.load(std::memory_order_relaxed);
  size_t memory = sizeof(*this) + slabs_.memory_bytes();
  for (const Layer& layer : layers_) memory += layer.map.memory_bytes() + layer.holes.memory_bytes();
  memory += chain_.memory_bytes();
  memory += hot_blocks_.size() * kHotBlock * sizeof(HotSlab) + hot_blocks_.capacity() * sizeof(void*);
  memory += (hot_free_.capacity() + dirty_.capacity() + reclaim_list_.capacity() + flush_queue_.capacity() +
             flush_frozen_.capacity()) *
            sizeof(uint32_t);
  memory += unclaimed_.capacity() * sizeof(Unclaimed) + release_queue_.size() * sizeof(uint32_t);
  memory += size_t{flush_capacity_ + 4} * format::kPageSize;
  if (compact_ != nullptr) memory += sizeof(Compact) + compact_->buffer->size();
  for (const auto& [slab, holes] : slab_holes_) memory += holes.capacity() * sizeof(format::HoleRange) + 64;
  for (const LayerSpec& layer : spec_.layers) memory += layer.slabs.capacity() * sizeof(SlabRun);
  if (arena_ != nullptr) memory += arena_->touched_bytes();
  all.memory_bytes = memory;
  return all;
}

}  // namespace holdfast
