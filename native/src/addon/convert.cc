// See convert.h.
#include "addon/convert.h"

#include <cmath>

#include "addon/control.h"
#include "core/pages.h"

namespace holdfast::addon {

void throw_invalid(Napi::Env env, const std::string& message) {
  throw_status(env, {Code::kInvalidArgument, message});
}

namespace {

[[noreturn]] void wrong(Napi::Env env, const std::string& name, const char* wanted) {
  throw_invalid(env, name + " must be " + wanted);
}

uint64_t u64_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsBigInt()) wrong(value.Env(), name, "a bigint");
  bool lossless = false;
  const uint64_t number = value.As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless) wrong(value.Env(), name, "a bigint from 0 to 2^64 - 1");
  return number;
}

uint32_t u32_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsNumber()) wrong(value.Env(), name, "a number");
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!(number >= 0 && number <= 4294967295.0 && std::floor(number) == number)) {
    wrong(value.Env(), name, "a whole number from 0 to 4294967295");
  }
  return uint32_t(number);
}

std::string string_of(const Napi::Value& value, const std::string& name) {
  if (!value.IsString()) wrong(value.Env(), name, "a string");
  std::string text = value.As<Napi::String>().Utf8Value();
  if (text.find('\0') != std::string::npos) wrong(value.Env(), name, "a string without a zero byte");
  return text;
}

Napi::Value number(Napi::Env env, double value) { return Napi::Number::New(env, value); }
Napi::Value text(Napi::Env env, const std::string& value) { return Napi::String::New(env, value); }

}  // namespace

Napi::Object object_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  if (!info[index].IsObject()) wrong(info.Env(), name, "an object");
  return info[index].As<Napi::Object>();
}

std::string string_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  return string_of(info[index], name);
}

uint32_t u32_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  return u32_of(info[index], name);
}

uint64_t u64_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  return u64_of(info[index], name);
}

std::string get_string(const Napi::Object& object, const char* name) { return string_of(object.Get(name), name); }

std::optional<std::string> find_string(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (value.IsUndefined()) return std::nullopt;
  return string_of(value, name);
}

uint64_t get_u64(const Napi::Object& object, const char* name) { return u64_of(object.Get(name), name); }
uint32_t get_u32(const Napi::Object& object, const char* name) { return u32_of(object.Get(name), name); }

uint64_t get_milliseconds(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (!value.IsNumber()) wrong(object.Env(), name, "a number");
  const double count = value.As<Napi::Number>().DoubleValue();
  if (!(count >= 0 && count <= 9007199254740991.0)) wrong(object.Env(), name, "milliseconds since 1970");
  return uint64_t(count);
}

std::optional<uint32_t> find_u32(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (value.IsUndefined()) return std::nullopt;
  return u32_of(value, name);
}

bool get_bool(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (!value.IsBoolean()) wrong(object.Env(), name, "true or false");
  return value.As<Napi::Boolean>().Value();
}

bool find_bool(const Napi::Object& object, const char* name) {
  return object.Get(name).IsUndefined() ? false : get_bool(object, name);
}

format::Uuid get_uuid(const Napi::Object& object, const char* name) {
  format::Uuid uuid{};
  if (!parse_uuid(get_string(object, name), &uuid)) {
    wrong(object.Env(), name, "a UUID in lower-case hyphenated text");
  }
  return uuid;
}

Napi::Array get_array(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (!value.IsArray()) wrong(object.Env(), name, "an array");
  return value.As<Napi::Array>();
}

std::vector<SlabRun> runs_from(const Napi::Array& array, const char* name) {
  std::vector<SlabRun> runs;
  runs.reserve(array.Length());
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const Napi::Value value = array.Get(i);
    if (!value.IsObject()) wrong(array.Env(), name, "an array of slab runs");
    const Napi::Object run = value.As<Napi::Object>();
    runs.push_back({get_u64(run, "first"), get_u32(run, "count"), get_u64(run, "generation")});
  }
  return runs;
}

std::vector<uint64_t> ids_from(const Napi::Value& value, const char* name) {
  if (!value.IsArray()) wrong(value.Env(), name, "an array of bigints");
  const Napi::Array array = value.As<Napi::Array>();
  std::vector<uint64_t> ids;
  for (uint32_t i = 0; i < array.Length(); ++i) ids.push_back(u64_of(array.Get(i), name));
  return ids;
}

LayerSpec layer_spec_from(const Napi::Object& layer) {
  LayerSpec out;
  out.layer_id = get_u64(layer, "layerId");
  out.slot = get_u32(layer, "slot");
  out.parent_layer_id = get_u64(layer, "parentLayerId");
  out.birth = get_u64(layer, "birth");
  out.size_bytes = get_u64(layer, "sizeBytes");
  out.frozen = get_bool(layer, "frozen");
  out.slabs = runs_from(get_array(layer, "slabs"), "slabs");
  return out;
}

std::vector<LayerSpec> layer_specs_from(const Napi::Value& value, const char* name) {
  if (!value.IsArray()) wrong(value.Env(), name, "an array of layers");
  const Napi::Array array = value.As<Napi::Array>();
  std::vector<LayerSpec> layers;
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const Napi::Value layer = array.Get(i);
    if (!layer.IsObject()) wrong(value.Env(), name, "an array of layers");
    layers.push_back(layer_spec_from(layer.As<Napi::Object>()));
  }
  return layers;
}

VolumeSpec volume_spec_from(const Napi::Object& object) {
  VolumeSpec spec;
  spec.volume_id = get_u64(object, "volumeId");
  spec.slot = get_u32(object, "slot");
  spec.uuid = get_uuid(object, "uuid");
  spec.name = get_string(object, "name");
  spec.size_bytes = get_u64(object, "sizeBytes");
  spec.epoch = get_u64(object, "epoch");
  spec.read_only = get_bool(object, "readOnly");
  spec.parameters_json = get_string(object, "parametersJson");
  spec.layers = layer_specs_from(object.Get("layers"), "layers");
  return spec;
}

Napi::Value big(Napi::Env env, uint64_t value) { return Napi::BigInt::New(env, value); }

Napi::Value to_js(Napi::Env env, const PoolInfo& info) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("uuid", text(env, uuid_text(info.uuid)));
  out.Set("name", text(env, info.name));
  out.Set("wwid", text(env, info.wwid));
  out.Set("deviceBytes", big(env, info.device_bytes));
  out.Set("slabSize", number(env, info.slab_size));
  out.Set("chunkSize", number(env, info.chunk_size));
  out.Set("slabCount", big(env, info.slab_count));
  out.Set("volumeSlots", number(env, info.volume_slots));
  out.Set("layerSlots", number(env, info.layer_slots));
  out.Set("hostSlots", number(env, info.host_slots));
  out.Set("fencing", text(env, fencing_class_name(info.fencing)));
  out.Set("renewIntervalMs", number(env, info.renew_interval_ms));
  out.Set("leaseMs", number(env, info.lease_ms));
  out.Set("drainMs", number(env, info.drain_ms));
  out.Set("createdUnixMs", number(env, double(info.created_unix_ms)));
  Napi::Array warnings = Napi::Array::New(env, info.warnings.size());
  for (size_t i = 0; i < info.warnings.size(); ++i) warnings.Set(uint32_t(i), text(env, info.warnings[i]));
  out.Set("warnings", warnings);
  return out;
}

Napi::Value to_js(Napi::Env env, const PoolRoom& room) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("info", to_js(env, room.info));
  out.Set("deviceBytes", big(env, room.device_bytes));
  out.Set("slabsPossible", big(env, room.slabs_possible));
  return out;
}

Napi::Value to_js(Napi::Env env, const DeviceInspection& inspection) {
  static constexpr const char* kKinds[] = {"blank", "pool", "foreign"};
  Napi::Object out = Napi::Object::New(env);
  out.Set("sizeBytes", big(env, inspection.size_bytes));
  out.Set("logicalSectorSize", number(env, inspection.logical_sector_size));
  out.Set("kind", text(env, kKinds[int(inspection.kind)]));
  out.Set("signature", text(env, inspection.signature));
  out.Set("mounted", Napi::Boolean::New(env, inspection.mounted));
  out.Set("wwid", text(env, inspection.wwid));
  if (inspection.pool.has_value()) out.Set("pool", to_js(env, *inspection.pool));
  return out;
}

Napi::Value to_js(Napi::Env env, const Authority& authority) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("store", text(env, uuid_text(authority.store)));
  out.Set("incarnation", big(env, authority.incarnation));
  out.Set("term", big(env, authority.term));
  out.Set("unclaimed", Napi::Boolean::New(env, authority.unclaimed));
  return out;
}

Napi::Value to_js(Napi::Env env, const Heartbeat& heartbeat) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("hostId", number(env, heartbeat.host_id));
  const char* state = heartbeat.state == format::HeartbeatState::kLive      ? "live"
                      : heartbeat.state == format::HeartbeatState::kStopped ? "stopped"
                                                                            : "empty";
  out.Set("state", text(env, state));
  out.Set("generation", big(env, heartbeat.generation));
  out.Set("sequence", big(env, heartbeat.sequence));
  out.Set("nonce", big(env, heartbeat.nonce));
  out.Set("nodeName", text(env, heartbeat.node_name));
  out.Set("machineId", text(env, uuid_text(heartbeat.machine_id)));
  out.Set("bootId", text(env, uuid_text(heartbeat.boot_id)));
  return out;
}

Napi::Value to_js(Napi::Env env, const Fence& fence) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("hostId", number(env, fence.host_id));
  out.Set("generation", big(env, fence.generation));
  out.Set("fencerHostId", number(env, fence.fencer_host_id));
  out.Set("term", big(env, fence.term));
  return out;
}

Napi::Value to_js(Napi::Env env, const VolumeRecordInfo& record) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("slot", number(env, record.slot));
  out.Set("volumeId", big(env, record.volume_id));
  out.Set("uuid", text(env, uuid_text(record.uuid)));
  out.Set("name", text(env, record.name));
  const char* state = record.state == format::VolumeState::kOpen     ? "open"
                      : record.state == format::VolumeState::kClosed ? "closed"
                                                                     : "deleted";
  out.Set("state", text(env, state));
  out.Set("sizeBytes", big(env, record.size_bytes));
  out.Set("topLayerId", big(env, record.top_layer_id));
  out.Set("epoch", big(env, record.epoch));
  out.Set("hostId", number(env, record.host_id));
  out.Set("generation", big(env, record.generation));
  out.Set("fenced", Napi::Boolean::New(env, record.fenced));
  out.Set("parametersJson", text(env, record.parameters_json));
  return out;
}

Napi::Value to_js(Napi::Env env, const LayerRecordInfo& record) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("slot", number(env, record.slot));
  out.Set("layerId", big(env, record.layer_id));
  out.Set("parentLayerId", big(env, record.parent_layer_id));
  out.Set("volumeId", big(env, record.volume_id));
  out.Set("sizeBytes", big(env, record.size_bytes));
  out.Set("birth", big(env, record.birth));
  const char* state = record.state == format::LayerState::kWritable ? "writable"
                      : record.state == format::LayerState::kFrozen ? "frozen"
                      : record.state == format::LayerState::kFolded ? "folded"
                                                                    : "deleted";
  out.Set("state", text(env, state));
  out.Set("snapshotName", text(env, record.snapshot_name));
  return out;
}

Napi::Value to_js(Napi::Env env, const SlabOwner& owner) {
  static constexpr const char* kStates[] = {"free", "claimed", "bad"};
  Napi::Object out = Napi::Object::New(env);
  out.Set("slab", big(env, owner.slab));
  out.Set("layerId", big(env, owner.layer_id));
  out.Set("volumeId", big(env, owner.volume_id));
  out.Set("generation", big(env, owner.generation));
  out.Set("state", text(env, kStates[int(owner.state)]));
  return out;
}

Napi::Value to_js(Napi::Env env, const SlabRun& run) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("first", big(env, run.first));
  out.Set("count", number(env, run.count));
  out.Set("generation", big(env, run.generation));
  return out;
}

Napi::Value to_js(Napi::Env env, const CheckReport& report) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("pool", to_js(env, report.pool));
  out.Set("clean", Napi::Boolean::New(env, report.clean));
  Napi::Array findings = Napi::Array::New(env, report.findings.size());
  for (size_t i = 0; i < report.findings.size(); ++i) {
    const CheckFinding& finding = report.findings[i];
    Napi::Object item = Napi::Object::New(env);
    item.Set("severity", text(env, severity_name(finding.severity)));
    item.Set("kind", text(env, finding.kind));
    item.Set("message", text(env, finding.message));
    if (finding.volume_id.has_value()) item.Set("volumeId", big(env, *finding.volume_id));
    if (finding.layer_id.has_value()) item.Set("layerId", big(env, *finding.layer_id));
    if (finding.slab.has_value()) item.Set("slab", big(env, *finding.slab));
    if (finding.offset.has_value()) item.Set("offset", big(env, *finding.offset));
    if (finding.length.has_value()) item.Set("length", big(env, *finding.length));
    findings.Set(uint32_t(i), item);
  }
  out.Set("findings", findings);
  out.Set("pagesRead", number(env, double(report.pages_read)));
  out.Set("volumes", number(env, double(report.volumes)));
  out.Set("layers", number(env, double(report.layers)));
  out.Set("slabsClaimed", big(env, report.slabs_claimed));
  out.Set("slabsFree", big(env, report.slabs_free));
  return out;
}

Napi::Value to_js(Napi::Env env, const LayerSpec& layer) {
  Napi::Object item = Napi::Object::New(env);
  item.Set("layerId", big(env, layer.layer_id));
  item.Set("slot", number(env, layer.slot));
  item.Set("parentLayerId", big(env, layer.parent_layer_id));
  item.Set("birth", big(env, layer.birth));
  item.Set("sizeBytes", big(env, layer.size_bytes));
  item.Set("frozen", Napi::Boolean::New(env, layer.frozen));
  item.Set("slabs", array_to_js(env, layer.slabs));
  return item;
}

Napi::Value to_js(Napi::Env env, const CutReport& report) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("frozen", to_js(env, report.frozen));
  out.Set("heldMicroseconds", number(env, double(report.held_ns / 1000)));
  return out;
}

Napi::Value to_js(Napi::Env env, const LayerUse& use) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("layerId", big(env, use.layer_id));
  out.Set("liveBlocks", big(env, use.live_blocks));
  out.Set("slabs", big(env, use.slabs));
  return out;
}

Napi::Value to_js(Napi::Env env, const MergeReport& report) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("movedBlocks", big(env, report.moved_blocks));
  out.Set("complete", report.complete);
  out.Set("noSpace", report.no_space);
  out.Set("spare", array_to_js(env, report.spare));
  return out;
}

Napi::Value to_js(Napi::Env env, const StripReport& report) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("emptied", array_to_js(env, report.emptied));
  out.Set("clearedBlocks", big(env, report.cleared_blocks));
  out.Set("uses", array_to_js(env, report.uses));
  return out;
}

Napi::Value to_js(Napi::Env env, const ByteRange& range) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("offset", big(env, range.offset));
  out.Set("length", big(env, range.length));
  return out;
}

Napi::Value to_js(Napi::Env env, const ChangeReading& reading) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("ranges", array_to_js(env, reading.ranges));
  out.Set("nextOffset", big(env, reading.next_offset));
  return out;
}

Napi::Value to_js(Napi::Env env, const VolumeSpec& spec) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("volumeId", big(env, spec.volume_id));
  out.Set("slot", number(env, spec.slot));
  out.Set("uuid", text(env, uuid_text(spec.uuid)));
  out.Set("name", text(env, spec.name));
  out.Set("sizeBytes", big(env, spec.size_bytes));
  out.Set("epoch", big(env, spec.epoch));
  out.Set("readOnly", Napi::Boolean::New(env, spec.read_only));
  out.Set("parametersJson", text(env, spec.parameters_json));
  out.Set("layers", array_to_js(env, spec.layers));
  return out;
}

Napi::Value to_js(Napi::Env env, const VolumeStats& stats) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("sizeBytes", big(env, stats.size_bytes));
  out.Set("mappedBytes", big(env, stats.mapped_bytes));
  out.Set("allocatedBytes", big(env, stats.allocated_bytes));
  out.Set("reads", big(env, stats.reads));
  out.Set("writes", big(env, stats.writes));
  out.Set("flushes", big(env, stats.flushes));
  out.Set("discards", big(env, stats.discards));
  out.Set("readBytes", big(env, stats.read_bytes));
  out.Set("writtenBytes", big(env, stats.written_bytes));
  out.Set("held", big(env, stats.held));
  out.Set("dirtyPages", big(env, stats.dirty_pages));
  out.Set("inFlight", big(env, stats.in_flight));
  out.Set("memoryBytes", big(env, stats.memory_bytes));
  return out;
}

Napi::Value to_js(Napi::Env env, const CompactReport& report) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("movedBlocks", big(env, report.moved_blocks));
  out.Set("complete", Napi::Boolean::New(env, report.complete));
  out.Set("noSpace", Napi::Boolean::New(env, report.no_space));
  return out;
}

Napi::Value to_js(Napi::Env env, const EngineEvent& event) {
  Napi::Object out = Napi::Object::New(env);
  out.Set("pool", text(env, uuid_text(event.pool)));
  switch (event.type) {
    case EngineEvent::Type::kSlabsLow:
      out.Set("type", text(env, "slabs-low"));
      out.Set("wanted", number(env, event.wanted));
      break;
    case EngineEvent::Type::kSlabClaimed:
    case EngineEvent::Type::kSlabEmptied:
      out.Set("type", text(env, event.type == EngineEvent::Type::kSlabClaimed ? "slab-claimed" : "slab-emptied"));
      out.Set("volumeId", big(env, event.volume_id));
      out.Set("layerId", big(env, event.layer_id));
      out.Set("slab", big(env, event.slab));
      out.Set("generation", big(env, event.generation));
      break;
    case EngineEvent::Type::kLease:
      out.Set("type", text(env, "lease"));
      out.Set("state", text(env, lease_state_name(event.lease)));
      out.Set("message", text(env, event.message));
      break;
    case EngineEvent::Type::kVolume:
      out.Set("type", text(env, "volume"));
      out.Set("volumeId", big(env, event.volume_id));
      out.Set("code", text(env, std::string("HF_") + code_name(event.code)));
      out.Set("message", text(env, event.message));
      break;
  }
  return out;
}

}  // namespace holdfast::addon
