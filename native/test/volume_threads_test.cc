// One volume, two executors on threads of their own, everything at once: for ThreadSanitizer, and for what each thread
// must still read back of its own blocks.
#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <future>
#include <thread>

#include "core/sim_disk.h"
#include "volume_fixture.h"

namespace holdfast::test {
namespace {

// A worker as the engine has it, without a ring: tasks and timers on one thread.
class ThreadExecutor final : public Executor {
 public:
  ThreadExecutor() : thread_([this] { run(); }) {}
  ~ThreadExecutor() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    ready_.notify_one();
    thread_.join();
  }
  void post(Task* task) override {
    std::lock_guard lock(mutex_);
    tasks_.push_back(task);
    ready_.notify_one();
  }
  uint64_t now_ns() const override {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
  }
  void post_at(Task* task, uint64_t when_ns) override {
    std::lock_guard lock(mutex_);
    timers_.emplace(when_ns, task);
    ready_.notify_one();
  }
  // Runs the function on the thread and waits for it.
  void call(std::function<void()> function) {
    struct Call : Task {
      std::function<void()> function;
      std::promise<void> done;
    } call;
    call.function = std::move(function);
    call.run = [](Task* task) {
      auto* self = static_cast<Call*>(task);
      self->function();
      self->done.set_value();
    };
    auto done = call.done.get_future();
    post(&call);
    done.wait();
  }

 private:
  void run() {
    Executor::set_current(this);
    for (;;) {
      std::unique_lock lock(mutex_);
      while (!timers_.empty() && (stopping_ || timers_.begin()->first <= now_ns())) {
        tasks_.push_back(timers_.begin()->second);
        timers_.erase(timers_.begin());
      }
      if (tasks_.empty()) {
        if (stopping_) return;
        ready_.wait_for(lock, std::chrono::milliseconds(timers_.empty() ? 1000 : 1));
        continue;
      }
      Task* task = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task->run(task);
    }
  }
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Task*> tasks_;
  std::multimap<uint64_t, Task*> timers_;
  bool stopping_ = false;
  std::thread thread_;
};

// Keeps `kDepth` requests going on its executor over its own blocks (every other one) until its count is used up.
class Client {
 public:
  static constexpr uint32_t kDepth = 8;
  Client(ThreadExecutor& executor, Volume& volume, uint32_t index, uint64_t blocks, uint64_t count)
      : executor_(executor), volume_(volume), index_(index), random_(index + 1), expected_(blocks, 0), left_(count) {}

  void start() {
    executor_.call([this] {
      for (Slot& slot : slots_) {
        slot.client = this;
        next(slot);
      }
    });
  }
  void wait() { done_.get_future().wait(); }
  uint64_t failures() const { return failures_; }

 private:
  struct Slot {
    VolumeRequest request;
    PageBuffer buffer{16 * kBlock};
    Client* client = nullptr;
    uint64_t block = 0;
    uint64_t value = 0;
  };

  void next(Slot& slot) {
    if (left_ == 0) {
      if (++idle_ == kDepth) done_.set_value();
      return;
    }
    left_--;
    // A block of ours that no other slot of ours is busy with.
    do {
      slot.block = random_.below(expected_.size() / 2) * 2 + index_;
    } while (busy_.count(slot.block) > 0);
    busy_.insert(slot.block);
    const uint64_t pick = random_.below(100);
    VolumeRequest& request = slot.request;
    request.fua = false;
    request.offset = slot.block * kBlock;
    request.length = kBlock;
    request.buffer = slot.buffer.data();
    if (pick < 45) {
      request.op = VolumeOp::kWrite;
      request.fua = pick < 2;
      slot.value = ++counter_ << 8 | index_;
      for (size_t i = 0; i < kBlock; i += 8) std::memcpy(slot.buffer.data() + i, &slot.value, 8);
    } else if (pick < 80) {
      request.op = VolumeOp::kRead;
    } else if (pick < 92) {
      request.op = pick < 86 ? VolumeOp::kDiscard : VolumeOp::kWriteZeroes;
      slot.value = 0;
    } else {
      request.op = VolumeOp::kFlush;
    }
    request.user = &slot;
    request.done = [](VolumeRequest* done, int error) {
      auto* self = static_cast<Slot*>(done->user);
      self->client->finished(*self, error);
    };
    volume_.submit(&request);
  }
  void finished(Slot& slot, int error) {
    if (Executor::current() != &executor_ || error != 0) failures_++;
    if (slot.request.op == VolumeOp::kRead) {
      uint64_t found;
      std::memcpy(&found, slot.buffer.data(), 8);
      if (found != expected_[slot.block]) failures_++;
    } else if (slot.request.op != VolumeOp::kFlush) {
      expected_[slot.block] = slot.value;
    }
    busy_.erase(slot.block);
    next(slot);
  }

  ThreadExecutor& executor_;
  Volume& volume_;
  const uint32_t index_;
  SimRandom random_;
  std::vector<uint64_t> expected_;
  std::set<uint64_t> busy_;
  std::array<Slot, kDepth> slots_;
  uint64_t left_;
  uint64_t counter_ = 0;
  uint32_t idle_ = 0;
  uint64_t failures_ = 0;
  std::promise<void> done_;
};

TEST(VolumeThreads, TwoExecutorsSubmitAtOnceAndEachReadsItsOwnBlocks) {
  constexpr uint64_t kBlocks = 2048;
  const format::Superblock superblock = small_superblock();
  MemoryDevice device(superblock.device_bytes);
  TestStock stock;
  stock.add(0, 200, 1);
  TestObserver observer;
  ArenaMemory memory(256 << 10);
  auto arena = memory.format(5, 1);
  VolumeSpec spec;
  spec.volume_id = 5;
  spec.size_bytes = kBlocks * kBlock;
  spec.epoch = 1;
  LayerSpec top;
  top.layer_id = 50;
  spec.layers.push_back(top);
  VolumeEnvironment environment;
  environment.device = &device;
  environment.pool = kPoolUuid;
  environment.superblock = &superblock;
  environment.stock = &stock;
  environment.observer = &observer;
  environment.arena = arena.get();
  environment.chunks_per_slab = 4;

  ThreadExecutor first;
  ThreadExecutor second;
  std::unique_ptr<Volume> volume;
  std::promise<Status> opened;
  first.call([&] {
    Volume::open(environment, spec, false, [&](Result<std::unique_ptr<Volume>> result) {
      if (result.ok()) volume = std::move(*result);
      opened.set_value(result.status);
    });
  });
  ASSERT_TRUE(opened.get_future().get().ok());
  {
    Client a(first, *volume, 0, kBlocks, 6000);
    Client b(second, *volume, 1, kBlocks, 6000);
    a.start();
    b.start();
    const uint64_t memory_seen = volume->stats().memory_bytes;  // from a third thread, in the middle of it
    EXPECT_GT(memory_seen, 0u);
    a.wait();
    b.wait();
    EXPECT_EQ(a.failures() + b.failures(), 0u);
    EXPECT_EQ(volume->stats().held, 0u);
  }
  std::promise<Status> closed;
  second.call([&] { volume->close([&](Status status) { closed.set_value(status); }); });
  const Status status = closed.get_future().get();
  EXPECT_TRUE(status.ok()) << status.message;
  volume.reset();
  EXPECT_TRUE(observer.events.empty());
}

// Each snapshot must show, for every block, a value that was its own at some time during the cut: the last one that had
// been acknowledged before it, or a later one.
TEST(VolumeThreads, CutsUnderTwoWritersLoseNothingAndTheirSnapshotsStand) {
  constexpr uint64_t kBlocks = 1024;
  const format::Superblock superblock = small_superblock();
  MemoryDevice device(superblock.device_bytes);
  TestStock stock;
  stock.add(0, 2000, 1);
  TestObserver observer;
  ArenaMemory memory(4 * kMiB);
  auto arena = memory.format(5, 1);
  VolumeSpec spec;
  spec.volume_id = 5;
  spec.size_bytes = kBlocks * kBlock;
  spec.epoch = 1;
  LayerSpec top;
  top.layer_id = 50;
  top.birth = 1;
  spec.layers.push_back(top);
  VolumeEnvironment environment;
  environment.device = &device;
  environment.pool = kPoolUuid;
  environment.superblock = &superblock;
  environment.stock = &stock;
  environment.observer = &observer;
  environment.arena = arena.get();
  environment.chunks_per_slab = 4;
  ThreadExecutor first;
  ThreadExecutor second;
  ThreadExecutor third;
  std::unique_ptr<Volume> volume;
  std::promise<Status> opened;
  first.call([&] {
    Volume::open(environment, spec, false, [&](Result<std::unique_ptr<Volume>> result) {
      if (result.ok()) volume = std::move(*result);
      opened.set_value(result.status);
    });
  });
  ASSERT_TRUE(opened.get_future().get().ok());
  constexpr int kCuts = 12;
  std::vector<LayerSpec> layers{top};
  {
    Client a(first, *volume, 0, kBlocks, 12'000);
    Client b(second, *volume, 1, kBlocks, 12'000);
    a.start();
    b.start();
    for (int i = 0; i < kCuts; i++) {
      LayerSpec next;
      next.layer_id = layers[0].layer_id + 1;
      next.slot = layers[0].slot + 1;
      next.parent_layer_id = layers[0].layer_id;
      next.birth = layers[0].birth + 1;
      std::promise<Result<CutReport>> cut;
      third.call([&] {
        volume->cut(next, {}, 60'000'000'000, [&](Result<CutReport> result) { cut.set_value(std::move(result)); });
      });
      Result<CutReport> report = cut.get_future().get();
      ASSERT_TRUE(report.ok()) << report.status.message;
      layers[0] = report->frozen;
      layers.insert(layers.begin(), next);
    }
    a.wait();
    b.wait();
    EXPECT_EQ(a.failures() + b.failures(), 0u);
  }
  // Values count up for each client, so of two snapshots the later one never shows an older value, but for discards.
  std::vector<uint64_t> before(kBlocks, 0);
  for (int i = kCuts; i >= 1; i--) {
    VolumeSpec view = spec;
    view.read_only = true;
    view.layers.assign(layers.begin() + i, layers.end());
    std::unique_ptr<Volume> reader;
    std::promise<Status> viewed;
    third.call([&] {
      Volume::open(environment, view, false, [&](Result<std::unique_ptr<Volume>> result) {
        if (result.ok()) reader = std::move(*result);
        viewed.set_value(result.status);
      });
    });
    const Status status = viewed.get_future().get();
    ASSERT_TRUE(status.ok()) << status.message;
    PageBuffer buffer(kBlocks * kBlock);
    VolumeRequest request;
    std::promise<int> read;
    request.op = VolumeOp::kRead;
    request.length = kBlocks * kBlock;
    request.buffer = buffer.data();
    request.user = &read;
    request.done = [](VolumeRequest* self, int error) { static_cast<std::promise<int>*>(self->user)->set_value(error); };
    third.call([&] { reader->submit(&request); });
    ASSERT_EQ(read.get_future().get(), 0);
    for (uint64_t block = 0; block < kBlocks; block++) {
      uint64_t value;
      std::memcpy(&value, buffer.data() + block * kBlock, sizeof value);
      if (value == 0) continue;
      EXPECT_EQ(value & 0xff, block % 2) << "block " << block << " shows the other client's";
      EXPECT_GE(value, before[block]) << "block " << block << " of a later snapshot is older";
      before[block] = value;
    }
    std::promise<void> stopped;
    third.call([&] { reader->abort([&](Status) { stopped.set_value(); }); });
    stopped.get_future().wait();
    reader.reset();
  }
  std::promise<Status> closed;
  second.call([&] { volume->close([&](Status status) { closed.set_value(status); }); });
  const Status status = closed.get_future().get();
  EXPECT_TRUE(status.ok()) << status.message;
  volume.reset();
}

// What each client reads must stay its own while blocks are copied up under it, and a cut comes into the middle of that.
TEST(VolumeThreads, CompactionUnderTwoWritersAndCutsLosesNothing) {
  constexpr uint64_t kBlocks = 1024;
  const format::Superblock superblock = small_superblock();
  MemoryDevice device(superblock.device_bytes);
  TestStock stock;
  stock.add(0, 4000, 1);
  TestObserver observer;
  ArenaMemory memory(4 * kMiB);
  auto arena = memory.format(5, 1);
  VolumeSpec spec;
  spec.volume_id = 5;
  spec.size_bytes = kBlocks * kBlock;
  spec.epoch = 1;
  LayerSpec top;
  top.layer_id = 50;
  top.birth = 1;
  spec.layers.push_back(top);
  VolumeEnvironment environment;
  environment.device = &device;
  environment.pool = kPoolUuid;
  environment.superblock = &superblock;
  environment.stock = &stock;
  environment.observer = &observer;
  environment.arena = arena.get();
  environment.chunks_per_slab = 4;
  ThreadExecutor first;
  ThreadExecutor second;
  ThreadExecutor third;
  ThreadExecutor fourth;
  std::unique_ptr<Volume> volume;
  std::promise<Status> opened;
  first.call([&] {
    Volume::open(environment, spec, false, [&](Result<std::unique_ptr<Volume>> result) {
      if (result.ok()) volume = std::move(*result);
      opened.set_value(result.status);
    });
  });
  ASSERT_TRUE(opened.get_future().get().ok());
  using Compacted = std::promise<Result<CompactReport>>;
  const auto compact = [&](ThreadExecutor& executor, Compacted& answer, std::vector<LayerSlabs> sources) {
    executor.call([&, sources = std::move(sources)] {
      volume->compact(sources, 1000, 0, [&](Result<CompactReport> result) { answer.set_value(std::move(result)); });
    });
  };
  std::vector<LayerSlabs> frozen;
  uint64_t moved = 0;
  {
    Client a(first, *volume, 0, kBlocks, 12'000);
    Client b(second, *volume, 1, kBlocks, 12'000);
    a.start();
    b.start();
    for (int i = 0; i < 10; i++) {
      Compacted early;
      compact(fourth, early, frozen);
      LayerSpec next;
      next.layer_id = top.layer_id + 1;
      next.slot = top.slot + 1;
      next.parent_layer_id = top.layer_id;
      next.birth = top.birth + 1;
      std::promise<Result<CutReport>> cut;
      third.call([&] {
        volume->cut(next, {}, 60'000'000'000, [&](Result<CutReport> result) { cut.set_value(std::move(result)); });
      });
      Result<CutReport> report = cut.get_future().get();
      ASSERT_TRUE(report.ok()) << report.status.message;
      Result<CompactReport> ended = early.get_future().get();
      ASSERT_TRUE(ended.ok()) << ended.status.message;
      frozen.insert(frozen.begin(), {report->frozen.layer_id, report->frozen.slabs});
      top = next;
      Compacted whole;
      compact(i % 2 == 0 ? third : first, whole, frozen);
      Result<CompactReport> done = whole.get_future().get();
      ASSERT_TRUE(done.ok()) << done.status.message;
      EXPECT_TRUE(done->complete);
      moved += ended->moved_blocks + done->moved_blocks;
    }
    a.wait();
    b.wait();
    EXPECT_EQ(a.failures() + b.failures(), 0u);
    EXPECT_GT(moved, 0u);
  }
  std::promise<Status> closed;
  second.call([&] { volume->close([&](Status status) { closed.set_value(status); }); });
  const Status status = closed.get_future().get();
  EXPECT_TRUE(status.ok()) << status.message;
  volume.reset();
  EXPECT_TRUE(observer.events.empty());
}

TEST(VolumeThreads, AbortInTheMiddleAnswersEveryRequestOnItsOwnThread) {
  const format::Superblock superblock = small_superblock();
  for (uint64_t round = 0; round < 20; round++) {
    MemoryDevice device(superblock.device_bytes);
    TestStock stock;
    stock.add(0, 3, 1);  // runs out: some are held
    TestObserver observer;
    ArenaMemory memory(64 << 10);
    auto arena = memory.format(5, 1);
    VolumeSpec spec;
    spec.volume_id = 5;
    spec.size_bytes = 64 * kMiB;
    spec.epoch = 1;
    LayerSpec top;
    top.layer_id = 50;
    spec.layers.push_back(top);
    VolumeEnvironment environment;
    environment.device = &device;
    environment.pool = kPoolUuid;
    environment.superblock = &superblock;
    environment.stock = &stock;
    environment.observer = &observer;
    environment.arena = arena.get();
    environment.chunks_per_slab = 4;
    ThreadExecutor executors[2];
    std::unique_ptr<Volume> volume;
    std::promise<Status> opened;
    executors[0].call([&] {
      Volume::open(environment, spec, false, [&](Result<std::unique_ptr<Volume>> result) {
        if (result.ok()) volume = std::move(*result);
        opened.set_value(result.status);
      });
    });
    ASSERT_TRUE(opened.get_future().get().ok());
    struct One {
      VolumeRequest request;
      PageBuffer buffer{kBlock};
      Executor* home = nullptr;
      std::atomic<uint64_t>* answered = nullptr;
      std::atomic<uint64_t>* wrong = nullptr;
    };
    std::atomic<uint64_t> answered{0};
    std::atomic<uint64_t> wrong{0};
    std::vector<std::unique_ptr<One>> all;
    for (uint64_t i = 0; i < 64; i++) {
      auto one = std::make_unique<One>();
      one->home = &executors[i % 2];
      one->answered = &answered;
      one->wrong = &wrong;
      one->request.op = VolumeOp::kWrite;
      one->request.offset = i * kChunk;
      one->request.length = kBlock;
      one->request.buffer = one->buffer.data();
      one->request.user = one.get();
      one->request.done = [](VolumeRequest* request, int error) {
        auto* self = static_cast<One*>(request->user);
        if (Executor::current() != self->home || (error != 0 && error != EIO)) (*self->wrong)++;
        (*self->answered)++;
      };
      all.push_back(std::move(one));
    }
    for (uint64_t half = 0; half < 2; half++) {
      executors[half].call([&, half] {
        for (uint64_t i = half; i < 64; i += 2) volume->submit(&all[i]->request);
      });
    }
    std::promise<void> stopped;
    executors[round % 2].call([&] { volume->abort([&](Status) { stopped.set_value(); }); });
    stopped.get_future().wait();
    while (answered.load() < 64) std::this_thread::yield();
    EXPECT_EQ(wrong.load(), 0u);
    volume.reset();
  }
}

}  // namespace
}  // namespace holdfast::test
