// See shared_memory.h.
#include "io/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace holdfast {

Result<std::unique_ptr<SharedMemory>> SharedMemory::create(const std::string& name, size_t bytes) {
  HF_ASSERT(bytes > 0);
  const int fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return Status{Code::kIo, std::string("memfd_create failed: ") + std::strerror(errno)};
  // A file that could shrink would turn an access into SIGBUS.
  if (ftruncate(fd, off_t(bytes)) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0) {
    Status status{Code::kIo, std::string("shared memory cannot be sized: ") + std::strerror(errno)};
    close(fd);
    return status;
  }
  return map(fd, bytes);
}

Result<std::unique_ptr<SharedMemory>> SharedMemory::adopt(int fd) {
  struct stat info{};
  if (fstat(fd, &info) != 0 || info.st_size <= 0) {
    close(fd);
    return Status{Code::kCorrupt, "what the keeper kept as shared memory is none"};
  }
  return map(fd, size_t(info.st_size));
}

Result<std::unique_ptr<SharedMemory>> SharedMemory::map(int fd, size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    Status status{Code::kIo, std::string("shared memory cannot be mapped: ") + std::strerror(errno)};
    close(fd);
    return status;
  }
  return std::unique_ptr<SharedMemory>(new SharedMemory(fd, data, bytes));
}

SharedMemory::~SharedMemory() {
  munmap(data_, size_);
  close(fd_);
}

}  // namespace holdfast
