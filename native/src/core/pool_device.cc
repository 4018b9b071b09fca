// Pools by path: what stands on a device and who uses it, refusing well, then the work of pool.cc.
#include <blkid/blkid.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "device_identity.h"
#include "pool.h"
#include "records.h"

namespace holdfast {
namespace {

using format::FencingClass;
using format::kPageSize;
using format::Superblock;

// How much of a device is looked at before it is called blank: its head, its tail, and samples between.
constexpr uint64_t kBlankHead = 16u << 20;
constexpr uint64_t kBlankTail = 1u << 20;
constexpr uint64_t kBlankSamples = 1024;
constexpr uint32_t kMinRenewMs = 50;
constexpr uint32_t kMaxLeaseMs = 600'000;

struct FdCloser {
  int fd;
  ~FdCloser() {
    if (fd >= 0) ::close(fd);
  }
};

struct ProbeFree {
  void operator()(blkid_probe probe) const { blkid_free_probe(probe); }
};
using Probe = std::unique_ptr<std::remove_pointer_t<blkid_probe>, ProbeFree>;

// libblkid reads through the page cache: what that still holds of an earlier life of the device is dropped first.
Probe open_probe(int fd) {
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  Probe probe(blkid_new_probe());
  if (probe == nullptr || blkid_probe_set_device(probe.get(), fd, 0, 0) != 0) return nullptr;
  blkid_probe_enable_superblocks(probe.get(), 1);
  blkid_probe_set_superblocks_flags(probe.get(), BLKID_SUBLKS_TYPE | BLKID_SUBLKS_MAGIC | BLKID_SUBLKS_BADCSUM);
  blkid_probe_enable_partitions(probe.get(), 1);
  blkid_probe_set_partitions_flags(probe.get(), BLKID_PARTS_MAGIC | BLKID_PARTS_FORCE_GPT);
  return probe;
}

std::string probe_value(blkid_probe probe, const char* name) {
  const char* value = nullptr;
  if (blkid_probe_lookup_value(probe, name, &value, nullptr) != 0 || value == nullptr) return {};
  return value;
}

// The first known signature below `limit` bytes; empty: none. Reads errors as "none": the caller has read the device.
std::string find_signature(const std::string& path, uint64_t limit) {
  const FdCloser file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) return {};
  const Probe probe = open_probe(file.fd);
  if (probe == nullptr) return {};
  while (blkid_do_probe(probe.get()) == 0) {
    std::string type = probe_value(probe.get(), "TYPE");
    std::string offset = probe_value(probe.get(), "SBMAGIC_OFFSET");
    if (type.empty()) {
      type = probe_value(probe.get(), "PTTYPE");
      offset = probe_value(probe.get(), "PTMAGIC_OFFSET");
    }
    if (!type.empty() && std::strtoull(offset.c_str(), nullptr, 10) < limit) return type;
  }
  return {};
}

Status wipe_signatures(const std::string& path) {
  const FdCloser file{::open(path.c_str(), O_RDWR | O_CLOEXEC)};
  if (file.fd < 0) return {Code::kIo, "can't open " + path + " to wipe old signatures: " + std::strerror(errno)};
  const Probe probe = open_probe(file.fd);
  if (probe == nullptr) return {Code::kIo, "can't look for old signatures on " + path};
  while (blkid_do_probe(probe.get()) == 0) {
    if (blkid_do_wipe(probe.get(), 0) != 0) {
      return {Code::kIo, "can't wipe an old signature of " + path + ": " + std::strerror(errno)};
    }
  }
  if (::fsync(file.fd) != 0) return {Code::kIo, "can't flush " + path + ": " + std::strerror(errno)};
  ::ioctl(file.fd, BLKRRPART);  // old partitions go; refused on devices that can't have any
  return {};
}

Result<bool> looks_blank(FdDevice& device) {
  PageBuffer buffer(kBlankTail);
  const uint64_t size = device.size_bytes();
  const auto zeros_in = [&](uint64_t from, uint64_t to, Status* failed) {
    for (uint64_t at = from; at < to; at += buffer.size()) {
      const uint64_t part = std::min<uint64_t>(buffer.size(), to - at);
      if (*failed = device.read(at, buffer.data(), part); !failed->ok()) return false;
      if (!is_zero(buffer.data(), part)) return false;
    }
    return true;
  };
  Status failed;
  bool blank = zeros_in(0, std::min(size, kBlankHead), &failed);
  if (blank && size > kBlankTail) blank = zeros_in(size - kBlankTail, size, &failed);
  const uint64_t step = std::max<uint64_t>(size / kBlankSamples / kPageSize, 1) * kPageSize;
  for (uint64_t at = step; blank && at + kPageSize <= size; at += step) blank = zeros_in(at, at + kPageSize, &failed);
  if (!failed.ok()) return failed;
  return blank;
}

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

Result<DeviceInspection> inspect(FdDevice& device, const std::string& path) {
  DeviceInspection found;
  found.size_bytes = device.size_bytes();
  found.logical_sector_size = device.logical_sector_size();
  found.wwid = device_wwid(device);
  found.in_use_by = device_user(device);
  found.mounted = !found.in_use_by.empty();
  Result<PoolInfo> pool = read_pool(device);
  if (pool.status.code == Code::kIo) return pool.status;
  // Where superblock A stands no other program has written over the head of the device, and a signature found
  // elsewhere is a volume's data. Where it doesn't, a signature in the head means that the pool is lost to it.
  const bool a_stands = pool.ok() && pool->warnings.empty();
  std::string signature;
  if (!a_stands) {
    const bool half = pool.ok() || pool.status.code == Code::kUnsupported;
    signature = lower(find_signature(path, half ? format::kAuthorityOffset : UINT64_MAX));
  }
  if (!signature.empty()) {
    found.kind = DeviceInspection::Kind::kForeign;
    found.signature = signature;
    return found;
  }
  if (pool.ok()) {
    if (Status status = check_wwid(*pool, found.wwid, path); !status.ok()) pool->warnings.push_back(status.message);
    found.kind = DeviceInspection::Kind::kPool;
    found.signature = "holdfast";
    found.pool = *pool;
    return found;
  }
  if (pool.status.code != Code::kNotAPool) {
    found.kind = DeviceInspection::Kind::kPool;
    found.signature = pool.status.code == Code::kUnsupported ? "holdfast (newer)" : "holdfast (damaged)";
    return found;
  }
  Result<bool> blank = looks_blank(device);
  if (!blank.ok()) return blank.status;
  found.kind = *blank ? DeviceInspection::Kind::kBlank : DeviceInspection::Kind::kForeign;
  found.signature = *blank ? "" : "data";
  return found;
}

Result<format::Uuid> random_uuid() {
  format::Uuid uuid{};
  if (::getrandom(uuid.data(), uuid.size(), 0) != static_cast<ssize_t>(uuid.size())) {
    return Status{Code::kIo, std::string("no randomness for a pool UUID: ") + std::strerror(errno)};
  }
  uuid[6] = static_cast<uint8_t>((uuid[6] & 0x0f) | 0x40);  // RFC 9562: version 4, variant 1
  uuid[8] = static_cast<uint8_t>((uuid[8] & 0x3f) | 0x80);
  return uuid;
}

Status check_options(const FormatOptions& options) {
  const auto wrong = [](const std::string& what) { return Status{Code::kInvalidArgument, what}; };
  if (options.fencing == FencingClass::kReservations) {
    return {Code::kUnsupported, "fencing by persistent reservations is not built yet; use manual, lease-only or loop"};
  }
  if (options.fencing == FencingClass::kNone || options.fencing > FencingClass::kLoop) {
    return wrong("a pool needs a fencing class: manual, lease-only or loop");
  }
  if (options.name.empty() || options.name.size() >= sizeof(Superblock::name)) {
    return wrong("a pool's name has 1 to " + std::to_string(sizeof(Superblock::name) - 1) + " bytes");
  }
  for (const char c : options.name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) return wrong("a pool's name has no control characters");
  }
  if (options.renew_interval_ms < kMinRenewMs || options.lease_ms > kMaxLeaseMs ||
      options.lease_ms < 3 * options.renew_interval_ms) {
    return wrong("the renew interval is at least " + std::to_string(kMinRenewMs) +
                 " ms, the lease at least three of them and at most " + std::to_string(kMaxLeaseMs) + " ms; given: " +
                 std::to_string(options.renew_interval_ms) + " and " + std::to_string(options.lease_ms));
  }
  if (options.uuid && uuid_is_zero(*options.uuid)) return wrong("a pool's UUID can't be all zeros");
  return {};
}

// A host that renews its heartbeat has the pool open, whatever the kernel of this machine knows.
Status check_nobody_alive(FdDevice& device, const PoolInfo& pool) {
  std::vector<std::string> damaged;
  Result<std::vector<Heartbeat>> before = read_heartbeats(device, pool.superblock, &damaged);
  if (!before.ok()) return before.status;
  bool any = false;
  for (const Heartbeat& heartbeat : *before) any = any || heartbeat.state == format::HeartbeatState::kLive;
  if (!any) return {};
  std::this_thread::sleep_for(std::chrono::milliseconds(pool.renew_interval_ms * 5 / 2 + 500));
  Result<std::vector<Heartbeat>> after = read_heartbeats(device, pool.superblock, &damaged);
  if (!after.ok()) return after.status;
  HF_ASSERT(before->size() == after->size());
  for (size_t host = 0; host < after->size(); host++) {
    const Heartbeat& now = (*after)[host];
    if (now.state != format::HeartbeatState::kLive || now.sequence == (*before)[host].sequence) continue;
    return {Code::kBusy, "node " + now.node_name + " (host " + std::to_string(now.host_id) + ") has pool " + pool.name +
                             " on " + device.name() + " open. Stop Holdfast there first; this can't be forced"};
  }
  return {};
}

Result<uint32_t> choose_drain(const FdDevice& device, const FormatOptions& options) {
  if (options.drain_ms) return *options.drain_ms;
  if (options.fencing != FencingClass::kLeaseOnly) return 0u;
  const DrainTime drain = device_drain(device);
  if (drain.ms) return *drain.ms;
  return Status{Code::kInvalidArgument,
                "lease-only fencing waits until the device can hold back no more I/O, and for " + device.name() +
                    " that time is unknown: " + drain.why +
                    ". Bound it and give the drain time yourself, or use manual"};
}

Status refuse_what_stands(const DeviceInspection& found, const std::string& path, bool force) {
  if (force || found.kind == DeviceInspection::Kind::kBlank) return {};
  if (found.kind == DeviceInspection::Kind::kPool) {
    const std::string which = found.pool ? "pool " + found.pool->name + " (" + uuid_text(found.pool->uuid) + ")"
                                         : "a Holdfast pool that this build can't read: " + found.signature;
    return {Code::kAlreadyExists, path + " already holds " + which + ". Force the format only if all of it may go"};
  }
  return {Code::kForeignData, path + " holds " +
                                  (found.signature == "data" ? "data of unknown kind" : found.signature) +
                                  ". Force the format only if all of it may go"};
}

}  // namespace

Status check_wwid(PoolInfo& info, const std::string& wwid, const std::string& device) {
  if (info.wwid.empty()) {
    info.warnings.push_back("pool " + info.name + " was made on a device without an identity, so a clone of " + device +
                            " can't be told from it");
    return {};
  }
  bool moved = false;
  if (!same_wwid(info.wwid, wwid, &moved)) {
    return {Code::kWrongPool, device + " is " + (wwid.empty() ? "a device without an identity" : wwid) + ", but pool " +
                                  info.name + " (" + uuid_text(info.uuid) + ") was made on " + info.wwid +
                                  ": this is a clone or a copy. Use the original, or format this one"};
  }
  if (moved) {
    info.warnings.push_back("the file system that holds the disk image of pool " + info.name +
                            " has another device number than at format (" + info.wwid + ", now " + wwid + ")");
  }
  return {};
}

Result<DeviceInspection> inspect_device(const std::string& path) {
  Result<std::unique_ptr<FdDevice>> device = FdDevice::open(path, FdDevice::Mode::kRead);
  if (!device.ok()) return device.status;
  return inspect(**device, path);
}

Result<PoolInfo> format_device(const std::string& path, const FormatOptions& options) {
  if (Status status = check_options(options); !status.ok()) return status;
  Result<std::unique_ptr<FdDevice>> opened = FdDevice::open(path, FdDevice::Mode::kExclusive);
  if (!opened.ok()) {
    if (opened.status.code != Code::kBusy) return opened.status;
    Result<std::unique_ptr<FdDevice>> look = FdDevice::open(path, FdDevice::Mode::kRead);
    const std::string user = look.ok() ? device_user(**look) : "";
    return Status{Code::kBusy, path + " is in use" + (user.empty() ? "" : ": " + user) + ". Release it first; " +
                                   "this can't be forced"};
  }
  FdDevice& device = **opened;
  Result<DeviceInspection> found = inspect(device, path);
  if (!found.ok()) return found.status;
  if (found->mounted) {
    return Status{Code::kBusy, path + " is in use: " + found->in_use_by + ". Release it first; this can't be forced"};
  }
  Result<Superblock> geometry = plan_geometry(device.size_bytes());
  if (!geometry.ok()) return Status{geometry.status.code, path + ": " + geometry.status.message};
  if (options.fencing == FencingClass::kLoop && !is_loop_or_file(device)) {
    return Status{Code::kInvalidArgument, "fencing class loop is for loop devices on one machine, and " + path +
                                              " is none; use manual or lease-only"};
  }
  if (Status status = refuse_what_stands(*found, path, options.force); !status.ok()) return status;
  if (found->pool) {
    if (Status status = check_nobody_alive(device, *found->pool); !status.ok()) return status;
  }
  Result<uint32_t> drain = choose_drain(device, options);
  if (!drain.ok()) return drain.status;

  Superblock s = *geometry;
  s.fencing = options.fencing;
  s.renew_interval_ms = options.renew_interval_ms;
  s.lease_ms = options.lease_ms;
  s.drain_ms = *drain;
  s.created_unix_ms = static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch())
          .count());
  HF_ASSERT(set_field(s.name, options.name));
  if (!set_field(s.wwid, found->wwid)) {
    return Status{Code::kUnsupported,
                  "the identity of " + path + " is longer than the superblock has room for: " + found->wwid};
  }
  Result<format::Uuid> uuid = options.uuid ? Result<format::Uuid>(*options.uuid) : random_uuid();
  if (!uuid.ok()) return uuid.status;
  if (Status status = wipe_signatures(path); !status.ok()) return status;
  return write_pool(device, s, *uuid, options.progress);
}

Result<PoolInfo> read_pool_at(FdDevice& device) {
  Result<PoolInfo> pool = read_pool(device);
  if (!pool.ok()) return pool;
  if (!pool->warnings.empty()) {
    const std::string signature =
        lower(find_signature("/proc/self/fd/" + std::to_string(device.fd()), format::kAuthorityOffset));
    if (!signature.empty()) {
      return Status{Code::kForeignData,
                    device.name() + " was pool " + pool->name + ", but " + signature +
                        " was written over its beginning. Nothing is touched until a person decides"};
    }
  }
  if (Status status = check_wwid(*pool, device_wwid(device), device.name()); !status.ok()) return status;
  return pool;
}

Result<PoolInfo> read_pool_at(const std::string& path) {
  Result<std::unique_ptr<FdDevice>> device = FdDevice::open(path, FdDevice::Mode::kRead);
  if (!device.ok()) return device.status;
  return read_pool_at(**device);
}

Result<bool> lock_is_free(const std::string& lock_path) {
  const FdCloser node{::open(lock_path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (node.fd < 0) {
    if (errno == ENOENT) {
      return Status{Code::kNotFound, "there is no " + lock_path + ", so nobody can tell whether its I/O is over"};
    }
    return Status{Code::kIo, "can't open " + lock_path + ": " + std::strerror(errno)};
  }
  if (::flock(node.fd, LOCK_EX | LOCK_NB) == 0) return true;
  if (errno == EWOULDBLOCK) return false;
  return Status{Code::kIo, "can't ask for the lock of " + lock_path + ": " + std::strerror(errno)};
}

}  // namespace holdfast
