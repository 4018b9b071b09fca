// Writing, reading and growing a pool on an open device; see pool.h. What a path is and who uses it: pool_device.cc.
#include "pool.h"

#include <algorithm>
#include <cstring>

namespace holdfast {
namespace {

using format::kPageSize;
using format::Superblock;
using format::Uuid;

constexpr size_t kBigRead = 4u << 20;
constexpr uint64_t kZeroStep = 64u << 20;
constexpr uint64_t kSuperblockOffsets[2] = {format::kSuperblockAOffset, format::kSuperblockBOffset};
constexpr const char* kCopyNames[2] = {"A", "B"};

struct Area {
  uint64_t offset, length;
};

uint64_t region_count(uint64_t slab_count) {
  return (slab_count + format::kSlabsPerRegion - 1) / format::kSlabsPerRegion;
}

// Zeroes and reads back. Slab pages must be blank where nothing was ever claimed: pages of a former pool would be
// refused for their UUID, but as damage, and the slab would be lost.
class Zeroer {
 public:
  Zeroer(SyncDevice& device, uint64_t total, const Progress& progress)
      : device_(device), buffer_(kBigRead), total_(2 * total), progress_(progress) {}

  Status zero(const std::vector<Area>& areas) {
    for (const Area& area : areas) {
      for (uint64_t at = 0; at < area.length; at += kZeroStep) {
        const uint64_t part = std::min(kZeroStep, area.length - at);
        if (Status status = device_.zero(area.offset + at, part); !status.ok()) return status;
        advance(part);
      }
    }
    return device_.flush();
  }

  Status verify(const std::vector<Area>& areas, Code code = Code::kIo,
                const char* verdict = "was zeroed but reads back something else; the device can't be trusted") {
    for (const Area& area : areas) {
      for (uint64_t at = 0; at < area.length; at += kBigRead) {
        const uint64_t part = std::min<uint64_t>(kBigRead, area.length - at);
        if (Status status = device_.read(area.offset + at, buffer_.data(), part); !status.ok()) return status;
        if (!is_zero(buffer_.data(), part)) {
          return {code, "the range of " + std::to_string(part) + " bytes at " + std::to_string(area.offset + at) +
                            " of " + device_.name() + " " + verdict};
        }
        advance(part);
      }
    }
    return {};
  }

 private:
  void advance(uint64_t bytes) {
    done_ += bytes;
    if (progress_) progress_(std::min(done_, total_), total_);
  }
  SyncDevice& device_;
  PageBuffer buffer_;
  uint64_t total_;
  uint64_t done_ = 0;
  const Progress& progress_;
};

uint64_t total_length(const std::vector<Area>& areas) {
  uint64_t total = 0;
  for (const Area& area : areas) total += area.length;
  return total;
}

// Writes and re-reads `buffer`.
Status write_checked(SyncDevice& device, uint64_t offset, PageBuffer& buffer) {
  if (Status status = device.write(offset, buffer.data(), buffer.size()); !status.ok()) return status;
  if (Status status = device.flush(); !status.ok()) return status;
  PageBuffer back(buffer.size());
  if (Status status = device.read(offset, back.data(), back.size()); !status.ok()) return status;
  if (std::memcmp(back.data(), buffer.data(), buffer.size()) != 0) {
    return {Code::kIo, device.name() + " does not read back what was written at " + std::to_string(offset) +
                           "; the device can't be trusted with a pool"};
  }
  return {};
}

Status write_first_pages(SyncDevice& device, const Superblock& s, const Uuid& uuid) {
  PageBuffer authority(2 * kPageSize);
  for (uint64_t copy = 0; copy < 2; copy++) {
    seal(authority.at<format::AuthorityPage>(copy * kPageSize), uuid, s.authority_offset + copy * kPageSize, 1);
  }
  if (Status status = write_checked(device, s.authority_offset, authority); !status.ok()) return status;

  PageBuffer heartbeats(s.host_slots * (2ull * kPageSize));
  for (uint32_t host = 0; host < s.host_slots; host++) {
    for (uint64_t copy = 0; copy < 2; copy++) {
      const uint64_t at = host * (2ull * kPageSize) + copy * kPageSize;
      auto& page = heartbeats.at<format::HeartbeatPage>(at);
      page.host_id = host;
      seal(page, uuid, s.heartbeat_offset + at, 1);
    }
  }
  if (Status status = write_checked(device, s.heartbeat_offset, heartbeats); !status.ok()) return status;

  PageBuffer fences(size_t{s.host_slots} * s.fence_generations * kPageSize);
  for (uint32_t host = 0; host < s.host_slots; host++) {
    for (uint32_t generation = 0; generation < s.fence_generations; generation++) {
      const uint64_t at = (uint64_t{host} * s.fence_generations + generation) * kPageSize;
      auto& page = fences.at<format::FencePage>(at);
      page.host_id = host;
      seal(page, uuid, s.fence_offset + at, 1);
    }
  }
  return write_checked(device, s.fence_offset, fences);
}

// Both copies, one after the other, each durable and re-read before the next: one is valid at every moment.
Status write_superblocks(SyncDevice& device, const Superblock& s, const Uuid& uuid, uint64_t sequence, int first) {
  for (int i = 0; i < 2; i++) {
    const uint64_t address = kSuperblockOffsets[(first + i) % 2];
    PageBuffer page(kPageSize);
    page.at<Superblock>() = s;
    seal(page.at<Superblock>(), uuid, address, sequence);
    if (Status status = write_checked(device, address, page); !status.ok()) return status;
  }
  return {};
}

PoolInfo make_info(const Superblock& s) {
  PoolInfo info;
  info.uuid = s.header.pool;
  info.name = field_text(s.name);
  info.wwid = field_text(s.wwid);
  info.device_bytes = s.device_bytes;
  info.slab_size = s.slab_size;
  info.chunk_size = s.chunk_size;
  info.slab_count = s.slab_count;
  info.volume_slots = s.volume_slots;
  info.layer_slots = s.layer_slots;
  info.host_slots = s.host_slots;
  info.fencing = s.fencing;
  info.renew_interval_ms = s.renew_interval_ms;
  info.lease_ms = s.lease_ms;
  info.drain_ms = s.drain_ms;
  info.created_unix_ms = s.created_unix_ms;
  info.superblock = s;
  return info;
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// Prepares the pages of slabs that the device has gained, and counts them in `s`.
Status add_slabs(SyncDevice& device, Superblock* s, uint64_t usable, uint64_t device_bytes, uint64_t slabs,
                 const Progress& progress) {
  // Slab pages that the last region has always had: never used, so still blank. Anything else is damage.
  std::vector<Area> kept;
  const uint64_t in_last = s->slab_count % format::kSlabsPerRegion;
  if (in_last != 0) {
    const uint64_t first_new =
        format::slab_page_offset(s->first_region_offset, s->slab_count - 1) + format::kSlabPairSize;
    kept.push_back({first_new, (format::kSlabsPerRegion - in_last) * format::kSlabPairSize});
  }
  std::vector<Area> fresh;
  for (uint64_t region = region_count(s->slab_count); region < region_count(slabs); region++) {
    fresh.push_back({s->first_region_offset + region * format::kRegionStride, format::kRegionPagesSize});
  }
  const uint64_t tail = (usable - format::kTailReserve) / kPageSize * kPageSize;
  fresh.push_back({tail, usable / kPageSize * kPageSize - tail});
  Zeroer zeroer(device, total_length(kept) + total_length(fresh), progress);
  if (Status status = zeroer.verify(kept, Code::kCorrupt,
                                    "holds slab pages that nothing may have written yet; run `holdfast pool check`");
      !status.ok()) {
    return status;
  }
  if (Status status = zeroer.zero(fresh); !status.ok()) return status;
  if (Status status = zeroer.verify(fresh); !status.ok()) return status;
  s->device_bytes = device_bytes;
  s->slab_count = slabs;
  return {};
}

// Whether the copy at `address` is the one that `s` was read from (its sequence is still the old one).
bool holds_superblock(SyncDevice& device, const Superblock& s, uint64_t address) {
  PageBuffer page(kPageSize);
  return device.read(address, page.data(), kPageSize).ok() &&
         verify(page.at<Superblock>(), s.header.pool, address) == PageState::kOk &&
         page.at<Superblock>().header.sequence == s.header.sequence;
}

}  // namespace

Result<PoolInfo> write_pool(SyncDevice& device, const Superblock& template_superblock, const Uuid& uuid,
                            const Progress& progress) {
  Superblock s = template_superblock;
  HF_ASSERT(!uuid_is_zero(uuid) && check_geometry(s).ok());
  HF_ASSERT(s.device_bytes + format::kTailReserve <= device.size_bytes());
  // First of all the old superblocks go, so that an interrupted format leaves no pool rather than half of an old one.
  for (const uint64_t offset : kSuperblockOffsets) {
    PageBuffer blank(kPageSize);
    if (Status status = write_checked(device, offset, blank); !status.ok()) return status;
  }
  std::vector<Area> areas{{0, s.first_region_offset}};
  for (uint64_t region = 0; region < region_count(s.slab_count); region++) {
    areas.push_back({s.first_region_offset + region * format::kRegionStride, format::kRegionPagesSize});
  }
  const uint64_t tail = device.size_bytes() - format::kTailReserve;
  areas.push_back({tail / kPageSize * kPageSize, device.size_bytes() - tail / kPageSize * kPageSize});
  Zeroer zeroer(device, total_length(areas), progress);
  if (Status status = zeroer.zero(areas); !status.ok()) return status;
  if (Status status = zeroer.verify(areas); !status.ok()) return status;
  if (Status status = write_first_pages(device, s, uuid); !status.ok()) return status;
  if (Status status = write_superblocks(device, s, uuid, 1, 0); !status.ok()) return status;
  Result<PoolInfo> back = read_pool(device);
  if (!back.ok()) return back;
  if (back->uuid != uuid || !back->warnings.empty()) {
    return Status{Code::kIo, device.name() + " does not read back as the pool that was just written"};
  }
  return back;
}

Result<PoolInfo> read_pool(SyncDevice& device) {
  PageBuffer pages[2] = {PageBuffer(kPageSize), PageBuffer(kPageSize)};
  PageState state[2];
  std::string unreadable[2];
  for (int copy = 0; copy < 2; copy++) {
    if (device.size_bytes() < kSuperblockOffsets[copy] + kPageSize) {
      return Status{Code::kNotAPool, device.name() + " holds no Holdfast pool (it is smaller than one could be)"};
    }
    const Status status = device.read(kSuperblockOffsets[copy], pages[copy].data(), kPageSize);
    if (!status.ok()) unreadable[copy] = status.message;
    state[copy] = status.ok() ? verify_any_pool(pages[copy].data(), format::kMagicSuperblock, kSuperblockOffsets[copy])
                              : PageState::kBadCrc;
  }
  if (!unreadable[0].empty() && !unreadable[1].empty()) return Status{Code::kIo, unreadable[0]};
  for (int copy = 0; copy < 2; copy++) {
    if (state[copy] == PageState::kNewerVersion) {
      const uint16_t version = pages[copy].at<Superblock>().header.version;
      return Status{Code::kUnsupported, "the pool on " + device.name() + " has format version " +
                                            std::to_string(version) + ", and this build knows up to " +
                                            std::to_string(format::kVersion) + ". Upgrade Holdfast on this node"};
    }
  }
  const bool ok[2] = {state[0] == PageState::kOk, state[1] == PageState::kOk};
  if (!ok[0] && !ok[1]) {
    const bool ever = state[0] == PageState::kBadCrc || state[1] == PageState::kBadCrc ||
                      state[0] == PageState::kWrongAddress || state[1] == PageState::kWrongAddress;
    if (!ever)
      return Status{Code::kNotAPool, device.name() + " holds no Holdfast pool. `holdfast pool format` makes one"};
    return Status{Code::kCorrupt, "both superblocks of " + device.name() + " are damaged (A " +
                                      page_state_text(state[0]) + ", B " + page_state_text(state[1]) +
                                      "). Restore the first MiB from a backup; nothing else is touched until then"};
  }
  const Superblock& a = pages[0].at<Superblock>();
  const Superblock& b = pages[1].at<Superblock>();
  if (ok[0] && ok[1] && a.header.pool != b.header.pool) {
    return Status{Code::kCorrupt, device.name() + " has superblocks of two pools (A " + uuid_text(a.header.pool) +
                                      ", B " + uuid_text(b.header.pool) + "): something copied over it"};
  }
  const int newest = !ok[0] || (ok[1] && b.header.sequence > a.header.sequence) ? 1 : 0;
  const Superblock& s = newest == 0 ? a : b;
  if (s.features_incompat != 0) {
    return Status{Code::kUnsupported, "the pool on " + device.name() + " uses features this build does not know (" +
                                          hex(s.features_incompat) + "). Upgrade Holdfast on this node"};
  }
  if (Status status = check_geometry(s); !status.ok()) return status;
  if (s.renew_interval_ms == 0 || s.fencing == format::FencingClass::kNone || s.fencing > format::FencingClass::kLoop) {
    return Status{Code::kCorrupt, "the superblock of " + device.name() + " names no fencing class or no lease"};
  }
  if (s.device_bytes > device.size_bytes()) {
    return Status{Code::kTooSmall, "the pool covers " + std::to_string(s.device_bytes) + " bytes but " + device.name() +
                                       " has only " + std::to_string(device.size_bytes()) +
                                       ": the device shrank, or it was grown and this machine has not seen that yet. Rescan the device, or give "
                                       "it back its size"};
  }
  PoolInfo info = make_info(s);
  for (int copy = 0; copy < 2; copy++) {
    if (ok[copy]) continue;
    info.warnings.push_back("superblock " + std::string(kCopyNames[copy]) + " of " + device.name() + " " +
                            (unreadable[copy].empty() ? page_state_text(state[copy]) : "can't be read") + "; copy " +
                            kCopyNames[1 - copy] + " was used");
  }
  if (ok[0] && ok[1] && a.header.sequence != b.header.sequence) {
    info.warnings.push_back("the superblocks of " + device.name() +
                            " differ in age (an update was interrupted); copy " + std::string(kCopyNames[newest]) +
                            " is newer and was used");
  }
  if (s.features_ro_compat != 0) {
    info.read_only = true;
    info.warnings.push_back("the pool on " + device.name() + " uses features this build can read but not write (" +
                            hex(s.features_ro_compat) + ")");
  }
  return info;
}

uint64_t slabs_after_growth(const PoolInfo& info, uint64_t device_bytes) {
  if (device_bytes <= format::kTailReserve) return info.slab_count;
  const uint64_t usable = (device_bytes - format::kTailReserve) / kPageSize * kPageSize;
  return std::max(info.slab_count, slabs_that_fit(info.superblock.first_region_offset, usable));
}

Result<PoolInfo> grow_pool(SyncDevice& device, const PoolInfo& info, const Progress& progress, uint64_t limit_bytes) {
  // What stands on disk decides, not what the caller read some time ago.
  Result<PoolInfo> now = read_pool(device);
  if (!now.ok()) return now;
  if (now->uuid != info.uuid) {
    return Status{Code::kWrongPool,
                  device.name() + " holds pool " + uuid_text(now->uuid) + ", not " + uuid_text(info.uuid)};
  }
  if (now->read_only) return Status{Code::kUnsupported, now->warnings.back()};
  Superblock s = now->superblock;
  const uint64_t usable = std::min(device.size_bytes(), limit_bytes);
  if (usable < s.device_bytes) return now;  // asked for before it grew further
  const uint64_t device_bytes = (usable - format::kTailReserve) / kPageSize * kPageSize;
  const uint64_t slabs = slabs_that_fit(s.first_region_offset, device_bytes);
  const bool grows = device_bytes > s.device_bytes && slabs > s.slab_count;
  // An update that was cut off between the two superblocks, or a damaged copy: made whole on the way.
  if (!grows && now->warnings.empty()) return now;
  if (grows) {
    if (Status status = add_slabs(device, &s, usable, device_bytes, slabs, progress); !status.ok()) return status;
  }
  const int newest = holds_superblock(device, s, format::kSuperblockAOffset) ? 0 : 1;
  if (Status status = write_superblocks(device, s, info.uuid, s.header.sequence + 1, 1 - newest); !status.ok()) {
    return status;
  }
  return read_pool(device);
}

}  // namespace holdfast
