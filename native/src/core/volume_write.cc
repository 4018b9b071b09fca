// Writing. In place where the top layer has the blocks' chunk; otherwise a free chunk of the layer's slabs is taken
// first. The order that everything rests on: data to the device, then (its I/O done) the bits in the page image by one
// 8-byte store, then the acknowledgement. A bit is never set for data that has not been written.
#include <algorithm>
#include <cerrno>

#include "volume_impl.h"

namespace holdfast {

using format::kBlocksPerChunk;
using format::kBlockSize;
using format::kChunkSize;
using format::kChunksPerSlab;
using format::SlabEntry;

void VolumeImpl::write(RequestState* state, bool inside_submit) {
  std::unique_lock lock(mu_);
  write_on(state, lock, inside_submit);
}

// Gives out as many extents as there are, parks the request when something is lacking, ends it when all is done.
void VolumeImpl::write_on(RequestState* state, std::unique_lock<std::mutex>& lock, bool inside_submit) {
  VolumeRequest& request = *state->request;
  const uint64_t end = request.offset + request.length;
  state->wait = RequestState::Wait::kNone;
  hold_epoch(state);
  if (state_ == State::kAborted && state->error == 0) state->error = EIO;
  if (state->error != 0) state->cursor = request.length;
  for (Extent& extent : state->extents) {
    if (!extent.unapplied) continue;
    if (!apply(state, extent)) {
      park(state, Need::kSlot);
      return unlock(lock);
    }
    extent.busy = false;
  }
  if (state->error == 0 && !begin_change(state)) {
    park_held(state);
    return unlock(lock);
  }
  Extent* batch[RequestState::kExtents];
  uint32_t batched = 0;
  Need need = Need::kNothing;
  while (state->cursor < request.length && state->outstanding < RequestState::kExtents) {
    uint32_t at = 0;
    while (state->extents[at].busy) at++;
    Extent& extent = state->extents[at];
    need = plan_extent(state, extent, end);
    if (need != Need::kNothing) break;
    extent.busy = true;
    state->outstanding++;
    state->changed = true;
    state->held_since = 0;
    batch[batched++] = &extent;
  }
  if (need != Need::kNothing) park(state, need);
  if (need == Need::kNothing && state->outstanding == 0) {
    HF_ASSERT(state->cursor == request.length);
    if (request.fua && state->error == 0) {
      modified_++;
      state->changed = false;
      drop_epoch(state);
      end_change(state);
      state->flush.home = state->home;
      state->flush.done = fua_done;
      state->flush.user = state;
      request_flush(&state->flush);
      return unlock(lock);
    }
    leave(state);
    unlock(lock);
    return inside_submit ? finish_later(state, state->error) : complete(state);
  }
  in_flight_.fetch_add(batched, std::memory_order_relaxed);
  unlock(lock);
  for (uint32_t i = 0; i < batched; i++) device_.submit(&batch[i]->io);
}

VolumeImpl::Need VolumeImpl::plan_extent(RequestState* state, Extent& extent, uint64_t end) {
  VolumeRequest& request = *state->request;
  const uint64_t from = request.offset + state->cursor;
  uint64_t at = from;
  HF_ASSERT(at < end && !extent.pinned && !extent.unapplied);
  extent.chunk = static_cast<uint32_t>(at / kChunkSize);
  extent.chunks = 0;
  extent.first_block = static_cast<uint8_t>(at % kChunkSize / kBlockSize);
  uint64_t disk = 0;
  while (at < end) {
    const auto chunk = static_cast<uint32_t>(at / kChunkSize);
    if (!copying_.empty() && copying(chunk)) {
      if (extent.chunks > 0) break;
      return Need::kCopy;
    }
    const uint64_t stop = std::min(end, uint64_t{chunk} * kChunkSize + kChunkSize);
    const uint32_t first = static_cast<uint32_t>(at % kChunkSize) / kBlockSize;
    const auto last = static_cast<uint32_t>((stop - uint64_t{chunk} * kChunkSize) / kBlockSize);
    Place place = top().map.find(chunk);
    if (extent.chunks > 0) {
      // Goes on only in the very next chunk of the same slab, there already or free to be taken.
      const uint32_t next = uint32_t{extent.index} + extent.chunks;
      if (next == kChunksPerSlab) break;
      if (place == kNoPlace) {
        if (!chunk_usable(extent.slab, next) || ensure_hot(extent.slab) == nullptr) break;
        take_chunk(extent.slab, next, chunk);
      } else if (place != (extent.slab << 8 | next)) {
        break;
      }
    } else {
      if (place == kNoPlace) {
        const Need need = place_for(chunk, &place);
        if (need != Need::kNothing) return need;
      }
      extent.slab = place >> 8;
      extent.index = static_cast<uint16_t>(place & 0xff);
      disk = data_offset(extent.slab, extent.index) + first * kBlockSize;
    }
    const uint32_t index = uint32_t{extent.index} + extent.chunks;
    const SlabEntry entry = slabs_.entry(extent.slab, index);
    HF_ASSERT(entry.logical_chunk == chunk);
    const uint16_t blocks = block_mask(first, last);
    if ((entry.data & blocks) != blocks && !extent.pinned) {
      // The image's slot is secured before the data goes out, so that the acknowledgement need not wait for one.
      HotSlab* image = ensure_hot(extent.slab);
      if (image == nullptr) {
        if (extent.chunks > 0) break;
        return Need::kSlot;
      }
      image->pins++;
      extent.pinned = true;
    }
    if ((entry.data | entry.zero) == 0) touch_limbo(extent.slab, index);
    extent.chunks++;
    extent.end_block = static_cast<uint8_t>(last);
    at = stop;
  }
  HF_ASSERT(extent.chunks > 0);
  const uint64_t length = at - from;
  extent.iov = {request.buffer + state->cursor, length};
  extent.io.op = IoOp::kWrite;
  extent.io.fua = false;
  extent.io.offset = disk;
  extent.io.length = length;
  extent.io.iov = &extent.iov;
  extent.io.iov_count = 1;
  extent.io.done = write_done;
  state->cursor += length;
  return Need::kNothing;
}

bool VolumeImpl::chunk_usable(uint32_t slab, uint32_t index) const {
  return slab < slabs_.size() && listed(slabs_[slab]) && index < usable_chunks_ &&
         slabs_.entry(slab, index).logical_chunk == format::kNoChunk;
}

// Where a new chunk goes: beside its neighbour in the volume, as far away on the disk as in the volume (so that a
// stream whose requests arrive out of order still lies in order); else the next free chunk of the current slab.
VolumeImpl::Need VolumeImpl::place_for(uint32_t chunk, Place* out) {
  Place near = kNoPlace;
  const uint32_t distance = top().map.find_before(chunk, kAffinityChunks, &near);
  uint32_t slab = kNoIndex;
  uint32_t index = 0;
  if (distance > 0 && chunk_usable((near + distance) >> 8, (near + distance) & 0xff)) {
    slab = (near + distance) >> 8;
    index = (near + distance) & 0xff;
  } else {
    if (current_ == kNoIndex || !listed(slabs_[current_])) {
      current_ = list_head_;
      current_cursor_ = 0;
    }
    if (current_ == kNoIndex) return Need::kSlab;
    slab = current_;
    index = current_cursor_;
    while (slabs_.entry(slab, index).logical_chunk != format::kNoChunk) index = (index + 1) % usable_chunks_;
    current_cursor_ = (index + 1) % usable_chunks_;
  }
  if (ensure_hot(slab) == nullptr) return Need::kSlot;
  take_chunk(slab, index, chunk);
  *out = slab << 8 | index;
  return Need::kNothing;
}

void VolumeImpl::take_chunk(uint32_t slab, uint32_t index, uint32_t chunk) {
  Slab& one = slabs_[slab];
  HF_ASSERT(listed(one) && one.hot != kNoIndex && one.free_chunks > 0);
  set_entry(slab, index, {chunk, 0, 0});
  top().map.set(chunk, slab << 8 | index);
  one.free_chunks--;
  free_total_--;
  if (usable_free(one) == 0) unlist_slab(slab);
  claim_ahead();
}

bool VolumeImpl::apply(RequestState* state, Extent& extent) {
  extent.unapplied = false;
  const bool good = state->error == 0 && state_ != State::kAborted;
  for (uint32_t i = 0; good && i < extent.chunks; i++) {
    const uint32_t index = uint32_t{extent.index} + i;
    const SlabEntry entry = slabs_.entry(extent.slab, index);
    // The grace period keeps the place with its chunk for as long as this request lives.
    HF_ASSERT(entry.logical_chunk == extent.chunk + i);
    const uint16_t blocks = block_mask(i == 0 ? extent.first_block : 0,
                                       i + 1u == extent.chunks ? extent.end_block : kBlocksPerChunk);
    const SlabEntry after = {entry.logical_chunk, static_cast<uint16_t>(entry.data | blocks),
                             static_cast<uint16_t>(entry.zero & ~blocks)};
    if (after.data == entry.data && after.zero == entry.zero) continue;
    HotSlab* image = ensure_hot(extent.slab);
    if (image == nullptr) {  // a discard came between and the image has been let go since
      extent.unapplied = true;
      return false;
    }
    set_entry(extent.slab, index, after);
    mark_dirty(*image);
  }
  if (extent.pinned) {
    extent.pinned = false;
    const uint32_t at = slabs_[extent.slab].hot;
    HF_ASSERT(at != kNoIndex && hot(at).pins > 0);
    hot(at).pins--;
    if (!good) mark_dirty(hot(at));  // chunks taken in vain become free by way of the next flush
    cool(at);
  }
  return true;
}

void VolumeImpl::write_done(IoRequest* io, int error) {
  auto* state = static_cast<RequestState*>(io->user);
  auto* extent = reinterpret_cast<Extent*>(io);
  VolumeImpl* self = state->volume;
  std::unique_lock lock(self->mu_);
  self->in_flight_.fetch_sub(1, std::memory_order_relaxed);
  state->outstanding--;
  if (error != 0 && state->error == 0) state->error = EIO;
  const bool applied = self->apply(state, *extent);
  extent->busy = !applied;  // not to be given out again before its bits are set
  if (state->wait != RequestState::Wait::kNone) {
    // Parked: resumed by whoever it waits for. It knows no place any more once nothing is at the device.
    const bool slab = state->wait == RequestState::Wait::kSlab;
    const bool copy = state->wait == RequestState::Wait::kCopy;
    if ((slab || copy) && state->outstanding == 0 && applied) {
      self->drop_epoch(state);
      self->end_change(state);
    }
    // Bits that are still to be set must not wait for a slab, which may not come, nor for a copy, which may wait for them.
    if (slab && !applied) self->wake(self->slab_waiters_, self->slab_waiters_tail_);
    if (copy && !applied) self->wake(self->copy_waiters_, self->copy_waiters_tail_);
    return self->unlock(lock);
  }
  if (!applied) {
    self->park(state, Need::kSlot);
    return self->unlock(lock);
  }
  if (state->outstanding > 0 && state->cursor == state->request->length) return self->unlock(lock);
  self->write_on(state, lock, false);
}

void VolumeImpl::fua_done(FlushWaiter* waiter, int error) {
  auto* state = static_cast<RequestState*>(waiter->user);
  VolumeImpl* self = state->volume;
  std::unique_lock lock(self->mu_);
  if (error != 0) state->error = error;
  self->leave(state);
  self->unlock(lock);
  self->complete(state);
}

}  // namespace holdfast
