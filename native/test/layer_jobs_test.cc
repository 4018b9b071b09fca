// Jobs on frozen layers: stripping, wiping, listing changes, each cut off and repeated.
#include "core/layer_jobs.h"

#include <algorithm>

#include "core/checker.h"
#include "core/gate.h"
#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using format::LayerRecord;
using format::LayerState;
using format::SlabEntry;
using format::SlabPage;

constexpr uint64_t kGeneration = 8;

// Volume 40 with the chain 43 (writable top, slab 4) on 42 (slab 3) on 41 (slabs 1 and 2) on 30 (slab 0); 42 and 41 have no
// name. Each layer maps whole chunks.
class LayerJobs : public PoolTest {
 protected:
  void SetUp() override {
    PoolTest::SetUp();
    for (int twice = 0; twice < 2; twice++) {
      ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 43, 7, format::VolumeState::kOpen)));
      LayerRecord base = layer_record(30, 0, 40, LayerState::kFrozen);
      ASSERT_TRUE(set_field(base.snapshot_name, "kept"));
      base.header.flags = format::kLayerSettled;
      ASSERT_OK(write_layer_record(device, s, 1, base));
      LayerRecord low = layer_record(41, 30, 40, LayerState::kFrozen);
      ASSERT_TRUE(set_field(low.snapshot_name, "deleted"));
      low.header.flags = format::kLayerSettled;
      ASSERT_OK(write_layer_record(device, s, 2, low));
      LayerRecord middle = layer_record(42, 41, 40, LayerState::kFrozen);
      middle.header.flags = format::kLayerSettled;
      ASSERT_OK(write_layer_record(device, s, 3, middle));
      ASSERT_OK(write_layer_record(device, s, 4, layer_record(43, 42, 40, LayerState::kWritable)));
    }
    put(0, 30, {{0, 0xffff, 0}, {1, 0xffff, 0}, {2, 0xffff, 0}, {3, 0xffff, 0}});
    put(1, 41, {{0, 0xffff, 0}, {1, 0x00ff, 0x0f00}});
    put(2, 41, {{2, 0xffff, 0}, {5, 0xffff, 0}});
    put(3, 42, {{1, 0xffff, 0}, {5, 0x000f, 0}});
    put(4, 43, {{0, 0x0fff, 0xf000}, {2, 0xfffe, 0}});
  }
  void put(uint64_t slab, uint64_t layer, std::vector<SlabEntry> entries, uint64_t sequence = 5) {
    const SlabPage page = page_with(layer, entries);
    write_slab(slab, page, sequence);
  }
  static SlabPage page_with(uint64_t layer, const std::vector<SlabEntry>& entries) {
    SlabPage page = slab_page(layer, 40, kGeneration, 7);
    for (size_t i = 0; i < entries.size(); i++) page.entries[i] = entries[i];
    return page;
  }
  LayerSpec layer(uint64_t id, uint32_t slot, uint64_t first, uint32_t count, bool frozen = true) const {
    LayerSpec spec;
    spec.layer_id = id;
    spec.slot = slot;
    spec.birth = id;
    spec.parent_layer_id = id == 41 ? 30 : id - 1;
    spec.frozen = frozen;
    spec.slabs = {{first, count, kGeneration}};
    return spec;
  }
  std::vector<LayerSpec> victims() const { return {layer(42, 3, 3, 1), layer(41, 2, 1, 2)}; }
  std::vector<LayerSpec> covers() const { return {layer(43, 4, 4, 1, false)}; }

  SlabPage copy_of(uint64_t slab, int copy) {
    SlabPage page;
    std::memcpy(&page, device.raw(slab_page_offset(s, slab) + static_cast<uint64_t>(copy) * format::kPageSize),
                sizeof page);
    return page;
  }
  SlabPage newest(uint64_t slab) {
    const SlabPage a = copy_of(slab, 0);
    const SlabPage b = copy_of(slab, 1);
    const Copies copies = choose_slab(a, b, kPool, slab_page_offset(s, slab));
    HF_ASSERT(copies.valid());
    return copies.newest == 0 ? a : b;
  }
  // What a chain of layers shows for a block: the layer that answers for it and whether with data. 0: nobody.
  std::pair<uint64_t, bool> answer(const std::vector<uint64_t>& layers, uint32_t chunk, uint32_t block) {
    for (const uint64_t id : layers) {
      bool hole = false;
      for (uint64_t slab = 0; slab < 8; slab++) {
        const SlabPage a = copy_of(slab, 0);
        const SlabPage b = copy_of(slab, 1);
        const Copies copies = choose_slab(a, b, kPool, slab_page_offset(s, slab));
        if (!copies.valid()) continue;
        const SlabPage& page = copies.newest == 0 ? a : b;
        if (page.layer_id != id) continue;
        for (const SlabEntry& entry : page.entries) {
          if (entry.logical_chunk != chunk) continue;
          if ((entry.data >> block & 1) != 0) return {id, true};
          if ((entry.zero >> block & 1) != 0) return {0, false};
        }
        for (uint32_t h = 0; h < page.hole_count; h++) {
          hole = hole || (chunk >= page.holes[h].start && chunk - page.holes[h].start < page.holes[h].length);
        }
      }
      if (hole) return {0, false};
    }
    return {0, false};
  }
  std::vector<std::pair<uint64_t, bool>> view(const std::vector<uint64_t>& layers) {
    std::vector<std::pair<uint64_t, bool>> all;
    for (uint32_t chunk = 0; chunk < 8; chunk++) {
      for (uint32_t block = 0; block < 16; block++) all.push_back(answer(layers, chunk, block));
    }
    return all;
  }
  std::string findings(bool infos) {
    Result<CheckReport> report = check_pool(device, {});
    HF_ASSERT(report.ok());
    EXPECT_EQ(report->slabs_claimed + report->slabs_free, report->pool.slab_count) << "not every slab is accounted for";
    std::string all;
    for (const CheckFinding& finding : report->findings) {
      if (infos || finding.severity != CheckFinding::Severity::kInfo) all += finding.kind + " ";
    }
    return all;
  }
  const std::vector<uint64_t> chain{43, 42, 41, 30};
};

TEST_F(LayerJobs, StrippingClearsWhatNewerLayersCoverAndTheChainShowsTheSame) {
  const auto before = view(chain);
  Result<StripReport> report = strip_layers(device, s, victims(), covers());
  ASSERT_OK(report);
  EXPECT_EQ(view(chain), before);
  // 41: chunk 0 by the top, 12 of chunk 1 by 42, 15 of chunk 2 by the top, 4 of chunk 5 by 42.
  EXPECT_EQ(report->cleared_blocks, 16u + 12 + 15 + 4);
  const SlabPage bare = newest(1);
  EXPECT_TRUE(std::all_of(std::begin(bare.entries), std::end(bare.entries),
                          [](const SlabEntry& entry) { return entry.logical_chunk == format::kNoChunk; }));
  EXPECT_EQ(newest(2).entries[0].data, 0x0001);
  EXPECT_EQ(newest(2).entries[1].data, 0xfff0);
  EXPECT_EQ(newest(3).entries[0].data, 0xffff) << "nothing of the newer victim is covered";
  ASSERT_EQ(report->emptied.size(), 1u);
  EXPECT_EQ(report->emptied[0].first, 1u);
  EXPECT_EQ(report->emptied[0].generation, kGeneration);
  EXPECT_EQ(newest(1).layer_id, 41u) << "an emptied slab's page still names the layer";
  ASSERT_EQ(report->uses.size(), 2u);
  EXPECT_EQ(report->uses[0].live_blocks, 20u);
  EXPECT_EQ(report->uses[0].slabs, 1u);
  EXPECT_EQ(report->uses[1].live_blocks, 13u);
  EXPECT_EQ(report->uses[1].slabs, 1u);
  for (uint64_t slab = 0; slab < 5; slab++) {
    EXPECT_TRUE(choose_slab(copy_of(slab, 0), copy_of(slab, 1), kPool, slab_page_offset(s, slab)).equal);
  }
  Result<std::optional<LayerRecord>> record = load_layer_record(device, s, 2);
  ASSERT_OK(record);
  EXPECT_EQ((*record)->state, LayerState::kFolded);
  EXPECT_EQ((*record)->folded_into, 43u);
  EXPECT_EQ(field_text((*record)->snapshot_name), "");
  EXPECT_EQ(findings(true), "");
  // Again: nothing to do, the same answer.
  const uint64_t writes = device.operations(MemoryDisk::Op::kWrite);
  Result<StripReport> again = strip_layers(device, s, victims(), covers());
  ASSERT_OK(again);
  EXPECT_EQ(again->cleared_blocks, 0u);
  EXPECT_EQ(again->emptied.size(), 1u);
  EXPECT_EQ(device.operations(MemoryDisk::Op::kWrite), writes);
}

TEST_F(LayerJobs, CoveredIsWhatTheNewestWholeCopySaysAndNothingElse) {
  // Chunk 5 in a torn copy, and in a page of another generation.
  const SlabPage grown = page_with(43, {{0, 0x0fff, 0xf000}, {2, 0xfffe, 0}, {5, 0xffff, 0}});
  write_slab(4, 1, grown, 6);
  damage(slab_page_offset(s, 4) + format::kPageSize);
  SlabPage later = grown;
  later.generation = kGeneration + 1;
  write_slab(5, later, 6);
  std::vector<LayerSpec> wide = covers();
  wide[0].slabs.push_back({5, 1, kGeneration});
  ASSERT_OK(strip_layers(device, s, victims(), wide));
  EXPECT_EQ(newest(2).entries[1].data, 0xfff0);
  write_slab(4, 1, grown, 7);
  ASSERT_OK(strip_layers(device, s, victims(), covers()));
  EXPECT_EQ(newest(2).entries[1].logical_chunk, format::kNoChunk);
}

TEST_F(LayerJobs, WhatWasReadIsMadeDurableBeforeAnythingIsCleared) {
  bool flushed = false;
  bool early = false;
  ASSERT_OK(strip_layers(device, s, victims(), covers()));  // the records say folded from here on
  put(2, 41, {{2, 0xffff, 0}, {5, 0xffff, 0}}, 50);
  device.set_faults([&](MemoryDisk::Op op, uint64_t, uint64_t) {
    if (op == MemoryDisk::Op::kFlush) flushed = true;
    if (op == MemoryDisk::Op::kWrite && !flushed) early = true;
    return MemoryDisk::Fault::kNone;
  });
  ASSERT_OK(strip_layers(device, s, victims(), covers()));
  device.set_faults(nullptr);
  EXPECT_TRUE(flushed);
  EXPECT_FALSE(early);
}

TEST_F(LayerJobs, HolesCoverAndAreStripped) {
  SlabPage top = page_with(43, {{0, 0x0fff, 0xf000}});
  top.holes[0] = {1, 2};
  top.hole_count = 1;
  write_slab(4, top, 9);
  SlabPage low = page_with(41, {});
  low.holes[0] = {0, 3};   // all of it covered: 0 by the entry, 1 and 2 by the hole
  low.holes[1] = {2, 4};   // its first chunk
  low.hole_count = 2;
  write_slab(1, low, 9);
  const auto before = view(chain);
  Result<StripReport> report = strip_layers(device, s, victims(), covers());
  ASSERT_OK(report);
  EXPECT_EQ(view(chain), before);
  const SlabPage left = newest(1);
  ASSERT_EQ(left.hole_count, 1u);
  EXPECT_EQ(left.holes[0].start, 3u);
  EXPECT_EQ(left.holes[0].length, 3u);
  EXPECT_EQ(newest(3).entries[0].logical_chunk, format::kNoChunk) << "chunk 1 of layer 42 lies under the hole";
}

TEST_F(LayerJobs, APageThatNamesAnotherLayerOrGenerationIsNotTouched) {
  SlabPage other = page_with(77, {{0, 0xffff, 0}});
  write_slab(1, other, 9);
  SlabPage later = page_with(41, {{2, 0xffff, 0}});
  later.generation = kGeneration + 1;
  write_slab(2, later, 9);
  Result<StripReport> report = strip_layers(device, s, victims(), covers());
  ASSERT_OK(report);
  EXPECT_TRUE(report->emptied.empty());
  EXPECT_EQ(newest(1).entries[0].data, 0xffff);
  EXPECT_EQ(newest(2).entries[0].data, 0xffff);
}

TEST_F(LayerJobs, RefusesAVictimThatIsWritableOrNotTheRecordsOwn) {
  std::vector<LayerSpec> wrong = victims();
  wrong[0] = layer(43, 4, 4, 1);
  EXPECT_TRUE(has_code(strip_layers(device, s, wrong, {layer(44, 5, 5, 1)}), Code::kStale, "writable"));
  wrong = victims();
  wrong[0].frozen = false;
  EXPECT_TRUE(has_code(strip_layers(device, s, wrong, covers()), Code::kInvalidArgument, "not frozen"));
  wrong = victims();
  wrong[1].slot = 9;
  EXPECT_TRUE(has_code(strip_layers(device, s, wrong, covers()), Code::kStale, "record slot"));
  EXPECT_TRUE(has_code(strip_layers(device, s, {victims()[1], victims()[0]}, covers()), Code::kInvalidArgument, "newest first"));
  EXPECT_EQ(newest(1).entries[0].data, 0xffff);
  Result<std::optional<LayerRecord>> record = load_layer_record(device, s, 2);
  ASSERT_OK(record);
  EXPECT_EQ((*record)->state, LayerState::kFrozen);
}

// A power cut at every write of it, each page keeping either version.
TEST_F(LayerJobs, AStripCutOffAnywhereShowsTheSameAndCanBeRepeated) {
  const auto before = view(chain);
  for (uint64_t stop_at = 0; stop_at < 40; stop_at++) {
    for (int keep = 0; keep < 4; keep++) {
      MemoryDisk fresh(kPoolBytes);
      std::memcpy(fresh.raw(0), device.raw(0), kPoolBytes / 4);
      uint64_t count = 0;
      fresh.set_faults([&](MemoryDisk::Op op, uint64_t, uint64_t) {
        if (op == MemoryDisk::Op::kRead) return MemoryDisk::Fault::kNone;
        return count++ >= stop_at ? MemoryDisk::Fault::kError : MemoryDisk::Fault::kNone;
      });
      const Result<StripReport> cut_off = strip_layers(fresh, s, victims(), covers());
      fresh.set_faults(nullptr);
      fresh.power_cut([&](uint64_t offset) { return keep == 0 || (keep < 3 && offset / format::kPageSize % 2 == keep - 1u); });
      std::vector<std::byte> now(fresh.raw(0), fresh.raw(0) + kPoolBytes / 4);
      std::vector<std::byte> saved(device.raw(0), device.raw(0) + kPoolBytes / 4);
      std::memcpy(device.raw(0), now.data(), now.size());
      EXPECT_EQ(view(chain), before) << "stopped at " << stop_at << ", kept " << keep;
      EXPECT_EQ(findings(false), "") << "stopped at " << stop_at << ", kept " << keep;
      Result<StripReport> again = strip_layers(device, s, victims(), covers());
      ASSERT_OK(again);
      EXPECT_EQ(view(chain), before);
      EXPECT_EQ(again->emptied.size(), 1u);
      EXPECT_EQ(findings(true), "");
      std::memcpy(device.raw(0), saved.data(), saved.size());
      if (cut_off.ok()) return;
    }
  }
}

TEST_F(LayerJobs, WipingFreesAndDiscardsOnlyWhatStillNamesTheLayerAndGeneration) {
  ASSERT_OK(strip_layers(device, s, victims(), covers()));
  std::memset(device.raw(slab_data_offset(s, 1)), 0x11, 4096);
  std::memset(device.raw(slab_data_offset(s, 2)), 0x22, 4096);
  ASSERT_OK(wipe_layers(device, s, {{41, 2, {{1, 1, kGeneration}}}}, false));
  EXPECT_EQ(newest(1).layer_id, 0u);
  EXPECT_EQ(newest(1).generation, kGeneration);
  EXPECT_EQ(copy_of(1, 0).layer_id + copy_of(1, 1).layer_id, 0u);
  EXPECT_NE(*device.raw(slab_data_offset(s, 1)), std::byte{0x11});
  EXPECT_EQ(*device.raw(slab_data_offset(s, 2)), std::byte{0x22});
  Result<std::optional<LayerRecord>> record = load_layer_record(device, s, 2);
  ASSERT_OK(record);
  EXPECT_EQ((*record)->state, LayerState::kFolded) << "no tombstone was asked for";
  // The slab is granted on. The order comes once more: before the new owner's claim, and after it.
  std::memset(device.raw(slab_data_offset(s, 1)), 0x33, 4096);
  ASSERT_OK(wipe_layers(device, s, {{41, 2, {{1, 1, kGeneration}}}}, false));
  EXPECT_EQ(*device.raw(slab_data_offset(s, 1)), std::byte{0x33}) << "a free slab's data may be a new owner's already";
  SlabPage claimed = slab_page(43, 40, kGeneration + 1, 9);
  claimed.entries[0] = {6, 0xffff, 0};
  write_slab(1, claimed, 100);
  ASSERT_OK(wipe_layers(device, s, {{41, 2, {{1, 1, kGeneration}}}}, true));
  EXPECT_EQ(newest(1).layer_id, 43u);
  EXPECT_EQ(*device.raw(slab_data_offset(s, 1)), std::byte{0x33});
}

TEST_F(LayerJobs, ATombstoneKeepsItsParentAndTheChainCanBeFollowedThroughIt) {
  // 42 gets what 41 has left; then 41 goes.
  ASSERT_OK(strip_layers(device, s, victims(), covers()));
  ASSERT_OK(wipe_layers(device, s, {{41, 2, {{1, 2, kGeneration}}}}, true));
  Result<std::optional<LayerRecord>> record = load_layer_record(device, s, 2);
  ASSERT_OK(record);
  EXPECT_EQ((*record)->state, LayerState::kDeleted);
  EXPECT_EQ((*record)->parent_layer_id, 30u);
  EXPECT_EQ(findings(true), "");
  ASSERT_OK(wipe_layers(device, s, {{41, 2, {{1, 2, kGeneration}}}}, true));
  // Without the tombstone's own parent the chain is broken, and said to be.
  ASSERT_OK(write_layer_record(device, s, 1, layer_record(31, 0, 40, LayerState::kDeleted)));
  EXPECT_NE(findings(false).find("layer-without-parent"), std::string::npos);
}

// 41 has left the chain, and so does 42: before it becomes a tombstone its record is made to name 30.
TEST_F(LayerJobs, AStripMakesARecordNameTheLivingLayerBelowAndTheTombstonesSlotIsAnybodys) {
  ASSERT_OK(strip_layers(device, s, victims(), covers()));
  ASSERT_OK(wipe_layers(device, s, {{41, 2, {{1, 2, kGeneration}}}}, true));
  LayerSpec relinked = layer(42, 3, 3, 1);
  relinked.parent_layer_id = 30;
  relinked.slabs.clear();
  ASSERT_OK(strip_layers(device, s, {relinked}, {layer(43, 4, 4, 1, false)}));
  for (uint64_t copy = 0; copy < 2; copy++) {
    LayerRecord record;
    std::memcpy(&record, device.raw(s.layer_table_offset + (3 * 2 + copy) * format::kPageSize), sizeof record);
    EXPECT_EQ(record.parent_layer_id, 30u) << "copy " << copy;
  }
  EXPECT_EQ(newest(3).entries[0].data, 0xffff) << "no slab was given";
  for (int twice = 0; twice < 2; twice++) {
    ASSERT_OK(write_layer_record(device, s, 2, layer_record(90, 43, 40, LayerState::kWritable)));
  }
  EXPECT_EQ(findings(false), "") << "the chain does not go through the slot any more";
  damage(s.layer_table_offset + (3 * 2) * format::kPageSize);
  EXPECT_EQ(findings(false).find("layer-without-parent"), std::string::npos) << "whichever copy is lost";
}

TEST_F(LayerJobs, AParentThatIsNotOlderIsRefused) {
  for (const uint64_t parent : {42, 43}) {
    std::vector<LayerSpec> wrong = victims();
    wrong[1].parent_layer_id = parent;
    EXPECT_TRUE(has_code(strip_layers(device, s, wrong, covers()), Code::kInvalidArgument, "not older"));
  }
  Result<std::optional<LayerRecord>> record = load_layer_record(device, s, 2);
  ASSERT_OK(record);
  EXPECT_EQ((*record)->parent_layer_id, 30u);
}

TEST_F(LayerJobs, AWipeCutOffBetweenTheCopiesIsFinished) {
  SlabPage free{};
  make_free_slab_page(&free, kGeneration);
  write_slab(1, 0, free, 9);  // copy B still names the layer
  ASSERT_OK(wipe_layers(device, s, {{41, 2, {{1, 1, kGeneration}}}}, false));
  EXPECT_EQ(copy_of(1, 1).layer_id, 0u);
}

// The power goes in the middle of a write, and every page that it covers is torn.
TEST_F(LayerJobs, AWipeTornAnywhereLeavesOneCopyOfEachPageAndCanBeRepeated) {
  for (int layer_or_volume = 0; layer_or_volume < 2; layer_or_volume++) {
    const auto wipe = [&]() -> Status {
      if (layer_or_volume == 0) return wipe_layers(device, s, {{41, 2, {{1, 2, kGeneration}}}}, false);
      return wipe_volume(device, s, {40, 4, 7, {{43, 4, {{4, 1, kGeneration}}}}});
    };
    for (int tear_at = 0;; tear_at++) {
      SetUp();
      int writes = 0;
      device.set_faults([&](MemoryDisk::Op op, uint64_t offset, uint64_t length) {
        if (op == MemoryDisk::Op::kRead || writes > tear_at) return MemoryDisk::Fault::kNone;
        if (op != MemoryDisk::Op::kWrite || writes++ < tear_at) return MemoryDisk::Fault::kNone;
        for (uint64_t at = offset; at < offset + length; at += format::kPageSize) damage(at);
        return MemoryDisk::Fault::kError;
      });
      const bool torn = !wipe().ok();
      device.set_faults(nullptr);
      EXPECT_EQ(findings(false).find("slab-page-both-bad"), std::string::npos) << "torn at write " << tear_at;
      ASSERT_OK(wipe()) << "torn at write " << tear_at;
      for (const uint64_t slab : layer_or_volume == 0 ? std::vector<uint64_t>{1, 2} : std::vector<uint64_t>{4}) {
        EXPECT_EQ(newest(slab).layer_id, 0u);
        EXPECT_EQ(newest(slab).generation, kGeneration);
      }
      if (!torn) break;
      ASSERT_LT(tear_at, 40);
    }
  }
}

TEST_F(LayerJobs, ADamagedPairIsLeftAndNamedAndTheRestIsWiped) {
  damage(slab_page_offset(s, 1));
  damage(slab_page_offset(s, 1) + format::kPageSize);
  EXPECT_TRUE(has_code(wipe_layers(device, s, {{41, 2, {{1, 2, kGeneration}}}}, true), Code::kCorrupt, "damaged"));
  EXPECT_EQ(newest(2).layer_id, 0u);
  EXPECT_TRUE(has_code(strip_layers(device, s, {victims()[0]}, covers()), Code::kOk));
}

TEST_F(LayerJobs, ChangesAreWhatTheLayersMentionMergedAndPaged) {
  SlabPage page = page_with(42, {{1, 0x0ff0, 0}, {2, 0x000f, 0x00f0}, {9, 0xffff, 0}});
  page.holes[0] = {10, 2};
  page.hole_count = 1;
  write_slab(3, page, 9);
  const std::vector<LayerSpec> layers = {layer(42, 3, 3, 1)};
  const uint64_t size = 64u << 20;
  Result<ChangeReading> all = read_changes(device, s, layers, size, 0, 100);
  ASSERT_OK(all);
  const uint64_t chunk = format::kChunkSize, block = format::kBlockSize;
  ASSERT_EQ(all->ranges.size(), 3u);
  EXPECT_EQ(all->ranges[0].offset, chunk + 4 * block);
  EXPECT_EQ(all->ranges[0].length, 8 * block);
  EXPECT_EQ(all->ranges[1].offset, 2 * chunk);
  EXPECT_EQ(all->ranges[1].length, 8 * block);
  EXPECT_EQ(all->ranges[2].offset, 9 * chunk);
  EXPECT_EQ(all->ranges[2].length, 3 * chunk);
  EXPECT_EQ(all->next_offset, 0u);
  // One at a time, each page starting where the last one said.
  std::vector<ByteRange> paged;
  uint64_t at = 0;
  do {
    Result<ChangeReading> one = read_changes(device, s, layers, size, at, 1);
    ASSERT_OK(one);
    paged.insert(paged.end(), one->ranges.begin(), one->ranges.end());
    at = one->next_offset;
  } while (at != 0);
  ASSERT_EQ(paged.size(), 3u);
  for (size_t i = 0; i < 3; i++) EXPECT_EQ(paged[i].offset, all->ranges[i].offset);
  // From within a range, and to an end within one.
  Result<ChangeReading> part = read_changes(device, s, layers, 10 * chunk, 9 * chunk + block, 5);
  ASSERT_OK(part);
  ASSERT_EQ(part->ranges.size(), 1u);
  EXPECT_EQ(part->ranges[0].length, 15 * block);
  // Two layers: the union.
  Result<ChangeReading> both = read_changes(device, s, {layer(42, 3, 3, 1), layer(41, 2, 1, 2)}, size, 0, 100);
  ASSERT_OK(both);
  EXPECT_EQ(both->ranges[0].offset, 0u);
  EXPECT_TRUE(has_code(read_changes(device, s, {[&] {
                                      LayerSpec old = layer(42, 3, 3, 1);
                                      old.slabs[0].generation = kGeneration - 1;
                                      return old;
                                    }()},
                                    size, 0, 100),
                       Code::kStale));
}

TEST_F(LayerJobs, AHostWithoutALeaseStripsAndWipesNothing) {
  uint64_t now = 1;
  PoolGate gate([&] { return now; });
  GatedSyncDevice gated(device, gate);
  EXPECT_TRUE(has_code(strip_layers(gated, s, victims(), covers()), Code::kLeaseExpired));
  EXPECT_TRUE(has_code(wipe_layers(gated, s, {{41, 2, {{1, 2, kGeneration}}}}, true), Code::kLeaseExpired));
  EXPECT_EQ(newest(1).layer_id, 41u);
  EXPECT_OK(read_changes(gated, s, victims(), 64u << 20, 0, 10));
}

}  // namespace
}  // namespace holdfast::test
