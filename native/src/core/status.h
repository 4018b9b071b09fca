// Errors as values. A Status that reaches a person says what happened, to what, and what to do next.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

namespace holdfast {

// Stable names; docs/errors.md has a row for each. The N-API layer turns them into `error.code` ("HF_" + name).
enum class Code {
  kOk,
  kInvalidArgument,   // the caller's words are wrong
  kNotFound,
  kAlreadyExists,
  kBusy,              // device mounted, flock held, volume open
  kNotAPool,          // no valid superblock in either copy
  kWrongPool,         // another pool's UUID, or a WWID that is not the one recorded
  kUnsupported,       // newer format version or an unknown incompatible feature
  kCorrupt,           // metadata fails its check in both copies
  kForeignData,       // the device holds something that is not ours
  kTooSmall,
  kNoSpace,
  kIo,                // errno from the device in `message`
  kFenced,            // this host generation or this volume is fenced
  kStale,             // epoch, generation or term is not the newest
  kLeaseExpired,
  kUnavailable,       // try again later
  kHoldExpired,       // writes were held for longer than agreed and go on; nothing was cut
};

const char* code_name(Code code);  // "INVALID_ARGUMENT", "IO", …

struct [[nodiscard]] Status {
  Code code = Code::kOk;
  std::string message;
  bool ok() const { return code == Code::kOk; }
};

template <typename T>
struct [[nodiscard]] Result {
  Status status;
  std::optional<T> value;
  Result(T v) : value(std::move(v)) {}                  // NOLINT: implicit on purpose
  Result(Status s) : status(std::move(s)) {}            // NOLINT
  bool ok() const { return status.ok(); }
  T& operator*() { return *value; }
  T* operator->() { return &*value; }
};

[[noreturn]] inline void assert_failed(const char* what, const char* file, int line) {
  std::fprintf(stderr, "holdfast: assertion failed: %s (%s:%d)\n", what, file, line);
  std::abort();
}

// Always on, in release builds too: a volume may stop, it may never corrupt.
#define HF_ASSERT(condition) \
  (__builtin_expect(!!(condition), 1) ? (void)0 : ::holdfast::assert_failed(#condition, __FILE__, __LINE__))

}  // namespace holdfast
