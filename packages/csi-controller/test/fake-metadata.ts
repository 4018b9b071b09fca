/**
 * A metadata service in memory that keeps volumes and snapshots, cuts nothing, and can be slow: for what the controller makes
 * of a CSI call and of an answer. The real service is behind the controller in controller.test.ts and in csi-node's tests.
 */
import { randomUUID } from 'node:crypto';
import type { ServerWritableStream } from '@grpc/grpc-js';
import { createLogger, HoldfastError, serve, unary, type GrpcServer } from '@holdfast/common';
import {
  holdfast,
  type AuditRecord,
  type CreateSnapshotGroupRequest__Output,
  type CreateSnapshotRequest__Output,
  type CreateVolumeRequest__Output,
  type ListChangesRequest__Output,
  type ListChangesResponse,
  type ListSnapshotsRequest__Output,
  type Snapshot,
  type SnapshotGroup,
  type Volume,
} from '@holdfast/proto';

export class FakeMetadata {
  readonly pools = [
    { uuid: randomUUID(), name: 'fast' },
    { uuid: randomUUID(), name: 'slow' },
  ] as const;
  readonly audit: AuditRecord[] = [];
  readonly volumes = new Map<string, Volume>();
  readonly snapshots = new Map<string, Snapshot>();
  readonly groups = new Map<string, SnapshotGroup>();
  readonly created: CreateVolumeRequest__Output[] = [];
  readonly cut: CreateSnapshotRequest__Output[] = [];
  readonly asked: ListChangesRequest__Output[] = [];
  /** What ListChanges sends, message by message; an error ends it. */
  changes: (ListChangesResponse | HoldfastError)[] = [];
  /** ListChanges streams that the caller has left. */
  cancelled = 0;
  /** While set, CreateSnapshot and CreateSnapshotGroup wait for it. */
  gate: Promise<void> | undefined;
  #server: GrpcServer | undefined;

  get address(): string {
    return this.#server?.address ?? '';
  }

  addVolume(name: string, sizeBytes: number, pool: 0 | 1 = 0, over: Volume = {}): Volume {
    const volume: Volume = {
      uuid: randomUUID(),
      name,
      pool_uuid: this.pools[pool].uuid,
      size_bytes: String(sizeBytes),
      state: 'READY',
      ...over,
    };
    this.volumes.set(volume.uuid ?? '', volume);
    return volume;
  }

  #one<T extends { uuid?: string; name?: string }>(
    map: Map<string, T>,
    what: string,
    by: { uuid?: string; name?: string },
  ): T {
    const found = by.uuid ? map.get(by.uuid) : [...map.values()].find((each) => each.name === by.name);
    if (found === undefined) throw new HoldfastError('NOT_FOUND', `There is no ${what}.`);
    return found;
  }

  #snapshot(name: string, volume: Volume, over: Snapshot = {}): Snapshot {
    const snapshot: Snapshot = {
      uuid: randomUUID(),
      name,
      pool_uuid: volume.pool_uuid ?? '',
      source_volume_uuid: volume.uuid ?? '',
      size_bytes: volume.size_bytes ?? '',
      state: 'READY',
      created_unix_ms: '1700000000123',
      ...over,
    };
    this.snapshots.set(snapshot.uuid ?? '', snapshot);
    return snapshot;
  }

  async #createSnapshot(request: CreateSnapshotRequest__Output): Promise<Snapshot> {
    this.cut.push(request);
    await this.gate;
    const before = [...this.snapshots.values()].find((each) => each.name === request.name);
    if (before !== undefined) {
      if (before.source_volume_uuid === request.source_volume_uuid) return before;
      throw new HoldfastError('ALREADY_EXISTS', 'The name stands for a snapshot of another volume.');
    }
    const volume = this.#one(this.volumes, 'volume', { uuid: request.source_volume_uuid });
    return this.#snapshot(request.name, volume, { parameters: request.parameters });
  }

  async #createGroup(request: CreateSnapshotGroupRequest__Output): Promise<SnapshotGroup> {
    await this.gate;
    const before = [...this.groups.values()].find((each) => each.name === request.name);
    if (before !== undefined) return before;
    const uuid = randomUUID();
    const snapshots = request.source_volume_uuids.map((each, i) =>
      this.#snapshot(`${request.name}-${i}`, this.#one(this.volumes, 'volume', { uuid: each }), {
        group_uuid: uuid,
      }),
    );
    const group = { uuid, name: request.name, state: 'READY', created_unix_ms: '1700000000123', snapshots };
    this.groups.set(uuid, group);
    return group;
  }

  #createVolume(request: CreateVolumeRequest__Output): Volume {
    this.created.push(request);
    const before = [...this.volumes.values()].find((each) => each.name === request.name);
    if (before !== undefined) {
      if (Number(before.size_bytes) >= Number(request.size_bytes)) return before;
      throw new HoldfastError('ALREADY_EXISTS', 'The name stands for a smaller volume.');
    }
    const pool = request.pool_uuids[0] === this.pools[1].uuid ? 1 : 0;
    return this.addVolume(request.name, Number(request.size_bytes), pool, {
      parameters: request.parameters,
      mutable_parameters: request.mutable_parameters,
      source_snapshot_uuid: request.source_snapshot_uuid,
      source_volume_uuid: request.source_volume_uuid,
    });
  }

  #list(request: ListSnapshotsRequest__Output): { snapshots: Snapshot[]; next_token: string } {
    if (request.starting_token !== '' && !/^\d+$/.test(request.starting_token)) {
      throw new HoldfastError('BAD_TOKEN', 'That is not a token of ours.');
    }
    const all = [...this.snapshots.values()].filter(
      (each) =>
        (request.snapshot_uuid === '' || each.uuid === request.snapshot_uuid) &&
        (request.source_volume_uuid === '' || each.source_volume_uuid === request.source_volume_uuid),
    );
    const from = Number(request.starting_token);
    // Small pages, so that a caller that wants more than one has to come again.
    const to = from + Math.min(request.max_entries || 2, 2);
    return { snapshots: all.slice(from, to), next_token: to < all.length ? String(to) : '' };
  }

  async start(): Promise<void> {
    const logger = createLogger('fake-metadata');
    logger.level = 'silent';
    const rpc = <Req, Res>(method: string, body: (request: Req) => Res | Promise<Res>) =>
      unary(logger, method, async (request: Req) => body(request));
    type ByUuid = { uuid: string };
    this.#server = await serve('127.0.0.1:0', (server) =>
      server.addService(holdfast.Metadata.service, {
        CreateVolume: rpc('CreateVolume', (r: CreateVolumeRequest__Output) => this.#createVolume(r)),
        GetVolume: rpc('GetVolume', (r: ByUuid & { name: string }) => this.#one(this.volumes, 'volume', r)),
        ModifyVolume: rpc('ModifyVolume', (r: ByUuid & { mutable_parameters: Record<string, string> }) => {
          const volume = this.#one(this.volumes, 'volume', r);
          volume.mutable_parameters = { ...volume.mutable_parameters, ...r.mutable_parameters };
          return volume;
        }),
        CreateSnapshot: rpc('CreateSnapshot', (r: CreateSnapshotRequest__Output) => this.#createSnapshot(r)),
        DeleteSnapshot: rpc('DeleteSnapshot', (r: ByUuid) => {
          this.snapshots.delete(r.uuid);
          return {};
        }),
        GetSnapshot: rpc('GetSnapshot', (r: ByUuid & { name: string }) =>
          this.#one(this.snapshots, 'snapshot', r),
        ),
        ListSnapshots: rpc('ListSnapshots', (r: ListSnapshotsRequest__Output) => this.#list(r)),
        CreateSnapshotGroup: rpc('CreateSnapshotGroup', (r: CreateSnapshotGroupRequest__Output) =>
          this.#createGroup(r),
        ),
        DeleteSnapshotGroup: rpc('DeleteSnapshotGroup', (r: ByUuid) => {
          for (const { uuid } of this.groups.get(r.uuid)?.snapshots ?? []) this.snapshots.delete(uuid ?? '');
          this.groups.delete(r.uuid);
          return {};
        }),
        GetSnapshotGroup: rpc('GetSnapshotGroup', (r: ByUuid) => this.#one(this.groups, 'group', r)),
        ListAudit: rpc('ListAudit', () => ({ records: this.audit })),
        ListVolumes: rpc('ListVolumes', () => ({ volumes: [...this.volumes.values()] })),
        ListPools: rpc('ListPools', () => ({ pools: this.pools })),
        PublishVolume: rpc('PublishVolume', () => ({ publish_id: 'p1' })),
        ListChanges: (call: ServerWritableStream<ListChangesRequest__Output, ListChangesResponse>) => {
          this.asked.push(call.request);
          call.on('cancelled', () => {
            this.cancelled += 1;
          });
          for (const message of this.changes) {
            if (message instanceof HoldfastError) {
              unary(logger, 'ListChanges', () => Promise.reject(message))(
                Object.assign(call) as never,
                (error) => call.emit('error', error),
              );
              return;
            }
            call.write(message);
          }
          call.end();
        },
      }),
    );
  }

  async stop(): Promise<void> {
    await this.#server?.close(0);
  }
}
