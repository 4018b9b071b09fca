// The three forms of a slab's entries; see slab_table.h.
#include "slab_table.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace holdfast {

using format::kChunksPerSlab;
using format::kNoChunk;
using format::SlabEntry;

namespace {
constexpr size_t kArrayBytes = kChunksPerSlab * sizeof(SlabEntry);
}

SlabTable::~SlabTable() {
  for (uint32_t i = 0; i < size_; i++) std::free((*this)[i].entries);
  for (SlabEntry* array : spare_) std::free(array);
}

uint32_t SlabTable::add() {
  uint32_t index;
  if (!vacant_.empty()) {
    index = vacant_.back();
    vacant_.pop_back();
  } else {
    if (size_ % kBlock == 0) blocks_.push_back(std::make_unique<Slab[]>(kBlock));
    index = size_++;
  }
  Slab& slab = (*this)[index];
  HF_ASSERT(slab.state == SlabState::kVacant);
  slab = Slab{};
  slab.state = SlabState::kLive;
  slab.free_chunks = kChunksPerSlab;
  live_++;
  return index;
}

void SlabTable::remove(uint32_t index) {
  Slab& slab = (*this)[index];
  HF_ASSERT(slab.state != SlabState::kVacant && slab.hot == kNoIndex);
  drop_entries(slab);
  slab = Slab{};
  vacant_.push_back(index);
  live_--;
}

void SlabTable::drop_entries(Slab& slab) {
  if (slab.form == kPlain) {
    entry_bytes_ -= kArrayBytes;
    if (spare_.size() < kSpareArrays) spare_.push_back(static_cast<SlabEntry*>(slab.entries));
    else std::free(slab.entries);
  } else if (slab.form == kRuns) {
    entry_bytes_ -= sizeof(RunList) + static_cast<const RunList*>(slab.entries)->count * sizeof(Run);
    std::free(slab.entries);
  }
  slab.entries = nullptr;
  slab.form = kNone;
}

SlabEntry* SlabTable::new_array() {
  entry_bytes_ += kArrayBytes;
  if (!spare_.empty()) {
    SlabEntry* array = spare_.back();
    spare_.pop_back();
    return array;
  }
  auto* array = static_cast<SlabEntry*>(std::malloc(kArrayBytes));
  HF_ASSERT(array != nullptr);
  return array;
}

SlabEntry SlabTable::packed_entry(const Slab& slab, uint32_t chunk) {
  if (slab.form == kNone) return kFreeEntry;
  const auto* list = static_cast<const RunList*>(slab.entries);
  uint32_t i = 0;
  while (chunk >= uint32_t{list->runs[i].first} + list->runs[i].length) i++;
  HF_ASSERT(i < list->count);
  const Run& run = list->runs[i];
  if (run.logical == kNoChunk) return kFreeEntry;
  return {run.logical + (chunk - run.first), run.data, run.zero};
}

SlabEntry* SlabTable::plain(uint32_t index) {
  Slab& slab = (*this)[index];
  if (slab.form == kPlain) return static_cast<SlabEntry*>(slab.entries);
  SlabEntry* array = new_array();
  for (uint32_t c = 0; c < kChunksPerSlab; c++) array[c] = packed_entry(slab, c);
  drop_entries(slab);
  slab.entries = array;
  slab.form = kPlain;
  return array;
}

uint32_t SlabTable::find_runs(const SlabEntry* entries, Run* out) {
  uint32_t count = 0;
  for (uint32_t c = 0; c < kChunksPerSlab; c++) {
    const SlabEntry& entry = entries[c];
    if (count > 0) {
      Run& last = out[count - 1];
      const bool same = entry.logical_chunk == kNoChunk
                            ? last.logical == kNoChunk
                            : last.logical != kNoChunk && entry.logical_chunk == last.logical + last.length &&
                                  entry.data == last.data && entry.zero == last.zero;
      if (same) {
        last.length++;
        continue;
      }
    }
    if (count == kMaxRuns) return kMaxRuns + 1;
    out[count++] = {entry.logical_chunk, entry.data, entry.zero, static_cast<uint16_t>(c), 1};
  }
  return count;
}

void SlabTable::load(uint32_t index, const SlabEntry* entries) {
  Slab& slab = (*this)[index];
  drop_entries(slab);
  Run found[kMaxRuns];
  const uint32_t count = find_runs(entries, found);
  if (count > kMaxRuns) {
    slab.entries = new_array();
    slab.form = kPlain;
    std::memcpy(slab.entries, entries, kArrayBytes);
  } else if (count > 1 || found[0].logical != kNoChunk) {
    const size_t bytes = sizeof(RunList) + count * sizeof(Run);
    auto* list = static_cast<RunList*>(std::malloc(bytes));
    HF_ASSERT(list != nullptr);
    list->count = count;
    std::memcpy(list->runs, found, count * sizeof(Run));
    slab.entries = list;
    slab.form = kRuns;
    entry_bytes_ += bytes;
  }
  uint32_t free_chunks = 0;
  for (uint32_t c = 0; c < kChunksPerSlab; c++) free_chunks += entries[c].logical_chunk == kNoChunk;
  slab.free_chunks = static_cast<uint16_t>(free_chunks);
}

void SlabTable::pack(uint32_t index) {
  Slab& slab = (*this)[index];
  if (slab.form != kPlain) return;
  Run found[kMaxRuns];
  if (find_runs(static_cast<const SlabEntry*>(slab.entries), found) > kMaxRuns) return;
  SlabEntry copy[kChunksPerSlab];
  std::memcpy(copy, slab.entries, kArrayBytes);
  load(index, copy);
}

size_t SlabTable::memory_bytes() const {
  return blocks_.size() * (kBlock * sizeof(Slab)) + blocks_.capacity() * sizeof(blocks_[0]) + entry_bytes_ +
         spare_.size() * kArrayBytes + vacant_.capacity() * sizeof(uint32_t);
}

}  // namespace holdfast
