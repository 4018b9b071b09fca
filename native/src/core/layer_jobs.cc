// See layer_jobs.h.
#include "layer_jobs.h"

#include <algorithm>
#include <cstring>

#include "layer_pages.h"
#include "slab_pairs.h"

namespace holdfast {
namespace {

using format::kBlocksPerChunk;
using format::kNoChunk;
using format::kPageSize;
using format::SlabEntry;
using format::SlabPage;
using format::Superblock;

class Stripper {
 public:
  Stripper(SyncDevice& device, const Superblock& s, const Pause& pause) : device_(device), s_(s), pause_(pause) {}

  Status cover(const LayerSpec& layer) {
    for (const SlabRun& run : layer.slabs) {
      Status judged;
      const auto visit = [&](uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
        if (!judged.ok() || !copies.valid()) return;
        // A whole copy that is newest is never written over but by way of the other one (volume_flush.cc).
        const SlabPage& newest = copies.newest == 0 ? a : b;
        if (!names(newest, layer, run)) return;
        judged = sane(slab, newest);
        if (judged.ok()) add_coverage(set_, newest);
      };
      const auto batch = [&] { return rest(judged); };
      if (Status status = for_each_pair(device_, s_, run, &buffer_, visit, batch); !status.ok()) return status;
    }
    return {};
  }

  Status strip(const LayerSpec& victim, StripReport* report) {
    report->uses.push_back({victim.layer_id, 0, 0});
    BlockSet mine;  // counts for the victims below only
    for (const SlabRun& run : victim.slabs) {
      Status judged;
      const auto visit = [&](uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
        if (judged.ok()) judged = strip_pair(victim, run, slab, a, b, copies, mine, report);
      };
      const auto batch = [&]() -> Status {
        if (judged.ok()) judged = write_changed();
        return rest(judged);
      };
      if (Status status = for_each_pair(device_, s_, run, &buffer_, visit, batch); !status.ok()) return status;
    }
    mine.each(0, [&](uint32_t chunk, uint16_t mask) {
      set_.add(chunk, mask);
      return true;
    });
    return device_.flush();
  }

 private:
  struct Changed {
    uint64_t slab;
    uint32_t older;
    uint64_t sequence;
    SlabPage page;
  };

  Status rest(const Status& judged) const {
    if (judged.ok() && pause_) pause_();
    return judged;
  }

  Status strip_pair(const LayerSpec& victim, const SlabRun& run, uint64_t slab, const SlabPage& a, const SlabPage& b,
                    const Copies& copies, BlockSet& mine, StripReport* report) {
    if (copies.bad()) return both_bad(slab, victim);
    const SlabPage* newest = !copies.valid() ? nullptr : copies.newest == 0 ? &a : &b;
    if (newest == nullptr || newest->generation < run.generation ||
        (newest->generation == run.generation && newest->layer_id == 0)) {
      add_emptied(slab, run.generation, report);  // never claimed, or given back
      return {};
    }
    if (!names(*newest, victim, run)) return {};
    if (Status status = sane(slab, *newest); !status.ok()) return status;
    add_coverage(mine, *newest);
    SlabPage page = *newest;
    LayerUse& use = report->uses.back();
    const uint64_t live_before = use.live_blocks;
    const uint64_t cleared = clear(page, &use);
    report->cleared_blocks += cleared;
    if (use.live_blocks > live_before) use.slabs++;
    else add_emptied(slab, run.generation, report);
    // Copies that differ are what an earlier job, or a crash after the cut, left: made whole on the way.
    if (cleared == 0 && copies.equal) return {};
    changed_.push_back({slab, static_cast<uint32_t>(1 - copies.newest), newest->header.sequence + 1, page});
    return {};
  }

  // Returns how many blocks went, and adds what is left to `use`.
  uint64_t clear(SlabPage& page, LayerUse* use) const {
    uint64_t cleared = 0;
    for (SlabEntry& entry : page.entries) {
      if (entry.logical_chunk == kNoChunk) continue;
      const auto before = static_cast<uint16_t>(entry.data | entry.zero);
      const uint16_t covered = set_.get(entry.logical_chunk);
      entry.data = static_cast<uint16_t>(entry.data & ~covered);
      entry.zero = static_cast<uint16_t>(entry.zero & ~covered);
      const auto after = static_cast<uint16_t>(entry.data | entry.zero);
      cleared += bits(before) - bits(after);
      use->live_blocks += bits(after);
      if (after == 0) entry = {kNoChunk, 0, 0};
    }
    // Ranges lose covered chunks at their ends; in the middle it would take more room than there may be.
    uint32_t kept = 0;
    for (uint32_t i = 0; i < page.hole_count; i++) {
      format::HoleRange hole = page.holes[i];
      const uint32_t length = hole.length;
      while (hole.length > 0 && set_.get(hole.start) == kAll) {
        hole.start++;
        hole.length--;
      }
      while (hole.length > 0 && set_.get(hole.start + hole.length - 1) == kAll) hole.length--;
      cleared += uint64_t{length - hole.length} * kBlocksPerChunk;
      use->live_blocks += uint64_t{hole.length} * kBlocksPerChunk;
      if (hole.length > 0) page.holes[kept++] = hole;
    }
    for (uint32_t i = kept; i < page.hole_count; i++) page.holes[i] = {};
    page.hole_count = kept;
    return cleared;
  }

  Status write_changed() {
    PageBuffer out(kPageSize);
    for (uint32_t turn = 0; turn < 2 && !changed_.empty(); turn++) {
      for (const Changed& one : changed_) {
        const uint32_t copy = turn == 0 ? one.older : 1 - one.older;
        const uint64_t address = slab_page_offset(s_, one.slab) + uint64_t{copy} * kPageSize;
        out.at<SlabPage>() = one.page;
        seal(out.at<SlabPage>(), s_.header.pool, address, one.sequence);
        if (Status status = device_.write(address, out.data(), kPageSize); !status.ok()) return status;
      }
      if (Status status = device_.flush(); !status.ok()) return status;
    }
    changed_.clear();
    return {};
  }

  static void add_emptied(uint64_t slab, uint64_t generation, StripReport* report) {
    std::vector<SlabRun>& runs = report->emptied;
    if (!runs.empty() && runs.back().first + runs.back().count == slab && runs.back().generation == generation) {
      runs.back().count++;
    } else {
      runs.push_back({slab, 1, generation});
    }
  }

  SyncDevice& device_;
  const Superblock& s_;
  const Pause& pause_;
  PageBuffer buffer_{kPairsPerRead * format::kSlabPairSize};
  BlockSet set_;
  std::vector<Changed> changed_;
};

// A chain goes from newer layers to older ones: what covers a victim is never below it.
Status check_parent(const std::vector<LayerSpec>& victims, const std::vector<LayerSpec>& covers, size_t index) {
  const uint64_t parent = victims[index].parent_layer_id;
  const auto is_parent = [&](const LayerSpec& layer) { return layer.layer_id == parent; };
  const auto upto = victims.begin() + static_cast<ptrdiff_t>(index) + 1;
  if (parent == 0 || (std::none_of(victims.begin(), upto, is_parent) &&
                      std::none_of(covers.begin(), covers.end(), is_parent))) {
    return {};
  }
  return {Code::kInvalidArgument, "layer " + std::to_string(victims[index].layer_id) + " can't have layer " +
                                      std::to_string(parent) + " as its parent, which is not older"};
}

// Wipes slabs of layers, many with each flush: a layer's slabs mostly lie one by one.
class Wiper {
 public:
  Wiper(SyncDevice& device, const Superblock& s, const Pause& pause) : device_(device), s_(s), pause_(pause) {}

  // Slabs that are not the layer's any more have been wiped before, and stay as they are.
  Status add(uint64_t layer_id, const SlabRun& run) {
    const auto ours = [&](const SlabPage& page, PageState state) {
      return state == PageState::kOk && page.layer_id == layer_id && page.generation == run.generation;
    };
    const auto visit = [&](uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
      if (copies.bad()) damaged_ += (damaged_.empty() ? "" : ", ") + std::to_string(slab);
      if (!copies.valid()) return;
      const SlabPage& newest = copies.newest == 0 ? a : b;
      // The newest copy may say "free" already: then freeing was cut off between the two.
      if (newest.generation != run.generation || (newest.layer_id != layer_id && newest.layer_id != 0)) return;
      if (!ours(a, copies.state[0]) && !ours(b, copies.state[1])) return;
      pages_.push_back(freeing(slab, run.generation, a, b, copies));
    };
    const auto batch = [&] { return pages_.size() < kPairsPerRead ? Status{} : wipe(); };
    return for_each_pair(device_, s_, run, &buffer_, visit, batch);
  }

  Status finish() {
    if (Status status = wipe(); !status.ok() || damaged_.empty()) return status;
    return {Code::kCorrupt, "both copies of the pages of these slabs are damaged, and they were left as they are: " +
                                damaged_ + ". Run `holdfast pool check`"};
  }

 private:
  // Both copies say "free", durably, before any data goes; and the data is gone before the caller hears of it.
  Status wipe() {
    if (pages_.empty()) return {};
    if (Status status = free_pages(device_, s_, pages_); !status.ok()) return status;
    std::sort(pages_.begin(), pages_.end(), [](const Freeing& a, const Freeing& b) { return a.slab < b.slab; });
    for (size_t i = 0; i < pages_.size();) {
      const uint64_t first = pages_[i].slab;
      uint64_t count = 1;
      // The data of neighbours lies side by side within a region.
      while (i + count < pages_.size() && pages_[i + count].slab == first + count &&
             (first + count) % format::kSlabsPerRegion != 0) {
        count++;
      }
      if (Status status = device_.discard(slab_data_offset(s_, first), count * format::kSlabSize); !status.ok()) {
        return status;
      }
      i += count;
    }
    pages_.clear();
    if (pause_) pause_();
    return {};
  }

  SyncDevice& device_;
  const Superblock& s_;
  const Pause& pause_;
  PageBuffer buffer_{kPairsPerRead * format::kSlabPairSize};
  std::vector<Freeing> pages_;
  std::string damaged_;
};

Status write_tombstone(SyncDevice& device, const Superblock& s, const WipeLayer& layer) {
  Result<std::optional<format::LayerRecord>> found = load_layer_record(device, s, layer.slot);
  if (!found.ok()) return found.status;
  if (!found->has_value() || (*found)->layer_id != layer.layer_id || (*found)->state == format::LayerState::kDeleted) {
    return {};
  }
  format::LayerRecord record = **found;
  record.state = format::LayerState::kDeleted;
  std::memset(record.snapshot_name, 0, sizeof record.snapshot_name);
  return write_layer_record(device, s, layer.slot, record);
}

}  // namespace

Result<StripReport> strip_layers(SyncDevice& device, const Superblock& s, const std::vector<LayerSpec>& victims,
                                 const std::vector<LayerSpec>& covers, const Pause& pause) {
  if (victims.empty() || covers.empty()) {
    return Status{Code::kInvalidArgument, "stripping takes at least one layer to strip and one that covers it"};
  }
  if (Status status = check_layers(s, victims); !status.ok()) return status;
  if (Status status = check_layers(s, covers); !status.ok()) return status;
  uint64_t birth = ~uint64_t{0};
  for (const auto* layers : {&covers, &victims}) {
    for (const LayerSpec& layer : *layers) {
      if (layer.birth >= birth) {
        return Status{Code::kInvalidArgument, "layer " + std::to_string(layer.layer_id) +
                                                  " is not older than the layer before it; give the newest first"};
      }
      birth = layer.birth;
    }
  }
  std::vector<format::LayerRecord> records(victims.size());
  for (size_t i = 0; i < victims.size(); i++) {
    if (!victims[i].frozen) {
      return Status{Code::kInvalidArgument, "layer " + std::to_string(victims[i].layer_id) +
                                                " is not frozen; only frozen layers are stripped"};
    }
    if (Status status = check_parent(victims, covers, i); !status.ok()) return status;
    if (Status status = check_victim(device, s, victims[i], "nothing was stripped", &records[i]); !status.ok()) return status;
  }
  for (size_t i = 0; i < victims.size(); i++) {
    const bool folded = records[i].state == format::LayerState::kFolded && records[i].folded_into == covers[0].layer_id;
    const bool linked = records[i].parent_layer_id == victims[i].parent_layer_id;
    if (folded && linked) continue;
    records[i].state = format::LayerState::kFolded;
    records[i].folded_into = covers[0].layer_id;
    records[i].parent_layer_id = victims[i].parent_layer_id;
    std::memset(records[i].snapshot_name, 0, sizeof records[i].snapshot_name);
    // The slot of a parent that is named no longer is soon another layer's: then neither copy may speak of it.
    for (uint32_t copies = linked ? 1 : 2; copies > 0; copies--) {
      if (Status status = write_layer_record(device, s, victims[i].slot, records[i]); !status.ok()) return status;
    }
  }
  StripReport report;
  Stripper stripper(device, s, pause);
  for (const LayerSpec& layer : covers) {
    if (Status status = stripper.cover(layer); !status.ok()) return status;
  }
  // What was read may have come out of the device's cache only. From here on it is durable.
  if (Status status = device.flush(); !status.ok()) return status;
  for (const LayerSpec& victim : victims) {
    if (Status status = stripper.strip(victim, &report); !status.ok()) return status;
  }
  return report;
}

Status wipe_layers(SyncDevice& device, const Superblock& s, const std::vector<WipeLayer>& layers, bool tombstone,
                   const Pause& pause) {
  for (const WipeLayer& layer : layers) {
    if (layer.layer_id == 0) return {Code::kInvalidArgument, "layer ids begin at 1"};
    for (const SlabRun& run : layer.slabs) {
      if (Status status = check_run(s, run); !status.ok()) return status;
    }
  }
  Wiper wiper(device, s, pause);
  for (const WipeLayer& layer : layers) {
    if (tombstone) {
      if (Status status = write_tombstone(device, s, layer); !status.ok()) return status;
    }
    for (const SlabRun& run : layer.slabs) {
      if (Status status = wiper.add(layer.layer_id, run); !status.ok()) return status;
    }
  }
  return wiper.finish();
}

Result<ChangeReading> read_changes(SyncDevice& device, const Superblock& s, const std::vector<LayerSpec>& layers,
                                   uint64_t size_bytes, uint64_t starting_offset, uint32_t max_ranges,
                                   const Pause& pause) {
  if (Status status = check_layers(s, layers); !status.ok()) return status;
  if (max_ranges == 0) return Status{Code::kInvalidArgument, "ask for at least one range"};
  if (size_bytes > format::kMaxVolumeBytes || starting_offset % format::kBlockSize != 0) {
    return Status{Code::kInvalidArgument, "the size is outside what the format allows, or the starting offset is not a "
                                          "multiple of 4096"};
  }
  BlockSet set;
  PageBuffer buffer(kPairsPerRead * format::kSlabPairSize);
  for (const LayerSpec& layer : layers) {
    for (const SlabRun& run : layer.slabs) {
      Status judged;
      const auto visit = [&](uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
        if (!judged.ok()) return;
        if (copies.bad()) judged = both_bad(slab, layer);
        if (!copies.valid()) return;
        const SlabPage& newest = copies.newest == 0 ? a : b;
        if (newest.generation > run.generation) {
          judged = {Code::kStale, "slab " + std::to_string(slab) + " has been handed on: it is not layer " +
                                      std::to_string(layer.layer_id) + "'s any more"};
        }
        if (!judged.ok() || !names(newest, layer, run)) return;
        judged = sane(slab, newest);
        if (judged.ok()) add_coverage(set, newest);
      };
      const auto batch = [&]() -> Status {
        if (judged.ok() && pause) pause();
        return judged;
      };
      if (Status status = for_each_pair(device, s, run, &buffer, visit, batch); !status.ok()) return status;
    }
  }
  ChangeReading reading;
  const auto add = [&](uint64_t from, uint64_t to) {
    from = std::max(from, starting_offset);
    to = std::min(to, size_bytes);
    if (from >= to) return true;
    std::vector<ByteRange>& ranges = reading.ranges;
    if (!ranges.empty() && ranges.back().offset + ranges.back().length == from) {
      ranges.back().length += to - from;
      return true;
    }
    if (ranges.size() == max_ranges) {
      reading.next_offset = from;
      return false;
    }
    ranges.push_back({from, to - from});
    return true;
  };
  set.each(static_cast<uint32_t>(starting_offset / format::kChunkSize), [&](uint32_t chunk, uint16_t mask) {
    const uint64_t base = uint64_t{chunk} * format::kChunkSize;
    for (uint32_t block = 0; block < kBlocksPerChunk;) {
      uint32_t stop = block;
      while (stop < kBlocksPerChunk && (mask >> stop & 1) != 0) stop++;
      if (stop > block && !add(base + block * format::kBlockSize, base + stop * format::kBlockSize)) return false;
      block = std::max(stop, block + 1);
    }
    return true;
  });
  return reading;
}

}  // namespace holdfast
