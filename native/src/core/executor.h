// Where continuations run. In production one executor is one worker thread with its io_uring; in tests and in the
// crash simulation a single deterministic queue. The engine core starts no thread and reads no clock of its own.
#pragma once

#include <cstdint>

namespace holdfast {

// Intrusive: the poster owns it and keeps it alive until run() was called.
struct Task {
  void (*run)(Task* self) = nullptr;
  Task* next = nullptr;
};

class Executor {
 public:
  virtual ~Executor() = default;
  // Any thread. The task runs later on the executor's thread, in the order posted, never inside post().
  virtual void post(Task* task) = 0;
  // CLOCK_BOOTTIME in nanoseconds, or simulated time.
  virtual uint64_t now_ns() const = 0;
  // Any thread. Runs the task on this executor at or after `when_ns` (same clock as now_ns()). A task can't be
  // taken back: it must cope with being late or needless.
  virtual void post_at(Task* task, uint64_t when_ns) = 0;
  // The executor whose thread this is; null on foreign threads.
  static Executor* current();
  // For executor implementations only: names the executor of the calling thread.
  static void set_current(Executor* executor);
};

}  // namespace holdfast
