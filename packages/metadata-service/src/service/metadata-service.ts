/** The control plane's API: holdfast.v1.Metadata, for csi-controller, the CLI and people. */
import { HoldfastError, unary, type CallContext } from '@holdfast/common';
import type {
  CreateVolumeRequest__Output,
  FenceNodeRequest__Output,
  Host,
  Known,
  MetadataHandlers,
  Pool,
  PublishVolumeRequest__Output,
  UnpublishVolumeRequest__Output,
  Volume,
} from '@holdfast/proto';
import { once } from '../model/answers.ts';
import { mayDecide, requirePool } from '../model/decision.ts';
import { publishVolume, requireVolume, unpublishVolume } from '../model/grants.ts';
import { confirmOff, fenceHost, hostsOfNode } from '../model/hosts.ts';
import {
  tables,
  type AuditEntry,
  type HostRecord,
  type PoolRecord,
  type VolumeRecord,
} from '../model/records.ts';
import { slabsOf } from '../model/slabs.ts';
import {
  createVolume,
  deleteVolume,
  expandVolume,
  layersOf,
  listVolumes,
  maxVolumeBytes,
  minVolumeBytes,
} from '../model/volumes.ts';
import type { Snapshot, Value } from '../store/store.ts';
import type { Core } from './core.ts';
import { Importer } from './import.ts';
import type { Operations } from './operations.ts';
import type { Sessions } from './sessions.ts';
import { fenceProgress, refuseUnconfirmed, waitUntil } from './waiting.ts';
import { accessMode, auditToWire, hostToWire, layerToWire, poolToWire, volumeToWire } from './wire.ts';

export const serviceVersion = '0.1.0';
const maxAuditEntries = 1000;

export class MetadataApi {
  readonly #core: Core;
  readonly #sessions: Sessions;
  readonly #operations: Operations;
  readonly #importer: Importer;

  constructor(core: Core, sessions: Sessions, operations: Operations) {
    this.#core = core;
    this.#sessions = sessions;
    this.#operations = operations;
    this.#importer = new Importer(core, sessions);
  }

  handlers(): Known<MetadataHandlers> {
    const log = this.#core.logger;
    return {
      CreateVolume: unary(log, 'CreateVolume', (request) => this.#createVolume(request)),
      DeleteVolume: unary(log, 'DeleteVolume', async (request) => {
        await this.#core.decide((d) =>
          once(d, 'DeleteVolume', request, () => {
            deleteVolume(d, request.uuid);
            return null;
          }),
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
      PublishVolume: unary(log, 'PublishVolume', (request) => this.#publishVolume(request)),
      UnpublishVolume: unary(log, 'UnpublishVolume', (request, context) =>
        this.#unpublishVolume(request, context),
      ),
      GetCapacity: unary(log, 'GetCapacity', async (request) => this.#capacity(request.pool_uuids)),
      ListPools: unary(log, 'ListPools', async () => ({ pools: this.#listPools() })),
      ListNodes: unary(log, 'ListNodes', async () => ({ nodes: this.#listNodes() })),
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

  async #createVolume(request: CreateVolumeRequest__Output): Promise<Volume> {
    const { answer } = await this.#core.decide((d) =>
      once(d, 'CreateVolume', request, () => {
        const volume = createVolume(d, {
          name: request.name,
          poolUuids: request.pool_uuids,
          sizeBytes: BigInt(request.size_bytes),
          limitBytes: BigInt(request.limit_bytes),
          parameters: request.parameters,
        });
        return describeVolume(d.tx, volume, true) as Value;
      }),
    );
    return answer as Volume;
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
    if (!repeated && volume.granted_node_id) {
      this.#sessions.get(volume.granted_node_id)?.link.send({
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
    const { answer: publishId } = await this.#core.decide((d) =>
      once(d, 'UnpublishVolume', request, () => unpublishVolume(d, request.uuid, request.node_id)),
    );
    const look = (): { volume: VolumeRecord | undefined; host: HostRecord | undefined } =>
      this.#core.read((tx) => {
        const volume = tables.volume.get(tx, request.uuid);
        const holder = volume?.grant.state === 'FREE' ? null : volume?.grant.holder;
        const host = holder ? tables.host.get(tx, volume?.poolUuid ?? '', holder.hostId) : undefined;
        return { volume, host: host?.generation === holder?.generation ? host : undefined };
      });
    return await waitUntil(
      this.#core,
      context,
      () => {
        const { volume, host } = look();
        if (publishId === '' || volume?.publication?.publishId !== publishId) return {};
        refuseUnconfirmed(this.#core, host);
        return undefined;
      },
      () => {
        const { volume, host } = look();
        const progress = fenceProgress(this.#operations, host);
        return `volume ${volume?.name} is being taken back from ${volume?.publication?.nodeId}${progress === '' ? '' : `: ${progress}`}`;
      },
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
        .filter((pool) => pool !== undefined && this.#isUsable(pool))
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

  /** Known pools, and those that were refused before they became known. */
  #listPools(): Pool[] {
    const known = this.#core.read((tx) =>
      tables.pool.list(tx).map((pool) => {
        const hosts = tables.host.list(tx, [pool.uuid]).map((host) => this.#host(host));
        return poolToWire(pool, hosts, this.#core.refusals.get(pool.uuid));
      }),
    );
    const names = new Set(known.map((pool) => pool.uuid));
    const refused = [...this.#core.refusals]
      .filter(([uuid]) => !names.has(uuid))
      .map(([uuid, message]): Pool => ({ uuid, state: 'REFUSED', message }));
    return [...known, ...refused];
  }

  #listNodes(): object[] {
    return this.#core.read((tx) =>
      tables.node.list(tx).map((node) => {
        const session = this.#sessions.get(node.nodeId);
        return {
          node_id: node.nodeId,
          name: node.name,
          connected: session !== undefined,
          last_seen_unix_ms: (session?.lastSeenUnixMs ?? node.lastSeenUnixMs).toString(),
          hosts: hostsOfNode({ tx }, node.nodeId).map(({ host }) => this.#host(host)),
          agent_version: node.version,
          max_volumes: node.maxVolumes,
        };
      }),
    );
  }

  #host(host: HostRecord): Host {
    return hostToWire(host, this.#operations.waitingFor(host.poolUuid, host.hostId));
  }

  async #fenceNode(request: FenceNodeRequest__Output, context: CallContext): Promise<{ hosts: Host[] }> {
    const { answer } = await this.#core.decide((d) =>
      once(d, 'FenceNode', request, () => {
        requireNode(d.tx, request.node_id);
        if (request.pool_uuid !== '') requirePool(d, request.pool_uuid);
        return hostsOfNode(d, request.node_id)
          .filter(({ pool }) => request.pool_uuid === '' || pool.uuid === request.pool_uuid)
          .map(({ pool, host }) => {
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
      ? { layers: layers.map((layer) => layerToWire(layer, slabsOf(tx, volume.poolUuid, layer.layerId))) }
      : {}),
  });
}
