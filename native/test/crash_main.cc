// holdfast-crash-test --seeds A..B [--aim JOB] [--keep-going] [--verbose]: runs the seeds from A to B, both included, and names the
// first that fails. With --aim (strip, wipe, cut, growth, merge) each of them many times over: the power cut, and the engine killed, at
// every boundary of the I/O of one such job, and all that comes of it.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "crash_sim.h"

namespace {

using holdfast::test::CrashAim;
using holdfast::test::CrashResult;

struct Options {
  unsigned long long first = 1;
  unsigned long long last = 1000;
  CrashAim::At aim = CrashAim::At::kNowhere;
  bool verbose = false;
  bool keep_going = false;
};

struct Totals {
  CrashResult counts;
  unsigned long long failed = 0;
  unsigned long long aimed = 0;  // crashes where they were aimed at
};

bool parse_seeds(const char* range, Options* options) {
  char* end = nullptr;
  options->first = options->last = std::strtoull(range, &end, 10);
  if (std::strncmp(end, "..", 2) == 0) options->last = std::strtoull(end + 2, &end, 10);
  if (*end == '\0' && options->last >= options->first) return true;
  std::fprintf(stderr, "--seeds takes N or A..B, not '%s'\n", range);
  return false;
}

bool parse_aim(const char* name, Options* options) {
  static const char* const kJobs[] = {"", "strip", "wipe", "cut", "growth", "merge"};
  for (int at = 1; at < 6; at++) {
    if (std::strcmp(name, kJobs[at]) == 0) options->aim = static_cast<CrashAim::At>(at);
  }
  if (options->aim != CrashAim::At::kNowhere) return true;
  std::fprintf(stderr, "--aim takes strip, wipe, cut, growth or merge, not '%s'\n", name);
  return false;
}

std::optional<Options> parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i++) {
    const bool more = i + 1 < argc;
    bool good = true;
    if (std::strcmp(argv[i], "--verbose") == 0) options.verbose = true;
    else if (std::strcmp(argv[i], "--keep-going") == 0) options.keep_going = true;
    else if (std::strcmp(argv[i], "--seeds") == 0 && more) good = parse_seeds(argv[++i], &options);
    else if (std::strcmp(argv[i], "--aim") == 0 && more) good = parse_aim(argv[++i], &options);
    else {
      good = false;
      std::fprintf(stderr, "usage: holdfast-crash-test [--seeds A..B] [--aim JOB] [--keep-going] [--verbose]\n");
    }
    if (!good) return std::nullopt;
  }
  return options;
}

// Whether it may go on.
bool run_one(unsigned long long seed, const Options& options, const CrashAim& aim, Totals* totals, CrashResult::Aimed* aimed) {
  const CrashResult result = holdfast::test::run_crash_seed(seed, options.verbose, aim);
  totals->counts.add(result);
  *aimed = result.aimed;
  if (result.ok) return true;
  totals->failed++;
  if (aim.at == CrashAim::At::kNowhere) std::printf("FAILED %s\n", result.failure.c_str());
  else std::printf("FAILED at boundary %u (%s): %s\n", aim.boundary, aim.power ? "power" : "kill", result.failure.c_str());
  std::fflush(stdout);
  return options.keep_going;
}

bool run_aimed(unsigned long long seed, const Options& options, Totals* totals) {
  CrashAim aim{options.aim, static_cast<uint32_t>(1 + seed % 3), 1, true};
  for (bool more = true; more; aim.boundary++) {
    more = false;
    for (const bool power : {true, false}) {
      aim.power = power;
      CrashResult::Aimed aimed{};
      if (!run_one(seed, options, aim, totals, &aimed)) return false;
      if (aimed != CrashResult::Aimed::kCrashed) continue;
      totals->aimed++;
      more = true;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const std::optional<Options> options = parse(argc, argv);
  if (!options.has_value()) return 2;
  const auto begun = std::chrono::steady_clock::now();
  Totals totals;
  for (unsigned long long seed = options->first; seed <= options->last; seed++) {
    CrashResult::Aimed aimed{};
    const bool on = options->aim == CrashAim::At::kNowhere ? run_one(seed, *options, {}, &totals, &aimed)
                                                           : run_aimed(seed, *options, &totals);
    if (!on) break;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  if (options->aim != CrashAim::At::kNowhere) std::printf("%llu crashes where they were aimed at; ", totals.aimed);
  std::printf("seeds %llu..%llu: %llu failed, %s, %.1f s\n", options->first, options->last, totals.failed,
              totals.counts.counts().c_str(), seconds);
  return totals.failed > 0 ? 1 : 0;
}
