// The devices that the control plane's tests and tools rest on: what is not flushed is lost, and faults are as told.
#include "core/sync_device.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "core/pages.h"
#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using Fault = MemoryDisk::Fault;
using Op = MemoryDisk::Op;

PageBuffer filled(int value, size_t bytes = 4096) {
  PageBuffer buffer(bytes);
  std::memset(buffer.data(), value, bytes);
  return buffer;
}

int first_byte(MemoryDisk& device, uint64_t offset) { return std::to_integer<int>(*device.raw(offset)); }

TEST(MemoryDisk, APowerCutTakesWhatWasNotFlushedAndNothingElse) {
  MemoryDisk device(1u << 20);
  const PageBuffer one = filled(1), two = filled(2), three = filled(3);
  ASSERT_OK(device.write(0, one.data(), 4096));
  ASSERT_OK(device.flush());
  ASSERT_OK(device.write(0, two.data(), 4096));
  ASSERT_OK(device.write(4096, two.data(), 4096));
  ASSERT_OK(device.write_durable(8192, three.data(), 4096));
  ASSERT_OK(device.write(12288, two.data(), 4096));
  device.power_cut([](uint64_t page) { return page == 12288; });
  EXPECT_EQ(first_byte(device, 0), 1);
  EXPECT_EQ(first_byte(device, 4096), 0);
  EXPECT_EQ(first_byte(device, 8192), 3);
  EXPECT_EQ(first_byte(device, 12288), 2);
}

TEST(MemoryDisk, FaultsAreWhatTheyAreCalled) {
  MemoryDisk device(1u << 20);
  const PageBuffer one = filled(1);
  Fault next = Fault::kError;
  device.set_faults([&](Op op, uint64_t, uint64_t) { return op == Op::kWrite ? next : Fault::kNone; });
  EXPECT_TRUE(has_code(device.write(0, one.data(), 4096), Code::kIo, "write of 4096 bytes at 0 on memory failed"));
  EXPECT_EQ(first_byte(device, 0), 0);
  next = Fault::kErrorAfter;
  EXPECT_TRUE(has_code(device.write(0, one.data(), 4096), Code::kIo));
  EXPECT_EQ(first_byte(device, 0), 1);
  next = Fault::kLost;
  EXPECT_OK(device.write(4096, one.data(), 4096));
  EXPECT_EQ(first_byte(device, 4096), 0);
  next = Fault::kTorn;
  EXPECT_OK(device.write(8192, one.data(), 4096));
  EXPECT_EQ(first_byte(device, 8192 + 2047), 1);
  EXPECT_EQ(first_byte(device, 8192 + 2048), 0);
}

TEST(MemoryDisk, RefusesWhatIsPastTheEnd) {
  MemoryDisk device(1u << 20);
  PageBuffer buffer(8192);
  EXPECT_TRUE(has_code(device.read((1u << 20) - 4096, buffer.data(), 8192), Code::kIo, "past the end"));
  EXPECT_TRUE(has_code(device.write(1u << 20, buffer.data(), 4096), Code::kIo, "past the end"));
}

TEST(FdDevice, WritesReadsZeroesAndDiscardsAnImageFile) {
  char directory[] = "/tmp/holdfast-fd-XXXXXX";
  ASSERT_NE(::mkdtemp(directory), nullptr);
  const std::string path = std::string(directory) + "/image";
  const int fd = ::open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::ftruncate(fd, (1 << 20) + 100), 0);
  ::close(fd);
  {
    Result<std::unique_ptr<FdDevice>> opened = FdDevice::open(path, FdDevice::Mode::kWrite);
    ASSERT_OK(opened);
    FdDevice& device = **opened;
    EXPECT_FALSE(device.is_block_device());
    EXPECT_EQ(device.size_bytes(), 1u << 20) << "a rest smaller than a page is not used";
    const PageBuffer seven = filled(7, 65536);
    PageBuffer back(65536);
    EXPECT_OK(device.write(0, seven.data(), 65536));
    EXPECT_OK(device.write_durable(65536, seven.data(), 65536));
    EXPECT_OK(device.flush());
    EXPECT_OK(device.read(65536, back.data(), 65536));
    EXPECT_EQ(std::memcmp(back.data(), seven.data(), 65536), 0);
    EXPECT_OK(device.zero(4096, 65536));
    EXPECT_OK(device.read(0, back.data(), 65536));
    EXPECT_EQ(std::to_integer<int>(back.data()[4095]), 7);
    EXPECT_TRUE(is_zero(back.data() + 4096, 65536 - 4096));
    EXPECT_OK(device.discard(65536, 65536));
    EXPECT_TRUE(has_code(device.read(1u << 20, back.data(), 4096), Code::kIo, "past the end"));
  }
  EXPECT_TRUE(has_code(FdDevice::open(directory, FdDevice::Mode::kRead), Code::kInvalidArgument, "neither"));
  ::unlink(path.c_str());
  EXPECT_TRUE(has_code(FdDevice::open(path, FdDevice::Mode::kRead), Code::kNotFound, path));
  ::rmdir(directory);
}

}  // namespace
}  // namespace holdfast::test
