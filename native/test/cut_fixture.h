// What tests of cuts share: a volume whose chain grows, the books of which slab is which layer's, other volumes on the
// same layers, and the disk for jobs on them.
#pragma once

#include <map>

#include "core/records.h"
#include "core/sync_device.h"
#include "volume_fixture.h"

namespace holdfast::test {

// The bench's disk for jobs on layers, which block.
class BenchDisk final : public SyncDevice {
 public:
  explicit BenchDisk(Bench& bench) : bench_(bench) {}
  uint64_t size_bytes() const override { return bench_.superblock.device_bytes; }
  const std::string& name() const override { return name_; }
  Status read(uint64_t offset, void* buffer, size_t length) override {
    bench_.raw_read(offset, buffer, length);
    return {};
  }
  Status write(uint64_t offset, const void* buffer, size_t length) override {
    bench_.raw_write(offset, buffer, length);
    return {};
  }
  Status write_durable(uint64_t offset, const void* buffer, size_t length) override {
    return write(offset, buffer, length);
  }
  Status flush() override { return {}; }
  Status discard(uint64_t offset, uint64_t length) override {
    // What was there must not be missed by anybody.
    const std::vector<uint8_t> garbage(kBlock, 0xdd);
    for (uint64_t at = 0; at < length; at += kBlock) bench_.raw_write(offset + at, garbage.data(), kBlock);
    return {};
  }
  Status zero(uint64_t, uint64_t) override { return {}; }

 private:
  Bench& bench_;
  std::string name_ = "bench";
};

struct CutBench : Bench {
  explicit CutBench(uint64_t size_bytes = 4 * kMiB, uint64_t stock_slabs = 200, uint64_t seed = 0)
      : Bench(size_bytes, stock_slabs, seed) {
    chunks_per_slab = 8;
  }

  // ---- books, as the metadata service keeps them

  void absorb() {
    for (const auto& one : observer.claimed) books[one.layer][one.slab] = one.generation;
    for (const auto& one : observer.emptied) {
      auto& layer = books[one.layer];
      auto at = layer.find(one.slab);
      if (at != layer.end() && at->second == one.generation) layer.erase(at);
    }
    observer.claimed.clear();
    observer.emptied.clear();
  }
  std::vector<SlabRun> slabs_of(uint64_t layer) {
    absorb();
    std::vector<SlabRun> runs;
    for (const auto& [slab, generation] : books[layer]) runs.push_back({slab, 1, generation});
    return runs;
  }
  std::vector<LayerSpec> with_slabs(std::vector<LayerSpec> layers) {
    for (LayerSpec& layer : layers) layer.slabs = slabs_of(layer.layer_id);
    return layers;
  }

  // ---- cutting

  LayerSpec next_top() const {
    LayerSpec top;
    top.layer_id = spec.layers[0].layer_id + 1;
    top.slot = spec.layers[0].slot + 1;
    top.parent_layer_id = spec.layers[0].layer_id;
    top.birth = spec.layers[0].birth + 1;
    top.size_bytes = spec.size_bytes;
    return top;
  }
  struct Answer {
    bool given = false;
    Status status;
    CutReport report;
  };
  std::unique_ptr<Answer> start_cut(const LayerSpec& top, uint64_t timeout_ns = 1'000'000'000) {
    auto answer = std::make_unique<Answer>();
    volume->cut(top, {"snap-" + std::to_string(top.parent_layer_id), 1234}, timeout_ns,
                [to = answer.get()](Result<CutReport> result) {
                  ASSERT_FALSE(to->given) << "answered twice";
                  to->given = true;
                  to->status = result.status;
                  if (result.ok()) to->report = std::move(*result);
                });
    return answer;
  }
  // The books after a cut that is known to have happened.
  void count_cut(const LayerSpec& top) {
    spec.layers[0].frozen = true;
    spec.layers[0].size_bytes = spec.size_bytes;
    spec.layers.insert(spec.layers.begin(), top);
  }
  Status cut() {
    const LayerSpec top = next_top();
    auto answer = start_cut(top);
    drive();
    EXPECT_TRUE(answer->given) << "cut() never answered";
    if (answer->status.ok()) {
      count_cut(top);
      report = answer->report;
      EXPECT_EQ(report.frozen.layer_id, top.parent_layer_id);
      std::map<uint64_t, uint64_t> told;
      for (const SlabRun& run : report.frozen.slabs) {
        for (uint64_t i = 0; i < run.count; i++) told[run.first + i] = run.generation;
      }
      absorb();
      EXPECT_EQ(told, books[top.parent_layer_id]) << "the report has other slabs than were claimed for the layer";
    }
    return answer->status;
  }
  Status call(const std::function<void(Volume::Done)>& start) {
    Status status{Code::kUnavailable, "never answered"};
    start([&](Status s) { status = std::move(s); });
    drive();
    return status;
  }
  Status hold(uint64_t timeout_ns = 1'000'000'000) {
    return call([&](Volume::Done done) { volume->hold(timeout_ns, std::move(done)); });
  }
  Status release() {
    return call([&](Volume::Done done) { volume->release(std::move(done)); });
  }
  // Opens what the record on the disk says is there: the next grant after whatever has happened.
  Status open_by_record(const LayerSpec& maybe_top) {
    absorb();
    format::VolumeRecord newest{};
    for (uint32_t copy = 0; copy < 2; copy++) {
      const format::VolumeRecord one = record(copy);
      if (verify(one, kPoolUuid, record_address(copy)) != PageState::kOk) continue;
      if (one.header.sequence >= newest.header.sequence) newest = one;
    }
    if (newest.top_layer_id == maybe_top.layer_id && spec.layers[0].layer_id != maybe_top.layer_id) count_cut(maybe_top);
    EXPECT_EQ(newest.top_layer_id, spec.layers[0].layer_id);
    spec.epoch++;
    // Which layer a slab is of, where no report got out: by the pages.
    for (uint64_t slab = 0; slab < 200; slab++) {
      format::SlabPage pair[2] = {page(slab, 0), page(slab, 1)};
      const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab, 0));
      for (auto& [layer, slabs] : books) slabs.erase(slab);
      if (copies.valid() && pair[copies.newest].layer_id != 0) {
        books[pair[copies.newest].layer_id][slab] = pair[copies.newest].generation;
        stock_without(slab);
      }
    }
    spec.layers = with_slabs(spec.layers);
    return open();
  }
  void stock_without(uint64_t slab) {
    const auto all = stock.slabs();
    if (all.count(slab) == 0) return;
    stock.clear();
    for (const auto& [number, generation] : all) {
      if (number != slab) stock.add(number, 1, generation);
    }
  }
  Status reopen() {
    if (Status status = close(); !status.ok()) return status;
    spec.epoch++;
    spec.layers = with_slabs(spec.layers);
    return open();
  }

  // ---- other views of the layers

  // Read-only, of the layers from index `from` of the chain on.
  std::unique_ptr<Volume> view(size_t from) {
    VolumeSpec frozen = spec;
    frozen.read_only = true;
    frozen.layers = with_slabs({spec.layers.begin() + static_cast<ptrdiff_t>(from), spec.layers.end()});
    frozen.size_bytes = frozen.layers[0].size_bytes;
    return open_other(frozen, nullptr);
  }
  std::unique_ptr<Volume> open_other(const VolumeSpec& other, PageArena* pages) {
    VolumeEnvironment e = environment();
    e.arena = pages;
    std::unique_ptr<Volume> opened;
    Volume::open(e, other, false, [&](Result<std::unique_ptr<Volume>> result) {
      EXPECT_TRUE(result.ok()) << result.status.message;
      if (result.ok()) opened = std::move(*result);
    });
    drive();
    return opened;
  }
  void drop(std::unique_ptr<Volume>& other) {
    bool stopped = false;
    other->abort([&](Status) { stopped = true; });
    drive();
    EXPECT_TRUE(stopped);
    other.reset();
  }
  // A request to another volume than the bench's own.
  int run_on(Volume& other, VolumeOp op, uint64_t offset, uint64_t length, std::byte* buffer) {
    VolumeRequest request;
    int error = -1;
    request.op = op;
    request.offset = offset;
    request.length = length;
    request.buffer = buffer;
    request.user = &error;
    request.done = [](VolumeRequest* self, int result) { *static_cast<int*>(self->user) = result; };
    other.submit(&request);
    drive();
    EXPECT_GE(error, 0) << "the request was never answered";
    return error;
  }
  std::vector<uint8_t> blocks_of(Volume& other) {
    const uint64_t size = other.stats().size_bytes;
    PageBuffer buffer(size);
    EXPECT_EQ(run_on(other, VolumeOp::kRead, 0, size, buffer.data()), 0);
    std::vector<uint8_t> blocks;
    for (uint64_t at = 0; at < size; at += kBlock) {
      blocks.push_back(static_cast<uint8_t>(buffer.data()[at]));
      EXPECT_EQ(std::memcmp(buffer.data() + at, buffer.data() + at + 1, kBlock - 1), 0) << "block " << at / kBlock;
    }
    return blocks;
  }
  std::vector<uint8_t> blocks() { return blocks_of(*volume); }
  int write_on(Volume& other, uint64_t offset, uint64_t length, uint8_t fill) {
    PageBuffer buffer(length);
    std::memset(buffer.data(), fill, length);
    return run_on(other, VolumeOp::kWrite, offset, length, buffer.data());
  }
  // Writes, discards and flushes at random, here and in `model`.
  void churn(SimRandom& random, std::vector<uint8_t>& model, int count) {
    for (int i = 0; i < count; i++) {
      const uint64_t first = random.below(model.size());
      const uint64_t length =
          1 + random.below(std::min<uint64_t>(model.size() - first, random.chance(300) ? 80 : 8));
      const auto fill = static_cast<uint8_t>(1 + random.below(250));
      const bool zero = random.chance(400);
      ASSERT_EQ(zero ? discard(first * kBlock, length * kBlock) : write(first * kBlock, length * kBlock, fill), 0);
      std::fill_n(model.begin() + static_cast<ptrdiff_t>(first), length, zero ? uint8_t{0} : fill);
      if (random.chance(80)) {
        ASSERT_EQ(flush(), 0);
      }
    }
  }

  std::map<uint64_t, std::map<uint64_t, uint64_t>> books;  // layer -> slab -> generation
  CutReport report;
};

// A chain of random layers, and what each of them shows.
struct ChainBench : CutBench {
  using CutBench::CutBench;

  // Layers of random writes and discards, each of which shows through those above in part.
  void build(SimRandom& random, size_t frozen, int writes = 30) {
    model.assign(spec.size_bytes / kBlock, 0);
    ASSERT_TRUE(open().ok());
    for (size_t i = 0; i < frozen; i++) {
      churn(random, model, writes);
      const Status status = cut();
      ASSERT_TRUE(status.ok()) << status.message;
      snapshots.push_back(model);
    }
  }
  // What each frozen layer shows, and the volume.
  void expect_same(const std::string& when, size_t named = 100) {
    EXPECT_EQ(blocks(), model) << when;
    for (size_t s = 0; s < std::min(named, snapshots.size()); s++) {
      auto reader = view(spec.layers.size() - 1 - s);
      ASSERT_NE(reader, nullptr);
      EXPECT_EQ(blocks_of(*reader), snapshots[s]) << "snapshot " << s << ", " << when;
      drop(reader);
    }
  }

  std::vector<uint8_t> model;
  std::vector<std::vector<uint8_t>> snapshots;  // oldest first
};

}  // namespace holdfast::test
