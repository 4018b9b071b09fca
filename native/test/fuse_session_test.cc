// The FUSE connection of an engine that is killed: for those who write to it that is a pause. Needs root.
#include "io/fuse_session.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <new>
#include <string>
#include <thread>
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

// Answers its first kBurst requests in one go, once all of them are there; later ones right away.
class Burst final : public PlainVolume {
 public:
  static constexpr int kBurst = 16;
  static constexpr int kBeforeLooking = kTurnBytes / 4096;

  void submit(VolumeRequest* request) override {
    if (arrived_++ >= kBurst) {
      if (answered_at_newcomer < 0) answered_at_newcomer = answered_;
      return later_.submit(request);
    }
    first_[arrived_ - 1].volume = this;
    first_[arrived_ - 1].request = request;
    first_[arrived_ - 1].complete = [](Completion* self, int, uint32_t) {
      auto* one = static_cast<First*>(self);
      one->volume->answer(one->request);
    };
    if (arrived_ < kBurst) return;
    for (First& one : first_) io_uring_prep_nop(Worker::current()->sqe(&one));
  }

  int answered_at_newcomer = -1;   // of the burst, when the first of the later requests came; the worker's until it ends
  std::atomic<int> coming{0};      // later requests that are about to be made

 private:
  struct First : Completion {
    Burst* volume = nullptr;
    VolumeRequest* request = nullptr;
  };

  void answer(VolumeRequest* request) {
    if (++answered_ == kBeforeLooking) {
      // Those who have their answer are about to ask again, and get the time to.
      for (int i = 0; i < 5000 && coming < kBeforeLooking - 1; i++) usleep(1000);
      usleep(20'000);
    }
    request->done(request, 0);
  }

  First first_[kBurst];
  int arrived_ = 0;
  int answered_ = 0;
  Sink later_;
};

// The session's one file, for reading.
int open_file(const FuseSession& session, int flags = 0) {
  const std::string path = "/proc/self/fd/" + std::to_string(session.mount_fd());
  return open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
}

// Answers at the end of a turn, or, while it holds, when it is told to.
class Held final : public PlainVolume {
 public:
  void submit(VolumeRequest* request) override {
    if (!hold) return now_.submit(request);
    requests_.push_back(request);
    held = requests_.size();
  }
  void let_go() {  // on the worker
    hold = false;
    for (VolumeRequest* request : requests_) now_.submit(request);
    requests_.clear();
  }
  std::atomic<bool> hold{false};
  std::atomic<size_t> held{0};

 private:
  std::vector<VolumeRequest*> requests_;
  Sink now_;
};

// A worker that polls for at most `poll_ns`, and readers of its one file. With a minute, no wait is long and no CPU crowded,
// however busy the machine is.
struct Polled {
  std::unique_ptr<Worker> worker;
  Held volume;
  std::unique_ptr<FuseSession> session;
  int file = -1;
  pid_t thread = 0;
  std::vector<std::thread> readers;
  std::atomic<int> failed{0};

  explicit Polled(uint64_t poll_ns) {
    Result<std::unique_ptr<Worker>> started = Worker::start(0, poll_ns);
    HF_ASSERT(started.ok());
    worker = std::move(*started);
    Result<std::unique_ptr<FuseSession>> created = FuseSession::create({worker.get()}, kSize);
    HF_ASSERT(created.ok());
    session = std::move(*created);
    session->start(&volume, FuseSession::Mode::kServe);
    HF_ASSERT(session->wait_agreed(10'000));
    file = open_file(*session, O_DIRECT);
    HF_ASSERT(file >= 0);
    run_on(*worker, [&] { thread = gettid(); });
  }
  ~Polled() {
    let_go();
    close(file);
    session->shut_down();
  }
  void read_blocks(int count, useconds_t pause_us = 0) {
    void* block = std::aligned_alloc(4096, 4096);
    for (int i = 0; i < count; i++) {
      failed += pread(file, block, 4096, 0) != 4096;
      usleep(pause_us);
    }
    std::free(block);
  }
  // So many requests are under way and stay it.
  void hold(size_t count) {
    volume.held = 0;
    volume.hold = true;
    for (size_t i = 0; i < count; i++) readers.emplace_back([this] { read_blocks(1); });
    while (volume.held < count) usleep(100);
  }
  void let_go() {
    run_on(*worker, [&] { volume.let_go(); });
    for (std::thread& reader : readers) reader.join();
    readers.clear();
  }
  // How often the worker has gone to sleep.
  long sleeps() {
    rusage usage{};
    run_on(*worker, [&] { getrusage(RUSAGE_THREAD, &usage); });
    return usage.ru_nvcsw;
  }
  // Whether it comes to be seen asleep (or awake) a hundred times in a row, within some seconds.
  bool stays(bool asleep) const {
    const std::string path = "/proc/self/task/" + std::to_string(thread) + "/stat";
    int in_a_row = 0;
    for (int i = 0; i < 4000 && in_a_row < 100; i++) {
      std::ifstream stat(path);
      std::string line;
      std::getline(stat, line);
      in_a_row = (line[line.rfind(')') + 2] == 'S') == asleep ? in_a_row + 1 : 0;
      usleep(1000);
    }
    return in_a_row == 100;
  }
};

constexpr uint64_t kMinuteNs = 60'000'000'000;

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

// Otherwise what is in flight would go round in one lump, and the device be idle while all of it is answered.
TEST(FuseSession, NewRequestsAreTakenInTheMiddleOfManyAnswers) {
  ASSERT_EQ(geteuid(), 0u) << "this test mounts a FUSE file system: run it as root";
  Result<std::unique_ptr<Worker>> worker = Worker::start(0);
  ASSERT_TRUE(worker.ok()) << worker.status.message;
  Burst volume;
  Result<std::unique_ptr<FuseSession>> session = FuseSession::create({worker.value->get()}, kSize);
  ASSERT_TRUE(session.ok()) << session.status.message;
  (*session)->start(&volume, FuseSession::Mode::kServe);
  ASSERT_TRUE((*session)->wait_agreed(10'000));
  const int file = open_file(**session, O_DIRECT);
  ASSERT_GE(file, 0);
  std::atomic<int> failed{0};
  std::vector<std::thread> readers;
  for (int i = 0; i < Burst::kBurst; i++) {
    readers.emplace_back([&, i] {
      void* block = std::aligned_alloc(4096, 4096);
      for (int turn = 0; turn < 2; turn++) {
        if (turn == 1) volume.coming++;
        if (pread(file, block, 4096, i * 4096) != 4096) failed++;
      }
      std::free(block);
    });
  }
  for (std::thread& reader : readers) reader.join();
  close(file);
  EXPECT_EQ(failed, 0);
  EXPECT_GE(volume.answered_at_newcomer, Burst::kBeforeLooking);
  EXPECT_LT(volume.answered_at_newcomer, Burst::kBurst);
  (*session)->shut_down();
}

bool can_poll() { return std::thread::hardware_concurrency() > 1; }

TEST(FuseSession, AWorkerWhoseWaitsAreBriefPollsInsteadOfSleeping) {
  ASSERT_EQ(geteuid(), 0u) << "this test mounts a FUSE file system: run it as root";
  if (!can_poll()) GTEST_SKIP() << "a worker never polls on a single CPU";
  constexpr int kReads = 300;
  const auto slept = [](Polled& one) {
    const long before = one.sleeps();
    one.read_blocks(kReads, 200);
    return one.sleeps() - before;
  };
  Polled never(0);
  EXPECT_GE(slept(never), kReads / 2);
  Polled one(kMinuteNs);
  one.read_blocks(20);
  EXPECT_LT(slept(one), kReads / 10);
  EXPECT_EQ(one.failed + never.failed, 0);
}

TEST(FuseSession, AWorkerThatPollsTakesTasksAndTimers) {
  ASSERT_EQ(geteuid(), 0u) << "this test mounts a FUSE file system: run it as root";
  if (!can_poll()) GTEST_SKIP() << "a worker never polls on a single CPU";
  Polled one(kMinuteNs);
  one.read_blocks(20);
  struct Told : Task {
    std::promise<void> done;
  };
  Told task, timer;
  task.run = timer.run = [](Task* self) { static_cast<Told*>(self)->done.set_value(); };
  ASSERT_TRUE(one.stays(false));
  one.worker->post(&task);
  EXPECT_EQ(task.done.get_future().wait_for(std::chrono::seconds(20)), std::future_status::ready);
  one.read_blocks(1);
  run_on(*one.worker, [&] { one.worker->post_at(&timer, one.worker->now_ns() + 500'000'000); });
  one.read_blocks(1);
  EXPECT_EQ(timer.done.get_future().wait_for(std::chrono::seconds(20)), std::future_status::ready);
}

TEST(FuseSession, AWorkerPollsForFewRequestsOnly) {
  ASSERT_EQ(geteuid(), 0u) << "this test mounts a FUSE file system: run it as root";
  if (!can_poll()) GTEST_SKIP() << "a worker never polls on a single CPU";
  Polled one(kMinuteNs);
  // Waits for a device that were brief.
  for (int i = 0; i < 8; i++) {
    one.hold(1);
    one.let_go();
  }
  one.hold(kPolledRequests);
  EXPECT_TRUE(one.stays(false));
  one.let_go();
  one.hold(kPolledRequests + 1);
  EXPECT_TRUE(one.stays(true));
  one.let_go();
  EXPECT_EQ(one.failed, 0);
}

TEST(FuseSession, AWorkerOfWhichNothingIsAskedSleeps) {
  ASSERT_EQ(geteuid(), 0u) << "this test mounts a FUSE file system: run it as root";
  Polled one(1'000'000);
  one.read_blocks(100);
  EXPECT_TRUE(one.stays(true));
  // Nor does it poll for what turned out to be slow.
  one.hold(1);
  EXPECT_TRUE(one.stays(true));
  one.let_go();
  EXPECT_EQ(one.failed, 0);
}

// The release of a closed file comes while the poll is being removed, which the kernel then does not do.
TEST(FuseSession, ShutsDownWhileARequestComes) {
  ASSERT_EQ(geteuid(), 0u) << "this test mounts a FUSE file system: run it as root";
  Result<std::unique_ptr<Worker>> worker = Worker::start(0);
  ASSERT_TRUE(worker.ok()) << worker.status.message;
  Sink sink;
  for (int round = 0; round < 300; round++) {
    Result<std::unique_ptr<FuseSession>> session = FuseSession::create({worker.value->get()}, kSize);
    ASSERT_TRUE(session.ok()) << session.status.message;
    (*session)->start(&sink, FuseSession::Mode::kServe);
    ASSERT_TRUE((*session)->wait_agreed(10'000));
    const int file = open_file(**session);
    ASSERT_GE(file, 0);
    close(file);
    (*session)->shut_down();
  }
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
