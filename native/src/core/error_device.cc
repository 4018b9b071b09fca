// See error_device.h.
#include "error_device.h"

#include "memory_device.h"

namespace holdfast {

namespace {

// The caller's request is carried out by a copy; the caller gets the error.
struct Shadow {
  IoRequest request;
  IoRequest* original = nullptr;
  int error = 0;
};

}  // namespace

void ErrorDevice::submit(IoRequest* request) {
  const Verdict verdict = judge_ ? judge_(*request) : Verdict{};
  if (verdict.error == 0) return below_.submit(request);
  if (!verdict.carry_out) return IoAnswer::post(Executor::current(), request, verdict.error);
  auto* shadow = new Shadow;
  shadow->request.op = request->op;
  shadow->request.fua = request->fua;
  shadow->request.offset = request->offset;
  shadow->request.length = request->length;
  shadow->request.iov = request->iov;
  shadow->request.iov_count = request->iov_count;
  shadow->request.user = shadow;
  shadow->request.done = [](IoRequest* self, int) {
    auto* done = static_cast<Shadow*>(self->user);
    IoRequest* original = done->original;
    const int error = done->error;
    delete done;
    original->done(original, error);
  };
  shadow->original = request;
  shadow->error = verdict.error;
  below_.submit(&shadow->request);
}

}  // namespace holdfast
