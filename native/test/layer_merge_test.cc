// Merging below a snapshot that is kept: cut off anywhere, learned late or never, everybody reads what they read before.
#include "core/layer_merge.h"

#include <algorithm>
#include <set>

#include "core/checker.h"
#include "cut_fixture.h"
#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using format::LayerState;
using format::SlabEntry;
using format::SlabPage;

// ---- with an open volume above

struct MergeBench : ChainBench {
  MergeBench() : ChainBench(2 * kMiB) {}

  format::Superblock job_superblock() const {
    format::Superblock s = superblock;
    s.header.pool = kPoolUuid;
    return s;
  }
  // The layer gets slabs that nobody has ahead.
  void give(uint64_t layer, uint64_t count) {
    for (; count > 0; count--) {
      const auto all = stock.slabs();
      const auto [slab, generation] = *all.rbegin();
      books[layer][slab] = generation;
      stock_without(slab);
    }
  }
  // The layers [from, to) of the chain into the one right above them.
  Result<MergeReport> merge(size_t from, size_t to, uint32_t permille = 1000, uint64_t max_blocks = 0) {
    BenchDisk disk(*this);
    const std::vector<LayerSpec> layers = with_slabs(spec.layers);
    return merge_layers(disk, job_superblock(), {layers.begin() + static_cast<ptrdiff_t>(from), layers.begin() + static_cast<ptrdiff_t>(to)},
                        layers[from - 1], permille, max_blocks);
  }
  Status learn(size_t at) {
    const LayerSlabs layer{spec.layers[at].layer_id, slabs_of(spec.layers[at].layer_id)};
    return call([&](Volume::Done done) { volume->learn(layer, std::move(done)); });
  }
  // Returns how many blocks are left in them.
  uint64_t strip_and_wipe(size_t from, size_t to) {
    BenchDisk disk(*this);
    const std::vector<LayerSpec> layers = with_slabs(spec.layers);
    Result<StripReport> stripped =
        strip_layers(disk, job_superblock(), {layers.begin() + static_cast<ptrdiff_t>(from), layers.begin() + static_cast<ptrdiff_t>(to)},
                     {layers[from - 1]});
    EXPECT_TRUE(stripped.ok()) << stripped.status.message;
    if (!stripped.ok()) return ~uint64_t{0};
    EXPECT_TRUE(call([&](Volume::Done done) { volume->forget(stripped->emptied, {}, std::move(done)); }).ok());
    uint64_t left = 0;
    for (const LayerUse& use : stripped->uses) left += use.live_blocks;
    for (size_t i = from; i < to; i++) {
      WipeLayer one{layers[i].layer_id, layers[i].slot, {}};
      for (const SlabRun& run : stripped->emptied) {
        for (uint64_t slab = run.first; slab < run.first + run.count; slab++) {
          if (books[one.layer_id].erase(slab) > 0) one.slabs.push_back({slab, 1, run.generation});
        }
      }
      const Status wiped = wipe_layers(disk, job_superblock(), {one}, false);
      EXPECT_TRUE(wiped.ok()) << wiped.message;
    }
    return left;
  }
  // Without the snapshots of the layers that have no name.
  void expect_named(const std::string& when, const std::set<size_t>& named) {
    EXPECT_EQ(blocks(), model) << when;
    for (const size_t s : named) {
      auto reader = view(spec.layers.size() - 1 - s);
      ASSERT_NE(reader, nullptr);
      EXPECT_EQ(blocks_of(*reader), snapshots[s]) << "snapshot " << s << ", " << when;
      drop(reader);
    }
  }
};

TEST(LayerMerge, NothingThatAnybodyReadsChangesAndStrippingThenEmptiesEverySlabBelowTheSnapshot) {
  for (uint64_t seed = 1; seed <= 12; seed++) {
    MergeBench bench;
    SimRandom random(seed);
    bench.build(random, 5);  // chain: top, 4 (kept), 3, 2, 1 (no names), 0 (kept)
    bench.churn(random, bench.model, 10);
    auto reader = bench.view(1);
    ASSERT_NE(reader, nullptr);
    bench.give(bench.spec.layers[1].layer_id, 4);
    Result<MergeReport> report = bench.merge(2, 5);
    ASSERT_TRUE(report.ok()) << report.status.message;
    EXPECT_TRUE(report->complete);
    EXPECT_GT(report->moved_blocks, 0u);
    bench.expect_named("merged, not learned", {0, 1, 2, 3, 4});
    Result<MergeReport> again = bench.merge(2, 5);
    ASSERT_TRUE(again.ok() && again->complete);
    EXPECT_EQ(again->moved_blocks, 0u) << "repeating it is harmless";
    ASSERT_TRUE(bench.learn(1).ok());
    ASSERT_TRUE(bench.learn(1).ok());
    bench.expect_named("learned", {0, 1, 2, 3, 4});
    const LayerSlabs head{bench.spec.layers[1].layer_id, bench.slabs_of(bench.spec.layers[1].layer_id)};
    ASSERT_TRUE(bench.call([&](Volume::Done done) { reader->learn(head, std::move(done)); }).ok()) << "its own top";
    EXPECT_EQ(bench.strip_and_wipe(2, 5), 0u) << "seed " << seed;
    for (size_t i = 2; i < 5; i++) EXPECT_TRUE(bench.slabs_of(bench.spec.layers[i].layer_id).empty());
    bench.expect_named("stripped", {0, 4});
    // The reader's map was learned too, and its slabs below are wiped.
    EXPECT_EQ(bench.blocks_of(*reader), bench.snapshots[4]);
    bench.drop(reader);
    ASSERT_TRUE(bench.reopen().ok());
    bench.expect_named("opened again", {0, 4});
    bench.churn(random, bench.model, 20);
    ASSERT_TRUE(bench.cut().ok());
    EXPECT_EQ(bench.blocks(), bench.model);
  }
}

TEST(LayerMerge, AnEngineThatTakesOverAfterTheLearningNeedsNothingOfWhatWasStripped) {
  MergeBench bench;
  SimRandom random(3);
  bench.build(random, 4);
  bench.give(bench.spec.layers[1].layer_id, 4);
  ASSERT_TRUE(bench.merge(2, 4).ok());
  ASSERT_TRUE(bench.learn(1).ok());
  EXPECT_EQ(bench.strip_and_wipe(2, 4), 0u);
  bench.kill();
  bench.spec.layers = bench.with_slabs(bench.spec.layers);
  ASSERT_TRUE(bench.open(true).ok());
  bench.expect_named("taken over", {0, 3});
}

TEST(LayerMerge, ItEndsAfterAboutWhatWasAskedForAndGoesOnWhenAskedAgain) {
  MergeBench bench;
  SimRandom random(5);
  bench.build(random, 4, 60);
  uint64_t moved = 0;
  int rounds = 0;
  for (bool complete = false; !complete; rounds++) {
    ASSERT_LT(rounds, 100);
    Result<MergeReport> report = bench.merge(2, 4, 1000, 20);
    ASSERT_TRUE(report.ok()) << report.status.message;
    EXPECT_TRUE(report->complete || report->moved_blocks >= 20);
    EXPECT_FALSE(report->no_space);
    moved += report->moved_blocks;
    complete = report->complete;
  }
  EXPECT_GT(rounds, 2);
  EXPECT_GT(moved, 40u);
  bench.expect_named("in parts", {0, 1, 2, 3});
  ASSERT_TRUE(bench.learn(1).ok());
  EXPECT_EQ(bench.strip_and_wipe(2, 4), 0u);
  bench.expect_named("stripped", {0, 3});
}

// Nothing is flushed between the learning and the forgetting, and a reader never flushes: a read that has only just begun may be at a place
// that is wiped next.
TEST(LayerMerge, WhoeverLearnedForgetsTheOldPlacesWhenTheReadsThatBeganBeforeHaveEnded) {
  MergeBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 8 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  ASSERT_EQ(bench.write(10 * kChunk, kChunk, 2), 0);
  ASSERT_TRUE(bench.cut().ok());
  auto reader = bench.view(1);
  ASSERT_NE(reader, nullptr);
  const LayerSpec old = bench.spec.layers[2];
  bench.give(bench.spec.layers[1].layer_id, 2);
  Result<MergeReport> merged = bench.merge(2, 3);
  ASSERT_TRUE(merged.ok() && merged->complete) << merged.status.message;

  struct Holder {
    Volume* volume = nullptr;
    VolumeRequest request;
    PageBuffer buffer{kChunk};
    int error = -1;
    Status forgotten{Code::kBusy, "not yet"};
  };
  Holder holders[2];
  holders[0].volume = bench.volume.get();
  holders[1].volume = reader.get();
  bench.device.set_delay([](const IoRequest& request) { return request.op == IoOp::kRead ? DelayDevice::kHold : 0; });
  for (Holder& one : holders) {
    one.request.op = VolumeOp::kRead;
    one.request.length = kChunk;
    one.request.buffer = one.buffer.data();
    one.request.user = &one.error;
    one.request.done = [](VolumeRequest* self, int error) { *static_cast<int*>(self->user) = error; };
    one.volume->submit(&one.request);
  }
  bench.drive();
  ASSERT_EQ(bench.device.held(), 2u);
  bench.device.set_delay(nullptr);

  const LayerSlabs head{bench.spec.layers[1].layer_id, bench.slabs_of(bench.spec.layers[1].layer_id)};
  for (Holder& one : holders) {
    ASSERT_TRUE(bench.call([&](Volume::Done done) { one.volume->learn(head, std::move(done)); }).ok());
  }
  const std::vector<SlabRun> slabs = bench.slabs_of(old.layer_id);
  for (Holder& one : holders) one.volume->forget(slabs, {}, [&](Status status) { one.forgotten = std::move(status); });
  bench.drive();
  for (Holder& one : holders) {
    EXPECT_EQ(one.forgotten.code, Code::kBusy) << "a read is still at the place";
    EXPECT_EQ(one.error, -1);
  }
  bench.device.let_all_go();
  bench.drive();
  for (Holder& one : holders) {
    EXPECT_TRUE(one.forgotten.ok()) << one.forgotten.message;
    EXPECT_EQ(one.error, 0);
    EXPECT_EQ(one.buffer.data()[0], std::byte{1});
  }
  // The slabs are somebody else's from here on.
  BenchDisk disk(bench);
  for (const SlabRun& run : slabs) {
    const uint64_t data = format::slab_data_offset(bench.superblock.first_region_offset, run.first);
    ASSERT_TRUE(disk.discard(data, 8 * kChunk).ok());
  }
  EXPECT_TRUE(bench.reads(0, 8 * kChunk, 1));
  EXPECT_EQ(bench.blocks_of(*reader)[0], 1);
  bench.drop(reader);
}

TEST(LayerMerge, ALayerThatSaysLessThanItDidIsNotLearned) {
  MergeBench bench;
  ASSERT_TRUE(bench.open().ok());
  ASSERT_EQ(bench.write(0, 4 * kChunk, 1), 0);
  ASSERT_TRUE(bench.cut().ok());
  const uint64_t slab = bench.slabs_of(bench.spec.layers[1].layer_id)[0].first;
  for (uint32_t copy = 0; copy < 2; copy++) {
    SlabPage page = bench.page(slab, copy);
    for (SlabEntry& entry : page.entries) {
      if (entry.logical_chunk == 2) entry = {format::kNoChunk, 0, 0};
    }
    seal(page, kPoolUuid, bench.page_address(slab, copy), page.header.sequence + 1);
    bench.raw_write(bench.page_address(slab, copy), &page, kBlock);
  }
  EXPECT_EQ(bench.learn(1).code, Code::kCorrupt);
  EXPECT_TRUE(bench.reads(0, 4 * kChunk, 1));
  EXPECT_EQ(bench.learn(0).code, Code::kInvalidArgument) << "what is written";
}

// ---- on the disk alone

constexpr uint64_t kGeneration = 8;

// Volume 40 with the chain 43 (top, slab 4) on 42 (kept, slab 3) on 41 (slabs 1 and 2) on 30 (kept, slab 0). Slab 5 is 42's, unused.
class MergeOnDisk : public PoolTest {
 protected:
  void SetUp() override {
    PoolTest::SetUp();
    for (int twice = 0; twice < 2; twice++) {
      ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 43, 7, format::VolumeState::kOpen)));
      const auto frozen = [&](uint64_t id, uint64_t parent, const char* name) {
        format::LayerRecord record = layer_record(id, parent, 40, LayerState::kFrozen);
        HF_ASSERT(set_field(record.snapshot_name, name));
        record.header.flags = format::kLayerSettled;
        return record;
      };
      ASSERT_OK(write_layer_record(device, s, 1, frozen(30, 0, "first")));
      ASSERT_OK(write_layer_record(device, s, 2, frozen(41, 30, "")));
      ASSERT_OK(write_layer_record(device, s, 3, frozen(42, 41, "second")));
      ASSERT_OK(write_layer_record(device, s, 4, layer_record(43, 42, 40, LayerState::kWritable)));
    }
    put(0, 30, {{0, 0xffff, 0}, {1, 0xffff, 0}, {2, 0xffff, 0}, {3, 0xffff, 0}, {6, 0xffff, 0}, {7, 0xffff, 0}});
    put(1, 41, {{0, 0xffff, 0}, {1, 0x00ff, 0x0f00}});
    put(2, 41, {{2, 0xffff, 0}, {5, 0xff00, 0x000f}}, {{6, 2}});
    put(3, 42, {{1, 0x000f, 0}, {5, 0x0ff0, 0}});
    put(4, 43, {{0, 0x00ff, 0}});
    for (uint64_t slab = 0; slab < 6; slab++) {
      for (uint64_t block = 0; block < 16 * 8; block++) {
        *device.raw(slab_data_offset(s, slab) + block * format::kBlockSize) = static_cast<std::byte>(1 + slab * 40 + block % 40);
      }
    }
  }
  void put(uint64_t slab, uint64_t layer, std::vector<SlabEntry> entries, std::vector<format::HoleRange> holes = {}) {
    SlabPage page = slab_page(layer, 40, kGeneration, 7);
    for (size_t i = 0; i < entries.size(); i++) page.entries[i] = entries[i];
    for (const format::HoleRange& hole : holes) page.holes[page.hole_count++] = hole;
    write_slab(slab, page, 5);
  }
  LayerSpec layer(uint64_t id, uint32_t slot, std::vector<SlabRun> slabs) const {
    LayerSpec spec;
    spec.layer_id = id;
    spec.slot = slot;
    spec.birth = id;
    spec.frozen = id != 43;
    spec.slabs = std::move(slabs);
    return spec;
  }
  std::vector<LayerSpec> victims() const { return {layer(41, 2, {{1, 2, kGeneration}})}; }
  LayerSpec head() const { return layer(42, 3, {{3, 1, kGeneration}, {5, 1, kGeneration}}); }

  // What the chain shows: a byte for each block, 0 for zeros.
  std::vector<int> content(const std::vector<uint64_t>& chain) {
    std::vector<int> shown(8 * 16, -1);
    for (const uint64_t id : chain) {
      std::vector<int> here(shown.size(), -1);
      for (uint64_t slab = 0; slab < 8; slab++) {
        SlabPage pair[2];
        std::memcpy(pair, device.raw(slab_page_offset(s, slab)), sizeof pair);
        const Copies copies = choose_slab(pair[0], pair[1], kPool, slab_page_offset(s, slab));
        EXPECT_FALSE(copies.bad()) << "slab " << slab;
        if (!copies.valid() || pair[copies.newest].layer_id != id) continue;
        const SlabPage& page = pair[copies.newest];
        for (uint32_t c = 0; c < format::kChunksPerSlab; c++) {
          for (uint32_t b = 0; b < 16 && page.entries[c].logical_chunk < 8; b++) {
            int& block = here[page.entries[c].logical_chunk * 16 + b];
            if ((page.entries[c].zero >> b & 1) != 0) block = 0;
            if ((page.entries[c].data >> b & 1) != 0) {
              block = static_cast<int>(*device.raw(slab_data_offset(s, slab) + (c * 16 + b) * uint64_t{format::kBlockSize}));
            }
          }
        }
        for (uint32_t h = 0; h < page.hole_count; h++) {
          for (uint32_t b = page.holes[h].start * 16; b < (page.holes[h].start + page.holes[h].length) * 16; b++) {
            if (here[b] < 0) here[b] = 0;
          }
        }
      }
      for (size_t b = 0; b < shown.size(); b++) {
        if (shown[b] < 0) shown[b] = here[b];
      }
    }
    for (int& block : shown) block = std::max(block, 0);
    return shown;
  }
  std::vector<std::vector<int>> views() { return {content({43, 42, 41, 30}), content({42, 41, 30}), content({41, 30}), content({30})}; }
  // All that a merge may write to: pages, and the first chunks of each slab.
  static constexpr size_t kDataBytes = 16 * format::kChunkSize;
  std::vector<std::vector<std::byte>> save() {
    std::vector<std::vector<std::byte>> all;
    for (uint64_t slab = 0; slab < 6; slab++) {
      const std::byte* pages = device.raw(slab_page_offset(s, slab));
      const std::byte* data = device.raw(slab_data_offset(s, slab));
      all.emplace_back(pages, pages + format::kSlabPairSize);
      all.emplace_back(data, data + kDataBytes);
    }
    return all;
  }
  void restore(const std::vector<std::vector<std::byte>>& all) {
    for (uint64_t slab = 0; slab < 6; slab++) {
      std::memcpy(device.raw(slab_page_offset(s, slab)), all[2 * slab].data(), format::kSlabPairSize);
      std::memcpy(device.raw(slab_data_offset(s, slab)), all[2 * slab + 1].data(), kDataBytes);
    }
  }
  std::string findings() {
    Result<CheckReport> report = check_pool(device, {});
    HF_ASSERT(report.ok());
    std::string all;
    for (const CheckFinding& finding : report->findings) {
      if (finding.severity != CheckFinding::Severity::kInfo) all += finding.kind + " ";
    }
    return all;
  }
};

TEST_F(MergeOnDisk, BlocksGoToTheChunksThatTheHeadHasAndToFreeOnesAndZerosAndHolesGoAsSuch) {
  const auto before = views();
  Result<MergeReport> report = merge_layers(device, s, victims(), head(), 1000, 0);
  ASSERT_OK(report);
  EXPECT_TRUE(report->complete);
  // 41: chunk 0 whole, 4 + 4 of chunk 1, chunk 2 whole, 4 + 4 of chunk 5, and the hole over two chunks.
  EXPECT_EQ(report->moved_blocks, 16u + 8 + 16 + 8 + 32);
  EXPECT_EQ(report->spare.size(), 1u) << "the head's own slab had room";
  EXPECT_EQ(views(), before);
  SlabPage page;
  std::memcpy(&page, device.raw(slab_page_offset(s, 3)), sizeof page);
  EXPECT_EQ(page.entries[0].data, 0x00ff);
  EXPECT_EQ(page.entries[0].zero, 0x0f00);
  EXPECT_EQ(page.entries[1].data, 0xfff0);
  EXPECT_EQ(page.entries[1].zero, 0x000f);
  EXPECT_EQ(page.hole_count, 1u);
  EXPECT_EQ(findings(), "");
  Result<StripReport> stripped = strip_layers(device, s, [&] {
    std::vector<LayerSpec> all = victims();
    all[0].parent_layer_id = 30;
    return all;
  }(), {head()});
  ASSERT_OK(stripped);
  EXPECT_EQ(stripped->uses[0].live_blocks, 0u);
  EXPECT_EQ(content({43, 42, 41, 30}), before[0]);
  EXPECT_EQ(content({42, 41, 30}), before[1]);
  EXPECT_EQ(content({30}), before[3]);
  EXPECT_TRUE(has_code(merge_layers(device, s, {layer(30, 1, {{0, 1, kGeneration}})}, victims()[0], 1000, 0), Code::kInvalidArgument, "folded"))
      << "into what was stripped";
}

TEST_F(MergeOnDisk, CutOffAnywhereEverybodyReadsTheSameAndItCanBeRepeated) {
  // Its own slab is full: what has no place in it needs the other one.
  SlabPage full = slab_page(42, 40, kGeneration, 7);
  for (uint32_t c = 0; c < format::kChunksPerSlab; c++) full.entries[c] = {100 + c, 0x0001, 0};
  full.entries[0] = {1, 0x000f, 0};
  full.entries[1] = {5, 0x0ff0, 0};
  write_slab(3, full, 5);
  write_slab(3, 1, slab_page(42, 40, kGeneration, 7), 4);  // and its copies differ
  const auto before = views();
  for (uint64_t stop_at = 0; stop_at < 200; stop_at++) {
    for (int keep = 0; keep < 4; keep++) {
      const std::vector<std::vector<std::byte>> saved = save();
      uint64_t count = 0;
      device.set_faults([&](MemoryDisk::Op op, uint64_t, uint64_t) {
        if (op == MemoryDisk::Op::kRead) return MemoryDisk::Fault::kNone;
        return count++ >= stop_at ? MemoryDisk::Fault::kError : MemoryDisk::Fault::kNone;
      });
      const bool through = merge_layers(device, s, victims(), head(), 1000, 0).ok();
      device.set_faults(nullptr);
      device.power_cut([&](uint64_t offset) { return keep == 0 || (keep < 3 && offset / format::kPageSize % 2 == keep - 1u); });
      EXPECT_EQ(views(), before) << "stopped at " << stop_at << ", kept " << keep;
      EXPECT_EQ(findings(), "") << "stopped at " << stop_at << ", kept " << keep;
      Result<MergeReport> again = merge_layers(device, s, victims(), head(), 1000, 0);
      ASSERT_OK(again);
      EXPECT_TRUE(again->complete && again->spare.empty());
      EXPECT_EQ(views(), before);
      EXPECT_EQ(findings(), "");
      ASSERT_OK(device.flush());
      restore(saved);
      if (through) {
        EXPECT_GT(stop_at, 10u);
        return;
      }
    }
  }
  FAIL() << "it never came to an end";
}

// The engine of one merge died, and the next one, somewhere else, finds in the device's cache what it had not flushed. Then the power goes,
// and tears whatever is not durable.
TEST_F(MergeOnDisk, WhatAMergeFoundInTheCacheOnlyIsDurableBeforeItsOtherCopyIsWrittenOver) {
  const auto before = views();
  const std::vector<std::vector<std::byte>> saved = save();
  // Carries out so many changes, or all: true.
  const auto merge = [&](uint64_t changes) {
    uint64_t count = 0;
    device.set_faults([&](MemoryDisk::Op op, uint64_t, uint64_t) {
      return op != MemoryDisk::Op::kRead && count++ >= changes ? MemoryDisk::Fault::kError : MemoryDisk::Fault::kNone;
    });
    const bool through = merge_layers(device, s, victims(), head(), 1000, 0).ok();
    device.set_faults(nullptr);
    return through;
  };
  // Of each page that is not durable the first 64 bytes arrive.
  const auto tear = [&] {
    std::vector<std::vector<std::byte>> written;
    for (uint64_t slab = 0; slab < 6; slab++) {
      const std::byte* pages = device.raw(slab_page_offset(s, slab));
      written.emplace_back(pages, pages + format::kSlabPairSize);
    }
    device.power_cut([](uint64_t) { return false; });
    for (uint64_t slab = 0; slab < 6; slab++) {
      for (size_t copy = 0; copy < format::kSlabPairSize; copy += format::kPageSize) {
        std::memcpy(device.raw(slab_page_offset(s, slab) + copy), written[slab].data() + copy, 64);
      }
    }
  };
  bool whole = false;
  uint64_t first = 0;
  for (; !whole; first++) {
    bool through = false;
    for (uint64_t second = 0; !through; second++) {
      restore(saved);
      ASSERT_OK(device.flush());
      whole = merge(first);
      through = merge(second);
      tear();
      ASSERT_EQ(views(), before) << "stopped at " << first << ", then at " << second;
      ASSERT_TRUE(merge(~uint64_t{0}));
      ASSERT_EQ(views(), before) << "stopped at " << first << ", then at " << second << ", and repeated";
      ASSERT_EQ(findings(), "") << "stopped at " << first << ", then at " << second << ", and repeated";
    }
  }
  EXPECT_GT(first, 10u);
}

TEST_F(MergeOnDisk, ASlabThatWouldCostTooManyChunksStaysAndOneThatIsDamagedStopsIt) {
  const auto before = views();
  Result<MergeReport> report = merge_layers(device, s, victims(), head(), 0, 0);
  ASSERT_OK(report);
  EXPECT_EQ(report->moved_blocks, 0u) << "each of them has a chunk that the head has not";
  EXPECT_TRUE(report->complete);
  damage(slab_page_offset(s, 2));
  damage(slab_page_offset(s, 2) + format::kPageSize);
  EXPECT_TRUE(has_code(merge_layers(device, s, victims(), head(), 1000, 0), Code::kCorrupt, "damaged"));
  EXPECT_TRUE(has_code(merge_layers(device, s, {}, head(), 1000, 0), Code::kInvalidArgument));
  EXPECT_TRUE(has_code(merge_layers(device, s, victims(), layer(43, 4, {{4, 1, kGeneration}}), 1000, 0), Code::kStale, "writable"));
  EXPECT_TRUE(has_code(merge_layers(device, s, {head()}, victims()[0], 1000, 0), Code::kInvalidArgument, "newest first"));
}

TEST_F(MergeOnDisk, ASlabOfTheHeadThatWasHandedOnIsNotClaimed) {
  SlabPage other = slab_page(77, 41, kGeneration + 1, 9);
  other.entries[0] = {0, 0xffff, 0};
  write_slab(5, other, 9);
  SlabPage full = slab_page(42, 40, kGeneration, 7);
  for (uint32_t c = 0; c < format::kChunksPerSlab; c++) full.entries[c] = {100 + c, 0x0001, 0};
  write_slab(3, full, 5);
  Result<MergeReport> report = merge_layers(device, s, victims(), head(), 1000, 0);
  ASSERT_OK(report);
  EXPECT_TRUE(report->no_space);
  EXPECT_FALSE(report->complete);
  SlabPage page;
  std::memcpy(&page, device.raw(slab_page_offset(s, 5)), sizeof page);
  EXPECT_EQ(page.layer_id, 77u);
}

}  // namespace
}  // namespace holdfast::test
