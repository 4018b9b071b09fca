// What a map costs at real scale: a volume of one TiB, opened from slab pages that are made up as they are read. Also
// how long the processor takes for it: the disk's part of the opening time comes on top.
#include <ctime>

#include "volume_fixture.h"

namespace holdfast::test {
namespace {

double processor_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

constexpr uint64_t kTiB = uint64_t{1} << 40;
constexpr uint64_t kSlabs = kTiB / format::kSlabSize;

// Reads of slab pages give claimed, full slabs; the rest is memory.
class FabricatedDevice final : public BlockDevice {
 public:
  FabricatedDevice(const format::Superblock& superblock, bool random)
      : superblock_(superblock), memory_(superblock.device_bytes) {
    if (!random) return;
    // Every chunk of the volume exactly once, in no order: steps of an odd number modulo a power of two.
    shuffle_ = 0x9e3779b1u;
  }
  uint64_t size_bytes() const override { return superblock_.device_bytes; }
  void submit(IoRequest* request) override {
    if (request->op != IoOp::kRead || !is_page(request->offset)) return memory_.submit(request);
    const double begun = processor_seconds();
    auto* to = static_cast<std::byte*>(request->iov[0].iov_base);
    for (uint64_t at = 0; at < request->length; at += format::kPageSize) {
      make_page(request->offset + at, *reinterpret_cast<format::SlabPage*>(to + at));
    }
    making_ += processor_seconds() - begun;
    IoAnswer::post(Executor::current(), request, 0);
  }
  double making_seconds() const { return making_; }

 private:
  bool is_page(uint64_t offset) const {
    return offset >= superblock_.first_region_offset &&
           (offset - superblock_.first_region_offset) % format::kRegionStride < format::kRegionPagesSize;
  }
  void make_page(uint64_t offset, format::SlabPage& page) const {
    const uint64_t in = offset - superblock_.first_region_offset;
    const uint64_t slab =
        in / format::kRegionStride * format::kSlabsPerRegion + in % format::kRegionStride / format::kSlabPairSize;
    page = format::SlabPage{};
    page.layer_id = 50;
    page.generation = 1;
    page.epoch = 1;
    page.volume_id = 5;
    for (uint32_t c = 0; c < format::kChunksPerSlab; c++) {
      const auto chunk = static_cast<uint32_t>(slab * format::kChunksPerSlab + c);
      page.entries[c] = {shuffle_ == 0 ? chunk : chunk * shuffle_ & 0xffffff, 0xffff, 0};
    }
    seal(page, kPoolUuid, offset, 3);
  }
  const format::Superblock& superblock_;
  MemoryDevice memory_;
  uint32_t shuffle_ = 0;
  double making_ = 0;
};

struct Cost {
  uint64_t memory = 0;
  uint64_t mapped = 0;
  double seconds = 0;
  double held_seconds = 0;  // of processor time, until writes went on after a cut
  double cut_seconds = 0;   // until it was answered
};

Cost open_one_tib(bool random) {
  const format::Superblock superblock = small_superblock(kSlabs);
  FabricatedDevice device(superblock, random);
  SimExecutor executor;
  TestStock stock;
  TestObserver observer;
  ArenaMemory memory(kMiB);
  auto arena = memory.format(5, 2);
  VolumeSpec spec;
  spec.volume_id = 5;
  spec.size_bytes = kTiB;
  spec.epoch = 2;
  LayerSpec top;
  top.layer_id = 50;
  top.slabs.push_back({0, kSlabs, 1});
  spec.layers.push_back(top);
  VolumeEnvironment environment;
  environment.device = &device;
  environment.pool = kPoolUuid;
  environment.superblock = &superblock;
  environment.stock = &stock;
  environment.observer = &observer;
  environment.arena = arena.get();
  std::unique_ptr<Volume> volume;
  const double begun = processor_seconds();
  Volume::open(environment, spec, false, [&](Result<std::unique_ptr<Volume>> result) {
    EXPECT_TRUE(result.ok()) << result.status.message;
    if (result.ok()) volume = std::move(*result);
  });
  executor.run_until_idle();
  Cost cost;
  cost.seconds = processor_seconds() - begun - device.making_seconds();
  const VolumeStats stats = volume->stats();
  cost.memory = stats.memory_bytes;
  cost.mapped = stats.mapped_bytes;
  LayerSpec next;
  next.layer_id = 51;
  next.slot = 1;
  next.parent_layer_id = 50;
  next.birth = 1;
  const double asked = processor_seconds();
  bool cut = false;
  volume->cut(next, {}, 1'000'000'000, [&](Result<CutReport> result) {
    EXPECT_TRUE(result.ok()) << result.status.message;
    cut = true;
  });
  while (volume->stats().allocated_bytes > 0 && executor.run_one()) {
  }
  cost.held_seconds = processor_seconds() - asked;  // the new top is there, which has nothing yet
  executor.run_until_idle();
  EXPECT_TRUE(cut);
  cost.cut_seconds = processor_seconds() - asked;
  bool stopped = false;
  volume->abort([&](Status) { stopped = true; });
  executor.run_until_idle();
  EXPECT_TRUE(stopped);
  return cost;
}

TEST(VolumeMemory, OneTebibyteMappedAtRandomStaysUnder400MiB) {
  const Cost cost = open_one_tib(true);
  RecordProperty("memory_bytes", std::to_string(cost.memory));
  std::printf("random: %.1f MiB, opened in %.2f s of processor time\n", double(cost.memory) / double(kMiB),
              cost.seconds);
  EXPECT_EQ(cost.mapped, kTiB);
  EXPECT_LT(cost.memory, 400 * kMiB);
  // A cut moves nothing: what its report costs is done while writes go on.
  std::printf("a cut of it: %.3f ms of processor time until writes go on, %.1f ms in all\n", cost.held_seconds * 1e3,
              cost.cut_seconds * 1e3);
  EXPECT_LT(cost.held_seconds, 0.02);
}

TEST(VolumeMemory, OneTebibyteMappedInSequenceStaysUnder8MiB) {
  const Cost cost = open_one_tib(false);
  std::printf("sequential: %.1f MiB, opened in %.2f s of processor time\n", double(cost.memory) / double(kMiB),
              cost.seconds);
  EXPECT_EQ(cost.mapped, kTiB);
  EXPECT_LT(cost.memory, 8 * kMiB);
}

TEST(VolumeMemory, SlabsWrittenInSequenceArePackedAgainOnceTheyAreDurable) {
  Bench bench(8192 * kMiB, 600);
  bench.superblock.slab_count = 600;
  ASSERT_TRUE(bench.open().ok());
  const uint64_t before = bench.volume->stats().memory_bytes;
  // One block of each chunk, so that the device stays small: 512 slabs, 8 GiB of address space.
  for (uint64_t c = 0; c < 8192 * kMiB / kChunk; c++) {
    ASSERT_EQ(bench.write(c * kChunk, kBlock, 1), 0);
    if (c % 4096 == 4095) {
      ASSERT_EQ(bench.flush(), 0);
    }
  }
  ASSERT_EQ(bench.flush(), 0);
  const uint64_t after = bench.volume->stats().memory_bytes;
  EXPECT_LT((after - before) * (kTiB / (8192 * kMiB)), 48 * kMiB) << after - before;
}

}  // namespace
}  // namespace holdfast::test
