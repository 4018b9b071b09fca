// `pool check`: reads every page of a pool and says what does not hold of everything that the disk alone can show.
// Never writes. On a pool in use its findings about open volumes are a moment's; those are marked info.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pool.h"
#include "status.h"
#include "sync_device.h"

namespace holdfast {

struct CheckFinding {
  enum class Severity { kError, kWarning, kInfo };
  Severity severity = Severity::kInfo;
  std::string kind;      // stable short name; docs/format.md has the list
  std::string message;
  std::optional<uint64_t> volume_id;
  std::optional<uint64_t> layer_id;
  std::optional<uint64_t> slab;
  std::optional<uint64_t> offset;  // bytes on the device
  std::optional<uint64_t> length;  // bytes
};

struct CheckReport {
  PoolInfo pool;
  bool clean = true;     // no error and no warning
  std::vector<CheckFinding> findings;
  uint64_t pages_read = 0;
  uint64_t volumes = 0;
  uint64_t layers = 0;
  uint64_t slabs_claimed = 0;
  uint64_t slabs_free = 0;
};

const char* severity_name(CheckFinding::Severity severity);  // 'error' | 'warning' | 'info'

// An error only where there is no report to make: no pool, an unsupported one, a device that can't be read at all.
Result<CheckReport> check_pool(SyncDevice& device, const Progress& progress);
Result<CheckReport> check_pool_at(const std::string& path, const Progress& progress);

}  // namespace holdfast
