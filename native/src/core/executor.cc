// Which executor the calling thread is; see executor.h.
#include "executor.h"

namespace holdfast {

namespace {
thread_local Executor* current_executor = nullptr;
}

Executor* Executor::current() { return current_executor; }

void Executor::set_current(Executor* executor) { current_executor = executor; }

}  // namespace holdfast
