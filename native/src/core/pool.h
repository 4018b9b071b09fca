// A pool as a whole: its geometry, what stands on a device before we touch it, format, reading it back, growth.
// The structs are the ones of native/lib/index.ts, field by field.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "format.h"
#include "pages.h"
#include "status.h"
#include "sync_device.h"

namespace holdfast {

using Progress = std::function<void(uint64_t done, uint64_t total)>;

struct PoolInfo {
  format::Uuid uuid{};
  std::string name;
  std::string wwid;
  uint64_t device_bytes = 0;
  uint32_t slab_size = 0;
  uint32_t chunk_size = 0;
  uint64_t slab_count = 0;
  uint32_t volume_slots = 0;
  uint32_t layer_slots = 0;
  uint32_t host_slots = 0;
  format::FencingClass fencing = format::FencingClass::kNone;
  uint32_t renew_interval_ms = 0;
  uint32_t lease_ms = 0;
  uint32_t drain_ms = 0;
  uint64_t created_unix_ms = 0;
  std::vector<std::string> warnings;
  bool read_only = false;         // an unknown read-only-compatible feature: nothing may be written
  format::Superblock superblock;  // the copy that counts
};

struct FormatOptions {
  std::string name;
  format::FencingClass fencing = format::FencingClass::kNone;
  bool force = false;
  uint32_t renew_interval_ms = 2'000;
  uint32_t lease_ms = 10'000;
  std::optional<uint32_t> drain_ms;  // default: computed from the device for kLeaseOnly, else 0
  std::optional<format::Uuid> uuid;  // fixed, for tests
  Progress progress;
};

struct DeviceInspection {
  enum class Kind { kBlank, kPool, kForeign };
  uint64_t size_bytes = 0;
  uint32_t logical_sector_size = 512;
  Kind kind = Kind::kBlank;
  std::string signature;        // "ext4", "gpt", "data", "holdfast (damaged)"; empty for blank
  bool mounted = false;         // or otherwise in use: swap, device-mapper, md, a loop device over this file
  std::string in_use_by;        // where it is mounted, what holds it; empty: nothing
  std::string wwid;
  std::optional<PoolInfo> pool;
};

const char* fencing_class_name(format::FencingClass fencing);  // 'reservations' | 'manual' | 'lease-only' | 'loop'
std::optional<format::FencingClass> parse_fencing_class(const std::string& name);

// ---- Geometry: pure arithmetic.

// The geometry of a pool on a device of `size_bytes` (tables sized by it); only the geometry fields are set.
// kTooSmall names the minimum.
Result<format::Superblock> plan_geometry(uint64_t size_bytes);
uint64_t minimum_pool_bytes();
// Slabs that fit when the first region begins at `first_region_offset` and `device_bytes` may be used.
uint64_t slabs_that_fit(uint64_t first_region_offset, uint64_t device_bytes);
// Whether a superblock that passed its checksum can be followed: sizes are this build's, areas in order, in bounds.
Status check_geometry(const format::Superblock& superblock);

inline uint64_t heartbeat_offset(const format::Superblock& s, uint32_t host_id) {
  HF_ASSERT(host_id < s.host_slots);
  return s.heartbeat_offset + host_id * (2ull * format::kPageSize);
}
inline uint64_t fence_offset(const format::Superblock& s, uint32_t host_id, uint64_t generation) {
  HF_ASSERT(host_id < s.host_slots);
  return s.fence_offset + (uint64_t{host_id} * s.fence_generations + generation % s.fence_generations) *
                              format::kPageSize;
}
inline uint64_t volume_record_offset(const format::Superblock& s, uint32_t slot) {
  HF_ASSERT(slot < s.volume_slots);
  return s.volume_table_offset + slot * (2ull * format::kPageSize);
}
inline uint64_t layer_record_offset(const format::Superblock& s, uint32_t slot) {
  HF_ASSERT(slot < s.layer_slots);
  return s.layer_table_offset + slot * (2ull * format::kPageSize);
}
inline uint64_t slab_page_offset(const format::Superblock& s, uint64_t slab) {
  HF_ASSERT(slab < s.slab_count);
  return format::slab_page_offset(s.first_region_offset, slab);
}
inline uint64_t slab_data_offset(const format::Superblock& s, uint64_t slab) {
  HF_ASSERT(slab < s.slab_count);
  return format::slab_data_offset(s.first_region_offset, slab);
}

// ---- On an open device: no identity or usage checks. Used by the functions below, by tests and by the checker.

// Writes a whole pool: old superblocks gone first, then zeros in every table and slab page area (read back), then
// authority, heartbeat and fence pages, and the superblocks last; all durable, all re-read. Overwrites whatever is
// there. `template_superblock` has geometry, name, class, times and wwid; `uuid` must be new (see FormatOptions).
Result<PoolInfo> write_pool(SyncDevice& device, const format::Superblock& template_superblock,
                            const format::Uuid& uuid, const Progress& progress);
// Superblocks only. Copy B when A is bad, with a warning; a newer version or unknown incompatible feature is
// kUnsupported; no superblock at all is kNotAPool; two damaged ones kCorrupt.
Result<PoolInfo> read_pool(SyncDevice& device);
// Refuses (kWrongPool) when the device that the pool was found on is not the one it was made on: an array clone, a
// copied image. Unknown identities can't be compared; that is a warning in `info`.
Status check_wwid(PoolInfo& info, const std::string& wwid, const std::string& device);
// After the device grew: gives the last region its missing slabs, adds regions (slab pages zeroed and read back
// first), then rewrites the superblocks. A superblock that is damaged or behind is rewritten too. Nothing to do is
// not an error. Slab numbers never change. Of a device that is larger than `limit_bytes` only those are used.
Result<PoolInfo> grow_pool(SyncDevice& device, const PoolInfo& info, const Progress& progress,
                           uint64_t limit_bytes = UINT64_MAX);
// Slabs that the pool would have if it grew into `device_bytes` of its device.
uint64_t slabs_after_growth(const PoolInfo& info, uint64_t device_bytes);

// ---- By path: what the tools and the engine use. A path is a block device or an image file.

Result<DeviceInspection> inspect_device(const std::string& path);
// Refuses, in this order: not built (reservations), mounted or in use (force or not), too small, an existing pool or
// foreign data without force, an existing pool whose hosts still renew their heartbeats (force or not).
Result<PoolInfo> format_device(const std::string& path, const FormatOptions& options);
// read_pool, check_wwid, and a refusal where a foreign signature stands over a damaged superblock A.
Result<PoolInfo> read_pool_at(const std::string& path);
// The same on a descriptor that the caller already has open (O_DIRECT); `device.name()` names it in messages.
Result<PoolInfo> read_pool_at(FdDevice& device);

// Class L's proof: whether nobody holds the flock on a device node. kNotFound when there is no such node.
Result<bool> lock_is_free(const std::string& lock_path);

}  // namespace holdfast
