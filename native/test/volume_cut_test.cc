// Cuts of an open volume: what a snapshot shows, what becomes of writes meanwhile, and what is left when it goes wrong.
#include <algorithm>
#include <cerrno>

#include "cut_fixture.h"

namespace holdfast::test {
namespace {

using format::LayerRecord;
using format::SlabPage;

LayerRecord layer_record(const Bench& bench, uint32_t slot) {
  const uint64_t address = bench.layer_record_address(slot);
  LayerRecord pair[2];
  bench.raw_read(address, pair, sizeof pair);
  const Copies copies = choose_record(pair[0], pair[1], kPoolUuid, address);
  EXPECT_TRUE(copies.valid()) << "layer record " << slot;
  return copies.valid() ? pair[copies.newest] : LayerRecord{};
}

bool is_record(const Bench& bench, const IoRequest& request) {
  return request.offset >= bench.superblock.volume_table_offset &&
         request.offset < bench.superblock.first_region_offset && request.op == IoOp::kWrite;
}

bool is_volume_record(const Bench& bench, const IoRequest& request) {
  return is_record(bench, request) && request.offset < bench.superblock.layer_table_offset;
}

TEST(VolumeCut, ASnapshotShowsTheSameWhateverIsWrittenOrDiscardedLater) {
  for (uint64_t seed = 1; seed <= 6; seed++) {
    CutBench bench(2 * kMiB);
    SimRandom random(seed);
    std::vector<uint8_t> model(2 * kMiB / kBlock, 0);
    std::vector<std::vector<uint8_t>> snapshots;  // oldest first
    ASSERT_TRUE(bench.open().ok());
    for (int round = 0; round < 5; round++) {
      bench.churn(random, model, 60);
      const Status status = bench.cut();
      ASSERT_TRUE(status.ok()) << status.message;
      snapshots.push_back(model);
      bench.churn(random, model, 40);
      EXPECT_EQ(bench.blocks(), model) << "seed " << seed;
      for (size_t s = 0; s < snapshots.size(); s++) {
        auto view = bench.view(bench.spec.layers.size() - 1 - s);
        ASSERT_NE(view, nullptr);
        ASSERT_EQ(bench.blocks_of(*view), snapshots[s]) << "snapshot " << s << ", round " << round;
        bench.drop(view);
      }
      if (round == 2) {
        ASSERT_TRUE(bench.reopen().ok());
      }
    }
    EXPECT_EQ(bench.blocks(), model);
  }
}

TEST(VolumeCut, TheNewTopStartsWithOneSlabAtATimeAgain) {
  CutBench bench(256 * kMiB, 600);
  bench.chunks_per_slab = 8;
  ASSERT_TRUE(bench.open().ok());
  stream(bench, 0, 64 * kMiB);
  ASSERT_TRUE(bench.cut().ok());
  for (uint64_t chunk = 0; chunk < 80; chunk++) ASSERT_EQ(bench.write(chunk * kChunk, kChunk, 2), 0);
  // Empty ones would stay with the layer after the next cut, until it is stripped.
  EXPECT_LE(bench.observer.claimed.size(), 10u + 2u);
  EXPECT_TRUE(bench.reads(0, 80 * kChunk, 2));
}

TEST(VolumeCut, AChainOfMoreLayersThanTheIndexHasGroupsReadsTheSame) {
  CutBench bench(2 * kMiB);
  SimRandom random(11);
  std::vector<uint8_t> model(2 * kMiB / kBlock, 0);
  ASSERT_TRUE(bench.open().ok());
  for (int round = 0; round < 44; round++) {
    bench.churn(random, model, 5);
    ASSERT_EQ(bench.blocks(), model) << "round " << round;  // the hints are there when the next layer comes
    const Status status = bench.cut();
    ASSERT_TRUE(status.ok()) << status.message;
    bench.churn(random, model, 3);
    ASSERT_EQ(bench.blocks(), model) << "round " << round;
  }
  ASSERT_TRUE(bench.reopen().ok());
  EXPECT_EQ(bench.blocks(), model);
}

// The chunk was in limbo when the layer froze: nothing maps it any more, but a read that came before may be there.
TEST(VolumeCut, ASlabThatTheCutFindsEmptyStaysUntilReadsOfItHaveEnded) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 24 * kChunk, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  bench.absorb();
  bench.device.set_delay([&](const IoRequest& request) {
    const uint64_t data = format::slab_data_offset(bench.superblock.first_region_offset, 0);
    return request.op == IoOp::kRead && request.offset >= data ? DelayDevice::kHold : 0;
  });
  auto read = bench.start(VolumeOp::kRead, 0, kChunk);
  bench.drive();
  ASSERT_FALSE(read->done());
  ASSERT_EQ(bench.discard(0, 24 * kChunk), 0);
  const LayerSpec top = bench.next_top();
  auto answer = bench.start_cut(top);
  bench.drive();
  EXPECT_FALSE(answer->given);
  EXPECT_TRUE(bench.observer.emptied.empty()) << "a slab went while a read was in it";
  bench.device.set_delay(nullptr);
  bench.device.let_all_go();
  bench.drive();
  ASSERT_TRUE(answer->given);
  EXPECT_TRUE(answer->status.ok()) << answer->status.message;
  EXPECT_FALSE(bench.observer.emptied.empty());
  EXPECT_TRUE(read->done());
  bench.count_cut(top);
  EXPECT_TRUE(bench.reads(0, 24 * kChunk, 0));
}

TEST(VolumeCut, TheRecordsSayWhatHappened) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  const LayerRecord frozen = layer_record(bench, 4);
  EXPECT_EQ(frozen.state, format::LayerState::kFrozen);
  EXPECT_EQ(frozen.size_bytes, 4 * kMiB);
  EXPECT_EQ(field_text(frozen.snapshot_name), "snap-50");
  EXPECT_EQ(frozen.created_unix_ms, 1234u);
  EXPECT_NE(frozen.header.flags & format::kLayerSettled, 0);
  const LayerRecord top = layer_record(bench, 5);
  EXPECT_EQ(top.layer_id, 51u);
  EXPECT_EQ(top.parent_layer_id, 50u);
  EXPECT_EQ(top.volume_id, 5u);
  EXPECT_EQ(top.state, format::LayerState::kWritable);
  for (uint32_t copy = 0; copy < 2; copy++) EXPECT_EQ(bench.record(copy).top_layer_id, 51u);
}

TEST(VolumeCut, ACloneReadsItsSourceAndGoesItsOwnWay) {
  CutBench bench(2 * kMiB);
  SimRandom random(3);
  std::vector<uint8_t> model(2 * kMiB / kBlock, 0);
  ASSERT_TRUE(bench.open().ok());
  bench.churn(random, model, 100);
  ASSERT_TRUE(bench.cut().ok());
  // The source has a higher epoch than its clone ever had.
  bench.spec.epoch = 9;
  ASSERT_TRUE(bench.reopen().ok());
  bench.churn(random, model, 30);
  std::vector<uint8_t> copy = bench.blocks();
  ASSERT_TRUE(bench.cut().ok());
  VolumeSpec clone;
  clone.volume_id = 6;
  clone.slot = 7;
  clone.name = "clone";
  clone.size_bytes = 3 * kMiB;  // larger than its source
  clone.epoch = 1;
  clone.host_id = 2;
  clone.generation = 1;
  LayerSpec top;
  top.layer_id = 60;
  top.slot = 20;
  top.parent_layer_id = bench.spec.layers[1].layer_id;
  top.birth = 60;
  top.size_bytes = clone.size_bytes;
  clone.layers = bench.with_slabs({bench.spec.layers.begin() + 1, bench.spec.layers.end()});
  clone.layers.insert(clone.layers.begin(), top);
  ArenaMemory memory;
  auto arena = memory.format(6, 1);
  auto other = bench.open_other(clone, arena.get());
  ASSERT_NE(other, nullptr);
  copy.resize(3 * kMiB / kBlock, 0);
  EXPECT_EQ(bench.blocks_of(*other), copy);
  bench.churn(random, model, 40);
  EXPECT_EQ(bench.blocks_of(*other), copy) << "the source's writes show in the clone";
  ASSERT_EQ(bench.write_on(*other, 5 * kBlock, 3 * kBlock, 77), 0);
  ASSERT_EQ(bench.run_on(*other, VolumeOp::kDiscard, 20 * kBlock, 300 * kBlock, nullptr), 0);
  std::fill_n(copy.begin() + 5, 3, uint8_t{77});
  std::fill_n(copy.begin() + 20, 300, uint8_t{0});
  EXPECT_EQ(bench.blocks_of(*other), copy);
  EXPECT_EQ(bench.blocks(), model) << "the clone's writes show in the source";
  bench.drop(other);
}

TEST(VolumeCut, HeldWritesEndAfterTheCutInTheNewTopWhileReadsAndFlushesGoOn) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 2 * kChunk, 1), 0);
  bench.device.set_delay(
      [&](const IoRequest& request) { return is_volume_record(bench, request) ? DelayDevice::kHold : 0; });
  const LayerSpec top = bench.next_top();
  auto answer = bench.start_cut(top);
  bench.drive();
  ASSERT_EQ(bench.device.held(), 1u) << "the commit is at the disk";
  auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 2);
  auto fua = bench.start(VolumeOp::kWrite, kBlock, kBlock, 3, true);
  auto discard = bench.start(VolumeOp::kDiscard, kChunk, kChunk);
  auto flush = bench.start(VolumeOp::kFlush, 0, 0);
  bench.drive();
  EXPECT_FALSE(write->done() || fua->done() || discard->done());
  EXPECT_TRUE(flush->done()) << "a flush waits for nothing";
  EXPECT_TRUE(bench.reads(0, 2 * kChunk, 1));
  bench.executor.advance(5'000'000'000);
  bench.drive();
  EXPECT_FALSE(write->done()) << "once the commit is at the disk no time-out lets writes go";
  bench.device.set_delay(nullptr);
  bench.device.let_all_go();
  bench.drive();
  EXPECT_TRUE(answer->given && answer->status.ok()) << answer->status.message;
  EXPECT_GE(answer->report.held_ns, 5'000'000'000u);
  EXPECT_TRUE(write->done() && fua->done() && discard->done());
  EXPECT_EQ(write->error + fua->error + discard->error, 0);
  bench.count_cut(top);
  EXPECT_TRUE(bench.reads(0, kBlock, 2));
  EXPECT_TRUE(bench.reads(kBlock, kBlock, 3));
  EXPECT_TRUE(bench.reads(2 * kBlock, 14 * kBlock, 1));
  EXPECT_TRUE(bench.reads(kChunk, kChunk, 0));
  auto view = bench.view(1);
  EXPECT_EQ(bench.blocks_of(*view)[0], 1);
  EXPECT_EQ(bench.blocks_of(*view)[16], 1);
  bench.drop(view);
}

TEST(VolumeCut, AWriteThatWaitsForASlabDoesNotStopACutAndGoesToTheNewTop) {
  CutBench bench(4 * kMiB, 1);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  auto held = bench.start(VolumeOp::kWrite, 8 * kChunk, 2 * kChunk, 2);
  bench.drive();
  ASSERT_FALSE(held->done());
  const Status status = bench.cut();
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_FALSE(held->done());
  bench.stock.add(1, 4, 1);
  bench.drive();
  EXPECT_TRUE(held->done());
  EXPECT_EQ(held->error, 0);
  auto view = bench.view(1);
  EXPECT_EQ(bench.blocks_of(*view)[8 * 16], 0);
  bench.drop(view);
  EXPECT_TRUE(bench.reads(8 * kChunk, 2 * kChunk, 2));
}

TEST(VolumeCut, RepeatingACutIsSuccessAndTellsTheSame) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kMiB, 1), 0);
  const LayerSpec top = bench.next_top();
  ASSERT_TRUE(bench.cut().ok());
  const CutReport first = bench.report;
  for (int round = 0; round < 2; round++) {
    auto again = bench.start_cut(top);
    bench.drive();
    ASSERT_TRUE(again->given && again->status.ok()) << again->status.message;
    EXPECT_EQ(again->report.frozen.layer_id, 50u);
    EXPECT_EQ(again->report.frozen.slabs.size(), first.frozen.slabs.size());
    EXPECT_TRUE(again->report.frozen.frozen);
    ASSERT_TRUE(bench.reopen().ok());
  }
  EXPECT_EQ(bench.spec.layers.size(), 2u);
  // A cut that names another parent than the top, or a layer further down, is out of date.
  LayerSpec wrong = bench.next_top();
  wrong.parent_layer_id = 50;
  auto stale = bench.start_cut(wrong);
  bench.drive();
  EXPECT_EQ(stale->status.code, Code::kStale);
  ASSERT_TRUE(bench.cut().ok());
  auto late = bench.start_cut(top);
  bench.drive();
  EXPECT_EQ(late->status.code, Code::kStale);
}

// What the volume reads, what its snapshot shows, and which of the two tops counts, after a cut during which something
// failed or stopped at a given I/O.
struct Outcome {
  std::vector<uint8_t> before;
  LayerSpec top;
};

Outcome prepare(CutBench& bench, uint64_t seed) {
  Outcome outcome;
  SimRandom random(seed);
  outcome.before.assign(2 * kMiB / kBlock, 0);
  EXPECT_TRUE(bench.open().ok());
  bench.churn(random, outcome.before, 40);
  EXPECT_TRUE(bench.cut().ok());
  bench.churn(random, outcome.before, 40);
  outcome.top = bench.next_top();
  return outcome;
}

TEST(VolumeCut, AnErrorAtAnyRequestOfACutLeavesTheOldTopOrTheNewOne) {
  uint64_t failed = 0;
  uint64_t succeeded = 0;
  for (int carry_out = 0; carry_out < 2; carry_out++) {
    for (uint64_t fail_at = 0;; fail_at++) {
      CutBench bench(2 * kMiB);
      Outcome outcome = prepare(bench, fail_at + 1);
      uint64_t count = 0;
      bench.errors.set_judge([&](const IoRequest&) {
        return count++ == fail_at ? ErrorDevice::Verdict{EIO, carry_out == 1} : ErrorDevice::Verdict{};
      });
      auto answer = bench.start_cut(outcome.top);
      bench.drive();
      bench.executor.advance(100'000'000);  // what is tried again
      bench.drive();
      ASSERT_TRUE(answer->given) << "request " << fail_at;
      const bool at_all = count > fail_at;
      bench.errors.set_judge(nullptr);
      if (answer->status.ok()) bench.count_cut(outcome.top);
      succeeded += answer->status.ok();
      failed += !answer->status.ok();
      // Writes go on whatever happened, and the snapshot, if there is one, does not see them.
      ASSERT_EQ(bench.write(3 * kBlock, 40 * kBlock, 201), 0) << answer->status.message;
      std::vector<uint8_t> now = outcome.before;
      std::fill_n(now.begin() + 3, 40, uint8_t{201});
      ASSERT_EQ(bench.blocks(), now);
      ASSERT_EQ(bench.flush(), 0);
      bench.kill();
      ASSERT_TRUE(bench.open_by_record(outcome.top).ok()) << "request " << fail_at;
      EXPECT_EQ(bench.spec.layers[0].layer_id == outcome.top.layer_id, answer->status.ok());
      EXPECT_EQ(bench.blocks(), now);
      if (answer->status.ok()) {
        auto view = bench.view(1);
        EXPECT_EQ(bench.blocks_of(*view), outcome.before) << "request " << fail_at;
        bench.drop(view);
      } else {
        const Status again = bench.cut();
        EXPECT_TRUE(again.ok()) << again.message;
      }
      ASSERT_TRUE(bench.abort().ok());
      if (!at_all) break;
    }
  }
  EXPECT_GT(failed, 5u);
  EXPECT_GT(succeeded, 5u);
}

TEST(VolumeCut, WhileTheCommitsOutcomeIsNotKnownWritesStayHeldAndItIsWrittenAgainToTheSameCopy) {
  CutBench bench(2 * kMiB);
  Outcome outcome = prepare(bench, 5);
  std::vector<uint64_t> written;
  bool broken = true;
  bench.errors.set_judge([&](const IoRequest& request) {
    if (!is_volume_record(bench, request)) return ErrorDevice::Verdict{};
    written.push_back(request.offset);
    return broken ? ErrorDevice::Verdict{EIO, written.size() % 2 == 0} : ErrorDevice::Verdict{};
  });
  auto answer = bench.start_cut(outcome.top, 1'000'000);
  bench.drive();
  auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 9);
  for (int i = 0; i < 20; i++) {
    bench.executor.advance(1'000'000'000);
    bench.drive();
  }
  EXPECT_FALSE(answer->given);
  EXPECT_FALSE(write->done());
  EXPECT_TRUE(bench.observer.has_event("is written again until it is"));
  EXPECT_GT(written.size(), 10u);
  EXPECT_TRUE(std::all_of(written.begin(), written.end(), [&](uint64_t at) { return at == written[0]; }));
  broken = false;
  bench.executor.advance(1'000'000'000);
  bench.drive();
  EXPECT_TRUE(answer->given && answer->status.ok());
  EXPECT_TRUE(write->done());
  bench.count_cut(outcome.top);
  auto view = bench.view(1);
  EXPECT_EQ(bench.blocks_of(*view), outcome.before);
  bench.drop(view);
}

// A cut that was given up left the first 64 bytes of two records, the next one's, which takes the slot for another layer, all but those.
// Nothing else tells the new layers' records apart, and the freezing layer's is the same in both.
TEST(VolumeCut, RecordsThatWereNeverWholeAreNotMadeSoByTheNextCutsTornWrites) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 4 * kChunk, 1), 0);
  LayerSpec top = bench.next_top();
  const uint32_t old_slot = bench.spec.layers[0].slot;
  const auto cut_torn = [&](size_t from, size_t to) {
    bench.tear_writes(format::kMagicLayer, {bench.layer_record_address(top.slot), bench.layer_record_address(old_slot)}, from, to);
    auto answer = bench.start_cut(top);
    bench.drive();
    bench.errors.set_judge(nullptr);
    EXPECT_EQ(answer->status.code, Code::kIo) << answer->status.message;
  };
  cut_torn(0, 64);
  top.layer_id++;
  cut_torn(64, kBlock);
  EXPECT_EQ(layer_record(bench, old_slot).state, format::LayerState::kWritable);
  LayerRecord pair[2];
  bench.raw_read(bench.layer_record_address(top.slot), pair, sizeof pair);
  EXPECT_TRUE(choose_record(pair[0], pair[1], kPoolUuid, bench.layer_record_address(top.slot)).blank());
  ASSERT_EQ(bench.write(kChunk, kChunk, 2), 0);
  auto answer = bench.start_cut(top);
  bench.drive();
  ASSERT_TRUE(answer->given);
  EXPECT_TRUE(answer->status.ok()) << answer->status.message;
  EXPECT_EQ(layer_record(bench, old_slot).state, format::LayerState::kFrozen);
  EXPECT_EQ(layer_record(bench, top.slot).layer_id, top.layer_id);
  EXPECT_TRUE(bench.reads(kChunk, kChunk, 2));
}

TEST(VolumeCut, AnAbortEndsACutThatWaitsForItsCommit) {
  CutBench bench(2 * kMiB);
  Outcome outcome = prepare(bench, 6);
  bench.errors.set_judge([&](const IoRequest& request) {
    return is_volume_record(bench, request) ? ErrorDevice::Verdict{EIO, true} : ErrorDevice::Verdict{};
  });
  auto answer = bench.start_cut(outcome.top);
  bench.drive();
  auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 9);
  auto flush = bench.start(VolumeOp::kFlush, 0, 0);
  ASSERT_TRUE(bench.abort().ok());
  EXPECT_TRUE(answer->given);
  EXPECT_EQ(answer->status.code, Code::kUnavailable);
  EXPECT_EQ(write->error, EIO);
  EXPECT_TRUE(flush->done());
  bench.errors.set_judge(nullptr);
  bench.volume.reset();
  ASSERT_TRUE(bench.open_by_record(outcome.top).ok());
  EXPECT_EQ(bench.spec.layers[0].layer_id, outcome.top.layer_id) << "it was on the disk after all";
  EXPECT_EQ(bench.blocks(), outcome.before);
  auto again = bench.start_cut(outcome.top);
  bench.drive();
  EXPECT_TRUE(again->given && again->status.ok());
}

TEST(VolumeCut, APowerCutAtAnyRequestOfACutLeavesTheOldTopOrTheNewOne) {
  uint64_t old_tops = 0;
  uint64_t new_tops = 0;
  for (uint64_t seed = 1; seed <= 3; seed++) {
    for (uint64_t stop_at = 0;; stop_at++) {
      CutBench bench(2 * kMiB, 200, seed * 1000 + stop_at + 1);
      Outcome outcome = prepare(bench, seed);
      ASSERT_EQ(bench.flush(), 0);
      auto answer = bench.start_cut(outcome.top);
      // Writes that come in while it is under way: to blocks of their own.
      auto late = bench.start(VolumeOp::kWrite, 0, 2 * kBlock, 222);
      for (uint64_t i = 0; i < stop_at; i++) {
        bench.executor.run_until_idle();
        if (bench.sim.in_flight() > 0) bench.sim.complete_one();
      }
      bench.executor.run_until_idle();
      const bool over = bench.sim.in_flight() == 0;
      const bool acknowledged = answer->given && answer->status.ok();
      bench.cut_power();
      const Status opened = bench.open_by_record(outcome.top);
      ASSERT_TRUE(opened.ok()) << opened.message << ", seed " << seed << ", request " << stop_at;
      const bool happened = bench.spec.layers[0].layer_id == outcome.top.layer_id;
      EXPECT_TRUE(happened || !acknowledged) << "a cut that was acknowledged is gone";
      (happened ? new_tops : old_tops)++;
      const std::vector<uint8_t> now = bench.blocks();
      for (size_t b = 0; b < now.size(); b++) {
        ASSERT_TRUE(now[b] == outcome.before[b] || (b < 2 && now[b] == 222))
            << "block " << b << ", seed " << seed << ", request " << stop_at;
      }
      if (happened) {
        auto view = bench.view(1);
        const std::vector<uint8_t> shown = bench.blocks_of(*view);
        for (size_t b = 0; b < shown.size(); b++) {
          ASSERT_TRUE(shown[b] == outcome.before[b] || (b < 2 && shown[b] == 222)) << "block " << b;
        }
        bench.drop(view);
        // Later writes do not change it.
        ASSERT_EQ(bench.write(0, kMiB, 99), 0);
        ASSERT_EQ(bench.flush(), 0);
        view = bench.view(1);
        EXPECT_EQ(bench.blocks_of(*view), shown);
        bench.drop(view);
      } else {
        const Status again = bench.cut();
        EXPECT_TRUE(again.ok()) << again.message;
      }
      ASSERT_TRUE(bench.abort().ok());
      if (over) break;
    }
  }
  EXPECT_GT(old_tops, 20u);
  EXPECT_GT(new_tops, 20u);
}

TEST(VolumeCut, AnEngineKilledAnywhereInACutIsTakenOverByWhatTheRecordSays) {
  uint64_t happened_times = 0;
  for (uint64_t stop_at = 0;; stop_at++) {
    CutBench bench(2 * kMiB, 200, stop_at + 77);
    Outcome outcome = prepare(bench, stop_at);
    ASSERT_EQ(bench.write(100 * kBlock, 4 * kBlock, 33), 0);
    std::fill_n(outcome.before.begin() + 100, 4, uint8_t{33});  // not flushed: only the page images have it
    auto answer = bench.start_cut(outcome.top);
    for (uint64_t i = 0; i < stop_at; i++) {
      bench.executor.run_until_idle();
      if (bench.sim.in_flight() > 0) bench.sim.complete_one();
    }
    bench.executor.run_until_idle();
    const bool over = bench.sim.in_flight() == 0;
    // As kill(), but at once: the disk has what it has.
    std::vector<std::byte> images(bench.arena_memory.data(), bench.arena_memory.data() + bench.arena_memory.size());
    bench.sim.kill();
    ASSERT_TRUE(bench.abort().ok());
    bench.volume.reset();
    bench.arena.reset();
    std::memcpy(bench.arena_memory.data(), images.data(), images.size());
    bench.sim.revive();
    // The kept grant knows the old chain; the record decides, and a grant that disagrees is refused.
    bench.absorb();
    const VolumeSpec kept = bench.spec;
    Status opened = bench.open(true);
    if (opened.code == Code::kStale) {
      happened_times++;
      bench.count_cut(outcome.top);
      opened = bench.open(true);
    }
    ASSERT_TRUE(opened.ok()) << opened.message << ", request " << stop_at;
    EXPECT_EQ(bench.blocks(), outcome.before) << "request " << stop_at;
    const bool happened = bench.spec.layers.size() > kept.layers.size();
    ASSERT_EQ(bench.write(0, kMiB, 88), 0);
    auto again = bench.start_cut(outcome.top);
    bench.drive();
    ASSERT_TRUE(again->given && again->status.ok()) << again->status.message;
    if (!happened) {
      std::fill_n(outcome.before.begin(), kMiB / kBlock, uint8_t{88});
      bench.count_cut(outcome.top);
    }
    ASSERT_EQ(bench.flush(), 0);
    auto view = bench.view(1);
    ASSERT_NE(view, nullptr);
    EXPECT_EQ(bench.blocks_of(*view), outcome.before) << "request " << stop_at;
    bench.drop(view);
    ASSERT_TRUE(bench.close().ok());
    if (over) break;
  }
  EXPECT_GT(happened_times, 3u);
}

TEST(VolumeCut, AGroupHoldThatIsNotCutInTimeLetsWritesGoAndCutsNothing) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  ASSERT_TRUE(bench.hold(50'000'000).ok());
  EXPECT_EQ(bench.hold(50'000'000).code, Code::kBusy);
  EXPECT_EQ(bench.grow(8 * kMiB).code, Code::kBusy);
  auto write = bench.start(VolumeOp::kWrite, 0, kBlock, 2);
  bench.drive();
  EXPECT_FALSE(write->done());
  EXPECT_TRUE(bench.reads(0, kChunk, 1));
  bench.executor.advance(60'000'000);
  bench.drive();
  EXPECT_TRUE(write->done());
  for (int i = 0; i < 2; i++) EXPECT_EQ(bench.cut().code, Code::kHoldExpired) << "also when the order comes again";
  EXPECT_EQ(bench.record(0).top_layer_id, 50u);
  ASSERT_TRUE(bench.release().ok());
  ASSERT_TRUE(bench.hold().ok());
  auto second = bench.start(VolumeOp::kWrite, kBlock, kBlock, 3);
  bench.drive();
  EXPECT_FALSE(second->done());
  ASSERT_TRUE(bench.release().ok());
  bench.drive();
  EXPECT_TRUE(second->done());
  // Held, then cut: what was written before the hold is what the snapshot shows.
  ASSERT_TRUE(bench.hold().ok());
  auto third = bench.start(VolumeOp::kWrite, 2 * kBlock, kBlock, 4);
  bench.drive();
  ASSERT_TRUE(bench.cut().ok());
  bench.drive();
  EXPECT_TRUE(third->done());
  auto view = bench.view(1);
  const auto shown = bench.blocks_of(*view);
  EXPECT_EQ(shown[0], 2);
  EXPECT_EQ(shown[1], 3);
  EXPECT_EQ(shown[2], 1);
  bench.drop(view);
}

TEST(VolumeCut, AHoldThatCantDrainInTimeEndsAndNothingIsHeld) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  bench.device.set_delay([&](const IoRequest& request) {
    return request.op == IoOp::kWrite && !is_record(bench, request) && request.iov != nullptr && request.length == kBlock &&
                   static_cast<const uint8_t*>(request.iov[0].iov_base)[0] == 0x42
               ? DelayDevice::kHold
               : 0;
  });
  auto slow = bench.start(VolumeOp::kWrite, 0, kBlock, 0x42);
  const LayerSpec top = bench.next_top();
  auto answer = bench.start_cut(top, 50'000'000);
  bench.drive();
  auto other = bench.start(VolumeOp::kWrite, kBlock, kBlock, 3);
  bench.drive();
  EXPECT_FALSE(other->done());
  bench.executor.advance(60'000'000);
  bench.drive();
  EXPECT_EQ(answer->status.code, Code::kHoldExpired);
  EXPECT_TRUE(other->done());
  bench.device.set_delay(nullptr);
  bench.device.let_all_go();
  bench.drive();
  EXPECT_TRUE(slow->done());
  EXPECT_TRUE(bench.cut().ok());
}

// The older layer may be stripped of what the top covers, below it there may be data: what is cleared must leave a zero.
TEST(VolumeCut, CoverageOfALayerWithParentsNeverShrinksOnTheDisk) {
  CutBench bench(kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.discard(0, 4 * kChunk), 0);  // reads as zeros from here on: data below, zeros in the middle
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(0, 2 * kChunk, 3), 0);
  ASSERT_EQ(bench.write(9 * kChunk, kChunk, 3), 0);  // nothing below: no need to remember
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.discard(kBlock, kChunk), 0);
  ASSERT_EQ(bench.discard(9 * kChunk, kChunk), 0);
  ASSERT_EQ(bench.flush(), 0);
  bench.absorb();
  std::vector<uint16_t> covered(16);
  for (const SlabRun& run : bench.slabs_of(52)) {
    SlabPage pair[2] = {bench.page(run.first, 0), bench.page(run.first, 1)};
    const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, bench.page_address(run.first, 0));
    ASSERT_TRUE(copies.valid());
    const SlabPage& page = pair[copies.newest];
    for (const auto& entry : page.entries) {
      if (entry.logical_chunk != format::kNoChunk) {
        covered[entry.logical_chunk] = static_cast<uint16_t>(covered[entry.logical_chunk] | entry.data | entry.zero);
      }
    }
    for (uint32_t h = 0; h < page.hole_count; h++) {
      for (uint32_t c = 0; c < page.holes[h].length; c++) covered[page.holes[h].start + c] = 0xffff;
    }
  }
  EXPECT_EQ(covered[0], 0xffff);
  EXPECT_EQ(covered[1], 0xffff);
  EXPECT_EQ(covered[9], 0);
}

// The same at random, against every page that is ever on the disk, and with failing flushes.
TEST(VolumeCut, CoverageNeverShrinksInAnyPageThatReachesTheDisk) {
  for (uint64_t seed = 1; seed <= 10; seed++) {
    CutBench bench(kMiB);
    SimRandom random(seed);
    std::vector<uint8_t> model(kMiB / kBlock, 0);
    ASSERT_TRUE(bench.open().ok());
    bench.churn(random, model, 60);
    ASSERT_TRUE(bench.cut().ok());
    bench.churn(random, model, 30);
    ASSERT_TRUE(bench.cut().ok());
    // What the two older layers mention, by their pages; and what the top covers, by the newest pages on the disk.
    const auto coverage = [&](uint64_t layer) {
      std::vector<uint16_t> covered(16);
      for (uint64_t slab = 0; slab < 60; slab++) {
        SlabPage pair[2] = {bench.page(slab, 0), bench.page(slab, 1)};
        const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, bench.page_address(slab, 0));
        if (!copies.valid() || pair[copies.newest].layer_id != layer) continue;
        const SlabPage& page = pair[copies.newest];
        for (const auto& entry : page.entries) {
          if (entry.logical_chunk == format::kNoChunk) continue;
          covered[entry.logical_chunk] = static_cast<uint16_t>(covered[entry.logical_chunk] | entry.data | entry.zero);
        }
        for (uint32_t h = 0; h < page.hole_count; h++) {
          for (uint32_t c = 0; c < page.holes[h].length; c++) covered[page.holes[h].start + c] = 0xffff;
        }
      }
      return covered;
    };
    std::vector<uint16_t> mentioned = coverage(50);
    for (size_t c = 0; c < 16; c++) mentioned[c] = static_cast<uint16_t>(mentioned[c] | coverage(51)[c]);
    std::vector<uint16_t> before(16);
    for (int round = 0; round < 120; round++) {
      bench.churn(random, model, 4);
      bench.errors.set_judge([&](const IoRequest& request) {
        return request.op != IoOp::kRead && random.chance(60) ? ErrorDevice::Verdict{EIO, random.chance(500)}
                                                              : ErrorDevice::Verdict{};
      });
      const int flushed = bench.flush();
      bench.errors.set_judge(nullptr);
      ASSERT_TRUE(flushed == 0 || flushed == EIO);
      const std::vector<uint16_t> now = coverage(52);
      for (size_t c = 0; c < 16; c++) {
        ASSERT_EQ(before[c] & mentioned[c] & ~now[c], 0) << "chunk " << c << ", round " << round << ", seed " << seed;
      }
      before = now;
    }
    EXPECT_EQ(bench.blocks(), model);
    ASSERT_TRUE(bench.abort().ok());
  }
}

// The service has the slab as the old top's, from an earlier opening that never came to use it.
TEST(VolumeCut, ASlabOfTheOldTopStaysWithItAlthoughAnotherClaimOfItWasCutOff) {
  CutBench bench(kMiB, 0);
  bench.books[50][0] = 1;
  bench.spec.layers[0].slabs = {{0, 1, 1}};
  ASSERT_TRUE(bench.open().ok());
  bench.errors.set_judge([&](const IoRequest& request) {
    return ErrorDevice::Verdict{request.op == IoOp::kWrite ? EIO : 0, false};
  });
  EXPECT_EQ(bench.write(0, kBlock, 1), EIO);
  bench.errors.set_judge(nullptr);
  bench.kill();
  ASSERT_TRUE(bench.open(true).ok());
  bench.stock.add(1, 1, 1);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(0, kBlock, 2), 0);
  EXPECT_EQ(bench.page(1, 0).layer_id, 51u);
  EXPECT_NE(bench.page(0, 0).layer_id, 51u);
  ASSERT_TRUE(bench.reopen().ok());
  EXPECT_TRUE(bench.reads(0, kBlock, 2));
}

// Somebody may have read it, and stripped an older layer against it.
TEST(VolumeCut, APageThatReachedTheDiskAlthoughItsFlushFailedIsNotWrittenOver) {
  CutBench bench(kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  const uint64_t slab = bench.slabs_of(50)[0].first;
  ASSERT_EQ(bench.write(kChunk, kBlock, 2), 0);
  uint64_t reached = 0;
  for (int landed = 0; landed < 2; landed++) {
    bench.errors.set_judge([&](const IoRequest& request) {
      const bool page = request.op == IoOp::kWrite && request.offset - bench.page_address(slab, 0) < 2 * kBlock;
      if (page) reached = request.offset;
      return page ? ErrorDevice::Verdict{EIO, landed == 1} : ErrorDevice::Verdict{};
    });
    ASSERT_EQ(bench.flush(), EIO);
    std::vector<uint64_t> written;
    bench.errors.set_judge([&](const IoRequest& request) {
      const bool page = request.op == IoOp::kWrite && request.offset - bench.page_address(slab, 0) < 2 * kBlock;
      if (page) written.push_back(request.offset);
      return ErrorDevice::Verdict{};
    });
    ASSERT_EQ(bench.write((landed + 2) * kChunk, kBlock, 3), 0);
    ASSERT_EQ(bench.flush(), 0);
    bench.errors.set_judge(nullptr);
    EXPECT_EQ(written[0], reached);
    EXPECT_EQ(written.size(), 1u + static_cast<size_t>(landed)) << "a copy that is whole is kept, the other one changed";
    EXPECT_EQ(written.back() == reached, landed == 0);
    ASSERT_EQ(bench.write((landed + 5) * kChunk, kBlock, 3), 0);
  }
  ASSERT_TRUE(bench.reopen().ok());
  EXPECT_TRUE(bench.reads(kChunk, kBlock, 2));
  EXPECT_TRUE(bench.reads(2 * kChunk, kBlock, 3));
}

TEST(VolumeCut, TheFrozenLayersPagesAreEqualAndItsEmptySlabsGoBack) {
  CutBench bench(4 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 20 * kChunk, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.write(kChunk, 3 * kBlock, 2), 0);
  ASSERT_EQ(bench.discard(8 * kChunk, 8 * kChunk), 0);  // one slab's whole content
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_TRUE(bench.cut().ok());
  for (const SlabRun& run : bench.report.frozen.slabs) {
    for (uint64_t slab = run.first; slab < run.first + run.count; slab++) {
      const SlabPage a = bench.page(slab, 0);
      const SlabPage b = bench.page(slab, 1);
      EXPECT_TRUE(choose_slab(a, b, kPoolUuid, bench.page_address(slab, 0)).equal) << "slab " << slab;
      EXPECT_TRUE(std::any_of(std::begin(a.entries), std::end(a.entries),
                              [](const auto& entry) { return entry.logical_chunk != format::kNoChunk; }))
          << "slab " << slab << " is empty and still the layer's";
    }
  }
  EXPECT_EQ(bench.report.frozen.slabs.size() > 0 ? bench.slabs_of(50).size() : 0, 2u);
  EXPECT_EQ(bench.slabs_of(51).size(), 0u) << "the new top costs nothing before its first write";
  EXPECT_EQ(bench.volume->stats().allocated_bytes, 0u);
  EXPECT_EQ(bench.volume->stats().dirty_pages, 0u);
}

TEST(VolumeCut, ForgettingWaitsForReadsInFlightAndNothingResolvesThereLater) {
  CutBench bench(4 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  const std::vector<SlabRun> frozen = bench.report.frozen.slabs;
  ASSERT_FALSE(frozen.empty());
  const uint64_t data = bench.superblock.first_region_offset + format::kRegionPagesSize;
  bench.device.set_delay(
      [&](const IoRequest& request) { return request.offset >= data ? DelayDevice::kHold : uint64_t{0}; });
  auto read = bench.start(VolumeOp::kRead, 0, kChunk);
  bench.drive();
  ASSERT_EQ(bench.device.held(), 1u);
  bench.device.set_delay(nullptr);
  ASSERT_EQ(bench.write(0, 8 * kChunk, 9), 0);
  ASSERT_EQ(bench.flush(), 0);
  Status forgotten{Code::kBusy, "not yet"};
  bench.volume->forget(frozen, {}, [&](Status status) { forgotten = std::move(status); });
  bench.drive();
  for (int i = 0; i < 3; i++) {
    ASSERT_EQ(bench.flush(), 0);
    EXPECT_TRUE(bench.reads(0, 8 * kChunk, 9));
  }
  EXPECT_EQ(forgotten.code, Code::kBusy) << "a read is still at the place";
  EXPECT_FALSE(read->done());
  bench.device.let_all_go();
  bench.drive();
  EXPECT_TRUE(forgotten.ok()) << forgotten.message;
  EXPECT_EQ(read->error, 0);
  // The slab is somebody else's from here on.
  std::vector<uint8_t> other(8 * kChunk, 0xcc);
  bench.raw_write(format::slab_data_offset(bench.superblock.first_region_offset, frozen[0].first), other.data(),
                  other.size());
  EXPECT_TRUE(bench.reads(0, 8 * kChunk, 9));
  ASSERT_EQ(bench.discard(0, kChunk), 0);
  EXPECT_TRUE(bench.reads(0, kChunk, 0));
  EXPECT_TRUE(bench.call([&](Volume::Done done) { bench.volume->forget(frozen, {}, std::move(done)); }).ok())
      << "an order that comes again";
  ASSERT_EQ(bench.write(20 * kChunk, 30 * kChunk, 4), 0);  // takes the index again
  ASSERT_TRUE(bench.cut().ok());
  EXPECT_TRUE(bench.reads(20 * kChunk, 30 * kChunk, 4));
  EXPECT_TRUE(bench.reads(kChunk, 7 * kChunk, 9));
  bench.kill();
  bench.absorb();
  bench.books[50].clear();
  bench.spec.layers = bench.with_slabs(bench.spec.layers);
  ASSERT_TRUE(bench.open(true).ok()) << "what was forgotten does not come back with a take-over";
  EXPECT_TRUE(bench.reads(kChunk, 7 * kChunk, 9));
}

TEST(VolumeCut, WhereAForgottenLayerOfALongChainAnsweredAnOlderOneDoes) {
  CutBench bench(4 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 2), 0);
  ASSERT_TRUE(bench.cut().ok());
  const std::vector<SlabRun> covered = bench.report.frozen.slabs;
  for (uint64_t layer = 0; layer < 4; layer++) {
    ASSERT_EQ(bench.write((20 + layer) * kChunk, kBlock, 3), 0);
    ASSERT_TRUE(bench.cut().ok());
  }
  EXPECT_TRUE(bench.reads(0, 8 * kChunk, 2));
  ASSERT_EQ(bench.write(0, 8 * kChunk, 9), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_TRUE(bench.call([&](Volume::Done done) { bench.volume->forget(covered, {}, std::move(done)); }).ok());
  // The discard has to know that the oldest layer would show through.
  ASSERT_EQ(bench.discard(0, kChunk), 0);
  ASSERT_EQ(bench.discard(2 * kChunk + kBlock, kBlock), 0);
  EXPECT_TRUE(bench.reads(0, kChunk, 0));
  EXPECT_TRUE(bench.reads(kChunk, kChunk + kBlock, 9));
  EXPECT_TRUE(bench.reads(2 * kChunk + kBlock, kBlock, 0));
  EXPECT_TRUE(bench.reads(2 * kChunk + 2 * kBlock, 5 * kChunk + 14 * kBlock, 9));
}

// Killed between the pages that give an empty slab of the old top back and the word of it: the engine that takes over finds
// nothing in it, and holds it for claimed all the same.
TEST(VolumeCut, AnEmptySlabThatWasForgottenDoesNotComeBackWithATakeOver) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 4 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  const std::vector<SlabRun> empty = bench.slabs_of(50);
  ASSERT_FALSE(empty.empty());
  bench.kill();
  for (const SlabRun& run : empty) {
    for (uint32_t copy = 0; copy < 2; copy++) {
      format::SlabPage page = bench.page(run.first, copy);
      const uint64_t sequence = page.header.sequence + 1;
      make_free_slab_page(&page, run.generation);
      seal(page, kPoolUuid, bench.page_address(run.first, copy), sequence);
      bench.raw_write(bench.page_address(run.first, copy), &page, kBlock);
    }
  }
  bench.spec.layers = bench.with_slabs(bench.spec.layers);
  ASSERT_TRUE(bench.open(true).ok());
  ASSERT_TRUE(bench.call([&](Volume::Done done) { bench.volume->forget(empty, {}, std::move(done)); }).ok());
  bench.kill();
  // They are another volume's by now.
  for (const SlabRun& run : empty) {
    for (uint32_t copy = 0; copy < 2; copy++) {
      format::SlabPage page = bench.page(run.first, copy);
      page.layer_id = 900;
      page.volume_id = 90;
      page.generation = run.generation + 1;
      seal(page, kPoolUuid, bench.page_address(run.first, copy), 1);
      bench.raw_write(bench.page_address(run.first, copy), &page, kBlock);
    }
  }
  bench.books[50].clear();
  bench.spec.layers = bench.with_slabs(bench.spec.layers);
  const Status opened = bench.open(true);
  EXPECT_TRUE(opened.ok()) << opened.message;
}

// What the metadata service has as its parent now may be another one: a layer in between has left the chain.
TEST(VolumeCut, TheLayerThatFreezesKeepsTheParentThatItsRecordNames) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_TRUE(bench.cut().ok());
  const uint32_t slot = bench.spec.layers[0].slot;
  LayerRecord record = layer_record(bench, slot);
  EXPECT_EQ(record.parent_layer_id, 50u);
  record.parent_layer_id = 49;
  for (uint32_t copy = 0; copy < 2; copy++) {
    const uint64_t address = bench.layer_record_address(slot) + copy * kBlock;
    seal(record, kPoolUuid, address, record.header.sequence + 1);
    bench.raw_write(address, &record, kBlock);
  }
  ASSERT_TRUE(bench.cut().ok());
  EXPECT_EQ(layer_record(bench, slot).parent_layer_id, 49u);
  EXPECT_EQ(layer_record(bench, slot).state, format::LayerState::kFrozen);
}

TEST(VolumeCut, ForgettingASlabOfTheWritableLayerIsRefused) {
  CutBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  const auto slabs = bench.slabs_of(50);
  EXPECT_EQ(bench.call([&](Volume::Done done) { bench.volume->forget(slabs, {}, std::move(done)); }).code,
            Code::kInvalidArgument);
  EXPECT_TRUE(bench.reads(0, kChunk, 1));
}

TEST(VolumeCut, AChainOfAThousandLayersReadsRightAndStaysSmall) {
  CutBench bench(64 * kMiB, 4000);
  bench.superblock.layer_slots = 2048;
  bench.superblock.layer_table_offset = 9 * kMiB;
  bench.superblock.first_region_offset = 32 * kMiB;
  ASSERT_TRUE(bench.open().ok());
  uint64_t memory_at_10 = 0;
  for (uint32_t layer = 1; layer < kMaxLayers; layer++) {
    ASSERT_EQ(bench.write(layer % 200 * kChunk, kBlock, static_cast<uint8_t>(1 + layer % 250)), 0);
    const LayerSpec top = bench.next_top();
    auto answer = bench.start_cut(top);
    bench.drive();
    ASSERT_TRUE(answer->given && answer->status.ok()) << layer << ": " << answer->status.message;
    bench.count_cut(top);
    if (layer == 10) memory_at_10 = bench.volume->stats().memory_bytes;
  }
  ASSERT_EQ(bench.spec.layers.size(), kMaxLayers);
  for (uint32_t c = 0; c < 200; c++) {
    uint32_t last = 0;
    for (uint32_t layer = 1; layer < kMaxLayers; layer++) last = layer % 200 == c ? layer : last;
    ASSERT_TRUE(bench.reads(c * kChunk, kBlock, last == 0 ? uint8_t{0} : static_cast<uint8_t>(1 + last % 250))) << c;
  }
  const uint64_t grown = bench.volume->stats().memory_bytes - memory_at_10;
  std::printf("memory for each layer with one chunk: %llu bytes\n",
              static_cast<unsigned long long>(grown / (kMaxLayers - 11)));
  EXPECT_LT(grown / (kMaxLayers - 11), 2048u);
  auto refused = bench.start_cut(bench.next_top());
  bench.drive();
  EXPECT_EQ(refused->status.code, Code::kNoSpace);
  ASSERT_TRUE(bench.reopen().ok()) << "a chain of the longest length opens";
  EXPECT_TRUE(bench.reads(0, kBlock, static_cast<uint8_t>(1 + 1000 % 250)));
}

}  // namespace
}  // namespace holdfast::test
