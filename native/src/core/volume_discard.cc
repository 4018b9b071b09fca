// Discard and write zeroes: exact to the block, in memory at once, durable with the next flush.
//
// Where no older layer shows through, clearing data bits is all. Where one does, the blocks must say "zero": by a zero
// mask in the chunk's entry, or, for whole chunks, by a hole range. A hole that replaces an entry goes into the very
// page that holds the entry, as one image: so the hole can't be lost while the cleared entry is kept, nor the other way
// round, whatever of the page writes survives. Within a layer data beats hole, so holes need never be taken out again.
//
// What a layer covers of what any older layer mentions (data, zeros or holes) never shrinks, on the disk either: an
// older layer that is folded may have been stripped of those blocks already, and what lies below it would show through.
// So a data bit that goes away leaves a zero bit or a hole in the same image, also where the older layers read as zeros
// today. A hole that stands in another slab's page does not do: that page may not be durable yet.
#include <algorithm>
#include <cerrno>

#include "volume_impl.h"

namespace holdfast {

using format::HoleRange;
using format::kBlocksPerChunk;
using format::kBlockSize;
using format::kChunkSize;
using format::SlabEntry;
using format::SlabPage;

void VolumeImpl::discard(RequestState* state, bool inside_submit) {
  const VolumeRequest& request = *state->request;
  const uint64_t end = request.offset + request.length;
  std::unique_lock lock(mu_);
  state->wait = RequestState::Wait::kNone;
  hold_epoch(state);
  state->changed = true;
  if (state_ == State::kAborted && state->error == 0) state->error = EIO;
  if (state->error != 0) state->cursor = request.length;
  const auto end_chunk = static_cast<uint32_t>((end + kChunkSize - 1) / kChunkSize);
  if (state->error == 0 && !begin_change(state)) {
    park_held(state);
    return unlock(lock);
  }
  const uint64_t batch = std::max<uint64_t>(64, kDiscardBatch * 4 / (3 + layers_.size()));
  for (uint64_t looked = 0; state->cursor < request.length; looked++) {
    if (looked == batch) {
      end_change(state);  // it may be held here: what it has done so far is no more than a crash might leave of it
      // Let others have the lock; go on in the executor's next turn.
      unlock(lock);
      state->run = run_request;
      state->home->post(state);
      return;
    }
    const uint64_t at = request.offset + state->cursor;
    const auto chunk = static_cast<uint32_t>(at / kChunkSize);
    uint32_t next = end_chunk;
    for (const Layer& layer : layers_) next = layer.map.next_mapped(chunk, next);
    if (next > chunk) {  // nothing to do up to there
      state->cursor = std::min(uint64_t{next} * kChunkSize, end) - request.offset;
      continue;
    }
    const uint64_t stop = std::min(end, uint64_t{chunk} * kChunkSize + kChunkSize);
    const uint32_t first = static_cast<uint32_t>(at % kChunkSize) / kBlockSize;
    const auto last = static_cast<uint32_t>((stop - uint64_t{chunk} * kChunkSize) / kBlockSize);
    const bool copied = !copying_.empty() && copying(chunk);
    const Need need = copied ? Need::kCopy : discard_chunk(chunk, block_mask(first, last));
    if (need != Need::kNothing) {
      park(state, need);
      return unlock(lock);
    }
    state->held_since = 0;
    state->cursor = stop - request.offset;
  }
  leave(state);
  unlock(lock);
  return inside_submit ? finish_later(state, state->error) : complete(state);
}

VolumeImpl::Need VolumeImpl::discard_chunk(uint32_t chunk, uint16_t blocks) {
  const Place place = top().map.find(chunk);
  return place != kNoPlace ? discard_mapped(chunk, blocks, place) : discard_hidden(chunk, blocks);
}

VolumeImpl::Need VolumeImpl::discard_mapped(uint32_t chunk, uint16_t blocks, Place place) {
  const uint32_t slab = place >> 8;
  const uint32_t index = place & 0xff;
  const SlabEntry entry = slabs_.entry(slab, index);
  HF_ASSERT(entry.logical_chunk == chunk);
  SlabEntry after = entry;
  after.data = static_cast<uint16_t>(entry.data & ~blocks);
  if (hole_in_page(slab, chunk)) {
    after.zero = 0;
  } else if (layers_.size() > 1) {
    uint16_t mentioned = 0;
    const bool hole = top().holes.covers(chunk);
    const uint16_t older = older_data(chunk, &mentioned);
    const uint16_t gone = static_cast<uint16_t>(blocks & ((hole ? 0 : older) | (entry.data & mentioned)));
    after.zero = static_cast<uint16_t>(entry.zero | gone);
    if (after.data == entry.data && after.zero == entry.zero) return Need::kNothing;
    // If the chunk is all zeros now, a hole says so as well and gives the place back.
    if (after.data == 0 && after.zero != 0 && (hole || (older & ~after.zero) == 0)) {
      const HoleResult result = add_hole(slab, chunk, index);
      if (result == HoleResult::kNoSlot) return Need::kSlot;
      if (result == HoleResult::kAdded) return Need::kNothing;
    }
  }
  if (after.data == entry.data && after.zero == entry.zero) return Need::kNothing;
  HotSlab* image = ensure_hot(slab);
  if (image == nullptr) return Need::kSlot;
  set_entry(slab, index, after);
  mark_dirty(*image);
  return Need::kNothing;
}

// The top layer says nothing about the chunk; an older layer may.
VolumeImpl::Need VolumeImpl::discard_hidden(uint32_t chunk, uint16_t blocks) {
  if (layers_.size() == 1 || top().holes.covers(chunk)) return Need::kNothing;
  const uint16_t older = older_data(chunk);
  const auto zero = static_cast<uint16_t>(older & blocks);
  if (zero == 0) return Need::kNothing;
  return cover_with_zeros(chunk, zero, zero == older);
}

// For a chunk that the top layer says nothing about. `whole`: no other block of it shows data.
VolumeImpl::Need VolumeImpl::cover_with_zeros(uint32_t chunk, uint16_t zero, bool whole) {
  // Any page of the layer will do: there is no entry that the hole would have to go with.
  for (uint32_t tried = 0; whole && tried < 8 && !top_list_.empty(); tried++) {
    if (hole_slab_ >= top_list_.size()) hole_slab_ = 0;
    const uint32_t slab = top_list_[hole_slab_];
    if (slabs_[slab].state != SlabState::kLive || !in_top(slabs_[slab])) {
      top_list_[hole_slab_] = top_list_.back();
      top_list_.pop_back();
      continue;
    }
    const HoleResult result = add_hole(slab, chunk, kNoIndex);
    if (result == HoleResult::kNoSlot) return Need::kSlot;
    if (result == HoleResult::kAdded) return Need::kNothing;
    hole_slab_++;
  }
  Place place = kNoPlace;
  const Need need = place_for(chunk, &place);
  if (need != Need::kNothing) return need;
  set_entry(place >> 8, place & 0xff, {chunk, 0, zero});
  mark_dirty(hot(slabs_[place >> 8].hot));
  return Need::kNothing;
}

bool VolumeImpl::hole_in_page(uint32_t slab, uint32_t chunk) const {
  if (!slabs_[slab].holes) return false;
  const std::vector<HoleRange>& holes = slab_holes_.at(slab);
  auto after = std::upper_bound(holes.begin(), holes.end(), chunk,
                                [](uint32_t value, const HoleRange& range) { return value < range.start; });
  return after != holes.begin() && chunk - std::prev(after)->start < std::prev(after)->length;
}

// Adds the chunk, which is not there yet, to the holes in the slab's page and, with `clear_index`, empties that entry in the same image.
VolumeImpl::HoleResult VolumeImpl::add_hole(uint32_t slab, uint32_t chunk, uint32_t clear_index) {
  const HotSlab* ready = ensure_hot(slab);
  if (ready == nullptr) return HoleResult::kNoSlot;
  std::vector<HoleRange>& holes = slab_holes_[slab];
  auto at = std::upper_bound(holes.begin(), holes.end(), chunk,
                             [](uint32_t value, const HoleRange& range) { return value < range.start; });
  const bool joins_before = at != holes.begin() && std::prev(at)->start + std::prev(at)->length == chunk;
  const bool joins_after = at != holes.end() && chunk + 1 == at->start;
  if (!joins_before && !joins_after && holes.size() == format::kHolesPerSlab) return HoleResult::kNoRoom;
  std::vector<HoleRange> changed = holes;
  auto place = changed.begin() + (at - holes.begin());
  if (joins_before && joins_after) {
    std::prev(place)->length += 1 + place->length;
    changed.erase(place);
  } else if (joins_before) {
    std::prev(place)->length++;
  } else if (joins_after) {
    place->start--;
    place->length++;
  } else {
    changed.insert(place, {chunk, 1});
  }
  const bool had = slabs_[slab].holes;
  slabs_[slab].holes = 1;
  changed.swap(holes);  // now: holes is the new list
  auto& page = scratch_page_->at<SlabPage>();
  fill_page(slab, &page, nullptr);
  if (clear_index != kNoIndex) page.entries[clear_index] = {chunk, 0, 0};
  HotSlab& image = hot(slabs_[slab].hot);
  const uint32_t slot = arena_->republish(image.slot, page);
  if (slot == PageArena::kNone) {
    changed.swap(holes);
    slabs_[slab].holes = had;
    if (!had) slab_holes_.erase(slab);
    cool(slabs_[slab].hot);
    return HoleResult::kNoSlot;
  }
  image.slot = slot;
  top().holes.add(chunk, uint64_t{chunk} + 1);
  if (clear_index != kNoIndex) set_entry(slab, clear_index, {chunk, 0, 0});
  mark_dirty(image);
  return HoleResult::kAdded;
}

}  // namespace holdfast
