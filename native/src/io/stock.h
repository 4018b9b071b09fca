// Slabs ahead: granted to this node, not claimed yet (DESIGN 4). One stock per pool. What is in it stands in shared
// memory as well, so that a successor has it with the metadata service away.
//
// A slab leaves the shared table before whoever took it does anything with it. An engine killed right there forgets
// the slab; the metadata service gets it back with the next report of what this host holds. The other order could give
// one slab to two.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/volume.h"
#include "io/shared_memory.h"

namespace holdfast {

class Stock final : public SlabStock {
 public:
  static constexpr size_t kCapacity = 65536;  // slabs: 1 TiB
  static constexpr size_t kTableBytes = kCapacity * 16;

  // `table` is kTableBytes long: zeros, or what another engine left. `low` is told, on any thread and without blocking,
  // how many writes wait for a slab.
  Stock(std::unique_ptr<SharedMemory> table, std::function<void(uint32_t wanted)> low);

  bool take(uint64_t near, Slab* out, Task* waiter, Executor* executor) override;
  bool cancel(Task* waiter) override;
  void put_back(Slab slab) override;
  bool known_full() const override { return full_.load(std::memory_order_acquire); }

  // kNoSpace: the table is full; nothing was added. kAlreadyExists: a slab is in it already.
  Status add(const std::vector<SlabRun>& runs);
  void declare_full();
  // The highest slabs first, so that what stays is together. All without `count`.
  std::vector<SlabRun> take_back(size_t count);
  std::vector<SlabRun> runs() const;
  size_t count() const;
  // Drops a slab that turned out to be taken already.
  void forget(uint64_t slab);
  int table_fd() const { return table_->fd(); }

 private:
  struct Row {
    std::atomic<uint64_t> slab_plus_one;  // 0: empty
    std::atomic<uint64_t> generation;
  };
  struct Held {
    uint64_t generation;
    uint32_t row;
  };
  struct Waiter {
    Task* task;
    Executor* executor;
  };
  static_assert(sizeof(Row) == 16);

  void insert(uint64_t slab, uint64_t generation);
  void remove(std::map<uint64_t, Held>::iterator position);
  void wake_all(std::vector<Waiter> waiters);
  static std::vector<SlabRun> as_runs(const std::map<uint64_t, Held>& slabs);

  std::unique_ptr<SharedMemory> table_;
  std::function<void(uint32_t)> low_;
  mutable std::mutex mutex_;
  std::map<uint64_t, Held> slabs_;
  std::vector<uint32_t> free_rows_;
  std::vector<Waiter> waiters_;
  std::atomic<bool> full_{false};
};

}  // namespace holdfast
