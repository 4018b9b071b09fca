// The engine's only way to a disk. Implementations: io_uring (src/io), memory, and the stackable error, delay
// and simulated (power cut) devices (src/core). Nothing above this interface knows which one it has.
#pragma once

#include <sys/uio.h>

#include <cstdint>

namespace holdfast {

enum class IoOp : uint8_t { kRead, kWrite, kFlush, kDiscard };

// One request. Owned by the caller, who keeps it (and the memory it points to) alive and unmoved until done() ran.
// Offsets, lengths and buffers of reads and writes are multiples of 4096 (O_DIRECT).
struct IoRequest {
  IoOp op = IoOp::kRead;
  bool fua = false;               // kWrite: durable when done() runs
  uint64_t offset = 0;            // bytes
  uint64_t length = 0;            // bytes; sum of iov for reads and writes; 0 for kFlush
  const iovec* iov = nullptr;     // reads and writes
  int iov_count = 0;
  // Runs exactly once, on the executor of the thread that submitted, never from inside submit().
  // error: 0 or a positive errno. A short transfer is finished by the device, not reported.
  void (*done)(IoRequest* self, int error) = nullptr;
  void* user = nullptr;           // the submitter's
  IoRequest* next = nullptr;      // the device's, while the request is with it
  uint64_t device_scratch[6] = {};  // the device's, while the request is with it
  uint64_t gate_scratch[2] = {};    // the same for the gate stacked on the device (gate.h), and for nobody else
};

class BlockDevice {
 public:
  virtual ~BlockDevice() = default;
  virtual uint64_t size_bytes() const = 0;
  // Never blocks and never fails: errors come through done(). Thread-safe where the implementation says so
  // (io_uring: any worker thread; memory and the simulated disk: one thread).
  // Requests have no order among each other but what the caller makes by waiting for done().
  // kFlush makes durable every write whose done() ran before the flush was submitted.
  // kDiscard is advisory: the range may read back as anything until it is written.
  virtual void submit(IoRequest* request) = 0;
};

}  // namespace holdfast
