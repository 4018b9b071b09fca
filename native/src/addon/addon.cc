// The N-API binding of native/lib/index.ts: the module, PoolTools, and what an environment owns.
#include <napi.h>
#include <sys/random.h>
#include <time.h>

#include <chrono>
#include <thread>

#include "addon/control.h"
#include "addon/convert.h"
#include "addon/wraps.h"
#include "core/checker.h"
#include "core/pool.h"
#include "core/records.h"

namespace holdfast::addon {

namespace {

constexpr unsigned kLetGoMs = 2000;        // per volume, when an environment ends with volumes open
constexpr unsigned kThreadsMs = 10'000;

std::shared_ptr<Dispatcher> dispatcher_of(const Napi::CallbackInfo& info) {
  return data_of(info.Env())->dispatcher;
}

// onProgress of an options object or argument. It is called, and let go, on the JS thread only: `owner` goes into the
// last closure that the JS thread runs for the call, `report` into the work.
struct ProgressBridge {
  std::shared_ptr<Napi::FunctionReference> owner;
  Progress report;
};

ProgressBridge progress_of(const Napi::Value& value, const std::shared_ptr<Dispatcher>& dispatcher) {
  ProgressBridge bridge;
  if (!value.IsFunction()) return bridge;
  bridge.owner = std::make_shared<Napi::FunctionReference>(Napi::Persistent(value.As<Napi::Function>()));
  auto last = std::make_shared<std::chrono::steady_clock::time_point>();
  bridge.report = [dispatcher, raw = bridge.owner.get(), last](uint64_t done, uint64_t total) {
    const auto now = std::chrono::steady_clock::now();
    if (done != total && now - *last < std::chrono::milliseconds(50)) return;
    *last = now;
    dispatcher->post([raw, done, total](Napi::Env env) {
      raw->Call({Napi::Number::New(env, double(done)), Napi::Number::New(env, double(total))});
    });
  };
  return bridge;
}

// Opens the pool on `path` for one call of the tools.
template <typename T>
std::function<Result<T>()> on_pool(std::string path,
                                   std::function<Result<T>(SyncDevice&, const format::Superblock&)> call) {
  return [path = std::move(path), call = std::move(call)]() -> Result<T> {
    Result<std::unique_ptr<FdDevice>> device = FdDevice::open(path, FdDevice::Mode::kRead);
    if (!device.ok()) return device.status;
    Result<PoolInfo> info = read_pool_at(**device);
    if (!info.ok()) return info.status;
    return call(**device, info->superblock);
  };
}

Napi::Value inspect_device_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    const std::string path = string_argument(info, 0, "devicePath");
    return promise_for<DeviceInspection>(
        info.Env(), dispatcher_of(info), [path] { return inspect_device(path); },
        [](Napi::Env env, DeviceInspection& value) { return to_js(env, value); });
  });
}

Napi::Value format_pool_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    const std::string path = string_argument(info, 0, "devicePath");
    const Napi::Object given = object_argument(info, 1, "options");
    FormatOptions options;
    options.name = get_string(given, "name");
    const std::string fencing = get_string(given, "fencing");
    const std::optional<format::FencingClass> parsed = parse_fencing_class(fencing);
    if (!parsed.has_value()) {
      throw_invalid(info.Env(), "fencing must be reservations, manual, lease-only or loop, not " + fencing);
    }
    options.fencing = *parsed;
    options.force = find_bool(given, "force");
    if (const auto ms = find_u32(given, "renewIntervalMs")) options.renew_interval_ms = *ms;
    if (const auto ms = find_u32(given, "leaseMs")) options.lease_ms = *ms;
    options.drain_ms = find_u32(given, "drainMs");
    if (find_string(given, "uuid").has_value()) options.uuid = get_uuid(given, "uuid");
    ProgressBridge progress = progress_of(given.Get("onProgress"), dispatcher_of(info));
    options.progress = progress.report;
    return promise_for<PoolInfo>(
        info.Env(), dispatcher_of(info), [path, options] { return format_device(path, options); },
        [owner = progress.owner](Napi::Env env, PoolInfo& value) { return to_js(env, value); });
  });
}

Napi::Value read_pool_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    const std::string path = string_argument(info, 0, "devicePath");
    return promise_for<PoolInfo>(
        info.Env(), dispatcher_of(info), [path] { return read_pool_at(path); },
        [](Napi::Env env, PoolInfo& value) { return to_js(env, value); });
  });
}

Napi::Value read_authority_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    return promise_for<Authority>(
        info.Env(), dispatcher_of(info),
        on_pool<Authority>(string_argument(info, 0, "devicePath"),
                           [](SyncDevice& device, const format::Superblock& superblock) {
                             return read_authority(device, superblock);
                           }),
        [](Napi::Env env, Authority& value) { return to_js(env, value); });
  });
}

Napi::Value claim_authority_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    const std::string path = string_argument(info, 0, "devicePath");
    const AuthorityClaim claim = claim_from(object_argument(info, 1, "claim"), kNotAHost);
    const uint32_t wait_ms = u32_argument(info, 2, "waitMs");
    return promise_for_status(info.Env(), dispatcher_of(info), [path, claim, wait_ms]() -> Status {
      Result<std::unique_ptr<FdDevice>> device = FdDevice::open(path, FdDevice::Mode::kWrite);
      if (!device.ok()) return device.status;
      Result<PoolInfo> pool = read_pool_at(**device);
      if (!pool.ok()) return pool.status;
      return claim_authority(**device, pool->superblock, claim, claim_environment(wait_ms));
    });
  });
}

template <typename T>
Napi::Value read_list_js(
    const Napi::CallbackInfo& info,
    Result<std::vector<T>> (*read)(SyncDevice&, const format::Superblock&, std::vector<std::string>*)) {
  return reject_on_throw(info, [&] {
    return promise_for<std::vector<T>>(
        info.Env(), dispatcher_of(info),
        on_pool<std::vector<T>>(string_argument(info, 0, "devicePath"),
                                [read](SyncDevice& device, const format::Superblock& superblock) {
                                  // checkPool() names the damaged ones; here what can be read is what counts.
                                  std::vector<std::string> damaged;
                                  return read(device, superblock, &damaged);
                                }),
        [](Napi::Env env, std::vector<T>& values) -> Napi::Value { return array_to_js(env, values); });
  });
}

Napi::Value read_heartbeats_js(const Napi::CallbackInfo& info) { return read_list_js<Heartbeat>(info, &read_heartbeats); }
Napi::Value read_volume_records_js(const Napi::CallbackInfo& info) {
  return read_list_js<VolumeRecordInfo>(info, &read_volume_records);
}
Napi::Value read_layer_records_js(const Napi::CallbackInfo& info) {
  return read_list_js<LayerRecordInfo>(info, &read_layer_records);
}

Napi::Value check_pool_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    const std::string path = string_argument(info, 0, "devicePath");
    ProgressBridge progress = progress_of(info[1], dispatcher_of(info));
    return promise_for<CheckReport>(
        info.Env(), dispatcher_of(info), [path, report = progress.report] { return check_pool_at(path, report); },
        [owner = progress.owner](Napi::Env env, CheckReport& value) { return to_js(env, value); });
  });
}

Napi::Value lock_is_free_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    const std::string path = string_argument(info, 0, "lockPath");
    return promise_for<bool>(
        info.Env(), dispatcher_of(info), [path] { return lock_is_free(path); },
        [](Napi::Env env, bool& value) -> Napi::Value { return Napi::Boolean::New(env, value); });
  });
}

// The environment ends: process exit or a terminated worker. Engines let go as in a hand-over; the keeper keeps the
// devices of volumes that are open.
void clean_up(AddonData* data) {
  data->dispatcher->shut();
  for (const auto& engine : data->engines) {
    [[maybe_unused]] Status left = engine->hand_over(kLetGoMs);
    [[maybe_unused]] Status ended = engine->destroy();
  }
  data->dispatcher->wait_threads(kThreadsMs);
  data->engines.clear();
}

Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData();
  data->dispatcher = std::make_shared<Dispatcher>(env);
  env.SetInstanceData<AddonData>(data);
  define_classes(env, data);
  env.AddCleanupHook(&clean_up, data);
  const auto add = [&](const char* name, Napi::Value (*function)(const Napi::CallbackInfo&)) {
    exports.Set(name, Napi::Function::New(env, function, name));
  };
  add("inspectDevice", &inspect_device_js);
  add("formatPool", &format_pool_js);
  add("readPool", &read_pool_js);
  add("readAuthority", &read_authority_js);
  add("claimAuthority", &claim_authority_js);
  add("readHeartbeats", &read_heartbeats_js);
  add("readVolumeRecords", &read_volume_records_js);
  add("readLayerRecords", &read_layer_records_js);
  add("checkPool", &check_pool_js);
  add("lockIsFree", &lock_is_free_js);
  add("createEngine", &create_engine_js);
  exports.Set("formatVersion", Napi::Number::New(env, format::kVersion));
  return exports;
}

}  // namespace

AddonData* data_of(Napi::Env env) { return env.GetInstanceData<AddonData>(); }

ClaimEnvironment claim_environment(uint32_t wait_ms) {
  ClaimEnvironment environment;
  environment.wait_ms = wait_ms;
  environment.now_ns = [] { return boottime_ns(); };
  environment.random = [] {
    uint64_t value = 0;
    const ssize_t got = getrandom(&value, sizeof value, 0);
    HF_ASSERT(got == ssize_t(sizeof value));
    return value;
  };
  environment.sleep_ms = [](uint64_t ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); };
  environment.unix_ms = [] {
    return uint64_t(std::chrono::duration_cast<std::chrono::milliseconds>(
                        std::chrono::system_clock::now().time_since_epoch())
                        .count());
  };
  return environment;
}

AuthorityClaim claim_from(const Napi::Object& object, uint32_t host_id) {
  AuthorityClaim claim;
  claim.store = get_uuid(object, "store");
  claim.incarnation = get_u64(object, "incarnation");
  claim.term = get_u64(object, "term");
  claim.force = find_bool(object, "force");
  claim.host_id = host_id;
  return claim;
}

}  // namespace holdfast::addon

static Napi::Object init(Napi::Env env, Napi::Object exports) { return holdfast::addon::initialize(env, exports); }
NODE_API_MODULE(holdfast, init)
