// See memory_device.h.
#include "memory_device.h"

#include <cerrno>
#include <cstring>
#include <new>

#include "format.h"
#include "status.h"

namespace holdfast {

using format::kBlockSize;

void IoAnswer::post(Executor* executor, IoRequest* request, int error) {
  HF_ASSERT(executor != nullptr);
  auto* answer = new (request->device_scratch) IoAnswer;
  answer->request = request;
  answer->error = error;
  answer->run = [](Task* task) {
    auto* self = static_cast<IoAnswer*>(task);
    self->request->done(self->request, self->error);
  };
  executor->post(answer);
}

void MemoryDevice::submit(IoRequest* request) {
  int error = 0;
  if (request->op != IoOp::kFlush &&
      (request->offset % kBlockSize != 0 || request->length % kBlockSize != 0 || request->offset > size_bytes_ ||
       request->length > size_bytes_ - request->offset)) {
    error = EINVAL;
  } else {
    std::lock_guard lock(mutex_);
    counts_[static_cast<int>(request->op)]++;
    uint64_t offset = request->offset;
    for (int i = 0; i < request->iov_count; i++) {
      auto* memory = static_cast<std::byte*>(request->iov[i].iov_base);
      for (size_t at = 0; at < request->iov[i].iov_len; at += kBlockSize, offset += kBlockSize) {
        auto found = blocks_.find(offset / kBlockSize);
        if (request->op == IoOp::kWrite) {
          if (found == blocks_.end()) {
            found = blocks_.emplace(offset / kBlockSize, new std::byte[kBlockSize]).first;
          }
          std::memcpy(found->second.get(), memory + at, kBlockSize);
        } else if (found == blocks_.end()) {
          std::memset(memory + at, 0, kBlockSize);
        } else {
          std::memcpy(memory + at, found->second.get(), kBlockSize);
        }
      }
    }
    if (request->op == IoOp::kDiscard) {
      for (uint64_t at = 0; at < request->length; at += kBlockSize) blocks_.erase((offset + at) / kBlockSize);
    }
  }
  IoAnswer::post(Executor::current(), request, error);
}

void MemoryDevice::read(uint64_t offset, void* to, size_t length) const {
  HF_ASSERT(offset % kBlockSize == 0 && length % kBlockSize == 0);
  std::lock_guard lock(mutex_);
  for (size_t at = 0; at < length; at += kBlockSize) {
    auto found = blocks_.find((offset + at) / kBlockSize);
    auto* target = static_cast<std::byte*>(to) + at;
    if (found == blocks_.end()) std::memset(target, 0, kBlockSize);
    else std::memcpy(target, found->second.get(), kBlockSize);
  }
}

void MemoryDevice::write(uint64_t offset, const void* from, size_t length) {
  HF_ASSERT(offset % kBlockSize == 0 && length % kBlockSize == 0);
  std::lock_guard lock(mutex_);
  for (size_t at = 0; at < length; at += kBlockSize) {
    Block& block = blocks_[(offset + at) / kBlockSize];
    if (block == nullptr) block.reset(new std::byte[kBlockSize]);
    std::memcpy(block.get(), static_cast<const std::byte*>(from) + at, kBlockSize);
  }
}

size_t MemoryDevice::blocks() const {
  std::lock_guard lock(mutex_);
  return blocks_.size();
}

uint64_t MemoryDevice::count(IoOp op) const {
  std::lock_guard lock(mutex_);
  return counts_[static_cast<int>(op)];
}

}  // namespace holdfast
