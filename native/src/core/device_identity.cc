// Reads what sysfs, /proc and the loop driver know about a device; see device_identity.h.
#include "device_identity.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <vector>

namespace holdfast {
namespace {

std::string trimmed(const std::string& text) {
  const size_t from = text.find_first_not_of(" \t\r\n");
  if (from == std::string::npos) return {};
  return text.substr(from, text.find_last_not_of(" \t\r\n") - from + 1);
}

std::string read_attribute(const std::string& path) {
  std::ifstream file(path);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return trimmed(text);
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

std::vector<std::string> list(const std::string& directory) {
  std::vector<std::string> names;
  DIR* dir = ::opendir(directory.c_str());
  if (dir == nullptr) return names;
  while (const dirent* entry = ::readdir(dir)) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  ::closedir(dir);
  std::sort(names.begin(), names.end());
  return names;
}

std::string sysfs_of(dev_t device) {
  return "/sys/dev/block/" + std::to_string(major(device)) + ":" + std::to_string(minor(device));
}

// The sysfs directory with the links resolved, so that ".." is the disk of a partition.
std::string resolved(const std::string& path) {
  char buffer[PATH_MAX];
  return ::realpath(path.c_str(), buffer) != nullptr ? buffer : path;
}

struct stat stat_of(const FdDevice& device) {
  struct stat info {};
  HF_ASSERT(::fstat(device.fd(), &info) == 0);
  return info;
}

std::string loop_identity(uint64_t inode, dev_t file_system) {
  return "loop:" + std::to_string(inode) + "@" + std::to_string(major(file_system)) + ":" +
         std::to_string(minor(file_system));
}

bool loop_status(int fd, loop_info64* status) { return ::ioctl(fd, LOOP_GET_STATUS64, status) == 0; }

// The kernel encodes a device number here as new_encode_dev does, not as glibc's dev_t.
dev_t decode_kernel_dev(uint64_t value) {
  return makedev(static_cast<unsigned>((value >> 8) & 0xfff),
                 static_cast<unsigned>((value & 0xff) | ((value >> 12) & 0xfff00)));
}

// "mpath-36001405…" (the path's designator type, then its value) as sysfs writes it for a single path.
std::string multipath_identity(const std::string& uuid) {
  const std::string id = uuid.substr(6);
  if (id.empty()) return {};
  if (id.rfind("nvme.", 0) == 0 || id.rfind("eui.", 0) == 0 || id.rfind("uuid.", 0) == 0) return id;
  switch (id[0]) {
    case '3': return "naa." + id.substr(1);
    case '2': return "eui." + id.substr(1);
    case '1': return "t10." + id.substr(1);
    default: return id;
  }
}

std::string disk_identity(const std::string& disk) {
  const std::string dm = read_attribute(disk + "/dm/uuid");
  if (dm.rfind("mpath-", 0) == 0) return multipath_identity(dm);
  if (!dm.empty()) return "dm:" + dm;
  for (const char* attribute : {"/wwid", "/device/wwid"}) {
    const std::string wwid = read_attribute(disk + attribute);
    if (!wwid.empty()) return wwid;
  }
  for (const char* attribute : {"/serial", "/device/serial"}) {
    const std::string serial = read_attribute(disk + attribute);
    if (!serial.empty()) return "serial:" + serial;
  }
  return {};
}

// The device numbers of a disk and all its partitions.
std::vector<dev_t> with_partitions(dev_t device) {
  std::vector<dev_t> all{device};
  const std::string disk = resolved(sysfs_of(device));
  for (const std::string& name : list(disk)) {
    if (!exists(disk + "/" + name + "/partition")) continue;
    unsigned major_number = 0;
    unsigned minor_number = 0;
    const std::string text = read_attribute(disk + "/" + name + "/dev");
    if (std::sscanf(text.c_str(), "%u:%u", &major_number, &minor_number) == 2) {
      all.push_back(makedev(major_number, minor_number));
    }
  }
  return all;
}

bool contains(const std::vector<dev_t>& devices, dev_t device) {
  return std::find(devices.begin(), devices.end(), device) != devices.end();
}

bool is_block_path_of(const std::string& path, const std::vector<dev_t>& devices) {
  struct stat info {};
  return !path.empty() && path[0] == '/' && ::stat(path.c_str(), &info) == 0 && S_ISBLK(info.st_mode) &&
         contains(devices, info.st_rdev);
}

std::string mount_of(const std::vector<dev_t>& devices) {
  std::ifstream mounts("/proc/self/mountinfo");
  std::string line;
  while (std::getline(mounts, line)) {
    std::istringstream words(line);
    std::string id, parent, number, root, target;
    words >> id >> parent >> number >> root >> target;
    unsigned major_number = 0;
    unsigned minor_number = 0;
    const bool parsed = std::sscanf(number.c_str(), "%u:%u", &major_number, &minor_number) == 2;
    bool ours = parsed && contains(devices, makedev(major_number, minor_number));
    const size_t dash = line.find(" - ");
    if (!ours && dash != std::string::npos) {  // btrfs and others show a device number of their own
      std::istringstream rest(line.substr(dash + 3));
      std::string type, source;
      rest >> type >> source;
      ours = is_block_path_of(source, devices);
    }
    if (ours) return target;
  }
  return {};
}

bool is_swap(const std::vector<dev_t>& devices) {
  std::ifstream swaps("/proc/swaps");
  std::string line;
  while (std::getline(swaps, line)) {
    if (is_block_path_of(line.substr(0, line.find_first_of(" \t")), devices)) return true;
  }
  return false;
}

std::string holder_of(const std::vector<dev_t>& devices) {
  for (const dev_t device : devices) {
    const std::vector<std::string> holders = list(sysfs_of(device) + "/holders");
    if (!holders.empty()) return holders.front();
  }
  return {};
}

// The loop device that has this file as its disk.
std::string loop_over(const struct stat& file) {
  for (const std::string& name : list("/sys/block")) {
    if (name.rfind("loop", 0) != 0 || !exists("/sys/block/" + name + "/loop")) continue;
    const int fd = ::open(("/dev/" + name).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) continue;
    loop_info64 status{};
    const bool bound = loop_status(fd, &status);
    ::close(fd);
    if (bound && status.lo_inode == file.st_ino && decode_kernel_dev(status.lo_device) == file.st_dev) return name;
  }
  return {};
}

std::optional<uint64_t> number(const std::string& text) {
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  return std::strtoull(text.c_str(), nullptr, 10);
}

DrainTime drain_of_scsi(const std::string& disk) {
  // sd sends a command up to 1 + max_retries times, each within `timeout`; then error handling, each step within
  // eh_timeout (abort, device, target, bus and host reset).
  const std::optional<uint64_t> timeout = number(read_attribute(disk + "/device/timeout"));
  const uint64_t eh_timeout = number(read_attribute(disk + "/device/eh_timeout")).value_or(10);
  if (!timeout) return {std::nullopt, "the SCSI command timeout is unknown"};
  uint64_t retries = 5;
  for (const std::string& name : list(disk + "/device/scsi_disk")) {
    const std::string text = read_attribute(disk + "/device/scsi_disk/" + name + "/max_retries");
    if (text == "-1") return {std::nullopt, "the SCSI disk is set to retry without limit (max_retries is -1)"};
    retries = number(text).value_or(retries);
  }
  uint64_t transport = 0;
  for (const std::string& name : list("/sys/class/iscsi_session")) {
    const std::string text = read_attribute("/sys/class/iscsi_session/" + name + "/recovery_tmo");
    if (text == "-1") return {std::nullopt, "an iSCSI session is set to wait for its target without limit"};
    transport = std::max(transport, number(text).value_or(120));
  }
  for (const std::string& name : list("/sys/class/fc_remote_ports")) {
    const std::string base = "/sys/class/fc_remote_ports/" + name;
    const std::optional<uint64_t> fast = number(read_attribute(base + "/fast_io_fail_tmo"));
    transport = std::max(transport, fast ? *fast : number(read_attribute(base + "/dev_loss_tmo")).value_or(60));
  }
  const uint64_t seconds = *timeout * (1 + retries) + 5 * eh_timeout + transport;
  return {static_cast<uint32_t>(seconds * 1000),
          "SCSI: " + std::to_string(*timeout) + " s x " + std::to_string(1 + retries) + " tries, error handling " +
              std::to_string(5 * eh_timeout) + " s, transport " + std::to_string(transport) + " s"};
}

DrainTime drain_of_nvme(const std::string& disk) {
  const std::optional<uint64_t> timeout = number(read_attribute("/sys/module/nvme_core/parameters/io_timeout"));
  const std::optional<uint64_t> retries = number(read_attribute("/sys/module/nvme_core/parameters/max_retries"));
  if (!timeout || !retries) return {std::nullopt, "the NVMe timeouts are unknown"};
  const std::string transport = read_attribute(disk + "/device/transport");
  uint64_t reconnect = 0;
  if (transport != "pcie") {
    std::optional<uint64_t> fast = number(read_attribute(disk + "/device/fast_io_fail_tmo"));
    if (!fast) fast = number(read_attribute(disk + "/device/ctrl_loss_tmo"));
    if (!fast)
      return {std::nullopt, "NVMe over fabrics is set to reconnect without limit, or native multipath hides it"};
    reconnect = *fast;
  }
  const uint64_t seconds = *timeout * (1 + *retries) + 2 * *timeout + reconnect;
  return {static_cast<uint32_t>(seconds * 1000),
          "NVMe: " + std::to_string(*timeout) + " s x " + std::to_string(1 + *retries) + " tries, reset " +
              std::to_string(2 * *timeout) + " s, reconnect " + std::to_string(reconnect) + " s"};
}

}  // namespace

bool is_loop_or_file(const FdDevice& device) {
  if (!device.is_block_device()) return true;
  return exists(resolved(sysfs_of(stat_of(device).st_rdev)) + "/loop");
}

std::string device_wwid(const FdDevice& device) {
  const struct stat info = stat_of(device);
  if (!device.is_block_device()) return loop_identity(info.st_ino, info.st_dev);
  loop_info64 loop{};
  if (loop_status(device.fd(), &loop)) return loop_identity(loop.lo_inode, decode_kernel_dev(loop.lo_device));
  const std::string own = resolved(sysfs_of(info.st_rdev));
  const std::string partition = read_attribute(own + "/partition");
  const std::string identity = disk_identity(partition.empty() ? own : own + "/..");
  if (identity.empty() || partition.empty()) return identity;
  return identity + "-part" + partition;
}

bool same_wwid(const std::string& recorded, const std::string& found, bool* moved) {
  *moved = false;
  if (recorded == found) return true;
  if (recorded.rfind("loop:", 0) != 0 || found.rfind("loop:", 0) != 0) return false;
  *moved = recorded.substr(0, recorded.find('@')) == found.substr(0, found.find('@'));
  return *moved;
}

std::string device_user(const FdDevice& device) {
  const struct stat info = stat_of(device);
  if (!device.is_block_device()) {
    const std::string loop = loop_over(info);
    return loop.empty() ? "" : "it is the disk of /dev/" + loop;
  }
  const std::vector<dev_t> devices = with_partitions(info.st_rdev);
  if (const std::string target = mount_of(devices); !target.empty()) return "it is mounted at " + target;
  if (is_swap(devices)) return "it is used as swap";
  if (const std::string holder = holder_of(devices); !holder.empty()) return "it is held by /dev/" + holder;
  return {};
}

DrainTime device_drain(const FdDevice& device) {
  if (is_loop_or_file(device)) {
    return {5'000, "a loop device over a local file: 5 s for the file system below"};
  }
  std::string disk = resolved(sysfs_of(stat_of(device).st_rdev));
  if (exists(disk + "/partition")) disk = resolved(disk + "/..");
  const std::string name = disk.substr(disk.rfind('/') + 1);
  if (exists(disk + "/dm")) {
    return {std::nullopt, "device-mapper (multipath with queue_if_no_path, say) may hold I/O back without limit"};
  }
  if (name.rfind("nvme", 0) == 0) return drain_of_nvme(disk);
  if (exists(disk + "/device/scsi_disk")) return drain_of_scsi(disk);
  return {std::nullopt, "the driver of " + name + " names no limit for how long it may hold I/O back"};
}

}  // namespace holdfast
