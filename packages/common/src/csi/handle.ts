/** Volume handles: "<pool uuid>/<volume uuid>", the `volume_id` of every CSI call. */
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
export function requireHandle(volumeId: string): VolumeHandle {
  requireField(volumeId, 'volume_id');
  const handle = parseHandle(volumeId);
  if (handle === undefined) {
    throw new HoldfastError(
      'NOT_FOUND',
      `There is no volume "${volumeId}": a handle looks like "<pool uuid>/<volume uuid>". Check volumeHandle in the PersistentVolume.`,
    );
  }
  return handle;
}

export function requireField(value: string | undefined | null, name: string): void {
  if (value === undefined || value === null || value === '') {
    throw new HoldfastError('INVALID_ARGUMENT', `${name} is missing from the request. Set it.`);
  }
}
