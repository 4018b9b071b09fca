// The books of slabs and layers, as the metadata service keeps them: cuts, copies, deletions.
#include <algorithm>
#include <cstring>

#include "core/page_arena.h"
#include "core/pages.h"
#include "world.h"

namespace holdfast::test::crash {

using format::LayerRecord;
using format::SlabPage;

// ---- slabs

void World::slab_claimed(uint64_t volume_id, uint64_t owner, uint64_t slab, uint64_t generation) {
  if (ignoring) return;
  SlabInfo& info = slabs[slab];
  log("volume %llu claims slab %llu generation %llu for layer %llu", ull(volume_id), ull(slab), ull(generation),
      ull(owner));
  if (info.generation != generation) return;  // STALE: changes nothing
  if (info.where == SlabInfo::Where::kLayer && info.layer != owner) fail("a slab was claimed by two layers");
  // Left its layer meanwhile, or never granted: changes nothing either.
  if (info.where == SlabInfo::Where::kFree || info.where == SlabInfo::Where::kLeaving) return;
  check_claimed(slab, owner);
  info.where = SlabInfo::Where::kLayer;
  info.layer = owner;
  // Whoever takes over now must not take it for its own again.
  const bool was_wiped = wiped.erase(slab) > 0;
  if (was_wiped && aimed.at == CrashAim::At::kNowhere && random.chance(400)) kill_due = now + random.below(20);
}

void World::slab_emptied(uint64_t volume_id, uint64_t owner, uint64_t slab, uint64_t generation) {
  if (ignoring) return;
  SlabInfo& info = slabs[slab];
  log("volume %llu empties slab %llu generation %llu", ull(volume_id), ull(slab), ull(generation));
  if (info.generation != generation || info.where == SlabInfo::Where::kLeaving) return;
  result.emptied++;
  if (info.where == SlabInfo::Where::kLayer && info.layer != owner)
    fail("a slab was emptied by a layer that had it not");
  check_given_back(slab, generation);
  info.where = SlabInfo::Where::kFree;
  if (random.chance(500)) grant(slab);  // handed on at once: a late discard would meet its new owner
}

void World::grant(uint64_t slab) {
  SlabInfo& info = slabs[slab];
  info.where = SlabInfo::Where::kStock;
  info.generation++;
  stock.add(slab, 1, info.generation);
}

void World::volume_event(uint64_t volume_id, Code, const std::string& message) {
  if (ignoring) return;
  log("event of volume %llu: %s", ull(volume_id), message.c_str());
  std::erase_if(unnamed, [&](const std::string& slab) { return message.find(slab) != std::string::npos; });
  if (!damaged && message.find("is mapped by slab") != std::string::npos)
    fail("a chunk was mapped twice: " + message);
}

void World::refill(uint64_t count) {
  bool any = false;
  for (uint64_t s = 0; s < slab_total && count > 0; s++) {
    const uint64_t slab = (s + now) % slab_total;
    if (slabs[slab].where != SlabInfo::Where::kFree) continue;
    grant(slab);
    any = true;
    count--;
  }
  if (!any) stock.declare_full();
}

// A claim that failed may have left the page with a layer that has gone since. Then nobody gets the slab.
void World::sort_by_page(uint64_t slab) {
  SlabInfo& info = slabs[slab];
  SlabPage page;
  info.where = SlabInfo::Where::kFree;
  if (!newest_page(slab, &page).valid() || page.generation != info.generation || page.layer_id == 0) return;
  const auto known = layers.find(page.layer_id);
  const bool lives = known != layers.end() && !known->second.removed;
  const bool about_to = std::any_of(volumes.begin(), volumes.end(), [&](const auto& one) {
    return one->cut != nullptr && one->cut->top.layer_id == page.layer_id;
  });
  info.where = lives || about_to ? SlabInfo::Where::kLayer : SlabInfo::Where::kQuarantine;
  info.layer = page.layer_id;
}

// What the agents of the living find out about the slabs of a dead host: by their pages, before anything is granted.
void World::sort_slabs_by_pages() {
  for (uint64_t slab = 0; slab < slab_total; slab++) {
    if (slabs[slab].where == SlabInfo::Where::kStock) sort_by_page(slab);
  }
}

// A slab that the stopped volume had taken and not yet reported is found by its page, as after a host's death; but
// the stock itself lives on, so only what is in nobody's hands is sorted.
void World::release_stock_of_the_dead() {
  const auto in_stock = stock.slabs();
  std::set<uint64_t> held;
  for (auto& one : volumes) {
    if (one->arena == nullptr) continue;
    for (uint32_t i = 0; i < one->arena->claim_count(); i++) {
      const auto claim = one->arena->claim(i);
      if (claim.state != PageArena::ClaimState::kFree) held.insert(claim.slab);
    }
  }
  for (uint64_t slab = 0; slab < slab_total; slab++) {
    if (slabs[slab].where != SlabInfo::Where::kStock || in_stock.count(slab) > 0 || held.count(slab) > 0) continue;
    sort_by_page(slab);
  }
}

std::vector<SlabRun> World::slabs_of(uint64_t id) const {
  std::vector<SlabRun> runs;
  for (const auto& [slab, info] : slabs) {
    if (info.where == SlabInfo::Where::kLayer && info.layer == id) runs.push_back({slab, 1, info.generation});
  }
  return runs;
}

// ---- layers

Layer& World::layer(uint64_t id) {
  const auto found = layers.find(id);
  if (found == layers.end()) fail("layer " + std::to_string(id) + " is in no book");
  return found->second;
}

// With a slot of its own, and in nobody's chain yet.
LayerSpec World::new_layer(uint64_t parent) {
  LayerSpec spec;
  spec.layer_id = next_layer++;
  spec.birth = spec.layer_id;
  spec.parent_layer_id = parent;
  while (layer_slots.count(spec.slot) > 0) spec.slot++;
  if (spec.slot >= superblock.layer_slots) fail("the simulation has run out of record slots for layers");
  layer_slots.insert(spec.slot);
  // From the first write of it on its record names the parent, whatever becomes of it.
  if (parent != 0) layer(parent).disk_children++;
  return spec;
}

void World::attach(const LayerSpec& spec) {
  Layer& added = layers[spec.layer_id];
  added.spec = spec;
  added.disk_parent = spec.parent_layer_id;
  if (spec.parent_layer_id != 0) layer(spec.parent_layer_id).children++;
}

// Newest first, with the slabs that the books have.
std::vector<LayerSpec> World::chain_of(uint64_t id) {
  std::vector<LayerSpec> chain;
  for (; id != 0; id = layer(id).spec.parent_layer_id) {
    chain.push_back(layer(id).spec);
    chain.back().parent_layer_id = layer(id).disk_parent;  // records stay as they are
    chain.back().slabs = slabs_of(id);
  }
  return chain;
}

// Every grant that is out on a volume whose chain has the layer.
std::vector<GrantRef> World::grants_over(uint64_t id) {
  std::vector<GrantRef> found;
  for (auto& one : volumes) {
    bool has = false;
    for (uint64_t at = one->top; at != 0 && !has; at = layer(at).spec.parent_layer_id) has = at == id;
    if (!has) continue;
    if (const GrantRef writer{one->id, one->opened_spec.epoch}; still_out(writer)) found.push_back(writer);
    for (const Reader& reader : one->readers) found.push_back({one->id, reader.spec.epoch});
  }
  return found;
}

bool World::still_out(const GrantRef& ref) {
  for (auto& one : volumes) {
    if (one->id != ref.volume) continue;
    const bool open = one->state == SimVolume::State::kOpening || one->state == SimVolume::State::kOpen ||
                      one->state == SimVolume::State::kStopping || one->must_take_over;
    if (open && one->opened_spec.epoch == ref.epoch) return true;
    for (const Reader& reader : one->readers) {
      if (reader.spec.epoch == ref.epoch) return true;
    }
  }
  return false;
}

// Its last slab is free. Its parent loses a use, unless it had left the chain before.
void World::layer_gone(uint64_t id) {
  Layer& gone = layer(id);
  if (!gone.removed && gone.spec.parent_layer_id != 0) layer(gone.spec.parent_layer_id).children--;
  gone.removed = gone.wiped = true;
  forget_tombstones(id);
}

// A slot is used again when no record names its layer any more.
void World::forget_tombstones(uint64_t id) {
  while (id != 0) {
    const auto found = layers.find(id);
    if (found == layers.end() || !found->second.wiped || found->second.disk_children > 0) return;
    layer_slots.erase(found->second.spec.slot);
    const uint64_t below = found->second.disk_parent;
    layers.erase(found);
    if (below != 0) layer(below).disk_children--;
    id = below;
  }
}

// ---- cuts

// While the volume is closed the agent makes it, by the records alone.
void World::snapshot(SimVolume& one) {
  begin_cut(one);
  for (uint64_t b = 0; b < one.size_blocks; b++) {
    std::vector<uint64_t> values;
    for (const Candidate& c : after_cut(one.cells[b], one.flushed_upto)) values.push_back(c.value);
    one.cut->view.values.push_back(std::move(values));
  }
  log("snapshot of volume %llu: layer %llu on top", ull(one.id), ull(one.cut->top.layer_id));
  disk.set_errors(0);
  aim(CrashAim::At::kCut);
  const Status written = write_cut(one);
  aim_over(CrashAim::At::kCut);
  set_errors();
  if (crash_due()) return;
  if (!written.ok()) fail("a snapshot's records can't be written: " + written.message);
  cut_happened(one, true);
}

// The layers' records first. Then the volume's names the new top: that is what makes it one.
Status World::write_cut(SimVolume& one) {
  const LayerSpec& top = one.cut->top;
  LayerRecord fresh{};
  fresh.layer_id = top.layer_id;
  fresh.parent_layer_id = top.parent_layer_id;
  fresh.volume_id = one.id;
  fresh.size_bytes = one.cut->view.size_bytes;
  fresh.birth = top.birth;
  fresh.state = format::LayerState::kWritable;
  if (Status status = write_layer_record(agent, superblock, top.slot, fresh); !status.ok()) return status;
  const uint32_t old_slot = layer(one.top).spec.slot;
  auto old = load_layer_record(agent, superblock, old_slot);
  if (!old.ok()) return old.status;
  auto record = load_volume_record(agent, superblock, one.spec.slot);
  if (!record.ok()) return record.status;
  if (!old->has_value() || !record->has_value()) fail("the records of a closed volume are gone");
  (*old)->state = format::LayerState::kFrozen;
  (*old)->size_bytes = one.cut->view.size_bytes;
  if (Status status = write_layer_record(agent, superblock, old_slot, **old); !status.ok()) return status;
  (*record)->top_layer_id = top.layer_id;
  return write_volume_record(agent, superblock, one.spec.slot, **record);
}

void World::begin_cut(SimVolume& one) {
  one.cut = std::make_unique<PendingCut>();
  PendingCut& cut = *one.cut;
  cut.view.size_bytes = one.size_blocks * kBlock;
  cut.top = one.retry.has_value() ? *one.retry : new_layer(one.top);
  cut.named = random.chance(600);
  one.retry.reset();
  given_up.erase(cut.top.layer_id);
}

// While requests are under way. What a dead engine was asked is settled by the record, when it is opened next.
void World::cut_volume(SimVolume& one) {
  if (one.cut != nullptr || one.cutting || one.growing || one.forgetting > 0) return;
  if (one.repeat.has_value()) return repeat_cut(one);
  if (one.spec.layers.size() >= max_layers) return;
  begin_cut(one);
  aim(CrashAim::At::kCut);
  PendingCut& cut = *one.cut;
  now++;
  for (uint64_t b = 0; b < one.size_blocks; b++) cut.view.values.push_back(current_values(one.cells[b], now));
  one.cutting = true;
  log("cut volume %llu: layer %llu on top", ull(one.id), ull(cut.top.layer_id));
  SimVolume* target = &one;
  const SnapshotInfo info{cut.named ? "snapshot of " + std::to_string(cut.top.parent_layer_id) : "", 1};
  one.volume->cut(cut.top, info, 1'000'000'000, [this, target](Result<CutReport> outcome) {
    target->cutting = false;
    if (ignoring) return;
    aim_over(CrashAim::At::kCut);
    log("cut of volume %llu: %s", ull(target->id), code_name(outcome.status.code));
    const Code code = outcome.status.code;
    if (outcome.ok()) {
      result.snapshots++;
      cut_happened(*target, true);
    } else if (code == Code::kIo || code == Code::kHoldExpired) {
      if (code == Code::kIo && error_chance == 0) fail("cut: " + outcome.status.message);
      cut_failed(*target);  // before the commit: it did not happen
    } else if (code != Code::kUnavailable) {
      fail("cut: " + outcome.status.message);
    }
  });
}

// Any of the frozen layers, named or not: what each of them shows, and the volume, must stay the same.
void World::compact_volume(SimVolume& one) {
  if (one.compacting || one.spec.layers.size() < 2) return;
  std::vector<LayerSlabs> sources;
  for (size_t i = 1; i < one.spec.layers.size(); i++) {
    const uint64_t id = one.spec.layers[i].layer_id;
    if (random.chance(800)) sources.push_back({id, slabs_of(id)});
  }
  const uint32_t permille = random.chance(700) ? 1000 : static_cast<uint32_t>(random.below(1000));
  const uint64_t most = random.chance(300) ? 1 + random.below(200) : 0;
  log("compact volume %llu", ull(one.id));
  one.compacting = true;
  SimVolume* target = &one;
  one.volume->compact(sources, permille, most, [this, target](Result<CompactReport> outcome) {
    target->compacting = false;
    if (ignoring) return;
    log("compaction of volume %llu: %s", ull(target->id), code_name(outcome.status.code));
    const Code code = outcome.status.code;
    if (outcome.ok()) {
      result.compacted += outcome->moved_blocks;
    } else if (code != Code::kBusy && code != Code::kUnavailable && (code != Code::kIo || error_chance == 0)) {
      fail("compact: " + outcome.status.message);
    }
  });
}

// Of a cut that happened, though its engine did not live to say so. Until this is answered the engine may be making the
// copies of the frozen pages equal.
void World::repeat_cut(SimVolume& one) {
  one.cutting = true;
  aim(CrashAim::At::kCut);
  log("cut volume %llu again: layer %llu is on top", ull(one.id), ull(one.repeat->layer_id));
  SimVolume* target = &one;
  one.volume->cut(*one.repeat, {}, 1'000'000'000, [this, target](Result<CutReport> outcome) {
    target->cutting = false;
    if (ignoring) return;
    aim_over(CrashAim::At::kCut);
    if (outcome.status.code == Code::kUnavailable) return;
    if (!outcome.ok()) fail("cut, repeated: " + outcome.status.message);
    log("cut of volume %llu: answered at last", ull(target->id));
    layer(target->repeat->parent_layer_id).settled = true;
    target->repeat.reset();
  });
}

// `answered`: else the record alone says so, and the service may ask for it once more before it goes on.
void World::cut_happened(SimVolume& one, bool answered) {
  set_top(one, true);
  PendingCut& cut = *one.cut;
  Layer& frozen = layer(one.top);
  frozen.is_top = false;
  frozen.spec.frozen = true;
  frozen.spec.size_bytes = cut.view.size_bytes;
  frozen.named = cut.named;
  frozen.lineage = one.lineage;
  frozen.view = std::make_unique<FrozenView>(std::move(cut.view));
  attach(cut.top);
  layer(cut.top.layer_id).is_top = true;
  one.top = cut.top.layer_id;
  frozen.settled = answered || random.chance(500);
  if (!frozen.settled) one.repeat = cut.top;
  one.cut.reset();
}

// The same is asked for again, or it is given up; then a record may go on speaking of it.
void World::cut_failed(SimVolume& one) {
  if (random.chance(600)) one.retry = one.cut->top;
  given_up.insert(one.cut->top.layer_id);
  one.cut.reset();
}

void World::set_top(SimVolume& one, bool there) {
  for (VolumeSpec* spec : {&one.spec, &one.opened_spec}) {
    if (spec->layers.empty() || (spec->layers[0].layer_id == one.cut->top.layer_id) == there) continue;
    if (there) {
      spec->layers[0].frozen = true;
      spec->layers.insert(spec->layers.begin(), one.cut->top);
    } else {
      spec->layers.erase(spec->layers.begin());
      spec->layers[0].frozen = false;
    }
  }
}

// Whether a cut that is not settled has happened. For as long as the volume is not open: what the record says may be in
// the cache only, and opening makes it durable.
bool World::resolve_cut(SimVolume& one) {
  if (one.cut == nullptr) return false;
  one.cutting = false;
  format::VolumeRecord pair[2];
  disk.peek(record_address(one), pair, sizeof pair);
  const Copies copies = choose_record(pair[0], pair[1], kPoolUuid, record_address(one));
  if (!copies.valid()) fail("the record of a volume that was cut is not usable");
  return pair[copies.newest].top_layer_id == one.cut->top.layer_id;
}

// ---- what frozen layers show

// Read as somebody would who has made a volume from it.
void World::check_view(Layer& one) {
  VolumeSpec spec;
  spec.volume_id = ~uint64_t{0};
  spec.slot = superblock.volume_slots - 1;
  spec.epoch = 1;
  spec.read_only = true;
  spec.layers = chain_of(one.spec.layer_id);
  spec.size_bytes = one.view->size_bytes;
  std::unique_ptr<Volume> reader;
  Status status{Code::kUnavailable, "open() never answered"};
  Volume::open(environment(nullptr), spec, false, [&](Result<std::unique_ptr<Volume>> opening) {
    status = opening.status;
    if (opening.ok()) reader = std::move(*opening);
  });
  while (status.code == Code::kUnavailable && step()) {
  }
  const std::string name = "frozen layer " + std::to_string(one.spec.layer_id);
  if (!status.ok()) fail(name + " can't be opened: " + status.message);
  PageBuffer buffer(one.view->size_bytes);
  read_now(*reader, 0, one.view->size_bytes / kBlock, buffer.data());
  for (uint64_t b = 0; b < one.view->values.size(); b++) {
    const uint64_t value = value_of(buffer.data() + b * kBlock, b);
    auto& values = one.view->values[b];
    result.checks++;
    if (std::find(values.begin(), values.end(), value) == values.end()) {
      fail(name + " shows something else at block " + std::to_string(b));
    }
    values = {value};
  }
  bool stopped = false;
  reader->abort([&](Status) { stopped = true; });
  while (!stopped && step()) {
  }
}

void World::check_views() {
  for (auto& [id, one] : layers) {
    if (one.view != nullptr) check_view(one);
  }
}

// ---- copies and deletions

// A volume made from a snapshot; nothing of it is on the disk before it is opened.
void World::make_clone() {
  std::vector<Layer*> sources;
  for (auto& [id, one] : layers) {
    if (one.named && one.view != nullptr && one.settled) sources.push_back(&one);
  }
  if (sources.empty() || volumes.size() >= max_volumes || next_volume > 250) return;
  Layer& source = *sources[random.below(sources.size())];
  disk.set_errors(0);
  check_view(source);
  set_errors();
  const auto& values = source.view->values;
  SimVolume& one = add_volume(values.size() + (random.chance(300) ? random.below(40) : 0), source.spec.layer_id);
  for (uint64_t b = 0; b < values.size(); b++) one.cells[b] = settled_cell(values[b][0]);
  one.lineage.insert(source.lineage.begin(), source.lineage.end());
  result.clones++;
  log("volume %llu is made from layer %llu", ull(one.id), ull(source.spec.layer_id));
}

// A snapshot is deleted. Its layer loses its name, and perhaps its last use.
void World::drop_name() {
  std::vector<Layer*> named;
  for (auto& [id, one] : layers) {
    if (one.named) named.push_back(&one);
  }
  if (named.empty()) return;
  Layer& one = *named[random.below(named.size())];
  log("snapshot of layer %llu is deleted", ull(one.spec.layer_id));
  one.named = false;
}

// From now on nobody opens it. Its record and its top are wiped by a job.
void World::delete_volume() {
  std::vector<SimVolume*> idle;
  for (SimVolume* one : in_state(SimVolume::State::kClosed)) {
    if (may_open(*one) && !one->must_take_over && one->cut == nullptr && !one->repeat.has_value()) idle.push_back(one);
  }
  if (idle.empty() || volumes.size() < 2) return;
  SimVolume& one = *idle[random.below(idle.size())];
  log("volume %llu is deleted", ull(one.id));
  one.state = SimVolume::State::kDeleting;
}

}  // namespace holdfast::test::crash
