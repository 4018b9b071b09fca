// Who may give orders about a pool: a restored database, a second service and a deposed leader fail here, before they
// can grant anything (DESIGN 6.4 and section 10).
#include <functional>

#include "core/records.h"
#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using format::kPageSize;
using Fault = MemoryDisk::Fault;
using Op = MemoryDisk::Op;

class AuthorityTest : public PoolTest {
 protected:
  Status claim(const format::Uuid& store, uint64_t incarnation, uint64_t term, bool force = false,
               const std::function<void()>& meanwhile = {}) {
    return claim_authority(device, s, {store, incarnation, term, 4, force},
                           {.wait_ms = 1'000,
                            .now_ns = [this] { return now; },
                            .random = [this] { return ++random; },
                            .sleep_ms =
                                [this, meanwhile](uint64_t ms) {
                                  now += ms * 1'000'000;
                                  if (meanwhile) meanwhile();
                                },
                            .unix_ms = [] { return uint64_t{5}; }});
  }
  uint64_t now = 5'000'000'000;
  uint64_t random = 0;
};

TEST_F(AuthorityTest, IsUnclaimedAtFirstAndThenTheClaimants) {
  EXPECT_TRUE(read_authority(device, s)->unclaimed);
  ASSERT_OK(claim(kStore, 1, 1));
  const Authority stands = *read_authority(device, s);
  EXPECT_FALSE(stands.unclaimed);
  EXPECT_EQ(stands.store, kStore);
  EXPECT_EQ(stands.incarnation, 1u);
  ASSERT_OK(claim(kStore, 1, 1)) << "again is fine";
  ASSERT_OK(claim(kStore, 1, 2));
  ASSERT_OK(claim(kStore, 2, 1)) << "a later incarnation begins its terms anew";
}

// DESIGN 10: "two databases grant one epoch".
TEST_F(AuthorityTest, RefusesASecondStoreARestoredDatabaseAndADeposedLeader) {
  ASSERT_OK(claim(kStore, 2, 7));
  EXPECT_TRUE(has_code(claim(kOtherStore, 9, 9), Code::kStale, "another metadata service"));
  EXPECT_TRUE(has_code(claim(kStore, 1, 8), Code::kStale, "a newer claim stands"));
  EXPECT_TRUE(has_code(claim(kStore, 2, 6), Code::kStale, "a newer claim stands"));
  EXPECT_EQ(read_authority(device, s)->term, 7u) << "and nothing was written";
  ASSERT_OK(claim(kOtherStore, 1, 1, /*force=*/true));
  EXPECT_TRUE(has_code(claim(kStore, 2, 7), Code::kStale));
}

TEST_F(AuthorityTest, OfTwoClaimsAtOnceAtMostOneSucceeds) {
  Status inner;
  const Status outer = claim(kStore, 1, 1, false, [&] { inner = claim(kOtherStore, 1, 1, true); });
  EXPECT_TRUE(has_code(outer, Code::kStale, "at the same time"));
  EXPECT_OK(inner);
  EXPECT_EQ(read_authority(device, s)->store, kOtherStore);
}

TEST_F(AuthorityTest, ARivalThatReadBeforeAndWritesAfterTheWaitIsTooSlowToBelieveItself) {
  device.set_faults([this](Op op, uint64_t offset, uint64_t) {
    if (op == Op::kWrite && offset >= s.authority_offset && offset < s.authority_offset + 2 * kPageSize) {
      now += 2'000'000'000;
    }
    return Fault::kNone;
  });
  EXPECT_TRUE(has_code(claim(kStore, 1, 1), Code::kUnavailable, "too long"));
}

TEST_F(AuthorityTest, AClaimThatIsLostOrFailsLeavesTheOldOneStanding) {
  ASSERT_OK(claim(kStore, 1, 1));
  for (const Fault fault : {Fault::kLost, Fault::kError}) {
    device.set_faults([fault](Op op, uint64_t, uint64_t) { return op == Op::kWrite ? fault : Fault::kNone; });
    EXPECT_FALSE(claim(kStore, 1, 2).ok());
    device.set_faults({});
    EXPECT_EQ(read_authority(device, s)->term, 1u);
  }
  ASSERT_OK(claim(kStore, 1, 2));
}

TEST_F(AuthorityTest, WithBothCopiesDamagedOnlyAForcedClaimGoesOn) {
  damage(s.authority_offset);
  damage(s.authority_offset + kPageSize);
  EXPECT_TRUE(has_code(read_authority(device, s), Code::kCorrupt));
  EXPECT_TRUE(has_code(claim(kStore, 1, 1), Code::kCorrupt));
  ASSERT_OK(claim(kStore, 1, 1, true));
  EXPECT_EQ(read_authority(device, s)->store, kStore);
  EXPECT_TRUE(has_code(claim({}, 1, 1), Code::kInvalidArgument));
}

}  // namespace
}  // namespace holdfast::test
