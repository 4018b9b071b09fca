// What engine and keeper say to each other: SOCK_SEQPACKET on a unix socket, one header and at most kKeeperBlob bytes
// a packet, descriptors by SCM_RIGHTS. Both ends run on one machine, but a keeper outlives many engine versions:
// numbers and layouts here are never reused with another meaning.
//
// The keeper knows nothing of volumes. It keeps named entries of {blob, descriptors}, and it makes, resizes and takes
// away the loop device of a FUSE file in a child of its own. (Such calls wait for the engine's answers; made by a
// thread of the engine, they would keep a killed engine's process, and so its flock on the pool, alive for ever.)
#pragma once

#include <cstdint>

namespace holdfast {

inline constexpr uint32_t kKeeperMagic = 0x4b504648;  // "HFPK"
inline constexpr uint16_t kKeeperVersion = 1;
inline constexpr uint32_t kKeeperBlob = 32768;        // bytes a packet
inline constexpr uint32_t kKeeperFds = 200;           // descriptors a packet; the kernel's limit is 253
inline constexpr uint32_t kKeeperName = 96;           // bytes, zero-terminated

enum class KeeperOp : uint16_t {
  // One or more packets, kKeeperMore on all but the last, which commits: the entry then is exactly what was sent.
  // Descriptors of an entry that is replaced are closed afterwards, so what was sent again lives on.
  kPut = 1,
  // Replaces the blob and flags, keeps the descriptors. ENOENT.
  kUpdate = 2,
  // Answer: packets of {blob in the first, descriptors}, kKeeperMore on all but the last; flags of the entry in
  // `argument`. The keeper keeps the descriptors. ENOENT.
  kGet = 3,
  // Answer: names, each zero-terminated, kKeeperMore on all but the last packet.
  kList = 4,
  // Closes an entry's descriptors and forgets it. What does not exist is success.
  kDrop = 5,
  // blob: KeeperAttach, descriptor: the FUSE mount. Answer: argument = loop number, blob: a sentence about queue
  // settings that could not be made, or nothing.
  kAttach = 6,
  // blob: KeeperLoop, descriptor: the FUSE mount. The loop device takes the file's size.
  kResize = 7,
  // blob: KeeperLoop. Syncs and detaches; EBUSY while mounted or open. Success if it is not there, or another's.
  kDetach = 8,
  // blob: KeeperLoop (number unused). argument = number of the loop device with that label, or -1.
  kFind = 9,
};

inline constexpr uint32_t kKeeperMore = 1u << 0;

// Flags of an entry (KeeperMessage::argument of kPut and kUpdate).
// Drop the entry when the connection that put it ends: closing the descriptors aborts the FUSE connection, so that
// callers get errors and do not hang. For kernels that cannot send requests again (before 6.9).
inline constexpr int64_t kKeeperAbortWhenOrphaned = 1;

struct KeeperMessage {
  uint32_t magic;
  uint16_t version;
  KeeperOp op;
  int32_t error;         // answers: 0 or a positive errno
  uint32_t flags;
  int64_t argument;
  uint32_t blob_length;  // bytes that follow this header
  uint32_t fd_count;
  char name[kKeeperName];
};
static_assert(sizeof(KeeperMessage) == 128);

struct KeeperLoop {
  int32_t number;        // /dev/loop<number>
  uint32_t ignore_sync;  // kDetach: 1 for a dead volume, whose data cannot be synced
  char label[64];        // the loop device's file name field: whose it is
};

// What the engine asks for.
inline constexpr uint32_t kSectorSize = 4096;
inline constexpr uint32_t kLoopRequests = 128;
inline constexpr uint32_t kLoopAsyncDepth = 96;

struct KeeperAttach {
  char label[64];
  uint32_t sector_size;
  uint32_t requests;     // of the loop device's queue
  uint32_t async_depth;
  uint32_t read_only;    // 1: a read-only loop device
};

}  // namespace holdfast
