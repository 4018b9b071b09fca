/** Names that Kubernetes gives to volumes and snapshots, and what of them is stored. */
import { createHash } from 'node:crypto';
import { HoldfastError, requireField } from '@holdfast/common';

/** The specification's general limit for strings. */
const MAX_NAME_BYTES = 128;
/** What a record on disk has room for. */
const MAX_STORED_NAME_BYTES = 127;

/** @throws INVALID_ARGUMENT when it is missing or too long. */
export function requireName(name: string): void {
  requireField(name, 'name');
  if (Buffer.byteLength(name) > MAX_NAME_BYTES) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The name has ${Buffer.byteLength(name)} bytes; at most ${MAX_NAME_BYTES} are allowed. Shorten it.`,
    );
  }
}

/** The name that the service keeps: a longer one is cut, and its digest keeps it one of a kind. */
export function storedName(name: string): string {
  if (Buffer.byteLength(name) <= MAX_STORED_NAME_BYTES) return name;
  const digest = createHash('sha256').update(name).digest('hex');
  // Whole characters only: a cut one would decode to something else.
  const head = Buffer.from(name)
    .subarray(0, MAX_STORED_NAME_BYTES - digest.length - 1)
    .toString()
    .replace(/\uFFFD+$/, '');
  return `${head}-${digest}`;
}
