// The known ways to lose or leak data (DESIGN section 10, "Data"), each tried on purpose. A test's name is the promise.
#include <array>
#include <cerrno>
#include <functional>

#include "volume_fixture.h"

namespace holdfast::test {
namespace {

using format::SlabPage;
using format::VolumeRecord;

// A sealed slab page as some other owner might have left it.
SlabPage page_of(const Bench& bench, uint64_t slab, uint32_t copy, uint64_t generation, uint64_t layer,
                 uint64_t sequence, uint64_t epoch = 1) {
  SlabPage page{};
  page.layer_id = layer;
  page.generation = generation;
  page.epoch = epoch;
  page.volume_id = 99;
  for (uint32_t c = 0; c < format::kChunksPerSlab; c++) {
    page.entries[c] = layer == 0 ? format::SlabEntry{format::kNoChunk, 0, 0} : format::SlabEntry{c, 0xffff, 0};
  }
  seal(page, kPoolUuid, bench.page_address(slab, copy), sequence);
  return page;
}

TEST(DataHazard, AnOldOwnersPageWithAHigherNumberNeverWins) {
  Bench bench(64 * kMiB, 1);
  for (uint32_t copy = 0; copy < 2; copy++) {
    const SlabPage old = page_of(bench, 0, copy, 1, 77, 1'000'000 + copy);
    bench.raw_write(bench.page_address(0, copy), &old, sizeof old);
  }
  bench.stock.clear();
  bench.stock.add(0, 1, 2);  // granted anew: generation 2
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, 16 * kMiB, 0));
  ASSERT_EQ(bench.write(0, kBlock, 5), 0);
  // Both copies were claimed before the data went in: nothing of the old owner is left to win.
  for (uint32_t copy = 0; copy < 2; copy++) EXPECT_EQ(bench.page(0, copy).generation, 2u);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_TRUE(bench.abort().ok());
  // Whichever one copy is lost, the other is ours.
  for (uint32_t copy = 0; copy < 2; copy++) {
    const SlabPage kept = bench.page(0, copy);
    bench.damage(bench.page_address(0, copy));
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    EXPECT_TRUE(bench.reads(kChunk, 15 * kMiB, 0)) << "copy " << copy << " damaged";
    ASSERT_TRUE(bench.abort().ok());
    bench.raw_write(bench.page_address(0, copy), &kept, sizeof kept);
  }
}

TEST(DataHazard, AClaimHasBothCopiesDurableBeforeAnyDataGoesIn) {
  Bench bench(kMiB, 4, 11);
  ASSERT_TRUE(bench.open().ok());
  std::vector<std::string> order;
  bench.device.set_delay([&](const IoRequest& request) {
    if (request.op == IoOp::kWrite) {
      const bool page = request.offset < bench.superblock.first_region_offset + format::kRegionPagesSize;
      order.push_back(page ? request.offset / kBlock % 2 == 0 ? "A" : "B" : "data");
    }
    if (request.op == IoOp::kFlush) order.push_back("flush");
    return uint64_t{0};
  });
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  EXPECT_EQ(order, (std::vector<std::string>{"A", "flush", "B", "flush", "data"}));
}

// Writes, frees and writes elsewhere, cutting the power at every step of it: a chunk whose freeing is not durable in
// both copies must not hold anything else.
TEST(DataHazard, AChunkIsNotReusedWhileItsFreeingPageIsOnlyInTheVolatileCache) {
  for (uint64_t seed = 1; seed <= 40; seed++) {
    Bench bench(2 * kMiB, 1, seed);
    bench.chunks_per_slab = 4;
    ASSERT_TRUE(bench.open().ok());
    for (uint64_t c = 0; c < 4; c++) ASSERT_EQ(bench.write(c * kChunk, kChunk, static_cast<uint8_t>(c + 1)), 0);
    ASSERT_EQ(bench.flush(), 0);
    ASSERT_EQ(bench.discard(0, 2 * kChunk), 0);
    if (seed % 3 == 1) {
      ASSERT_EQ(bench.flush(), 0);
    }
    // No other room: these wait for the freed chunks, which the volume has to make durable by itself.
    auto late = bench.start(VolumeOp::kWrite, 10 * kChunk, kChunk, 0x77);
    auto later = bench.start(VolumeOp::kWrite, 11 * kChunk, kChunk, 0x78);
    for (uint64_t steps = 0; steps < seed; steps++) {
      bench.executor.run_until_idle();
      if (bench.sim.in_flight() > 0) bench.sim.complete_one();
    }
    bench.cut_power();
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    for (uint64_t c = 0; c < 2; c++) {
      EXPECT_TRUE(bench.reads(c * kChunk, kChunk, 0) || bench.reads(c * kChunk, kChunk, static_cast<uint8_t>(c + 1)))
          << "seed " << seed;
    }
    for (uint64_t c = 2; c < 4; c++) EXPECT_TRUE(bench.reads(c * kChunk, kChunk, static_cast<uint8_t>(c + 1)));
    ASSERT_TRUE(bench.abort().ok());
  }
}

TEST(DataHazard, FreedChunksComeBackWhenThePoolHasNoOtherRoom) {
  Bench bench(2 * kMiB, 1);
  bench.chunks_per_slab = 4;
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t c = 0; c < 4; c++) ASSERT_EQ(bench.write(c * kChunk, kChunk, 1), 0);
  ASSERT_EQ(bench.discard(0, 2 * kChunk), 0);
  EXPECT_EQ(bench.write(10 * kChunk, 2 * kChunk, 9), 0);
  EXPECT_TRUE(bench.reads(10 * kChunk, 2 * kChunk, 9));
  EXPECT_TRUE(bench.reads(0, 2 * kChunk, 0));
}

TEST(DataHazard, AFreedChunkIsNotReusedUnderAReadThatBeganBefore) {
  Bench bench(2 * kMiB, 1);
  bench.chunks_per_slab = 1;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  bool hold = true;
  bench.device.set_delay([&](const IoRequest& request) {
    return hold && request.op == IoOp::kRead ? DelayDevice::kHold : 0;
  });
  auto read = bench.start(VolumeOp::kRead, 0, kChunk);
  bench.drive();
  ASSERT_EQ(bench.device.held(), 1u);
  hold = false;
  ASSERT_EQ(bench.discard(0, kChunk), 0);
  auto write = bench.start(VolumeOp::kWrite, 4 * kChunk, kChunk, 2);
  for (int i = 0; i < 4; i++) ASSERT_EQ(bench.flush(), 0);
  EXPECT_FALSE(write->done()) << "the only chunk there is is still being read";
  bench.device.let_all_go();
  bench.drive();
  ASSERT_EQ(read->error, 0);
  for (uint64_t i = 0; i < kChunk; i++) ASSERT_NE(static_cast<uint8_t>(read->buffer->data()[i]), 2) << "at " << i;
  ASSERT_TRUE(write->done());
  EXPECT_EQ(write->error, 0);
}

// The page must not speak of data that the flush before it did not cover.
TEST(DataHazard, APageImageIsTakenBeforeTheDataFlush) {
  for (uint64_t seed = 1; seed <= 60; seed++) {
    Bench bench(2 * kMiB, 8, seed);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, kBlock, 1), 0);
    bool hold = true;
    bench.device.set_delay([&](const IoRequest& request) {
      return hold && request.op == IoOp::kFlush ? DelayDevice::kHold : 0;
    });
    auto flush = bench.start(VolumeOp::kFlush, 0, 0);
    bench.drive();
    ASSERT_EQ(bench.device.held(), 1u);
    bench.device.let_go(0);  // the device flush is on its way; what is written now is not covered by it
    hold = false;
    auto write = bench.start(VolumeOp::kWrite, kBlock, kBlock, 2);
    for (uint64_t steps = 0; steps < 3 + seed % 9; steps++) {
      bench.executor.run_until_idle();
      if (bench.sim.in_flight() > 0) bench.sim.complete_one();
    }
    const bool flushed = flush->done();
    bench.cut_power();
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    if (flushed) {
      EXPECT_TRUE(bench.reads(0, kBlock, 1));
    }
    EXPECT_TRUE(bench.reads(kBlock, kBlock, 0) || bench.reads(kBlock, kBlock, 2)) << "seed " << seed;
    ASSERT_TRUE(bench.abort().ok());
  }
}

TEST(DataHazard, TheFirstFlushAfterATakeOverIsNeverSkippedAsClean) {
  for (uint64_t seed = 1; seed <= 20; seed++) {
    Bench bench(2 * kMiB, 8, seed);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, kChunk, 1), 0);
    ASSERT_EQ(bench.flush(), 0);
    ASSERT_EQ(bench.write(0, kChunk, 2), 0);           // in place: no page changes
    ASSERT_EQ(bench.write(4 * kChunk, kChunk, 3), 0);  // a new chunk: a page does
    bench.kill();
    ASSERT_TRUE(bench.open(true).ok());
    ASSERT_EQ(bench.flush(), 0);
    bench.cut_power();
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    EXPECT_TRUE(bench.reads(0, kChunk, 2)) << "seed " << seed;
    EXPECT_TRUE(bench.reads(4 * kChunk, kChunk, 3)) << "seed " << seed;
    ASSERT_TRUE(bench.abort().ok());
  }
}

TEST(DataHazard, TheFirstFlushAfterOpeningGoesToTheDevice) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  const uint64_t flushes = bench.memory.count(IoOp::kFlush);
  ASSERT_EQ(bench.flush(), 0);
  EXPECT_EQ(bench.memory.count(IoOp::kFlush), flushes + 1);
}

TEST(DataHazard, AnEmptySlabIsReturnedOnlyAfterItsDiscardIsOver) {
  Bench bench(2 * kMiB, 8);
  bench.chunks_per_slab = 2;
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t c = 0; c < 8; c++) ASSERT_EQ(bench.write(c * kChunk, kChunk, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.discard(0, 8 * kChunk), 0);
  bench.device.set_delay([&](const IoRequest& request) {
    if (request.op != IoOp::kDiscard) return uint64_t{0};
    // By now neither copy of the page says that the slab is anybody's.
    for (uint64_t slab = 0; slab < 8; slab++) {
      if (format::slab_data_offset(bench.superblock.first_region_offset, slab) != request.offset) continue;
      EXPECT_EQ(bench.page(slab, 0).layer_id, 0u);
      EXPECT_EQ(bench.page(slab, 1).layer_id, 0u);
    }
    return DelayDevice::kHold;
  });
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.write(9 * kChunk, kBlock, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_GT(bench.device.held(), 0u);
  EXPECT_TRUE(bench.observer.emptied.empty()) << "returned while its discard was under way";
  bench.device.set_delay(nullptr);
  bench.device.let_all_go();
  bench.drive();
  EXPECT_FALSE(bench.observer.emptied.empty());
}

// Hand-made chain: a frozen layer with data everywhere under a writable top.
struct Chain : Bench {
  explicit Chain(uint64_t seed, uint64_t size = kMiB) : Bench(size, 32, seed) {}
  void freeze() {
    ASSERT_TRUE(close().ok());
    next_grant();
    LayerSpec top;
    top.layer_id = spec.layers[0].layer_id + 1;
    top.slot = spec.layers[0].slot + 1;
    top.parent_layer_id = spec.layers[0].layer_id;
    top.birth = spec.layers[0].birth + 1;
    spec.layers[0].frozen = true;
    spec.layers.insert(spec.layers.begin(), top);
    for (uint32_t copy = 0; copy < 2; copy++) {
      VolumeRecord changed = record(copy);
      changed.top_layer_id = top.layer_id;
      seal(changed, kPoolUuid, record_address(copy), changed.header.sequence + 1);
      raw_write(record_address(copy), &changed, sizeof changed);
    }
  }
};

TEST(DataHazard, AHoleIsNeverLostWhileTheDataBitItReplacesIsCleared) {
  for (uint64_t seed = 1; seed <= 80; seed++) {
    Chain bench(seed);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, kMiB, 0xaa), 0);
    bench.freeze();
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, kMiB, 0xbb), 0);
    ASSERT_EQ(bench.flush(), 0);
    // Whole chunks (a hole), and part of one (a zero mask).
    ASSERT_EQ(bench.discard(0, 6 * kChunk + 5 * kBlock), 0);
    auto flush = bench.start(VolumeOp::kFlush, 0, 0);
    for (uint64_t steps = 0; steps < seed % 8; steps++) {
      bench.executor.run_until_idle();
      if (bench.sim.in_flight() > 0) bench.sim.complete_one();
    }
    bench.cut_power();
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    for (uint64_t c = 0; c < 6; c++) {
      EXPECT_TRUE(bench.reads(c * kChunk, kChunk, 0) || bench.reads(c * kChunk, kChunk, 0xbb))
          << "the frozen layer shows through at chunk " << c << ", seed " << seed;
    }
    EXPECT_TRUE(bench.reads(6 * kChunk, 5 * kBlock, 0) || bench.reads(6 * kChunk, 5 * kBlock, 0xbb));
    EXPECT_TRUE(bench.reads(6 * kChunk + 5 * kBlock, kMiB - 6 * kChunk - 5 * kBlock, 0xbb));
    ASSERT_TRUE(bench.abort().ok());
  }
}

TEST(DataHazard, ADiscardIsExactToTheBlockAndNeverIgnored) {
  Bench bench(4 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  const struct {
    uint64_t block, count;
  } cases[] = {{0, 1}, {15, 2}, {3, 1}, {16, 16}, {40, 1}, {47, 33}, {100, 412}, {1, 700}};
  for (VolumeOp op : {VolumeOp::kDiscard, VolumeOp::kWriteZeroes}) {
    for (const auto& [block, count] : cases) {
      ASSERT_EQ(bench.write(0, 4 * kMiB, 7), 0);
      ASSERT_EQ(bench.run(op, block * kBlock, count * kBlock), 0);
      if (block > 0) {
        EXPECT_TRUE(bench.reads(0, block * kBlock, 7));
      }
      EXPECT_TRUE(bench.reads(block * kBlock, count * kBlock, 0));
      EXPECT_TRUE(bench.reads((block + count) * kBlock, 4 * kMiB - (block + count) * kBlock, 7));
    }
  }
}

TEST(DataHazard, ADiscardWorksOnAFullPool) {
  Bench bench(4 * kMiB, 1);
  bench.chunks_per_slab = 8;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  bench.stock.declare_full();
  EXPECT_EQ(bench.discard(kBlock, 3 * kChunk), 0);
  EXPECT_EQ(bench.run(VolumeOp::kWriteZeroes, 5 * kChunk, 20 * kChunk), 0);
  EXPECT_TRUE(bench.reads(kBlock, 3 * kChunk, 0));
  EXPECT_TRUE(bench.reads(5 * kChunk, 20 * kChunk, 0));
  EXPECT_TRUE(bench.reads(0, kBlock, 1));
}

TEST(DataHazard, WhatWasDiscardedDoesNotComeBackWithALaterPartialWrite) {
  Bench bench(kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.discard(0, kChunk), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.write(2 * kBlock, kBlock, 2), 0);
  EXPECT_TRUE(bench.reads(0, 2 * kBlock, 0));
  EXPECT_TRUE(bench.reads(3 * kBlock, 13 * kBlock, 0));
  ASSERT_TRUE(bench.close().ok());
  bench.next_grant();
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, 2 * kBlock, 0));
  EXPECT_TRUE(bench.reads(2 * kBlock, kBlock, 2));
  EXPECT_TRUE(bench.reads(3 * kBlock, 13 * kBlock, 0));
}

TEST(DataHazard, ATornVolumeRecordLosesNoEpoch) {
  for (uint32_t torn_write = 0; torn_write < 2; torn_write++) {
    Bench bench(kMiB);
    bench.spec.epoch = 5;
    ASSERT_TRUE(bench.open().ok());
    ASSERT_TRUE(bench.abort().ok());
    EXPECT_EQ(bench.record(0).epoch, 5u);
    EXPECT_EQ(bench.record(1).epoch, 5u);
    // The next opener's power goes while it writes one of the copies.
    bench.spec.epoch = 6;
    uint32_t writes = 0;
    bench.errors.set_judge([&](const IoRequest& request) {
      if (request.op != IoOp::kWrite || request.offset < bench.record_address(0) ||
          request.offset > bench.record_address(1) || writes++ != torn_write) {
        return ErrorDevice::Verdict{};
      }
      std::vector<std::byte> half(kBlock);
      bench.raw_read(request.offset, half.data(), kBlock);
      std::memcpy(half.data(), request.iov[0].iov_base, kBlock / 2);
      bench.raw_write(request.offset, half.data(), kBlock);
      return ErrorDevice::Verdict{EIO, false};
    });
    const Status status = bench.open();
    EXPECT_EQ(status.ok(), torn_write == 1) << status.message;  // one durable copy is enough to be open
    if (status.ok()) {
      ASSERT_TRUE(bench.abort().ok());
    }
    bench.errors.set_judge(nullptr);
    // A grant no newer than the newest durable epoch stays refused, whichever copy was torn.
    bench.spec.epoch = torn_write == 0 ? 5 : 6;
    const Status refused = bench.open();
    EXPECT_EQ(refused.code, Code::kStale) << refused.message;
    bench.spec.epoch = 7;
    ASSERT_TRUE(bench.open().ok());
    EXPECT_EQ(bench.record(0).epoch, 7u);
    EXPECT_EQ(bench.record(1).epoch, 7u);
    ASSERT_TRUE(bench.abort().ok());
  }
}

// Killed between the two copies of the record: the next opener must write over the older one first.
TEST(DataHazard, TheOlderCopyOfTheRecordIsWrittenFirst) {
  Bench bench(kMiB);
  bench.spec.epoch = 4;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_TRUE(bench.abort().ok());
  const VolumeRecord before = bench.record(0);
  bench.spec.epoch = 5;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_TRUE(bench.abort().ok());
  bench.raw_write(bench.record_address(0), &before, sizeof before);  // copy A is of epoch 4, copy B of epoch 5
  std::vector<uint64_t> order;
  bench.errors.set_judge([&](const IoRequest& request) {
    if (request.op == IoOp::kWrite) order.push_back(request.offset);
    return ErrorDevice::Verdict{};
  });
  bench.spec.epoch = 6;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_GE(order.size(), 2u);
  EXPECT_EQ(order[0], bench.record_address(0));
  EXPECT_EQ(order[1], bench.record_address(1));
}

TEST(DataHazard, ARecordWithTwoBadCopiesIsRefused) {
  Bench bench(kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_TRUE(bench.close().ok());
  bench.damage(bench.record_address(0));
  bench.next_grant();
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.observer.has_event("of its record"));
  ASSERT_TRUE(bench.abort().ok());
  bench.damage(bench.record_address(0));
  bench.damage(bench.record_address(1));
  bench.next_grant();
  EXPECT_EQ(bench.open().code, Code::kCorrupt);
}

TEST(DataHazard, ASlabWithTwoBadCopiesIsNamedAndNeverServedAsEmpty) {
  Bench bench(64 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t m = 0; m < 40; m++) ASSERT_EQ(bench.write(m * kMiB, kMiB, 3), 0);
  ASSERT_TRUE(bench.close().ok());
  bench.next_grant();
  const uint64_t slab = bench.spec.layers[0].slabs[1].first;  // the second 16 MiB
  bench.damage(bench.page_address(slab, 0));
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.observer.has_event("slab " + std::to_string(slab)));
  EXPECT_TRUE(bench.reads(20 * kMiB, kMiB, 3));
  ASSERT_TRUE(bench.abort().ok());
  bench.damage(bench.page_address(slab, 1));
  bench.next_grant();
  const Status status = bench.open();
  EXPECT_EQ(status.code, Code::kCorrupt);
  EXPECT_NE(status.message.find("slab " + std::to_string(slab)), std::string::npos) << status.message;
  EXPECT_NE(status.message.find("bytes 16777216 to 67108864"), std::string::npos) << status.message;
}

// Only damage can lead here: a copy that should have been superseded serves again.
TEST(DataHazard, AChunkThatSeveralSlabsMapIsServedByTheNewestPage) {
  const std::vector<std::array<uint64_t, 3>> orders = {{11, 12, 13}, {13, 12, 11}, {12, 13, 11}, {12, 11, 13}};
  for (const auto& numbers : orders) {
    Bench bench(kMiB, 3);
    bench.chunks_per_slab = 1;
    ASSERT_TRUE(bench.open().ok());
    for (uint64_t c = 0; c < 3; c++) ASSERT_EQ(bench.write(c * kChunk, kChunk, static_cast<uint8_t>(c + 1)), 0);
    ASSERT_TRUE(bench.close().ok());
    bench.next_grant();
    uint8_t newest = 0;
    for (uint64_t slab = 0; slab < 3; slab++) {
      for (uint32_t copy = 0; copy < 2; copy++) {
        SlabPage page = bench.page(slab, copy);
        if (numbers[slab] == 13) newest = static_cast<uint8_t>(page.entries[0].logical_chunk + 1);
        page.entries[0].logical_chunk = 9;
        seal(page, kPoolUuid, bench.page_address(slab, copy), numbers[slab]);
        bench.raw_write(bench.page_address(slab, copy), &page, sizeof page);
      }
    }
    ASSERT_TRUE(bench.open().ok());
    EXPECT_TRUE(bench.observer.has_event("is newer and serves"));
    EXPECT_TRUE(bench.reads(9 * kChunk, kChunk, newest));
    ASSERT_EQ(bench.write(0, 2 * kChunk, 8), 0) << "the losers' places can be used again";
    EXPECT_TRUE(bench.reads(9 * kChunk, kChunk, newest));
    ASSERT_TRUE(bench.close().ok());
    bench.observer.events.clear();
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    EXPECT_TRUE(bench.observer.events.empty());
    EXPECT_TRUE(bench.reads(9 * kChunk, kChunk, newest));
    EXPECT_TRUE(bench.reads(0, 2 * kChunk, 8));
  }
}

// A frozen layer whose pages' copies were not yet equal when the power went, and then the newer one of a page was lost.
TEST(DataHazard, AChunkThatSeveralSlabsOfAFrozenLayerMapIsServedByTheNewestPage) {
  for (const bool read_only : {false, true}) {
    Chain bench(0);
    bench.chunks_per_slab = 1;
    ASSERT_TRUE(bench.open().ok());
    for (uint64_t c = 0; c < 3; c++) ASSERT_EQ(bench.write(c * kChunk, kChunk, static_cast<uint8_t>(c + 1)), 0);
    bench.freeze();
    uint8_t newest = 0;
    for (const SlabRun& run : bench.spec.layers[1].slabs) {
      for (uint32_t copy = 0; copy < 2; copy++) {
        SlabPage page = bench.page(run.first, copy);
        const uint32_t chunk = page.entries[0].logical_chunk;
        if (chunk == format::kNoChunk) continue;
        if (chunk == 1) newest = 2;
        page.entries[0].logical_chunk = 9;
        seal(page, kPoolUuid, bench.page_address(run.first, copy), chunk == 1 ? 13 : 10 + chunk);
        bench.raw_write(bench.page_address(run.first, copy), &page, sizeof page);
      }
    }
    bench.spec.read_only = read_only;
    const Status status = bench.open();
    ASSERT_TRUE(status.ok()) << status.message;
    EXPECT_TRUE(bench.observer.has_event("is newer and serves"));
    EXPECT_EQ(newest, 2);
    EXPECT_TRUE(bench.reads(9 * kChunk, kChunk, newest));
    ASSERT_TRUE(bench.abort().ok());
  }
}

TEST(DataHazard, AVolumeNeverShrinksSoItCannotGrowOldBytesBack) {
  Bench bench(4 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(3 * kMiB, kMiB, 9), 0);
  EXPECT_EQ(bench.grow(2 * kMiB).code, Code::kInvalidArgument);
  ASSERT_TRUE(bench.grow(8 * kMiB).ok());
  EXPECT_TRUE(bench.reads(3 * kMiB, kMiB, 9));
  EXPECT_TRUE(bench.reads(4 * kMiB, 4 * kMiB, 0));
  ASSERT_TRUE(bench.close().ok());
  // The service has not heard of the growth: the record, which is durable, counts.
  bench.next_grant();
  bench.spec.size_bytes = 2 * kMiB;
  ASSERT_TRUE(bench.open().ok());
  EXPECT_EQ(bench.volume->stats().size_bytes, 8 * kMiB);
  EXPECT_TRUE(bench.reads(3 * kMiB, kMiB, 9));
}

TEST(DataHazard, AClaimedSlabThatTheServiceThinksFreeIsLeftAlone) {
  for (uint64_t generation : {2, 3}) {
    Bench bench(kMiB, 0);
    for (uint32_t copy = 0; copy < 2; copy++) {
      const SlabPage claimed = page_of(bench, 1, copy, 3, 77, 12);
      bench.raw_write(bench.page_address(1, copy), &claimed, sizeof claimed);
    }
    const SlabPage before = bench.page(1, 0);
    bench.stock.add(1, 1, generation);  // a restored database gives it out again
    bench.stock.add(2, 1, generation);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, kBlock, 1), 0);
    EXPECT_TRUE(bench.observer.has_event("it is left alone"));
    const SlabPage after = bench.page(1, 0);
    EXPECT_EQ(std::memcmp(&before, &after, sizeof before), 0);
    ASSERT_EQ(bench.observer.claimed.size(), 1u);
    EXPECT_EQ(bench.observer.claimed[0].slab, 2u);
  }
}

TEST(DataHazard, AGrantOfASlabThatHasBeenHandedOnIsRefused) {
  Bench bench(kMiB, 4);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  ASSERT_TRUE(bench.close().ok());
  bench.next_grant();
  const uint64_t slab = bench.spec.layers[0].slabs[0].first;
  for (uint32_t copy = 0; copy < 2; copy++) {
    const SlabPage other = page_of(bench, slab, copy, 2, 77, 1);
    bench.raw_write(bench.page_address(slab, copy), &other, sizeof other);
  }
  EXPECT_EQ(bench.open().code, Code::kStale);
}

// Either the same copy is written again, or, where the page did get there, what is there is made sure of first.
TEST(DataHazard, APageWriteOfUnknownOutcomeIsRetriedToTheSameCopyOrKeptWhole) {
  enum Way { kLost, kLanded, kFlushFailed };
  for (const Way way : {kLost, kLanded, kFlushFailed}) {
    Bench bench(kMiB, 4);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, kBlock, 1), 0);
    ASSERT_EQ(bench.flush(), 0);
    ASSERT_EQ(bench.write(kBlock, kBlock, 2), 0);
    struct Written {
      uint64_t offset;
      uint64_t sequence;
    };
    std::vector<Written> written;
    bool fail = true;
    bench.errors.set_judge([&](const IoRequest& request) {
      if (request.op == IoOp::kWrite) {
        written.push_back({request.offset, static_cast<const SlabPage*>(request.iov[0].iov_base)->header.sequence});
      }
      const bool hit = fail && (way == kFlushFailed ? request.op == IoOp::kFlush && !written.empty()
                                                    : request.op == IoOp::kWrite);
      return ErrorDevice::Verdict{hit ? EIO : 0, way != kLost};
    });
    EXPECT_EQ(bench.flush(), EIO);
    EXPECT_EQ(bench.flush(), EIO);
    fail = false;
    EXPECT_EQ(bench.flush(), 0);
    // The copy that served before the failures is written only behind one that is whole and newer.
    const uint64_t tried = written[0].offset;
    uint64_t sure = 0;
    for (size_t i = 0; i < written.size(); i++) {
      if (written[i].offset == tried) {
        EXPECT_TRUE(way == kLost || written[i].sequence == written[0].sequence);
        sure = written[i].sequence;
      } else {
        EXPECT_NE(way, kLost);
        EXPECT_GT(written[i].sequence, sure);
      }
    }
    EXPECT_GE(written.size(), 3u);
    // And what a failed flush left dirty is durable now.
    bench.errors.set_judge(nullptr);
    ASSERT_TRUE(bench.abort().ok());
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    EXPECT_TRUE(bench.reads(kBlock, kBlock, 2));
  }
}

TEST(DataHazard, AChunkWhoseFirstWriteFailedIsNotFreedUnderAZeroMask) {
  Chain bench(0);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kMiB, 0xaa), 0);
  bench.freeze();
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(8 * kChunk, kBlock, 1), 0);  // a slab is there
  bench.errors.set_judge([&](const IoRequest& request) {
    return ErrorDevice::Verdict{request.op == IoOp::kWrite ? EIO : 0, false};
  });
  EXPECT_EQ(bench.write(0, kBlock, 2), EIO);  // takes a place in vain
  bench.errors.set_judge(nullptr);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.discard(0, 2 * kBlock), 0);  // the same place now says "zeros"
  for (int i = 0; i < 4; i++) {
    ASSERT_EQ(bench.write(9 * kChunk, kBlock, 3), 0);
    ASSERT_EQ(bench.flush(), 0);
  }
  EXPECT_TRUE(bench.reads(0, 2 * kBlock, 0));
  EXPECT_TRUE(bench.reads(2 * kBlock, 6 * kBlock, 0xaa));
}

TEST(DataHazard, AHalfWrittenFirstClaimIsNotTakenForDamage) {
  Bench bench(kMiB, 1, 3);
  ASSERT_TRUE(bench.open().ok());
  // The claim of copy A gets as far as everything but its first sector.
  bench.errors.set_judge([&](const IoRequest& request) {
    if (request.op != IoOp::kWrite || request.offset != bench.page_address(0, 0)) return ErrorDevice::Verdict{};
    std::vector<std::byte> torn(kBlock);
    std::memcpy(torn.data() + 512, static_cast<std::byte*>(request.iov[0].iov_base) + 512, kBlock - 512);
    bench.raw_write(request.offset, torn.data(), kBlock);
    return ErrorDevice::Verdict{EIO, false};
  });
  EXPECT_EQ(bench.write(0, kBlock, 1), EIO);
  bench.errors.set_judge(nullptr);
  bench.kill();
  ASSERT_TRUE(bench.open(true).ok());
  EXPECT_EQ(bench.write(0, kBlock, 1), 0);
  EXPECT_TRUE(bench.reads(0, kBlock, 1));
}

// Tears the `nth` write (from 0) to the page pair of slab 0 and fails it, as when the power goes in the middle of it.
void tear_page_write(Bench& bench, uint32_t nth) {
  bench.errors.set_judge([&bench, nth, seen = uint32_t{0}](const IoRequest& request) mutable {
    const bool page = request.offset >= bench.page_address(0, 0) && request.offset <= bench.page_address(0, 1);
    if (request.op != IoOp::kWrite || !page || seen++ != nth) return ErrorDevice::Verdict{};
    std::vector<std::byte> torn(kBlock);
    std::memcpy(torn.data(), request.iov[0].iov_base, kBlock / 2);
    bench.raw_write(request.offset, torn.data(), kBlock);
    return ErrorDevice::Verdict{EIO, false};
  });
}

TEST(DataHazard, AClaimThatIsMadeAgainLeavesOneCopyWhole) {
  Bench bench(kMiB, 1);
  ASSERT_TRUE(bench.open().ok());
  tear_page_write(bench, 1);
  EXPECT_EQ(bench.write(0, kBlock, 1), EIO);
  ASSERT_TRUE(bench.abort().ok());
  bench.spec.layers[0].slabs = {{0, 1, 1}};  // found by its page
  bench.spec.epoch++;
  ASSERT_TRUE(bench.open().ok());
  tear_page_write(bench, 0);
  EXPECT_EQ(bench.write(0, kBlock, 2), EIO);
  bench.errors.set_judge(nullptr);
  ASSERT_TRUE(bench.abort().ok());
  bench.spec.epoch++;
  const Status status = bench.open();
  ASSERT_TRUE(status.ok()) << status.message;
  ASSERT_EQ(bench.write(0, kBlock, 3), 0);
  EXPECT_TRUE(bench.reads(0, kBlock, 3));
}

// The sectors that a torn page lacks may be the same in the next page written to that copy.
TEST(DataHazard, ATornCopyIsNotMadeWholeByAnotherTornWrite) {
  Bench bench(64 * kMiB, 1, 21);
  // The next page that goes to slab 0 gets no further than one half of it, on either side of its first 512 bytes.
  const auto tear_next = [&](bool first_sector) {
    bench.errors.set_judge([&bench, first_sector](const IoRequest& request) {
      const bool page = request.offset >= bench.page_address(0, 0) && request.offset <= bench.page_address(0, 1);
      if (request.op != IoOp::kWrite || !page) return ErrorDevice::Verdict{};
      std::vector<std::byte> torn(kBlock);
      bench.raw_read(request.offset, torn.data(), kBlock);
      const size_t at = first_sector ? 0 : 512;
      std::memcpy(torn.data() + at, static_cast<std::byte*>(request.iov[0].iov_base) + at,
                  first_sector ? 512 : kBlock - 512);
      bench.raw_write(request.offset, torn.data(), kBlock);
      return ErrorDevice::Verdict{EIO, false};
    });
    EXPECT_EQ(bench.flush(), EIO);
    bench.errors.set_judge(nullptr);
    bench.cut_power();
    bench.next_grant();
  };
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  // Chunk 1 is described in the page's first sector, chunk 60 in the second.
  ASSERT_EQ(bench.write(kChunk, kBlock, 2), 0);
  ASSERT_EQ(bench.write(60 * kChunk, kBlock, 3), 0);
  tear_next(true);
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(kChunk, kBlock, 0));
  // Chunk 60 again, and another chunk where chunk 1 was.
  ASSERT_EQ(bench.write(60 * kChunk, kBlock, 4), 0);
  ASSERT_EQ(bench.write(200 * kChunk, kBlock, 5), 0);
  tear_next(false);
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, kBlock, 1));
  EXPECT_TRUE(bench.reads(kChunk, kBlock, 0));
  EXPECT_TRUE(bench.reads(60 * kChunk, kBlock, 0));
}

// The same of a record: the first volume of a slot was deleted before its record was ever whole, the next one has parameters of its class.
TEST(DataHazard, ARecordThatWasNeverWholeIsNotMadeSoByTheNextVolumesTornWrite) {
  Bench bench(kMiB, 1, 21);
  bench.spec.parameters_json = std::string(300, 'p');  // on both sides of the record's first 512 bytes
  const auto open_torn = [&](size_t from, size_t to) {
    bench.tear_writes(format::kMagicVolume, {bench.record_address(0)}, from, to);
    EXPECT_EQ(bench.open().code, Code::kIo);
    bench.errors.set_judge(nullptr);
    bench.sim.cut_power();
  };
  open_torn(0, 512);
  bench.spec.volume_id = 6;
  bench.spec.name = "next";
  bench.spec.layers[0].layer_id = 60;
  bench.spec.layers[0].slot = 5;
  open_torn(512, kBlock);
  bench.spec.epoch++;
  const Status opened = bench.open();
  EXPECT_TRUE(opened.ok()) << opened.message;
}

// And of a layer's: the first top of the volume was given up before its record was ever whole, the next one has its slot, and its place in
// the order of births. All that tells them apart is in the record's first 64 bytes.
TEST(DataHazard, ALayersRecordThatWasNeverWholeIsNotMadeSoByTheNextFirstOpensTornWrite) {
  Bench bench(kMiB, 1, 21);
  const uint64_t address = bench.layer_record_address(bench.spec.layers[0].slot);
  const auto open_torn = [&](size_t from, size_t to) {
    bench.tear_writes(format::kMagicLayer, {address}, from, to);
    EXPECT_EQ(bench.open().code, Code::kIo);
    bench.errors.set_judge(nullptr);
    bench.sim.cut_power();
  };
  open_torn(0, 64);
  bench.spec.layers[0].layer_id = 60;
  open_torn(64, kBlock);
  format::LayerRecord pair[2];
  bench.raw_read(address, pair, sizeof pair);
  EXPECT_TRUE(choose_record(pair[0], pair[1], kPoolUuid, address).blank());
  bench.spec.epoch++;
  const Status opened = bench.open();
  EXPECT_TRUE(opened.ok()) << opened.message;
}

// Killed while the second copy of a claim was on its way: it may be in the device's cache only.
TEST(DataHazard, AClaimThatWasCutOffIsMadeAgainBeforeDataGoesIn) {
  Bench bench(kMiB, 1);
  ASSERT_TRUE(bench.open().ok());
  bench.errors.set_judge([&](const IoRequest& request) {
    const bool second = request.op == IoOp::kWrite && request.offset == bench.page_address(0, 1);
    return ErrorDevice::Verdict{second ? EIO : 0, true};
  });
  EXPECT_EQ(bench.write(0, kBlock, 1), EIO);
  bench.kill();
  ASSERT_TRUE(bench.open(true).ok());
  std::vector<std::string> order;
  bench.errors.set_judge([&](const IoRequest& request) {
    if (request.op == IoOp::kWrite) {
      const bool page = request.offset < bench.superblock.first_region_offset + format::kRegionPagesSize;
      order.push_back(page ? "page" : "data");
    }
    if (request.op == IoOp::kFlush) order.push_back("flush");
    return ErrorDevice::Verdict{};
  });
  ASSERT_EQ(bench.write(0, kBlock, 2), 0);
  EXPECT_EQ(order, (std::vector<std::string>{"page", "flush", "page", "flush", "data"}));
}

// Killed between taking a slab from the stock and looking at its page: the slab was somebody else's all along.
TEST(DataHazard, AClaimOfASlabThatIsSomebodyElsesDoesNotKeepTheVolumeFromOpening) {
  Bench bench(kMiB, 1);
  ASSERT_TRUE(bench.open().ok());
  bench.errors.set_judge([](const IoRequest& request) {
    return ErrorDevice::Verdict{request.op == IoOp::kRead ? EIO : 0, false};
  });
  EXPECT_EQ(bench.write(0, kBlock, 1), EIO);
  bench.errors.set_judge(nullptr);
  bench.kill();
  for (uint32_t copy = 0; copy < 2; copy++) {
    const SlabPage theirs = page_of(bench, 0, copy, 1, 77, 9);
    bench.raw_write(bench.page_address(0, copy), &theirs, sizeof theirs);
  }
  const Status status = bench.open(true);
  ASSERT_TRUE(status.ok()) << status.message;
  bench.stock.add(1, 1, 1);
  ASSERT_EQ(bench.write(0, kBlock, 2), 0);
  EXPECT_TRUE(bench.observer.has_event("it is left alone"));
  EXPECT_EQ(bench.page(0, 0).layer_id, 77u);
  EXPECT_EQ(bench.page(0, 1).layer_id, 77u);
}

// What the record says may be in the cache only, after a write of unknown outcome. Were the other copy written over at
// once and torn by a power cut, an epoch would be lost.
TEST(DataHazard, TheRecordThatWasReadIsDurableBeforeTheOtherCopyIsWrittenOver) {
  for (const bool taking_over : {false, true}) {
    Bench bench(kMiB);
    ASSERT_TRUE(bench.open().ok());
    if (taking_over) bench.kill();
    else ASSERT_TRUE(bench.abort().ok());
    std::string order;
    bench.errors.set_judge([&](const IoRequest& request) {
      if (order.size() < 3) order += "RWFD"[static_cast<int>(request.op)];
      return ErrorDevice::Verdict{};
    });
    bench.spec.epoch += taking_over ? 0 : 1;
    ASSERT_TRUE(bench.open(taking_over).ok());
    EXPECT_EQ(order, "RFW");
  }
}

// The first flush of a slab's page went to the copy that is damaged now; the other one is the claim, which is empty.
TEST(DataHazard, ADamagedCopyIsToldOfAlsoWhereTheOtherOneIsEmpty) {
  Bench bench(kMiB, 1);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_TRUE(bench.abort().ok());
  bench.damage(bench.page_address(0, 1));
  bench.next_grant();
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.observer.has_event("copy B of the page of slab 0"));
}

// A claim that was cut off, made again after a cut for the layer on top since, and cut off once more: one copy names the old top, and
// the one that named the new top is damaged. Were there anything in the slab, both would name the new top.
TEST(DataHazard, AnUnfinishedClaimOfAnOlderTopIsMadeAgainWhereTheNewerCopyIsDamaged) {
  for (const bool holds_data : {false, true}) {
    Chain bench(0);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.write(0, kChunk, 1), 0);
    bench.freeze();
    const uint64_t top = bench.spec.layers[0].layer_id;
    const uint64_t slab = 40;
    SlabPage old = page_of(bench, slab, 0, 1, 0, 5);
    old.layer_id = bench.spec.layers[1].layer_id;
    old.volume_id = bench.spec.volume_id;
    if (holds_data) old.entries[0] = {3, 1, 0};
    seal(old, kPoolUuid, bench.page_address(slab, 0), 5);
    bench.raw_write(bench.page_address(slab, 0), &old, sizeof old);
    bench.raw_write(bench.page_address(slab, 1), &old, sizeof old);
    bench.damage(bench.page_address(slab, 1));
    bench.spec.layers[0].slabs.push_back({slab, 1, 1});
    const Status status = bench.open();
    EXPECT_EQ(status.ok(), !holds_data) << status.message;
    if (!status.ok()) continue;
    EXPECT_TRUE(bench.observer.has_event("copy B of the page of slab 40"));
    ASSERT_EQ(bench.write(kChunk, kChunk, 2), 0);
    for (uint32_t copy = 0; copy < 2; copy++) EXPECT_EQ(bench.page(slab, copy).layer_id, top);
    EXPECT_TRUE(bench.reads(0, kChunk, 1));
    EXPECT_TRUE(bench.reads(kChunk, kChunk, 2));
    ASSERT_TRUE(bench.abort().ok());
  }
}

}  // namespace
}  // namespace holdfast::test
