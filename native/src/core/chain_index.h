// Which frozen layer of a chain answers for a block: so that a lookup through hundreds of layers asks the one or few that
// say something about the very blocks that are asked for.
//
// A hint of 4 bits for each block: the newest group, of layers next to each other, of which one says something about it.
// That nothing newer does is certain. That the group still does is not, as layers are stripped of what newer ones cover:
// then the hint is lowered. A hint never has to rise but for a layer that is newly frozen, which each leaf of hints takes in
// when it is next looked at; where a frozen layer came to say more (volume_learn.cc), the leaf is made anew. The top is not in here.
//
// 8 bytes a chunk, made for 128 chunks at a time when one of them is first looked up: at most 130 MiB for a TiB that is
// read all over.
//
// Not thread-safe: the volume calls it under its lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "status.h"

namespace holdfast {

class ChainIndex {
 public:
  static constexpr uint32_t kLeafChunks = 128;  // 8 MiB of the volume
  static constexpr uint32_t kGroups = 15;       // 0 in a hint: no frozen layer says anything

  struct Leaf {
    size_t layers = 0;  // the oldest so many are in the hints
    uint64_t hints[kLeafChunks] = {};
  };

  // To be called first wherever the number of frozen layers may have grown. Groups grow by halves, so that all hints are
  // made anew but a few times in a chain's life.
  void fit(size_t frozen) {
    size_t width = width_;
    while (width * kGroups < frozen) width += (width + 1) / 2;
    if (width == width_) return;
    clear();
    width_ = width;
  }
  // Layers have other numbers now, or say more about many chunks.
  void clear() {
    leaves_.clear();
    leaf_count_ = 0;
    width_ = 1;
  }
  // A layer may say more about the chunk than it did.
  void forget(uint32_t chunk) {
    const uint32_t at = chunk / kLeafChunks;
    if (at >= leaves_.size() || leaves_[at] == nullptr) return;
    leaves_[at].reset();
    leaf_count_--;
  }
  // The layers of a group are [first(group), first(group + 1)), the oldest layer is 0, and groups count from 1.
  size_t first(uint32_t group) const { return (group - 1) * width_; }
  uint32_t group(size_t layer) const { return static_cast<uint32_t>(layer / width_) + 1; }

  // The hints of the chunk's neighbourhood, from chunk / kLeafChunks * kLeafChunks on.
  Leaf& leaf(uint32_t chunk) {
    const uint32_t at = chunk / kLeafChunks;
    if (at >= leaves_.size()) leaves_.resize(at + 1);
    if (leaves_[at] == nullptr) {
      leaves_[at] = std::make_unique<Leaf>();
      leaf_count_++;
    }
    return *leaves_[at];
  }
  static uint32_t hint(uint64_t hints, uint32_t block) { return static_cast<uint32_t>(hints >> (4 * block)) & 15; }
  static void set_hint(uint64_t& hints, uint16_t blocks, uint32_t group) {
    HF_ASSERT(group <= kGroups);
    for (uint32_t left = blocks; left != 0; left &= left - 1) {
      const auto shift = static_cast<uint32_t>(4 * __builtin_ctz(left));
      hints = (hints & ~(uint64_t{15} << shift)) | uint64_t{group} << shift;
    }
  }
  // The newest group that any of the blocks has, and in `blocks` those that have it; 0: none has one.
  static uint32_t newest(uint64_t hints, uint16_t& blocks) {
    uint32_t best = 0;
    uint16_t with = 0;
    for (uint32_t left = blocks; left != 0; left &= left - 1) {
      const auto block = static_cast<uint32_t>(__builtin_ctz(left));
      const uint32_t group = hint(hints, block);
      if (group > best) with = 0;
      if (group < best) continue;
      best = group;
      with = static_cast<uint16_t>(with | 1u << block);
    }
    blocks = with;
    return best;
  }
  size_t memory_bytes() const { return leaves_.capacity() * sizeof(leaves_[0]) + leaf_count_ * sizeof(Leaf); }

 private:
  std::vector<std::unique_ptr<Leaf>> leaves_;
  size_t leaf_count_ = 0;
  size_t width_ = 1;
};

}  // namespace holdfast
