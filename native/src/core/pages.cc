// How a page is sealed, judged and chosen; see pages.h.
#include "pages.h"

#include <algorithm>
#include <cstring>

#include "crc32c.h"

namespace holdfast {
namespace {

using format::kPageSize;
using format::PageHeader;
using format::SlabPage;

static_assert(offsetof(PageHeader, crc32c) == 40);

uint32_t page_crc(const void* page) {
  static constexpr char kZeros[sizeof(PageHeader::crc32c)] = {};
  const auto* bytes = static_cast<const std::byte*>(page);
  constexpr size_t at = offsetof(PageHeader, crc32c);
  constexpr size_t after = at + sizeof kZeros;
  uint32_t crc = crc32c(bytes, at);
  crc = crc32c(kZeros, sizeof kZeros, crc);
  return crc32c(bytes + after, kPageSize - after, crc);
}

PageHeader header_of(const void* page) {
  PageHeader header;
  std::memcpy(&header, page, sizeof header);
  return header;
}

// The same content: all but the address and the CRC that follows from it.
bool same_content(const void* a, const void* b) {
  PageHeader x = header_of(a);
  PageHeader y = header_of(b);
  x.address = y.address = 0;
  x.crc32c = y.crc32c = 0;
  if (std::memcmp(&x, &y, sizeof x) != 0) return false;
  return std::memcmp(static_cast<const char*>(a) + sizeof x, static_cast<const char*>(b) + sizeof y,
                     kPageSize - sizeof x) == 0;
}

bool torn_or_blank(PageState state) { return state == PageState::kBlank || state == PageState::kBadCrc; }

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

const char* page_state_text(PageState state) {
  switch (state) {
    case PageState::kOk: return "is valid";
    case PageState::kBlank: return "is blank";
    case PageState::kBadMagic: return "is not a page of this kind";
    case PageState::kBadCrc: return "fails its checksum";
    case PageState::kNewerVersion: return "is of a newer format version";
    case PageState::kWrongPool: return "belongs to another pool";
    case PageState::kWrongAddress: return "belongs to another place on the device";
  }
  HF_ASSERT(!"a page state without a text");
  return "";
}

bool is_zero(const void* data, size_t length) {
  // Comparing the buffer with itself, one byte on, lets memcmp's vector code do the work.
  const auto* bytes = static_cast<const char*>(data);
  return length == 0 || (bytes[0] == 0 && std::memcmp(bytes, bytes + 1, length - 1) == 0);
}

void seal(void* page, uint32_t magic, const format::Uuid& pool, uint64_t address, uint64_t sequence) {
  HF_ASSERT(page != nullptr && reinterpret_cast<uintptr_t>(page) % alignof(PageHeader) == 0);
  HF_ASSERT(address % kPageSize == 0 && !uuid_is_zero(pool));
  auto& header = *static_cast<PageHeader*>(page);
  header.magic = magic;
  header.version = format::kVersion;
  header.pool = pool;
  header.address = address;
  header.sequence = sequence;
  header.reserved = 0;
  header.crc32c = page_crc(page);
  HF_ASSERT(verify(page, magic, pool, address) == PageState::kOk);
}

void blot(void* page, uint32_t magic) {
  std::memset(page, 0xff, kPageSize);
  std::memcpy(page, &magic, sizeof magic);
}

PageState verify_any_pool(const void* page, uint32_t magic, uint64_t address) {
  const PageHeader header = header_of(page);
  // Version and CRC keep their place and meaning in every future version, so that "newer" can be told from "damaged".
  if (header.magic != magic) {
    if (header.magic != 0) return PageState::kBadMagic;
    // No magic but something else: the first write of the page was torn, and its first sector is the one that is
    // missing.
    return is_zero(page, kPageSize) ? PageState::kBlank : PageState::kBadCrc;
  }
  if (header.crc32c != page_crc(page)) return PageState::kBadCrc;
  if (header.version > format::kVersion) return PageState::kNewerVersion;
  if (header.version == 0) return PageState::kBadMagic;
  if (header.address != address) return PageState::kWrongAddress;
  return PageState::kOk;
}

PageState verify(const void* page, uint32_t magic, const format::Uuid& pool, uint64_t address) {
  const PageState state = verify_any_pool(page, magic, address);
  if (state != PageState::kOk && state != PageState::kWrongAddress) return state;
  return header_of(page).pool == pool ? state : PageState::kWrongPool;
}

bool Copies::blank() const {
  return newest < 0 && torn_or_blank(state[0]) && torn_or_blank(state[1]) &&
         (state[0] == PageState::kBlank || state[1] == PageState::kBlank);
}

bool Copies::degraded() const {
  if (newest < 0) return false;
  const PageState other = state[1 - newest];
  return other != PageState::kOk && other != PageState::kBlank;
}

Copies choose_record(const void* a, const void* b, uint32_t magic, const format::Uuid& pool, uint64_t address_a,
                     uint64_t address_b) {
  Copies copies;
  copies.state[0] = verify(a, magic, pool, address_a);
  copies.state[1] = verify(b, magic, pool, address_b);
  const bool a_ok = copies.state[0] == PageState::kOk;
  const bool b_ok = copies.state[1] == PageState::kOk;
  if (a_ok && b_ok) {
    copies.newest = header_of(b).sequence > header_of(a).sequence ? 1 : 0;
    copies.equal = same_content(a, b);
  } else if (a_ok || b_ok) {
    copies.newest = a_ok ? 0 : 1;
  }
  return copies;
}

bool is_empty(const SlabPage& page) {
  return page.hole_count == 0 && std::all_of(std::begin(page.entries), std::end(page.entries), [](const auto& entry) {
           return entry.logical_chunk == format::kNoChunk;
         });
}

Copies choose_slab(const SlabPage& a, const SlabPage& b, const format::Uuid& pool, uint64_t address_a) {
  Copies copies;
  copies.state[0] = verify(a, pool, address_a);
  copies.state[1] = verify(b, pool, address_a + kPageSize);
  const bool a_ok = copies.state[0] == PageState::kOk;
  const bool b_ok = copies.state[1] == PageState::kOk;
  if (a_ok && b_ok) {
    const bool b_newer =
        b.generation != a.generation ? b.generation > a.generation : b.header.sequence > a.header.sequence;
    copies.newest = b_newer ? 1 : 0;
    copies.equal = same_content(&a, &b);
  } else if (a_ok || b_ok) {
    copies.newest = a_ok ? 0 : 1;
  }
  return copies;
}

PageBuffer::PageBuffer(size_t bytes) : size_((bytes + kPageSize - 1) / kPageSize * kPageSize) {
  HF_ASSERT(size_ > 0);
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(kPageSize, size_)));
  HF_ASSERT(data_ != nullptr);
  clear();
}

void PageBuffer::clear() { std::memset(data_.get(), 0, size_); }

std::string uuid_text(const format::Uuid& uuid) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(36);
  for (size_t i = 0; i < uuid.size(); i++) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kDigits[uuid[i] >> 4];
    text += kDigits[uuid[i] & 15];
  }
  return text;
}

bool parse_uuid(const std::string& text, format::Uuid* out) {
  if (text.size() != 36) return false;
  format::Uuid uuid{};
  size_t at = 0;
  for (size_t i = 0; i < uuid.size(); i++) {
    if (i == 4 || i == 6 || i == 8 || i == 10) {
      if (text[at++] != '-') return false;
    }
    const int high = hex_digit(text[at]);
    const int low = hex_digit(text[at + 1]);
    if (high < 0 || low < 0) return false;
    uuid[i] = static_cast<uint8_t>(high << 4 | low);
    at += 2;
  }
  *out = uuid;
  return true;
}

std::string field_text(std::span<const char> field) {
  return {field.begin(), std::find(field.begin(), field.end(), '\0')};
}

bool set_field(std::span<char> field, const std::string& text) {
  if (text.size() > field.size() || text.find('\0') != std::string::npos) return false;
  std::fill(field.begin(), field.end(), '\0');
  std::copy(text.begin(), text.end(), field.begin());
  return true;
}

}  // namespace holdfast
