// See delay_device.h.
#include "delay_device.h"

#include <new>

#include "status.h"

namespace holdfast {

namespace {

struct Later : Task {
  IoRequest* request = nullptr;
  BlockDevice* below = nullptr;
};
static_assert(sizeof(Later) <= sizeof(IoRequest::device_scratch));

}  // namespace

void DelayDevice::submit(IoRequest* request) {
  const uint64_t delay = delay_ ? delay_(*request) : 0;
  if (delay == 0) return below_.submit(request);
  if (delay == kHold) {
    held_.push_back(request);
    return;
  }
  auto* later = new (request->device_scratch) Later;
  later->request = request;
  later->below = &below_;
  later->run = [](Task* task) {
    auto* self = static_cast<Later*>(task);
    self->below->submit(self->request);
  };
  Executor* executor = Executor::current();
  executor->post_at(later, executor->now_ns() + delay);
}

void DelayDevice::let_go(size_t index) {
  HF_ASSERT(index < held_.size());
  IoRequest* request = held_[index];
  held_.erase(held_.begin() + static_cast<ptrdiff_t>(index));
  below_.submit(request);
}

void DelayDevice::let_all_go() {
  while (!held_.empty()) let_go(0);
}

}  // namespace holdfast
