// Between the JS thread and all others: promises for what runs on control threads, and the way back to JS.
//
// One Dispatcher per environment (main thread or worker_threads worker). It keeps the event loop alive exactly while
// a promise of ours is pending. When the environment ends, what is still running is waited for, for a while, and its
// results are dropped.
#pragma once

#include <napi.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "core/status.h"

namespace holdfast::addon {

// An `Error` with `code` HF_…
Napi::Error make_error(Napi::Env env, const Status& status);
[[noreturn]] void throw_status(Napi::Env env, const Status& status);

class Dispatcher : public std::enable_shared_from_this<Dispatcher> {
 public:
  // JS thread.
  explicit Dispatcher(Napi::Env env);
  // Any thread: `call` runs later on the JS thread, in order. Dropped when the environment is ending.
  void post(std::function<void(Napi::Env)> call);
  // JS thread: the event loop stays alive between the two.
  void begin();
  void end();
  // Runs `work` on a thread of its own.
  void spawn(std::function<void()> work);
  // JS thread, when the environment ends: no more calls. False: work is still running after `timeout_ms`.
  void shut();
  bool wait_threads(unsigned timeout_ms);

 private:
  static void call_js(napi_env env, napi_value function, void* context, void* data);

  std::mutex mutex_;
  std::condition_variable idle_;
  napi_threadsafe_function function_ = nullptr;
  bool shut_ = false;
  unsigned threads_ = 0;
  napi_env env_;
  unsigned pending_ = 0;  // JS thread
};

// A promise for `work`, which runs on a control thread and returns a Result. `convert` makes the JS value of it.
template <typename T>
Napi::Value promise_for(Napi::Env env, const std::shared_ptr<Dispatcher>& dispatcher,
                        std::function<Result<T>()> work, std::function<Napi::Value(Napi::Env, T&)> convert) {
  auto deferred = std::make_shared<Napi::Promise::Deferred>(env);
  Napi::Value promise = deferred->Promise();
  dispatcher->begin();
  dispatcher->spawn([dispatcher, deferred, work = std::move(work), convert = std::move(convert)] {
    auto result = std::make_shared<Result<T>>(work());
    dispatcher->post([dispatcher, deferred, result, convert](Napi::Env js) {
      dispatcher->end();
      if (!result->ok()) {
        deferred->Reject(make_error(js, result->status).Value());
        return;
      }
      try {
        deferred->Resolve(convert(js, **result));
      } catch (const Napi::Error& error) {
        deferred->Reject(error.Value());
      }
    });
  });
  return promise;
}

// The same for work without a value.
Napi::Value promise_for_status(Napi::Env env, const std::shared_ptr<Dispatcher>& dispatcher,
                               std::function<Status()> work);

// A call whose arguments are wrong rejects, like every other failure of a promise-returning function.
Napi::Value reject_on_throw(const Napi::CallbackInfo& info, const std::function<Napi::Value()>& call);

}  // namespace holdfast::addon
