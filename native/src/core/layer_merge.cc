// See layer_merge.h. Slab by slab of the victims:
//
//   what shows of it → places in the head → slabs claimed if need be → data copied → flushed → the head's pages, older copies, flushed,
//   then the others, flushed
//
// So a page that is read says nothing that is not durable below it, and one of its copies is whole at any moment.
#include "layer_merge.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "layer_pages.h"

namespace holdfast {
namespace {

using format::HoleRange;
using format::kBlocksPerChunk;
using format::kBlockSize;
using format::kChunkSize;
using format::kChunksPerSlab;
using format::kHolesPerSlab;
using format::kNoChunk;
using format::kPageSize;
using format::SlabEntry;
using format::SlabPage;
using format::Superblock;

constexpr uint32_t kNowhere = 0xffffffff;

// Where the head has a chunk: index of the slab << 8 | chunk in it. In pieces, like BlockSet.
class PlaceSet {
 public:
  uint32_t get(uint32_t chunk) const {
    const auto piece = pieces_.find(chunk / BlockSet::kPieceChunks);
    return piece == pieces_.end() ? kNowhere : piece->second[chunk % BlockSet::kPieceChunks];
  }
  void put(uint32_t chunk, uint32_t place) {
    std::vector<uint32_t>& piece = pieces_[chunk / BlockSet::kPieceChunks];
    if (piece.empty()) piece.resize(BlockSet::kPieceChunks, kNowhere);
    piece[chunk % BlockSet::kPieceChunks] = place;
  }

 private:
  std::map<uint32_t, std::vector<uint32_t>> pieces_;
};

struct HeadSlab {
  uint64_t slab = 0;
  uint64_t generation = 0;
  uint64_t sequence = 0;
  uint32_t newest = 0;
  uint32_t free = 0;   // chunks
  uint32_t holes = 0;
  bool equal = false;  // both copies
};

struct Spare {
  uint64_t slab = 0;
  uint64_t generation = 0;
  uint32_t first = 0;  // the copy that does not serve
};

// Blocks of a chunk that show.
struct Move {
  uint32_t chunk = 0;
  uint16_t data = 0;
  uint16_t zero = 0;
  uint32_t from = 0;  // in its slab
  uint32_t to = kNowhere;
};

struct Found {
  uint64_t slab = 0;
  std::vector<Move> moves;
  std::vector<HoleRange> holes;  // whole chunks of which the head says nothing
};

class Merger {
 public:
  Merger(SyncDevice& device, const Superblock& s, const LayerSpec& head, uint64_t volume_id, uint32_t permille,
         uint64_t max_blocks, const Pause& pause)
      : device_(device),
        s_(s),
        head_(head),
        volume_id_(volume_id),
        needed_max_(kChunksPerSlab * permille / 1000),
        max_blocks_(max_blocks),
        pause_(pause) {}

  Status read_head() {
    for (const SlabRun& run : head_.slabs) {
      Status judged;
      const auto visit = [&](uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
        if (judged.ok()) judged = read_head_pair(run, slab, a, b, copies);
      };
      const auto batch = [&] { return judged; };
      if (Status status = for_each_pair(device_, s_, run, &buffer_, visit, batch); !status.ok()) return status;
    }
    // What was read may have come out of the device's cache only, where a merge that was cut off has left it, and is built upon: the other
    // copy of each page is written over, and a power cut would tear both.
    if (Status status = device_.flush(); !status.ok()) return status;
    return settle();
  }

  Status merge(const LayerSpec& victim) {
    BlockSet own;  // counts for the victims below only
    if (Status status = read_victim(victim, &own); !status.ok()) return status;
    std::vector<Found> found;
    const auto look = [&](uint64_t slab, const SlabPage& page) {
      if (!stopped_) found.push_back(shown(slab, page));
    };
    const auto move = [&]() -> Status {
      for (Found& one : found) {
        if (stopped_) break;
        if (Status status = move_slab(one); !status.ok()) return status;
      }
      found.clear();
      return {};
    };
    if (Status status = each_page(victim, look, move); !status.ok()) return status;
    own.each(0, [&](uint32_t chunk, uint16_t mask) {
      covered_.add(chunk, mask);
      return true;
    });
    return {};
  }

  MergeReport report() {
    report_.complete = !stopped_;
    for (const Spare& spare : spares_) report_.spare.push_back({spare.slab, 1, spare.generation});
    return std::move(report_);
  }

 private:
  Status read_head_pair(const SlabRun& run, uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
    if (copies.bad()) return both_bad(slab, head_);
    const SlabPage* newest = !copies.valid() ? nullptr : copies.newest == 0 ? &a : &b;
    if (newest == nullptr || newest->generation < run.generation) {
      spares_.push_back({slab, run.generation, static_cast<uint32_t>(copies.next())});
      return {};
    }
    if (!names(*newest, head_, run)) return {};
    if (Status status = sane(slab, *newest); !status.ok()) return status;
    HeadSlab one{slab,
                 run.generation,
                 newest->header.sequence,
                 static_cast<uint32_t>(copies.newest),
                 0,
                 newest->hole_count,
                 copies.equal};
    const auto index = static_cast<uint32_t>(slabs_.size());
    for (uint32_t c = 0; c < kChunksPerSlab; c++) {
      const SlabEntry& entry = newest->entries[c];
      if (entry.logical_chunk == kNoChunk) {
        one.free++;
      } else if (places_.get(entry.logical_chunk) != kNowhere) {
        return mapped_twice(head_.layer_id);
      } else {
        places_.put(entry.logical_chunk, index << 8 | c);
      }
    }
    add_coverage(covered_, *newest);
    epoch_ = std::max(epoch_, newest->epoch);
    slabs_.push_back(one);
    return {};
  }

  Status read_victim(const LayerSpec& victim, BlockSet* own) {
    own_entries_ = BlockSet();
    taken_ = BlockSet();
    bool twice = false;
    const auto visit = [&](uint64_t, const SlabPage& page) {
      add_coverage(*own, page);
      for (const SlabEntry& entry : page.entries) {
        if (entry.logical_chunk == kNoChunk) continue;
        twice = twice || own_entries_.get(entry.logical_chunk) != 0;
        own_entries_.add(entry.logical_chunk, static_cast<uint16_t>(entry.data | entry.zero));
      }
    };
    const Status status = each_page(victim, visit, [] { return Status{}; });
    return status.ok() && twice ? mapped_twice(victim.layer_id) : status;
  }

  static Status mapped_twice(uint64_t layer_id) {
    return {Code::kCorrupt, "layer " + std::to_string(layer_id) + " maps a chunk from two places, and which is right is for its opener to say; "
                            "it is not merged. Run `holdfast pool check`"};
  }

  // Of each slab that is the victim's: visit(slab, page), and batch() now and then.
  template <typename Visit, typename Batch>
  Status each_page(const LayerSpec& victim, Visit visit, Batch batch) {
    for (const SlabRun& run : victim.slabs) {
      Status judged;
      const auto pair = [&](uint64_t slab, const SlabPage& a, const SlabPage& b, const Copies& copies) {
        if (!judged.ok()) return;
        if (copies.bad()) judged = both_bad(slab, victim);
        if (!copies.valid()) return;
        const SlabPage& newest = copies.newest == 0 ? a : b;
        if (!names(newest, victim, run)) return;
        judged = sane(slab, newest);
        if (judged.ok()) visit(slab, newest);
      };
      const auto between = [&]() -> Status { return judged.ok() ? batch() : judged; };
      if (Status status = for_each_pair(device_, s_, run, &buffer_, pair, between); !status.ok()) return status;
    }
    return {};
  }

  // What is found is to be moved: no other slab of the victim's is asked for it again.
  Found shown(uint64_t slab, const SlabPage& page) {
    Found found;
    found.slab = slab;
    for (uint32_t c = 0; c < kChunksPerSlab; c++) {
      const SlabEntry& entry = page.entries[c];
      if (entry.logical_chunk == kNoChunk) continue;
      const auto open = static_cast<uint16_t>(~covered_.get(entry.logical_chunk));
      const Move move{entry.logical_chunk, static_cast<uint16_t>(entry.data & open),
                      static_cast<uint16_t>(entry.zero & open), c, kNowhere};
      if ((move.data | move.zero) != 0) found.moves.push_back(move);
    }
    for (uint32_t i = 0; i < page.hole_count; i++) add_shown_hole(page.holes[i], &found);
    return found;
  }

  void add_shown_hole(const HoleRange& hole, Found* found) {
    for (uint32_t chunk = hole.start; chunk < hole.start + hole.length; chunk++) {
      // An entry of the same layer beats the hole, and two ranges may have the same chunk.
      const auto zero = static_cast<uint16_t>(~(covered_.get(chunk) | own_entries_.get(chunk) | taken_.get(chunk)));
      if (zero == 0) continue;
      taken_.add(chunk, zero);
      if (zero != kAll) {
        found->moves.push_back({chunk, 0, zero, 0, kNowhere});
      } else if (!found->holes.empty() && found->holes.back().start + found->holes.back().length == chunk) {
        found->holes.back().length++;
      } else {
        found->holes.push_back({chunk, 1});
      }
    }
  }

  Status move_slab(Found& found) {
    if (found.moves.empty() && found.holes.empty()) return {};
    uint32_t needed = 0;
    for (const Move& move : found.moves) needed += places_.get(move.chunk) == kNowhere;
    if (needed > needed_max_) return {};
    if (max_blocks_ != 0 && report_.moved_blocks >= max_blocks_) {
      stopped_ = true;
      return {};
    }
    if (!has_room(needed, found.holes.size())) {
      report_.no_space = stopped_ = true;
      return {};
    }
    if (Status status = place(found); !status.ok()) return status;
    for (const Move& move : found.moves) {
      if (Status status = copy(found.slab, move); !status.ok()) return status;
    }
    if (Status status = device_.flush(); !status.ok()) return status;
    if (Status status = write_touched(); !status.ok()) return status;
    if (pause_) pause_();
    return {};
  }

  bool has_room(uint64_t chunks, uint64_t holes) const {
    uint64_t free = spares_.size() * kChunksPerSlab;
    uint64_t ranges = spares_.size() * kHolesPerSlab;
    for (const HeadSlab& one : slabs_) {
      free += one.free;
      ranges += kHolesPerSlab - one.holes;
    }
    return chunks <= free && holes <= ranges;
  }

  // Copies that differ are what a crash left, of a cut or of an earlier job: the older one may map what the newer does not.
  Status settle() {
    bool any = false;
    for (HeadSlab& one : slabs_) {
      if (one.equal) continue;
      SlabPage page;
      if (Status status = read_page(one, &page); !status.ok()) return status;
      if (Status status = write_page(one, page, 1 - one.newest, one.sequence); !status.ok()) return status;
      one.equal = any = true;
    }
    return any ? device_.flush() : Status{};
  }

  // ---- places

  Status place(Found& found) {
    for (Move& move : found.moves) {
      move.to = places_.get(move.chunk);
      if (move.to == kNowhere) {
        if (Status status = take_chunk(move.chunk, &move.to); !status.ok()) return status;
      }
      SlabPage* page = nullptr;
      if (Status status = touch(move.to >> 8, &page); !status.ok()) return status;
      SlabEntry& entry = page->entries[move.to & 0xff];
      if (entry.logical_chunk != move.chunk || ((entry.data | entry.zero) & (move.data | move.zero)) != 0) {
        return {Code::kCorrupt, "the page of slab " + std::to_string(slabs_[move.to >> 8].slab) +
                                    " has changed while it was merged into. Run `holdfast pool check`"};
      }
      entry.data = static_cast<uint16_t>(entry.data | move.data);
      entry.zero = static_cast<uint16_t>(entry.zero | move.zero);
      report_.moved_blocks += bits(move.data) + bits(move.zero);
    }
    for (const HoleRange& hole : found.holes) {
      if (Status status = put_hole(hole); !status.ok()) return status;
    }
    return {};
  }

  Status take_chunk(uint32_t chunk, uint32_t* out) {
    while (current_ < slabs_.size() && slabs_[current_].free == 0) current_++;
    if (current_ == slabs_.size()) {
      if (Status status = claim(); !status.ok()) return status;
    }
    SlabPage* page = nullptr;
    if (Status status = touch(current_, &page); !status.ok()) return status;
    uint32_t at = 0;
    while (at < kChunksPerSlab && page->entries[at].logical_chunk != kNoChunk) at++;
    HF_ASSERT(at < kChunksPerSlab);
    page->entries[at] = {chunk, 0, 0};
    slabs_[current_].free--;
    *out = current_ << 8 | at;
    places_.put(chunk, *out);
    return {};
  }

  Status put_hole(const HoleRange& hole) {
    uint32_t at = 0;
    while (at < slabs_.size() && slabs_[at].holes == kHolesPerSlab) at++;
    if (at == slabs_.size()) {
      if (Status status = claim(); !status.ok()) return status;
    }
    SlabPage* page = nullptr;
    if (Status status = touch(at, &page); !status.ok()) return status;
    page->holes[page->hole_count++] = hole;
    slabs_[at].holes++;
    report_.moved_blocks += uint64_t{hole.length} * kBlocksPerChunk;
    return {};
  }

  // A page of the new generation in both copies, one after the other, durably, before any data: no power cut tears both.
  Status claim() {
    HF_ASSERT(!spares_.empty());  // has_room() said so
    const Spare spare = spares_.back();
    HeadSlab one{spare.slab, spare.generation, 1, 1 - spare.first, kChunksPerSlab, 0, true};
    SlabPage page;
    make_free_slab_page(&page, spare.generation);
    page.layer_id = head_.layer_id;
    page.volume_id = volume_id_;
    page.epoch = epoch_;
    for (const uint32_t copy : {spare.first, 1 - spare.first}) {
      if (Status status = write_page(one, page, copy, 1); !status.ok()) return status;
      if (Status status = device_.flush(); !status.ok()) return status;
    }
    spares_.pop_back();
    slabs_.push_back(one);
    return {};
  }

  // ---- the disk

  Status copy(uint64_t slab, const Move& move) {
    if (move.data == 0) return {};
    const auto first = static_cast<uint32_t>(__builtin_ctz(move.data));
    const auto end = static_cast<uint32_t>(32 - __builtin_clz(move.data));
    const uint64_t from = slab_data_offset(s_, slab) + uint64_t{move.from} * kChunkSize;
    const uint64_t to = slab_data_offset(s_, slabs_[move.to >> 8].slab) + uint64_t{move.to & 0xff} * kChunkSize;
    if (Status status = device_.read(from + first * kBlockSize, data_.data() + first * kBlockSize, (end - first) * kBlockSize);
        !status.ok()) {
      return status;
    }
    for (uint32_t block = first; block < end;) {
      uint32_t stop = block;
      while (stop < end && (move.data >> stop & 1) != 0) stop++;
      if (stop > block) {
        const size_t length = (stop - block) * kBlockSize;
        if (Status status = device_.write(to + block * kBlockSize, data_.data() + block * kBlockSize, length); !status.ok()) {
          return status;
        }
      }
      block = std::max(stop, block + 1);
    }
    return {};
  }

  uint64_t page_address(const HeadSlab& one, uint32_t copy) const {
    return slab_page_offset(s_, one.slab) + uint64_t{copy} * kPageSize;
  }

  Status read_page(const HeadSlab& one, SlabPage* out) {
    const uint64_t address = page_address(one, one.newest);
    if (Status status = device_.read(address, page_.data(), kPageSize); !status.ok()) return status;
    *out = page_.at<SlabPage>();
    if (verify(*out, s_.header.pool, address) == PageState::kOk && out->layer_id == head_.layer_id &&
        out->generation == one.generation && out->header.sequence == one.sequence) {
      return {};
    }
    return {Code::kCorrupt, "the page of slab " + std::to_string(one.slab) + " of frozen layer " +
                                std::to_string(head_.layer_id) + " is not what it was a moment ago. Run `holdfast pool check`"};
  }

  Status write_page(const HeadSlab& one, const SlabPage& page, uint32_t copy, uint64_t sequence) {
    page_.at<SlabPage>() = page;
    seal(page_.at<SlabPage>(), s_.header.pool, page_address(one, copy), sequence);
    return device_.write(page_address(one, copy), page_.data(), kPageSize);
  }

  Status touch(uint32_t index, SlabPage** out) {
    auto [at, fresh] = touched_.try_emplace(index);
    if (fresh) {
      if (Status status = read_page(slabs_[index], &at->second); !status.ok()) return status;
    }
    *out = &at->second;
    return {};
  }

  Status write_touched() {
    for (uint32_t turn = 0; turn < 2; turn++) {
      for (const auto& [index, page] : touched_) {
        const HeadSlab& one = slabs_[index];
        const uint32_t copy = turn == 0 ? 1 - one.newest : one.newest;
        if (Status status = write_page(one, page, copy, one.sequence + 1); !status.ok()) return status;
      }
      if (Status status = device_.flush(); !status.ok()) return status;
    }
    for (const auto& [index, page] : touched_) slabs_[index].sequence++;
    touched_.clear();
    return {};
  }

  SyncDevice& device_;
  const Superblock& s_;
  const LayerSpec& head_;
  const uint64_t volume_id_;
  const uint32_t needed_max_;
  const uint64_t max_blocks_;
  const Pause& pause_;
  PageBuffer buffer_{kPairsPerRead * format::kSlabPairSize};
  PageBuffer data_{kChunkSize};
  PageBuffer page_{kPageSize};
  MergeReport report_;
  bool stopped_ = false;
  BlockSet covered_;      // by the head and the victims that are through
  BlockSet own_entries_;  // of the victim that is looked at
  BlockSet taken_;        // of its holes
  PlaceSet places_;
  std::vector<HeadSlab> slabs_;
  std::vector<Spare> spares_;
  uint32_t current_ = 0;  // in slabs_: none before it has a free chunk
  uint64_t epoch_ = 0;
  std::map<uint32_t, SlabPage> touched_;  // by index in slabs_: as they are to be
};

Status check_chain(const std::vector<LayerSpec>& victims, const LayerSpec& head) {
  if (victims.empty()) return {Code::kInvalidArgument, "merging takes at least one layer to merge"};
  uint64_t birth = head.birth;
  for (const LayerSpec& layer : victims) {
    if (layer.birth >= birth) {
      return {Code::kInvalidArgument, "layer " + std::to_string(layer.layer_id) +
                                          " is not older than the layer before it; give the newest first"};
    }
    birth = layer.birth;
  }
  return {};
}

}  // namespace

Result<MergeReport> merge_layers(SyncDevice& device, const Superblock& s, const std::vector<LayerSpec>& victims,
                                 const LayerSpec& head, uint32_t skip_above_permille, uint64_t max_blocks,
                                 const Pause& pause) {
  if (Status status = check_chain(victims, head); !status.ok()) return status;
  if (Status status = check_layers(s, victims); !status.ok()) return status;
  if (Status status = check_layers(s, {head}); !status.ok()) return status;
  const std::string undone = "nothing was merged";
  format::LayerRecord record;
  for (const LayerSpec& victim : victims) {
    if (Status status = check_victim(device, s, victim, undone, &record); !status.ok()) return status;
  }
  if (Status status = check_victim(device, s, head, undone, &record); !status.ok()) return status;
  // Of what was ever stripped, a reader may still be at a place that looks free.
  if (record.state != format::LayerState::kFrozen) {
    return Status{Code::kInvalidArgument, "layer " + std::to_string(head.layer_id) + " is folded on the disk; " + undone};
  }
  Merger merger(device, s, head, record.volume_id, skip_above_permille, max_blocks, pause);
  if (Status status = merger.read_head(); !status.ok()) return status;
  for (const LayerSpec& victim : victims) {
    if (Status status = merger.merge(victim); !status.ok()) return status;
  }
  return merger.report();
}

}  // namespace holdfast
