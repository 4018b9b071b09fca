// A bounded run of the crash test, and every seed that has ever failed. `holdfast-crash-test --seeds A..B` runs more.
#include <gtest/gtest.h>

#include "crash_sim.h"

namespace holdfast::test {
namespace {

TEST(Crash, ManySeedsKeepEveryInvariant) {
  for (uint64_t seed = 1; seed <= 150; seed++) {
    const CrashResult result = run_crash_seed(seed);
    ASSERT_TRUE(result.ok) << result.failure;
  }
}

}  // namespace
}  // namespace holdfast::test
