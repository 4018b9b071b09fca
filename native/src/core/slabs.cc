// Slabs as the control plane sees them: whose they are by their pages, and giving a deleted volume's back; see
// records.h.
#include <algorithm>

#include "records.h"
#include "slab_pairs.h"

namespace holdfast {
namespace {

using format::kPageSize;
using format::SlabPage;
using format::Superblock;

SlabOwner owner_of(uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
  SlabOwner owner;
  owner.slab = slab;
  if (copies.bad()) {
    owner.state = SlabOwner::State::kBad;
  } else if (copies.valid()) {
    const SlabPage& page = copies.newest == 0 ? a : b;
    owner.layer_id = page.layer_id;
    owner.volume_id = page.volume_id;
    owner.generation = page.generation;
    owner.state = page.layer_id == 0 ? SlabOwner::State::kFree : SlabOwner::State::kClaimed;
  }
  return owner;
}

// Contiguous slabs [first, first + count) of one region: discarded in one go.
struct Stretch {
  uint64_t first;
  uint32_t count;
};

class Wiper {
 public:
  Wiper(SyncDevice& device, const Superblock& s) : device_(device), s_(s), buffer_(kPairsPerRead * 2 * kPageSize) {}

  // Both copies say "free" before any data goes, and the data is gone before the caller hears of it.
  Status wipe(const WipeLayer& layer) {
    for (const SlabRun& run : layer.slabs) {
      if (Status status = judge(layer.layer_id, run); !status.ok()) return status;
    }
    if (Status status = free_pages(device_, s_, pages_); !status.ok()) return status;
    for (const Stretch& stretch : stretches_) {
      const uint64_t length = uint64_t{stretch.count} * format::kSlabSize;
      if (Status status = device_.discard(slab_data_offset(s_, stretch.first), length); !status.ok()) return status;
    }
    pages_.clear();
    stretches_.clear();
    return {};
  }

  const std::string& left_alone() const { return left_alone_; }

 private:
  Status judge(uint64_t layer_id, const SlabRun& run) {
    return for_each_pair(device_, s_, run, &buffer_, [&](uint64_t slab, SlabPage& a, SlabPage& b, Copies copies) {
      const SlabOwner owner = owner_of(slab, a, b, copies);
      const bool later = owner.generation > run.generation;
      if (later || (owner.state == SlabOwner::State::kClaimed && owner.layer_id != layer_id)) {
        left_alone_ += (left_alone_.empty() ? "" : "; ") + std::string("slab ") + std::to_string(slab) +
                       " says layer " + std::to_string(owner.layer_id) + ", generation " +
                       std::to_string(owner.generation);
        return;
      }
      if (!copies.blank()) pages_.push_back(freeing(slab, run.generation, a, b, copies));
      remember(slab);
    });
  }

  void remember(uint64_t slab) {
    if (!stretches_.empty() && stretches_.back().first + stretches_.back().count == slab &&
        slab % format::kSlabsPerRegion != 0) {
      stretches_.back().count++;
    } else {
      stretches_.push_back({slab, 1});
    }
  }

  SyncDevice& device_;
  const Superblock& s_;
  PageBuffer buffer_;
  std::vector<Freeing> pages_;
  std::vector<Stretch> stretches_;
  std::string left_alone_;
};

}  // namespace

Result<std::vector<SlabOwner>> scan_slabs(SyncDevice& device, const Superblock& s, const std::vector<SlabRun>& runs) {
  std::vector<SlabOwner> owners;
  PageBuffer buffer(kPairsPerRead * 2 * kPageSize);
  for (const SlabRun& run : runs) {
    if (Status status = check_run(s, run); !status.ok()) return status;
    Status status = for_each_pair(device, s, run, &buffer, [&](uint64_t slab, SlabPage& a, SlabPage& b, Copies copies) {
      owners.push_back(owner_of(slab, a, b, copies));
    });
    if (!status.ok()) return status;
  }
  return owners;
}

Status free_pages(SyncDevice& device, const Superblock& s, const std::vector<Freeing>& pages) {
  PageBuffer out(kPageSize);
  for (uint32_t turn = 0; turn < 2 && !pages.empty(); turn++) {
    for (const Freeing& one : pages) {
      const uint64_t address = slab_page_offset(s, one.slab) + uint64_t{turn == 0 ? one.first : 1 - one.first} * kPageSize;
      make_free_slab_page(&out.at<SlabPage>(), one.generation);
      seal(out.at<SlabPage>(), s.header.pool, address, one.sequence);
      if (Status status = device.write(address, out.data(), kPageSize); !status.ok()) return status;
    }
    if (Status status = device.flush(); !status.ok()) return status;
  }
  return {};
}

void make_free_slab_page(SlabPage* page, uint64_t generation) {
  *page = SlabPage{};
  page->generation = generation;
  for (auto& entry : page->entries) entry = {format::kNoChunk, 0, 0};
}

Status wipe_volume(SyncDevice& device, const Superblock& s, const WipeRequest& request) {
  if (request.volume_id == 0) return {Code::kInvalidArgument, "volume ids begin at 1"};
  for (const WipeLayer& layer : request.layers) {
    if (layer.layer_id == 0) return {Code::kInvalidArgument, "layer ids begin at 1"};
    for (const SlabRun& run : layer.slabs) {
      if (Status status = check_run(s, run); !status.ok()) return status;
    }
  }
  Result<std::optional<format::VolumeRecord>> volume = load_volume_record(device, s, request.slot);
  if (!volume.ok()) return volume.status;
  // A slot that never saw this volume: it was never opened, and there is nothing to say about it.
  if (volume->has_value() && (*volume)->volume_id == request.volume_id) {
    if ((*volume)->epoch > request.closed_epoch) {
      return {Code::kStale, "volume " + std::to_string(request.volume_id) +
                                " was opened again since the epoch that the "
                                "deletion names; nothing was deleted"};
    }
    if ((*volume)->state != format::VolumeState::kDeleted) {
      format::VolumeRecord record = **volume;
      record.state = format::VolumeState::kDeleted;
      record.header.flags = 0;
      if (Status status = write_volume_record(device, s, request.slot, record); !status.ok()) return status;
    }
  }
  Wiper wiper(device, s);
  for (const WipeLayer& layer : request.layers) {
    Result<std::optional<format::LayerRecord>> found = load_layer_record(device, s, layer.slot);
    if (!found.ok()) return found.status;
    if (found->has_value() && (*found)->layer_id == layer.layer_id && (*found)->state != format::LayerState::kDeleted) {
      format::LayerRecord record = **found;
      record.state = format::LayerState::kDeleted;
      if (Status status = write_layer_record(device, s, layer.slot, record); !status.ok()) return status;
    }
    if (Status status = wiper.wipe(layer); !status.ok()) return status;
  }
  if (wiper.left_alone().empty()) return {};
  return {Code::kStale, "volume " + std::to_string(request.volume_id) +
                            " was deleted, but some of the slabs named "
                            "with it are somebody else's and were left alone: " +
                            wiper.left_alone()};
}

}  // namespace holdfast
