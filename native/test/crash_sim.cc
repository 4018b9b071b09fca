// The world of the crash test: see crash_sim.h. The model's rules stand above `Cell`.
#include "crash_sim.h"

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "core/page_arena.h"
#include "core/pages.h"
#include "core/sim_disk.h"
#include "core/sim_executor.h"
#include "volume_fixture.h"

namespace holdfast::test {
namespace {

using format::SlabEntry;
using format::SlabPage;
using format::VolumeRecord;

constexpr uint64_t kOpenEnded = ~uint64_t{0};
constexpr uint32_t kBlocksPerChunk = format::kBlocksPerChunk;

struct Failure {
  std::string what;
};

// One value that a block may hold. Times count the simulation's steps.
//   - A value is *current* unless a later write, begun after this one had ended, was acknowledged.
//   - After a power cut it may still be there unless such a later write was also made durable: by FUA, by a flush begun
//     after it was acknowledged, or by having been read back after an earlier cut.
//   - `maybe`: the write failed or was cut off; it may have happened or not, and supersedes nothing.
struct Candidate {
  uint64_t value = 0;
  uint64_t start = 0;
  uint64_t end = kOpenEnded;
  bool durable = false;
  bool maybe = false;
};
using Cell = std::vector<Candidate>;

struct World;
struct SimVolume;

struct Operation {
  VolumeRequest request;
  std::unique_ptr<PageBuffer> buffer;
  World* world = nullptr;
  SimVolume* volume = nullptr;
  uint64_t id = 0;
  uint64_t start = 0;
  bool lost = false;  // its engine was killed: nobody hears the answer
  bool answered = false;
  std::vector<std::vector<uint64_t>> readable;  // reads: what each block might hold when it began
};

struct FrozenView {
  std::vector<LayerSpec> layers;
  uint64_t size_bytes = 0;
  std::vector<std::vector<uint64_t>> values;  // per block: what it may hold for ever; fixed when read first
};

// A cut of an open volume that has not been answered. Until it is, any value that a block had when it began, or that was
// written since, may be the snapshot's.
struct PendingCut {
  LayerSpec top;
  FrozenView view;
};

struct SimVolume {
  enum class State { kClosed, kOpening, kOpen, kStopping };
  uint64_t id = 0;
  VolumeSpec spec;
  State state = State::kClosed;
  bool must_take_over = false;
  VolumeSpec opened_spec;
  std::unique_ptr<Volume> volume;
  std::unique_ptr<PageBuffer> arena_memory;
  std::unique_ptr<PageArena> arena;
  std::vector<Cell> cells;
  uint64_t flushed_upto = 0;
  uint64_t outstanding = 0;
  uint64_t outstanding_reads = 0;
  uint64_t size_blocks = 0;   // what has been acknowledged
  uint64_t may_be_blocks = 0;  // what a cut-off growth may have made it
  bool growing = false;
  std::vector<FrozenView> frozen;
  std::unique_ptr<PendingCut> cut;
  bool cutting = false;       // the engine lives that was asked
  bool compacting = false;    // likewise
  uint64_t next_layer = 1;
  uint64_t cursor = 0;        // of its sequential stream

  uint64_t take_cursor(uint64_t blocks) {
    const uint64_t at = cursor % size_blocks;
    cursor = at + blocks;
    return at;
  }
};

struct SlabInfo {
  enum class Where { kFree, kStock, kLayer };
  Where where = Where::kFree;
  uint64_t generation = 0;
  uint64_t layer = 0;
};

struct World final : VolumeObserver {
  explicit World(uint64_t seed_, bool verbose_)
      : seed(seed_),
        verbose(verbose_),
        random(seed_),
        superblock(small_superblock(64)),
        disk(superblock.device_bytes, seed_ * 31 + 7, [this](uint64_t block) { return is_page(block * kBlock); }) {}

  bool is_page(uint64_t offset) const {
    return offset < superblock.first_region_offset + format::kRegionPagesSize;
  }

  [[noreturn]] void fail(const std::string& what) const { throw Failure{what}; }
  void log(const char* format, ...) const __attribute__((format(printf, 2, 3))) {
    if (!verbose) return;
    va_list arguments;
    va_start(arguments, format);
    std::fprintf(stderr, "%6llu  ", static_cast<unsigned long long>(now));
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
  }

  // ---- the metadata service, as far as slabs go

  void slab_claimed(uint64_t volume_id, uint64_t layer, uint64_t slab, uint64_t generation) override {
    if (ignoring) return;
    SlabInfo& info = slabs[slab];
    log("volume %llu claims slab %llu generation %llu", (unsigned long long)volume_id, (unsigned long long)slab,
        (unsigned long long)generation);
    if (info.generation != generation) return;  // STALE: changes nothing
    if (info.where == SlabInfo::Where::kLayer && info.layer != layer) fail("a slab was claimed by two layers");
    if (info.where == SlabInfo::Where::kFree) return;
    info.where = SlabInfo::Where::kLayer;
    info.layer = layer;
  }
  void slab_emptied(uint64_t volume_id, uint64_t layer, uint64_t slab, uint64_t generation) override {
    if (ignoring) return;
    SlabInfo& info = slabs[slab];
    log("volume %llu empties slab %llu generation %llu", (unsigned long long)volume_id, (unsigned long long)slab,
        (unsigned long long)generation);
    if (info.generation != generation) return;
    emptied++;
    if (info.where == SlabInfo::Where::kLayer && info.layer != layer)
      fail("a slab was emptied by a layer that had it not");
    info.where = SlabInfo::Where::kFree;
    if (random.chance(500)) grant(slab);  // handed on at once: a late discard would meet its new owner
  }
  void grant(uint64_t slab) {
    SlabInfo& info = slabs[slab];
    info.where = SlabInfo::Where::kStock;
    info.generation++;
    stock.add(slab, 1, info.generation);
  }
  void volume_event(uint64_t volume_id, Code, const std::string& message) override {
    if (ignoring) return;
    log("event of volume %llu: %s", (unsigned long long)volume_id, message.c_str());
    if (!damaged && message.find("is mapped by slab") != std::string::npos)
      fail("a chunk was mapped twice: " + message);
  }
  void refill(uint64_t count) {
    bool any = false;
    for (uint64_t s = 0; s < slab_total && count > 0; s++) {
      const uint64_t slab = (s + now) % slab_total;
      SlabInfo& info = slabs[slab];
      if (info.where != SlabInfo::Where::kFree) continue;
      grant(slab);
      any = true;
      count--;
    }
    if (!any) stock.declare_full();
  }

  // What the agents of the living find out about the slabs of a dead host: by their pages, before anything is granted.
  void sort_slabs_by_pages() {
    for (uint64_t slab = 0; slab < slab_total; slab++) {
      SlabInfo& info = slabs[slab];
      if (info.where != SlabInfo::Where::kStock) continue;
      SlabPage pair[2];
      disk.peek(page_address(slab), pair, sizeof pair);
      const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab));
      info.where = SlabInfo::Where::kFree;
      if (!copies.valid()) continue;
      const SlabPage& page = pair[copies.newest];
      if (page.generation == info.generation && page.layer_id != 0) {
        info.where = SlabInfo::Where::kLayer;
        info.layer = page.layer_id;
      }
    }
  }
  uint64_t page_address(uint64_t slab) const { return format::slab_page_offset(superblock.first_region_offset, slab); }

  std::vector<SlabRun> slabs_of(uint64_t layer) const {
    std::vector<SlabRun> runs;
    for (const auto& [slab, info] : slabs) {
      if (info.where == SlabInfo::Where::kLayer && info.layer == layer) runs.push_back({slab, 1, info.generation});
    }
    return runs;
  }

  // ---- volumes

  void make_volume(uint64_t id) {
    auto one = std::make_unique<SimVolume>();
    one->id = id;
    one->spec.volume_id = id;
    one->spec.slot = static_cast<uint32_t>(id);
    one->spec.name = "v" + std::to_string(id);
    one->size_blocks =
        (8 + random.below(max_chunks - 7)) * kBlocksPerChunk - (random.chance(300) ? random.below(kBlocksPerChunk) : 0);
    one->may_be_blocks = one->size_blocks;
    one->spec.size_bytes = one->size_blocks * kBlock;
    one->spec.host_id = 1;
    one->spec.generation = 1;
    LayerSpec top;
    top.layer_id = id * 100 + one->next_layer++;
    top.slot = static_cast<uint32_t>(id);
    top.birth = 1;
    one->spec.layers.push_back(top);
    one->cells.assign(one->size_blocks, Cell{{0, 0, 0, true, false}});
    one->arena_memory = std::make_unique<PageBuffer>(arena_bytes);
    volumes.push_back(std::move(one));
  }

  void open_volume(SimVolume& one) {
    const bool taking_over = one.must_take_over;
    resolve_cut(one);
    if (taking_over) {
      // The grant may be the one that the killed engine had, or the service may have caught up.
      if (random.chance(500)) one.spec = one.opened_spec;
      else for (LayerSpec& layer : one.spec.layers) layer.slabs = slabs_of(layer.layer_id);
    } else {
      one.spec.epoch++;
      one.spec.size_bytes = one.size_blocks * kBlock;
      for (LayerSpec& layer : one.spec.layers) layer.slabs = slabs_of(layer.layer_id);
    }
    one.opened_spec = one.spec;
    auto arena = taking_over
                     ? PageArena::attach(one.arena_memory->data(), one.arena_memory->size())
                     : PageArena::format(one.arena_memory->data(), one.arena_memory->size(), one.id, one.spec.epoch);
    if (!arena.ok()) fail("the page arena is not usable: " + arena.status.message);
    one.arena = std::move(*arena);
    VolumeEnvironment environment;
    environment.device = &disk;
    environment.pool = kPoolUuid;
    environment.superblock = &superblock;
    environment.stock = &stock;
    environment.observer = this;
    environment.arena = one.arena.get();
    environment.full_timeout_ns = 1'000'000;
    environment.chunks_per_slab = chunks_per_slab;
    one.state = SimVolume::State::kOpening;
    log("open volume %llu, epoch %llu%s", (unsigned long long)one.id, (unsigned long long)one.spec.epoch,
        taking_over ? ", taking over" : "");
    SimVolume* target = &one;
    Volume::open(environment, one.spec, taking_over,
                 [this, target, taking_over](Result<std::unique_ptr<Volume>> result) {
                   opened(*target, taking_over, std::move(result));
                 });
  }
  void opened(SimVolume& one, bool taking_over, Result<std::unique_ptr<Volume>> result) {
    if (ignoring) {
      if (result.ok()) one.volume = std::move(*result);
      return;
    }
    if (!result.ok()) {
      // Only an I/O error excuses. A failed opening leaves the arena as it was found, so a take-over is tried again.
      if (result.status.code != Code::kIo || error_chance == 0)
        fail("volume " + std::to_string(one.id) + ": " + result.status.message);
      log("open failed: %s", result.status.message.c_str());
      one.state = SimVolume::State::kClosed;
      return;
    }
    one.volume = std::move(*result);
    one.state = SimVolume::State::kOpen;
    one.must_take_over = false;
    const uint64_t blocks = one.volume->stats().size_bytes / kBlock;
    if (blocks != one.size_blocks && blocks != one.may_be_blocks) {
      fail("volume " + std::to_string(one.id) + " has a size that nobody gave it");
    }
    one.size_blocks = blocks;
    one.may_be_blocks = blocks;
    one.cells.resize(std::max<size_t>(blocks, one.cells.size()), Cell{{0, 0, 0, true, false}});
    log("volume %llu is open%s", (unsigned long long)one.id, taking_over ? " (taken over)" : "");
  }

  // ---- requests

  Operation& start(SimVolume& one, VolumeOp op, uint64_t block, uint64_t blocks, bool fua) {
    auto owned = std::make_unique<Operation>();
    Operation& o = *owned;
    o.world = this;
    o.volume = &one;
    o.id = ++operation_count;
    o.start = ++now;
    o.request.op = op;
    o.request.fua = fua;
    o.request.offset = block * kBlock;
    o.request.length = blocks * kBlock;
    o.request.user = &o;
    o.request.done = [](VolumeRequest* request, int error) {
      auto* self = static_cast<Operation*>(request->user);
      self->world->answered(*self, error);
    };
    if (op == VolumeOp::kRead || op == VolumeOp::kWrite) {
      o.buffer = std::make_unique<PageBuffer>(blocks * kBlock);
      o.request.buffer = o.buffer->data();
    }
    for (uint64_t i = 0; i < blocks; i++) {
      Cell& cell = one.cells[block + i];
      if (op == VolumeOp::kWrite) {
        const uint64_t value = one.id << 56 | o.id << 24 | (block + i);
        fill(o.buffer->data() + i * kBlock, value);
        cell.push_back({value, o.start, kOpenEnded, false, false});
        if (one.cut != nullptr) one.cut->view.values[block + i].push_back(value);
      } else if (op == VolumeOp::kDiscard || op == VolumeOp::kWriteZeroes) {
        cell.push_back({0, o.start, kOpenEnded, false, false});
        if (one.cut != nullptr) one.cut->view.values[block + i].push_back(0);
      } else if (op == VolumeOp::kRead) {
        o.readable.push_back(current_values(cell, o.start));
      }
    }
    one.outstanding++;
    if (op == VolumeOp::kRead) one.outstanding_reads++;
    log("#%llu volume %llu %s%s blocks %llu+%llu", (unsigned long long)o.id, (unsigned long long)one.id, op_name(op),
        fua ? " fua" : "", (unsigned long long)block, (unsigned long long)blocks);
    operations[&o] = std::move(owned);
    one.volume->submit(&o.request);
    if (o.answered) fail("done() ran inside submit()");
    return o;
  }
  static const char* op_name(VolumeOp op) {
    static const char* const kNames[] = {"read", "write", "flush", "discard", "write zeroes"};
    return kNames[static_cast<int>(op)];
  }
  static void fill(std::byte* memory, uint64_t value) {
    for (size_t at = 0; at < kBlock; at += sizeof value) std::memcpy(memory + at, &value, sizeof value);
  }
  // The word that fills the block. A block that is not filled by one word was put together wrongly.
  uint64_t value_of(const std::byte* memory, uint64_t block) const {
    uint64_t value;
    std::memcpy(&value, memory, sizeof value);
    if (std::memcmp(memory, memory + sizeof value, kBlock - sizeof value) != 0) {
      fail("block " + std::to_string(block) + " is not whole");
    }
    return value;
  }

  static std::vector<uint64_t> current_values(const Cell& cell, uint64_t at) {
    std::vector<uint64_t> values;
    for (const Candidate& c : cell) {
      const bool superseded = std::any_of(cell.begin(), cell.end(), [&](const Candidate& later) {
        return !later.maybe && later.end != kOpenEnded && later.end < at && c.end < later.start;
      });
      if (!superseded) values.push_back(c.value);
    }
    return values;
  }
  static bool is_durable(const Candidate& c, uint64_t flushed_upto) {
    return !c.maybe && c.end != kOpenEnded && (c.durable || c.end < flushed_upto);
  }
  // What is left after the power was cut.
  static Cell after_cut(const Cell& cell, uint64_t flushed_upto) {
    Cell left;
    for (const Candidate& c : cell) {
      const bool superseded = std::any_of(cell.begin(), cell.end(), [&](const Candidate& later) {
        return is_durable(later, flushed_upto) && c.end < later.start;
      });
      if (!superseded) left.push_back(c);
    }
    return left;
  }
  void prune(SimVolume& one, Cell& cell) const {
    if (cell.size() > 4 && one.outstanding_reads == 0) cell = after_cut(cell, one.flushed_upto);
  }

  void answered(Operation& o, int error) {
    if (o.answered) fail("request #" + std::to_string(o.id) + " was answered twice");
    o.answered = true;
    SimVolume& one = *o.volume;
    one.outstanding--;
    if (o.request.op == VolumeOp::kRead) one.outstanding_reads--;
    if (o.lost || ignoring) {
      operations.erase(&o);
      return;
    }
    const uint64_t end = ++now;
    log("#%llu answered %d", (unsigned long long)o.id, error);
    const uint64_t first = o.request.offset / kBlock;
    const uint64_t count = o.request.length / kBlock;
    if (error != 0 && error != EIO && error != ENOSPC) fail("a request got errno " + std::to_string(error));
    if (error == EIO && error_chance == 0 && one.state == SimVolume::State::kOpen) {
      fail("request #" + std::to_string(o.id) + " failed although the disk did not");
    }
    switch (o.request.op) {
      case VolumeOp::kRead:
        if (error != 0) break;
        for (uint64_t i = 0; i < count; i++) {
          const uint64_t value = value_of(o.buffer->data() + i * kBlock, first + i);
          checks++;
          const auto& known = o.readable[i];
          if (std::find(known.begin(), known.end(), value) != known.end()) continue;
          const Cell& cell = one.cells[first + i];
          if (std::any_of(cell.begin(), cell.end(),
                          [&](const Candidate& c) { return c.value == value && c.start > o.start; }))
            continue;
          wrong(one, first + i, value, "read");
        }
        break;
      case VolumeOp::kFlush:
        if (error == 0) one.flushed_upto = std::max(one.flushed_upto, o.start);
        break;
      default:
        for (uint64_t i = 0; i < count; i++) {
          Cell& cell = one.cells[first + i];
          for (Candidate& c : cell) {
            if (c.start != o.start) continue;
            c.end = end;
            c.maybe = error != 0;
            c.durable = error == 0 && o.request.fua;
          }
          prune(one, cell);
        }
        break;
    }
    operations.erase(&o);
  }

  [[noreturn]] void wrong(const SimVolume& one, uint64_t block, uint64_t value, const char* when) const {
    char text[400];
    std::string allowed;
    for (const Candidate& c : one.cells[block]) {
      std::snprintf(text, sizeof text, " %llx[%llu..%lld%s%s]", (unsigned long long)c.value,
                    (unsigned long long)c.start, c.end == kOpenEnded ? -1ll : (long long)c.end,
                    c.durable ? " durable" : "", c.maybe ? " maybe" : "");
      allowed += text;
    }
    std::snprintf(text, sizeof text, "volume %llu block %llu (chunk %llu): %s found %llx, flushed up to %llu, allowed:",
                  (unsigned long long)one.id, (unsigned long long)block, (unsigned long long)block / kBlocksPerChunk,
                  when, (unsigned long long)value, (unsigned long long)one.flushed_upto);
    fail(text + allowed);
  }

  // ---- running

  bool step() {
    const bool tasks = !executor.idle();
    const bool flights = disk.in_flight() > 0;
    if (!tasks && !flights) return false;
    if (tasks && (!flights || random.chance(600))) executor.run_one();
    else disk.complete_one();
    return true;
  }
  void settle() {
    for (uint64_t guard = 0;; guard++) {
      if (guard > 2'000'000) fail("the engine never comes to rest");
      if (step()) continue;
      if (!executor.timers() || all_answered()) return;
      executor.advance(1'000'000);
    }
  }
  bool all_answered() const { return operations.empty(); }

  void random_operation(SimVolume& one) {
    const uint64_t pick = random.below(weight_total);
    uint64_t at = 0;
    const auto chosen = [&](uint64_t weight) { return pick >= at && pick < (at += weight); };
    uint64_t block = random.below(one.size_blocks);
    uint64_t length = 1;
    const uint64_t shape = random.below(10);
    if (shape < 3) length = 1 + random.below(4);
    else if (shape < 6) length = 1 + random.below(2 * kBlocksPerChunk);
    else if (shape < 8) {
      block = block / kBlocksPerChunk * kBlocksPerChunk;
      length = kBlocksPerChunk * (1 + random.below(8));
    } else if (shape == 8) {
      block = hot_chunk % std::max<uint64_t>(1, one.size_blocks / kBlocksPerChunk) * kBlocksPerChunk + random.below(4);
      length = 1 + random.below(6);
      if (block >= one.size_blocks) block = 0;
    } else {
      length = 2 * kBlocksPerChunk;
      block = one.take_cursor(length);
    }
    length = std::min(length, one.size_blocks - block);
    if (chosen(weight_write)) start(one, VolumeOp::kWrite, block, length, random.chance(fua_chance));
    else if (chosen(weight_read)) start(one, VolumeOp::kRead, block, length, false);
    else if (chosen(weight_flush)) start(one, VolumeOp::kFlush, 0, 0, false);
    else {
      if (random.chance(one.spec.layers.size() > 1 ? 60 : wide_discards)) {
        block = random.chance(500) ? 0 : block;
        length = one.size_blocks - block;
      }
      start(one, random.chance(500) ? VolumeOp::kDiscard : VolumeOp::kWriteZeroes, block, length, false);
    }
  }

  std::vector<SimVolume*> in_state(SimVolume::State state) {
    std::vector<SimVolume*> found;
    for (auto& one : volumes) {
      if (one->state == state) found.push_back(one.get());
    }
    return found;
  }
  void wait_for(SimVolume& one) {
    for (uint64_t guard = 0; one.outstanding > 0; guard++) {
      if (guard > 2'000'000) fail("a request is never answered");
      if (step()) continue;
      refill(2);
      executor.advance(1'000'000);
    }
  }

  void close_volume(SimVolume& one) {
    wait_for(one);
    while (one.growing) {
      if (!step()) fail("grow() never answered");
    }
    for (uint64_t guard = 0; one.cutting; guard++) {
      if (guard > 2'000'000) fail("cut() never answered");
      if (!step()) executor.advance(1'000'000);
    }
    one.state = SimVolume::State::kStopping;
    log("close volume %llu", (unsigned long long)one.id);
    Status status{Code::kUnavailable, "close() never answered"};
    bool closed = false;
    one.volume->close([&](Status s) {
      status = std::move(s);
      closed = true;
    });
    while (!closed && step()) {
    }
    if (!closed) fail("close() never answered");
    if (!status.ok()) {
      if (error_chance == 0) fail("close failed although the disk did not: " + status.message);
      one.state = SimVolume::State::kOpen;
      return stop_volume(one);
    }
    one.volume.reset();
    one.arena.reset();
    one.state = SimVolume::State::kClosed;
    one.flushed_upto = ++now;
    check_equal_copies(one);
    if (one.spec.layers.size() < max_layers && random.chance(snapshot_chance)) snapshot(one);
  }
  // Revoked: no page is written any more, what was not flushed may be gone, the power stays on.
  void stop_volume(SimVolume& one) {
    log("stop volume %llu", (unsigned long long)one.id);
    one.state = SimVolume::State::kStopping;
    bool stopped = false;
    one.volume->abort([&](Status) { stopped = true; });
    for (uint64_t guard = 0; !stopped; guard++) {
      if (guard > 2'000'000 || !step()) fail("abort() never answered");
    }
    while (one.outstanding > 0) {
      if (!step()) fail("a request of a stopped volume is never answered");
    }
    one.volume.reset();
    one.arena.reset();
    one.state = SimVolume::State::kClosed;
    for (Cell& cell : one.cells) {
      cell = after_cut(cell, one.flushed_upto);
      for (Candidate& c : cell) {
        if (!is_durable(c, one.flushed_upto)) c.maybe = true;
      }
    }
    release_stock_of_the_dead();
  }
  // A slab that the stopped volume had taken and not yet reported is found by its page, as after a host's death; but
  // the stock itself lives on, so only what is in nobody's hands is sorted.
  void release_stock_of_the_dead() {
    const auto in_stock = stock.slabs();
    std::map<uint64_t, bool> held;
    for (auto& one : volumes) {
      if (one->arena == nullptr) continue;
      for (uint32_t i = 0; i < one->arena->claim_count(); i++) {
        const auto claim = one->arena->claim(i);
        if (claim.state != PageArena::ClaimState::kFree) held[claim.slab] = true;
      }
    }
    for (uint64_t slab = 0; slab < slab_total; slab++) {
      SlabInfo& info = slabs[slab];
      if (info.where != SlabInfo::Where::kStock || in_stock.count(slab) > 0 || held.count(slab) > 0) continue;
      SlabPage pair[2];
      disk.peek(page_address(slab), pair, sizeof pair);
      const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab));
      info.where = SlabInfo::Where::kFree;
      if (!copies.valid()) continue;
      const SlabPage& page = pair[copies.newest];
      if (page.generation == info.generation && page.layer_id != 0) {
        info.where = SlabInfo::Where::kLayer;
        info.layer = page.layer_id;
      }
    }
  }

  // ---- crashes

  // The engine's process is gone with everything in it; the arena's memory is as it was at that moment.
  void end_engine() {
    std::vector<std::vector<std::byte>> arenas;
    for (auto& one : volumes) {
      arenas.emplace_back(one->arena_memory->data(), one->arena_memory->data() + one->arena_memory->size());
    }
    disk.kill();
    ignoring = true;
    now++;
    for (auto& [key, o] : operations) {
      o->lost = true;
      if (o->request.op == VolumeOp::kRead || o->request.op == VolumeOp::kFlush) continue;
      for (uint64_t i = 0; i < o->request.length / kBlock; i++) {
        for (Candidate& c : o->volume->cells[o->request.offset / kBlock + i]) {
          if (c.start != o->start) continue;
          c.end = now;
          c.maybe = true;
        }
      }
    }
    // The corpse is taken apart by the book, so that its memory is freed; nothing of it reaches the disk.
    settle_dead();
    for (auto& one : volumes) {
      if (one->volume == nullptr) continue;
      bool stopped = false;
      one->volume->abort([&](Status) { stopped = true; });
      settle_dead();
      if (!stopped) fail("abort() of a volume on a dead disk never answered");
      one->volume.reset();
    }
    settle_dead();
    if (!operations.empty()) fail("requests of a stopped volume are never answered");
    for (size_t i = 0; i < volumes.size(); i++) {
      volumes[i]->arena.reset();
      std::memcpy(volumes[i]->arena_memory->data(), arenas[i].data(), arenas[i].size());
    }
    if (disk.in_flight() > 0) fail("I/O in flight after abort");
    disk.revive();
    ignoring = false;
  }
  void settle_dead() {
    for (uint64_t guard = 0; !executor.idle() || disk.in_flight() > 0; guard++) {
      if (guard > 2'000'000) fail("the engine never comes to rest on a dead disk");
      if (!executor.idle()) executor.run_one();
      else disk.complete_one();
    }
  }

  void kill_engine() {
    kills++;
    log("the engine is killed");
    end_engine();
    std::set<uint64_t> known;  // to an arena: not the stock's to hand out
    for (auto& one : volumes) {
      if (one->state == SimVolume::State::kClosed && !one->must_take_over) continue;
      one->state = SimVolume::State::kClosed;
      one->must_take_over = true;
      auto arena = PageArena::attach(one->arena_memory->data(), one->arena_memory->size());
      if (!arena.ok()) fail("the page arena left behind is not usable: " + arena.status.message);
      for (uint32_t i = 0; i < (*arena)->claim_count(); i++) {
        const auto claim = (*arena)->claim(i);
        if (claim.state != PageArena::ClaimState::kFree) known.insert(claim.slab);
      }
    }
    stock.clear();
    for (auto& [slab, info] : slabs) {
      if (info.where == SlabInfo::Where::kStock && known.count(slab) == 0) stock.add(slab, 1, info.generation);
    }
    for (auto& one : volumes) {
      if (one->must_take_over) open_volume(*one);
    }
    errors_on = false;
    disk.set_errors(0);
    settle();
  }

  void cut_power() {
    cuts++;
    log("the power is cut");
    end_engine();
    disk.cut_power();
    stock.clear();
    errors_on = false;
    disk.set_errors(0);
    sort_slabs_by_pages();
    check_pages();
    for (auto& one : volumes) {
      one->must_take_over = false;
      one->state = SimVolume::State::kClosed;
      for (Cell& cell : one->cells) cell = after_cut(cell, one->flushed_upto);
      open_volume(*one);
    }
    settle();
    for (auto& one : volumes) verify_all(*one);
    for (auto& one : volumes) check_frozen(*one);
    refill(random.below(4));
  }

  // Reads everything back; from then on it is what it is.
  void verify_all(SimVolume& one) {
    if (one.state != SimVolume::State::kOpen) fail("volume " + std::to_string(one.id) + " did not open after a crash");
    const uint64_t chunk = 8 * kBlocksPerChunk;
    for (uint64_t first = 0; first < one.size_blocks; first += chunk) {
      const uint64_t count = std::min(chunk, one.size_blocks - first);
      PageBuffer buffer(count * kBlock);
      read_now(*one.volume, first, count, buffer.data());
      for (uint64_t i = 0; i < count; i++) {
        const uint64_t value = value_of(buffer.data() + i * kBlock, first + i);
        Cell& cell = one.cells[first + i];
        checks++;
        if (std::none_of(cell.begin(), cell.end(), [&](const Candidate& c) { return c.value == value; })) {
          wrong(one, first + i, value, "after the cut");
        }
        cell = {{value, 0, 0, true, false}};
      }
    }
    one.flushed_upto = now;
  }
  void read_now(Volume& volume, uint64_t first, uint64_t count, std::byte* to) {
    VolumeRequest request;
    int error = -1;
    request.op = VolumeOp::kRead;
    request.offset = first * kBlock;
    request.length = count * kBlock;
    request.buffer = to;
    request.user = &error;
    request.done = [](VolumeRequest* self, int result) { *static_cast<int*>(self->user) = result; };
    volume.submit(&request);
    while (error < 0) {
      if (!step()) fail("a read is never answered");
    }
    if (error != 0) fail("a read failed although the disk did not");
  }

  // ---- checks of the disk itself

  void check_pages() {
    std::map<std::pair<uint64_t, uint32_t>, uint64_t> mapped;  // (layer, chunk) -> slab
    for (const auto& [slab, info] : slabs) {
      if (info.where != SlabInfo::Where::kLayer) continue;
      SlabPage pair[2];
      disk.peek(page_address(slab), pair, sizeof pair);
      const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab));
      if (copies.bad()) fail("both copies of the page of slab " + std::to_string(slab) + " are damaged");
      if (!copies.valid()) continue;
      const SlabPage& page = pair[copies.newest];
      if (page.generation != info.generation || page.layer_id == 0) continue;
      if (page.layer_id != info.layer) fail("slab " + std::to_string(slab) + " is in two layers");
      for (const SlabEntry& entry : page.entries) {
        if (entry.logical_chunk == format::kNoChunk) {
          if ((entry.data | entry.zero) != 0) fail("a free chunk has blocks");
          continue;
        }
        if ((entry.data | entry.zero) == 0) fail("a chunk is mapped without any block");
        if ((entry.data & entry.zero) != 0) fail("a block is data and zeros at once");
        if (!mapped.try_emplace({info.layer, entry.logical_chunk}, slab).second) {
          fail("chunk " + std::to_string(entry.logical_chunk) + " of layer " + std::to_string(info.layer) +
               " is mapped twice");
        }
      }
    }
  }
  void check_equal_copies(const SimVolume& one) {
    for (const SlabRun& run : slabs_of(one.spec.layers[0].layer_id)) {
      SlabPage pair[2];
      disk.peek(page_address(run.first), pair, sizeof pair);
      const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(run.first));
      if (!copies.valid()) continue;
      if (pair[copies.newest].generation != run.generation || pair[copies.newest].layer_id == 0) continue;
      bool any = false;
      for (const SlabEntry& entry : pair[copies.newest].entries) any |= entry.logical_chunk != format::kNoChunk;
      if (any && !copies.equal)
        fail("the copies of the page of slab " + std::to_string(run.first) + " differ after a clean close");
    }
  }

  // ---- layers: what a snapshot leaves, made while the volume is closed

  void snapshot(SimVolume& one) {
    FrozenView view;
    view.layers = one.spec.layers;
    for (LayerSpec& layer : view.layers) layer.frozen = true;
    view.size_bytes = one.size_blocks * kBlock;
    for (uint64_t b = 0; b < one.size_blocks; b++) {
      std::vector<uint64_t> values;
      for (const Candidate& c : after_cut(one.cells[b], one.flushed_upto)) values.push_back(c.value);
      view.values.push_back(std::move(values));
    }
    LayerSpec top;
    top.layer_id = one.id * 100 + one.next_layer++;
    top.slot = static_cast<uint32_t>(one.id + 8 * one.next_layer);
    top.parent_layer_id = one.spec.layers[0].layer_id;
    top.birth = one.next_layer;
    one.spec.layers[0].frozen = true;
    one.spec.layers.insert(one.spec.layers.begin(), top);
    // The record names the new top; that is what makes it one.
    const uint64_t address = superblock.volume_table_offset + one.spec.slot * 2 * kBlock;
    PageBuffer pair(2 * kBlock);
    disk.peek(address, pair.data(), 2 * kBlock);
    const Copies copies = choose_record(pair.at<VolumeRecord>(0), pair.at<VolumeRecord>(kBlock), kPoolUuid, address);
    if (!copies.valid()) fail("the record of a closed volume is not usable");
    VolumeRecord record = pair.at<VolumeRecord>(static_cast<size_t>(copies.newest) * kBlock);
    record.top_layer_id = top.layer_id;
    for (uint32_t copy = 0; copy < 2; copy++) {
      auto& page = pair.at<VolumeRecord>(copy * kBlock);
      page = record;
      seal(page, kPoolUuid, address + copy * kBlock, record.header.sequence + 1);
      disk.poke(address + copy * kBlock, &page, kBlock);
    }
    log("snapshot of volume %llu: layer %llu on top", (unsigned long long)one.id, (unsigned long long)top.layer_id);
    one.frozen.push_back(std::move(view));
  }
  // While requests are under way. What a dead engine was asked is settled by the record, when it is opened next.
  void cut_volume(SimVolume& one) {
    if (one.cut != nullptr || one.growing || one.spec.layers.size() >= max_layers) return;
    one.cut = std::make_unique<PendingCut>();
    PendingCut& cut = *one.cut;
    cut.view.layers = one.spec.layers;
    for (LayerSpec& layer : cut.view.layers) layer.frozen = true;
    cut.view.size_bytes = one.size_blocks * kBlock;
    now++;
    for (uint64_t b = 0; b < one.size_blocks; b++) cut.view.values.push_back(current_values(one.cells[b], now));
    cut.top.layer_id = one.id * 100 + one.next_layer++;
    cut.top.slot = static_cast<uint32_t>(one.id + 8 * one.next_layer);
    cut.top.parent_layer_id = one.spec.layers[0].layer_id;
    cut.top.birth = one.next_layer;
    one.cutting = true;
    log("cut volume %llu: layer %llu on top", (unsigned long long)one.id, (unsigned long long)cut.top.layer_id);
    SimVolume* target = &one;
    one.volume->cut(cut.top, {}, 1'000'000'000, [this, target](Result<CutReport> result) {
      target->cutting = false;
      if (ignoring) return;
      log("cut of volume %llu: %s", (unsigned long long)target->id, code_name(result.status.code));
      if (result.ok()) {
        online_cuts++;
        cut_happened(*target);
      } else if (result.status.code == Code::kIo || result.status.code == Code::kHoldExpired) {
        if (result.status.code == Code::kIo && error_chance == 0) fail("cut: " + result.status.message);
        target->cut.reset();  // before the commit: it did not happen
      } else if (result.status.code != Code::kUnavailable) {
        fail("cut: " + result.status.message);
      }
    });
  }
  // Any of the frozen layers, named or not: what each of them shows, and the volume, must stay the same.
  void compact_volume(SimVolume& one) {
    if (one.compacting || one.spec.layers.size() < 2) return;
    std::vector<LayerSlabs> sources;
    for (size_t i = 1; i < one.spec.layers.size(); i++) {
      if (random.chance(800)) sources.push_back({one.spec.layers[i].layer_id, slabs_of(one.spec.layers[i].layer_id)});
    }
    const uint32_t permille = random.chance(700) ? 1000 : static_cast<uint32_t>(random.below(1000));
    log("compact volume %llu", (unsigned long long)one.id);
    one.compacting = true;
    SimVolume* target = &one;
    one.volume->compact(sources, permille, random.chance(300) ? 1 + random.below(200) : 0,
                        [this, target](Result<CompactReport> result) {
      target->compacting = false;
      if (ignoring) return;
      log("compaction of volume %llu: %s", (unsigned long long)target->id, code_name(result.status.code));
      if (result.ok()) {
        compacted += result->moved_blocks;
      } else if (result.status.code != Code::kBusy && result.status.code != Code::kUnavailable &&
                 (result.status.code != Code::kIo || error_chance == 0)) {
        fail("compact: " + result.status.message);
      }
    });
  }
  void cut_happened(SimVolume& one) {
    for (VolumeSpec* spec : {&one.spec, &one.opened_spec}) {
      if (spec->layers.empty() || spec->layers[0].layer_id == one.cut->top.layer_id) continue;
      spec->layers[0].frozen = true;
      spec->layers.insert(spec->layers.begin(), one.cut->top);
    }
    one.frozen.push_back(std::move(one.cut->view));
    one.cut.reset();
  }
  void resolve_cut(SimVolume& one) {
    if (one.cut == nullptr) return;
    one.cutting = false;
    const uint64_t address = superblock.volume_table_offset + one.spec.slot * 2 * kBlock;
    PageBuffer pair(2 * kBlock);
    disk.peek(address, pair.data(), 2 * kBlock);
    const Copies copies = choose_record(pair.at<VolumeRecord>(0), pair.at<VolumeRecord>(kBlock), kPoolUuid, address);
    if (!copies.valid()) fail("the record of a volume that was cut is not usable");
    if (pair.at<VolumeRecord>(static_cast<size_t>(copies.newest) * kBlock).top_layer_id == one.cut->top.layer_id) {
      cut_happened(one);
    } else {
      one.cut.reset();
    }
  }
  void check_frozen(SimVolume& one) {
    for (FrozenView& view : one.frozen) {
      VolumeSpec spec = one.spec;
      spec.read_only = true;
      spec.layers = view.layers;
      spec.size_bytes = view.size_bytes;
      for (LayerSpec& layer : spec.layers) layer.slabs = slabs_of(layer.layer_id);
      VolumeEnvironment environment;
      environment.device = &disk;
      environment.pool = kPoolUuid;
      environment.superblock = &superblock;
      environment.observer = this;
      environment.chunks_per_slab = chunks_per_slab;
      std::unique_ptr<Volume> reader;
      Status status{Code::kUnavailable, "open() never answered"};
      Volume::open(environment, spec, false, [&](Result<std::unique_ptr<Volume>> result) {
        status = result.status;
        if (result.ok()) reader = std::move(*result);
      });
      while (status.code == Code::kUnavailable && step()) {
      }
      if (!status.ok()) fail("a frozen layer can't be opened: " + status.message);
      PageBuffer buffer(view.size_bytes);
      read_now(*reader, 0, view.size_bytes / kBlock, buffer.data());
      for (uint64_t b = 0; b < view.values.size(); b++) {
        const uint64_t value = value_of(buffer.data() + b * kBlock, b);
        auto& values = view.values[b];
        checks++;
        if (std::find(values.begin(), values.end(), value) == values.end()) {
          fail("frozen layer " + std::to_string(view.layers[0].layer_id) + " shows something else at block " +
               std::to_string(b));
        }
        values = {value};
      }
      bool stopped = false;
      reader->abort([&](Status) { stopped = true; });
      while (!stopped && step()) {
      }
    }
  }

  // ---- the whole run

  void run() {
    superblock.layer_slots = 512;  // each cut that is asked for takes one
    static const uint32_t kChunksPerSlab[] = {2, 3, 4, 8, 16, 256};
    chunks_per_slab = kChunksPerSlab[random.below(6)];
    max_chunks = chunks_per_slab >= 16 ? 64 : 16 + random.below(48);
    slab_total = 6 + random.below(48);
    arena_bytes = random.chance(400) ? PageArena::kMinimumBytes : 256 << 10;
    max_layers = random.chance(400) ? 4 : 1;
    snapshot_chance = 600;
    weight_write = 20 + random.below(60);
    weight_read = 5 + random.below(20);
    weight_flush = random.below(20);
    weight_discard = random.chance(750) ? random.below(30) : 0;
    weight_total = weight_write + weight_read + weight_flush + weight_discard + 1;
    weight_discard++;
    wide_discards = random.chance(500) ? 60 : 400;
    fua_chance = random.chance(500) ? 0 : 150;
    hot_chunk = random.below(max_chunks);
    depth = 1 + random.below(10);
    const uint64_t lazy = random.below(900);
    const uint64_t crash_chance = 4 + random.below(25);
    const uint64_t kill_share = random.below(1000);
    error_chance = random.chance(300) ? 5 + random.below(random.chance(300) ? 250 : 60) : 0;
    const uint64_t count = 1 + random.below(3);
    for (uint64_t s = 0; s < slab_total; s++) slabs[s] = {};
    for (uint64_t v = 1; v <= count; v++) make_volume(v);
    refill(2 + random.below(6));
    for (auto& one : volumes) open_volume(*one);
    settle();

    const uint64_t length = 60 + random.below(240);
    for (uint64_t i = 0; i < length; i++) {
      // Let the engine and the disk get on, a little or a lot.
      while (!random.chance(static_cast<uint32_t>(lazy)) && step()) {
      }
      if (random.chance(100)) executor.advance(random.below(1'000'000));
      if (random.chance(150)) refill(1 + random.below(3));
      if (error_chance > 0 && random.chance(40)) {
        errors_on = !errors_on;
        disk.set_errors(errors_on ? static_cast<uint32_t>(error_chance) : 0);
        log("disk errors %s", errors_on ? "on" : "off");
        if (!errors_on && random.chance(500)) {
          // What a failed flush left half written, met by the next flush and a cut in the middle of it.
          for (SimVolume* one : in_state(SimVolume::State::kOpen)) start(*one, VolumeOp::kFlush, 0, 0, false);
          for (uint64_t steps = random.below(60); steps > 0 && step(); steps--) {
          }
          cut_power();
          continue;
        }
      }
      if (random.chance(static_cast<uint32_t>(crash_chance))) {
        if (random.below(1000) < kill_share) kill_engine();
        else cut_power();
        continue;
      }
      auto closed = in_state(SimVolume::State::kClosed);
      if (!closed.empty() && random.chance(300)) {
        open_volume(*closed[random.below(closed.size())]);
        continue;
      }
      auto open = in_state(SimVolume::State::kOpen);
      if (open.empty()) {
        if (!step() && !closed.empty()) open_volume(*closed[0]);
        continue;
      }
      SimVolume& one = *open[random.below(open.size())];
      const uint64_t rare = random.below(1000);
      if (rare < 12) close_volume(one);
      else if (rare < 18) {
        stop_volume(one);
      } else if (rare < 26) {
        grow_volume(one);
      } else if (rare < 46 && max_layers > 1) {
        cut_volume(one);
      } else if (rare < 76 && max_layers > 1) {
        compact_volume(one);
      } else if (one.outstanding < depth) {
        random_operation(one);
      } else {
        step();
      }
    }
    // The end: everything by the book, then everything once more after a last cut.
    disk.set_errors(0);
    errors_on = false;
    for (auto& one : volumes) {
      if (one->state == SimVolume::State::kClosed) open_volume(*one);
    }
    settle_answers();
    cut_power();
    if (random.chance(700)) return damage_pages();
    for (auto& one : volumes) close_volume(*one);
  }

  // One copy of some pages is damaged, the serving one as a rule. What was written last may be gone then, but no block
  // may show what was never written to it: the copy that is left must not map a place that others have been given.
  void damage_pages() {
    end_engine();
    disk.cut_power();
    stock.clear();
    sort_slabs_by_pages();
    for (const auto& [slab, info] : slabs) {
      if (info.where != SlabInfo::Where::kLayer || random.chance(400)) continue;
      SlabPage pair[2];
      disk.peek(page_address(slab), pair, sizeof pair);
      const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab));
      if (!copies.valid() || copies.state[0] != copies.state[1]) continue;
      const int victim = random.chance(800) ? copies.newest : 1 - copies.newest;
      reinterpret_cast<uint8_t*>(&pair[victim])[1000] ^= 0x40;
      disk.poke(page_address(slab) + static_cast<uint64_t>(victim) * kBlock, &pair[victim], kBlock);
    }
    damaged = true;
    for (auto& one : volumes) {
      one->must_take_over = false;
      one->state = SimVolume::State::kClosed;
      open_volume(*one);
    }
    settle();
    for (auto& one : volumes) {
      if (one->state != SimVolume::State::kOpen) fail("one damaged copy kept a volume from opening");
      PageBuffer buffer(one->size_blocks * kBlock);
      read_now(*one->volume, 0, one->size_blocks, buffer.data());
      for (uint64_t b = 0; b < one->size_blocks; b++) {
        const uint64_t value = value_of(buffer.data() + b * kBlock, b);
        checks++;
        if (value != 0 && (value >> 56 != one->id || (value & 0xffffff) != b)) {
          wrong(*one, b, value, "with a damaged page");
        }
      }
    }
    end_engine();
  }
  void settle_answers() {
    for (uint64_t guard = 0; !operations.empty() || !in_state(SimVolume::State::kOpening).empty(); guard++) {
      if (guard > 2'000'000) fail("requests are never answered");
      if (step()) continue;
      refill(2);
      executor.advance(1'000'000);
    }
  }
  void grow_volume(SimVolume& one) {
    if (one.cut != nullptr || one.may_be_blocks != one.size_blocks || one.size_blocks + 20 > max_chunks * kBlocksPerChunk * 2) return;
    const uint64_t blocks = one.size_blocks + 1 + random.below(20);
    log("grow volume %llu to %llu blocks", (unsigned long long)one.id, (unsigned long long)blocks);
    one.may_be_blocks = blocks;
    one.growing = true;
    SimVolume* target = &one;
    one.volume->grow(blocks * kBlock, [this, target, blocks](Status status) {
      target->growing = false;
      if (ignoring) return;
      if (!status.ok()) {
        // Of unknown outcome on the disk, and told so: the size stays until the volume is opened anew.
        if (status.code != Code::kIo) fail("grow: " + status.message);
        return;
      }
      target->size_blocks = blocks;
      target->cells.resize(std::max<size_t>(blocks, target->cells.size()), Cell{{0, 0, 0, true, false}});
    });
  }

  uint64_t seed;
  bool verbose;
  SimRandom random;
  format::Superblock superblock;
  SimExecutor executor;
  SimDisk disk;
  TestStock stock;
  std::map<uint64_t, SlabInfo> slabs;
  std::vector<std::unique_ptr<SimVolume>> volumes;
  std::map<Operation*, std::unique_ptr<Operation>> operations;
  uint64_t now = 1;
  uint64_t operation_count = 0;
  uint64_t cuts = 0;
  uint64_t kills = 0;
  uint64_t online_cuts = 0;
  uint64_t compacted = 0;  // blocks
  uint64_t checks = 0;
  bool ignoring = false;
  bool errors_on = false;
  bool damaged = false;
  uint64_t emptied = 0;
  uint64_t error_chance = 0;

  uint32_t chunks_per_slab = 0;
  uint64_t max_chunks = 0;
  uint64_t slab_total = 0;
  size_t arena_bytes = 0;
  size_t max_layers = 1;
  uint32_t snapshot_chance = 0;
  uint64_t weight_write = 0;
  uint64_t weight_read = 0;
  uint64_t weight_flush = 0;
  uint64_t weight_discard = 0;
  uint64_t weight_total = 0;
  uint32_t fua_chance = 0;
  uint32_t wide_discards = 0;
  uint64_t hot_chunk = 0;
  uint64_t depth = 0;
};

}  // namespace

CrashResult run_crash_seed(uint64_t seed, bool verbose) {
  CrashResult result;
  auto world = std::make_unique<World>(seed, verbose);
  try {
    world->run();
  } catch (const Failure& failure) {
    result.ok = false;
    result.failure = "seed " + std::to_string(seed) + ", step " + std::to_string(world->now) + ": " + failure.what;
  }
  result.operations = world->operation_count;
  result.cuts = world->cuts;
  result.kills = world->kills;
  result.snapshots = world->online_cuts;
  result.checks = world->checks;
  result.emptied = world->emptied;
  result.compacted = world->compacted;
  if (!result.ok) (void)world.release();  // taken apart in mid-flight it could only hide the failure behind another
  return result;
}

}  // namespace holdfast::test
