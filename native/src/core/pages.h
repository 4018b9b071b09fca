// The 4 KiB page as such: sealing one before it is written, judging one after it was read, and choosing between the
// two copies that everything mutable has. Nothing that fails verify() is ever followed (DESIGN invariant 8).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <type_traits>

#include "format.h"
#include "status.h"

namespace holdfast {

enum class PageState : uint8_t {
  kOk,
  kBlank,         // 4096 zero bytes: never written (format zeroes)
  kBadMagic,      // not a page of the expected kind
  kBadCrc,        // torn or damaged
  kNewerVersion,  // intact, but of a format version this build does not know
  kWrongPool,     // intact, another pool's
  kWrongAddress,  // intact, but belongs elsewhere on the device: a misdirected write
};

// For sentences: "is blank", "fails its checksum", …
const char* page_state_text(PageState state);

// The magic number of each page type, so that call sites can't mix them up.
template <typename Page>
inline constexpr uint32_t kMagicOf = 0;
template <>
inline constexpr uint32_t kMagicOf<format::Superblock> = format::kMagicSuperblock;
template <>
inline constexpr uint32_t kMagicOf<format::AuthorityPage> = format::kMagicAuthority;
template <>
inline constexpr uint32_t kMagicOf<format::HeartbeatPage> = format::kMagicHeartbeat;
template <>
inline constexpr uint32_t kMagicOf<format::FencePage> = format::kMagicFence;
template <>
inline constexpr uint32_t kMagicOf<format::VolumeRecord> = format::kMagicVolume;
template <>
inline constexpr uint32_t kMagicOf<format::LayerRecord> = format::kMagicLayer;
template <>
inline constexpr uint32_t kMagicOf<format::SlabPage> = format::kMagicSlab;

// Fills in the whole header (magic, version, pool, address, sequence, CRC; flags are kept). The page must not change
// afterwards. `page` is 4096 bytes, at least 8-aligned.
void seal(void* page, uint32_t magic, const format::Uuid& pool, uint64_t address, uint64_t sequence);

// Judges 4096 bytes read from `address`. The order of the checks is the order of the enumerators.
PageState verify(const void* page, uint32_t magic, const format::Uuid& pool, uint64_t address);

// Everything but whose it is: for reading a superblock before the pool's UUID is known.
PageState verify_any_pool(const void* page, uint32_t magic, uint64_t address);

// Makes a page that shares no sector with any page of its type, and counts as torn: what a torn copy is overwritten with before another
// page goes there. A torn copy is not dead: it lacks some sectors of a page that was never durable, and those of the next page may be the
// very same. Torn in its turn, that write would make the lost page whole, newer than the one that serves. The magic, so that it counts as
// torn still, then all ones, which is neither an id nor a length, an entry, a hole range or a text.
void blot(void* page, uint32_t magic);

bool is_zero(const void* data, size_t length);

template <typename Page>
void seal(Page& page, const format::Uuid& pool, uint64_t address, uint64_t sequence) {
  static_assert(sizeof(Page) == format::kPageSize && kMagicOf<Page> != 0);
  seal(&page, kMagicOf<Page>, pool, address, sequence);
}

template <typename Page>
PageState verify(const Page& page, const format::Uuid& pool, uint64_t address) {
  static_assert(sizeof(Page) == format::kPageSize && kMagicOf<Page> != 0);
  return verify(&page, kMagicOf<Page>, pool, address);
}

// The page at `offset` of a buffer. The buffer is 4096-aligned and long enough.
template <typename Page>
Page& page_at(std::span<std::byte> buffer, size_t offset) {
  static_assert(sizeof(Page) == format::kPageSize && std::is_trivially_copyable_v<Page>);
  HF_ASSERT(offset % format::kPageSize == 0 && offset + sizeof(Page) <= buffer.size());
  return *reinterpret_cast<Page*>(buffer.data() + offset);
}

// Two copies, judged. Copies are numbered 0 (A, the lower address) and 1 (B).
struct Copies {
  PageState state[2] = {PageState::kBlank, PageState::kBlank};
  int newest = -1;      // 0 or 1; -1: neither is valid
  bool equal = false;   // both valid, and the same but for address and CRC
  bool valid() const { return newest >= 0; }
  // Never written, or given up in the middle of the very first write (nothing rests on a page before both copies, or
  // for records the one copy, are durable): one is blank and the other blank or torn.
  bool blank() const;
  // Neither usable nor blank: damage. Never to be taken for "empty".
  bool bad() const { return newest < 0 && !blank(); }
  // One copy serves, the other is neither valid nor blank: to be reported.
  bool degraded() const;
  // The copy that the next change goes to: never the one that serves.
  int next() const { return newest == 0 ? 1 : 0; }
};

// Records (superblock, authority, heartbeat, volume, layer): the valid copy with the larger sequence.
Copies choose_record(const void* a, const void* b, uint32_t magic, const format::Uuid& pool, uint64_t address_a,
                     uint64_t address_b);

template <typename Page>
Copies choose_record(const Page& a, const Page& b, const format::Uuid& pool, uint64_t address_a) {
  static_assert(sizeof(Page) == format::kPageSize && kMagicOf<Page> != 0);
  static_assert(!std::is_same_v<Page, format::SlabPage>, "slab pages are ordered by generation first");
  return choose_record(&a, &b, kMagicOf<Page>, pool, address_a, address_a + format::kPageSize);
}

// Maps nothing and hides nothing: as a claim leaves it.
bool is_empty(const format::SlabPage& page);

// Slab pages: the valid copy with the larger (generation, flush number), so an old owner's page never wins by a high
// flush number.
Copies choose_slab(const format::SlabPage& a, const format::SlabPage& b, const format::Uuid& pool, uint64_t address_a);

// 4096-aligned memory for O_DIRECT, zeroed. Size is rounded up to whole pages.
class PageBuffer {
 public:
  explicit PageBuffer(size_t bytes);
  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  std::span<std::byte> span() { return {data_.get(), size_}; }
  void clear();
  template <typename Page>
  Page& at(size_t offset = 0) {
    return page_at<Page>(span(), offset);
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_;
};

// UUIDs as people read them: lower case with hyphens.
std::string uuid_text(const format::Uuid& uuid);
bool parse_uuid(const std::string& text, format::Uuid* out);
inline bool uuid_is_zero(const format::Uuid& uuid) { return uuid == format::Uuid{}; }

// A zero-padded field of fixed size as a string, and back (refuses what does not fit: false, field unchanged).
std::string field_text(std::span<const char> field);
bool set_field(std::span<char> field, const std::string& text);

}  // namespace holdfast
