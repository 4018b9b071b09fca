// Loop devices over a volume's FUSE file. Every call here may wait for the engine's answers and so runs in a child of
// the keeper, never in the keeper itself.
#pragma once

#include <cstdint>

#include "io/keeper_protocol.h"

namespace holdfast::keeper {

// Each returns 0 or a positive errno.

// Opens the root of the mount (the volume) and puts a free loop device on it: direct I/O, mq-deadline with room for
// reads while writes are held. `note` gets a sentence where a queue setting could not be made.
int attach_loop(int mount_fd, const KeeperAttach& wanted, int* number, char* note, uint32_t note_size);
int resize_loop(int mount_fd, const KeeperLoop& loop);
int detach_loop(const KeeperLoop& loop);
// -1 where no loop device carries the label.
int find_loop(const char* label, int* number);

}  // namespace holdfast::keeper
