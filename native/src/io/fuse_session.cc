// See fuse_session.h.
#include "io/fuse_session.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/mount.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "io/fuse_wire.h"

namespace holdfast {

namespace {

constexpr uint64_t kRoot = FUSE_ROOT_ID;
constexpr int kReadBatch = 16;  // requests read in one turn, so that their I/O is submitted before more is read
constexpr uint16_t kMaxBackground = 512;
constexpr uint16_t kCongestionThreshold = 384;
constexpr uint32_t kDiscardGranularity = 4096;
constexpr uint64_t kAttributeSeconds = 3600;

Status errno_status(const char* what) {
  const int error = errno;
  return {Code::kIo, std::string(what) + ": " + std::strerror(error)};
}

// The file system context's own account of what went wrong, where it has one.
std::string mount_log(int context) {
  char line[512];
  const ssize_t length = read(context, line, sizeof line - 1);
  if (length <= 0) return "";
  return " (" + std::string(line, size_t(length)) + ")";
}

Result<int> detached_mount(int fuse_fd) {
  const int context = int(syscall(SYS_fsopen, "fuse", FSOPEN_CLOEXEC));
  if (context < 0) {
    Status status = errno_status("FUSE cannot be mounted");
    status.message += ": load the kernel module fuse, and run with CAP_SYS_ADMIN";
    return status;
  }
  const std::string fd = std::to_string(fuse_fd);
  const auto set = [&](const char* key, const char* value) {
    return syscall(SYS_fsconfig, context, FSCONFIG_SET_STRING, key, value, 0) == 0;
  };
  bool ok = set("source", "holdfast") && set("fd", fd.c_str()) && set("rootmode", "100600") && set("user_id", "0") &&
            set("group_id", "0") && set("max_read", "1048576");
  ok = ok && syscall(SYS_fsconfig, context, FSCONFIG_SET_FLAG, "allow_other", nullptr, 0) == 0;
  ok = ok && syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) == 0;
  int mount = -1;
  if (ok) mount = int(syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, 0));
  if (mount < 0) {
    Status status = errno_status("the volume's FUSE mount failed");
    status.message += mount_log(context);
    close(context);
    return status;
  }
  close(context);
  return mount;
}

fuse_attr root_attributes(uint64_t size) {
  fuse_attr attr{};
  attr.ino = kRoot;
  attr.size = size;
  attr.blocks = size / 512;
  attr.mode = S_IFREG | 0600;
  attr.nlink = 1;
  attr.blksize = 4096;
  return attr;
}

bool wait_until(const std::function<bool()>& condition, unsigned timeout_ms) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  auto pause = std::chrono::microseconds(50);
  for (;;) {
    if (condition()) return true;
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(pause);
    if (pause < std::chrono::milliseconds(5)) pause *= 2;
  }
}

}  // namespace

// --- channel -----------------------------------------------------------------------------------------------------

FuseChannel::FuseChannel(FuseSession* session, Worker* worker, int fd) : session_(session), worker_(worker), fd_(fd) {
  poll_.channel = this;
  poll_.complete = [](Completion* self, int, uint32_t flags) {
    static_cast<Poll*>(self)->channel->polled(flags);
  };
  removal_.channel = this;
  removal_.complete = [](Completion* self, int result, uint32_t) {
    auto* removal = static_cast<PollRemoval*>(self);
    FuseChannel* channel = removal->channel;
    removal->outstanding = false;
    // The kernel does not remove a poll that is about to report something.
    if (result == -EALREADY && channel->poll_armed_ && !channel->reading_) channel->remove_poll();
  };
  read_task_.channel = this;
  read_task_.run = [](Task* self) {
    FuseChannel* channel = static_cast<ReadTask*>(self)->channel;
    channel->read_task_queued_ = false;
    channel->read_requests();
  };
}

void FuseChannel::start() {
  HF_ASSERT(Worker::current() == worker_);
  reading_ = true;
  arm_poll();
  queue_read();
}

void FuseChannel::arm_poll() {
  if (poll_armed_) return;
  io_uring_prep_poll_multishot(worker_->sqe(&poll_), fd_, POLLIN | EPOLLEXCLUSIVE);
  poll_armed_ = true;
}

void FuseChannel::remove_poll() {
  if (removal_.outstanding) return;
  io_uring_prep_poll_remove(worker_->sqe(&removal_), uint64_t(reinterpret_cast<uintptr_t>(&poll_)));
  removal_.outstanding = true;
}

void FuseChannel::polled(uint32_t flags) {
  if ((flags & IORING_CQE_F_MORE) == 0) poll_armed_ = false;
  if (!reading_) return;
  if (!poll_armed_ && !ended_) arm_poll();
  if (!read_task_queued_ && !waiting_for_slot_) read_requests();
}

void FuseChannel::queue_read() {
  if (read_task_queued_) return;
  read_task_queued_ = true;
  worker_->post(&read_task_);
}

void FuseChannel::resume() {
  waiting_for_slot_ = false;
  queue_read();
}

void FuseChannel::look() {
  if (read_task_queued_ || waiting_for_slot_) return;
  read_requests();
  worker_->submit();
}

void FuseChannel::stop_reading() {
  reading_ = false;
  if (waiting_for_slot_) {
    worker_->forget_waiter(this);
    waiting_for_slot_ = false;
  }
  if (poll_armed_) remove_poll();
}

void FuseChannel::read_requests() {
  size_t taken = 0;  // bytes, since the last submission
  for (int i = 0; i < kReadBatch; ++i) {
    if (!reading_ || ended_) return;
    Slot* slot = worker_->take_slot(this);
    if (slot == nullptr) {
      waiting_for_slot_ = true;
      return;
    }
    const size_t resident = slot->resident;
    iovec iov[3] = {{slot->header, kFuseHeaderSize},
                    {slot->buffer, resident},
                    {worker_->overflow() + resident, kMaxTransfer - resident}};
    const ssize_t length = readv(fd_, iov, 3);
    if (length >= 0) {
      if (size_t(length) > kFuseHeaderSize + resident) {
        const size_t payload = size_t(length) - kFuseHeaderSize;
        std::memcpy(slot->buffer + resident, worker_->overflow() + resident, payload - resident);
        slot->used(payload);
      }
      handle(slot, size_t(length));
      taken += std::max(size_t(length), size_t{4096});
      if (taken >= kTurnBytes) {
        taken = 0;
        worker_->submit();
      }
      continue;
    }
    const int error = errno;
    worker_->release_slot(slot);
    if (error == EAGAIN) return;
    if (error == EINTR || error == ENOENT) continue;  // ENOENT: the request was taken back
    if (error == ENODEV || error == ECONNABORTED) {
      ended_ = true;
      return;
    }
    HF_ASSERT(!"reading /dev/fuse fails only in the ways above");
  }
  queue_read();
}

void FuseChannel::send(uint64_t unique, int error, const void* data, size_t length) {
  fuse_out_header header{};
  header.unique = unique;
  header.error = -error;
  header.len = uint32_t(sizeof header + length);
  iovec iov[2] = {{&header, sizeof header}, {const_cast<void*>(data), length}};
  // It fails only when the request or the connection is gone, and then nobody waits for the answer.
  while (writev(fd_, iov, length > 0 ? 2 : 1) < 0 && errno == EINTR) {
  }
}

void FuseChannel::reply(Slot* slot, int error, const void* data, size_t length) {
  send(slot->unique, error, data, length);
  worker_->answered(this, length);
  worker_->release_slot(slot);
}

void FuseChannel::request_done(VolumeRequest* request, int error) {
  Slot* slot = static_cast<Slot*>(request->user);
  FuseChannel* channel = slot->channel;
  HF_ASSERT(Worker::current() == channel->worker_);
  FuseSession* session = channel->session_;
  if (request->op == VolumeOp::kRead) {
    if (error != 0) std::memset(slot->buffer, 0, request->length);  // what of it is resident is not known
    slot->used(request->length);
  }
  if (error != 0 && session->mode() == FuseSession::Mode::kSilent) {
    channel->worker_->release_slot(slot);
  } else if (error != 0) {
    channel->reply(slot, error);
  } else if (request->op == VolumeOp::kRead) {
    channel->reply(slot, 0, slot->buffer, request->length);
  } else if (request->op == VolumeOp::kWrite) {
    fuse_write_out out{};
    out.size = uint32_t(request->length);
    channel->reply(slot, 0, &out, sizeof out);
  } else {
    channel->reply(slot, 0);
  }
  HF_ASSERT(channel->in_flight_ > 0);
  --channel->in_flight_;
  session->in_flight_.fetch_sub(1, std::memory_order_release);
}

void FuseChannel::submit(Slot* slot, VolumeOp op, uint64_t offset, uint64_t length) {
  if (session_->mode() == FuseSession::Mode::kFail) {
    reply(slot, EIO);
    return;
  }
  if (offset % 4096 != 0 || length % 4096 != 0 || length > session_->size_bytes() ||
      offset > session_->size_bytes() - length) {
    reply(slot, EINVAL);
    return;
  }
  if (length == 0 && op != VolumeOp::kFlush) {
    if (op == VolumeOp::kWrite) {
      fuse_write_out out{};
      reply(slot, 0, &out, sizeof out);
    } else {
      reply(slot, 0);
    }
    return;
  }
  VolumeRequest& request = slot->request;
  request.op = op;
  request.fua = false;  // the block layer's FUA arrives as a write and an FSYNC
  request.offset = offset;
  request.length = length;
  request.buffer = op == VolumeOp::kRead || op == VolumeOp::kWrite ? slot->buffer : nullptr;
  request.done = &FuseChannel::request_done;
  request.user = slot;
  slot->channel = this;
  ++in_flight_;
  session_->in_flight_.fetch_add(1, std::memory_order_relaxed);
  session_->volume_->submit(&request);
}

void FuseChannel::handle_init(Slot* slot, size_t length) {
  std::byte message[sizeof(fuse_in_header) + sizeof(fuse_init_in)]{};
  const size_t head = length < kFuseHeaderSize ? length : kFuseHeaderSize;
  std::memcpy(message, slot->header, head);
  if (length > kFuseHeaderSize) {
    const size_t rest = std::min(length, sizeof message) - kFuseHeaderSize;
    std::memcpy(message + kFuseHeaderSize, slot->buffer, rest);
  }
  fuse_init_in in{};
  std::memcpy(&in, message + sizeof(fuse_in_header), sizeof in);
  if (in.major != FUSE_KERNEL_VERSION) {
    reply(slot, EPROTO);
    return;
  }
  const uint64_t offered = uint64_t(in.flags) | ((in.flags & fuse_wire::kInitExtended) ? uint64_t(in.flags2) << 32 : 0);
  const uint64_t wanted = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_MAX_PAGES |
                          fuse_wire::kInitExtended | fuse_wire::kInitHasResend;
  const uint64_t agreed = offered & wanted;
  FuseAgreement& agreement = session_->agreement_;
  agreement.minor = in.minor;
  agreement.max_write = kMaxTransfer;
  agreement.max_pages = kMaxTransfer / 4096;
  agreement.flags = agreed;
  agreement.can_resend = (agreed & fuse_wire::kInitHasResend) != 0 ? 1 : 0;
  fuse_init_out out{};
  out.major = FUSE_KERNEL_VERSION;
  out.minor = FUSE_KERNEL_MINOR_VERSION;
  out.max_readahead = in.max_readahead;
  out.flags = uint32_t(agreed);
  out.flags2 = uint32_t(agreed >> 32);
  out.max_background = kMaxBackground;
  out.congestion_threshold = kCongestionThreshold;
  out.max_write = kMaxTransfer;
  out.time_gran = 1;
  out.max_pages = uint16_t(kMaxTransfer / 4096);
  reply(slot, 0, &out, sizeof out);
  session_->agreed_.store(true, std::memory_order_release);
}

void FuseChannel::handle(Slot* slot, size_t length) {
  HF_ASSERT(length >= sizeof(fuse_in_header));
  fuse_in_header in;
  std::memcpy(&in, slot->header, sizeof in);
  HF_ASSERT(in.len == length);
  slot->unique = in.unique;
  const std::byte* body = slot->header + sizeof in;
  const auto argument = [&](auto& value) {
    static_assert(sizeof value <= kFuseHeaderSize - sizeof(fuse_in_header));
    std::memcpy(&value, body, sizeof value);
  };
  switch (in.opcode) {
    case FUSE_READ: {
      fuse_read_in read{};
      argument(read);
      HF_ASSERT(read.size <= kMaxTransfer);
      submit(slot, VolumeOp::kRead, read.offset, read.size);
      return;
    }
    case FUSE_WRITE: {
      fuse_write_in write{};
      argument(write);
      HF_ASSERT(write.size <= kMaxTransfer && length == kFuseHeaderSize + write.size);
      submit(slot, VolumeOp::kWrite, write.offset, write.size);
      return;
    }
    case FUSE_FSYNC:
      submit(slot, VolumeOp::kFlush, 0, 0);
      return;
    case FUSE_FALLOCATE: {
      fuse_fallocate_in fallocate{};
      argument(fallocate);
      if (fallocate.mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)) {
        submit(slot, VolumeOp::kDiscard, fallocate.offset, fallocate.length);
      } else if (fallocate.mode == (FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)) {
        submit(slot, VolumeOp::kWriteZeroes, fallocate.offset, fallocate.length);
      } else {
        reply(slot, EINVAL);  // not EOPNOTSUPP: that would turn discard off for good
      }
      return;
    }
    case FUSE_INIT:
      handle_init(slot, length);
      return;
    case FUSE_GETATTR: {
      fuse_attr_out out{};
      out.attr_valid = kAttributeSeconds;
      out.attr = root_attributes(session_->size_bytes());
      reply(slot, 0, &out, sizeof out);
      return;
    }
    case FUSE_SETATTR: {  // times only; the size is the volume's
      fuse_attr_out out{};
      out.attr_valid = kAttributeSeconds;
      out.attr = root_attributes(session_->size_bytes());
      reply(slot, 0, &out, sizeof out);
      return;
    }
    case FUSE_OPEN: {
      fuse_open_out out{};
      out.open_flags = FOPEN_DIRECT_IO | fuse_wire::kOpenParallelDirectWrites;
      reply(slot, 0, &out, sizeof out);
      return;
    }
    case FUSE_STATFS: {
      fuse_statfs_out out{};
      out.st.bsize = kDiscardGranularity;
      out.st.frsize = kDiscardGranularity;
      out.st.blocks = session_->size_bytes() / kDiscardGranularity;
      out.st.namelen = 255;
      reply(slot, 0, &out, sizeof out);
      return;
    }
    case FUSE_RELEASE:
    case FUSE_DESTROY:
      reply(slot, 0);
      return;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
      worker_->release_slot(slot);  // by the protocol without an answer
      return;
    default:
      reply(slot, ENOSYS);
      return;
  }
}

// --- session -----------------------------------------------------------------------------------------------------

Result<std::unique_ptr<FuseSession>> FuseSession::create(const std::vector<Worker*>& workers, uint64_t size_bytes) {
  HF_ASSERT(!workers.empty() && size_bytes % 4096 == 0);
  std::unique_ptr<FuseSession> session(new FuseSession());
  session->size_bytes_.store(size_bytes);
  const int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    Status status = errno_status("/dev/fuse cannot be opened");
    status.message += ": load the kernel module fuse, and give the agent the device";
    return status;
  }
  session->channels_.push_back(std::make_unique<FuseChannel>(session.get(), workers[0], fd));
  Result<int> mount = detached_mount(fd);
  if (!mount.ok()) return mount.status;
  session->mount_fd_ = *mount;
  Status status = session->clone_for(workers);
  if (!status.ok()) return status;
  return session;
}

Result<std::unique_ptr<FuseSession>> FuseSession::adopt(const std::vector<Worker*>& workers, uint64_t size_bytes,
                                                        std::vector<int> fuse_fds, int mount_fd,
                                                        FuseAgreement agreement) {
  HF_ASSERT(!workers.empty() && !fuse_fds.empty() && size_bytes % 4096 == 0);
  std::unique_ptr<FuseSession> session(new FuseSession());
  session->size_bytes_.store(size_bytes);
  session->agreement_ = agreement;
  session->agreed_.store(true);
  session->mount_fd_ = mount_fd;
  for (size_t i = 0; i < fuse_fds.size(); ++i) {
    if (i < workers.size()) {
      session->channels_.push_back(std::make_unique<FuseChannel>(session.get(), workers[i], fuse_fds[i]));
    } else {
      session->surplus_fds_.push_back(fuse_fds[i]);
    }
  }
  Status status = session->clone_for(workers);
  if (!status.ok()) return status;
  return session;
}

Status FuseSession::clone_for(const std::vector<Worker*>& workers) {
  const int origin = channels_[0]->fd();
  for (size_t i = channels_.size(); i < workers.size(); ++i) {
    const int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return errno_status("/dev/fuse cannot be opened");
    uint32_t source = uint32_t(origin);
    if (ioctl(fd, FUSE_DEV_IOC_CLONE, &source) != 0) {
      Status status = errno_status("the FUSE connection cannot be cloned");
      close(fd);
      return status;
    }
    channels_.push_back(std::make_unique<FuseChannel>(this, workers[i], fd));
  }
  return {};
}

FuseSession::~FuseSession() {
  HF_ASSERT(!started_);
  // The mount last: with nobody left to answer, its end waits for nothing.
  for (auto& channel : channels_) close(channel->fd());
  for (int fd : surplus_fds_) close(fd);
  if (mount_fd_ >= 0) close(mount_fd_);
}

void FuseSession::for_each_channel(const std::function<void(FuseChannel&)>& function) {
  for (auto& channel : channels_) {
    run_on(*channel->worker(), [&] { function(*channel); });
  }
}

void FuseSession::start(Volume* volume, Mode mode) {
  HF_ASSERT(!started_ && (volume != nullptr || mode == Mode::kFail));
  started_ = true;
  volume_ = volume;
  mode_.store(mode, std::memory_order_release);
  for_each_channel([](FuseChannel& channel) { channel.start(); });
}

bool FuseSession::wait_agreed(unsigned timeout_ms) {
  return wait_until([this] { return agreed_.load(std::memory_order_acquire); }, timeout_ms);
}

Status FuseSession::resend() {
  fuse_out_header header{};
  header.len = sizeof header;
  header.error = fuse_wire::kNotifyResend;
  if (write(channels_[0]->fd(), &header, sizeof header) != ssize_t(sizeof header)) {
    return errno_status("the kernel would not send the dead engine's requests again");
  }
  return {};
}

void FuseSession::set_mode(Mode mode) {
  mode_.store(mode, std::memory_order_release);
  for_each_channel([](FuseChannel&) {});
}

void FuseSession::stop_reading() {
  for_each_channel([](FuseChannel& channel) { channel.stop_reading(); });
}

void FuseSession::resume_reading() {
  for_each_channel([](FuseChannel& channel) { channel.start(); });
}

bool FuseSession::wait_idle(unsigned timeout_ms) {
  return wait_until([this] { return in_flight_.load(std::memory_order_acquire) == 0; }, timeout_ms);
}

void FuseSession::set_size(uint64_t size_bytes) {
  HF_ASSERT(size_bytes % 4096 == 0 && size_bytes >= size_bytes_.load());
  size_bytes_.store(size_bytes);
  struct {
    fuse_out_header header;
    fuse_notify_inval_inode_out inode;
  } message{};
  message.header.len = sizeof message;
  message.header.error = FUSE_NOTIFY_INVAL_INODE;
  message.inode.ino = kRoot;
  message.inode.off = -1;  // attributes only
  // Fails where the kernel has no attributes cached, which is as good.
  [[maybe_unused]] ssize_t written = write(channels_[0]->fd(), &message, sizeof message);
}

void FuseSession::shut_down() {
  if (!started_) return;
  HF_ASSERT(in_flight_.load(std::memory_order_acquire) == 0);
  stop_reading();
  const bool quiet = wait_until(
      [this] {
        bool all = true;
        for_each_channel([&all](FuseChannel& channel) { all = all && channel.quiet(); });
        return all;
      },
      60'000);
  HF_ASSERT(quiet);
  started_ = false;
}

std::vector<int> FuseSession::fuse_fds() const {
  std::vector<int> fds;
  for (const auto& channel : channels_) fds.push_back(channel->fd());
  fds.insert(fds.end(), surplus_fds_.begin(), surplus_fds_.end());
  return fds;
}

}  // namespace holdfast
