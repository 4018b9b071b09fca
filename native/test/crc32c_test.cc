// CRC32C against published vectors, and the two implementations against each other.
#include "core/crc32c.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

namespace holdfast {
namespace {

TEST(Crc32c, MatchesThePublishedVectors) {
  // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
  EXPECT_EQ(crc32c("123456789", 9), 0xe3069283u);
  const std::vector<uint8_t> zeros(32, 0x00);
  const std::vector<uint8_t> ones(32, 0xff);
  EXPECT_EQ(crc32c(zeros.data(), 32), 0x8a9136aau);
  EXPECT_EQ(crc32c(ones.data(), 32), 0x62a8ab43u);
  std::vector<uint8_t> rising(32);
  for (size_t i = 0; i < 32; i++) rising[i] = static_cast<uint8_t>(i);
  EXPECT_EQ(crc32c(rising.data(), 32), 0x46dd794eu);
  EXPECT_EQ(crc32c_portable("123456789", 9), 0xe3069283u);
}

TEST(Crc32c, BothImplementationsAgreeAtEveryLengthAndAlignment) {
  std::mt19937_64 random(7);
  std::vector<uint8_t> data(4096 + 64);
  for (auto& byte : data) byte = static_cast<uint8_t>(random());
  for (size_t offset = 0; offset < 9; offset++) {
    for (size_t length = 0; length < 300; length++) {
      ASSERT_EQ(crc32c(&data[offset], length), crc32c_portable(&data[offset], length)) << offset << ' ' << length;
    }
    ASSERT_EQ(crc32c(&data[offset], 4096), crc32c_portable(&data[offset], 4096));
  }
}

TEST(Crc32c, ContinuesWhereItStopped) {
  std::vector<uint8_t> data(1000);
  for (size_t i = 0; i < data.size(); i++) data[i] = static_cast<uint8_t>(i * 31);
  const uint32_t whole = crc32c(data.data(), data.size());
  for (size_t cut = 0; cut <= data.size(); cut += 37) {
    EXPECT_EQ(crc32c(&data[cut], data.size() - cut, crc32c(data.data(), cut)), whole);
    EXPECT_EQ(crc32c_portable(&data[cut], data.size() - cut, crc32c_portable(data.data(), cut)), whole);
  }
}

}  // namespace
}  // namespace holdfast
