// The volume on one layer: what it serves, what it refuses, what it holds.
#include <cerrno>

#include "volume_fixture.h"

namespace holdfast::test {
namespace {

TEST(Volume, WhatWasNeverWrittenReadsAsZeros) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  EXPECT_TRUE(bench.reads(0, 4 * kMiB, 0));
}

TEST(Volume, ReadsBackWhatWasWrittenAcrossChunksAndSlabs) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t at = 0; at < 40; at++) ASSERT_EQ(bench.write(at * kMiB, kMiB, static_cast<uint8_t>(at + 1)), 0);
  for (uint64_t at = 0; at < 40; at++) ASSERT_TRUE(bench.reads(at * kMiB, kMiB, static_cast<uint8_t>(at + 1)));
  EXPECT_EQ(bench.volume->stats().mapped_bytes, 40 * kMiB);
  EXPECT_EQ(bench.observer.claimed.size(), 4u) << "three, and one ahead";
}

TEST(Volume, APartOfAChunkLeavesTheRestZero) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(3 * kBlock, 2 * kBlock, 9), 0);
  EXPECT_TRUE(bench.reads(0, 3 * kBlock, 0));
  EXPECT_TRUE(bench.reads(3 * kBlock, 2 * kBlock, 9));
  EXPECT_TRUE(bench.reads(5 * kBlock, 11 * kBlock, 0));
}

TEST(Volume, RefusesWhatLiesPastTheEndOrIsMisaligned) {
  Bench bench(kMiB);
  ASSERT_TRUE(bench.open().ok());
  EXPECT_EQ(bench.write(kMiB - kBlock, 2 * kBlock, 1), EINVAL);
  EXPECT_EQ(bench.write(kMiB, kBlock, 1), EINVAL);
  EXPECT_EQ(bench.run(VolumeOp::kRead, ~uint64_t{0} - kBlock + 1, kBlock), EINVAL);
  EXPECT_EQ(bench.run(VolumeOp::kRead, 512, kBlock), EINVAL);
  EXPECT_EQ(bench.run(VolumeOp::kRead, 0, 512), EINVAL);
  EXPECT_EQ(bench.write(kMiB - kBlock, kBlock, 1), 0);
}

TEST(Volume, SurvivesACleanCloseAndMakesAllCopiesEqual) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t at = 0; at < 20; at++) {
    ASSERT_EQ(bench.write(at * kMiB, kMiB, static_cast<uint8_t>(at + 1)), 0);
    if (at % 3 == 0) {
      ASSERT_EQ(bench.flush(), 0);
    }
  }
  const auto claimed = bench.observer.claimed;
  ASSERT_TRUE(bench.close().ok());
  for (const auto& one : claimed) {
    const auto a = bench.page(one.slab, 0);
    const auto b = bench.page(one.slab, 1);
    EXPECT_TRUE(choose_slab(a, b, kPoolUuid, bench.page_address(one.slab, 0)).equal) << "slab " << one.slab;
  }
  const auto a = bench.record(0);
  const auto b = bench.record(1);
  EXPECT_TRUE(choose_record(a, b, kPoolUuid, bench.record_address(0)).equal);
  EXPECT_EQ(a.state, format::VolumeState::kClosed);
  EXPECT_EQ(a.epoch, 1u);
  bench.next_grant();
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t at = 0; at < 20; at++) ASSERT_TRUE(bench.reads(at * kMiB, kMiB, static_cast<uint8_t>(at + 1)));
  EXPECT_TRUE(bench.observer.events.empty());
}

TEST(Volume, AFlushWithNothingNewDoesNoIo) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  const uint64_t flushes = bench.memory.count(IoOp::kFlush);
  ASSERT_EQ(bench.flush(), 0);
  EXPECT_TRUE(bench.reads(0, kBlock, 1));
  ASSERT_EQ(bench.flush(), 0);
  EXPECT_EQ(bench.memory.count(IoOp::kFlush), flushes);
}

TEST(Volume, AFlushWithoutChangedPagesIsOneDeviceFlush) {
  Bench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kBlock, 1), 0);
  ASSERT_EQ(bench.flush(), 0);
  ASSERT_EQ(bench.write(0, kBlock, 2), 0);
  const uint64_t flushes = bench.memory.count(IoOp::kFlush);
  const uint64_t writes = bench.memory.count(IoOp::kWrite);
  ASSERT_EQ(bench.flush(), 0);
  EXPECT_EQ(bench.memory.count(IoOp::kFlush), flushes + 1);
  EXPECT_EQ(bench.memory.count(IoOp::kWrite), writes);
}

}  // namespace
}  // namespace holdfast::test
