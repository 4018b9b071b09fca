// Executors for tests: one that the test turns by hand, and one with a thread of its own.
#pragma once

#include <time.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "core/executor.h"
#include "core/status.h"

namespace holdfast::test {

inline uint64_t boottime_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_BOOTTIME, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
}

// Intrusive FIFO of tasks. Not thread-safe.
class TaskQueue {
 public:
  void push(Task* task) {
    task->next = nullptr;
    (head_ == nullptr ? head_ : tail_->next) = task;
    tail_ = task;
  }
  Task* pop() {
    Task* task = head_;
    if (task != nullptr) head_ = task->next;
    return task;
  }

 private:
  Task* head_ = nullptr;
  Task* tail_ = nullptr;
};

// Runs nothing until told to; the clock stands still until moved.
class ManualExecutor final : public Executor {
 public:
  ManualExecutor() { set_current(this); }
  ~ManualExecutor() override { set_current(nullptr); }
  void post(Task* task) override { tasks_.push(task); }
  uint64_t now_ns() const override { return now; }
  void post_at(Task*, uint64_t) override { HF_ASSERT(!"no timers here"); }
  // Runs what is posted, and what that posts. Returns how many tasks ran.
  int run() {
    int count = 0;
    while (Task* task = tasks_.pop()) {
      task->run(task);
      count++;
    }
    return count;
  }
  uint64_t now = 1'000;

 private:
  TaskQueue tasks_;
};

class ThreadExecutor final : public Executor {
 public:
  ThreadExecutor() : thread_([this] { loop(); }) {}
  ~ThreadExecutor() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      wake_.notify_one();
    }
    thread_.join();
  }
  void post(Task* task) override {
    const std::lock_guard lock(mutex_);
    tasks_.push(task);
    wake_.notify_one();
  }
  uint64_t now_ns() const override { return boottime_ns(); }
  void post_at(Task*, uint64_t) override { HF_ASSERT(!"no timers here"); }

 private:
  void loop() {
    set_current(this);
    std::unique_lock lock(mutex_);
    for (;;) {
      Task* task = tasks_.pop();
      if (task != nullptr) {
        lock.unlock();
        task->run(task);
        lock.lock();
      } else if (stop_) {
        return;
      } else {
        wake_.wait(lock);
      }
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  TaskQueue tasks_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace holdfast::test
