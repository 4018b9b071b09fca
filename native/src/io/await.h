// Waiting, on a control thread, for what runs on a worker and answers by a callback.
#pragma once

#include <functional>
#include <future>
#include <memory>
#include <utility>

#include "io/worker.h"

namespace holdfast {

// Calls `start(done)` on the worker and returns what `done` was given. `done` may be copied and is called once.
template <typename T>
T await_on(Worker& worker, const std::function<void(std::function<void(T)>)>& start) {
  HF_ASSERT(Worker::current() == nullptr);
  auto promise = std::make_shared<std::promise<std::shared_ptr<T>>>();
  std::future<std::shared_ptr<T>> answer = promise->get_future();
  run_on(worker, [&] {
    start([promise](T value) { promise->set_value(std::make_shared<T>(std::move(value))); });
  });
  return std::move(*answer.get());
}

}  // namespace holdfast
