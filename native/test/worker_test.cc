// Workers with real threads and real io_uring on an image file: what the thread sanitizer is to look at. Every test
// hands memory from thread to thread and back.
#include "io/worker.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <string>
#include <thread>

#include "core/pages.h"
#include "io/poll_decider.h"
#include "io/uring_device.h"
#include "thread_executor.h"

namespace holdfast::test {
namespace {

constexpr uint64_t kBlock = format::kBlockSize;
constexpr uint64_t kMillisecond = 1'000'000;

std::unique_ptr<Worker> start_worker(unsigned index = 0) {
  Result<std::unique_ptr<Worker>> worker = Worker::start(index);
  if (!worker.ok()) ADD_FAILURE() << worker.status.message;
  return worker.ok() ? std::move(*worker) : nullptr;
}

// An unlinked image file, opened for direct I/O.
class ImageFile {
 public:
  explicit ImageFile(uint64_t bytes) : bytes_(bytes) {
    std::string path = (std::filesystem::temp_directory_path() / "holdfast-worker-XXXXXX").string();
    const int made = ::mkstemp(path.data());
    HF_ASSERT(made >= 0 && ::ftruncate(made, static_cast<off_t>(bytes)) == 0);
    fd_ = ::open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
    ::close(made);
    ::unlink(path.c_str());
    HF_ASSERT(fd_ >= 0);
  }
  ~ImageFile() { ::close(fd_); }
  ImageFile(const ImageFile&) = delete;
  ImageFile& operator=(const ImageFile&) = delete;
  int fd() const { return fd_; }
  uint64_t bytes() const { return bytes_; }
  int first_byte(uint64_t offset) const {
    PageBuffer page(kBlock);
    HF_ASSERT(::pread(fd_, page.data(), kBlock, static_cast<off_t>(offset)) == static_cast<ssize_t>(kBlock));
    return std::to_integer<int>(page.data()[0]);
  }

 private:
  uint64_t bytes_;
  int fd_ = -1;
};

// One block's I/O; the thread that waits for the answer is not the one that it runs on.
struct BlockIo {
  IoRequest io;
  iovec iov{};
  PageBuffer buffer{kBlock};
  std::promise<int> answer;

  BlockIo(IoOp op, uint64_t offset, int fill = 0) {
    std::memset(buffer.data(), fill, kBlock);
    iov = {buffer.data(), kBlock};
    io.op = op;
    io.offset = offset;
    io.length = kBlock;
    io.iov = &iov;
    io.iov_count = 1;
    io.user = this;
    io.done = [](IoRequest* request, int error) { static_cast<BlockIo*>(request->user)->answer.set_value(error); };
  }
  int first_byte() const { return std::to_integer<int>(buffer.data()[0]); }
};

TEST(Worker, ATaskPostedFromAnyThreadRunsOnceAndOnTheWorker) {
  constexpr int kThreads = 4;
  constexpr int kTasks = 300;
  struct Counted : Task {
    Worker* worker = nullptr;
    int runs = 0;  // the worker's alone
    std::atomic<int>* left = nullptr;
    std::promise<void>* all = nullptr;
  };
  std::array<std::unique_ptr<Worker>, 2> workers = {start_worker(0), start_worker(1)};
  ASSERT_TRUE(workers[0] != nullptr && workers[1] != nullptr);
  std::vector<Counted> tasks(size_t{kThreads} * kTasks);
  std::atomic<int> left{kThreads * kTasks};
  std::promise<void> all;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; t++) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kTasks; i++) {
        Counted& task = tasks[static_cast<size_t>(t * kTasks + i)];
        task.worker = workers[static_cast<size_t>(i % 2)].get();
        task.left = &left;
        task.all = &all;
        task.run = [](Task* self) {
          auto* counted = static_cast<Counted*>(self);
          EXPECT_EQ(Worker::current(), counted->worker);
          EXPECT_EQ(Executor::current(), counted->worker);
          counted->runs++;
          if (counted->left->fetch_sub(1) == 1) counted->all->set_value();
        };
        task.worker->post(&task);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  all.get_future().wait();
  for (auto& worker : workers) worker.reset();
  for (const Counted& task : tasks) EXPECT_EQ(task.runs, 1);
}

TEST(Worker, TimersComeInTheirOrderAndNeverEarly) {
  auto worker = start_worker();
  ASSERT_TRUE(worker);
  struct Timed : Task {
    uint64_t when = 0;
    std::vector<const Timed*>* order = nullptr;
    bool early = false;
    std::promise<void>* last = nullptr;
  };
  std::array<Timed, 8> timers;
  std::vector<const Timed*> order;
  std::promise<void> last;
  const uint64_t begun = boottime_ns();
  for (size_t i = 0; i < timers.size(); i++) {
    // Longest first.
    Timed& timer = timers[i];
    timer.when = begun + (timers.size() - i) * 5 * kMillisecond;
    timer.order = &order;
    timer.last = i == 0 ? &last : nullptr;
    timer.run = [](Task* self) {
      auto* timed = static_cast<Timed*>(self);
      timed->early = boottime_ns() < timed->when;
      timed->order->push_back(timed);
      if (timed->last != nullptr) timed->last->set_value();
    };
  }
  // Half of them come from the worker itself, in a task that goes on until every timer is posted: those that are due by then come in their order too.
  struct Held : Task {
    std::array<Timed, 8>* timers = nullptr;
    Worker* worker = nullptr;
    std::promise<void> rest_posted;
  } held;
  held.timers = &timers;
  held.worker = worker.get();
  held.run = [](Task* self) {
    auto* me = static_cast<Held*>(self);
    for (size_t i = 1; i < me->timers->size(); i += 2) me->worker->post_at(&(*me->timers)[i], (*me->timers)[i].when);
    me->rest_posted.get_future().wait();
  };
  worker->post(&held);
  for (size_t i = 0; i < timers.size(); i += 2) worker->post_at(&timers[i], timers[i].when);
  held.rest_posted.set_value();
  last.get_future().wait();
  worker.reset();
  ASSERT_EQ(order.size(), timers.size());
  for (size_t i = 0; i < order.size(); i++) {
    EXPECT_FALSE(order[i]->early);
    if (i > 0) {
      EXPECT_GT(order[i]->when, order[i - 1]->when);
    }
  }
}

TEST(Worker, RunOnIsOverWhenItReturns) {
  auto worker = start_worker();
  ASSERT_TRUE(worker);
  int count = 0;
  for (int i = 0; i < 500; i++) run_on(*worker, [&] { count++; });
  EXPECT_EQ(count, 500);
}

// A long turn hands over what it has: the device need not wait for the turn's end.
TEST(Worker, WhatIsSubmittedInATurnIsAtWorkBeforeTheTurnEnds) {
  auto worker = start_worker();
  ASSERT_TRUE(worker);
  int pipe[2];
  ASSERT_EQ(pipe2(pipe, O_CLOEXEC), 0);
  struct Written : Completion {
    std::promise<int> result;
  } written;
  written.complete = [](Completion* self, int result, uint32_t) { static_cast<Written*>(self)->result.set_value(result); };
  const auto arrived = [&] {
    pollfd one{pipe[0], POLLIN, 0};
    return ::poll(&one, 1, 0) == 1;
  };
  bool before = true;
  bool after = false;
  run_on(*worker, [&] {
    io_uring_prep_write(worker->sqe(&written), pipe[1], "x", 1, 0);
    before = arrived();
    worker->submit();
    after = arrived();
  });
  EXPECT_FALSE(before);
  EXPECT_TRUE(after);
  EXPECT_EQ(written.result.get_future().get(), 1);
  ::close(pipe[0]);
  ::close(pipe[1]);
}

TEST(UringDevice, WhatOneWorkerWroteAnotherReads) {
  constexpr uint64_t kBlocks = 64;
  ImageFile file(kBlocks * kBlock);
  std::array<std::unique_ptr<Worker>, 2> workers = {start_worker(0), start_worker(1)};
  ASSERT_TRUE(workers[0] != nullptr && workers[1] != nullptr);
  UringDevice device(file.fd(), file.bytes());
  for (size_t writer = 0; writer < 2; writer++) {
    std::vector<std::unique_ptr<BlockIo>> writes;
    for (uint64_t b = 0; b < kBlocks; b++) {
      writes.push_back(std::make_unique<BlockIo>(IoOp::kWrite, b * kBlock, static_cast<int>(1 + b + writer * 100)));
      writes.back()->io.fua = b % 8 == 0;
    }
    run_on(*workers[writer], [&] {
      for (auto& write : writes) device.submit(&write->io);
    });
    for (auto& write : writes) EXPECT_EQ(write->answer.get_future().get(), 0);
    std::vector<std::unique_ptr<BlockIo>> reads;
    for (uint64_t b = 0; b < kBlocks; b++) reads.push_back(std::make_unique<BlockIo>(IoOp::kRead, b * kBlock));
    run_on(*workers[1 - writer], [&] {
      for (auto& read : reads) device.submit(&read->io);
    });
    for (uint64_t b = 0; b < kBlocks; b++) {
      EXPECT_EQ(reads[b]->answer.get_future().get(), 0);
      EXPECT_EQ(reads[b]->first_byte(), static_cast<int>(1 + b + writer * 100));
    }
  }
  BlockIo past(IoOp::kRead, kBlocks * kBlock);
  run_on(*workers[0], [&] { device.submit(&past.io); });
  EXPECT_EQ(past.answer.get_future().get(), EIO);
}

// The thread may have been stopped since it prepared the write: what counts is the gate when the kernel gets it.
TEST(UringDevice, AWriteWhoseGateHasClosedWaitsUntilItOpens) {
  ImageFile file(kBlock);
  auto worker = start_worker();
  ASSERT_TRUE(worker);
  PoolGate gate([] { return boottime_ns(); });
  UringDevice device(file.fd(), file.bytes());
  device.set_gate(&gate);
  BlockIo write(IoOp::kWrite, 0, 7);
  std::future<int> answer = write.answer.get_future();
  gate.renew(boottime_ns() + kMillisecond);
  run_on(*worker, [&] {
    device.submit(&write.io);
    while (gate.open_at(boottime_ns())) {
    }
    worker->submit();  // in the middle of a turn it is looked at as at its end
  });
  EXPECT_EQ(answer.wait_for(std::chrono::milliseconds(100)), std::future_status::timeout);
  EXPECT_EQ(file.first_byte(0), 0);
  gate.renew(boottime_ns() + 60'000 * kMillisecond);
  EXPECT_EQ(answer.get(), 0);
  EXPECT_EQ(file.first_byte(0), 7);
}

TEST(UringDevice, AWriteWhoseGateIsFencedFailsAndReachesNoDisk) {
  ImageFile file(kBlock);
  auto worker = start_worker();
  ASSERT_TRUE(worker);
  PoolGate gate([] { return boottime_ns(); });
  UringDevice device(file.fd(), file.bytes());
  device.set_gate(&gate);
  gate.renew(boottime_ns() + 60'000 * kMillisecond);
  BlockIo write(IoOp::kWrite, 0, 7);
  run_on(*worker, [&] {
    device.submit(&write.io);
    gate.fence();
  });
  EXPECT_EQ(write.answer.get_future().get(), EIO);
  EXPECT_EQ(file.first_byte(0), 0);
}

TEST(PollDecider, PollsOnceMostWaitsWereBriefAndNoLongerWhenAThirdAreNot) {
  using Wait = PollDecider::Wait;
  PollDecider one;
  const auto wait = [&](int times, bool brief) {
    for (int i = 0; i < times; i++) one.waited(Wait::kDevice, brief);
    return one.worthwhile(Wait::kDevice);
  };
  EXPECT_FALSE(wait(3, true));
  EXPECT_TRUE(wait(1, true));
  EXPECT_FALSE(one.worthwhile(Wait::kCaller));
  // One long wait among many brief ones changes nothing,
  EXPECT_TRUE(wait(100, true));
  EXPECT_TRUE(wait(1, false));
  // long ones alone end it at once, and it takes no longer to come back the more of them there were.
  EXPECT_FALSE(wait(100, false));
  EXPECT_TRUE(wait(4, true));
  // Every second one long: never, in the long run.
  for (int i = 0; i < 100; i++) one.waited(Wait::kDevice, i % 2 == 0);
  EXPECT_FALSE(one.worthwhile(Wait::kDevice));
}

TEST(PollDecider, RestsForLongerEachTimeThatTheCpuIsCrowded) {
  constexpr auto kWait = PollDecider::Wait::kCaller;
  PollDecider one;
  const auto rest = [&] {
    uint32_t waits = 0;
    for (; !one.worthwhile(kWait); waits++) one.waited(kWait, true);
    return waits;
  };
  rest();
  uint32_t expected = PollDecider::kFirstRest;
  for (int i = 0; i < 20; i++) {
    one.polled(true);
    EXPECT_EQ(rest(), expected);
    expected = std::min(expected * 2, PollDecider::kLongestRest);
  }
  // Until it has polled undisturbed for long enough.
  for (uint32_t i = 1; i < PollDecider::kGoodPolls; i++) one.polled(false);
  one.polled(true);
  EXPECT_EQ(rest(), PollDecider::kLongestRest);
  for (uint32_t i = 0; i < PollDecider::kGoodPolls; i++) one.polled(false);
  EXPECT_TRUE(one.worthwhile(kWait));
  one.polled(true);
  EXPECT_EQ(rest(), PollDecider::kFirstRest);
}

}  // namespace
}  // namespace holdfast::test
