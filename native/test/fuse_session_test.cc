// The FUSE connection of an engine that is killed: for those who write to it that is a pause. Needs root.
#include "io/fuse_session.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <new>
#include <string>
#include <vector>

#include "core/plain_volume.h"
#include "io/worker.h"

namespace holdfast::test {
namespace {

constexpr uint64_t kSize = 64u << 20;
constexpr size_t kWrite = 1u << 20;
constexpr int kWriters = 4;

// Takes everything and keeps nothing.
class Sink final : public PlainVolume {
 public:
  void submit(VolumeRequest* request) override {
    auto* answer = new (request->scratch) Answer;
    static_assert(sizeof(Answer) <= sizeof request->scratch);
    answer->request = request;
    answer->run = [](Task* self) {
      VolumeRequest* done = static_cast<Answer*>(self)->request;
      done->done(done, 0);
    };
    Executor::current()->post(answer);
  }

 private:
  struct Answer : Task {
    VolumeRequest* request = nullptr;
  };
};

struct Shared {
  std::atomic<uint64_t> written{0};
  std::atomic<uint64_t> failed{0};
  std::atomic<bool> stop{false};
};

// An engine's process, until it is killed.
[[noreturn]] void serve(int fuse_fd, bool successor) {
  Result<std::unique_ptr<Worker>> worker = Worker::start(0);
  if (!worker.ok()) _exit(1);
  FuseAgreement agreement;
  agreement.can_resend = 1;
  Result<std::unique_ptr<FuseSession>> session =
      FuseSession::adopt({worker.value->get()}, kSize, {fuse_fd}, -1, agreement);
  if (!session.ok()) _exit(1);
  Sink sink;
  (*session)->start(&sink, FuseSession::Mode::kServe);
  if (successor && !(*session)->resend().ok()) _exit(1);
  for (;;) pause();
}

[[noreturn]] void write_all_the_time(const std::string& path, Shared& shared) {
  const int fd = open(path.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC);
  void* data = mmap(nullptr, kWrite, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (fd < 0 || data == MAP_FAILED) {
    shared.failed++;
    _exit(1);
  }
  while (!shared.stop) {
    if (pwrite(fd, data, kWrite, 0) == ssize_t{kWrite}) shared.written++;
    else shared.failed++;
  }
  _exit(0);
}

TEST(FuseSession, AnEngineKilledWhileTheKernelCopiesARequestToItLosesNone) {
  ASSERT_EQ(geteuid(), 0u) << "this test mounts a FUSE file system: run it as root";
  const int fuse_fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
  ASSERT_GE(fuse_fd, 0);
  std::string path = (std::filesystem::temp_directory_path() / "holdfast-fuse-XXXXXX").string();
  const int point = mkstemp(path.data());
  ASSERT_GE(point, 0);
  close(point);
  const std::string options =
      "fd=" + std::to_string(fuse_fd) + ",rootmode=100600,user_id=0,group_id=0,max_read=1048576";
  ASSERT_EQ(mount("holdfast-test", path.c_str(), "fuse", MS_NOSUID | MS_NODEV, options.c_str()), 0);
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto& shared = *new (memory) Shared;

  const auto start = [&](auto&& body) {
    const pid_t pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      body();
    }
    return pid;
  };
  const auto end = [](pid_t pid) {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  };
  pid_t engine = start([&] { serve(fuse_fd, false); });
  std::vector<pid_t> writers;
  for (int i = 0; i < kWriters; i++) {
    writers.push_back(start([&] {
      close(fuse_fd);
      write_all_the_time(path, shared);
    }));
  }
  for (int round = 0; round < 150; round++) {
    // Each engine's buffers are new: soon after its start most of what it reads goes where no page is yet.
    const uint64_t before = shared.written;
    for (int i = 0; i < 40'000 && shared.written == before; i++) usleep(50);
    usleep(static_cast<useconds_t>(round * 37 % 2000));
    end(engine);
    engine = start([&] { serve(fuse_fd, true); });
  }
  shared.stop = true;
  for (pid_t writer : writers) waitpid(writer, nullptr, 0);
  EXPECT_EQ(shared.failed, 0u) << "of " << shared.written << " writes";
  EXPECT_GT(shared.written, 100u);
  umount2(path.c_str(), MNT_DETACH);
  end(engine);
  close(fuse_fd);
  munmap(memory, sizeof(Shared));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace holdfast::test
