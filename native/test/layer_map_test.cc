// The forward map and the slab table against plain containers, and what they cost.
#include "core/layer_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "core/sim_disk.h"
#include "core/slab_table.h"

namespace holdfast::test {
namespace {

TEST(LayerMap, MatchesAPlainMapUnderRandomChanges) {
  for (uint64_t seed = 1; seed <= 20; seed++) {
    SimRandom random(seed);
    LayerMap map;
    const uint32_t chunks = seed % 2 == 0 ? 20'000 : 5'000;
    map.resize(chunks);
    std::map<uint32_t, Place> plain;
    for (int i = 0; i < 20'000; i++) {
      const auto chunk = static_cast<uint32_t>(random.below(chunks));
      auto at = plain.lower_bound(chunk);
      const uint32_t room = (at == plain.end() ? chunks : at->first) - chunk;
      if (at != plain.end() && at->first == chunk) {
        map.erase(chunk);
        plain.erase(at);
      } else if (room > 0) {
        const auto count =
            static_cast<uint32_t>(1 + random.below(std::min<uint32_t>(room, random.chance(200) ? 300 : 3)));
        const auto place = static_cast<Place>(random.chance(500) ? chunk + 77 : random.below(1u << 30));
        map.set_run(chunk, count, place);
        for (uint32_t k = 0; k < count; k++) plain[chunk + k] = place + k;
      }
      if (i % 16 != 0) continue;
      const auto from = static_cast<uint32_t>(random.below(chunks));
      const auto next = plain.lower_bound(from);
      ASSERT_EQ(map.next_mapped(from, chunks), next == plain.end() ? chunks : next->first);
      ASSERT_EQ(map.find(from), plain.count(from) > 0 ? plain[from] : kNoPlace);
      Place place = kNoPlace;
      const uint32_t distance = map.find_before(from, 64, &place);
      uint32_t expected = 0;
      if (auto before = plain.lower_bound(from); before != plain.begin()) {
        const uint32_t away = from - std::prev(before)->first;
        if (away <= 64) expected = away;
      }
      ASSERT_EQ(distance, expected);
      if (distance > 0) {
        ASSERT_EQ(place, plain[from - distance]);
      }
    }
    for (uint32_t c = 0; c < chunks; c++) {
      const auto at = plain.find(c);
      ASSERT_EQ(map.find(c), at == plain.end() ? kNoPlace : at->second);
    }
    while (!plain.empty()) {
      map.erase(plain.begin()->first);
      plain.erase(plain.begin());
    }
    EXPECT_LT(map.memory_bytes(), 4096u) << "an empty map costs next to nothing";
  }
}

TEST(SlabTable, KeepsEveryEntryInEveryForm) {
  SimRandom random(5);
  for (int round = 0; round < 200; round++) {
    SlabTable table;
    const uint32_t index = table.add();
    format::SlabEntry entries[format::kChunksPerSlab];
    const uint64_t pieces = 1 + random.below(40);
    uint32_t c = 0;
    while (c < format::kChunksPerSlab) {
      const auto length = static_cast<uint32_t>(1 + random.below(2 * format::kChunksPerSlab / pieces));
      const auto logical = static_cast<uint32_t>(random.below(1u << 30));
      const auto data = static_cast<uint16_t>(random.next());
      const bool free = random.chance(200);
      for (uint32_t k = 0; k < length && c < format::kChunksPerSlab; k++, c++) {
        entries[c] = free ? kFreeEntry : format::SlabEntry{logical + k, data, static_cast<uint16_t>(~data)};
      }
    }
    table.load(index, entries);
    const auto same = [&] {
      for (uint32_t i = 0; i < format::kChunksPerSlab; i++) {
        const format::SlabEntry entry = table.entry(index, i);
        if (std::memcmp(&entry, &entries[i], sizeof entry) != 0) return false;
      }
      return true;
    };
    EXPECT_TRUE(same());
    table.plain(index);
    EXPECT_TRUE(same());
    table.pack(index);
    EXPECT_TRUE(same());
  }
}

}  // namespace
}  // namespace holdfast::test
