// A real loop device over a sparse file in a directory of its own. Gone with the object, and (autoclear) with the
// process.
#pragma once

#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/status.h"

namespace holdfast::test {

class TempDirectory {
 public:
  TempDirectory() {
    char name[] = "/tmp/holdfast-test-XXXXXX";
    HF_ASSERT(::mkdtemp(name) != nullptr);
    path = name;
  }
  ~TempDirectory() { HF_ASSERT(std::system(("rm -rf --one-file-system " + path).c_str()) == 0); }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  std::string path;
};

inline void make_image(const std::string& path, uint64_t bytes) {
  const int fd = ::open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  HF_ASSERT(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(bytes)) == 0);
  ::close(fd);
}

class LoopDevice {
 public:
  explicit LoopDevice(const std::string& image) {
    const int file = ::open(image.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
    HF_ASSERT(file >= 0);
    const int control = ::open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    HF_ASSERT(control >= 0);
    for (int tries = 0; fd_ < 0; tries++) {  // another process may take the free one first
      HF_ASSERT(tries < 100);
      const int number = ::ioctl(control, LOOP_CTL_GET_FREE);
      HF_ASSERT(number >= 0);
      path = "/dev/loop" + std::to_string(number);
      fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
      loop_config config{};
      config.fd = static_cast<__u32>(file);
      config.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
      if (fd_ >= 0 && ::ioctl(fd_, LOOP_CONFIGURE, &config) == 0) break;
      if (fd_ >= 0) ::close(fd_);
      fd_ = -1;
    }
    ::close(control);
    ::close(file);
  }
  ~LoopDevice() { ::close(fd_); }  // autoclear: the last close detaches it
  LoopDevice(const LoopDevice&) = delete;
  LoopDevice& operator=(const LoopDevice&) = delete;
  // The file has grown: tell the kernel.
  void refresh_size() { HF_ASSERT(::ioctl(fd_, LOOP_SET_CAPACITY) == 0); }

  std::string path;

 private:
  int fd_ = -1;
};

// Runs a program; false when it is missing or fails.
inline bool run(const std::string& command) { return std::system((command + " >/dev/null 2>&1").c_str()) == 0; }

}  // namespace holdfast::test
