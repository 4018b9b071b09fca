// Layers that have left the chain: an open volume goes on without them, and has room for as many cuts as it likes.
#include <cstdio>

#include "core/layer_jobs.h"
#include "cut_fixture.h"

namespace holdfast::test {
namespace {

struct ForgetBench : CutBench {
  explicit ForgetBench(uint64_t size_bytes = 2 * kMiB, uint64_t stock_slabs = 200) : CutBench(size_bytes, stock_slabs) {
    superblock.layer_slots = 2048;
    superblock.layer_table_offset = 9 * kMiB;
    superblock.first_region_offset = 32 * kMiB;
  }
  Status forget(const std::vector<SlabRun>& slabs, const std::vector<uint64_t>& layers) {
    return call([&](Volume::Done done) { volume->forget(slabs, layers, std::move(done)); });
  }
  format::Superblock job_superblock() const {
    format::Superblock s = superblock;
    s.header.pool = kPoolUuid;
    return s;
  }
  // As the service does with a layer that newer ones cover: stripped, out of the chain, its slabs wiped and somebody else's.
  void remove(size_t at) {
    BenchDisk disk(*this);
    const std::vector<LayerSpec> layers = with_slabs(spec.layers);
    Result<StripReport> stripped = strip_layers(disk, job_superblock(), {layers[at]}, {layers[at - 1]});
    ASSERT_TRUE(stripped.ok()) << stripped.status.message;
    ASSERT_EQ(stripped->uses[0].live_blocks, 0u);
    ASSERT_TRUE(forget(layers[at].slabs, {layers[at].layer_id}).ok());
    const Status wiped = wipe_layers(disk, job_superblock(), {{layers[at].layer_id, layers[at].slot, layers[at].slabs}}, true);
    ASSERT_TRUE(wiped.ok()) << wiped.message;
    for (const SlabRun& run : layers[at].slabs) stock.add(run.first, run.count, run.generation + 1);
    books.erase(layers[at].layer_id);
    spec.layers.erase(spec.layers.begin() + static_cast<ptrdiff_t>(at));
  }
};

TEST(VolumeForget, AVolumeThatStaysOpenIsCutMoreOftenThanAChainHasLayersWhenOldOnesGo) {
  ForgetBench bench(2 * kMiB, 40);
  ASSERT_TRUE(bench.open().ok());
  const uint32_t cuts = kMaxLayers + 120;
  const size_t window = 3;
  uint64_t memory_at_100 = 0;
  for (uint32_t i = 0; i < cuts; i++) {
    ASSERT_EQ(bench.write(0, 8 * kChunk, static_cast<uint8_t>(1 + i % 250)), 0);
    const Status status = bench.cut();
    ASSERT_TRUE(status.ok()) << i << ": " << status.message;
    if (bench.spec.layers.size() > window + 1) {
      bench.remove(window + 1);
      if (HasFatalFailure()) return;
    }
    if (i == 100) memory_at_100 = bench.volume->stats().memory_bytes;
    if (i % 100 != 99) continue;
    for (size_t named = 0; named < window; named++) {
      auto view = bench.view(1 + named);
      ASSERT_NE(view, nullptr);
      EXPECT_EQ(bench.blocks_of(*view)[0], 1 + (i - named) % 250) << "snapshot " << named << " after cut " << i;
      bench.drop(view);
    }
  }
  EXPECT_EQ(bench.spec.layers.size(), window + 1);
  EXPECT_LE(bench.volume->stats().memory_bytes, memory_at_100 + 4096);
  EXPECT_TRUE(bench.reads(0, 8 * kChunk, static_cast<uint8_t>(1 + (cuts - 1) % 250)));
  bench.kill();
  bench.spec.layers = bench.with_slabs(bench.spec.layers);
  ASSERT_TRUE(bench.open(true).ok()) << "an engine that takes over needs none of them";
  EXPECT_TRUE(bench.reads(0, 8 * kChunk, static_cast<uint8_t>(1 + (cuts - 1) % 250)));
}

TEST(VolumeForget, ThoseAboveAndBelowALayerThatGoesShowTheSameAndAreCutAndCompactedOn) {
  for (uint64_t seed = 1; seed <= 6; seed++) {
    ForgetBench bench;
    SimRandom random(seed);
    std::vector<uint8_t> model(2 * kMiB / kBlock, 0);
    std::vector<std::vector<uint8_t>> snapshots;  // oldest first, of layers that have slabs
    ASSERT_TRUE(bench.open().ok());
    std::vector<uint64_t> empty;
    for (int round = 0; round < 8; round++) {
      if (random.chance(500)) {
        empty.push_back(bench.spec.layers[0].layer_id);
      } else {
        bench.churn(random, model, 20);
      }
      const bool holds = empty.empty() || empty.back() != bench.spec.layers[0].layer_id;
      ASSERT_TRUE(bench.cut().ok());
      if (holds) snapshots.push_back(model);
      EXPECT_EQ(bench.blocks(), model);  // the masks are there
    }
    ASSERT_TRUE(bench.forget({}, empty).ok());
    ASSERT_TRUE(bench.forget({}, empty).ok()) << "an order that comes again";
    std::erase_if(bench.spec.layers, [&](const LayerSpec& layer) {
      return std::find(empty.begin(), empty.end(), layer.layer_id) != empty.end();
    });
    EXPECT_EQ(bench.blocks(), model) << "seed " << seed;
    bench.churn(random, model, 20);
    ASSERT_TRUE(bench.cut().ok());
    snapshots.push_back(model);
    EXPECT_EQ(bench.report.frozen.layer_id, bench.spec.layers[1].layer_id);
    bench.churn(random, model, 10);
    EXPECT_EQ(bench.blocks(), model);
    std::vector<LayerSlabs> sources;
    for (size_t i = 1; i < bench.spec.layers.size(); i++) {
      sources.push_back({bench.spec.layers[i].layer_id, bench.slabs_of(bench.spec.layers[i].layer_id)});
    }
    // Among the layers a further one goes while their blocks are being moved.
    ASSERT_TRUE(bench.cut().ok());
    ASSERT_TRUE(bench.cut().ok());
    const uint64_t between = bench.spec.layers[1].layer_id;
    Status compacted{Code::kUnavailable, "never answered"};
    bench.volume->compact(sources, 1000, 0, [&](Result<CompactReport> result) {
      compacted = result.status;
      EXPECT_TRUE(result.ok() && result->complete);
    });
    for (uint64_t events = random.below(60); events > 0; events--) {
      if (!bench.executor.idle()) bench.executor.run_one();
      else if (bench.sim.in_flight() > 0) bench.sim.complete_one();
    }
    EXPECT_TRUE(bench.forget({}, {between}).ok());
    for (int i = 0; i < 1000 && !compacted.ok(); i++) {
      bench.drive();
      bench.executor.advance(20'000'000);
    }
    ASSERT_TRUE(compacted.ok()) << compacted.message;
    std::erase_if(bench.spec.layers, [&](const LayerSpec& layer) { return layer.layer_id == between; });
    EXPECT_EQ(bench.blocks(), model) << "seed " << seed;
    for (size_t s = 0; s < snapshots.size(); s++) {
      auto view = bench.view(bench.spec.layers.size() - 1 - s);
      ASSERT_NE(view, nullptr);
      EXPECT_EQ(bench.blocks_of(*view), snapshots[s]) << "snapshot " << s << ", seed " << seed;
      bench.drop(view);
    }
    ASSERT_TRUE(bench.reopen().ok());
    EXPECT_EQ(bench.blocks(), model);
  }
}

// Grace periods are counted in a ring: while a request is there for longer than it reaches, later ones share the last.
TEST(VolumeForget, AReadThatIsThereForMoreFlushesThanAreCountedIsWaitedForAndThenItIsAnswered) {
  ForgetBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  const auto hold_read = [&] {
    bench.device.set_delay([](const IoRequest& request) { return request.op == IoOp::kRead ? DelayDevice::kHold : 0; });
    auto read = bench.start(VolumeOp::kRead, 0, kChunk);
    bench.drive();
    bench.device.set_delay(nullptr);
    return read;
  };
  auto early = hold_read();
  for (int i = 0; i < 80; i++) {
    ASSERT_EQ(bench.write((21 + i / 16) * kChunk + i % 16 * kBlock, kBlock, 7), 0);  // changes a page
    ASSERT_EQ(bench.flush(), 0);
  }
  auto late = hold_read();
  ASSERT_EQ(bench.device.held(), 2u);
  ASSERT_EQ(bench.write(0, 8 * kChunk, 9), 0);
  ASSERT_EQ(bench.flush(), 0);
  Status forgotten{Code::kBusy, "not yet"};
  bench.volume->forget(bench.report.frozen.slabs, {bench.spec.layers[1].layer_id}, [&](Status status) { forgotten = std::move(status); });
  for (const size_t held : {2u, 1u}) {
    bench.drive();
    ASSERT_EQ(bench.device.held(), held);
    EXPECT_EQ(forgotten.code, Code::kBusy) << held << " reads are still at the place";
    bench.device.let_go(0);
  }
  bench.drive();
  EXPECT_TRUE(forgotten.ok()) << forgotten.message;
  for (const auto* read : {early.get(), late.get()}) {
    EXPECT_EQ(read->error, 0);
    EXPECT_EQ(read->buffer->data()[0], std::byte{1});
  }
  EXPECT_TRUE(bench.reads(0, 8 * kChunk, 9));
}

TEST(VolumeForget, ALayerThatHoldsMoreAndTheTopAreRefusedAndNothingIsForgotten) {
  ForgetBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 20 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(20 * kChunk, kChunk, 2), 0);
  const std::vector<SlabRun> slabs = bench.report.frozen.slabs;
  uint64_t count = 0;
  for (const SlabRun& run : slabs) count += run.count;
  ASSERT_GT(count, 1u);
  const std::vector<SlabRun> first = {{slabs[0].first, 1, slabs[0].generation}};
  EXPECT_EQ(bench.forget(first, {bench.spec.layers[1].layer_id}).code, Code::kInvalidArgument);
  EXPECT_EQ(bench.forget({}, {bench.spec.layers[0].layer_id}).code, Code::kInvalidArgument);
  EXPECT_TRUE(bench.reads(0, 20 * kChunk, 1));
  EXPECT_TRUE(bench.reads(20 * kChunk, kChunk, 2));
  EXPECT_TRUE(bench.forget({}, {12345}).ok()) << "one that it does not have is no error";
  auto view = bench.view(1);
  ASSERT_NE(view, nullptr);
  EXPECT_EQ(bench.call([&](Volume::Done done) {
    view->forget({}, {bench.spec.layers[1].layer_id}, std::move(done));
  }).code, Code::kInvalidArgument) << "what a reader reads";
  bench.drop(view);
}

}  // namespace
}  // namespace holdfast::test
