// The agent of the simulation: its way to the disk, and the jobs on layers that nobody writes: strips, the forgetting and
// wiping of slabs, merges into layers that are kept, the wiping of layers and volumes. The rules of what may be done when are the metadata service's
// (model/reclaim.ts there); engines, readers and cuts go on meanwhile.
#include <algorithm>
#include <cstring>

#include "core/layer_merge.h"
#include "core/pages.h"
#include "world.h"

namespace holdfast::test::crash {

// ---- the disk, call by call

struct AgentDevice::Call {
  IoRequest io;
  iovec iov{};
  std::unique_ptr<PageBuffer> buffer;
  bool over = false;
  bool abandoned = false;
  int error = 0;
};

uint64_t AgentDevice::size_bytes() const { return world_.disk.size_bytes(); }

Status AgentDevice::read(uint64_t offset, void* buffer, size_t length) {
  auto call = std::make_unique<Call>();
  call->buffer = std::make_unique<PageBuffer>(length);
  call->iov = {call->buffer->data(), length};
  call->io.op = IoOp::kRead;
  call->io.offset = offset;
  call->io.length = length;
  call->io.iov = &call->iov;
  call->io.iov_count = 1;
  return carry_out(std::move(call), buffer);
}

Status AgentDevice::begin(IoOp op, bool fua, uint64_t offset, const void* from, size_t length) {
  auto call = std::make_unique<Call>();
  call->io.op = op;
  call->io.fua = fua;
  call->io.offset = offset;
  call->io.length = length;
  if (from != nullptr) {
    call->buffer = std::make_unique<PageBuffer>(length);
    std::memcpy(call->buffer->data(), from, length);
    call->iov = {call->buffer->data(), length};
    call->io.iov = &call->iov;
    call->io.iov_count = 1;
  }
  return carry_out(std::move(call), nullptr);
}

Status AgentDevice::carry_out(std::unique_ptr<Call> call, void* to) {
  if (world_.crash_due()) return {Code::kIo, "the power has failed"};
  call->io.user = call.get();
  call->io.done = [](IoRequest* request, int error) {
    auto* self = static_cast<Call*>(request->user);
    self->over = true;
    self->error = error;
    if (self->abandoned) delete self;
  };
  world_.disk.submit(&call->io);
  while (!call->over && !world_.crash_due()) {
    if (world_.job_running && world_.random.chance(world_.bystander_chance)) world_.bystander();
    else world_.step();
  }
  if (!call->over) {
    call->abandoned = true;
    (void)call.release();
    return {Code::kIo, "the power has failed"};
  }
  if (call->error != 0) return {Code::kIo, "the disk has failed"};
  if (to != nullptr) std::memcpy(to, call->buffer->data(), call->io.length);
  return {};
}

Status AgentDevice::write(uint64_t offset, const void* buffer, size_t length) {
  return begin(IoOp::kWrite, false, offset, buffer, length);
}
Status AgentDevice::write_durable(uint64_t offset, const void* buffer, size_t length) {
  return begin(IoOp::kWrite, true, offset, buffer, length);
}
Status AgentDevice::flush() { return begin(IoOp::kFlush, false, 0, nullptr, 0); }
Status AgentDevice::discard(uint64_t offset, uint64_t length) {
  return begin(IoOp::kDiscard, false, offset, nullptr, length);
}
Status AgentDevice::zero(uint64_t, uint64_t) { return {Code::kUnsupported, "no job of the simulation asks for zeros"}; }

// ---- one job at a time

namespace {

struct Running {
  explicit Running(bool& flag) : flag_(flag) { flag_ = true; }
  ~Running() { flag_ = false; }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
  bool& flag_;
};

}  // namespace

// A crash, or a disk that fails, ends a job; nothing else may. It is begun anew then, from what the books say.
bool World::job_done(const char* what, const Status& status) {
  log("%s: %s", what, status.ok() ? "done" : status.message.c_str());
  if (status.ok()) return true;
  if (crash_due()) {
    result.jobs_cut_off++;
    return false;
  }
  if (status.code != Code::kIo || error_chance == 0) fail(std::string(what) + ": " + status.message);
  return false;
}

// What goes on between two I/Os of a job.
void World::bystander() {
  const Running once(job_running);
  job_running = false;  // not again inside
  auto open = in_state(SimVolume::State::kOpen);
  auto readers = open_readers();
  const uint64_t what = random.below(100);
  if (!readers.empty() && what < 25) {
    Reader& reader = *readers[random.below(readers.size())];
    if (reader.outstanding < depth) random_read(reader);
  } else if (what < 27) {
    for (SimVolume* one : in_state(SimVolume::State::kClosed)) {
      if (may_open(*one) && random.chance(500)) return open_volume(*one);
    }
  } else if (!open.empty()) {
    SimVolume& one = *open[random.below(open.size())];
    if (what < 29) cut_volume(one);
    else if (what < 31) grow_volume(one);
    else if (what < 32) close_volume(one);
    else if (what < 33) stop_volume(one);
    else if (what < 36) compact_volume(one);
    else if (one.outstanding < depth) random_operation(one);
  }
  step();
  job_running = true;
}

// A crash soon, at some boundary of the I/O that begins now.
void World::aim(CrashAim::At what) {
  if (aimed.at == what && ++aimed_seen == aimed.nth) {
    armed = true;
    disk.set_fuse(aimed.boundary, what == CrashAim::At::kMerge);
  }
  if (aimed.at != CrashAim::At::kNowhere || !random.chance(aim_jobs_chance)) return;
  disk.set_fuse(1 + static_cast<uint32_t>(random.below(random.chance(700) ? 16 : 80)));
}

void World::aim_over(CrashAim::At what) {
  if (!armed || aimed.at != what || crash_due()) return;
  armed = false;
  disk.set_fuse(0);
  result.aimed = CrashResult::Aimed::kOver;
}

// ---- strips

bool World::is_folded(const Layer& one) const {
  return one.spec.frozen && one.settled && !one.named && !one.removed && one.children == 1;
}

const Layer& World::child_of(const Layer& one) const {
  for (const auto& [id, other] : layers) {
    if (!other.removed && other.spec.parent_layer_id == one.spec.layer_id) return other;
  }
  fail("layer " + std::to_string(one.spec.layer_id) + " has lost its child");
}

// The newest of a segment of folded layers.
bool World::may_strip(const Layer& one) const { return is_folded(one) && !is_folded(child_of(one)); }

std::vector<LayerSpec> World::segment_from(uint64_t newest) {
  std::vector<LayerSpec> victims;
  for (LayerSpec& spec : chain_of(newest)) {
    if (!is_folded(layer(spec.layer_id))) break;
    victims.push_back(std::move(spec));
  }
  return victims;
}

void World::strip(uint64_t newest) {
  const std::vector<LayerSpec> victims = segment_from(newest);
  for (const LayerSpec& victim : victims) layer(victim.layer_id).view.reset();  // nobody looks at it from here any more
  LayerSpec head = child_of(layer(newest)).spec;
  head.slabs = slabs_of(head.layer_id);
  std::vector<Coverage> covered(victims.size());  // of each victim: by what is above it
  add_coverage(head, &covered[0]);
  for (size_t i = 1; i < victims.size(); i++) {
    covered[i] = covered[i - 1];
    add_coverage(victims[i - 1], &covered[i]);
  }
  log("strip of %llu layers from layer %llu on, under layer %llu", ull(victims.size()), ull(newest),
      ull(head.layer_id));
  stripping = {head};
  stripping.insert(stripping.end(), victims.begin(), victims.end());
  aim(CrashAim::At::kStrip);
  Result<StripReport> report = [&] {
    const Running running(job_running);
    return strip_layers(agent, superblock, victims, {head});
  }();
  aim_over(CrashAim::At::kStrip);
  stripping.clear();
  if (!job_done("strip", report.status)) return;
  result.strips++;
  result.stripped_blocks += report->cleared_blocks;
  for (size_t i = 0; i < victims.size(); i++) check_stripped(victims[i], covered[i]);
  strip_ended(victims, *report);
}

// ---- merges

// Its head, or one of the layers themselves, shows more than some holder knows.
bool World::being_learned(uint64_t newest) {
  const uint64_t head = child_of(layer(newest)).spec.layer_id;
  const std::vector<LayerSpec> victims = segment_from(newest);
  return std::any_of(learning.begin(), learning.end(), [&](const Learning& one) {
    return one.head == head ||
           std::any_of(victims.begin(), victims.end(), [&](const LayerSpec& v) { return v.layer_id == one.head; });
  });
}

// Free ones, of a new generation, that nobody has ahead.
void World::give_slabs(uint64_t id, uint64_t count) {
  for (auto& [slab, info] : slabs) {
    if (count == 0) return;
    if (info.where != SlabInfo::Where::kFree) continue;
    info.where = SlabInfo::Where::kLayer;
    info.layer = id;
    info.generation++;
    wiped.erase(slab);
    count--;
  }
}

// What still shows of folded layers goes up into the frozen one above them, which has a name, or several children.
void World::merge(uint64_t id) {
  give_slabs(id, random.below(4));
  const std::vector<LayerSpec> victims = segment_from(layer(id).spec.parent_layer_id);
  LayerSpec head = layer(id).spec;
  head.slabs = slabs_of(id);
  const uint32_t permille = random.chance(700) ? 1000 : static_cast<uint32_t>(random.below(1000));
  const uint64_t most = random.chance(300) ? 1 + random.below(200) : 0;
  log("merge of %llu layers into layer %llu", ull(victims.size()), ull(id));
  const auto same = [&](const Learning& one) { return one.head == id; };
  if (std::none_of(learning.begin(), learning.end(), same)) learning.push_back({id, true, {}});
  merging = id;
  aim(CrashAim::At::kMerge);
  Result<MergeReport> report = [&] {
    const Running running(job_running);
    return merge_layers(agent, superblock, victims, head, permille, most);
  }();
  aim_over(CrashAim::At::kMerge);
  merging = 0;
  if (!job_done("merge", report.status)) return;
  const auto begun = std::find_if(learning.begin(), learning.end(), same);
  begun->cut_off = false;
  begun->waiting = grants_over(id);
  result.merges++;
  result.merged_blocks += report->moved_blocks;
}

void World::ask_to_learn(const Learning& one) {
  const uint64_t head = one.head;
  const std::vector<SlabRun> runs = slabs_of(head);
  for (const GrantRef& ref : one.waiting) {
    const auto done = [this, head, ref, runs](Status status) {
      if (ignoring) return;
      log("layer %llu learned by volume %llu, epoch %llu: %s", ull(head), ull(ref.volume), ull(ref.epoch),
          code_name(status.code));
      if (status.ok()) return learned(head, ref, runs);
      const bool failed = status.code == Code::kIo && error_chance > 0;
      if (status.code != Code::kBusy && status.code != Code::kUnavailable && !failed) fail("learn: " + status.message);
    };
    for (auto& volume : volumes) {
      if (volume->id != ref.volume) continue;
      if (volume->state == SimVolume::State::kOpen && volume->opened_spec.epoch == ref.epoch) {
        if (volume->cutting || volume->growing) continue;
        volume->forgetting++;
        volume->volume->learn({head, runs}, [target = volume.get(), done](Status status) {
          target->forgetting--;
          done(std::move(status));
        });
      }
      for (Reader& reader : volume->readers) {
        if (reader.spec.epoch == ref.epoch && reader.volume != nullptr) reader.volume->learn({head, runs}, done);
      }
    }
  }
}

// And so would an engine that takes over from it.
void World::learned(uint64_t head, GrantRef ref, const std::vector<SlabRun>& runs) {
  for (Learning& one : learning) {
    if (one.head == head) std::erase(one.waiting, ref);
  }
  result.learned++;
  drop_from_specs(ref, [&](VolumeSpec& spec) {
    for (LayerSpec& layer : spec.layers) {
      if (layer.layer_id == head) layer.slabs = runs;
    }
  });
}

// ---- strips, at the worst of times

// A strip whose covers may be in the device's cache only, and a crash in the middle of it: right after writes, while they
// are flushed, or when the engine was stopped at that.
void World::strip_in_a_storm() {
  std::vector<SimVolume*> found;
  for (SimVolume* one : in_state(SimVolume::State::kOpen)) {
    const uint64_t parent = layer(one->top).spec.parent_layer_id;
    if (one->cut != nullptr || parent == 0 || !is_folded(layer(parent))) continue;
    if (being_learned(parent)) continue;
    Coverage left;
    add_coverage(chain_of(parent)[0], &left);
    if (!left.empty()) found.push_back(one);
  }
  if (found.empty()) return;
  SimVolume& one = *found[random.below(found.size())];
  log("a strip in a storm");
  // Once before, so that no record is written, and nothing flushed for its sake, in the one that counts.
  strip(layer(one.top).spec.parent_layer_id);
  if (crash_due() || one.state != SimVolume::State::kOpen || one.cut != nullptr) return;
  disk.set_fuse(0);
  for (uint64_t count = random.below(3); count > 0; count--) random_operation(one);
  start(one, VolumeOp::kWrite, 0, std::min<uint64_t>(one.size_blocks, 24 * kBlocksPerChunk), false);
  for (uint64_t steps = 300; steps > 0 && !operations.empty() && step(); steps--) {
  }
  start(one, VolumeOp::kFlush, 0, 0, false);
  const uint64_t before = page_writes;
  for (uint64_t steps = 300; steps > 0 && page_writes == before && step(); steps--) {
  }
  for (uint64_t steps = random.below(10); steps > 0 && step(); steps--) {
  }
  if (random.chance(600)) stop_volume(one, false);
  const uint64_t newest = layer(one.top).spec.parent_layer_id;
  if (!may_strip(layer(newest)) || being_learned(newest)) return;
  disk.set_fuse(1 + static_cast<uint32_t>(random.below(random.chance(700) ? 6 : 20)));
  strip(newest);
  while (!crash_due() && step()) {
  }
  crash(random.chance(800));
}

void World::strip_ended(const std::vector<LayerSpec>& victims, const StripReport& report) {
  for (const LayerSpec& victim : victims) {
    Leaving gone;
    gone.layer = victim.layer_id;
    for (const SlabRun& run : report.emptied) {
      for (uint64_t slab = run.first; slab < run.first + run.count; slab++) {
        SlabInfo& info = slabs[slab];
        if (info.where != SlabInfo::Where::kLayer || info.layer != gone.layer || info.generation != run.generation) {
          continue;
        }
        check_emptied(slab, run.generation, gone.layer);
        info.where = SlabInfo::Where::kLeaving;
        gone.runs.push_back({slab, 1, run.generation});
      }
    }
    if (gone.runs.empty()) continue;
    gone.number = next_leaving++;
    gone.waiting = grants_over(gone.layer);
    log("%llu slabs leave layer %llu, and %llu grants know them", ull(gone.runs.size()), ull(gone.layer),
        ull(gone.waiting.size()));
    leaving.push_back(std::move(gone));
  }
}

// ---- slabs that leave

// Every holder that knows the slabs, or has the layers in its chain, and can be asked now; `then(id, holder)` when it has.
void World::ask_to_forget(const std::vector<GrantRef>& waiting, const std::vector<SlabRun>& runs,
                          const std::vector<uint64_t>& gone, void (World::*then)(uint64_t id, GrantRef ref),
                          uint64_t id) {
  for (const GrantRef& ref : waiting) {
    const auto done = [this, ref, then, id](Status status) {
      if (ignoring) return;
      log("forgotten by volume %llu, epoch %llu: %s", ull(ref.volume), ull(ref.epoch), code_name(status.code));
      if (status.ok()) return (this->*then)(id, ref);
      if (status.code != Code::kBusy && status.code != Code::kUnavailable) fail("forget: " + status.message);
    };
    for (auto& one : volumes) {
      if (one->id != ref.volume) continue;
      if (one->state == SimVolume::State::kOpen && one->opened_spec.epoch == ref.epoch) {
        if (one->cutting || one->growing) continue;
        one->forgetting++;
        one->volume->forget(runs, gone, [target = one.get(), done](Status status) {
          target->forgetting--;
          done(std::move(status));
        });
      }
      for (Reader& reader : one->readers) {
        if (reader.spec.epoch == ref.epoch && reader.volume != nullptr) reader.volume->forget(runs, gone, done);
      }
    }
  }
}

// What the keeper of a holder has.
void World::drop_from_specs(const GrantRef& ref, const std::function<void(VolumeSpec&)>& drop) {
  for (auto& one : volumes) {
    if (one->id != ref.volume) continue;
    if (one->opened_spec.epoch == ref.epoch) drop(one->opened_spec);
    if (one->spec.epoch == ref.epoch) drop(one->spec);
    for (Reader& reader : one->readers) {
      if (reader.spec.epoch == ref.epoch) drop(reader.spec);
    }
  }
}

// The holder knows no place in them any more, and what its keeper has would not bring them back.
void World::forgotten(uint64_t number, GrantRef ref) {
  const auto found = std::find_if(leaving.begin(), leaving.end(), [&](const Leaving& l) { return l.number == number; });
  if (found == leaving.end()) return;
  check_no_claim(ref, [&](const PageArena::Claim& claim) {
    return std::any_of(found->runs.begin(), found->runs.end(), [&](const SlabRun& gone) {
      return gone.first == claim.slab && gone.generation == claim.generation;
    });
  });
  std::erase(found->waiting, ref);
  result.forgotten++;
  drop_from_specs(ref, [&](VolumeSpec& spec) {
    for (LayerSpec& kept : spec.layers) {
      if (kept.layer_id != found->layer) continue;
      std::erase_if(kept.slabs, [&](const SlabRun& run) {
        return std::any_of(found->runs.begin(), found->runs.end(), [&](const SlabRun& gone) {
          return gone.first == run.first && gone.generation == run.generation;
        });
      });
    }
  });
}

// Its chain goes on without the layer, whose record may be anybody's from now on.
void World::layer_forgotten(uint64_t id, GrantRef ref) {
  const auto found = layers.find(id);
  if (found == layers.end()) return;
  check_no_claim(ref, [&](const PageArena::Claim& claim) {
    return claim.state == PageArena::ClaimState::kClaimed && claim.layer_id == id;
  });
  std::erase(found->second.waiting, ref);
  result.layers_forgotten++;
  drop_from_specs(ref, [&](VolumeSpec& spec) {
    std::erase_if(spec.layers, [&](const LayerSpec& one) { return one.layer_id == id; });
  });
}

void World::free_slabs(const std::vector<SlabRun>& runs) {
  for (const SlabRun& run : runs) {
    format::SlabPage page;
    if (newest_page(run.first, &page).valid() && page.layer_id != 0 && page.generation == run.generation) {
      fail("slab " + std::to_string(run.first) + " was wiped, but its page still names layer " +
           std::to_string(page.layer_id));
    }
    slabs[run.first].where = SlabInfo::Where::kFree;
    result.wiped_slabs++;
    if (random.chance(700)) grant(run.first);
  }
}

void World::wipe_leaving(uint64_t number) {
  const auto found = std::find_if(leaving.begin(), leaving.end(), [&](const Leaving& l) { return l.number == number; });
  const Leaving gone = *found;
  log("wipe of slabs %llu of layer %llu", ull(number), ull(gone.layer));
  aim(CrashAim::At::kWipe);
  const Status status = [&] {
    const Running running(job_running);
    return wipe_layers(agent, superblock, {{gone.layer, layer(gone.layer).spec.slot, gone.runs}}, false);
  }();
  aim_over(CrashAim::At::kWipe);
  if (!job_done("wipe", status)) return;
  result.wipes++;
  free_slabs(gone.runs);
  leaving.remove_if([&](const Leaving& l) { return l.number == number; });
  for (const SlabRun& run : gone.runs) wiped.insert(run.first);
}

// ---- layers and volumes that go

// The layer itself, or the first one below it that is in a chain, by what the records say.
uint64_t World::living_from(uint64_t id) {
  while (id != 0 && layer(id).removed) id = layer(id).disk_parent;
  return id;
}

// The nearest layer above a removed one that is not folded; null: all above are gone.
const Layer* World::head_above(const Layer& one) {
  auto above = layers.find(one.above);
  while (above != layers.end() && above->second.removed) above = layers.find(above->second.above);
  if (above == layers.end()) return nullptr;
  const Layer* head = &above->second;
  while (is_folded(*head)) head = &child_of(*head);
  return head;
}

// Before a removed layer becomes a tombstone its record is made to name the living layer below, so that tombstones below it, which
// nothing else names, give their slots back. False: it is to be tried again.
bool World::relink(uint64_t id) {
  Layer& one = layer(id);
  if (!one.removed || one.disk_children == 0) return true;
  const uint64_t parent = one.next_disk_parent.value_or(living_from(one.disk_parent));
  const Layer* head = head_above(one);
  if (parent == one.disk_parent || head == nullptr) return true;
  if (!one.next_disk_parent.has_value()) {
    one.next_disk_parent = parent;
    if (parent != 0) layer(parent).disk_children++;
  }
  log("layer %llu is to name layer %llu, not %llu", ull(id), ull(parent), ull(one.disk_parent));
  LayerSpec victim = one.spec;
  victim.parent_layer_id = parent;
  victim.slabs.clear();
  LayerSpec cover = head->spec;
  cover.slabs.clear();
  aim(CrashAim::At::kStrip);
  Result<StripReport> report = [&] {
    const Running running(job_running);
    return strip_layers(agent, superblock, {victim}, {cover});
  }();
  aim_over(CrashAim::At::kStrip);
  if (!job_done("relink", report.status)) return false;
  result.relinked++;
  const uint64_t before = one.disk_parent;
  one.disk_parent = parent;
  one.next_disk_parent.reset();
  if (before != 0) {
    layer(before).disk_children--;
    forget_tombstones(before);
  }
  return true;
}

// With what it has: nobody's chain has it. Or with nothing: it has left its chain.
void World::wipe_layer(uint64_t id) {
  if (!relink(id)) return;
  const std::vector<SlabRun> runs = slabs_of(id);
  layer(id).view.reset();
  log("wipe of layer %llu with %llu slabs", ull(id), ull(runs.size()));
  aim(CrashAim::At::kWipe);
  const Status status = [&] {
    const Running running(job_running);
    return wipe_layers(agent, superblock, {{id, layer(id).spec.slot, runs}}, true);
  }();
  aim_over(CrashAim::At::kWipe);
  if (!job_done("wipe of a layer", status)) return;
  result.wipes++;
  free_slabs(runs);
  layer_gone(id);
}

void World::wipe_deleted(SimVolume& one) {
  const std::vector<SlabRun> runs = slabs_of(one.top);
  log("wipe of volume %llu with %llu slabs", ull(one.id), ull(runs.size()));
  aim(CrashAim::At::kWipe);
  const Status status = [&] {
    const Running running(job_running);
    return wipe_volume(agent, superblock,
                       {one.id, one.spec.slot, one.spec.epoch, {{one.top, layer(one.top).spec.slot, runs}}});
  }();
  aim_over(CrashAim::At::kWipe);
  if (!job_done("wipe of a volume", status)) return;
  result.wipes++;
  free_slabs(runs);
  layer_gone(one.top);
  volume_slots.erase(one.spec.slot);
  std::erase_if(volumes, [&](const auto& other) { return other.get() == &one; });
}

// A folded layer without slabs. Its record goes when no grant is out that was given with it in the chain.
void World::remove_from_chain(uint64_t id) {
  Layer& gone = layer(id);
  const uint64_t child = child_of(gone).spec.layer_id;
  gone.waiting = grants_over(id);
  layer(child).spec.parent_layer_id = gone.spec.parent_layer_id;
  gone.removed = true;
  gone.above = child;
  gone.children = 0;
  gone.view.reset();
  result.unchained++;
  log("layer %llu leaves its chain, below layer %llu", ull(id), ull(child));
}

// ---- what is to be done

std::vector<World::Work> World::reclaimable(bool strips) {
  std::vector<Work> found;
  std::set<uint64_t> leaves;
  const auto any_out = [&](const std::vector<GrantRef>& refs) {
    return std::any_of(refs.begin(), refs.end(), [&](const GrantRef& ref) { return still_out(ref); });
  };
  for (const Leaving& gone : leaving) {
    leaves.insert(gone.layer);
    found.push_back({any_out(gone.waiting) ? Work::kForget : Work::kWipeSlabs, gone.number});
  }
  learning.remove_if([&](const Learning& one) {
    return layers.count(one.head) == 0 || layer(one.head).removed || (!one.cut_off && !any_out(one.waiting));
  });
  for (const Learning& one : learning) found.push_back({one.cut_off ? Work::kMerge : Work::kLearn, one.head});
  for (auto& one : volumes) {
    if (one->state == SimVolume::State::kDeleting) found.push_back({Work::kWipeVolume, one->id});
  }
  for (const auto& [id, one] : layers) {
    if (one.removed) {
      if (one.wiped || leaves.count(id) > 0) continue;
      found.push_back({any_out(one.waiting) ? Work::kForgetLayer : Work::kWipeLayer, id});
    } else if (!one.spec.frozen || !one.settled || one.named || leaves.count(id) > 0) {
      continue;
    } else if (one.children == 0) {
      found.push_back({Work::kWipeLayer, id});
    } else if (is_folded(one) && slabs_of(id).empty()) {
      found.push_back({Work::kRemove, id});
    } else if (strips && may_strip(one) && !being_learned(id)) {
      found.push_back({Work::kStrip, id});
      const Layer& head = child_of(one);
      const bool kept = head.spec.frozen && head.settled && (head.named || head.children > 1);
      if (kept && !slabs_of(id).empty()) found.push_back({Work::kMerge, head.spec.layer_id});
    }
  }
  return found;
}

void World::carry_out(const Work& work) {
  switch (work.kind) {
    case Work::kForget:
      for (const Leaving& gone : leaving) {
        if (gone.number == work.id) return ask_to_forget(gone.waiting, gone.runs, {}, &World::forgotten, gone.number);
      }
      return;
    case Work::kForgetLayer: return ask_to_forget(layer(work.id).waiting, {}, {work.id}, &World::layer_forgotten, work.id);
    case Work::kWipeSlabs: return wipe_leaving(work.id);
    case Work::kWipeVolume:
      for (auto& one : volumes) {
        if (one->id == work.id) return wipe_deleted(*one);
      }
      return;
    case Work::kWipeLayer: return wipe_layer(work.id);
    case Work::kRemove: return remove_from_chain(work.id);
    case Work::kLearn:
      for (const Learning& one : learning) {
        if (one.head == work.id) return ask_to_learn(one);
      }
      return;
    case Work::kStrip: return strip(work.id);
    case Work::kMerge: return merge(work.id);
  }
}

void World::reclaim() {
  const std::vector<Work> work = reclaimable(true);
  if (!work.empty()) carry_out(work[random.below(work.size())]);
}

// Until nothing is left but what is in use: each segment is stripped once more, and all that comes of it.
void World::finish_reclaim() {
  aimed.at = CrashAim::At::kNowhere;
  aim_jobs_chance = 0;
  bystander_chance = 0;
  for (int round = 0; round < 3; round++) {
    std::vector<uint64_t> newest;
    for (const Work& work : reclaimable(true)) {
      if (work.kind == Work::kStrip) newest.push_back(work.id);
    }
    for (const uint64_t id : newest) {
      if (may_strip(layer(id)) && !being_learned(id)) strip(id);
    }
    for (uint64_t guard = 0;; guard++) {
      const std::vector<Work> work = reclaimable(false);
      if (work.empty()) break;
      if (guard > 10'000) fail("the jobs on layers never come to an end");
      carry_out(work[0]);
      while (step()) {
      }
    }
  }
}

}  // namespace holdfast::test::crash
