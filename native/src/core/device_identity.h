// What the kernel says about a device: which one it is, who uses it, and how long it can hold I/O back.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "status.h"
#include "sync_device.h"

namespace holdfast {

// Stable identity, the same on every node and by every path name:
//   "loop:INODE@MAJOR:MINOR"  a loop device or its image file (device number of the file system, inode of the file)
//   "naa.…", "eui.…", "nvme.…", "t10.…"  SCSI and NVMe, multipath or not
//   "serial:…"                virtio and others that have no more
//   "dm:…"                    other device-mapper devices
// A partition has "-partN" after it. Empty: the kernel knows none.
std::string device_wwid(const FdDevice& device);

// Whether two identities mean the same device. A loop file keeps its inode when its file system's device number
// changes over a reboot; `*moved` tells so.
bool same_wwid(const std::string& recorded, const std::string& found, bool* moved);

bool is_loop_or_file(const FdDevice& device);

// Who uses the device: a mount, swap, a holder (device-mapper, md), a loop device over the file. Empty: nobody seen.
std::string device_user(const FdDevice& device);

struct DrainTime {
  std::optional<uint32_t> ms;  // none: unbounded or unknown
  std::string why;             // one sentence
};
// The longest that the kernel may hold back I/O already submitted to the device before it is done or failed.
DrainTime device_drain(const FdDevice& device);

}  // namespace holdfast
