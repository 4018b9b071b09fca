// Between the engine's structs and the objects of native/lib/index.ts, field by field. JS thread.
// The from-JS functions throw a Napi::Error with code HF_INVALID_ARGUMENT that names the field.
#pragma once

#include <napi.h>

#include <optional>
#include <string>
#include <vector>

#include "core/checker.h"
#include "core/layer_merge.h"
#include "core/pool.h"
#include "core/records.h"
#include "core/volume.h"
#include "io/engine.h"

namespace holdfast::addon {

[[noreturn]] void throw_invalid(Napi::Env env, const std::string& message);

Napi::Object object_argument(const Napi::CallbackInfo& info, size_t index, const char* name);
std::string string_argument(const Napi::CallbackInfo& info, size_t index, const char* name);
uint32_t u32_argument(const Napi::CallbackInfo& info, size_t index, const char* name);
uint64_t u64_argument(const Napi::CallbackInfo& info, size_t index, const char* name);

std::string get_string(const Napi::Object& object, const char* name);
std::optional<std::string> find_string(const Napi::Object& object, const char* name);
uint64_t get_u64(const Napi::Object& object, const char* name);                  // bigint
uint32_t get_u32(const Napi::Object& object, const char* name);                  // number
uint64_t get_milliseconds(const Napi::Object& object, const char* name);         // number, since 1970
std::optional<uint32_t> find_u32(const Napi::Object& object, const char* name);
bool get_bool(const Napi::Object& object, const char* name);
bool find_bool(const Napi::Object& object, const char* name);                    // absent: false
format::Uuid get_uuid(const Napi::Object& object, const char* name);
Napi::Array get_array(const Napi::Object& object, const char* name);
std::vector<SlabRun> runs_from(const Napi::Array& array, const char* name);
std::vector<uint64_t> ids_from(const Napi::Value& value, const char* name);        // an array of bigints
LayerSpec layer_spec_from(const Napi::Object& object);
std::vector<LayerSpec> layer_specs_from(const Napi::Value& value, const char* name);
VolumeSpec volume_spec_from(const Napi::Object& object);

Napi::Value big(Napi::Env env, uint64_t value);
Napi::Value to_js(Napi::Env env, const PoolInfo& info);
Napi::Value to_js(Napi::Env env, const PoolRoom& room);
Napi::Value to_js(Napi::Env env, const DeviceInspection& inspection);
Napi::Value to_js(Napi::Env env, const Authority& authority);
Napi::Value to_js(Napi::Env env, const Heartbeat& heartbeat);
Napi::Value to_js(Napi::Env env, const Fence& fence);
Napi::Value to_js(Napi::Env env, const VolumeRecordInfo& record);
Napi::Value to_js(Napi::Env env, const LayerRecordInfo& record);
Napi::Value to_js(Napi::Env env, const SlabOwner& owner);
Napi::Value to_js(Napi::Env env, const SlabRun& run);
Napi::Value to_js(Napi::Env env, const CheckReport& report);
Napi::Value to_js(Napi::Env env, const LayerSpec& layer);
Napi::Value to_js(Napi::Env env, const VolumeSpec& spec);
Napi::Value to_js(Napi::Env env, const CutReport& report);
Napi::Value to_js(Napi::Env env, const CompactReport& report);
Napi::Value to_js(Napi::Env env, const MergeReport& report);
Napi::Value to_js(Napi::Env env, const LayerUse& use);
Napi::Value to_js(Napi::Env env, const StripReport& report);
Napi::Value to_js(Napi::Env env, const ByteRange& range);
Napi::Value to_js(Napi::Env env, const ChangeReading& reading);
Napi::Value to_js(Napi::Env env, const VolumeStats& stats);
Napi::Value to_js(Napi::Env env, const EngineEvent& event);

template <typename T>
Napi::Value array_to_js(Napi::Env env, const std::vector<T>& values) {
  Napi::Array array = Napi::Array::New(env, values.size());
  for (size_t i = 0; i < values.size(); ++i) array.Set(uint32_t(i), to_js(env, values[i]));
  return array;
}

}  // namespace holdfast::addon
