// The lease, step by step, with a clock and a disk that the test moves: when I/O may be issued, when it must not, and
// who can tell whom apart (DESIGN 6.1 and 6.2, section 10 "Ownership").
#include "core/lease.h"

#include <memory>

#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using format::HeartbeatState;
using format::kPageSize;
using Fault = MemoryDisk::Fault;
using Op = MemoryDisk::Op;

constexpr uint64_t kSecond = 1'000'000'000;
const format::Uuid kMachine = {0x11};
const format::Uuid kBoot = {0x22};

class LeaseTest : public PoolTest {
 protected:
  void SetUp() override {
    PoolTest::SetUp();
    ASSERT_OK(claim(kStore, 1, 1));
  }

  Status claim(const format::Uuid& store, uint64_t incarnation, uint64_t term, bool force = false) {
    return claim_authority(device, s, {store, incarnation, term, 0, force},
                           {.wait_ms = 100,
                            .now_ns = [this] { return now; },
                            .random = [this] { return ++random; },
                            .sleep_ms = [this](uint64_t ms) { now += ms * 1'000'000; },
                            .unix_ms = [] { return uint64_t{5}; }});
  }

  std::unique_ptr<Lease> lease(uint64_t generation, bool taking_over = false, uint32_t host = 3) {
    LeaseOptions options;
    options.superblock = s;
    options.host_id = host;
    options.generation = generation;
    options.node_name = "node-a";
    options.machine_id = kMachine;
    options.boot_id = kBoot;
    options.taking_over = taking_over;
    return std::make_unique<Lease>(
        options,
        LeaseEnvironment{&device, [this] { return now; }, [this] { return ++random; }, [] { return uint64_t{1'000}; },
                         [this] {
                           gaps++;
                           return gap_result;
                         }});
  }

  FenceOrder order(uint64_t generation, uint32_t host = 3) {
    return {.host_id = host,
            .generation = generation,
            .term = 1,
            .incarnation = 1,
            .fencer_host_id = 9,
            .fencer_generation = 2,
            .unix_ms = 7};
  }

  void fail_writes_at(uint64_t offset, uint64_t length, Fault fault) {
    device.set_faults([=](Op op, uint64_t at, uint64_t) {
      return op == Op::kWrite && at >= offset && at < offset + length ? fault : Fault::kNone;
    });
  }
  void fail_heartbeats(Fault fault) { fail_writes_at(heartbeat_offset(s, 3), 2 * kPageSize, fault); }

  uint64_t now = 1'000 * kSecond;
  uint64_t random = 0;
  int gaps = 0;
  Status gap_result;
};

TEST_F(LeaseTest, IsValidForOneLeaseFromBeforeItsReads) {
  auto mine = lease(5);
  device.set_faults([this](Op op, uint64_t, uint64_t) {
    if (op == Op::kRead) now += kSecond / 2;  // a slow disk
    return Fault::kNone;
  });
  const uint64_t begun = now;
  const LeaseOutcome outcome = mine->renew();
  ASSERT_OK(outcome.status);
  EXPECT_EQ(outcome.state, LeaseState::kValid);
  EXPECT_EQ(outcome.deadline_ns, begun + 10 * kSecond) << "t0 is taken before anything is read";
  EXPECT_FALSE(outcome.gap);
  EXPECT_EQ(outcome.authority.term, 1u);
  const Heartbeat beat = *read_heartbeat(device, s, 3);
  EXPECT_EQ(beat.state, HeartbeatState::kLive);
  EXPECT_EQ(beat.generation, 5u);
  EXPECT_EQ(beat.node_name, "node-a");
}

TEST_F(LeaseTest, EveryRenewalMovesTheSequenceAndTheDeadline) {
  auto mine = lease(5);
  uint64_t sequence = 0;
  for (int i = 0; i < 5; i++) {
    EXPECT_EQ(mine->renew().deadline_ns, now + 10 * kSecond);
    EXPECT_GT(read_heartbeat(device, s, 3)->sequence, sequence);
    sequence = read_heartbeat(device, s, 3)->sequence;
    now += 2 * kSecond;
  }
}

TEST_F(LeaseTest, ARenewalThatTakesLongerThanTheLeaseIsNone) {
  auto mine = lease(5);
  device.set_faults([this](Op op, uint64_t, uint64_t) {
    if (op == Op::kWrite) now += 11 * kSecond;
    return Fault::kNone;
  });
  const LeaseOutcome outcome = mine->renew();
  EXPECT_EQ(outcome.state, LeaseState::kHeld);
  EXPECT_TRUE(has_code(outcome.status, Code::kLeaseExpired));
}

TEST_F(LeaseTest, AnUnreadableFencePageHoldsAndNeverFences) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  const uint64_t at = fence_offset(s, 3, 5);
  damage(at);
  now += 2 * kSecond;
  LeaseOutcome outcome = mine->renew();
  EXPECT_TRUE(has_code(outcome.status, Code::kCorrupt, "fails its checksum"));
  EXPECT_EQ(outcome.state, LeaseState::kValid) << "what the last renewal gave still holds";
  now += 9 * kSecond;
  outcome = mine->renew();
  EXPECT_EQ(outcome.state, LeaseState::kHeld);
  damage(at);  // flips the bit back
  outcome = mine->renew();
  EXPECT_EQ(outcome.state, LeaseState::kValid);
  EXPECT_TRUE(outcome.gap);
  // A blank fence page is damage too: format has written every one.
  std::memset(device.raw(at), 0, kPageSize);
  EXPECT_TRUE(has_code(mine->renew().status, Code::kCorrupt, "is blank"));
}

TEST_F(LeaseTest, ReadAndWriteErrorsHoldUntilTheDiskIsBack) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  const uint64_t deadline = mine->deadline_ns();
  fail_heartbeats(Fault::kError);
  for (int i = 0; i < 6; i++) {
    now += 2 * kSecond;
    const LeaseOutcome outcome = mine->renew();
    EXPECT_TRUE(has_code(outcome.status, Code::kIo));
    EXPECT_EQ(outcome.deadline_ns, deadline);
    EXPECT_EQ(outcome.state, now < deadline ? LeaseState::kValid : LeaseState::kHeld);
  }
  device.set_faults({});
  const LeaseOutcome outcome = mine->renew();
  ASSERT_OK(outcome.status);
  EXPECT_TRUE(outcome.gap);
  EXPECT_EQ(outcome.deadline_ns, now + 10 * kSecond);
}

TEST_F(LeaseTest, AWriteOfUnknownOutcomeIsNotTakenForAnotherMachine) {
  for (const Fault fault : {Fault::kError, Fault::kErrorAfter, Fault::kTorn}) {
    SetUp();
    auto mine = lease(5);
    ASSERT_OK(mine->renew().status);
    for (int i = 0; i < 3; i++) {
      fail_heartbeats(fault);
      now += kSecond;
      (void)mine->renew();
      device.set_faults({});
    }
    now += kSecond;
    const LeaseOutcome first = mine->renew();
    now += kSecond;
    const LeaseOutcome second = mine->renew();
    EXPECT_NE(first.state, LeaseState::kFenced) << first.status.message;
    ASSERT_OK(second.status);
    EXPECT_EQ(second.state, LeaseState::kValid);
  }
}

TEST_F(LeaseTest, AHeartbeatThatTheDiskLostExtendsNothing) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  now += 2 * kSecond;
  ASSERT_OK(mine->renew().status);
  fail_heartbeats(Fault::kLost);
  now += 2 * kSecond;
  ASSERT_OK(mine->renew().status) << "can't be known before it is read back";
  const uint64_t deadline = mine->deadline_ns();
  now += 2 * kSecond;
  const LeaseOutcome outcome = mine->renew();
  EXPECT_TRUE(has_code(outcome.status, Code::kIo, "gone from the disk"));
  EXPECT_EQ(outcome.deadline_ns, deadline);
}

TEST_F(LeaseTest, AFencedGenerationStopsForGood) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  ASSERT_OK(write_fence(device, s, order(5)));
  now += 2 * kSecond;
  const uint64_t beat = read_heartbeat(device, s, 3)->sequence;
  const LeaseOutcome outcome = mine->renew();
  EXPECT_EQ(outcome.state, LeaseState::kFenced);
  EXPECT_EQ(outcome.deadline_ns, 0u);
  EXPECT_TRUE(has_code(outcome.status, Code::kFenced, "by host 9"));
  EXPECT_EQ(read_heartbeat(device, s, 3)->sequence, beat) << "no sign of life after the fence";
  ASSERT_OK(mine->write_stopped());
  EXPECT_EQ(read_heartbeat(device, s, 3)->state, HeartbeatState::kStopped);
  EXPECT_EQ(read_heartbeat(device, s, 3)->generation, 5u);
  EXPECT_EQ(mine->renew().state, LeaseState::kFenced);
  EXPECT_OK(mine->write_stopped());
}

TEST_F(LeaseTest, TheFenceOfAnotherGenerationOrHostFencesNobodyElse) {
  ASSERT_OK(write_fence(device, s, order(4)));
  ASSERT_OK(write_fence(device, s, order(5, 4)));
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  // Generation 13 shares the page with 5: if it is fenced, 5 was dead long before.
  ASSERT_OK(write_fence(device, s, order(13)));
  EXPECT_EQ(mine->renew().state, LeaseState::kFenced);
}

// DESIGN 10: "two fencers, one erases the other's page".
TEST_F(LeaseTest, TwoFencersWithPagesOfDifferentGenerationsEraseNothing) {
  ASSERT_OK(write_fence(device, s, order(5)));
  ASSERT_OK(write_fence(device, s, order(6)));
  ASSERT_OK(write_fence(device, s, order(5)));
  EXPECT_EQ(read_fence(device, s, 3, 5)->generation, 5u);
  EXPECT_EQ(read_fence(device, s, 3, 6)->generation, 6u);
  // Eight generations on it is the same page: the later one stands, and a late order for the earlier changes nothing.
  ASSERT_OK(write_fence(device, s, order(13)));
  EXPECT_TRUE(has_code(write_fence(device, s, order(5)), Code::kStale, "long gone"));
  EXPECT_EQ(read_fence(device, s, 3, 5)->generation, 13u);
}

// DESIGN 10: "fence write lost or sent to a clone of the disk".
TEST_F(LeaseTest, AFenceWriteThatIsLostOrFailsIsNoticed) {
  for (const Fault fault : {Fault::kLost, Fault::kError}) {
    fail_writes_at(fence_offset(s, 3, 5), kPageSize, fault);
    EXPECT_TRUE(has_code(write_fence(device, s, order(5)), Code::kIo));
    device.set_faults({});
    EXPECT_OK(write_fence(device, s, order(5))) << "and can be asked for again";
    ASSERT_OK(write_pool(device, plan(kPoolBytes), kPool, {}));
    ASSERT_OK(claim(kStore, 1, 1));
  }
}

TEST_F(LeaseTest, AFenceSurvivesAPowerCutRightAfter) {
  ASSERT_OK(write_fence(device, s, order(5)));
  device.power_cut([](uint64_t) { return false; });
  EXPECT_EQ(read_fence(device, s, 3, 5)->generation, 5u);
}

// DESIGN 10: "deposed leader's late order".
TEST_F(LeaseTest, AFenceOrderOfADeposedLeaderIsRefused) {
  ASSERT_OK(claim(kStore, 1, 2));
  EXPECT_TRUE(has_code(write_fence(device, s, order(5)), Code::kStale, "newer authority"));
  EXPECT_EQ(read_fence(device, s, 3, 5)->generation, 0u);
}

// "Cut | heartbeat begun after the page was durable": what a timed fence rests on.
TEST_F(LeaseTest, NoLeaseReachesBeyondAFenceByMoreThanOneLease) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  now += kSecond;
  // The fencer's page becomes durable between the victim's look and its heartbeat.
  const uint64_t begun = now;
  bool written = false;
  device.set_faults([&](Op op, uint64_t at, uint64_t) {
    if (op == Op::kWrite && at >= heartbeat_offset(s, 3) && at < heartbeat_offset(s, 4) && !written) {
      written = true;
      now += 3 * kSecond;
    }
    return Fault::kNone;
  });
  LeaseOutcome outcome = mine->renew();
  device.set_faults({});
  ASSERT_OK(write_fence(device, s, order(5)));
  EXPECT_EQ(outcome.deadline_ns, begun + 10 * kSecond);
  EXPECT_LT(outcome.deadline_ns, now + 10 * kSecond);
  now += kSecond;
  EXPECT_EQ(mine->renew().state, LeaseState::kFenced);
}

TEST_F(LeaseTest, AfterAGapVolumesAreCheckedBeforeAnythingGoesOn) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  EXPECT_EQ(gaps, 0);
  now += 10 * kSecond;  // at the deadline itself the lease is over
  gap_result = {Code::kIo, "a record can't be read"};
  LeaseOutcome outcome = mine->renew();
  EXPECT_EQ(outcome.state, LeaseState::kHeld);
  EXPECT_TRUE(outcome.gap);
  EXPECT_EQ(gaps, 1);
  now += 2 * kSecond;
  gap_result = {};
  outcome = mine->renew();
  EXPECT_EQ(outcome.state, LeaseState::kValid);
  EXPECT_TRUE(outcome.gap);
  EXPECT_EQ(gaps, 2);
  now += 9 * kSecond;
  EXPECT_FALSE(mine->renew().gap);
  EXPECT_EQ(gaps, 2);
}

// DESIGN 10: "node frozen with lease left, thawed after takeover".
TEST_F(LeaseTest, ANodeThatThawsAfterItsFenceFindsItBeforeItMayIssueAnything) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  ASSERT_OK(write_fence(device, s, order(5)));
  auto next = lease(6);
  now += 3600 * kSecond;
  ASSERT_OK(next->renew().status);
  const uint64_t beat = read_heartbeat(device, s, 3)->sequence;
  EXPECT_EQ(mine->renew().state, LeaseState::kFenced);
  EXPECT_EQ(gaps, 0);
  EXPECT_TRUE(has_code(mine->write_stopped(), Code::kStale)) << "the slot has a later life";
  EXPECT_EQ(read_heartbeat(device, s, 3)->sequence, beat);
  EXPECT_EQ(read_heartbeat(device, s, 3)->generation, 6u);
}

TEST_F(LeaseTest, TwoMachinesOnOneSlotNoticeEachOther) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  auto clone = std::make_unique<Lease>(*mine);  // a virtual machine cloned with its memory
  now += 2 * kSecond;
  ASSERT_OK(mine->renew().status);
  now += kSecond;
  const LeaseOutcome outcome = clone->renew();
  EXPECT_TRUE(outcome.state == LeaseState::kFenced || outcome.state == LeaseState::kHeld ||
              has_code(outcome.status, Code::kIo))
      << outcome.status.message;
  // Whatever the first of them did, within one round of each no two hold a lease that grows.
  now += kSecond;
  (void)mine->renew();
  now += kSecond;
  (void)clone->renew();
  now += kSecond;
  (void)mine->renew();
  EXPECT_TRUE(mine->state() == LeaseState::kFenced || clone->state() == LeaseState::kFenced);
}

TEST_F(LeaseTest, SaysStoppedOnlyOfItselfWhenAnotherMachineHasItsIdentity) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  auto other = lease(5, /*taking_over=*/true);  // a second engine that believes the first is dead
  ASSERT_OK(other->renew().status);
  now += kSecond;
  EXPECT_TRUE(has_code(mine->renew().status, Code::kFenced, "somebody else"));
  EXPECT_TRUE(has_code(mine->write_stopped(), Code::kStale));
  EXPECT_EQ(read_heartbeat(device, s, 3)->state, HeartbeatState::kLive);
  EXPECT_OK(other->renew().status);
}

TEST_F(LeaseTest, AnEngineTakesOverTheSameGenerationOnlyOnTheSameBootOfTheSameMachine) {
  ASSERT_OK(lease(5)->renew().status);
  EXPECT_EQ(lease(5)->renew().state, LeaseState::kFenced) << "without taking over";
  auto next = lease(5, true);
  ASSERT_OK(next->renew().status);
  LeaseOptions options;
  options.superblock = s;
  options.host_id = 3;
  options.generation = 5;
  options.taking_over = true;
  options.machine_id = kMachine;
  options.boot_id = {0x23};
  Lease rebooted(
      options,
      LeaseEnvironment{&device, [this] { return now; }, [this] { return ++random; }, [] { return uint64_t{1}; }, {}});
  EXPECT_EQ(rebooted.renew().state, LeaseState::kFenced);
  EXPECT_OK(next->renew().status) << "and the refused one has touched nothing";
}

TEST_F(LeaseTest, AFirstHeartbeatThatFailsIsTriedAgain) {
  for (const bool taking_over : {false, true}) {
    SetUp();
    ASSERT_OK(lease(taking_over ? 5 : 4)->renew().status);
    for (const Fault fault : {Fault::kError, Fault::kErrorAfter}) {
      auto mine = lease(taking_over ? 5 : 6, taking_over);
      fail_heartbeats(fault);
      EXPECT_EQ(mine->renew().state, LeaseState::kHeld);
      EXPECT_EQ(mine->renew().state, LeaseState::kHeld);
      device.set_faults({});
      EXPECT_OK(mine->renew().status);
      EXPECT_OK(mine->write_stopped());
      SetUp();
      ASSERT_OK(lease(taking_over ? 5 : 4)->renew().status);
    }
  }
}

TEST_F(LeaseTest, AnOlderGenerationThanTheSlotsIsRefused) {
  ASSERT_OK(lease(5)->renew().status);
  EXPECT_EQ(lease(4)->renew().state, LeaseState::kFenced);
  EXPECT_OK(lease(6)->renew().status);
}

TEST_F(LeaseTest, AStoppedGenerationNeverLivesAgain) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  ASSERT_OK(mine->write_stopped());
  EXPECT_EQ(mine->renew().state, LeaseState::kStopped);
  EXPECT_EQ(read_heartbeat(device, s, 3)->state, HeartbeatState::kStopped);
  EXPECT_EQ(lease(5, true)->renew().state, LeaseState::kFenced);
  EXPECT_OK(lease(6)->renew().status);
}

TEST_F(LeaseTest, AStopThatIsLostIsNotBelieved) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  fail_heartbeats(Fault::kLost);
  EXPECT_TRUE(has_code(mine->write_stopped(), Code::kIo, "does not read back"));
  device.set_faults({});
  EXPECT_OK(mine->write_stopped());
}

TEST_F(LeaseTest, ADamagedHeartbeatPageIsHealedAndProvesNothingUntilReadBack) {
  auto mine = lease(5);
  ASSERT_OK(mine->renew().status);
  damage(heartbeat_offset(s, 3));
  damage(heartbeat_offset(s, 3) + kPageSize);
  const uint64_t deadline = mine->deadline_ns();
  now += kSecond;
  const LeaseOutcome outcome = mine->renew();
  EXPECT_TRUE(has_code(outcome.status, Code::kCorrupt));
  EXPECT_EQ(outcome.deadline_ns, deadline);
  now += kSecond;
  EXPECT_OK(mine->renew().status);
}

TEST_F(LeaseTest, HoldsWithoutAnAuthorityPage) {
  damage(s.authority_offset);
  auto mine = lease(5);
  EXPECT_OK(mine->renew().status) << "one copy is enough";
  damage(s.authority_offset + kPageSize);
  EXPECT_TRUE(has_code(mine->renew().status, Code::kCorrupt, "authority"));
}

}  // namespace
}  // namespace holdfast::test
