// See worker.h.
#include "io/worker.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <future>

#include "io/fuse_session.h"

namespace holdfast {

namespace {

constexpr unsigned kRingEntries = 512;
constexpr unsigned kCompletionEntries = 8192;
// Longer than what helps with a request (loop device, io_uring, the caller) has the CPU for between two looks.
constexpr uint64_t kCrowdedNs = 500'000;
constexpr uint64_t kTrimAfterNs = 5'000'000'000;
constexpr int kPrSetIoFlusher = 57;  // PR_SET_IO_FLUSHER, newer than some C libraries

thread_local Worker* current_worker = nullptr;

uint64_t boottime_ns() {
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

}  // namespace

void Worker::TaskList::push(Task* task) {
  task->next = nullptr;
  if (tail != nullptr) {
    tail->next = task;
  } else {
    head = task;
  }
  tail = task;
}

Task* Worker::TaskList::pop() {
  Task* task = head;
  if (task != nullptr) {
    head = task->next;
    if (head == nullptr) tail = nullptr;
    task->next = nullptr;
  }
  return task;
}

Worker* Worker::current() { return current_worker; }

Result<std::unique_ptr<Worker>> Worker::start(unsigned index, uint64_t poll_ns) {
  std::unique_ptr<Worker> worker(new Worker());
  worker->poll_ns_ = std::thread::hardware_concurrency() == 1 ? 0 : poll_ns;
  std::promise<Status> ready;
  // The ring is made on its own thread: a single-issuer ring belongs to the thread that made it.
  worker->thread_ = std::thread([&ready, raw = worker.get(), index] {
    Status status = raw->set_up(index);
    const bool ok = status.ok();
    ready.set_value(std::move(status));
    if (ok) raw->run();
  });
  Status status = ready.get_future().get();
  if (!status.ok()) {
    worker->thread_.join();
    return status;
  }
  return worker;
}

Status Worker::set_up(unsigned index) {
  index_ = index;
  char name[16];
  std::snprintf(name, sizeof name, "hf-io-%u", index);
  prctl(PR_SET_NAME, name);
  // Memory that this thread needs must not be won by writing back pages through this very thread.
  // Without CAP_SYS_RESOURCE it fails, and everything else works.
  prctl(kPrSetIoFlusher, 1, 0, 0, 0);

  const unsigned wanted[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_COOP_TASKRUN, 0};
  int result = -EINVAL;
  for (unsigned flags : wanted) {
    io_uring_params params{};
    params.flags = flags | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;
    params.cq_entries = kCompletionEntries;
    result = io_uring_queue_init_params(kRingEntries, &ring_, &params);
    if (result == 0) {
      defer_taskrun_ = (flags & IORING_SETUP_DEFER_TASKRUN) != 0;
      break;
    }
    if (result != -EINVAL) break;
  }
  if (result != 0) {
    return {Code::kUnsupported, std::string("io_uring cannot be set up (") + std::strerror(-result) +
                                    "): allow io_uring (sysctl kernel.io_uring_disabled=0, seccomp profile)"};
  }
  ring_ready_ = true;
  io_uring_ring_dontfork(&ring_);

  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd_ < 0) return {Code::kIo, std::string("eventfd failed: ") + std::strerror(errno)};

  void* memory =
      mmap(nullptr, kSlotMemory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return {Code::kIo, std::string("no address space for request buffers: ") + std::strerror(errno)};
  }
  slot_memory_ = static_cast<std::byte*>(memory);
  // Before anything of it is used: a fork() would share its pages, and each first write after that need a new page.
  if (madvise(memory, kSlotMemory, MADV_DONTFORK) != 0) {
    return {Code::kIo, std::string("request buffers cannot be kept from child processes: ") + std::strerror(errno)};
  }
  madvise(memory, kSlotMemory, MADV_NOHUGEPAGE);
  madvise(memory, kSlotMemory, MADV_DONTDUMP);
  std::byte* const headers = overflow() + kMaxTransfer;
  std::memset(overflow(), 0, kMaxTransfer + kSlotsPerWorker * kHeaderStride);
  slots_.reset(new Slot[kSlotsPerWorker]);
  for (size_t i = kSlotsPerWorker; i-- > 0;) {
    slots_[i].buffer = slot_memory_ + i * kMaxTransfer;
    slots_[i].header = headers + i * kHeaderStride;
    slots_[i].next = free_slots_;
    free_slots_ = &slots_[i];
  }
  trim_task_.worker = this;
  trim_task_.run = [](Task* self) { static_cast<TrimTask*>(self)->worker->trim_slots(); };
  wake_poll_.worker = this;
  wake_poll_.complete = [](Completion* self, int, uint32_t flags) {
    auto* poll = static_cast<WakePoll*>(self);
    uint64_t ignored;
    while (read(poll->worker->wake_fd_, &ignored, sizeof ignored) > 0) {
    }
    if ((flags & IORING_CQE_F_MORE) == 0) poll->armed = false;
  };
  return {};
}

Worker::~Worker() {
  if (thread_.joinable()) {
    {
      std::lock_guard lock(inbox_mutex_);
      inbox_stop_ = true;
    }
    inbox_filled_.store(true, std::memory_order_seq_cst);
    wake();
    thread_.join();
  }
  if (ring_ready_) io_uring_queue_exit(&ring_);
  if (wake_fd_ >= 0) close(wake_fd_);
  if (slot_memory_ != nullptr) munmap(slot_memory_, kSlotMemory);
}

uint64_t Worker::now_ns() const { return boottime_ns(); }

void Worker::wake() {
  if (!asleep_.exchange(false, std::memory_order_seq_cst)) return;
  const uint64_t one = 1;
  // EAGAIN would mean that the counter is full: the worker is being woken already.
  [[maybe_unused]] ssize_t written = write(wake_fd_, &one, sizeof one);
}

void Worker::post(Task* task) {
  HF_ASSERT(task->run != nullptr);
  if (current_worker == this) {
    tasks_.push(task);
    return;
  }
  {
    std::lock_guard lock(inbox_mutex_);
    inbox_.push(task);
  }
  inbox_filled_.store(true, std::memory_order_seq_cst);
  wake();
}

void Worker::post_at(Task* task, uint64_t when_ns) {
  HF_ASSERT(task->run != nullptr);
  if (current_worker == this) {
    add_timer({when_ns, timer_order_++, task});
    return;
  }
  {
    std::lock_guard lock(inbox_mutex_);
    inbox_timers_.push_back({when_ns, 0, task});
  }
  inbox_filled_.store(true, std::memory_order_seq_cst);
  wake();
}

void Worker::add_timer(Timer timer) {
  timers_.push_back(timer);
  std::push_heap(timers_.begin(), timers_.end(), [](const Timer& a, const Timer& b) {
    return a.when_ns != b.when_ns ? a.when_ns > b.when_ns : a.order > b.order;
  });
}

void Worker::run_timers() {
  if (timers_.empty()) return;
  const uint64_t now = boottime_ns();
  while (!timers_.empty() && timers_.front().when_ns <= now) {
    std::pop_heap(timers_.begin(), timers_.end(), [](const Timer& a, const Timer& b) {
      return a.when_ns != b.when_ns ? a.when_ns > b.when_ns : a.order > b.order;
    });
    Task* task = timers_.back().task;
    timers_.pop_back();
    tasks_.push(task);
  }
}

void Worker::take_inbox() {
  if (!inbox_filled_.exchange(false, std::memory_order_seq_cst)) return;
  std::lock_guard lock(inbox_mutex_);
  while (Task* task = inbox_.pop()) tasks_.push(task);
  for (Timer timer : inbox_timers_) {
    timer.order = timer_order_++;
    add_timer(timer);
  }
  inbox_timers_.clear();
  if (inbox_stop_) stopping_ = true;
}

void Worker::run_tasks() {
  // Only what is there now: tasks that tasks post wait for the next turn, so that I/O gets its share.
  Task* last = tasks_.tail;
  while (Task* task = tasks_.pop()) {
    task->run(task);
    if (task == last) break;
  }
}

void Worker::arm_wake_poll() {
  if (wake_poll_.armed) return;
  io_uring_prep_poll_multishot(sqe(&wake_poll_), wake_fd_, POLLIN);
  wake_poll_.armed = true;
}

void Worker::recall_late() {
  if (guarded_.empty()) return;
  static __kernel_timespec pause = {0, 20'000'000};
  const uint64_t now = boottime_ns();
  for (Guarded& one : guarded_) {
    if (one.gate == nullptr || one.gate->open_at(now)) continue;
    one.gate = nullptr;
    const auto data = one.entry->user_data;
    io_uring_prep_timeout(one.entry, &pause, 0, 0);
    one.entry->user_data = data;
    *one.recalled = true;
  }
}

// The kernel may take fewer entries than there are (out of memory, too many completions): the rest stay guarded.
void Worker::forget_submitted() {
  const unsigned left = io_uring_sq_ready(&ring_);
  if (left == 0) return guarded_.clear();
  const unsigned head = ring_.sq.sqe_tail - left;
  std::erase_if(guarded_, [head](const Guarded& one) { return static_cast<int>(one.position - head) < 0; });
}

io_uring_sqe* Worker::sqe(Completion* completion) {
  HF_ASSERT(current_worker == this);
  io_uring_sqe* entry = io_uring_get_sqe(&ring_);
  while (entry == nullptr) {
    submit();
    entry = io_uring_get_sqe(&ring_);
  }
  entry->user_data = uint64_t(reinterpret_cast<uintptr_t>(completion));
  return entry;
}

void Worker::submit() {
  HF_ASSERT(current_worker == this);
  if (io_uring_sq_ready(&ring_) == 0) return;
  recall_late();
  const int result = io_uring_submit(&ring_);
  HF_ASSERT(result >= 0 || result == -EBUSY || result == -EAGAIN || result == -EINTR);
  forget_submitted();
}

void Worker::answered(FuseChannel* channel, size_t bytes) {
  answering_ = channel;
  answered_bytes_ += std::max(bytes, size_t{4096});
}

bool Worker::reap() {
  bool any = false;
  answering_ = nullptr;
  answered_bytes_ = 0;
  io_uring_cqe* cqes[64];
  for (;;) {
    const unsigned count = io_uring_peek_batch_cqe(&ring_, cqes, 64);
    if (count == 0) return any;
    any = true;
    // The entries are copied out first: a completion may submit, and a submission may reap.
    struct Copy {
      Completion* completion;
      int result;
      uint32_t flags;
    } copies[64];
    for (unsigned i = 0; i < count; ++i) {
      copies[i] = {reinterpret_cast<Completion*>(uintptr_t(cqes[i]->user_data)), cqes[i]->res, cqes[i]->flags};
    }
    io_uring_cq_advance(&ring_, count);
    for (unsigned i = 0; i < count; ++i) {
      if (copies[i].completion != nullptr) {
        copies[i].completion->complete(copies[i].completion, copies[i].result, copies[i].flags);
      }
      if (answered_bytes_ >= kTurnBytes && i + 1 < count) {
        answered_bytes_ = 0;
        answering_->look();
      }
    }
    if (count < 64) return true;
  }
}

// Until something is there to be done, but not longer than poll_ns_ after `since_ns`. What is prepared goes to the kernel
// first. False: nothing came.
bool Worker::poll(uint64_t since_ns) {
  submit();
  uint64_t until = since_ns + poll_ns_;
  if (!timers_.empty()) until = std::min(until, timers_.front().when_ns);
  bool came = false;
  bool crowded = false;
  const uint64_t crowded_ns = std::max(kCrowdedNs, 2 * poll_ns_);
  for (uint64_t now = since_ns; !came && now < until;) {
    sched_yield();
    io_uring_get_events(&ring_);
    came = io_uring_cq_ready(&ring_) > 0 || inbox_filled_.load(std::memory_order_relaxed);
    const uint64_t before = now;
    now = boottime_ns();
    crowded = crowded || now - before > crowded_ns;
  }
  polling_.polled(crowded);
  return came;
}

// What is prepared goes to the kernel; comes back when something is there to be done.
void Worker::submit_and_wait() {
  bool sleep = tasks_.head == nullptr;
  if (sleep) {
    asleep_.store(true, std::memory_order_seq_cst);
    if (inbox_filled_.load(std::memory_order_seq_cst)) {
      asleep_.store(false, std::memory_order_seq_cst);
      sleep = false;
    }
  }
  __kernel_timespec timeout{};
  if (sleep && !timers_.empty()) {
    const uint64_t now = boottime_ns();
    const uint64_t wait = timers_.front().when_ns > now ? timers_.front().when_ns - now : 0;
    timeout.tv_sec = int64_t(wait / 1'000'000'000);
    timeout.tv_nsec = int64_t(wait % 1'000'000'000);
  }
  recall_late();
  if (!sleep) {
    // Deferred task work only runs when events are asked for.
    if (defer_taskrun_) {
      io_uring_submit_and_get_events(&ring_);
    } else {
      io_uring_submit(&ring_);
    }
  } else if (timers_.empty()) {
    io_uring_submit_and_wait(&ring_, 1);
  } else {
    io_uring_cqe* cqe = nullptr;
    io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &timeout, nullptr);
  }
  asleep_.store(false, std::memory_order_relaxed);
  forget_submitted();
}

void Worker::wait_and_reap() {
  arm_wake_poll();
  const bool asked = slots_in_use_ > 0 || answering_ != nullptr;
  const size_t most = std::max(most_in_use_, slots_in_use_);
  if (poll_ns_ == 0 || tasks_.head != nullptr || !asked || most > kPolledRequests) {
    submit_and_wait();
  } else {
    const auto wait = slots_in_use_ > 0 ? PollDecider::Wait::kDevice : PollDecider::Wait::kCaller;
    const uint64_t since = boottime_ns();
    if (!polling_.worthwhile(wait) || !poll(since)) submit_and_wait();
    polling_.waited(wait, boottime_ns() - since <= poll_ns_);
  }
  most_in_use_ = slots_in_use_;
  reap();
}

void Worker::run() {
  current_worker = this;
  Executor::set_current(this);
  for (;;) {
    take_inbox();
    if (stopping_ && tasks_.head == nullptr) break;
    run_timers();
    run_tasks();
    wait_and_reap();
  }
  Executor::set_current(nullptr);
  current_worker = nullptr;
}

Slot* Worker::take_slot(FuseChannel* waiter) {
  HF_ASSERT(current_worker == this);
  Slot* slot = free_slots_;
  if (slot == nullptr) {
    slot_waiters_.push_back(waiter);
    return nullptr;
  }
  free_slots_ = slot->next;
  slot->next = nullptr;
  // The new one may be given back at once, for want of a request.
  most_in_use_ = std::max(most_in_use_, slots_in_use_++);
  return slot;
}

void Worker::release_slot(Slot* slot) {
  HF_ASSERT(current_worker == this);
  slot->channel = nullptr;
  --slots_in_use_;
  slot->next = free_slots_;
  free_slots_ = slot;
  if (slot->resident > 0 && !trim_task_.armed) {
    trim_task_.armed = true;
    post_at(&trim_task_, boottime_ns() + kTrimAfterNs);
  }
  slot->released_ns = 0;
  if (!slot_waiters_.empty()) {
    FuseChannel* waiter = slot_waiters_.back();
    slot_waiters_.pop_back();
    waiter->resume();
  }
}

void Worker::forget_waiter(FuseChannel* waiter) {
  slot_waiters_.erase(std::remove(slot_waiters_.begin(), slot_waiters_.end(), waiter), slot_waiters_.end());
}

// Gives memory of buffers that were not used for a while back to the system. A slot is marked in one pass
// (released_ns) and trimmed in the next if nobody took it in between.
void Worker::trim_slots() {
  trim_task_.armed = false;
  const uint64_t now = boottime_ns();
  bool left = false;
  for (Slot* slot = free_slots_; slot != nullptr; slot = slot->next) {
    if (slot->resident == 0) continue;
    if (slot->released_ns == 0) {
      slot->released_ns = now;
      left = true;
    } else {
      madvise(slot->buffer, slot->resident, MADV_DONTNEED);
      slot->resident = 0;
      slot->released_ns = 0;
    }
  }
  if (left && !trim_task_.armed) {
    trim_task_.armed = true;
    post_at(&trim_task_, now + kTrimAfterNs);
  }
}

void run_on(Worker& worker, const std::function<void()>& function) {
  HF_ASSERT(Worker::current() == nullptr);
  struct Call : Task {
    const std::function<void()>* function = nullptr;
    std::promise<void> done;
  } call;
  call.function = &function;
  call.run = [](Task* self) {
    auto* me = static_cast<Call*>(self);
    (*me->function)();
    me->done.set_value();
  };
  worker.post(&call);
  call.done.get_future().wait();
}

}  // namespace holdfast
