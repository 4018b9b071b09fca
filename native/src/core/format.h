// Pool format v1: every byte that Holdfast puts on a pool outside the data slabs.
//
// Integers are little-endian; every structure below is one 4 KiB page. A page carries its magic, the format
// version, the pool's UUID, its own byte address on the device and a CRC32C over all 4096 bytes (with the crc
// field zero), so a page that is torn, stale from another pool, or written to the wrong place is noticed and
// never followed (DESIGN section 3, invariant 8).
//
// Layout of the device:
//   0         superblock A          512 KiB  superblock B
//   1 MiB     authority A, B (pages 256, 257)
//   2 MiB     heartbeats: host_slots x (A, B)
//   then      fence pages: host_slots x fence_generations, one page each
//   then      volume records: volume_slots x (A, B)
//   then      layer records: layer_slots x (A, B)
//   first_region_offset (16 MiB aligned): regions of region_stride bytes:
//             [slab pages: slabs_per_region x (A, B)] [slabs: slabs_per_region x slab_size]
// The last region may hold fewer slabs than slabs_per_region; its slab page area always has full size, so a
// device that grew gains slabs in place.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace holdfast::format {

inline constexpr uint16_t kVersion = 1;
inline constexpr uint32_t kPageSize = 4096;
inline constexpr uint32_t kBlockSize = 4096;
inline constexpr uint32_t kBlocksPerChunk = 16;
inline constexpr uint32_t kChunkSize = kBlockSize * kBlocksPerChunk;
inline constexpr uint32_t kChunksPerSlab = 256;
inline constexpr uint32_t kSlabSize = kChunkSize * kChunksPerSlab;
inline constexpr uint32_t kSlabsPerRegion = 4096;
inline constexpr uint64_t kSlabPairSize = 2ull * kPageSize;
inline constexpr uint64_t kRegionPagesSize = kSlabsPerRegion * kSlabPairSize;                      // 32 MiB
inline constexpr uint64_t kRegionStride = kRegionPagesSize + uint64_t{kSlabsPerRegion} * kSlabSize;  // 64 GiB + 32 MiB
inline constexpr uint64_t kSuperblockAOffset = 0;
inline constexpr uint64_t kSuperblockBOffset = 512u << 10;
inline constexpr uint64_t kAuthorityOffset = 1u << 20;
inline constexpr uint64_t kHeartbeatOffset = 2u << 20;
inline constexpr uint32_t kHostSlots = 256;       // host ids 0..255
inline constexpr uint32_t kFenceGenerations = 8;  // fence[host][generation mod 8]

// Kept zero at the end of the device: other programs look for signatures there (GPT's backup, md, ZFS), and nothing
// that a volume writes may be taken for one.
inline constexpr uint64_t kTailReserve = 1u << 20;

// Magic numbers: four ASCII letters as they stand on disk.
inline constexpr uint32_t magic(char a, char b, char c, char d) {
  return uint32_t(uint8_t(a)) | uint32_t(uint8_t(b)) << 8 | uint32_t(uint8_t(c)) << 16 | uint32_t(uint8_t(d)) << 24;
}
inline constexpr uint32_t kMagicSuperblock = magic('H', 'F', 'S', 'B');
inline constexpr uint32_t kMagicAuthority = magic('H', 'F', 'A', 'U');
inline constexpr uint32_t kMagicHeartbeat = magic('H', 'F', 'H', 'B');
inline constexpr uint32_t kMagicFence = magic('H', 'F', 'F', 'E');
inline constexpr uint32_t kMagicVolume = magic('H', 'F', 'V', 'O');
inline constexpr uint32_t kMagicLayer = magic('H', 'F', 'L', 'A');
inline constexpr uint32_t kMagicSlab = magic('H', 'F', 'S', 'L');

using Uuid = std::array<uint8_t, 16>;

// First 48 bytes of every page.
struct PageHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t flags;     // meaning depends on the page type; 0 where none is named
  Uuid pool;          // the pool's UUID
  uint64_t address;   // byte offset of this page on the device
  uint64_t sequence;  // of two copies the valid one with the larger sequence counts. Slab pages: the flush number.
  uint32_t crc32c;    // Castagnoli, over the page with this field zero
  uint32_t reserved;
};
static_assert(sizeof(PageHeader) == 48);

enum class FencingClass : uint8_t {
  kNone = 0,
  kReservations = 1,  // A: persistent reservations, proved pairwise (not built yet: refused at format)
  kManual = 2,        // C: somebody who knows says "off"
  kLeaseOnly = 3,     // C with --fencing=lease-only
  kLoop = 4,          // L: loop devices on one machine; the victim's flock is the proof
};

struct Superblock {
  PageHeader header;
  uint64_t features_compat;           // unknown bits: ignore
  uint64_t features_ro_compat;        // unknown bits: no writing
  uint64_t features_incompat;         // unknown bits: refuse
  uint64_t device_bytes;              // bytes that the format may use: the device's size less kTailReserve
  uint32_t block_size;                // bytes
  uint32_t chunk_size;                // bytes
  uint32_t slab_size;                 // bytes
  uint32_t slabs_per_region;
  uint64_t region_stride;             // bytes from one region's start to the next
  uint64_t first_region_offset;       // bytes
  uint64_t slab_count;                // slabs in all regions together
  uint64_t authority_offset;          // bytes, 2 pages
  uint64_t heartbeat_offset;          // bytes, host_slots x 2 pages
  uint64_t fence_offset;              // bytes, host_slots x fence_generations pages
  uint64_t volume_table_offset;       // bytes, volume_slots x 2 pages
  uint64_t layer_table_offset;        // bytes, layer_slots x 2 pages
  uint32_t host_slots;
  uint32_t fence_generations;
  uint32_t volume_slots;
  uint32_t layer_slots;
  uint32_t renew_interval_ms;
  uint32_t lease_ms;
  uint32_t drain_ms;                  // how long the device may hold back I/O already submitted (lease-only fences)
  FencingClass fencing;
  uint8_t reserved0[3];
  uint64_t created_unix_ms;
  char name[64];                      // UTF-8, zero-padded
  char wwid[128];                     // identity of the device, zero-padded; see pool.h
  uint8_t reserved1[3704];
};
static_assert(sizeof(Superblock) == kPageSize);

// Who may give orders about this pool. Two copies written in turn.
struct AuthorityPage {
  PageHeader header;
  Uuid store;               // the metadata service's store id; all zero: never claimed
  uint64_t incarnation;     // grows with every restore or rebuild of the store
  uint64_t term;            // leader term inside an incarnation
  uint64_t nonce;           // drawn for the claim and re-read after the wait
  uint32_t claimed_by_host; // host id of the agent that wrote it
  uint32_t reserved0;
  uint64_t claimed_unix_ms;
  uint8_t reserved[3992];
};
static_assert(sizeof(AuthorityPage) == kPageSize);

enum class HeartbeatState : uint32_t { kEmpty = 0, kLive = 1, kStopped = 2 };

// One host slot's sign of life. header.sequence grows by one each renewal.
struct HeartbeatPage {
  PageHeader header;
  uint32_t host_id;
  HeartbeatState state;     // kStopped: stopped(generation): the gate is closed for good and nothing is in flight
  uint64_t generation;
  uint64_t nonce;           // drawn by the engine at each renewal; another value read back: two machines on one slot
  uint32_t lease_ms;
  uint32_t reserved0;
  Uuid machine_id;
  Uuid boot_id;
  uint64_t renewed_unix_ms; // for people only, never for a decision
  char node_name[128];
  uint8_t reserved[3848];
};
static_assert(sizeof(HeartbeatPage) == kPageSize);

// fence[host][generation mod fence_generations]. Says one thing: "this generation is fenced".
// format writes every page with generation 0, which fences nobody (generations begin at 1).
struct FencePage {
  PageHeader header;
  uint32_t host_id;
  uint32_t fencer_host_id;
  uint64_t generation;
  uint64_t fencer_generation;
  uint64_t term;
  uint64_t incarnation;
  uint64_t fenced_unix_ms;
  uint8_t reserved[4000];
};
static_assert(sizeof(FencePage) == kPageSize);

// header.flags of a volume record. Set together with kClosed when the volume was closed without its last flush and
// without making the copies of its slab pages equal (revoked, or closed on behalf of a dead opener): differing copies
// are then what a crash leaves, not damage. Cleared by the next open.
inline constexpr uint16_t kVolumeUnclean = 1;

enum class VolumeState : uint32_t { kFree = 0, kClosed = 1, kOpen = 2, kDeleted = 3 };

struct VolumeRecord {
  PageHeader header;
  uint64_t volume_id;          // never reused; 0: the slot was never used
  VolumeState state;
  uint32_t logical_sector_size;
  uint64_t size_bytes;
  uint64_t top_layer_id;
  uint64_t epoch;              // incarnation in the upper 24 bits, counter in the lower 40
  uint32_t host_id;            // of the last opener
  uint32_t fenced;             // 1: a fenced volume, never reopened by itself
  uint64_t generation;         // of the last opener's host slot
  uint64_t flush_number;       // highest flush number the last opener is known to have used
  Uuid uuid;
  char name[128];
  char key_id[64];             // encryption key, empty: none
  uint32_t parameters_length;  // bytes of UTF-8 JSON in parameters
  uint32_t reserved0;
  char parameters[2048];       // the volume's parameters (file system, owner, labels) as JSON
  uint8_t reserved[1720];
};
static_assert(sizeof(VolumeRecord) == kPageSize);

// header.flags of a layer record. The layer is frozen and both copies of each of its slab pages were made equal after the
// cut: copies that differ by more than what stripping takes away are damage from then on.
inline constexpr uint16_t kLayerSettled = 1;

enum class LayerState : uint32_t { kFree = 0, kWritable = 1, kFrozen = 2, kFolded = 3, kDeleted = 4 };

struct LayerRecord {
  PageHeader header;
  uint64_t layer_id;         // never reused; 0: the slot was never used
  uint64_t parent_layer_id;  // 0: none
  uint64_t volume_id;        // the volume it was born as the top of
  uint64_t size_bytes;       // of the volume when this layer was (or would be) frozen
  uint64_t birth;            // precedence: a larger number is newer
  uint64_t folded_into;      // kFolded: the layer that took it over
  LayerState state;
  uint32_t reserved0;
  uint64_t created_unix_ms;
  char snapshot_name[128];
  uint8_t reserved[3856];
};
static_assert(sizeof(LayerRecord) == kPageSize);

inline constexpr uint32_t kNoChunk = 0xffffffffu;
// Upper bound of a volume's size that u32 chunk numbers allow, one chunk kept back for kNoChunk.
inline constexpr uint64_t kMaxVolumeBytes = (uint64_t{1} << 32) * kChunkSize - kChunkSize;

// One chunk of a slab. Position in the array is the physical place. Free: logical_chunk == kNoChunk and both masks 0.
// Bit i of data: block i of the logical chunk is stored in block i of this place. Bit i of zero: it reads as zeros
// although an older layer may have data. A block has at most one of the two bits.
struct SlabEntry {
  uint32_t logical_chunk;
  uint16_t data;
  uint16_t zero;
};
static_assert(sizeof(SlabEntry) == 8 && alignof(SlabEntry) == 4);

// Chunks [start, start + length) of the layer read as zeros where no entry of the same layer says otherwise.
struct HoleRange {
  uint32_t start;
  uint32_t length;
};
static_assert(sizeof(HoleRange) == 8);

inline constexpr uint32_t kHolesPerSlab = 240;

struct SlabPage {
  PageHeader header;      // sequence: the volume-wide flush number
  uint64_t layer_id;      // layer of birth; never changes while the slab is allocated; 0: free
  uint64_t generation;    // the slab's generation, from the metadata service, grows with every allocation
  uint64_t epoch;         // of the writer
  uint64_t volume_id;     // for people and for the checker
  uint32_t hole_count;
  uint32_t reserved0;
  uint8_t reserved1[40];
  SlabEntry entries[kChunksPerSlab];
  HoleRange holes[kHolesPerSlab];
};
static_assert(offsetof(SlabPage, entries) == 128);
static_assert(sizeof(SlabPage) == kPageSize);

inline constexpr uint64_t kEpochCounterBits = 40;

// Where slab number `slab` keeps its pages and its data. Pure arithmetic on the superblock's geometry.
constexpr uint64_t slab_page_offset(uint64_t first_region_offset, uint64_t slab) {
  return first_region_offset + slab / kSlabsPerRegion * kRegionStride + slab % kSlabsPerRegion * kSlabPairSize;
}
constexpr uint64_t slab_data_offset(uint64_t first_region_offset, uint64_t slab) {
  return first_region_offset + slab / kSlabsPerRegion * kRegionStride + kRegionPagesSize +
         slab % kSlabsPerRegion * kSlabSize;
}

}  // namespace holdfast::format
