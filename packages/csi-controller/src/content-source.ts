/** What a new volume is made from: a snapshot, another volume, or nothing. */
import {
  formatHandle,
  formatSnapshotHandle,
  HoldfastError,
  requireHandle,
  requireSnapshotHandle,
  type CallContext,
} from '@holdfast/common';
import type { Csi, Volume__Output } from '@holdfast/proto';
import type { MetadataApi } from './metadata-client.ts';

export interface ContentSource {
  readonly poolUuid: string;
  /** The copy has at least so many. */
  readonly sizeBytes: bigint;
  /** For CreateVolume at the metadata service. */
  readonly request: { source_snapshot_uuid: string } | { source_volume_uuid: string };
}

/** Undefined: the volume is made empty. @throws INVALID_ARGUMENT for a source without a type, NOT_FOUND. */
export async function contentSource(
  metadata: MetadataApi,
  source: Csi.VolumeContentSource__Output | null,
  context: CallContext,
): Promise<ContentSource | undefined> {
  if (source === null) return undefined;
  if (source.snapshot) {
    const handle = requireSnapshotHandle(
      source.snapshot.snapshot_id,
      'volume_content_source.snapshot.snapshot_id',
    );
    const snapshot = await metadata.snapshot(handle, context);
    return {
      poolUuid: snapshot.pool_uuid,
      sizeBytes: BigInt(snapshot.size_bytes),
      request: { source_snapshot_uuid: snapshot.uuid },
    };
  }
  if (source.volume) {
    const volumeId = source.volume.volume_id;
    const handle = requireHandle(volumeId, 'volume_content_source.volume.volume_id');
    const volume = await metadata.getVolume(handle.volumeUuid, {}, context);
    if (volume.pool_uuid !== handle.poolUuid || volume.state === 'DELETING') {
      throw new HoldfastError('NOT_FOUND', `There is no volume ${volumeId}, or it is being deleted.`);
    }
    return {
      poolUuid: volume.pool_uuid,
      sizeBytes: BigInt(volume.size_bytes),
      request: { source_volume_uuid: volume.uuid },
    };
  }
  throw new HoldfastError(
    'INVALID_ARGUMENT',
    'volume_content_source names no source that this driver knows. Give a snapshot or a volume.',
  );
}

/** Whether an existing volume is what a repeated call asks for; then its source need not exist any more. */
export function isMadeFrom(volume: Volume__Output, source: Csi.VolumeContentSource__Output): boolean {
  const made = sourceOf(volume)?.content_source;
  if (source.snapshot) return made?.snapshot?.snapshot_id === source.snapshot.snapshot_id;
  if (source.volume) return made?.volume?.volume_id === source.volume.volume_id;
  return false;
}

/** `content_source` of a volume, as CSI shows it. A copy is on its source's pool. */
export function sourceOf(volume: Volume__Output): { content_source: Csi.VolumeContentSource } | undefined {
  const poolUuid = volume.pool_uuid;
  if (volume.source_snapshot_uuid !== '') {
    const snapshotUuid = volume.source_snapshot_uuid;
    return {
      content_source: { snapshot: { snapshot_id: formatSnapshotHandle({ poolUuid, snapshotUuid }) } },
    };
  }
  if (volume.source_volume_uuid === '') return undefined;
  const volumeUuid = volume.source_volume_uuid;
  return { content_source: { volume: { volume_id: formatHandle({ poolUuid, volumeUuid }) } } };
}
