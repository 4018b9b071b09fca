// Crashes, storms, and the whole run.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "core/page_arena.h"
#include "core/pages.h"
#include "world.h"

namespace holdfast::test::crash {

World::World(uint64_t seed_, bool verbose_, const CrashAim& aim_)
    : seed(seed_),
      verbose(verbose_),
      aimed(aim_),
      random(seed_),
      superblock(small_superblock(64)),
      disk(superblock.device_bytes, seed_ * 31 + 7, [this](uint64_t block) { return is_page(block * kBlock); }) {
  superblock.header.pool = kPoolUuid;
  disk.set_watcher([this](const IoRequest& request) { submitted(request); });
}

void World::log(const char* format, ...) const {
  if (!verbose) return;
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "%6llu  ", ull(now));
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

bool World::step() {
  const bool tasks = !executor.idle();
  const bool flights = disk.in_flight() > 0;
  if (!tasks && !flights) return false;
  if (tasks && (!flights || random.chance(600))) executor.run_one();
  else disk.complete_one();
  return true;
}

void World::settle() {
  for (uint64_t guard = 0;; guard++) {
    if (guard > 2'000'000) fail("the engine never comes to rest");
    if (step()) continue;
    if (!executor.timers() || operations.empty()) return;
    executor.advance(1'000'000);
  }
}

void World::settle_answers() {
  for (uint64_t guard = 0; !operations.empty() || !in_state(SimVolume::State::kOpening).empty(); guard++) {
    if (guard > 2'000'000) fail("requests are never answered");
    if (step()) continue;
    refill(2);
    executor.advance(1'000'000);
  }
}

// The engine's process is gone with everything in it; the arena's memory is as it was at that moment.
void World::end_engine() {
  note_records();
  disk.set_fuse(0);
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
  for (auto& one : volumes) {
    one->forgetting = 0;
    for (Reader& reader : one->readers) {
      if (reader.volume == nullptr) continue;
      bool stopped = false;
      reader.volume->abort([&](Status) { stopped = true; });
      settle_dead();
      if (!stopped) fail("abort() of a reader on a dead disk never answered");
      reader.volume.reset();
    }
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

void World::settle_dead() {
  for (uint64_t guard = 0; !executor.idle() || disk.in_flight() > 0; guard++) {
    if (guard > 2'000'000) fail("the engine never comes to rest on a dead disk");
    if (!executor.idle()) executor.run_one();
    else disk.complete_one();
  }
}

// A crash, and all volumes opened again; with some luck another crash in the middle of that, and another.
void World::crash(bool power) {
  bool cut = false;
  for (;;) {
    if (power) cut_power();
    else kill_engine();
    cut |= power;
    if (!random.chance(again_chance)) break;
    disk.set_fuse(1 + static_cast<uint32_t>(random.below(random.chance(700) ? 8 : 40)));
    while (!crash_due() && step()) {
    }
    if (!crash_due()) break;
    power = random.chance(500);
  }
  disk.set_fuse(0);
  settle();
  if (!cut) return;
  for (auto& one : volumes) {
    if (one->state != SimVolume::State::kDeleting) verify_all(*one);
  }
  check_views();
  refill(random.below(4));
}

void World::kill_engine() {
  result.kills++;
  log("the engine is killed");
  end_engine();
  check_records();
  std::set<uint64_t> known;  // to an arena: not the stock's to hand out
  for (auto& one : volumes) {
    if (one->state == SimVolume::State::kDeleting) continue;
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
  errors_on = false;
  disk.set_errors(0);
  for (auto& one : volumes) {
    if (one->must_take_over) open_volume(*one);
    // Readers go on with what the keeper has, or are gone.
    for (auto reader = one->readers.begin(); reader != one->readers.end();) {
      const auto next = std::next(reader);
      if (random.chance(700) && !reader->stopping) open_reader(*reader);
      else one->readers.erase(reader);
      reader = next;
    }
  }
}

void World::cut_power() {
  result.cuts++;
  log("the power is cut");
  end_engine();
  disk.cut_power();
  stock.clear();
  errors_on = false;
  disk.set_errors(0);
  sort_slabs_by_pages();
  check_pages();
  check_records();
  for (auto& one : volumes) {
    one->readers.clear();
    if (one->state == SimVolume::State::kDeleting) continue;
    one->must_take_over = false;
    one->state = SimVolume::State::kClosed;
    for (Cell& cell : one->cells) cell = after_cut(cell, one->flushed_upto);
    open_volume(*one);
  }
}

// A flush, writes, a flush that fails at its pages, and while that is tried again the power goes.
void World::storm() {
  log("a storm");
  errors_on = false;
  set_errors();
  flush_all();
  for (uint64_t count = 1 + random.below(6); count > 0; count--) {
    for (SimVolume* one : in_state(SimVolume::State::kOpen)) random_operation(*one);
  }
  for (uint64_t steps = random.below(100); steps > 0 && step(); steps--) {
  }
  disk.set_errors(0, 200 + static_cast<uint32_t>(random.below(800)));
  for (uint64_t tries = 1 + random.below(3); tries > 0; tries--) flush_all();
  set_errors();
  for (SimVolume* one : in_state(SimVolume::State::kOpen)) start(*one, VolumeOp::kFlush, 0, 0, false);
  disk.set_fuse(1 + static_cast<uint32_t>(random.below(6)));
  while (!crash_due() && step()) {
  }
  crash(random.chance(800));
}

// Asks every volume for a flush and waits for the answers, if they come by themselves.
void World::flush_all() {
  disk.set_fuse(0);
  for (SimVolume* one : in_state(SimVolume::State::kOpen)) start(*one, VolumeOp::kFlush, 0, 0, false);
  while (step()) {
  }
}

void World::set_errors() {
  disk.set_errors(errors_on ? static_cast<uint32_t>(error_chance) : 0,
                  errors_on ? static_cast<uint32_t>(page_error_chance) : 0);
}

// What kind of world this seed makes.
void World::draw() {
  superblock.layer_slots = 512;  // each cut that is given up keeps one
  static const uint32_t kChunksPerSlab[] = {2, 3, 4, 8, 16, 256};
  chunks_per_slab = kChunksPerSlab[random.below(6)];
  max_chunks = chunks_per_slab >= 16 ? 64 : 16 + random.below(48);
  slab_total = 6 + random.below(48);
  arena_bytes = random.chance(400) ? PageArena::kMinimumBytes : 256 << 10;
  if (random.chance(600)) {
    max_layers = 3 + random.below(6);
    job_chance = random.chance(150) ? 0 : 20 + static_cast<uint32_t>(random.below(150));
    if (random.chance(500)) max_chunks = 16;  // soon covered
  }
  bystander_chance = random.chance(200) ? 0 : static_cast<uint32_t>(random.below(600));
  weight_write = 20 + random.below(60);
  weight_read = 5 + random.below(20);
  weight_flush = random.below(20);
  weight_discard = random.chance(750) ? random.below(30) : 0;
  weight_total = weight_write + weight_read + weight_flush + weight_discard + 1;
  weight_discard++;
  wide_discards = random.chance(500) ? 60 : 400;
  if (max_layers > 1) wide_writes = static_cast<uint32_t>(random.below(120));
  fua_chance = random.chance(500) ? 0 : 150;
  hot_chunk = random.below(max_chunks);
  depth = 1 + random.below(10);
  lazy = random.below(900);
  crash_chance = random.below(max_layers > 1 ? 24 : 20) + (max_layers > 1 ? 1 : 4);
  aim_chance = random.chance(500) ? 0 : 40;
  aim_jobs_chance = random.chance(300) ? 0 : static_cast<uint32_t>(random.below(700));
  kill_share = random.below(1000);
  again_chance = random.chance(300) ? 0 : static_cast<uint32_t>(random.below(800));
  error_chance = random.chance(300) ? 5 + random.below(random.chance(300) ? 250 : 60) : 0;
  page_error_chance = random.chance(500) ? error_chance : 100 + random.below(600);
  disk.set_slow_reads(random.chance(600) ? 0 : 100 + static_cast<uint32_t>(random.below(500)));
  if (aimed.at != CrashAim::At::kNowhere) {
    aim_chance = 0;
    crash_chance = 0;
    error_chance = page_error_chance = 0;
    max_layers = std::max<size_t>(max_layers, 4);
    max_chunks = 16;
    job_chance = std::max<uint32_t>(job_chance, 80);
  }
  for (uint64_t s = 0; s < slab_total; s++) slabs[s] = {};
  const uint64_t count = 1 + random.below(3);
  for (uint64_t v = 0; v < count; v++) make_volume();
  max_volumes = count + (max_layers > 1 ? 1 + random.below(5) : 0);
}

void World::run() {
  draw();
  refill(2 + random.below(6));
  for (auto& one : volumes) open_volume(*one);
  settle();

  uint64_t length = 60 + random.below(max_layers > 1 ? 600 : 240);
  for (uint64_t i = 0; i < length; i++) {
    // Let the engine and the disk get on, a little or a lot.
    while (!crash_due() && !random.chance(static_cast<uint32_t>(lazy)) && step()) {
    }
    if (crash_due() && armed) {
      armed = false;
      result.aimed = CrashResult::Aimed::kCrashed;
      crash(aimed.power);
      length = std::min(length, i + 40);
      continue;
    }
    if (crash_due()) {
      crash(random.below(1000) >= kill_share);
      continue;
    }
    if (result.aimed == CrashResult::Aimed::kOver) break;
    if (random.chance(aim_chance)) {
      disk.set_fuse(1 + static_cast<uint32_t>(random.below(random.chance(500) ? 6 : 60)));
    }
    if (random.chance(100)) executor.advance(random.below(1'000'000));
    if (random.chance(150)) refill(1 + random.below(3));
    if (error_chance > 0 && random.chance(30)) {
      storm();
      continue;
    }
    if (error_chance > 0 && random.chance(40)) {
      errors_on = !errors_on;
      set_errors();
      log("disk errors %s", errors_on ? "on" : "off");
    }
    if (kill_due != 0 && now >= kill_due) {
      kill_due = 0;
      crash(false);
      continue;
    }
    if (random.chance(static_cast<uint32_t>(crash_chance))) {
      crash(random.below(1000) >= kill_share);
      continue;
    }
    if (max_layers > 1 && change_layers()) continue;
    change_volumes();
  }
  // The end: everything by the book, then everything once more after a last cut.
  if (crash_due()) crash(true);
  errors_on = false;
  set_errors();
  disk.set_fuse(0);
  again_chance = 0;
  for (auto& one : volumes) {
    drop_readers(*one);
    if (may_open(*one)) open_volume(*one);
  }
  settle_answers();
  crash(true);
  if (random.chance(max_layers > 1 ? 500 : 700)) return damage_pages();
  finish_reclaim();
  for (auto& one : volumes) verify_all(*one);
  check_views();
  format_pool();
  check_whole_pool("after a crash");
  for (auto& one : volumes) close_volume(*one);
  check_whole_pool("after a clean close");
}

// Something about the layers, now and then.
bool World::change_layers() {
  auto readers = open_readers();
  if (!readers.empty() && random.chance(80)) {
    Reader& reader = *readers[random.below(readers.size())];
    if (random.chance(40)) drop_reader(reader);
    else if (reader.outstanding < depth) random_read(reader);
    return true;
  }
  if (random.chance(job_chance)) {
    if (aimed.at == CrashAim::At::kNowhere && random.chance(150)) strip_in_a_storm();
    else reclaim();
    return true;
  }
  const uint64_t rare = random.below(1000);
  if (rare < 14) {
    drop_name();
  } else if (rare < 34) {
    make_clone();
  } else if (rare < 40) {
    delete_volume();
  } else if (rare < 70) {
    for (SimVolume* one : in_state(SimVolume::State::kClosed)) {
      if (one->must_take_over || one->cut != nullptr || one->readers.size() > 2 || random.chance(300)) continue;
      add_reader(*one);
      return true;
    }
    return false;
  } else {
    return false;
  }
  return true;
}

// Volumes opened, closed, stopped, grown and cut, and above all used.
void World::change_volumes() {
  std::vector<SimVolume*> closed;
  for (SimVolume* one : in_state(SimVolume::State::kClosed)) {
    if (may_open(*one)) closed.push_back(one);
  }
  if (!closed.empty() && random.chance(max_layers > 1 ? 40 : 300)) {
    return open_volume(*closed[random.below(closed.size())]);
  }
  auto open = in_state(SimVolume::State::kOpen);
  if (open.empty()) {
    if (step()) return;
    if (!closed.empty()) return open_volume(*closed[0]);
    for (auto& one : volumes) drop_readers(*one);
    return;
  }
  SimVolume& one = *open[random.below(open.size())];
  const uint64_t rare = random.below(1000);
  if (rare < 12) close_volume(one);
  else if (rare < 18) stop_volume(one);
  else if (rare < 26) grow_volume(one);
  else if (rare < 56 && max_layers > 1) cut_volume(one);
  else if (rare < 80 && max_layers > 1) compact_volume(one);
  else if (one.outstanding < depth) random_operation(one);
  else step();
}

}  // namespace holdfast::test::crash

namespace holdfast::test {

namespace {

struct Count {
  uint64_t CrashResult::*number;
  const char* of;
};
constexpr Count kCounts[] = {
    {&CrashResult::operations, "operations"},
    {&CrashResult::cuts, "power cuts"},
    {&CrashResult::kills, "kills"},
    {&CrashResult::snapshots, "snapshots of open volumes"},
    {&CrashResult::growths, "growths"},
    {&CrashResult::clones, "clones"},
    {&CrashResult::readers, "readers"},
    {&CrashResult::strips, "strips"},
    {&CrashResult::stripped_blocks, "blocks stripped"},
    {&CrashResult::merges, "merges"},
    {&CrashResult::merged_blocks, "blocks merged"},
    {&CrashResult::learned, "times a merge learned"},
    {&CrashResult::forgotten, "times slabs forgotten"},
    {&CrashResult::wipes, "wipes"},
    {&CrashResult::jobs_cut_off, "strips and wipes cut off"},
    {&CrashResult::wiped_slabs, "slabs wiped"},
    {&CrashResult::unchained, "layers removed from chains"},
    {&CrashResult::layers_forgotten, "times layers forgotten"},
    {&CrashResult::relinked, "records relinked"},
    {&CrashResult::compacted, "blocks compacted"},
    {&CrashResult::emptied, "slabs given back"},
    {&CrashResult::checks, "blocks checked"},
};

}  // namespace

void CrashResult::add(const CrashResult& other) {
  for (const Count& count : kCounts) this->*count.number += other.*count.number;
}

std::string CrashResult::counts() const {
  std::string text;
  for (const Count& count : kCounts) {
    text += (text.empty() ? "" : ", ") + std::to_string(this->*count.number) + " " + count.of;
  }
  return text;
}

CrashResult run_crash_seed(uint64_t seed, bool verbose, const CrashAim& aim) {
  auto world = std::make_unique<crash::World>(seed, verbose, aim);
  try {
    world->run();
  } catch (const crash::Failure& failure) {
    CrashResult result = world->result;
    result.ok = false;
    result.failure = "seed " + std::to_string(seed) + ", step " + std::to_string(world->now) + ": " + failure.what;
    (void)world.release();  // taken apart in mid-flight it could only hide the failure behind another
    return result;
  }
  return world->result;
}

}  // namespace holdfast::test
