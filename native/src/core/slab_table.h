// The volume's slabs, all layers together, by index. Each slab's 256 entries are kept in one of three forms: none (all
// free), a short list of runs (a slab written in order costs tens of bytes), or the plain 2 KiB array. A slab with
// changes that are not yet durable is always plain.
//
// Not thread-safe: the volume calls it under its lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "format.h"
#include "status.h"

namespace holdfast {

inline constexpr uint32_t kNoIndex = 0xffffffffu;
inline constexpr format::SlabEntry kFreeEntry = {format::kNoChunk, 0, 0};

enum class SlabState : uint8_t {
  kVacant,     // the index is free
  kLive,
  kReleasing,  // empty, on its way back; nothing is allocated from it
};

struct Slab {
  uint64_t number = 0;      // in the pool
  uint64_t generation = 0;
  uint64_t sequence = 0;    // flush number of the newest durable copy
  void* entries = nullptr;  // by `form`
  uint32_t hot = kNoIndex;  // index of its HotSlab while it has changes or limbo
  uint32_t claim = kNoIndex;  // index in the arena's directory, if it was claimed since the volume was opened
  uint32_t list_next = kNoIndex;  // of the slabs with free chunks
  uint32_t list_previous = kNoIndex;
  uint16_t free_chunks = 0;
  uint16_t layer = 0;       // index in the chain, oldest 0: so that a new top moves nothing
  SlabState state = SlabState::kVacant;
  uint8_t form : 2 = 0;     // SlabTable::Form
  uint8_t newest : 1 = 0;   // which copy serves
  uint8_t unequal : 1 = 0;  // the copies differ
  uint8_t unsettled : 2 = 0;  // page writes needed until no copy on the disk maps a chunk that is free here
  uint8_t ours : 1 = 0;     // the newest copy was written under the current epoch
  uint8_t listed : 1 = 0;   // in the list of slabs with free chunks, while its layer is the top
  uint8_t holes : 1 = 0;    // has hole ranges
};
static_assert(sizeof(Slab) <= 64);

class SlabTable {
 public:
  enum Form : uint8_t { kNone = 0, kRuns = 1, kPlain = 2 };

  SlabTable() = default;
  ~SlabTable();
  SlabTable(const SlabTable&) = delete;
  SlabTable& operator=(const SlabTable&) = delete;

  uint32_t add();               // a vacant index, made live and empty
  void remove(uint32_t index);  // its entries go with it
  uint32_t size() const { return size_; }  // upper bound of indices
  uint32_t live() const { return live_; }
  Slab& operator[](uint32_t index) { return blocks_[index / kBlock][index % kBlock]; }
  const Slab& operator[](uint32_t index) const { return blocks_[index / kBlock][index % kBlock]; }

  format::SlabEntry entry(uint32_t index, uint32_t chunk) const {
    const Slab& slab = (*this)[index];
    if (slab.form == kPlain) return static_cast<const format::SlabEntry*>(slab.entries)[chunk];
    return packed_entry(slab, chunk);
  }
  // The plain array; unpacks if needed.
  format::SlabEntry* plain(uint32_t index);
  void load(uint32_t index, const format::SlabEntry* entries);  // packs if that is small
  void pack(uint32_t index);                                    // a plain slab that will rest for a while

  size_t memory_bytes() const;

 private:
  static constexpr uint32_t kBlock = 64;
  static constexpr uint32_t kMaxRuns = 24;
  static constexpr size_t kSpareArrays = 16;
  struct Run {
    uint32_t logical;  // kNoChunk: free chunks
    uint16_t data;
    uint16_t zero;
    uint16_t first;
    uint16_t length;
  };
  struct RunList {
    uint32_t count;
    Run runs[];
  };
  static format::SlabEntry packed_entry(const Slab& slab, uint32_t chunk);
  // Returns the number of runs, or kMaxRuns + 1 when there are more.
  static uint32_t find_runs(const format::SlabEntry* entries, Run* out);
  void drop_entries(Slab& slab);
  format::SlabEntry* new_array();

  std::vector<std::unique_ptr<Slab[]>> blocks_;
  std::vector<uint32_t> vacant_;
  std::vector<format::SlabEntry*> spare_;
  uint32_t size_ = 0;
  uint32_t live_ = 0;
  size_t entry_bytes_ = 0;
};

}  // namespace holdfast
