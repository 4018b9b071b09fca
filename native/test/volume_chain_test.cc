// Chains of layers, made by hand: the topmost layer that says something about a block answers for it.
#include <algorithm>
#include <cerrno>

#include "volume_fixture.h"

namespace holdfast::test {
namespace {

struct Chain : Bench {
  explicit Chain(uint64_t size = 4 * kMiB) : Bench(size, 200) { chunks_per_slab = 8; }
  // What a snapshot of a closed volume comes to: the record names a new top above the frozen layer.
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
      format::VolumeRecord changed = record(copy);
      changed.top_layer_id = top.layer_id;
      seal(changed, kPoolUuid, record_address(copy), changed.header.sequence + 1);
      raw_write(record_address(copy), &changed, sizeof changed);
    }
    ASSERT_TRUE(open().ok());
  }
  void reopen() {
    ASSERT_TRUE(close().ok());
    next_grant();
    ASSERT_TRUE(open().ok());
  }
};

TEST(VolumeChain, EachBlockIsAnsweredByTheTopmostLayerThatHasIt) {
  Chain bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kMiB, 1), 0);
  bench.freeze();
  ASSERT_EQ(bench.write(3 * kBlock, 2 * kBlock, 2), 0);
  ASSERT_EQ(bench.write(kMiB, kChunk, 2), 0);
  bench.freeze();
  ASSERT_EQ(bench.write(4 * kBlock, 3 * kBlock, 3), 0);
  for (int round = 0; round < 2; round++) {
    EXPECT_TRUE(bench.reads(0, 3 * kBlock, 1));
    EXPECT_TRUE(bench.reads(3 * kBlock, kBlock, 2));
    EXPECT_TRUE(bench.reads(4 * kBlock, 3 * kBlock, 3));
    EXPECT_TRUE(bench.reads(7 * kBlock, kMiB - 7 * kBlock, 1));
    EXPECT_TRUE(bench.reads(kMiB, kChunk, 2));
    EXPECT_TRUE(bench.reads(kMiB + kChunk, 2 * kMiB, 0));
    bench.reopen();
  }
}

TEST(VolumeChain, ADiscardHidesOlderLayersExactlyAndWritingShowsAgain) {
  Chain bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 2 * kMiB, 1), 0);
  bench.freeze();
  ASSERT_EQ(bench.write(20 * kChunk, kBlock, 2), 0);  // the layer has a slab
  ASSERT_EQ(bench.discard(kBlock, 4 * kChunk), 0);    // chunk 0 and 4 in part, 1..3 whole, none in the top
  for (int round = 0; round < 2; round++) {
    EXPECT_TRUE(bench.reads(0, kBlock, 1));
    EXPECT_TRUE(bench.reads(kBlock, 4 * kChunk, 0));
    EXPECT_TRUE(bench.reads(kBlock + 4 * kChunk, 10 * kChunk, 1));
    bench.reopen();
  }
  ASSERT_EQ(bench.write(2 * kChunk + kBlock, kBlock, 3), 0);
  EXPECT_TRUE(bench.reads(2 * kChunk, kBlock, 0)) << "the hole still covers the rest of the chunk";
  EXPECT_TRUE(bench.reads(2 * kChunk + kBlock, kBlock, 3));
  EXPECT_TRUE(bench.reads(2 * kChunk + 2 * kBlock, 14 * kBlock, 0));
  ASSERT_EQ(bench.discard(2 * kChunk + kBlock, kBlock), 0);
  EXPECT_TRUE(bench.reads(kChunk, 3 * kChunk, 0));
  bench.reopen();
  EXPECT_TRUE(bench.reads(kChunk, 3 * kChunk, 0));
}

TEST(VolumeChain, ADiscardWhereNothingShowsThroughCostsNothing) {
  Chain bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, kChunk, 1), 0);
  bench.freeze();
  ASSERT_EQ(bench.discard(kMiB, 2 * kMiB), 0);
  EXPECT_EQ(bench.volume->stats().allocated_bytes, 0u);
}

TEST(VolumeChain, MoreHolesThanAPageHoldsAreKeptElsewhere) {
  Chain bench(64 * kMiB);
  bench.chunks_per_slab = format::kChunksPerSlab;
  ASSERT_TRUE(bench.open().ok());
  for (uint64_t m = 0; m < 64; m++) ASSERT_EQ(bench.write(m * kMiB, kMiB, 1), 0);
  bench.freeze();
  ASSERT_EQ(bench.write(0, kBlock, 2), 0);
  // Every other chunk: no two holes can be joined.
  for (uint64_t c = 1; c < 1000; c += 2) ASSERT_EQ(bench.discard(c * kChunk, kChunk), 0);
  for (int round = 0; round < 2; round++) {
    for (uint64_t c = 1; c < 1000; c += 2) {
      ASSERT_TRUE(bench.reads(c * kChunk, kChunk, 0));
      ASSERT_TRUE(bench.reads((c + 1) * kChunk, kChunk, 1));
    }
    bench.reopen();
  }
}

TEST(VolumeChain, RandomOperationsOverThreeLayersMatchAPlainArray) {
  for (uint64_t seed = 1; seed <= 8; seed++) {
    Chain bench(2 * kMiB);
    SimRandom random(seed);
    std::vector<uint8_t> blocks(2 * kMiB / kBlock, 0);
    ASSERT_TRUE(bench.open().ok());
    for (int layer = 0; layer < 3; layer++) {
      for (int i = 0; i < 150; i++) {
        const uint64_t first = random.below(blocks.size());
        const uint64_t count = 1 + random.below(std::min<uint64_t>(blocks.size() - first, random.chance(300) ? 80 : 8));
        const auto fill = static_cast<uint8_t>(1 + random.below(250));
        const bool zero = random.chance(400);
        ASSERT_EQ(
            zero ? bench.discard(first * kBlock, count * kBlock) : bench.write(first * kBlock, count * kBlock, fill),
            0);
        std::fill_n(blocks.begin() + static_cast<ptrdiff_t>(first), count, zero ? uint8_t{0} : fill);
        if (random.chance(100)) {
          ASSERT_EQ(bench.flush(), 0);
        }
      }
      if (layer < 2) bench.freeze();
    }
    bench.reopen();
    auto all = bench.start(VolumeOp::kRead, 0, 2 * kMiB);
    bench.drive();
    for (size_t b = 0; b < blocks.size(); b++) {
      ASSERT_EQ(static_cast<uint8_t>(all->buffer->data()[b * kBlock]), blocks[b]) << "block " << b << ", seed " << seed;
      ASSERT_EQ(static_cast<uint8_t>(all->buffer->data()[b * kBlock + kBlock - 1]), blocks[b]);
    }
  }
}

}  // namespace
}  // namespace holdfast::test
