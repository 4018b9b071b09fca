// A small formatted pool in memory, and the few ways in which tests damage and change it.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "core/pages.h"
#include "core/pool.h"
#include "core/records.h"
#include "core/sync_device.h"

namespace holdfast::test {

inline const format::Uuid kPool = {0xaa, 1, 2, 3, 4, 5, 0x46, 7, 0x88, 9, 10, 11, 12, 13, 14, 15};
inline const format::Uuid kStore = {0x51};
inline const format::Uuid kOtherStore = {0x52};
inline constexpr uint64_t kPoolBytes = 256u << 20;

inline testing::AssertionResult is_ok(const Status& status) {
  if (status.ok()) return testing::AssertionSuccess();
  return testing::AssertionFailure() << code_name(status.code) << ": " << status.message;
}
template <typename T>
testing::AssertionResult is_ok(const Result<T>& result) {
  return is_ok(result.status);
}
#define ASSERT_OK(expression) ASSERT_TRUE(::holdfast::test::is_ok(expression))
#define EXPECT_OK(expression) EXPECT_TRUE(::holdfast::test::is_ok(expression))

// Code and sentence together, so that a failing test says what it got.
inline testing::AssertionResult has_code(const Status& status, Code code, const std::string& part = "") {
  if (status.code != code) {
    return testing::AssertionFailure() << code_name(status.code) << " instead of " << code_name(code) << ": "
                                       << status.message;
  }
  if (status.message.find(part) == std::string::npos) {
    return testing::AssertionFailure() << "\"" << status.message << "\" does not say \"" << part << "\"";
  }
  return testing::AssertionSuccess();
}
template <typename T>
testing::AssertionResult has_code(const Result<T>& result, Code code, const std::string& part = "") {
  return has_code(result.status, code, part);
}

inline format::Superblock plan(uint64_t bytes, const std::string& name = "test") {
  Result<format::Superblock> planned = plan_geometry(bytes);
  HF_ASSERT(planned.ok());
  format::Superblock s = *planned;
  s.fencing = format::FencingClass::kLeaseOnly;
  s.renew_interval_ms = 2'000;
  s.lease_ms = 10'000;
  s.created_unix_ms = 1'000;
  HF_ASSERT(set_field(s.name, name) && set_field(s.wwid, "memory:1"));
  return s;
}

class PoolTest : public testing::Test {
 protected:
  void SetUp() override {
    Result<PoolInfo> made = write_pool(device, plan(kPoolBytes), kPool, {});
    ASSERT_OK(made);
    info = *made;
    s = info.superblock;
  }

  // Flips a bit in the middle of the page at `offset`.
  void damage(uint64_t offset) { *device.raw(offset + 2000) ^= std::byte{0x10}; }

  // A slab page as an engine would write it, into one copy.
  void write_slab(uint64_t slab, int copy, format::SlabPage page, uint64_t sequence) {
    const uint64_t address = slab_page_offset(s, slab) + static_cast<uint64_t>(copy) * format::kPageSize;
    seal(page, kPool, address, sequence);
    std::memcpy(device.raw(address), &page, sizeof page);
  }
  void write_slab(uint64_t slab, const format::SlabPage& page, uint64_t sequence) {
    write_slab(slab, 0, page, sequence);
    write_slab(slab, 1, page, sequence);
  }
  static format::SlabPage slab_page(uint64_t layer, uint64_t volume, uint64_t generation, uint64_t epoch = 1) {
    format::SlabPage page;
    make_free_slab_page(&page, generation);
    page.layer_id = layer;
    page.volume_id = volume;
    page.epoch = epoch;
    return page;
  }
  static format::VolumeRecord volume_record(uint64_t id, uint64_t top, uint64_t epoch, format::VolumeState state) {
    format::VolumeRecord record{};
    record.volume_id = id;
    record.state = state;
    record.logical_sector_size = 4096;
    record.size_bytes = 64u << 20;
    record.top_layer_id = top;
    record.epoch = epoch;
    record.host_id = 3;
    record.generation = 5;
    HF_ASSERT(set_field(record.name, "vol-" + std::to_string(id)));
    return record;
  }
  static format::LayerRecord layer_record(uint64_t id, uint64_t parent, uint64_t volume, format::LayerState state) {
    format::LayerRecord record{};
    record.layer_id = id;
    record.parent_layer_id = parent;
    record.volume_id = volume;
    record.size_bytes = 64u << 20;
    record.birth = id;
    record.state = state;
    return record;
  }

  MemoryDisk device{kPoolBytes};
  PoolInfo info;
  format::Superblock s{};
};

}  // namespace holdfast::test
