// Volume and layer records, authority, heartbeats and fence pages; see records.h. Slabs: slabs.cc.
#include "records.h"

#include <algorithm>
#include <cstring>

namespace holdfast {
namespace {

using format::AuthorityPage;
using format::FencePage;
using format::HeartbeatPage;
using format::kPageSize;
using format::LayerRecord;
using format::Superblock;
using format::VolumeRecord;

constexpr size_t kPairSize = 2 * kPageSize;
constexpr uint32_t kPairsPerRead = 512;  // 4 MiB

// A page pair as read, and which copy counts.
template <typename Page>
struct PairOf {
  PageBuffer memory{kPairSize};
  Copies copies;
  Page& copy(int i) { return memory.at<Page>(static_cast<size_t>(i) * kPageSize); }
  Page& newest() {
    HF_ASSERT(copies.valid());
    return copy(copies.newest);
  }
};

std::string states(const Copies& copies) {
  return std::string("copy A ") + page_state_text(copies.state[0]) + ", copy B " + page_state_text(copies.state[1]);
}

template <typename Page>
Status read_pair(SyncDevice& device, const Superblock& s, uint64_t offset, PairOf<Page>* pair) {
  if (Status status = device.read(offset, pair->memory.data(), kPairSize); !status.ok()) return status;
  pair->copies = choose_record(pair->copy(0), pair->copy(1), s.header.pool, offset);
  return {};
}

Status damaged_status(const SyncDevice& device, const std::string& what, uint64_t offset, const Copies& copies) {
  return {Code::kCorrupt, "both copies of " + what + " at " + std::to_string(offset) + " on " + device.name() +
                              " are damaged (" + states(copies) + "). Run `holdfast pool check` and restore them"};
}

// Seals `page` into the copy that does not serve. `pair` is fresh from the disk; what was read may be in the device's
// cache only (a write whose outcome was not known), so it is made durable before the other copy is written over.
template <typename Page>
Status write_next(SyncDevice& device, const Superblock& s, uint64_t offset, PairOf<Page>& pair, const Page& page) {
  const int to = pair.copies.next();
  const uint64_t sequence = pair.copies.valid() ? pair.newest().header.sequence + 1 : 1;
  const uint64_t address = offset + static_cast<uint64_t>(to) * kPageSize;
  PageBuffer out(kPageSize);
  if (Status status = device.flush(); !status.ok()) return status;
  if (pair.copies.state[to] == PageState::kBadCrc) {
    blot(out.data(), kMagicOf<Page>);
    if (Status status = device.write_durable(address, out.data(), kPageSize); !status.ok()) return status;
  }
  out.at<Page>() = page;
  seal(out.at<Page>(), s.header.pool, address, sequence);
  return device.write_durable(address, out.data(), kPageSize);
}

VolumeRecordInfo decode(uint32_t slot, const VolumeRecord& r, const Copies& copies) {
  VolumeRecordInfo info;
  info.slot = slot;
  info.volume_id = r.volume_id;
  info.uuid = r.uuid;
  info.name = field_text(r.name);
  info.state = r.state;
  info.size_bytes = r.size_bytes;
  info.top_layer_id = r.top_layer_id;
  info.epoch = r.epoch;
  info.host_id = r.host_id;
  info.generation = r.generation;
  info.fenced = r.fenced != 0;
  info.parameters_json.assign(r.parameters, std::min<size_t>(r.parameters_length, sizeof r.parameters));
  info.degraded = copies.degraded();
  return info;
}

LayerRecordInfo decode(uint32_t slot, const LayerRecord& r, const Copies& copies) {
  LayerRecordInfo info;
  info.slot = slot;
  info.layer_id = r.layer_id;
  info.parent_layer_id = r.parent_layer_id;
  info.volume_id = r.volume_id;
  info.size_bytes = r.size_bytes;
  info.birth = r.birth;
  info.state = r.state;
  info.snapshot_name = field_text(r.snapshot_name);
  info.degraded = copies.degraded();
  return info;
}

uint64_t id_of(const VolumeRecord& r) { return r.volume_id; }
uint64_t id_of(const LayerRecord& r) { return r.layer_id; }
const char* kind_of(const VolumeRecord*) { return "volume record "; }
const char* kind_of(const LayerRecord*) { return "layer record "; }

// Reads the pair of a slot; not ok when both copies are damaged.
template <typename Record>
Status read_used_pair(SyncDevice& device, const Superblock& s, uint32_t slot, uint64_t offset, PairOf<Record>* pair) {
  if (Status status = read_pair(device, s, offset, pair); !status.ok()) return status;
  if (!pair->copies.bad()) return {};
  return damaged_status(device, kind_of(static_cast<Record*>(nullptr)) + std::to_string(slot), offset, pair->copies);
}

template <typename Record>
Result<std::optional<Record>> load_record(SyncDevice& device, const Superblock& s, uint32_t slot, uint64_t offset) {
  PairOf<Record> pair;
  if (Status status = read_used_pair(device, s, slot, offset, &pair); !status.ok()) return status;
  if (!pair.copies.valid() || id_of(pair.newest()) == 0) return std::optional<Record>();
  return std::optional<Record>(pair.newest());
}

template <typename Info, typename Record>
Result<std::optional<Info>> read_record(SyncDevice& device, const Superblock& s, uint32_t slot, uint64_t offset) {
  PairOf<Record> pair;
  if (Status status = read_used_pair(device, s, slot, offset, &pair); !status.ok()) return status;
  if (!pair.copies.valid() || id_of(pair.newest()) == 0) return std::optional<Info>();
  return std::optional<Info>(decode(slot, pair.newest(), pair.copies));
}

template <typename Record>
Status write_record(SyncDevice& device, const Superblock& s, uint32_t slot, uint64_t offset, const Record& record) {
  PairOf<Record> pair;
  if (Status status = read_used_pair(device, s, slot, offset, &pair); !status.ok()) return status;
  return write_next(device, s, offset, pair, record);
}

template <typename Info, typename Record>
Result<std::vector<Info>> read_table(SyncDevice& device, const Superblock& s, uint64_t table, uint32_t slots,
                                     std::vector<std::string>* damaged) {
  std::vector<Info> found;
  PageBuffer buffer(kPairsPerRead * kPairSize);
  for (uint32_t first = 0; first < slots; first += kPairsPerRead) {
    const uint32_t count = std::min(kPairsPerRead, slots - first);
    const uint64_t base = table + first * uint64_t{kPairSize};
    if (Status status = device.read(base, buffer.data(), count * kPairSize); !status.ok()) return status;
    for (uint32_t i = 0; i < count; i++) {
      const uint64_t offset = base + i * uint64_t{kPairSize};
      const Record& a = buffer.at<Record>(i * kPairSize);
      const Record& b = buffer.at<Record>(i * kPairSize + kPageSize);
      const Copies copies = choose_record(a, b, s.header.pool, offset);
      if (copies.bad()) {
        damaged->push_back(damaged_status(device, kind_of(&a) + std::to_string(first + i), offset, copies).message);
      } else if (copies.valid()) {
        const Record& newest = copies.newest == 0 ? a : b;
        if (id_of(newest) != 0) found.push_back(decode(first + i, newest, copies));
      }
    }
  }
  return found;
}

Status slot_in_range(const char* what, uint32_t slot, uint32_t slots) {
  if (slot < slots) return {};
  return {Code::kInvalidArgument, std::string(what) + " slot " + std::to_string(slot) + " is past the table's " +
                                      std::to_string(slots) + " slots"};
}

std::string epoch_text(uint64_t epoch) {
  return std::to_string(epoch >> format::kEpochCounterBits) + "." +
         std::to_string(epoch & ((uint64_t{1} << format::kEpochCounterBits) - 1));
}

// Reads the record of a volume, which must be there.
Result<VolumeRecord> require_volume(SyncDevice& device, const Superblock& s, uint32_t slot, uint64_t volume_id) {
  Result<std::optional<VolumeRecord>> found = load_volume_record(device, s, slot);
  if (!found.ok()) return found.status;
  if (!found->has_value() || (*found)->volume_id != volume_id) {
    return Status{Code::kStale, "volume slot " + std::to_string(slot) + " holds " +
                                    (found->has_value() ? "volume " + std::to_string((*found)->volume_id) : "nothing") +
                                    ", not volume " + std::to_string(volume_id)};
  }
  return **found;
}

}  // namespace

// ---- Volume and layer records

Result<std::optional<VolumeRecordInfo>> read_volume_record(SyncDevice& device, const Superblock& s, uint32_t slot) {
  if (Status status = slot_in_range("volume", slot, s.volume_slots); !status.ok()) return status;
  return read_record<VolumeRecordInfo, VolumeRecord>(device, s, slot, volume_record_offset(s, slot));
}

Result<std::optional<LayerRecordInfo>> read_layer_record(SyncDevice& device, const Superblock& s, uint32_t slot) {
  if (Status status = slot_in_range("layer", slot, s.layer_slots); !status.ok()) return status;
  return read_record<LayerRecordInfo, LayerRecord>(device, s, slot, layer_record_offset(s, slot));
}

Result<std::optional<VolumeRecord>> load_volume_record(SyncDevice& device, const Superblock& s, uint32_t slot) {
  if (Status status = slot_in_range("volume", slot, s.volume_slots); !status.ok()) return status;
  return load_record<VolumeRecord>(device, s, slot, volume_record_offset(s, slot));
}

Result<std::optional<LayerRecord>> load_layer_record(SyncDevice& device, const Superblock& s, uint32_t slot) {
  if (Status status = slot_in_range("layer", slot, s.layer_slots); !status.ok()) return status;
  return load_record<LayerRecord>(device, s, slot, layer_record_offset(s, slot));
}

Status write_volume_record(SyncDevice& device, const Superblock& s, uint32_t slot, const VolumeRecord& record) {
  if (Status status = slot_in_range("volume", slot, s.volume_slots); !status.ok()) return status;
  return write_record(device, s, slot, volume_record_offset(s, slot), record);
}

Status write_layer_record(SyncDevice& device, const Superblock& s, uint32_t slot, const LayerRecord& record) {
  if (Status status = slot_in_range("layer", slot, s.layer_slots); !status.ok()) return status;
  return write_record(device, s, slot, layer_record_offset(s, slot), record);
}

Result<std::vector<VolumeRecordInfo>> read_volume_records(SyncDevice& device, const Superblock& s,
                                                          std::vector<std::string>* damaged) {
  return read_table<VolumeRecordInfo, VolumeRecord>(device, s, s.volume_table_offset, s.volume_slots, damaged);
}

Result<std::vector<LayerRecordInfo>> read_layer_records(SyncDevice& device, const Superblock& s,
                                                        std::vector<std::string>* damaged) {
  return read_table<LayerRecordInfo, LayerRecord>(device, s, s.layer_table_offset, s.layer_slots, damaged);
}

Status write_volume_closed(SyncDevice& device, const Superblock& s, uint32_t slot, uint64_t volume_id, uint64_t epoch) {
  Result<VolumeRecord> found = require_volume(device, s, slot, volume_id);
  if (!found.ok()) return found.status;
  if (found->epoch != epoch) {
    return {Code::kStale, "volume " + std::to_string(volume_id) + " is at epoch " + epoch_text(found->epoch) +
                              " on disk, not " + epoch_text(epoch) + "; its record is left alone"};
  }
  if (found->state == format::VolumeState::kClosed) return {};
  if (found->state != format::VolumeState::kOpen) {
    return {Code::kStale, "volume " + std::to_string(volume_id) + " is deleted; its record is left alone"};
  }
  VolumeRecord record = *found;
  record.state = format::VolumeState::kClosed;
  record.header.flags |= format::kVolumeUnclean;
  return write_volume_record(device, s, slot, record);
}

Status check_volume_still_ours(SyncDevice& device, const Superblock& s, uint32_t slot, uint64_t volume_id,
                               uint64_t epoch, uint32_t host_id, uint64_t generation) {
  Result<VolumeRecord> found = require_volume(device, s, slot, volume_id);
  if (!found.ok()) return found.status;
  if (found->epoch == epoch && found->host_id == host_id && found->generation == generation && found->fenced == 0 &&
      found->state == format::VolumeState::kOpen) {
    return {};
  }
  return {Code::kStale, "volume " + std::to_string(volume_id) + " is no longer ours: its record says epoch " +
                            epoch_text(found->epoch) + ", host " + std::to_string(found->host_id) + ", generation " +
                            std::to_string(found->generation) + "; we have epoch " + epoch_text(epoch) + ", host " +
                            std::to_string(host_id) + ", generation " + std::to_string(generation)};
}

// ---- Authority

namespace {

// Negative, zero, positive: the page's (incarnation, term) against the claim's.
int compare_authority(const AuthorityPage& page, uint64_t incarnation, uint64_t term) {
  if (page.incarnation != incarnation) return page.incarnation < incarnation ? -1 : 1;
  if (page.term != term) return page.term < term ? -1 : 1;
  return 0;
}

std::string authority_text(const AuthorityPage& page) {
  return "store " + uuid_text(page.store) + ", incarnation " + std::to_string(page.incarnation) + ", term " +
         std::to_string(page.term);
}

Status read_authority_pair(SyncDevice& device, const Superblock& s, PairOf<AuthorityPage>* pair) {
  if (Status status = read_pair(device, s, s.authority_offset, pair); !status.ok()) return status;
  // Format writes both copies, so blank is damage here.
  if (!pair->copies.valid()) return damaged_status(device, "the authority page", s.authority_offset, pair->copies);
  return {};
}

}  // namespace

Result<Authority> read_authority(SyncDevice& device, const Superblock& s) {
  PairOf<AuthorityPage> pair;
  if (Status status = read_authority_pair(device, s, &pair); !status.ok()) return status;
  const AuthorityPage& page = pair.newest();
  return Authority{page.store, page.incarnation, page.term, uuid_is_zero(page.store)};
}

Status claim_authority(SyncDevice& device, const Superblock& s, const AuthorityClaim& claim,
                       const ClaimEnvironment& environment) {
  if (uuid_is_zero(claim.store) || claim.incarnation == 0) {
    return {Code::kInvalidArgument, "a claim needs a store id and an incarnation from 1"};
  }
  const uint64_t begun = environment.now_ns();
  PairOf<AuthorityPage> pair;
  if (Status status = read_authority_pair(device, s, &pair); !status.ok()) {
    if (status.code != Code::kCorrupt || !claim.force) return status;
  }
  if (pair.copies.valid() && !claim.force) {
    const AuthorityPage& stands = pair.newest();
    if (!uuid_is_zero(stands.store) && stands.store != claim.store) {
      return {Code::kStale,
              "the pool belongs to another metadata service (" + authority_text(stands) +
                  "). Two services must never share a pool; take it over only if that one is gone for good"};
    }
    if (!uuid_is_zero(stands.store) && compare_authority(stands, claim.incarnation, claim.term) > 0) {
      return {Code::kStale, "a newer claim stands on the pool (" + authority_text(stands) +
                                "), and this is incarnation " + std::to_string(claim.incarnation) + ", term " +
                                std::to_string(claim.term) +
                                ": an older database or a deposed leader must not give orders"};
    }
  }
  AuthorityPage page{};
  page.store = claim.store;
  page.incarnation = claim.incarnation;
  page.term = claim.term;
  page.nonce = environment.random();
  page.claimed_by_host = claim.host_id;
  page.claimed_unix_ms = environment.unix_ms();
  if (Status status = write_next(device, s, s.authority_offset, pair, page); !status.ok()) return status;
  const uint64_t took_ms = (environment.now_ns() - begun) / 1'000'000;
  environment.sleep_ms(environment.wait_ms);
  PairOf<AuthorityPage> again;
  if (Status status = read_authority_pair(device, s, &again); !status.ok()) return status;
  const AuthorityPage& stands = again.newest();
  if (stands.nonce != page.nonce || stands.store != page.store ||
      compare_authority(stands, claim.incarnation, claim.term) != 0) {
    return {Code::kStale, "somebody else claimed the pool at the same time (" + authority_text(stands) + ")"};
  }
  // The wait covers a rival that read before our write and writes after it, if nobody takes longer than half of it.
  if (took_ms * 2 > environment.wait_ms) {
    return {Code::kUnavailable, "claiming the pool took " + std::to_string(took_ms) + " ms, too long for a wait of " +
                                    std::to_string(environment.wait_ms) + " ms to exclude a rival. Try again"};
  }
  return {};
}

// ---- Heartbeats

namespace {
Heartbeat decode(const HeartbeatPage& page) {
  return {page.host_id,    page.state,  page.generation, page.header.sequence, page.nonce, field_text(page.node_name),
          page.machine_id, page.boot_id};
}
}  // namespace

Result<Heartbeat> read_heartbeat(SyncDevice& device, const Superblock& s, uint32_t host_id) {
  if (Status status = slot_in_range("host", host_id, s.host_slots); !status.ok()) return status;
  PairOf<HeartbeatPage> pair;
  const uint64_t offset = heartbeat_offset(s, host_id);
  if (Status status = read_pair(device, s, offset, &pair); !status.ok()) return status;
  if (!pair.copies.valid()) {
    return damaged_status(device, "the heartbeat of host " + std::to_string(host_id), offset, pair.copies);
  }
  return decode(pair.newest());
}

Result<std::vector<Heartbeat>> read_heartbeats(SyncDevice& device, const Superblock& s,
                                               std::vector<std::string>* damaged) {
  PageBuffer buffer(s.host_slots * kPairSize);
  if (Status status = device.read(s.heartbeat_offset, buffer.data(), buffer.size()); !status.ok()) return status;
  std::vector<Heartbeat> found;
  for (uint32_t host = 0; host < s.host_slots; host++) {
    const auto& a = buffer.at<HeartbeatPage>(host * kPairSize);
    const auto& b = buffer.at<HeartbeatPage>(host * kPairSize + kPageSize);
    const Copies copies = choose_record(a, b, s.header.pool, heartbeat_offset(s, host));
    if (copies.valid()) {
      found.push_back(decode(copies.newest == 0 ? a : b));
    } else {
      found.emplace_back().host_id = host;
      damaged->push_back(
          damaged_status(device, "the heartbeat of host " + std::to_string(host), heartbeat_offset(s, host), copies)
              .message);
    }
  }
  return found;
}

// ---- Fence pages

namespace {

Status check_fence_target(const Superblock& s, uint32_t host_id, uint64_t generation) {
  if (Status status = slot_in_range("host", host_id, s.host_slots); !status.ok()) return status;
  if (generation == 0) return {Code::kInvalidArgument, "host generations begin at 1"};
  return {};
}

Status read_fence_page(SyncDevice& device, const Superblock& s, uint32_t host_id, uint64_t generation,
                       PageBuffer* buffer) {
  const uint64_t offset = fence_offset(s, host_id, generation);
  if (Status status = device.read(offset, buffer->data(), kPageSize); !status.ok()) return status;
  const auto& page = buffer->at<FencePage>();
  const PageState state = verify(page, s.header.pool, offset);
  if (state == PageState::kOk && page.host_id == host_id) return {};
  return {Code::kCorrupt, "the fence page of host " + std::to_string(host_id) + ", generation " +
                              std::to_string(generation) + " at " + std::to_string(offset) + " on " + device.name() +
                              " " + (state == PageState::kOk ? "names another host" : page_state_text(state)) +
                              ": it fences nobody, and that host must not issue I/O until it can be read"};
}

}  // namespace

Result<Fence> read_fence(SyncDevice& device, const Superblock& s, uint32_t host_id, uint64_t generation) {
  if (Status status = check_fence_target(s, host_id, generation); !status.ok()) return status;
  PageBuffer buffer(kPageSize);
  if (Status status = read_fence_page(device, s, host_id, generation, &buffer); !status.ok()) return status;
  const auto& page = buffer.at<FencePage>();
  return Fence{page.host_id, page.generation, page.fencer_host_id, page.term};
}

Status write_fence(SyncDevice& device, const Superblock& s, const FenceOrder& order) {
  if (Status status = check_fence_target(s, order.host_id, order.generation); !status.ok()) return status;
  PairOf<AuthorityPage> authority;
  if (Status status = read_authority_pair(device, s, &authority); !status.ok()) return status;
  if (compare_authority(authority.newest(), order.incarnation, order.term) > 0) {
    return {Code::kStale, "the order to fence host " + std::to_string(order.host_id) + " is of incarnation " +
                              std::to_string(order.incarnation) + ", term " + std::to_string(order.term) +
                              ", and a newer authority stands (" + authority_text(authority.newest()) + ")"};
  }
  PageBuffer before(kPageSize);
  const Status readable = read_fence_page(device, s, order.host_id, order.generation, &before);
  if (!readable.ok() && readable.code != Code::kCorrupt) return readable;
  const uint64_t offset = fence_offset(s, order.host_id, order.generation);
  uint64_t sequence = 1;
  if (readable.ok()) {  // an unreadable page is overwritten: that heals it
    const auto& stands = before.at<FencePage>();
    if (stands.generation > order.generation) {
      return {Code::kStale, "generation " + std::to_string(order.generation) + " of host " +
                                std::to_string(order.host_id) + " is long gone: generation " +
                                std::to_string(stands.generation) + " is fenced already"};
    }
    if (stands.generation == order.generation) return device.flush();  // maybe written by a fencer that then died
    sequence = stands.header.sequence + 1;
  }
  PageBuffer buffer(kPageSize);
  auto& page = buffer.at<FencePage>();
  page.host_id = order.host_id;
  page.fencer_host_id = order.fencer_host_id;
  page.generation = order.generation;
  page.fencer_generation = order.fencer_generation;
  page.term = order.term;
  page.incarnation = order.incarnation;
  page.fenced_unix_ms = order.unix_ms;
  seal(page, s.header.pool, offset, sequence);
  if (Status status = device.write_durable(offset, buffer.data(), kPageSize); !status.ok()) return status;
  PageBuffer back(kPageSize);
  if (Status status = device.read(offset, back.data(), kPageSize); !status.ok()) return status;
  if (std::memcmp(back.data(), buffer.data(), kPageSize) == 0) return {};
  const auto& other = back.at<FencePage>();
  if (verify(other, s.header.pool, offset) == PageState::kOk && other.host_id == order.host_id &&
      other.generation == order.generation) {
    return device.flush();  // a second fencer said the same at the same time
  }
  return {Code::kIo, "the fence page of host " + std::to_string(order.host_id) + ", generation " +
                         std::to_string(order.generation) + " does not read back from " + device.name() +
                         " as written; the host counts as not fenced. Ask again"};
}

}  // namespace holdfast
