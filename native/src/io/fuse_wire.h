// What of the FUSE kernel protocol is newer than the headers that this may be built with. Numbers are the kernel's ABI.
#pragma once

#include <linux/fuse.h>

#include <cstdint>

namespace holdfast::fuse_wire {

inline constexpr uint32_t kOpenParallelDirectWrites = 1u << 6;  // 7.38, kernel 6.2
inline constexpr uint64_t kInitHasResend = 1ull << 39;          // 7.40, kernel 6.9
inline constexpr uint64_t kInitExtended = 1ull << 30;           // 7.36, kernel 5.17
inline constexpr int kNotifyResend = 7;
inline constexpr uint32_t kOpStatx = 52;

}  // namespace holdfast::fuse_wire
