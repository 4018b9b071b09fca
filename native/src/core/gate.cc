// Counting in, holding, letting go; see gate.h for the order that makes it a proof.
#include "gate.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>

namespace holdfast {
namespace {

// A callback turned into something a thread can sleep on. Shared, as the callback may outlive an impatient sleeper.
class Latch {
 public:
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  bool wait(uint64_t timeout_ms) {
    std::unique_lock lock(mutex_);
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    return changed_.wait_until(lock, until, [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

template <typename Gate>
bool wait_for(Gate& gate, uint64_t timeout_ms) {
  auto latch = std::make_shared<Latch>();
  gate.when_idle([latch] { latch->open(); });
  return latch->wait(timeout_ms);
}

}  // namespace

// ---- InFlight

void InFlight::when_idle(std::function<void()> idle) {
  uint64_t before;
  {
    const std::lock_guard lock(mutex_);
    waiters_.push_back(std::move(idle));
    before = word_.fetch_or(kWaiting, std::memory_order_seq_cst);
  }
  // Whoever takes the count to zero after this sees the bit; if it was zero before, nobody will.
  if (before / kOne == 0) fire();
}

void InFlight::fire() {
  std::vector<std::function<void()>> ready;
  {
    const std::lock_guard lock(mutex_);
    // The zero that brought us here may be older than a waiter in the list: it must be seen (again) under the lock.
    if (count() != 0) return;
    ready.swap(waiters_);
    word_.fetch_and(~kWaiting, std::memory_order_seq_cst);
  }
  for (const auto& idle : ready) idle();
}

// ---- PoolGate

PoolGate::PoolGate(std::function<uint64_t()> now_ns) : now_ns_(std::move(now_ns)) { HF_ASSERT(now_ns_); }

PoolGate::~PoolGate() {
  HF_ASSERT(volumes_.empty());
  HF_ASSERT(control_.count() == 0);
}

void PoolGate::renew(uint64_t deadline_ns) {
  const std::lock_guard lock(mutex_);
  if (fenced()) return;
  if (deadline_ns > deadline_ns_.load(std::memory_order_relaxed)) {
    deadline_ns_.store(deadline_ns, std::memory_order_seq_cst);
  }
  for (VolumeGate* volume : volumes_) volume->release();
}

void PoolGate::hold() {
  const std::lock_guard lock(mutex_);
  deadline_ns_.store(0, std::memory_order_seq_cst);
}

void PoolGate::fence() {
  const std::lock_guard lock(mutex_);
  fenced_.store(true, std::memory_order_seq_cst);
  deadline_ns_.store(0, std::memory_order_seq_cst);
  for (VolumeGate* volume : volumes_) volume->release();
}

uint64_t PoolGate::in_flight() const {
  const std::lock_guard lock(mutex_);
  uint64_t total = control_.count();
  for (const VolumeGate* volume : volumes_) total += volume->in_flight();
  return total;
}

void PoolGate::when_idle(std::function<void()> idle) {
  struct Join {
    std::atomic<size_t> left;
    std::function<void()> idle;
  };
  auto join = std::make_shared<Join>();
  join->idle = std::move(idle);
  const auto one = [join] {
    if (join->left.fetch_sub(1, std::memory_order_acq_rel) == 1) join->idle();
  };
  {
    // The lock keeps every volume gate alive while its callback is attached. The last part of the sum is taken after
    // it is let go, so that `idle` never runs under it.
    const std::lock_guard lock(mutex_);
    join->left = volumes_.size() + 2;
    for (VolumeGate* volume : volumes_) volume->when_idle(one);
    control_.when_idle(one);
  }
  one();
}

bool PoolGate::wait_idle(uint64_t timeout_ms) { return wait_for(*this, timeout_ms); }

void PoolGate::add(VolumeGate* volume) {
  const std::lock_guard lock(mutex_);
  volumes_.push_back(volume);
}

void PoolGate::remove(VolumeGate* volume) {
  const std::lock_guard lock(mutex_);
  const auto at = std::find(volumes_.begin(), volumes_.end(), volume);
  HF_ASSERT(at != volumes_.end());
  volumes_.erase(at);
}

PoolGate::Guard::Guard(PoolGate& gate) : gate_(gate) {
  gate_.control_.enter();
  if (gate_.fenced()) {
    status_ = {Code::kFenced, "this host is fenced on the pool, and nothing may be written"};
  } else if (gate_.now_ns() >= gate_.deadline_ns()) {
    status_ = {Code::kLeaseExpired, "this host's lease on the pool has run out; try again when it is renewed"};
  }
}

PoolGate::Guard::~Guard() { gate_.control_.leave(); }

// ---- VolumeGate

struct VolumeGate::Queue : Task {
  VolumeGate* gate = nullptr;
  Executor* executor = nullptr;
  IoRequest* head = nullptr;
  IoRequest* tail = nullptr;
  bool posted = false;
};

VolumeGate::VolumeGate(PoolGate& pool) : pool_(pool) { pool_.add(this); }

VolumeGate::~VolumeGate() {
  pool_.remove(this);
  HF_ASSERT(in_flight_.count() == 0);
  const std::lock_guard lock(mutex_);
  HF_ASSERT(held_ == 0);
}

void VolumeGate::revoke() {
  revoked_.store(true, std::memory_order_seq_cst);
  release();
}

uint64_t VolumeGate::held() const {
  const std::lock_guard lock(mutex_);
  return held_;
}

bool VolumeGate::wait_idle(uint64_t timeout_ms) { return wait_for(*this, timeout_ms); }

VolumeGate::Verdict VolumeGate::look(uint64_t now_ns) const {
  if (revoked() || pool_.fenced()) return Verdict::kRefuse;
  return now_ns < pool_.deadline_ns() ? Verdict::kGo : Verdict::kHold;
}

bool VolumeGate::park(IoRequest* request, Executor* executor) {
  const std::lock_guard lock(mutex_);
  // Renewal opens the gate first and takes this lock to release afterwards: what it opened is seen here.
  const Verdict verdict = look(executor->now_ns());
  if (verdict == Verdict::kGo) return false;
  Queue* queue = nullptr;
  for (const auto& candidate : queues_) {
    if (candidate->executor == executor) queue = candidate.get();
  }
  if (queue == nullptr) {
    queues_.push_back(std::make_unique<Queue>());
    queue = queues_.back().get();
    queue->run = run_queue;
    queue->gate = this;
    queue->executor = executor;
  }
  request->next = nullptr;
  (queue->head == nullptr ? queue->head : queue->tail->next) = request;
  queue->tail = request;
  held_++;
  if (verdict == Verdict::kRefuse && !queue->posted) {
    queue->posted = true;
    executor->post(queue);
  }
  return true;
}

void VolumeGate::release() {
  const std::lock_guard lock(mutex_);
  for (const auto& queue : queues_) {
    if (queue->head == nullptr || queue->posted) continue;
    queue->posted = true;
    queue->executor->post(queue.get());
  }
}

void VolumeGate::run_queue(Task* task) {
  auto* queue = static_cast<Queue*>(task);
  VolumeGate& gate = *queue->gate;
  IoRequest* request;
  {
    const std::lock_guard lock(gate.mutex_);
    request = queue->head;
    queue->head = queue->tail = nullptr;
    queue->posted = false;
  }
  // The last done() may destroy the gate: nothing of it is touched after a request was handed on.
  while (request != nullptr) {
    IoRequest* next = request->next;
    request->next = nullptr;
    {
      const std::lock_guard lock(gate.mutex_);
      HF_ASSERT(gate.held_ > 0);
      gate.held_--;
    }
    reinterpret_cast<GatedDevice*>(request->gate_scratch[1])->resume(request);
    request = next;
  }
}

// ---- GatedDevice

bool GatedDevice::pass(IoRequest* request, Executor* executor, bool* refused) {
  gate_.in_flight_.enter();
  const VolumeGate::Verdict verdict = gate_.look(executor->now_ns());
  *refused = verdict == VolumeGate::Verdict::kRefuse;
  if (verdict != VolumeGate::Verdict::kGo) {
    gate_.in_flight_.leave();
    return false;
  }
  request->gate_scratch[0] = reinterpret_cast<uint64_t>(request->done);
  request->gate_scratch[1] = reinterpret_cast<uint64_t>(this);
  request->done = finished;
  inner_.submit(request);
  return true;
}

void GatedDevice::submit(IoRequest* request) {
  Executor* executor = Executor::current();
  HF_ASSERT(executor != nullptr);
  request->gate_scratch[1] = reinterpret_cast<uint64_t>(this);
  bool refused = false;
  while (!pass(request, executor, &refused)) {
    if (gate_.park(request, executor)) return;
  }
}

void GatedDevice::resume(IoRequest* request) {
  Executor* executor = Executor::current();
  bool refused = false;
  while (!pass(request, executor, &refused)) {
    if (refused) {
      request->done(request, EIO);
      return;
    }
    if (gate_.park(request, executor)) return;
  }
}

void GatedDevice::finished(IoRequest* request, int error) {
  auto* self = reinterpret_cast<GatedDevice*>(request->gate_scratch[1]);
  request->done = reinterpret_cast<void (*)(IoRequest*, int)>(request->gate_scratch[0]);
  // Out of the count before the owner hears of it: "zero in flight" is about the device, and the owner may free us.
  self->gate_.in_flight_.leave();
  request->done(request, error);
}

// ---- GatedSyncDevice

Status GatedSyncDevice::write(uint64_t offset, const void* buffer, size_t length) {
  const PoolGate::Guard guard(gate_);
  return guard.ok() ? inner_.write(offset, buffer, length) : guard.status();
}

Status GatedSyncDevice::write_durable(uint64_t offset, const void* buffer, size_t length) {
  const PoolGate::Guard guard(gate_);
  return guard.ok() ? inner_.write_durable(offset, buffer, length) : guard.status();
}

Status GatedSyncDevice::flush() {
  const PoolGate::Guard guard(gate_);
  return guard.ok() ? inner_.flush() : guard.status();
}

Status GatedSyncDevice::discard(uint64_t offset, uint64_t length) {
  const PoolGate::Guard guard(gate_);
  return guard.ok() ? inner_.discard(offset, length) : guard.status();
}

Status GatedSyncDevice::zero(uint64_t offset, uint64_t length) {
  const PoolGate::Guard guard(gate_);
  return guard.ok() ? inner_.zero(offset, length) : guard.status();
}

}  // namespace holdfast
