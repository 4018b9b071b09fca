// Blocking devices: a descriptor opened with O_DIRECT, and a disk in memory that fails on demand; see sync_device.h.
#include "sync_device.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace holdfast {
namespace {

using format::kPageSize;

constexpr size_t kMaxTransfer = 8u << 20;
constexpr uint64_t kMaxZero = 1ull << 30;  // one BLKZEROOUT: bounded, so that it can be interrupted and reported

Status io_error(const std::string& device, const char* what, uint64_t offset, uint64_t length, int error) {
  return {Code::kIo, std::string(what) + " of " + std::to_string(length) + " bytes at " + std::to_string(offset) +
                         " on " + device + " failed: " + std::strerror(error)};
}

Status check_range(const SyncDevice& device, const char* what, uint64_t offset, uint64_t length) {
  HF_ASSERT(offset % kPageSize == 0 && length % kPageSize == 0);
  if (offset > device.size_bytes() || length > device.size_bytes() - offset) {
    return {Code::kIo, std::string(what) + " of " + std::to_string(length) + " bytes at " + std::to_string(offset) +
                           " is past the end of " + device.name() + " (" + std::to_string(device.size_bytes()) +
                           " bytes)"};
  }
  return {};
}

}  // namespace

// ---- FdDevice

Result<std::unique_ptr<FdDevice>> FdDevice::open(const std::string& path, Mode mode) {
  struct stat before {};
  if (::stat(path.c_str(), &before) != 0) {
    if (errno == ENOENT) return Status{Code::kNotFound, "there is no device " + path};
    return Status{Code::kIo, "can't look at " + path + ": " + std::strerror(errno)};
  }
  if (!S_ISBLK(before.st_mode) && !S_ISREG(before.st_mode)) {
    return Status{Code::kInvalidArgument,
                  path + " is neither a block device nor an image file; name the device itself"};
  }
  int flags = O_DIRECT | O_CLOEXEC | (mode == Mode::kRead ? O_RDONLY : O_RDWR);
  if (mode == Mode::kExclusive && S_ISBLK(before.st_mode)) flags |= O_EXCL;
  const int fd = ::open(path.c_str(), flags);
  if (fd < 0) {
    if (errno == EBUSY) {
      return Status{Code::kBusy, path + " is in use: mounted, swap, or held by device-mapper or md. Release it first"};
    }
    if (errno == ENXIO || errno == ENOMEDIUM) {
      return Status{Code::kNotFound, "there is no disk behind " + path + ": " + std::strerror(errno)};
    }
    return Status{Code::kIo, "can't open " + path + ": " + std::strerror(errno)};
  }
  std::unique_ptr<FdDevice> device(new FdDevice(fd, true, path));
  if (Status status = device->examine(); !status.ok()) return status;
  return device;
}

Result<std::unique_ptr<FdDevice>> FdDevice::borrow(int fd, const std::string& name) {
  std::unique_ptr<FdDevice> device(new FdDevice(fd, false, name));
  if (Status status = device->examine(); !status.ok()) return status;
  return device;
}

Status FdDevice::examine() {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) return {Code::kIo, "can't look at " + name_ + ": " + std::strerror(errno)};
  block_device_ = S_ISBLK(info.st_mode);
  if (Status status = measure(); !status.ok()) return status;
  if (!block_device_) return {};
  int sector = 0;
  if (::ioctl(fd_, BLKSSZGET, &sector) != 0) {
    return {Code::kIo, "can't read the sector size of " + name_ + ": " + std::strerror(errno)};
  }
  logical_sector_size_ = static_cast<uint32_t>(sector);
  if (logical_sector_size_ > kPageSize) {
    return {Code::kUnsupported, name_ + " has sectors of " + std::to_string(sector) +
                                    " bytes; Holdfast needs sectors of at most 4096 bytes"};
  }
  return {};
}

FdDevice::~FdDevice() {
  if (owned_) ::close(fd_);
}

Status FdDevice::measure() {
  uint64_t size = 0;
  if (block_device_) {
    if (::ioctl(fd_, BLKGETSIZE64, &size) != 0) {
      return {Code::kIo, "can't ask for the size of " + name_ + ": " + std::strerror(errno)};
    }
  } else {
    struct stat info{};
    if (::fstat(fd_, &info) != 0) return {Code::kIo, "can't look at " + name_ + ": " + std::strerror(errno)};
    size = static_cast<uint64_t>(info.st_size);
  }
  size_.store(size / kPageSize * kPageSize, std::memory_order_relaxed);
  return {};
}

Status FdDevice::read(uint64_t offset, void* buffer, size_t length) {
  if (Status status = check_range(*this, "read", offset, length); !status.ok()) return status;
  HF_ASSERT(reinterpret_cast<uintptr_t>(buffer) % kPageSize == 0);
  auto* to = static_cast<char*>(buffer);
  size_t done = 0;
  while (done < length) {
    const size_t part = std::min(length - done, kMaxTransfer);
    const ssize_t n = ::pread(fd_, to + done, part, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return io_error(name_, "read", offset + done, part, n < 0 ? errno : ENODATA);
    done += static_cast<size_t>(n);
  }
  return {};
}

Status FdDevice::write_flags(uint64_t offset, const void* buffer, size_t length, int flags) {
  if (Status status = check_range(*this, "write", offset, length); !status.ok()) return status;
  HF_ASSERT(reinterpret_cast<uintptr_t>(buffer) % kPageSize == 0);
  const auto* from = static_cast<const char*>(buffer);
  size_t done = 0;
  while (done < length) {
    iovec part{const_cast<char*>(from + done), std::min(length - done, kMaxTransfer)};
    const ssize_t n = ::pwritev2(fd_, &part, 1, static_cast<off_t>(offset + done), flags);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return io_error(name_, "write", offset + done, part.iov_len, n < 0 ? errno : ENOSPC);
    done += static_cast<size_t>(n);
  }
  return {};
}

Status FdDevice::write(uint64_t offset, const void* buffer, size_t length) {
  return write_flags(offset, buffer, length, 0);
}

Status FdDevice::write_durable(uint64_t offset, const void* buffer, size_t length) {
  return write_flags(offset, buffer, length, RWF_DSYNC);
}

Status FdDevice::flush() {
  if (::fdatasync(fd_) != 0) return io_error(name_, "flush", 0, 0, errno);
  return {};
}

Status FdDevice::discard(uint64_t offset, uint64_t length) {
  if (Status status = check_range(*this, "discard", offset, length); !status.ok()) return status;
  if (length == 0) return {};
  int result = 0;
  if (block_device_) {
    uint64_t range[2] = {offset, length};
    result = ::ioctl(fd_, BLKDISCARD, range);
  } else {
    result = ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                         static_cast<off_t>(length));
  }
  if (result != 0 && errno != EOPNOTSUPP) return io_error(name_, "discard", offset, length, errno);
  return {};
}

Status FdDevice::zero(uint64_t offset, uint64_t length) {
  if (Status status = check_range(*this, "zeroing", offset, length); !status.ok()) return status;
  while (length > 0) {
    const uint64_t part = std::min(length, kMaxZero);
    int result = 0;
    if (block_device_) {
      uint64_t range[2] = {offset, part};
      result = ::ioctl(fd_, BLKZEROOUT, range);
    } else {
      result = ::fallocate(fd_, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                           static_cast<off_t>(part));
      if (result != 0 && errno == EOPNOTSUPP) {  // file systems without it
        result = ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                             static_cast<off_t>(part));
      }
    }
    if (result != 0) return io_error(name_, "zeroing", offset, part, errno);
    offset += part;
    length -= part;
  }
  return {};
}

// ---- MemoryDisk

namespace {
constexpr uint64_t kMemoryRoom = 1ull << 38;  // address space, not memory: room to grow; ThreadSanitizer leaves little
}

MemoryDisk::MemoryDisk(uint64_t size_bytes) : size_(size_bytes), reserved_(kMemoryRoom) {
  HF_ASSERT(size_bytes % kPageSize == 0 && size_bytes <= reserved_);
  void* memory = ::mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  HF_ASSERT(memory != MAP_FAILED);
  memory_ = static_cast<std::byte*>(memory);
}

MemoryDisk::~MemoryDisk() { ::munmap(memory_, reserved_); }

void MemoryDisk::set_faults(std::function<Fault(Op, uint64_t, uint64_t)> faults) {
  const std::lock_guard lock(mutex_);
  faults_ = std::move(faults);
}

std::byte* MemoryDisk::raw(uint64_t offset) {
  HF_ASSERT(offset < size_);
  return memory_ + offset;
}

void MemoryDisk::resize(uint64_t size_bytes) {
  const std::lock_guard lock(mutex_);
  HF_ASSERT(size_bytes % kPageSize == 0 && size_bytes <= reserved_);
  size_ = size_bytes;
}

uint64_t MemoryDisk::operations(Op op) const {
  const std::lock_guard lock(mutex_);
  return operations_[static_cast<size_t>(op)];
}

MemoryDisk::Fault MemoryDisk::fault(Op op, uint64_t offset, uint64_t length) {
  operations_[static_cast<size_t>(op)]++;
  return faults_ ? faults_(op, offset, length) : Fault::kNone;
}

void MemoryDisk::remember(uint64_t offset, uint64_t length) {
  for (uint64_t page = offset; page < offset + length; page += kPageSize) {
    auto [entry, fresh] = before_.try_emplace(page);
    if (fresh) entry->second.assign(memory_ + page, memory_ + page + kPageSize);
  }
}

void MemoryDisk::power_cut(const std::function<bool(uint64_t)>& keep) {
  const std::lock_guard lock(mutex_);
  for (const auto& [page, content] : before_) {
    if (!keep(page)) std::memcpy(memory_ + page, content.data(), kPageSize);
  }
  before_.clear();
}

Status MemoryDisk::read(uint64_t offset, void* buffer, size_t length) {
  const std::lock_guard lock(mutex_);
  if (Status status = check_range(*this, "read", offset, length); !status.ok()) return status;
  const Fault f = fault(Op::kRead, offset, length);
  if (f == Fault::kError || f == Fault::kErrorAfter) return io_error(name_, "read", offset, length, EIO);
  std::memcpy(buffer, memory_ + offset, length);
  return {};
}

Status MemoryDisk::store(uint64_t offset, const void* buffer, size_t length, bool durable) {
  const std::lock_guard lock(mutex_);
  if (Status status = check_range(*this, "write", offset, length); !status.ok()) return status;
  const Fault f = fault(Op::kWrite, offset, length);
  if (f == Fault::kError) return io_error(name_, "write", offset, length, EIO);
  if (f == Fault::kLost) return {};
  const size_t arrives = f == Fault::kTorn ? length / 2 / 512 * 512 : length;
  remember(offset, length);
  std::memcpy(memory_ + offset, buffer, arrives);
  if (durable) {
    for (uint64_t page = offset; page < offset + length; page += kPageSize) before_.erase(page);
  }
  if (f == Fault::kErrorAfter) return io_error(name_, "write", offset, length, EIO);
  return {};
}

Status MemoryDisk::write(uint64_t offset, const void* buffer, size_t length) {
  return store(offset, buffer, length, false);
}

Status MemoryDisk::write_durable(uint64_t offset, const void* buffer, size_t length) {
  return store(offset, buffer, length, true);
}

Status MemoryDisk::flush() {
  const std::lock_guard lock(mutex_);
  const Fault f = fault(Op::kFlush, 0, 0);
  if (f == Fault::kError) return io_error(name_, "flush", 0, 0, EIO);
  if (f != Fault::kLost) before_.clear();
  if (f == Fault::kErrorAfter) return io_error(name_, "flush", 0, 0, EIO);
  return {};
}

Status MemoryDisk::discard(uint64_t offset, uint64_t length) {
  const std::lock_guard lock(mutex_);
  if (Status status = check_range(*this, "discard", offset, length); !status.ok()) return status;
  const Fault f = fault(Op::kDiscard, offset, length);
  if (f == Fault::kError) return io_error(name_, "discard", offset, length, EIO);
  if (length > 0) HF_ASSERT(::madvise(memory_ + offset, length, MADV_DONTNEED) == 0);
  return {};
}

Status MemoryDisk::zero(uint64_t offset, uint64_t length) {
  const std::lock_guard lock(mutex_);
  if (Status status = check_range(*this, "zeroing", offset, length); !status.ok()) return status;
  const Fault f = fault(Op::kZero, offset, length);
  if (f == Fault::kError) return io_error(name_, "zeroing", offset, length, EIO);
  if (f == Fault::kLost) return {};
  if (length > 0) HF_ASSERT(::madvise(memory_ + offset, length, MADV_DONTNEED) == 0);
  return {};
}

}  // namespace holdfast
