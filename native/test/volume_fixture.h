// What the volume's tests share: a small pool on a device in memory, a stock of slabs, and calls that wait.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/delay_device.h"
#include "core/error_device.h"
#include "core/memory_device.h"
#include "core/page_arena.h"
#include "core/pages.h"
#include "core/sim_disk.h"
#include "core/sim_executor.h"
#include "core/volume.h"

namespace holdfast::test {

inline constexpr uint64_t kMiB = uint64_t{1} << 20;
inline constexpr uint64_t kChunk = format::kChunkSize;
inline constexpr uint64_t kBlock = format::kBlockSize;
inline const format::Uuid kPoolUuid = {7, 7, 7};

// Geometry as pool format makes it, small tables. The device is as large as it says, but sparse.
inline format::Superblock small_superblock(uint64_t slabs = 4096) {
  format::Superblock s{};
  s.block_size = format::kBlockSize;
  s.chunk_size = format::kChunkSize;
  s.slab_size = format::kSlabSize;
  s.slabs_per_region = format::kSlabsPerRegion;
  s.region_stride = format::kRegionStride;
  s.volume_table_offset = 8 * kMiB;
  s.volume_slots = 64;
  s.layer_table_offset = 9 * kMiB;
  s.layer_slots = 64;
  s.first_region_offset = 16 * kMiB;
  s.slab_count = slabs;
  s.device_bytes = s.first_region_offset + (slabs / format::kSlabsPerRegion + 1) * format::kRegionStride;
  return s;
}

class TestStock final : public SlabStock {
 public:
  bool take(uint64_t near, Slab* out, Task* waiter, Executor* executor) override {
    std::lock_guard lock(mutex_);
    if (slabs_.empty()) {
      if (waiter != nullptr) waiters_.push_back({waiter, executor});
      return false;
    }
    auto at = slabs_.upper_bound(near);
    if (at == slabs_.end()) at = slabs_.begin();
    *out = {at->first, at->second};
    slabs_.erase(at);
    return true;
  }
  bool cancel(Task* waiter) override {
    std::lock_guard lock(mutex_);
    for (auto at = waiters_.begin(); at != waiters_.end(); ++at) {
      if (at->task != waiter) continue;
      waiters_.erase(at);
      return true;
    }
    return false;
  }
  void put_back(Slab slab) override {
    std::lock_guard lock(mutex_);
    slabs_[slab.slab] = slab.generation;
  }
  bool known_full() const override {
    std::lock_guard lock(mutex_);
    return full_;
  }
  void add(uint64_t first, uint64_t count, uint64_t generation) {
    std::lock_guard lock(mutex_);
    for (uint64_t i = 0; i < count; i++) slabs_[first + i] = generation;
    full_ = false;
    wake();
  }
  void declare_full() {
    std::lock_guard lock(mutex_);
    full_ = true;
    wake();
  }
  size_t size() const {
    std::lock_guard lock(mutex_);
    return slabs_.size();
  }
  size_t waiters() const {
    std::lock_guard lock(mutex_);
    return waiters_.size();
  }
  std::map<uint64_t, uint64_t> slabs() const { return slabs_; }
  void clear() {
    std::lock_guard lock(mutex_);
    slabs_.clear();
    waiters_.clear();
    full_ = false;
  }

 private:
  struct Waiter {
    Task* task;
    Executor* executor;
  };
  void wake() {
    std::vector<Waiter> waiters;
    waiters.swap(waiters_);
    for (const Waiter& one : waiters) one.executor->post(one.task);
  }
  mutable std::mutex mutex_;
  std::map<uint64_t, uint64_t> slabs_;
  std::vector<Waiter> waiters_;
  bool full_ = false;
};

struct TestObserver final : VolumeObserver {
  struct Claimed {
    uint64_t layer;
    uint64_t slab;
    uint64_t generation;
  };
  void slab_claimed(uint64_t, uint64_t layer, uint64_t slab, uint64_t generation) override {
    std::lock_guard lock(mutex);
    claimed.push_back({layer, slab, generation});
  }
  void slab_emptied(uint64_t, uint64_t layer, uint64_t slab, uint64_t generation) override {
    std::lock_guard lock(mutex);
    emptied.push_back({layer, slab, generation});
  }
  void volume_event(uint64_t, Code code, const std::string& message) override {
    std::lock_guard lock(mutex);
    events.push_back({code, message});
  }
  bool has_event(const std::string& part) const {
    for (const auto& [code, message] : events) {
      if (message.find(part) != std::string::npos) return true;
    }
    return false;
  }
  std::mutex mutex;
  std::vector<Claimed> claimed;
  std::vector<Claimed> emptied;
  std::vector<std::pair<Code, std::string>> events;
};

// Memory that stands for the memfd: it stays when the engine "dies".
class ArenaMemory {
 public:
  explicit ArenaMemory(size_t bytes = 4 * kMiB) : buffer_(bytes) {}
  std::unique_ptr<PageArena> format(uint64_t volume_id, uint64_t epoch) {
    auto arena = PageArena::format(buffer_.data(), buffer_.size(), volume_id, epoch);
    HF_ASSERT(arena.ok());
    return std::move(*arena);
  }
  std::unique_ptr<PageArena> attach() {
    auto arena = PageArena::attach(buffer_.data(), buffer_.size());
    HF_ASSERT(arena.ok());
    return std::move(*arena);
  }
  std::byte* data() { return buffer_.data(); }
  size_t size() const { return buffer_.size(); }

 private:
  PageBuffer buffer_;
};

// One volume on one pool. Everything runs when the test says so.
class Bench {
 public:
  // With a seed: on a disk that forgets; else on memory that never does.
  explicit Bench(uint64_t size_bytes = 64 * kMiB, uint64_t stock_slabs = 64, uint64_t seed = 0)
      : superblock(small_superblock()),
        memory(superblock.device_bytes),
        sim(superblock.device_bytes, seed,
            [this](uint64_t block) {
              return block * kBlock < superblock.first_region_offset + format::kRegionPagesSize;
            }),
        on_sim(seed != 0),
        errors(seed != 0 ? static_cast<BlockDevice&>(sim) : memory),
        device(errors) {
    stock.add(0, stock_slabs, 1);
    spec.volume_id = 5;
    spec.slot = 3;
    spec.name = "test";
    spec.size_bytes = size_bytes;
    spec.epoch = 1;
    spec.host_id = 2;
    spec.generation = 1;
    LayerSpec top;
    top.layer_id = 50;
    top.slot = 4;
    top.birth = 1;
    top.size_bytes = size_bytes;
    spec.layers.push_back(top);
  }
  ~Bench() { drive(); }

  // Until nothing moves any more but what a test holds back.
  void drive() {
    for (;;) {
      executor.run_until_idle();
      if (!on_sim || sim.in_flight() == 0) return;
      sim.complete_one();
    }
  }
  void raw_read(uint64_t offset, void* to, size_t length) const {
    if (on_sim) sim.peek(offset, to, length);
    else memory.read(offset, to, length);
  }
  void raw_write(uint64_t offset, const void* from, size_t length) {
    if (on_sim) sim.poke(offset, from, length);
    else memory.write(offset, from, length);
  }

  VolumeEnvironment environment() {
    VolumeEnvironment e;
    e.device = &device;
    e.pool = kPoolUuid;
    e.superblock = &superblock;
    e.stock = &stock;
    e.observer = &observer;
    e.arena = arena.get();
    e.full_timeout_ns = 60'000'000'000;
    e.chunks_per_slab = chunks_per_slab;
    return e;
  }

  Status open(bool taking_over = false) {
    if (!spec.read_only) {
      arena = taking_over ? arena_memory.attach() : arena_memory.format(spec.volume_id, spec.epoch);
    }
    Status status{Code::kUnavailable, "open() never answered"};
    Volume::open(environment(), spec, taking_over, [&](Result<std::unique_ptr<Volume>> result) {
      status = result.status;
      if (result.ok()) volume = std::move(*result);
    });
    drive();
    return status;
  }
  // As after a clean close, a crash, or a move: the next grant, with what the observer has reported.
  void next_grant() {
    spec.epoch++;
    take_reports();
  }
  void take_reports() {
    auto& slabs = spec.layers[0].slabs;
    for (const auto& one : observer.claimed) {
      std::erase_if(slabs, [&](const SlabRun& run) { return run.first == one.slab && run.count == 1; });
      slabs.push_back({one.slab, 1, one.generation});
    }
    for (const auto& one : observer.emptied) {
      std::erase_if(slabs,
                    [&](const SlabRun& run) { return run.first == one.slab && run.generation == one.generation; });
    }
    observer.claimed.clear();
    observer.emptied.clear();
  }
  // The process is gone; the device has finished what it had; the arena's memory stays as it was.
  void kill() {
    drive();
    std::vector<std::byte> memory_then(arena_memory.data(), arena_memory.data() + arena_memory.size());
    if (on_sim) sim.kill();
    EXPECT_TRUE(abort().ok());
    volume.reset();
    arena.reset();
    std::memcpy(arena_memory.data(), memory_then.data(), memory_then.size());
    if (on_sim) sim.revive();
  }
  // The process and the power are gone.
  void cut_power() {
    HF_ASSERT(on_sim);
    sim.kill();
    device.set_delay(nullptr);
    device.let_all_go();
    EXPECT_TRUE(abort().ok());
    volume.reset();
    arena.reset();
    sim.cut_power();
    sim.revive();
  }

  Status close() {
    Status status{Code::kUnavailable, "close() never answered"};
    volume->close([&](Status s) { status = std::move(s); });
    drive();
    if (status.ok()) volume.reset();
    return status;
  }
  Status abort() {
    Status status{Code::kUnavailable, "abort() never answered"};
    volume->abort([&](Status s) { status = std::move(s); });
    drive();
    return status;
  }
  Status grow(uint64_t size) {
    Status status{Code::kUnavailable, "grow() never answered"};
    volume->grow(size, [&](Status s) { status = std::move(s); });
    drive();
    return status;
  }

  // A request that the test holds on to.
  struct Pending {
    VolumeRequest request;
    std::unique_ptr<PageBuffer> buffer;
    int error = -1;  // not yet
    bool done() const { return error >= 0; }
  };
  std::unique_ptr<Pending> start(VolumeOp op, uint64_t offset, uint64_t length, uint8_t fill = 0, bool fua = false) {
    auto pending = std::make_unique<Pending>();
    pending->request.op = op;
    pending->request.fua = fua;
    pending->request.offset = offset;
    pending->request.length = length;
    pending->request.user = pending.get();
    pending->request.done = [](VolumeRequest* request, int error) {
      auto* self = static_cast<Pending*>(request->user);
      ASSERT_EQ(self->error, -1) << "done() ran twice";
      self->error = error;
    };
    if (op == VolumeOp::kRead || op == VolumeOp::kWrite) {
      pending->buffer = std::make_unique<PageBuffer>(length > 0 ? length : kBlock);
      std::memset(pending->buffer->data(), op == VolumeOp::kWrite ? fill : 0xee, pending->buffer->size());
      pending->request.buffer = pending->buffer->data();
    }
    volume->submit(&pending->request);
    EXPECT_FALSE(pending->done()) << "done() ran inside submit()";
    return pending;
  }
  int run(VolumeOp op, uint64_t offset, uint64_t length, uint8_t fill = 0, bool fua = false) {
    auto pending = start(op, offset, length, fill, fua);
    drive();
    EXPECT_TRUE(pending->done()) << "the request was never answered";
    return pending->error;
  }
  int write(uint64_t offset, uint64_t length, uint8_t fill) { return run(VolumeOp::kWrite, offset, length, fill); }
  int flush() { return run(VolumeOp::kFlush, 0, 0); }
  int discard(uint64_t offset, uint64_t length) { return run(VolumeOp::kDiscard, offset, length); }
  // Whether every byte reads as `fill`.
  ::testing::AssertionResult reads(uint64_t offset, uint64_t length, uint8_t fill) {
    auto pending = start(VolumeOp::kRead, offset, length);
    drive();
    if (pending->error != 0) return ::testing::AssertionFailure() << "errno " << pending->error;
    for (uint64_t i = 0; i < length; i++) {
      const auto byte = static_cast<uint8_t>(pending->buffer->data()[i]);
      if (byte != fill) {
        return ::testing::AssertionFailure() << "byte " << offset + i << " is " << int(byte) << ", not " << int(fill);
      }
    }
    return ::testing::AssertionSuccess();
  }

  uint64_t page_address(uint64_t slab, uint32_t copy) const {
    return format::slab_page_offset(superblock.first_region_offset, slab) + copy * kBlock;
  }
  format::SlabPage page(uint64_t slab, uint32_t copy) const {
    format::SlabPage page;
    raw_read(page_address(slab, copy), &page, sizeof page);
    return page;
  }
  void damage(uint64_t address) {
    std::vector<uint8_t> block(kBlock);
    raw_read(address, block.data(), kBlock);
    for (size_t i = 600; i < 1100; i++) block[i] = static_cast<uint8_t>(block[i] ^ 0x5a);
    raw_write(address, block.data(), kBlock);
  }
  // Of intact pages of this kind that are written to either copy at `address`, only the bytes [from, to) arrive, durably, and the
  // write fails. Whatever else is written there passes.
  void tear_writes(uint32_t magic, std::vector<uint64_t> addresses, size_t from, size_t to) {
    errors.set_judge([this, magic, addresses = std::move(addresses), from, to](const IoRequest& request) {
      const bool ours = std::any_of(addresses.begin(), addresses.end(), [&](uint64_t address) {
        return request.offset == address || request.offset == address + kBlock;
      });
      if (request.op != IoOp::kWrite || !ours) return ErrorDevice::Verdict{};
      const auto* page = static_cast<const std::byte*>(request.iov[0].iov_base);
      if (verify(page, magic, kPoolUuid, request.offset) != PageState::kOk) return ErrorDevice::Verdict{};
      std::vector<std::byte> torn(kBlock);
      raw_read(request.offset, torn.data(), kBlock);
      std::memcpy(torn.data() + from, page + from, to - from);
      raw_write(request.offset, torn.data(), kBlock);
      return ErrorDevice::Verdict{EIO, false};
    });
  }
  uint64_t layer_record_address(uint32_t slot) const { return superblock.layer_table_offset + uint64_t{slot} * 2 * kBlock; }
  uint64_t record_address(uint32_t copy) const {
    return superblock.volume_table_offset + (spec.slot * 2 + copy) * kBlock;
  }
  format::VolumeRecord record(uint32_t copy) const {
    format::VolumeRecord record;
    raw_read(record_address(copy), &record, sizeof record);
    return record;
  }

  SimExecutor executor;
  format::Superblock superblock;
  MemoryDevice memory;
  SimDisk sim;
  const bool on_sim;
  ErrorDevice errors;
  DelayDevice device;
  TestStock stock;
  TestObserver observer;
  ArenaMemory arena_memory;
  std::unique_ptr<PageArena> arena;
  VolumeSpec spec;
  uint32_t chunks_per_slab = format::kChunksPerSlab;
  std::unique_ptr<Volume> volume;
};

// First writes in sequence, eight at a time, on a device that takes 20 ms for a flush.
inline void stream(Bench& bench, uint64_t from, uint64_t to) {
  constexpr uint64_t kPiece = 8 * kChunk;
  std::vector<std::unique_ptr<Bench::Pending>> pending;
  bench.device.set_delay([](const IoRequest& request) {
    return uint64_t{request.op == IoOp::kFlush ? 20'000'000u : request.op == IoOp::kWrite ? 1'000'000u : 0u};
  });
  while (from < to || !pending.empty() || bench.executor.timers()) {
    while (from < to && pending.size() < 8) {
      pending.push_back(bench.start(VolumeOp::kWrite, from, kPiece, 1));
      from += kPiece;
    }
    bench.drive();
    std::erase_if(pending, [](const auto& one) { return one->done(); });
    if (!bench.executor.timers()) continue;
    bench.executor.advance(bench.executor.next_timer_ns() - bench.executor.now_ns());
    bench.drive();
  }
  bench.device.set_delay(nullptr);
}

}  // namespace holdfast::test
