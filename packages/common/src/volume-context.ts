/**
 * The `volume_context` of a volume: what a PersistentVolume keeps, so that a volume which was never opened (it holds no
 * data and has no record on its pool) can be known again to a metadata service that lost it. A volume that was opened
 * comes back from its record on the pool; then the context only says which pool to ask. A volume that was made from another
 * one names its source: nothing of it is on the disk before its first open, and to make it anew as an empty one would
 * lose what it shows.
 */
import { HoldfastError } from './errors.ts';

const prefix = 'holdfast.io/';
const keys = {
  pool: `${prefix}pool`,
  name: `${prefix}name`,
  size: `${prefix}size-bytes`,
  sourceSnapshot: `${prefix}source-snapshot`,
  sourceVolume: `${prefix}source-volume`,
} as const;
const parameterPrefix = `${prefix}parameter.`;

export interface VolumeContext {
  poolUuid: string;
  name: string;
  sizeBytes: bigint;
  parameters: Record<string, string>;
  /** UUIDs; absent for a volume that was made empty. */
  sourceSnapshotUuid?: string;
  sourceVolumeUuid?: string;
}

export function volumeContext(volume: VolumeContext): Record<string, string> {
  return {
    [keys.pool]: volume.poolUuid,
    [keys.name]: volume.name,
    [keys.size]: volume.sizeBytes.toString(),
    ...(volume.sourceSnapshotUuid ? { [keys.sourceSnapshot]: volume.sourceSnapshotUuid } : {}),
    ...(volume.sourceVolumeUuid ? { [keys.sourceVolume]: volume.sourceVolumeUuid } : {}),
    ...Object.fromEntries(
      Object.entries(volume.parameters).map(([key, value]) => [parameterPrefix + key, value]),
    ),
  };
}

/**
 * Reads what volumeContext() made. Keys of others (Kubernetes adds some) are passed over. Undefined: no context of ours.
 * @throws HoldfastError INVALID_ARGUMENT when it is one of ours but incomplete.
 */
export function parseVolumeContext(context: Readonly<Record<string, string>>): VolumeContext | undefined {
  const { [keys.pool]: poolUuid, [keys.name]: name, [keys.size]: size } = context;
  if (poolUuid === undefined && name === undefined && size === undefined) return undefined;
  if (!poolUuid || !name || size === undefined || !/^[1-9][0-9]{0,18}$/.test(size)) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The volume context is incomplete: it needs ${keys.pool}, ${keys.name} and ${keys.size} (a number of bytes). ` +
        'Copy volumeAttributes from the PersistentVolume that was made when the volume was created.',
    );
  }
  const parameters = Object.fromEntries(
    Object.entries(context)
      .filter(([key]) => key.startsWith(parameterPrefix))
      .map(([key, value]) => [key.slice(parameterPrefix.length), value]),
  );
  const { [keys.sourceSnapshot]: snapshot, [keys.sourceVolume]: volume } = context;
  return {
    poolUuid,
    name,
    sizeBytes: BigInt(size),
    parameters,
    ...(snapshot ? { sourceSnapshotUuid: snapshot } : {}),
    ...(volume ? { sourceVolumeUuid: volume } : {}),
  };
}
