/** Publications and grants of volumes. Every step of the grant machine goes through applyGrant(). */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, requireAuthority, requireLife, requirePool, stale, type Decision } from './decision.ts';
import { nextEpoch } from './epoch.ts';
import { sameLife, stepGrant, type GrantEvent, type GrantOutcome } from './grant.ts';
import type { Death } from './host.ts';
import {
  tables,
  type AccessMode,
  type HostLife,
  type PublicationRecord,
  type VolumeRecord,
} from './records.ts';

/** A publication that was never staged yields to another node after this. */
export const supersedeAfterMs = 30_000;

/** Slabs of the volume's last holder, who died, are not yet read: the grant has to wait for the scan. */
export class OrphansPending extends HoldfastError {
  readonly poolUuid: string;
  readonly life: HostLife;
  constructor(volume: VolumeRecord, life: HostLife) {
    super(
      'UNAVAILABLE',
      `Volume ${volume.name} waits until the slabs that ${life.nodeId} (generation ${life.generation}) held when it died ` +
        'have been read from the pool. A live agent does that; repeat the call.',
    );
    this.poolUuid = volume.poolUuid;
    this.life = life;
  }
}

export function requireVolume(d: { readonly tx: Snapshot }, uuid: string): VolumeRecord {
  const volume = tables.volume.get(d.tx, uuid);
  if (volume === undefined || volume.state === 'DELETING') {
    throw new HoldfastError(
      'NOT_FOUND',
      `Volume ${uuid} does not exist${volume ? ': it is being deleted' : ''}.`,
    );
  }
  return volume;
}

/** Steps the machine and stores the outcome with its audit record. */
export function applyGrant(d: Decision, volume: VolumeRecord, event: GrantEvent): GrantOutcome {
  const outcome = stepGrant(volume.grant, event);
  if (outcome.type !== 'changed') return outcome;
  const { next } = outcome;
  const holder = next.holder ?? volume.grant.holder;
  const before = volume.grant.state;
  volume.grant = next;
  if (next.state === 'REVOKING') tables.revoking.put(d.tx, true, volume.poolUuid, volume.uuid);
  else if (before === 'REVOKING') tables.revoking.delete(d.tx, volume.poolUuid, volume.uuid);
  if (holder !== null) {
    if (next.state === 'FREE') tables.held.delete(d.tx, volume.poolUuid, holder.hostId, volume.uuid);
    else tables.held.put(d.tx, true, volume.poolUuid, holder.hostId, volume.uuid);
  }
  if (next.state === 'FREE' && volume.publication?.ending) endPublication(d, volume);
  tables.volume.put(d.tx, volume, volume.uuid);
  audit(d, outcome.audit.event, {
    poolUuid: volume.poolUuid,
    volumeUuid: volume.uuid,
    nodeId: holder?.nodeId ?? '',
    epoch: next.epoch,
    generation: holder?.generation ?? 0n,
    proof: outcome.audit.proof,
    detail: volume.name,
  });
  return outcome;
}

/** All grants of a generation that is dead. Part of the transaction that stores the proof. */
export function voidGrants(d: Decision, poolUuid: string, hostId: number, death: Death): void {
  for (const [[, , uuid]] of tables.held.entries(d.tx, [poolUuid, hostId])) {
    const volume = tables.volume.get(d.tx, uuid as string);
    if (volume === undefined) continue;
    applyGrant(d, volume, {
      type: 'generation-dead',
      hostId,
      generation: death.generation,
      proof: `generation ${death.generation} of ${death.nodeId} is dead: ${death.proof}`,
    });
  }
}

export interface PublishRequest {
  uuid: string;
  nodeId: string;
  accessMode: AccessMode;
  readOnly: boolean;
}

export function publishVolume(d: Decision, request: PublishRequest): PublicationRecord {
  const volume = requireVolume(d, request.uuid);
  const node = tables.node.get(d.tx, request.nodeId);
  if (node === undefined) {
    throw new HoldfastError('NOT_FOUND', `Node ${request.nodeId} is not known: its agent never connected.`);
  }
  if (request.accessMode === 'MULTI_NODE_READER_ONLY') {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Volume ${volume.name} cannot be read by several nodes: access mode MULTI_NODE_READER_ONLY comes with snapshots.`,
    );
  }
  const current = volume.publication;
  if (current?.nodeId === request.nodeId) return samePublication(volume, current, request);
  if (current !== null) supersede(d, volume, current, request.nodeId);
  if (volume.grant.state !== 'FREE') {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Volume ${volume.name} is still granted to ${volume.grant.holder?.nodeId}. Unpublish it there first.`,
    );
  }
  const count = tables.published.entries(d.tx, [node.nodeId]).length;
  if (node.maxVolumes > 0 && count >= node.maxVolumes) {
    throw new HoldfastError(
      'TOO_MANY',
      `Node ${node.nodeId} has ${count} volumes and takes ${node.maxVolumes}. Unpublish one, or use another node.`,
    );
  }
  const publication: PublicationRecord = {
    publishId: d.newId(),
    nodeId: node.nodeId,
    accessMode: request.accessMode,
    readOnly: request.readOnly,
    staged: false,
    ending: false,
    sinceUnixMs: d.nowUnixMs,
  };
  tables.volume.put(d.tx, { ...volume, publication }, volume.uuid);
  tables.published.put(d.tx, true, node.nodeId, volume.uuid);
  audit(d, 'publish', {
    poolUuid: volume.poolUuid,
    volumeUuid: volume.uuid,
    nodeId: node.nodeId,
    detail: volume.name,
  });
  return publication;
}

function samePublication(
  volume: VolumeRecord,
  current: PublicationRecord,
  request: PublishRequest,
): PublicationRecord {
  if (current.ending) {
    throw new HoldfastError(
      'OPERATION_PENDING',
      `Volume ${volume.name} is being unpublished from ${current.nodeId}. Repeat the call when that has ended.`,
    );
  }
  if (current.accessMode !== request.accessMode || current.readOnly !== request.readOnly) {
    throw new HoldfastError(
      'ALREADY_EXISTS',
      `Volume ${volume.name} is published to ${current.nodeId} already, as ${current.accessMode}` +
        `${current.readOnly ? ', read-only' : ''}. Unpublish it first.`,
    );
  }
  return current;
}

function supersede(d: Decision, volume: VolumeRecord, current: PublicationRecord, nodeId: string): void {
  const ageMs = d.nowUnixMs - current.sinceUnixMs;
  if (current.staged || current.ending || ageMs <= supersedeAfterMs) {
    throw new HoldfastError(
      'PUBLISHED_ELSEWHERE',
      `Volume ${volume.name} is published to ${current.nodeId}${current.ending ? ', which is being taken back' : ''}. ` +
        `Unpublish it there before it is published to ${nodeId}.`,
    );
  }
  audit(d, 'superseded', {
    poolUuid: volume.poolUuid,
    volumeUuid: volume.uuid,
    nodeId: current.nodeId,
    detail: `never staged in ${Math.round(ageMs / 1000)} s; published to ${nodeId} now`,
  });
  endPublication(d, volume);
}

function endPublication(d: Decision, volume: VolumeRecord): void {
  if (volume.publication === null) return;
  tables.published.delete(d.tx, volume.publication.nodeId, volume.uuid);
  volume.publication = null;
}

/**
 * Takes a publication back and returns its id; empty: there is none. It is gone at once, or when the grant, now REVOKING,
 * is free. An empty node id means every node.
 */
export function unpublishVolume(d: Decision, uuid: string, nodeId: string): string {
  const volume = tables.volume.get(d.tx, uuid);
  const publication = volume?.publication ?? null;
  if (volume === undefined || publication === null || (nodeId !== '' && publication.nodeId !== nodeId))
    return '';
  if (volume.grant.state === 'FREE') {
    endPublication(d, volume);
    tables.volume.put(d.tx, volume, uuid);
    audit(d, 'unpublish', {
      poolUuid: volume.poolUuid,
      volumeUuid: uuid,
      nodeId: publication.nodeId,
      epoch: volume.grant.epoch,
      detail: publication.staged ? 'the grant was returned before' : 'it was never staged',
    });
    return publication.publishId;
  }
  publication.ending = true;
  tables.volume.put(d.tx, volume, uuid);
  if (volume.grant.state !== 'REVOKING') applyGrant(d, volume, { type: 'unpublish' });
  return publication.publishId;
}

export interface StageRequest {
  poolUuid: string;
  life: HostLife;
  volumeUuid: string;
  publishId: string;
  readOnly: boolean;
}

/** FREE -> OFFERED, or the grant that this host has already. */
export function stageVolume(d: Decision, request: StageRequest): VolumeRecord {
  const volume = requireVolume(d, request.volumeUuid);
  if (volume.poolUuid !== request.poolUuid) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `Volume ${volume.name} is on pool ${volume.poolUuid}, not on ${request.poolUuid}.`,
    );
  }
  const pool = requirePool(d, volume.poolUuid);
  requireAuthority(d, pool);
  const host = requireLife(d, pool.uuid, request.life);
  const publication = volume.publication;
  const current =
    publication !== null &&
    !publication.ending &&
    publication.publishId === request.publishId &&
    publication.nodeId === request.life.nodeId;
  if (current && volume.grant.state === 'FREE') requireNoOrphans(d, volume);
  const outcome = applyGrant(d, volume, {
    type: 'stage',
    holder: request.life,
    publishId: request.publishId,
    publishCurrent: current,
    hostLive: host.state === 'LIVE',
    readOnly: request.readOnly || isReadOnly(publication),
    nextEpoch: nextEpoch(volume.grant.epoch, d.service.incarnation),
  });
  if (outcome.type === 'stale') {
    throw new HoldfastError('FAILED_PRECONDITION', `Volume ${volume.name} cannot be staged: ${outcome.why}.`);
  }
  if (outcome.type === 'changed' && publication !== null && !publication.staged) {
    volume.publication = { ...publication, staged: true };
    tables.volume.put(d.tx, volume, volume.uuid);
  }
  return volume;
}

function isReadOnly(publication: PublicationRecord | null): boolean {
  return publication?.readOnly === true || publication?.accessMode === 'SINGLE_NODE_READER_ONLY';
}

/** @throws OrphansPending, or HoldfastError CORRUPT when slabs of the last holder cannot be read at all. */
function requireNoOrphans(d: Decision, volume: VolumeRecord): void {
  const last = volume.grant.holder;
  const orphans =
    last === null ? undefined : tables.orphan.get(d.tx, volume.poolUuid, last.hostId, last.generation);
  if (last === null || orphans === undefined) return;
  if (orphans.runs.length > 0) throw new OrphansPending(volume, last);
  const slabs = orphans.bad.map(
    (run) => `${run.first}${run.count > 1 ? ` to ${run.first + run.count - 1}` : ''}`,
  );
  throw new HoldfastError(
    'CORRUPT',
    `Volume ${volume.name} is refused: ${last.nodeId} held it when it died, and of its slabs ${slabs.join(', ')} both ` +
      'copies of the page fail their check, so data may be missing. Run: holdfast pool check',
  );
}

export function volumeOpened(
  d: Decision,
  poolUuid: string,
  life: HostLife,
  uuid: string,
  epoch: bigint,
): void {
  requireLife(d, poolUuid, life);
  const volume = requireVolume(d, uuid);
  // Told already under another request id: what it says is recorded.
  if (volume.grant.state === 'OPEN' && volume.grant.epoch === epoch && sameLife(volume.grant.holder, life))
    return;
  const outcome = applyGrant(d, volume, { type: 'opened', holder: life, epoch });
  if (outcome.type === 'stale') throw stale(outcome.why);
}

export function volumeReturned(
  d: Decision,
  poolUuid: string,
  life: HostLife,
  uuid: string,
  epoch: bigint,
): void {
  requireLife(d, poolUuid, life);
  const volume = tables.volume.get(d.tx, uuid);
  if (volume === undefined) throw stale(`volume ${uuid} does not exist`);
  if (volume.grant.state === 'FREE' && volume.grant.epoch === epoch && sameLife(volume.grant.holder, life))
    return;
  const outcome = applyGrant(d, volume, { type: 'returned', holder: life, epoch });
  if (outcome.type === 'stale') throw stale(outcome.why);
}
