// CRC32C (Castagnoli), the check of every page in a pool. Uses the processor's instruction where there is one,
// found at run time, so that one binary serves every machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace holdfast {

// Continues from `crc`; begin with 0. crc32c("123456789") is 0xe3069283.
uint32_t crc32c(const void* data, size_t length, uint32_t crc = 0);

// The portable implementation, which crc32c() falls back to. Public so that a test can hold both together.
uint32_t crc32c_portable(const void* data, size_t length, uint32_t crc = 0);

}  // namespace holdfast
