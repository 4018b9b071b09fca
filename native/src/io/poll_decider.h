// Whether a worker should poll before it sleeps, by how its waits and its polling went lately.
#pragma once

#include <algorithm>
#include <cstdint>

namespace holdfast {

// Not thread safe: a worker's own.
class PollDecider {
 public:
  // What is waited for: the device, while requests are under way; or the next request, after one was answered.
  enum class Wait : uint8_t { kDevice, kCaller };

  static constexpr uint32_t kFirstRest = 16;    // waits
  static constexpr uint32_t kLongestRest = 4096;
  static constexpr uint32_t kGoodPolls = 256;   // in a row, after which an earlier rest is forgotten

  // Of the waits of this kind so far more than two in three were brief, and the CPU is free for it.
  bool worthwhile(Wait wait) const { return rest_ == 0 && score(wait) >= 4; }

  // A wait is over, with or without polling; `brief`: it took no longer than one would have polled.
  void waited(Wait wait, bool brief) {
    auto& score = score_[static_cast<int>(wait)];
    score = std::clamp(score + (brief ? 1 : -2), 0, 8);
    if (rest_ > 0) --rest_;
  }

  // It was polled. `crowded`: something else took the CPU for long meanwhile, and whoever sleeps gets it back sooner than
  // whoever polls. Then no polling for a while, longer each time.
  void polled(bool crowded) {
    if (crowded) {
      good_ = 0;
      rest_ = next_rest_;
      next_rest_ = std::min(next_rest_ * 2, kLongestRest);
    } else if (++good_ >= kGoodPolls) {
      good_ = 0;
      next_rest_ = kFirstRest;
    }
  }

 private:
  int score(Wait wait) const { return score_[static_cast<int>(wait)]; }

  int score_[2] = {0, 0};
  uint32_t rest_ = 0;
  uint32_t next_rest_ = kFirstRest;
  uint32_t good_ = 0;
};

}  // namespace holdfast
