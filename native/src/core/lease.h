// The right of this host generation to issue I/O to a pool, and how it is kept (DESIGN 6.1): a state machine that
// takes one step per renewal. It owns no thread, reads no clock and starts no timer of its own: a lease thread (or a
// test) calls renew() every renew interval and passes the outcome on to the gate (gate.h).
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "format.h"
#include "records.h"
#include "status.h"
#include "sync_device.h"

namespace holdfast {

enum class LeaseState {
  kHeld,     // no right to issue I/O now: not joined yet, or the disk could not be read or written in time
  kValid,    // until deadline_ns
  kFenced,   // for good: fenced on disk, or another machine lives on this slot
  kStopped,  // for good: gave itself up
};
const char* lease_state_name(LeaseState state);  // 'valid' | 'held' | 'fenced' | 'stopped'

struct LeaseOptions {
  format::Superblock superblock;
  uint32_t host_id = 0;
  uint64_t generation = 0;        // from 1
  std::string node_name;
  format::Uuid machine_id{};
  format::Uuid boot_id{};
  // An engine that takes over from a dead one of the same process generation (DESIGN 5.3): the slot may hold this
  // very generation already, if machine and boot are the same. Otherwise the slot must hold an older one.
  bool taking_over = false;
};

struct LeaseEnvironment {
  SyncDevice* device = nullptr;             // not gated: renewal is what opens the gate
  std::function<uint64_t()> now_ns;         // CLOCK_BOOTTIME
  std::function<uint64_t()> random;
  std::function<uint64_t()> unix_ms;        // for people only
  // Called in renew() when the lease had run out, after the fence page was read and before I/O may go on: re-read
  // every open volume's record and revoke those that are no longer ours. Not ok: stay held, try again next time.
  std::function<Status()> after_gap;
};

struct LeaseOutcome {
  LeaseState state = LeaseState::kHeld;  // kValid also after a failed renewal, while the last one still holds
  uint64_t deadline_ns = 0;     // I/O may be issued before it. Never moves back; a failed renewal leaves it.
  bool gap = false;             // the lease had run out before this renewal
  Authority authority;          // as read in this renewal; only when `status` is ok
  Status status;                // why this renewal did not extend the lease
};

// One thread at a time.
class Lease {
 public:
  Lease(LeaseOptions options, LeaseEnvironment environment);

  // 1. t0. 2. Reads fence page, authority, own heartbeat. 3. Writes the heartbeat, durable. 4. deadline = t0 + lease.
  // Fenced: the caller shuts the gate for good, waits for zero in flight, then calls write_stopped().
  // Once fenced or stopped it touches the disk no more and repeats itself.
  LeaseOutcome renew();

  // stopped(generation): says on disk that the gate is closed for good and nothing is in flight. The caller has made
  // that true. After it renew() answers kStopped (kFenced if it was fenced before). kStale: the slot has a later life.
  Status write_stopped();

  LeaseState state() const { return state_; }
  uint64_t deadline_ns() const { return deadline_ns_; }
  uint64_t lease_ns() const { return lease_ns_; }

 private:
  struct Slot;
  Status look_for_fence();
  Status read_slot(Slot* slot);
  Status judge_slot(const Slot& slot);
  Status write_slot(const Slot& slot, format::HeartbeatState state);
  Status write_heartbeat(Slot* slot);
  LeaseOutcome not_extended(Status why, bool gap);
  LeaseOutcome fence(Status why);

  const LeaseOptions options_;
  const LeaseEnvironment environment_;
  const uint64_t lease_ns_;
  LeaseState state_ = LeaseState::kHeld;
  uint64_t deadline_ns_ = 0;
  bool joined_ = false;         // a heartbeat of ours was written and acknowledged
  bool foreign_ = false;        // the slot showed somebody else's: "stopped" would be said of them too
  Status fenced_why_;
  // Nonces by which we know our own heartbeats; 0: none.
  uint64_t acknowledged_ = 0;   // of the last that the device said it wrote
  uint64_t previous_ = 0;       // of the one before
  uint64_t pending_ = 0;        // of one whose outcome is unknown: used again until it is acknowledged
};

}  // namespace holdfast
