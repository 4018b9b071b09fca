// Making the map durable.
//
//   freeze the changed pages' images (completed writes only) → device flush → write the frozen pages, each to its older
//   copy → device flush
//
// The first device flush makes the data durable before a page says that it is there; the second makes the pages
// durable before anything rests on them. Only then does the newer copy count as the newest. A page write of unknown
// outcome (an error, or a failed second flush) is retried to the same copy, so the other one always serves. If that copy
// turns out to be whole, others may have read it (layer_jobs.cc): it is written once more as it is, which can't tear it,
// and counts from then on; what is new goes to the other one. With more
// changed pages than fit the buffer it goes round by round, each with a device flush between freezing and writing.
//
// One flush at a time; who comes meanwhile shares the next. A flush with nothing completed since the last successful
// one started is done at once.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "volume_impl.h"

namespace holdfast {

using format::kChunksPerSlab;
using format::kNoChunk;
using format::kPageSize;
using format::SlabEntry;
using format::SlabPage;

// ---- images of changed pages

HotSlab* VolumeImpl::ensure_hot(uint32_t index) {
  Slab& slab = slabs_[index];
  HF_ASSERT(slab.state == SlabState::kLive && in_top(slab));
  if (slab.hot != kNoIndex && hot(slab.hot).slot != PageArena::kNone) return &hot(slab.hot);
  slabs_.plain(index);
  auto& page = scratch_page_->at<SlabPage>();
  fill_page(index, &page, nullptr);
  const uint32_t slot = arena_->publish(slab.number, slab.generation, top().id, page);
  if (arena_->free_slots() < arena_->slot_count() / 8) want_flush();
  if (slot == PageArena::kNone) return nullptr;
  if (slab.hot == kNoIndex) {
    if (hot_free_.empty()) {
      if (hot_size_ % kHotBlock == 0) hot_blocks_.push_back(std::make_unique<HotSlab[]>(kHotBlock));
      slab.hot = hot_size_++;
    } else {
      slab.hot = hot_free_.back();
      hot_free_.pop_back();
    }
    hot(slab.hot) = HotSlab{};
    hot(slab.hot).slab = index;
    hot_live_++;
  }
  hot(slab.hot).slot = slot;
  return &hot(slab.hot);
}

void VolumeImpl::fill_page(uint32_t index, SlabPage* page, ChunkSet* limbo) const {
  const Slab& slab = slabs_[index];
  std::memset(static_cast<void*>(page), 0, offsetof(SlabPage, entries));
  page->layer_id = layers_[slab.layer].id;
  page->generation = slab.generation;
  page->epoch = spec_.epoch;
  page->volume_id = spec_.volume_id;
  for (uint32_t c = 0; c < kChunksPerSlab; c++) {
    SlabEntry entry = slabs_.entry(index, c);
    if (limbo != nullptr && entry.logical_chunk != kNoChunk && (entry.data | entry.zero) == 0) {
      limbo->add(c);
      entry = kFreeEntry;
    }
    page->entries[c] = entry;
  }
  std::memset(static_cast<void*>(page->holes), 0, sizeof page->holes);
  if (slab.holes) {
    const auto& holes = slab_holes_.at(index);
    HF_ASSERT(holes.size() <= format::kHolesPerSlab);
    page->hole_count = static_cast<uint32_t>(holes.size());
    std::copy(holes.begin(), holes.end(), page->holes);
  }
}

void VolumeImpl::set_entry(uint32_t index, uint32_t chunk, SlabEntry entry) {
  HF_ASSERT((entry.data & entry.zero) == 0);
  SlabEntry& place = slabs_.plain(index)[chunk];
  // A frozen layer never comes to say more than it did: chain_ rests on it.
  HF_ASSERT(in_top(slabs_[index]) || ((entry.data & ~place.data) | (entry.zero & ~place.zero)) == 0);
  if ((place.data | place.zero) == 0 && (entry.data | entry.zero) != 0) touch_limbo(index, chunk);
  data_chunks_ += entry.data != 0;
  data_chunks_ -= place.data != 0;
  place = entry;
  const Slab& slab = slabs_[index];
  if (slab.hot != kNoIndex && hot(slab.hot).slot != PageArena::kNone) {
    arena_->store_entry(hot(slab.hot).slot, chunk, entry);
  }
}

void VolumeImpl::touch_limbo(uint32_t index, uint32_t chunk) {
  const Slab& slab = slabs_[index];
  if (slab.hot == kNoIndex) return;
  HotSlab& one = hot(slab.hot);
  one.frozen_limbo.drop(chunk);
  one.limbo_one.drop(chunk);
  one.limbo_both.drop(chunk);
}

void VolumeImpl::mark_dirty(HotSlab& one) {
  HF_ASSERT(one.slot != PageArena::kNone);
  one.dirty = true;
  if (one.queued) return;
  one.queued = true;
  dirty_.push_back(slabs_[one.slab].hot);
}

// An image is let go when the disk has all that is in it; the rest of the HotSlab when no chunk is in limbo either.
void VolumeImpl::cool(uint32_t hot_index) {
  HotSlab& one = hot(hot_index);
  HF_ASSERT(one.slab != kNoIndex);
  if (one.dirty || one.flushing || one.pins > 0) return;
  if (one.slot != PageArena::kNone) {
    arena_->release(one.slot);
    one.slot = PageArena::kNone;
    if (slot_waiters_ != nullptr) wake(slot_waiters_, slot_waiters_tail_);
  }
  if (!one.limbo_one.empty() || !one.limbo_both.empty() || one.queued || one.reclaim_listed) return;
  const uint32_t index = one.slab;
  slabs_[index].hot = kNoIndex;
  one.slab = kNoIndex;
  hot_free_.push_back(hot_index);
  hot_live_--;
  if (usable_free(slabs_[index]) == 0) slabs_.pack(index);
  maybe_release(index);
}

void VolumeImpl::reclaim() {
  std::vector<uint32_t> again;
  std::vector<uint32_t> list;
  list.swap(reclaim_list_);
  bool freed = false;
  for (uint32_t at : list) {
    HotSlab& one = hot(at);
    HF_ASSERT(one.reclaim_listed && one.slab != kNoIndex);
    if (!grace_over(one.reclaim_epoch)) {
      again.push_back(at);
      continue;
    }
    one.reclaim_listed = false;
    const uint32_t index = one.slab;
    Slab& slab = slabs_[index];
    for (uint32_t c = 0; c < kChunksPerSlab; c++) {
      if (!one.limbo_both.has(c)) continue;
      const SlabEntry entry = slabs_.entry(index, c);
      HF_ASSERT(entry.logical_chunk != kNoChunk && (entry.data | entry.zero) == 0);
      top().map.erase(entry.logical_chunk);
      set_entry(index, c, kFreeEntry);
      slab.free_chunks++;
      if (listed(slab)) free_total_++;
      freed = true;
    }
    one.limbo_both.clear();
    if (!slab.listed && !slab.unsettled && usable_free(slab) > 0) list_slab(index);
    cool(at);
  }
  for (uint32_t at : again) reclaim_list_.push_back(at);
  if (freed && slab_waiters_ != nullptr) wake(slab_waiters_, slab_waiters_tail_);
}

// ---- asking for a flush

void VolumeImpl::request_flush(FlushWaiter* waiter) {
  waiter->next_waiter = nullptr;
  if (!flush_running_ && modified_ == flushed_) return finish_waiters(waiter, 0);
  // Joins the end of the list, so that waiters are answered in the order they came.
  FlushWaiter** tail = &flush_next_;
  while (*tail != nullptr) tail = &(*tail)->next_waiter;
  *tail = waiter;
  if (!flush_running_ && !quiet()) start_flush();
}

void VolumeImpl::finish_waiters(FlushWaiter* list, int error) {
  while (list != nullptr) {
    FlushWaiter* next = list->next_waiter;
    list->error = error;
    list->run = [](Task* task) {
      auto* self = static_cast<FlushWaiter*>(task);
      self->done(self, self->error);
    };
    list->home->post(list);
    list = next;
  }
}

void VolumeImpl::request_flush_done(FlushWaiter* waiter, int error) {
  auto* state = static_cast<RequestState*>(waiter->user);
  VolumeImpl* self = state->volume;
  std::unique_lock lock(self->mu_);
  state->error = error;
  self->leave(state);
  self->unlock(lock);
  self->complete(state);
}

void VolumeImpl::want_flush() {
  if (flush_running_) flush_wanted_ = true;
  else if (quiet()) return;
  else if (!dirty_.empty() && (state_ == State::kOpen || state_ == State::kClosing)) start_flush();
}

// ---- the flush itself: one chain of callbacks on the executor that started it

void VolumeImpl::start_flush() {
  HF_ASSERT(!flush_running_ && flush_queue_.empty() && flush_frozen_.empty());
  flush_running_ = true;
  flush_wanted_ = false;
  start_background();
  flush_home_ = Executor::current();
  HF_ASSERT(flush_home_ != nullptr);
  flush_start_ = modified_;
  flush_waiters_ = flush_next_;
  flush_next_ = nullptr;
  flush_error_ = 0;
  flush_next_write_ = 0;
  flush_queue_.swap(dirty_);
  const auto wanted = static_cast<uint32_t>(std::min<size_t>(flush_queue_.size(), kFlushPagesMax));
  if (wanted > flush_capacity_) {
    flush_capacity_ = kFlushPagesMin;
    while (flush_capacity_ < wanted) flush_capacity_ *= 2;
    flush_pages_ = std::make_unique<PageBuffer>(size_t{flush_capacity_} * kPageSize);
  }
  flush_round();
}

// Freezes as many pages as fit and flushes the device, so that the data they speak of is durable.
void VolumeImpl::flush_round() {
  flush_round_first_ = static_cast<uint32_t>(flush_frozen_.size());
  flush_final_ = flush_queue_.empty();
  if (!flush_final_) {
    const uint64_t number = ++flush_number_;
    arena_->raise_flush_number(number);
    const uint32_t epoch = epoch_;
    uint32_t count = 0;
    while (count < flush_capacity_ && !flush_queue_.empty()) {
      const uint32_t at = flush_queue_.back();
      flush_queue_.pop_back();
      HotSlab& one = hot(at);
      HF_ASSERT(one.queued && one.dirty && !one.flushing);
      one.queued = false;
      one.dirty = false;
      one.flushing = true;
      one.frozen_sequence = number;
      one.frozen_epoch = epoch;
      one.frozen_limbo.clear();
      auto& page = flush_pages_->at<SlabPage>(size_t{count} * kPageSize);
      fill_page(one.slab, &page, &one.frozen_limbo);
      flush_frozen_.push_back(at);
      count++;
    }
    bump_epoch();
  }
  flush_barrier_.volume = this;
  flush_barrier_.io.user = this;
  flush_barrier_.io.op = IoOp::kFlush;
  flush_barrier_.io.offset = 0;
  flush_barrier_.io.length = 0;
  flush_barrier_.io.done = flush_barrier_io;
  device_.submit(&flush_barrier_.io);
}

void VolumeImpl::flush_barrier_io(IoRequest* io, int error) {
  static_cast<VolumeImpl*>(io->user)->flush_barrier_done(error);
}

void VolumeImpl::flush_barrier_done(int error) {
  std::unique_lock lock(mu_);
  if (state_ == State::kAborted) error = EIO;
  if (error != 0 || flush_final_) {
    flush_finish(error);
    return unlock(lock);
  }
  flush_next_write_ = flush_round_first_;
  for (uint32_t i = 0; i < kFlushDepth; i++) flush_io_[i].tag = kNoIndex;
  flush_write_more();
  unlock(lock);
}

void VolumeImpl::flush_write_more() {
  for (PageIo& io : flush_io_) {
    if (flush_next_write_ == flush_frozen_.size() || flush_error_ != 0) break;
    if (io.tag != kNoIndex) continue;
    io.tag = flush_next_write_++;
    io.volume = this;
    io.io.iov = &io.iov;
    io.io.iov_count = 1;
    io.io.user = &io;
    io.io.length = kPageSize;
    io.io.fua = false;
    flush_outstanding_++;
    const HotSlab& one = hot(flush_frozen_[io.tag]);
    if (!one.uncertain) {
      flush_submit_page(io);
      continue;
    }
    if (flush_found_ == nullptr) flush_found_ = std::make_unique<PageBuffer>(size_t{kFlushDepth} * kPageSize);
    const Slab& slab = slabs_[one.slab];
    io.iov = {&flush_found_->at<SlabPage>(static_cast<size_t>(&io - flush_io_.data()) * kPageSize), kPageSize};
    io.io.op = IoOp::kRead;
    io.io.offset = page_offset(slab.number, 1u - slab.newest);
    io.io.done = [](IoRequest* request, int error) {
      auto* page_io = static_cast<PageIo*>(request->user);
      page_io->volume->flush_looked(*page_io, error);
    };
    device_.submit(&io.io);
  }
}

void VolumeImpl::flush_submit_page(PageIo& io) {
  const HotSlab& one = hot(flush_frozen_[io.tag]);
  const Slab& slab = slabs_[one.slab];
  const uint64_t address = page_offset(slab.number, 1u - slab.newest);
  auto& page = flush_pages_->at<SlabPage>(size_t{io.tag - flush_round_first_} * kPageSize);
  seal(page, environment_.pool, address, one.frozen_sequence);
  io.iov = {&page, kPageSize};
  io.io.op = IoOp::kWrite;
  io.io.fua = false;
  io.io.offset = address;
  io.io.done = flush_page_io;
  device_.submit(&io.io);
}

// What a failed write, or one that no barrier followed, left.
void VolumeImpl::flush_looked(PageIo& io, int error) {
  std::unique_lock lock(mu_);
  if (error != 0 || state_ == State::kAborted) {
    lock.unlock();
    return flush_page_io(&io.io, EIO);
  }
  HotSlab& one = hot(flush_frozen_[io.tag]);
  const Slab& slab = slabs_[one.slab];
  const auto& page = *static_cast<const SlabPage*>(io.iov.iov_base);
  if (verify(page, environment_.pool, io.io.offset) == PageState::kOk && page.layer_id == layers_[slab.layer].id &&
      page.generation == slab.generation && page.header.sequence > slab.sequence) {
    io.io.op = IoOp::kWrite;
    io.io.fua = true;
    io.io.done = [](IoRequest* request, int failed) {
      auto* page_io = static_cast<PageIo*>(request->user);
      page_io->volume->flush_kept(*page_io, failed);
    };
    device_.submit(&io.io);
  } else {
    one.uncertain = false;
    flush_submit_page(io);
  }
  unlock(lock);
}

void VolumeImpl::flush_kept(PageIo& io, int error) {
  std::unique_lock lock(mu_);
  if (error != 0 || state_ == State::kAborted) {
    lock.unlock();
    return flush_page_io(&io.io, EIO);
  }
  HotSlab& one = hot(flush_frozen_[io.tag]);
  Slab& slab = slabs_[one.slab];
  one.uncertain = false;
  slab.newest ^= 1;
  slab.sequence = static_cast<const SlabPage*>(io.iov.iov_base)->header.sequence;
  slab.unequal = 1;
  flush_submit_page(io);
  unlock(lock);
}

void VolumeImpl::flush_page_io(IoRequest* io, int error) {
  auto* page = static_cast<PageIo*>(io->user);
  page->tag = kNoIndex;
  page->volume->flush_page_done(error);
}

void VolumeImpl::flush_page_done(int error) {
  std::unique_lock lock(mu_);
  flush_outstanding_--;
  if (state_ == State::kAborted) error = EIO;
  if (error != 0 && flush_error_ == 0) flush_error_ = EIO;
  flush_write_more();
  if (flush_outstanding_ == 0) {
    if (flush_error_ != 0) flush_finish(flush_error_);
    else flush_round();
  }
  unlock(lock);
}

void VolumeImpl::flush_finish(int error) {
  HF_ASSERT(flush_running_ && flush_outstanding_ == 0);
  if (error == 0) {
    HF_ASSERT(flush_queue_.empty());
    flushed_ = flush_start_;
    for (uint32_t at : flush_frozen_) {
      HotSlab& one = hot(at);
      Slab& slab = slabs_[one.slab];
      one.flushing = false;
      slab.newest ^= 1;
      slab.sequence = one.frozen_sequence;
      slab.unequal = 1;
      slab.ours = 1;
      if (slab.unsettled) {
        if (--slab.unsettled == 0) {
          // Every copy now comes from a time when the free chunks were free.
          unsettled_--;
          if (usable_free(slab) > 0) list_slab(one.slab);
        } else {
          mark_dirty(one);
        }
      }
      // What was absent before and is absent again is absent from both copies. What was taken again in between has
      // been dropped from both sets.
      for (size_t w = 0; w < one.limbo_one.words.size(); w++) {
        one.limbo_both.words[w] |= one.limbo_one.words[w] & one.frozen_limbo.words[w];
        one.limbo_one.words[w] = one.frozen_limbo.words[w] & ~one.limbo_both.words[w];
      }
      one.frozen_limbo.clear();
      if (!one.limbo_both.empty()) {
        one.reclaim_epoch = one.frozen_epoch;
        if (!one.reclaim_listed) {
          one.reclaim_listed = true;
          reclaim_list_.push_back(at);
        }
      }
      // The other copy must lose the chunk as well; when the next flush comes, or at once if space is wanted.
      if (!one.limbo_one.empty()) mark_dirty(one);
      cool(at);
    }
    flush_frozen_.clear();
    reclaim();
    if (flush_home_->now_ns() - claimed_ns_ > kStreamGapNs) ahead_ = 1;  // the stream that wanted more is over
    release_spare();
    if (slab_waiters_ != nullptr) settle_for_space();
    if (slab_waiters_ != nullptr && list_head_ != kNoIndex) wake(slab_waiters_, slab_waiters_tail_);
  } else {
    for (size_t i = 0; i < flush_frozen_.size(); i++) {
      HotSlab& one = hot(flush_frozen_[i]);
      one.flushing = false;
      one.frozen_limbo.clear();
      // Every page that was handed to the device: also one whose write was answered well, for no barrier followed it.
      one.uncertain = one.uncertain || i < flush_next_write_;
      mark_dirty(one);
    }
    flush_frozen_.clear();
    // Those not yet frozen are still marked as queued.
    dirty_.insert(dirty_.end(), flush_queue_.begin(), flush_queue_.end());
    flush_queue_.clear();
    if (state_ != State::kAborted) {
      event(Code::kIo, "volume " + std::to_string(spec_.volume_id) +
                           ": a flush failed at the device; what was written since the last good flush is not yet safe "
                           "and is tried again at the next flush. Check the pool's device and its paths");
    }
    fail_waiting(slot_waiters_, slot_waiters_tail_, EIO);  // no slot will come free without a flush
  }
  FlushWaiter* done = flush_waiters_;
  flush_waiters_ = nullptr;
  flush_running_ = false;
  finish_waiters(done, error);
  const bool serving = state_ == State::kOpen || state_ == State::kClosing;
  if (!serving || modified_ == flushed_) {
    // Nothing was completed since this flush started, so it serves those who came during it as well.
    FlushWaiter* late = flush_next_;
    flush_next_ = nullptr;
    finish_waiters(late, serving ? 0 : EIO);
  }
  // Who waits for a slot goes on only when pages become clean, and those with chunks in limbo take a second write.
  const bool again = (flush_wanted_ || slot_waiters_ != nullptr) && error == 0 && !dirty_.empty();
  flush_wanted_ = false;
  HF_ASSERT(!quiet());
  if (serving && (flush_next_ != nullptr || again)) start_flush();
  end_background();
}

}  // namespace holdfast
