// Reads a whole pool, area by area, and holds what it finds against what must be true; see checker.h.
//
// Memory: one bit per chunk of what a layer maps (2 MiB per dense TiB), so that a chunk mapped twice is noticed in one
// pass. The few that are found are read a second time, which names both places and forgives what an open volume was just
// moving.
#include "checker.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <unordered_map>
#include <utility>

#include "records.h"

namespace holdfast {
namespace {

using format::kPageSize;
using format::LayerState;
using format::SlabPage;
using format::Superblock;
using format::VolumeState;
using Severity = CheckFinding::Severity;

constexpr size_t kPairSize = 2 * kPageSize;
constexpr size_t kBigRead = 4u << 20;
constexpr uint32_t kPieceChunks = 65536;  // 4 GiB of a volume: 8 KiB of memory
constexpr size_t kMaxTwice = 1000;  // chunks mapped twice that are named one by one

struct VolumeSeen {
  uint32_t slot = 0;
  std::string name;
  VolumeState state = VolumeState::kFree;
  bool unclean = false;
  uint64_t size_bytes = 0;
  uint64_t top_layer_id = 0;
  uint64_t epoch = 0;
};

struct LayerSeen {
  LayerRecordInfo info;
  uint64_t chunks = 0;  // how many logical chunks it may map
  bool is_top = false;
  bool broken = false;       // an error has been named
  bool used = false;         // some volume's chain or some named snapshot has it
  bool settled = false;      // nobody may be writing it, and its last writer made its pages' copies equal
  uint64_t epoch = 0;        // of its volume, if it is the top; 0: unknown
  // By logical chunk, in pieces of kPieceChunks that exist where something is mapped: volumes are large and thin.
  std::unordered_map<uint32_t, std::vector<bool>> mapped;

  // True: it was mapped before.
  bool map(uint32_t chunk) {
    std::vector<bool>& piece = mapped[chunk / kPieceChunks];
    if (piece.empty()) piece.resize(kPieceChunks);
    const bool before = piece[chunk % kPieceChunks];
    piece[chunk % kPieceChunks] = true;
    return before;
  }
};

struct Twice {
  uint64_t layer_id;
  uint32_t chunk;
};

std::string place(const std::string& what, uint64_t number) { return what + " " + std::to_string(number); }

std::string copy_states(const Copies& copies) {
  return std::string("copy A ") + page_state_text(copies.state[0]) + ", copy B " + page_state_text(copies.state[1]);
}

class Checker {
 public:
  Checker(SyncDevice& device, const PoolInfo& info, const Progress& progress)
      : device_(device), s_(info.superblock), progress_(progress) {
    report_.pool = info;
    total_pages_ = 2 + 2 + uint64_t{s_.host_slots} * (2 + s_.fence_generations) +
                   2ull * (uint64_t{s_.volume_slots} + s_.layer_slots + s_.slab_count);
  }

  CheckReport run() {
    check_superblocks();
    check_authority();
    check_hosts();
    check_volumes();
    check_layers();
    relate_volumes_and_layers();
    check_slabs();
    confirm_twice();
    for (const CheckFinding& finding : report_.findings) {
      report_.clean = report_.clean && finding.severity == Severity::kInfo;
    }
    return std::move(report_);
  }

 private:
  CheckFinding& find(Severity severity, const char* kind, std::string message) {
    CheckFinding finding;
    finding.severity = severity;
    finding.kind = kind;
    finding.message = std::move(message);
    report_.findings.push_back(std::move(finding));
    return report_.findings.back();
  }

  CheckFinding& find_at(Severity severity, const char* kind, uint64_t offset, uint64_t length, std::string message) {
    CheckFinding& finding = find(severity, kind, std::move(message));
    finding.offset = offset;
    finding.length = length;
    return finding;
  }

  void advance(uint64_t bytes) {
    report_.pages_read += bytes / kPageSize;
    if (progress_) progress_(std::min(report_.pages_read, total_pages_), total_pages_);
  }

  // Reads an area piece by piece; what can't be read is a finding, and looks like a damaged page to the caller.
  void read_piece(uint64_t offset, PageBuffer& buffer, size_t length) {
    advance(length);
    if (device_.read(offset, buffer.data(), length).ok()) return;
    for (size_t at = 0; at < length; at += kPageSize) {
      Status status = device_.read(offset + at, buffer.data() + at, kPageSize);
      if (status.ok()) continue;
      std::memset(buffer.data() + at, 0xff, kPageSize);
      find_at(Severity::kError, "read-error", offset + at, kPageSize, status.message);
    }
  }

  template <typename Visit>  // visit(first index of the piece, count, buffer)
  void read_pairs(uint64_t offset, uint64_t count, Visit visit) {
    PageBuffer buffer(kBigRead);
    constexpr uint64_t kPerRead = kBigRead / kPairSize;
    for (uint64_t first = 0; first < count; first += kPerRead) {
      const uint64_t n = std::min(kPerRead, count - first);
      read_piece(offset + first * kPairSize, buffer, n * kPairSize);
      for (uint64_t i = 0; i < n; i++) visit(first + i, buffer, i * kPairSize);
    }
  }

  void check_superblocks() {
    for (const std::string& warning : report_.pool.warnings) find(Severity::kWarning, "superblock", warning);
    advance(2 * kPageSize);
    if (device_.size_bytes() >= s_.device_bytes + format::kTailReserve + format::kSlabSize) {
      find(Severity::kInfo, "device-grew",
           device_.name() + " has " + std::to_string(device_.size_bytes()) + " bytes, of which the pool uses " +
               std::to_string(s_.device_bytes));
    }
  }

  void check_authority() {
    read_pairs(s_.authority_offset, 1, [&](uint64_t, PageBuffer& buffer, size_t at) {
      const auto& a = buffer.at<format::AuthorityPage>(at);
      const auto& b = buffer.at<format::AuthorityPage>(at + kPageSize);
      const Copies copies = choose_record(a, b, s_.header.pool, s_.authority_offset);
      if (!copies.valid()) {
        find_at(Severity::kError, "authority-both-bad", s_.authority_offset, kPairSize,
                "both copies of the authority page are unusable (" + copy_states(copies) +
                    "): no host can renew its lease until a metadata service claims the pool by force");
      } else if (copies.state[1 - copies.newest] != PageState::kOk) {
        find_at(Severity::kWarning, "authority-copy-bad", s_.authority_offset, kPairSize,
                "one copy of the authority page is unusable (" + copy_states(copies) + "); the next claim rewrites it");
      }
    });
  }

  void check_hosts() {
    std::vector<format::HeartbeatPage> newest(s_.host_slots);
    read_pairs(s_.heartbeat_offset, s_.host_slots, [&](uint64_t host, PageBuffer& buffer, size_t at) {
      const auto& a = buffer.at<format::HeartbeatPage>(at);
      const auto& b = buffer.at<format::HeartbeatPage>(at + kPageSize);
      const uint64_t offset = heartbeat_offset(s_, static_cast<uint32_t>(host));
      const Copies copies = choose_record(a, b, s_.header.pool, offset);
      if (!copies.valid()) {
        find_at(Severity::kError, "heartbeat-both-bad", offset, kPairSize,
                "both heartbeat pages of " + place("host", host) + " are unusable (" + copy_states(copies) +
                    "): whether it lives can't be seen on disk");
        return;
      }
      newest[host] = copies.newest == 0 ? a : b;
      if (copies.state[1 - copies.newest] != PageState::kOk) {
        find_at(Severity::kInfo, "heartbeat-copy-bad", offset, kPairSize,
                "one heartbeat page of " + place("host", host) + " is unusable (" + copy_states(copies) +
                    "); its next renewal rewrites it");
      }
      if (newest[host].host_id != host) {
        find_at(Severity::kError, "heartbeat-wrong-host", offset, kPairSize,
                "the heartbeat page of " + place("host", host) + " names " + place("host", newest[host].host_id));
      }
    });
    check_fences(newest);
  }

  void check_fences(const std::vector<format::HeartbeatPage>& heartbeats) {
    PageBuffer buffer(size_t{s_.fence_generations} * kPageSize);
    for (uint32_t host = 0; host < s_.host_slots; host++) {
      const uint64_t base = fence_offset(s_, host, 0);
      read_piece(base, buffer, buffer.size());
      for (uint32_t i = 0; i < s_.fence_generations; i++) {
        const uint64_t offset = base + uint64_t{i} * kPageSize;
        const auto& page = buffer.at<format::FencePage>(size_t{i} * kPageSize);
        const PageState state = verify(page, s_.header.pool, offset);
        const std::string which = "fence page " + std::to_string(i) + " of " + place("host", host);
        if (state != PageState::kOk) {
          find_at(Severity::kError, "fence-page-bad", offset, kPageSize,
                  which + " " + page_state_text(state) +
                      ": a generation that falls on it can't get a lease until it is "
                      "written again");
        } else if (page.host_id != host || (page.generation != 0 && page.generation % s_.fence_generations != i)) {
          find_at(Severity::kError, "fence-page-misplaced", offset, kPageSize,
                  which + " names " + place("host", page.host_id) + ", " + place("generation", page.generation));
        } else if (page.generation != 0) {
          fenced_[host] = std::max(fenced_[host], page.generation);
          if (heartbeats[host].generation == page.generation &&
              heartbeats[host].state == format::HeartbeatState::kLive) {
            find(Severity::kInfo, "fenced-not-stopped",
                 place("host", host) + ", " + place("generation", page.generation) +
                     " is fenced and has not said on disk that it stopped");
          }
        }
      }
    }
  }

  void check_volumes() {
    read_pairs(s_.volume_table_offset, s_.volume_slots, [&](uint64_t slot, PageBuffer& buffer, size_t at) {
      const auto& a = buffer.at<format::VolumeRecord>(at);
      const auto& b = buffer.at<format::VolumeRecord>(at + kPageSize);
      const uint64_t offset = volume_record_offset(s_, static_cast<uint32_t>(slot));
      const Copies copies = choose_record(a, b, s_.header.pool, offset);
      if (copies.bad()) {
        find_at(Severity::kError, "volume-record-both-bad", offset, kPairSize,
                "both copies of " + place("volume record", slot) + " are damaged (" + copy_states(copies) +
                    "): the volume can't be opened");
        return;
      }
      if (!copies.valid()) {
        if (copies.state[0] != copies.state[1]) {
          find_at(Severity::kInfo, "volume-record-torn", offset, kPairSize,
                  "the first write of " + place("volume record", slot) + " was interrupted; the slot counts as unused");
        }
        return;
      }
      const format::VolumeRecord& record = copies.newest == 0 ? a : b;
      if (record.volume_id == 0) return;
      const bool open = record.state == VolumeState::kOpen;
      if (copies.degraded()) {
        find_at(open ? Severity::kInfo : Severity::kWarning, "volume-record-copy-bad", offset, kPairSize,
                "one copy of the record of " + place("volume", record.volume_id) + " is damaged (" +
                    copy_states(copies) + "); the other serves")
            .volume_id = record.volume_id;
      }
      check_volume(static_cast<uint32_t>(slot), record, offset);
    });
  }

  void check_volume(uint32_t slot, const format::VolumeRecord& record, uint64_t offset) {
    const std::string name = "volume " + std::to_string(record.volume_id) + " (" + field_text(record.name) + ")";
    const auto wrong = [&](const char* kind, const std::string& what) {
      find_at(Severity::kError, kind, offset, kPairSize, name + " " + what).volume_id = record.volume_id;
    };
    if (record.state != VolumeState::kClosed && record.state != VolumeState::kOpen &&
        record.state != VolumeState::kDeleted) {
      return wrong("volume-state", "has an unknown state " + std::to_string(static_cast<uint32_t>(record.state)));
    }
    if (record.state == VolumeState::kDeleted) return;
    report_.volumes++;
    if (record.size_bytes == 0 || record.size_bytes % format::kBlockSize != 0 ||
        record.size_bytes > format::kMaxVolumeBytes) {
      wrong("volume-size", "has an impossible size of " + std::to_string(record.size_bytes) + " bytes");
    }
    if (record.parameters_length > sizeof record.parameters) {
      wrong("volume-parameters", "says that its parameters are longer than the record");
    }
    if (record.host_id >= s_.host_slots) {
      wrong("volume-host", "was last opened by " + place("host", record.host_id) + ", which can't be");
    }
    const auto fence = fenced_.find(record.host_id);
    if (record.state == VolumeState::kOpen && fence != fenced_.end() && record.generation <= fence->second) {
      find(Severity::kInfo, "open-by-fenced-host",
           name + " was left open by " + place("host", record.host_id) + ", " + place("generation", record.generation) +
               ", which is fenced")
          .volume_id = record.volume_id;
    }
    VolumeSeen seen{slot,
                    field_text(record.name),
                    record.state,
                    (record.header.flags & format::kVolumeUnclean) != 0,
                    record.size_bytes,
                    record.top_layer_id,
                    record.epoch};
    const auto [existing, fresh] = volumes_.try_emplace(record.volume_id, std::move(seen));
    if (!fresh) {
      wrong("volume-twice",
            "has two records, in slots " + std::to_string(existing->second.slot) + " and " + std::to_string(slot));
    }
  }

  void check_layers() {
    read_pairs(s_.layer_table_offset, s_.layer_slots, [&](uint64_t slot, PageBuffer& buffer, size_t at) {
      const auto& a = buffer.at<format::LayerRecord>(at);
      const auto& b = buffer.at<format::LayerRecord>(at + kPageSize);
      const uint64_t offset = layer_record_offset(s_, static_cast<uint32_t>(slot));
      const Copies copies = choose_record(a, b, s_.header.pool, offset);
      if (copies.bad()) {
        find_at(Severity::kError, "layer-record-both-bad", offset, kPairSize,
                "both copies of " + place("layer record", slot) + " are damaged (" + copy_states(copies) +
                    "): volumes on that layer can't be opened");
        return;
      }
      if (!copies.valid()) {
        if (copies.state[0] != copies.state[1]) {
          find_at(Severity::kInfo, "layer-record-torn", offset, kPairSize,
                  "the first write of " + place("layer record", slot) + " was interrupted; the slot counts as unused");
        }
        return;
      }
      const format::LayerRecord& record = copies.newest == 0 ? a : b;
      if (record.layer_id == 0) return;
      if (copies.degraded()) {
        const auto volume = volumes_.find(record.volume_id);
        const bool open = volume != volumes_.end() && volume->second.state == VolumeState::kOpen;
        find_at(open ? Severity::kInfo : Severity::kWarning, "layer-record-copy-bad", offset, kPairSize,
                "one copy of the record of " + place("layer", record.layer_id) + " is damaged (" + copy_states(copies) +
                    "); the other serves")
            .layer_id = record.layer_id;
      }
      LayerSeen seen;
      seen.info.slot = static_cast<uint32_t>(slot);
      seen.info.layer_id = record.layer_id;
      seen.info.parent_layer_id = record.parent_layer_id;
      seen.info.volume_id = record.volume_id;
      seen.info.size_bytes = record.size_bytes;
      seen.info.birth = record.birth;
      seen.info.state = record.state;
      seen.info.snapshot_name = field_text(record.snapshot_name);
      const bool frozen = record.state == LayerState::kFrozen || record.state == LayerState::kFolded;
      seen.settled = frozen && (record.header.flags & format::kLayerSettled) != 0;
      if (record.state == LayerState::kFree || record.state > LayerState::kDeleted) {
        find_at(Severity::kError, "layer-state", offset, kPairSize,
                place("layer", record.layer_id) + " has an unknown state")
            .layer_id = record.layer_id;
        return;
      }
      if (record.state != LayerState::kDeleted) report_.layers++;
      const auto [existing, fresh] = layers_.try_emplace(record.layer_id, std::move(seen));
      if (!fresh) {
        find_at(Severity::kError, "layer-twice", offset, kPairSize,
                place("layer", record.layer_id) + " has two records, in slots " +
                    std::to_string(existing->second.info.slot) + " and " + std::to_string(slot))
            .layer_id = record.layer_id;
      }
    });
  }

  // Marks a chain from its top down, tombstones left out.
  void use_chain(uint64_t id) {
    for (auto at = layers_.find(id); at != layers_.end() && !at->second.used;
         at = layers_.find(at->second.info.parent_layer_id)) {
      at->second.used = true;
    }
  }

  void relate_volumes_and_layers() {
    for (const auto& [id, volume] : volumes_) use_chain(volume.top_layer_id);
    for (const auto& [id, seen] : layers_) {
      if (!seen.info.snapshot_name.empty() && seen.info.state == LayerState::kFrozen) use_chain(id);
    }
    for (auto& [id, seen] : layers_) {
      seen.chunks = (seen.info.size_bytes + format::kChunkSize - 1) / format::kChunkSize;
      if (seen.info.state != LayerState::kDeleted) check_chain(id, seen);
    }
    for (const auto& [id, volume] : volumes_) {
      const auto top = layers_.find(volume.top_layer_id);
      if (top == layers_.end() || top->second.info.state == LayerState::kDeleted) {
        CheckFinding& finding = find_at(
            Severity::kError, "volume-without-layer", volume_record_offset(s_, volume.slot), kPairSize,
            "volume " + std::to_string(id) + " (" + volume.name + ") has " + place("layer", volume.top_layer_id) +
                " as its top, which " + (top == layers_.end() ? "has no record" : "is deleted"));
        finding.volume_id = id;
        finding.layer_id = volume.top_layer_id;
        continue;
      }
      LayerSeen& seen = top->second;
      seen.is_top = true;
      seen.epoch = volume.epoch;
      seen.settled = volume.state == VolumeState::kClosed && !volume.unclean;
      seen.chunks = std::max(seen.chunks, (volume.size_bytes + format::kChunkSize - 1) / format::kChunkSize);
    }
    for (auto& [id, seen] : layers_) {
      if (seen.info.state == LayerState::kWritable && volumes_.find(seen.info.volume_id) == volumes_.end()) {
        find(Severity::kWarning, "layer-without-volume",
             place("layer", id) + " is writable, but " + place("volume", seen.info.volume_id) + " has no record")
            .layer_id = id;
      } else if (!seen.used && !seen.broken && seen.info.state == LayerState::kWritable) {
        find(Severity::kInfo, "layer-unused",
             place("layer", id) + " is writable, but not the top of " + place("volume", seen.info.volume_id) +
                 ": a cut was interrupted; it is repeated, or the layer is given up")
            .layer_id = id;
      } else if (!seen.used && !seen.broken && seen.info.state != LayerState::kDeleted) {
        find(Severity::kInfo, "layer-unused",
             place("layer", id) + " is frozen, and no named snapshot and no volume that was ever opened rests on it")
            .layer_id = id;
      }
      seen.chunks = std::min<uint64_t>(seen.chunks, format::kNoChunk);
    }
  }

  void check_chain(uint64_t id, LayerSeen& seen) {
    const auto wrong = [&](const char* kind, const std::string& what) {
      seen.broken = true;
      find_at(Severity::kError, kind, layer_record_offset(s_, seen.info.slot), kPairSize,
              place("layer", id) + " " + what)
          .layer_id = id;
    };
    if (seen.info.size_bytes > format::kMaxVolumeBytes) wrong("layer-size", "has an impossible size");
    const LayerSeen* child = &seen;
    bool first = true;
    for (size_t steps = 0; child->info.parent_layer_id != 0; steps++) {
      const auto parent = layers_.find(child->info.parent_layer_id);
      const std::string link = place("layer", child->info.layer_id) + " has " +
                               place("layer", child->info.parent_layer_id) + " as its parent";
      if (parent == layers_.end()) {
        return wrong("layer-without-parent", "rests on nothing: " + link + ", which has no record");
      }
      if (steps > layers_.size()) return wrong("layer-cycle", "is below itself in its own chain");
      if (parent->second.info.state == LayerState::kDeleted) {
        child = &parent->second;  // stripped bare and wiped: its record says what it rested on
        continue;
      }
      if (std::exchange(first, false)) {  // each link is judged once, from its child
        // Not so where a cut was cut off: its new top is in nobody's chain yet.
        const bool cut_off = !seen.used && seen.info.state == LayerState::kWritable;
        if (parent->second.info.state == LayerState::kWritable && !cut_off) {
          wrong("layer-parent-writable", "rests on a layer that is still writable: " + link);
        }
        if (parent->second.info.birth >= seen.info.birth)
          wrong("layer-order", "is not newer than its parent: " + link);
      }
      child = &parent->second;
    }
  }

  void check_slabs() {
    for (uint64_t first = 0; first < s_.slab_count; first += format::kSlabsPerRegion) {
      const uint64_t count = std::min<uint64_t>(format::kSlabsPerRegion, s_.slab_count - first);
      read_pairs(slab_page_offset(s_, first), count, [&](uint64_t i, PageBuffer& buffer, size_t at) {
        check_slab(first + i, buffer.at<SlabPage>(at), buffer.at<SlabPage>(at + kPageSize));
      });
    }
  }

  void find_slab(Severity severity, const char* kind, uint64_t slab, const SlabPage* page, const std::string& what) {
    const uint64_t offset = slab_page_offset(s_, slab);
    std::string whose;
    if (page != nullptr && page->layer_id != 0) {
      whose = " of volume " + std::to_string(page->volume_id) + ", layer " + std::to_string(page->layer_id);
    }
    CheckFinding& finding = find_at(severity, kind, offset, kPairSize, place("slab", slab) + whose + ": " + what);
    finding.slab = slab;
    if (page != nullptr && page->layer_id != 0) {
      finding.volume_id = page->volume_id;
      finding.layer_id = page->layer_id;
    }
  }

  // Something that concerns logical chunks: the sentence gives their bytes in the volume.
  void find_chunks(Severity severity, const char* kind, uint64_t slab, const SlabPage& page, uint64_t chunk,
                   uint64_t count, const std::string& what) {
    const uint64_t from = chunk * format::kChunkSize;
    find_slab(severity, kind, slab, &page,
              what + " (volume bytes " + std::to_string(from) + " to " +
                  std::to_string(from + count * format::kChunkSize) + ")");
  }

  void check_slab(uint64_t slab, const SlabPage& a, const SlabPage& b) {
    const Copies copies = choose_slab(a, b, s_.header.pool, slab_page_offset(s_, slab));
    if (copies.bad()) {
      find_slab(Severity::kError, "slab-page-both-bad", slab, readable_owner(a, b),
                "both copies of its page are damaged (" + copy_states(copies) +
                    "), so what its 16 MiB hold can't be told; the volume can only be read without it");
      return;
    }
    if (!copies.valid()) {
      report_.slabs_free++;
      if (copies.state[0] != copies.state[1]) {
        find_slab(Severity::kInfo, "slab-claim-torn", slab, nullptr,
                  "its first claim was interrupted before any data could follow; it counts as free");
      }
      return;
    }
    const SlabPage& page = copies.newest == 0 ? a : b;
    if (page.layer_id == 0) {
      report_.slabs_free++;
      return;
    }
    report_.slabs_claimed++;
    const auto found = layers_.find(page.layer_id);
    LayerSeen* layer = found == layers_.end() ? nullptr : &found->second;
    if (is_half_claim(page, copies.newest == 0 ? b : a, copies)) {
      find_slab(Severity::kInfo, "slab-claim-torn", slab, &page,
                "its claim was interrupted before any data could follow; its volume makes it anew when it needs it");
    } else {
      check_copies(slab, a, b, copies, layer);
    }
    check_owner(slab, page, layer);
    check_entries(slab, page, layer);
    check_holes(slab, page, layer);
  }

  // The serving copy maps nothing and the other one is not of the same owner: nothing can be lost by that.
  static bool is_half_claim(const SlabPage& page, const SlabPage& other, const Copies& copies) {
    const PageState state = copies.state[1 - copies.newest];
    if (state == PageState::kOk && other.generation == page.generation && other.layer_id != 0) return false;
    if (state != PageState::kOk && state != PageState::kBlank && state != PageState::kBadCrc) return false;
    return is_empty(page);
  }

  // Of two damaged copies, one whose header looks right: good enough to name the volume, not to follow.
  const SlabPage* readable_owner(const SlabPage& a, const SlabPage& b) const {
    for (const SlabPage* page : {&a, &b}) {
      if (page->header.magic == format::kMagicSlab && page->header.pool == s_.header.pool &&
          layers_.find(page->layer_id) != layers_.end()) {
        return page;
      }
    }
    return nullptr;
  }

  // Whether the newer page is the older one without some blocks: what stripping, cut off between the copies, leaves.
  static bool stripped(const SlabPage& newer, const SlabPage& older) {
    if (newer.generation != older.generation || newer.layer_id != older.layer_id) return false;
    for (uint32_t i = 0; i < format::kChunksPerSlab; i++) {
      const format::SlabEntry& left = newer.entries[i];
      const format::SlabEntry& was = older.entries[i];
      if (left.logical_chunk == format::kNoChunk) continue;
      if (left.logical_chunk != was.logical_chunk || (left.data & ~was.data) != 0 || (left.zero & ~was.zero) != 0) {
        return false;
      }
    }
    for (uint32_t i = 0; i < std::min(newer.hole_count, format::kHolesPerSlab); i++) {
      const format::HoleRange& left = newer.holes[i];
      bool inside = false;
      for (uint32_t j = 0; j < std::min(older.hole_count, format::kHolesPerSlab); j++) {
        const format::HoleRange& was = older.holes[j];
        inside = inside || (left.start >= was.start && uint64_t{left.start} + left.length <= uint64_t{was.start} + was.length);
      }
      if (!inside) return false;
    }
    return true;
  }
  bool is_parent(uint64_t parent, uint64_t child) const {
    const auto found = layers_.find(child);
    return found != layers_.end() && found->second.info.parent_layer_id == parent;
  }

  void check_copies(uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies, const LayerSeen* layer) {
    const bool settled = layer != nullptr && layer->settled;
    const bool frozen = layer != nullptr && !layer->is_top && layer->info.state != LayerState::kWritable;
    const SlabPage& page = copies.newest == 0 ? a : b;
    const Severity severity = settled ? Severity::kWarning : Severity::kInfo;
    const PageState other = copies.state[1 - copies.newest];
    if (other != PageState::kOk) {
      find_slab(severity, "slab-page-copy-bad", slab, &page,
                std::string("copy ") + (copies.newest == 0 ? "B" : "A") + " of its page " + page_state_text(other) +
                    "; the other serves");
      return;
    }
    if (a.generation == b.generation && a.layer_id != b.layer_id && a.layer_id != 0 && b.layer_id != 0) {
      if (is_empty(a) && is_empty(b) && (is_parent(a.layer_id, b.layer_id) || is_parent(b.layer_id, a.layer_id))) {
        find_slab(Severity::kInfo, "slab-claim-torn", slab, &page,
                  "claiming it for another layer of its volume was interrupted before any data could follow");
        return;
      }
      find_slab(Severity::kError, "slab-owned-twice", slab, &page,
                "its two copies name different owners of the same generation: layers " + std::to_string(a.layer_id) +
                    " and " + std::to_string(b.layer_id));
      return;
    }
    const SlabPage& older = copies.newest == 0 ? b : a;
    if (!copies.equal && settled && frozen && stripped(older, page)) {
      find_slab(Severity::kInfo, "slab-copies-differ", slab, &page,
                "blocks of older layers were being merged into it; that is gone on with, which makes the copies equal");
    } else if (!copies.equal && settled && frozen && stripped(page, older)) {
      find_slab(Severity::kInfo, "slab-copies-differ", slab, &page,
                "one copy of its page has been stripped and the other not yet; stripping again makes them equal");
    } else if (!copies.equal && settled) {
      find_slab(Severity::kWarning, "slab-copies-differ", slab, &page,
                std::string(frozen ? "its layer is frozen" : "its volume is closed") +
                    ", but the copies of its page differ; what the newer one lacks may be lost");
    }
  }

  void check_owner(uint64_t slab, const SlabPage& page, const LayerSeen* layer) {
    if (layer == nullptr) {
      find_slab(Severity::kError, "slab-of-unknown-layer", slab, &page, "the layer that its page names has no record");
      return;
    }
    if (layer->info.state == LayerState::kDeleted) {
      find_slab(Severity::kWarning, "slab-of-deleted-layer", slab, &page,
                "its layer is deleted; deleting was interrupted and must be repeated");
    }
    if (page.volume_id != layer->info.volume_id) {
      find_slab(Severity::kWarning, "slab-volume-differs", slab, &page,
                "its page names " + place("volume", page.volume_id) + ", its layer's record " +
                    place("volume", layer->info.volume_id));
    }
    if (layer->is_top && page.epoch > layer->epoch) {
      find_slab(Severity::kError, "slab-epoch-ahead", slab, &page,
                "its page was written in a later epoch than the volume's record knows");
    }
  }

  void check_entries(uint64_t slab, const SlabPage& page, LayerSeen* layer) {
    for (uint32_t i = 0; i < format::kChunksPerSlab; i++) {
      const format::SlabEntry& entry = page.entries[i];
      if (entry.logical_chunk == format::kNoChunk) {
        if (entry.data != 0 || entry.zero != 0) {
          find_slab(Severity::kError, "entry-mask-without-chunk", slab, &page,
                    "its " + place("chunk", i) + " is free but has blocks marked");
        }
        continue;
      }
      if ((entry.data | entry.zero) == 0) {
        find_chunks(Severity::kError, "entry-without-blocks", slab, page, entry.logical_chunk, 1,
                    "its " + place("chunk", i) + " is taken but has no block");
      }
      if ((entry.data & entry.zero) != 0) {
        find_chunks(Severity::kError, "entry-masks-overlap", slab, page, entry.logical_chunk, 1,
                    "its " + place("chunk", i) + " marks blocks both as data and as zeros");
      }
      if (layer == nullptr) continue;
      if (entry.logical_chunk >= layer->chunks) {
        find_chunks(Severity::kError, "chunk-past-end", slab, page, entry.logical_chunk, 1,
                    "its " + place("chunk", i) + " is past the end of the layer");
        continue;
      }
      if (layer->map(entry.logical_chunk)) {
        twice_count_++;
        if (twice_.size() < kMaxTwice) twice_.push_back({page.layer_id, entry.logical_chunk});
      }
    }
  }

  void check_holes(uint64_t slab, const SlabPage& page, const LayerSeen* layer) {
    if (page.hole_count > format::kHolesPerSlab) {
      find_slab(Severity::kError, "hole-count", slab, &page,
                "its page says it has " + std::to_string(page.hole_count) + " hole ranges; there is room for " +
                    std::to_string(format::kHolesPerSlab));
      return;
    }
    const uint64_t end = layer != nullptr ? layer->chunks : format::kNoChunk;
    for (uint32_t i = 0; i < page.hole_count; i++) {
      const format::HoleRange& hole = page.holes[i];
      if (hole.length == 0 || hole.start >= end || hole.length > end - hole.start) {
        find_chunks(Severity::kError, "hole-range", slab, page, hole.start, hole.length,
                    "its " + place("hole range", i) + " is empty or past the end of the layer");
      }
    }
  }

  // Second look at every chunk that seemed to be mapped twice: all slabs of those layers are read again.
  void confirm_twice() {
    if (twice_.empty()) return;
    struct Seen {
      uint64_t slab, sequence;
    };
    std::map<std::pair<uint64_t, uint32_t>, std::vector<Seen>> places;
    for (const Twice& twice : twice_) places[{twice.layer_id, twice.chunk}];
    for (uint64_t first = 0; first < s_.slab_count; first += format::kSlabsPerRegion) {
      const uint64_t count = std::min<uint64_t>(format::kSlabsPerRegion, s_.slab_count - first);
      read_pairs(slab_page_offset(s_, first), count, [&](uint64_t i, PageBuffer& buffer, size_t at) {
        const auto& a = buffer.at<SlabPage>(at);
        const auto& b = buffer.at<SlabPage>(at + kPageSize);
        const Copies copies = choose_slab(a, b, s_.header.pool, slab_page_offset(s_, first + i));
        if (!copies.valid()) return;
        const SlabPage& page = copies.newest == 0 ? a : b;
        for (const format::SlabEntry& entry : page.entries) {
          if (entry.logical_chunk == format::kNoChunk) continue;
          const auto found = places.find({page.layer_id, entry.logical_chunk});
          if (found != places.end()) found->second.push_back({first + i, page.header.sequence});
        }
      });
    }
    for (const auto& [key, seen] : places) {
      if (seen.size() < 2) continue;
      const LayerSeen& layer = layers_.at(key.first);
      std::string list;
      bool ordered = true;  // each page of another flush: the newest is right, and the next open sees to the others
      for (size_t i = 0; i < seen.size(); i++) {
        list += (i == 0 ? "" : ", ") + std::to_string(seen[i].slab);
        for (size_t j = 0; j < i; j++) ordered = ordered && seen[i].sequence != seen[j].sequence;
      }
      const bool crash = ordered && layer.is_top && !layer.settled;
      const uint64_t from = uint64_t{key.second} * format::kChunkSize;
      CheckFinding& finding =
          find(crash ? Severity::kInfo : Severity::kError, "chunk-mapped-twice",
               "volume " + std::to_string(layer.info.volume_id) + ", layer " + std::to_string(key.first) +
                   ": volume bytes " + std::to_string(from) + " to " + std::to_string(from + format::kChunkSize) +
                   " are mapped by more than one place, in slabs " + list +
                   (crash ? "; a crash left it so, and the page of the latest flush counts" : ""));
      finding.volume_id = layer.info.volume_id;
      finding.layer_id = key.first;
      finding.slab = seen.back().slab;
      finding.offset = slab_page_offset(s_, seen.back().slab);
      finding.length = kPairSize;
    }
    if (twice_count_ > twice_.size()) {
      find(Severity::kError, "chunk-mapped-twice",
           std::to_string(twice_count_ - twice_.size()) + " more chunks seem to be mapped twice");
    }
  }

  SyncDevice& device_;
  const Superblock s_;
  const Progress& progress_;
  CheckReport report_;
  uint64_t total_pages_ = 0;
  std::unordered_map<uint32_t, uint64_t> fenced_;  // host id -> highest generation that is fenced
  std::map<uint64_t, VolumeSeen> volumes_;         // by id; not the deleted ones
  std::map<uint64_t, LayerSeen> layers_;           // by id
  std::vector<Twice> twice_;
  uint64_t twice_count_ = 0;
};

}  // namespace

const char* severity_name(CheckFinding::Severity severity) {
  switch (severity) {
    case Severity::kError: return "error";
    case Severity::kWarning: return "warning";
    case Severity::kInfo: return "info";
  }
  return "unknown";
}

Result<CheckReport> check_pool(SyncDevice& device, const Progress& progress) {
  Result<PoolInfo> info = read_pool(device);
  if (!info.ok()) return info.status;
  return Checker(device, *info, progress).run();
}

Result<CheckReport> check_pool_at(const std::string& path, const Progress& progress) {
  Result<std::unique_ptr<FdDevice>> device = FdDevice::open(path, FdDevice::Mode::kRead);
  if (!device.ok()) return device.status;
  Result<PoolInfo> info = read_pool_at(**device);
  if (!info.ok()) return info.status;
  return Checker(**device, *info, progress).run();
}

}  // namespace holdfast
