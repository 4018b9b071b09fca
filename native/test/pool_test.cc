// A pool on a device: geometry, format that can be interrupted anywhere, superblocks that are damaged, newer, or of
// another kind, and growth.
#include "core/pool.h"

#include <functional>
#include <set>

#include "core/crc32c.h"
#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using format::kPageSize;
using format::Superblock;
using Fault = MemoryDisk::Fault;
using Op = MemoryDisk::Op;

constexpr uint64_t kGiB = 1ull << 30;

TEST(Geometry, TablesAreSizedByTheDevice) {
  EXPECT_EQ(plan_geometry(kGiB)->volume_slots, 1024u);
  EXPECT_EQ(plan_geometry(64 * kGiB)->volume_slots, 4096u);
  EXPECT_EQ(plan_geometry(64 * kGiB)->layer_slots, 8192u);
  EXPECT_EQ(plan_geometry(100 * 1024 * kGiB)->volume_slots, 65536u);
  EXPECT_EQ(plan_geometry(100 * 1024 * kGiB)->layer_slots, 131072u);
}

TEST(Geometry, TheSmallestPoolHasOneSlabAndOnePageLessIsRefusedWithTheMinimumNamed) {
  const uint64_t minimum = minimum_pool_bytes();
  EXPECT_EQ(minimum, 97u << 20);
  EXPECT_EQ(plan_geometry(minimum)->slab_count, 1u);
  EXPECT_TRUE(has_code(plan_geometry(minimum - kPageSize), Code::kTooSmall, "at least 97 MiB"));
}

TEST(Geometry, EverySlabAndItsPagesLieInsideTheDeviceAndApart) {
  for (const uint64_t bytes : {minimum_pool_bytes(), 64 * kGiB, 65 * kGiB, 64 * kGiB + (33u << 20), 200 * kGiB}) {
    const Superblock s = *plan_geometry(bytes);
    ASSERT_OK(check_geometry(s));
    const uint64_t last = s.slab_count - 1;
    EXPECT_LE(slab_data_offset(s, last) + format::kSlabSize, bytes - format::kTailReserve);
    EXPECT_GT(slab_data_offset(s, last) + 2 * format::kSlabSize,
              bytes - format::kTailReserve - format::kRegionPagesSize - format::kSlabSize);
    for (uint64_t slab = 0; slab < s.slab_count; slab += 997) {
      EXPECT_GE(slab_page_offset(s, slab), s.first_region_offset);
      EXPECT_EQ(slab_data_offset(s, slab) % format::kSlabSize, 0u);
      EXPECT_GE(slab_data_offset(s, slab), slab_page_offset(s, slab) + format::kSlabPairSize);
    }
  }
}

TEST(Geometry, FencingClassesHaveTheNamesOfTheInterface) {
  EXPECT_EQ(parse_fencing_class("lease-only"), format::FencingClass::kLeaseOnly);
  EXPECT_EQ(parse_fencing_class("loop"), format::FencingClass::kLoop);
  EXPECT_EQ(parse_fencing_class("none"), std::nullopt);
  EXPECT_STREQ(fencing_class_name(format::FencingClass::kManual), "manual");
}

TEST_F(PoolTest, ReadsBackAsFormatted) {
  EXPECT_EQ(info.uuid, kPool);
  EXPECT_EQ(info.name, "test");
  EXPECT_EQ(info.wwid, "memory:1");
  EXPECT_EQ(info.slab_count, 10u);
  EXPECT_EQ(info.device_bytes, kPoolBytes - (1u << 20));
  EXPECT_EQ(info.fencing, format::FencingClass::kLeaseOnly);
  EXPECT_TRUE(info.warnings.empty());
  EXPECT_TRUE(read_authority(device, s)->unclaimed);
  EXPECT_EQ(read_fence(device, s, 255, 8)->generation, 0u);
  EXPECT_EQ(read_heartbeat(device, s, 255)->state, format::HeartbeatState::kEmpty);
  const std::vector<SlabOwner> owners = *scan_slabs(device, s, {{0, 10, 1}});
  ASSERT_EQ(owners.size(), 10u);
  for (const SlabOwner& owner : owners) EXPECT_EQ(owner.state, SlabOwner::State::kFree);
}

TEST_F(PoolTest, UsesTheOtherSuperblockAndSaysSo) {
  damage(format::kSuperblockAOffset);
  Result<PoolInfo> read = read_pool(device);
  ASSERT_OK(read);
  ASSERT_EQ(read->warnings.size(), 1u);
  EXPECT_EQ(read->warnings[0], "superblock A of memory fails its checksum; copy B was used");
  EXPECT_EQ(read->uuid, kPool);
  damage(format::kSuperblockAOffset);
  damage(format::kSuperblockBOffset);
  EXPECT_EQ(read_pool(device)->warnings[0], "superblock B of memory fails its checksum; copy A was used");
  damage(format::kSuperblockAOffset);
  EXPECT_TRUE(has_code(read_pool(device), Code::kCorrupt, "both superblocks"));
}

TEST_F(PoolTest, UsesTheOtherSuperblockWhenOneCannotBeRead) {
  device.set_faults(
      [](Op op, uint64_t offset, uint64_t) { return op == Op::kRead && offset == 0 ? Fault::kError : Fault::kNone; });
  Result<PoolInfo> read = read_pool(device);
  ASSERT_OK(read);
  EXPECT_NE(read->warnings.at(0).find("can't be read"), std::string::npos);
  device.set_faults([](Op op, uint64_t, uint64_t) { return op == Op::kRead ? Fault::kError : Fault::kNone; });
  EXPECT_TRUE(has_code(read_pool(device), Code::kIo));
}

TEST_F(PoolTest, RefusesANewerFormatVersionEvenOfOneCopy) {
  auto* b = reinterpret_cast<Superblock*>(device.raw(format::kSuperblockBOffset));
  b->header.version = format::kVersion + 1;
  b->header.crc32c = 0;
  b->header.crc32c = crc32c(b, kPageSize);
  EXPECT_TRUE(has_code(read_pool(device), Code::kUnsupported, "format version 2"));
}

void reseal(MemoryDisk& device, const std::function<void(Superblock&)>& change) {
  for (const uint64_t at : {format::kSuperblockAOffset, format::kSuperblockBOffset}) {
    auto* page = reinterpret_cast<Superblock*>(device.raw(at));
    change(*page);
    seal(*page, page->header.pool, at, page->header.sequence + 1);
  }
}

TEST_F(PoolTest, RefusesUnknownIncompatibleFeaturesAndOnlyReadsUnknownReadOnlyOnes) {
  reseal(device, [](Superblock& page) { page.features_compat = 1ull << 63; });
  EXPECT_FALSE(read_pool(device)->read_only);
  reseal(device, [](Superblock& page) { page.features_ro_compat = 4; });
  Result<PoolInfo> read = read_pool(device);
  ASSERT_OK(read);
  EXPECT_TRUE(read->read_only);
  EXPECT_NE(read->warnings.at(0).find("read but not write"), std::string::npos);
  EXPECT_TRUE(has_code(grow_pool(device, info, {}), Code::kUnsupported));
  reseal(device, [](Superblock& page) { page.features_incompat = 2; });
  EXPECT_TRUE(has_code(read_pool(device), Code::kUnsupported, "0x2"));
}

TEST_F(PoolTest, RefusesAGeometryThatPassesItsChecksumButCannotBe) {
  const Superblock good = s;
  const auto with = [&](const std::function<void(Superblock&)>& change) {
    reseal(device, [&](Superblock& page) {
      const uint64_t sequence = page.header.sequence;
      page = good;
      page.header.sequence = sequence;
      change(page);
    });
    return read_pool(device).status;
  };
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.chunk_size = 32768; }), Code::kCorrupt));
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.fence_offset = p.heartbeat_offset; }), Code::kCorrupt, "fence"));
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.slab_count++; }), Code::kCorrupt, "slabs do not fit"));
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.volume_slots = 1u << 30; }), Code::kCorrupt));
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.first_region_offset += 4096; }), Code::kCorrupt));
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.lease_ms = 0; }), Code::kCorrupt));
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.fencing = format::FencingClass::kNone; }), Code::kCorrupt));
  EXPECT_TRUE(has_code(with([](Superblock& p) { p.layer_table_offset = UINT64_MAX - 4095; }), Code::kCorrupt));
  EXPECT_OK(with([](Superblock&) {}));
}

TEST_F(PoolTest, RefusesADeviceThatShrankAndTwoPoolsInOne) {
  device.resize(kPoolBytes - (16u << 20));
  EXPECT_TRUE(has_code(read_pool(device), Code::kTooSmall, "the device shrank"));
  device.resize(kPoolBytes);
  auto* b = reinterpret_cast<Superblock*>(device.raw(format::kSuperblockBOffset));
  seal(*b, kOtherStore, format::kSuperblockBOffset, 9);
  EXPECT_TRUE(has_code(read_pool(device), Code::kCorrupt, "two pools"));
}

TEST(ReadPool, SaysThatABlankOrForeignDeviceIsNoPool) {
  MemoryDisk device(kPoolBytes);
  EXPECT_TRUE(has_code(read_pool(device), Code::kNotAPool));
  std::memset(device.raw(0), 0x5a, 1u << 20);
  EXPECT_TRUE(has_code(read_pool(device), Code::kNotAPool));
  MemoryDisk tiny(kPageSize);
  EXPECT_TRUE(has_code(read_pool(tiny), Code::kNotAPool));
}

TEST(WritePool, CutOffAtAnyPointItLeavesAWholePoolOrNone) {
  const format::Uuid fresh = {0xbb, 1};
  bool finished = false;
  int whole = 0;
  for (int limit = 0; !finished; limit++) {
    MemoryDisk device(kPoolBytes);
    ASSERT_OK(write_pool(device, plan(kPoolBytes, "old"), kPool, {}));
    int writes = 0;
    device.set_faults([&](Op op, uint64_t, uint64_t) {
      return (op == Op::kWrite || op == Op::kZero) && writes++ >= limit ? Fault::kError : Fault::kNone;
    });
    finished = write_pool(device, plan(kPoolBytes, "new"), fresh, {}).ok();
    device.set_faults({});
    device.power_cut([&](uint64_t page) { return (page / kPageSize) % 2 == static_cast<uint64_t>(limit) % 2; });
    const Result<PoolInfo> read = read_pool(device);
    if (read.ok() && read.value->uuid == fresh) {
      whole++;
      EXPECT_OK(read_authority(device, read.value->superblock));
      EXPECT_OK(read_fence(device, read.value->superblock, 255, 7));
      std::vector<std::string> damaged;
      EXPECT_EQ(read_heartbeats(device, read.value->superblock, &damaged)->size(), 256u);
      EXPECT_TRUE(damaged.empty());
    } else if (limit > 1) {  // until both old superblocks are gone nothing else was touched, and the old pool is whole
      EXPECT_FALSE(read.ok()) << "half of the old pool is left after " << limit << " writes";
    }
    ASSERT_LT(limit, 100);
  }
  EXPECT_GE(whole, 2);
}

TEST(WritePool, NoticesADeviceThatDoesNotZeroOrDoesNotWrite) {
  MemoryDisk device(kPoolBytes);
  std::memset(device.raw(60u << 20), 1, kPageSize);
  device.set_faults([](Op op, uint64_t, uint64_t) { return op == Op::kZero ? Fault::kLost : Fault::kNone; });
  EXPECT_TRUE(has_code(write_pool(device, plan(kPoolBytes), kPool, {}), Code::kIo, "can't be trusted"));
  device.set_faults([](Op op, uint64_t offset, uint64_t) {
    return op == Op::kWrite && offset == format::kAuthorityOffset ? Fault::kLost : Fault::kNone;
  });
  EXPECT_TRUE(has_code(write_pool(device, plan(kPoolBytes), kPool, {}), Code::kIo, "can't be trusted"));
  EXPECT_TRUE(has_code(read_pool(device), Code::kNotAPool));
}

TEST(WritePool, PagesOfAFormerPoolAreNeverTakenForTheNewOnes) {
  MemoryDisk device(kPoolBytes);
  const Superblock old = write_pool(device, plan(kPoolBytes), kPool, {})->superblock;
  format::SlabPage page;
  make_free_slab_page(&page, 9);
  page.layer_id = 77;
  const uint64_t at = slab_page_offset(old, 3);
  seal(page, kPool, at, 1'000'000);
  std::memcpy(device.raw(at), &page, sizeof page);
  const format::Uuid fresh = {0xbb, 2};
  const Superblock now = write_pool(device, plan(kPoolBytes), fresh, {})->superblock;
  EXPECT_EQ(scan_slabs(device, now, {{3, 1, 1}})->at(0).state, SlabOwner::State::kFree) << "zeroed by format";
  // And had zeroing missed it, the UUID would tell: damage, never an owner.
  std::memcpy(device.raw(at), &page, sizeof page);
  const SlabOwner owner = scan_slabs(device, now, {{3, 1, 1}})->at(0);
  EXPECT_EQ(owner.state, SlabOwner::State::kBad);
  EXPECT_EQ(owner.layer_id, 0u);
}

TEST_F(PoolTest, GrowsInPlaceAndKeepsEverySlabWhereItWas) {
  EXPECT_EQ(grow_pool(device, info, {})->slab_count, 10u) << "nothing to do";
  write_slab(9, slab_page(4, 1, 2), 7);
  device.resize(512u << 20);
  uint64_t last = 0;
  Result<PoolInfo> grown = grow_pool(device, info, [&](uint64_t done, uint64_t total) {
    EXPECT_LE(done, total);
    last = done;
  });
  ASSERT_OK(grown);
  EXPECT_GT(last, 0u);
  EXPECT_EQ(grown->slab_count, 26u);
  EXPECT_TRUE(grown->warnings.empty());
  const std::vector<SlabOwner> owners = *scan_slabs(device, grown->superblock, {{0, 26, 1}});
  EXPECT_EQ(owners.at(9).layer_id, 4u);
  EXPECT_EQ(owners.at(25).state, SlabOwner::State::kFree);
}

TEST_F(PoolTest, GrowsNoFurtherThanItIsToldAndALateOrderForLessChangesNothing) {
  device.resize(512u << 20);
  const uint64_t limit = 384u << 20;
  const uint64_t possible = slabs_after_growth(info, limit);
  Result<PoolInfo> grown = grow_pool(device, info, {}, limit);
  ASSERT_OK(grown);
  EXPECT_EQ(grown->slab_count, possible);
  EXPECT_LT(possible, slabs_after_growth(info, 512u << 20));
  ASSERT_OK(grow_pool(device, info, {}));
  const uint64_t writes = device.operations(Op::kWrite);
  EXPECT_EQ(grow_pool(device, info, {}, limit)->slab_count, 26u);
  EXPECT_EQ(device.operations(Op::kWrite), writes);
}

TEST_F(PoolTest, RefusesADeviceThatIsSmallerThanThePool) {
  device.resize(512u << 20);
  ASSERT_OK(grow_pool(device, info, {}));
  device.resize(kPoolBytes);
  EXPECT_TRUE(has_code(read_pool(device), Code::kTooSmall, "Rescan"));
  EXPECT_TRUE(has_code(grow_pool(device, info, {}), Code::kTooSmall));
}

TEST_F(PoolTest, GrowsByWholeRegionsWhosePagesAreZeroedFirst) {
  device.resize(140 * kGiB);
  // Old bytes where the second region's pages will be.
  const uint64_t at = s.first_region_offset + format::kRegionStride + 8192;
  std::memset(device.raw(at), 0xee, kPageSize);
  Result<PoolInfo> grown = grow_pool(device, info, {});
  ASSERT_OK(grown);
  EXPECT_GT(grown->slab_count, 2u * format::kSlabsPerRegion);
  EXPECT_EQ(scan_slabs(device, grown->superblock, {{4097, 1, 1}})->at(0).state, SlabOwner::State::kFree);
  EXPECT_EQ(read_pool(device)->slab_count, grown->slab_count);
}

TEST_F(PoolTest, GrowthThatIsCutOffIsTheOldPoolOrTheNewOne) {
  for (int limit = 0; limit < 4; limit++) {
    device.resize(kPoolBytes);
    ASSERT_OK(write_pool(device, plan(kPoolBytes), kPool, {}));
    device.resize(512u << 20);
    int writes = 0;
    device.set_faults([&](Op op, uint64_t, uint64_t) {
      if (op != Op::kWrite && op != Op::kZero) return Fault::kNone;
      return writes++ == limit ? Fault::kTorn : writes > limit + 1 ? Fault::kError : Fault::kNone;
    });
    (void)grow_pool(device, info, {}).ok();
    device.set_faults({});
    Result<PoolInfo> read = read_pool(device);
    ASSERT_OK(read);
    EXPECT_TRUE(read->slab_count == 10 || read->slab_count == 26) << limit;
    ASSERT_OK(grow_pool(device, *read, {}));
    EXPECT_EQ(read_pool(device)->slab_count, 26u);
    EXPECT_TRUE(read_pool(device)->warnings.empty());
  }
}

TEST_F(PoolTest, GrowthRefusesPagesThatNobodyMayHaveWritten) {
  std::memset(device.raw(format::slab_page_offset(s.first_region_offset, 12)), 1, kPageSize);
  device.resize(512u << 20);
  EXPECT_TRUE(has_code(grow_pool(device, info, {}), Code::kCorrupt, "pool check"));
  PoolInfo other = info;
  other.uuid = kOtherStore;
  EXPECT_TRUE(has_code(grow_pool(device, other, {}), Code::kWrongPool));
}

TEST_F(PoolTest, RefusesADeviceThatIsNotTheOneThePoolWasMadeOn) {
  EXPECT_OK(check_wwid(info, "memory:1", "/dev/x"));
  EXPECT_TRUE(has_code(check_wwid(info, "memory:2", "/dev/x"), Code::kWrongPool, "clone"));
  EXPECT_TRUE(has_code(check_wwid(info, "", "/dev/x"), Code::kWrongPool));
  info.wwid = "loop:12@8:1";
  EXPECT_OK(check_wwid(info, "loop:12@8:17", "/dev/x"));
  EXPECT_EQ(info.warnings.size(), 1u);
  EXPECT_TRUE(has_code(check_wwid(info, "loop:13@8:1", "/dev/x"), Code::kWrongPool));
  info.wwid = "";
  EXPECT_OK(check_wwid(info, "naa.6", "/dev/x"));
  EXPECT_EQ(info.warnings.size(), 2u);
}

}  // namespace
}  // namespace holdfast::test
