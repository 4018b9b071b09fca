// Pools on real loop devices: what stands on a device, and every reason to refuse to format or use one. Needs root.
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <fstream>

#include "core/device_identity.h"
#include "core/pool.h"
#include "loop_device.h"
#include "pool_fixture.h"

namespace holdfast::test {
namespace {

using Kind = DeviceInspection::Kind;
using format::FencingClass;

class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "loop devices need root";
    image = directory.path + "/disk";
    make_image(image, kPoolBytes);
  }

  static FormatOptions options(bool force = false) {
    FormatOptions chosen;
    chosen.name = "test";
    chosen.fencing = FencingClass::kLoop;
    chosen.force = force;
    return chosen;
  }

  void overwrite(uint64_t offset, const std::string& bytes) {
    std::fstream file(image, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file << bytes;
    HF_ASSERT(file.flush().good());
  }

  // Unmounts whatever the test does.
  struct Mount {
    Mount(const std::string& device, const std::string& target, const char* type) : at(target) {
      ::mkdir(at.c_str(), 0700);
      mounted = ::mount(device.c_str(), at.c_str(), type, 0, nullptr) == 0;
    }
    ~Mount() {
      if (mounted) ::umount2(at.c_str(), MNT_DETACH);
    }
    std::string at;
    bool mounted;
  };

  TempDirectory directory;
  std::string image;
};

TEST_F(DeviceTest, ABlankDeviceBecomesAPoolThatSaysWhoItIs) {
  const LoopDevice loop(image);
  DeviceInspection found = *inspect_device(loop.path).value;
  EXPECT_EQ(found.kind, Kind::kBlank);
  EXPECT_EQ(found.signature, "");
  EXPECT_EQ(found.size_bytes, kPoolBytes);
  EXPECT_FALSE(found.mounted) << found.in_use_by;
  EXPECT_EQ(found.wwid.rfind("loop:", 0), 0u);
  uint64_t last = 0, of = 0;
  FormatOptions chosen = options();
  chosen.progress = [&](uint64_t done, uint64_t total) {
    last = done;
    of = total;
  };
  const Result<PoolInfo> made = format_device(loop.path, chosen);
  ASSERT_OK(made);
  EXPECT_GT(of, 0u);
  EXPECT_EQ(last, of);
  EXPECT_EQ(made.value->uuid[6] >> 4, 4);
  found = *inspect_device(loop.path).value;
  EXPECT_EQ(found.kind, Kind::kPool);
  ASSERT_TRUE(found.pool.has_value());
  EXPECT_EQ(found.pool->uuid, made.value->uuid);
  const Result<PoolInfo> read = read_pool_at(loop.path);
  ASSERT_OK(read);
  EXPECT_EQ(read.value->wwid, found.wwid);
  EXPECT_TRUE(read.value->warnings.empty());
  EXPECT_EQ(read.value->drain_ms, 0u);
  // The image file itself is the same device by another name.
  EXPECT_EQ(read_pool_at(image).value->uuid, made.value->uuid);
}

TEST_F(DeviceTest, AnExistingPoolIsNeverOverwrittenSilently) {
  const LoopDevice loop(image);
  const format::Uuid first = format_device(loop.path, options()).value->uuid;
  EXPECT_TRUE(has_code(format_device(loop.path, options()), Code::kAlreadyExists, "already holds pool test"));
  EXPECT_EQ(read_pool_at(loop.path).value->uuid, first);
  const Result<PoolInfo> second = format_device(loop.path, options(true));
  ASSERT_OK(second);
  EXPECT_NE(second.value->uuid, first);
}

TEST_F(DeviceTest, ADamagedOrNewerPoolIsNotBlankEither) {
  const LoopDevice loop(image);
  ASSERT_OK(format_device(loop.path, options()));
  overwrite(1'000, "damage");
  overwrite(format::kSuperblockBOffset + 1'000, "damage");
  EXPECT_EQ(inspect_device(loop.path).value->signature, "holdfast (damaged)");
  EXPECT_TRUE(has_code(format_device(loop.path, options()), Code::kAlreadyExists, "can't read"));
  EXPECT_TRUE(has_code(read_pool_at(loop.path), Code::kCorrupt));
}

TEST_F(DeviceTest, UsesSuperblockBAndSaysSo) {
  const LoopDevice loop(image);
  ASSERT_OK(format_device(loop.path, options()));
  overwrite(3'000, "damage");
  const Result<PoolInfo> read = read_pool_at(loop.path);
  ASSERT_OK(read);
  EXPECT_NE(read.value->warnings.at(0).find("superblock A of " + loop.path), std::string::npos);
}

TEST_F(DeviceTest, AFileSystemIsRefusedWithoutForceAndItsSignatureIsGoneAfter) {
  for (const std::string type : {"ext4", "xfs", "btrfs"}) {
    make_image(image, 0);
    make_image(image, 512u << 20);
    const LoopDevice loop(image);
    ASSERT_TRUE(run("mkfs." + type + (type == "ext4" ? " -F " : " -f ") + loop.path)) << type;
    const DeviceInspection found = *inspect_device(loop.path).value;
    EXPECT_EQ(found.kind, Kind::kForeign);
    EXPECT_EQ(found.signature, type);
    EXPECT_TRUE(has_code(format_device(loop.path, options()), Code::kForeignData, type));
    EXPECT_EQ(inspect_device(loop.path).value->signature, type) << "untouched";
    ASSERT_OK(format_device(loop.path, options(true)));
    EXPECT_FALSE(run("blkid -p " + loop.path)) << "a signature is left";
    EXPECT_EQ(inspect_device(loop.path).value->kind, Kind::kPool);
  }
}

TEST_F(DeviceTest, APartitionTableIsForeign) {
  std::string sector(512, '\0');
  // One Linux partition of 64 MiB from sector 2048, and the signature of the table.
  const std::string entry("\x00\x20\x21\x00\x83\x28\x20\x08\x00\x08\x00\x00\x00\x00\x02\x00", 16);
  sector.replace(446, entry.size(), entry).replace(510, 2, "\x55\xaa");
  overwrite(0, sector);
  const LoopDevice loop(image);
  EXPECT_EQ(inspect_device(loop.path).value->signature, "dos");
  EXPECT_TRUE(has_code(format_device(loop.path, options()), Code::kForeignData, "dos"));
  ASSERT_OK(format_device(loop.path, options(true)));
  EXPECT_FALSE(run("blkid -p " + loop.path));
}

TEST_F(DeviceTest, DataOfUnknownKindIsForeignWhereverItLies) {
  for (const uint64_t at : {uint64_t{0}, uint64_t{8} << 20, kPoolBytes / 2, kPoolBytes - 4096}) {
    make_image(image, 0);
    make_image(image, kPoolBytes);
    overwrite(at, std::string(300'000 < kPoolBytes - at ? 300'000 : 4096, 'x'));
    const LoopDevice loop(image);
    EXPECT_EQ(inspect_device(loop.path).value->signature, "data") << at;
    EXPECT_TRUE(has_code(format_device(loop.path, options()), Code::kForeignData, "unknown kind"));
  }
}

TEST_F(DeviceTest, AMountedDeviceIsRefusedEvenWithForce) {
  make_image(image, 0);
  make_image(image, 512u << 20);
  const LoopDevice loop(image);
  ASSERT_TRUE(run("mkfs.ext4 -F " + loop.path));
  {
    const Mount mount(loop.path, directory.path + "/mnt", "ext4");
    ASSERT_TRUE(mount.mounted);
    const DeviceInspection found = *inspect_device(loop.path).value;
    EXPECT_TRUE(found.mounted);
    EXPECT_EQ(found.in_use_by, "it is mounted at " + mount.at);
    EXPECT_TRUE(has_code(format_device(loop.path, options(true)), Code::kBusy, mount.at));
    std::ofstream(mount.at + "/file") << "still there";
    EXPECT_TRUE(run("sync -f " + mount.at));
  }
  ASSERT_OK(format_device(loop.path, options(true)));
}

TEST_F(DeviceTest, AnImageWithALoopDeviceOverItIsInUse) {
  const LoopDevice loop(image);
  EXPECT_TRUE(has_code(format_device(image, options(true)), Code::kBusy, loop.path));
}

TEST_F(DeviceTest, ADeviceThatIsTooSmallIsRefusedWithTheMinimumNamed) {
  make_image(image, 0);
  make_image(image, 96u << 20);
  const LoopDevice loop(image);
  EXPECT_TRUE(has_code(format_device(loop.path, options(true)), Code::kTooSmall, "at least 97 MiB"));
}

TEST_F(DeviceTest, OptionsThatCannotBeAreRefusedBeforeAnythingIsTouched) {
  const LoopDevice loop(image);
  const auto with = [&](const std::function<void(FormatOptions&)>& change) {
    FormatOptions chosen = options();
    change(chosen);
    return format_device(loop.path, chosen).status;
  };
  EXPECT_TRUE(
      has_code(with([](auto& o) { o.fencing = FencingClass::kReservations; }), Code::kUnsupported, "not built"));
  EXPECT_TRUE(has_code(with([](auto& o) { o.fencing = FencingClass::kNone; }), Code::kInvalidArgument));
  EXPECT_TRUE(has_code(with([](auto& o) { o.name = ""; }), Code::kInvalidArgument, "name"));
  EXPECT_TRUE(has_code(with([](auto& o) { o.name = std::string(64, 'n'); }), Code::kInvalidArgument, "63"));
  EXPECT_TRUE(has_code(with([](auto& o) { o.name = "a\nb"; }), Code::kInvalidArgument));
  EXPECT_TRUE(has_code(with([](auto& o) { o.lease_ms = 5'999; }), Code::kInvalidArgument, "three"));
  EXPECT_TRUE(has_code(with([](auto& o) { o.renew_interval_ms = 0; }), Code::kInvalidArgument));
  EXPECT_TRUE(has_code(with([](auto& o) { o.uuid = format::Uuid{}; }), Code::kInvalidArgument));
  EXPECT_EQ(inspect_device(loop.path).value->kind, Kind::kBlank);
  EXPECT_TRUE(has_code(format_device(directory.path + "/none", options()), Code::kNotFound));
  EXPECT_TRUE(has_code(format_device(directory.path, options()), Code::kInvalidArgument));
  EXPECT_TRUE(has_code(format_device("/dev/null", options()), Code::kInvalidArgument));
}

TEST_F(DeviceTest, LeaseOnlyTakesTheDrainTimeFromTheDeviceUnlessTold) {
  const LoopDevice loop(image);
  FormatOptions chosen = options();
  chosen.fencing = FencingClass::kLeaseOnly;
  EXPECT_EQ(format_device(loop.path, chosen).value->drain_ms, 5'000u);
  chosen.force = true;
  chosen.drain_ms = 123;
  EXPECT_EQ(format_device(loop.path, chosen).value->drain_ms, 123u);
}

// A copied image is what an array's clone of a disk is: same bytes, another device.
TEST_F(DeviceTest, ACloneOfThePoolsDiskIsRefused) {
  ASSERT_OK(format_device(image, options()));
  const std::string copy = directory.path + "/copy";
  ASSERT_TRUE(run("cp --sparse=always " + image + " " + copy));
  const LoopDevice clone(copy);
  EXPECT_TRUE(has_code(read_pool_at(clone.path), Code::kWrongPool, "clone or a copy"));
  EXPECT_NE(inspect_device(clone.path).value->pool->warnings.at(0).find("clone"), std::string::npos);
  ASSERT_TRUE(run("mv " + image + " " + directory.path + "/moved"));
  EXPECT_OK(read_pool_at(directory.path + "/moved")) << "the same file under another name is the same disk";
}

TEST_F(DeviceTest, APoolThatAFileSystemWasMadeOverIsNotUsedThroughSuperblockB) {
  const LoopDevice loop(image);
  ASSERT_OK(format_device(loop.path, options()));
  ASSERT_TRUE(run("mkfs.ext4 -F -E nodiscard,lazy_itable_init=1,lazy_journal_init=1 " + loop.path));
  // mkfs may wipe copy B or not: in no case is the device ours.
  EXPECT_FALSE(read_pool_at(loop.path).ok());
  EXPECT_EQ(inspect_device(loop.path).value->kind, Kind::kForeign);
  EXPECT_EQ(inspect_device(loop.path).value->signature, "ext4");
}

TEST_F(DeviceTest, ASignatureInAVolumesDataDoesNotMakeThePoolForeign) {
  const LoopDevice loop(image);
  const PoolInfo made = *format_device(loop.path, options()).value;
  ASSERT_TRUE(run("mkfs.ext4 -F " + directory.path + "/fs 64M"));
  ASSERT_TRUE(run("dd conv=notrunc bs=1M if=" + directory.path + "/fs of=" + image +
                  " seek=" + std::to_string(slab_data_offset(made.superblock, 1) >> 20)));
  EXPECT_EQ(inspect_device(loop.path).value->kind, Kind::kPool);
  EXPECT_OK(read_pool_at(loop.path));
}

TEST_F(DeviceTest, APoolWhoseHostsStillRenewCannotBeFormattedEvenWithForce) {
  const LoopDevice loop(image);
  FormatOptions chosen = options(true);
  chosen.renew_interval_ms = 100;
  chosen.lease_ms = 500;
  const format::Superblock s = format_device(loop.path, chosen).value->superblock;
  std::unique_ptr<FdDevice> device = std::move(*FdDevice::open(loop.path, FdDevice::Mode::kWrite));
  PageBuffer page(format::kPageSize);
  std::atomic<bool> stop{false};
  std::thread beating([&] {
    for (uint64_t sequence = 2; !stop.load(); sequence++) {
      auto& beat = page.at<format::HeartbeatPage>();
      beat.host_id = 6;
      beat.state = format::HeartbeatState::kLive;
      beat.generation = 1;
      beat.nonce = sequence;
      HF_ASSERT(set_field(beat.node_name, "node-f"));
      const uint64_t at = heartbeat_offset(s, 6) + sequence % 2 * format::kPageSize;
      seal(beat, s.header.pool, at, sequence);
      HF_ASSERT(device->write_durable(at, page.data(), page.size()).ok());
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const Result<PoolInfo> refused = format_device(loop.path, options(true));
  stop.store(true);
  beating.join();
  EXPECT_TRUE(has_code(refused, Code::kBusy, "node-f"));
  EXPECT_OK(format_device(loop.path, options(true))) << "once it has stopped renewing";
}

TEST_F(DeviceTest, GrowsWithItsDevice) {
  LoopDevice loop(image);
  PoolInfo made = *format_device(loop.path, options()).value;
  ASSERT_EQ(::truncate(image.c_str(), 1 << 30), 0);
  loop.refresh_size();
  std::unique_ptr<FdDevice> device = std::move(*FdDevice::open(loop.path, FdDevice::Mode::kWrite));
  const Result<PoolInfo> grown = grow_pool(*device, made, {});
  ASSERT_OK(grown);
  EXPECT_EQ(grown.value->slab_count, made.slab_count + 48);
  EXPECT_EQ(read_pool_at(loop.path).value->slab_count, grown.value->slab_count);
}

TEST_F(DeviceTest, ALockSaysWhetherItsHolderIsGone) {
  const std::string path = directory.path + "/node";
  EXPECT_TRUE(has_code(lock_is_free(path), Code::kNotFound, "nobody can tell"));
  const LoopDevice loop(image);
  struct stat info {};
  ASSERT_EQ(::stat(loop.path.c_str(), &info), 0);
  ASSERT_EQ(::mknod(path.c_str(), S_IFBLK | 0600, info.st_rdev), 0);
  EXPECT_TRUE(*lock_is_free(path).value);
  const int holder = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(holder, 0);
  ASSERT_EQ(::flock(holder, LOCK_EX), 0);
  EXPECT_FALSE(*lock_is_free(path).value);
  const int copy = ::dup(holder);
  ::close(holder);
  EXPECT_FALSE(*lock_is_free(path).value) << "a copy of the descriptor keeps it";
  ::close(copy);
  EXPECT_TRUE(*lock_is_free(path).value);
}

TEST_F(DeviceTest, IdentitiesCompareByDeviceNotByName) {
  const LoopDevice loop(image);
  std::unique_ptr<FdDevice> by_loop = std::move(*FdDevice::open(loop.path, FdDevice::Mode::kRead));
  std::unique_ptr<FdDevice> by_file = std::move(*FdDevice::open(image, FdDevice::Mode::kRead));
  EXPECT_EQ(device_wwid(*by_loop), device_wwid(*by_file));
  EXPECT_TRUE(is_loop_or_file(*by_loop));
  EXPECT_TRUE(device_drain(*by_loop).ms.has_value());
  bool moved = false;
  EXPECT_TRUE(same_wwid("naa.6001", "naa.6001", &moved));
  EXPECT_FALSE(same_wwid("naa.6001", "naa.6002", &moved));
  EXPECT_FALSE(moved);
  EXPECT_TRUE(same_wwid("loop:7@8:1", "loop:7@8:2", &moved));
  EXPECT_TRUE(moved);
}

}  // namespace
}  // namespace holdfast::test
