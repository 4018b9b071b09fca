// See stock.h.
#include "io/stock.h"

#include <algorithm>
#include <string>

namespace holdfast {

Stock::Stock(std::unique_ptr<SharedMemory> table, std::function<void(uint32_t)> low)
    : table_(std::move(table)), low_(std::move(low)) {
  HF_ASSERT(table_->size() == kTableBytes);
  Row* rows = static_cast<Row*>(table_->data());
  for (size_t i = kCapacity; i-- > 0;) {
    const uint64_t slab = rows[i].slab_plus_one.load(std::memory_order_acquire);
    if (slab == 0) {
      free_rows_.push_back(uint32_t(i));
    } else {
      slabs_[slab - 1] = {rows[i].generation.load(std::memory_order_relaxed), uint32_t(i)};
    }
  }
}

void Stock::insert(uint64_t slab, uint64_t generation) {
  HF_ASSERT(!free_rows_.empty());
  const uint32_t index = free_rows_.back();
  free_rows_.pop_back();
  Row& row = static_cast<Row*>(table_->data())[index];
  row.generation.store(generation, std::memory_order_relaxed);
  row.slab_plus_one.store(slab + 1, std::memory_order_release);
  const bool fresh = slabs_.emplace(slab, Held{generation, index}).second;
  HF_ASSERT(fresh);
}

void Stock::remove(std::map<uint64_t, Held>::iterator position) {
  Row& row = static_cast<Row*>(table_->data())[position->second.row];
  row.slab_plus_one.store(0, std::memory_order_release);
  free_rows_.push_back(position->second.row);
  slabs_.erase(position);
}

bool Stock::take(uint64_t near, Slab* out, Task* waiter, Executor* executor) {
  uint32_t wanted = 0;
  {
    std::lock_guard lock(mutex_);
    if (!slabs_.empty()) {
      auto position = slabs_.lower_bound(near);
      if (position == slabs_.end()) position = slabs_.begin();
      *out = {position->first, position->second.generation};
      remove(position);
      return true;
    }
    if (waiter == nullptr) return false;
    HF_ASSERT(executor != nullptr);
    waiters_.push_back({waiter, executor});
    wanted = uint32_t(waiters_.size());
  }
  low_(wanted);
  return false;
}

bool Stock::cancel(Task* waiter) {
  std::lock_guard lock(mutex_);
  const auto found = std::find_if(waiters_.begin(), waiters_.end(), [&](const Waiter& w) { return w.task == waiter; });
  if (found == waiters_.end()) return false;
  waiters_.erase(found);
  return true;
}

void Stock::wake_all(std::vector<Waiter> waiters) {
  for (const Waiter& waiter : waiters) waiter.executor->post(waiter.task);
}

void Stock::put_back(Slab slab) {
  std::lock_guard lock(mutex_);
  insert(slab.slab, slab.generation);
  // Posted under the lock, so that cancel()'s "posted already" is true when it says so.
  wake_all(std::exchange(waiters_, {}));
}

Status Stock::add(const std::vector<SlabRun>& runs) {
  std::lock_guard lock(mutex_);
  uint64_t count = 0;
  std::map<uint64_t, uint64_t> given;  // first slab to one past the last
  const auto twice = [](uint64_t slab) {
    return Status{Code::kAlreadyExists, "slab " + std::to_string(slab) + " is in the stock already, or given twice"};
  };
  for (const SlabRun& run : runs) {
    if (run.count == 0) continue;
    count += run.count;
    const auto next = slabs_.lower_bound(run.first);
    if (next != slabs_.end() && next->first < run.first + run.count) return twice(next->first);
    const auto after = given.upper_bound(run.first);
    if (after != given.end() && after->first < run.first + run.count) return twice(after->first);
    if (after != given.begin() && std::prev(after)->second > run.first) return twice(run.first);
    given[run.first] = run.first + run.count;
  }
  if (count > free_rows_.size()) {
    return {Code::kNoSpace, "the stock holds at most " + std::to_string(kCapacity) + " slabs; " +
                                std::to_string(free_rows_.size()) + " more fit, " + std::to_string(count) +
                                " were given"};
  }
  for (const SlabRun& run : runs) {
    for (uint32_t i = 0; i < run.count; ++i) insert(run.first + i, run.generation);
  }
  if (count > 0) {
    full_.store(false, std::memory_order_release);
    wake_all(std::exchange(waiters_, {}));
  }
  return {};
}

void Stock::declare_full() {
  std::lock_guard lock(mutex_);
  if (!slabs_.empty()) return;
  full_.store(true, std::memory_order_release);
  wake_all(std::exchange(waiters_, {}));
}

std::vector<SlabRun> Stock::as_runs(const std::map<uint64_t, Held>& slabs) {
  std::vector<SlabRun> runs;
  for (const auto& [slab, held] : slabs) {
    if (!runs.empty() && runs.back().first + runs.back().count == slab && runs.back().generation == held.generation) {
      ++runs.back().count;
    } else {
      runs.push_back({slab, 1, held.generation});
    }
  }
  return runs;
}

std::vector<SlabRun> Stock::take_back(size_t count) {
  std::lock_guard lock(mutex_);
  std::map<uint64_t, Held> taken;
  while (taken.size() < count && !slabs_.empty()) {
    auto last = std::prev(slabs_.end());
    taken.insert(*last);
    remove(last);
  }
  return as_runs(taken);
}

std::vector<SlabRun> Stock::runs() const {
  std::lock_guard lock(mutex_);
  return as_runs(slabs_);
}

size_t Stock::count() const {
  std::lock_guard lock(mutex_);
  return slabs_.size();
}

void Stock::forget(uint64_t slab) {
  std::lock_guard lock(mutex_);
  const auto found = slabs_.find(slab);
  if (found != slabs_.end()) remove(found);
}

}  // namespace holdfast
