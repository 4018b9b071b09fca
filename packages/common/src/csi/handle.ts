/**
 * Handles: "<pool uuid>/<volume uuid>" is the `volume_id` of every CSI call; snapshots and groups of them have the same form
 * with their own UUID.
 */
import { HoldfastError } from '../errors.ts';

const uuid = '[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}';
const pattern = new RegExp(`^(${uuid})/(${uuid})$`);
const uuidPattern = new RegExp(`^${uuid}$`);

export interface VolumeHandle {
  readonly poolUuid: string;
  readonly volumeUuid: string;
}

export const isUuid = (text: string): boolean => uuidPattern.test(text);

export const formatHandle = (handle: VolumeHandle): string => `${handle.poolUuid}/${handle.volumeUuid}`;

/** Undefined for anything that this driver never gave out. */
export function parseHandle(volumeId: string): VolumeHandle | undefined {
  const match = pattern.exec(volumeId);
  return match ? { poolUuid: match[1] as string, volumeUuid: match[2] as string } : undefined;
}

/**
 * For calls that need the volume to exist.
 * @throws INVALID_ARGUMENT when empty, NOT_FOUND when it can't be a handle of ours.
 */
export function requireHandle(volumeId: string, field = 'volume_id'): VolumeHandle {
  requireField(volumeId, field);
  const handle = parseHandle(volumeId);
  if (handle === undefined) {
    throw new HoldfastError(
      'NOT_FOUND',
      `There is no volume "${volumeId}": a handle looks like "<pool uuid>/<volume uuid>". Check volumeHandle in the PersistentVolume.`,
    );
  }
  return handle;
}

export interface SnapshotHandle {
  readonly poolUuid: string;
  /** Of a snapshot, or of a group. */
  readonly snapshotUuid: string;
}

export const formatSnapshotHandle = (handle: SnapshotHandle): string =>
  `${handle.poolUuid}/${handle.snapshotUuid}`;

/** Undefined for anything that this driver never gave out. */
export function parseSnapshotHandle(snapshotId: string): SnapshotHandle | undefined {
  const handle = parseHandle(snapshotId);
  return handle && { poolUuid: handle.poolUuid, snapshotUuid: handle.volumeUuid };
}

/**
 * For calls that need the snapshot, or the group, to exist.
 * @throws INVALID_ARGUMENT when empty, NOT_FOUND when it can't be a handle of ours.
 */
export function requireSnapshotHandle(snapshotId: string, field: string): SnapshotHandle {
  requireField(snapshotId, field);
  const handle = parseSnapshotHandle(snapshotId);
  if (handle === undefined) {
    throw new HoldfastError(
      'NOT_FOUND',
      `There is no snapshot "${snapshotId}": a handle looks like "<pool uuid>/<snapshot uuid>". Check snapshotHandle in the VolumeSnapshotContent.`,
    );
  }
  return handle;
}

export function requireField(value: string | undefined | null, name: string): void {
  if (value === undefined || value === null || value === '') {
    throw new HoldfastError('INVALID_ARGUMENT', `${name} is missing from the request. Set it.`);
  }
}
