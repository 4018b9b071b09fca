// Stacks on another device and makes chosen requests fail: for tests of what the engine does about it.
#pragma once

#include <cstdint>
#include <functional>

#include "block_device.h"

namespace holdfast {

class ErrorDevice final : public BlockDevice {
 public:
  struct Verdict {
    int error = 0;          // 0: passed on
    bool carry_out = false;  // the request is done all the same, only its answer is an error: an unknown outcome
  };
  using Judge = std::function<Verdict(const IoRequest& request)>;

  explicit ErrorDevice(BlockDevice& below) : below_(below) {}
  // Called on the submitting thread for each request. Null: nothing fails.
  void set_judge(Judge judge) { judge_ = std::move(judge); }
  uint64_t size_bytes() const override { return below_.size_bytes(); }
  void submit(IoRequest* request) override;

 private:
  BlockDevice& below_;
  Judge judge_;
};

}  // namespace holdfast
