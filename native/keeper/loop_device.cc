// See loop_device.h.
#include "loop_device.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace holdfast::keeper {

namespace {

constexpr unsigned kLoopMajor = 7;
constexpr int kBusyTries = 15;  // x 100 ms: what scans new devices opens them for a moment

void pause_ms(long ms) {
  timespec wait{ms / 1000, ms % 1000 * 1'000'000};
  nanosleep(&wait, nullptr);
}

// Opens /dev/loop<number>, making the node where nobody else does (containers have a /dev of their own).
int open_loop(int number, int flags) {
  char path[64];
  std::snprintf(path, sizeof path, "/dev/loop%d", number);
  int fd = open(path, flags | O_CLOEXEC);
  if (fd < 0 && errno == ENOENT) {
    if (mknod(path, S_IFBLK | 0660, makedev(kLoopMajor, unsigned(number))) != 0 && errno != EEXIST) return -1;
    fd = open(path, flags | O_CLOEXEC);
  }
  return fd;
}

bool write_setting(int number, const char* setting, const char* value) {
  char path[128];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/queue/%s", number, setting);
  const int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool ok = write(fd, value, std::strlen(value)) == ssize_t(std::strlen(value));
  close(fd);
  return ok;
}

template <size_t kSize>
void read_setting(int number, const char* setting, char (&value)[kSize]) {
  value[0] = 0;
  char path[128];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/queue/%s", number, setting);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  char text[256];
  const ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  if (length <= 0) return;
  text[length] = 0;
  // The one that is chosen stands in brackets, as in "none [mq-deadline]".
  const char* begin = std::strchr(text, '[');
  const char* end = begin != nullptr ? std::strchr(begin, ']') : nullptr;
  if (end != nullptr) {
    ++begin;
  } else {
    begin = text;
    end = text + std::strcspn(text, "\n");
  }
  const size_t size = size_t(end - begin);
  if (size >= kSize) return;
  std::memcpy(value, begin, size);
  value[size] = 0;
}

bool write_async_depth(int number, const char* value) {
  return write_setting(number, "iosched/async_depth", value) || write_setting(number, "async_depth", value);
}

LoopQueue read_queue(int number) {
  LoopQueue queue{};
  read_setting(number, "scheduler", queue.scheduler);
  read_setting(number, "nr_requests", queue.nr_requests);
  read_setting(number, "iosched/async_depth", queue.async_depth);
  if (queue.async_depth[0] == 0) read_setting(number, "async_depth", queue.async_depth);
  read_setting(number, "rq_affinity", queue.rq_affinity);
  read_setting(number, "nomerges", queue.nomerges);
  return queue;
}

// As far as the kernel takes them. The scheduler first: it brings depths of its own.
void write_queue(int number, const LoopQueue& queue) {
  if (queue.scheduler[0] != 0) write_setting(number, "scheduler", queue.scheduler);
  if (queue.nr_requests[0] != 0) write_setting(number, "nr_requests", queue.nr_requests);
  if (queue.async_depth[0] != 0) write_async_depth(number, queue.async_depth);
  if (queue.rq_affinity[0] != 0) write_setting(number, "rq_affinity", queue.rq_affinity);
  if (queue.nomerges[0] != 0) write_setting(number, "nomerges", queue.nomerges);
}

// To change the scheduler the kernel waits for what is under way, and lets nothing new in meanwhile: not where somebody
// has the device open still and waits for writes that are held.
bool is_idle(int number) {
  char path[128];
  std::snprintf(path, sizeof path, "/sys/block/loop%d/inflight", number);
  FILE* file = std::fopen(path, "re");
  if (file == nullptr) return false;
  unsigned reads = 1;
  unsigned writes = 1;
  const int read = std::fscanf(file, "%u %u", &reads, &writes);
  std::fclose(file);
  return read == 2 && reads == 0 && writes == 0;
}

bool label_is(const loop_info64& info, const char* label) {
  return std::strncmp(reinterpret_cast<const char*>(info.lo_file_name), label, LO_NAME_SIZE - 1) == 0;
}

}  // namespace

int attach_loop(int mount_fd, const KeeperAttach& wanted, int* number, LoopQueue* found, char* note,
                uint32_t note_size) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", mount_fd);
  const bool read_only = wanted.read_only != 0;
  const int file = open(path, (read_only ? O_RDONLY : O_RDWR) | O_DIRECT | O_CLOEXEC);
  if (file < 0) return errno;
  const int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
  if (control < 0) {
    const int error = errno;
    close(file);
    return error;
  }
  int error = EBUSY;
  for (int attempt = 0; attempt < 64 && error == EBUSY; ++attempt) {
    const int free_number = ioctl(control, LOOP_CTL_GET_FREE);
    if (free_number < 0) {
      error = errno;
      break;
    }
    const int loop = open_loop(free_number, O_RDWR);
    if (loop < 0) {
      error = errno;
      break;
    }
    loop_config config{};
    config.fd = uint32_t(file);
    config.block_size = wanted.sector_size;
    config.info.lo_flags = LO_FLAGS_DIRECT_IO | (read_only ? uint32_t(LO_FLAGS_READ_ONLY) : 0u);
    std::snprintf(reinterpret_cast<char*>(config.info.lo_file_name), LO_NAME_SIZE, "%s", wanted.label);
    error = ioctl(loop, LOOP_CONFIGURE, &config) == 0 ? 0 : errno;
    if (error == 0) *number = free_number;
    close(loop);
    if (error == EBUSY) pause_ms(attempt);
  }
  close(control);
  close(file);
  if (error != 0) return error;

  *found = read_queue(*number);
  // With `none` held writes would take every tag and stop reads too.
  const bool scheduler = write_setting(*number, "scheduler", "mq-deadline");
  char text[16];
  std::snprintf(text, sizeof text, "%u", wanted.requests);
  const bool requests = write_setting(*number, "nr_requests", text);
  std::snprintf(text, sizeof text, "%u", wanted.async_depth);
  const bool depth = write_async_depth(*number, text);
  // Completed among the CPUs that share a cache (1), requests end on the engine's CPU. With 2 each is an interrupt for
  // the CPU that asked, which costs reads at depth 32 a tenth; docs/benchmarks.md has the comparisons. Only speed hangs
  // on this and the next: a kernel that refuses is as right.
  [[maybe_unused]] const bool affinity = write_setting(*number, "rq_affinity", "1");
  // Whoever could merge sends large requests already; looking for neighbours costs each small one some CPU.
  [[maybe_unused]] const bool merges = write_setting(*number, "nomerges", "1");
  note[0] = 0;
  if (!scheduler || !requests || !depth) {
    std::snprintf(note, note_size,
                  "/sys/block/loop%d/queue could not be set (%s%s%s): while writes are held, reads may wait with them; "
                  "give the keeper a writable /sys and the kernel mq-deadline",
                  *number, scheduler ? "" : " scheduler=mq-deadline", requests ? "" : " nr_requests",
                  depth ? "" : " async_depth");
  }
  return 0;
}

int resize_loop(int mount_fd, const KeeperLoop& loop) {
  // Older kernels take the size from the inode: have it asked for first.
  struct stat attributes{};
  if (fstat(mount_fd, &attributes) != 0) return errno;
  const int fd = open_loop(loop.number, O_RDONLY);
  if (fd < 0) return errno;
  loop_info64 info{};
  int error = 0;
  if (ioctl(fd, LOOP_GET_STATUS64, &info) != 0) {
    error = errno;
  } else if (!label_is(info, loop.label)) {
    error = ENXIO;
  } else if (ioctl(fd, LOOP_SET_CAPACITY) != 0) {
    error = errno;
  }
  close(fd);
  return error;
}

int detach_loop(const KeeperLoop& loop, const LoopQueue* found) {
  int error = EBUSY;
  for (int attempt = 0; attempt < kBusyTries && error == EBUSY; ++attempt) {
    if (attempt > 0) pause_ms(100);
    const int fd = open_loop(loop.number, O_RDWR | O_EXCL);  // a mount holds it exclusively: EBUSY
    if (fd < 0) {
      error = errno;
      if (error == ENXIO || error == ENODEV) return 0;
      continue;
    }
    loop_info64 info{};
    if (ioctl(fd, LOOP_GET_STATUS64, &info) != 0 || !label_is(info, loop.label)) {
      close(fd);
      return 0;  // not attached any more, or by now somebody else's
    }
    if (fsync(fd) != 0 && loop.ignore_sync == 0) {
      error = errno;
      close(fd);
      return error;
    }
    // Before the number is free: whoever takes it then may set its queue at once.
    const LoopQueue ours = read_queue(loop.number);
    const bool put_back = found != nullptr && is_idle(loop.number);
    if (put_back) write_queue(loop.number, *found);
    if (ioctl(fd, LOOP_CLR_FD) != 0) {
      error = errno == ENXIO ? 0 : errno;
    } else if (ioctl(fd, LOOP_GET_STATUS64, &info) == 0 && label_is(info, loop.label) &&
               (info.lo_flags & LO_FLAGS_AUTOCLEAR) != 0) {
      // With another opener the kernel only marks the device to go away at the last close. Take the mark back then.
      info.lo_flags &= ~uint32_t(LO_FLAGS_AUTOCLEAR);
      ioctl(fd, LOOP_SET_STATUS64, &info);
      error = EBUSY;
    } else {
      error = 0;
    }
    if (error != 0 && put_back) write_queue(loop.number, ours);
    close(fd);
  }
  return error;
}

int find_loop(const char* label, int* number) {
  *number = -1;
  DIR* directory = opendir("/sys/block");
  if (directory == nullptr) return errno;
  while (dirent* entry = readdir(directory)) {
    int candidate = -1;
    if (std::sscanf(entry->d_name, "loop%d", &candidate) != 1) continue;
    char path[128];
    std::snprintf(path, sizeof path, "/sys/block/loop%d/loop/backing_file", candidate);
    if (access(path, F_OK) != 0) continue;  // not attached
    const int fd = open_loop(candidate, O_RDONLY);
    if (fd < 0) continue;
    loop_info64 info{};
    if (ioctl(fd, LOOP_GET_STATUS64, &info) == 0 && label_is(info, label)) *number = candidate;
    close(fd);
    if (*number >= 0) break;
  }
  closedir(directory);
  return 0;
}

}  // namespace holdfast::keeper
