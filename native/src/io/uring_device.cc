// See uring_device.h.
#include "io/uring_device.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/ioctl.h>

#include <cerrno>
#include <new>

#include "io/worker.h"

namespace holdfast {

namespace {

// BLOCK_URING_CMD_DISCARD (kernel 6.12), newer than the headers that this may be built with.
constexpr uint32_t kBlockUringCommandDiscard = _IO(0x12, 0);

// How a discard is asked for, best first; UringDevice::discard_way_ holds the first that was not refused.
constexpr int kDiscardByCommand = 0;
constexpr int kDiscardByPunchHole = 1;
constexpr int kDiscardNone = 2;

}  // namespace

// Lives in IoRequest::device_scratch.
struct UringDevice::State {
  Completion completion;
  IoRequest* request;
  UringDevice* device;
  uint64_t transferred;  // bytes, reads and writes
  iovec* rest;           // what a short transfer left, owned
  int discard_way;
  bool recalled;         // its gate closed before the kernel had it
};

void UringDevice::submit(IoRequest* request) {
  static_assert(sizeof(State) <= sizeof(IoRequest::device_scratch));
  HF_ASSERT(Worker::current() != nullptr);
  HF_ASSERT(request->done != nullptr);
  HF_ASSERT(request->offset % 4096 == 0 && request->length % 4096 == 0);
  auto* state = new (request->device_scratch) State{};
  state->completion.complete = &UringDevice::complete;
  state->request = request;
  state->device = this;
  state->discard_way = discard_way_.load(std::memory_order_relaxed);
  prepare(state);
}

void UringDevice::prepare(State* state) {
  IoRequest* request = state->request;
  const uint64_t offset = request->offset + state->transferred;
  const int fd = state->device->fd_;
  io_uring_sqe* sqe = Worker::current()->sqe(&state->completion);
  switch (request->op) {
    case IoOp::kRead:
    case IoOp::kWrite: {
      const iovec* iov = state->rest != nullptr ? state->rest : request->iov;
      int count = request->iov_count;
      if (state->rest != nullptr) {
        while (count > 0 && state->rest[request->iov_count - count].iov_len == 0) --count;
        iov = state->rest + (request->iov_count - count);
      }
      HF_ASSERT(count > 0);
      if (request->op == IoOp::kRead) {
        if (count == 1) {
          io_uring_prep_read(sqe, fd, iov->iov_base, unsigned(iov->iov_len), offset);
        } else {
          io_uring_prep_readv(sqe, fd, iov, unsigned(count), offset);
        }
      } else {
        if (count == 1) {
          io_uring_prep_write(sqe, fd, iov->iov_base, unsigned(iov->iov_len), offset);
        } else {
          io_uring_prep_writev(sqe, fd, iov, unsigned(count), offset);
        }
        if (request->fua) sqe->rw_flags = RWF_DSYNC;
      }
      break;
    }
    case IoOp::kFlush:
      io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
      break;
    case IoOp::kDiscard:
      if (state->discard_way == kDiscardNone) {
        // Advisory: a device that can't is as good as done. A no-op keeps done() out of submit().
        io_uring_prep_nop(sqe);
      } else if (state->discard_way == kDiscardByCommand) {
        io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, nullptr, 0, 0);
        sqe->cmd_op = kBlockUringCommandDiscard;
        sqe->addr = request->offset;
        sqe->addr3 = request->length;
      } else {
        io_uring_prep_fallocate(sqe, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(request->offset),
                                off_t(request->length));
      }
      break;
  }
  if (state->device->gate_ != nullptr) Worker::current()->guard(sqe, state->device->gate_, &state->recalled);
}

void UringDevice::complete(Completion* completion, int result, uint32_t) {
  auto* state = reinterpret_cast<State*>(completion);
  IoRequest* request = state->request;
  if (state->recalled) {  // held, like a request that meets a closed gate
    state->recalled = false;
    if (state->device->gate_->fenced()) return finish(state, EIO);
    return prepare(state);
  }
  if (result == -EINTR || result == -EAGAIN) {
    prepare(state);
    return;
  }
  if (request->op == IoOp::kDiscard) {
    const bool unsupported = result == -EOPNOTSUPP || result == -EINVAL || result == -ENOTTY || result == -ENOSYS;
    if (unsupported && state->discard_way != kDiscardNone) {
      ++state->discard_way;
      int known = state->discard_way - 1;
      state->device->discard_way_.compare_exchange_strong(known, state->discard_way, std::memory_order_relaxed);
      prepare(state);
      return;
    }
    finish(state, result < 0 ? -result : 0);
    return;
  }
  if (result < 0) {
    finish(state, -result);
    return;
  }
  if (request->op == IoOp::kFlush) {
    finish(state, 0);
    return;
  }
  state->transferred += uint64_t(result);
  if (state->transferred >= request->length) {
    HF_ASSERT(state->transferred == request->length);
    finish(state, 0);
    return;
  }
  if (result == 0) {  // past the end of the device
    finish(state, EIO);
    return;
  }
  // A short transfer: go on behind what is done.
  if (state->rest == nullptr) {
    state->rest = new iovec[size_t(request->iov_count)];
    for (int i = 0; i < request->iov_count; ++i) state->rest[i] = request->iov[i];
  }
  size_t skip = size_t(result);
  for (int i = 0; i < request->iov_count && skip > 0; ++i) {
    const size_t part = skip < state->rest[i].iov_len ? skip : state->rest[i].iov_len;
    state->rest[i].iov_base = static_cast<std::byte*>(state->rest[i].iov_base) + part;
    state->rest[i].iov_len -= part;
    skip -= part;
  }
  prepare(state);
}

void UringDevice::finish(State* state, int error) {
  delete[] state->rest;
  IoRequest* request = state->request;
  request->done(request, error);
}

}  // namespace holdfast
