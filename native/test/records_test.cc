// Volume and layer records, closing on behalf of, scanning and wiping slabs (DESIGN 6.3, 6.4, section 10).
#include "core/records.h"

#include <functional>
#include <optional>
#include <utility>

#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using format::kPageSize;
using format::LayerState;
using format::VolumeRecord;
using format::VolumeState;
using Fault = MemoryDisk::Fault;
using Op = MemoryDisk::Op;

using RecordsTest = PoolTest;

// Of volume records only some part arrives, when it is asked for, and the write fails.
class TearingDisk final : public SyncDevice {
 public:
  explicit TearingDisk(MemoryDisk& under) : under_(under) {}
  std::optional<std::pair<size_t, size_t>> part;  // of the next record's bytes

  uint64_t size_bytes() const override { return under_.size_bytes(); }
  const std::string& name() const override { return under_.name(); }
  Status read(uint64_t offset, void* buffer, size_t length) override { return under_.read(offset, buffer, length); }
  Status write(uint64_t offset, const void* buffer, size_t length) override { return under_.write(offset, buffer, length); }
  Status write_durable(uint64_t offset, const void* buffer, size_t length) override {
    const bool record = verify(buffer, format::kMagicVolume, kPool, offset) == PageState::kOk;
    if (!record || !part.has_value()) return under_.write_durable(offset, buffer, length);
    const auto [from, to] = *part;
    std::memcpy(under_.raw(offset + from), static_cast<const std::byte*>(buffer) + from, to - from);
    part.reset();
    return {Code::kIo, "torn"};
  }
  Status flush() override { return under_.flush(); }
  Status discard(uint64_t offset, uint64_t length) override { return under_.discard(offset, length); }
  Status zero(uint64_t offset, uint64_t length) override { return under_.zero(offset, length); }

 private:
  MemoryDisk& under_;
};

TEST_F(RecordsTest, AnUnusedSlotIsEmptyAndARecordComesBackWhole) {
  EXPECT_FALSE(read_volume_record(device, s, 7)->has_value());
  VolumeRecord record = volume_record(70, 71, 9, VolumeState::kOpen);
  record.uuid = {1, 2};
  record.fenced = 1;
  const std::string json = R"({"fsType":"ext4"})";
  std::memcpy(record.parameters, json.data(), json.size());
  record.parameters_length = static_cast<uint32_t>(json.size());
  ASSERT_OK(write_volume_record(device, s, 7, record));
  const VolumeRecordInfo back = **read_volume_record(device, s, 7);
  EXPECT_EQ(back.slot, 7u);
  EXPECT_EQ(back.volume_id, 70u);
  EXPECT_EQ(back.uuid, record.uuid);
  EXPECT_EQ(back.name, "vol-70");
  EXPECT_EQ(back.state, VolumeState::kOpen);
  EXPECT_EQ(back.top_layer_id, 71u);
  EXPECT_EQ(back.epoch, 9u);
  EXPECT_EQ(back.host_id, 3u);
  EXPECT_EQ(back.generation, 5u);
  EXPECT_TRUE(back.fenced);
  EXPECT_EQ(back.parameters_json, json);
  ASSERT_OK(write_layer_record(device, s, 8, layer_record(71, 70, 69, LayerState::kFrozen)));
  EXPECT_EQ((*read_layer_record(device, s, 8))->parent_layer_id, 70u);
  EXPECT_TRUE(has_code(read_volume_record(device, s, s.volume_slots), Code::kInvalidArgument));
  EXPECT_TRUE(has_code(write_layer_record(device, s, s.layer_slots, {}), Code::kInvalidArgument));
}

TEST_F(RecordsTest, CopiesAreWrittenInTurnAndDurably) {
  const uint64_t at = volume_record_offset(s, 0);
  for (uint64_t epoch = 1; epoch <= 4; epoch++) {
    ASSERT_OK(write_volume_record(device, s, 0, volume_record(1, 2, epoch, VolumeState::kOpen)));
    const auto* written = reinterpret_cast<VolumeRecord*>(device.raw(at + (epoch - 1) % 2 * kPageSize));
    EXPECT_EQ(written->epoch, epoch);
  }
  device.power_cut([](uint64_t) { return false; });
  EXPECT_EQ((*read_volume_record(device, s, 0))->epoch, 4u);
}

// A write of unknown outcome, then another one during which the power goes.
TEST_F(RecordsTest, WhatWasReadIsDurableBeforeTheOtherCopyIsWrittenOver) {
  std::string order;
  ASSERT_OK(write_volume_record(device, s, 0, volume_record(1, 2, 1, VolumeState::kOpen)));
  device.set_faults([&](Op op, uint64_t, uint64_t) {
    order += op == Op::kRead ? "R" : op == Op::kWrite ? "W" : op == Op::kFlush ? "F" : "?";
    return Fault::kNone;
  });
  ASSERT_OK(write_volume_record(device, s, 0, volume_record(1, 2, 2, VolumeState::kOpen)));
  EXPECT_EQ(order, "RFW");
}

// DESIGN 10: "torn volume record loses an epoch".
TEST_F(RecordsTest, ATornRecordKeepsTheEpochBeforeIt) {
  const auto with_long_parameters = [](uint64_t epoch) {
    VolumeRecord record = volume_record(1, 2, epoch, VolumeState::kOpen);
    std::memset(record.parameters, static_cast<int>('a' + epoch), sizeof record.parameters);
    record.parameters_length = sizeof record.parameters;
    return record;
  };
  for (uint64_t epoch = 1; epoch <= 6; epoch++) {
    ASSERT_OK(write_volume_record(device, s, 0, with_long_parameters(10 * epoch)));
    device.set_faults([](Op op, uint64_t, uint64_t) { return op == Op::kWrite ? Fault::kTorn : Fault::kNone; });
    ASSERT_OK(write_volume_record(device, s, 0, with_long_parameters(10 * epoch + 1)));
    device.set_faults({});
    const VolumeRecordInfo back = **read_volume_record(device, s, 0);
    EXPECT_EQ(back.epoch, 10 * epoch);
    EXPECT_TRUE(back.degraded);
  }
}

// The sectors that a torn record lacks may be the same in the next record written to that copy.
TEST_F(RecordsTest, ATornRecordIsNotMadeWholeByAnotherTornWrite) {
  TearingDisk tearing(device);
  const auto with_parameters = [](uint64_t epoch, char of) {
    VolumeRecord record = volume_record(1, 2, epoch, VolumeState::kOpen);
    std::memset(record.parameters, of, sizeof record.parameters);
    record.parameters_length = sizeof record.parameters;
    return record;
  };
  ASSERT_OK(write_volume_record(tearing, s, 0, with_parameters(1, 'a')));
  ASSERT_OK(write_volume_record(tearing, s, 0, with_parameters(2, 'a')));
  tearing.part = {0, kPageSize / 2};
  EXPECT_TRUE(has_code(write_volume_record(tearing, s, 0, with_parameters(3, 'b')), Code::kIo));
  tearing.part = {kPageSize / 2, kPageSize};
  EXPECT_TRUE(has_code(write_volume_record(tearing, s, 0, with_parameters(4, 'b')), Code::kIo));
  EXPECT_EQ((*read_volume_record(device, s, 0))->epoch, 2u);
}

TEST_F(RecordsTest, BothCopiesDamagedAreRefusedAndNotWrittenOver) {
  ASSERT_OK(write_volume_record(device, s, 0, volume_record(1, 2, 1, VolumeState::kClosed)));
  ASSERT_OK(write_volume_record(device, s, 0, volume_record(1, 2, 2, VolumeState::kClosed)));
  damage(volume_record_offset(s, 0));
  damage(volume_record_offset(s, 0) + kPageSize);
  EXPECT_TRUE(has_code(read_volume_record(device, s, 0), Code::kCorrupt, "volume record 0"));
  EXPECT_TRUE(has_code(write_volume_record(device, s, 0, volume_record(1, 2, 3, VolumeState::kOpen)), Code::kCorrupt));
  ASSERT_OK(write_volume_record(device, s, 600, volume_record(9, 2, 1, VolumeState::kDeleted)));
  std::vector<std::string> damaged;
  const std::vector<VolumeRecordInfo> all = *read_volume_records(device, s, &damaged);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].slot, 600u);
  EXPECT_EQ(all[0].state, VolumeState::kDeleted);
  ASSERT_EQ(damaged.size(), 1u);
  EXPECT_NE(damaged[0].find("volume record 0"), std::string::npos);
}

TEST_F(RecordsTest, ATableIsReadToItsLastSlot) {
  for (const uint32_t slot : {0u, 511u, 512u, 1'023u}) {
    ASSERT_OK(write_volume_record(device, s, slot, volume_record(slot + 1, 2, 1, VolumeState::kClosed)));
  }
  ASSERT_OK(write_layer_record(device, s, s.layer_slots - 1, layer_record(3, 0, 1, LayerState::kWritable)));
  std::vector<std::string> damaged;
  EXPECT_EQ(read_volume_records(device, s, &damaged)->size(), 4u);
  EXPECT_EQ(read_layer_records(device, s, &damaged)->at(0).slot, s.layer_slots - 1);
  EXPECT_TRUE(damaged.empty());
}

TEST_F(RecordsTest, ClosingOnBehalfNeedsTheVeryEpochAndSaysUnclean) {
  ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 41, 7, VolumeState::kOpen)));
  EXPECT_TRUE(has_code(write_volume_closed(device, s, 4, 40, 6), Code::kStale, "epoch 0.7"));
  EXPECT_TRUE(has_code(write_volume_closed(device, s, 4, 40, 8), Code::kStale));
  EXPECT_TRUE(has_code(write_volume_closed(device, s, 4, 39, 7), Code::kStale, "volume 40"));
  EXPECT_TRUE(has_code(write_volume_closed(device, s, 5, 40, 7), Code::kStale, "nothing"));
  EXPECT_EQ((*read_volume_record(device, s, 4))->state, VolumeState::kOpen);
  ASSERT_OK(write_volume_closed(device, s, 4, 40, 7));
  ASSERT_OK(write_volume_closed(device, s, 4, 40, 7)) << "again is fine";
  const VolumeRecord record = **load_volume_record(device, s, 4);
  EXPECT_EQ(record.state, VolumeState::kClosed);
  EXPECT_EQ(record.epoch, 7u);
  EXPECT_EQ(record.header.flags & format::kVolumeUnclean, format::kVolumeUnclean);
}

TEST_F(RecordsTest, AfterAGapARecordThatSomebodyElseWroteIsNoLongerOurs) {
  ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 41, 7, VolumeState::kOpen)));
  EXPECT_OK(check_volume_still_ours(device, s, 4, 40, 7, 3, 5));
  EXPECT_TRUE(has_code(check_volume_still_ours(device, s, 4, 40, 6, 3, 5), Code::kStale, "no longer ours"));
  EXPECT_TRUE(has_code(check_volume_still_ours(device, s, 4, 40, 7, 2, 5), Code::kStale));
  EXPECT_TRUE(has_code(check_volume_still_ours(device, s, 4, 40, 7, 3, 4), Code::kStale));
  EXPECT_TRUE(has_code(check_volume_still_ours(device, s, 4, 44, 7, 3, 5), Code::kStale));
  ASSERT_OK(write_volume_closed(device, s, 4, 40, 7));
  EXPECT_TRUE(has_code(check_volume_still_ours(device, s, 4, 40, 7, 3, 5), Code::kStale));
  device.set_faults([](Op op, uint64_t, uint64_t) { return op == Op::kRead ? Fault::kError : Fault::kNone; });
  EXPECT_TRUE(has_code(check_volume_still_ours(device, s, 4, 40, 7, 3, 5), Code::kIo));
}

// DESIGN 10: "restored database thinks a claimed slab is free": the page says whose it is.
TEST_F(RecordsTest, ScanningTellsWhoseEachSlabIs) {
  write_slab(2, slab_page(5, 50, 8), 3);
  write_slab(3, 0, slab_page(5, 50, 8), 3);    // one copy of a claim
  write_slab(4, 0, slab_page(5, 50, 8), 900);  // an old owner with a high flush number
  write_slab(4, 1, slab_page(6, 60, 9), 1);
  write_slab(5, slab_page(0, 0, 12), 1);  // given back
  write_slab(6, slab_page(5, 50, 8), 3);
  damage(slab_page_offset(s, 6));
  damage(slab_page_offset(s, 6) + kPageSize);
  const std::vector<SlabOwner> owners = *scan_slabs(device, s, {{6, 1, 8}, {0, 6, 8}});
  ASSERT_EQ(owners.size(), 7u);
  EXPECT_EQ(owners[0].slab, 6u);
  EXPECT_EQ(owners[0].state, SlabOwner::State::kBad);
  EXPECT_EQ(owners[1].state, SlabOwner::State::kFree);
  EXPECT_EQ(owners[3].state, SlabOwner::State::kClaimed);
  EXPECT_EQ(owners[3].layer_id, 5u);
  EXPECT_EQ(owners[4].layer_id, 5u);
  EXPECT_EQ(owners[5].layer_id, 6u);
  EXPECT_EQ(owners[5].generation, 9u);
  EXPECT_EQ(owners[6].state, SlabOwner::State::kFree);
  EXPECT_EQ(owners[6].generation, 12u) << "a claim must bring a higher one";
  EXPECT_TRUE(has_code(scan_slabs(device, s, {{9, 2, 1}}), Code::kInvalidArgument, "past the pool's 10 slabs"));
  EXPECT_TRUE(has_code(scan_slabs(device, s, {{UINT64_MAX, 2, 1}}), Code::kInvalidArgument));
}

class WipeTest : public PoolTest {
 protected:
  void SetUp() override {
    PoolTest::SetUp();
    ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 41, 7, VolumeState::kClosed)));
    ASSERT_OK(write_layer_record(device, s, 6, layer_record(41, 0, 40, LayerState::kWritable)));
    for (const uint64_t slab : {1, 2, 3, 7}) {
      write_slab(slab, slab_page(41, 40, 8), 5);
      std::memset(device.raw(slab_data_offset(s, slab)), 0x77, kPageSize);
    }
  }
  WipeRequest request(uint64_t epoch = 7) { return {40, 4, epoch, {{41, 6, {{1, 3, 8}, {7, 1, 8}}}}}; }
  bool wiped(uint64_t slab) {
    return scan_slabs(device, s, {{slab, 1, 1}})->at(0).state == SlabOwner::State::kFree &&
           is_zero(device.raw(slab_data_offset(s, slab)), kPageSize);
  }
};

TEST_F(WipeTest, TombstonesTheRecordsAndGivesEverySlabBack) {
  std::vector<Op> order;
  device.set_faults([&](Op op, uint64_t, uint64_t) {
    if (op != Op::kRead) order.push_back(op);
    return Fault::kNone;
  });
  ASSERT_OK(wipe_volume(device, s, request()));
  for (const uint64_t slab : {1, 2, 3, 7}) EXPECT_TRUE(wiped(slab)) << slab;
  EXPECT_EQ((*read_volume_record(device, s, 4))->state, VolumeState::kDeleted);
  EXPECT_EQ((*read_volume_record(device, s, 4))->epoch, 7u) << "epochs only grow, also past a deletion";
  EXPECT_EQ((*read_layer_record(device, s, 6))->state, LayerState::kDeleted);
  // Two records, each after a flush; one copy of the pages durable, then the other; then discards, contiguous slabs in one.
  EXPECT_EQ(order, (std::vector<Op>{Op::kFlush, Op::kWrite, Op::kFlush, Op::kWrite,
                                    Op::kWrite, Op::kWrite, Op::kWrite, Op::kWrite, Op::kFlush,
                                    Op::kWrite, Op::kWrite, Op::kWrite, Op::kWrite, Op::kFlush,
                                    Op::kDiscard, Op::kDiscard}));
  ASSERT_OK(wipe_volume(device, s, request())) << "again is fine";
}

TEST_F(WipeTest, RefusesAVolumeThatWasOpenedSinceAndChangesNothing) {
  ASSERT_OK(write_volume_record(device, s, 4, volume_record(40, 41, 8, VolumeState::kOpen)));
  EXPECT_TRUE(has_code(wipe_volume(device, s, request(7)), Code::kStale, "nothing was deleted"));
  EXPECT_EQ((*read_volume_record(device, s, 4))->state, VolumeState::kOpen);
  EXPECT_FALSE(wiped(1));
}

// DESIGN 10: "late discard on a re-granted slab".
TEST_F(WipeTest, LeavesSlabsAloneThatAreSomebodyElsesByNow) {
  write_slab(2, slab_page(99, 90, 8), 1);
  write_slab(7, slab_page(41, 40, 9), 1);
  EXPECT_TRUE(has_code(wipe_volume(device, s, request()), Code::kStale, "slab 2 says layer 99"));
  EXPECT_TRUE(wiped(1));
  EXPECT_TRUE(wiped(3));
  EXPECT_FALSE(wiped(2));
  EXPECT_FALSE(wiped(7));
  EXPECT_EQ((*read_volume_record(device, s, 4))->state, VolumeState::kDeleted);
}

TEST_F(WipeTest, CutOffAnywhereItCanBeRepeated) {
  for (int limit = 0; limit < 17; limit++) {
    SetUp();
    int operations = 0;
    device.set_faults([&](Op op, uint64_t, uint64_t) {
      return op != Op::kRead && operations++ >= limit ? Fault::kError : Fault::kNone;
    });
    const bool done = wipe_volume(device, s, request()).ok();
    EXPECT_EQ(done, limit == 16);
    device.set_faults({});
    device.power_cut([&](uint64_t page) { return page / kPageSize % 2 == static_cast<uint64_t>(limit) % 2; });
    ASSERT_OK(wipe_volume(device, s, request()));
    for (const uint64_t slab : {1, 2, 3, 7}) EXPECT_TRUE(wiped(slab)) << slab;
  }
}

TEST_F(WipeTest, AVolumeThatWasNeverOpenedHasNothingToSay) {
  ASSERT_OK(wipe_volume(device, s, {80, 9, 0, {{81, 12, {{5, 1, 3}}}}}));
  EXPECT_FALSE(read_volume_record(device, s, 9)->has_value());
  EXPECT_TRUE(has_code(wipe_volume(device, s, {80, 9, 0, {{81, 12, {{9, 5, 3}}}}}), Code::kInvalidArgument));
  EXPECT_TRUE(has_code(wipe_volume(device, s, {0, 9, 0, {}}), Code::kInvalidArgument));
}

}  // namespace
}  // namespace holdfast::test
