/** The control plane's API: holdfast.v1.Metadata, for csi-controller, the CLI and people. */
import { HoldfastError, unary, type CallContext } from '@holdfast/common';
import type {
  CreateSnapshotGroupRequest__Output,
  CreateSnapshotRequest__Output,
  CreateVolumeRequest__Output,
  DrainPoolRequest__Output,
  FenceNodeRequest__Output,
  Host,
  Known,
  ListNodesRequest__Output,
  MetadataHandlers,
  Node,
  Pool,
  PublishVolumeRequest__Output,
  RemovePoolRequest__Output,
  Snapshot as WireSnapshot,
  SnapshotGroup,
  UnpublishVolumeRequest__Output,
  Volume,
} from '@holdfast/proto';
import { once } from '../model/answers.ts';
import { mayDecide, requirePool, stale, type Decision } from '../model/decision.ts';
import { publishVolume, requireReady, requireVolume, unpublishVolume } from '../model/grants.ts';
import { growthNote } from '../model/growth.ts';
import { createGroup, deleteGroup, requireGroup } from '../model/groups.ts';
import { confirmOff, fenceHost, hostsOfNode } from '../model/hosts.ts';
import {
  tables,
  type AuditEntry,
  type GroupRecord,
  type HostRecord,
  type NodeRecord,
  type PoolRecord,
  type SnapshotRecord,
  type VolumeRecord,
} from '../model/records.ts';
import { layersOf } from '../model/layers.ts';
import { beginRemoval, contentsOf, drainPool, undrainPool } from '../model/removal.ts';
import { slabsOf } from '../model/slabs.ts';
import {
  beginCut,
  createSnapshot,
  deleteSnapshot,
  listSnapshots,
  requireSnapshot,
} from '../model/snapshots.ts';
import { usageOf } from '../model/usage.ts';
import {
  createVolume,
  deleteVolume,
  expandVolume,
  listVolumes,
  modifyVolume,
  maxVolumeBytes,
  minVolumeBytes,
} from '../model/volumes.ts';
import type { Snapshot, Value } from '../store/store.ts';
import { listChanges } from './changes.ts';
import type { Core } from './core.ts';
import { growNow } from './grow.ts';
import type { Heartbeats } from './heartbeats.ts';
import { Importer } from './import.ts';
import type { Operations } from './operations.ts';
import { removalProgress } from './remove-pool.ts';
import type { Sessions } from './sessions.ts';
import { afterWaiting, fenceProgress, isUnconfirmed, refuseUnconfirmed, waitUntil } from './waiting.ts';
import {
  accessMode,
  auditToWire,
  groupToWire,
  hostToWire,
  layerToWire,
  poolToWire,
  snapshotToWire,
  volumeToWire,
} from './wire.ts';

export const serviceVersion = '0.1.0';
const maxAuditEntries = 1000;

export class MetadataApi {
  readonly #core: Core;
  readonly #sessions: Sessions;
  readonly #operations: Operations;
  readonly #heartbeats: Heartbeats;
  readonly #importer: Importer;

  constructor(core: Core, sessions: Sessions, operations: Operations, heartbeats: Heartbeats) {
    this.#core = core;
    this.#sessions = sessions;
    this.#operations = operations;
    this.#heartbeats = heartbeats;
    this.#importer = new Importer(core, sessions);
  }

  handlers(): Known<MetadataHandlers> {
    const log = this.#core.logger;
    return {
      CreateVolume: unary(log, 'CreateVolume', (request, context) => this.#createVolume(request, context)),
      DeleteVolume: unary(log, 'DeleteVolume', async (request, context) => {
        await afterWaiting(this.#core, context, () =>
          this.#core.decide((d) =>
            once(d, 'DeleteVolume', request, () => {
              deleteVolume(d, request.uuid);
              return null;
            }),
          ),
        );
        return {};
      }),
      GetVolume: unary(log, 'GetVolume', async (request) => {
        if (request.uuid !== '') {
          await this.#importer.ensureKnown(request.uuid, request.volume_context);
        }
        return this.#core.read((tx) => describeVolume(tx, findVolume(tx, request), true));
      }),
      ListVolumes: unary(log, 'ListVolumes', async (request) =>
        this.#core.read((tx) => {
          const page = listVolumes(tx, {
            maxEntries: request.max_entries,
            token: request.starting_token,
            includeDeleting: request.include_deleting,
          });
          return {
            volumes: page.volumes.map((volume) => describeVolume(tx, volume, false)),
            next_token: page.nextToken,
          };
        }),
      ),
      ExpandVolume: unary(log, 'ExpandVolume', (request) => this.#expandVolume(request)),
      ModifyVolume: unary(log, 'ModifyVolume', async (request) => {
        const { answer } = await this.#core.decide((d) =>
          once(
            d,
            'ModifyVolume',
            request,
            () =>
              describeVolume(d.tx, modifyVolume(d, request.uuid, request.mutable_parameters), true) as Value,
          ),
        );
        return answer as Volume;
      }),
      PublishVolume: unary(log, 'PublishVolume', (request) => this.#publishVolume(request)),
      UnpublishVolume: unary(log, 'UnpublishVolume', (request, context) =>
        this.#unpublishVolume(request, context),
      ),
      CreateSnapshot: unary(log, 'CreateSnapshot', (request, context) =>
        this.#createSnapshot(request, context),
      ),
      DeleteSnapshot: unary(log, 'DeleteSnapshot', async (request) => {
        await this.#core.decide((d) =>
          once(d, 'DeleteSnapshot', request, () => {
            deleteSnapshot(d, request.uuid);
            return null;
          }),
        );
        return {};
      }),
      GetSnapshot: unary(log, 'GetSnapshot', async (request) =>
        this.#core.read((tx) => describeSnapshot(tx, findSnapshot(tx, request))),
      ),
      ListSnapshots: unary(log, 'ListSnapshots', async (request) =>
        this.#core.read((tx) => {
          const page = listSnapshots(tx, {
            maxEntries: request.max_entries,
            token: request.starting_token,
            sourceVolumeUuid: request.source_volume_uuid,
            snapshotUuid: request.snapshot_uuid,
          });
          return {
            snapshots: page.snapshots.map((snapshot) => describeSnapshot(tx, snapshot)),
            next_token: page.nextToken,
          };
        }),
      ),
      CreateSnapshotGroup: unary(log, 'CreateSnapshotGroup', (request, context) =>
        this.#createGroup(request, context),
      ),
      DeleteSnapshotGroup: unary(log, 'DeleteSnapshotGroup', async (request) => {
        await this.#core.decide((d) =>
          once(d, 'DeleteSnapshotGroup', request, () => {
            deleteGroup(d, request.uuid);
            return null;
          }),
        );
        return {};
      }),
      GetSnapshotGroup: unary(log, 'GetSnapshotGroup', async (request) =>
        this.#core.read((tx) => describeGroup(tx, requireGroup({ tx }, request.uuid))),
      ),
      ListChanges: (stream) => listChanges(this.#core, this.#sessions, stream),
      GetCapacity: unary(log, 'GetCapacity', async (request) => this.#capacity(request.pool_uuids)),
      ListPools: unary(log, 'ListPools', async () => ({ pools: this.#listPools() })),
      GrowPool: unary(log, 'GrowPool', async ({ pool_uuid: uuid }, context) => {
        const { added } = await growNow(this.#core, this.#sessions, this.#operations, uuid, context);
        return { pool: this.#pool(uuid), slabs_added: added.toString() };
      }),
      DrainPool: unary(log, 'DrainPool', (request) => this.#drain('DrainPool', request, drainPool)),
      UndrainPool: unary(log, 'UndrainPool', (request) => this.#drain('UndrainPool', request, undrainPool)),
      RemovePool: unary(log, 'RemovePool', (request, context) => this.#removePool(request, context)),
      ListNodes: unary(log, 'ListNodes', async (request) => ({ nodes: this.#listNodes(request) })),
      FenceNode: unary(log, 'FenceNode', (request, context) => this.#fenceNode(request, context)),
      ConfirmNodeOff: unary(log, 'ConfirmNodeOff', (request) => this.#confirmNodeOff(request)),
      ListAudit: unary(log, 'ListAudit', async (request) => ({
        records: this.#listAudit(
          request.volume_uuid,
          request.node_id,
          BigInt(request.after_sequence),
          request.max_entries,
        ).map(auditToWire),
      })),
      GetServiceInfo: unary(log, 'GetServiceInfo', async () => ({
        store_id: this.#core.service.storeId,
        incarnation: this.#core.service.incarnation.toString(),
        term: this.#core.service.term.toString(),
        version: serviceVersion,
        store_kind: this.#core.store.kind,
      })),
    };
  }

  async #createVolume(request: CreateVolumeRequest__Output, context: CallContext): Promise<Volume> {
    const { answer } = await this.#core.decide((d) =>
      once(d, 'CreateVolume', request, () => {
        const { volume, isNew } = createVolume(d, {
          name: request.name,
          poolUuids: request.pool_uuids,
          sizeBytes: BigInt(request.size_bytes),
          limitBytes: BigInt(request.limit_bytes),
          parameters: request.parameters,
          sourceSnapshotUuid: request.source_snapshot_uuid,
          sourceVolumeUuid: request.source_volume_uuid,
          mutableParameters: request.mutable_parameters,
        });
        if (isNew && volume.state === 'CREATING') {
          const purpose = { snapshotUuid: '', cloneUuid: volume.uuid, groupUuid: '', quiesce: false };
          beginCut(d, requireReady(d, request.source_volume_uuid), purpose, this.#isConnected);
        }
        return describeVolume(d.tx, volume, true) as Value;
      }),
    );
    const volume = answer as Volume;
    if (volume.state !== 'CREATING') return volume;
    return await waitUntil(
      this.#core,
      context,
      () =>
        this.#core.read((tx) => {
          const now = requireVolume({ tx }, volume.uuid ?? '');
          return now.state === 'CREATING' ? undefined : describeVolume(tx, now, true);
        }),
      () => this.#cutProgress(request.source_volume_uuid),
    );
  }

  readonly #isConnected = (nodeId: string): boolean => this.#sessions.isConnected(nodeId);

  #cutProgress(volumeUuid: string): string {
    const volume = this.#core.read((tx) => tables.volume.get(tx, volumeUuid));
    const why = this.#operations.lastError('cut', volumeUuid);
    return `volume ${volume?.name ?? volumeUuid} is being cut${why === '' ? '' : ` (${why.replace(/\.$/, '')})`}`;
  }

  async #createSnapshot(request: CreateSnapshotRequest__Output, context: CallContext): Promise<WireSnapshot> {
    const { answer: uuid } = await this.#core.decide((d) =>
      once(d, 'CreateSnapshot', request, () => {
        const wanted = {
          name: request.name,
          sourceVolumeUuid: request.source_volume_uuid,
          parameters: request.parameters,
        };
        return createSnapshot(d, wanted, this.#isConnected).uuid;
      }),
    );
    return await waitUntil(
      this.#core,
      context,
      () =>
        this.#core.read((tx) => {
          const snapshot = requireSnapshot(tx, uuid);
          return snapshot.state === 'READY' ? describeSnapshot(tx, snapshot) : undefined;
        }),
      () => this.#cutProgress(request.source_volume_uuid),
    );
  }

  async #createGroup(
    request: CreateSnapshotGroupRequest__Output,
    context: CallContext,
  ): Promise<SnapshotGroup> {
    const { answer: uuid } = await this.#core.decide((d) =>
      once(d, 'CreateSnapshotGroup', request, () => {
        const wanted = {
          name: request.name,
          sourceVolumeUuids: request.source_volume_uuids,
          parameters: request.parameters,
        };
        return createGroup(d, wanted, this.#isConnected).uuid;
      }),
    );
    return await waitUntil(
      this.#core,
      context,
      () =>
        this.#core.read((tx) => {
          const group = tables.group.get(tx, uuid);
          if (group === undefined) {
            throw new HoldfastError(
              'OPERATION_PENDING',
              `Snapshot group ${request.name} was given up: its volumes could not all be held and cut at once. Nothing was named; ` +
                'ListAudit says why. Repeat the call with a new request id.',
            );
          }
          return group.state === 'READY' ? describeGroup(tx, group) : undefined;
        }),
      () => {
        const why = this.#operations.lastError('group', uuid);
        return `snapshot group ${request.name} is being cut${why === '' ? '' : ` (${why.replace(/\.$/, '')})`}`;
      },
    );
  }

  async #expandVolume(request: {
    request_id: string;
    uuid: string;
    size_bytes: string;
    limit_bytes: string;
  }): Promise<Volume> {
    const { answer, repeated } = await this.#core.decide((d) =>
      once(d, 'ExpandVolume', request, () => {
        const volume = expandVolume(d, request.uuid, BigInt(request.size_bytes), BigInt(request.limit_bytes));
        return describeVolume(d.tx, volume, true) as Value;
      }),
    );
    const volume = answer as Volume;
    const holders = repeated
      ? []
      : [volume.granted_node_id ?? '', ...(volume.readers ?? []).map((reader) => reader.node_id ?? '')];
    for (const nodeId of holders) {
      this.#sessions.get(nodeId)?.link.send({
        volume_resized: { volume_uuid: request.uuid, size_bytes: volume.size_bytes ?? '0' },
      });
    }
    return volume;
  }

  async #publishVolume(request: PublishVolumeRequest__Output): Promise<{ publish_id: string }> {
    await this.#importer.ensureKnown(request.uuid, request.volume_context);
    const { answer } = await this.#core.decide((d) =>
      once(d, 'PublishVolume', request, () => {
        const publication = publishVolume(d, {
          uuid: request.uuid,
          nodeId: request.node_id,
          accessMode: accessMode(request.access_mode),
          readOnly: request.read_only,
        });
        return publication.publishId;
      }),
    );
    return { publish_id: answer };
  }

  async #unpublishVolume(request: UnpublishVolumeRequest__Output, context: CallContext): Promise<object> {
    // The answer on record is which publication was meant, so that a late repeat does not end a newer one.
    const { answer: publishIds } = await this.#core.decide((d) =>
      once(d, 'UnpublishVolume', request, () => unpublishVolume(d, request.uuid, request.node_id)),
    );
    const look = (): { name: string; nodeId: string; host: HostRecord | undefined }[] =>
      this.#core.read((tx) => {
        const volume = tables.volume.get(tx, request.uuid);
        const left = volume?.publications.filter((one) => publishIds.includes(one.publishId)) ?? [];
        return left.map(({ nodeId, publishId }) => {
          const grants = volume === undefined ? [] : [volume.grant, ...volume.readers];
          const holder = grants.find(
            (grant) => grant.state !== 'FREE' && grant.publishId === publishId,
          )?.holder;
          const host = holder ? tables.host.get(tx, volume?.poolUuid ?? '', holder.hostId) : undefined;
          return {
            name: volume?.name ?? '',
            nodeId,
            host: host?.generation === holder?.generation ? host : undefined,
          };
        });
      });
    return await waitUntil(
      this.#core,
      context,
      () => {
        const left = look();
        if (left.length === 0) return {};
        for (const { host } of left) refuseUnconfirmed(this.#core, host);
        return undefined;
      },
      () =>
        look()
          .map(({ name, nodeId, host }) => {
            const progress = fenceProgress(this.#operations, host);
            return `volume ${name} is being taken back from ${nodeId}${progress === '' ? '' : `: ${progress}`}`;
          })
          .join('; '),
    );
  }

  #capacity(poolUuids: readonly string[]): {
    available_bytes: string;
    maximum_volume_bytes: string;
    minimum_volume_bytes: string;
  } {
    const free = this.#core.read((tx) => {
      const pools =
        poolUuids.length > 0 ? poolUuids.map((uuid) => tables.pool.get(tx, uuid)) : tables.pool.list(tx);
      return pools
        .filter((pool) => pool !== undefined && !pool.draining && this.#isUsable(pool))
        .map((pool) => BigInt(pool?.slabsFree ?? 0) * BigInt(pool?.slabSize ?? 0));
    });
    return {
      available_bytes: free.reduce((sum, bytes) => sum + bytes, 0n).toString(),
      maximum_volume_bytes: maxVolumeBytes.toString(),
      minimum_volume_bytes: minVolumeBytes.toString(),
    };
  }

  #isUsable(pool: PoolRecord): boolean {
    return mayDecide({ service: this.#core.service, refusal: (uuid) => this.#core.refusals.get(uuid) }, pool);
  }

  #describePool(tx: Snapshot, pool: PoolRecord): Pool {
    const hosts = tables.host.list(tx, [pool.uuid]).map((host) => this.#host(host));
    const problems = this.#sessions.all().flatMap((session) => session.problems.get(pool.uuid) ?? []);
    const failure = this.#operations.lastError('grow', pool.uuid);
    const growth = [growthNote(tx, pool), failure, ...problems].filter((sentence) => sentence !== '');
    return poolToWire(pool, hosts, {
      refusal: this.#core.refusals.get(pool.uuid),
      growth: growth.join(' '),
      contents: pool.draining ? contentsOf(tx, pool.uuid) : undefined,
      removal: pool.removing ? removalProgress(this.#core, this.#sessions, pool.uuid) : '',
    });
  }

  #pool(uuid: string): Pool {
    return this.#core.read((tx) => this.#describePool(tx, requirePool({ tx }, uuid)));
  }

  async #drain(
    method: string,
    request: DrainPoolRequest__Output,
    change: (d: Decision, poolUuid: string, by: string) => void,
  ): Promise<Pool> {
    await this.#core.decide((d) =>
      once(d, method, request, () => {
        change(d, request.pool_uuid, request.asked_by || 'a person');
        return null;
      }),
    );
    return this.#pool(request.pool_uuid);
  }

  async #removePool(request: RemovePoolRequest__Output, context: CallContext): Promise<object> {
    const uuid = request.pool_uuid;
    await this.#core.decide((d) =>
      once(d, 'RemovePool', request, () => {
        beginRemoval(d, uuid, request.asked_by || 'a person', request.forget_kept_layers);
        return null;
      }),
    );
    return await waitUntil(
      this.#core,
      context,
      () => (this.#core.read((tx) => tables.pool.get(tx, uuid)) === undefined ? {} : undefined),
      () => `the pool is being removed: ${removalProgress(this.#core, this.#sessions, uuid)}`,
    );
  }

  /** Known pools, and those that were refused before they became known. */
  #listPools(): Pool[] {
    const known = this.#core.read((tx) => tables.pool.list(tx).map((pool) => this.#describePool(tx, pool)));
    const names = new Set(known.map((pool) => pool.uuid));
    const refused = [...this.#core.refusals]
      .filter(([uuid]) => !names.has(uuid))
      .map(([uuid, message]): Pool => ({ uuid, state: 'REFUSED', message }));
    return [...known, ...refused];
  }

  #listNodes(wanted: ListNodesRequest__Output): Node[] {
    return this.#core.read((tx) => {
      const hosts = tables.host.list(tx);
      return tables.node
        .list(tx)
        .filter((node) => wanted.name === '' || node.name === wanted.name)
        .map((node) => ({ node, hosts: hosts.filter((host) => host.nodeId === node.nodeId) }))
        .filter((one) => !wanted.only_troubled || this.#isTroubled(one.node, one.hosts))
        .map((one) => this.#node(one.node, one.hosts));
    });
  }

  #isTroubled(node: NodeRecord, hosts: readonly HostRecord[]): boolean {
    return (
      !this.#sessions.isConnected(node.nodeId) ||
      hosts.some((host) => host.state !== 'LIVE' && host.state !== 'JOINING')
    );
  }

  #node(node: NodeRecord, hosts: readonly HostRecord[]): Node {
    const session = this.#sessions.get(node.nodeId);
    return {
      node_id: node.nodeId,
      name: node.name,
      connected: session !== undefined,
      last_seen_unix_ms: (session?.lastSeenUnixMs ?? node.lastSeenUnixMs).toString(),
      hosts: hosts.map((host) => this.#host(host)),
      agent_version: node.version,
      max_volumes: node.maxVolumes,
      silent_ms: Math.floor(this.#sessions.silentMs(node.nodeId)).toString(),
    };
  }

  #host(host: HostRecord): Host {
    return this.#core.read((tx) =>
      hostToWire(host, {
        waitingFor: this.#operations.waitingFor(host.poolUuid, host.hostId),
        heldVolumes: tables.held.entries(tx, [host.poolUuid, host.hostId]).length,
        heartbeatStillMs: this.#heartbeats.stillMs(host),
        needsConfirmation: isUnconfirmed(tables.pool.get(tx, host.poolUuid), host),
      }),
    );
  }

  async #fenceNode(request: FenceNodeRequest__Output, context: CallContext): Promise<{ hosts: Host[] }> {
    const { answer } = await this.#core.decide((d) =>
      once(d, 'FenceNode', request, () => {
        requireNode(d.tx, request.node_id);
        if (request.pool_uuid !== '') requirePool(d, request.pool_uuid);
        const hosts = hostsOfNode(d, request.node_id).filter(
          ({ pool }) => request.pool_uuid === '' || pool.uuid === request.pool_uuid,
        );
        this.#refuseOtherLife(request, hosts);
        return hosts.map(({ pool, host }) => {
          fenceHost(d, pool, host, request.reason || 'asked for by a person');
          return { poolUuid: pool.uuid, hostId: host.hostId, generation: host.generation };
        });
      }),
    );
    const meant = answer as { poolUuid: string; hostId: number; generation: bigint }[];
    const look = (): HostRecord[] =>
      this.#core.read((tx) =>
        meant
          .map(({ poolUuid, hostId }) => tables.host.get(tx, poolUuid, hostId))
          .filter((host) => host !== undefined),
      );
    const isOver = (host: HostRecord, index: number): boolean =>
      host.state === 'DEAD' || host.generation !== meant[index]?.generation;
    if (request.no_wait) return { hosts: look().map((host) => this.#host(host)) };
    const hosts = await waitUntil(
      this.#core,
      context,
      () => {
        const now = look();
        if (now.every(isOver)) return now;
        for (const host of now) refuseUnconfirmed(this.#core, host);
        return undefined;
      },
      () =>
        look()
          .map((host) => fenceProgress(this.#operations, host))
          .filter((sentence) => sentence !== '')
          .join('; '),
    );
    return { hosts: hosts.map((host) => this.#host(host)) };
  }

  /** A caller who looked before it asked: what it saw may be over. @throws HoldfastError */
  #refuseOtherLife(request: FenceNodeRequest__Output, hosts: readonly { host: HostRecord }[]): void {
    if (request.unless_connected && this.#sessions.isConnected(request.node_id)) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `The agent of ${request.node_id} is connected, and the fence was asked for only if it is not. Nothing was changed.`,
      );
    }
    const meant = BigInt(request.generation);
    if (meant === 0n) return;
    if (request.pool_uuid === '') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'FenceNode takes a generation only together with pool_uuid.',
      );
    }
    const other = hosts.find(({ host }) => host.generation !== meant);
    if (hosts.length > 0 && other === undefined) return;
    throw stale(
      `generation ${meant} of ${request.node_id} was meant, it is ${other ? `at ${other.host.generation}` : 'no host of that pool'}`,
    );
  }

  async #confirmNodeOff(request: {
    request_id: string;
    node_id: string;
    confirmed_by: string;
  }): Promise<{ hosts: Host[] }> {
    if (request.confirmed_by === '') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'ConfirmNodeOff needs confirmed_by: who says that the machine is off.',
      );
    }
    if (this.#sessions.isConnected(request.node_id)) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `The agent of ${request.node_id} is connected, so its machine is not off. To cut the node off, run: holdfast node ` +
          `fence ${request.node_id}`,
      );
    }
    const { answer } = await this.#core.decide((d) =>
      once(d, 'ConfirmNodeOff', request, () => {
        requireNode(d.tx, request.node_id);
        return confirmOff(d, request.node_id, request.confirmed_by);
      }),
    );
    return { hosts: answer.map((host) => this.#host(host)) };
  }

  #listAudit(volumeUuid: string, nodeId: string, after: bigint, maxEntries: number): AuditEntry[] {
    const limit = maxEntries > 0 ? Math.min(maxEntries, maxAuditEntries) : maxAuditEntries;
    return this.#core.read((tx) => {
      if (volumeUuid === '' && nodeId === '') return tables.audit.list(tx, [], { after: [after], limit });
      const index = volumeUuid === '' ? tables.auditNode : tables.auditVolume;
      const about = volumeUuid === '' ? nodeId : volumeUuid;
      const both = volumeUuid !== '' && nodeId !== '';
      return index
        .entries(tx, [about], { after: [about, after], ...(both ? {} : { limit }) })
        .map(([parts]) => tables.audit.get(tx, BigInt(parts[1] as string)))
        .filter((entry) => entry !== undefined && (nodeId === '' || entry.nodeId === nodeId))
        .slice(0, limit) as AuditEntry[];
    });
  }
}

function requireNode(tx: Snapshot, nodeId: string): void {
  if (tables.node.get(tx, nodeId) !== undefined) return;
  throw new HoldfastError(
    'NOT_FOUND',
    `Node ${nodeId} is not known. \`holdfast node list\` shows those that are.`,
  );
}

function findVolume(tx: Snapshot, { uuid, name }: { uuid: string; name: string }): VolumeRecord {
  if (uuid === '') {
    const found = tables.volumeName.get(tx, name);
    if (found === undefined) throw new HoldfastError('NOT_FOUND', `There is no volume named ${name}.`);
    return requireVolume({ tx }, found);
  }
  const volume = tables.volume.get(tx, uuid);
  if (volume === undefined) throw new HoldfastError('NOT_FOUND', `Volume ${uuid} does not exist.`);
  return volume;
}

/** @param withLayers lists leave them out */
export function describeVolume(tx: Snapshot, volume: VolumeRecord, withLayers: boolean): Volume {
  const layers = layersOf(tx, volume);
  const slabSize = BigInt(tables.pool.get(tx, volume.poolUuid)?.slabSize ?? 0);
  const slabs = layers.reduce((sum, layer) => sum + layer.slabCount, 0);
  return volumeToWire(volume, {
    allocatedBytes: BigInt(slabs) * slabSize,
    ...(withLayers
      ? {
          usage: usageOf(tx, volume),
          layers: layers.map((layer) => ({
            ...layerToWire(layer, slabsOf(tx, volume.poolUuid, layer.layerId)),
            parent_layer_id: layer.parentLayerId.toString(),
          })),
        }
      : {}),
  });
}

function findSnapshot(tx: Snapshot, { uuid, name }: { uuid: string; name: string }): SnapshotRecord {
  if (uuid !== '') return requireSnapshot(tx, uuid);
  const found = tables.snapshotName.get(tx, name);
  if (found === undefined) throw new HoldfastError('NOT_FOUND', `There is no snapshot named ${name}.`);
  return requireSnapshot(tx, found);
}

function describeSnapshot(tx: Snapshot, snapshot: SnapshotRecord): WireSnapshot {
  const layer = tables.layer.get(tx, snapshot.poolUuid, snapshot.layerId);
  const slabSize = BigInt(tables.pool.get(tx, snapshot.poolUuid)?.slabSize ?? 0);
  return snapshotToWire(snapshot, BigInt(layer?.slabCount ?? 0) * slabSize);
}

function describeGroup(tx: Snapshot, group: GroupRecord): SnapshotGroup {
  const snapshots = group.snapshotUuids.map((uuid) => describeSnapshot(tx, requireSnapshot(tx, uuid)));
  return groupToWire(group, snapshots);
}
