// Which layers of a chain say anything about a chunk: so that a lookup through hundreds of layers asks those few that do.
//
// A mask of 32 bits for each chunk, a bit for a group of layers next to each other (one layer while there are at most 32).
// A bit that is set may be stale, one that is clear is certain. Masks come into being for 512 chunks at a time, when one
// of them is first looked up; from then on whoever adds to a layer tells. At most 64 MiB for a TiB that is read all over.
//
// Not thread-safe: the volume calls it under its lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace holdfast {

class ChainIndex {
 public:
  static constexpr uint32_t kLeafChunks = 512;  // 32 MiB of the volume

  // To be called first wherever the number of layers may have grown: groups grow with it, and masks are made anew.
  void fit(size_t layers) {
    const size_t width = (layers + 31) / 32;
    if (width == width_) return;
    width_ = width;
    clear();
  }
  void clear() {
    leaves_.clear();
    leaf_count_ = 0;
  }
  // Layers in a group: bit b is for those from b * width() on.
  size_t width() const { return width_; }
  uint32_t bit(size_t layer) const { return 1u << (layer / width_); }

  // The masks of the chunk's neighbourhood, from chunk / kLeafChunks * kLeafChunks on; null: not made yet.
  uint32_t* leaf(uint32_t chunk) const {
    const uint32_t at = chunk / kLeafChunks;
    return at < leaves_.size() ? leaves_[at].get() : nullptr;
  }
  uint32_t* add_leaf(uint32_t chunk) {
    const uint32_t at = chunk / kLeafChunks;
    if (at >= leaves_.size()) leaves_.resize(at + 1);
    leaves_[at] = std::make_unique<uint32_t[]>(kLeafChunks);
    leaf_count_++;
    return leaves_[at].get();
  }
  // The layer, of so many, now says something about the chunk.
  void mention(uint32_t chunk, size_t layer, size_t layers) {
    if (leaf_count_ == 0) return;
    fit(layers);
    if (uint32_t* masks = leaf(chunk)) masks[chunk % kLeafChunks] |= bit(layer);
  }
  size_t memory_bytes() const {
    return leaves_.capacity() * sizeof(leaves_[0]) + leaf_count_ * kLeafChunks * sizeof(uint32_t);
  }

 private:
  std::vector<std::unique_ptr<uint32_t[]>> leaves_;
  size_t leaf_count_ = 0;
  size_t width_ = 1;
};

}  // namespace holdfast
