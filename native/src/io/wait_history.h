// Whether a worker's waits were brief lately, so that polling for the end of the next one is worth its CPU time.
#pragma once

#include <algorithm>

namespace holdfast {

// Not thread safe: a worker's own.
class WaitHistory {
 public:
  // A wait is over; `brief`: it took no longer than one would have polled.
  void add(bool brief) { score_ = std::clamp(score_ + (brief ? 1 : -2), 0, 8); }
  // So far more than two in three were: what polling gains outweighs what it wastes.
  bool mostly_brief() const { return score_ >= 4; }

 private:
  int score_ = 0;
};

}  // namespace holdfast
