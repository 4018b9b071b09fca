// `pool check` names every fault it can see, once, at its place, with the right weight, and is silent on a good pool.
#include "core/checker.h"

#include <algorithm>
#include <functional>

#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using format::kNoChunk;
using format::kPageSize;
using format::LayerState;
using format::SlabPage;
using format::VolumeState;
using Severity = CheckFinding::Severity;
using Fault = MemoryDisk::Fault;
using Op = MemoryDisk::Op;

// Volume 40 (closed, slot 4) with layers 41 (top, slabs 1 and 2) on 30 (frozen, slab 3); volume 50 (open, slot 5) with
// layer 51 (slab 6).
class CheckerTest : public PoolTest {
 protected:
  void SetUp() override {
    PoolTest::SetUp();
    for (int twice = 0; twice < 2; twice++) {
      ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 41, 7, VolumeState::kClosed)));
      ASSERT_OK(write_volume_record(device, s, 5, volume_record(50, 51, 7, VolumeState::kOpen)));
      ASSERT_OK(write_layer_record(device, s, 1, layer_record(30, 0, 40, LayerState::kFrozen)));
      ASSERT_OK(write_layer_record(device, s, 2, layer_record(41, 30, 40, LayerState::kWritable)));
      ASSERT_OK(write_layer_record(device, s, 3, layer_record(51, 0, 50, LayerState::kWritable)));
    }
    write_slab(1, mapped(41, 40, {10, 11, 12}), 5);
    write_slab(2, mapped(41, 40, {20}), 5);
    write_slab(3, mapped(30, 40, {10, 500}), 5);
    write_slab(6, mapped(51, 50, {10}), 5);
  }

  static SlabPage mapped(uint64_t layer, uint64_t volume, std::initializer_list<uint32_t> chunks) {
    SlabPage page = slab_page(layer, volume, 8, 7);
    size_t i = 0;
    for (const uint32_t chunk : chunks) page.entries[i++] = {chunk, 0x00ff, 0x0100};
    return page;
  }

  CheckReport check() {
    Result<CheckReport> report = check_pool(device, {});
    HF_ASSERT(report.ok());
    return *report;
  }

  // The one finding that the change leads to.
  testing::AssertionResult finds(const std::string& kind, Severity severity, const std::string& part = "") {
    const CheckReport report = check();
    std::string all;
    int matching = 0;
    for (const CheckFinding& finding : report.findings) {
      all += std::string("\n  ") + severity_name(finding.severity) + " " + finding.kind + ": " + finding.message;
      if (finding.kind == kind && finding.severity == severity && finding.message.find(part) != std::string::npos) {
        matching++;
        found = finding;
      }
    }
    if (report.clean != std::all_of(report.findings.begin(), report.findings.end(),
                                    [](const CheckFinding& finding) { return finding.severity == Severity::kInfo; })) {
      return testing::AssertionFailure() << "clean is wrong:" << all;
    }
    if (matching == 1 && report.findings.size() == 1) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "looked for one " << severity_name(severity) << " " << kind << " (" << part
                                       << "), found:" << all;
  }
  CheckFinding found;
};

TEST_F(CheckerTest, AGoodPoolIsCleanAndCounted) {
  uint64_t last = 0, of = 0;
  Result<CheckReport> report = check_pool(device, [&](uint64_t done, uint64_t total) {
    EXPECT_GE(done, last);
    EXPECT_LE(done, total);
    last = done;
    of = total;
  });
  ASSERT_OK(report);
  EXPECT_TRUE(report->clean);
  EXPECT_TRUE(report->findings.empty()) << report->findings[0].message;
  EXPECT_EQ(report->volumes, 2u);
  EXPECT_EQ(report->layers, 3u);
  EXPECT_EQ(report->slabs_claimed, 4u);
  EXPECT_EQ(report->slabs_free, 6u);
  EXPECT_EQ(report->pool.uuid, kPool);
  EXPECT_GT(report->pages_read, 2'000u);
  EXPECT_EQ(last, of);
}

TEST_F(CheckerTest, NeverWrites) {
  damage(slab_page_offset(s, 1));
  damage(volume_record_offset(s, 4));
  damage(0);
  device.set_faults([](Op op, uint64_t, uint64_t) {
    EXPECT_EQ(op, Op::kRead);
    return Fault::kNone;
  });
  EXPECT_FALSE(check().clean);
}

TEST_F(CheckerTest, NamesDamagedSuperblocksAuthorityHeartbeatsAndFencePages) {
  const auto once = [&](uint64_t at, const char* kind, Severity severity, const std::string& part) {
    damage(at);
    EXPECT_TRUE(finds(kind, severity, part));
    damage(at);
  };
  once(0, "superblock", Severity::kWarning, "copy B was used");
  once(s.authority_offset, "authority-copy-bad", Severity::kWarning, "copy A fails its checksum");
  once(heartbeat_offset(s, 9), "heartbeat-copy-bad", Severity::kInfo, "host 9");
  once(fence_offset(s, 9, 3), "fence-page-bad", Severity::kError, "fence page 3 of host 9");
  damage(s.authority_offset);
  once(s.authority_offset + kPageSize, "authority-both-bad", Severity::kError, "by force");
  damage(s.authority_offset);
  damage(heartbeat_offset(s, 9));
  once(heartbeat_offset(s, 9) + kPageSize, "heartbeat-both-bad", Severity::kError, "host 9");
}

TEST_F(CheckerTest, NamesAFencePageOnTheWrongPlaceAndAFencedHostThatIsStillOpen) {
  format::FencePage page{};
  page.host_id = 3;
  page.generation = 5;
  const auto place = [&](uint32_t host, uint64_t generation) {
    const uint64_t at = fence_offset(s, host, generation);
    seal(page, kPool, at, 2);
    std::memcpy(device.raw(at), &page, sizeof page);
  };
  place(3, 5);
  EXPECT_TRUE(finds("open-by-fenced-host", Severity::kInfo, "volume 50"));
  EXPECT_EQ(found.volume_id, 50u);
  page.host_id = 4;
  place(3, 5);
  EXPECT_TRUE(finds("fence-page-misplaced", Severity::kError, "names host 4"));
}

TEST_F(CheckerTest, OneBadRecordCopyIsInfoOfAnOpenVolumeAndAWarningOfAClosedOne) {
  damage(volume_record_offset(s, 5));
  EXPECT_TRUE(finds("volume-record-copy-bad", Severity::kInfo, "volume 50"));
  damage(volume_record_offset(s, 5));
  damage(volume_record_offset(s, 4));
  EXPECT_TRUE(finds("volume-record-copy-bad", Severity::kWarning, "volume 40"));
  damage(volume_record_offset(s, 4));
  damage(layer_record_offset(s, 2) + kPageSize);
  EXPECT_TRUE(finds("layer-record-copy-bad", Severity::kWarning, "layer 41"));
}

TEST_F(CheckerTest, TwoBadRecordCopiesAreAnError) {
  ASSERT_OK(write_volume_record(device, s, 9, volume_record(90, 41, 7, VolumeState::kDeleted)));
  ASSERT_OK(write_volume_record(device, s, 9, volume_record(90, 41, 7, VolumeState::kDeleted)));
  EXPECT_TRUE(check().clean) << "a tombstone";
  damage(volume_record_offset(s, 9));
  damage(volume_record_offset(s, 9) + kPageSize);
  EXPECT_TRUE(finds("volume-record-both-bad", Severity::kError, "volume record 9"));
  EXPECT_EQ(found.offset, volume_record_offset(s, 9));
  EXPECT_EQ(found.length, 2u * kPageSize);
}

TEST_F(CheckerTest, AnInterruptedFirstWriteIsNoDamage) {
  ASSERT_OK(write_volume_record(device, s, 9, volume_record(90, 41, 7, VolumeState::kClosed)));
  damage(volume_record_offset(s, 9));
  EXPECT_TRUE(finds("volume-record-torn", Severity::kInfo, "counts as unused"));
  std::memset(device.raw(volume_record_offset(s, 9)), 0, kPageSize);
  write_slab(8, 0, mapped(41, 40, {}), 5);
  damage(slab_page_offset(s, 8));
  EXPECT_TRUE(finds("slab-claim-torn", Severity::kInfo, "slab 8"));
}

// Of a volume that was cleanly closed since: the claim was never needed again.
TEST_F(CheckerTest, HalfAClaimIsNoDamage) {
  write_slab(8, 0, mapped(41, 40, {}), 5);
  EXPECT_TRUE(finds("slab-claim-torn", Severity::kInfo, "slab 8")) << "the other copy is blank";
  write_slab(8, 1, mapped(41, 40, {}), 5);
  EXPECT_TRUE(check().findings.empty());
  damage(slab_page_offset(s, 8));
  EXPECT_TRUE(finds("slab-claim-torn", Severity::kInfo, "slab 8")) << "the other copy is torn";
  write_slab(8, 0, slab_page(51, 50, 2), 90);
  write_slab(8, 1, slab_page(41, 40, 3), 5);
  EXPECT_TRUE(finds("slab-claim-torn", Severity::kInfo, "slab 8")) << "the other copy is an earlier owner's";
  EXPECT_TRUE(check().clean);
}

TEST_F(CheckerTest, HoldsVolumesAndLayersAgainstEachOther) {
  const auto volume = [&](const std::function<void(format::VolumeRecord&)>& change, const char* kind,
                          const std::string& part) {
    format::VolumeRecord record = volume_record(40, 41, 7, VolumeState::kClosed);
    change(record);
    ASSERT_OK(write_volume_record(device, s, 4, record));
    EXPECT_TRUE(finds(kind, Severity::kError, part));
    ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 41, 7, VolumeState::kClosed)));
  };
  volume([](auto& r) { r.size_bytes = 0; }, "volume-size", "impossible size of 0");
  volume([](auto& r) { r.size_bytes = (64u << 20) + 512; }, "volume-size", "");
  volume([](auto& r) { r.host_id = 999; }, "volume-host", "host 999");
  volume([](auto& r) { r.parameters_length = 4096; }, "volume-parameters", "");
  write_slab(2, slab_page(0, 0, 9), 6);
  volume([](auto& r) { r.epoch = 6; }, "slab-epoch-ahead", "slab 1");
}

TEST_F(CheckerTest, NamesAVolumeWithoutALayerAndOneWithTwoRecords) {
  ASSERT_OK(write_volume_record(device, s, 9, volume_record(90, 91, 7, VolumeState::kClosed)));
  EXPECT_TRUE(finds("volume-without-layer", Severity::kError, "has no record"));
  ASSERT_OK(write_volume_record(device, s, 9, volume_record(40, 41, 7, VolumeState::kClosed)));
  EXPECT_TRUE(finds("volume-twice", Severity::kError, "slots 4 and 9"));
}

TEST_F(CheckerTest, NamesBrokenLayerChains) {
  const auto layer = [&](format::LayerRecord record, const char* kind, const std::string& part) {
    ASSERT_OK(write_layer_record(device, s, 9, record));
    EXPECT_TRUE(finds(kind, Severity::kError, part));
  };
  layer(layer_record(60, 59, 40, LayerState::kFrozen), "layer-without-parent", "layer 59");
  layer(layer_record(60, 41, 40, LayerState::kFrozen), "layer-parent-writable", "layer 41");
  format::LayerRecord older = layer_record(60, 30, 40, LayerState::kFrozen);
  older.birth = 30;
  layer(older, "layer-order", "layer 30");
}

TEST_F(CheckerTest, ALayerCycleEndsTheWalk) {
  format::LayerRecord low = layer_record(60, 61, 40, LayerState::kFrozen);
  format::LayerRecord high = layer_record(61, 60, 40, LayerState::kFrozen);
  ASSERT_OK(write_layer_record(device, s, 9, low));
  ASSERT_OK(write_layer_record(device, s, 10, high));
  const CheckReport report = check();
  EXPECT_EQ(std::count_if(report.findings.begin(), report.findings.end(),
                          [](const CheckFinding& finding) { return finding.kind == "layer-cycle"; }),
            2);
}

TEST_F(CheckerTest, ABadSlabPageCopyIsInfoOfAnOpenVolumeAWarningOfAClosedOneAndTwoAreAnError) {
  damage(slab_page_offset(s, 6));
  EXPECT_TRUE(finds("slab-page-copy-bad", Severity::kInfo, "volume 50, layer 51"));
  damage(slab_page_offset(s, 6));
  damage(slab_page_offset(s, 1) + kPageSize);
  EXPECT_TRUE(finds("slab-page-copy-bad", Severity::kWarning, "slab 1 of volume 40, layer 41: copy B"));
  damage(slab_page_offset(s, 1));
  EXPECT_TRUE(finds("slab-page-both-bad", Severity::kError, "slab 1 of volume 40"));
  EXPECT_EQ(found.slab, 1u);
  EXPECT_EQ(found.volume_id, 40u);
  EXPECT_EQ(found.layer_id, 41u);
  EXPECT_EQ(found.offset, slab_page_offset(s, 1));
}

TEST_F(CheckerTest, CopiesThatDifferAreDamageOnlyAfterACleanClose) {
  write_slab(6, 1, mapped(51, 50, {10, 11}), 6);
  EXPECT_TRUE(check().findings.empty()) << "its volume is open";
  write_slab(1, 1, mapped(41, 40, {10, 11, 12, 13}), 6);
  EXPECT_TRUE(finds("slab-copies-differ", Severity::kWarning, "slab 1"));
  ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 41, 7, VolumeState::kOpen)));
  ASSERT_OK(write_volume_closed(device, s, 4, 40, 7));
  EXPECT_TRUE(check().findings.empty()) << "closed, but not cleanly";
}

TEST_F(CheckerTest, AFrozenLayersCopiesMayDifferUntilItIsSettledAndAfterThatByStrippingOrMergingOnly) {
  write_slab(3, 1, mapped(30, 40, {10, 500, 501}), 6);
  EXPECT_TRUE(check().findings.empty()) << "a crash right after the cut leaves this";
  format::LayerRecord settled = layer_record(30, 0, 40, LayerState::kFrozen);
  settled.header.flags = format::kLayerSettled;
  ASSERT_OK(write_layer_record(device, s, 1, settled));
  EXPECT_TRUE(finds("slab-copies-differ", Severity::kInfo, "being merged into it")) << "the newer copy only has more";
  write_slab(3, 1, mapped(30, 40, {10, 501}), 6);
  EXPECT_TRUE(finds("slab-copies-differ", Severity::kWarning, "its layer is frozen"));
  SlabPage stripped = mapped(30, 40, {10, 500});
  stripped.entries[0].data = 0x000f;
  stripped.entries[1] = {format::kNoChunk, 0, 0};
  write_slab(3, 0, mapped(30, 40, {10, 500}), 7);
  write_slab(3, 1, stripped, 8);
  EXPECT_TRUE(finds("slab-copies-differ", Severity::kInfo, "stripped"));
  damage(slab_page_offset(s, 3));
  EXPECT_TRUE(finds("slab-page-copy-bad", Severity::kWarning));
}

TEST_F(CheckerTest, VolumesShareLayersAndAFoldedOneStaysInTheChain) {
  ASSERT_OK(write_layer_record(device, s, 1, layer_record(30, 0, 40, LayerState::kFolded)));
  for (int twice = 0; twice < 2; twice++) {
    ASSERT_OK(write_volume_record(device, s, 6, volume_record(60, 61, 7, VolumeState::kClosed)));
    ASSERT_OK(write_layer_record(device, s, 9, layer_record(61, 30, 60, LayerState::kWritable)));
  }
  write_slab(4, mapped(61, 60, {10}), 5);
  const CheckReport report = check();
  EXPECT_TRUE(report.findings.empty()) << report.findings[0].message;
  EXPECT_EQ(report.slabs_claimed + report.slabs_free, report.pool.slab_count);
}

TEST_F(CheckerTest, AnInterruptedCutAndALayerThatNobodyNeedsAreInfo) {
  // The new top's record is there, the volume's record is still the old one's.
  ASSERT_OK(write_layer_record(device, s, 9, layer_record(60, 41, 40, LayerState::kWritable)));
  EXPECT_TRUE(finds("layer-unused", Severity::kInfo, "a cut was interrupted"));
  ASSERT_OK(write_layer_record(device, s, 2, layer_record(41, 30, 40, LayerState::kFrozen)));
  EXPECT_TRUE(finds("layer-unused", Severity::kInfo, "a cut was interrupted")) << "the old top may say frozen already";
  ASSERT_OK(write_layer_record(device, s, 9, layer_record(60, 0, 40, LayerState::kFrozen)));
  EXPECT_TRUE(finds("layer-unused", Severity::kInfo, "no named snapshot"));
  format::LayerRecord named = layer_record(60, 0, 40, LayerState::kFrozen);
  ASSERT_TRUE(set_field(named.snapshot_name, "kept"));
  ASSERT_OK(write_layer_record(device, s, 9, named));
  EXPECT_TRUE(check().findings.empty());
}

TEST_F(CheckerTest, NamesAChunkMappedTwiceWithBothPlaces) {
  write_slab(2, mapped(41, 40, {20, 11}), 5);
  EXPECT_TRUE(finds("chunk-mapped-twice", Severity::kError, "volume bytes 720896 to 786432"));
  EXPECT_NE(found.message.find("slabs 1, 2"), std::string::npos) << found.message;
  write_slab(2, mapped(41, 40, {20, 20}), 5);
  EXPECT_TRUE(finds("chunk-mapped-twice", Severity::kError, "slabs 2, 2"));
}

TEST_F(CheckerTest, AChunkMappedTwiceByPagesOfDifferentFlushesIsWhatACrashOfAnOpenVolumeLeaves) {
  write_slab(7, mapped(51, 50, {10}), 9);
  EXPECT_TRUE(finds("chunk-mapped-twice", Severity::kInfo, "the page of the latest flush counts"));
  write_slab(7, mapped(51, 50, {10}), 5);
  EXPECT_TRUE(finds("chunk-mapped-twice", Severity::kError, "slabs 6, 7"));
}

TEST_F(CheckerTest, ForgivesAChunkThatAnOpenVolumeMovedWhileItWasRead) {
  write_slab(2, mapped(41, 40, {20, 11}), 5);
  bool moved = false;
  device.set_faults([&](Op op, uint64_t offset, uint64_t) {
    if (op == Op::kRead && offset == slab_page_offset(s, 0)) {
      if (moved) {  // the second look
        write_slab(1, mapped(41, 40, {10, 12}), 5);
      }
      moved = true;
    }
    return Fault::kNone;
  });
  EXPECT_TRUE(check().findings.empty());
}

TEST_F(CheckerTest, NamesEntriesAndHolesThatCannotBe) {
  const auto page = [&](const std::function<void(SlabPage&)>& change, const char* kind, const std::string& part) {
    SlabPage changed = mapped(41, 40, {10, 11, 12});
    change(changed);
    write_slab(1, changed, 5);
    EXPECT_TRUE(finds(kind, Severity::kError, part));
  };
  page([](SlabPage& p) { p.entries[7].data = 1; }, "entry-mask-without-chunk", "chunk 7");
  page([](SlabPage& p) { p.entries[2] = {12, 0, 0}; }, "entry-without-blocks", "volume bytes 786432");
  page([](SlabPage& p) { p.entries[0].zero = 1; }, "entry-masks-overlap", "volume bytes 655360 to 720896");
  page([](SlabPage& p) { p.entries[5] = {1'024, 1, 0}; }, "chunk-past-end", "past the end");
  page([](SlabPage& p) { p.hole_count = 241; }, "hole-count", "241");
  const auto hole = [&](uint32_t start, uint32_t length) {
    page(
        [&](SlabPage& p) {
          p.hole_count = 1;
          p.holes[0] = {start, length};
        },
        "hole-range", "hole range 0");
  };
  hole(0, 0);
  hole(1'024, 1);
  hole(1'000, 25);
  hole(5, 0xffffffffu);
  SlabPage good = mapped(41, 40, {10});
  good.hole_count = 2;
  good.holes[0] = {0, 1'024};
  good.holes[1] = {1'023, 1};
  write_slab(1, good, 5);
  EXPECT_TRUE(check().findings.empty());
}

TEST_F(CheckerTest, NamesSlabsWhoseOwnerIsUnknownDeletedOrDouble) {
  write_slab(8, mapped(77, 70, {1}), 5);
  EXPECT_TRUE(finds("slab-of-unknown-layer", Severity::kError, "volume 70, layer 77"));
  write_slab(8, 0, mapped(41, 40, {600}), 5);
  write_slab(8, 1, mapped(51, 50, {600}), 6);
  EXPECT_TRUE(finds("slab-owned-twice", Severity::kError, "layers 41 and 51"));
  write_slab(8, mapped(41, 50, {600}), 5);
  EXPECT_TRUE(finds("slab-volume-differs", Severity::kWarning, "slab 8"));
  ASSERT_OK(write_layer_record(device, s, 9, layer_record(77, 0, 70, LayerState::kDeleted)));
  write_slab(8, mapped(77, 70, {1}), 5);
  EXPECT_TRUE(finds("slab-of-deleted-layer", Severity::kWarning, "must be repeated"));
}

TEST_F(CheckerTest, AWipedVolumeLeavesACleanPool) {
  ASSERT_OK(wipe_volume(device, s, {40, 4, 7, {{41, 2, {{1, 2, 8}}}, {30, 1, {{3, 1, 8}}}}}));
  const CheckReport report = check();
  EXPECT_TRUE(report.findings.empty()) << report.findings[0].message;
  EXPECT_EQ(report.volumes, 1u);
  EXPECT_EQ(report.layers, 1u);
  EXPECT_EQ(report.slabs_claimed, 1u);
}

TEST_F(CheckerTest, GoesOnPastPagesThatCannotBeRead) {
  const uint64_t bad = slab_page_offset(s, 1) + kPageSize;
  device.set_faults([bad](Op op, uint64_t offset, uint64_t length) {
    return op == Op::kRead && offset <= bad && bad < offset + length ? Fault::kError : Fault::kNone;
  });
  const CheckReport report = check();
  ASSERT_EQ(report.findings.size(), 2u);
  EXPECT_EQ(report.findings[0].kind, "read-error");
  EXPECT_EQ(report.findings[0].offset, bad);
  EXPECT_EQ(report.findings[1].kind, "slab-page-copy-bad");
  EXPECT_EQ(report.slabs_claimed, 4u);
}

TEST_F(CheckerTest, RefusesWhatIsNoPoolItKnows) {
  damage(0);
  damage(format::kSuperblockBOffset);
  EXPECT_TRUE(has_code(check_pool(device, {}), Code::kCorrupt));
}

}  // namespace
}  // namespace holdfast::test
