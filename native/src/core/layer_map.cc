// Leaves of the forward map; see layer_map.h.
#include "layer_map.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "status.h"

namespace holdfast {

LayerMap::~LayerMap() {
  for (auto& block : blocks_) {
    for (uint32_t i = 0; block != nullptr && i < kBlockLeaves; i++) free_leaf(block[i]);
  }
}

void LayerMap::resize(uint64_t chunk_count) {
  leaf_count_ = std::max(leaf_count_, (chunk_count + kLeafChunks - 1) / kLeafChunks);
}

uintptr_t& LayerMap::leaf_for(uint32_t at) {
  const uint32_t block = at / kBlockLeaves;
  if (block >= blocks_.size()) blocks_.resize(block + 1);
  if (blocks_[block] == nullptr) {
    blocks_[block] = std::make_unique<uintptr_t[]>(kBlockLeaves);
    block_count_++;
  }
  return blocks_[block][at % kBlockLeaves];
}

void LayerMap::free_leaf(uintptr_t& leaf) {
  if (leaf == 0) return;
  if ((leaf & kDenseTag) != 0) {
    leaf_bytes_ -= sizeof(DenseLeaf);
    std::free(dense(leaf));
  } else {
    leaf_bytes_ -= sizeof(RunLeaf) + runs(leaf)->capacity * sizeof(Run);
    std::free(runs(leaf));
  }
  leaf = 0;
}

uint32_t LayerMap::upper(const RunLeaf* leaf, uint32_t offset) {
  uint32_t low = 0;
  uint32_t high = leaf->count;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (leaf->runs[middle].first <= offset) low = middle + 1;
    else high = middle;
  }
  return low;
}

Place LayerMap::find_run(uintptr_t leaf, uint32_t offset) {
  const RunLeaf* list = runs(leaf);
  const uint32_t at = upper(list, offset);
  if (at == 0) return kNoPlace;
  const Run& run = list->runs[at - 1];
  return offset < uint32_t{run.first} + run.length ? run.place + (offset - run.first) : kNoPlace;
}

void LayerMap::insert_at(uintptr_t& leaf, uint32_t index, Run run) {
  RunLeaf* list = runs(leaf);
  const uint32_t count = list == nullptr ? 0 : list->count;
  const uint32_t capacity = list == nullptr ? 0 : list->capacity;
  if (count == capacity) {
    const uint32_t grown = capacity == 0 ? 4 : capacity * 2;
    list = static_cast<RunLeaf*>(std::realloc(list, sizeof(RunLeaf) + grown * sizeof(Run)));
    HF_ASSERT(list != nullptr);
    leaf_bytes_ += (grown - capacity) * sizeof(Run) + (capacity == 0 ? sizeof(RunLeaf) : 0);
    list->count = count;
    list->capacity = grown;
    leaf = reinterpret_cast<uintptr_t>(list);
  }
  std::memmove(&list->runs[index + 1], &list->runs[index], (count - index) * sizeof(Run));
  list->runs[index] = run;
  list->count = count + 1;
}

void LayerMap::remove_at(uintptr_t& leaf, uint32_t index) {
  RunLeaf* list = runs(leaf);
  HF_ASSERT(index < list->count);
  std::memmove(&list->runs[index], &list->runs[index + 1], (list->count - index - 1) * sizeof(Run));
  if (--list->count == 0) free_leaf(leaf);
}

void LayerMap::make_dense(uintptr_t& leaf) {
  auto* wide = static_cast<DenseLeaf*>(std::malloc(sizeof(DenseLeaf)));
  HF_ASSERT(wide != nullptr);
  std::memset(static_cast<void*>(wide), 0xff, sizeof(DenseLeaf));
  static_assert(kNoPlace == 0xffffffffu);
  wide->mapped = 0;
  const RunLeaf* list = runs(leaf);
  for (uint32_t i = 0; i < list->count; i++) {
    const Run& run = list->runs[i];
    for (uint32_t k = 0; k < run.length; k++) wide->places[run.first + k] = run.place + k;
    wide->mapped += run.length;
  }
  free_leaf(leaf);
  leaf = reinterpret_cast<uintptr_t>(wide) | kDenseTag;
  leaf_bytes_ += sizeof(DenseLeaf);
}

// Joins with the neighbours where both chunks and places go on.
void LayerMap::insert_run(uintptr_t& leaf, uint32_t offset, uint32_t length, Place place) {
  RunLeaf* list = runs(leaf);
  if (list != nullptr) {
    const uint32_t at = upper(list, offset);
    Run* before = at > 0 ? &list->runs[at - 1] : nullptr;
    Run* after = at < list->count ? &list->runs[at] : nullptr;
    HF_ASSERT(before == nullptr || uint32_t{before->first} + before->length <= offset);
    HF_ASSERT(after == nullptr || offset + length <= after->first);
    const bool joins_before = before != nullptr && uint32_t{before->first} + before->length == offset &&
                              before->place + before->length == place;
    const bool joins_after = after != nullptr && offset + length == after->first && place + length == after->place;
    if (joins_before) {
      before->length = static_cast<uint16_t>(before->length + length);
      if (joins_after) {
        before->length = static_cast<uint16_t>(before->length + after->length);
        remove_at(leaf, at);
      }
      return;
    }
    if (joins_after) {
      after->first = static_cast<uint16_t>(offset);
      after->length = static_cast<uint16_t>(after->length + length);
      after->place = place;
      return;
    }
    if (list->count >= max_runs_) {
      make_dense(leaf);
      DenseLeaf* wide = dense(leaf);
      for (uint32_t k = 0; k < length; k++) wide->places[offset + k] = place + k;
      wide->mapped += length;
      return;
    }
    insert_at(leaf, at, {static_cast<uint16_t>(offset), static_cast<uint16_t>(length), place});
    return;
  }
  insert_at(leaf, 0, {static_cast<uint16_t>(offset), static_cast<uint16_t>(length), place});
}

void LayerMap::set_run(uint32_t first, uint32_t count, Place place) {
  HF_ASSERT(count > 0 && uint64_t{first} + count <= chunks() && place != kNoPlace);
  while (count > 0) {
    uintptr_t& leaf = leaf_for(first / kLeafChunks);
    const uint32_t offset = first % kLeafChunks;
    const uint32_t length = std::min(count, kLeafChunks - offset);
    if ((leaf & kDenseTag) != 0) {
      DenseLeaf* wide = dense(leaf);
      for (uint32_t k = 0; k < length; k++) {
        HF_ASSERT(wide->places[offset + k] == kNoPlace);
        wide->places[offset + k] = place + k;
      }
      wide->mapped += length;
    } else {
      insert_run(leaf, offset, length, place);
    }
    first += length;
    place += length;
    count -= length;
  }
}

void LayerMap::erase(uint32_t chunk) {
  HF_ASSERT(chunk < chunks());
  uintptr_t& leaf = leaf_for(chunk / kLeafChunks);
  const uint32_t offset = chunk % kLeafChunks;
  HF_ASSERT(leaf != 0);
  if ((leaf & kDenseTag) != 0) {
    DenseLeaf* wide = dense(leaf);
    HF_ASSERT(wide->places[offset] != kNoPlace);
    wide->places[offset] = kNoPlace;
    if (--wide->mapped == 0) free_leaf(leaf);
    return;
  }
  const uint32_t at = upper(runs(leaf), offset);
  HF_ASSERT(at > 0);
  Run& run = runs(leaf)->runs[at - 1];
  const uint32_t inside = offset - run.first;
  HF_ASSERT(inside < run.length);
  const Run tail = {static_cast<uint16_t>(offset + 1), static_cast<uint16_t>(run.length - inside - 1),
                    run.place + inside + 1};
  if (inside == 0 && tail.length == 0) {
    remove_at(leaf, at - 1);
  } else if (inside == 0) {
    run = tail;
  } else {
    run.length = static_cast<uint16_t>(inside);
    if (tail.length == 0) return;
    if (runs(leaf)->count >= max_runs_) {
      make_dense(leaf);
      for (uint32_t k = 0; k < tail.length; k++) dense(leaf)->places[tail.first + k] = tail.place + k;
      dense(leaf)->mapped += tail.length;
    } else {
      insert_at(leaf, at, tail);
    }
  }
}

uint32_t LayerMap::next_mapped(uint32_t from, uint32_t end) const {
  uint32_t chunk = from;
  while (chunk < end) {
    const uint32_t at = chunk / kLeafChunks;
    const uint32_t block = at / kBlockLeaves;
    if (block >= blocks_.size()) return end;
    if (blocks_[block] == nullptr) {
      const uint64_t block_end = (uint64_t{block} + 1) * kBlockLeaves * kLeafChunks;
      if (block_end >= end) return end;
      chunk = static_cast<uint32_t>(block_end);
      continue;
    }
    const uintptr_t leaf = blocks_[block][at % kBlockLeaves];
    const uint64_t leaf_end = std::min<uint64_t>(end, (uint64_t{at} + 1) * kLeafChunks);
    if (leaf != 0 && (leaf & kDenseTag) != 0) {
      for (; chunk < leaf_end; chunk++) {
        if (dense(leaf)->places[chunk % kLeafChunks] != kNoPlace) return chunk;
      }
    } else if (leaf != 0) {
      const RunLeaf* list = runs(leaf);
      const uint32_t offset = chunk % kLeafChunks;
      uint32_t i = upper(list, offset);
      if (i > 0 && offset < uint32_t{list->runs[i - 1].first} + list->runs[i - 1].length) return chunk;
      if (i < list->count) {
        const uint64_t found = uint64_t{at} * kLeafChunks + list->runs[i].first;
        return found < end ? static_cast<uint32_t>(found) : end;
      }
    }
    chunk = static_cast<uint32_t>(leaf_end);
  }
  return end;
}

uint32_t LayerMap::find_before(uint32_t chunk, uint32_t within, Place* place) const {
  within = std::min(within, chunk);
  uint32_t distance = 1;
  while (distance <= within) {
    const uint32_t at = chunk - distance;
    const uintptr_t leaf = leaf_at(at / kLeafChunks);
    const uint32_t offset = at % kLeafChunks;
    if (leaf == 0) {
      distance += offset + 1;
    } else if ((leaf & kDenseTag) != 0) {
      *place = dense(leaf)->places[offset];
      if (*place != kNoPlace) return distance;
      distance++;
    } else {
      const uint32_t i = upper(runs(leaf), offset);
      if (i == 0) {
        distance += offset + 1;
        continue;
      }
      const Run& run = runs(leaf)->runs[i - 1];
      const uint32_t last = std::min<uint32_t>(offset, uint32_t{run.first} + run.length - 1);
      distance += offset - last;
      if (distance > within) return 0;
      *place = run.place + (last - run.first);
      return distance;
    }
  }
  return 0;
}

}  // namespace holdfast
