// Volumes and their readers: made, opened, closed, stopped and grown; requests to them, and what their answers must be.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "core/page_arena.h"
#include "core/pages.h"
#include "world.h"

namespace holdfast::test::crash {

SimVolume& World::add_volume(uint64_t size_blocks, uint64_t parent) {
  auto one = std::make_unique<SimVolume>();
  one->id = next_volume++;
  one->lineage.insert(one->id);
  uint32_t slot = 1;
  while (volume_slots.count(slot) > 0) slot++;
  volume_slots.insert(slot);
  one->spec.volume_id = one->id;
  one->spec.slot = slot;
  one->spec.name = "v" + std::to_string(one->id);
  one->spec.host_id = 1;
  one->spec.generation = 1;
  one->size_blocks = size_blocks;
  one->may_be_blocks = size_blocks;
  one->spec.size_bytes = size_blocks * kBlock;
  const LayerSpec top = new_layer(parent);
  attach(top);
  layer(top.layer_id).is_top = true;
  one->top = top.layer_id;
  one->cells.assign(size_blocks, settled_cell(0));
  one->arena_memory = std::make_unique<PageBuffer>(arena_bytes);
  volumes.push_back(std::move(one));
  return *volumes.back();
}

void World::make_volume() {
  add_volume((8 + random.below(max_chunks - 7)) * kBlocksPerChunk -
                 (random.chance(300) ? random.below(kBlocksPerChunk) : 0),
             0);
}

VolumeEnvironment World::environment(PageArena* arena) {
  VolumeEnvironment environment;
  environment.device = &disk;
  environment.pool = kPoolUuid;
  environment.superblock = &superblock;
  environment.stock = &stock;
  environment.observer = this;
  environment.arena = arena;
  environment.full_timeout_ns = 1'000'000;
  environment.chunks_per_slab = chunks_per_slab;
  return environment;
}

void World::open_volume(SimVolume& one) {
  const bool taking_over = one.must_take_over;
  one.compacting = false;
  const bool cut = resolve_cut(one);
  if (one.cut != nullptr) set_top(one, cut);
  if (one.cut != nullptr && !cut) cut_failed(one);
  if (taking_over) {
    // What the keeper has, or with the slabs that the service has counted since.
    one.spec = one.opened_spec;
    if (random.chance(500)) {
      for (LayerSpec& spec : one.spec.layers) spec.slabs = slabs_of(spec.layer_id);
    }
  } else {
    one.spec.epoch++;
    one.spec.size_bytes = one.size_blocks * kBlock;
    one.spec.layers = chain_of(one.top);
    if (cut) {
      one.spec.layers[0].frozen = true;
      one.spec.layers.insert(one.spec.layers.begin(), one.cut->top);
      one.spec.layers[0].slabs = slabs_of(one.cut->top.layer_id);
    }
  }
  one.opened_spec = one.spec;
  auto arena = taking_over
                   ? PageArena::attach(one.arena_memory->data(), one.arena_memory->size())
                   : PageArena::format(one.arena_memory->data(), one.arena_memory->size(), one.id, one.spec.epoch);
  if (!arena.ok()) fail("the page arena is not usable: " + arena.status.message);
  one.arena = std::move(*arena);
  one.state = SimVolume::State::kOpening;
  log("open volume %llu, epoch %llu%s", ull(one.id), ull(one.spec.epoch), taking_over ? ", taking over" : "");
  for (const LayerSpec& spec : one.spec.layers) {
    std::string runs;
    for (const SlabRun& run : spec.slabs) runs += " " + std::to_string(run.first) + "/" + std::to_string(run.generation);
    log("  layer %llu with slabs%s", ull(spec.layer_id), runs.c_str());
  }
  SimVolume* target = &one;
  Volume::open(environment(one.arena.get()), one.spec, taking_over,
               [this, target, taking_over](Result<std::unique_ptr<Volume>> opening) {
                 opened(*target, taking_over, std::move(opening));
               });
}

void World::opened(SimVolume& one, bool taking_over, Result<std::unique_ptr<Volume>> opening) {
  if (ignoring) {
    if (opening.ok()) one.volume = std::move(*opening);
    return;
  }
  if (!opening.ok()) {
    // Only an I/O error excuses. A failed opening leaves the arena as it was found, so a take-over is tried again.
    if (opening.status.code != Code::kIo || error_chance == 0)
      fail("volume " + std::to_string(one.id) + ": " + opening.status.message);
    log("open failed: %s", opening.status.message.c_str());
    one.state = SimVolume::State::kClosed;
    return;
  }
  one.volume = std::move(*opening);
  one.state = SimVolume::State::kOpen;
  one.must_take_over = false;
  if (one.cut != nullptr) cut_happened(one, false);
  const uint64_t blocks = one.volume->stats().size_bytes / kBlock;
  if (blocks != one.size_blocks && blocks != one.may_be_blocks) {
    fail("volume " + std::to_string(one.id) + " has a size that nobody gave it");
  }
  one.size_blocks = blocks;
  one.may_be_blocks = blocks;
  one.recorded_blocks = blocks;
  one.cells.resize(std::max<size_t>(blocks, one.cells.size()), settled_cell(0));
  log("volume %llu is open%s", ull(one.id), taking_over ? " (taken over)" : "");
}

// Or, when it is to be stopped in the middle of that: as far as it gets.
void World::close_volume(SimVolume& one) {
  wait_for(one);
  while (one.growing && !crash_due()) {
    if (!step()) fail("grow() never answered");
  }
  for (uint64_t guard = 0; (one.cutting || one.forgetting > 0) && !crash_due(); guard++) {
    if (guard > 2'000'000) fail("cut() or forget() never answered");
    if (!step()) executor.advance(1'000'000);
  }
  if (crash_due()) return;
  one.state = SimVolume::State::kStopping;
  log("close volume %llu", ull(one.id));
  const auto outcome = std::make_shared<Status>(Code::kUnavailable, "close() never answered");
  one.volume->close([outcome](Status s) { *outcome = std::move(s); });
  for (uint64_t steps = random.chance(100) ? random.below(60) : kOpenEnded; steps > 0; steps--) {
    if (crash_due()) return;
    if (outcome->code != Code::kUnavailable || !step()) break;
  }
  if (outcome->code == Code::kUnavailable) {
    if (disk.in_flight() == 0 && executor.idle()) fail(outcome->message);
    return stop_volume(one);
  }
  if (!outcome->ok()) {
    if (error_chance == 0) fail("close failed although the disk did not: " + outcome->message);
    one.state = SimVolume::State::kOpen;
    return stop_volume(one);
  }
  one.volume.reset();
  one.arena.reset();
  one.state = SimVolume::State::kClosed;
  one.flushed_upto = ++now;
  check_equal_copies(one);
  if (!one.repeat.has_value() && one.spec.layers.size() < max_layers && random.chance(snapshot_chance)) snapshot(one);
}

// Revoked: no page is written any more, what was not flushed may be gone, the power stays on.
void World::stop_volume(SimVolume& one) { stop_volume(one, random.chance(700)); }

// `closed`: the agent says so in the record.
void World::stop_volume(SimVolume& one, bool closed) {
  log("stop volume %llu", ull(one.id));
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
  if (!closed) return;
  const Status written = write_volume_closed(agent, superblock, one.spec.slot, one.id, one.spec.epoch);
  if (!written.ok() && !crash_due() && error_chance == 0) fail("closed(epoch) is not written: " + written.message);
}

void World::grow_volume(SimVolume& one) {
  if (one.cut != nullptr || one.cutting || one.forgetting > 0 || one.may_be_blocks != one.size_blocks ||
      one.size_blocks + 20 > max_chunks * kBlocksPerChunk * 2) {
    return;
  }
  aim(CrashAim::At::kGrowth);
  const uint64_t blocks = one.size_blocks + 1 + random.below(20);
  log("grow volume %llu to %llu blocks", ull(one.id), ull(blocks));
  one.may_be_blocks = blocks;
  one.growing = true;
  SimVolume* target = &one;
  one.volume->grow(blocks * kBlock, [this, target, blocks](Status status) {
    target->growing = false;
    if (ignoring) return;
    aim_over(CrashAim::At::kGrowth);
    result.growths++;
    if (!status.ok()) {
      // Of unknown outcome on the disk, and told so: the size stays until the volume is opened anew.
      if (status.code != Code::kIo) fail("grow: " + status.message);
      return;
    }
    target->size_blocks = blocks;
    target->recorded_blocks = blocks;
    target->cells.resize(std::max<size_t>(blocks, target->cells.size()), settled_cell(0));
  });
}

void World::wait_for(SimVolume& one) {
  for (uint64_t guard = 0; one.outstanding > 0 && !crash_due(); guard++) {
    if (guard > 2'000'000) fail("a request is never answered");
    if (step()) continue;
    refill(2);
    executor.advance(1'000'000);
  }
}

// ---- requests

namespace {

const char* op_name(VolumeOp op) {
  static const char* const kNames[] = {"read", "write", "flush", "discard", "write zeroes"};
  return kNames[static_cast<int>(op)];
}

void fill(std::byte* memory, uint64_t value) {
  for (size_t at = 0; at < kBlock; at += sizeof value) std::memcpy(memory + at, &value, sizeof value);
}

}  // namespace

Operation& World::submit(SimVolume& one, Reader* reader, std::unique_ptr<Operation> owned) {
  Operation& o = *owned;
  o.world = this;
  o.volume = &one;
  o.reader = reader;
  o.request.user = &o;
  o.request.done = [](VolumeRequest* request, int error) {
    auto* self = static_cast<Operation*>(request->user);
    self->world->answered(*self, error);
  };
  operations[&o] = std::move(owned);
  (reader != nullptr ? *reader->volume : *one.volume).submit(&o.request);
  if (o.answered) fail("done() ran inside submit()");
  return o;
}

Operation& World::start(SimVolume& one, VolumeOp op, uint64_t block, uint64_t blocks, bool fua) {
  auto owned = std::make_unique<Operation>();
  Operation& o = *owned;
  o.id = ++result.operations;
  o.start = ++now;
  o.request.op = op;
  o.request.fua = fua;
  o.request.offset = block * kBlock;
  o.request.length = blocks * kBlock;
  if (op == VolumeOp::kRead || op == VolumeOp::kWrite) {
    o.buffer = std::make_unique<PageBuffer>(blocks * kBlock);
    o.request.buffer = o.buffer->data();
  }
  for (uint64_t i = 0; i < blocks; i++) {
    Cell& cell = one.cells[block + i];
    if (op == VolumeOp::kRead) {
      o.readable.push_back(current_values(cell, o.start));
    } else if (op != VolumeOp::kFlush) {
      const uint64_t value = op == VolumeOp::kWrite ? one.id << 56 | o.id << 24 | (block + i) : 0;
      if (op == VolumeOp::kWrite) fill(o.buffer->data() + i * kBlock, value);
      cell.push_back({value, o.start, kOpenEnded, false, false});
      if (one.cut != nullptr) one.cut->view.values[block + i].push_back(value);
    }
  }
  one.outstanding++;
  if (op == VolumeOp::kRead) one.outstanding_reads++;
  log("#%llu volume %llu %s%s blocks %llu+%llu", ull(o.id), ull(one.id), op_name(op), fua ? " fua" : "", ull(block),
      ull(blocks));
  return submit(one, nullptr, std::move(owned));
}

void World::start_reading(Reader& reader, uint64_t block, uint64_t blocks) {
  auto owned = std::make_unique<Operation>();
  Operation& o = *owned;
  o.id = ++result.operations;
  o.start = ++now;
  o.request.op = VolumeOp::kRead;
  o.request.offset = block * kBlock;
  o.request.length = blocks * kBlock;
  o.buffer = std::make_unique<PageBuffer>(blocks * kBlock);
  o.request.buffer = o.buffer->data();
  for (uint64_t i = 0; i < blocks; i++) o.readable.push_back(current_values(reader.of->cells[block + i], o.start));
  reader.outstanding++;
  log("#%llu reader of volume %llu, epoch %llu: blocks %llu+%llu", ull(o.id), ull(reader.of->id),
      ull(reader.spec.epoch), ull(block), ull(blocks));
  submit(*reader.of, &reader, std::move(owned));
}

// The word that fills the block. A block that is not filled by one word was put together wrongly.
uint64_t World::value_of(const std::byte* memory, uint64_t block) const {
  uint64_t value;
  std::memcpy(&value, memory, sizeof value);
  if (std::memcmp(memory, memory + sizeof value, kBlock - sizeof value) != 0) {
    fail("block " + std::to_string(block) + " is not whole");
  }
  return value;
}

void World::prune(SimVolume& one, Cell& cell) const {
  if (cell.size() > 4 && one.outstanding_reads == 0) cell = after_cut(cell, one.flushed_upto);
}

void World::answered(Operation& o, int error) {
  if (o.answered) fail("request #" + std::to_string(o.id) + " was answered twice");
  o.answered = true;
  SimVolume& one = *o.volume;
  if (o.reader != nullptr) o.reader->outstanding--;
  else one.outstanding--;
  if (o.reader == nullptr && o.request.op == VolumeOp::kRead) one.outstanding_reads--;
  if (o.lost || ignoring) {
    operations.erase(&o);
    return;
  }
  const uint64_t end = ++now;
  log("#%llu answered %d", ull(o.id), error);
  if (error != 0 && error != EIO && error != ENOSPC) fail("a request got errno " + std::to_string(error));
  const bool serves = o.reader != nullptr ? !o.reader->stopping : one.state == SimVolume::State::kOpen;
  if (error == EIO && error_chance == 0 && serves) {
    fail("request #" + std::to_string(o.id) + " failed although the disk did not");
  }
  if (o.request.op == VolumeOp::kRead) {
    if (error == 0) read_answered(o);
  } else if (o.request.op == VolumeOp::kFlush) {
    if (error == 0) one.flushed_upto = std::max(one.flushed_upto, o.start);
  } else {
    for (uint64_t i = 0; i < o.request.length / kBlock; i++) {
      Cell& cell = one.cells[o.request.offset / kBlock + i];
      for (Candidate& c : cell) {
        if (c.start != o.start) continue;
        c.end = end;
        c.maybe = error != 0;
        c.durable = error == 0 && o.request.fua;
      }
      prune(one, cell);
    }
  }
  operations.erase(&o);
}

void World::read_answered(Operation& o) {
  const uint64_t first = o.request.offset / kBlock;
  for (uint64_t i = 0; i < o.request.length / kBlock; i++) {
    const uint64_t value = value_of(o.buffer->data() + i * kBlock, first + i);
    result.checks++;
    if (o.reader != nullptr) {
      const auto [seen, fresh] = o.reader->seen.try_emplace(first + i, value);
      if (!fresh && seen->second != value) wrong(*o.volume, first + i, value, "a reader that saw something else before");
    }
    const auto& known = o.readable[i];
    if (std::find(known.begin(), known.end(), value) != known.end()) continue;
    const Cell& cell = o.volume->cells[first + i];
    const bool since = std::any_of(cell.begin(), cell.end(),
                                   [&](const Candidate& c) { return c.value == value && c.start > o.start; });
    if (!since) wrong(*o.volume, first + i, value, o.reader != nullptr ? "a reader" : "a read");
  }
}

void World::wrong(const SimVolume& one, uint64_t block, uint64_t value, const char* when) const {
  char text[400];
  std::string allowed;
  for (const Candidate& c : one.cells[block]) {
    std::snprintf(text, sizeof text, " %llx[%llu..%lld%s%s]", ull(c.value), ull(c.start),
                  c.end == kOpenEnded ? -1ll : static_cast<long long>(c.end), c.durable ? " durable" : "",
                  c.maybe ? " maybe" : "");
    allowed += text;
  }
  std::snprintf(text, sizeof text, "volume %llu block %llu (chunk %llu): %s found %llx, flushed up to %llu, allowed:",
                ull(one.id), ull(block), ull(block / kBlocksPerChunk), when, ull(value), ull(one.flushed_upto));
  fail(text + allowed);
}

void World::random_operation(SimVolume& one) {
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
  if (chosen(weight_write)) {
    if (random.chance(wide_writes)) {  // soon nothing of older layers is left to see
      block = random.chance(600) ? 0 : block;
      length = std::min<uint64_t>(one.size_blocks - block, 24 * kBlocksPerChunk);
    }
    start(one, VolumeOp::kWrite, block, length, random.chance(fua_chance));
  } else if (chosen(weight_read)) {
    start(one, VolumeOp::kRead, block, length, false);
  } else if (chosen(weight_flush)) {
    start(one, VolumeOp::kFlush, 0, 0, false);
  } else {
    if (random.chance(wide_discards)) {
      block = random.chance(500) ? 0 : block;
      length = one.size_blocks - block;
    }
    start(one, random.chance(500) ? VolumeOp::kDiscard : VolumeOp::kWriteZeroes, block, length, false);
  }
}

// Reads everything back; from then on it is what it is.
void World::verify_all(SimVolume& one) {
  if (one.state != SimVolume::State::kOpen) fail("volume " + std::to_string(one.id) + " did not open after a crash");
  const uint64_t chunk = 8 * kBlocksPerChunk;
  for (uint64_t first = 0; first < one.size_blocks; first += chunk) {
    const uint64_t count = std::min(chunk, one.size_blocks - first);
    PageBuffer buffer(count * kBlock);
    read_now(*one.volume, first, count, buffer.data());
    for (uint64_t i = 0; i < count; i++) {
      const uint64_t value = value_of(buffer.data() + i * kBlock, first + i);
      Cell& cell = one.cells[first + i];
      result.checks++;
      if (std::none_of(cell.begin(), cell.end(), [&](const Candidate& c) { return c.value == value; })) {
        wrong(one, first + i, value, "after the cut");
      }
      cell = settled_cell(value);
    }
  }
  one.flushed_upto = now;
}

void World::read_now(Volume& volume, uint64_t first, uint64_t count, std::byte* to) {
  VolumeRequest request;
  int error = -1;
  request.op = VolumeOp::kRead;
  request.offset = first * kBlock;
  request.length = count * kBlock;
  request.buffer = to;
  request.user = &error;
  request.done = [](VolumeRequest* self, int outcome) { *static_cast<int*>(self->user) = outcome; };
  volume.submit(&request);
  while (error < 0) {
    if (!step()) fail("a read is never answered");
  }
  if (error != 0) fail("a read failed although the disk did not");
}

std::vector<SimVolume*> World::in_state(SimVolume::State state) {
  std::vector<SimVolume*> found;
  for (auto& one : volumes) {
    if (one->state == state) found.push_back(one.get());
  }
  return found;
}

// ---- readers: the volume is closed, and nobody writes it

void World::add_reader(SimVolume& one) {
  one.readers.emplace_back();
  Reader& reader = one.readers.back();
  reader.of = &one;
  one.spec.epoch++;
  reader.spec = one.spec;
  reader.spec.read_only = true;
  reader.spec.size_bytes = one.size_blocks * kBlock;
  reader.spec.layers = chain_of(one.top);
  result.readers++;
  open_reader(reader);
}

void World::open_reader(Reader& reader) {
  log("open volume %llu read-only, epoch %llu", ull(reader.of->id), ull(reader.spec.epoch));
  reader.opening = true;
  Volume::open(environment(nullptr), reader.spec, false, [this, &reader](Result<std::unique_ptr<Volume>> opening) {
    reader.opening = false;
    if (opening.ok()) reader.volume = std::move(*opening);
    else if (!ignoring && (opening.status.code != Code::kIo || error_chance == 0))
      fail("a reader of volume " + std::to_string(reader.of->id) + ": " + opening.status.message);
  });
}

void World::drop_reader(Reader& reader) {
  while (reader.opening) {
    if (!step()) fail("a reader never opens");
  }
  if (reader.volume != nullptr) {
    reader.stopping = true;
    bool stopped = false;
    reader.volume->abort([&](Status) { stopped = true; });
    while (!stopped || reader.outstanding > 0) {
      if (!step()) fail("abort() of a reader never answered");
    }
  }
  log("a reader of volume %llu is gone, epoch %llu", ull(reader.of->id), ull(reader.spec.epoch));
  reader.of->readers.remove_if([&](const Reader& other) { return &other == &reader; });
}

void World::drop_readers(SimVolume& one) {
  while (!one.readers.empty()) drop_reader(one.readers.front());
}

std::vector<Reader*> World::open_readers() {
  std::vector<Reader*> found;
  for (auto& one : volumes) {
    for (Reader& reader : one->readers) {
      if (reader.volume != nullptr && !reader.stopping) found.push_back(&reader);
    }
  }
  return found;
}

void World::random_read(Reader& reader) {
  const uint64_t size = reader.spec.size_bytes / kBlock;
  const uint64_t block = random.below(size);
  start_reading(reader, block, std::min(size - block, 1 + random.below(random.chance(500) ? 4 : 8 * kBlocksPerChunk)));
}

}  // namespace holdfast::test::crash
