// An executor for tests and simulations: one queue, one thread, a clock that moves only when it is told to. The same
// calls in the same order give the same run.
#pragma once

#include <cstdint>
#include <functional>
#include <map>

#include "executor.h"

namespace holdfast {

class SimExecutor final : public Executor {
 public:
  // Makes itself the calling thread's executor.
  SimExecutor();
  ~SimExecutor() override;
  SimExecutor(const SimExecutor&) = delete;
  SimExecutor& operator=(const SimExecutor&) = delete;

  void post(Task* task) override;
  uint64_t now_ns() const override { return now_ns_; }
  void post_at(Task* task, uint64_t when_ns) override;

  bool run_one();        // false: nothing was ready
  void run_until_idle();
  // Moves the clock and makes ready what has come due.
  void advance(uint64_t ns);
  bool idle() const { return head_ == nullptr; }
  bool timers() const { return !timers_.empty(); }
  uint64_t next_timer_ns() const { return timers_.begin()->first; }
  // Forgets what is queued, as a killed process does. Timers stay: they must cope with being late.
  void drop_tasks();

 private:
  Task* head_ = nullptr;
  Task* tail_ = nullptr;
  std::multimap<uint64_t, Task*> timers_;
  uint64_t now_ns_ = 1'000'000'000;
};

}  // namespace holdfast
