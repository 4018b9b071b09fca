// Compaction: whatever races with it, fails or stops, everybody reads what they read before; and when it is through,
// stripping finds nothing that still shows.
#include <algorithm>
#include <cerrno>

#include "core/layer_jobs.h"
#include "cut_fixture.h"

namespace holdfast::test {
namespace {

struct CompactBench : ChainBench {
  explicit CompactBench(uint64_t size_bytes = 2 * kMiB, uint64_t stock_slabs = 200, uint64_t seed = 0)
      : ChainBench(size_bytes, stock_slabs, seed) {}

  struct Compacting {
    bool given = false;
    Status status;
    CompactReport report;
  };
  // Of the layers [from, to) of the chain, newest first.
  std::vector<LayerSlabs> sources(size_t from = 1, size_t to = 100) {
    std::vector<LayerSlabs> all;
    for (size_t i = from; i < std::min(to, spec.layers.size()); i++) {
      all.push_back({spec.layers[i].layer_id, slabs_of(spec.layers[i].layer_id)});
    }
    return all;
  }
  std::unique_ptr<Compacting> start_compact(const std::vector<LayerSlabs>& from, uint32_t permille = 1000,
                                            uint64_t max_blocks = 0) {
    auto answer = std::make_unique<Compacting>();
    volume->compact(from, permille, max_blocks, [to = answer.get()](Result<CompactReport> result) {
      ASSERT_FALSE(to->given) << "answered twice";
      to->given = true;
      to->status = result.status;
      if (result.ok()) to->report = *result;
    });
    return answer;
  }
  // With its rests.
  void finish(const Compacting& answer) {
    for (int i = 0; i < 1000 && !answer.given; i++) {
      drive();
      if (!answer.given) executor.advance(20'000'000);
    }
    ASSERT_TRUE(answer.given) << "compact() never answered";
  }
  Compacting compact(const std::vector<LayerSlabs>& from, uint32_t permille = 1000, uint64_t max_blocks = 0) {
    auto answer = start_compact(from, permille, max_blocks);
    finish(*answer);
    return *answer;
  }
  // The newest `victims` of the frozen layers; returns the slabs that are empty now.
  std::vector<SlabRun> strip(size_t victims) {
    BenchDisk disk(*this);
    format::Superblock s = superblock;
    s.header.pool = kPoolUuid;
    const std::vector<LayerSpec> layers = with_slabs(spec.layers);
    Result<StripReport> stripped = strip_layers(
        disk, s, {layers.begin() + 1, layers.begin() + 1 + static_cast<ptrdiff_t>(victims)}, {layers[0]});
    EXPECT_TRUE(stripped.ok()) << stripped.status.message;
    if (!stripped.ok()) return {};
    live_blocks = 0;
    for (const LayerUse& use : stripped->uses) live_blocks += use.live_blocks;
    return stripped->emptied;
  }
  // As the service does with what stripping has emptied.
  void wipe(const std::vector<SlabRun>& emptied) {
    EXPECT_TRUE(call([&](Volume::Done done) { volume->forget(emptied, {}, std::move(done)); }).ok());
    BenchDisk disk(*this);
    format::Superblock s = superblock;
    s.header.pool = kPoolUuid;
    for (const LayerSpec& layer : spec.layers) {
      WipeLayer one{layer.layer_id, layer.slot, {}};
      for (const SlabRun& run : emptied) {
        for (uint64_t slab = run.first; slab < run.first + run.count; slab++) {
          if (books[layer.layer_id].erase(slab) > 0) one.slabs.push_back({slab, 1, run.generation});
        }
      }
      const Status status = wipe_layers(disk, s, {one}, false);
      EXPECT_TRUE(status.ok()) << status.message;
    }
  }
  uint64_t slab_count(size_t from) {
    uint64_t count = 0;
    for (size_t i = from; i < spec.layers.size(); i++) count += slabs_of(spec.layers[i].layer_id).size();
    return count;
  }

  uint64_t live_blocks = 0;                      // that the last strip left
};

bool is_data(const Bench& bench, const IoRequest& request) {
  return (request.op == IoOp::kRead || request.op == IoOp::kWrite) &&
         request.offset >= bench.superblock.first_region_offset + format::kRegionPagesSize;
}

TEST(VolumeCompact, NothingThatAnybodyReadsChangesAndStrippingThenEmptiesEverySlab) {
  for (uint64_t seed = 1; seed <= 8; seed++) {
    CompactBench bench;
    SimRandom random(seed);
    bench.build(random, 4);
    bench.churn(random, bench.model, 15);
    const auto answer = bench.compact(bench.sources());
    ASSERT_TRUE(answer.status.ok()) << answer.status.message;
    EXPECT_TRUE(answer.report.complete);
    EXPECT_FALSE(answer.report.no_space);
    EXPECT_GT(answer.report.moved_blocks, 0u);
    bench.expect_same("compacted");
    const auto again = bench.compact(bench.sources());
    EXPECT_TRUE(again.report.complete);
    EXPECT_EQ(again.report.moved_blocks, 0u) << "repeating it is harmless";
    // It was answered, so it is durable: nobody flushes again. Data that the disk has is all there is now.
    const uint64_t before = bench.slab_count(1);
    const std::vector<SlabRun> emptied = bench.strip(4);
    uint64_t count = 0;
    for (const SlabRun& run : emptied) count += run.count;
    EXPECT_EQ(count, before) << "seed " << seed << ": " << bench.live_blocks << " blocks are left";
    bench.wipe(emptied);
    EXPECT_EQ(bench.slab_count(1), 0u);
    EXPECT_EQ(bench.blocks(), bench.model);
    ASSERT_TRUE(bench.reopen().ok());
    EXPECT_EQ(bench.blocks(), bench.model);
    bench.churn(random, bench.model, 30);
    EXPECT_EQ(bench.blocks(), bench.model);
  }
}

TEST(VolumeCompact, OnlyWhatShowsOfTheGivenLayersIsMovedAndNamedOnesBetweenThemStay) {
  CompactBench bench;
  SimRandom random(11);
  bench.build(random, 4);
  // Layers 1 and 3 of the chain; 2 and 4 have names.
  std::vector<LayerSlabs> from = bench.sources(1, 2);
  from.push_back(bench.sources(3, 4)[0]);
  const auto answer = bench.compact(from);
  ASSERT_TRUE(answer.status.ok()) << answer.status.message;
  bench.expect_same("compacted");
  // Slabs of other generations, of layers that are not there, of the top, and of another layer than is said: nothing is done.
  const uint64_t written = bench.volume->stats().allocated_bytes;
  std::vector<LayerSlabs> wrong = bench.sources(2, 3);
  for (SlabRun& run : wrong[0].slabs) run.generation++;
  wrong.push_back({999, bench.sources(2, 3)[0].slabs});
  wrong.push_back({bench.spec.layers[1].layer_id, bench.sources(2, 3)[0].slabs});
  wrong.push_back({bench.spec.layers[0].layer_id, bench.slabs_of(bench.spec.layers[0].layer_id)});
  const auto none = bench.compact(wrong);
  EXPECT_TRUE(none.status.ok() && none.report.complete);
  EXPECT_EQ(none.report.moved_blocks, 0u);
  EXPECT_EQ(bench.volume->stats().allocated_bytes, written);
}

TEST(VolumeCompact, BlocksOfALayerThatIsNotGivenStayInIt) {
  CompactBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 4 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(0, 8 * kBlock, 2), 0);
  ASSERT_EQ(bench.discard(kChunk, 4 * kBlock), 0);
  ASSERT_TRUE(bench.cut().ok());
  EXPECT_EQ(bench.compact(bench.sources(1, 2)).report.moved_blocks, 8u + 4) << "data and zeros of the newer layer";
  EXPECT_EQ(bench.compact(bench.sources(2, 3)).report.moved_blocks, 4 * 16u - 12) << "and the rest of the older one";
  EXPECT_TRUE(bench.reads(0, 8 * kBlock, 2));
  EXPECT_TRUE(bench.reads(8 * kBlock, 8 * kBlock, 1));
  EXPECT_TRUE(bench.reads(kChunk, 4 * kBlock, 0));
  EXPECT_TRUE(bench.reads(kChunk + 4 * kBlock, 3 * kChunk - 4 * kBlock, 1));
}

TEST(VolumeCompact, ASlabThatWouldCostTooManyChunksStaysAndChunksThatTheTopHasCostNothing) {
  CompactBench bench;  // 8 chunks a slab
  bench.model.assign(bench.spec.size_bytes / kBlock, 0);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);           // slab 0: all of it will show
  ASSERT_EQ(bench.write(8 * kChunk, 8 * kChunk, 2), 0);  // slab 1: two chunks
  ASSERT_EQ(bench.write(16 * kChunk, 8 * kChunk, 3), 0); // slab 2: a block of each, in chunks that the top has
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(8 * kChunk, 6 * kChunk, 4), 0);
  for (uint64_t c = 16; c < 24; c++) ASSERT_EQ(bench.write(c * kChunk, 15 * kBlock, 5), 0);
  const std::vector<uint8_t> before = bench.blocks();
  auto answer = bench.compact(bench.sources(), 0);
  ASSERT_TRUE(answer.status.ok());
  EXPECT_TRUE(answer.report.complete);
  EXPECT_EQ(answer.report.moved_blocks, 8u);
  answer = bench.compact(bench.sources(), 249);
  EXPECT_EQ(answer.report.moved_blocks, 0u);
  answer = bench.compact(bench.sources(), 250);
  EXPECT_EQ(answer.report.moved_blocks, 32u);
  EXPECT_TRUE(answer.report.complete);
  answer = bench.compact(bench.sources(), 1000);
  EXPECT_EQ(answer.report.moved_blocks, 128u);
  EXPECT_EQ(bench.blocks(), before);
}

TEST(VolumeCompact, EndsAfterAboutTheBlocksThatWereAskedForAndGoesOnWhenAskedAgain) {
  CompactBench bench;
  SimRandom random(3);
  bench.build(random, 3, 40);
  uint64_t moved = 0;
  int rounds = 0;
  for (bool complete = false; !complete; rounds++) {
    ASSERT_LT(rounds, 200);
    const auto answer = bench.compact(bench.sources(), 1000, 20);
    ASSERT_TRUE(answer.status.ok());
    EXPECT_LE(answer.report.moved_blocks, 20u + 15);
    EXPECT_TRUE(answer.report.complete || answer.report.moved_blocks >= 20);
    moved += answer.report.moved_blocks;
    complete = answer.report.complete;
  }
  EXPECT_GT(rounds, 3);
  EXPECT_GT(moved, 60u);
  bench.expect_same("in parts");
  bench.strip(3);
  EXPECT_EQ(bench.live_blocks, 0u);
}

// ---- beside requests

// Requests that never meet each other, at random, while a compaction runs; every order of events that the executor and the
// disk allow is one that some seed may pick.
struct Racing {
  Racing(CompactBench& b, uint64_t seed) : bench(b), random(seed) {}

  struct Running {
    std::unique_ptr<Bench::Pending> pending;
    uint64_t first;
    uint64_t count;
    uint8_t fill;
  };
  bool free(uint64_t first, uint64_t count) const {
    return std::none_of(running.begin(), running.end(), [&](const Running& one) {
      return first < one.first + one.count && one.first < first + count;
    });
  }
  void submit() {
    const uint64_t pick = random.below(100);
    const uint64_t first = random.below(bench.model.size());
    const uint64_t count = 1 + random.below(std::min<uint64_t>(bench.model.size() - first, random.chance(200) ? 100 : 12));
    if (pick < 8) {
      running.push_back({bench.start(VolumeOp::kFlush, 0, 0), 0, 0, 0});
      return;
    }
    if (!free(first, count)) return;
    const VolumeOp op = pick < 50 ? VolumeOp::kWrite : pick < 75 ? VolumeOp::kDiscard : VolumeOp::kRead;
    const auto fill = static_cast<uint8_t>(op == VolumeOp::kWrite ? 1 + random.below(250) : 0);
    running.push_back({bench.start(op, first * kBlock, count * kBlock, fill, random.chance(100)), first, count, fill});
    submitted++;
  }
  void reap() {
    for (size_t i = 0; i < running.size();) {
      Running& one = running[i];
      if (!one.pending->done()) {
        i++;
        continue;
      }
      ASSERT_EQ(one.pending->error, 0);
      for (uint64_t b = 0; b < one.count; b++) {
        uint8_t& block = bench.model[one.first + b];
        if (one.pending->request.op != VolumeOp::kRead) {
          block = one.fill;
          continue;
        }
        const auto* found = reinterpret_cast<const uint8_t*>(one.pending->buffer->data()) + b * kBlock;
        ASSERT_EQ(found[0], block) << "block " << one.first + b;
        ASSERT_EQ(std::memcmp(found, found + 1, kBlock - 1), 0);
      }
      running[i] = std::move(running.back());
      running.pop_back();
    }
  }
  // One event.
  void turn(size_t depth) {
    const uint64_t pick = random.below(100);
    if (pick < 25 && running.size() < depth) submit();
    else if (pick < 65 && !bench.executor.idle()) bench.executor.run_one();
    else if (bench.sim.in_flight() > 0) bench.sim.complete_one();
    else if (!bench.executor.idle()) bench.executor.run_one();
    else bench.executor.advance(1 + random.below(20'000'000));
    reap();
  }
  void drain() {
    for (int guard = 0; !running.empty() && guard < 2'000'000; guard++) {
      if (!bench.executor.idle()) bench.executor.run_one();
      else if (bench.sim.in_flight() > 0) bench.sim.complete_one();
      else bench.executor.advance(20'000'000);
      reap();
    }
    ASSERT_TRUE(running.empty()) << "a request is never answered";
  }

  CompactBench& bench;
  SimRandom random;
  std::vector<Running> running;
  uint64_t submitted = 0;
};

TEST(VolumeCompact, WritesAndDiscardsThatRaceWithItAreNeitherLostNorUndone) {
  uint64_t moved = 0;
  uint64_t beside = 0;
  for (uint64_t seed = 1; seed <= 60; seed++) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    CompactBench bench(kMiB, 200, seed);
    SimRandom random(seed);
    bench.build(random, 1 + random.below(5), 12);
    Racing race(bench, seed * 17);
    const size_t depth = 1 + random.below(8);
    for (int round = 0; round < 3; round++) {
      const size_t first = 1 + (random.chance(300) ? random.below(bench.spec.layers.size() - 1) : 0);
      auto answer = bench.start_compact(bench.sources(first), random.chance(700) ? 1000 : 300,
                                        random.chance(200) ? 1 + random.below(100) : 0);
      const uint64_t submitted = race.submitted;
      for (int guard = 0; !answer->given; guard++) {
        ASSERT_LT(guard, 200'000) << "compact() never answered";
        race.turn(depth);
        if (HasFatalFailure()) return;
      }
      ASSERT_TRUE(answer->status.ok()) << answer->status.message;
      moved += answer->report.moved_blocks;
      beside += race.submitted - submitted;
      race.drain();
      if (HasFatalFailure()) return;
      bench.expect_same("round " + std::to_string(round));
      if (HasFailure()) return;
    }
    ASSERT_TRUE(bench.reopen().ok());
    bench.expect_same("opened again");
    if (HasFailure()) return;
  }
  EXPECT_GT(moved, 3000u);
  EXPECT_GT(beside, 1000u);
}

TEST(VolumeCompact, AWriteToAChunkThatIsBeingCopiedWaitsForItAndItsNeighboursDoNot) {
  CompactBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 4 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  bench.device.set_delay([&](const IoRequest& request) {
    return is_data(bench, request) && request.op == IoOp::kRead ? DelayDevice::kHold : 0;
  });
  auto answer = bench.start_compact(bench.sources());
  bench.drive();  // the new top has no slab yet
  bench.executor.advance(20'000'000);
  bench.drive();
  ASSERT_GE(bench.device.held(), 1u) << "its reads are at the disk";
  bench.device.set_delay(nullptr);
  auto write = bench.start(VolumeOp::kWrite, kChunk + 3 * kBlock, kBlock, 2);
  auto wide = bench.start(VolumeOp::kWrite, 3 * kChunk, 4 * kChunk, 3);
  auto discard = bench.start(VolumeOp::kDiscard, 2 * kChunk, kChunk);
  bench.drive();
  EXPECT_FALSE(write->done() || wide->done() || discard->done());
  EXPECT_EQ(bench.write(20 * kChunk, kChunk, 4), 0);
  EXPECT_TRUE(bench.reads(0, 4 * kChunk, 1));
  EXPECT_EQ(bench.flush(), 0);
  bench.device.let_all_go();
  bench.finish(*answer);
  bench.drive();
  EXPECT_TRUE(write->done() && wide->done() && discard->done());
  EXPECT_EQ(write->error + wide->error + discard->error, 0);
  EXPECT_TRUE(bench.reads(0, kChunk + 3 * kBlock, 1));
  EXPECT_TRUE(bench.reads(kChunk + 3 * kBlock, kBlock, 2));
  EXPECT_TRUE(bench.reads(kChunk + 4 * kBlock, 12 * kBlock, 1));
  EXPECT_TRUE(bench.reads(2 * kChunk, kChunk, 0));
  EXPECT_TRUE(bench.reads(3 * kChunk, 4 * kChunk, 3));
}

TEST(VolumeCompact, ItWaitsForWritesThatWereUnderWayAndThenLeavesTheirBlocksAlone) {
  CompactBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 2 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  bench.device.set_delay([&](const IoRequest& request) { return is_data(bench, request) ? DelayDevice::kHold : 0; });
  auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 2);
  auto answer = bench.start_compact(bench.sources());
  bench.drive();
  ASSERT_EQ(bench.device.held(), 1u) << "the write, and no read of the compaction before it has ended";
  bench.device.set_delay(nullptr);
  bench.device.let_all_go();
  bench.finish(*answer);
  EXPECT_EQ(write->error, 0);
  EXPECT_TRUE(answer->status.ok());
  EXPECT_EQ(answer->report.moved_blocks, 31u);
  EXPECT_TRUE(bench.reads(0, kBlock, 2));
  EXPECT_TRUE(bench.reads(kBlock, 31 * kBlock, 1));
}

TEST(VolumeCompact, ALongDiscardThatMeetsMarkedChunksHalfwayIsNotWaitedFor) {
  constexpr uint64_t kChunks = 1800;  // more than a discard does in one turn
  CompactBench bench(kChunks * kChunk, 200);
  bench.chunks_per_slab = format::kChunksPerSlab;
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t at = 0; at < kChunks; at += 200) ASSERT_EQ(bench.write(at * kChunk, 200 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(0, kBlock, 2), 0);  // the top has a slab
  auto answer = bench.start_compact(bench.sources());
  auto discard = bench.start(VolumeOp::kDiscard, 0, kChunks * kChunk);
  ASSERT_TRUE(bench.executor.run_one());
  auto waiting = bench.start(VolumeOp::kWrite, (kChunks - 100) * kChunk, kBlock, 3);
  bench.finish(*answer);
  bench.drive();
  ASSERT_TRUE(discard->done() && waiting->done());
  EXPECT_EQ(discard->error + waiting->error, 0);
  ASSERT_TRUE(answer->status.ok() && answer->report.complete);
  EXPECT_GT(answer->report.moved_blocks, 0u) << "it never met the discard";
  EXPECT_TRUE(bench.reads(0, 1000 * kChunk, 0));
}

TEST(VolumeCompact, WhatItHasMovedIsDurableWhenItAnswers) {
  for (uint64_t seed = 1; seed <= 10; seed++) {
    CompactBench bench(kMiB, 200, seed);
    SimRandom random(seed);
    bench.build(random, 3, 15);
    ASSERT_EQ(bench.flush(), 0);
    const auto answer = bench.compact(bench.sources());
    ASSERT_TRUE(answer.status.ok() && answer.report.complete);
    bench.cut_power();
    ASSERT_TRUE(bench.open_by_record(bench.spec.layers[0]).ok());
    bench.expect_same("after a power cut");
    bench.strip(3);
    EXPECT_EQ(bench.live_blocks, 0u) << "seed " << seed;
  }
}

// ---- crashes

TEST(VolumeCompact, APowerCutOrAKillAfterAnyRequestOfItLosesNothing) {
  uint64_t points = 0;
  for (uint64_t seed = 1; seed <= 6; seed++) {
    for (uint64_t stop_at = 0;; stop_at += 1 + (stop_at > 40 ? 3 : 0)) {
      SCOPED_TRACE("seed " + std::to_string(seed) + ", request " + std::to_string(stop_at));
      CompactBench bench(kMiB, 200, seed * 1000 + stop_at);
      SimRandom random(seed);
      bench.build(random, 3, 12);
      bench.churn(random, bench.model, 6);
      ASSERT_EQ(bench.flush(), 0);
      auto answer = bench.start_compact(bench.sources());
      uint64_t completed = 0;
      SimRandom order(stop_at);
      while (!answer->given && completed < stop_at) {
        if (!bench.executor.idle() && (bench.sim.in_flight() == 0 || order.chance(500))) {
          bench.executor.run_one();
        } else if (bench.sim.in_flight() > 0) {
          bench.sim.complete_one();
          completed++;
        } else {
          bench.executor.advance(20'000'000);
        }
      }
      const bool through = answer->given;
      if ((seed + stop_at) % 2 == 0) {
        bench.cut_power();
        ASSERT_TRUE(bench.open_by_record(bench.spec.layers[0]).ok());
      } else {
        // As the process is killed: nothing of it is carried on, but what is at the disk may land.
        std::vector<std::byte> then(bench.arena_memory.data(), bench.arena_memory.data() + bench.arena_memory.size());
        bench.sim.kill();
        EXPECT_TRUE(bench.abort().ok());
        EXPECT_TRUE(answer->given);
        bench.volume.reset();
        bench.arena.reset();
        std::memcpy(bench.arena_memory.data(), then.data(), then.size());
        bench.sim.revive();
        bench.absorb();
        bench.spec.layers = bench.with_slabs(bench.spec.layers);
        ASSERT_TRUE(bench.open(true).ok());
      }
      bench.expect_same("after the crash");
      const auto again = bench.compact(bench.sources());
      ASSERT_TRUE(again.status.ok() && again.report.complete) << again.status.message;
      bench.expect_same("compacted once more");
      bench.strip(3);
      EXPECT_EQ(bench.live_blocks, 0u);
      if (HasFailure()) return;
      points++;
      if (through) break;
    }
  }
  EXPECT_GT(points, 120u);
}

TEST(VolumeCompact, AnErrorAtAnyOfItsRequestsEndsItAndTheDataStays) {
  uint64_t failed = 0;
  for (int carry_out = 0; carry_out < 2; carry_out++) {
    for (uint64_t fail_at = 0;; fail_at++) {
      SCOPED_TRACE("request " + std::to_string(fail_at));
      CompactBench bench(kMiB);
      SimRandom random(4);
      bench.build(random, 3, 15);
      ASSERT_EQ(bench.flush(), 0);
      uint64_t count = 0;
      bench.errors.set_judge([&](const IoRequest&) {
        return count++ == fail_at ? ErrorDevice::Verdict{EIO, carry_out == 1} : ErrorDevice::Verdict{};
      });
      auto answer = bench.start_compact(bench.sources());
      bench.finish(*answer);
      bench.errors.set_judge(nullptr);
      failed += !answer->status.ok();
      if (!answer->status.ok()) {
        EXPECT_EQ(answer->status.code, Code::kIo) << answer->status.message;
      }
      bench.expect_same("after the error");
      // What was taken in vain comes back, and writes to the same chunks find the way.
      ASSERT_EQ(bench.write(0, kMiB / 2, 9), 0);
      std::fill_n(bench.model.begin(), kMiB / 2 / kBlock, uint8_t{9});
      const auto again = bench.compact(bench.sources());
      ASSERT_TRUE(again.status.ok() && again.report.complete) << again.status.message;
      bench.expect_same("compacted once more");
      ASSERT_TRUE(bench.reopen().ok());
      bench.expect_same("opened again");
      bench.strip(3);
      EXPECT_EQ(bench.live_blocks, 0u);
      if (HasFailure()) return;
      if (count <= fail_at) break;
    }
  }
  EXPECT_GT(failed, 20u);
}

TEST(VolumeCompact, APlaceThatWasTakenInVainAndIsAboutToBeFreeIsTakenAgain) {
  CompactBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(20 * kChunk, kBlock, 2), 0);
  bench.errors.set_judge([&](const IoRequest& request) {
    return is_data(bench, request) && request.op == IoOp::kWrite ? ErrorDevice::Verdict{EIO, false}
                                                                 : ErrorDevice::Verdict{};
  });
  ASSERT_EQ(bench.compact(bench.sources()).status.code, Code::kIo);
  bench.errors.set_judge(nullptr);
  ASSERT_EQ(bench.flush(), 0);  // one page copy stands without the chunk
  ASSERT_EQ(bench.write(21 * kChunk, kBlock, 3), 0);
  bench.device.set_delay([](const IoRequest& request) { return request.op == IoOp::kFlush ? DelayDevice::kHold : 0; });
  auto flush = bench.start(VolumeOp::kFlush, 0, 0);  // the other one is about to
  bench.drive();
  ASSERT_EQ(bench.device.held(), 1u);
  bench.device.set_delay([&](const IoRequest& request) { return is_data(bench, request) ? DelayDevice::kHold : 0; });
  auto answer = bench.start_compact(bench.sources());
  bench.drive();
  ASSERT_EQ(bench.device.held(), 2u) << "it has its place, and reads";
  bench.device.let_go(0);
  bench.drive();
  ASSERT_TRUE(flush->done());
  bench.device.set_delay(nullptr);
  bench.device.let_all_go();
  bench.finish(*answer);
  EXPECT_TRUE(answer->status.ok()) << answer->status.message;
  EXPECT_EQ(answer->report.moved_blocks, 16u);
  ASSERT_TRUE(bench.reopen().ok());
  EXPECT_TRUE(bench.reads(0, kChunk, 1));
  bench.strip(1);
  EXPECT_EQ(bench.live_blocks, 0u);
}

// ---- space

TEST(VolumeCompact, OnAFullPoolItMovesWhatFitsInFullAndNothingThatAHeldWriteWaitsFor) {
  CompactBench bench(4 * kMiB, 4);  // 8 chunks a slab
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);           // all of the first slab shows
  ASSERT_EQ(bench.write(8 * kChunk, 8 * kChunk, 2), 0);  // two chunks of the second
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(10 * kChunk, 6 * kChunk, 3), 0);
  SlabStock::Slab slab;
  while (bench.stock.take(0, &slab, nullptr, nullptr)) {
  }
  bench.stock.declare_full();
  ASSERT_EQ(bench.volume->stats().allocated_bytes / format::kSlabSize, 1u) << "room for two chunks";
  const std::vector<uint8_t> before = bench.blocks();
  auto answer = bench.compact(bench.sources());
  ASSERT_TRUE(answer.status.ok());
  EXPECT_TRUE(answer.report.no_space);
  EXPECT_FALSE(answer.report.complete);
  EXPECT_EQ(answer.report.moved_blocks, 32u) << "the second slab";
  EXPECT_EQ(bench.blocks(), before);
}

TEST(VolumeCompact, AHeldWriteGetsTheSlabThatItWaitsForAndTheCompactionDoesNot) {
  CompactBench bench(4 * kMiB, 1);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  auto answer = bench.start_compact(bench.sources());
  bench.drive();
  auto write = bench.start(VolumeOp::kWrite, 20 * kChunk, 8 * kChunk, 2);
  bench.drive();
  ASSERT_EQ(bench.volume->stats().held, 1u);
  for (int i = 0; i < 20; i++) {
    bench.executor.advance(7'000'000);
    bench.drive();
  }
  EXPECT_FALSE(answer->given);
  bench.stock.add(1, 1, 1);
  bench.executor.advance(20'000'000);
  bench.drive();
  EXPECT_TRUE(write->done()) << "eight chunks are what the slab has";
  EXPECT_FALSE(answer->given);
  bench.stock.declare_full();
  bench.finish(*answer);
  EXPECT_TRUE(answer->status.ok() && answer->report.no_space);
  EXPECT_EQ(answer->report.moved_blocks, 0u);
}

TEST(VolumeCompact, WithASlabToComeItWaitsAndWithNoneForTenSecondsItEnds) {
  CompactBench bench(4 * kMiB, 1);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  auto answer = bench.start_compact(bench.sources());
  bench.drive();
  EXPECT_FALSE(answer->given);
  EXPECT_GT(bench.stock.waiters(), 0u) << "it has asked for one";
  EXPECT_TRUE(bench.reads(0, 8 * kChunk, 1));
  auto write = bench.start(VolumeOp::kWrite, 3 * kChunk, kBlock, 2);
  bench.drive();
  EXPECT_FALSE(write->done()) << "it waits for the slab, like the compaction, and not for the compaction";
  EXPECT_EQ(bench.volume->stats().held, 1u);
  bench.stock.add(1, 1, 1);
  bench.drive();
  EXPECT_TRUE(write->done());
  bench.finish(*answer);
  EXPECT_TRUE(answer->status.ok());
  EXPECT_TRUE(answer->report.complete);
  EXPECT_EQ(answer->report.moved_blocks, 127u);
  EXPECT_TRUE(bench.reads(3 * kChunk, kBlock, 2));
  ASSERT_TRUE(bench.cut().ok());
  auto late = bench.start_compact(bench.sources());
  bench.drive();
  bench.executor.advance(9'000'000'000);
  bench.drive();
  EXPECT_FALSE(late->given);
  bench.executor.advance(2'000'000'000);
  bench.drive();
  ASSERT_TRUE(late->given);
  EXPECT_TRUE(late->status.ok() && late->report.no_space && !late->report.complete);
}

TEST(VolumeCompact, WithHardlyAnyRoomForPageImagesItStillEnds) {
  for (uint64_t seed = 1; seed <= 10; seed++) {
    CompactBench bench(4 * kMiB, 200, seed);
    bench.arena_memory = ArenaMemory(PageArena::kMinimumBytes);
    bench.chunks_per_slab = 2;
    SimRandom random(seed);
    bench.build(random, 3, 30);
    Racing race(bench, seed);
    auto answer = bench.start_compact(bench.sources());
    for (int guard = 0; !answer->given; guard++) {
      ASSERT_LT(guard, 500'000);
      race.turn(6);
      if (HasFatalFailure()) return;
    }
    ASSERT_TRUE(answer->status.ok()) << answer->status.message;
    race.drain();
    bench.expect_same("seed " + std::to_string(seed));
  }
}

TEST(VolumeCompact, WherePagesCanNotBeWrittenItGivesUpInsteadOfWaitingForRoomForImages) {
  CompactBench bench(8 * kMiB, 200);
  bench.arena_memory = ArenaMemory(PageArena::kMinimumBytes);
  bench.chunks_per_slab = 2;
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t at = 0; at < 100; at += 10) ASSERT_EQ(bench.write(at * kChunk, 10 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  bench.errors.set_judge([&](const IoRequest& request) {
    if (request.op != IoOp::kWrite || is_data(bench, request)) return ErrorDevice::Verdict{};
    const auto& page = *static_cast<const format::SlabPage*>(request.iov->iov_base);
    const bool claim = std::all_of(std::begin(page.entries), std::end(page.entries),
                                   [](const auto& entry) { return entry.logical_chunk == format::kNoChunk; });
    return ErrorDevice::Verdict{claim ? 0 : EIO, false};  // slabs can be had
  });
  auto answer = bench.start_compact(bench.sources());
  bench.finish(*answer);
  EXPECT_EQ(answer->status.code, Code::kIo) << answer->status.message;
  bench.errors.set_judge(nullptr);
  EXPECT_TRUE(bench.reads(0, 100 * kChunk, 1));
  const auto again = bench.compact(bench.sources());
  EXPECT_TRUE(again.status.ok() && again.report.complete) << again.status.message;
  ASSERT_TRUE(bench.reopen().ok());
  EXPECT_TRUE(bench.reads(0, 100 * kChunk, 1));
}

// ---- beside other calls

TEST(VolumeCompact, OneAtATimeAndOnlyWhereWritesAreNeitherHeldNorForbidden) {
  CompactBench bench;
  SimRandom random(5);
  bench.build(random, 2);
  auto first = bench.start_compact(bench.sources());
  auto second = bench.start_compact(bench.sources());
  bench.finish(*first);
  EXPECT_TRUE(first->status.ok());
  EXPECT_EQ(second->status.code, Code::kBusy);
  ASSERT_TRUE(bench.hold().ok());
  EXPECT_EQ(bench.compact(bench.sources()).status.code, Code::kBusy);
  ASSERT_TRUE(bench.release().ok());
  EXPECT_TRUE(bench.compact(bench.sources()).status.ok());
  auto reader = bench.view(1);
  Status refused;
  reader->compact(bench.sources(2), 1000, 0, [&](Result<CompactReport> result) { refused = result.status; });
  bench.drive();
  EXPECT_EQ(refused.code, Code::kInvalidArgument);
  bench.drop(reader);
  ASSERT_TRUE(bench.abort().ok());
  EXPECT_EQ(bench.compact(bench.sources()).status.code, Code::kUnavailable);
}

// What is called while one batch is at the disk; the rest of it is never begun.
struct Halfway : CompactBench {
  Halfway() : CompactBench(8 * kMiB, 200) {
    EXPECT_TRUE(open().ok());
    EXPECT_EQ(write(0, 64 * kChunk, 1), 0);
    EXPECT_TRUE(cut().ok());
    device.set_delay([this](const IoRequest& request) { return is_data(*this, request) ? DelayDevice::kHold : 0; });
    answer = start_compact(sources());
    drive();  // the new top has no slab yet
    executor.advance(20'000'000);
    drive();
    EXPECT_GE(device.held(), 1u);
    EXPECT_FALSE(answer->given);
  }
  void go_on() {
    device.set_delay(nullptr);
    device.let_all_go();
    drive();
  }
  std::unique_ptr<Compacting> answer;
};

TEST(VolumeCompact, AHoldLetsTheBatchEndBeforeAnyWriteIsHeldAndTheRestWaitsForAnotherTime) {
  Halfway bench;
  Status held{Code::kUnavailable, ""};
  bool answered = false;
  bench.volume->hold(1'000'000'000, [&](Status status) {
    held = std::move(status);
    answered = true;
  });
  bench.drive();
  EXPECT_FALSE(answered);
  auto beside = bench.start(VolumeOp::kDiscard, 100 * kChunk, kChunk);
  auto flush = bench.start(VolumeOp::kFlush, 0, 0);
  bench.drive();
  EXPECT_TRUE(beside->done() && flush->done()) << "writes are held though nothing but the compaction is under way";
  bench.executor.advance(5'000'000'000);
  bench.drive();
  bench.go_on();
  EXPECT_TRUE(answered && held.ok()) << held.message;
  auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 2);
  bench.drive();
  EXPECT_FALSE(write->done());
  EXPECT_TRUE(bench.answer->given && bench.answer->status.ok());
  EXPECT_FALSE(bench.answer->report.complete);
  EXPECT_GT(bench.answer->report.moved_blocks, 0u);
  ASSERT_TRUE(bench.release().ok());
  bench.drive();
  EXPECT_EQ(write->error, 0);
  const auto again = bench.compact(bench.sources());
  EXPECT_TRUE(again.status.ok() && again.report.complete);
  EXPECT_EQ(again.report.moved_blocks + bench.answer->report.moved_blocks, 64u * 16);
}

TEST(VolumeCompact, ACutEndsItFirstAndHoldsWritesOnlyForItself) {
  Halfway bench;
  const LayerSpec top = bench.next_top();
  auto cut = bench.start_cut(top);
  bench.drive();
  bench.executor.advance(5'000'000'000);
  bench.drive();
  EXPECT_FALSE(cut->given);
  bench.go_on();
  ASSERT_TRUE(cut->given && cut->status.ok()) << cut->status.message;
  EXPECT_EQ(cut->report.held_ns, 0u) << "the clock has stood still since the batch was let go";
  EXPECT_TRUE(bench.answer->given && bench.answer->status.ok());
  EXPECT_FALSE(bench.answer->report.complete);
  bench.count_cut(top);
  EXPECT_TRUE(bench.reads(0, 64 * kChunk, 1));
  auto view = bench.view(1);
  EXPECT_EQ(bench.blocks_of(*view)[5], 1);
  bench.drop(view);
  const auto again = bench.compact(bench.sources());
  EXPECT_TRUE(again.status.ok() && again.report.complete);
  EXPECT_EQ(again.report.moved_blocks, 64u * 16);
}

TEST(VolumeCompact, ACloseEndsItFirstAndLeavesItsPagesWhole) {
  Halfway bench;
  Status closed{Code::kUnavailable, ""};
  bool answered = false;
  bench.volume->close([&](Status status) {
    closed = std::move(status);
    answered = true;
  });
  bench.drive();
  EXPECT_FALSE(answered);
  bench.go_on();
  ASSERT_TRUE(answered && closed.ok()) << closed.message;
  EXPECT_TRUE(bench.answer->given && bench.answer->status.ok());
  EXPECT_FALSE(bench.answer->report.complete);
  bench.volume.reset();
  bench.spec.epoch++;
  bench.spec.layers = bench.with_slabs(bench.spec.layers);
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, 64 * kChunk, 1));
  EXPECT_TRUE(bench.observer.events.empty()) << bench.observer.events[0].second;
}

TEST(VolumeCompact, AnAbortEndsItWhereverItIs) {
  // At the disk, resting, waiting for requests, and waiting for a slab.
  {
    Halfway bench;
    auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 2);
    bool stopped = false;
    bench.volume->abort([&](Status) { stopped = true; });
    bench.drive();
    EXPECT_FALSE(stopped) << "its I/O is still at the disk";
    EXPECT_EQ(write->error, EIO);
    bench.go_on();
    EXPECT_TRUE(stopped && bench.answer->given);
    EXPECT_EQ(bench.answer->status.code, Code::kUnavailable);
  }
  {
    Halfway bench;
    auto read = bench.start(VolumeOp::kRead, 80 * kChunk, kBlock);  // somebody is there, so it rests
    bench.go_on();
    ASSERT_TRUE(read->done());
    ASSERT_FALSE(bench.answer->given);
    ASSERT_TRUE(bench.abort().ok());
    EXPECT_EQ(bench.answer->status.code, Code::kUnavailable);
    bench.executor.advance(1'000'000'000);
    bench.drive();
  }
  {
    CompactBench bench(4 * kMiB, 1);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
    ASSERT_TRUE(bench.cut().ok());
    auto answer = bench.start_compact(bench.sources());
    bench.drive();
    ASSERT_FALSE(answer->given);
    ASSERT_TRUE(bench.abort().ok());
    EXPECT_EQ(answer->status.code, Code::kUnavailable);
  }
  {
    CompactBench bench;
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, 2 * kChunk, 1), 0);
    ASSERT_TRUE(bench.cut().ok());
    bench.device.set_delay([&](const IoRequest& request) { return is_data(bench, request) ? DelayDevice::kHold : 0; });
    auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 2);
    bench.drive();
    auto answer = bench.start_compact(bench.sources());
    bench.drive();
    auto parked = bench.start(VolumeOp::kWrite, kChunk, kBlock, 2);
    bench.drive();
    bool stopped = false;
    bench.volume->abort([&](Status) { stopped = true; });
    bench.drive();
    EXPECT_EQ(parked->error, EIO);
    EXPECT_EQ(answer->status.code, Code::kUnavailable) << "it has nothing at the disk and waits for nobody";
    EXPECT_FALSE(stopped);
    bench.device.set_delay(nullptr);
    bench.device.let_all_go();
    bench.drive();
    EXPECT_TRUE(stopped && write->done());
  }
}

TEST(VolumeCompact, HoldsCutsForgettingAndClosingAtRandomMomentsAreAllAnswered) {
  uint64_t early = 0;
  for (uint64_t seed = 1; seed <= 60; seed++) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    CompactBench bench(kMiB, 200, seed);
    SimRandom random(seed);
    bench.build(random, 3, 12);
    Racing race(bench, seed * 31);
    auto answer = bench.start_compact(bench.sources());
    for (uint64_t turns = random.below(120); turns > 0; turns--) race.turn(4);
    const uint64_t what = random.below(3);
    if (what == 0) {
      const LayerSpec top = bench.next_top();
      auto cut = bench.start_cut(top, 60'000'000'000);
      for (int guard = 0; !cut->given || !answer->given; guard++) {
        ASSERT_LT(guard, 500'000);
        race.turn(4);
        if (HasFatalFailure()) return;
      }
      ASSERT_TRUE(cut->status.ok()) << cut->status.message;
      bench.count_cut(top);
    } else if (what == 1) {
      bool held = false;
      bench.volume->hold(60'000'000'000, [&](Status status) { held = status.ok(); });
      for (int guard = 0; !held; guard++) {
        ASSERT_LT(guard, 500'000);
        race.turn(4);
        if (HasFatalFailure()) return;
      }
      bench.volume->release([](Status) {});
    } else {
      race.drain();
      if (HasFatalFailure()) return;
      const Status closed = bench.close();
      ASSERT_TRUE(closed.ok()) << closed.message;
      bench.spec.epoch++;
      bench.spec.layers = bench.with_slabs(bench.spec.layers);
      ASSERT_TRUE(bench.open().ok());
    }
    race.drain();
    bench.finish(*answer);
    if (HasFatalFailure()) return;
    ASSERT_TRUE(answer->status.ok()) << answer->status.message;
    early += !answer->report.complete;
    bench.expect_same("in the end");
    if (HasFailure()) return;
  }
  EXPECT_GT(early, 10u);
}

TEST(VolumeCompact, BesideRequestsItRestsAndAloneItDoesNot) {
  CompactBench bench(8 * kMiB, 200);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 64 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  uint64_t most = 0;
  bench.device.set_delay([&](const IoRequest& request) { return is_data(bench, request) ? uint64_t{1'000'000} : 0; });
  auto answer = bench.start_compact(bench.sources());
  uint64_t idle = 0;
  for (; !answer->given; idle++) {
    bench.executor.advance(1'000'000);
    bench.drive();
    most = std::max(most, bench.volume->stats().written_bytes);
  }
  // The same again, with somebody who reads all the time.
  ASSERT_TRUE(bench.cut().ok());
  auto beside = bench.start_compact(bench.sources());
  uint64_t busy = 0;
  for (; !beside->given; busy++) {
    auto read = bench.start(VolumeOp::kRead, 100 * kChunk, kBlock);
    bench.executor.advance(1'000'000);
    bench.drive();
    ASSERT_LT(busy, 100'000u);
  }
  EXPECT_EQ(beside->report.moved_blocks, answer->report.moved_blocks);
  EXPECT_GT(busy, 4 * idle);
}

}  // namespace
}  // namespace holdfast::test
