// holdfast-keeper: keeps the descriptors that must outlive a crash of the engine (DESIGN 5.3).
//
//   holdfast-keeper --socket PATH
//
// One process per node, started before the agent and never stopped while volumes are open; deliberately small, so that
// there is nothing in it to crash or to upgrade. It serves root only, one packet at a time, and never waits: what can
// wait for an engine (loop devices) is done by a child.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "io/keeper_protocol.h"
#include "loop_device.h"

namespace holdfast::keeper {
namespace {

constexpr size_t kMaxEntries = 65536;
constexpr size_t kMaxFdsPerEntry = 4096;

struct Entry {
  std::vector<char> blob;
  std::vector<int> fds;
  int64_t flags = 0;
  uint64_t owner = 0;  // connection
};

struct Connection {
  int fd = -1;
  uint64_t id = 0;
  bool staging = false;
  std::string staged_name;
  Entry staged;
};

// What a child did, through a pipe.
struct ChildResult {
  int32_t error = 0;
  int32_t number = -1;
  LoopQueue found{};  // kAttach
  char note[512] = {};
};

struct Child {
  pid_t pid = -1;
  int result_fd = -1;
  uint64_t connection = 0;
  KeeperOp op{};
  std::string label;  // kAttach, kDetach: whose loop device
};

volatile sig_atomic_t asked_to_stop = 0;

void close_all(std::vector<int>& fds) {
  for (int fd : fds) close(fd);
  fds.clear();
}

class Keeper {
 public:
  int run(const char* socket_path);

 private:
  bool listen_at(const char* socket_path);
  void accept_one();
  void serve(Connection& connection);
  void handle(Connection& connection, const KeeperMessage& message, std::vector<char> blob, std::vector<int> fds);
  void put(Connection& connection, const KeeperMessage& message, std::vector<char>& blob, std::vector<int>& fds);
  void get(Connection& connection, const KeeperMessage& message);
  void list(Connection& connection);
  void start_child(Connection& connection, const KeeperMessage& message, const std::vector<char>& blob,
                   const std::vector<int>& fds);
  void child_done(Child& child);
  void answer(Connection& connection, KeeperOp op, int error, int64_t argument = 0, const void* blob = nullptr,
              size_t blob_length = 0, const int* fds = nullptr, size_t fd_count = 0, bool more = false);
  void end(Connection& connection);
  void drop(const std::string& name);

  int listener_ = -1;
  int lock_ = -1;
  uint64_t next_id_ = 1;
  std::vector<std::unique_ptr<Connection>> connections_;
  std::vector<Child> children_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, LoopQueue> queues_;  // how attached loop devices were found, by their labels
};

bool Keeper::listen_at(const char* socket_path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (std::strlen(socket_path) >= sizeof address.sun_path) {
    std::fprintf(stderr, "holdfast-keeper: %s is too long for a unix socket (at most %zu bytes)\n", socket_path,
                 sizeof address.sun_path - 1);
    return false;
  }
  std::strcpy(address.sun_path, socket_path);
  // The lock, not the socket, says whether a keeper lives: a socket file stays behind a killed one.
  const std::string lock_path = std::string(socket_path) + ".lock";
  lock_ = open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_ < 0) {
    std::fprintf(stderr, "holdfast-keeper: %s cannot be opened: %s\n", lock_path.c_str(), std::strerror(errno));
    return false;
  }
  if (flock(lock_, LOCK_EX | LOCK_NB) != 0) {
    std::fprintf(stderr, "holdfast-keeper: another keeper serves %s already; nothing to do\n", socket_path);
    return false;
  }
  unlink(socket_path);
  umask(0077);
  listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener_ < 0 || bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
      listen(listener_, 64) != 0) {
    std::fprintf(stderr, "holdfast-keeper: cannot listen at %s: %s\n", socket_path, std::strerror(errno));
    return false;
  }
  return true;
}

void Keeper::accept_one() {
  const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return;
  ucred peer{};
  socklen_t length = sizeof peer;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0 || peer.uid != 0) {
    close(fd);
    return;
  }
  const int buffer = 1 << 20;
  setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer);
  auto connection = std::make_unique<Connection>();
  connection->fd = fd;
  connection->id = next_id_++;
  connections_.push_back(std::move(connection));
}

void Keeper::answer(Connection& connection, KeeperOp op, int error, int64_t argument, const void* blob,
                    size_t blob_length, const int* fds, size_t fd_count, bool more) {
  KeeperMessage message{};
  message.magic = kKeeperMagic;
  message.version = kKeeperVersion;
  message.op = op;
  message.error = error;
  message.flags = more ? kKeeperMore : 0;
  message.argument = argument;
  message.blob_length = uint32_t(blob_length);
  message.fd_count = uint32_t(fd_count);
  iovec iov[2] = {{&message, sizeof message}, {const_cast<void*>(blob), blob_length}};
  msghdr header{};
  header.msg_iov = iov;
  header.msg_iovlen = blob_length > 0 ? 2 : 1;
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
  // A client that does not read its answers is not waited for long: others need the keeper.
  for (int tries = 0; tries < 50; ++tries) {
    if (sendmsg(connection.fd, &header, MSG_NOSIGNAL) >= 0) return;
    if (errno != EAGAIN && errno != EINTR) return;
    pollfd writable{connection.fd, POLLOUT, 0};
    poll(&writable, 1, 20);
  }
}

void Keeper::drop(const std::string& name) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) return;
  close_all(found->second.fds);
  entries_.erase(found);
}

void Keeper::end(Connection& connection) {
  close(connection.fd);
  connection.fd = -1;
  close_all(connection.staged.fds);
  std::vector<std::string> orphans;
  for (const auto& [name, entry] : entries_) {
    if (entry.owner == connection.id && (entry.flags & kKeeperAbortWhenOrphaned) != 0) orphans.push_back(name);
  }
  for (const std::string& name : orphans) drop(name);
}

void Keeper::put(Connection& connection, const KeeperMessage& message, std::vector<char>& blob,
                 std::vector<int>& fds) {
  const std::string name(message.name);
  if (!connection.staging || connection.staged_name != name) {
    close_all(connection.staged.fds);
    connection.staged = Entry{};
    connection.staged_name = name;
    connection.staging = true;
    connection.staged.blob = std::move(blob);
  }
  connection.staged.fds.insert(connection.staged.fds.end(), fds.begin(), fds.end());
  fds.clear();
  if ((message.flags & kKeeperMore) != 0 && connection.staged.fds.size() <= kMaxFdsPerEntry) return;
  connection.staging = false;
  const bool too_many = connection.staged.fds.size() > kMaxFdsPerEntry ||
                        (entries_.size() >= kMaxEntries && entries_.count(name) == 0);
  if (too_many || name.empty()) {
    close_all(connection.staged.fds);
    answer(connection, KeeperOp::kPut, name.empty() ? EINVAL : ENOSPC);
    return;
  }
  Entry replaced = std::move(entries_[name]);
  connection.staged.flags = message.argument;
  connection.staged.owner = connection.id;
  entries_[name] = std::move(connection.staged);
  connection.staged = Entry{};
  close_all(replaced.fds);
  answer(connection, KeeperOp::kPut, 0);
}

void Keeper::get(Connection& connection, const KeeperMessage& message) {
  const auto found = entries_.find(message.name);
  if (found == entries_.end()) {
    answer(connection, KeeperOp::kGet, ENOENT);
    return;
  }
  const Entry& entry = found->second;
  size_t sent = 0;
  do {
    const size_t part = std::min<size_t>(entry.fds.size() - sent, kKeeperFds);
    const bool more = sent + part < entry.fds.size();
    answer(connection, KeeperOp::kGet, 0, entry.flags, entry.blob.data(), sent == 0 ? entry.blob.size() : 0,
           entry.fds.data() + sent, part, more);
    sent += part;
  } while (sent < entry.fds.size());
}

void Keeper::list(Connection& connection) {
  std::vector<char> names;
  for (const auto& [name, entry] : entries_) {
    if (names.size() + name.size() + 1 > kKeeperBlob) {
      answer(connection, KeeperOp::kList, 0, 0, names.data(), names.size(), nullptr, 0, true);
      names.clear();
    }
    names.insert(names.end(), name.begin(), name.end());
    names.push_back(0);
  }
  answer(connection, KeeperOp::kList, 0, 0, names.data(), names.size());
}

void Keeper::start_child(Connection& connection, const KeeperMessage& message, const std::vector<char>& blob,
                         const std::vector<int>& fds) {
  const bool attaches = message.op == KeeperOp::kAttach;
  const bool needs_mount = attaches || message.op == KeeperOp::kResize;
  KeeperLoop loop{};
  KeeperAttach attach{};
  if (blob.size() != (attaches ? sizeof attach : sizeof loop) || fds.size() != (needs_mount ? 1u : 0u)) {
    answer(connection, message.op, EINVAL);
    return;
  }
  std::memcpy(attaches ? static_cast<void*>(&attach) : static_cast<void*>(&loop), blob.data(), blob.size());
  loop.label[sizeof loop.label - 1] = 0;
  attach.label[sizeof attach.label - 1] = 0;
  int pipe_fds[2];
  if (pipe2(pipe_fds, O_CLOEXEC) != 0) {
    answer(connection, message.op, errno);
    return;
  }
  const pid_t pid = fork();
  if (pid < 0) {
    const int error = errno;
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    answer(connection, message.op, error);
    return;
  }
  if (pid == 0) {
    // Only what the work needs stays open: a child that waits for an engine must hold nothing that others wait for.
    int result_fd = fcntl(pipe_fds[1], F_DUPFD, 1 << 10);
    int mount_fd = needs_mount ? fcntl(fds[0], F_DUPFD, 1 << 10) : -1;
    dup2(result_fd, 3);
    if (needs_mount) dup2(mount_fd, 4);
    syscall(SYS_close_range, needs_mount ? 5u : 4u, ~0u, 0u);
    signal(SIGTERM, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    ChildResult result;
    switch (message.op) {
      case KeeperOp::kAttach:
        result.error = attach_loop(4, attach, &result.number, &result.found, result.note, sizeof result.note);
        break;
      case KeeperOp::kResize: result.error = resize_loop(4, loop); break;
      case KeeperOp::kDetach: {
        const auto found = queues_.find(loop.label);
        result.error = detach_loop(loop, found != queues_.end() ? &found->second : nullptr);
        break;
      }
      case KeeperOp::kFind: result.error = find_loop(loop.label, &result.number); break;
      default: result.error = EINVAL;
    }
    const ssize_t written = write(3, &result, sizeof result);
    _exit(written == ssize_t(sizeof result) ? 0 : 1);
  }
  close(pipe_fds[1]);
  children_.push_back({pid, pipe_fds[0], connection.id, message.op,
                       attaches ? attach.label : loop.label});
}

void Keeper::child_done(Child& child) {
  ChildResult result;
  if (read(child.result_fd, &result, sizeof result) != ssize_t(sizeof result)) result.error = EIO;
  close(child.result_fd);
  child.result_fd = -1;
  while (waitpid(child.pid, nullptr, 0) < 0 && errno == EINTR) {
  }
  result.note[sizeof result.note - 1] = 0;
  if (result.error == 0) {
    if (child.op == KeeperOp::kAttach) queues_[child.label] = result.found;
    if (child.op == KeeperOp::kDetach) queues_.erase(child.label);
  }
  for (auto& connection : connections_) {
    if (connection->id == child.connection && connection->fd >= 0) {
      answer(*connection, child.op, result.error, result.number, result.note, std::strlen(result.note));
    }
  }
}

void Keeper::handle(Connection& connection, const KeeperMessage& message, std::vector<char> blob,
                    std::vector<int> fds) {
  switch (message.op) {
    case KeeperOp::kPut:
      put(connection, message, blob, fds);
      break;
    case KeeperOp::kUpdate: {
      const auto found = entries_.find(message.name);
      if (found != entries_.end()) {
        found->second.blob = std::move(blob);
        found->second.flags = message.argument;
        found->second.owner = connection.id;
      }
      answer(connection, message.op, found == entries_.end() ? ENOENT : 0);
      break;
    }
    case KeeperOp::kGet:
      get(connection, message);
      break;
    case KeeperOp::kList:
      list(connection);
      break;
    case KeeperOp::kDrop:
      drop(message.name);
      answer(connection, message.op, 0);
      break;
    case KeeperOp::kAttach:
    case KeeperOp::kResize:
    case KeeperOp::kDetach:
    case KeeperOp::kFind:
      start_child(connection, message, blob, fds);
      break;
    default:
      answer(connection, message.op, EOPNOTSUPP);
  }
  close_all(fds);
}

void Keeper::serve(Connection& connection) {
  KeeperMessage message{};
  static std::vector<char> body(kKeeperBlob);
  iovec iov[2] = {{&message, sizeof message}, {body.data(), body.size()}};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 253)];
  msghdr header{};
  header.msg_iov = iov;
  header.msg_iovlen = 2;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  const ssize_t length = recvmsg(connection.fd, &header, MSG_CMSG_CLOEXEC);
  if (length < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (length <= 0) {
    end(connection);
    return;
  }
  std::vector<int> fds;
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    const size_t before = fds.size();
    fds.resize(before + count);
    std::memcpy(fds.data() + before, CMSG_DATA(part), count * sizeof(int));
  }
  message.name[kKeeperName - 1] = 0;
  const bool sound = size_t(length) >= sizeof message && message.magic == kKeeperMagic &&
                     message.version == kKeeperVersion && (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0 &&
                     message.blob_length == size_t(length) - sizeof message && message.fd_count == fds.size();
  if (!sound) {
    close_all(fds);
    answer(connection, message.op, EPROTO);
    end(connection);
    return;
  }
  handle(connection, message, std::vector<char>(body.begin(), body.begin() + long(message.blob_length)),
         std::move(fds));
}

int Keeper::run(const char* socket_path) {
  if (!listen_at(socket_path)) return 1;
  while (asked_to_stop == 0) {
    std::vector<pollfd> polls;
    polls.push_back({listener_, POLLIN, 0});
    for (const auto& connection : connections_) polls.push_back({connection->fd, POLLIN, 0});
    const size_t first_child = polls.size();
    for (const Child& child : children_) polls.push_back({child.result_fd, POLLIN, 0});
    // Signals arrive only while waiting here, so that none is missed.
    sigset_t none;
    sigemptyset(&none);
    if (ppoll(polls.data(), polls.size(), nullptr, &none) < 0) continue;
    const size_t connection_count = connections_.size();
    const size_t child_count = children_.size();
    for (size_t i = 0; i < connection_count; ++i) {
      if (polls[1 + i].revents != 0) serve(*connections_[i]);
    }
    for (size_t i = 0; i < child_count; ++i) {
      if (polls[first_child + i].revents != 0) child_done(children_[i]);
    }
    std::erase_if(connections_, [](const auto& connection) { return connection->fd < 0; });
    std::erase_if(children_, [](const Child& child) { return child.result_fd < 0; });
    if ((polls[0].revents & POLLIN) != 0) accept_one();
  }
  if (!entries_.empty()) {
    std::fprintf(stderr,
                 "holdfast-keeper: told to stop while it keeps %zu entries: a crash of the agent is now an I/O error, "
                 "not a pause, for volumes that are open\n",
                 entries_.size());
  }
  unlink(socket_path);
  return 0;
}

void set_up_process() {
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  // Losing this process to memory pressure would turn the next engine crash into I/O errors.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // whose shadow memory is not to be locked
  mlockall(MCL_CURRENT | MCL_FUTURE);
#endif
  const int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (fd >= 0) {
    [[maybe_unused]] ssize_t written = write(fd, "-1000", 5);
    close(fd);
  }
  struct sigaction stop{};
  stop.sa_handler = [](int) { asked_to_stop = 1; };
  sigaction(SIGTERM, &stop, nullptr);
  sigaction(SIGINT, &stop, nullptr);
  sigset_t stops;
  sigemptyset(&stops);
  sigaddset(&stops, SIGTERM);
  sigaddset(&stops, SIGINT);
  sigprocmask(SIG_BLOCK, &stops, nullptr);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGHUP, SIG_IGN);
}

}  // namespace
}  // namespace holdfast::keeper

int main(int argc, char** argv) {
  if (argc != 3 || std::strcmp(argv[1], "--socket") != 0) {
    std::fprintf(stderr, "usage: holdfast-keeper --socket PATH\n");
    return 2;
  }
  holdfast::keeper::set_up_process();
  holdfast::keeper::Keeper keeper;
  return keeper.run(argv[2]);
}
