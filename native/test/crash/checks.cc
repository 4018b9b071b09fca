// What the disk must hold at certain moments, whoever writes it; and at the end, what `pool check` makes of it.
#include <algorithm>
#include <cstring>

#include "core/checker.h"
#include "core/pages.h"
#include "world.h"

namespace holdfast::test::crash {

using format::LayerRecord;
using format::SlabEntry;
using format::SlabPage;
using format::VolumeRecord;

Copies World::newest_page(uint64_t slab, SlabPage* page) const {
  SlabPage pair[2];
  disk.peek(page_address(slab), pair, sizeof pair);
  const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab));
  if (copies.valid()) *page = pair[copies.newest];
  return copies;
}

Copies World::durable_page(uint64_t slab, SlabPage* page) const {
  SlabPage pair[2];
  disk.peek_durable(page_address(slab), pair, sizeof pair);
  const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab));
  if (copies.valid()) *page = pair[copies.newest];
  return copies;
}

// ---- every write and discard

void World::submitted(const IoRequest& request) {
  if (ignoring || request.op == IoOp::kRead || request.op == IoOp::kFlush) return;
  if (request.op == IoOp::kWrite && is_page(request.offset)) {
    page_writes++;
    for (uint64_t at = 0; at < request.length; at += kBlock) check_overwrite(request.offset + at);
    if (request.length == kBlock) check_page_of_job(request.offset, request.iov[0].iov_base);
    return;
  }
  const uint64_t data = format::slab_data_offset(superblock.first_region_offset, 0);
  const uint64_t slab = (request.offset - data) / format::kSlabSize;
  if (request.op == IoOp::kDiscard) {
    for (uint64_t at = 0; at < request.length; at += format::kSlabSize) check_discard(slab + at / format::kSlabSize);
    return;
  }
  const SlabInfo& info = slabs[slab];
  if (info.where != SlabInfo::Where::kStock && info.where != SlabInfo::Where::kLayer) {
    fail("data goes into slab " + std::to_string(slab) + ", which is nobody's");
  }
  uint64_t owner = info.layer;
  if (info.where == SlabInfo::Where::kStock) {  // taken, and not yet heard of
    SlabPage page;
    disk.peek(page_address(slab), &page, sizeof page);
    owner = page.layer_id;
  } else if (const auto known = layers.find(owner); known != layers.end() && known->second.settled && owner != merging) {
    fail("data goes into slab " + std::to_string(slab) + " of a layer that is frozen");
  }
  check_claimed(slab, owner);
  if (owner == merging && owner != 0) check_merge_data(slab, request);
}
// A slab is discarded while it is still its old owner's, and when no copy of its page says so any more: late, it would
// meet the next owner's data; early, a crash would leave a map to nothing.
void World::check_discard(uint64_t slab) {
  const SlabInfo& info = slabs[slab];
  if (info.where != SlabInfo::Where::kLayer && info.where != SlabInfo::Where::kLeaving) {
    fail("slab " + std::to_string(slab) + " is discarded when it may be somebody else's");
  }
  SlabPage pair[2];
  disk.peek_durable(page_address(slab), pair, sizeof pair);
  for (uint32_t copy = 0; copy < 2; copy++) {
    const PageState state = verify(pair[copy], kPoolUuid, page_address(slab) + copy * kBlock);
    if (state == PageState::kOk && pair[copy].layer_id != 0 && pair[copy].generation == info.generation) {
      fail("slab " + std::to_string(slab) + " is discarded while copy " + "AB"[copy] + " of its page names its layer");
    }
  }
}

// Of two copies the one that is certain to serve is never written over: torn, it would leave the older one. (Where
// writes fail their outcome is unknown, and "the same copy again" may be that one.)
void World::check_overwrite(uint64_t address) {
  if (error_chance > 0) return;
  const uint64_t pair_address = address / (2 * kBlock) * (2 * kBlock);
  PageBuffer pair(2 * kBlock);
  disk.peek_durable(pair_address, pair.data(), pair.size());
  const auto newer = [&]<typename Page>(const Page& a, const Page& b) {  // -1: as good as each other
    const Copies copies = [&] {
      if constexpr (std::is_same_v<Page, SlabPage>) return choose_slab(a, b, kPoolUuid, pair_address);
      else return choose_record(a, b, kPoolUuid, pair_address);
    }();
    return copies.equal ? -1 : copies.newest;
  };
  int serves = -1;
  if (address >= superblock.first_region_offset) serves = newer(pair.at<SlabPage>(0), pair.at<SlabPage>(kBlock));
  else if (address >= superblock.layer_table_offset)
    serves = newer(pair.at<LayerRecord>(0), pair.at<LayerRecord>(kBlock));
  else serves = newer(pair.at<VolumeRecord>(0), pair.at<VolumeRecord>(kBlock));
  if (serves >= 0 && pair_address + static_cast<uint64_t>(serves) * kBlock == address) {
    fail("the copy that serves is written over, at byte " + std::to_string(address));
  }
  // As good as each other: then the other one must not be on its way to the disk either.
  const uint64_t other = pair_address + (address == pair_address ? kBlock : 0);
  PageBuffer seen(kBlock);
  disk.peek(other, seen.data(), kBlock);
  if (serves < 0 && std::memcmp(seen.data(), pair.data() + (other - pair_address), kBlock) != 0) {
    fail("both copies of a page may be torn at once, at byte " + std::to_string(address));
  }
}

// A claimed slab has neither copy left as an earlier owner's or a blank one: they say whose it is, or were torn later.
// Durably, unless failed writes may have left one in the cache only.
void World::check_claimed(uint64_t slab, uint64_t owner) {
  SlabPage pair[2];
  if (error_chance > 0) disk.peek(page_address(slab), pair, sizeof pair);
  else disk.peek_durable(page_address(slab), pair, sizeof pair);
  for (uint32_t copy = 0; copy < 2; copy++) {
    const PageState state = verify(pair[copy], kPoolUuid, page_address(slab) + copy * kBlock);
    if (state == PageState::kBadCrc) continue;
    if (state == PageState::kOk && pair[copy].generation == slabs[slab].generation && pair[copy].layer_id == owner)
      continue;
    fail("slab " + std::to_string(slab) + " is used, but copy " + "AB"[copy] + " of its page does not name its layer");
  }
}

// A slab that was given back is free in both copies, whichever of them gets lost.
void World::check_given_back(uint64_t slab, uint64_t generation) {
  SlabPage pair[2];
  disk.peek_durable(page_address(slab), pair, sizeof pair);
  for (uint32_t copy = 0; copy < 2; copy++) {
    const PageState state = verify(pair[copy], kPoolUuid, page_address(slab) + copy * kBlock);
    if (state == PageState::kOk && pair[copy].layer_id == 0 && pair[copy].generation == generation) continue;
    fail("slab " + std::to_string(slab) + " was given back, but copy " + "AB"[copy] + " of its page is not free");
  }
}

// ---- records

// Before a crash: the epochs that the records have reached for certain.
void World::note_records() {
  for (auto& one : volumes) {
    VolumeRecord pair[2];
    disk.peek_durable(record_address(*one), pair, sizeof pair);
    const Copies copies = choose_record(pair[0], pair[1], kPoolUuid, record_address(*one));
    if (!copies.valid() || pair[copies.newest].volume_id != one->id) continue;  // the slot may have been another's
    one->recorded_epoch = std::max(one->recorded_epoch, pair[copies.newest].epoch);
  }
}

// After it: epochs only grow, and what a record has said is not forgotten.
void World::check_records() {
  for (auto& one : volumes) {
    VolumeRecord pair[2];
    disk.peek(record_address(*one), pair, sizeof pair);
    const Copies copies = choose_record(pair[0], pair[1], kPoolUuid, record_address(*one));
    const std::string name = "the record of volume " + std::to_string(one->id);
    if (copies.bad()) fail("both copies of " + name + " are damaged");
    if (one->recorded_epoch == 0) continue;
    if (!copies.valid() || pair[copies.newest].volume_id != one->id) fail(name + " is gone");
    if (pair[copies.newest].epoch < one->recorded_epoch) fail(name + " has lost an epoch");
    if (pair[copies.newest].size_bytes < one->recorded_blocks * kBlock) fail(name + " has lost a size");
    if (one->state != SimVolume::State::kDeleting) check_chain(*one, pair[copies.newest].top_layer_id);
  }
}

// From a volume's record down, as somebody follows it who has nothing but the disk: past tombstones, to what the books say.
void World::check_chain(const SimVolume& one, uint64_t top) {
  std::map<uint64_t, LayerRecord> records;
  for (const uint32_t slot : layer_slots) {
    LayerRecord pair[2];
    const uint64_t address = superblock.layer_table_offset + uint64_t{slot} * 2 * kBlock;
    disk.peek(address, pair, sizeof pair);
    const Copies copies = choose_record(pair[0], pair[1], kPoolUuid, address);
    if (copies.valid()) records[pair[copies.newest].layer_id] = pair[copies.newest];
  }
  std::vector<uint64_t> found;
  for (uint64_t id = top; id != 0;) {
    const auto record = records.find(id);
    if (record == records.end()) {
      fail("the chain of volume " + std::to_string(one.id) + " leads to layer " + std::to_string(id) + ", which has no record");
    }
    const auto known = layers.find(id);
    const bool removed = known != layers.end() && known->second.removed;
    if (record->second.state != format::LayerState::kDeleted && !removed) found.push_back(id);
    id = record->second.parent_layer_id;
  }
  std::vector<uint64_t> wanted;
  if (top != one.top) wanted.push_back(top);  // a cut of which nobody has heard yet
  for (const LayerSpec& spec : chain_of(one.top)) wanted.push_back(spec.layer_id);
  if (found != wanted) fail("the records of volume " + std::to_string(one.id) + " lead to other layers than it has");
}

// ---- pages at rest

void World::check_pages() {
  std::map<std::pair<uint64_t, uint32_t>, uint64_t> mapped;  // (layer, chunk) -> slab
  for (const auto& [slab, info] : slabs) {
    if (info.where != SlabInfo::Where::kLayer && info.where != SlabInfo::Where::kLeaving) continue;
    SlabPage page;
    const Copies copies = newest_page(slab, &page);
    if (copies.bad()) fail("both copies of the page of slab " + std::to_string(slab) + " are damaged");
    if (!copies.valid() || page.generation != info.generation || page.layer_id == 0) continue;
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

void World::check_equal_copies(const SimVolume& one) {
  for (const SlabRun& run : slabs_of(one.top)) {
    SlabPage page;
    const Copies copies = newest_page(run.first, &page);
    if (!copies.valid() || page.generation != run.generation || page.layer_id == 0) continue;
    const bool any = std::any_of(std::begin(page.entries), std::end(page.entries),
                                 [](const SlabEntry& entry) { return entry.logical_chunk != format::kNoChunk; });
    if (any && !copies.equal)
      fail("the copies of the page of slab " + std::to_string(run.first) + " differ after a clean close");
  }
}

// ---- what strips may take, and must

void World::add_coverage(const SlabPage& page, Coverage* to) {
  for (const SlabEntry& entry : page.entries) {
    if (entry.logical_chunk != format::kNoChunk) (*to)[entry.logical_chunk] |= uint16_t(entry.data | entry.zero);
  }
  for (uint32_t i = 0; i < page.hole_count; i++) {
    for (uint32_t c = 0; c < page.holes[i].length; c++) (*to)[page.holes[i].start + c] = 0xffff;
  }
}

// `durable`: as after a power cut in which nothing survives that need not.
void World::add_coverage(const LayerSpec& of, Coverage* to, bool durable) const {
  for (const SlabRun& run : of.slabs) {
    for (uint64_t slab = run.first; slab < run.first + run.count; slab++) {
      SlabPage page;
      const Copies copies = durable ? durable_page(slab, &page) : newest_page(slab, &page);
      if (!copies.valid() || page.layer_id != of.layer_id || page.generation != run.generation) continue;
      add_coverage(page, to);
    }
  }
}

// A page that a job on layers writes, against the one that serves now: what it takes away is covered, and what it adds is there,
// durably, whether the power goes or not.
void World::check_page_of_job(uint64_t address, const void* content) {
  if ((stripping.empty() && merging == 0) || address < superblock.first_region_offset) return;
  const uint64_t slab = (address - superblock.first_region_offset) / format::kSlabPairSize;
  const SlabInfo& info = slabs[slab];
  SlabPage before;
  SlabPage after;
  std::memcpy(&after, content, sizeof after);
  if (info.where != SlabInfo::Where::kLayer || after.layer_id != info.layer || !newest_page(slab, &before).valid()) return;
  if (before.layer_id != info.layer || before.generation != info.generation) return;
  if (info.layer == merging) check_merge_write(slab, before, after);
  else check_strip_write(slab, before, after);
}

void World::check_strip_write(uint64_t slab, const SlabPage& before, const SlabPage& after) const {
  const auto victim = std::find_if(stripping.begin(), stripping.end(),
                                   [&](const LayerSpec& layer) { return layer.layer_id == after.layer_id; });
  if (victim == stripping.end() || victim == stripping.begin()) return;  // others go on
  Coverage covered;
  for (auto above = stripping.begin(); above != victim; ++above) add_coverage(*above, &covered, true);
  Coverage had;
  Coverage has;
  add_coverage(before, &had);
  add_coverage(after, &has);
  for (const auto& [chunk, mask] : had) {
    if ((mask & ~has[chunk] & ~covered[chunk]) == 0) continue;
    fail("slab " + std::to_string(slab) + " of layer " + std::to_string(after.layer_id) + " is to lose blocks of chunk " +
         std::to_string(chunk) + " that no durable page above covers");
  }
}

void World::check_merge_write(uint64_t slab, const SlabPage& before, const SlabPage& after) const {
  const uint64_t data = format::slab_data_offset(superblock.first_region_offset, slab);
  for (uint64_t c = 0; c < format::kChunksPerSlab; c++) {
    const SlabEntry& old = before.entries[c];
    const SlabEntry& entry = after.entries[c];
    const auto more = static_cast<uint16_t>(entry.data & ~(old.logical_chunk == entry.logical_chunk ? old.data : 0));
    for (uint64_t block = 0; block < kBlocksPerChunk; block++) {
      if ((more >> block & 1) == 0) continue;
      std::byte seen[kBlock];
      std::byte certain[kBlock];
      disk.peek(data + c * kChunk + block * kBlock, seen, kBlock);
      disk.peek_durable(data + c * kChunk + block * kBlock, certain, kBlock);
      if (std::memcmp(seen, certain, kBlock) == 0) continue;
      fail("a merge says in slab " + std::to_string(slab) + " that it has block " + std::to_string(block) + " of chunk " +
           std::to_string(entry.logical_chunk) + ", which is not durable");
    }
  }
}

// Of what either copy of a frozen layer's page maps nothing is written over: the older one serves when the newer is damaged.
void World::check_merge_data(uint64_t slab, const IoRequest& request) const {
  SlabPage pair[2];
  disk.peek(page_address(slab), pair, sizeof pair);
  const uint64_t data = format::slab_data_offset(superblock.first_region_offset, slab);
  for (uint32_t copy = 0; copy < 2; copy++) {
    const SlabPage& page = pair[copy];
    if (verify(page, kPoolUuid, page_address(slab) + copy * kBlock) != PageState::kOk || page.layer_id != merging) continue;
    for (uint64_t at = request.offset; at < request.offset + request.length; at += kBlock) {
      const SlabEntry& entry = page.entries[(at - data) / kChunk];
      if ((entry.data >> ((at - data) % kChunk / kBlock) & 1) == 0) continue;
      fail("a merge writes over data of chunk " + std::to_string(entry.logical_chunk) + " that copy " + "AB"[copy] +
           " of the page of slab " + std::to_string(slab) + " maps");
    }
  }
}

// Nor would an engine that takes over have it for the volume's.
void World::check_no_claim(const GrantRef& ref, const std::function<bool(const PageArena::Claim&)>& of) const {
  for (const auto& one : volumes) {
    if (one->id != ref.volume || one->arena == nullptr || one->opened_spec.epoch != ref.epoch) continue;
    for (uint32_t i = 0; i < one->arena->claim_count(); i++) {
      const PageArena::Claim claim = one->arena->claim(i);
      if (claim.state == PageArena::ClaimState::kFree || !of(claim)) continue;
      fail("volume " + std::to_string(one->id) + " says that it has forgotten slab " + std::to_string(claim.slab) +
           ", or its layer " + std::to_string(claim.layer_id) + ", and keeps a claim of it");
    }
  }
}

// After a strip nothing is left in the layer's pages of what newer layers had covered before it began, and their copies are
// equal; only ranges of holes keep whole chunks, and those that are covered only in their middle.
void World::check_stripped(const LayerSpec& victim, const Coverage& covered) const {
  const auto mask_of = [&](uint32_t chunk) {
    const auto found = covered.find(chunk);
    return found == covered.end() ? uint16_t{0} : found->second;
  };
  const auto wrong_chunk = [&](uint32_t chunk) {
    fail("chunk " + std::to_string(chunk) + " of layer " + std::to_string(victim.layer_id) +
         " still has blocks that were covered before it was stripped");
  };
  for (const SlabRun& run : victim.slabs) {
    SlabPage page;
    const Copies copies = newest_page(run.first, &page);
    if (!copies.valid() || page.layer_id != victim.layer_id || page.generation != run.generation) continue;
    if (!copies.equal) fail("slab " + std::to_string(run.first) + " was stripped in one copy of its page only");
    for (const SlabEntry& entry : page.entries) {
      if (entry.logical_chunk == format::kNoChunk) continue;
      if (((entry.data | entry.zero) & mask_of(entry.logical_chunk)) != 0) wrong_chunk(entry.logical_chunk);
    }
    for (uint32_t i = 0; i < page.hole_count; i++) {
      for (const uint32_t end : {page.holes[i].start, page.holes[i].start + page.holes[i].length - 1}) {
        if (mask_of(end) == 0xffff) wrong_chunk(end);
      }
    }
  }
}
// A slab that a strip reports as empty is.
void World::check_emptied(uint64_t slab, uint64_t generation, uint64_t owner) {
  SlabPage page;
  if (!newest_page(slab, &page).valid() || page.generation != generation || page.layer_id != owner) return;
  const bool any = page.hole_count > 0 ||
                   std::any_of(std::begin(page.entries), std::end(page.entries),
                               [](const SlabEntry& entry) { return entry.logical_chunk != format::kNoChunk; });
  if (any) fail("slab " + std::to_string(slab) + " is reported as emptied and is not");
}

// ---- the whole pool

// The rest of a pool, of two hosts, so that `pool check` has one to judge.
void World::format_pool() {
  superblock.fencing = format::FencingClass::kLeaseOnly;
  superblock.renew_interval_ms = 2'000;
  superblock.lease_ms = 10'000;
  superblock.host_slots = 2;
  superblock.fence_generations = 1;
  superblock.authority_offset = format::kAuthorityOffset;
  superblock.heartbeat_offset = format::kHeartbeatOffset;
  superblock.fence_offset = superblock.heartbeat_offset + superblock.host_slots * 2 * kBlock;
  const auto put = [&]<typename Page>(Page page, uint64_t address, uint32_t copies) {
    for (uint32_t copy = 0; copy < copies; copy++) {
      seal(page, kPoolUuid, address + copy * kBlock, 1);
      disk.poke(address + copy * kBlock, &page, kBlock);
    }
  };
  put(superblock, format::kSuperblockAOffset, 1);
  put(superblock, format::kSuperblockBOffset, 1);
  put(format::AuthorityPage{}, superblock.authority_offset, 2);
  for (uint32_t host = 0; host < superblock.host_slots; host++) {
    format::HeartbeatPage heartbeat{};
    heartbeat.host_id = host;
    put(heartbeat, heartbeat_offset(superblock, host), 2);
    format::FencePage fence{};
    fence.host_id = host;
    put(fence, fence_offset(superblock, host, 0), 1);
  }
}

// Nothing that crashes and failing writes have left is worth a warning, save that a layer's record stays torn in one
// copy until it is written again.
void World::check_whole_pool(const char* when) {
  Result<CheckReport> report = check_pool(agent, {});
  if (!report.ok()) fail(std::string(when) + ", the pool is not one: " + report.status.message);
  for (const CheckFinding& finding : report->findings) {
    if (finding.severity == CheckFinding::Severity::kInfo || finding.kind == "layer-record-copy-bad") continue;
    // A slab that nobody gets: a claim of it failed, and its volume is deleted since.
    if (finding.slab.has_value() && slabs[*finding.slab].where == SlabInfo::Where::kQuarantine) continue;
    // The new top of a cut that did not happen outlives its volume.
    if (finding.kind == "layer-without-volume" && given_up.count(finding.layer_id.value_or(0)) > 0) continue;
    fail(std::string(when) + ", the checker finds " + severity_name(finding.severity) + " " + finding.kind + ": " +
         finding.message);
  }
}

// One copy of some pages is damaged, the serving one as a rule. What was written last may be gone then, but no block
// may show what was never written to it: the copy that is left must not map a place that others have been given.
void World::damage_pages() {
  end_engine();
  disk.cut_power();
  stock.clear();
  sort_slabs_by_pages();
  std::set<uint64_t> mapped;  // layers that some volume has
  for (auto& one : volumes) {
    if (one->state == SimVolume::State::kDeleting) continue;
    one->readers.clear();
    for (const LayerSpec& spec : chain_of(one->top)) mapped.insert(spec.layer_id);
  }
  for (const auto& [slab, info] : slabs) {
    if (info.where != SlabInfo::Where::kLayer || mapped.count(info.layer) == 0 || random.chance(400)) continue;
    SlabPage pair[2];
    disk.peek(page_address(slab), pair, sizeof pair);
    const Copies copies = choose_slab(pair[0], pair[1], kPoolUuid, page_address(slab));
    if (!copies.valid() || copies.state[0] != copies.state[1]) continue;
    const int victim = random.chance(800) ? copies.newest : 1 - copies.newest;
    const auto maps = [](const SlabEntry& entry) { return entry.logical_chunk != format::kNoChunk; };
    if (std::any_of(std::begin(pair[victim].entries), std::end(pair[victim].entries), maps) &&
        pair[victim].generation == info.generation && pair[victim].layer_id == info.layer) {
      unnamed.insert("of slab " + std::to_string(slab) + " ");
    }
    reinterpret_cast<uint8_t*>(&pair[victim])[1000] ^= 0x40;
    disk.poke(page_address(slab) + static_cast<uint64_t>(victim) * kBlock, &pair[victim], kBlock);
  }
  damaged = true;
  for (auto& one : volumes) {
    if (one->state == SimVolume::State::kDeleting) continue;
    one->must_take_over = false;
    one->state = SimVolume::State::kClosed;
    open_volume(*one);
  }
  settle();
  if (!unnamed.empty()) fail("nobody was told of the damaged copy " + *unnamed.begin());
  for (auto& one : volumes) {
    if (one->state == SimVolume::State::kDeleting) continue;
    if (one->state != SimVolume::State::kOpen) fail("one damaged copy kept a volume from opening");
    PageBuffer buffer(one->size_blocks * kBlock);
    read_now(*one->volume, 0, one->size_blocks, buffer.data());
    for (uint64_t b = 0; b < one->size_blocks; b++) {
      const uint64_t value = value_of(buffer.data() + b * kBlock, b);
      result.checks++;
      if (value != 0 && (one->lineage.count(value >> 56) == 0 || (value & 0xffffff) != b)) {
        wrong(*one, b, value, "with a damaged page");
      }
    }
  }
  end_engine();
}

}  // namespace holdfast::test::crash
