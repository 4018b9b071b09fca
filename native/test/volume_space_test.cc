// Space: held writes, full pools, slabs that come and go, image slots that run short.
#include <cerrno>

#include "volume_fixture.h"

namespace holdfast::test {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;

TEST(VolumeSpace, AWriteWithoutASlabIsHeldAndGoesOnWhenOneComes) {
  Bench bench(4 * kMiB, 0);
  ASSERT_TRUE(bench.open().ok());
  auto write = bench.start(VolumeOp::kWrite, 0, kChunk, 1);
  bench.drive();
  EXPECT_FALSE(write->done());
  EXPECT_EQ(bench.volume->stats().held, 1u);
  EXPECT_TRUE(bench.reads(0, kChunk, 0)) << "reads go on";
  bench.executor.advance(3600 * kSecond);
  bench.drive();
  EXPECT_FALSE(write->done()) << "an absent service is no reason to fail";
  bench.stock.add(0, 1, 1);
  bench.drive();
  ASSERT_TRUE(write->done());
  EXPECT_EQ(write->error, 0);
  EXPECT_EQ(bench.volume->stats().held, 0u);
  EXPECT_TRUE(bench.reads(0, kChunk, 1));
}

TEST(VolumeSpace, AFullPoolHoldsForTheTimeoutThenSaysEnospcWhileRewritesGoOn) {
  Bench bench(4 * kMiB, 1);
  bench.chunks_per_slab = 4;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 4 * kChunk, 1), 0);
  bench.stock.declare_full();
  auto first = bench.start(VolumeOp::kWrite, 8 * kChunk, kChunk, 2);
  bench.drive();
  bench.executor.advance(30 * kSecond);
  auto second = bench.start(VolumeOp::kWrite, 9 * kChunk, kChunk, 3);
  bench.drive();
  EXPECT_EQ(bench.write(kChunk, kChunk, 4), 0) << "rewrites go on";
  EXPECT_TRUE(bench.reads(kChunk, kChunk, 4));
  bench.executor.advance(31 * kSecond);
  bench.drive();
  ASSERT_TRUE(first->done());
  EXPECT_EQ(first->error, ENOSPC);
  EXPECT_FALSE(second->done()) << "each request is held for the whole timeout";
  bench.executor.advance(30 * kSecond);
  bench.drive();
  ASSERT_TRUE(second->done());
  EXPECT_EQ(second->error, ENOSPC);
  bench.stock.add(1, 1, 1);
  EXPECT_EQ(bench.write(8 * kChunk, kChunk, 2), 0);
}

TEST(VolumeSpace, AnAbortAnswersHeldWritesAndTakesTheWaiterBack) {
  Bench bench(4 * kMiB, 0);
  ASSERT_TRUE(bench.open().ok());
  auto write = bench.start(VolumeOp::kWrite, 0, kChunk, 1);
  bench.drive();
  EXPECT_EQ(bench.stock.waiters(), 1u);
  ASSERT_TRUE(bench.abort().ok());
  ASSERT_TRUE(write->done());
  EXPECT_EQ(write->error, EIO);
  EXPECT_EQ(bench.stock.waiters(), 0u);
  EXPECT_EQ(bench.run(VolumeOp::kRead, 0, kBlock), EIO);
  EXPECT_EQ(bench.flush(), EIO);
  ASSERT_TRUE(bench.abort().ok()) << "idempotent";
  bench.volume.reset();
  bench.stock.add(0, 1, 1);
  bench.drive();
}

TEST(VolumeSpace, AnAbortWaitsForWhatIsAtTheDeviceAndWritesNothingMore) {
  Bench bench(4 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  bench.device.set_delay([](const IoRequest& request) { return request.op == IoOp::kWrite ? DelayDevice::kHold : 0; });
  auto write = bench.start(VolumeOp::kWrite, 0, kChunk, 2);
  bench.drive();
  bool stopped = false;
  bench.volume->abort([&](Status) { stopped = true; });
  bench.drive();
  EXPECT_FALSE(stopped);
  const uint64_t writes = bench.memory.count(IoOp::kWrite);
  bench.device.let_all_go();
  bench.drive();
  EXPECT_TRUE(stopped);
  EXPECT_EQ(write->error, EIO);
  EXPECT_EQ(bench.memory.count(IoOp::kWrite), writes + 1) << "only what was at the device already";
}

TEST(VolumeSpace, TheNextSlabIsClaimedBeforeTheCurrentOneIsFull) {
  Bench bench(64 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kMiB, 1), 0);
  EXPECT_EQ(bench.observer.claimed.size(), 1u) << "a small volume costs one slab";
  for (uint64_t m = 8; m < 13; m++) ASSERT_EQ(bench.write(m * kMiB, kMiB, 1), 0);
  EXPECT_EQ(bench.observer.claimed.size(), 2u);
}

TEST(VolumeSpace, AStreamOfFirstWritesClaimsManySlabsWithTwoFlushes) {
  Bench bench(256 * kMiB, 600);
  bench.chunks_per_slab = 8;
  ASSERT_TRUE(bench.open().ok());
  const uint64_t flushes = bench.memory.count(IoOp::kFlush);
  stream(bench, 0, 256 * kMiB);
  EXPECT_EQ(bench.observer.claimed.size(), 512u) << "the whole volume, and not one slab more";
  EXPECT_LE(bench.memory.count(IoOp::kFlush) - flushes, 2 * 512u / 6);
}

TEST(VolumeSpace, WhatAStreamHadAheadGoesBackWhenItIsOver) {
  Bench bench(256 * kMiB, 600);
  bench.chunks_per_slab = 8;
  ASSERT_TRUE(bench.open().ok());
  stream(bench, 0, 64 * kMiB);
  ASSERT_EQ(bench.flush(), 0);
  const size_t claimed = bench.observer.claimed.size();
  EXPECT_GE(claimed, 128u + 8u);
  EXPECT_TRUE(bench.observer.emptied.empty()) << "it may go on";
  bench.executor.advance(11'000'000'000);
  ASSERT_EQ(bench.write(0, kBlock, 2), 0);
  ASSERT_EQ(bench.flush(), 0);
  EXPECT_LE(claimed - bench.observer.emptied.size(), 128u + 3u);
  EXPECT_EQ(bench.observer.claimed.size(), claimed);
  ASSERT_EQ(bench.write(64 * kMiB, 8 * kMiB, 3), 0);
  EXPECT_TRUE(bench.reads(64 * kMiB, 8 * kMiB, 3));
}

TEST(VolumeSpace, ASequentialStreamLiesInOrderEvenWhenItsRequestsArriveOutOfOrder) {
  Bench bench(64 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  for (uint64_t group = 0; group < 10; group++) {
    for (uint64_t i : {3, 1, 2, 4}) ASSERT_EQ(bench.write((group * 4 + i) * kChunk, kChunk, 1), 0);
  }
  const uint64_t reads = bench.memory.count(IoOp::kRead);
  EXPECT_TRUE(bench.reads(0, 41 * kChunk, 1));
  EXPECT_EQ(bench.memory.count(IoOp::kRead), reads + 1) << "one piece on the disk is one I/O";
}

TEST(VolumeSpace, ABigFirstWriteIsOneDeviceWrite) {
  Bench bench(64 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  const uint64_t writes = bench.memory.count(IoOp::kWrite);
  ASSERT_EQ(bench.write(kChunk, kMiB, 2), 0);
  EXPECT_EQ(bench.memory.count(IoOp::kWrite), writes + 1);
}

TEST(VolumeSpace, EmptiedSlabsGoBackAndCanBeGrantedAnew) {
  Bench bench(16 * kMiB, 16);
  bench.chunks_per_slab = 16;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 16 * kMiB, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.discard(0, 16 * kMiB), 0);
  for (int i = 0; i < 3; i++) {
    ASSERT_EQ(bench.write(0, kBlock, 2), 0);
    ASSERT_EQ(bench.flush(), 0);
  }
  EXPECT_GE(bench.observer.emptied.size(), 13u);
  EXPECT_LE(bench.volume->stats().allocated_bytes, 3 * 16 * kMiB);
  const auto emptied = bench.observer.emptied;
  bench.take_reports();
  for (const auto& one : emptied) bench.stock.add(one.slab, 1, one.generation + 1);
  ASSERT_EQ(bench.write(0, 16 * kMiB, 3), 0);
  EXPECT_TRUE(bench.reads(0, 16 * kMiB, 3));
  ASSERT_TRUE(bench.close().ok());
  bench.next_grant();
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, 16 * kMiB, 3));
}

TEST(VolumeSpace, SlabsKeptForHeldWritesGoBackWhenThoseAreDone) {
  Bench bench(16 * kMiB, 8);
  bench.chunks_per_slab = 4;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 32 * kChunk, 1), 0);  // the stock is used up
  ASSERT_EQ(bench.flush(), 0);
  auto held = bench.start(VolumeOp::kWrite, 40 * kChunk, kChunk, 2);
  bench.drive();
  EXPECT_FALSE(held->done());
  ASSERT_EQ(bench.discard(0, 32 * kChunk), 0);
  for (int i = 0; i < 4; i++) {
    ASSERT_EQ(bench.write(40 * kChunk, kBlock, 2), 0);
    ASSERT_EQ(bench.flush(), 0);
  }
  EXPECT_TRUE(held->done());
  EXPECT_GE(bench.observer.emptied.size(), 5u);
  EXPECT_TRUE(bench.reads(40 * kChunk, kChunk, 2));
}

TEST(VolumeSpace, MoreChangedPagesThanImageSlotsOnlyMeansMoreFlushes) {
  Bench bench(64 * kMiB, 200);
  bench.arena_memory = ArenaMemory(PageArena::kMinimumBytes);
  bench.chunks_per_slab = 4;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_LT(bench.arena->slot_count(), 16u);
  ASSERT_EQ(bench.write(0, 24 * kMiB, 1), 0);
  ASSERT_EQ(bench.discard(0, 20 * kMiB), 0);
  EXPECT_TRUE(bench.reads(0, 20 * kMiB, 0));
  EXPECT_TRUE(bench.reads(20 * kMiB, 4 * kMiB, 1));
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_TRUE(bench.close().ok());
  bench.next_grant();
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, 20 * kMiB, 0));
  EXPECT_TRUE(bench.reads(20 * kMiB, 4 * kMiB, 1));
}

TEST(VolumeSpace, AFuaWriteIsDurableMapIncluded) {
  for (uint64_t seed = 1; seed <= 10; seed++) {
    Bench bench(4 * kMiB, 8, seed);
    ASSERT_TRUE(bench.open().ok());
    ASSERT_EQ(bench.run(VolumeOp::kWrite, 3 * kBlock, 20 * kBlock, 5, true), 0);
    bench.cut_power();
    bench.next_grant();
    ASSERT_TRUE(bench.open().ok());
    EXPECT_TRUE(bench.reads(3 * kBlock, 20 * kBlock, 5));
    ASSERT_TRUE(bench.abort().ok());
  }
}

TEST(VolumeSpace, WhatAKilledEngineAcknowledgedIsThereAfterTheTakeOver) {
  Bench bench(16 * kMiB, 16);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 3 * kMiB, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.write(2 * kMiB, 3 * kMiB, 2), 0);
  ASSERT_EQ(bench.discard(0, kMiB), 0);
  bench.kill();
  // The grant is the old one: what was claimed since stands in the arena.
  ASSERT_TRUE(bench.open(true).ok());
  EXPECT_TRUE(bench.reads(0, kMiB, 0));
  EXPECT_TRUE(bench.reads(kMiB, kMiB, 1));
  EXPECT_TRUE(bench.reads(2 * kMiB, 3 * kMiB, 2));
  EXPECT_TRUE(bench.reads(5 * kMiB, 11 * kMiB, 0));
}

TEST(VolumeSpace, AnEqualEpochIsRightOnlyForTakingOver) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_TRUE(bench.abort().ok());
  EXPECT_EQ(bench.open().code, Code::kStale);
  bench.kill();
  bench.spec.generation++;  // another life of the host is another holder
  EXPECT_EQ(bench.open(true).code, Code::kStale);
  bench.spec.generation--;
  EXPECT_TRUE(bench.open(true).ok());
}

TEST(VolumeSpace, AFencedRecordIsNeverReopened) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_TRUE(bench.close().ok());
  for (uint32_t copy = 0; copy < 2; copy++) {
    format::VolumeRecord record = bench.record(copy);
    record.fenced = 1;
    seal(record, kPoolUuid, bench.record_address(copy), record.header.sequence + 1);
    bench.raw_write(bench.record_address(copy), &record, sizeof record);
  }
  bench.next_grant();
  EXPECT_EQ(bench.open().code, Code::kFenced);
}

TEST(VolumeSpace, AReadOnlyVolumeWritesNothing) {
  Bench bench(4 * kMiB);
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kMiB, 6), 0);
  ASSERT_TRUE(bench.close().ok());
  bench.next_grant();
  bench.spec.read_only = true;
  const uint64_t writes = bench.memory.count(IoOp::kWrite);
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, kMiB, 6));
  EXPECT_EQ(bench.write(0, kBlock, 1), EROFS);
  EXPECT_EQ(bench.discard(0, kBlock), EROFS);
  EXPECT_EQ(bench.flush(), 0);
  ASSERT_TRUE(bench.close().ok());
  EXPECT_EQ(bench.memory.count(IoOp::kWrite), writes);
}

}  // namespace
}  // namespace holdfast::test
