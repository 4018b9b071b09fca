// Loop devices over a volume's FUSE file. Every call here may wait for the engine's answers and so runs in a child of
// the keeper, never in the keeper itself.
#pragma once

#include <cstdint>

#include "io/keeper_protocol.h"

namespace holdfast::keeper {

// The queue settings of a loop device that a volume changes, as their sysfs files have them; "" where there is none.
// They belong to the device's number and outlive what is attached to it.
struct LoopQueue {
  char scheduler[32];
  char nr_requests[16];
  char async_depth[16];  // of the scheduler
  char rq_affinity[8];
  char nomerges[8];
};

// Each returns 0 or a positive errno.

// Opens the root of the mount (the volume) and puts a free loop device on it: direct I/O, mq-deadline with room for
// reads while writes are held. `note` gets a sentence where a queue setting could not be made, `found` the settings
// that the device had.
int attach_loop(int mount_fd, const KeeperAttach& wanted, int* number, LoopQueue* found, char* note,
                uint32_t note_size);
int resize_loop(int mount_fd, const KeeperLoop& loop);
// The next user of the number gets it with the settings in `found`. nullptr: they stay.
int detach_loop(const KeeperLoop& loop, const LoopQueue* found);
// -1 where no loop device carries the label.
int find_loop(const char* label, int* number);

}  // namespace holdfast::keeper
