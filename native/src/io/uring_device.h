// A block device by io_uring and O_DIRECT. The one file descriptor is also the one that carries the engine's flock:
// requests still in the kernel keep the file, and so the lock, alive (DESIGN 5.3).
#pragma once

#include <atomic>

#include "core/block_device.h"
#include "core/gate.h"
#include "core/status.h"

namespace holdfast {

// submit(): from any worker thread; done() runs on that worker.
class UringDevice final : public BlockDevice {
 public:
  // Borrows `fd` (O_RDWR | O_DIRECT, a block device or a file), which must outlive every request.
  UringDevice(int fd, uint64_t size_bytes) : fd_(fd), size_bytes_(size_bytes) {}
  // From now on the gate is looked at again right before a batch goes to the kernel. It must outlive every request.
  void set_gate(const PoolGate* gate) { gate_ = gate; }
  uint64_t size_bytes() const override { return size_bytes_.load(std::memory_order_relaxed); }
  void set_size(uint64_t size_bytes) { size_bytes_.store(size_bytes, std::memory_order_relaxed); }
  void submit(IoRequest* request) override;

 private:
  struct State;
  static void prepare(State* state);
  static void complete(struct Completion* completion, int result, uint32_t flags);
  static void finish(State* state, int error);

  int fd_;
  const PoolGate* gate_ = nullptr;
  std::atomic<uint64_t> size_bytes_;
  std::atomic<int> discard_way_{0};  // see uring_device.cc
};

}  // namespace holdfast
