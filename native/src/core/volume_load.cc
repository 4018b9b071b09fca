// From the slab pages to the map: pages are read in runs, each pair judged, the newer copy loaded, and after a crash of
// the engine the arena's images, which are newer than what is on the disk, laid over it.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "volume_opener.h"

namespace holdfast {

using format::kChunksPerSlab;
using format::kNoChunk;
using format::kPageSize;
using format::SlabEntry;
using format::SlabPage;

namespace {
// Lookups for which memory is asked ahead: as many as a core has at a time. It drops what comes on top.
constexpr uint32_t kAhead = 16;
}  // namespace

// ---- slab pages

void VolumeOpener::plan_reads() {
  std::map<uint64_t, Granted> claims;  // by slab; the arena's word on slabs beats the grant's
  const PageArena* arena = spec_.read_only ? nullptr : environment_.arena;
  for (uint32_t i = 0; arena != nullptr && i < arena->claim_count(); i++) {
    const PageArena::Claim claim = arena->claim(i);
    if (claim.state == PageArena::ClaimState::kFree) continue;
    // What was not claimed to the end was never reported: as good for the top that is now as for the one that was then.
    Granted one{claim.slab, claim.generation, 0, i, claim.state == PageArena::ClaimState::kClaiming};
    for (uint32_t l = 0; l < spec_.layers.size() && !one.claiming; l++) {
      if (spec_.layers[l].layer_id == claim.layer_id) one.layer = l;
    }
    if (claim.state == PageArena::ClaimState::kReturned) {
      returned_[claim.slab] = claim.generation;
      // The engine that gave it back may not have lived to say so.
      volume_->notices_.push_back({false, claim.layer_id, claim.slab, claim.generation});
      continue;
    }
    auto [at, added] = claims.try_emplace(claim.slab, one);
    if (!added && at->second.generation < claim.generation) at->second = one;
  }
  for (uint32_t l = 0; l < spec_.layers.size(); l++) {
    for (const SlabRun& run : spec_.layers[l].slabs) {
      for (uint64_t slab = run.first; slab < run.first + run.count; slab++) {
        if (auto claim = claims.find(slab); claim != claims.end() && claim->second.generation >= run.generation) {
          // Claimed once more when the engine was killed, but the service has it as this layer's all the same.
          if (claim->second.claiming && claim->second.generation == run.generation) {
            claim->second.layer = l;
            claim->second.known = true;
          }
          continue;
        }
        if (auto gone = returned_.find(slab); gone != returned_.end() && gone->second >= run.generation) continue;
        granted_.push_back({slab, run.generation, l, PageArena::kNone, false});
      }
    }
  }
  for (const auto& [slab, one] : claims) {
    if (auto gone = returned_.find(slab); gone != returned_.end() && gone->second >= one.generation) continue;
    granted_.push_back(one);
  }
  std::sort(granted_.begin(), granted_.end(), [](const Granted& a, const Granted& b) { return a.slab < b.slab; });
  for (size_t i = 1; i < granted_.size(); i++) {
    if (granted_[i].slab == granted_[i - 1].slab) {
      return refuse(Code::kCorrupt, "the grant names slab " + std::to_string(granted_[i].slab) + " twice");
    }
  }
  if (granted_.size() > kMaxSlabIndex) return refuse(Code::kInvalidArgument, "the grant has too many slabs");
  for (auto& layer : volume_->layers_) {
    layer.map.resize((volume_->size_bytes_ + format::kChunkSize - 1) / format::kChunkSize);
  }
  std::vector<uint64_t> mapped(volume_->layers_.size());
  for (const Granted& one : granted_) mapped[one.layer] += kChunksPerSlab;
  for (uint32_t l = 0; l < mapped.size(); l++) layer_of(l).map.expect(mapped[l]);
  if (arena != nullptr) {
    volume_->flush_number_ = std::max(volume_->flush_number_, arena->flush_number());
    for (const PageArena::Image& image : arena->images()) images_[image.slab] = image;
  }
  read_more();
  if (outstanding_ == 0) have_pages();
}

void VolumeOpener::read_more() {
  for (Read& read : reads_) {
    if (read.busy || next_ == granted_.size() || !failure_.ok()) continue;
    size_t count = 1;
    while (next_ + count < granted_.size() && count < kSlabsPerRead &&
           granted_[next_ + count].slab == granted_[next_].slab + count &&
           granted_[next_ + count].slab / format::kSlabsPerRegion == granted_[next_].slab / format::kSlabsPerRegion) {
      count++;
    }
    if (read.buffer == nullptr || read.buffer->size() < count * format::kSlabPairSize) {
      read.buffer = std::make_unique<PageBuffer>(count * format::kSlabPairSize);
    }
    read.opener = this;
    read.first = next_;
    read.count = count;
    read.busy = true;
    read.iov = {read.buffer->data(), count * format::kSlabPairSize};
    read.io.op = IoOp::kRead;
    read.io.offset = format::slab_page_offset(superblock_.first_region_offset, granted_[next_].slab);
    read.io.length = read.iov.iov_len;
    read.io.iov = &read.iov;
    read.io.iov_count = 1;
    read.io.user = &read;
    read.io.done = [](IoRequest* request, int error) {
      auto* one = static_cast<Read*>(request->user);
      one->opener->have_run(*one, error);
    };
    next_ += count;
    outstanding_++;
    environment_.device->submit(&read.io);
  }
}

void VolumeOpener::have_run(Read& read, int error) {
  outstanding_--;
  read.busy = false;
  if (error != 0) {
    fail(Code::kIo, "the pages of slabs " + std::to_string(granted_[read.first].slab) + " to " +
                        std::to_string(granted_[read.first + read.count - 1].slab) + " can't be read " +
                        errno_text(error) + "; check the pool's device");
  }
  for (size_t i = 0; i < read.count && failure_.ok(); i++) {
    have_pair(granted_[read.first + i], read.buffer->at<SlabPage>(i * format::kSlabPairSize),
              read.buffer->at<SlabPage>(i * format::kSlabPairSize + kPageSize));
  }
  read_more();
  if (outstanding_ == 0) have_pages();
}

void VolumeOpener::fail(Code code, std::string why) {
  if (failure_.ok()) failure_ = {code, std::move(why)};
}

void VolumeOpener::have_pair(const Granted& granted, const SlabPage& a, const SlabPage& b) {
  const uint64_t address = format::slab_page_offset(superblock_.first_region_offset, granted.slab);
  const Copies copies = choose_slab(a, b, environment_.pool, address);
  const std::string slab_name = "slab " + std::to_string(granted.slab);
  const auto image = images_.find(granted.slab);
  // A cut is committed only when its layer's pages are durable: an image of a layer below the top has nothing to add.
  const bool has_image =
      granted.layer == 0 && image != images_.end() && image->second.generation == granted.generation;
  // The arena says that the claim was never completed: whatever its pages look like, there is no data yet. It is made
  // again from the start, which finds out whether the slab is ours at all and has both copies durable.
  if (granted.claiming && !has_image) return keep_unclaimed(granted);
  if (copies.bad() && !has_image) {
    // Named once the rest is known: what is not mapped elsewhere may have been here.
    bad_slabs_.push_back(slab_name + " (layer " + std::to_string(spec_.layers[granted.layer].layer_id) +
                         ", page at byte " + std::to_string(address) + ": copy A " + page_state_text(copies.state[0]) +
                         ", copy B " + page_state_text(copies.state[1]) + ")");
    return;
  }
  const SlabPage* newest = !copies.valid() ? nullptr : copies.newest == 0 ? &a : &b;
  if (newest != nullptr && newest->generation > granted.generation) {
    return fail(Code::kStale, slab_name + " has been handed on: its page is of generation " +
                                  std::to_string(newest->generation) + ", the grant of generation " +
                                  std::to_string(granted.generation));
  }
  const LayerSpec& layer = spec_.layers[granted.layer];
  const bool current = newest != nullptr && newest->generation == granted.generation && newest->layer_id != 0;
  if (!current) {
    // Never claimed, given back, or the claim was cut off: no data can be in it.
    if (!has_image) return keep_unclaimed(granted);
    return fail(Code::kCorrupt, slab_name + " has changes in memory but no valid page on the disk");
  }
  const SlabPage& other = copies.newest == 0 ? b : a;
  const PageState other_state = copies.state[1 - copies.newest];
  // A claim that was not finished, made again after a cut for the layer that is on top since: the copy that named this one is damaged.
  // Nothing can be in the slab, for both copies name a layer before anything goes in.
  const bool remade = newest->layer_id != layer.layer_id && !has_image && other_state != PageState::kOk && is_empty(*newest) &&
                      std::any_of(spec_.layers.begin() + granted.layer, spec_.layers.end(),
                                  [&](const LayerSpec& one) { return one.layer_id == newest->layer_id; });
  if (newest->layer_id != layer.layer_id && !remade) {
    return fail(Code::kCorrupt, slab_name + " is granted as layer " + std::to_string(layer.layer_id) +
                                    "'s, but its page names layer " + std::to_string(newest->layer_id) +
                                    ". Run `holdfast pool check`");
  }
  // Layers that came from another volume have that volume's epochs.
  if (!spec_.read_only && newest->volume_id == spec_.volume_id && newest->epoch > spec_.epoch) {
    return fail(Code::kStale, slab_name + " was written under epoch " + std::to_string(newest->epoch) +
                                  ", newer than the grant's " + std::to_string(spec_.epoch));
  }
  const bool other_current =
      other_state == PageState::kOk && other.generation == granted.generation && other.layer_id == newest->layer_id;
  // Half a claim, in which nothing can be yet; unless the other copy is damaged and was more than that: who knows.
  const bool half_claimed = !other_current && !has_image && granted.layer == 0 && is_empty(*newest);
  if (half_claimed && (other_state == PageState::kOk || other_state == PageState::kBlank)) {
    return keep_unclaimed(granted);
  }
  if (other_state != PageState::kOk) {
    uint32_t low = kNoChunk;
    uint32_t high = 0;
    for (const SlabEntry& entry : newest->entries) {
      if (entry.logical_chunk == kNoChunk) continue;
      low = std::min(low, entry.logical_chunk);
      high = std::max(high, entry.logical_chunk);
    }
    tell(Code::kCorrupt,
         std::string("copy ") + "BA"[copies.newest] + " of the page of " + slab_name + " (byte " +
             std::to_string(address + (copies.newest == 0 ? kPageSize : 0)) + " of the pool) " +
             page_state_text(other_state) + "; the other copy serves" +
             (low == kNoChunk
                  ? std::string()
                  : ". It maps parts of bytes " + std::to_string(uint64_t{low} * format::kChunkSize) + " to " +
                        std::to_string((uint64_t{high} + 1) * format::kChunkSize) + " of the volume"));
  }
  if (half_claimed || remade) return keep_unclaimed(granted);
  if (other_state == PageState::kBadCrc && granted.layer == 0 && !spec_.read_only) {
    torn_.push_back(address + (copies.newest == 0 ? kPageSize : 0));
  }
  load(granted, *newest, copies, other_current ? &other : nullptr,
       has_image ? &environment_.arena->image(image->second.slot) : nullptr,
       has_image ? image->second.slot : PageArena::kNone);
}

void VolumeOpener::keep_unclaimed(const Granted& granted) {
  if (granted.layer != 0 || spec_.read_only) return;
  volume_->unclaimed_.push_back({{granted.slab, granted.generation}, granted.claim, !granted.claiming || granted.known});
}

// Entries that make no sense although the page's check is right were never written by a correct engine.
std::string VolumeOpener::nonsense(const SlabPage& page, bool image) const {
  const uint64_t chunks = (volume_->size_bytes_ + format::kChunkSize - 1) / format::kChunkSize;
  if (page.hole_count > format::kHolesPerSlab) return "counts more holes than it can hold";
  for (const SlabEntry& entry : page.entries) {
    if (entry.logical_chunk == kNoChunk) {
      if ((entry.data | entry.zero) != 0) return "has blocks in a free chunk";
      continue;
    }
    if (entry.logical_chunk >= chunks)
      return "maps chunk " + std::to_string(entry.logical_chunk) + ", past the volume's end";
    if ((entry.data & entry.zero) != 0) return "has blocks that are both data and zeros";
    if (!image && (entry.data | entry.zero) == 0)
      return "maps chunk " + std::to_string(entry.logical_chunk) + " without any block";
  }
  return {};
}

void VolumeOpener::load(const Granted& granted, const SlabPage& disk, const Copies& copies, const SlabPage* older,
                        const SlabPage* image, uint32_t slot) {
  VolumeImpl& volume = *volume_;
  const SlabPage& page = image != nullptr ? *image : disk;
  if (std::string why = nonsense(page, image != nullptr); !why.empty()) {
    return fail(Code::kCorrupt,
                "the page of slab " + std::to_string(granted.slab) + " " + why + ". Run `holdfast pool check`");
  }
  const uint32_t index = volume.slabs_.add();
  Slab& slab = volume.slabs_[index];
  slab.number = granted.slab;
  slab.generation = granted.generation;
  slab.layer = static_cast<uint16_t>(spec_layers_ - 1 - granted.layer);
  slab.claim = granted.claim;
  slab.newest = static_cast<uint8_t>(copies.newest) & 1;
  slab.sequence = disk.header.sequence;
  slab.unequal = !copies.equal;
  volume.flush_number_ = std::max(volume.flush_number_, disk.header.sequence);
  if (older != nullptr) volume.flush_number_ = std::max(volume.flush_number_, older->header.sequence);
  volume.slabs_.load(index, page.entries);

  if (granted.layer == 0) volume.add_to_top(index);
  VolumeImpl::Layer& layer = layer_of(granted.layer);
  for (uint32_t c = 0; c < kAhead; c++) layer.map.prefetch(page.entries[c].logical_chunk);
  uint32_t run_first = kNoChunk;
  uint32_t run_place = 0;
  uint32_t run_length = 0;
  const auto put = [&] {
    if (run_length > 0) layer.map.set_run(run_first, run_length, run_place);
    run_length = 0;
  };
  for (uint32_t c = 0; c < kChunksPerSlab; c++) {
    const SlabEntry& entry = page.entries[c];
    if (c + kAhead < kChunksPerSlab) layer.map.prefetch(page.entries[c + kAhead].logical_chunk);
    if (entry.logical_chunk == kNoChunk) continue;
    volume.data_chunks_ += entry.data != 0;
    const uint32_t chunk = entry.logical_chunk;
    const bool follows =
        run_length > 0 && chunk == run_first + run_length && (index << 8 | c) == run_place + run_length;
    if (!follows) put();
    const Place taken = layer.map.find(chunk);
    if (taken != kNoPlace) {
      if (taken >> 8 == index) {
        return fail(Code::kCorrupt, "the page of slab " + std::to_string(granted.slab) + " maps chunk " +
                                        std::to_string(chunk) + " twice. Run `holdfast pool check`");
      }
      twice_.push_back({granted.layer, chunk, index});
      continue;
    }
    if (run_length == 0) {
      run_first = chunk;
      run_place = index << 8 | c;
    }
    run_length++;
  }
  put();
  if (page.hole_count > 0) {
    slab.holes = 1;
    auto& holes = volume.slab_holes_[index];
    holes.assign(page.holes, page.holes + page.hole_count);
    for (const format::HoleRange& hole : holes) layer.holes.add(hole.start, uint64_t{hole.start} + hole.length);
  }
  if (granted.layer != 0 || spec_.read_only) return;
  if (granted.claim != PageArena::kNone) volume.notices_.push_back({true, layer.id, slab.number, slab.generation});
  // Chunks that are free now, but that a copy on the disk still maps, are not to be used before that copy is gone.
  const auto still_maps = [&](const SlabPage* copy) {
    if (copy == nullptr) return false;
    for (uint32_t c = 0; c < kChunksPerSlab; c++) {
      if (copy->entries[c].logical_chunk != kNoChunk && page.entries[c].logical_chunk == kNoChunk) return true;
    }
    return false;
  };
  slab.unsettled = image != nullptr && still_maps(&disk) ? 2 : still_maps(older) ? 1 : 0;
  if (slab.unsettled > 0) {
    volume.unsettled_++;
  } else if (volume.usable_free(slab) > 0) {
    volume.list_slab(index);
  }
  if (image != nullptr) adopt_image(index, slot);
}

// An image without a slab of ours must not be left to haunt the arena; one with a slab is dirty by definition.
void VolumeOpener::adopt_image(uint32_t index, uint32_t slot) {
  VolumeImpl& volume = *volume_;
  volume.slabs_.plain(index);
  if (volume.hot_size_ % VolumeImpl::kHotBlock == 0) {
    volume.hot_blocks_.push_back(std::make_unique<HotSlab[]>(VolumeImpl::kHotBlock));
  }
  const uint32_t at = volume.hot_size_++;
  volume.hot_live_++;
  HotSlab& one = volume.hot(at);
  one = HotSlab{};
  one.slab = index;
  one.slot = slot;
  volume.slabs_[index].hot = at;
  volume.mark_dirty(one);
  images_.erase(volume.slabs_[index].number);
}

// ---- everything has been read

void VolumeOpener::have_pages() {
  if (!failure_.ok()) return refuse(failure_.code, std::move(failure_.message));
  if (!bad_slabs_.empty()) return refuse(Code::kCorrupt, bad_slabs_text());
  if (!settle_twice()) return refuse(failure_.code, std::move(failure_.message));
  blot_torn(0);
}

// Made whole by the next write to it (pages.h), a torn copy might map chunks that have another use by now.
void VolumeOpener::blot_torn(int error) {
  if (error != 0) {
    return refuse(Code::kIo, "a torn copy of a slab's page can't be written over " + errno_text(error) +
                                 "; check the pool's device");
  }
  if (torn_.empty()) return pages_settled();
  const uint64_t address = torn_.back();
  torn_.pop_back();
  blot(pages_.data(), format::kMagicSlab);
  submit(IoOp::kWrite, address, 1, 0, &VolumeOpener::blot_torn);
}

void VolumeOpener::pages_settled() {
  for (const auto& [slab, image] : images_) environment_.arena->release(image.slot);
  images_.clear();
  granted_.clear();
  granted_.shrink_to_fit();
  spec_.layers.clear();
  if (spec_.read_only) return serve();
  environment_.arena->raise_flush_number(volume_->flush_number_);
  // What a killed engine had acknowledged may be in the device's cache only: a first flush before anything is served.
  if (!taking_over_) return serve();
  volume_->state_ = VolumeImpl::State::kOpen;
  first_flush_.home = home_;
  first_flush_.user = this;
  first_flush_.done = [](FlushWaiter* waiter, int error) {
    static_cast<VolumeOpener*>(waiter->user)->first_flush_done(error);
  };
  std::unique_lock lock(volume_->mu_);
  volume_->request_flush(&first_flush_);
  volume_->unlock(lock);
}

void VolumeOpener::first_flush_done(int error) {
  if (error != 0) {
    // Everything is still dirty, in the arena too, and the next flush tries again: the volume may serve.
    std::unique_lock lock(volume_->mu_);
    tell(Code::kIo, "the first flush after taking over failed; it is tried again with the next one");
    lock.unlock();
  }
  serve();
}

void VolumeOpener::serve() {
  volume_->state_ = VolumeImpl::State::kOpen;
  for (LayerSpec& layer : volume_->spec_.layers) {
    layer.slabs.clear();
    layer.slabs.shrink_to_fit();
  }
  end({});
}

std::string VolumeOpener::bad_slabs_text() const {
  std::string text = "both copies of the page of ";
  for (size_t i = 0; i < bad_slabs_.size() && i < kNamed; i++) text += (i > 0 ? ", " : "") + bad_slabs_[i];
  if (bad_slabs_.size() > kNamed) text += " and " + std::to_string(bad_slabs_.size() - kNamed) + " more";
  // The logical range: what no other slab accounts for.
  const auto chunks = static_cast<uint32_t>((volume_->size_bytes_ + format::kChunkSize - 1) / format::kChunkSize);
  uint32_t low = kNoChunk;
  uint32_t high = 0;
  for (uint32_t c = 0; c < chunks;) {
    uint32_t mapped = chunks;
    for (const auto& layer : volume_->layers_) mapped = layer.map.next_mapped(c, mapped);
    if (mapped > c) {
      low = std::min(low, c);
      high = mapped;
      c = mapped;
    }
    while (c < chunks && volume_->top().map.find(c) != kNoPlace) c++;
    if (c < chunks && mapped == c) c++;  // mapped by an older layer only
  }
  text += " are damaged";
  if (low != kNoChunk) {
    text += "; what it maps lies within bytes " + std::to_string(uint64_t{low} * format::kChunkSize) + " to " +
            std::to_string(uint64_t{high} * format::kChunkSize) + " of the volume, where no other slab has them";
  }
  return text + ". It is not served as empty; restore it from a backup, or run `holdfast pool check`";
}

// A chunk in two slabs of one layer can only come from a page copy that should have been superseded: the page with
// the higher flush number is right. Equal numbers can't be told apart. In the writable layer the other one is repaired,
// a frozen layer's pages stay as they are.
bool VolumeOpener::settle_twice() {
  for (const Twice& twice : twice_) {
    VolumeImpl& volume = *volume_;
    // Who has it by now: there may have been more than two.
    auto& map = layer_of(twice.layer).map;
    const uint32_t holder = map.find(twice.chunk) >> 8;
    const Slab& a = volume.slabs_[holder];
    const Slab& b = volume.slabs_[twice.slab];
    const std::string what = "chunk " + std::to_string(twice.chunk) + " (byte " +
                             std::to_string(uint64_t{twice.chunk} * format::kChunkSize) +
                             " of the volume) is mapped by slab " + std::to_string(a.number) + " and by slab " +
                             std::to_string(b.number);
    if (a.sequence == b.sequence) {
      fail(Code::kCorrupt, what + " under the same flush number. Run `holdfast pool check`");
      return false;
    }
    const uint32_t loser = a.sequence < b.sequence ? holder : twice.slab;
    const uint32_t winner = loser == holder ? twice.slab : holder;
    const uint32_t loser_at = entry_of(loser, twice.chunk);
    const uint32_t winner_at = entry_of(winner, twice.chunk);
    map.erase(twice.chunk);
    map.set(twice.chunk, winner << 8 | winner_at);
    tell(Code::kCorrupt,
         what + "; the one in slab " + std::to_string(volume.slabs_[winner].number) + " is newer and serves");
    if (spec_.read_only || twice.layer != 0) continue;
    HotSlab* image = volume.ensure_hot(loser);
    if (image == nullptr) {
      fail(Code::kUnavailable, "there is no room for the page images that its repair needs");
      return false;
    }
    volume.set_entry(loser, loser_at, kFreeEntry);
    volume.mark_dirty(*image);
    // The chunk is free once both copies have lost it: as after any other crash.
    Slab& slab = volume.slabs_[loser];
    if (volume.listed(slab)) volume.unlist_slab(loser);
    slab.free_chunks++;
    if (slab.unsettled == 0) volume.unsettled_++;
    slab.unsettled = 2;
  }
  return true;
}

uint32_t VolumeOpener::entry_of(uint32_t slab, uint32_t chunk) const {
  for (uint32_t c = 0; c < kChunksPerSlab; c++) {
    if (volume_->slabs_.entry(slab, c).logical_chunk == chunk) return c;
  }
  HF_ASSERT(!"the slab that a chunk was found in has it");
  return 0;
}

}  // namespace holdfast
