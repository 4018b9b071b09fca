// See sim_disk.h for the fault model.
#include "sim_disk.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "format.h"
#include "status.h"

namespace holdfast {

using format::kBlockSize;

namespace {
constexpr uint64_t kGarbage = 0xbadbadbadu;
}  // namespace

SimDisk::SimDisk(uint64_t size_bytes, uint64_t seed, std::function<bool(uint64_t)> is_page)
    : size_bytes_(size_bytes), random_(seed), is_page_(std::move(is_page)) {}

SimDisk::Content SimDisk::content_of(const std::byte* memory) {
  Content content;
  std::memcpy(&content.word, memory, sizeof content.word);
  if (std::memcmp(memory, memory + sizeof content.word, kBlockSize - sizeof content.word) == 0) return content;
  content.bytes.reset(new std::byte[kBlockSize]);
  std::memcpy(content.bytes.get(), memory, kBlockSize);
  return content;
}

void SimDisk::render(const Content& content, std::byte* to) {
  if (content.bytes != nullptr) {
    std::memcpy(to, content.bytes.get(), kBlockSize);
    return;
  }
  for (size_t at = 0; at < kBlockSize; at += sizeof content.word)
    std::memcpy(to + at, &content.word, sizeof content.word);
}

SimDisk::Content SimDisk::untouched(uint64_t block) const {
  return {is_page_(block) ? 0 : kGarbage << 28 | (block & 0xfffffff), nullptr};
}

SimDisk::Block& SimDisk::block_at(uint64_t block) {
  auto [at, fresh] = blocks_.try_emplace(block);
  if (fresh) at->second.durable = untouched(block);
  return at->second;
}

void SimDisk::apply(uint64_t number, Content content, bool durable) {
  Block& block = block_at(number);
  if (durable) {
    block.durable = std::move(content);
    block.versions.clear();
    return;
  }
  if (block.versions.empty()) unsettled_.push_back(number);
  block.versions.push_back({sequence_, std::move(content)});
}

void SimDisk::submit(IoRequest* request) {
  HF_ASSERT(request->op == IoOp::kFlush || request->offset + request->length <= size_bytes_);
  HF_ASSERT(request->offset % kBlockSize == 0 && request->length % kBlockSize == 0);
  if (watcher_) watcher_(*request);
  const bool slow = request->op == IoOp::kRead && slow_reads_ > 0 && random_.chance(slow_reads_);
  flights_.push_back({request, sequence_, slow ? completed_ + random_.below(600) : 0});
  if (is_boundary(*request)) boundary();
}

void SimDisk::boundary() {
  if (fuse_ > 0 && --fuse_ == 0) blown_ = true;
}

// `partly`: per mille of the blocks that are left out.
void SimDisk::carry_out(const IoRequest& request, uint64_t submitted, uint32_t partly) {
  switch (request.op) {
    case IoOp::kRead: {
      uint64_t block = request.offset / kBlockSize;
      for (int i = 0; i < request.iov_count; i++) {
        auto* to = static_cast<std::byte*>(request.iov[i].iov_base);
        for (size_t at = 0; at < request.iov[i].iov_len; at += kBlockSize, block++) {
          peek(block * kBlockSize, to + at, kBlockSize);
        }
      }
      return;
    }
    case IoOp::kWrite: {
      sequence_++;
      uint64_t block = request.offset / kBlockSize;
      for (int i = 0; i < request.iov_count; i++) {
        const auto* from = static_cast<const std::byte*>(request.iov[i].iov_base);
        for (size_t at = 0; at < request.iov[i].iov_len; at += kBlockSize, block++) {
          // A page: whole, torn or not at all. Data: whole or not at all.
          const bool page = is_page_(block);
          if (partly > 0 && random_.chance(page ? partly / 2 : partly)) continue;
          if (partly > 0 && page && random_.chance(700)) {
            std::byte torn[kBlockSize];
            peek(block * kBlockSize, torn, kBlockSize);
            const uint32_t unit = tear_unit();
            for (uint32_t part = 0; part < kBlockSize; part += unit) {
              if (random_.chance(500)) std::memcpy(torn + part, from + at + part, unit);
            }
            apply(block, content_of(torn), false);
            continue;
          }
          apply(block, content_of(from + at), request.fua && partly == 0);
        }
      }
      return;
    }
    case IoOp::kFlush: {
      std::vector<uint64_t> rest;
      for (uint64_t number : unsettled_) {
        Block& block = blocks_.at(number);
        size_t covered = 0;
        while (covered < block.versions.size() && block.versions[covered].sequence <= submitted) covered++;
        if (covered > 0) {
          block.durable = std::move(block.versions[covered - 1].content);
          block.versions.erase(block.versions.begin(), block.versions.begin() + static_cast<ptrdiff_t>(covered));
        }
        if (!block.versions.empty()) rest.push_back(number);
      }
      unsettled_ = std::move(rest);
      return;
    }
    case IoOp::kDiscard: {
      sequence_++;
      const uint64_t first = request.offset / kBlockSize;
      const uint64_t end = first + request.length / kBlockSize;
      const uint64_t how = random_.below(3);
      for (auto at = blocks_.lower_bound(first); at != blocks_.end() && at->first < end; ++at) {
        if (how == 0) continue;
        if (at->second.versions.empty()) unsettled_.push_back(at->first);
        at->second.versions.push_back({sequence_, how == 1 ? Content{} : untouched(at->first)});
      }
      return;
    }
  }
}

void SimDisk::complete_one() {
  HF_ASSERT(!flights_.empty());
  completed_++;
  size_t at = random_.below(flights_.size());
  for (int tries = 0; tries < 8 && flights_[at].due > completed_; tries++) at = random_.below(flights_.size());
  const Flight flight = flights_[at];
  flights_[at] = flights_.back();
  flights_.pop_back();
  const bool page_write = is_page_write(*flight.request);
  const uint32_t errors = page_write ? page_errors_ : errors_;
  if (is_boundary(*flight.request)) boundary();
  int error = 0;
  if (dead_) {
    error = EIO;
  } else if (errors > 0 && random_.chance(errors)) {
    error = EIO;
    if (flight.request->op != IoOp::kRead && random_.chance(700)) {
      carry_out(*flight.request, flight.sequence, flight.request->op == IoOp::kWrite ? 500 : 0);
    }
  } else {
    carry_out(*flight.request, flight.sequence, 0);
  }
  flight.request->done(flight.request, error);
}

void SimDisk::kill() {
  for (const Flight& flight : flights_) {
    if (flight.request->op == IoOp::kRead || flight.request->op == IoOp::kFlush) continue;
    switch (random_.below(4)) {
      case 0: break;
      case 1: carry_out(*flight.request, flight.sequence, 0); break;
      default: carry_out(*flight.request, flight.sequence, 500); break;
    }
  }
  dead_ = true;
}

void SimDisk::cut_power() {
  HF_ASSERT(flights_.empty());
  const uint32_t mood = static_cast<uint32_t>(random_.below(4));  // 0: nothing survives, 1: all does, else: any
  const uint32_t tears = random_.chance(500) ? 900 : 300;
  for (uint64_t number : unsettled_) {
    Block& block = blocks_.at(number);
    if (block.versions.empty()) continue;
    const auto pick = [&]() -> const Content& {
      const uint64_t choices = block.versions.size() + 1;
      const uint64_t choice = mood == 0 ? 0 : mood == 1 ? choices - 1 : random_.below(choices);
      return choice == 0 ? block.durable : block.versions[choice - 1].content;
    };
    if (is_page_(number) && random_.chance(tears)) {
      std::byte torn[kBlockSize];
      std::byte from[kBlockSize];
      const uint32_t unit = tear_unit();
      for (uint32_t at = 0; at < kBlockSize; at += unit) {
        render(pick(), from);
        std::memcpy(torn + at, from + at, unit);
      }
      block.durable = content_of(torn);
    } else {
      Content survivor = pick();
      block.durable = std::move(survivor);
    }
    block.versions.clear();
  }
  unsettled_.clear();
}

void SimDisk::peek(uint64_t offset, void* to, size_t length) const {
  for (size_t at = 0; at < length; at += kBlockSize) {
    const uint64_t number = (offset + at) / kBlockSize;
    const auto found = blocks_.find(number);
    auto* target = static_cast<std::byte*>(to) + at;
    if (found == blocks_.end()) render(untouched(number), target);
    else if (found->second.versions.empty()) render(found->second.durable, target);
    else render(found->second.versions.back().content, target);
  }
}

void SimDisk::peek_durable(uint64_t offset, void* to, size_t length) const {
  for (size_t at = 0; at < length; at += kBlockSize) {
    const uint64_t number = (offset + at) / kBlockSize;
    const auto found = blocks_.find(number);
    render(found == blocks_.end() ? untouched(number) : found->second.durable, static_cast<std::byte*>(to) + at);
  }
}

void SimDisk::poke(uint64_t offset, const void* from, size_t length) {
  for (size_t at = 0; at < length; at += kBlockSize) {
    apply((offset + at) / kBlockSize, content_of(static_cast<const std::byte*>(from) + at), true);
  }
}

}  // namespace holdfast
