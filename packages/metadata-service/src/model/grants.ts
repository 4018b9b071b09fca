/** Publications and grants of volumes. Every step of the grant machine goes through applyGrant(). */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, requireAuthority, requireLife, requirePool, stale, type Decision } from './decision.ts';
import { nextEpoch } from './epoch.ts';
import { isMaintenance, sameLife, stepGrant, type GrantEvent, type GrantOutcome } from './grant.ts';
import type { Death } from './host.ts';
import {
  tables,
  type AccessMode,
  type GrantRecord,
  type HostLife,
  type PoolRecord,
  type PublicationRecord,
  type VolumeRecord,
} from './records.ts';
import { compactionOf } from './segments.ts';

/** A publication that was never staged yields to another node after this. */
export const supersedeAfterMs = 30_000;

/** Something that ends by itself stands before a grant: who asks waits for it, or repeats the call. */
export class MustWait extends HoldfastError {
  readonly isOver: (tx: Snapshot) => boolean;
  constructor(message: string, isOver: (tx: Snapshot) => boolean) {
    super('UNAVAILABLE', message);
    this.isOver = isOver;
  }
}

/** Slabs of the volume's last holder, who died, are not yet read: the grant has to wait for the scan. */
function orphansPending(volume: VolumeRecord, life: HostLife): MustWait {
  return new MustWait(
    `Volume ${volume.name} waits until the slabs that ${life.nodeId} (generation ${life.generation}) held when it died ` +
      'have been read from the pool. A live agent does that; repeat the call.',
    (tx) => {
      const left = tables.orphan.get(tx, volume.poolUuid, life.hostId, life.generation);
      return left === undefined || left.runs.length === 0;
    },
  );
}

/** What somebody has a closed volume for; or it is being cut, and nobody opens it before it is known which layer is the top. */
export function maintained(tx: Snapshot, volume: VolumeRecord): MustWait {
  const compacted = compactionOf(tx, volume) !== undefined;
  return new MustWait(
    `Volume ${volume.name} is being ${compacted ? 'compacted' : 'cut for a snapshot or a copy'}. That is over in a moment; repeat the call.`,
    (tx) => {
      const now = tables.volume.get(tx, volume.uuid);
      return (
        now === undefined ||
        (tables.cutting.get(tx, volume.poolUuid, volume.uuid) === undefined && !isMaintenance(now.grant))
      );
    },
  );
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

/** One that is not waiting for the cut of its source. */
export function requireReady(d: { readonly tx: Snapshot }, uuid: string): VolumeRecord {
  const volume = requireVolume(d, uuid);
  if (volume.state === 'CREATING') {
    throw new HoldfastError(
      'UNAVAILABLE',
      `Volume ${volume.name} is still being made: its source is being cut. Repeat the call.`,
    );
  }
  return volume;
}

/**
 * Steps the machine and stores the outcome with its audit record.
 * @param reader one of the volume's read grants, or a new one that is FREE; undefined: the writer's
 */
export function applyGrant(
  d: Decision,
  volume: VolumeRecord,
  event: GrantEvent,
  reader?: GrantRecord,
): GrantOutcome {
  const grant = reader ?? volume.grant;
  const outcome = stepGrant(grant, event);
  if (outcome.type !== 'changed') return outcome;
  const { next } = outcome;
  const holder = next.holder ?? grant.holder;
  if (reader === undefined) volume.grant = next;
  else {
    const others = volume.readers.filter((one) => one !== reader);
    volume.readers = next.state === 'FREE' ? others : [...others, next];
  }
  if (next.epoch > volume.lastEpoch) volume.lastEpoch = next.epoch;
  if (holder !== null) {
    const at = [volume.poolUuid, volume.uuid, holder.hostId] as const;
    if (next.state === 'REVOKING') tables.revoking.put(d.tx, true, ...at);
    else if (grant.state === 'REVOKING') tables.revoking.delete(d.tx, ...at);
    if (next.state === 'FREE') tables.held.delete(d.tx, volume.poolUuid, holder.hostId, volume.uuid);
    else tables.held.put(d.tx, true, volume.poolUuid, holder.hostId, volume.uuid);
  }
  if (next.state === 'FREE') {
    const ended = volume.publications.find((one) => one.ending && one.publishId === next.publishId);
    if (ended !== undefined) endPublication(d, volume, ended);
  }
  tables.volume.put(d.tx, volume, volume.uuid);
  const kind = reader !== undefined ? ', for reading' : isMaintenance(next) ? ', for maintenance' : '';
  audit(d, outcome.audit.event, {
    poolUuid: volume.poolUuid,
    volumeUuid: volume.uuid,
    nodeId: holder?.nodeId ?? '',
    epoch: next.epoch,
    generation: holder?.generation ?? 0n,
    proof: outcome.audit.proof,
    detail: volume.name + kind,
  });
  return outcome;
}

/** The grant that a host has of a volume, if any: the writer's, or one of the readers' (then also as `reader`). */
export function grantOfHost(
  volume: VolumeRecord,
  hostId: number,
): { grant: GrantRecord; reader: GrantRecord | undefined } | undefined {
  const reader = volume.readers.find((one) => one.holder?.hostId === hostId);
  if (reader !== undefined) return { grant: reader, reader };
  const { grant } = volume;
  return grant.state !== 'FREE' && grant.holder?.hostId === hostId ? { grant, reader: undefined } : undefined;
}

/** Of the readers, the one with this epoch and holder; undefined: the message is about the writer's grant. */
function readerAt(volume: VolumeRecord, life: HostLife, epoch: bigint): GrantRecord | undefined {
  return volume.readers.find((one) => one.epoch === epoch && sameLife(one.holder, life));
}

/** All grants of a generation that is dead. Part of the transaction that stores the proof. */
export function voidGrants(d: Decision, poolUuid: string, hostId: number, death: Death): void {
  for (const [[, , uuid]] of tables.held.entries(d.tx, [poolUuid, hostId])) {
    const volume = tables.volume.get(d.tx, uuid as string);
    const held = volume === undefined ? undefined : grantOfHost(volume, hostId);
    if (volume === undefined || held === undefined) continue;
    const event = {
      type: 'generation-dead',
      hostId,
      generation: death.generation,
      proof: `generation ${death.generation} of ${death.nodeId} is dead: ${death.proof}`,
    } as const;
    applyGrant(d, volume, event, held.reader);
  }
}

export interface PublishRequest {
  uuid: string;
  nodeId: string;
  accessMode: AccessMode;
  readOnly: boolean;
}

const shared: AccessMode = 'MULTI_NODE_READER_ONLY';

export function publishVolume(d: Decision, request: PublishRequest): PublicationRecord {
  const volume = requireReady(d, request.uuid);
  const node = tables.node.get(d.tx, request.nodeId);
  if (node === undefined) {
    throw new HoldfastError('NOT_FOUND', `Node ${request.nodeId} is not known: its agent never connected.`);
  }
  const current = volume.publications.find((one) => one.nodeId === request.nodeId);
  if (current !== undefined) return samePublication(volume, current, request);
  for (const other of volume.publications) {
    if (request.accessMode === shared && other.accessMode === shared) continue;
    supersede(d, volume, other, request);
  }
  const held = [volume.grant, ...(request.accessMode === shared ? [] : volume.readers)].find(
    (grant) => grant.state !== 'FREE' && !isMaintenance(grant),
  );
  if (held !== undefined) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Volume ${volume.name} is still granted to ${held.holder?.nodeId}. Unpublish it there first.`,
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
  volume.publications = [...volume.publications, publication];
  tables.volume.put(d.tx, volume, volume.uuid);
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

function supersede(
  d: Decision,
  volume: VolumeRecord,
  current: PublicationRecord,
  request: PublishRequest,
): void {
  const ageMs = d.nowUnixMs - current.sinceUnixMs;
  if (current.staged || current.ending || ageMs <= supersedeAfterMs) {
    throw new HoldfastError(
      'PUBLISHED_ELSEWHERE',
      `Volume ${volume.name} is published to ${current.nodeId}` +
        (current.accessMode === shared ? ', for reading by several nodes' : '') +
        `${current.ending ? ', which is being taken back' : ''}. Unpublish it there before it is published to ` +
        `${request.nodeId} as ${request.accessMode}.`,
    );
  }
  audit(d, 'superseded', {
    poolUuid: volume.poolUuid,
    volumeUuid: volume.uuid,
    nodeId: current.nodeId,
    detail: `never staged in ${Math.round(ageMs / 1000)} s; published to ${request.nodeId} now`,
  });
  endPublication(d, volume, current);
}

function endPublication(d: Decision, volume: VolumeRecord, ended: PublicationRecord): void {
  tables.published.delete(d.tx, ended.nodeId, volume.uuid);
  volume.publications = volume.publications.filter((one) => one.publishId !== ended.publishId);
}

/**
 * Takes publications back and returns their ids; none: there is none. Each is gone at once, or when the grant that was given
 * under it, now REVOKING, is free. An empty node id means every node.
 */
export function unpublishVolume(d: Decision, uuid: string, nodeId: string): string[] {
  const volume = tables.volume.get(d.tx, uuid);
  if (volume === undefined) return [];
  const meant = volume.publications.filter((one) => nodeId === '' || one.nodeId === nodeId);
  for (const publication of meant) unpublish(d, volume, publication);
  return meant.map((publication) => publication.publishId);
}

function unpublish(d: Decision, volume: VolumeRecord, publication: PublicationRecord): void {
  const reader = volume.readers.find((one) => one.publishId === publication.publishId);
  const grant = reader ?? volume.grant;
  if (grant.state === 'FREE' || grant.publishId !== publication.publishId) {
    endPublication(d, volume, publication);
    tables.volume.put(d.tx, volume, volume.uuid);
    audit(d, 'unpublish', {
      poolUuid: volume.poolUuid,
      volumeUuid: volume.uuid,
      nodeId: publication.nodeId,
      epoch: volume.grant.epoch,
      detail: publication.staged ? 'the grant was returned before' : 'it was never staged',
    });
    return;
  }
  volume.publications = volume.publications.map((one) =>
    one.publishId === publication.publishId ? { ...one, ending: true } : one,
  );
  tables.volume.put(d.tx, volume, volume.uuid);
  if (grant.state !== 'REVOKING') applyGrant(d, volume, { type: 'unpublish' }, reader);
}

export interface StageRequest {
  poolUuid: string;
  life: HostLife;
  volumeUuid: string;
  publishId: string;
  readOnly: boolean;
}

export interface Staged {
  volume: VolumeRecord;
  grant: GrantRecord;
}

/** FREE -> OFFERED, or the grant that this host has already. */
export function stageVolume(d: Decision, request: StageRequest): Staged {
  const volume = requireReady(d, request.volumeUuid);
  const { life } = request;
  if (volume.poolUuid !== request.poolUuid) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `Volume ${volume.name} is on pool ${volume.poolUuid}, not on ${request.poolUuid}.`,
    );
  }
  const pool = requirePool(d, volume.poolUuid);
  requireAuthority(d, pool);
  const host = requireLife(d, pool.uuid, life);
  const publication = volume.publications.find(
    (one) => one.publishId === request.publishId && one.nodeId === life.nodeId && !one.ending,
  );
  const beside = publication?.accessMode === shared;
  const reader = beside ? (grantOfHost(volume, life.hostId)?.reader ?? freeReader(volume)) : undefined;
  const before = reader ?? volume.grant;
  if (publication !== undefined && (before.state === 'FREE' || isMaintenance(volume.grant))) {
    if (isMaintenance(volume.grant) || tables.cutting.get(d.tx, pool.uuid, volume.uuid) !== undefined)
      throw maintained(d.tx, volume);
    requireNoOrphans(d, volume);
  }
  const outcome = applyGrant(
    d,
    volume,
    {
      type: 'stage',
      holder: life,
      publishId: request.publishId,
      publishCurrent: publication !== undefined,
      hostLive: host.state === 'LIVE',
      readOnly: request.readOnly || isReadOnly(publication),
      blockedBy: blockedBy(volume, beside),
      nextEpoch: nextEpoch(volume.lastEpoch, d.service.incarnation),
    },
    reader,
  );
  if (outcome.type === 'stale') {
    throw new HoldfastError('FAILED_PRECONDITION', `Volume ${volume.name} cannot be staged: ${outcome.why}.`);
  }
  if (outcome.type === 'changed' && publication?.staged === false) {
    volume.publications = volume.publications.map((one) =>
      one.publishId === publication.publishId ? { ...one, staged: true } : one,
    );
    tables.volume.put(d.tx, volume, volume.uuid);
  }
  return { volume, grant: outcome.type === 'changed' ? outcome.next : before };
}

/** Of a host that does not read the volume yet. */
function freeReader(volume: VolumeRecord): GrantRecord {
  return { state: 'FREE', epoch: volume.lastEpoch, holder: null, publishId: '', readOnly: true };
}

/** A writer has no readers beside it, and readers no writer. */
function blockedBy(volume: VolumeRecord, reading: boolean): string {
  const other = reading ? (volume.grant.state === 'FREE' ? undefined : volume.grant) : volume.readers[0];
  if (other === undefined) return '';
  return `${other.holder?.nodeId} has it ${reading ? 'alone' : 'for reading beside others'} (${other.state})`;
}

/** What a stage gave, as far as it is still so. @throws STALE when the grant is over */
export function stagedBefore(d: Decision, volumeUuid: string, life: HostLife, epoch: bigint): Staged {
  const volume = tables.volume.get(d.tx, volumeUuid);
  const held = volume === undefined ? undefined : grantOfHost(volume, life.hostId);
  if (volume === undefined || held?.grant.epoch !== epoch || !sameLife(held.grant.holder, life)) {
    throw stale(`the grant of epoch ${epoch} on volume ${volumeUuid} is over`);
  }
  return { volume, grant: held.grant };
}

/** Gives a closed volume to a live host for a cut or a compaction. @throws HoldfastError when it cannot be given now */
export function maintain(d: Decision, pool: PoolRecord, volume: VolumeRecord, life: HostLife): void {
  requireAuthority(d, pool);
  const host = requireLife(d, pool.uuid, life);
  requireNoOrphans(d, volume);
  const outcome = applyGrant(d, volume, {
    type: 'maintain',
    holder: life,
    hostLive: host.state === 'LIVE',
    blockedBy: blockedBy(volume, false),
    nextEpoch: nextEpoch(volume.lastEpoch, d.service.incarnation),
  });
  if (outcome.type === 'stale') {
    throw new HoldfastError(
      'UNAVAILABLE',
      `Volume ${volume.name} cannot be opened for maintenance: ${outcome.why}.`,
    );
  }
}

function isReadOnly(publication: PublicationRecord | undefined): boolean {
  return publication?.readOnly === true || publication?.accessMode.endsWith('_READER_ONLY') === true;
}

/** @throws MustWait, or HoldfastError CORRUPT when slabs of the last holder cannot be read at all. */
export function requireNoOrphans(d: { readonly tx: Snapshot }, volume: VolumeRecord): void {
  const last = volume.grant.holder;
  const orphans =
    last === null ? undefined : tables.orphan.get(d.tx, volume.poolUuid, last.hostId, last.generation);
  if (last === null || orphans === undefined) return;
  if (orphans.runs.length > 0) throw orphansPending(volume, last);
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
  const reader = readerAt(volume, life, epoch);
  const { state, epoch: current, holder } = reader ?? volume.grant;
  // Told already under another request id: what it says is recorded.
  if (state === 'OPEN' && current === epoch && sameLife(holder, life)) return;
  const outcome = applyGrant(d, volume, { type: 'opened', holder: life, epoch }, reader);
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
  const reader = readerAt(volume, life, epoch);
  const outcome = applyGrant(d, volume, { type: 'returned', holder: life, epoch }, reader);
  if (outcome.type === 'stale') throw stale(outcome.why);
}
