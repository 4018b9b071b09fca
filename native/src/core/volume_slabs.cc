// Slabs: claiming one (its page checked, then both copies written durably one after the other, before any data goes
// in), giving an empty one back (page durable in both copies → discard complete → returned), and waiting for one.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "volume_impl.h"

namespace holdfast {

using format::kChunksPerSlab;
using format::kPageSize;
using format::SlabPage;

// ---- slabs with free chunks

void VolumeImpl::add_to_top(uint32_t index) {
  slabs_[index].layer = static_cast<uint16_t>(layers_.size() - 1);
  top_slabs_++;
  if (top_list_.size() > 2 * top_slabs_ + 64) {
    std::erase_if(top_list_, [this](uint32_t one) {
      return slabs_[one].state != SlabState::kLive || !in_top(slabs_[one]);
    });
    std::sort(top_list_.begin(), top_list_.end());
    top_list_.erase(std::unique(top_list_.begin(), top_list_.end()), top_list_.end());
  }
  top_list_.push_back(index);
}

void VolumeImpl::list_slab(uint32_t index) {
  Slab& slab = slabs_[index];
  HF_ASSERT(!slab.listed && in_top(slab) && slab.state == SlabState::kLive && !slab.unsettled);
  slab.listed = 1;
  slab.list_previous = kNoIndex;
  slab.list_next = list_head_;
  if (list_head_ != kNoIndex) slabs_[list_head_].list_previous = index;
  list_head_ = index;
  free_total_ += usable_free(slab);
}

void VolumeImpl::unlist_slab(uint32_t index) {
  Slab& slab = slabs_[index];
  HF_ASSERT(listed(slab));
  slab.listed = 0;
  if (slab.list_previous != kNoIndex) slabs_[slab.list_previous].list_next = slab.list_next;
  else list_head_ = slab.list_next;
  if (slab.list_next != kNoIndex) slabs_[slab.list_next].list_previous = slab.list_previous;
  slab.list_next = slab.list_previous = kNoIndex;
  free_total_ -= usable_free(slab);
  if (current_ == index) current_ = kNoIndex;
}

// What flushes can do for space: chunks in limbo, and chunks that only the older copy of a page still maps.
void VolumeImpl::settle_for_space() {
  for (uint32_t seen = 0, done = 0; unsettled_ > 0 && done < 32 && seen < slabs_.size(); seen++) {
    unsettled_cursor_ = (unsettled_cursor_ + 1) % slabs_.size();
    const Slab& slab = slabs_[unsettled_cursor_];
    if (slab.state != SlabState::kLive || !slab.unsettled || !in_top(slab)) continue;
    HotSlab* image = ensure_hot(unsettled_cursor_);
    if (image == nullptr) break;
    mark_dirty(*image);
    done++;
  }
  want_flush();
}

// ---- claiming

// Ahead of need, so that a stream of first writes does not stop at the end of each slab.
void VolumeImpl::claim_ahead() {
  if (claiming_ == 0 && free_total_ < room_ahead()) start_claims();
}

// A write waits for one.
void VolumeImpl::want_slab() {
  if (claiming_ == 0) start_claims();
  else if (top_slabs_ >= 2) ahead_ = std::min<uint64_t>(2 * ahead_, kClaims);  // they were asked for too late
}

// All that are claimed at a time go step by step together and share two device flushes: beside a stream of writes each
// flush costs it tens of milliseconds on a disk with a cache of its own.
void VolumeImpl::start_claims() {
  HF_ASSERT(claiming_ == 0);
  for (uint64_t more = claim_batch(); more > 0 && start_claim(); more--) {
  }
}

// False: there is none to be had now. At most kClaims at a time: start_claims() sees to it.
bool VolumeImpl::start_claim() {
  if (stock_waiting_ || state_ != State::kOpen || holding_) return false;
  Claim& claim = *std::find_if(claims_.begin(), claims_.end(),
                               [](const Claim& one) { return one.stage == Claim::Stage::kIdle; });
  claim.volume = this;
  claim.directory = PageArena::kNone;
  claim.known = false;
  if (!unclaimed_.empty()) {
    claim.slab = unclaimed_.back().slab;
    claim.directory = unclaimed_.back().directory;
    claim.known = unclaimed_.back().known;
    unclaimed_.pop_back();
  } else {
    uint64_t near = current_ != kNoIndex ? slabs_[current_].number
                    : slabs_.size() > 0  ? slabs_[slabs_.size() - 1].number
                                         : 0;
    for (const Claim& one : claims_) {
      if (one.stage != Claim::Stage::kIdle && one.slab.slab > near) near = one.slab.slab;
    }
    if (!environment_.stock->take(near, &claim.slab, &stock_task_, Executor::current())) {
      stock_waiting_ = true;
      arm_full_timer();
      return false;
    }
  }
  full_since_ = 0;
  if (claim.directory != PageArena::kNone && arena_->claim(claim.directory).layer_id != top().id) {
    arena_->set_claim_state(claim.directory, PageArena::ClaimState::kFree);
    claim.directory = PageArena::kNone;
  }
  if (claim.directory == PageArena::kNone) {
    claim.directory =
        arena_->add_claim({claim.slab.slab, claim.slab.generation, top().id, PageArena::ClaimState::kClaiming});
    if (claim.directory == PageArena::kNone || slabs_.size() + claiming_ > kMaxSlabIndex) {
      if (claim.directory != PageArena::kNone) arena_->set_claim_state(claim.directory, PageArena::ClaimState::kFree);
      environment_.stock->put_back(claim.slab);
      event(Code::kNoSpace, "volume " + std::to_string(spec_.volume_id) +
                                " has claimed as many slabs as this opening of it can keep track of; close it and open "
                                "it again (move it to another node, or restart the pods that use it)");
      fail_waiting(slab_waiters_, slab_waiters_tail_, ENOSPC);
      return false;
    }
  }
  if (claim.pages == nullptr) claim.pages = std::make_unique<PageBuffer>(2 * kPageSize);
  if (claiming_++ == 0) start_background();
  claim.stage = Claim::Stage::kRead;
  claim_submit(claim, IoOp::kRead, 0, 2);
  return true;
}

void VolumeImpl::claim_submit(Claim& claim, IoOp op, uint32_t copy, uint32_t pages) {
  PageIo& io = claim.io;
  io.iov = {claim.pages->data() + size_t{copy} * kPageSize, size_t{pages} * kPageSize};
  io.io.op = op;
  io.io.fua = false;
  io.io.offset = page_offset(claim.slab.slab, copy);
  io.io.length = io.iov.iov_len;
  io.io.iov = &io.iov;
  io.io.iov_count = 1;
  io.io.user = &claim;
  io.io.done = [](IoRequest* request, int error) {
    Claim* done = static_cast<Claim*>(request->user);
    done->volume->claim_step(*done, error);
  };
  claim_ios_++;
  device_.submit(&io.io);
}

SlabPage& VolumeImpl::seal_empty_page(std::byte* memory, const SlabStock::Slab& slab, uint64_t layer_id, uint32_t copy,
                                      uint64_t sequence) {
  auto& page = page_at<SlabPage>({memory, kPageSize}, 0);
  std::memset(static_cast<void*>(&page), 0, kPageSize);
  page.layer_id = layer_id;
  page.generation = slab.generation;
  page.epoch = spec_.epoch;
  page.volume_id = layer_id != 0 ? spec_.volume_id : 0;
  for (format::SlabEntry& entry : page.entries) entry = kFreeEntry;
  seal(page, environment_.pool, page_offset(slab.slab, copy), sequence);
  return page;
}

// Whether somebody else's rights stand on this page: then the slab is not ours to claim, whatever the stock says.
std::string VolumeImpl::claim_objection(const Claim& claim, const SlabPage& page, PageState state) const {
  if (state == PageState::kNewerVersion) return "is of a newer format version";
  if (state != PageState::kOk) return {};
  const std::string whose = "names layer " + std::to_string(page.layer_id) + ", generation " +
                            std::to_string(page.generation) + ", epoch " + std::to_string(page.epoch);
  if (page.generation > claim.slab.generation) return whose;
  if (page.generation < claim.slab.generation || page.layer_id == 0) return {};
  // Claimed in vain, or not to the end, for a layer that was the top then: still nobody else's.
  const auto ours = [&](const Layer& layer) { return layer.id == page.layer_id; };
  if (page.epoch > spec_.epoch || std::none_of(layers_.begin(), layers_.end(), ours)) return whose;
  for (const format::SlabEntry& entry : page.entries) {
    if (entry.logical_chunk != format::kNoChunk) return whose + " and holds data";
  }
  return page.hole_count > 0 ? whose + " and holds holes" : std::string();
}

void VolumeImpl::claim_step(Claim& claim, int error) {
  std::unique_lock lock(mu_);
  claim_ios_--;
  if (state_ == State::kAborted || error != 0) claim_failed(claim, error);
  else if (claim.stage == Claim::Stage::kRead && claim_looked(claim)) claim_submit(claim, IoOp::kWrite, claim.first, 1);
  claims_on();
  unlock(lock);
}

void VolumeImpl::claim_failed(Claim& claim, int error) {
  const bool read = claim.stage == Claim::Stage::kRead;
  if (state_ != State::kAborted) {
    unclaimed_.push_back({claim.slab, claim.directory, claim.known});
    event(Code::kIo, "volume " + std::to_string(spec_.volume_id) + ": slab " + std::to_string(claim.slab.slab) +
                         " could not be claimed: its page can't be " + (read ? "read" : "written") + " (errno " +
                         std::to_string(error) +
                         "). Writes to new places fail until it can; check the pool's device");
  }
  claim_ended(claim);
  if (state_ != State::kAborted && list_head_ == kNoIndex && claiming_ == 0) {
    fail_waiting(slab_waiters_, slab_waiters_tail_, EIO);
  }
}

void VolumeImpl::claim_ended(Claim& claim) {
  claim.stage = Claim::Stage::kIdle;
  HF_ASSERT(claiming_ > 0);
  claiming_--;
}

// Whether the slab is ours to claim; its pages are sealed then.
bool VolumeImpl::claim_looked(Claim& claim) {
  for (uint32_t copy = 0; copy < 2; copy++) {
    const auto& page = claim.pages->at<SlabPage>(size_t{copy} * kPageSize);
    const PageState state = verify(page, environment_.pool, page_offset(claim.slab.slab, copy));
    const std::string objection = claim_objection(claim, page, state);
    if (!objection.empty()) {
      arena_->set_claim_state(claim.directory, PageArena::ClaimState::kFree);
      event(Code::kStale, "volume " + std::to_string(spec_.volume_id) + ": slab " + std::to_string(claim.slab.slab) +
                              " was handed out with generation " + std::to_string(claim.slab.generation) +
                              ", but its page (copy " + "AB"[copy] + ") " + objection +
                              "; it is left alone. Run `holdfast pool check` to see whose it is");
      claim_ended(claim);
      return false;
    }
    // A page of this very generation may carry a number that this opening has not used yet.
    if (state == PageState::kOk && page.generation == claim.slab.generation) {
      flush_number_ = std::max(flush_number_, page.header.sequence);
    }
  }
  // A claim that was cut off before has left one copy torn perhaps: the other one stays until that is whole.
  const Copies copies = choose_slab(claim.pages->at<SlabPage>(0), claim.pages->at<SlabPage>(kPageSize),
                                    environment_.pool, page_offset(claim.slab.slab, 0));
  claim.first = static_cast<uint32_t>(copies.next());
  flush_number_++;
  arena_->raise_flush_number(flush_number_);
  for (uint32_t copy = 0; copy < 2; copy++) {
    seal_empty_page(claim.pages->data() + size_t{copy} * kPageSize, claim.slab, top().id, copy, flush_number_);
  }
  claim.stage = Claim::Stage::kWriteFirst;
  return true;
}

// When all that are under way have come equally far, the device is flushed for all of them; when none is, it is over.
void VolumeImpl::claims_on() {
  if (claim_ios_ > 0) return;
  if (claiming_ > 0) {
    claim_flush_.io.op = IoOp::kFlush;
    claim_flush_.io.offset = 0;
    claim_flush_.io.length = 0;
    claim_flush_.io.user = this;
    claim_flush_.io.done = [](IoRequest* io, int error) { static_cast<VolumeImpl*>(io->user)->claims_flushed(error); };
    claim_ios_++;
    device_.submit(&claim_flush_.io);
    return;
  }
  if (slab_waiters_ != nullptr) want_slab();
  hold_drained();
  end_background();
}

void VolumeImpl::claims_flushed(int error) {
  std::unique_lock lock(mu_);
  claim_ios_--;
  // Half of what was there when they were asked for is gone: next time it might be all.
  const bool late = top_slabs_ >= 2 && 2 * free_total_ < room_ahead();
  bool claimed = false;
  for (Claim& claim : claims_) {
    if (claim.stage == Claim::Stage::kIdle) continue;
    if (state_ == State::kAborted || error != 0) {
      claim_failed(claim, error);
    } else if (claim.stage == Claim::Stage::kWriteFirst) {
      claim.stage = Claim::Stage::kWriteSecond;
      claim_submit(claim, IoOp::kWrite, 1 - claim.first, 1);
    } else {
      claim_done(claim);
      claimed = true;
    }
  }
  if (claimed) claimed_ns_ = Executor::current()->now_ns();
  if (claimed && late) ahead_ = std::min<uint64_t>(2 * ahead_, kClaims);
  if (claimed && slab_waiters_ != nullptr) wake(slab_waiters_, slab_waiters_tail_);
  claims_on();
  unlock(lock);
}

void VolumeImpl::claim_done(Claim& claim) {
  arena_->set_claim_state(claim.directory, PageArena::ClaimState::kClaimed);
  const uint32_t index = slabs_.add();
  Slab& slab = slabs_[index];
  slab.number = claim.slab.slab;
  slab.generation = claim.slab.generation;
  slab.sequence = claim.pages->at<SlabPage>().header.sequence;
  slab.claim = claim.directory;
  slab.ours = 1;
  add_to_top(index);
  list_slab(index);
  notices_.push_back({true, top().id, slab.number, slab.generation});
  claim_ended(claim);
}

// ---- waiting for the stock

void VolumeImpl::stock_has_some(Task* task) {
  VolumeImpl* self = static_cast<StockTask*>(task)->volume;
  std::unique_lock lock(self->mu_);
  self->stock_waiting_ = false;
  if (self->slab_waiters_ != nullptr) self->want_slab();
  else self->claim_ahead();
  self->idle_check();
  self->unlock(lock);
}

// A timer can't be taken back, so it outlives the volume if it must.
struct VolumeImpl::FullTimer : Task {
  std::mutex mutex;
  VolumeImpl* volume = nullptr;
  bool armed = false;  // under the volume's lock
};

void VolumeImpl::arm_full_timer() {
  if (slab_waiters_ == nullptr || !environment_.stock->known_full()) return;
  Executor* executor = Executor::current();
  HF_ASSERT(executor != nullptr);
  if (full_since_ == 0) full_since_ = executor->now_ns();
  if (full_timer_ == nullptr) {
    full_timer_ = new FullTimer;
    full_timer_->volume = this;
    full_timer_->run = full_timer_run;
  }
  if (full_timer_->armed) return;
  uint64_t soonest = ~uint64_t{0};
  for (RequestState* at = slab_waiters_; at != nullptr; at = at->next_waiting) {
    soonest = std::min(soonest, std::max(at->held_since, full_since_));
  }
  full_timer_->armed = true;
  executor->post_at(full_timer_, soonest + environment_.full_timeout_ns);
}

void VolumeImpl::full_timer_run(Task* task) {
  auto* timer = static_cast<FullTimer*>(task);
  std::unique_lock guard(timer->mutex);
  if (timer->volume != nullptr) return timer->volume->slab_waiters_timeout();
  guard.unlock();
  delete timer;
}

void VolumeImpl::drop_full_timer() {
  if (full_timer_ == nullptr) return;
  std::unique_lock guard(full_timer_->mutex);
  full_timer_->volume = nullptr;
  const bool armed = full_timer_->armed;
  guard.unlock();
  if (!armed) delete full_timer_;
}

void VolumeImpl::slab_waiters_timeout() {
  std::unique_lock lock(mu_);
  full_timer_->armed = false;
  if (!environment_.stock->known_full()) {
    full_since_ = 0;
    return unlock(lock);
  }
  const uint64_t now = Executor::current()->now_ns();
  RequestState* expired = nullptr;
  RequestState* expired_tail = nullptr;
  RequestState* rest = nullptr;
  RequestState* rest_tail = nullptr;
  for (RequestState* at = slab_waiters_; at != nullptr;) {
    RequestState* next = at->next_waiting;
    at->next_waiting = nullptr;
    const bool over = full_since_ != 0 && std::max(at->held_since, full_since_) + environment_.full_timeout_ns <= now;
    RequestState*& head = over ? expired : rest;
    RequestState*& tail = over ? expired_tail : rest_tail;
    if (head == nullptr) head = at;
    else tail->next_waiting = at;
    tail = at;
    at = next;
  }
  slab_waiters_ = rest;
  slab_waiters_tail_ = rest_tail;
  if (expired != nullptr) {
    event(Code::kNoSpace, "volume " + std::to_string(spec_.volume_id) +
                              ": the pool is full, writes to new places get ENOSPC. Delete volumes or grow the pool");
    fail_waiting(expired, expired_tail, ENOSPC);
  }
  arm_full_timer();
  unlock(lock);
}

// ---- giving back

void VolumeImpl::maybe_release(uint32_t index) {
  Slab& slab = slabs_[index];
  if (slab.state != SlabState::kLive || !in_top(slab) || slab.hot != kNoIndex || slab.unsettled || slab.holes ||
      slab.free_chunks != kChunksPerSlab || state_ != State::kOpen) {
    return;
  }
  HF_ASSERT(listed(slab));
  ahead_ = 1;  // it shrinks
  // Not the last room, nor what a held write is about to take: it would only have to be claimed again.
  if (slab_waiters_ != nullptr || free_total_ < usable_chunks_ + 2 * room_ahead()) return;
  unlist_slab(index);
  slab.state = SlabState::kReleasing;
  release_queue_.push_back(index);
  start_release();
}

// Empty slabs that were kept when they became empty, for a write that was held then.
void VolumeImpl::release_spare() {
  uint32_t index = list_head_;
  for (uint32_t seen = 0; seen < 16 && index != kNoIndex && free_total_ > usable_chunks_ + 2 * room_ahead(); seen++) {
    const uint32_t next = slabs_[index].list_next;
    maybe_release(index);
    index = next;
  }
}

void VolumeImpl::start_release() {
  if (release_.stage != Release::Stage::kIdle || release_queue_.empty() || state_ != State::kOpen) return;
  release_.slab = release_queue_.front();
  release_queue_.pop_front();
  if (release_.page == nullptr) release_.page = std::make_unique<PageBuffer>(kPageSize);
  start_background();
  flush_number_++;
  arena_->raise_flush_number(flush_number_);
  release_.stage = Release::Stage::kWriteFirst;
  release_submit_page(1u - slabs_[release_.slab].newest);
}

void VolumeImpl::release_submit_page(uint32_t copy) {
  const Slab& slab = slabs_[release_.slab];
  seal_empty_page(release_.page->data(), {slab.number, slab.generation}, 0, copy, flush_number_);
  PageIo& io = release_.io;
  io.iov = {release_.page->data(), kPageSize};
  io.io.op = IoOp::kWrite;
  io.io.fua = true;
  io.io.offset = page_offset(slab.number, copy);
  io.io.length = kPageSize;
  io.io.iov = &io.iov;
  io.io.iov_count = 1;
  io.io.user = this;
  io.io.done = [](IoRequest* request, int error) { static_cast<VolumeImpl*>(request->user)->release_step(error); };
  device_.submit(&io.io);
}

// One that can't be given back: the top claims it anew when it needs it, a layer that was the top just keeps it.
void VolumeImpl::keep_empty(uint32_t index) {
  Slab& slab = slabs_[index];
  if (in_top(slab)) unclaimed_.push_back({{slab.number, slab.generation}, slab.claim, true});
  else slab.state = SlabState::kLive;
}

void VolumeImpl::release_step(int error) {
  std::unique_lock lock(mu_);
  const uint32_t index = release_.slab;
  Slab& slab = slabs_[index];
  HF_ASSERT(slab.state == SlabState::kReleasing && slab.free_chunks == kChunksPerSlab);
  const bool writing = release_.stage != Release::Stage::kDiscard;
  const auto stop = [&] {
    if (in_top(slab)) top_slabs_--;
    if (slab.state == SlabState::kReleasing) slabs_.remove(index);
    release_.stage = Release::Stage::kIdle;
    if (state_ == State::kOpen) start_release();
    if (release_.stage == Release::Stage::kIdle && cut_ != nullptr && cut_->waits_release) {
      cut_->waits_release = false;
      frozen_post();
    }
    end_background();
    unlock(lock);
  };
  if (state_ == State::kAborted) return stop();
  if (writing && error != 0) {
    event(Code::kIo, "volume " + std::to_string(spec_.volume_id) + ": the page of empty slab " +
                         std::to_string(slab.number) + " can't be written (errno " + std::to_string(error) +
                         "); the slab stays with its layer. Check the pool's device");
    keep_empty(index);
    return stop();
  }
  if (release_.stage == Release::Stage::kWriteFirst) {
    release_.stage = Release::Stage::kWriteSecond;
    release_submit_page(slab.newest);
    return unlock(lock);
  }
  if (release_.stage == Release::Stage::kWriteSecond) {
    // From here on the slab is not ours, also for an engine that takes over with an old grant.
    if (slab.claim != PageArena::kNone) {
      arena_->set_claim_state(slab.claim, PageArena::ClaimState::kReturned);
    } else {
      slab.claim =
          arena_->add_claim({slab.number, slab.generation, layers_[slab.layer].id, PageArena::ClaimState::kReturned});
      if (slab.claim == PageArena::kNone) {
        keep_empty(index);
        return stop();
      }
    }
    release_.stage = Release::Stage::kDiscard;
    PageIo& io = release_.io;
    io.io.op = IoOp::kDiscard;
    io.io.fua = false;
    io.io.offset = data_offset(index, 0);
    io.io.length = format::kSlabSize;
    io.io.iov = nullptr;
    io.io.iov_count = 0;
    device_.submit(&io.io);
    return unlock(lock);
  }
  // A device that can't discard has not failed: the slab is as empty as it needs to be.
  notices_.push_back({false, layers_[slab.layer].id, slab.number, slab.generation});
  stop();
}

}  // namespace holdfast
