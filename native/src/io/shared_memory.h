// Memory that outlives the process: a memfd that the keeper holds too.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "core/status.h"

namespace holdfast {

class SharedMemory {
 public:
  // `name` is what /proc shows. All zero, sparse.
  static Result<std::unique_ptr<SharedMemory>> create(const std::string& name, size_t bytes);
  // Takes the descriptor, also when it fails.
  static Result<std::unique_ptr<SharedMemory>> adopt(int fd);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  int fd() const { return fd_; }
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  SharedMemory(int fd, void* data, size_t size) : fd_(fd), data_(data), size_(size) {}
  static Result<std::unique_ptr<SharedMemory>> map(int fd, size_t bytes);
  int fd_;
  void* data_;
  size_t size_;
};

}  // namespace holdfast
