// The page arena alone, and under a process that is really killed at any instruction.
#include "core/page_arena.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "volume_fixture.h"

namespace holdfast::test {
namespace {

format::SlabPage image_with(uint32_t chunk) {
  format::SlabPage page{};
  for (auto& entry : page.entries) entry = {format::kNoChunk, 0, 0};
  page.entries[0] = {chunk, 1, 0};
  return page;
}

TEST(PageArena, WhatWasPublishedIsThereAfterAttaching) {
  ArenaMemory memory(64 << 10);
  {
    auto arena = memory.format(9, 4);
    arena->raise_flush_number(77);
    const uint32_t slot = arena->publish(5, 2, 50, image_with(1));
    arena->store_entry(slot, 7, {123, 0xf, 0xf0});
    arena->publish(6, 2, 50, image_with(2));
    const uint32_t gone = arena->publish(7, 2, 50, image_with(3));
    arena->release(gone);
    const uint32_t claim = arena->add_claim({5, 2, 50, PageArena::ClaimState::kClaiming});
    arena->set_claim_state(claim, PageArena::ClaimState::kClaimed);
    arena->add_claim({8, 2, 50, PageArena::ClaimState::kReturned});
    const uint32_t dropped = arena->add_claim({9, 2, 50, PageArena::ClaimState::kClaiming});
    arena->set_claim_state(dropped, PageArena::ClaimState::kFree);
  }
  auto arena = memory.attach();
  EXPECT_EQ(arena->volume_id(), 9u);
  EXPECT_EQ(arena->epoch(), 4u);
  EXPECT_EQ(arena->flush_number(), 77u);
  const auto images = arena->images();
  ASSERT_EQ(images.size(), 2u);
  EXPECT_EQ(images[0].slab, 5u);
  EXPECT_EQ(arena->image(images[0].slot).entries[7].logical_chunk, 123u);
  EXPECT_EQ(arena->image(images[0].slot).entries[7].zero, 0xf0);
  EXPECT_EQ(arena->claim(0).state, PageArena::ClaimState::kClaimed);
  EXPECT_EQ(arena->claim(1).state, PageArena::ClaimState::kReturned);
  EXPECT_EQ(arena->claim(2).state, PageArena::ClaimState::kFree);
}

TEST(PageArena, OfTwoImagesOfOneSlabTheNewerCounts) {
  ArenaMemory memory(64 << 10);
  {
    auto arena = memory.format(9, 4);
    arena->publish(5, 2, 50, image_with(1));
    arena->publish(5, 2, 50, image_with(2));  // as if killed inside republish()
  }
  auto arena = memory.attach();
  const auto images = arena->images();
  ASSERT_EQ(images.size(), 1u);
  EXPECT_EQ(arena->image(images[0].slot).entries[0].logical_chunk, 2u);
  EXPECT_EQ(arena->free_slots(), arena->slot_count() - 1);
}

TEST(PageArena, SaysWhenItIsFullAndGoesOnWhenSlotsAreLetGo) {
  ArenaMemory memory(64 << 10);
  auto arena = memory.format(9, 4);
  std::vector<uint32_t> slots;
  for (;;) {
    const uint32_t slot = arena->publish(slots.size(), 1, 1, image_with(0));
    if (slot == PageArena::kNone) break;
    slots.push_back(slot);
  }
  EXPECT_EQ(slots.size(), arena->slot_count());
  EXPECT_EQ(arena->republish(slots[0], image_with(1)), PageArena::kNone);
  EXPECT_EQ(arena->image(slots[0]).entries[0].logical_chunk, 0u);
  arena->release(slots[3]);
  EXPECT_NE(arena->republish(slots[0], image_with(1)), PageArena::kNone);
}

TEST(PageArena, RefusesMemoryThatIsNotOne) {
  ArenaMemory memory(64 << 10);
  EXPECT_EQ(PageArena::attach(memory.data(), memory.size()).status.code, Code::kCorrupt);
  EXPECT_EQ(PageArena::attach(memory.data(), 4096).status.code, Code::kInvalidArgument);
  memory.format(9, 4);
  EXPECT_TRUE(PageArena::attach(memory.data(), memory.size()).ok());
  EXPECT_FALSE(PageArena::attach(memory.data(), memory.size() - 4096).ok());
}

// A device in memory that two processes share: what the killed one had written is there for the next.
class SharedDevice final : public BlockDevice {
 public:
  SharedDevice(std::byte* memory, const format::Superblock& superblock) : memory_(memory), superblock_(superblock) {}
  static constexpr uint64_t kSlabs = 32;
  static constexpr size_t kBytes = 24 * kMiB + kSlabs * 4 * kChunk;  // 4 chunks of each slab are used
  uint64_t size_bytes() const override { return superblock_.device_bytes; }
  void submit(IoRequest* request) override {
    uint64_t offset = request->offset;
    for (int i = 0; i < request->iov_count; i++) {
      for (size_t at = 0; at < request->iov[i].iov_len; at += kBlock, offset += kBlock) {
        auto* memory = static_cast<std::byte*>(request->iov[i].iov_base) + at;
        if (request->op == IoOp::kWrite) std::memcpy(place(offset), memory, kBlock);
        else std::memcpy(memory, place(offset), kBlock);
      }
    }
    IoAnswer::post(Executor::current(), request, 0);
  }

 private:
  std::byte* place(uint64_t offset) const {
    const uint64_t data = superblock_.first_region_offset + format::kRegionPagesSize;
    if (offset < data) {
      HF_ASSERT(offset < 24 * kMiB);
      return memory_ + offset;
    }
    const uint64_t slab = (offset - data) / format::kSlabSize;
    const uint64_t inside = (offset - data) % format::kSlabSize;
    HF_ASSERT(slab < kSlabs && inside < 4 * kChunk);
    return memory_ + 24 * kMiB + slab * 4 * kChunk + inside;
  }
  std::byte* memory_;
  const format::Superblock& superblock_;
};

// What the killed process has been told: per block the last acknowledged value, and the one that was under way.
struct Ledger {
  static constexpr uint64_t kBlocks = 16 * 60;
  std::atomic<uint64_t> acknowledged[kBlocks];
  std::atomic<uint64_t> under_way[kBlocks];
  std::atomic<uint64_t> operations;
};

struct Life {
  SimExecutor executor;
  TestObserver observer;
  TestStock stock;
  std::unique_ptr<PageArena> arena;
  std::unique_ptr<Volume> volume;
  Status open(BlockDevice& device, const format::Superblock& superblock, std::byte* memory, size_t bytes, bool over) {
    auto made = over ? PageArena::attach(memory, bytes) : PageArena::format(memory, bytes, 5, 1);
    if (!made.ok()) return made.status;
    arena = std::move(*made);
    std::set<uint64_t> known;
    for (uint32_t i = 0; i < arena->claim_count(); i++) known.insert(arena->claim(i).slab);
    for (uint64_t slab = 0; slab < SharedDevice::kSlabs; slab++) {
      if (known.count(slab) == 0) stock.add(slab, 1, 1);
    }
    VolumeSpec spec;
    spec.volume_id = 5;
    spec.size_bytes = Ledger::kBlocks * kBlock;
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
    Status status{Code::kUnavailable, "open() never answered"};
    Volume::open(environment, spec, over, [&](Result<std::unique_ptr<Volume>> result) {
      status = result.status;
      if (result.ok()) volume = std::move(*result);
    });
    executor.run_until_idle();
    return status;
  }
  int run(VolumeOp op, uint64_t block, PageBuffer& buffer) {
    VolumeRequest request;
    int error = -1;
    request.op = op;
    request.offset = block * kBlock;
    request.length = op == VolumeOp::kFlush ? 0 : kBlock;
    request.buffer = buffer.data();
    request.user = &error;
    request.done = [](VolumeRequest* self, int result) { *static_cast<int*>(self->user) = result; };
    volume->submit(&request);
    executor.run_until_idle();
    return error;
  }
};

[[noreturn]] void victim(SharedDevice& device, const format::Superblock& superblock, std::byte* memory, size_t bytes,
                         Ledger& ledger, bool over, uint64_t seed) {
  Life life;
  if (!life.open(device, superblock, memory, bytes, over).ok()) _exit(3);
  SimRandom random(seed);
  PageBuffer buffer(kBlock);
  for (;;) {
    const uint64_t block = random.below(Ledger::kBlocks);
    const uint64_t pick = random.below(100);
    if (pick < 10) {
      if (life.run(VolumeOp::kFlush, 0, buffer) != 0) _exit(4);
      continue;
    }
    const uint64_t value = pick < 60 ? ledger.operations.load() << 20 | block : 0;
    ledger.under_way[block].store(value);
    for (size_t i = 0; i < kBlock; i += 8) std::memcpy(buffer.data() + i, &value, 8);
    if (life.run(pick < 60 ? VolumeOp::kWrite : VolumeOp::kDiscard, block, buffer) != 0) _exit(5);
    ledger.acknowledged[block].store(value);
    ledger.operations.fetch_add(1);
  }
}

TEST(PageArena, AProcessKilledAtAnyInstructionLosesNothingItHadAcknowledged) {
  constexpr size_t kArena = 96 << 10;
  const format::Superblock superblock = small_superblock(SharedDevice::kSlabs);
  const auto shared = [](size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    HF_ASSERT(memory != MAP_FAILED);
    return static_cast<std::byte*>(memory);
  };
  std::byte* disk = shared(SharedDevice::kBytes);
  std::byte* memory = shared(kArena);
  auto* ledger = new (shared(sizeof(Ledger))) Ledger{};
  ledger->operations = 1;
  SharedDevice device(disk, superblock);
  for (uint64_t round = 0; round < 40; round++) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) victim(device, superblock, memory, kArena, *ledger, round > 0, round);
    // Every other one gets going first, however slow the machine or the sanitizer; the rest die while they open or soon
    // after.
    const uint64_t begun = ledger->operations.load();
    for (int ms = 0; round % 2 == 0 && ms < 20'000 && ledger->operations.load() < begun + 60; ms++) usleep(1000);
    usleep(static_cast<useconds_t>(3000 + round * 517 % 9000));
    ASSERT_EQ(kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the victim gave up by itself: " << WEXITSTATUS(status);
    // Looked at on copies, so that the next victim takes over from the dead one itself.
    std::vector<std::byte> disk_copy(disk, disk + SharedDevice::kBytes);
    PageBuffer arena_copy(kArena);
    std::memcpy(arena_copy.data(), memory, kArena);
    SharedDevice view(disk_copy.data(), superblock);
    Life life;
    const Status opened = life.open(view, superblock, arena_copy.data(), kArena, round > 0 || ledger->operations > 1);
    if (!opened.ok() && round == 0) continue;  // killed before it had opened the volume at all
    ASSERT_TRUE(opened.ok()) << opened.message;
    PageBuffer buffer(kBlock);
    for (uint64_t block = 0; block < Ledger::kBlocks; block++) {
      ASSERT_EQ(life.run(VolumeOp::kRead, block, buffer), 0);
      uint64_t found;
      std::memcpy(&found, buffer.data(), 8);
      ASSERT_TRUE(found == ledger->acknowledged[block].load() || found == ledger->under_way[block].load())
          << "block " << block << " holds " << found << " after kill " << round;
      // Seen once, it is what it is for the next round.
    }
    for (uint64_t block = 0; block < Ledger::kBlocks; block++) {
      if (ledger->acknowledged[block].load() == ledger->under_way[block].load()) continue;
      ASSERT_EQ(life.run(VolumeOp::kRead, block, buffer), 0);
      uint64_t found;
      std::memcpy(&found, buffer.data(), 8);
      ledger->acknowledged[block].store(found);
    }
  }
  EXPECT_GT(ledger->operations.load(), 1000u);
  munmap(disk, SharedDevice::kBytes);
  munmap(memory, kArena);
  munmap(ledger, sizeof(Ledger));
}

}  // namespace
}  // namespace holdfast::test
