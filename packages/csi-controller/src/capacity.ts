/** Sizes: what a CSI capacity range means for a volume. All in bytes. */
import { HoldfastError, type FileSystem } from '@holdfast/common';
import type { Csi } from '@holdfast/proto';

const MIB = 1n << 20n;
/** Sizes are whole MiB: readable, and a multiple of every block size that matters. */
export const SIZE_STEP = MIB;
export const DEFAULT_SIZE = 1n << 30n;

/** The least that mkfs accepts, rounded up with room to write something; 'block' needs one step. */
const smallest: Record<FileSystem | 'block', bigint> = {
  block: MIB,
  ext4: 16n * MIB,
  btrfs: 128n * MIB,
  xfs: 300n * MIB,
};

export interface SizeRange {
  /** What a new volume gets. */
  readonly sizeBytes: bigint;
  /** An existing one of the same name must not be larger; 0: no limit. */
  readonly limitBytes: bigint;
}

const roundUp = (bytes: bigint): bigint => ((bytes + SIZE_STEP - 1n) / SIZE_STEP) * SIZE_STEP;
const roundDown = (bytes: bigint): bigint => (bytes / SIZE_STEP) * SIZE_STEP;
const max = (a: bigint, b: bigint): bigint => (a > b ? a : b);

function readRange(range: Csi.CapacityRange__Output | null): { required: bigint; limit: bigint } {
  const required = BigInt(range?.required_bytes ?? 0);
  const limit = BigInt(range?.limit_bytes ?? 0);
  if (required < 0n || limit < 0n) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `capacity_range has a negative size (required ${required}, limit ${limit}). Give bytes, or 0 for none.`,
    );
  }
  if (limit > 0n && required > limit) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `capacity_range asks for at least ${required} and at most ${limit} bytes. Ask for no more than the limit.`,
    );
  }
  return { required, limit };
}

/** @throws INVALID_ARGUMENT for negative sizes, OUT_OF_RANGE where no whole MiB of a usable size lies in the range. */
export function sizeForCreate(range: Csi.CapacityRange__Output | null, use: FileSystem | 'block'): SizeRange {
  const { required, limit } = readRange(range);
  const least = smallest[use];
  const wanted =
    required > 0n ? roundUp(required) : limit > 0n && limit < DEFAULT_SIZE ? roundDown(limit) : DEFAULT_SIZE;
  const sizeBytes = max(wanted, least);
  if (limit > 0n && sizeBytes > limit) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `No size fits: ${use} needs at least ${least} bytes, sizes are whole MiB, and the limit is ${limit} bytes. Raise limit_bytes to ${sizeBytes}.`,
    );
  }
  return { sizeBytes, limitBytes: limit };
}

/**
 * A copy has at least its source's bytes: one that asks for fewer gets these, because "required" says how many at least.
 * @throws OUT_OF_RANGE where the limit is lower than the source.
 */
export function sizeForCopy(range: Csi.CapacityRange__Output | null, leastBytes: bigint): SizeRange {
  const { required, limit } = readRange(range);
  const sizeBytes = max(roundUp(required), leastBytes);
  if (limit > 0n && sizeBytes > limit) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `A copy has at least the ${leastBytes} bytes of its source, in whole MiB, and the limit is ${limit} bytes. Raise limit_bytes to ${sizeBytes}.`,
    );
  }
  return { sizeBytes, limitBytes: limit };
}

/** @throws INVALID_ARGUMENT without a required size, OUT_OF_RANGE where the rounded size passes the limit. */
export function sizeForExpand(range: Csi.CapacityRange__Output | null): SizeRange {
  const { required, limit } = readRange(range);
  if (required === 0n && limit === 0n) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      'capacity_range is missing from the request. Say how large the volume shall be.',
    );
  }
  const sizeBytes = required > 0n ? roundUp(required) : SIZE_STEP;
  if (limit > 0n && sizeBytes > limit) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `Sizes are whole MiB: ${required} bytes become ${sizeBytes}, which passes the limit of ${limit}. Raise limit_bytes.`,
    );
  }
  return { sizeBytes, limitBytes: limit };
}
