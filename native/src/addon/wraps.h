// Engine, Pool and OpenVolume as JS objects, and what one environment owns.
//
// A JS object only points to its engine object: dropping it closes nothing, and what is open goes on. The environment
// keeps each engine until destroy(), or until it ends itself.
#pragma once

#include <napi.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "addon/control.h"
#include "core/records.h"
#include "io/engine.h"

namespace holdfast::addon {

inline constexpr uint32_t kNotAHost = 0xffffffffu;  // claimed_by_host of a node without a slot

struct AddonData {
  std::shared_ptr<Dispatcher> dispatcher;
  Napi::FunctionReference engine_class;
  Napi::FunctionReference pool_class;
  Napi::FunctionReference volume_class;
  std::vector<std::shared_ptr<Engine>> engines;
  // One JS object per pool and volume, for as long as somebody holds it.
  std::unordered_map<const void*, Napi::ObjectReference> known;
  // onEvent of each engine.
  std::unordered_map<uint64_t, Napi::FunctionReference> event_handlers;
  uint64_t next_engine = 1;
};

AddonData* data_of(Napi::Env env);
void define_classes(Napi::Env env, AddonData* data);
Napi::Value create_engine_js(const Napi::CallbackInfo& info);
ClaimEnvironment claim_environment(uint32_t wait_ms);
AuthorityClaim claim_from(const Napi::Object& object, uint32_t host_id);

}  // namespace holdfast::addon
