// Nothing reaches the disk but through a gate. A request is first counted in, then the gate is looked at, then the
// request is submitted; whoever closes the gate does it first and looks at the count afterwards. So "closed, and zero
// in flight" is a proof that no I/O is at the device and none will come (DESIGN 6.1 and 6.3).
//
// One PoolGate per pool: its deadline is the lease. Past it requests are held, in order, and go on when it is renewed.
// One VolumeGate per open volume: revocation. Fenced or revoked is for good: every request fails with EIO.
//
// What the gate can't promise: that a thread which passed the check is not frozen before the kernel has the request.
// docs/fencing.md says what follows from that.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "block_device.h"
#include "executor.h"
#include "status.h"
#include "sync_device.h"

namespace holdfast {

class VolumeGate;

// Counts requests in and out, and tells when there are none. Any thread. Destroyed when no thread is inside a call.
class InFlight {
 public:
  void enter() { word_.fetch_add(kOne, std::memory_order_seq_cst); }
  void leave() {
    // Nothing is touched after the count went to zero without a waiter: the owner may be gone by then.
    if (word_.fetch_sub(kOne, std::memory_order_seq_cst) == (kOne | kWaiting)) fire();
  }
  uint64_t count() const { return word_.load(std::memory_order_seq_cst) / kOne; }
  // Runs `idle` once, as soon as the count is zero: at once on this thread, or on the one that takes it to zero.
  void when_idle(std::function<void()> idle);

 private:
  static constexpr uint64_t kWaiting = 1;  // somebody waits for zero
  static constexpr uint64_t kOne = 2;      // the count is in the other bits
  void fire();
  std::atomic<uint64_t> word_{0};
  std::mutex mutex_;
  std::vector<std::function<void()>> waiters_;
};

// Thread-safe. Outlives its volume gates and guards.
class PoolGate {
 public:
  explicit PoolGate(std::function<uint64_t()> now_ns);  // CLOCK_BOOTTIME
  ~PoolGate();
  PoolGate(const PoolGate&) = delete;
  PoolGate& operator=(const PoolGate&) = delete;

  // The lease was renewed: I/O may be issued until then. Held requests go on. Never moves the deadline back.
  void renew(uint64_t deadline_ns);
  // Closes until the next renew() (an orderly pause; the deadline does the same by itself).
  void hold();
  // Closes for good. What is held fails with EIO, on its executor.
  void fence();

  bool fenced() const { return fenced_.load(std::memory_order_seq_cst); }
  uint64_t deadline_ns() const { return deadline_ns_.load(std::memory_order_seq_cst); }
  // May be asked again by a device that batches, right before it hands the batch to the kernel.
  bool open_at(uint64_t now_ns) const { return now_ns < deadline_ns() && !fenced(); }
  uint64_t now_ns() const { return now_ns_(); }

  // At the device now: all volumes and control writes together.
  uint64_t in_flight() const;
  // Runs `idle` once, when everything that is in flight now or comes in before the gate is closed is over. To be of
  // use as a proof the gate must be closed first. On any thread.
  void when_idle(std::function<void()> idle);
  // The same, blocking; false: still not idle after `timeout_ms`. Not from an executor thread.
  bool wait_idle(uint64_t timeout_ms);

  // Control writes: counted in while it lives. Not ok: the lease is over (kLeaseExpired) or the host fenced (kFenced),
  // and nothing may be written.
  class Guard {
   public:
    explicit Guard(PoolGate& gate);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    const Status& status() const { return status_; }
    bool ok() const { return status_.ok(); }

   private:
    PoolGate& gate_;
    Status status_;
  };

 private:
  friend class VolumeGate;
  void add(VolumeGate* volume);
  void remove(VolumeGate* volume);

  std::function<uint64_t()> now_ns_;
  std::atomic<uint64_t> deadline_ns_{0};
  std::atomic<bool> fenced_{false};
  InFlight control_;
  mutable std::mutex mutex_;  // before a volume gate's
  std::vector<VolumeGate*> volumes_;
};

// Thread-safe. Destroyed only with nothing in flight and nothing held.
class VolumeGate {
 public:
  explicit VolumeGate(PoolGate& pool);
  ~VolumeGate();
  VolumeGate(const VolumeGate&) = delete;
  VolumeGate& operator=(const VolumeGate&) = delete;

  PoolGate& pool() { return pool_; }
  // For good: whatever is held or comes later fails with EIO.
  void revoke();
  bool revoked() const { return revoked_.load(std::memory_order_seq_cst); }
  uint64_t in_flight() const { return in_flight_.count(); }
  uint64_t held() const;
  void when_idle(std::function<void()> idle) { in_flight_.when_idle(std::move(idle)); }
  bool wait_idle(uint64_t timeout_ms);

 private:
  friend class PoolGate;
  friend class GatedDevice;
  enum class Verdict { kGo, kHold, kRefuse };
  struct Queue;  // the held requests of one executor

  Verdict look(uint64_t now_ns) const;
  // False: the gate is open again, and the request was not taken.
  bool park(IoRequest* request, Executor* executor);
  void release();  // posts every executor that has held requests
  static void run_queue(Task* task);

  PoolGate& pool_;
  InFlight in_flight_;
  std::atomic<bool> revoked_{false};
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Queue>> queues_;
  uint64_t held_ = 0;
};

// A BlockDevice behind a volume's gate. As thread-safe as the device below. submit() is called on executor threads
// only (held and refused requests come back through the executor).
class GatedDevice final : public BlockDevice {
 public:
  GatedDevice(BlockDevice& inner, VolumeGate& gate) : inner_(inner), gate_(gate) {}
  uint64_t size_bytes() const override { return inner_.size_bytes(); }
  void submit(IoRequest* request) override;

 private:
  friend class VolumeGate;
  bool pass(IoRequest* request, Executor* executor, bool* refused);
  void resume(IoRequest* request);  // on its executor, out of a queue
  static void finished(IoRequest* request, int error);
  BlockDevice& inner_;
  VolumeGate& gate_;
};

// A SyncDevice whose writes, flushes and discards each take a pool guard. Reads are free.
class GatedSyncDevice final : public SyncDevice {
 public:
  GatedSyncDevice(SyncDevice& inner, PoolGate& gate) : inner_(inner), gate_(gate) {}
  uint64_t size_bytes() const override { return inner_.size_bytes(); }
  const std::string& name() const override { return inner_.name(); }
  Status read(uint64_t offset, void* buffer, size_t length) override { return inner_.read(offset, buffer, length); }
  Status write(uint64_t offset, const void* buffer, size_t length) override;
  Status write_durable(uint64_t offset, const void* buffer, size_t length) override;
  Status flush() override;
  Status discard(uint64_t offset, uint64_t length) override;
  Status zero(uint64_t offset, uint64_t length) override;

 private:
  SyncDevice& inner_;
  PoolGate& gate_;
};

}  // namespace holdfast
