// A Volume of requests alone, for what stands in for one before a frontend: tests, and the benchmark's bare path. It has no layers and
// no state, so every other call is ignored; nobody may wait for their `done`.
#pragma once

#include "volume.h"

namespace holdfast {

class PlainVolume : public Volume {
 public:
  void grow(uint64_t, Done) override {}
  void hold(uint64_t, Done) override {}
  void release(Done) override {}
  void cut(const LayerSpec&, const SnapshotInfo&, uint64_t, CutDone) override {}
  void forget(const std::vector<SlabRun>&, const std::vector<uint64_t>&, Done) override {}
  void learn(const LayerSlabs&, Done) override {}
  void compact(const std::vector<LayerSlabs>&, uint32_t, uint64_t, CompactDone) override {}
  void close(Done) override {}
  void abort(Done) override {}
  VolumeStats stats() const override { return {}; }
};

}  // namespace holdfast
