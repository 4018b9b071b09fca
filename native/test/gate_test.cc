// The gate: held past the deadline, refused when fenced or revoked, and "closed and zero in flight" as a proof. The
// last tests run it with real threads, for ThreadSanitizer and for the proof itself.
#include "core/gate.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "core/sync_device.h"
#include "pool_fixture.h"
#include "thread_executor.h"

namespace holdfast::test {
namespace {

// Keeps what it is given until the test finishes it.
class ParkingDevice final : public BlockDevice {
 public:
  uint64_t size_bytes() const override { return 1u << 30; }
  void submit(IoRequest* request) override { inside.push_back(request); }
  void finish(int error = 0) {
    IoRequest* request = inside.front();
    inside.pop_front();
    request->done(request, error);
  }
  std::deque<IoRequest*> inside;
};

struct Request : IoRequest {
  Request() {
    done = [](IoRequest* self, int result) {
      auto* request = static_cast<Request*>(self);
      request->runs++;
      request->error = result;
    };
  }
  int runs = 0;
  int error = -1;
};

class GateTest : public testing::Test {
 protected:
  ManualExecutor executor;
  PoolGate pool{[this] { return executor.now; }};
  ParkingDevice disk;
};

TEST_F(GateTest, LetsThroughBeforeTheDeadlineAndHoldsFromItOn) {
  VolumeGate volume(pool);
  GatedDevice device(disk, volume);
  Request a, b, c;
  device.submit(&a);
  EXPECT_TRUE(disk.inside.empty()) << "closed until the first renewal";
  EXPECT_EQ(volume.held(), 1u);
  pool.renew(2'000);
  EXPECT_TRUE(disk.inside.empty()) << "never from inside renew()";
  executor.run();
  EXPECT_EQ(disk.inside.size(), 1u);
  executor.now = 1'999;
  device.submit(&b);
  EXPECT_EQ(disk.inside.size(), 2u);
  EXPECT_EQ(pool.in_flight(), 2u);
  executor.now = 2'000;
  device.submit(&c);
  EXPECT_EQ(disk.inside.size(), 2u);
  disk.finish();
  disk.finish(ENOMEDIUM);
  EXPECT_EQ(a.error, 0);
  EXPECT_EQ(b.error, ENOMEDIUM);
  EXPECT_EQ(c.runs, 0);
  pool.renew(2'000);
  executor.run();
  EXPECT_EQ(volume.held(), 1u) << "an old deadline opens nothing";
  pool.renew(3'000);
  executor.run();
  disk.finish();
  EXPECT_EQ(c.runs, 1);
  EXPECT_EQ(pool.in_flight(), 0u);
}

TEST_F(GateTest, HeldRequestsGoOnInTheirOrder) {
  VolumeGate volume(pool);
  GatedDevice device(disk, volume);
  Request requests[5];
  for (Request& request : requests) device.submit(&request);
  EXPECT_EQ(volume.held(), 5u);
  pool.renew(9'000);
  executor.run();
  ASSERT_EQ(disk.inside.size(), 5u);
  for (Request& request : requests) {
    EXPECT_EQ(disk.inside.front(), &request);
    disk.finish();
  }
  EXPECT_EQ(volume.held(), 0u);
}

TEST_F(GateTest, FencedForGoodFailsWhatIsHeldAndWhatComesAndNeverOpensAgain) {
  VolumeGate volume(pool);
  GatedDevice device(disk, volume);
  Request held, inside, late;
  pool.renew(2'000);
  device.submit(&inside);
  executor.now = 2'000;
  device.submit(&held);
  pool.fence();
  EXPECT_EQ(held.runs, 0) << "on its executor, not here";
  executor.run();
  EXPECT_EQ(held.error, EIO);
  device.submit(&late);
  EXPECT_EQ(late.runs, 0) << "never from inside submit()";
  executor.run();
  EXPECT_EQ(late.error, EIO);
  pool.renew(100'000);
  executor.now = 3'000;
  Request never;
  device.submit(&never);
  executor.run();
  EXPECT_EQ(never.error, EIO);
  EXPECT_EQ(disk.inside.size(), 1u);
  bool idle = false;
  pool.when_idle([&] { idle = true; });
  EXPECT_FALSE(idle);
  disk.finish();
  EXPECT_TRUE(idle);
  EXPECT_EQ(inside.error, 0) << "what the disk says of what it had is passed on";
}

TEST_F(GateTest, ARevokedVolumeStopsAndTheOthersGoOn) {
  VolumeGate first(pool);
  VolumeGate second(pool);
  GatedDevice first_device(disk, first);
  GatedDevice second_device(disk, second);
  pool.renew(9'000);
  Request a, b, c;
  first_device.submit(&a);
  second_device.submit(&b);
  first.revoke();
  int idle = 0;
  first.when_idle([&] { idle++; });
  EXPECT_EQ(idle, 0);
  disk.finish();
  EXPECT_EQ(idle, 1) << "the other volume's I/O does not count";
  first_device.submit(&c);
  executor.run();
  EXPECT_EQ(c.error, EIO);
  EXPECT_EQ(disk.inside.size(), 1u);
  disk.finish();
  EXPECT_EQ(b.error, 0);
  EXPECT_EQ(idle, 1);
}

TEST_F(GateTest, ARequestParkedByTheLeaseFailsWhenItsVolumeIsRevoked) {
  VolumeGate volume(pool);
  GatedDevice device(disk, volume);
  Request held;
  device.submit(&held);
  volume.revoke();
  executor.run();
  EXPECT_EQ(held.error, EIO);
  EXPECT_EQ(volume.in_flight(), 0u);
}

TEST_F(GateTest, AReleasedRequestThatIsLateAgainIsHeldAgain) {
  VolumeGate volume(pool);
  GatedDevice device(disk, volume);
  Request request;
  device.submit(&request);
  pool.renew(2'000);
  executor.now = 5'000;  // the executor was slow
  executor.run();
  EXPECT_EQ(volume.held(), 1u);
  EXPECT_TRUE(disk.inside.empty());
  pool.renew(9'000);
  executor.run();
  disk.finish();
  EXPECT_EQ(request.runs, 1);
}

TEST_F(GateTest, HoldClosesUntilTheNextRenewal) {
  VolumeGate volume(pool);
  GatedDevice device(disk, volume);
  pool.renew(9'000);
  pool.hold();
  Request request;
  device.submit(&request);
  EXPECT_TRUE(disk.inside.empty());
  pool.renew(9'000);
  executor.run();
  disk.finish();
  EXPECT_EQ(request.error, 0);
}

TEST_F(GateTest, ControlWritesNeedTheLeaseAndAreCounted) {
  MemoryDisk memory(1u << 20);
  GatedSyncDevice device(memory, pool);
  PageBuffer page(4096);
  EXPECT_TRUE(has_code(device.write_durable(0, page.data(), 4096), Code::kLeaseExpired));
  EXPECT_OK(device.read(0, page.data(), 4096));
  pool.renew(9'000);
  uint64_t seen = 0;
  memory.set_faults([&](MemoryDisk::Op, uint64_t, uint64_t) {
    seen = pool.in_flight();
    return MemoryDisk::Fault::kNone;
  });
  EXPECT_OK(device.write_durable(0, page.data(), 4096));
  EXPECT_EQ(seen, 1u);
  EXPECT_EQ(pool.in_flight(), 0u);
  EXPECT_OK(device.write(0, page.data(), 4096));
  EXPECT_OK(device.flush());
  EXPECT_OK(device.discard(0, 4096));
  EXPECT_OK(device.zero(0, 4096));
  pool.fence();
  EXPECT_TRUE(has_code(device.write(0, page.data(), 4096), Code::kFenced));
  EXPECT_TRUE(has_code(device.flush(), Code::kFenced));
  EXPECT_TRUE(has_code(device.discard(0, 4096), Code::kFenced));
  EXPECT_TRUE(has_code(device.zero(0, 4096), Code::kFenced));
}

TEST_F(GateTest, WaitingForIdleTakesEveryVolumeAndEveryControlWrite) {
  auto volume = std::make_unique<VolumeGate>(pool);
  GatedDevice device(disk, *volume);
  pool.renew(9'000);
  Request request;
  device.submit(&request);
  auto guard = std::make_unique<PoolGate::Guard>(pool);
  pool.fence();
  EXPECT_FALSE(pool.wait_idle(10));
  disk.finish();
  EXPECT_FALSE(pool.wait_idle(10));
  guard.reset();
  EXPECT_TRUE(pool.wait_idle(10));
  int times = 0;
  pool.when_idle([&] {
    times++;
    EXPECT_EQ(pool.in_flight(), 0u) << "may call back into the gate";
  });
  EXPECT_EQ(times, 1);
}

// ---- Real threads.

// A disk that says at each moment whether anything is at it, and that finishes on the submitting executor.
class CountingDevice final : public BlockDevice {
 public:
  uint64_t size_bytes() const override { return 1u << 30; }
  void submit(IoRequest* request) override {
    at_disk.fetch_add(1);
    submitted.fetch_add(1);
    if (closed.load()) after_proof.fetch_add(1);
    auto* completion = new (request->device_scratch) Completion;
    completion->disk = this;
    completion->request = request;
    completion->run = [](Task* self) {
      const Completion finished = *static_cast<Completion*>(self);
      finished.disk->at_disk.fetch_sub(1);
      finished.request->done(finished.request, 0);
    };
    Executor::current()->post(completion);
  }
  struct Completion : Task {
    CountingDevice* disk;
    IoRequest* request;
  };
  static_assert(sizeof(Completion) <= sizeof(IoRequest::device_scratch));
  std::atomic<uint64_t> at_disk{0};
  std::atomic<uint64_t> submitted{0};
  std::atomic<uint64_t> after_proof{0};  // submitted although the proof was given
  std::atomic<bool> closed{false};
};

// Submits again and again from its executor's thread until it gets EIO.
struct Runner : Task {
  Runner(ThreadExecutor& on, GatedDevice& to) : executor(on), device(to) {
    run = [](Task* self) { static_cast<Runner*>(self)->device.submit(&static_cast<Runner*>(self)->request); };
    request.user = this;
    request.done = [](IoRequest* io, int error) {
      auto* runner = static_cast<Runner*>(io->user);
      if (error == 0) {
        runner->completed.fetch_add(1);
        runner->executor.post(runner);
      } else {
        HF_ASSERT(error == EIO);
        runner->ended.store(true);
      }
    };
  }
  ThreadExecutor& executor;
  GatedDevice& device;
  IoRequest request;
  std::atomic<uint64_t> completed{0};
  std::atomic<bool> ended{false};
};

void wait_until(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST(GateThreads, ClosedAndZeroInFlightMeansThatNothingComesAfter) {
  for (int round = 0; round < 40; round++) {
    CountingDevice disk;
    PoolGate pool(boottime_ns);
    std::vector<std::unique_ptr<ThreadExecutor>> executors;
    for (int i = 0; i < 3; i++) executors.push_back(std::make_unique<ThreadExecutor>());
    VolumeGate volume(pool);
    VolumeGate other(pool);
    GatedDevice device(disk, volume);
    GatedDevice other_device(disk, other);
    std::vector<std::unique_ptr<Runner>> runners;
    for (size_t i = 0; i < 12; i++) {
      runners.push_back(std::make_unique<Runner>(*executors[i % 3], i % 2 == 0 ? device : other_device));
    }
    pool.renew(boottime_ns() + 3'600'000'000'000);
    for (auto& runner : runners) runner->executor.post(runner.get());
    wait_until([&] { return disk.submitted.load() > 100; });
    const bool whole_pool = round % 2 == 0;
    std::atomic<bool> idle{false};
    const auto proof = [&] {
      if (whole_pool) {
        EXPECT_EQ(disk.at_disk.load(), 0u);
        disk.closed.store(true);
      }
      idle.store(true);
    };
    if (whole_pool) {
      pool.fence();
      pool.when_idle(proof);
    } else {
      volume.revoke();
      volume.when_idle(proof);
    }
    wait_until([&] { return idle.load(); });
    if (!whole_pool) {
      const uint64_t before = runners[1]->completed.load();
      wait_until([&] { return runners[1]->completed.load() > before; });
      pool.fence();
    }
    for (auto& runner : runners) wait_until([&] { return runner->ended.load(); });
    EXPECT_TRUE(pool.wait_idle(10'000));
    EXPECT_EQ(disk.after_proof.load(), 0u);
    executors.clear();
  }
}

TEST(GateThreads, ALeaseThatComesAndGoesLosesNoRequestAndRunsNoneTwice) {
  CountingDevice disk;
  PoolGate pool(boottime_ns);
  std::vector<std::unique_ptr<ThreadExecutor>> executors;
  for (int i = 0; i < 3; i++) executors.push_back(std::make_unique<ThreadExecutor>());
  auto volume = std::make_unique<VolumeGate>(pool);
  GatedDevice device(disk, *volume);
  std::vector<std::unique_ptr<Runner>> runners;
  for (size_t i = 0; i < 9; i++) runners.push_back(std::make_unique<Runner>(*executors[i % 3], device));
  for (auto& runner : runners) runner->executor.post(runner.get());
  for (int i = 0; i < 200; i++) {
    pool.renew(boottime_ns() + 300'000);  // shorter than the pause: it runs out by itself every time
    std::this_thread::sleep_for(std::chrono::microseconds(600));
    if (i % 7 == 0) pool.hold();
  }
  // All of them still go round.
  std::vector<uint64_t> before;
  for (auto& runner : runners) before.push_back(runner->completed.load());
  pool.renew(boottime_ns() + 3'600'000'000'000);
  for (size_t i = 0; i < runners.size(); i++) {
    wait_until([&] { return runners[i]->completed.load() > before[i]; });
  }
  volume->revoke();
  for (auto& runner : runners) wait_until([&] { return runner->ended.load(); });
  uint64_t completed = 0;
  for (auto& runner : runners) completed += runner->completed.load();
  EXPECT_TRUE(volume->wait_idle(10'000));
  EXPECT_EQ(disk.submitted.load(), completed);
  EXPECT_EQ(volume->held(), 0u);
  executors.clear();
}

TEST(GateThreads, ControlWritesFromManyThreadsAreAllOverWhenTheFenceSaysSo) {
  PoolGate pool(boottime_ns);
  MemoryDisk memory(1u << 20);
  GatedSyncDevice device(memory, pool);
  pool.renew(boottime_ns() + 3'600'000'000'000);
  std::atomic<bool> closed{false};
  std::atomic<int> late{0};
  memory.set_faults([&](MemoryDisk::Op, uint64_t, uint64_t) {
    if (closed.load()) late.fetch_add(1);
    return MemoryDisk::Fault::kNone;
  });
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 3; i++) {
    threads.emplace_back([&device, i] {
      PageBuffer page(4096);
      while (device.write(i * 4096, page.data(), 4096).ok()) {
      }
    });
  }
  wait_until([&] { return memory.operations(MemoryDisk::Op::kWrite) > 1'000; });
  pool.fence();
  EXPECT_TRUE(pool.wait_idle(10'000));
  closed.store(true);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(late.load(), 0);
}

}  // namespace
}  // namespace holdfast::test
