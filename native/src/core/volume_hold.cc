// Holding new writes, so that what the map says stands still and is durable: for a cut, or for a group of volumes until
// each of them is held.
//
//   flush, while writes go on → hold new ones → those under way end → flush what they left
//
// A compaction stops moving before all that, so that nobody is held for its sake.
//
// A write that has begun goes on to its end. One that waits for a slab has nothing at the device and knows no place:
// it waits on, and begins anew in whatever layer is the top by then. A discard may be held between two chunks. Neither
// has been acknowledged, so what a snapshot shows of them is what a crash might.
#include <cerrno>
#include <utility>

#include "volume_impl.h"

namespace holdfast {

// ---- requests

bool VolumeImpl::begin_change(RequestState* state) {
  if (state->changing) return true;
  if (holding_) return false;
  state->changing = true;
  changing_++;
  return true;
}

void VolumeImpl::end_change(RequestState* state) {
  if (!state->changing) return;
  state->changing = false;
  HF_ASSERT(changing_ > 0);
  changing_--;
  hold_drained();
}

void VolumeImpl::park_held(RequestState* state) {
  HF_ASSERT(holding_ && state->outstanding == 0 && state->wait == RequestState::Wait::kNone);
  state->wait = RequestState::Wait::kHold;
  state->next_waiting = nullptr;
  if (hold_waiters_ == nullptr) hold_waiters_ = state;
  else hold_waiters_tail_->next_waiting = state;
  hold_waiters_tail_ = state;
  drop_epoch(state);
}

// ---- the time-out

// A timer can't be taken back. It finds out here whether its volume is still there.
struct VolumeImpl::TimerLink {
  std::mutex mutex;
  VolumeImpl* volume = nullptr;
};

struct VolumeImpl::HoldTimer : Task {
  std::shared_ptr<TimerLink> link;
  uint64_t number = 0;
  void (VolumeImpl::*fired)(uint64_t number) = nullptr;
};

void VolumeImpl::set_timer(uint64_t after_ns) {
  post_timer(control_.home, after_ns, ++timer_number_, &VolumeImpl::timer_fired);
}

void VolumeImpl::post_timer(Executor* home, uint64_t after_ns, uint64_t number,
                            void (VolumeImpl::*fired)(uint64_t number)) {
  if (timer_link_ == nullptr) {
    timer_link_ = std::make_shared<TimerLink>();
    timer_link_->volume = this;
  }
  auto* timer = new HoldTimer;
  timer->link = timer_link_;
  timer->number = number;
  timer->fired = fired;
  timer->run = [](Task* task) {
    std::unique_ptr<HoldTimer> self(static_cast<HoldTimer*>(task));
    std::lock_guard guard(self->link->mutex);
    if (self->link->volume != nullptr) (self->link->volume->*self->fired)(self->number);
  };
  home->post_at(timer, home->now_ns() + after_ns);
}

void VolumeImpl::drop_timers() {
  if (timer_link_ == nullptr) return;
  std::lock_guard guard(timer_link_->mutex);
  timer_link_->volume = nullptr;
}

void VolumeImpl::timer_fired(uint64_t number) {
  std::unique_lock lock(mu_);
  if (number != timer_number_ || state_ == State::kAborted) return unlock(lock);
  if (stage_ == HoldStage::kRetry) {
    cut_commit();
  } else if (stage_ == HoldStage::kDrain || stage_ == HoldStage::kFlushHeld || stage_ == HoldStage::kHeld ||
             stage_ == HoldStage::kRecords) {
    hold_expired_ = true;
    if (stage_ == HoldStage::kHeld && control_.kind == Control::Kind::kHold) hold_lost_ = true;
    if (waits_idly()) {
      hold_end({Code::kHoldExpired, "volume " + std::to_string(spec_.volume_id) + ": the writes under way did not end within " +
                                        std::to_string(hold_timeout_ns_ / 1'000'000) +
                                        " ms, so new ones were not held any longer; try again, or allow more time"});
    } else if (stage_ == HoldStage::kFlushHeld) {
      resume_writes();  // the flush's answer will find that the time is over
    }
  }
  unlock(lock);
}

// ---- holding

bool VolumeImpl::can_hold(const char* what, Status* refusal) const {
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  if (state_ != State::kOpen) {
    *refusal = {Code::kUnavailable, name + " is not open; open it and " + what + " then"};
  } else if (read_only_) {
    *refusal = {Code::kInvalidArgument, name + " is open read-only: nothing writes to it here"};
  } else if (control_.kind == Control::Kind::kHold) {
    *refusal = {Code::kBusy, name + " has its writes held already; cut or release it first"};
  } else if (control_.kind != Control::Kind::kNone) {
    *refusal = {Code::kBusy, name + " is being grown, cut or closed already; try again when that is done"};
  }
  return refusal->ok();
}

Status VolumeImpl::stopped_status(const char* what) const {
  return {Code::kUnavailable, "volume " + std::to_string(spec_.volume_id) + ": " + what +
                                  "; its record on the disk says what has happened"};
}

void VolumeImpl::hold(uint64_t timeout_ns, Done done) {
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  if (Status refusal; !can_hold("hold its writes", &refusal)) {
    post_done(home, std::move(done), std::move(refusal));
    return unlock(lock);
  }
  control_.kind = Control::Kind::kHold;
  control_.home = home;
  control_.done = std::move(done);
  hold_begin(timeout_ns);
  unlock(lock);
}

void VolumeImpl::release(Done done) {
  std::unique_lock lock(mu_);
  hold_lost_ = false;
  if (stage_ == HoldStage::kHeld && control_.kind == Control::Kind::kHold) hold_end({});
  post_done(Executor::current(), std::move(done), {});
  unlock(lock);
}

void VolumeImpl::hold_begin(uint64_t timeout_ns) {
  HF_ASSERT(stage_ == HoldStage::kNone && !holding_);
  hold_expired_ = false;
  hold_lost_ = false;
  hold_timeout_ns_ = timeout_ns;
  stage_ = HoldStage::kFlush;
  hold_waits_ = moving();
  if (hold_waits_) compact_stop();
  else hold_flush();
}

void VolumeImpl::hold_moved() {
  if (!std::exchange(hold_waits_, false)) return;
  if (state_ == State::kAborted) hold_end(stopped_status("it was stopped"));
  else hold_flush();
}

// Never a needless one: a discard that is held half-way has changed pages and is not yet counted as modified.
void VolumeImpl::hold_flush() {
  modified_++;
  FlushWaiter& waiter = control_.flush;
  waiter.home = control_.home;
  waiter.user = this;
  waiter.done = [](FlushWaiter* self, int error) { static_cast<VolumeImpl*>(self->user)->hold_flushed(error); };
  start_background();
  request_flush(&waiter);
}

void VolumeImpl::hold_flushed(int error) {
  std::unique_lock lock(mu_);
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  if (state_ == State::kAborted) {
    hold_end(stopped_status("it was stopped"));
  } else if (hold_expired_) {
    hold_end({Code::kHoldExpired, name + ": what was written could not be flushed within " +
                                      std::to_string(hold_timeout_ns_ / 1'000'000) +
                                      " ms, so writes were not held any longer; try again, or allow more time"});
  } else if (error != 0) {
    hold_end({Code::kIo, name + ": what was written can't be flushed, so nothing was held or cut. Check the pool's "
                                "device and try again"});
  } else if (stage_ == HoldStage::kFlush) {
    stage_ = HoldStage::kDrain;
    holding_ = true;
    hold_since_ = control_.home->now_ns();
    set_timer(hold_timeout_ns_);
    // Those that still have bits to set do it; the others are held like new ones.
    if (slab_waiters_ != nullptr) wake(slab_waiters_, slab_waiters_tail_);
    hold_drained();
  } else if (flush_running_) {
    hold_flush();  // one for space has begun behind it
  } else {
    HF_ASSERT(stage_ == HoldStage::kFlushHeld && changing_ == 0 && holding_);
    stage_ = HoldStage::kHeld;
    if (control_.kind == Control::Kind::kCut) {
      cut_write_records();
    } else {
      post_done(control_.home, std::move(control_.done), {});
      control_.done = nullptr;
    }
  }
  end_background();
  unlock(lock);
}

void VolumeImpl::hold_drained() {
  if (stage_ != HoldStage::kDrain || changing_ > 0 || claiming_ > 0) return;
  if (state_ == State::kAborted) return;
  stage_ = HoldStage::kFlushHeld;
  hold_flush();
}

void VolumeImpl::resume_writes() {
  if (!holding_) return;
  holding_ = false;
  held_ns_ = control_.home->now_ns() - hold_since_;
  timer_number_++;
  wake(hold_waiters_, hold_waiters_tail_);
  if (state_ == State::kOpen && slab_waiters_ != nullptr) want_slab();
}

void VolumeImpl::hold_end(Status status) {
  resume_writes();
  timer_number_++;
  stage_ = HoldStage::kNone;
  // Flushes that came while nothing was to move.
  if (flush_next_ != nullptr && !flush_running_) {
    if (state_ == State::kOpen) {
      start_flush();
    } else {
      FlushWaiter* late = flush_next_;
      flush_next_ = nullptr;
      finish_waiters(late, EIO);
    }
  }
  if (cut_ != nullptr && control_.kind == Control::Kind::kCut) cut_end(std::move(status));
  else if (control_.done != nullptr) control_end(std::move(status));
  else control_ = Control{};
  idle_check();
}

}  // namespace holdfast
