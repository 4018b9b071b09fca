// Stacks on another device and holds requests back: for a set time each, or until they are let go one by one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "block_device.h"
#include "executor.h"

namespace holdfast {

class DelayDevice final : public BlockDevice {
 public:
  static constexpr uint64_t kHold = ~uint64_t{0};
  // Nanoseconds that the request waits before it goes on; 0: none; kHold: until let_go().
  using Delay = std::function<uint64_t(const IoRequest& request)>;

  explicit DelayDevice(BlockDevice& below) : below_(below) {}
  void set_delay(Delay delay) { delay_ = std::move(delay); }
  uint64_t size_bytes() const override { return below_.size_bytes(); }
  void submit(IoRequest* request) override;

  // One thread only.
  size_t held() const { return held_.size(); }
  void let_go(size_t index);
  void let_all_go();
  const IoRequest& held_request(size_t index) const { return *held_[index]; }

 private:
  BlockDevice& below_;
  Delay delay_;
  std::vector<IoRequest*> held_;
};

}  // namespace holdfast
