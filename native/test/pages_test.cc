// Sealing, judging and choosing pages: what is torn, stale, misplaced or someone else's is never followed.
#include "core/pages.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "core/crc32c.h"

namespace holdfast {
namespace {

using format::kPageSize;
using format::SlabPage;
using format::Uuid;
using format::VolumeRecord;

const Uuid kPool = {1, 2, 3};
const Uuid kOther = {9};
constexpr uint64_t kAddress = 8u << 20;

struct Pair {
  PageBuffer memory{2 * kPageSize};
  template <typename Page>
  Page& a() {
    return memory.at<Page>(0);
  }
  template <typename Page>
  Page& b() {
    return memory.at<Page>(kPageSize);
  }
};

// Seals again after a header field was changed on purpose: a page that is intact but says something else.
void reseal_crc(void* page) {
  auto* header = static_cast<format::PageHeader*>(page);
  header->crc32c = 0;
  header->crc32c = crc32c(page, kPageSize);
}

TEST(Pages, ASealedPageIsOkAndAZeroPageIsBlank) {
  Pair pair;
  auto& record = pair.a<VolumeRecord>();
  EXPECT_EQ(verify(record, kPool, kAddress), PageState::kBlank);
  record.volume_id = 5;
  seal(record, kPool, kAddress, 3);
  EXPECT_EQ(verify(record, kPool, kAddress), PageState::kOk);
  EXPECT_EQ(record.header.sequence, 3u);
  EXPECT_EQ(std::memcmp(&record, "HFVO", 4), 0);
}

TEST(Pages, EveryFlippedBitOfAPageIsNoticed) {
  Pair pair;
  auto& record = pair.a<VolumeRecord>();
  record.volume_id = 5;
  seal(record, kPool, kAddress, 3);
  auto* bytes = reinterpret_cast<uint8_t*>(&record);
  for (size_t i = 0; i < kPageSize; i++) {
    const auto mask = static_cast<uint8_t>(1u << (i % 8));
    bytes[i] ^= mask;
    ASSERT_NE(verify(record, kPool, kAddress), PageState::kOk) << "byte " << i;
    bytes[i] ^= mask;
  }
  EXPECT_EQ(verify(record, kPool, kAddress), PageState::kOk);
}

TEST(Pages, ATornPageFailsItsChecksum) {
  Pair pair;
  auto& record = pair.a<VolumeRecord>();
  record.epoch = 1;
  record.parameters[2000] = 'x';
  seal(record, kPool, kAddress, 1);
  pair.b<VolumeRecord>() = record;
  pair.b<VolumeRecord>().epoch = 2;
  pair.b<VolumeRecord>().parameters[2000] = 'y';
  seal(pair.b<VolumeRecord>(), kPool, kAddress, 2);
  for (size_t cut = 512; cut < kPageSize; cut += 512) {
    VolumeRecord torn = record;
    std::memcpy(&torn, &pair.b<VolumeRecord>(), cut);
    const PageState state = verify(torn, kPool, kAddress);
    if (cut <= 2000) {
      EXPECT_EQ(state, PageState::kBadCrc) << cut;
    }
  }
}

TEST(Pages, NamesWhatIsWrong) {
  Pair pair;
  auto& record = pair.a<VolumeRecord>();
  seal(record, kPool, kAddress, 1);
  EXPECT_EQ(verify(record, kOther, kAddress), PageState::kWrongPool);
  EXPECT_EQ(verify(record, kPool, kAddress + kPageSize), PageState::kWrongAddress);
  EXPECT_EQ(verify(record, kOther, kAddress + kPageSize), PageState::kWrongPool);
  EXPECT_EQ(verify(&record, format::kMagicLayer, kPool, kAddress), PageState::kBadMagic);
  record.header.version = format::kVersion + 1;
  EXPECT_EQ(verify(record, kPool, kAddress), PageState::kBadCrc) << "damage is not a newer version";
  reseal_crc(&record);
  EXPECT_EQ(verify(record, kPool, kAddress), PageState::kNewerVersion);
  std::set<std::string> texts;
  for (int i = 0; i <= static_cast<int>(PageState::kWrongAddress); i++) {
    texts.insert(page_state_text(static_cast<PageState>(i)));
  }
  EXPECT_EQ(texts.size(), 7u);
}

TEST(Pages, OfTwoRecordsTheLargerSequenceCountsAndTheOtherCopyIsWrittenNext) {
  Pair pair;
  auto& a = pair.a<VolumeRecord>();
  auto& b = pair.b<VolumeRecord>();
  seal(a, kPool, kAddress, 4);
  seal(b, kPool, kAddress + kPageSize, 5);
  Copies copies = choose_record(a, b, kPool, kAddress);
  EXPECT_EQ(copies.newest, 1);
  EXPECT_EQ(copies.next(), 0);
  EXPECT_FALSE(copies.equal);
  seal(a, kPool, kAddress, 5);
  copies = choose_record(a, b, kPool, kAddress);
  EXPECT_EQ(copies.newest, 0);
  EXPECT_TRUE(copies.equal);
  reinterpret_cast<uint8_t*>(&a)[100] ^= 1;
  copies = choose_record(a, b, kPool, kAddress);
  EXPECT_EQ(copies.newest, 1);
  EXPECT_EQ(copies.next(), 0);
  EXPECT_TRUE(copies.degraded());
  EXPECT_FALSE(copies.bad());
  reinterpret_cast<uint8_t*>(&b)[100] ^= 1;
  copies = choose_record(a, b, kPool, kAddress);
  EXPECT_FALSE(copies.valid());
  EXPECT_TRUE(copies.bad());
  EXPECT_FALSE(copies.blank());
}

TEST(Pages, ATornFirstWriteIsStillBlankButAForeignPageIsDamage) {
  Pair pair;
  auto& a = pair.a<VolumeRecord>();
  auto& b = pair.b<VolumeRecord>();
  EXPECT_TRUE(choose_record(a, b, kPool, kAddress).blank());
  seal(a, kPool, kAddress, 1);
  reinterpret_cast<uint8_t*>(&a)[4000] ^= 1;
  EXPECT_TRUE(choose_record(a, b, kPool, kAddress).blank());
  seal(a, kPool, kAddress + (1u << 20), 1);
  EXPECT_TRUE(choose_record(a, b, kPool, kAddress).bad());
}

// DESIGN 10, data: "page of an old owner with a higher number".
TEST(Pages, AnOldOwnersSlabPageWithAHigherFlushNumberNeverWins) {
  Pair pair;
  auto& a = pair.a<SlabPage>();
  auto& b = pair.b<SlabPage>();
  a.generation = 7;
  seal(a, kPool, kAddress, 1'000'000);
  b.generation = 8;
  seal(b, kPool, kAddress + kPageSize, 1);
  EXPECT_EQ(choose_slab(a, b, kPool, kAddress).newest, 1);
  a.generation = 8;
  seal(a, kPool, kAddress, 2);
  EXPECT_EQ(choose_slab(a, b, kPool, kAddress).newest, 0);
}

TEST(Pages, UuidsAndFieldsGoBothWays) {
  Uuid uuid{};
  ASSERT_TRUE(parse_uuid("00112233-4455-6677-8899-aabbccddeeff", &uuid));
  EXPECT_EQ(uuid_text(uuid), "00112233-4455-6677-8899-aabbccddeeff");
  EXPECT_FALSE(parse_uuid("00112233-4455-6677-8899-aabbccddeef", &uuid));
  EXPECT_FALSE(parse_uuid("00112233x4455-6677-8899-aabbccddeeff", &uuid));
  EXPECT_FALSE(parse_uuid("0011223g-4455-6677-8899-aabbccddeeff", &uuid));
  char field[4] = {'z', 'z', 'z', 'z'};
  EXPECT_FALSE(set_field(field, "12345"));
  EXPECT_EQ(field_text(field), "zzzz");
  EXPECT_TRUE(set_field(field, "ab"));
  EXPECT_EQ(field_text(field), "ab");
  EXPECT_TRUE(set_field(field, "abcd"));
  EXPECT_EQ(field_text(field), "abcd");
}

}  // namespace
}  // namespace holdfast
