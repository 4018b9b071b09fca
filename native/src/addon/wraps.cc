// See wraps.h.
#include "addon/wraps.h"

#include <chrono>
#include <limits>
#include <thread>

#include "addon/convert.h"

namespace holdfast::addon {

namespace {

// What the constructors take: nobody but this file can make one.
template <typename T>
std::shared_ptr<T> constructor_argument(const Napi::CallbackInfo& info) {
  if (info.Length() != 1 || !info[0].IsExternal()) {
    throw_invalid(info.Env(), "engines, pools and volumes are made by createEngine, openPool and openVolume");
  }
  return *info[0].As<Napi::External<std::shared_ptr<T>>>().Data();
}

template <typename T>
Napi::Value wrap(Napi::Env env, Napi::FunctionReference& constructor, std::shared_ptr<T> value) {
  AddonData* data = data_of(env);
  const auto found = data->known.find(value.get());
  if (found != data->known.end()) {
    const Napi::Value existing = found->second.Value();
    if (existing.IsObject()) return existing;
    data->known.erase(found);
  }
  const Napi::Object object = constructor.New({Napi::External<std::shared_ptr<T>>::New(env, &value)});
  data->known[value.get()] = Napi::Weak(object);
  return object;
}

class VolumeWrap : public Napi::ObjectWrap<VolumeWrap> {
 public:
  explicit VolumeWrap(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<VolumeWrap>(info), volume_(constructor_argument<EngineVolume>(info)) {}

  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "OpenVolume",
                       {InstanceAccessor<&VolumeWrap::spec>("spec"), InstanceAccessor<&VolumeWrap::exported>("export"),
                        InstanceMethod<&VolumeWrap::grow>("grow"), InstanceMethod<&VolumeWrap::close>("close"),
                        InstanceMethod<&VolumeWrap::revoke>("revoke"), InstanceMethod<&VolumeWrap::detach>("detach"),
                        InstanceMethod<&VolumeWrap::hold>("hold"), InstanceMethod<&VolumeWrap::release>("release"),
                        InstanceMethod<&VolumeWrap::cut>("cut"),
                        InstanceMethod<&VolumeWrap::forget>("forget"), InstanceMethod<&VolumeWrap::learn>("learn"),
                        InstanceMethod<&VolumeWrap::compact>("compact"),
                        InstanceMethod<&VolumeWrap::stats>("stats")});
  }

 private:
  Napi::Value run(const Napi::CallbackInfo& info, Status (EngineVolume::*call)()) {
    return promise_for_status(info.Env(), data_of(info.Env())->dispatcher,
                              [volume = volume_, call] { return ((*volume).*call)(); });
  }
  Napi::Value spec(const Napi::CallbackInfo& info) { return to_js(info.Env(), volume_->spec()); }
  Napi::Value exported(const Napi::CallbackInfo& info) {
    Napi::Object out = Napi::Object::New(info.Env());
    out.Set("frontend", "fuse");
    out.Set("devicePath", volume_->device_path());
    out.Set("reason", volume_->reason());
    return out;
  }
  Napi::Value grow(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const uint64_t size = u64_argument(info, 0, "sizeBytes");
      return promise_for_status(info.Env(), data_of(info.Env())->dispatcher,
                                [volume = volume_, size] { return volume->grow(size); });
    });
  }
  Napi::Value close(const Napi::CallbackInfo& info) { return run(info, &EngineVolume::close); }
  Napi::Value revoke(const Napi::CallbackInfo& info) { return run(info, &EngineVolume::revoke); }
  Napi::Value detach(const Napi::CallbackInfo& info) { return run(info, &EngineVolume::detach); }
  Napi::Value hold(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const uint32_t timeout_ms = u32_argument(info, 0, "timeoutMs");
      return promise_for_status(info.Env(), data_of(info.Env())->dispatcher,
                                [volume = volume_, timeout_ms] { return volume->hold(timeout_ms); });
    });
  }
  Napi::Value release(const Napi::CallbackInfo& info) { return run(info, &EngineVolume::release); }
  Napi::Value cut(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      LayerSpec top = layer_spec_from(object_argument(info, 0, "top"));
      const Napi::Object given = object_argument(info, 1, "snapshot");
      SnapshotInfo snapshot;
      snapshot.name = get_string(given, "name");
      snapshot.unix_ms = get_milliseconds(given, "unixMs");
      const uint32_t timeout_ms = u32_argument(info, 2, "timeoutMs");
      return promise_for<CutReport>(
          info.Env(), data_of(info.Env())->dispatcher,
          [volume = volume_, top = std::move(top), snapshot, timeout_ms] {
            return volume->cut(top, snapshot, timeout_ms);
          },
          [](Napi::Env env, CutReport& report) { return to_js(env, report); });
    });
  }
  Napi::Value forget(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      if (!info[0].IsArray()) throw_invalid(info.Env(), "slabs must be an array of slab runs");
      std::vector<SlabRun> slabs = runs_from(info[0].As<Napi::Array>(), "slabs");
      std::vector<uint64_t> layers = ids_from(info[1], "layers");
      return promise_for_status(info.Env(), data_of(info.Env())->dispatcher,
                                [volume = volume_, slabs = std::move(slabs), layers = std::move(layers)] {
                                  return volume->forget(slabs, layers);
                                });
    });
  }
  Napi::Value learn(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const LayerSpec spec = layer_spec_from(object_argument(info, 0, "layer"));
      return promise_for_status(info.Env(), data_of(info.Env())->dispatcher,
                                [volume = volume_, layer = LayerSlabs{spec.layer_id, spec.slabs}] { return volume->learn(layer); });
    });
  }
  Napi::Value compact(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      if (!info[0].IsArray()) throw_invalid(info.Env(), "sources must be an array of layers with their slabs");
      const auto given = info[0].As<Napi::Array>();
      std::vector<LayerSlabs> sources;
      for (uint32_t i = 0; i < given.Length(); ++i) {
        if (!Napi::Value(given[i]).IsObject()) throw_invalid(info.Env(), "sources has something that is no layer");
        const auto layer = Napi::Value(given[i]).As<Napi::Object>();
        sources.push_back({get_u64(layer, "layerId"), runs_from(get_array(layer, "slabs"), "slabs")});
      }
      const uint32_t skip_above = u32_argument(info, 1, "skipAbovePermille");
      const uint64_t max_blocks = u64_argument(info, 2, "maxBlocks");
      return promise_for<CompactReport>(
          info.Env(), data_of(info.Env())->dispatcher,
          [volume = volume_, sources = std::move(sources), skip_above, max_blocks] {
            return volume->compact(sources, skip_above, max_blocks);
          },
          [](Napi::Env env, CompactReport& report) { return to_js(env, report); });
    });
  }
  Napi::Value stats(const Napi::CallbackInfo& info) { return to_js(info.Env(), volume_->stats()); }

  std::shared_ptr<EngineVolume> volume_;
};

Napi::Value wrap_volume(Napi::Env env, std::shared_ptr<EngineVolume> volume) {
  return wrap(env, data_of(env)->volume_class, std::move(volume));
}

// Between the batches of a job on layers the disk is left to volumes for as long as the batch took.
Pause pace() {
  using Clock = std::chrono::steady_clock;
  auto begun = std::make_shared<Clock::time_point>(Clock::now());
  return [begun] {
    std::this_thread::sleep_for(std::min<Clock::duration>(Clock::now() - *begun, std::chrono::milliseconds(100)));
    *begun = Clock::now();
  };
}

class PoolWrap : public Napi::ObjectWrap<PoolWrap> {
 public:
  explicit PoolWrap(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<PoolWrap>(info), pool_(constructor_argument<EnginePool>(info)) {}

  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "Pool",
        {InstanceAccessor<&PoolWrap::info>("info"), InstanceAccessor<&PoolWrap::host_id>("hostId"),
         InstanceAccessor<&PoolWrap::generation>("generation"), InstanceAccessor<&PoolWrap::lock_path>("lockPath"),
         InstanceMethod<&PoolWrap::lease_state>("leaseState"), InstanceMethod<&PoolWrap::volumes>("volumes"),
         InstanceMethod<&PoolWrap::open_volume>("openVolume"), InstanceMethod<&PoolWrap::add_slabs>("addSlabs"),
         InstanceMethod<&PoolWrap::declare_full>("declareFull"),
         InstanceMethod<&PoolWrap::take_back_slabs>("takeBackSlabs"), InstanceMethod<&PoolWrap::stock>("stock"),
         InstanceMethod<&PoolWrap::read_authority>("readAuthority"),
         InstanceMethod<&PoolWrap::claim_authority>("claimAuthority"),
         InstanceMethod<&PoolWrap::read_heartbeat>("readHeartbeat"),
         InstanceMethod<&PoolWrap::read_fence>("readFence"), InstanceMethod<&PoolWrap::write_fence>("writeFence"),
         InstanceMethod<&PoolWrap::read_volume_record>("readVolumeRecord"),
         InstanceMethod<&PoolWrap::read_volume_records>("readVolumeRecords"),
         InstanceMethod<&PoolWrap::scan_slabs>("scanSlabs"), InstanceMethod<&PoolWrap::wipe_volume>("wipeVolume"),
         InstanceMethod<&PoolWrap::read_layer_record>("readLayerRecord"),
         InstanceMethod<&PoolWrap::strip_layers>("stripLayers"),
         InstanceMethod<&PoolWrap::merge_layers>("mergeLayers"), InstanceMethod<&PoolWrap::wipe_layers>("wipeLayers"),
         InstanceMethod<&PoolWrap::read_changes>("readChanges"), InstanceMethod<&PoolWrap::look>("look"),
         InstanceMethod<&PoolWrap::grow>("grow"), InstanceMethod<&PoolWrap::close>("close"),
         InstanceMethod<&PoolWrap::stop>("stop")});
  }

 private:
  std::shared_ptr<Dispatcher> dispatcher(const Napi::CallbackInfo& info) {
    return data_of(info.Env())->dispatcher;
  }
  // A read or write of the pool's pages; not after close().
  template <typename T>
  Napi::Value on_disk(const Napi::CallbackInfo& info,
                      std::function<Result<T>(SyncDevice&, const format::Superblock&)> call,
                      std::function<Napi::Value(Napi::Env, T&)> convert) {
    return promise_for<T>(
        info.Env(), dispatcher(info),
        [pool = pool_, call = std::move(call)]() -> Result<T> {
          const std::shared_ptr<EnginePool::Use> use = pool->use();
          if (use == nullptr) return Status{Code::kNotFound, "pool " + pool->info().name + " is closed"};
          return call(pool->device(), pool->info().superblock);
        },
        std::move(convert));
  }
  Napi::Value on_disk_status(const Napi::CallbackInfo& info,
                             std::function<Status(SyncDevice&, const format::Superblock&)> call) {
    return on_disk<bool>(
        info,
        [call = std::move(call)](SyncDevice& device, const format::Superblock& superblock) -> Result<bool> {
          Status status = call(device, superblock);
          if (!status.ok()) return status;
          return true;
        },
        [](Napi::Env env, bool&) { return env.Undefined(); });
  }

  Napi::Value room(const Napi::CallbackInfo& info, std::function<Result<PoolRoom>(EnginePool&)> call) {
    return promise_for<PoolRoom>(
        info.Env(), dispatcher(info),
        [pool = pool_, call = std::move(call)]() -> Result<PoolRoom> {
          const std::shared_ptr<EnginePool::Use> use = pool->use();
          if (use == nullptr) return Status{Code::kNotFound, "pool " + pool->info().name + " is closed"};
          return call(*pool);
        },
        [](Napi::Env env, PoolRoom& value) { return to_js(env, value); });
  }
  Napi::Value look(const Napi::CallbackInfo& info) {
    return room(info, [](EnginePool& pool) { return pool.look(); });
  }
  Napi::Value grow(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const uint64_t limit = u64_argument(info, 0, "deviceBytes");
      return room(info, [limit](EnginePool& pool) { return pool.grow(limit); });
    });
  }
  Napi::Value info(const Napi::CallbackInfo& info) { return to_js(info.Env(), pool_->info()); }
  Napi::Value host_id(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), pool_->spec().host_id);
  }
  Napi::Value generation(const Napi::CallbackInfo& info) { return big(info.Env(), pool_->spec().generation); }
  Napi::Value lock_path(const Napi::CallbackInfo& info) {
    return Napi::String::New(info.Env(), pool_->spec().lock_path);
  }
  Napi::Value lease_state(const Napi::CallbackInfo& info) {
    return Napi::String::New(info.Env(), lease_state_name(pool_->lease_state()));
  }
  Napi::Value volumes(const Napi::CallbackInfo& info) {
    const std::vector<std::shared_ptr<EngineVolume>> volumes = pool_->volumes();
    Napi::Array out = Napi::Array::New(info.Env(), volumes.size());
    for (size_t i = 0; i < volumes.size(); ++i) out.Set(uint32_t(i), wrap_volume(info.Env(), volumes[i]));
    return out;
  }
  Napi::Value open_volume(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      VolumeSpec spec = volume_spec_from(object_argument(info, 0, "spec"));
      bool with_device = true;
      if (!info[1].IsUndefined()) {
        const Napi::Object options = object_argument(info, 1, "options");
        if (!options.Get("device").IsUndefined()) with_device = get_bool(options, "device");
      }
      return promise_for<std::shared_ptr<EngineVolume>>(
          info.Env(), dispatcher(info),
          [pool = pool_, spec = std::move(spec), with_device] { return pool->open_volume(spec, with_device); },
          [](Napi::Env env, std::shared_ptr<EngineVolume>& volume) { return wrap_volume(env, volume); });
    });
  }

  Napi::Value add_slabs(const Napi::CallbackInfo& info) {
    if (!info[0].IsArray()) throw_invalid(info.Env(), "runs must be an array of slab runs");
    Status status = pool_->add_slabs(runs_from(info[0].As<Napi::Array>(), "runs"));
    if (!status.ok()) throw_status(info.Env(), status);
    return info.Env().Undefined();
  }
  Napi::Value declare_full(const Napi::CallbackInfo& info) {
    pool_->stock().declare_full();
    return info.Env().Undefined();
  }
  Napi::Value take_back_slabs(const Napi::CallbackInfo& info) {
    const size_t count =
        info[0].IsUndefined() ? std::numeric_limits<size_t>::max() : u32_argument(info, 0, "count");
    return array_to_js(info.Env(), pool_->stock().take_back(count));
  }
  Napi::Value stock(const Napi::CallbackInfo& info) { return array_to_js(info.Env(), pool_->stock().runs()); }

  Napi::Value read_authority(const Napi::CallbackInfo& info) {
    return on_disk<Authority>(
        info,
        [](SyncDevice& device, const format::Superblock& superblock) {
          return holdfast::read_authority(device, superblock);
        },
        [](Napi::Env env, Authority& value) { return to_js(env, value); });
  }
  Napi::Value claim_authority(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const AuthorityClaim claim = claim_from(object_argument(info, 0, "claim"), pool_->spec().host_id);
      const uint32_t wait_ms = u32_argument(info, 1, "waitMs");
      return on_disk_status(info, [claim, wait_ms](SyncDevice& device, const format::Superblock& superblock) {
        return holdfast::claim_authority(device, superblock, claim, claim_environment(wait_ms));
      });
    });
  }
  // Numbers that the disk format cannot have are an error here, not an assertion further down.
  uint32_t host_argument(const Napi::CallbackInfo& info, uint32_t host_id) {
    if (host_id >= pool_->info().host_slots) {
      throw_invalid(info.Env(), "host id " + std::to_string(host_id) + " is past the pool's " +
                                    std::to_string(pool_->info().host_slots) + " slots");
    }
    return host_id;
  }
  uint32_t volume_slot(const Napi::CallbackInfo& info, uint32_t slot) {
    if (slot >= pool_->info().volume_slots) {
      throw_invalid(info.Env(), "volume slot " + std::to_string(slot) + " is past the pool's " +
                                    std::to_string(pool_->info().volume_slots));
    }
    return slot;
  }
  Napi::Value read_heartbeat(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const uint32_t host = host_argument(info, u32_argument(info, 0, "hostId"));
      return on_disk<Heartbeat>(
          info,
          [host](SyncDevice& device, const format::Superblock& superblock) {
            return holdfast::read_heartbeat(device, superblock, host);
          },
          [](Napi::Env env, Heartbeat& value) { return to_js(env, value); });
    });
  }
  Napi::Value read_fence(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const uint32_t host = host_argument(info, u32_argument(info, 0, "hostId"));
      const uint64_t generation = u64_argument(info, 1, "generation");
      return on_disk<Fence>(
          info,
          [host, generation](SyncDevice& device, const format::Superblock& superblock) {
            return holdfast::read_fence(device, superblock, host, generation);
          },
          [](Napi::Env env, Fence& value) { return to_js(env, value); });
    });
  }
  Napi::Value write_fence(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const Napi::Object victim = object_argument(info, 0, "victim");
      FenceOrder order;
      order.host_id = host_argument(info, get_u32(victim, "hostId"));
      order.generation = get_u64(victim, "generation");
      order.term = get_u64(victim, "term");
      order.incarnation = get_u64(victim, "incarnation");
      order.fencer_host_id = pool_->spec().host_id;
      order.fencer_generation = pool_->spec().generation;
      order.unix_ms = claim_environment(0).unix_ms();
      return on_disk_status(info, [order](SyncDevice& device, const format::Superblock& superblock) {
        return holdfast::write_fence(device, superblock, order);
      });
    });
  }
  Napi::Value read_volume_record(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const uint32_t slot = volume_slot(info, u32_argument(info, 0, "slot"));
      using Found = std::optional<VolumeRecordInfo>;
      return on_disk<Found>(
          info,
          [slot](SyncDevice& device, const format::Superblock& superblock) {
            return holdfast::read_volume_record(device, superblock, slot);
          },
          [](Napi::Env env, Found& value) { return value.has_value() ? to_js(env, *value) : env.Undefined(); });
    });
  }
  Napi::Value read_volume_records(const Napi::CallbackInfo& info) {
    return on_disk<std::vector<VolumeRecordInfo>>(
        info,
        [](SyncDevice& device, const format::Superblock& superblock) {
          std::vector<std::string> damaged;
          return holdfast::read_volume_records(device, superblock, &damaged);
        },
        [](Napi::Env env, std::vector<VolumeRecordInfo>& values) -> Napi::Value { return array_to_js(env, values); });
  }
  Napi::Value scan_slabs(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      if (!info[0].IsArray()) throw_invalid(info.Env(), "runs must be an array of slab runs");
      std::vector<SlabRun> runs = runs_from(info[0].As<Napi::Array>(), "runs");
      return on_disk<std::vector<SlabOwner>>(
          info,
          [runs = std::move(runs)](SyncDevice& device, const format::Superblock& superblock) {
            return holdfast::scan_slabs(device, superblock, runs);
          },
          [](Napi::Env env, std::vector<SlabOwner>& values) -> Napi::Value { return array_to_js(env, values); });
    });
  }
  Napi::Value wipe_volume(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const Napi::Object given = object_argument(info, 0, "volume");
      WipeRequest request;
      request.volume_id = get_u64(given, "volumeId");
      request.slot = volume_slot(info, get_u32(given, "slot"));
      request.closed_epoch = get_u64(given, "closedEpoch");
      const Napi::Array layers = get_array(given, "layers");
      for (uint32_t i = 0; i < layers.Length(); ++i) {
        const Napi::Value value = layers.Get(i);
        if (!value.IsObject()) throw_invalid(info.Env(), "layers must be an array of layers");
        const Napi::Object layer = value.As<Napi::Object>();
        WipeLayer out;
        out.layer_id = get_u64(layer, "layerId");
        out.slot = get_u32(layer, "slot");
        if (out.slot >= pool_->info().layer_slots) {
          throw_invalid(info.Env(), "layer slot " + std::to_string(out.slot) + " is past the pool's " +
                                        std::to_string(pool_->info().layer_slots));
        }
        out.slabs = runs_from(get_array(layer, "slabs"), "slabs");
        request.layers.push_back(std::move(out));
      }
      return on_disk_status(info, [request = std::move(request)](SyncDevice& device,
                                                                 const format::Superblock& superblock) {
        return holdfast::wipe_volume(device, superblock, request);
      });
    });
  }
  uint32_t layer_slot(const Napi::CallbackInfo& info, uint32_t slot) {
    if (slot >= pool_->info().layer_slots) {
      throw_invalid(info.Env(), "layer slot " + std::to_string(slot) + " is past the pool's " +
                                    std::to_string(pool_->info().layer_slots));
    }
    return slot;
  }
  std::vector<LayerSpec> layers_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
    std::vector<LayerSpec> layers = layer_specs_from(info[index], name);
    for (const LayerSpec& layer : layers) layer_slot(info, layer.slot);
    return layers;
  }
  Napi::Value read_layer_record(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const uint32_t slot = layer_slot(info, u32_argument(info, 0, "slot"));
      using Found = std::optional<LayerRecordInfo>;
      return on_disk<Found>(
          info,
          [slot](SyncDevice& device, const format::Superblock& superblock) {
            return holdfast::read_layer_record(device, superblock, slot);
          },
          [](Napi::Env env, Found& value) { return value.has_value() ? to_js(env, *value) : env.Undefined(); });
    });
  }
  Napi::Value merge_layers(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      std::vector<LayerSpec> victims = layers_argument(info, 0, "victims");
      LayerSpec head = layer_spec_from(object_argument(info, 1, "head"));
      layer_slot(info, head.slot);
      const uint32_t permille = u32_argument(info, 2, "skipAbovePermille");
      const uint64_t most = u64_argument(info, 3, "maxBlocks");
      return on_disk<MergeReport>(
          info,
          [victims = std::move(victims), head = std::move(head), permille, most](SyncDevice& device,
                                                                                 const format::Superblock& superblock) {
            return holdfast::merge_layers(device, superblock, victims, head, permille, most, pace());
          },
          [](Napi::Env env, MergeReport& report) { return to_js(env, report); });
    });
  }
  Napi::Value strip_layers(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      std::vector<LayerSpec> victims = layers_argument(info, 0, "victims");
      std::vector<LayerSpec> covers = layers_argument(info, 1, "covers");
      return on_disk<StripReport>(
          info,
          [victims = std::move(victims), covers = std::move(covers)](SyncDevice& device,
                                                                     const format::Superblock& superblock) {
            return holdfast::strip_layers(device, superblock, victims, covers, pace());
          },
          [](Napi::Env env, StripReport& report) { return to_js(env, report); });
    });
  }
  Napi::Value wipe_layers(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      if (!info[0].IsArray()) throw_invalid(info.Env(), "layers must be an array of layers");
      std::vector<WipeLayer> layers;
      const Napi::Array given = info[0].As<Napi::Array>();
      for (uint32_t i = 0; i < given.Length(); ++i) {
        const Napi::Value value = given.Get(i);
        if (!value.IsObject()) throw_invalid(info.Env(), "layers must be an array of layers");
        const Napi::Object layer = value.As<Napi::Object>();
        layers.push_back({get_u64(layer, "layerId"), layer_slot(info, get_u32(layer, "slot")),
                          runs_from(get_array(layer, "slabs"), "slabs")});
      }
      if (!info[1].IsBoolean()) throw_invalid(info.Env(), "tombstone must be true or false");
      const bool tombstone = info[1].As<Napi::Boolean>().Value();
      return on_disk_status(info, [layers = std::move(layers), tombstone](SyncDevice& device,
                                                                          const format::Superblock& superblock) {
        return holdfast::wipe_layers(device, superblock, layers, tombstone, pace());
      });
    });
  }
  Napi::Value read_changes(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      std::vector<LayerSpec> layers = layers_argument(info, 0, "layers");
      const uint64_t size = u64_argument(info, 1, "sizeBytes");
      const uint64_t from = u64_argument(info, 2, "startingOffset");
      const uint32_t ranges = u32_argument(info, 3, "maxRanges");
      return on_disk<ChangeReading>(
          info,
          [layers = std::move(layers), size, from, ranges](SyncDevice& device, const format::Superblock& superblock) {
            return holdfast::read_changes(device, superblock, layers, size, from, ranges, pace());
          },
          [](Napi::Env env, ChangeReading& reading) { return to_js(env, reading); });
    });
  }
  Napi::Value close(const Napi::CallbackInfo& info) {
    return promise_for_status(info.Env(), dispatcher(info), [pool = pool_] { return pool->close(); });
  }
  Napi::Value stop(const Napi::CallbackInfo& info) {
    return promise_for_status(info.Env(), dispatcher(info), [pool = pool_] { return pool->stop(); });
  }

  std::shared_ptr<EnginePool> pool_;
};

Napi::Value wrap_pool(Napi::Env env, std::shared_ptr<EnginePool> pool) {
  return wrap(env, data_of(env)->pool_class, std::move(pool));
}

Napi::Value wrap_pools(Napi::Env env, const std::vector<std::shared_ptr<EnginePool>>& pools) {
  Napi::Array out = Napi::Array::New(env, pools.size());
  for (size_t i = 0; i < pools.size(); ++i) out.Set(uint32_t(i), wrap_pool(env, pools[i]));
  return out;
}

class EngineWrap : public Napi::ObjectWrap<EngineWrap> {
 public:
  explicit EngineWrap(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<EngineWrap>(info), engine_(constructor_argument<Engine>(info)) {}

  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "Engine",
        {InstanceMethod<&EngineWrap::adopt>("adopt"), InstanceMethod<&EngineWrap::open_pool>("openPool"),
         InstanceMethod<&EngineWrap::pools>("pools"), InstanceMethod<&EngineWrap::hand_over>("handOver"),
         InstanceMethod<&EngineWrap::destroy>("destroy")});
  }
  void set_number(uint64_t number) { number_ = number; }

 private:
  std::shared_ptr<Dispatcher> dispatcher(const Napi::CallbackInfo& info) {
    return data_of(info.Env())->dispatcher;
  }
  Napi::Value adopt(const Napi::CallbackInfo& info) {
    return promise_for<std::vector<std::shared_ptr<EnginePool>>>(
        info.Env(), dispatcher(info), [engine = engine_] { return engine->adopt(); },
        [](Napi::Env env, std::vector<std::shared_ptr<EnginePool>>& pools) { return wrap_pools(env, pools); });
  }
  Napi::Value open_pool(const Napi::CallbackInfo& info) {
    return reject_on_throw(info, [&] {
      const Napi::Object given = object_argument(info, 0, "options");
      PoolSpec spec;
      spec.device_path = get_string(given, "devicePath");
      spec.uuid = get_uuid(given, "uuid");
      spec.host_id = get_u32(given, "hostId");
      spec.generation = get_u64(given, "generation");
      spec.node_name = get_string(given, "nodeName");
      spec.machine_id = get_uuid(given, "machineId");
      spec.boot_id = get_uuid(given, "bootId");
      spec.lock_path = get_string(given, "lockPath");
      if (spec.generation == 0) throw_invalid(info.Env(), "generation must be at least 1");
      return promise_for<std::shared_ptr<EnginePool>>(
          info.Env(), dispatcher(info), [engine = engine_, spec] { return engine->open_pool(spec); },
          [](Napi::Env env, std::shared_ptr<EnginePool>& pool) { return wrap_pool(env, pool); });
    });
  }
  Napi::Value pools(const Napi::CallbackInfo& info) { return wrap_pools(info.Env(), engine_->pools()); }
  Napi::Value hand_over(const Napi::CallbackInfo& info) {
    return promise_for_status(info.Env(), dispatcher(info), [engine = engine_] { return engine->hand_over(); });
  }
  Napi::Value destroy(const Napi::CallbackInfo& info) {
    return promise_for<bool>(
        info.Env(), dispatcher(info),
        [engine = engine_]() -> Result<bool> {
          Status status = engine->destroy();
          if (!status.ok()) return status;
          return true;
        },
        [engine = engine_, number = number_](Napi::Env env, bool&) {
          AddonData* data = data_of(env);
          std::erase(data->engines, engine);
          data->event_handlers.erase(number);
          return env.Undefined();
        });
  }

  std::shared_ptr<Engine> engine_;
  uint64_t number_ = 0;
};

}  // namespace

Napi::Value create_engine_js(const Napi::CallbackInfo& info) {
  return reject_on_throw(info, [&] {
    AddonData* data = data_of(info.Env());
    const Napi::Object given = object_argument(info, 0, "options");
    EngineOptions options;
    options.keeper_socket = get_string(given, "keeperSocket");
    options.workers = find_u32(given, "workers").value_or(0);
    if (options.workers > 64) throw_invalid(info.Env(), "workers must be at most 64");
    if (const auto poll = find_u32(given, "pollMicroseconds")) {
      if (*poll > 1000) throw_invalid(info.Env(), "pollMicroseconds must be at most 1000");
      options.poll_ns = uint64_t{*poll} * 1000;
    }
    const Napi::Value handler = given.Get("onEvent");
    if (!handler.IsFunction()) throw_invalid(info.Env(), "onEvent must be a function");
    const uint64_t number = data->next_engine++;
    data->event_handlers[number] = Napi::Persistent(handler.As<Napi::Function>());
    const std::shared_ptr<Dispatcher> dispatcher = data->dispatcher;
    EventSink sink = [dispatcher, number](EngineEvent event) {
      dispatcher->post([number, event = std::move(event)](Napi::Env env) {
        AddonData* owner = data_of(env);
        const auto found = owner->event_handlers.find(number);
        if (found != owner->event_handlers.end()) found->second.Call({to_js(env, event)});
      });
    };
    return promise_for<std::shared_ptr<Engine>>(
        info.Env(), dispatcher, [options, sink] { return Engine::create(options, sink); },
        [number](Napi::Env env, std::shared_ptr<Engine>& engine) -> Napi::Value {
          AddonData* owner = data_of(env);
          owner->engines.push_back(engine);
          const Napi::Object object =
              owner->engine_class.New({Napi::External<std::shared_ptr<Engine>>::New(env, &engine)});
          EngineWrap::Unwrap(object)->set_number(number);
          return object;
        });
  });
}

void define_classes(Napi::Env env, AddonData* data) {
  data->engine_class = Napi::Persistent(EngineWrap::define(env));
  data->pool_class = Napi::Persistent(PoolWrap::define(env));
  data->volume_class = Napi::Persistent(VolumeWrap::define(env));
}

}  // namespace holdfast::addon
