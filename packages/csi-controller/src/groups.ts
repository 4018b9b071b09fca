/** CSI GroupController: snapshots of several volumes that show one moment. All members are on one pool. */
import {
  csiUnary,
  formatSnapshotHandle,
  HoldfastError,
  InFlight,
  parseSnapshotHandle,
  readSnapshotParameters,
  requireField,
  requireHandle,
  requireSnapshotHandle,
  type CallContext,
  type Logger,
} from '@holdfast/common';
import type { Csi, Known, SnapshotGroup__Output } from '@holdfast/proto';
import type { MetadataApi } from './metadata-client.ts';
import { requireName, storedName } from './names.ts';
import { toCsiSnapshot, toTimestamp } from './snapshots.ts';

function toCsiGroup(group: SnapshotGroup__Output): Csi.VolumeGroupSnapshot {
  const snapshots = group.snapshots.map(toCsiSnapshot);
  return {
    group_snapshot_id: formatSnapshotHandle({
      poolUuid: group.snapshots[0]?.pool_uuid ?? '',
      snapshotUuid: group.uuid,
    }),
    snapshots,
    creation_time: toTimestamp(group.created_unix_ms),
    ready_to_use: group.state === 'READY' && snapshots.every((snapshot) => snapshot.ready_to_use),
  };
}

/** @throws INVALID_ARGUMENT when the caller's list is another one than the group's; an empty list says nothing. */
function compareMembers(group: SnapshotGroup__Output, snapshotIds: readonly string[]): void {
  if (snapshotIds.length === 0) return;
  const members = new Set(group.snapshots.map((snapshot) => toCsiSnapshot(snapshot).snapshot_id));
  const strangers = snapshotIds.filter((id) => !members.has(id));
  if (strangers.length === 0 && new Set(snapshotIds).size === members.size) return;
  throw new HoldfastError(
    'INVALID_ARGUMENT',
    `snapshot_ids does not match group ${group.uuid}, which has ${members.size} snapshots (${[...members].join(', ')}). Give exactly these.`,
  );
}

export class GroupService {
  readonly #metadata: MetadataApi;
  readonly #inFlight = new InFlight();

  constructor(metadata: MetadataApi) {
    this.#metadata = metadata;
  }

  handlers(log: Logger): Known<Csi.GroupControllerHandlers> {
    return {
      GroupControllerGetCapabilities: csiUnary(log, 'GroupControllerGetCapabilities', async () => ({
        capabilities: [{ rpc: { type: 'CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT' as const } }],
      })),
      CreateVolumeGroupSnapshot: csiUnary(log, 'CreateVolumeGroupSnapshot', (r, c) => this.create(r, c)),
      DeleteVolumeGroupSnapshot: csiUnary(log, 'DeleteVolumeGroupSnapshot', (r, c) => this.remove(r, c)),
      GetVolumeGroupSnapshot: csiUnary(log, 'GetVolumeGroupSnapshot', (r, c) => this.get(r, c)),
    };
  }

  async create(
    request: Csi.CreateVolumeGroupSnapshotRequest__Output,
    context: CallContext,
  ): Promise<Csi.CreateVolumeGroupSnapshotResponse> {
    requireName(request.name);
    if (request.source_volume_ids.length === 0) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'source_volume_ids is missing from the request. Name the volumes of the group.',
      );
    }
    const handles = request.source_volume_ids.map((id) => requireHandle(id, 'source_volume_ids'));
    const parameters = readSnapshotParameters(request.parameters);
    const pools = new Set(handles.map((handle) => handle.poolUuid));
    if (pools.size > 1) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `The volumes are on ${pools.size} pools (${[...pools].join(', ')}), and a group is cut on one. Make a group for each pool.`,
      );
    }
    return this.#inFlight.run([`the group named ${request.name}`], async () => {
      const group = await this.#metadata.createSnapshotGroup(
        {
          name: storedName(request.name),
          source_volume_uuids: [...new Set(handles.map((handle) => handle.volumeUuid))],
          parameters,
        },
        context,
      );
      return { group_snapshot: toCsiGroup(group) };
    });
  }

  async remove(
    request: Csi.DeleteVolumeGroupSnapshotRequest__Output,
    context: CallContext,
  ): Promise<Csi.DeleteVolumeGroupSnapshotResponse> {
    requireField(request.group_snapshot_id, 'group_snapshot_id');
    const handle = parseSnapshotHandle(request.group_snapshot_id);
    if (handle === undefined) return {};
    return this.#inFlight.run([`group ${request.group_snapshot_id}`], async () => {
      const group = await this.#metadata.findSnapshotGroup(handle, context);
      if (group === undefined) return {};
      compareMembers(group, request.snapshot_ids);
      await this.#metadata.deleteSnapshotGroup(group.uuid, context);
      return {};
    });
  }

  async get(
    request: Csi.GetVolumeGroupSnapshotRequest__Output,
    context: CallContext,
  ): Promise<Csi.GetVolumeGroupSnapshotResponse> {
    const handle = requireSnapshotHandle(request.group_snapshot_id, 'group_snapshot_id');
    const group = await this.#metadata.findSnapshotGroup(handle, context);
    if (group === undefined) {
      throw new HoldfastError('NOT_FOUND', `There is no group ${request.group_snapshot_id}.`);
    }
    compareMembers(group, request.snapshot_ids);
    return { group_snapshot: toCsiGroup(group) };
  }
}
