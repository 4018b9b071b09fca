// Reading: which place answers for each block, through the chain of layers, and as few I/Os as the places allow.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "volume_impl.h"

namespace holdfast {

using format::kBlocksPerChunk;
using format::kBlockSize;
using format::kChunkSize;
using format::SlabEntry;

VolumeImpl::LayerView VolumeImpl::view(const Layer& layer, uint32_t chunk) const {
  LayerView found;
  found.place = layer.map.find(chunk);
  if (found.place != kNoPlace) {
    const SlabEntry entry = slabs_.entry(found.place >> 8, found.place & 0xff);
    HF_ASSERT(entry.logical_chunk == chunk);
    found.data = entry.data;
    found.zero = entry.zero;
  }
  if (!layer.holes.empty() && layer.holes.covers(chunk)) found.zero = static_cast<uint16_t>(~found.data);
  return found;
}

uint64_t& VolumeImpl::hints(uint32_t chunk) const {
  const size_t frozen = layers_.size() - 1;
  chain_.fit(frozen);
  ChainIndex::Leaf& leaf = chain_.leaf(chunk);
  const uint32_t first = chunk / ChainIndex::kLeafChunks * ChainIndex::kLeafChunks;
  const uint32_t end = first + ChainIndex::kLeafChunks;
  for (; leaf.layers < frozen; leaf.layers++) {
    const Layer& layer = layers_[leaf.layers];
    const uint32_t group = chain_.group(leaf.layers);
    for (uint32_t at = layer.map.next_mapped(first, end); at < end; at = layer.map.next_mapped(at + 1, end)) {
      const LayerView found = view(layer, at);
      ChainIndex::set_hint(leaf.hints[at - first], static_cast<uint16_t>(found.data | found.zero), group);
    }
    layer.holes.for_each(first, end, [&](uint64_t at) { ChainIndex::set_hint(leaf.hints[at - first], kAllBlocks, group); });
  }
  return leaf.hints[chunk - first];
}

uint16_t VolumeImpl::older_data(uint32_t chunk, uint16_t* mentioned) const {
  uint16_t shown = 0;
  uint16_t any = 0;
  through_layers(chunk, kAllBlocks, false, [&](const Layer& layer, uint16_t asked) {
    const LayerView found = view(layer, chunk);
    const auto answered = static_cast<uint16_t>(asked & (found.data | found.zero));
    shown = static_cast<uint16_t>(shown | (asked & found.data));
    any = static_cast<uint16_t>(any | answered);
    return answered;
  });
  if (mentioned != nullptr) *mentioned = any;
  return shown;
}

uint32_t VolumeImpl::resolve(uint64_t offset, uint64_t end, Piece* out, uint32_t count, uint32_t data) const {
  uint32_t used = 0;
  uint32_t used_data = 0;
  uint64_t next_disk = 0;  // where the last piece would go on
  uint32_t last_slab = kNoIndex;
  while (offset < end) {
    const auto chunk = static_cast<uint32_t>(offset / kChunkSize);
    const uint32_t first = static_cast<uint32_t>(offset % kChunkSize) / kBlockSize;
    const uint64_t chunk_end = uint64_t{chunk} * kChunkSize + kChunkSize;
    const uint32_t last = chunk_end <= end ? kBlocksPerChunk : static_cast<uint32_t>(end % kChunkSize) / kBlockSize;
    const uint16_t wanted = block_mask(first, last);
    // Layers and the blocks that they answer for with data. Each has at least one, and no block is in two.
    uint16_t masks[kBlocksPerChunk];
    Place places[kBlocksPerChunk];
    uint32_t depth = 0;
    through_layers(chunk, wanted, true, [&](const Layer& layer, uint16_t asked) {
      const LayerView found = view(layer, chunk);
      const auto mine = static_cast<uint16_t>(asked & found.data);
      if (mine != 0) {
        masks[depth] = mine;
        places[depth++] = found.place;
      }
      return static_cast<uint16_t>(asked & (found.data | found.zero));
    });
    for (uint32_t block = first; block < last;) {
      uint32_t source = 0;
      while (source < depth && (masks[source] >> block & 1) == 0) source++;
      uint32_t stop = block + 1;
      uint64_t disk = kZeroes;
      uint32_t slab = kNoIndex;
      if (source < depth) {
        while (stop < last && (masks[source] >> stop & 1) != 0) stop++;
        slab = places[source] >> 8;
        disk = data_offset(slab, places[source] & 0xff) + block * kBlockSize;
      } else {
        const auto any = [&](uint32_t b) {
          for (uint32_t d = 0; d < depth; d++) {
            if ((masks[d] >> b & 1) != 0) return true;
          }
          return false;
        };
        while (stop < last && !any(stop)) stop++;
      }
      const uint64_t length = uint64_t{stop - block} * kBlockSize;
      if (used > 0 && (disk == kZeroes ? out[used - 1].disk == kZeroes : disk == next_disk && slab == last_slab)) {
        out[used - 1].length += length;
      } else {
        if (used == count || (disk != kZeroes && used_data == data)) return used;
        used_data += disk != kZeroes;
        out[used++] = {length, disk};
      }
      next_disk = disk == kZeroes ? 0 : disk + length;
      last_slab = slab;
      block = stop;
    }
    offset = std::min(chunk_end, end);
  }
  return used;
}

void VolumeImpl::read(RequestState* state, bool inside_submit) {
  VolumeRequest& request = *state->request;
  const uint64_t end = request.offset + request.length;
  for (;;) {
    Piece pieces[16];
    uint32_t count = 0;
    {
      std::unique_lock lock(mu_);
      if (state_ == State::kAborted) state->error = EIO;
      if (state->error != 0) state->cursor = request.length;
      const uint64_t from = request.offset + state->cursor;
      if (from < end) {
        count = resolve(from, end, pieces, 16, RequestState::kExtents - state->outstanding);
      } else if (state->outstanding == 0) {
        leave(state);
        unlock(lock);
        if (inside_submit) return finish_later(state, state->error);
        return complete(state);
      }
    }
    if (count == 0) return;  // everything is on its way, or no extent is free
    Extent* batch[RequestState::kExtents];
    uint32_t batched = 0;
    for (uint32_t i = 0; i < count; i++) {
      std::byte* target = request.buffer + state->cursor;
      state->cursor += pieces[i].length;
      if (pieces[i].disk == kZeroes) {
        std::memset(target, 0, pieces[i].length);
        continue;
      }
      uint32_t at = 0;
      while (state->extents[at].busy) at++;
      HF_ASSERT(at < RequestState::kExtents);
      Extent& extent = state->extents[at];
      extent.busy = true;
      extent.iov = {target, pieces[i].length};
      extent.io.op = IoOp::kRead;
      extent.io.fua = false;
      extent.io.offset = pieces[i].disk;
      extent.io.length = pieces[i].length;
      extent.io.iov = &extent.iov;
      extent.io.iov_count = 1;
      extent.io.done = read_done;
      state->outstanding++;
      batch[batched++] = &extent;
    }
    in_flight_.fetch_add(batched, std::memory_order_relaxed);
    for (uint32_t i = 0; i < batched; i++) device_.submit(&batch[i]->io);
    if (state->outstanding == RequestState::kExtents || (batched > 0 && state->cursor == request.length)) return;
  }
}

void VolumeImpl::read_done(IoRequest* io, int error) {
  auto* state = static_cast<RequestState*>(io->user);
  VolumeImpl* self = state->volume;
  auto* extent = reinterpret_cast<Extent*>(io);
  extent->busy = false;
  self->in_flight_.fetch_sub(1, std::memory_order_relaxed);
  state->outstanding--;
  if (error != 0 && state->error == 0) state->error = EIO;
  // More to give out, or the last one: read() knows which. While others are at the device and all is given out: wait.
  if (state->outstanding > 0 && state->cursor == state->request->length) return;
  self->read(state, false);
}

}  // namespace holdfast
