// A disk that forgets: the fault model of the crash test (STYLE: written down at the top).
//
//   - Requests complete in any order, when the simulation says so, and some reads very late. Writes in flight have no order
//     among each other.
//   - A completed write is in the volatile cache. It is durable only by FUA, or by a flush submitted after its
//     completion. A flush promises nothing about writes that were still in flight when it was submitted.
//   - A power cut decides for each 4 KiB block on its own which of its versions since the last durable one survives,
//     the durable one included, those of writes in flight included. In pages (the metadata areas) each 512-byte sector
//     decides for itself, so they tear, and at times each 64 bytes do: most of what changes in a page lies in its first
//     sector, and the format promises to notice any tear. Data blocks do not tear (data has no checksum, and devices
//     write 4 KiB whole).
//   - The cache may have written back anything before: a version that survives needs no flush.
//   - A discarded block reads as what it was, as zeros or as garbage, until it is written.
//   - How likely a page is to tear, and whether everything, nothing or anything survives, is drawn for each cut.
//   - A failed write, or one whose process was killed, may have been carried out in part, or whole; a page may be torn
//     by it, too. A failed flush may have flushed. Writes to pages may fail more often than the rest, so that a flush
//     gets past its data and fails at its pages.
//   - A crash can be aimed: the fuse blows after so many page writes, flushes and discards, between the submission of one
//     and its completion or right after that, and the simulation crashes there.
//   - Data blocks that were never written read as garbage that names them, never as zeros.
//
// Not thread-safe. Contents are kept small: a block that repeats one 8-byte word costs that word.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "block_device.h"
#include "format.h"

namespace holdfast {

// xoshiro-like small generator: the same seed gives the same run on every machine.
class SimRandom {
 public:
  explicit SimRandom(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }
  bool chance(uint32_t per_mille) { return next() % 1000 < per_mille; }

 private:
  uint64_t state_;
};

class SimDisk final : public BlockDevice {
 public:
  // `is_page(block)`: whether this 4 KiB block is metadata (zero when never written, tears) or data.
  SimDisk(uint64_t size_bytes, uint64_t seed, std::function<bool(uint64_t block)> is_page);
  uint64_t size_bytes() const override { return size_bytes_; }
  void submit(IoRequest* request) override;

  size_t in_flight() const { return flights_.size(); }
  // Completes one request, chosen at random; done() runs inside.
  void complete_one();
  // Per mille of requests that fail from now on, and of writes to pages.
  void set_errors(uint32_t per_mille, uint32_t page_writes) {
    errors_ = per_mille;
    page_errors_ = page_writes;
  }
  void set_errors(uint32_t per_mille) { set_errors(per_mille, per_mille); }
  // The fuse: blown after `events` submissions and completions of page writes, flushes and discards, and of data writes
  // if they count too; 0 takes it out.
  void set_fuse(uint32_t events, bool data_writes = false) {
    fuse_ = events;
    fuse_data_ = data_writes;
    blown_ = false;
  }
  bool fuse_blown() const { return blown_; }
  // Per mille of reads that stay in flight for long, while others overtake them.
  void set_slow_reads(uint32_t per_mille) { slow_reads_ = per_mille; }
  // Called with each request as it is submitted.
  void set_watcher(std::function<void(const IoRequest&)> watcher) { watcher_ = std::move(watcher); }
  // The process that submitted is dead: each write in flight lands or does not, and from now on every request fails
  // without effect, until revive().
  void kill();
  void revive() { dead_ = false; }
  // Power: what is not durable is decided, as above. In flight must be nothing that lives (kill() first).
  void cut_power();

  // What a read would see now. For checks from outside.
  void peek(uint64_t offset, void* to, size_t length) const;
  // What is certain to be there after a power cut, unless something newer is.
  void peek_durable(uint64_t offset, void* to, size_t length) const;
  // Durably, at once. For setting things up from outside.
  void poke(uint64_t offset, const void* from, size_t length);

 private:
  struct Content {
    uint64_t word = 0;  // repeated, if `bytes` is null
    std::shared_ptr<std::byte[]> bytes;
  };
  struct Version {
    uint64_t sequence;
    Content content;
  };
  struct Block {
    Content durable;
    std::vector<Version> versions;  // oldest first
  };
  struct Flight {
    IoRequest* request;
    uint64_t sequence;  // of the last applied write when this was submitted
    uint64_t due;       // not before so many requests have been completed, unless nothing else is in flight
  };
  static Content content_of(const std::byte* memory);
  static void render(const Content& content, std::byte* to);
  Content untouched(uint64_t block) const;
  Block& block_at(uint64_t block);
  void apply(uint64_t block, Content content, bool durable);
  void carry_out(const IoRequest& request, uint64_t submitted, uint32_t partly);
  bool is_page_write(const IoRequest& request) const {
    return request.op == IoOp::kWrite && is_page_(request.offset / format::kBlockSize);
  }
  // Where what is durable, or what the map says, may change.
  bool is_boundary(const IoRequest& request) const {
    return is_page_write(request) || request.op == IoOp::kFlush || request.op == IoOp::kDiscard ||
           (fuse_data_ && request.op == IoOp::kWrite);
  }
  void boundary();
  uint32_t tear_unit() { return random_.chance(500) ? 512 : 64; }

  uint64_t size_bytes_;
  SimRandom random_;
  std::function<bool(uint64_t)> is_page_;
  std::map<uint64_t, Block> blocks_;
  std::vector<uint64_t> unsettled_;  // blocks with versions
  std::vector<Flight> flights_;
  uint64_t sequence_ = 1;
  uint32_t errors_ = 0;
  uint32_t page_errors_ = 0;
  uint32_t slow_reads_ = 0;
  uint64_t completed_ = 0;
  uint32_t fuse_ = 0;
  bool fuse_data_ = false;
  bool blown_ = false;
  std::function<void(const IoRequest&)> watcher_;
  bool dead_ = false;
};

}  // namespace holdfast
