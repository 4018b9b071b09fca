// The `fuse` frontend: a FUSE file system whose root inode is the volume, spoken raw over /dev/fuse (DESIGN 5.1).
//
// One channel per worker: its own clone of the connection's descriptor, read without blocking and drained whenever
// poll says so. Header and payload of a write are read apart, so that data lies page-aligned and goes to O_DIRECT
// without a copy. A request is answered on the channel that read it.
//
// The mount is detached: no path, alive as long as its descriptor or an open file on it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "core/status.h"
#include "core/volume.h"
#include "io/worker.h"

namespace holdfast {

// What the kernel and the engine agreed on. It is asked for once in a connection's life, so a successor gets it from
// the keeper. Plain bytes.
struct FuseAgreement {
  uint32_t minor = 0;            // the kernel's protocol minor
  uint32_t max_write = 0;        // bytes
  uint32_t max_pages = 0;
  uint32_t can_resend = 0;       // 1: the kernel knows FUSE_NOTIFY_RESEND
  uint64_t flags = 0;            // as answered
};

class FuseSession;

// One clone of the connection on one worker. Worker thread only, but for construction.
class FuseChannel {
 public:
  FuseChannel(FuseSession* session, Worker* worker, int fd);
  void start();                  // arms the poll and reads what is there
  void resume();                 // a slot is free again
  void look();                   // reads what is there and submits its I/O, in the middle of the worker's turn
  void stop_reading();
  bool idle() const { return in_flight_ == 0; }
  bool quiet() const { return !poll_armed_ && !removal_.outstanding && !read_task_queued_ && !waiting_for_slot_; }
  int fd() const { return fd_; }
  Worker* worker() const { return worker_; }

 private:
  friend class FuseSession;
  struct Poll : Completion {
    FuseChannel* channel = nullptr;
  };
  struct PollRemoval : Completion {
    FuseChannel* channel = nullptr;
    bool outstanding = false;
  };
  struct ReadTask : Task {
    FuseChannel* channel = nullptr;
  };

  void arm_poll();
  void remove_poll();
  void polled(uint32_t flags);
  void read_requests();
  void queue_read();
  void handle(Slot* slot, size_t length);
  void submit(Slot* slot, VolumeOp op, uint64_t offset, uint64_t length);
  void handle_init(Slot* slot, size_t length);
  void reply(Slot* slot, int error, const void* data = nullptr, size_t length = 0);
  void send(uint64_t unique, int error, const void* data, size_t length);
  static void request_done(VolumeRequest* request, int error);

  FuseSession* session_;
  Worker* worker_;
  int fd_;
  Poll poll_;
  PollRemoval removal_;
  ReadTask read_task_;
  bool poll_armed_ = false;
  bool read_task_queued_ = false;
  bool waiting_for_slot_ = false;
  bool reading_ = false;
  bool ended_ = false;
  uint32_t in_flight_ = 0;       // with the volume
};

class FuseSession {
 public:
  enum class Mode : int {
    kServe,    // requests go to the volume
    kFail,     // everything answers EIO: revoked or fenced
    kSilent,   // errors are swallowed: the requests stay in the kernel for a successor
  };

  // Opens /dev/fuse, mounts, clones a descriptor per worker. Nothing is served before start().
  static Result<std::unique_ptr<FuseSession>> create(const std::vector<Worker*>& workers, uint64_t size_bytes);
  // A dead engine's connection. Takes the descriptors; clones more where there are fewer than workers, and keeps the
  // surplus open, unread. Call resend() after start().
  static Result<std::unique_ptr<FuseSession>> adopt(const std::vector<Worker*>& workers, uint64_t size_bytes,
                                                    std::vector<int> fuse_fds, int mount_fd, FuseAgreement agreement);
  // Closes the descriptors. shut_down() must have run if start() has.
  ~FuseSession();

  // The calls below block; control threads only.
  // From now on requests reach `volume`, which may be null in mode kFail.
  void start(Volume* volume, Mode mode);
  // Waits until the kernel's first message is answered. False after `timeout_ms`.
  bool wait_agreed(unsigned timeout_ms);
  // Lets the kernel send again everything that a dead engine had not answered.
  Status resend();
  // Returns when every worker has seen the mode; what came earlier may still be with the volume.
  void set_mode(Mode mode);
  // Stops reading. Requests with the volume go on. Idempotent.
  void stop_reading();
  // After stop_reading(): reads again.
  void resume_reading();
  // True when nothing is with the volume (within `timeout_ms`).
  bool wait_idle(unsigned timeout_ms);
  // The new size is served, and the kernel's idea of it forgotten.
  void set_size(uint64_t size_bytes);
  // Stops reading for good and waits for the polls to end; nothing may be with the volume any more.
  void shut_down();

  Mode mode() const { return mode_.load(std::memory_order_acquire); }
  uint64_t size_bytes() const { return size_bytes_.load(std::memory_order_relaxed); }
  const FuseAgreement& agreement() const { return agreement_; }
  // Every clone, those that no worker reads included.
  std::vector<int> fuse_fds() const;
  int mount_fd() const { return mount_fd_; }
  uint64_t in_flight() const { return in_flight_.load(std::memory_order_relaxed); }

 private:
  friend class FuseChannel;
  FuseSession() = default;
  Status clone_for(const std::vector<Worker*>& workers);
  void for_each_channel(const std::function<void(FuseChannel&)>& function);

  std::vector<std::unique_ptr<FuseChannel>> channels_;
  std::vector<int> surplus_fds_;
  int mount_fd_ = -1;
  Volume* volume_ = nullptr;
  FuseAgreement agreement_;
  std::atomic<Mode> mode_{Mode::kFail};
  std::atomic<bool> agreed_{false};
  std::atomic<uint64_t> size_bytes_{0};
  std::atomic<uint64_t> in_flight_{0};
  bool started_ = false;
};

}  // namespace holdfast
