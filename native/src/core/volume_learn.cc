// Learning what others have copied into a frozen layer of the chain (layer_merge.h): its pages are read again, and what they say more than
// is known goes into the map. Requests go on: a block has the same bytes at its old place and at its new one.
//
// Why the whole volume may not be cut or closed meanwhile: what is being read is by index of the layer.
#include <algorithm>

#include "volume_impl.h"

namespace holdfast {

using format::kChunksPerSlab;
using format::kNoChunk;
using format::SlabEntry;
using format::SlabPage;

namespace {
constexpr size_t kPairsAtOnce = 32;  // pages whose entries are compared under one hold of the lock
}

void VolumeImpl::learn(const LayerSlabs& given, Done done) {
  std::unique_lock lock(mu_);
  Executor* home = Executor::current();
  HF_ASSERT(home != nullptr);
  const std::string name = "volume " + std::to_string(spec_.volume_id);
  const auto layer = std::find_if(layers_.begin(), layers_.end(), [&](const Layer& one) { return one.id == given.layer_id; });
  Status refusal;
  bool over = false;
  if (state_ != State::kOpen) {
    refusal = {Code::kUnavailable, name + " is not open"};
  } else if (control_.kind != Control::Kind::kNone) {
    refusal = {Code::kBusy, name + " is being grown, cut or closed, or its writes are held; try again when that is done"};
  } else if (!read_only_ && top().id == given.layer_id) {
    refusal = {Code::kInvalidArgument, name + " has nothing to learn of layer " + std::to_string(given.layer_id) + ": it writes it"};
  } else {
    over = layer == layers_.end() || given.slabs.empty();
  }
  if (over || !refusal.ok()) {
    post_done(home, std::move(done), std::move(refusal));
    return unlock(lock);
  }
  learn_ = std::make_unique<Learn>();
  learn_->layer = static_cast<size_t>(layer - layers_.begin());
  for (const SlabRun& run : given.slabs) {
    for (uint64_t i = 0; i < run.count; i++) learn_->slabs.push_back({run.first + i, run.generation});
  }
  for (uint32_t i = 0; i < slabs_.size(); i++) {
    if (slabs_[i].state != SlabState::kVacant && slabs_[i].layer == learn_->layer) learn_->known[slabs_[i].number] = i;
  }
  learn_->pages = std::make_unique<PageBuffer>(kPairsAtOnce * format::kSlabPairSize);
  learn_->io.volume = this;
  control_.kind = Control::Kind::kLearn;
  control_.home = home;
  control_.done = std::move(done);
  learn_read();
  unlock(lock);
}

// As many as lie side by side.
void VolumeImpl::learn_read() {
  Learn& job = *learn_;
  const auto follows = [&](size_t count) {
    const uint64_t number = job.slabs[job.next].number + count;
    return job.next + count < job.slabs.size() && job.slabs[job.next + count].number == number &&
           number % format::kSlabsPerRegion != 0;
  };
  job.reading = 1;
  while (job.reading < kPairsAtOnce && follows(job.reading)) job.reading++;
  PageIo& io = job.io;
  io.iov = {job.pages->data(), job.reading * format::kSlabPairSize};
  io.io.op = IoOp::kRead;
  io.io.offset = page_offset(job.slabs[job.next].number, 0);
  io.io.length = io.iov.iov_len;
  io.io.iov = &io.iov;
  io.io.iov_count = 1;
  io.io.user = this;
  io.io.done = [](IoRequest* request, int error) { static_cast<VolumeImpl*>(request->user)->learn_have(error); };
  start_background();
  device_.submit(&io.io);
}

void VolumeImpl::learn_have(int error) {
  std::unique_lock lock(mu_);
  Learn& job = *learn_;
  Status status;
  if (state_ == State::kAborted) {
    status = stopped_status("it was stopped while it read pages again");
  } else if (error != 0) {
    status = {Code::kIo, "volume " + std::to_string(spec_.volume_id) + ": pages of frozen layer " +
                             std::to_string(layers_[job.layer].id) + " can't be read. Check the pool's device and try again"};
  }
  for (size_t i = 0; i < job.reading && status.ok(); i++) {
    const size_t at = i * format::kSlabPairSize;
    status = learn_pair(job.slabs[job.next + i], job.pages->at<SlabPage>(at), job.pages->at<SlabPage>(at + format::kPageSize));
  }
  job.next += job.reading;
  if (status.ok() && job.next < job.slabs.size()) {
    learn_read();
  } else {
    learn_.reset();
    control_end(std::move(status));
  }
  end_background();
  unlock(lock);
}

Status VolumeImpl::learn_pair(const Learn::One& one, const SlabPage& a, const SlabPage& b) {
  const Copies copies = choose_slab(a, b, environment_.pool, page_offset(one.number, 0));
  Layer& layer = layers_[learn_->layer];
  if (copies.bad()) {
    return {Code::kCorrupt, "both copies of the page of slab " + std::to_string(one.number) + " of layer " +
                                std::to_string(layer.id) + " are damaged. Run `holdfast pool check`"};
  }
  if (!copies.valid()) return {};
  const SlabPage& page = copies.newest == 0 ? a : b;
  if (page.layer_id != layer.id || page.generation != one.generation) return {};  // not in use, or handed on
  const auto known = learn_->known.find(one.number);
  const bool fresh = known == learn_->known.end();
  uint32_t index = fresh ? kNoIndex : known->second;
  if (Status status = learn_refusal(one, page, index); !status.ok()) return status;
  if (fresh) {
    index = slabs_.add();
    slabs_[index].number = one.number;
    slabs_[index].generation = one.generation;
    slabs_[index].layer = static_cast<uint16_t>(learn_->layer);
    learn_->known[one.number] = index;
  }
  Slab& slab = slabs_[index];
  slab.newest = static_cast<uint8_t>(copies.newest) & 1;
  slab.sequence = page.header.sequence;
  slab.unequal = !copies.equal;
  for (uint32_t c = 0; c < kChunksPerSlab; c++) {
    const SlabEntry& entry = page.entries[c];
    if (entry.logical_chunk == kNoChunk) continue;
    const SlabEntry before = slabs_.entry(index, c);
    data_chunks_ += entry.data != 0 && before.data == 0;
    if (before.data != entry.data || before.zero != entry.zero) chain_.forget(entry.logical_chunk);
    if (before.logical_chunk == kNoChunk) layer.map.set(entry.logical_chunk, index << 8 | c);
  }
  slabs_.load(index, page.entries);
  if (page.hole_count == 0) return {};
  slab.holes = 1;
  slab_holes_[index].assign(page.holes, page.holes + page.hole_count);
  for (uint32_t i = 0; i < page.hole_count; i++) {
    const format::HoleRange& hole = page.holes[i];
    layer.holes.add(hole.start, uint64_t{hole.start} + hole.length);
  }
  chain_.clear();  // a range may be long
  return {};
}

// A frozen layer only gains; and a chunk has one place in it.
Status VolumeImpl::learn_refusal(const Learn::One& one, const SlabPage& page, uint32_t index) const {
  const LayerMap& map = layers_[learn_->layer].map;
  bool good = page.hole_count <= format::kHolesPerSlab && (index != kNoIndex || slabs_.size() < kMaxSlabIndex);
  for (uint32_t c = 0; c < kChunksPerSlab && good; c++) {
    const SlabEntry& entry = page.entries[c];
    const SlabEntry before = index == kNoIndex ? kFreeEntry : slabs_.entry(index, c);
    good = (entry.data & entry.zero) == 0;
    if (before.logical_chunk != kNoChunk) {
      good = good && entry.logical_chunk == before.logical_chunk && (before.data & ~entry.data) == 0 &&
             (before.zero & ~entry.zero) == 0;
    } else if (entry.logical_chunk != kNoChunk) {
      good = good && entry.logical_chunk < map.chunks() && map.find(entry.logical_chunk) == kNoPlace;
    } else {
      good = good && (entry.data | entry.zero) == 0;
    }
  }
  if (good) return {};
  return {Code::kCorrupt, "the page of slab " + std::to_string(one.number) + " of frozen layer " +
                              std::to_string(layers_[learn_->layer].id) +
                              " says less than it did, or what can't be. Run `holdfast pool check`"};
}

}  // namespace holdfast
