// Hints: which group of frozen layers is the newest that says something about a block.
#include "core/chain_index.h"

#include <gtest/gtest.h>

namespace holdfast {
namespace {

TEST(ChainIndex, ALaterLayersHintTakesThePlaceOfAnOlderOnesForItsBlocksOnly) {
  uint64_t hints = 0;
  ChainIndex::set_hint(hints, 0x00ff, 3);
  ChainIndex::set_hint(hints, 0x8180, 7);
  for (uint32_t block = 0; block < 16; block++) {
    EXPECT_EQ(ChainIndex::hint(hints, block), block == 7 || block == 8 || block == 15 ? 7u : block < 7 ? 3u : 0u) << block;
  }
}

TEST(ChainIndex, TheNewestGroupIsAskedForTheBlocksThatHaveItAndNoOthers) {
  uint64_t hints = 0;
  ChainIndex::set_hint(hints, 0x000f, 2);
  ChainIndex::set_hint(hints, 0x0030, 15);
  uint16_t blocks = 0xffff;
  EXPECT_EQ(ChainIndex::newest(hints, blocks), 15u);
  EXPECT_EQ(blocks, 0x0030);
  blocks = 0x00c9;
  EXPECT_EQ(ChainIndex::newest(hints, blocks), 2u);
  EXPECT_EQ(blocks, 0x0009);
  blocks = 0xff00;
  EXPECT_EQ(ChainIndex::newest(hints, blocks), 0u);
}

TEST(ChainIndex, EveryLayerIsInAGroupHoweverLongTheChain) {
  ChainIndex index;
  size_t remade = 0;
  for (size_t frozen = 1; frozen <= 4096; frozen++) {
    index.leaf(0).layers = frozen;
    index.fit(frozen);
    remade += index.leaf(0).layers == 0;
    ASSERT_LE(index.group(frozen - 1), ChainIndex::kGroups);
    const size_t layer = frozen / 2;
    ASSERT_LE(index.first(index.group(layer)), layer);
    ASSERT_GT(index.first(index.group(layer) + 1), layer);
  }
  EXPECT_GE(remade, 5u) << "hints of other groups must not stay";
  EXPECT_LE(remade, 20u);
}

TEST(ChainIndex, WhatIsForgottenIsMadeAnewAndTheRestStays) {
  ChainIndex index;
  index.fit(8);
  index.leaf(0).layers = 8;
  index.leaf(ChainIndex::kLeafChunks).layers = 8;
  const size_t before = index.memory_bytes();
  index.forget(ChainIndex::kLeafChunks - 1);
  index.forget(100 * ChainIndex::kLeafChunks);
  EXPECT_LT(index.memory_bytes(), before);
  EXPECT_EQ(index.leaf(0).layers, 0u);
  EXPECT_EQ(index.leaf(ChainIndex::kLeafChunks).layers, 8u);
  index.clear();
  EXPECT_EQ(index.leaf(ChainIndex::kLeafChunks).layers, 0u);
}

}  // namespace
}  // namespace holdfast
