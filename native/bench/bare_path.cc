// The path of a volume's requests without a volume: FUSE session, workers, io_uring and loop device as the engine has them, over a
// device whose blocks stand where the requests ask for them. No map, no gate, no metadata. What a volume loses against this is what
// its map and its safety cost; what this loses against the device is what the path costs, whatever an engine does.
//
//   holdfast-bare-path DEVICE     exports DEVICE until stdin ends; prints the loop device's path
//
// Everything on DEVICE is overwritten by what is written to the loop device.
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/plain_volume.h"
#include "io/fuse_session.h"
#include "io/uring_device.h"
#include "loop_device.h"

namespace holdfast {
namespace {

constexpr unsigned kWorkers = 2;

class BareVolume final : public PlainVolume {
 public:
  explicit BareVolume(BlockDevice& device) : device_(device) {}

  void submit(VolumeRequest* request) override {
    static_assert(sizeof(Io) <= sizeof request->scratch);
    auto* io = new (request->scratch) Io{};
    io->request = request;
    switch (request->op) {
      case VolumeOp::kRead:
      case VolumeOp::kWrite:
        io->iov = {request->buffer, request->length};
        io->io.op = request->op == VolumeOp::kRead ? IoOp::kRead : IoOp::kWrite;
        io->io.fua = request->fua;
        io->io.iov = &io->iov;
        io->io.iov_count = 1;
        break;
      case VolumeOp::kFlush:
        io->io.op = IoOp::kFlush;
        break;
      case VolumeOp::kDiscard:
      case VolumeOp::kWriteZeroes:  // a discarded block may read back as anything: neither is offered
        io->refused.run = [](Task* self) {
          VolumeRequest* refused = static_cast<Refused*>(self)->request;
          refused->done(refused, EINVAL);
        };
        io->refused.request = request;
        Executor::current()->post(&io->refused);
        return;
    }
    io->io.offset = request->offset;
    io->io.length = request->length;
    io->io.done = [](IoRequest* done, int error) {
      VolumeRequest* finished = reinterpret_cast<Io*>(done)->request;
      finished->done(finished, error);
    };
    device_.submit(&io->io);
  }

 private:
  struct Refused : Task {
    VolumeRequest* request = nullptr;
  };
  struct Io {
    IoRequest io;  // first: done() finds the rest by it
    iovec iov;
    VolumeRequest* request;
    Refused refused;
  };
  BlockDevice& device_;
};

int fail(const char* what, const std::string& why) {
  std::fprintf(stderr, "holdfast-bare-path: %s: %s\n", what, why.c_str());
  return 1;
}

// Once requests may come: the kernel answers them with an error when the descriptors go, and nothing here is worth an order.
[[noreturn]] void fail_at_work(const char* what, const std::string& why) { std::_Exit(fail(what, why)); }

int serve(const char* path) {
  const int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
  if (fd < 0) return fail(path, std::strerror(errno));
  uint64_t size = 0;
  if (ioctl(fd, BLKGETSIZE64, &size) != 0) return fail(path, "it is not a block device");
  size = size / 4096 * 4096;
  UringDevice device(fd, size);
  BareVolume volume(device);

  std::vector<std::unique_ptr<Worker>> owned;
  std::vector<Worker*> workers;
  for (unsigned i = 0; i < kWorkers; ++i) {
    Result<std::unique_ptr<Worker>> worker = Worker::start(i, kDefaultPollNs);
    if (!worker.ok()) return fail("a worker", worker.status.message);
    owned.push_back(std::move(*worker));
    workers.push_back(owned.back().get());
  }
  Result<std::unique_ptr<FuseSession>> created = FuseSession::create(workers, size);
  if (!created.ok()) return fail("FUSE", created.status.message);
  FuseSession& session = **created;
  session.start(&volume, FuseSession::Mode::kServe);
  if (!session.wait_agreed(10'000)) fail_at_work("FUSE", "the kernel said nothing for 10 s");

  KeeperLoop loop{};
  std::snprintf(loop.label, sizeof loop.label, "holdfast-bare-path:%d", getpid());
  KeeperAttach attach{};
  std::memcpy(attach.label, loop.label, sizeof attach.label);
  attach.sector_size = kSectorSize;
  attach.requests = kLoopRequests;
  attach.async_depth = kLoopAsyncDepth;
  char note[256];
  keeper::LoopQueue found{};
  int error = keeper::attach_loop(session.mount_fd(), attach, &loop.number, &found, note, sizeof note);
  if (error != 0) fail_at_work("the loop device", std::strerror(error));
  std::printf("/dev/loop%d\n", loop.number);
  std::fflush(stdout);

  char ignored[64];
  while (read(STDIN_FILENO, ignored, sizeof ignored) > 0) {
  }
  error = keeper::detach_loop(loop, &found);
  if (error != 0) fail_at_work("the loop device stays", std::strerror(error));
  session.stop_reading();
  if (!session.wait_idle(10'000)) fail_at_work("FUSE", "requests do not end");
  session.shut_down();
  return 0;
}

}  // namespace
}  // namespace holdfast

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "Usage: holdfast-bare-path DEVICE\n");
    return 2;
  }
  return holdfast::serve(argv[1]);
}
