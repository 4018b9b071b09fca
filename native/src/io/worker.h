// A worker: one thread with one io_uring, on which everything of the data path runs. All volumes share the same few
// workers; nothing on a worker ever blocks but the one wait at the end of each turn of its loop.
//
// A turn: run posted tasks and due timers, reap completions, then one io_uring_enter that submits what the turn
// prepared and waits for what comes next. The ring is single-issuer with deferred task work where the kernel has it.
//
// A turn that moves much data (kTurnBytes) does not leave the device and the callers idle for so long: what is prepared
// goes to the kernel in between, and between two completions new requests are looked for. Otherwise everything in
// flight goes round in one lump, and the device is idle while requests are copied.
//
// With few requests under way (kPolledRequests) and a quick disk, wake-ups are a good part of what a caller waits: a CPU
// that went idle has to come back (in a virtual machine, through its host). So a worker whose waits were brief lately polls before it sleeps,
// for at most poll_ns a wait, and lets whatever else wants the CPU go first. It never polls when nothing was asked of it,
// and not for a while after something else has had its CPU for long (poll_decider.h).
#pragma once

#include <liburing.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/executor.h"
#include "core/gate.h"
#include "core/status.h"
#include "core/volume.h"
#include "io/poll_decider.h"

namespace holdfast {

// What a completion queue entry's user_data points to. Owned by whoever prepared the entry.
struct Completion {
  void (*complete)(Completion* self, int result, uint32_t flags) = nullptr;
};

class FuseChannel;

inline constexpr size_t kMaxTransfer = 1u << 20;  // bytes of one FUSE request's payload
inline constexpr size_t kFuseHeaderSize = 80;     // fuse_in_header plus the arguments of a read or a write

// Bytes of requests read, or answered, after which a turn hands over what it has prepared. A block counts at least.
inline constexpr size_t kTurnBytes = 32u << 10;

// Requests under way on a worker up to which it polls. With more of them its CPU time is better spent by the others.
inline constexpr size_t kPolledRequests = 8;
// How long a worker polls where nothing else is asked for. Linux' haltpoll polls as long in a guest.
inline constexpr uint64_t kDefaultPollNs = 200'000;

// A frontend request's memory: kMaxTransfer bytes of address space, of which only what was used is resident.
//
// /dev/fuse is read into resident memory only, and into none that a child process shares: a thread that is killed while
// the kernel copies a request to it gets no new page any more, and the kernel then ends the request with EIO
// (fuse_dev_do_read) instead of keeping it for the successor. So a read takes the resident part of a slot's buffer
// first and the worker's overflow memory for the rest.
struct Slot {
  VolumeRequest request;
  FuseChannel* channel = nullptr;
  uint64_t unique = 0;
  Slot* next = nullptr;
  std::byte* buffer = nullptr;   // page-aligned, kMaxTransfer bytes
  size_t resident = 0;           // bytes of buffer that are there for certain, whole pages
  uint64_t released_ns = 0;
  std::byte* header = nullptr;   // kFuseHeaderSize bytes, resident

  // The buffer's first `bytes` have been used, so they are resident.
  void used(size_t bytes) {
    if (bytes > resident) resident = (bytes + 4095) / 4096 * 4096;
  }
};

class Worker final : public Executor {
 public:
  // Starts the thread. `index` only names it. `poll_ns`: the longest that it polls before it sleeps; 0: never. On a
  // single CPU it never does: what it waits for needs that one.
  static Result<std::unique_ptr<Worker>> start(unsigned index, uint64_t poll_ns = 0);
  // Stops and joins. Nothing may be outstanding at the ring but polls that belong to nobody any more.
  ~Worker() override;
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void post(Task* task) override;
  uint64_t now_ns() const override;
  void post_at(Task* task, uint64_t when_ns) override;

  // The worker whose thread this is; null elsewhere.
  static Worker* current();

  // --- on the worker's own thread only ---
  // A submission queue entry for `completion`; never null: a full queue is submitted first.
  io_uring_sqe* sqe(Completion* completion);
  // The gate of an entry that was just prepared is looked at once more right before the kernel gets it. If it has closed
  // since, the entry becomes a short pause instead and `*recalled` true: whoever reaps it prepares it again. So a thread
  // that was stopped in the middle of a batch hands over nothing of it when it goes on after its lease. `recalled` lives
  // as long as the entry's completion.
  void guard(io_uring_sqe* entry, const PoolGate* gate, bool* recalled) {
    guarded_.push_back({ring_.sq.sqe_tail - 1, entry, gate, recalled});
  }
  // Hands what is prepared to the kernel, without waiting for anything.
  void submit();
  // `channel` has answered a request of so many bytes. After kTurnBytes, and while more completions are to be dealt with
  // first, it is asked to look for new requests (FuseChannel::look()).
  void answered(FuseChannel* channel, size_t bytes);
  // Null when all are in use; the channel is then called back through FuseChannel::resume() when one is free.
  Slot* take_slot(FuseChannel* waiter);
  void release_slot(Slot* slot);
  void forget_waiter(FuseChannel* waiter);
  // kMaxTransfer bytes, resident: for what is read beyond a slot's resident part, until it is copied there.
  std::byte* overflow() const { return slot_memory_ + kSlotsPerWorker * kMaxTransfer; }

 private:
  struct Timer {
    uint64_t when_ns;
    uint64_t order;
    Task* task;
  };
  struct TaskList {
    Task* head = nullptr;
    Task* tail = nullptr;
    void push(Task* task);
    Task* pop();
  };

  Worker() = default;
  Status set_up(unsigned index);
  void run();
  void run_tasks();
  void take_inbox();
  void add_timer(Timer timer);
  void run_timers();
  bool poll(uint64_t since_ns);
  void submit_and_wait();
  void wait_and_reap();
  bool reap();
  void wake();
  void arm_wake_poll();
  void recall_late();            // before every submission
  void forget_submitted();       // and after it
  void trim_slots();

  io_uring ring_{};
  bool ring_ready_ = false;
  bool defer_taskrun_ = false;
  int wake_fd_ = -1;
  std::thread thread_;
  unsigned index_ = 0;

  // Own thread.
  TaskList tasks_;
  struct Guarded {
    unsigned position;    // in the submission queue: the value of its tail
    io_uring_sqe* entry;
    const PoolGate* gate;  // null once recalled
    bool* recalled;
  };
  std::vector<Guarded> guarded_;  // prepared, not yet submitted
  std::vector<Timer> timers_;  // a heap, soonest first
  uint64_t timer_order_ = 0;
  struct WakePoll : Completion {
    Worker* worker = nullptr;
    bool armed = false;
  } wake_poll_;
  bool stopping_ = false;
  uint64_t poll_ns_ = 0;
  PollDecider polling_;
  // Answered since the last reap() began.
  FuseChannel* answering_ = nullptr;
  size_t answered_bytes_ = 0;

  // The slots' buffers, the overflow memory, the slots' headers.
  static constexpr size_t kSlotsPerWorker = 1024;
  static constexpr size_t kHeaderStride = 128;
  static constexpr size_t kSlotMemory = (kSlotsPerWorker + 1) * kMaxTransfer + kSlotsPerWorker * kHeaderStride;
  static_assert(kHeaderStride >= kFuseHeaderSize);
  std::byte* slot_memory_ = nullptr;
  std::unique_ptr<Slot[]> slots_;
  Slot* free_slots_ = nullptr;
  size_t slots_in_use_ = 0;
  size_t most_in_use_ = 0;      // since the last wait
  std::vector<FuseChannel*> slot_waiters_;
  struct TrimTask : Task {
    Worker* worker = nullptr;
    bool armed = false;
  } trim_task_;

  // Any thread.
  std::mutex inbox_mutex_;
  TaskList inbox_;
  std::vector<Timer> inbox_timers_;
  bool inbox_stop_ = false;
  std::atomic<bool> asleep_{false};
  std::atomic<bool> inbox_filled_{false};
};

// Runs `function` on the worker and waits for it. Not from a worker thread.
void run_on(Worker& worker, const std::function<void()>& function);

}  // namespace holdfast
