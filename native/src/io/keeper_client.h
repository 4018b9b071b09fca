// The engine's side of the keeper's protocol (keeper_protocol.h). Blocking; control threads only. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/status.h"
#include "io/keeper_protocol.h"

namespace holdfast {

struct KeptEntry {
  std::string blob;
  std::vector<int> fds;  // the receiver's to close
  int64_t flags = 0;
};

class KeeperClient {
 public:
  static Result<std::unique_ptr<KeeperClient>> connect(const std::string& socket_path);
  ~KeeperClient();
  KeeperClient(const KeeperClient&) = delete;
  KeeperClient& operator=(const KeeperClient&) = delete;

  // Replaces the entry. The descriptors are duplicated to the keeper; the caller keeps its own.
  Status put(const std::string& name, const std::string& blob, const std::vector<int>& fds, int64_t flags);
  Status update(const std::string& name, const std::string& blob, int64_t flags);  // kNotFound
  Result<KeptEntry> get(const std::string& name);                                  // kNotFound
  Result<std::vector<std::string>> list();
  Status drop(const std::string& name);

  // Loop devices; each takes as long as the engine takes to answer the kernel. `note`: see KeeperOp::kAttach.
  Result<int> attach(int mount_fd, const KeeperAttach& wanted, std::string* note);
  Status resize(int mount_fd, const KeeperLoop& loop);
  Status detach(const KeeperLoop& loop);  // kBusy
  Result<int> find(const std::string& label);  // -1: none

  // After an error of the calls above: a new connection. What the keeper had may be gone with the old one.
  Status reconnect();

  const std::string& socket_path() const { return socket_path_; }

 private:
  struct Answer {
    KeeperMessage message{};
    std::string blob;
    std::vector<int> fds;
  };
  KeeperClient(int fd, std::string socket_path) : fd_(fd), socket_path_(std::move(socket_path)) {}
  Status lost(const char* what) const;
  Status send(int fd, KeeperOp op, const std::string& name, const std::string& blob, const int* fds, size_t fd_count,
              int64_t argument, uint32_t flags) const;
  Result<Answer> receive(int fd) const;
  // One request and one answer on a connection of its own: these can take long.
  Result<Answer> ask_apart(KeeperOp op, const std::string& blob, const int* fds, size_t fd_count) const;

  std::mutex mutex_;
  int fd_;
  std::string socket_path_;
};

}  // namespace holdfast
