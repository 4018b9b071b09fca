// Compaction: what still shows of old layers is copied up into the top, so that stripping finds it covered and empties the
// slabs that it stood in. Zeros and holes go up as such: whether anything lies below them is not for the top to know. For layers that nobody names any more; that is for whoever asks to know. Nothing that anybody
// reads changes: not the volume, for the copy is the same bytes, and no snapshot, for the top is in none.
//
//   look for chunks that a slab still shows → mark a few → requests that came before the marks end → places in the top →
//   read → write → set the bits → unmark → rest → … → flush → answer
//
// A copy and a write of the same block would go to the same place of the top, so while a chunk is marked, new writes and
// discards of it wait (before they know a place, so nothing waits for them). Reads need not: the old place and the new one
// hold the same. All else is as for a write: bits are set when the data is written, not before; a chunk taken in vain
// becomes free by way of the next flush. Like a request it holds a grace period while it has places.
//
// It gives way: small batches, few at the device at a time, and a rest as long as the batch when anybody uses the volume; it
// takes no slab that a held write waits for; and it stops moving before writes are held.
#include <algorithm>
#include <cerrno>
#include <utility>

#include "volume_impl.h"

namespace holdfast {

using format::kBlocksPerChunk;
using format::kBlockSize;
using format::kChunkSize;
using format::kChunksPerSlab;
using format::SlabEntry;

namespace {
constexpr uint64_t kLooks = 4096;         // at entries of layers, under one hold of the lock
// Beside requests. A write that meets a marked chunk waits for the whole batch, a read for what is at the device.
constexpr size_t kChunksBeside = 8;
constexpr uint32_t kDepthBeside = 1;
constexpr uint32_t kPieceBeside = kChunkSize;
constexpr uint32_t kPiece = 4 * kChunkSize;
constexpr uint64_t kLongestRestNs = 250'000'000;
constexpr uint64_t kLackRestNs = 20'000'000;
constexpr uint64_t kPatienceNs = 10'000'000'000;  // before a slab counts as not to be had
}  // namespace

void VolumeImpl::compact(const std::vector<LayerSlabs>& sources, uint32_t skip_above_permille, uint64_t max_blocks,
                         CompactDone done) {
  auto job = std::make_unique<Compact>();
  job->buffer = std::make_unique<PageBuffer>(size_t{kCopyChunks} * kChunkSize);
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  Status refusal;
  if (state_ != State::kOpen) {
    refusal = {Code::kUnavailable, name + " is not open; open it and compact it then"};
  } else if (read_only_) {
    refusal = {Code::kInvalidArgument, name + " is open read-only; compact it where it is open for writing"};
  } else if (compact_ != nullptr) {
    refusal = {Code::kBusy, name + " is being compacted already; try again when that is done"};
  } else if (control_.kind == Control::Kind::kHold || control_.kind == Control::Kind::kCut) {
    refusal = {Code::kBusy, name + " has its writes held, or is being cut; try again when that is done"};
  }
  if (!refusal.ok()) {
    post_done(home, [done = std::move(done)](Status status) { done(std::move(status)); }, std::move(refusal));
    return unlock(lock);
  }
  job->home = home;
  job->done = std::move(done);
  job->max_blocks = max_blocks;
  job->needed_max = uint64_t{skip_above_permille} * usable_chunks_ / 1000;
  job->requests = request_count();
  job->from.resize(layers_.size());
  for (PageIo& io : job->io) {
    io.volume = this;
    io.tag = kNoIndex;
  }
  struct Wanted {
    SlabRun run;
    size_t layer;
  };
  std::vector<Wanted> wanted;
  for (const LayerSlabs& source : sources) {
    for (size_t i = 0; i + 1 < layers_.size(); i++) {
      if (layers_[i].id != source.layer_id) continue;
      job->from[i] = true;
      for (const SlabRun& run : source.slabs) wanted.push_back({run, i});
    }
  }
  std::sort(wanted.begin(), wanted.end(), [](const Wanted& a, const Wanted& b) { return a.run.first < b.run.first; });
  for (uint32_t i = 0; i < slabs_.size() && !wanted.empty(); i++) {
    const Slab& slab = slabs_[i];
    if (slab.state != SlabState::kLive) continue;
    auto at = std::upper_bound(wanted.begin(), wanted.end(), slab.number,
                               [](uint64_t number, const Wanted& one) { return number < one.run.first; });
    if (at == wanted.begin()) continue;
    --at;
    if (slab.number < at->run.first + at->run.count && slab.generation == at->run.generation && slab.layer == at->layer) {
      job->sources.push_back({i, slab.number, slab.generation});
    }
  }
  compact_ = std::move(job);
  start_background();
  compact_post(Compact::Stage::kLook);
  unlock(lock);
}

void VolumeImpl::compact_post(Compact::Stage stage) {
  compact_->stage = stage;
  compact_task_.run = [](Task* task) {
    VolumeImpl* self = static_cast<CompactTask*>(task)->volume;
    std::unique_lock lock(self->mu_);
    if (self->compact_->stage == Compact::Stage::kPlan) self->compact_plan();
    else self->compact_look();
    self->unlock(lock);
  };
  compact_->home->post(&compact_task_);
}

// ---- what to move

// Which of the blocks no layer above says anything about.
uint16_t VolumeImpl::still_shown(uint32_t layer, uint32_t chunk, uint16_t blocks, uint64_t* looked) const {
  for (size_t i = layers_.size(); i-- > layer + size_t{1} && blocks != 0;) {
    const LayerView found = view(layers_[i], chunk);
    blocks = static_cast<uint16_t>(blocks & ~(found.data | found.zero));
    ++*looked;
  }
  return blocks;
}

void VolumeImpl::compact_look() {
  Compact& job = *compact_;
  HF_ASSERT(job.stage == Compact::Stage::kLook && copying_.empty() && job.outstanding == 0);
  if (state_ == State::kAborted) return compact_end(stopped_status("it was stopped while it was being compacted"));
  const bool enough = job.max_blocks != 0 && job.report.moved_blocks >= job.max_blocks;
  if (job.stop || enough) return compact_moved();
  if (job.next_chunk < job.chunks.size()) return compact_mark();
  if (job.entry == 0 || job.entry == kChunksPerSlab) job.chunks.clear();
  uint64_t looked = 0;
  for (; job.source < job.sources.size(); job.source++, job.entry = 0, job.hole = 0, job.hole_chunk = 0) {
    const Compact::Source& source = job.sources[job.source];
    const Slab& slab = slabs_[source.slab];
    // It may have been forgotten meanwhile.
    if (slab.state != SlabState::kLive || slab.number != source.number || slab.generation != source.generation) {
      job.chunks.clear();
      job.needed = 0;
      continue;
    }
    HF_ASSERT(!in_top(slab));
    const bool fresh = job.entry < kChunksPerSlab;
    if (fresh && !compact_look_entries(&looked)) {
      job.next_chunk = job.chunks.size();  // whether they are to be moved is not known yet
      return compact_post(Compact::Stage::kLook);
    }
    if (fresh && compact_skips(std::exchange(job.needed, 0))) {
      job.chunks.clear();
      continue;
    }
    const bool through = !job.chunks.empty() || compact_look_holes(&looked);
    job.next_chunk = 0;
    if (!job.chunks.empty()) return compact_mark();
    if (!through) return compact_post(Compact::Stage::kLook);
  }
  job.next_chunk = 0;
  compact_moved();
}

bool VolumeImpl::compact_look_entries(uint64_t* looked) {
  Compact& job = *compact_;
  const uint32_t index = job.sources[job.source].slab;
  const uint32_t layer = slabs_[index].layer;
  for (; job.entry < kChunksPerSlab; job.entry++) {
    if (*looked >= kLooks) return false;
    ++*looked;
    const SlabEntry entry = slabs_.entry(index, job.entry);
    const uint32_t chunk = entry.logical_chunk;
    // Where two slabs of the layer have a chunk, after a crash, one of them serves.
    if (chunk == format::kNoChunk || layers_[layer].map.find(chunk) != (index << 8 | job.entry)) continue;
    const uint16_t shown = still_shown(layer, chunk, static_cast<uint16_t>(entry.data | entry.zero), looked);
    if (shown == 0) continue;
    job.chunks.push_back(chunk);
    job.needed += (shown & entry.data) != 0 && top().map.find(chunk) == kNoPlace;
  }
  return true;
}

bool VolumeImpl::compact_skips(uint32_t needed) {
  if (needed > compact_->needed_max) return true;
  // With no more slabs to come, what the top has left is for writes, unless all of this slab fits: then one comes back.
  const bool lacks = needed > 0 && environment_.stock->known_full() && (slab_waiters_ != nullptr || free_total_ < needed);
  if (lacks) compact_->report.no_space = true;
  return lacks;
}

// As many as make a batch: a hole may be long.
bool VolumeImpl::compact_look_holes(uint64_t* looked) {
  Compact& job = *compact_;
  const uint32_t index = job.sources[job.source].slab;
  if (!slabs_[index].holes) return true;
  const uint32_t layer = slabs_[index].layer;
  const std::vector<format::HoleRange>& holes = slab_holes_.at(index);
  for (; job.hole < holes.size(); job.hole++, job.hole_chunk = 0) {
    for (; job.hole_chunk < holes[job.hole].length; job.hole_chunk++) {
      if (*looked >= kLooks || job.chunks.size() == kCopyChunks) return false;
      ++*looked;
      const uint32_t chunk = holes[job.hole].start + job.hole_chunk;
      if (still_shown(layer, chunk, view(layers_[layer], chunk).zero, looked) != 0) job.chunks.push_back(chunk);
    }
  }
  return true;
}

// ---- alone with a few chunks

void VolumeImpl::compact_mark() {
  Compact& job = *compact_;
  job.users = active_ > 0 || request_count() != job.requests;
  job.requests = request_count();
  job.begun_ns = job.home->now_ns();
  job.depth = job.users ? kDepthBeside : kCopyDepth;
  size_t count = std::min<size_t>(job.users ? kChunksBeside : kCopyChunks, job.chunks.size() - job.next_chunk);
  if (job.max_blocks != 0) {
    const uint64_t left = job.max_blocks - job.report.moved_blocks;
    count = std::min<uint64_t>(count, (left + kBlocksPerChunk - 1) / kBlocksPerChunk);
  }
  const auto first = job.chunks.begin() + static_cast<ptrdiff_t>(job.next_chunk);
  copying_.assign(first, first + static_cast<ptrdiff_t>(count));
  job.stage = Compact::Stage::kGrace;
  job.grace = epoch_;
  bump_epoch();  // goes on at once if nobody is there
}

void VolumeImpl::compact_grace() {
  if (leave_epoch(compact_->grace)) compact_post(Compact::Stage::kPlan);
}

// Nobody else changes these chunks until they are unmarked. Where their blocks are and where they go.
void VolumeImpl::compact_plan() {
  Compact& job = *compact_;
  if (job.stop || state_ == State::kAborted) {
    compact_unmark();
    job.stage = Compact::Stage::kLook;
    return compact_look();
  }
  job.epoch = epoch_;
  epoch_counts_[epoch_ % kGraceRing]++;
  job.copies.clear();
  job.pieces.clear();
  job.next_piece = 0;
  Need need = Need::kNothing;
  size_t planned = 0;
  while (planned < copying_.size()) {
    need = compact_plan_chunk(copying_[planned]);
    if (need != Need::kNothing) break;
    planned++;
  }
  copying_.resize(planned);
  if (planned > 0) job.lacking_since_ns = 0;
  if (job.copies.empty()) {
    job.next_chunk += planned;
    compact_leave_epoch();
    return need != Need::kNothing && planned == 0 ? compact_lacks(need) : compact_unmarked();
  }
  job.stage = Compact::Stage::kRead;
  compact_submit();
}

VolumeImpl::Need VolumeImpl::compact_plan_chunk(uint32_t chunk) {
  Compact& job = *compact_;
  uint16_t masks[kBlocksPerChunk];
  Place places[kBlocksPerChunk];
  uint32_t depth = 0;
  uint16_t blocks = 0;
  uint16_t zeros = 0;
  const LayerView above = view(top(), chunk);
  auto open = static_cast<uint16_t>(~(above.data | above.zero));
  for (size_t i = layers_.size() - 1; i-- > 0 && open != 0;) {
    const LayerView found = view(layers_[i], chunk);
    const auto mine = static_cast<uint16_t>(open & found.data);
    if (job.from[i]) zeros = static_cast<uint16_t>(zeros | (open & found.zero));
    open = static_cast<uint16_t>(open & ~(found.data | found.zero));
    if (mine == 0 || !job.from[i]) continue;
    masks[depth] = mine;
    places[depth++] = found.place;
    blocks = static_cast<uint16_t>(blocks | mine);
  }
  if ((blocks | zeros) == 0) return Need::kNothing;  // written or discarded meanwhile
  Place place = above.place;
  if (place == kNoPlace) {
    const bool waited_for = slab_waiters_ != nullptr;
    const bool whole = blocks == 0 && older_data(chunk) == 0;
    if (waited_for && !(whole && top_slabs_ > 0)) return Need::kSlab;
    const Need need = blocks == 0 ? cover_with_zeros(chunk, zeros, whole) : place_for(chunk, &place);
    if (need != Need::kNothing) return need;
  } else if (blocks == 0) {
    HotSlab* image = ensure_hot(place >> 8);
    if (image == nullptr) return Need::kSlot;
    const SlabEntry entry = slabs_.entry(place >> 8, place & 0xff);
    set_entry(place >> 8, place & 0xff, {chunk, entry.data, static_cast<uint16_t>(entry.zero | zeros)});
    mark_dirty(*image);
  }
  if (blocks == 0) {  // no data to copy: done
    modified_++;
    job.report.moved_blocks += static_cast<uint64_t>(__builtin_popcount(zeros));
    return Need::kNothing;
  }
  const uint32_t slab = place >> 8;
  HotSlab* image = ensure_hot(slab);
  if (image == nullptr) return Need::kSlot;
  image->pins++;
  const SlabEntry entry = slabs_.entry(slab, place & 0xff);
  HF_ASSERT(entry.logical_chunk == chunk && ((entry.data | entry.zero) & (blocks | zeros)) == 0);
  if ((entry.data | entry.zero) == 0) touch_limbo(slab, place & 0xff);
  const auto at = static_cast<uint32_t>(job.copies.size() * kChunkSize);
  for (uint32_t i = 0; i < depth; i++) compact_piece(places[i], masks[i], at);
  job.copies.push_back({chunk, blocks, zeros, place});
  return Need::kNothing;
}

// The blocks in rows; such as go on where the last one ended are one with it.
void VolumeImpl::compact_piece(Place place, uint16_t blocks, uint32_t at) {
  Compact& job = *compact_;
  const uint32_t most = job.users ? kPieceBeside : kPiece;
  for (uint32_t first = 0; first < kBlocksPerChunk;) {
    if ((blocks >> first & 1) == 0) {
      first++;
      continue;
    }
    uint32_t end = first + 1;
    while (end < kBlocksPerChunk && (blocks >> end & 1) != 0) end++;
    const Compact::Piece piece = {data_offset(place >> 8, place & 0xff) + uint64_t{first} * kBlockSize,
                                  at + first * kBlockSize, (end - first) * kBlockSize, place >> 8};
    first = end;
    if (!job.pieces.empty()) {
      Compact::Piece& last = job.pieces.back();
      if (last.slab == piece.slab && last.disk + last.length == piece.disk && last.at + last.length == piece.at &&
          last.length + piece.length <= most) {
        last.length += piece.length;
        continue;
      }
    }
    job.pieces.push_back(piece);
  }
}

// ---- the copy

void VolumeImpl::compact_submit() {
  Compact& job = *compact_;
  for (PageIo& io : job.io) {
    if (job.next_piece == job.pieces.size() || job.outstanding == job.depth || job.error != 0) return;
    if (io.tag != kNoIndex) continue;
    const Compact::Piece& piece = job.pieces[job.next_piece];
    io.tag = static_cast<uint32_t>(job.next_piece++);
    io.iov = {job.buffer->data() + piece.at, piece.length};
    io.io.op = job.stage == Compact::Stage::kRead ? IoOp::kRead : IoOp::kWrite;
    io.io.fua = false;
    io.io.offset = piece.disk;
    io.io.length = piece.length;
    io.io.iov = &io.iov;
    io.io.iov_count = 1;
    io.io.user = &io;
    io.io.done = [](IoRequest* request, int error) {
      auto* one = static_cast<PageIo*>(request->user);
      one->tag = kNoIndex;
      one->volume->compact_io_done(error);
    };
    job.outstanding++;
    device_.submit(&io.io);
  }
}

void VolumeImpl::compact_io_done(int error) {
  std::unique_lock lock(mu_);
  Compact& job = *compact_;
  job.outstanding--;
  if (state_ == State::kAborted) error = EIO;
  if (error != 0) job.error = error;
  compact_submit();
  if (job.outstanding == 0) {
    if (job.stage == Compact::Stage::kRead && job.error == 0) {
      job.stage = Compact::Stage::kWrite;
      job.pieces.clear();
      job.next_piece = 0;
      for (size_t i = 0; i < job.copies.size(); i++) {
        compact_piece(job.copies[i].place, job.copies[i].blocks, static_cast<uint32_t>(i * kChunkSize));
      }
      compact_submit();
    } else {
      compact_apply();
    }
  }
  unlock(lock);
}

void VolumeImpl::compact_apply() {
  Compact& job = *compact_;
  const bool good = job.error == 0;
  for (const Compact::Copy& copy : job.copies) {
    const uint32_t slab = copy.place >> 8;
    const uint32_t index = copy.place & 0xff;
    const SlabEntry entry = slabs_.entry(slab, index);
    // What the marks are for.
    HF_ASSERT(entry.logical_chunk == copy.chunk && ((entry.data | entry.zero) & (copy.blocks | copy.zeros)) == 0);
    const uint32_t at = slabs_[slab].hot;
    HF_ASSERT(at != kNoIndex && hot(at).pins > 0);
    if (good) {
      set_entry(slab, index,
                {copy.chunk, static_cast<uint16_t>(entry.data | copy.blocks), static_cast<uint16_t>(entry.zero | copy.zeros)});
      job.report.moved_blocks += static_cast<uint64_t>(__builtin_popcount(copy.blocks | copy.zeros));
    }
    mark_dirty(hot(at));  // chunks taken in vain become free by way of the next flush
    hot(at).pins--;
  }
  if (good) modified_++;
  job.next_chunk += copying_.size();
  compact_leave_epoch();
  if (good) return compact_unmarked();
  compact_unmark();
  if (state_ == State::kAborted) return compact_end(stopped_status("it was stopped while it was being compacted"));
  compact_end({Code::kIo, "volume " + std::to_string(spec_.volume_id) +
                              " is not compacted: blocks of its older layers can't be copied (errno " +
                              std::to_string(job.error) +
                              "). They stay where they are. Check the pool's device; it is tried again later"});
}

void VolumeImpl::compact_leave_epoch() {
  uint32_t& count = epoch_counts_[compact_->epoch % kGraceRing];
  HF_ASSERT(count > 0);
  if (--count == 0 && oldest_epoch_ != epoch_) advance_grace();
}

// ---- between batches

void VolumeImpl::compact_unmark() {
  copying_.clear();
  if (copy_waiters_ != nullptr) wake(copy_waiters_, copy_waiters_tail_);
}

// A batch is over: rests as long as it took if anybody is there.
void VolumeImpl::compact_unmarked() {
  Compact& job = *compact_;
  compact_unmark();
  // Somebody's flush should not have to write all the pages of a long compaction.
  if (dirty_.size() > kFlushPagesMax) want_flush();
  if (!job.users && active_ == 0 && request_count() == job.requests) return compact_post(Compact::Stage::kLook);
  compact_rest(std::min(job.home->now_ns() - job.begun_ns, kLongestRestNs));
}

void VolumeImpl::compact_lacks(Need need) {
  Compact& job = *compact_;
  compact_unmark();
  const uint64_t now = job.home->now_ns();
  if (job.lacking_since_ns == 0) job.lacking_since_ns = now;
  const bool slab = need == Need::kSlab;
  if (now - job.lacking_since_ns >= kPatienceNs || (slab && environment_.stock->known_full())) {
    if (slab) job.report.no_space = true;
    job.stop = true;
    return compact_post(Compact::Stage::kLook);
  }
  if (!slab) {
    want_flush();
  } else if (slab_waiters_ == nullptr) {
    settle_for_space();
    if (claiming_ == 0) start_claims();
  }
  compact_rest(kLackRestNs);
}

void VolumeImpl::compact_rest(uint64_t ns) {
  if (compact_->stop) return compact_post(Compact::Stage::kLook);
  compact_->stage = Compact::Stage::kRest;
  post_timer(compact_->home, ns, ++compact_rests_, &VolumeImpl::compact_rested);
}

void VolumeImpl::compact_rested(uint64_t number) {
  std::unique_lock lock(mu_);
  if (number == compact_rests_ && compact_ != nullptr && compact_->stage == Compact::Stage::kRest) {
    compact_->stage = Compact::Stage::kLook;
    compact_look();
  }
  unlock(lock);
}

// ---- the end

void VolumeImpl::compact_stop() {
  Compact& job = *compact_;
  job.stop = true;
  if (job.stage == Compact::Stage::kGrace) {
    compact_unmark();
    compact_post(Compact::Stage::kLook);
  } else if (job.stage == Compact::Stage::kRest) {
    compact_rests_++;
    compact_post(Compact::Stage::kLook);
  }
}

void VolumeImpl::compact_moved() {
  Compact& job = *compact_;
  job.stage = Compact::Stage::kFlush;
  job.report.complete =
      job.source == job.sources.size() && job.next_chunk == job.chunks.size() && !job.report.no_space;
  hold_moved();
  job.flush.home = job.home;
  job.flush.user = this;
  job.flush.done = [](FlushWaiter* waiter, int error) {
    static_cast<VolumeImpl*>(waiter->user)->compact_flushed(error);
  };
  request_flush(&job.flush);
}

void VolumeImpl::compact_flushed(int error) {
  std::unique_lock lock(mu_);
  Status status;
  if (state_ == State::kAborted) {
    status = stopped_status("it was stopped while it was being compacted");
  } else if (error != 0) {
    status = {Code::kIo, "volume " + std::to_string(spec_.volume_id) +
                             ": blocks of its older layers were copied, but that can't be made durable yet. Check the "
                             "pool's device; it is tried again later"};
  }
  compact_end(std::move(status));
  unlock(lock);
}

void VolumeImpl::compact_end(Status status) {
  HF_ASSERT(copying_.empty() && compact_->outstanding == 0);
  const auto job = std::shared_ptr<Compact>(std::move(compact_));
  hold_moved();
  post_done(
      job->home,
      [job](Status result) {
        if (result.ok()) job->done(job->report);
        else job->done(std::move(result));
      },
      std::move(status));
  end_background();
}

}  // namespace holdfast
