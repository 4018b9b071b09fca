// Layout of the arena's memory and the order of the stores into it; the why is in page_arena.h.
#include "page_arena.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

namespace holdfast {

using format::kPageSize;

namespace {

constexpr uint64_t kArenaMagic = 0x31414e4552414648;  // "HFARENA1"
constexpr uint64_t kSlabBits = 56;
constexpr uint64_t kSlabMask = (uint64_t{1} << kSlabBits) - 1;

void publish_word(uint64_t& word, uint64_t value) {
  std::atomic_ref<uint64_t>(word).store(value, std::memory_order_release);
}

constexpr size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

struct PageArena::Header {
  uint64_t magic;
  uint64_t bytes;
  uint64_t volume_id;
  uint64_t epoch;
  uint64_t flush_number;
  uint32_t directory_used;  // high-water marks: nothing above was ever written to
  uint32_t slots_used;
};

// word: state in the upper 8 bits, slab number in the lower 56. Zero: free.
struct PageArena::DirectoryEntry {
  uint64_t word;
  uint64_t generation;
  uint64_t layer_id;
};

// word: slab number + 1. Zero: free.
struct PageArena::SlotMeta {
  uint64_t word;
  uint64_t generation;
  uint64_t layer_id;
  uint64_t version;
};

PageArena::PageArena(void* memory, size_t bytes) : memory_(static_cast<std::byte*>(memory)), bytes_(bytes) {
  static_assert(sizeof(Header) <= kPageSize);
  HF_ASSERT(reinterpret_cast<uintptr_t>(memory) % kPageSize == 0);
  lay_out();
}

// Header, a quarter for the directory, the rest for slots.
void PageArena::lay_out() {
  const size_t directory_bytes = round_up(bytes_ / 4, kPageSize);
  const size_t rest = bytes_ - kPageSize - directory_bytes;
  slot_count_ = static_cast<uint32_t>((rest - kPageSize) / (kPageSize + sizeof(SlotMeta)));
  directory_capacity_ = static_cast<uint32_t>(directory_bytes / sizeof(DirectoryEntry));
  header_ = reinterpret_cast<Header*>(memory_);
  directory_ = reinterpret_cast<DirectoryEntry*>(memory_ + kPageSize);
  metas_ = reinterpret_cast<SlotMeta*>(memory_ + kPageSize + directory_bytes);
  const size_t metas_bytes = round_up(slot_count_ * sizeof(SlotMeta), kPageSize);
  images_ = reinterpret_cast<format::SlabPage*>(memory_ + kPageSize + directory_bytes + metas_bytes);
  HF_ASSERT(reinterpret_cast<std::byte*>(images_ + slot_count_) <= memory_ + bytes_);
  HF_ASSERT(slot_count_ > 0 && directory_capacity_ > 0);
}

Result<std::unique_ptr<PageArena>> PageArena::format(void* memory, size_t bytes, uint64_t volume_id, uint64_t epoch) {
  if (bytes < kMinimumBytes || bytes % kPageSize != 0) {
    return Status{Code::kInvalidArgument, "the page arena of volume " + std::to_string(volume_id) + " is " +
                                              std::to_string(bytes) + " bytes; give it whole pages, at least " +
                                              std::to_string(kMinimumBytes) + " bytes"};
  }
  std::unique_ptr<PageArena> arena(new PageArena(memory, bytes));
  Header& header = *arena->header_;
  if (header.magic == kArenaMagic && header.bytes == bytes) {
    // Used before: clear only what was ever written, so that sparse memory stays sparse.
    std::memset(static_cast<void*>(arena->directory_), 0, std::min(header.directory_used, arena->directory_capacity_) *
                                                              sizeof(DirectoryEntry));
    std::memset(static_cast<void*>(arena->metas_), 0,
                std::min(header.slots_used, arena->slot_count_) * sizeof(SlotMeta));
  } else if (header.magic != 0) {
    std::memset(memory, 0, bytes);
  }
  publish_word(header.magic, 0);
  header.bytes = bytes;
  header.volume_id = volume_id;
  header.epoch = epoch;
  header.flush_number = 0;
  header.directory_used = 0;
  header.slots_used = 0;
  publish_word(header.magic, kArenaMagic);
  return arena;
}

Result<std::unique_ptr<PageArena>> PageArena::attach(void* memory, size_t bytes) {
  if (bytes < kMinimumBytes || bytes % kPageSize != 0) {
    return Status{Code::kInvalidArgument, "the page arena left behind is " + std::to_string(bytes) +
                                              " bytes, which no engine makes; open the volume afresh"};
  }
  std::unique_ptr<PageArena> arena(new PageArena(memory, bytes));
  const Header& header = *arena->header_;
  if (header.magic != kArenaMagic || header.bytes != bytes || header.directory_used > arena->directory_capacity_ ||
      header.slots_used > arena->slot_count_) {
    return Status{
        Code::kCorrupt,
        "the page images left behind are not usable (unknown layout or another size); open the volume afresh: "
        "what was flushed is on the pool"};
  }
  arena->adopt();
  return arena;
}

// Rebuilds the free lists. Of two images of one slab (killed in the middle of republish()) the newer one counts.
void PageArena::adopt() {
  for (uint32_t i = 0; i < header_->directory_used; i++) {
    if (directory_[i].word == 0) free_directory_.push_back(i);
  }
  std::unordered_map<uint64_t, uint32_t> newest;
  for (uint32_t i = 0; i < header_->slots_used; i++) {
    if (metas_[i].word == 0) continue;
    next_version_ = std::max(next_version_, metas_[i].version + 1);
    auto [at, fresh] = newest.try_emplace(metas_[i].word, i);
    if (fresh) continue;
    uint32_t loser = i;
    const SlotMeta& other = metas_[at->second];
    if (metas_[i].generation > other.generation ||
        (metas_[i].generation == other.generation && metas_[i].version > other.version)) {
      loser = at->second;
      at->second = i;
    }
    publish_word(metas_[loser].word, 0);
  }
  for (uint32_t i = 0; i < header_->slots_used; i++) {
    if (metas_[i].word == 0) free_slots_.push_back(i);
  }
}

uint64_t PageArena::volume_id() const { return header_->volume_id; }
uint64_t PageArena::epoch() const { return header_->epoch; }
uint64_t PageArena::flush_number() const { return header_->flush_number; }

void PageArena::raise_flush_number(uint64_t number) {
  if (number > header_->flush_number) publish_word(header_->flush_number, number);
}

uint32_t PageArena::claim_count() const { return header_->directory_used; }

PageArena::Claim PageArena::claim(uint32_t index) const {
  HF_ASSERT(index < header_->directory_used);
  const DirectoryEntry& entry = directory_[index];
  return {entry.word & kSlabMask, entry.generation, entry.layer_id, static_cast<ClaimState>(entry.word >> kSlabBits)};
}

uint32_t PageArena::add_claim(const Claim& claim) {
  HF_ASSERT(claim.state != ClaimState::kFree && claim.slab <= kSlabMask);
  uint32_t index;
  if (!free_directory_.empty()) {
    index = free_directory_.back();
    free_directory_.pop_back();
  } else {
    if (header_->directory_used == directory_capacity_) return kNone;
    index = header_->directory_used;
    directory_[index].word = 0;
    std::atomic_ref<uint32_t>(header_->directory_used).store(index + 1, std::memory_order_release);
  }
  DirectoryEntry& entry = directory_[index];
  HF_ASSERT(entry.word == 0);
  entry.generation = claim.generation;
  entry.layer_id = claim.layer_id;
  publish_word(entry.word, claim.slab | static_cast<uint64_t>(claim.state) << kSlabBits);
  return index;
}

void PageArena::set_claim_state(uint32_t index, ClaimState state) {
  HF_ASSERT(index < header_->directory_used && directory_[index].word != 0);
  DirectoryEntry& entry = directory_[index];
  if (state == ClaimState::kFree) {
    publish_word(entry.word, 0);
    free_directory_.push_back(index);
    return;
  }
  publish_word(entry.word, (entry.word & kSlabMask) | static_cast<uint64_t>(state) << kSlabBits);
}

uint32_t PageArena::free_slots() const {
  return slot_count_ - header_->slots_used + static_cast<uint32_t>(free_slots_.size());
}

uint32_t PageArena::publish(uint64_t slab, uint64_t generation, uint64_t layer_id, const format::SlabPage& image) {
  uint32_t slot;
  if (!free_slots_.empty()) {
    slot = free_slots_.back();
    free_slots_.pop_back();
  } else {
    if (header_->slots_used == slot_count_) return kNone;
    slot = header_->slots_used;
    metas_[slot].word = 0;
    std::atomic_ref<uint32_t>(header_->slots_used).store(slot + 1, std::memory_order_release);
  }
  SlotMeta& meta = metas_[slot];
  HF_ASSERT(meta.word == 0);
  std::memcpy(static_cast<void*>(&images_[slot]), &image, kPageSize);
  meta.generation = generation;
  meta.layer_id = layer_id;
  meta.version = next_version_++;
  publish_word(meta.word, slab + 1);
  return slot;
}

uint32_t PageArena::republish(uint32_t slot, const format::SlabPage& image) {
  HF_ASSERT(slot < header_->slots_used && metas_[slot].word != 0);
  const SlotMeta& old = metas_[slot];
  const uint32_t fresh = publish(old.word - 1, old.generation, old.layer_id, image);
  if (fresh != kNone) release(slot);
  return fresh;
}

void PageArena::release(uint32_t slot) {
  HF_ASSERT(slot < header_->slots_used && metas_[slot].word != 0);
  publish_word(metas_[slot].word, 0);
  free_slots_.push_back(slot);
}

const format::SlabPage& PageArena::image(uint32_t slot) const {
  HF_ASSERT(slot < header_->slots_used && metas_[slot].word != 0);
  return images_[slot];
}

void PageArena::store_entry(uint32_t slot, uint32_t chunk, format::SlabEntry entry) {
  HF_ASSERT(slot < header_->slots_used && chunk < format::kChunksPerSlab);
  uint64_t word;
  std::memcpy(&word, &entry, sizeof word);
  using Word [[gnu::may_alias]] = uint64_t;
  static_assert(offsetof(format::SlabPage, entries) % sizeof(Word) == 0 && sizeof entry == sizeof(Word));
  __atomic_store_n(reinterpret_cast<Word*>(&images_[slot].entries[chunk]), word, __ATOMIC_RELEASE);
}

std::vector<PageArena::Image> PageArena::images() const {
  std::vector<Image> all;
  for (uint32_t i = 0; i < header_->slots_used; i++) {
    if (metas_[i].word != 0) all.push_back({i, metas_[i].word - 1, metas_[i].generation, metas_[i].layer_id});
  }
  return all;
}

size_t PageArena::touched_bytes() const {
  return kPageSize + header_->directory_used * sizeof(DirectoryEntry) +
         header_->slots_used * (sizeof(SlotMeta) + kPageSize);
}

}  // namespace holdfast
