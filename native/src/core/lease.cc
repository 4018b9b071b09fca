// One renewal after the other; see lease.h for the order and why t0 comes first: whatever is read after t0 was true
// after t0, and no I/O is issued later than t0 + lease. So a fencer whose page was durable before a heartbeat began
// knows the last moment at which the victim may have issued anything.
#include "lease.h"

#include <cstring>

#include "pages.h"

namespace holdfast {

using format::HeartbeatPage;
using format::HeartbeatState;
using format::kPageSize;

// The two copies of our heartbeat page.
struct Lease::Slot {
  PageBuffer memory{2 * kPageSize};
  Copies copies;
  uint64_t offset = 0;
  HeartbeatPage& copy(int i) { return memory.at<HeartbeatPage>(static_cast<size_t>(i) * kPageSize); }
  const HeartbeatPage& newest() const {
    HF_ASSERT(copies.valid());
    return const_cast<Slot*>(this)->copy(copies.newest);
  }
};

const char* lease_state_name(LeaseState state) {
  switch (state) {
    case LeaseState::kHeld: return "held";
    case LeaseState::kValid: return "valid";
    case LeaseState::kFenced: return "fenced";
    case LeaseState::kStopped: return "stopped";
  }
  return "unknown";
}

Lease::Lease(LeaseOptions options, LeaseEnvironment environment)
    : options_(std::move(options)),
      environment_(std::move(environment)),
      lease_ns_(uint64_t{options_.superblock.lease_ms} * 1'000'000) {
  HF_ASSERT(environment_.device != nullptr && environment_.now_ns && environment_.random && environment_.unix_ms);
  HF_ASSERT(options_.generation > 0 && options_.host_id < options_.superblock.host_slots && lease_ns_ > 0);
}

LeaseOutcome Lease::renew() {
  if (state_ == LeaseState::kFenced || state_ == LeaseState::kStopped) {
    LeaseOutcome outcome;
    outcome.state = state_;
    outcome.status = fenced_why_;
    return outcome;
  }
  const uint64_t t0 = environment_.now_ns();
  const bool gap = joined_ && t0 >= deadline_ns_;
  if (Status status = look_for_fence(); !status.ok()) {
    return status.code == Code::kFenced ? fence(std::move(status)) : not_extended(std::move(status), gap);
  }
  Result<Authority> authority = read_authority(*environment_.device, options_.superblock);
  if (!authority.ok()) return not_extended(std::move(authority.status), gap);
  Slot slot;
  if (Status status = read_slot(&slot); !status.ok()) return not_extended(std::move(status), gap);
  Status judged = judge_slot(slot);
  if (judged.code == Code::kFenced) return fence(std::move(judged));
  // A damaged slot is written all the same, which heals it, but proves nothing before it was read back next time.
  if (Status status = write_heartbeat(&slot); !status.ok()) return not_extended(std::move(status), gap);
  if (!judged.ok()) return not_extended(std::move(judged), gap);
  if (gap && environment_.after_gap) {
    if (Status status = environment_.after_gap(); !status.ok()) return not_extended(std::move(status), gap);
  }
  const uint64_t deadline = t0 + lease_ns_;
  joined_ = true;
  if (environment_.now_ns() >= deadline) {
    return not_extended({Code::kLeaseExpired, "renewing the lease of host " + std::to_string(options_.host_id) +
                                                  " took longer than the lease itself; the disk is too slow"},
                        gap);
  }
  HF_ASSERT(deadline >= deadline_ns_);
  deadline_ns_ = deadline;
  state_ = LeaseState::kValid;
  LeaseOutcome outcome;
  outcome.state = state_;
  outcome.deadline_ns = deadline_ns_;
  outcome.gap = gap;
  outcome.authority = *authority;
  return outcome;
}

Status Lease::look_for_fence() {
  Result<Fence> page = read_fence(*environment_.device, options_.superblock, options_.host_id, options_.generation);
  if (!page.ok()) return page.status;
  // A later generation on our own page means that ours was dead before that one began.
  if (page->generation < options_.generation) return {};
  return {Code::kFenced, "host " + std::to_string(options_.host_id) + ", generation " +
                             std::to_string(options_.generation) + " was fenced by host " +
                             std::to_string(page->fencer_host_id) + " (the page names generation " +
                             std::to_string(page->generation) + "). Its volumes may be open elsewhere now"};
}

Status Lease::read_slot(Slot* slot) {
  slot->offset = heartbeat_offset(options_.superblock, options_.host_id);
  Status status = environment_.device->read(slot->offset, slot->memory.data(), slot->memory.size());
  if (!status.ok()) return status;
  slot->copies = choose_record(slot->copy(0), slot->copy(1), options_.superblock.header.pool, slot->offset);
  return {};
}

// Whether the slot shows what we left there, or at first, what a new generation may follow.
Status Lease::judge_slot(const Slot& slot) {
  const std::string us =
      "host " + std::to_string(options_.host_id) + ", generation " + std::to_string(options_.generation);
  if (!slot.copies.valid()) {
    return {Code::kCorrupt, "both copies of the heartbeat page of " + us +
                                " are damaged; written anew, and held "
                                "until it reads back"};
  }
  const HeartbeatPage& page = slot.newest();
  const bool same_life = page.generation == options_.generation && page.state == HeartbeatState::kLive;
  if (same_life && page.nonce != 0 && (page.nonce == acknowledged_ || page.nonce == pending_)) return {};
  if (same_life && page.nonce != 0 && page.nonce == previous_) {
    return {Code::kIo, "the last heartbeat of " + us + " is gone from the disk, which had said that it was durable"};
  }
  if (!joined_) {
    if (page.generation < options_.generation) return {};
    if (same_life && options_.taking_over && page.machine_id == options_.machine_id &&
        page.boot_id == options_.boot_id) {
      return {};
    }
  }
  foreign_ = true;
  return {Code::kFenced, "the heartbeat page of " + us + " is written by somebody else: node " +
                             field_text(page.node_name) + ", generation " + std::to_string(page.generation) +
                             ". Two machines with one identity (a cloned virtual machine?), or a later life of this "
                             "slot; this one stops"};
}

Status Lease::write_heartbeat(Slot* slot) {
  if (pending_ != 0 && slot->copies.valid() && slot->newest().nonce == pending_) {  // it had arrived after all
    previous_ = acknowledged_;
    acknowledged_ = pending_;
    pending_ = 0;
  }
  while (pending_ == 0 || pending_ == acknowledged_ || pending_ == previous_) pending_ = environment_.random();
  if (Status status = write_slot(*slot, HeartbeatState::kLive); !status.ok()) return status;
  previous_ = acknowledged_;
  acknowledged_ = pending_;
  pending_ = 0;
  return {};
}

Status Lease::write_slot(const Slot& slot, HeartbeatState state) {
  const int to = slot.copies.next();
  const uint64_t address = slot.offset + static_cast<uint64_t>(to) * kPageSize;
  PageBuffer buffer(kPageSize);
  auto& page = buffer.at<HeartbeatPage>();
  page.host_id = options_.host_id;
  page.state = state;
  page.generation = options_.generation;
  page.nonce = pending_ != 0 ? pending_ : acknowledged_;
  page.lease_ms = options_.superblock.lease_ms;
  page.machine_id = options_.machine_id;
  page.boot_id = options_.boot_id;
  page.renewed_unix_ms = environment_.unix_ms();
  set_field(page.node_name, options_.node_name.substr(0, sizeof page.node_name));
  const uint64_t sequence = slot.copies.valid() ? slot.newest().header.sequence + 1 : environment_.unix_ms();
  seal(page, options_.superblock.header.pool, address, sequence);
  return environment_.device->write_durable(address, buffer.data(), kPageSize);
}

LeaseOutcome Lease::not_extended(Status why, bool gap) {
  HF_ASSERT(!why.ok());
  state_ = environment_.now_ns() < deadline_ns_ ? LeaseState::kValid : LeaseState::kHeld;
  LeaseOutcome outcome;
  outcome.state = state_;
  outcome.deadline_ns = deadline_ns_;
  outcome.gap = gap;
  outcome.status = std::move(why);
  return outcome;
}

LeaseOutcome Lease::fence(Status why) {
  state_ = LeaseState::kFenced;
  fenced_why_ = std::move(why);
  deadline_ns_ = 0;
  return renew();
}

Status Lease::write_stopped() {
  if (state_ == LeaseState::kStopped) return {};
  const std::string us =
      "host " + std::to_string(options_.host_id) + ", generation " + std::to_string(options_.generation);
  Slot slot;
  if (Status status = read_slot(&slot); !status.ok()) return status;
  if (slot.copies.valid()) {
    const HeartbeatPage& page = slot.newest();
    const bool ours = page.generation == options_.generation && page.nonce != 0 &&
                      (page.nonce == acknowledged_ || page.nonce == pending_ || page.nonce == previous_);
    if (ours && page.state == HeartbeatState::kStopped) {
      if (state_ != LeaseState::kFenced) state_ = LeaseState::kStopped;
      return {};
    }
    const bool before_us = !joined_ && page.generation < options_.generation;
    // A successor that finds itself fenced before its first renewal: the page is its dead predecessor's.
    const bool inherited = !joined_ && options_.taking_over && page.generation == options_.generation &&
                           page.machine_id == options_.machine_id && page.boot_id == options_.boot_id;
    if (foreign_ || (!ours && !before_us && !inherited)) {
      return {Code::kStale, "the heartbeat page of " + us + " is somebody else's by now (generation " +
                                std::to_string(page.generation) + "); nothing is written over it"};
    }
  }
  if (pending_ == 0 && acknowledged_ == 0) {
    while (pending_ == 0) pending_ = environment_.random();
  }
  if (Status status = write_slot(slot, HeartbeatState::kStopped); !status.ok()) return status;
  Slot back;
  if (Status status = read_slot(&back); !status.ok()) return status;
  if (!back.copies.valid() || back.newest().state != HeartbeatState::kStopped ||
      back.newest().generation != options_.generation) {
    return {Code::kIo, "the page that says that " + us + " has stopped does not read back as written"};
  }
  deadline_ns_ = 0;
  if (state_ != LeaseState::kFenced) {
    state_ = LeaseState::kStopped;
    fenced_why_ = {Code::kLeaseExpired, us + " has stopped and given its lease up"};
  }
  return {};
}

}  // namespace holdfast
