// See keeper_client.h.
#include "io/keeper_client.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace holdfast {

namespace {

Result<int> connect_to(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return Status{Code::kInvalidArgument, "the keeper's socket path " + path + " is too long for a unix socket"};
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0) return Status{Code::kIo, std::string("no socket for the keeper: ") + std::strerror(errno)};
  const int buffer = 1 << 20;
  setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    Status status{Code::kUnavailable, "the keeper does not answer at " + path + ": " + std::strerror(errno) +
                                          "; start holdfast-keeper --socket " + path};
    close(fd);
    return status;
  }
  return fd;
}

template <typename T>
std::string bytes_of(const T& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

Result<std::unique_ptr<KeeperClient>> KeeperClient::connect(const std::string& socket_path) {
  Result<int> fd = connect_to(socket_path);
  if (!fd.ok()) return fd.status;
  return std::unique_ptr<KeeperClient>(new KeeperClient(*fd, socket_path));
}

KeeperClient::~KeeperClient() { close(fd_); }

Status KeeperClient::reconnect() {
  std::lock_guard lock(mutex_);
  Result<int> fd = connect_to(socket_path_);
  if (!fd.ok()) return fd.status;
  close(fd_);
  fd_ = *fd;
  return {};
}

Status KeeperClient::lost(const char* what) const {
  return {Code::kUnavailable, std::string("the keeper at ") + socket_path_ + " is gone (" + what + ": " +
                                  std::strerror(errno) + "); start it again and retry"};
}

Status KeeperClient::send(int fd, KeeperOp op, const std::string& name, const std::string& blob, const int* fds,
                          size_t fd_count, int64_t argument, uint32_t flags) const {
  HF_ASSERT(name.size() < kKeeperName && blob.size() <= kKeeperBlob && fd_count <= kKeeperFds);
  KeeperMessage message{};
  message.magic = kKeeperMagic;
  message.version = kKeeperVersion;
  message.op = op;
  message.flags = flags;
  message.argument = argument;
  message.blob_length = uint32_t(blob.size());
  message.fd_count = uint32_t(fd_count);
  std::memcpy(message.name, name.c_str(), name.size());
  iovec iov[2] = {{&message, sizeof message}, {const_cast<char*>(blob.data()), blob.size()}};
  msghdr header{};
  header.msg_iov = iov;
  header.msg_iovlen = blob.empty() ? 1 : 2;
  std::vector<char> control(CMSG_SPACE(sizeof(int) * std::max<size_t>(fd_count, 1)));
  if (fd_count > 0) {
    header.msg_control = control.data();
    header.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
    std::memcpy(CMSG_DATA(rights), fds, sizeof(int) * fd_count);
  }
  while (sendmsg(fd, &header, MSG_NOSIGNAL) < 0) {
    if (errno != EINTR) return lost("send");
  }
  return {};
}

Result<KeeperClient::Answer> KeeperClient::receive(int fd) const {
  Answer answer;
  answer.blob.resize(kKeeperBlob);
  iovec iov[2] = {{&answer.message, sizeof answer.message}, {answer.blob.data(), answer.blob.size()}};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 253)];
  msghdr header{};
  header.msg_iov = iov;
  header.msg_iovlen = 2;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  ssize_t length;
  while ((length = recvmsg(fd, &header, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {
  }
  if (length <= 0) {
    if (length == 0) errno = ECONNRESET;
    return lost("receive");
  }
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    const size_t before = answer.fds.size();
    answer.fds.resize(before + count);
    std::memcpy(answer.fds.data() + before, CMSG_DATA(part), count * sizeof(int));
  }
  const bool sound = size_t(length) >= sizeof answer.message && answer.message.magic == kKeeperMagic &&
                     answer.message.version == kKeeperVersion &&
                     (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0 &&
                     answer.message.blob_length == size_t(length) - sizeof answer.message &&
                     answer.message.fd_count == answer.fds.size();
  if (!sound) {
    for (int received : answer.fds) close(received);
    return Status{Code::kUnavailable, "the keeper at " + socket_path_ +
                                          " answers in a way that this engine does not understand; raise the limit on "
                                          "open files (ulimit -n), and let engine and keeper be of one release"};
  }
  answer.blob.resize(answer.message.blob_length);
  return answer;
}

Status KeeperClient::put(const std::string& name, const std::string& blob, const std::vector<int>& fds,
                         int64_t flags) {
  std::lock_guard lock(mutex_);
  size_t sent = 0;
  do {
    const size_t part = std::min<size_t>(fds.size() - sent, kKeeperFds);
    const bool more = sent + part < fds.size();
    Status status = send(fd_, KeeperOp::kPut, name, sent == 0 ? blob : std::string(), fds.data() + sent, part, flags,
                         more ? kKeeperMore : 0);
    if (!status.ok()) return status;
    sent += part;
  } while (sent < fds.size());
  Result<Answer> answer = receive(fd_);
  if (!answer.ok()) return answer.status;
  if (answer->message.error != 0) {
    return {Code::kUnavailable,
            "the keeper would not keep " + name + ": " + std::strerror(answer->message.error)};
  }
  return {};
}

Status KeeperClient::update(const std::string& name, const std::string& blob, int64_t flags) {
  std::lock_guard lock(mutex_);
  Status status = send(fd_, KeeperOp::kUpdate, name, blob, nullptr, 0, flags, 0);
  if (!status.ok()) return status;
  Result<Answer> answer = receive(fd_);
  if (!answer.ok()) return answer.status;
  if (answer->message.error == ENOENT) return {Code::kNotFound, "the keeper has no " + name};
  if (answer->message.error != 0) {
    return {Code::kUnavailable, "the keeper would not change " + name + ": " + std::strerror(answer->message.error)};
  }
  return {};
}

Result<KeptEntry> KeeperClient::get(const std::string& name) {
  std::lock_guard lock(mutex_);
  Status status = send(fd_, KeeperOp::kGet, name, "", nullptr, 0, 0, 0);
  if (!status.ok()) return status;
  KeptEntry entry;
  for (;;) {
    Result<Answer> answer = receive(fd_);
    if (!answer.ok() || answer->message.error != 0) {
      for (int fd : entry.fds) close(fd);
      if (!answer.ok()) return answer.status;
      if (answer->message.error == ENOENT) return Status{Code::kNotFound, "the keeper has no " + name};
      return Status{Code::kUnavailable,
                    "the keeper would not give " + name + ": " + std::strerror(answer->message.error)};
    }
    entry.flags = answer->message.argument;
    entry.blob += answer->blob;
    entry.fds.insert(entry.fds.end(), answer->fds.begin(), answer->fds.end());
    if ((answer->message.flags & kKeeperMore) == 0) return entry;
  }
}

Result<std::vector<std::string>> KeeperClient::list() {
  std::lock_guard lock(mutex_);
  Status status = send(fd_, KeeperOp::kList, "", "", nullptr, 0, 0, 0);
  if (!status.ok()) return status;
  std::vector<std::string> names;
  for (;;) {
    Result<Answer> answer = receive(fd_);
    if (!answer.ok()) return answer.status;
    for (size_t at = 0; at < answer->blob.size();) {
      names.emplace_back(answer->blob.c_str() + at);
      at += names.back().size() + 1;
    }
    if ((answer->message.flags & kKeeperMore) == 0) return names;
  }
}

Status KeeperClient::drop(const std::string& name) {
  std::lock_guard lock(mutex_);
  Status status = send(fd_, KeeperOp::kDrop, name, "", nullptr, 0, 0, 0);
  if (!status.ok()) return status;
  Result<Answer> answer = receive(fd_);
  return answer.status;
}

Result<KeeperClient::Answer> KeeperClient::ask_apart(KeeperOp op, const std::string& blob, const int* fds,
                                                     size_t fd_count) const {
  Result<int> fd = connect_to(socket_path_);
  if (!fd.ok()) return fd.status;
  Status status = send(*fd, op, "", blob, fds, fd_count, 0, 0);
  Result<Answer> answer = status.ok() ? receive(*fd) : Result<Answer>(status);
  close(*fd);
  return answer;
}

Result<int> KeeperClient::attach(int mount_fd, const KeeperAttach& wanted, std::string* note) {
  Result<Answer> answer = ask_apart(KeeperOp::kAttach, bytes_of(wanted), &mount_fd, 1);
  if (!answer.ok()) return answer.status;
  if (answer->message.error != 0) {
    return Status{Code::kIo, std::string("no loop device can be set up: ") + std::strerror(answer->message.error) +
                                 "; load the kernel module loop, and give the keeper /dev/loop-control"};
  }
  *note = answer->blob;
  return int(answer->message.argument);
}

Status KeeperClient::resize(int mount_fd, const KeeperLoop& loop) {
  Result<Answer> answer = ask_apart(KeeperOp::kResize, bytes_of(loop), &mount_fd, 1);
  if (!answer.ok()) return answer.status;
  if (answer->message.error == 0) return {};
  return {Code::kIo, "/dev/loop" + std::to_string(loop.number) + " does not take the new size: " +
                         std::strerror(answer->message.error) + "; the volume has it already, so ask again"};
}

Status KeeperClient::detach(const KeeperLoop& loop) {
  Result<Answer> answer = ask_apart(KeeperOp::kDetach, bytes_of(loop), nullptr, 0);
  if (!answer.ok()) return answer.status;
  if (answer->message.error == 0) return {};
  const std::string device = "/dev/loop" + std::to_string(loop.number);
  if (answer->message.error == EBUSY) {
    return {Code::kBusy, device + " is mounted or held open; unmount it, and end what has it open"};
  }
  return {Code::kIo, device + " cannot be synced and detached: " + std::strerror(answer->message.error)};
}

Result<int> KeeperClient::find(const std::string& label) {
  KeeperLoop loop{};
  label.copy(loop.label, sizeof loop.label - 1);
  Result<Answer> answer = ask_apart(KeeperOp::kFind, bytes_of(loop), nullptr, 0);
  if (!answer.ok()) return answer.status;
  if (answer->message.error != 0) {
    return Status{Code::kIo, std::string("/sys/block cannot be read: ") + std::strerror(answer->message.error)};
  }
  return int(answer->message.argument);
}

}  // namespace holdfast
