// Specs as bytes, for the keeper. A newer engine reads what an older one wrote, so fields are only ever added at the
// end, and the version says how many there are.
#pragma once

#include <string>

#include "core/status.h"
#include "core/volume.h"
#include "io/fuse_session.h"

namespace holdfast {

// What an engine must know to be a host on a pool again.
struct PoolSpec {
  std::string device_path;
  format::Uuid uuid{};
  uint32_t host_id = 0;
  uint64_t generation = 0;
  std::string node_name;
  format::Uuid machine_id{};
  format::Uuid boot_id{};
  std::string lock_path;
};

// An export as it stands.
struct ExportState {
  FuseAgreement agreement;
  int32_t loop_number = -1;   // -1: not attached yet
  bool dead = false;          // revoked or fenced: answers EIO until it is detached
  std::string label;          // of the loop device
};

std::string encode(const PoolSpec& spec);
std::string encode(const VolumeSpec& spec);
std::string encode(const ExportState& state);
// kCorrupt: not what encode() made.
Result<PoolSpec> decode_pool(const std::string& bytes);
Result<VolumeSpec> decode_volume(const std::string& bytes);
Result<ExportState> decode_export(const std::string& bytes);

}  // namespace holdfast
