// The mutable pages of a pool but for slab pages of open volumes: volume and layer records, authority, heartbeats,
// fence pages; and what is read or freed slab by slab. Blocking; every write is durable and goes to the copy that
// does not serve. Writers hand in a gated device (gate.h, GatedSyncDevice), so that a host without a lease can't.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "format.h"
#include "pages.h"
#include "pool.h"
#include "status.h"
#include "sync_device.h"
#include "volume.h"

namespace holdfast {

// ---- Volume and layer records.

struct VolumeRecordInfo {
  uint32_t slot = 0;
  uint64_t volume_id = 0;
  format::Uuid uuid{};
  std::string name;
  format::VolumeState state = format::VolumeState::kFree;
  uint64_t size_bytes = 0;
  uint64_t top_layer_id = 0;
  uint64_t epoch = 0;
  uint32_t host_id = 0;
  uint64_t generation = 0;
  bool fenced = false;
  std::string parameters_json;
  bool degraded = false;          // the other copy is damaged
};

struct LayerRecordInfo {
  uint32_t slot = 0;
  uint64_t layer_id = 0;
  uint64_t parent_layer_id = 0;
  uint64_t volume_id = 0;
  uint64_t size_bytes = 0;
  uint64_t birth = 0;
  format::LayerState state = format::LayerState::kFree;
  std::string snapshot_name;
  bool degraded = false;
};

// Empty: the slot was never used. kCorrupt: neither copy is usable.
Result<std::optional<VolumeRecordInfo>> read_volume_record(SyncDevice& device, const format::Superblock& superblock,
                                                           uint32_t slot);
Result<std::optional<LayerRecordInfo>> read_layer_record(SyncDevice& device, const format::Superblock& superblock,
                                                         uint32_t slot);
// The same, whole, for changing a field and writing it back.
Result<std::optional<format::VolumeRecord>> load_volume_record(SyncDevice& device, const format::Superblock& superblock,
                                                               uint32_t slot);
Result<std::optional<format::LayerRecord>> load_layer_record(SyncDevice& device, const format::Superblock& superblock,
                                                             uint32_t slot);
// Writes `record` (its header is filled in) over the copy that does not serve, with the next sequence, durably.
// Refuses to build on a slot whose copies are both damaged (kCorrupt).
Status write_volume_record(SyncDevice& device, const format::Superblock& superblock, uint32_t slot,
                           const format::VolumeRecord& record);
Status write_layer_record(SyncDevice& device, const format::Superblock& superblock, uint32_t slot,
                          const format::LayerRecord& record);
// Every used slot, tombstones included. A slot with two damaged copies is named in `damaged` and left out.
Result<std::vector<VolumeRecordInfo>> read_volume_records(SyncDevice& device, const format::Superblock& superblock,
                                                          std::vector<std::string>* damaged);
Result<std::vector<LayerRecordInfo>> read_layer_records(SyncDevice& device, const format::Superblock& superblock,
                                                        std::vector<std::string>* damaged);

// closed(epoch): for a volume whose gate is shut and whose I/O is over but which could not close itself (revoked).
// Says kVolumeUnclean. Refuses (kStale) unless the record is this volume's and of exactly this epoch; closed already
// is success.
Status write_volume_closed(SyncDevice& device, const format::Superblock& superblock, uint32_t slot, uint64_t volume_id,
                           uint64_t epoch);
// After a lease gap: whether the record still is what the opener wrote (volume, epoch, host, generation, open).
// kStale: no longer; kIo or kCorrupt: can't be told now, hold and ask again.
Status check_volume_still_ours(SyncDevice& device, const format::Superblock& superblock, uint32_t slot,
                               uint64_t volume_id, uint64_t epoch, uint32_t host_id, uint64_t generation);

// ---- Authority.

struct Authority {
  format::Uuid store{};
  uint64_t incarnation = 0;
  uint64_t term = 0;
  bool unclaimed = true;
};

struct AuthorityClaim {
  format::Uuid store{};
  uint64_t incarnation = 0;
  uint64_t term = 0;
  uint32_t host_id = 0;       // of the agent that writes it
  bool force = false;         // take it from another store, or from a higher incarnation or term
};

struct ClaimEnvironment {
  uint64_t wait_ms = 0;
  std::function<uint64_t()> now_ns;            // CLOCK_BOOTTIME
  std::function<uint64_t()> random;
  std::function<void(uint64_t ms)> sleep_ms;
  std::function<uint64_t()> unix_ms;
};

Result<Authority> read_authority(SyncDevice& device, const format::Superblock& superblock);
// Write, wait, re-read. kStale: another store's, or a newer claim stands, or somebody claimed meanwhile.
// kUnavailable: this host was too slow between reading and writing for the wait to prove anything; try again.
Status claim_authority(SyncDevice& device, const format::Superblock& superblock, const AuthorityClaim& claim,
                       const ClaimEnvironment& environment);

// ---- Heartbeats (written by lease.h).

struct Heartbeat {
  uint32_t host_id = 0;
  format::HeartbeatState state = format::HeartbeatState::kEmpty;
  uint64_t generation = 0;
  uint64_t sequence = 0;
  uint64_t nonce = 0;
  std::string node_name;
  format::Uuid machine_id{};
  format::Uuid boot_id{};
};

Result<Heartbeat> read_heartbeat(SyncDevice& device, const format::Superblock& superblock, uint32_t host_id);
// All slots, by host id. A slot with two damaged copies comes back with state kEmpty and is named in `damaged`.
Result<std::vector<Heartbeat>> read_heartbeats(SyncDevice& device, const format::Superblock& superblock,
                                               std::vector<std::string>* damaged);

// ---- Fence pages.

struct Fence {
  uint32_t host_id = 0;
  uint64_t generation = 0;   // the generation that the page says is fenced; 0: none
  uint32_t fencer_host_id = 0;
  uint64_t term = 0;
};

struct FenceOrder {
  uint32_t host_id = 0;       // victim
  uint64_t generation = 0;
  uint64_t term = 0;
  uint64_t incarnation = 0;
  uint32_t fencer_host_id = 0;
  uint64_t fencer_generation = 0;
  uint64_t unix_ms = 0;
};

// What page fence[host][generation mod 8] says. kCorrupt: unreadable, which fences nobody and lets nobody go on.
Result<Fence> read_fence(SyncDevice& device, const format::Superblock& superblock, uint32_t host_id,
                         uint64_t generation);
// Durable, re-read, compared. The order must be of the authority that stands on the pool (kStale otherwise). Already
// fenced is success. A page that names a later generation is left alone (kStale). kIo: it can't be shown to stand.
Status write_fence(SyncDevice& device, const format::Superblock& superblock, const FenceOrder& order);

// ---- Slabs.

struct SlabOwner {
  enum class State { kFree, kClaimed, kBad };
  uint64_t slab = 0;
  uint64_t layer_id = 0;
  uint64_t volume_id = 0;
  uint64_t generation = 0;
  State state = State::kFree;
};

// The page pair of each slab of the runs, in order. A run past the end of the pool is kInvalidArgument.
Result<std::vector<SlabOwner>> scan_slabs(SyncDevice& device, const format::Superblock& superblock,
                                          const std::vector<SlabRun>& runs);

// A page that says "free": keeps the generation, so that a claim must bring a higher one.
void make_free_slab_page(format::SlabPage* page, uint64_t generation);

struct WipeLayer {
  uint64_t layer_id = 0;
  uint32_t slot = 0;
  std::vector<SlabRun> slabs;
};
struct WipeRequest {
  uint64_t volume_id = 0;
  uint32_t slot = 0;
  uint64_t closed_epoch = 0;
  std::vector<WipeLayer> layers;
};
// Tombstones the records, frees both copies of each slab's page, then discards the data; the discards are over when
// it returns. kStale, and nothing changed: the record's epoch is newer than `closed_epoch`. Slabs whose page names
// another layer or a later generation are left alone and reported (kStale) after the rest is done. May be repeated.
Status wipe_volume(SyncDevice& device, const format::Superblock& superblock, const WipeRequest& request);

}  // namespace holdfast
