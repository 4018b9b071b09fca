/** Between records and messages: bigint and text, our names and the enums' names. The only place that knows both. */
import { HoldfastError } from '@holdfast/common';
import type {
  AccessMode__Output,
  AuditRecord,
  ClaimedSlab__Output,
  FencingClass__Output,
  Grant,
  Host,
  HostRef__Output,
  Layer,
  Pool,
  PoolSeen__Output,
  Snapshot,
  SnapshotGroup,
  SlabRun as WireRun,
  SlabRun__Output,
  Volume,
} from '@holdfast/proto';
import type { Claim } from '../model/allocation.ts';
import { machineWasOff } from '../model/host.ts';
import type { PoolSighting } from '../model/pools.ts';
import type { PoolContents } from '../model/removal.ts';
import type {
  AccessMode,
  AuditEntry,
  FencingClass,
  GrantRecord,
  GroupRecord,
  HostLife,
  HostRecord,
  LayerRecord,
  PoolRecord,
  SlabRun,
  SnapshotRecord,
  VolumeRecord,
} from '../model/records.ts';
import type { Usage } from '../model/usage.ts';

const fencingNames = {
  reservations: 'FENCING_CLASS_RESERVATIONS',
  manual: 'FENCING_CLASS_MANUAL',
  'lease-only': 'FENCING_CLASS_LEASE_ONLY',
  loop: 'FENCING_CLASS_LOOP',
} as const satisfies Record<FencingClass, FencingClass__Output>;

function fencingClass(name: FencingClass__Output): FencingClass {
  const found = (Object.keys(fencingNames) as FencingClass[]).find((key) => fencingNames[key] === name);
  if (found === undefined)
    throw new HoldfastError('INVALID_ARGUMENT', `A pool has no fencing class (${name}).`);
  return found;
}

const accessModes: readonly AccessMode[] = [
  'SINGLE_NODE_WRITER',
  'SINGLE_NODE_READER_ONLY',
  'MULTI_NODE_READER_ONLY',
  'SINGLE_NODE_SINGLE_WRITER',
  'SINGLE_NODE_MULTI_WRITER',
];

export function accessMode(name: AccessMode__Output): AccessMode {
  const found = accessModes.find((mode) => name === `ACCESS_MODE_${mode}`);
  if (found === undefined) throw new HoldfastError('INVALID_ARGUMENT', 'PublishVolume needs an access_mode.');
  return found;
}

export function lifeOfRef(ref: HostRef__Output | null | undefined): { poolUuid: string; life: HostLife } {
  if (!ref || ref.pool_uuid === '' || ref.node_id === '') {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      'The request names no host (pool, node, host id, generation).',
    );
  }
  return {
    poolUuid: ref.pool_uuid,
    life: { hostId: ref.host_id, generation: BigInt(ref.generation), nodeId: ref.node_id },
  };
}

export function refOf(host: HostRecord): {
  pool_uuid: string;
  node_id: string;
  host_id: number;
  generation: string;
} {
  return {
    pool_uuid: host.poolUuid,
    node_id: host.nodeId,
    host_id: host.hostId,
    generation: host.generation.toString(),
  };
}

export function runToWire(run: SlabRun): WireRun {
  return { first: run.first.toString(), count: run.count, generation: run.generation.toString() };
}

export function runFromWire(run: SlabRun__Output): SlabRun {
  return { first: slabNumber(run.first), count: run.count, generation: BigInt(run.generation) };
}

export function claimFromWire(claim: ClaimedSlab__Output): Claim {
  return {
    layerId: BigInt(claim.layer_id),
    slab: slabNumber(claim.slab),
    generation: BigInt(claim.generation),
  };
}

export function slabNumber(text: string): number {
  const number = Number(text);
  if (!Number.isSafeInteger(number))
    throw new HoldfastError('INVALID_ARGUMENT', `Slab ${text} does not exist.`);
  return number;
}

export function sightingFromWire(seen: PoolSeen__Output): PoolSighting {
  const authority = seen.authority;
  return {
    uuid: seen.uuid,
    name: seen.name,
    wwid: seen.wwid,
    devicePath: seen.device_path,
    fencing: fencingClass(seen.fencing),
    slabSize: slabNumber(seen.slab_size),
    slabCount: slabNumber(seen.slab_count),
    volumeSlots: seen.volume_slots,
    layerSlots: seen.layer_slots,
    hostSlots: seen.host_slots,
    renewIntervalMs: seen.renew_interval_ms,
    leaseMs: seen.lease_ms,
    drainMs: seen.drain_ms,
    deviceBytes: BigInt(seen.device_bytes),
    slabsPossible: slabNumber(seen.slabs_possible),
    problem: seen.problem,
    authority: {
      storeId: authority?.store_id ?? '',
      incarnation: BigInt(authority?.incarnation ?? 0),
      term: BigInt(authority?.term ?? 0),
    },
  };
}

/** What is known of a host besides its record. */
export interface HostStanding {
  /** Of its fence. */
  waitingFor: string;
  heldVolumes: number;
  heartbeatStillMs: number | undefined;
  needsConfirmation: boolean;
}

export function hostToWire(host: HostRecord, standing: HostStanding): Host {
  const fencing = host.state === 'FENCING' || host.state === 'CUTTING';
  return {
    pool_uuid: host.poolUuid,
    node_id: host.nodeId,
    host_id: host.hostId,
    generation: host.generation.toString(),
    state: `HOST_STATE_${host.state}`,
    lock_path: host.lockPath,
    machine_id: host.machineId,
    boot_id: host.bootId,
    fence_reason: host.fence?.reason ?? '',
    waiting_for: fencing ? standing.waitingFor : '',
    since_unix_ms: host.sinceUnixMs.toString(),
    proof: host.proof,
    machine_off: machineWasOff(host),
    held_volumes: standing.heldVolumes,
    needs_confirmation: standing.needsConfirmation,
    heartbeat_read: standing.heartbeatStillMs !== undefined,
    heartbeat_still_ms: Math.floor(standing.heartbeatStillMs ?? 0).toString(),
  };
}

/** What is known of a pool besides its record. */
export interface PoolStanding {
  refusal: string | undefined;
  /** What its growth waits for. */
  growth: string;
  /** Of one that is draining or being removed. */
  contents: PoolContents | undefined;
  /** What its removal waits for. */
  removal: string;
}

export function poolToWire(pool: PoolRecord, hosts: Host[], standing: PoolStanding): Pool {
  const { refusal, contents } = standing;
  return {
    uuid: pool.uuid,
    name: pool.name,
    wwid: pool.wwid,
    fencing: fencingNames[pool.fencing],
    slab_size: pool.slabSize.toString(),
    slab_count: pool.slabCount.toString(),
    slabs_free: pool.slabsFree.toString(),
    slabs_ahead: pool.slabsAhead.toString(),
    volume_slots: pool.volumeSlots,
    layer_slots: pool.layerSlots,
    renew_interval_ms: pool.renewIntervalMs,
    lease_ms: pool.leaseMs,
    drain_ms: pool.drainMs,
    incarnation: (pool.claimed?.incarnation ?? 0n).toString(),
    hosts,
    provisioned_bytes: pool.provisionedBytes.toString(),
    state: refusal !== undefined ? 'REFUSED' : pool.removing ? 'REMOVING' : pool.state,
    message: refusal ?? standing.removal,
    draining: pool.draining ?? false,
    growth: standing.growth,
    contents:
      contents === undefined
        ? null
        : {
            volumes: contents.volumes.toString(),
            volumes_deleting: contents.deleting.toString(),
            snapshots: contents.snapshots.toString(),
            layers: contents.layers.toString(),
            kept_layers: contents.keptLayers.toString(),
            grants: contents.grants.toString(),
            volume_names: contents.volumeNames,
            snapshot_names: contents.snapshotNames,
          },
  };
}

/**
 * For agents. The parent is the one in the layer's record on the disk, which engines and jobs leave as it is: layers in between may have left
 * the chain since. What may be named where is counted (diskChildren), and slots are used again by that.
 */
export function layerToWire(layer: LayerRecord, slabs: readonly SlabRun[]): Layer {
  return {
    layer_id: layer.layerId.toString(),
    slot: layer.slot,
    parent_layer_id: layer.diskParentId.toString(),
    birth: layer.birth.toString(),
    size_bytes: layer.sizeBytes.toString(),
    frozen: layer.frozen,
    slabs: slabs.map(runToWire),
  };
}

/** @param layers left out of lists, as is `usage` */
export function volumeToWire(
  volume: VolumeRecord,
  { allocatedBytes, layers, usage }: { allocatedBytes: bigint; layers?: Layer[]; usage?: Usage },
): Volume {
  const { grant } = volume;
  return {
    uuid: volume.uuid,
    volume_id: volume.volumeId.toString(),
    name: volume.name,
    pool_uuid: volume.poolUuid,
    size_bytes: volume.sizeBytes.toString(),
    parameters: volume.parameters,
    state: volume.state,
    epoch: grant.epoch.toString(),
    grant: `GRANT_STATE_${grant.state}`,
    granted_node_id: grant.state === 'FREE' ? '' : (grant.holder?.nodeId ?? ''),
    publications: volume.publications.map((publication) => ({
      publish_id: publication.publishId,
      node_id: publication.nodeId,
      access_mode: `ACCESS_MODE_${publication.accessMode}`,
      read_only: publication.readOnly,
      staged: publication.staged,
      since_unix_ms: publication.sinceUnixMs.toString(),
    })),
    allocated_bytes: allocatedBytes.toString(),
    created_unix_ms: volume.createdUnixMs.toString(),
    layers: layers ?? [],
    slot: volume.slot,
    source_snapshot_uuid: volume.sourceSnapshotUuid,
    source_volume_uuid: volume.sourceVolumeUuid,
    own_bytes: (usage?.ownBytes ?? 0n).toString(),
    shared_bytes: (usage?.sharedBytes ?? 0n).toString(),
    reclaimable_bytes: (usage?.reclaimableBytes ?? 0n).toString(),
    mutable_parameters: volume.mutableParameters ?? {},
    readers: volume.readers.map((reader) => ({
      node_id: reader.holder?.nodeId ?? '',
      epoch: reader.epoch.toString(),
      grant: `GRANT_STATE_${reader.state}`,
    })),
  };
}

export function snapshotToWire(snapshot: SnapshotRecord, layerBytes: bigint): Snapshot {
  return {
    uuid: snapshot.uuid,
    name: snapshot.name,
    pool_uuid: snapshot.poolUuid,
    source_volume_uuid: snapshot.sourceVolumeUuid,
    size_bytes: snapshot.sizeBytes.toString(),
    layer_id: snapshot.layerId.toString(),
    state: snapshot.state,
    group_uuid: snapshot.groupUuid,
    created_unix_ms: snapshot.createdUnixMs.toString(),
    parameters: snapshot.parameters,
    layer_bytes: layerBytes.toString(),
  };
}

export function groupToWire(group: GroupRecord, snapshots: Snapshot[]): SnapshotGroup {
  return {
    uuid: group.uuid,
    name: group.name,
    state: group.state === 'READY' ? 'READY' : 'CUTTING',
    created_unix_ms: group.createdUnixMs.toString(),
    snapshots,
  };
}

export function grantToWire(volume: VolumeRecord, grant: GrantRecord, layers: Layer[]): Grant {
  return {
    volume_uuid: volume.uuid,
    volume_id: volume.volumeId.toString(),
    slot: volume.slot,
    name: volume.name,
    size_bytes: volume.sizeBytes.toString(),
    epoch: grant.epoch.toString(),
    layers,
    parameters: volume.parameters,
    read_only: grant.readOnly,
  };
}

export function auditToWire(entry: AuditEntry): AuditRecord {
  return {
    sequence: entry.sequence.toString(),
    at_unix_ms: entry.atUnixMs.toString(),
    event: entry.event,
    pool_uuid: entry.poolUuid,
    volume_uuid: entry.volumeUuid,
    node_id: entry.nodeId,
    epoch: entry.epoch.toString(),
    generation: entry.generation.toString(),
    proof: entry.proof,
    detail: entry.detail,
  };
}
