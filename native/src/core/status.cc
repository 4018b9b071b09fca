// The stable names of status codes.
#include "status.h"

namespace holdfast {

const char* code_name(Code code) {
  switch (code) {
    case Code::kOk: return "OK";
    case Code::kInvalidArgument: return "INVALID_ARGUMENT";
    case Code::kNotFound: return "NOT_FOUND";
    case Code::kAlreadyExists: return "ALREADY_EXISTS";
    case Code::kBusy: return "BUSY";
    case Code::kNotAPool: return "NOT_A_POOL";
    case Code::kWrongPool: return "WRONG_POOL";
    case Code::kUnsupported: return "UNSUPPORTED";
    case Code::kCorrupt: return "CORRUPT";
    case Code::kForeignData: return "FOREIGN_DATA";
    case Code::kTooSmall: return "TOO_SMALL";
    case Code::kNoSpace: return "NO_SPACE";
    case Code::kIo: return "IO";
    case Code::kFenced: return "FENCED";
    case Code::kStale: return "STALE";
    case Code::kLeaseExpired: return "LEASE_EXPIRED";
    case Code::kUnavailable: return "UNAVAILABLE";
    case Code::kHoldExpired: return "HOLD_EXPIRED";
  }
  HF_ASSERT(!"a code without a name");
  return "";
}

}  // namespace holdfast
