// Opening a volume: the grant is checked, what is stale or damaged refused, and the claim to the volume written durably
// before anything else. The slab pages come after that: volume_load.cc.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "volume_opener.h"

namespace holdfast {

using format::kPageSize;
using format::LayerRecord;
using format::LayerState;
using format::VolumeRecord;
using format::VolumeState;

// ---- ends

// Later, on the executor, so that `opened` never runs inside open().
void VolumeOpener::end(Status status) {
  HF_ASSERT(outstanding_ == 0);
  result_ = std::move(status);
  task_.opener = this;
  task_.run = [](Task* task) {
    std::unique_ptr<VolumeOpener> self(static_cast<EndTask*>(task)->opener);
    // Slots and events that came up while opening are told first.
    if (self->volume_ != nullptr) {
      std::unique_lock lock(self->volume_->mu_);
      self->volume_->unlock(lock);
    }
    if (self->result_.ok()) {
      self->opened_(Result<std::unique_ptr<Volume>>(std::unique_ptr<Volume>(std::move(self->volume_))));
    } else {
      self->opened_(Result<std::unique_ptr<Volume>>(std::move(self->result_)));
    }
  };
  home_->post(&task_);
}

// ---- the grant

std::string VolumeOpener::bad_spec() const {
  if (spec_.volume_id == 0 || spec_.layers.empty()) return "the grant names no usable chain of layers";
  if (spec_.layers.size() > kMaxLayers) {
    return "its chain has " + std::to_string(spec_.layers.size()) + " layers, more than the " +
           std::to_string(kMaxLayers) + " that can be opened; delete snapshots";
  }
  if (spec_.size_bytes == 0 || spec_.size_bytes % format::kBlockSize != 0 ||
      spec_.size_bytes > format::kMaxVolumeBytes) {
    return "its size of " + std::to_string(spec_.size_bytes) + " bytes is outside what the format allows";
  }
  if (spec_.slot >= superblock_.volume_slots) return "its record slot lies outside the pool's table";
  for (const LayerSpec& layer : spec_.layers) {
    if (layer.layer_id == 0) return "the grant has a layer without an id";
    if (&layer != &spec_.layers[0] && layer.birth >= (&layer - 1)->birth) {
      return "the grant has layer " + std::to_string(layer.layer_id) + " below layer " +
             std::to_string((&layer - 1)->layer_id) + ", which is not newer";
    }
    for (const SlabRun& run : layer.slabs) {
      if (run.count == 0 || run.first + run.count > superblock_.slab_count) {
        return "the grant has slabs outside the pool (" + std::to_string(run.first) + " and on)";
      }
    }
  }
  if (spec_.read_only) return {};
  if (spec_.layers[0].frozen) return "its top layer is frozen, it can only be opened read-only";
  if (spec_.layers[0].slot >= superblock_.layer_slots) return "its layer's record slot lies outside the pool's table";
  const PageArena* arena = environment_.arena;
  if (arena == nullptr || environment_.stock == nullptr) return "no page arena or no slab stock was given";
  if (arena->volume_id() != spec_.volume_id || arena->epoch() != spec_.epoch) {
    return "the page images given are of volume " + std::to_string(arena->volume_id()) + ", epoch " +
           std::to_string(arena->epoch()) + "; the grant is of epoch " + std::to_string(spec_.epoch);
  }
  if (!taking_over_ && (arena->claim_count() > 0 || !arena->images().empty())) {
    return "page images of an earlier engine are there, but it is not taken over from";
  }
  return {};
}

void VolumeOpener::begin() {
  if (std::string why = bad_spec(); !why.empty()) return refuse(Code::kInvalidArgument, std::move(why));
  volume_ = std::make_unique<VolumeImpl>(environment_, spec_);
  volume_->record_page_ = std::make_unique<PageBuffer>(kPageSize);
  volume_->scratch_page_ = std::make_unique<PageBuffer>(kPageSize);
  for (auto layer = spec_.layers.rbegin(); layer != spec_.layers.rend(); ++layer) {
    volume_->layers_.emplace_back();
    volume_->layers_.back().id = layer->layer_id;
  }
  read_pair(superblock_.volume_table_offset + uint64_t{spec_.slot} * 2 * kPageSize, &VolumeOpener::record_read);
}

// ---- one I/O at a time: records

void VolumeOpener::submit(IoOp op, uint64_t offset, uint32_t pages, size_t at, void (VolumeOpener::*then)(int)) {
  then_ = then;
  iov_ = {pages_.data() + at, size_t{pages} * kPageSize};
  io_.op = op;
  io_.fua = op == IoOp::kWrite;
  io_.offset = op == IoOp::kFlush ? 0 : offset;
  io_.length = op == IoOp::kFlush ? 0 : iov_.iov_len;
  io_.iov = op == IoOp::kFlush ? nullptr : &iov_;
  io_.iov_count = op == IoOp::kFlush ? 0 : 1;
  io_.user = this;
  io_.done = [](IoRequest* request, int error) {
    auto* self = static_cast<VolumeOpener*>(request->user);
    self->outstanding_--;
    (self->*self->then_)(error);
  };
  outstanding_++;
  environment_.device->submit(&io_);
}

std::string VolumeOpener::errno_text(int error) const {
  return "(errno " + std::to_string(error) + ": " + std::strerror(error) + ")";
}

// What was read may be in the device's cache only, left by a writer that died or got an error. It must be durable
// before the other copy is written over.
void VolumeOpener::record_read(int error) {
  if (error != 0)
    return refuse(Code::kIo, "its record can't be read " + errno_text(error) + "; check the pool's device");
  if (spec_.read_only) return have_record();
  submit(IoOp::kFlush, 0, 0, 0, &VolumeOpener::record_settled);
}

void VolumeOpener::record_settled(int error) {
  if (error != 0) {
    return refuse(Code::kIo, "the cache of the pool's device can't be flushed " + errno_text(error) +
                                 "; check the device and its paths");
  }
  have_record();
}

void VolumeOpener::have_record() {
  const uint64_t address = superblock_.volume_table_offset + uint64_t{spec_.slot} * 2 * kPageSize;
  const auto& a = pages_.at<VolumeRecord>(0);
  const auto& b = pages_.at<VolumeRecord>(kPageSize);
  const Copies copies = choose_record(a, b, environment_.pool, address);
  if (copies.bad()) {
    return refuse(Code::kCorrupt, std::string("both copies of its record are damaged: copy A ") +
                                      page_state_text(copies.state[0]) + ", copy B " +
                                      page_state_text(copies.state[1]) +
                                      "; which epoch it is at can't be known. Run `holdfast pool check`");
  }
  if (copies.degraded()) {
    const int damaged = 1 - copies.newest;
    tell(Code::kCorrupt, std::string("copy ") + "AB"[damaged] + " of its record (byte " +
                             std::to_string(address + uint64_t(damaged) * kPageSize) + " of the pool) " +
                             page_state_text(copies.state[damaged]) + "; the other copy serves");
  }
  if (copies.state[0] == PageState::kBadCrc || copies.state[1] == PageState::kBadCrc) {
    torn_record_ = address + (copies.state[0] == PageState::kBadCrc ? 0 : kPageSize);
  }
  bool fresh = true;
  VolumeRecord& record = volume_->record_;
  if (copies.valid()) {
    record = copies.newest == 0 ? a : b;
    volume_->record_newest_ = copies.newest;
    fresh = record.volume_id == 0 || record.state == VolumeState::kFree ||
            (record.volume_id != spec_.volume_id && record.state == VolumeState::kDeleted);
  } else {
    volume_->record_newest_ = 1;
  }
  if (spec_.read_only) {
    if (!fresh && record.volume_id == spec_.volume_id && record.epoch > spec_.epoch) {
      return refuse(Code::kStale, "its record is of epoch " + std::to_string(record.epoch) +
                                      ", newer than the grant's " + std::to_string(spec_.epoch));
    }
    // A frozen layer shows the same whatever the record says; one that might be written must still be the top.
    if (!fresh && record.volume_id == spec_.volume_id && record.top_layer_id != spec_.layers[0].layer_id &&
        !spec_.layers[0].frozen) {
      return refuse_top();
    }
    return plan_reads();
  }
  if (fresh) return first_open();
  if (record.volume_id != spec_.volume_id) {
    return refuse(Code::kStale, "its record slot belongs to volume " + std::to_string(record.volume_id) +
                                    "; the grant is out of date");
  }
  if (record.state == VolumeState::kDeleted) return refuse(Code::kNotFound, "it has been deleted");
  if (record.fenced != 0) {
    return refuse(Code::kFenced, "it is fenced, and a fenced volume is never reopened by itself");
  }
  const bool same_holder =
      record.epoch == spec_.epoch && record.host_id == spec_.host_id && record.generation == spec_.generation;
  if (record.epoch > spec_.epoch || (record.epoch == spec_.epoch && !(taking_over_ && same_holder))) {
    return refuse(Code::kStale, "its record is of epoch " + std::to_string(record.epoch) + " (host " +
                                    std::to_string(record.host_id) + ", generation " +
                                    std::to_string(record.generation) + "), the grant of epoch " +
                                    std::to_string(spec_.epoch) + "; ask for a new grant");
  }
  if (record.top_layer_id != spec_.layers[0].layer_id) return refuse_top();
  // Volumes never shrink: a growth that is durable counts, whoever knows of it.
  volume_->size_bytes_ = std::max(record.size_bytes, spec_.size_bytes);
  write_record();
}

// Whoever opens believes the disk: a cut may have happened that the grant does not know of.
void VolumeOpener::refuse_top() {
  refuse(Code::kStale, "its record names layer " + std::to_string(volume_->record_.top_layer_id) +
                           " as the top, the grant layer " + std::to_string(spec_.layers[0].layer_id) +
                           "; the metadata service must read the record first");
}

// A slot never used, or whose former volume is gone: the layer's record first, then the whole volume record.
void VolumeOpener::first_open() {
  const uint64_t sequence = volume_->record_.header.sequence;
  volume_->record_ = VolumeRecord{};
  VolumeRecord& record = volume_->record_;
  record.header.sequence = sequence;
  record.volume_id = spec_.volume_id;
  record.logical_sector_size = format::kBlockSize;
  record.top_layer_id = spec_.layers[0].layer_id;
  record.uuid = spec_.uuid;
  if (!set_field(record.name, spec_.name) || spec_.parameters_json.size() > sizeof record.parameters) {
    return refuse(Code::kInvalidArgument, "its name or its parameters do not fit its record (at most " +
                                              std::to_string(sizeof record.name) + " and " +
                                              std::to_string(sizeof record.parameters) + " bytes)");
  }
  std::memcpy(record.parameters, spec_.parameters_json.data(), spec_.parameters_json.size());
  record.parameters_length = static_cast<uint32_t>(spec_.parameters_json.size());
  volume_->size_bytes_ = spec_.size_bytes;
  read_pair(layer_address(), &VolumeOpener::have_layer);
}

uint64_t VolumeOpener::layer_address() const {
  return superblock_.layer_table_offset + uint64_t{spec_.layers[0].slot} * 2 * kPageSize;
}

void VolumeOpener::have_layer(int error) {
  if (error != 0) return refuse(Code::kIo, "its layer's record can't be read " + errno_text(error));
  const auto& a = pages_.at<LayerRecord>(0);
  const auto& b = pages_.at<LayerRecord>(kPageSize);
  const Copies copies = choose_record(a, b, environment_.pool, layer_address());
  if (copies.bad()) {
    return refuse(Code::kCorrupt, "both copies of its layer's record are damaged. Run `holdfast pool check`");
  }
  const LayerSpec& top = spec_.layers[0];
  uint64_t sequence = 0;
  if (copies.valid()) {
    const LayerRecord& found = copies.newest == 0 ? a : b;
    sequence = found.header.sequence;
    if (found.layer_id != 0 && found.layer_id != top.layer_id && found.state != LayerState::kFree &&
        found.state != LayerState::kDeleted) {
      return refuse(Code::kStale, "the record slot of its layer belongs to layer " + std::to_string(found.layer_id));
    }
  }
  layer_copy_ = static_cast<uint32_t>(copies.next());
  if (copies.state[layer_copy_] == PageState::kBadCrc && !std::exchange(layer_blotted_, true)) {
    blot(pages_.data(), format::kMagicLayer);
    return submit(IoOp::kWrite, layer_address() + uint64_t{layer_copy_} * kPageSize, 1, 0, &VolumeOpener::layer_blotted);
  }
  LayerRecord record{};
  record.layer_id = top.layer_id;
  record.parent_layer_id = top.parent_layer_id;
  record.volume_id = spec_.volume_id;
  record.size_bytes = spec_.size_bytes;
  record.birth = top.birth;
  record.state = LayerState::kWritable;
  for (uint32_t copy = 0; copy < 2; copy++) {
    auto& page = pages_.at<LayerRecord>(size_t{copy} * kPageSize);
    page = record;
    seal(page, environment_.pool, layer_address() + uint64_t{copy} * kPageSize, sequence + 1);
  }
  write_layer(&VolumeOpener::layer_half_written);
}

void VolumeOpener::layer_blotted(int error) {
  if (error != 0) return refuse(Code::kIo, "a torn copy of its layer's record can't be written over " + errno_text(error));
  read_pair(layer_address(), &VolumeOpener::have_layer);
}

void VolumeOpener::write_layer(void (VolumeOpener::*then)(int)) {
  submit(IoOp::kWrite, layer_address() + uint64_t{layer_copy_} * kPageSize, 1, size_t{layer_copy_} * kPageSize, then);
}

void VolumeOpener::layer_half_written(int error) {
  if (error != 0) return refuse(Code::kIo, "its layer's record can't be written " + errno_text(error));
  layer_copy_ = 1 - layer_copy_;
  write_layer(&VolumeOpener::layer_written);
}

void VolumeOpener::layer_written(int error) {
  if (error != 0) return refuse(Code::kIo, "its layer's record can't be written " + errno_text(error));
  write_record();
}

// Made whole by the next write to it (pages.h), a torn copy might be the record of a volume that never came to be, and has been deleted.
void VolumeOpener::blot_record(int error) {
  if (error != 0) {
    return refuse(Code::kIo, "a torn copy of its record can't be written over " + errno_text(error) + "; check the pool's device");
  }
  write_record();
}

// {epoch, host, generation, open} durable before anything else is read as ours or written.
void VolumeOpener::write_record() {
  if (const uint64_t torn = std::exchange(torn_record_, 0); torn != 0) {
    blot(pages_.data(), format::kMagicVolume);
    return submit(IoOp::kWrite, torn, 1, 0, &VolumeOpener::blot_record);
  }
  VolumeRecord& record = volume_->record_;
  record.header.flags = 0;
  record.state = VolumeState::kOpen;
  record.size_bytes = volume_->size_bytes_;
  record.epoch = spec_.epoch;
  record.host_id = spec_.host_id;
  record.generation = spec_.generation;
  volume_->flush_number_ = record.flush_number;
  if (volume_->record_newest_ != 0 && volume_->record_newest_ != 1) volume_->record_newest_ = 0;
  std::unique_lock lock(volume_->mu_);
  volume_->control_.kind = VolumeImpl::Control::Kind::kGrow;  // nobody else's
  volume_->opener_ = this;
  volume_->write_record([](VolumeImpl* self, int error) {
    self->control_ = VolumeImpl::Control{};
    self->opener_->record_error_ = error;
    self->opener_->post_step(&VolumeOpener::record_written);
  });
  lock.unlock();
}

// The volume's own callbacks run under its lock: go on outside.
void VolumeOpener::post_step(void (VolumeOpener::*step)()) {
  step_ = step;
  step_task_.opener = this;
  step_task_.run = [](Task* task) {
    VolumeOpener* self = static_cast<EndTask*>(task)->opener;
    (self->*self->step_)();
  };
  home_->post(&step_task_);
}

void VolumeOpener::record_written() {
  if (record_error_ != 0) {
    return refuse(Code::kIo, "its record can't be written " + errno_text(record_error_) + "; check the pool's device");
  }
  plan_reads();
}

void Volume::open(const VolumeEnvironment& environment, const VolumeSpec& spec, bool taking_over, Opened opened) {
  VolumeOpener::start(environment, spec, taking_over, std::move(opened));
}

}  // namespace holdfast
