// Where things lie in a pool, as arithmetic on the size of the device; see pool.h and format.h.
#include <algorithm>

#include "pool.h"

namespace holdfast {
namespace {

using format::kPageSize;
using format::Superblock;

constexpr uint64_t kGiB = 1ull << 30;
constexpr uint64_t kVolumeSlotsPerGiB = 64;
constexpr uint64_t kMinVolumeSlots = 1024;
constexpr uint64_t kMaxVolumeSlots = 65536;

constexpr uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// All offsets for given table sizes.
Superblock lay_out(uint32_t volume_slots, uint32_t layer_slots) {
  Superblock s{};
  s.block_size = format::kBlockSize;
  s.chunk_size = format::kChunkSize;
  s.slab_size = format::kSlabSize;
  s.slabs_per_region = format::kSlabsPerRegion;
  s.region_stride = format::kRegionStride;
  s.host_slots = format::kHostSlots;
  s.fence_generations = format::kFenceGenerations;
  s.volume_slots = volume_slots;
  s.layer_slots = layer_slots;
  s.authority_offset = format::kAuthorityOffset;
  s.heartbeat_offset = format::kHeartbeatOffset;
  s.fence_offset = s.heartbeat_offset + s.host_slots * (2ull * kPageSize);
  s.volume_table_offset = s.fence_offset + uint64_t{s.host_slots} * s.fence_generations * kPageSize;
  s.layer_table_offset = s.volume_table_offset + s.volume_slots * (2ull * kPageSize);
  s.first_region_offset = round_up(s.layer_table_offset + s.layer_slots * (2ull * kPageSize), format::kSlabSize);
  return s;
}

Status bad_geometry(const std::string& what) {
  return {Code::kCorrupt, "the superblock passes its checksum but its geometry can't be followed: " + what};
}

}  // namespace

uint64_t slabs_that_fit(uint64_t first_region_offset, uint64_t device_bytes) {
  if (device_bytes <= first_region_offset) return 0;
  const uint64_t room = device_bytes - first_region_offset;
  const uint64_t rest = room % format::kRegionStride;
  const uint64_t in_last = rest > format::kRegionPagesSize ? (rest - format::kRegionPagesSize) / format::kSlabSize : 0;
  return room / format::kRegionStride * format::kSlabsPerRegion + in_last;
}

uint64_t minimum_pool_bytes() {
  const Superblock s = lay_out(kMinVolumeSlots, 2 * kMinVolumeSlots);
  return s.first_region_offset + format::kRegionPagesSize + format::kSlabSize + format::kTailReserve;
}

Result<Superblock> plan_geometry(uint64_t size_bytes) {
  if (size_bytes < minimum_pool_bytes()) {
    return Status{Code::kTooSmall, "a pool needs at least " + std::to_string(minimum_pool_bytes() >> 20) +
                                       " MiB; the device has " + std::to_string(size_bytes >> 20) + " MiB"};
  }
  const uint64_t volumes = std::clamp(size_bytes / kGiB * kVolumeSlotsPerGiB, kMinVolumeSlots, kMaxVolumeSlots);
  Superblock s = lay_out(static_cast<uint32_t>(volumes), static_cast<uint32_t>(2 * volumes));
  s.device_bytes = (size_bytes - format::kTailReserve) / kPageSize * kPageSize;
  s.slab_count = slabs_that_fit(s.first_region_offset, s.device_bytes);
  HF_ASSERT(s.slab_count > 0);
  HF_ASSERT(check_geometry(s).ok());
  return s;
}

Status check_geometry(const Superblock& s) {
  if (s.block_size != format::kBlockSize || s.chunk_size != format::kChunkSize || s.slab_size != format::kSlabSize ||
      s.slabs_per_region != format::kSlabsPerRegion || s.region_stride != format::kRegionStride) {
    return bad_geometry("block, chunk, slab or region sizes are not those of format version 1");
  }
  if (s.host_slots == 0 || s.host_slots > 65536 || s.fence_generations == 0 || s.fence_generations > 4096 ||
      s.volume_slots == 0 || s.volume_slots > (1u << 24) || s.layer_slots == 0 || s.layer_slots > (1u << 25)) {
    return bad_geometry("a table has an impossible number of slots");
  }
  // Areas in this order, none over another, all page-aligned.
  const struct {
    uint64_t offset, size;
    const char* name;
  } areas[] = {
      {s.authority_offset, 2ull * kPageSize, "authority"},
      {s.heartbeat_offset, s.host_slots * (2ull * kPageSize), "heartbeats"},
      {s.fence_offset, uint64_t{s.host_slots} * s.fence_generations * kPageSize, "fence pages"},
      {s.volume_table_offset, s.volume_slots * (2ull * kPageSize), "volume records"},
      {s.layer_table_offset, s.layer_slots * (2ull * kPageSize), "layer records"},
      {s.first_region_offset, 0, "regions"},
  };
  uint64_t end = format::kSuperblockBOffset + kPageSize;
  for (const auto& area : areas) {
    if (area.offset % kPageSize != 0 || area.offset < end || area.offset > s.device_bytes) {
      return bad_geometry(std::string("the ") + area.name + " area lies at " + std::to_string(area.offset));
    }
    end = area.offset + area.size;
  }
  if (s.first_region_offset % format::kSlabSize != 0) return bad_geometry("the first region is not aligned");
  if (s.slab_count == 0 || s.slab_count > slabs_that_fit(s.first_region_offset, s.device_bytes)) {
    return bad_geometry(std::to_string(s.slab_count) + " slabs do not fit in " + std::to_string(s.device_bytes) +
                        " bytes");
  }
  if (s.renew_interval_ms == 0 && s.lease_ms == 0) return {};  // a plan, not yet a pool
  if (s.renew_interval_ms == 0 || s.lease_ms <= s.renew_interval_ms) {
    return bad_geometry("the lease is not longer than the renew interval");
  }
  return {};
}

const char* fencing_class_name(format::FencingClass fencing) {
  switch (fencing) {
    case format::FencingClass::kNone: return "none";
    case format::FencingClass::kReservations: return "reservations";
    case format::FencingClass::kManual: return "manual";
    case format::FencingClass::kLeaseOnly: return "lease-only";
    case format::FencingClass::kLoop: return "loop";
  }
  return "unknown";
}

std::optional<format::FencingClass> parse_fencing_class(const std::string& name) {
  for (const auto fencing : {format::FencingClass::kReservations, format::FencingClass::kManual,
                             format::FencingClass::kLeaseOnly, format::FencingClass::kLoop}) {
    if (name == fencing_class_name(fencing)) return fencing;
  }
  return std::nullopt;
}

}  // namespace holdfast
