// A block device in memory, sparse, that never loses anything: for tests of what lies above, and for measuring it.
// Thread-safe. done() runs on the executor of the submitting thread, in its next turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "block_device.h"
#include "executor.h"

namespace holdfast {

// A task in a request's scratch space that calls its done(): how a device without a thread of its own answers later.
struct IoAnswer : Task {
  IoRequest* request = nullptr;
  int error = 0;
  // `executor`: of the thread that submitted the request.
  static void post(Executor* executor, IoRequest* request, int error);
};
static_assert(sizeof(IoAnswer) <= sizeof(IoRequest::device_scratch));

class MemoryDevice final : public BlockDevice {
 public:
  explicit MemoryDevice(uint64_t size_bytes) : size_bytes_(size_bytes) {}
  uint64_t size_bytes() const override { return size_bytes_; }
  void submit(IoRequest* request) override;

  // Directly, for tests. Multiples of 4096.
  void read(uint64_t offset, void* to, size_t length) const;
  void write(uint64_t offset, const void* from, size_t length);
  size_t blocks() const;
  uint64_t count(IoOp op) const;  // requests of this kind so far

 private:
  using Block = std::unique_ptr<std::byte[]>;
  uint64_t size_bytes_;
  mutable std::mutex mutex_;
  std::unordered_map<uint64_t, Block> blocks_;
  uint64_t counts_[4] = {};
};

}  // namespace holdfast
