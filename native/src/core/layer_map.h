// One layer's forward map: logical chunk to place. A place is a chunk of a slab in the volume's slab table, in 4 bytes.
//
// Budgets (DESIGN section 3) shape it. A leaf covers 4096 chunks (256 MiB of the volume) and is either absent, a short
// sorted list of runs (8 bytes each: a stretch of consecutive chunks in consecutive places), or, when the runs grow too
// many, a plain array of 4-byte places. Sequential data costs a few runs per leaf, random data 4 bytes per chunk.
//
// Leaves hang in blocks that exist where something is mapped. So an empty map costs nothing whatever the volume's size, and
// a chain of a thousand layers with little in each stays small.
//
// Not thread-safe: the volume calls it under its lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace holdfast {

using Place = uint32_t;  // slab index << 8 | chunk in the slab
inline constexpr Place kNoPlace = 0xffffffffu;
inline constexpr uint32_t kMaxSlabIndex = 0xfffffe;

class LayerMap {
 public:
  static constexpr uint32_t kLeafChunks = 4096;
  // Half a dense leaf. So no leaf costs more than 8 bytes a mapped chunk, or 16 while its list has just grown.
  static constexpr uint32_t kMaxRuns = 1024;
  // Where the map is known to become dense (see expect()), lists give way to arrays early: they are quicker.
  static constexpr uint32_t kMaxRunsDense = 32;

  LayerMap() = default;
  ~LayerMap();
  LayerMap(LayerMap&& other) noexcept
      : blocks_(std::move(other.blocks_)),
        leaf_count_(other.leaf_count_),
        block_count_(other.block_count_),
        leaf_bytes_(other.leaf_bytes_),
        max_runs_(other.max_runs_) {
    other.blocks_.clear();
    other.block_count_ = 0;
    other.leaf_bytes_ = 0;
  }
  LayerMap& operator=(LayerMap&&) = delete;

  void resize(uint64_t chunks);  // only grows
  // How many chunks will be mapped. From a quarter of all on, plain arrays keep to the budget whatever the order.
  void expect(uint64_t mapped) { max_runs_ = mapped >= this->chunks() / 4 ? kMaxRunsDense : kMaxRuns; }
  // For many lookups in a row at places far apart. Inlined early: GCC takes a call that only prefetches for one that does
  // nothing, and drops it.
  [[gnu::always_inline]] void prefetch(uint32_t chunk) const {
    const uintptr_t leaf = leaf_at(chunk / kLeafChunks);
    if ((leaf & kDenseTag) != 0) __builtin_prefetch(&dense(leaf)->places[chunk % kLeafChunks], 1);
  }
  uint64_t chunks() const { return leaf_count_ * kLeafChunks; }

  Place find(uint32_t chunk) const {
    const uintptr_t leaf = leaf_at(chunk / kLeafChunks);
    if (leaf == 0) return kNoPlace;
    if ((leaf & kDenseTag) != 0) return dense(leaf)->places[chunk % kLeafChunks];
    return find_run(leaf, chunk % kLeafChunks);
  }
  void set(uint32_t chunk, Place place) { set_run(chunk, 1, place); }
  void erase(uint32_t chunk);
  // `count` chunks from `first` on to places from `place` on; none of them may be mapped.
  void set_run(uint32_t first, uint32_t count, Place place);
  // The first mapped chunk at or after `from` and below `end`; `end` if there is none. Skips absent leaves at once.
  uint32_t next_mapped(uint32_t from, uint32_t end) const;

  // The nearest mapped chunk below `chunk`, at most `within` away; its distance, or 0 if there is none.
  uint32_t find_before(uint32_t chunk, uint32_t within, Place* place) const;

  size_t memory_bytes() const {
    return blocks_.capacity() * sizeof(blocks_[0]) + block_count_ * kBlockLeaves * sizeof(uintptr_t) + leaf_bytes_;
  }

 private:
  struct Run {
    uint16_t first;
    uint16_t length;
    Place place;
  };
  struct RunLeaf {
    uint32_t count;
    uint32_t capacity;
    Run runs[];
  };
  struct DenseLeaf {
    uint32_t mapped;
    uint32_t reserved;
    Place places[kLeafChunks];
  };
  static constexpr uintptr_t kDenseTag = 1;
  static constexpr uint32_t kBlockLeaves = 64;  // 16 GiB of the volume

  uintptr_t leaf_at(uint32_t at) const {
    const uint32_t block = at / kBlockLeaves;
    return block < blocks_.size() && blocks_[block] != nullptr ? blocks_[block][at % kBlockLeaves] : 0;
  }
  uintptr_t& leaf_for(uint32_t at);  // makes its block
  static RunLeaf* runs(uintptr_t leaf) { return reinterpret_cast<RunLeaf*>(leaf); }
  static DenseLeaf* dense(uintptr_t leaf) { return reinterpret_cast<DenseLeaf*>(leaf & ~kDenseTag); }
  static Place find_run(uintptr_t leaf, uint32_t offset);
  // Index of the first run that starts after `offset`.
  static uint32_t upper(const RunLeaf* leaf, uint32_t offset);
  void insert_run(uintptr_t& leaf, uint32_t offset, uint32_t length, Place place);
  void insert_at(uintptr_t& leaf, uint32_t index, Run run);
  void remove_at(uintptr_t& leaf, uint32_t index);
  void make_dense(uintptr_t& leaf);
  void free_leaf(uintptr_t& leaf);

  std::vector<std::unique_ptr<uintptr_t[]>> blocks_;  // as far as the last one that was ever needed
  uint64_t leaf_count_ = 0;
  size_t block_count_ = 0;
  size_t leaf_bytes_ = 0;
  uint32_t max_runs_ = kMaxRuns;
};

}  // namespace holdfast
