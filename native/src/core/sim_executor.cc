// See sim_executor.h.
#include "sim_executor.h"

#include "status.h"

namespace holdfast {

SimExecutor::SimExecutor() { Executor::set_current(this); }

SimExecutor::~SimExecutor() {
  // Late timers still run once, so that whoever left one behind can free it.
  while (!timers_.empty()) {
    const uint64_t due = timers_.begin()->first;
    advance(due > now_ns_ ? due - now_ns_ : 0);
    run_until_idle();
  }
  if (Executor::current() == this) Executor::set_current(nullptr);
}

void SimExecutor::post(Task* task) {
  task->next = nullptr;
  if (head_ == nullptr) head_ = task;
  else tail_->next = task;
  tail_ = task;
}

void SimExecutor::post_at(Task* task, uint64_t when_ns) { timers_.emplace(when_ns, task); }

bool SimExecutor::run_one() {
  Task* task = head_;
  if (task == nullptr) return false;
  head_ = task->next;
  task->next = nullptr;
  task->run(task);
  return true;
}

void SimExecutor::run_until_idle() {
  while (run_one()) {
  }
}

void SimExecutor::advance(uint64_t ns) {
  now_ns_ += ns;
  while (!timers_.empty() && timers_.begin()->first <= now_ns_) {
    Task* task = timers_.begin()->second;
    timers_.erase(timers_.begin());
    post(task);
  }
}

void SimExecutor::drop_tasks() { head_ = tail_ = nullptr; }

}  // namespace holdfast
