// A disk as the control plane sees it: blocking calls, one thing after the other. Format, check, lease and fencing
// are written on it and run on threads that may block; the data path never is (that is block_device.h).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "format.h"
#include "status.h"

namespace holdfast {

// Offsets and lengths are multiples of 4096 and buffers are 4096-aligned (O_DIRECT). Errors are kIo and name the
// device, the operation, the place and the errno. Thread-safe.
class SyncDevice {
 public:
  virtual ~SyncDevice() = default;
  virtual uint64_t size_bytes() const = 0;
  virtual const std::string& name() const = 0;
  virtual Status read(uint64_t offset, void* buffer, size_t length) = 0;
  virtual Status write(uint64_t offset, const void* buffer, size_t length) = 0;
  // Durable when it returns, whatever else is in the device's volatile cache (FUA, or a write and a flush).
  virtual Status write_durable(uint64_t offset, const void* buffer, size_t length) = 0;
  // Makes durable every write that returned before.
  virtual Status flush() = 0;
  // Advisory; over when it returns. The range may read back as anything until it is written.
  virtual Status discard(uint64_t offset, uint64_t length) = 0;
  // The range reads back as zeros; not durable before flush().
  virtual Status zero(uint64_t offset, uint64_t length) = 0;
};

// A block device, or an image file (what a loop device is made of), opened with O_DIRECT.
class FdDevice final : public SyncDevice {
 public:
  enum class Mode {
    kRead,
    kWrite,
    kExclusive,  // O_EXCL: refused with kBusy while mounted, used as swap, or held by device-mapper or md
  };
  static Result<std::unique_ptr<FdDevice>> open(const std::string& path, Mode mode);
  // Uses a descriptor that somebody else opened with O_DIRECT and keeps open for longer.
  static Result<std::unique_ptr<FdDevice>> borrow(int fd, const std::string& name);

  ~FdDevice() override;
  FdDevice(const FdDevice&) = delete;
  FdDevice& operator=(const FdDevice&) = delete;

  int fd() const { return fd_; }
  bool is_block_device() const { return block_device_; }
  uint32_t logical_sector_size() const { return logical_sector_size_; }
  uint64_t size_bytes() const override { return size_.load(std::memory_order_relaxed); }
  // Asks the kernel for the size again: a device may grow, or shrink, while it is open. Thread-safe.
  Status measure();
  const std::string& name() const override { return name_; }
  Status read(uint64_t offset, void* buffer, size_t length) override;
  Status write(uint64_t offset, const void* buffer, size_t length) override;
  Status write_durable(uint64_t offset, const void* buffer, size_t length) override;
  Status flush() override;
  Status discard(uint64_t offset, uint64_t length) override;
  Status zero(uint64_t offset, uint64_t length) override;

 private:
  FdDevice(int fd, bool owned, std::string name) : fd_(fd), owned_(owned), name_(std::move(name)) {}
  Status examine();
  Status write_flags(uint64_t offset, const void* buffer, size_t length, int flags);

  int fd_;
  bool owned_;
  bool block_device_ = false;
  uint32_t logical_sector_size_ = 512;
  std::atomic<uint64_t> size_{0};
  std::string name_;
};

// A disk in memory for tests: sparse, forgets what was not flushed, and fails on demand.
class MemoryDisk final : public SyncDevice {
 public:
  enum class Op { kRead, kWrite, kFlush, kDiscard, kZero };
  enum class Fault {
    kNone,
    kError,          // EIO, nothing happened
    kErrorAfter,     // EIO, but it did happen
    kLost,           // reported as done, nothing happened
    kTorn,           // reported as done, only the first half of the bytes (whole 512-byte sectors) arrived
  };
  explicit MemoryDisk(uint64_t size_bytes);
  ~MemoryDisk() override;
  MemoryDisk(const MemoryDisk&) = delete;
  MemoryDisk& operator=(const MemoryDisk&) = delete;

  // Asked before each operation; called with the device's lock held, so it must not call back. Null: no faults.
  void set_faults(std::function<Fault(Op op, uint64_t offset, uint64_t length)> faults);
  // Power cut: of every 4 KiB page written since the last flush, the version that `keep` picks stays: true the new
  // one, false the last durable one. Durable writes and what was flushed always stay.
  void power_cut(const std::function<bool(uint64_t page_offset)>& keep);
  // Direct access, past faults and durability; for planting damage.
  std::byte* raw(uint64_t offset);
  void resize(uint64_t size_bytes);  // grow or shrink, as an array does under us
  uint64_t operations(Op op) const;

  uint64_t size_bytes() const override { return size_; }
  const std::string& name() const override { return name_; }
  Status read(uint64_t offset, void* buffer, size_t length) override;
  Status write(uint64_t offset, const void* buffer, size_t length) override;
  Status write_durable(uint64_t offset, const void* buffer, size_t length) override;
  Status flush() override;
  Status discard(uint64_t offset, uint64_t length) override;
  Status zero(uint64_t offset, uint64_t length) override;

 private:
  Fault fault(Op op, uint64_t offset, uint64_t length);
  Status store(uint64_t offset, const void* buffer, size_t length, bool durable);
  void remember(uint64_t offset, uint64_t length);

  uint64_t size_;
  uint64_t reserved_;
  std::byte* memory_;
  std::string name_ = "memory";
  mutable std::mutex mutex_;
  std::function<Fault(Op, uint64_t, uint64_t)> faults_;
  std::map<uint64_t, std::vector<std::byte>> before_;  // last durable content of pages written since
  uint64_t operations_[5] = {};
};

}  // namespace holdfast
