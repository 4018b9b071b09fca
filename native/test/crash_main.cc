// holdfast-crash-test --seeds A..B [--verbose]: runs the seeds from A to B, both included, and names the first that
// fails.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "crash_sim.h"

int main(int argc, char** argv) {
  unsigned long long first = 1;
  unsigned long long last = 1000;
  bool verbose = false;
  bool keep_going = false;
  for (int i = 1; i < argc; i++) {
    if (std::strcmp(argv[i], "--verbose") == 0) {
      verbose = true;
    } else if (std::strcmp(argv[i], "--keep-going") == 0) {
      keep_going = true;
    } else if (std::strcmp(argv[i], "--seeds") == 0 && i + 1 < argc) {
      const char* range = argv[++i];
      char* end = nullptr;
      first = last = std::strtoull(range, &end, 10);
      if (std::strncmp(end, "..", 2) == 0) last = std::strtoull(end + 2, &end, 10);
      if (*end != '\0' || last < first) {
        std::fprintf(stderr, "--seeds takes N or A..B, not '%s'\n", range);
        return 2;
      }
    } else {
      std::fprintf(stderr, "usage: holdfast-crash-test [--seeds A..B] [--keep-going] [--verbose]\n");
      return 2;
    }
  }
  const auto begun = std::chrono::steady_clock::now();
  holdfast::test::CrashResult total;
  unsigned long long failed = 0;
  for (unsigned long long seed = first; seed <= last; seed++) {
    const auto result = holdfast::test::run_crash_seed(seed, verbose);
    total.operations += result.operations;
    total.cuts += result.cuts;
    total.kills += result.kills;
    total.snapshots += result.snapshots;
    total.checks += result.checks;
    total.emptied += result.emptied;
    total.compacted += result.compacted;
    if (result.ok) continue;
    failed++;
    std::printf("FAILED %s\n", result.failure.c_str());
    std::fflush(stdout);
    if (!keep_going) break;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  std::printf(
      "seeds %llu..%llu: %llu failed, %llu operations, %llu power cuts, %llu kills, %llu snapshots of open volumes, "
      "%llu slabs given back, %llu blocks compacted, %llu blocks checked, %.1f s\n",
      first, last, failed, static_cast<unsigned long long>(total.operations),
      static_cast<unsigned long long>(total.cuts), static_cast<unsigned long long>(total.kills),
      static_cast<unsigned long long>(total.snapshots),
      static_cast<unsigned long long>(total.emptied), static_cast<unsigned long long>(total.compacted),
      static_cast<unsigned long long>(total.checks), seconds);
  return failed > 0 ? 1 : 0;
}
