// See spec_codec.h.
#include "io/spec_codec.h"

#include <cstring>

namespace holdfast {

namespace {

constexpr uint32_t kPoolTag = 0x31504648;    // "HFP1"
constexpr uint32_t kVolumeTag = 0x32564648;     // "HFV2": next_top at the end
constexpr uint32_t kVolumeTagOne = 0x31564648;  // "HFV1"
constexpr uint32_t kExportTag = 0x31454648;  // "HFE1"

class Writer {
 public:
  explicit Writer(uint32_t tag) { number(tag); }
  template <typename T>
  void number(T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void text(const std::string& value) {
    number(uint32_t(value.size()));
    bytes_ += value;
  }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  Reader(const std::string& bytes, uint32_t tag) : bytes_(bytes) {
    uint32_t found = 0;
    number(&found);
    if (found != tag) ok_ = false;
  }
  template <typename T>
  void number(T* value) {
    if (!ok_ || bytes_.size() - at_ < sizeof *value) {
      ok_ = false;
      return;
    }
    std::memcpy(value, bytes_.data() + at_, sizeof *value);
    at_ += sizeof *value;
  }
  void text(std::string* value) {
    uint32_t length = 0;
    number(&length);
    if (!ok_ || bytes_.size() - at_ < length) {
      ok_ = false;
      return;
    }
    value->assign(bytes_, at_, length);
    at_ += length;
  }
  // A count of things of at least `size` bytes each: never believed beyond what can be there.
  uint32_t count(size_t size) {
    uint32_t value = 0;
    number(&value);
    if (ok_ && value > (bytes_.size() - at_) / size) ok_ = false;
    return ok_ ? value : 0;
  }
  void boolean(bool* value) {
    uint8_t byte = 0;
    number(&byte);
    *value = byte != 0;
  }
  bool ok() const { return ok_; }

 private:
  const std::string& bytes_;
  size_t at_ = 0;
  bool ok_ = true;
};

void write_layer(Writer& out, const LayerSpec& layer) {
  out.number(layer.layer_id);
  out.number(layer.slot);
  out.number(layer.parent_layer_id);
  out.number(layer.birth);
  out.number(layer.size_bytes);
  out.number(uint8_t(layer.frozen));
  out.number(uint32_t(layer.slabs.size()));
  for (const SlabRun& run : layer.slabs) {
    out.number(run.first);
    out.number(run.count);
    out.number(run.generation);
  }
}

LayerSpec read_layer(Reader& in) {
  LayerSpec layer;
  in.number(&layer.layer_id);
  in.number(&layer.slot);
  in.number(&layer.parent_layer_id);
  in.number(&layer.birth);
  in.number(&layer.size_bytes);
  in.boolean(&layer.frozen);
  const uint32_t runs = in.count(20);
  layer.slabs.reserve(runs);
  for (uint32_t j = 0; j < runs && in.ok(); ++j) {
    SlabRun run;
    in.number(&run.first);
    in.number(&run.count);
    in.number(&run.generation);
    layer.slabs.push_back(run);
  }
  return layer;
}

Status garbled(const char* what) {
  return {Code::kCorrupt, std::string("the keeper's note of a ") + what +
                              " is not readable; it was written by another release: detach its devices by hand"};
}

}  // namespace

std::string encode(const PoolSpec& spec) {
  Writer out(kPoolTag);
  out.text(spec.device_path);
  out.number(spec.uuid);
  out.number(spec.host_id);
  out.number(spec.generation);
  out.text(spec.node_name);
  out.number(spec.machine_id);
  out.number(spec.boot_id);
  out.text(spec.lock_path);
  return out.take();
}

Result<PoolSpec> decode_pool(const std::string& bytes) {
  Reader in(bytes, kPoolTag);
  PoolSpec spec;
  in.text(&spec.device_path);
  in.number(&spec.uuid);
  in.number(&spec.host_id);
  in.number(&spec.generation);
  in.text(&spec.node_name);
  in.number(&spec.machine_id);
  in.number(&spec.boot_id);
  in.text(&spec.lock_path);
  if (!in.ok()) return garbled("pool");
  return spec;
}

std::string encode(const VolumeSpec& spec) {
  Writer out(kVolumeTag);
  out.number(spec.volume_id);
  out.number(spec.slot);
  out.number(spec.uuid);
  out.text(spec.name);
  out.number(spec.size_bytes);
  out.number(spec.epoch);
  out.number(spec.host_id);
  out.number(spec.generation);
  out.number(uint8_t(spec.read_only));
  out.text(spec.parameters_json);
  out.number(uint32_t(spec.layers.size()));
  for (const LayerSpec& layer : spec.layers) write_layer(out, layer);
  out.number(uint8_t(spec.next_top.has_value()));
  if (spec.next_top.has_value()) write_layer(out, *spec.next_top);
  return out.take();
}

Result<VolumeSpec> decode_volume(const std::string& bytes) {
  const bool first_version = Reader(bytes, kVolumeTagOne).ok();
  Reader in(bytes, first_version ? kVolumeTagOne : kVolumeTag);
  VolumeSpec spec;
  in.number(&spec.volume_id);
  in.number(&spec.slot);
  in.number(&spec.uuid);
  in.text(&spec.name);
  in.number(&spec.size_bytes);
  in.number(&spec.epoch);
  in.number(&spec.host_id);
  in.number(&spec.generation);
  in.boolean(&spec.read_only);
  in.text(&spec.parameters_json);
  const uint32_t layers = in.count(41);
  for (uint32_t i = 0; i < layers && in.ok(); ++i) {
    spec.layers.push_back(read_layer(in));
  }
  bool cutting = false;
  if (!first_version) in.boolean(&cutting);
  if (cutting) spec.next_top = read_layer(in);
  if (!in.ok()) return garbled("volume");
  return spec;
}

std::string encode(const ExportState& state) {
  Writer out(kExportTag);
  out.number(state.agreement);
  out.number(state.loop_number);
  out.number(uint8_t(state.dead));
  out.text(state.label);
  return out.take();
}

Result<ExportState> decode_export(const std::string& bytes) {
  Reader in(bytes, kExportTag);
  ExportState state;
  in.number(&state.agreement);
  in.number(&state.loop_number);
  in.boolean(&state.dead);
  in.text(&state.label);
  if (!in.ok()) return garbled("volume's device");
  return state;
}

}  // namespace holdfast
