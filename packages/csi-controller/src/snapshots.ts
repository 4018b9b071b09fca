/** CSI snapshots: each call is one idempotent call to the metadata service, where a cut is a durable operation. */
import {
  csiUnary,
  formatHandle,
  formatSnapshotHandle,
  HoldfastError,
  parseHandle,
  parseSnapshotHandle,
  readSnapshotParameters,
  requireField,
  requireHandle,
  requireSnapshotHandle,
  type CallContext,
  type InFlight,
  type Logger,
} from '@holdfast/common';
import type { Csi, Known, Snapshot__Output } from '@holdfast/proto';
import type { MetadataApi } from './metadata-client.ts';
import { requireName, storedName } from './names.ts';

export const toTimestamp = (unixMs: string): NonNullable<Csi.Snapshot['creation_time']> => {
  const ms = BigInt(unixMs);
  return { seconds: (ms / 1000n).toString(), nanos: Number(ms % 1000n) * 1_000_000 };
};

export function toCsiSnapshot(snapshot: Snapshot__Output): Csi.Snapshot {
  const poolUuid = snapshot.pool_uuid;
  return {
    snapshot_id: formatSnapshotHandle({ poolUuid, snapshotUuid: snapshot.uuid }),
    source_volume_id: formatHandle({ poolUuid, volumeUuid: snapshot.source_volume_uuid }),
    size_bytes: snapshot.size_bytes,
    creation_time: toTimestamp(snapshot.created_unix_ms),
    ready_to_use: snapshot.state === 'READY',
    group_snapshot_id:
      snapshot.group_uuid === '' ? '' : formatSnapshotHandle({ poolUuid, snapshotUuid: snapshot.group_uuid }),
  };
}

type Handlers = Pick<
  Known<Csi.ControllerHandlers>,
  'CreateSnapshot' | 'DeleteSnapshot' | 'ListSnapshots' | 'GetSnapshot'
>;

export class SnapshotService {
  readonly #metadata: MetadataApi;
  readonly #inFlight: InFlight;

  constructor(metadata: MetadataApi, inFlight: InFlight) {
    this.#metadata = metadata;
    this.#inFlight = inFlight;
  }

  handlers(log: Logger): Handlers {
    return {
      CreateSnapshot: csiUnary(log, 'CreateSnapshot', (r, c) => this.create(r, c)),
      DeleteSnapshot: csiUnary(log, 'DeleteSnapshot', (r, c) => this.remove(r, c)),
      ListSnapshots: csiUnary(log, 'ListSnapshots', (r, c) => this.list(r, c)),
      GetSnapshot: csiUnary(log, 'GetSnapshot', (r, c) => this.get(r, c)),
    };
  }

  async create(
    request: Csi.CreateSnapshotRequest__Output,
    context: CallContext,
  ): Promise<Csi.CreateSnapshotResponse> {
    requireName(request.name);
    const handle = requireHandle(request.source_volume_id, 'source_volume_id');
    const parameters = readSnapshotParameters(request.parameters);
    // Not the volume's turn: a cut takes as long as the disk does, and a pod may be starting meanwhile.
    return this.#inFlight.run([`the snapshot named ${request.name}`], async () => {
      const snapshot = await this.#metadata.createSnapshot(
        { name: storedName(request.name), source_volume_uuid: handle.volumeUuid, parameters },
        context,
      );
      return { snapshot: toCsiSnapshot(snapshot) };
    });
  }

  async remove(
    request: Csi.DeleteSnapshotRequest__Output,
    context: CallContext,
  ): Promise<Csi.DeleteSnapshotResponse> {
    requireField(request.snapshot_id, 'snapshot_id');
    const handle = parseSnapshotHandle(request.snapshot_id);
    if (handle === undefined) return {};
    return this.#inFlight.run([`snapshot ${request.snapshot_id}`], async () => {
      const snapshot = await this.#metadata.findSnapshot(handle, context);
      if (snapshot === undefined) return {};
      if (snapshot.group_uuid !== '') {
        throw new HoldfastError(
          'INVALID_ARGUMENT',
          `Snapshot ${request.snapshot_id} belongs to group ${snapshot.pool_uuid}/${snapshot.group_uuid} and is deleted with it. Delete the group.`,
        );
      }
      await this.#metadata.deleteSnapshot(handle.snapshotUuid, context);
      return {};
    });
  }

  async list(
    request: Csi.ListSnapshotsRequest__Output,
    context: CallContext,
  ): Promise<Csi.ListSnapshotsResponse> {
    if (request.max_entries < 0) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'max_entries is negative. Give a number of entries, or 0 for all.',
      );
    }
    const snapshot = request.snapshot_id === '' ? undefined : parseSnapshotHandle(request.snapshot_id);
    const volume = request.source_volume_id === '' ? undefined : parseHandle(request.source_volume_id);
    // A handle that this driver never gave out names nothing.
    if (request.snapshot_id !== '' && snapshot === undefined) return { entries: [] };
    if (request.source_volume_id !== '' && volume === undefined) return { entries: [] };
    const entries: Csi._csi_v1_ListSnapshotsResponse_Entry[] = [];
    let token = request.starting_token;
    do {
      const page = await this.#metadata.listSnapshots(
        {
          max_entries: request.max_entries === 0 ? 0 : request.max_entries - entries.length,
          starting_token: token,
          snapshot_uuid: snapshot?.snapshotUuid ?? '',
          source_volume_uuid: volume?.volumeUuid ?? '',
        },
        context,
      );
      for (const found of page.snapshots) {
        const pools = new Set([snapshot?.poolUuid ?? found.pool_uuid, volume?.poolUuid ?? found.pool_uuid]);
        if (pools.size === 1 && pools.has(found.pool_uuid)) entries.push({ snapshot: toCsiSnapshot(found) });
      }
      token = page.next_token;
    } while (token !== '' && (request.max_entries === 0 || entries.length < request.max_entries));
    return { entries, next_token: token };
  }

  async get(request: Csi.GetSnapshotRequest__Output, context: CallContext): Promise<Csi.GetSnapshotResponse> {
    const handle = requireSnapshotHandle(request.snapshot_id, 'snapshot_id');
    return { snapshot: toCsiSnapshot(await this.#metadata.snapshot(handle, context)) };
  }
}
