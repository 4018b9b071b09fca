// The page images that are not yet durable (DESIGN 5.3), in memory that outlives the process: a memfd which the keeper
// holds. One per open volume.
//
// Three parts: a header; a directory of the slabs that this open of the volume claimed or gave back, which the grant
// does not know of; and slots, each with the 4 KiB image of one slab page that has changes the disk may not have yet.
// A slot is taken when a page first changes and let go when the page is durable with no newer change, so the memory
// that is really used follows the number of changed pages, not the volume's size. A fixed, sparse size will do.
//
// The process may be killed between any two instructions. So whatever is published is complete before the one 8-byte
// store that publishes it, and every change to a published image is either one 8-byte store or a second image that
// replaces the first by one 8-byte store (the larger version wins while both stand). No log, no checksum, no order of
// replay: what is in memory survives a kill whole, and does not survive a power cut at all.
//
// Not thread-safe: the volume calls it under its lock.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "format.h"
#include "status.h"

namespace holdfast {

class PageArena {
 public:
  static constexpr size_t kDefaultBytes = size_t{96} << 20;  // sparse: about 12 TiB of claims and 18,000 changed pages
  static constexpr size_t kMinimumBytes = size_t{64} << 10;
  static constexpr uint32_t kNone = 0xffffffffu;

  enum class ClaimState : uint8_t {
    kFree = 0,
    kClaiming = 1,  // its pages may or may not be written; no data in it yet
    kClaimed = 2,
    kReturned = 3,  // no longer the volume's, whatever the grant says
  };
  struct Claim {
    uint64_t slab = 0;
    uint64_t generation = 0;
    uint64_t layer_id = 0;
    ClaimState state = ClaimState::kFree;
  };
  struct Image {
    uint32_t slot = kNone;
    uint64_t slab = 0;
    uint64_t generation = 0;
    uint64_t layer_id = 0;
  };

  // `memory` (page-aligned, `bytes` long, all zero or to be overwritten) belongs to the caller and outlives the arena.
  static Result<std::unique_ptr<PageArena>> format(void* memory, size_t bytes, uint64_t volume_id, uint64_t epoch);
  // What a killed engine left behind. Refuses memory that format() did not make.
  static Result<std::unique_ptr<PageArena>> attach(void* memory, size_t bytes);

  uint64_t volume_id() const;
  uint64_t epoch() const;
  // The highest flush number that a page on disk may carry. Raised before the page is written.
  uint64_t flush_number() const;
  void raise_flush_number(uint64_t number);

  // Directory. Indices stay valid until the entry is dropped.
  uint32_t claim_count() const;                            // upper bound of indices
  Claim claim(uint32_t index) const;                       // state kFree: no entry
  uint32_t add_claim(const Claim& claim);                  // kNone: the directory is full
  void set_claim_state(uint32_t index, ClaimState state);  // kFree drops the entry

  // Slots.
  uint32_t slot_count() const { return slot_count_; }
  uint32_t free_slots() const;
  // Copies `image` into a free slot and publishes it. kNone: no slot is free.
  uint32_t publish(uint64_t slab, uint64_t generation, uint64_t layer_id, const format::SlabPage& image);
  // Replaces the image in `slot` by another one as a whole, for changes of more than one entry. Returns the new slot,
  // or kNone when none is free (nothing has changed then).
  uint32_t republish(uint32_t slot, const format::SlabPage& image);
  void release(uint32_t slot);
  const format::SlabPage& image(uint32_t slot) const;
  // One entry, by one 8-byte store.
  void store_entry(uint32_t slot, uint32_t chunk, format::SlabEntry entry);
  std::vector<Image> images() const;

  size_t touched_bytes() const;  // what the arena has ever written to

 private:
  struct Header;
  struct DirectoryEntry;
  struct SlotMeta;
  PageArena(void* memory, size_t bytes);
  void lay_out();
  void adopt();

  std::byte* memory_;
  size_t bytes_;
  Header* header_ = nullptr;
  DirectoryEntry* directory_ = nullptr;
  SlotMeta* metas_ = nullptr;
  format::SlabPage* images_ = nullptr;
  uint32_t directory_capacity_ = 0;
  uint32_t slot_count_ = 0;
  uint64_t next_version_ = 1;
  std::vector<uint32_t> free_slots_;       // of those below the high-water mark
  std::vector<uint32_t> free_directory_;   // likewise
};

}  // namespace holdfast
