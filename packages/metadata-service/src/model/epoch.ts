/** Epochs: the fencing token of a volume. Incarnation of the store in the upper 24 bits, a counter in the lower 40. */
import { HoldfastError } from '@holdfast/common';

export const epochCounterBits = 40n;
const maxIncarnation = (1n << 24n) - 1n;

/** The next epoch of a volume: newer than `last`, and newer than all of any older incarnation. */
export function nextEpoch(last: bigint, incarnation: bigint): bigint {
  if (incarnation < 1n || incarnation > maxIncarnation) {
    throw new HoldfastError('INTERNAL', `Incarnation ${incarnation} does not fit into an epoch.`);
  }
  const first = (incarnation << epochCounterBits) + 1n;
  const next = last + 1n > first ? last + 1n : first;
  if (next >> epochCounterBits !== incarnation) {
    throw new HoldfastError(
      'INTERNAL',
      `Epoch ${last} of this volume is of incarnation ${last >> epochCounterBits}, this service is incarnation ` +
        `${incarnation}: its database is older than the pool. Restore the newest backup.`,
    );
  }
  return next;
}
