// The end of a frozen layer's life, as far as this volume goes: slabs in which nothing can be resolved any more are taken out of the
// map, and a layer that has none left out of the chain.
//
// Slabs know their layer by its index, oldest 0. A layer that leaves moves all newer ones down by one: every index is changed under one
// hold of the lock. None is kept across one: a request knows places, not layers; a cut has the volume for itself; and of a compaction
// what it keeps by layer is changed too.
#include <algorithm>

#include "volume_impl.h"

namespace holdfast {

using format::kChunksPerSlab;
using format::kNoChunk;
using format::SlabEntry;

void VolumeImpl::forget(const std::vector<SlabRun>& slabs, const std::vector<uint64_t>& layers, Done done) {
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  std::vector<SlabRun> wanted = slabs;
  std::sort(wanted.begin(), wanted.end(), [](const SlabRun& a, const SlabRun& b) { return a.first < b.first; });
  const IsWanted is_wanted = [&](uint64_t number, uint64_t generation) {
    auto run = std::upper_bound(wanted.begin(), wanted.end(), number,
                                [](uint64_t one, const SlabRun& other) { return one < other.first; });
    if (run == wanted.begin()) return false;
    --run;
    return number < run->first + run->count && generation == run->generation;
  };
  std::vector<bool> leaving(layers_.size());
  for (size_t i = 0; i < layers_.size(); i++) {
    leaving[i] = std::find(layers.begin(), layers.end(), layers_[i].id) != layers.end();
  }
  std::vector<uint32_t> found;
  Status refusal = find_forgotten(is_wanted, leaving, &found);
  if (refusal.ok()) {
    forget_found(found);
    forget_claims(is_wanted, layers);
    if (!layers.empty()) drop_layers(leaving);
  }
  if (!refusal.ok() || found.empty()) {
    post_done(home, std::move(done), std::move(refusal));
    return unlock(lock);
  }
  control_.kind = Control::Kind::kForget;
  control_.home = home;
  control_.done = std::move(done);
  // When it is answered the slabs are wiped and handed on: reads that began before, in this very period too, may be at their places until then.
  forget_.epoch = epoch_;
  forget_.waiting = true;
  bump_epoch();
  unlock(lock);
}

Status VolumeImpl::find_forgotten(const IsWanted& is_wanted, const std::vector<bool>& leaving,
                                  std::vector<uint32_t>* found) const {
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  if (state_ != State::kOpen) return {Code::kUnavailable, name + " is not open"};
  if (control_.kind != Control::Kind::kNone) {
    return {Code::kBusy, name + " is being grown, cut or closed, or its writes are held; try again when that is done"};
  }
  if (leaving.back()) {
    return {Code::kInvalidArgument, name + " can't do without layer " + std::to_string(top().id) + ": it is its top"};
  }
  for (uint32_t i = 0; i < slabs_.size(); i++) {
    const Slab& slab = slabs_[i];
    if (slab.state == SlabState::kVacant) continue;
    if (slab.state == SlabState::kLive && is_wanted(slab.number, slab.generation)) {
      if (!read_only_ && in_top(slab)) {
        return {Code::kInvalidArgument, name + " can't forget slab " + std::to_string(slab.number) +
                                            ": it belongs to the layer that is written"};
      }
      found->push_back(i);
    } else if (leaving[slab.layer]) {
      return {Code::kInvalidArgument, name + " can't do without layer " + std::to_string(layers_[slab.layer].id) +
                                          ": it has slab " + std::to_string(slab.number)};
    }
  }
  return {};
}

void VolumeImpl::forget_found(const std::vector<uint32_t>& found) {
  std::vector<bool> holes(layers_.size());
  for (uint32_t index : found) {
    if (slabs_[index].holes) holes[slabs_[index].layer] = true;
    forget_slab(index);
  }
  for (size_t i = 0; i < layers_.size(); i++) {
    if (!holes[i]) continue;
    layers_[i].holes = HoleSet();
    for (const auto& [slab, ranges] : slab_holes_) {
      if (slabs_[slab].layer != i) continue;
      for (const format::HoleRange& hole : ranges) layers_[i].holes.add(hole.start, uint64_t{hole.start} + hole.length);
    }
  }
}

void VolumeImpl::forget_slab(uint32_t index) {
  Slab& slab = slabs_[index];
  HF_ASSERT(slab.hot == kNoIndex);
  LayerMap& map = layers_[slab.layer].map;
  for (uint32_t c = 0; c < kChunksPerSlab; c++) {
    const SlabEntry entry = slabs_.entry(index, c);
    if (entry.logical_chunk == kNoChunk) continue;
    data_chunks_ -= entry.data != 0;
    if (map.find(entry.logical_chunk) == (index << 8 | c)) map.erase(entry.logical_chunk);
  }
  if (slab.holes) slab_holes_.erase(index);
  // An engine that takes over must not take it for the volume's again.
  if (slab.claim != PageArena::kNone) arena_->set_claim_state(slab.claim, PageArena::ClaimState::kFree);
  slabs_.remove(index);
}

// Those that an engine before this one had claimed, and that were found to hold nothing. A claim of a layer that has left the chain
// would be taken for the top's.
void VolumeImpl::forget_claims(const IsWanted& is_wanted, const std::vector<uint64_t>& layers) {
  for (uint32_t i = 0; arena_ != nullptr && i < arena_->claim_count(); i++) {
    const PageArena::Claim claim = arena_->claim(i);
    if (claim.state == PageArena::ClaimState::kFree || claim.layer_id == top().id) continue;
    const bool left = claim.state == PageArena::ClaimState::kClaimed &&
                      std::find(layers.begin(), layers.end(), claim.layer_id) != layers.end();
    if (!left && !is_wanted(claim.slab, claim.generation)) continue;
    arena_->set_claim_state(i, PageArena::ClaimState::kFree);
    std::erase_if(unclaimed_, [&](const Unclaimed& one) { return one.directory == i; });
  }
}

void VolumeImpl::drop_layers(const std::vector<bool>& leaving) {
  std::vector<Layer> kept;
  std::vector<bool> sources;
  std::vector<uint16_t> at(layers_.size());
  for (size_t i = 0; i < layers_.size(); i++) {
    if (leaving[i]) {
      std::erase_if(spec_.layers, [&](const LayerSpec& spec) { return spec.layer_id == layers_[i].id; });
      continue;
    }
    at[i] = static_cast<uint16_t>(kept.size());
    kept.push_back(std::move(layers_[i]));
    if (compact_ != nullptr && i < compact_->from.size()) sources.push_back(compact_->from[i]);
  }
  if (kept.size() < leaving.size()) {
    for (uint32_t i = 0; i < slabs_.size(); i++) {
      if (slabs_[i].state != SlabState::kVacant) slabs_[i].layer = at[slabs_[i].layer];
    }
    chain_.clear();
  }
  layers_.swap(kept);
  if (compact_ != nullptr) compact_->from = std::move(sources);
}

// Whenever the grace period has moved on.
void VolumeImpl::forget_check() {
  if (!leave_epoch(forget_.epoch)) return;
  forget_.waiting = false;
  if (control_.kind == Control::Kind::kForget) control_end({});
}

}  // namespace holdfast
