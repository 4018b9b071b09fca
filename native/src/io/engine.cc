// The engine's threads, its pools by UUID, and the house-keeping: see engine.h.
#include "io/engine.h"

#include <ctime>
#include <utility>

namespace holdfast {

namespace {

constexpr auto kHousekeeping = std::chrono::milliseconds(100);
constexpr unsigned kKeeperCheckEvery = 20;  // rounds of house-keeping

unsigned default_workers() {
  const unsigned cpus = std::thread::hardware_concurrency();
  return cpus < 2 ? 2 : cpus > 8 ? 8 : cpus;
}

}  // namespace

uint64_t boottime_ns() {
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

Result<std::shared_ptr<Engine>> Engine::create(const EngineOptions& options, EventSink sink) {
  HF_ASSERT(sink != nullptr);
  Result<std::unique_ptr<KeeperClient>> keeper = KeeperClient::connect(options.keeper_socket);
  if (!keeper.ok()) return keeper.status;
  std::shared_ptr<Engine> engine(new Engine());
  engine->sink_ = std::move(sink);
  engine->keeper_ = std::move(*keeper);
  const unsigned count = options.workers == 0 ? default_workers() : options.workers;
  for (unsigned i = 0; i < count; ++i) {
    Result<std::unique_ptr<Worker>> worker = Worker::start(i, options.poll_ns);
    if (!worker.ok()) return worker.status;
    engine->workers_.push_back(std::move(*worker));
  }
  engine->housekeeper_ = std::thread([raw = engine.get()] { raw->housekeep(); });
  return engine;
}

Engine::~Engine() {
  {
    std::lock_guard lock(housekeeping_mutex_);
    housekeeping_stop_ = true;
  }
  housekeeping_wake_.notify_all();
  if (housekeeper_.joinable()) housekeeper_.join();
  HF_ASSERT(pools_.empty());
}

void Engine::housekeep() {
  std::unique_lock lock(housekeeping_mutex_);
  for (unsigned round = 1; !housekeeping_stop_; ++round) {
    housekeeping_wake_.wait_for(lock, kHousekeeping);
    if (housekeeping_stop_) return;
    lock.unlock();
    for (const auto& pool : pools()) pool->watch_lease();
    if (round % kKeeperCheckEvery == 0) check_keeper();
    lock.lock();
  }
}

// A keeper that was restarted has nothing any more: it is given everything again.
void Engine::check_keeper() {
  if (keeper_->list().ok()) return;
  if (!keeper_->reconnect().ok()) return;
  for (const auto& pool : pools()) {
    // An entry that can't be kept now is tried again with the next change of it; I/O does not depend on it.
    if (!pool->keep().ok()) return;
    for (const auto& volume : pool->volumes()) {
      if (!volume->keep().ok()) return;
    }
  }
}

std::vector<std::shared_ptr<EnginePool>> Engine::pools() const {
  std::lock_guard lock(pools_mutex_);
  std::vector<std::shared_ptr<EnginePool>> pools;
  for (const auto& [uuid, pool] : pools_) {
    if (pool != nullptr) pools.push_back(pool);  // null: its name is taken, it is being opened
  }
  return pools;
}

Result<std::shared_ptr<EnginePool>> Engine::open_pool(const PoolSpec& spec) {
  auto pool = std::make_shared<EnginePool>(shared_from_this(), spec);
  {
    // The name is taken first, so that two calls cannot open one pool.
    std::lock_guard lock(pools_mutex_);
    if (pools_.count(spec.uuid) != 0) {
      return Status{Code::kAlreadyExists, "pool " + uuid_text(spec.uuid) + " is open in this engine; close it first"};
    }
    pools_[spec.uuid] = nullptr;
  }
  Status status = pool->open(false);
  std::lock_guard lock(pools_mutex_);
  if (!status.ok()) {
    pools_.erase(spec.uuid);
    return status;
  }
  pools_[spec.uuid] = pool;
  return pool;
}

Result<std::vector<std::shared_ptr<EnginePool>>> Engine::adopt() {
  Result<std::vector<std::string>> names = keeper_->list();
  if (!names.ok()) return names.status;
  struct Adoption {
    std::shared_ptr<EnginePool> pool;
    Status status;
    std::thread thread;
  };
  std::vector<Adoption> adoptions;
  const auto close_all = [](const std::vector<int>& fds) {
    for (int fd : fds) close(fd);
  };
  for (const std::string& name : *names) {
    if (name.rfind("pool/", 0) != 0) continue;
    Result<KeptEntry> entry = keeper_->get(name);
    if (!entry.ok()) return entry.status;
    Result<PoolSpec> spec = decode_pool(entry->blob);
    if (!spec.ok() || entry->fds.size() != 1) {
      close_all(entry->fds);
      return spec.ok() ? Status{Code::kCorrupt, "the keeper's entry " + name + " lacks its stock"} : spec.status;
    }
    Result<std::unique_ptr<SharedMemory>> table = SharedMemory::adopt(entry->fds[0]);
    if (!table.ok()) return table.status;
    Adoption adoption;
    adoption.pool = std::make_shared<EnginePool>(shared_from_this(), *spec);
    EnginePool* raw = adoption.pool.get();
    if ((*table)->size() == Stock::kTableBytes) {
      raw->stock_ = std::make_unique<Stock>(std::move(*table), [raw](uint32_t wanted) {
        EngineEvent event;
        event.type = EngineEvent::Type::kSlabsLow;
        event.wanted = wanted;
        raw->emit(std::move(event));
      });
    }
    adoptions.push_back(std::move(adoption));
  }
  // Side by side: a pool whose disk is slow, or whose dead engine's I/O is still under way, does not hold up others.
  for (Adoption& adoption : adoptions) {
    adoption.thread = std::thread([&adoption] { adoption.status = adoption.pool->open(true); });
  }
  std::vector<std::shared_ptr<EnginePool>> adopted;
  Status failed;
  for (Adoption& adoption : adoptions) {
    adoption.thread.join();
    if (adoption.status.ok()) {
      {
        std::lock_guard lock(pools_mutex_);
        pools_[adoption.pool->spec().uuid] = adoption.pool;
      }
      adopted.push_back(adoption.pool);
    } else {
      failed = adoption.status;
    }
  }
  for (const auto& pool : adopted) pool->adopt_volumes();
  if (adopted.empty() && !failed.ok()) return failed;
  return adopted;
}

Status Engine::hand_over(unsigned timeout_ms) {
  for (const auto& pool : pools()) {
    Status status = pool->let_go(timeout_ms);
    if (!status.ok()) return status;
    std::lock_guard lock(pools_mutex_);
    pools_.erase(pool->spec().uuid);
  }
  return {};
}

Status Engine::destroy() {
  {
    std::lock_guard lock(pools_mutex_);
    if (!pools_.empty()) {
      return {Code::kBusy, std::to_string(pools_.size()) + " pools are open; close them, or hand them over"};
    }
  }
  {
    std::lock_guard lock(housekeeping_mutex_);
    housekeeping_stop_ = true;
  }
  housekeeping_wake_.notify_all();
  if (housekeeper_.joinable()) housekeeper_.join();
  workers_.clear();
  return {};
}

}  // namespace holdfast
