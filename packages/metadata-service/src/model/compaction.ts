/**
 * Compaction: blocks of folded layers that nothing newer covers are copied up into the volume's writable top, by whoever may write
 * it, so that the next strip empties their slabs. Here it is decided when that pays; service/compact.ts gives the orders.
 *
 * Why it ends: an order that moved something leaves less to move, as what the top covers is never moved again. A run in which
 * nothing is left to move is on record with the live blocks that there were, and that segment is left alone until it has other layers,
 * another head, or a tenth less of them.
 */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, requirePool, type Decision } from './decision.ts';
import { isMaintenance } from './grant.ts';
import { applyGrant, maintain } from './grants.ts';
import { requireLayer, stillOut } from './layers.ts';
import {
  tables,
  type CompactedRecord,
  type CompactingRecord,
  type HostLife,
  type LayerRecord,
  type SlabRun,
  type StripRecord,
  type VolumeRecord,
} from './records.ts';
import { busyLayers, maxBackoff, segmentFrom, type View } from './segments.ts';
import { slabsOf } from './slabs.ts';

/** As in the pool format (native/src/core/format.h, kBlockSize). */
const blockBytes = 4096;
/** A closed volume is free for this long between two orders: who wants to open, cut or delete it comes in between. */
const pauseMs = 1000;
/** With more free slabs than this a pool is not full, whatever a holder found in its stock. */
export const plenty = 16;
/** Looked at again when fewer than this share of the blocks are live that were when nothing was left to move. */
const worthAnother = 0.9;

export interface CompactionPolicy {
  /** Segments are compacted of whose slabs a smaller share is live; 0: none are. */
  below: number;
  /** At most once in this time, when there is nothing left to do. */
  intervalMs: number;
  /** Whether an agent has a session. */
  isConnected: (nodeId: string) => boolean;
}

/** A segment that it pays to compact now, with the volume in whose top its blocks go. */
export interface DueCompaction {
  segment: StripRecord;
  volume: VolumeRecord;
}

export function compactionDue(
  view: View,
  poolUuid: string,
  newest: LayerRecord,
  nowUnixMs: number,
  policy: CompactionPolicy,
): DueCompaction | undefined {
  const segment = worthMoving(view, poolUuid, newest, nowUnixMs, policy);
  if (segment === undefined || segment.headFrozen) return undefined;
  const volume = volumeToWrite(view.tx, poolUuid, segment.headId, policy);
  return volume && { segment, volume };
}

/** A segment of which a small enough share is live, and whose last compaction or merge left something to do. */
export function worthMoving(
  view: View,
  poolUuid: string,
  newest: LayerRecord,
  nowUnixMs: number,
  policy: CompactionPolicy,
): StripRecord | undefined {
  if (policy.below <= 0) return undefined;
  const segment = segmentFrom(view, poolUuid, newest);
  if (segment === undefined) return undefined;
  const busy = busyLayers(view.tx, poolUuid);
  if (busy.has(segment.headId) || segment.victims.some((id) => busy.has(id))) return undefined;
  const counted = tables.fold.get(view.tx, poolUuid, newest.layerId);
  if (counted === undefined || !isOf(counted, segment)) return undefined;
  const use = useOf(view.tx, poolUuid, segment.victims);
  if (use === undefined || use.share >= policy.below) return undefined;
  const last = tables.compacted.get(view.tx, poolUuid, newest.layerId);
  if (
    last !== undefined &&
    isOf(last, segment) &&
    !mayGoOn(view.tx, poolUuid, last, use.liveBlocks, nowUnixMs)
  ) {
    return undefined;
  }
  return segment;
}

/** It is about this segment, or about more of it: layers that were emptied since do not make it another. */
function isOf(last: { victims: bigint[]; headId: bigint }, segment: StripRecord): boolean {
  return last.headId === segment.headId && segment.victims.every((id) => last.victims.includes(id));
}

function mayGoOn(
  tx: Snapshot,
  poolUuid: string,
  last: CompactedRecord,
  liveBlocks: number,
  nowUnixMs: number,
): boolean {
  if (nowUnixMs < last.dueUnixMs) return false;
  if (last.complete) return liveBlocks < worthAnother * last.liveBlocks;
  return (tables.pool.get(tx, poolUuid)?.slabsFree ?? 0) > last.shortAt;
}

/** Undefined: they have no slabs, or not all were counted. */
export function useOf(
  tx: Snapshot,
  poolUuid: string,
  victims: readonly bigint[],
): { liveBlocks: number; share: number } | undefined {
  const pool = tables.pool.get(tx, poolUuid);
  const layers = victims.map((id) => requireLayer(tx, poolUuid, id)).filter((layer) => layer.slabCount > 0);
  if (pool === undefined || layers.length === 0 || layers.some((layer) => layer.liveBlocks < 0))
    return undefined;
  const slabs = layers.reduce((sum, layer) => sum + layer.slabCount, 0);
  const liveBlocks = layers.reduce((sum, layer) => sum + layer.liveBlocks, 0);
  return { liveBlocks, share: (liveBlocks * blockBytes) / (slabs * pool.slabSize) };
}

/**
 * The volume whose top the head is, if somebody may write it now: its writer, or anybody when it is closed and nobody is about to open
 * it. Not while it is cut, alone or in a group: that must not wait, and what is moved would go into the wrong layer.
 */
function volumeToWrite(
  tx: Snapshot,
  poolUuid: string,
  headId: bigint,
  policy: CompactionPolicy,
): VolumeRecord | undefined {
  const volume = tables.volume.get(tx, requireLayer(tx, poolUuid, headId).volumeUuid);
  if (volume?.topLayerId !== headId || volume.state !== 'READY' || volume.readers.length > 0)
    return undefined;
  if (tables.cutting.get(tx, poolUuid, volume.uuid) !== undefined) return undefined;
  const inGroup = tables.grouping
    .entries(tx, [poolUuid])
    .some(([[, uuid]]) => tables.group.get(tx, uuid as string)?.sourceVolumeUuids.includes(volume.uuid));
  if (inGroup) return undefined;
  const { grant } = volume;
  if (grant.state === 'FREE') {
    const { holder } = grant;
    const unread =
      holder !== null && tables.orphan.get(tx, poolUuid, holder.hostId, holder.generation) !== undefined;
    return volume.publications.length > 0 || unread ? undefined : volume;
  }
  const writes = grant.state === 'OPEN' && !isMaintenance(grant) && !grant.readOnly;
  return writes && policy.isConnected(grant.holder?.nodeId ?? '') ? volume : undefined;
}

/**
 * Puts a compaction on record, if it is still due. A closed volume is given to `candidate` for it.
 * @throws HoldfastError when a closed volume cannot be given now
 */
export function beginCompaction(
  d: Decision,
  poolUuid: string,
  newestId: bigint,
  policy: CompactionPolicy,
  candidate: HostLife | undefined,
): CompactingRecord | undefined {
  const newest = tables.layer.get(d.tx, poolUuid, newestId);
  const due = newest && compactionDue(d, poolUuid, newest, d.nowUnixMs, policy);
  if (due === undefined) return undefined;
  const { segment, volume } = due;
  if (volume.grant.state === 'FREE') {
    if (candidate === undefined) return undefined;
    maintain(d, requirePool(d, poolUuid), volume, candidate);
  }
  const { epoch, holder } = volume.grant;
  if (holder === null) throw new HoldfastError('INTERNAL', `Volume ${volume.name} is granted to nobody.`);
  const record: CompactingRecord = {
    victims: segment.victims,
    headId: segment.headId,
    volumeUuid: volume.uuid,
    epoch,
    holder,
  };
  tables.compacting.put(d.tx, record, poolUuid, newestId);
  return record;
}

/** What the record orders, with the slabs that the layers have now. Undefined: its grant is over, or being taken back. */
export function compactionOrder(
  tx: Snapshot,
  record: CompactingRecord,
): { volume: VolumeRecord; sources: (LayerRecord & { slabs: SlabRun[] })[] } | undefined {
  const grant = stillOut(tx, record);
  const volume = tables.volume.get(tx, record.volumeUuid);
  if (volume === undefined || grant === undefined || grant.state === 'REVOKING') return undefined;
  const sources = record.victims
    .map((id) => requireLayer(tx, volume.poolUuid, id))
    .filter((layer) => layer.slabCount > 0)
    .map((layer) => ({ ...layer, slabs: slabsOf(tx, volume.poolUuid, layer.layerId) }));
  return { volume, sources };
}

export interface CompactionOutcome {
  movedBlocks: bigint;
  complete: boolean;
  noSpace: boolean;
}

/** It was answered: what it moved is durable in the top. A closed volume comes back. */
export function compactionEnded(
  d: Decision,
  poolUuid: string,
  newestId: bigint,
  outcome: CompactionOutcome,
  intervalMs: number,
): void {
  const record = tables.compacting.get(d.tx, poolUuid, newestId);
  if (record === undefined) return;
  const last = tables.compacted.get(d.tx, poolUuid, newestId);
  const { movedBlocks, complete, noSpace } = outcome;
  const moved = movedBlocks > 0n;
  const maintained = giveBack(d, record, 'returned');
  const ended = complete || noSpace || !moved;
  const backOff = !complete && (noSpace || !moved);
  const interval = backOff ? later(last, intervalMs) : intervalMs;
  const live = useOf(d.tx, poolUuid, record.victims)?.liveBlocks ?? 0;
  const unstripped = moved || last?.moved === true;
  tables.compacting.delete(d.tx, poolUuid, newestId);
  remember(d, poolUuid, newestId, record, {
    dueUnixMs: d.nowUnixMs + (ended ? interval : maintained ? pauseMs : 0),
    intervalMs: interval,
    complete,
    liveBlocks: Math.max(0, live - Number(movedBlocks)),
    moved: unstripped && !ended,
    shortAt: noSpace ? Math.min(requirePool(d, poolUuid).slabsFree, plenty) : -1,
  });
  if (ended && unstripped) stripSoon(d, poolUuid, newestId);
  if (!moved) return;
  audit(d, 'compact', {
    poolUuid,
    volumeUuid: record.volumeUuid,
    nodeId: record.holder.nodeId,
    epoch: record.epoch,
    generation: record.holder.generation,
    proof: `its writer says that they are durable in layer ${record.headId}, which shows the same`,
    detail:
      `${movedBlocks} blocks of layers ${record.victims.join(', ')} moved up` +
      (complete ? '; nothing is left to move' : noSpace ? '; the pool has no room for more' : ''),
  });
}

/** Not done, or nobody can say: whoever has a closed volume for it is asked to let go. */
export function compactionFailed(d: Decision, poolUuid: string, newestId: bigint, intervalMs: number): void {
  const record = tables.compacting.get(d.tx, poolUuid, newestId);
  if (record === undefined) return;
  giveBack(d, record, 'unpublish');
  const last = tables.compacted.get(d.tx, poolUuid, newestId);
  const interval = later(last, intervalMs);
  tables.compacting.delete(d.tx, poolUuid, newestId);
  remember(d, poolUuid, newestId, record, {
    dueUnixMs: d.nowUnixMs + interval,
    intervalMs: interval,
    complete: false,
    liveBlocks: 0,
    moved: last?.moved === true,
    shortAt: -1,
  });
}

export function later(last: CompactedRecord | undefined, intervalMs: number): number {
  const doubled = last === undefined ? intervalMs : 2 * last.intervalMs;
  return Math.min(Math.max(doubled, intervalMs), maxBackoff * intervalMs);
}

export function remember(
  d: Decision,
  poolUuid: string,
  newestId: bigint,
  { victims, headId }: Pick<CompactedRecord, 'victims' | 'headId'>,
  what: Omit<CompactedRecord, 'victims' | 'headId'>,
): void {
  tables.compacted.put(d.tx, { victims, headId, ...what }, poolUuid, newestId);
}

/** A grant that was given for it ends. False: it was its writer's. */
function giveBack(d: Decision, record: CompactingRecord, how: 'returned' | 'unpublish'): boolean {
  const volume = tables.volume.get(d.tx, record.volumeUuid);
  const grant = stillOut(d.tx, record);
  if (volume === undefined || grant === undefined || !isMaintenance(grant)) return false;
  const { holder, epoch } = record;
  if (how === 'returned') applyGrant(d, volume, { type: 'returned', holder, epoch });
  else if (grant.state !== 'REVOKING') applyGrant(d, volume, { type: 'unpublish' });
  return true;
}

/** The head covers more than when the segment was stripped last. */
function stripSoon(d: Decision, poolUuid: string, newestId: bigint): void {
  const fold = tables.fold.get(d.tx, poolUuid, newestId);
  if (fold === undefined) return;
  tables.fold.put(d.tx, { ...fold, headClosed: false, dueUnixMs: d.nowUnixMs }, poolUuid, newestId);
}
