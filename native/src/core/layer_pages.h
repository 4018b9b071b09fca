// What jobs on layers have in common: the blocks that pages cover, and what is looked at before anything is followed or changed.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "records.h"
#include "slab_pairs.h"

namespace holdfast {

inline constexpr uint16_t kAll = 0xffff;  // blocks of a chunk

inline uint64_t bits(uint16_t mask) { return static_cast<uint64_t>(__builtin_popcount(mask)); }

// Blocks of a volume, 16 to a chunk, in pieces that exist where any is.
class BlockSet {
 public:
  static constexpr uint32_t kPieceChunks = 4096;
  uint16_t get(uint32_t chunk) const {
    const auto piece = pieces_.find(chunk / kPieceChunks);
    return piece == pieces_.end() ? uint16_t{0} : piece->second[chunk % kPieceChunks];
  }
  void add(uint32_t chunk, uint16_t mask) {
    if (mask == 0) return;
    std::vector<uint16_t>& piece = pieces_[chunk / kPieceChunks];
    if (piece.empty()) piece.resize(kPieceChunks);
    piece[chunk % kPieceChunks] = static_cast<uint16_t>(piece[chunk % kPieceChunks] | mask);
  }
  void add_chunks(uint64_t from, uint64_t to) {
    for (uint64_t chunk = from; chunk < to; chunk++) add(static_cast<uint32_t>(chunk), kAll);
  }
  template <typename Visit>  // visit(chunk, mask), ascending, empty ones left out; false ends it
  void each(uint32_t from, Visit visit) const {
    for (auto piece = pieces_.lower_bound(from / kPieceChunks); piece != pieces_.end(); ++piece) {
      for (uint32_t i = 0; i < kPieceChunks; i++) {
        const uint32_t chunk = piece->first * kPieceChunks + i;
        if (chunk >= from && piece->second[i] != 0 && !visit(chunk, piece->second[i])) return;
      }
    }
  }

 private:
  std::map<uint32_t, std::vector<uint16_t>> pieces_;
};

inline bool names(const format::SlabPage& page, const LayerSpec& layer, const SlabRun& run) {
  return page.layer_id == layer.layer_id && page.generation == run.generation;
}

// Entries that no correct engine writes are followed by nobody.
inline Status sane(uint64_t slab, const format::SlabPage& page) {
  bool good = page.hole_count <= format::kHolesPerSlab;
  for (uint32_t i = 0; good && i < page.hole_count; i++) {
    good = page.holes[i].length > 0 && uint64_t{page.holes[i].start} + page.holes[i].length <= format::kNoChunk;
  }
  for (const format::SlabEntry& entry : page.entries) {
    good = good && (entry.data & entry.zero) == 0 && (entry.logical_chunk != format::kNoChunk || (entry.data | entry.zero) == 0);
  }
  if (good) return {};
  return {Code::kCorrupt, "the page of slab " + std::to_string(slab) + " (layer " + std::to_string(page.layer_id) +
                              ") makes no sense although its checksum is right. Run `holdfast pool check`"};
}

inline Status both_bad(uint64_t slab, const LayerSpec& layer) {
  return {Code::kCorrupt, "both copies of the page of slab " + std::to_string(slab) + " of layer " +
                              std::to_string(layer.layer_id) + " are damaged. Run `holdfast pool check`"};
}

inline void add_coverage(BlockSet& set, const format::SlabPage& page) {
  for (const format::SlabEntry& entry : page.entries) {
    if (entry.logical_chunk != format::kNoChunk) set.add(entry.logical_chunk, static_cast<uint16_t>(entry.data | entry.zero));
  }
  for (uint32_t i = 0; i < page.hole_count; i++) {
    set.add_chunks(page.holes[i].start, uint64_t{page.holes[i].start} + page.holes[i].length);
  }
}

inline Status check_layers(const format::Superblock& s, const std::vector<LayerSpec>& layers) {
  for (const LayerSpec& layer : layers) {
    if (layer.layer_id == 0) return {Code::kInvalidArgument, "layer ids begin at 1"};
    for (const SlabRun& run : layer.slabs) {
      if (Status status = check_run(s, run); !status.ok()) return status;
    }
  }
  return {};
}

// What a record says must fit before anything is changed: that it is the victim's, frozen, and not deleted.
inline Status check_victim(SyncDevice& device, const format::Superblock& s, const LayerSpec& victim, const std::string& undone,
                           format::LayerRecord* out) {
  Result<std::optional<format::LayerRecord>> found = load_layer_record(device, s, victim.slot);
  if (!found.ok()) return found.status;
  const std::string name = "layer " + std::to_string(victim.layer_id);
  if (!found->has_value() || (*found)->layer_id != victim.layer_id) {
    return {Code::kStale, "the record slot " + std::to_string(victim.slot) + " is not that of " + name +
                              "; " + undone};
  }
  if ((*found)->state != format::LayerState::kFrozen && (*found)->state != format::LayerState::kFolded) {
    return {Code::kStale, name + ((*found)->state == format::LayerState::kWritable ? " is writable" : " is deleted") +
                              " on the disk; " + undone};
  }
  *out = **found;
  return {};
}

}  // namespace holdfast
