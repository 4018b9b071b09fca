// See control.h.
#include "addon/control.h"

#include <pthread.h>

#include <chrono>

namespace holdfast::addon {

Napi::Error make_error(Napi::Env env, const Status& status) {
  Napi::Error error = Napi::Error::New(env, status.message);
  error.Set("code", Napi::String::New(env, std::string("HF_") + code_name(status.code)));
  return error;
}

void throw_status(Napi::Env env, const Status& status) { throw make_error(env, status); }

Dispatcher::Dispatcher(Napi::Env env) : env_(env) {
  napi_value name = Napi::String::New(env, "holdfast");
  const napi_status made = napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, nullptr,
                                                           &Dispatcher::call_js, &function_);
  HF_ASSERT(made == napi_ok);
  // Events alone do not keep a process alive.
  napi_unref_threadsafe_function(env, function_);
}

void Dispatcher::call_js(napi_env env, napi_value, void*, void* data) {
  std::unique_ptr<std::function<void(Napi::Env)>> call(static_cast<std::function<void(Napi::Env)>*>(data));
  if (env == nullptr) return;  // the environment is gone
  Napi::HandleScope scope(env);
  try {
    (*call)(Napi::Env(env));
  } catch (const Napi::Error& error) {
    // Thrown by a JS callback of ours, or by promises of a worker that is being terminated. Nobody waits for it here.
    bool terminating = false;
    napi_is_exception_pending(env, &terminating);
    if (!terminating) napi_fatal_exception(env, error.Value());
  }
}

void Dispatcher::post(std::function<void(Napi::Env)> call) {
  auto data = std::make_unique<std::function<void(Napi::Env)>>(std::move(call));
  std::lock_guard lock(mutex_);
  if (shut_) return;
  if (napi_call_threadsafe_function(function_, data.get(), napi_tsfn_nonblocking) == napi_ok) {
    data.release();  // call_js has it
  }
}

void Dispatcher::begin() {
  if (pending_++ == 0) napi_ref_threadsafe_function(env_, function_);
}

void Dispatcher::end() {
  HF_ASSERT(pending_ > 0);
  if (--pending_ == 0) napi_unref_threadsafe_function(env_, function_);
}

void Dispatcher::spawn(std::function<void()> work) {
  {
    std::lock_guard lock(mutex_);
    ++threads_;
  }
  std::thread([self = shared_from_this(), work = std::move(work)]() mutable {
    pthread_setname_np(pthread_self(), "hf-control");
    work();
    work = nullptr;  // what it holds is let go before anybody is told that it is over
    std::lock_guard lock(self->mutex_);
    if (--self->threads_ == 0) self->idle_.notify_all();
  }).detach();
}

void Dispatcher::shut() {
  std::lock_guard lock(mutex_);
  if (shut_) return;
  shut_ = true;
  napi_release_threadsafe_function(function_, napi_tsfn_abort);
}

bool Dispatcher::wait_threads(unsigned timeout_ms) {
  std::unique_lock lock(mutex_);
  return idle_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] { return threads_ == 0; });
}

Napi::Value promise_for_status(Napi::Env env, const std::shared_ptr<Dispatcher>& dispatcher,
                               std::function<Status()> work) {
  return promise_for<bool>(
      env, dispatcher,
      [work = std::move(work)]() -> Result<bool> {
        Status status = work();
        if (!status.ok()) return status;
        return true;
      },
      [](Napi::Env js, bool&) { return js.Undefined(); });
}

Napi::Value reject_on_throw(const Napi::CallbackInfo& info, const std::function<Napi::Value()>& call) {
  try {
    return call();
  } catch (const Napi::Error& error) {
    Napi::Promise::Deferred deferred(info.Env());
    deferred.Reject(error.Value());
    return deferred.Promise();
  }
}

}  // namespace holdfast::addon
