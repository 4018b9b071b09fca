// Opening a volume, as an object that lives while it lasts: volume_open.cc has the grant and the records,
// volume_load.cc the slab pages and the arena's images.
#pragma once

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "volume_impl.h"

namespace holdfast {

class VolumeOpener {
 public:
  static void start(const VolumeEnvironment& environment, const VolumeSpec& spec, bool taking_over,
                    Volume::Opened opened) {
    auto* self = new VolumeOpener(environment, spec, taking_over, std::move(opened));
    self->begin();
  }

 private:
  static constexpr uint32_t kSlabsPerRead = 128;  // 1 MiB of pages
  static constexpr uint32_t kReads = 6;           // in flight
  static constexpr size_t kNamed = 4;             // how many bad slabs an error names

  struct Granted {
    uint64_t slab = 0;
    uint64_t generation = 0;
    uint32_t layer = 0;     // index in the grant, newest first: 0 is the top
    uint32_t claim = PageArena::kNone;
    bool claiming = false;  // the arena says: its claim may not be complete
    bool known = false;     // but the grant names it as well
  };
  struct Read {
    IoRequest io;
    iovec iov{};
    VolumeOpener* opener = nullptr;
    size_t first = 0;  // index in granted_
    size_t count = 0;
    std::unique_ptr<PageBuffer> buffer;
    bool busy = false;
  };
  // A chunk that another slab of the layer was found to map before this one.
  struct Twice {
    uint32_t layer;         // as in Granted
    uint32_t chunk;
    uint32_t slab;
  };

  VolumeOpener(const VolumeEnvironment& environment, const VolumeSpec& spec, bool taking_over, Volume::Opened opened)
      : environment_(environment),
        superblock_(*environment.superblock),
        spec_(spec),
        taking_over_(taking_over),
        spec_layers_(spec.layers.size()),
        opened_(std::move(opened)),
        home_(Executor::current()) {
    HF_ASSERT(home_ != nullptr);
    name_ = "volume " + std::to_string(spec.volume_id) + (spec.name.empty() ? "" : " (" + spec.name + ")");
  }

  // ---- ends
  void end(Status status);
  void refuse(Code code, std::string why) { end({code, name_ + " is not opened: " + std::move(why)}); }
  void tell(Code code, std::string message) { volume_->event(code, name_ + ": " + std::move(message)); }

  // ---- the grant
  std::string bad_spec() const;
  void begin();

  // ---- one I/O at a time: records
  void submit(IoOp op, uint64_t offset, uint32_t pages, size_t at, void (VolumeOpener::*then)(int));
  void read_pair(uint64_t offset, void (VolumeOpener::*then)(int)) { submit(IoOp::kRead, offset, 2, 0, then); }
  std::string errno_text(int error) const;
  void record_read(int error);
  void record_settled(int error);
  void have_record();
  void refuse_top();
  void first_open();
  uint64_t layer_address() const;
  void have_layer(int error);
  void layer_blotted(int error);
  void write_layer(void (VolumeOpener::*then)(int));
  void layer_half_written(int error);
  void layer_written(int error);
  void blot_record(int error);
  void write_record();
  void post_step(void (VolumeOpener::*step)());
  void record_written();

  // ---- slab pages
  void plan_reads();
  void read_more();
  void have_run(Read& read, int error);
  void fail(Code code, std::string why);
  void have_pair(const Granted& granted, const format::SlabPage& a, const format::SlabPage& b);
  VolumeImpl::Layer& layer_of(uint32_t granted) {
    return volume_->layers_[spec_layers_ - 1 - granted];
  }
  void keep_unclaimed(const Granted& granted);
  std::string nonsense(const format::SlabPage& page, bool image) const;
  void load(const Granted& granted, const format::SlabPage& disk, const Copies& copies, const format::SlabPage* older,
            const format::SlabPage* image, uint32_t slot);
  void adopt_image(uint32_t index, uint32_t slot);

  // ---- everything has been read
  void have_pages();
  void blot_torn(int error);
  void pages_settled();
  void first_flush_done(int error);
  void serve();
  std::string bad_slabs_text() const;
  bool settle_twice();
  uint32_t entry_of(uint32_t slab, uint32_t chunk) const;

  struct EndTask : Task {
    VolumeOpener* opener = nullptr;
  };

  const VolumeEnvironment environment_;
  const format::Superblock& superblock_;
  VolumeSpec spec_;
  const bool taking_over_;
  const size_t spec_layers_;
  Volume::Opened opened_;
  Executor* home_;
  std::string name_;
  std::unique_ptr<VolumeImpl> volume_;

  PageBuffer pages_{2 * format::kPageSize};
  IoRequest io_;
  iovec iov_{};
  void (VolumeOpener::*then_)(int) = nullptr;
  uint32_t outstanding_ = 0;
  uint64_t torn_record_ = 0;  // address of a copy of the volume's record that fails its checksum; 0: none
  bool layer_blotted_ = false;
  uint32_t layer_copy_ = 0;
  int record_error_ = 0;
  void (VolumeOpener::*step_)() = nullptr;
  EndTask step_task_;
  EndTask task_;

  std::vector<Granted> granted_;
  std::map<uint64_t, uint64_t> returned_;
  std::map<uint64_t, PageArena::Image> images_;
  Read reads_[kReads];
  size_t next_ = 0;
  std::vector<std::string> bad_slabs_;
  std::vector<Twice> twice_;
  std::vector<uint64_t> torn_;  // addresses of copies in the top layer that fail their checksum; the other one serves
  FlushWaiter first_flush_;
  Status failure_;
  Status result_;
};

}  // namespace holdfast
