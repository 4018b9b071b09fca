/**
 * What is to be done about frozen layers that nothing names (layers.ts): strips of segments of folded layers, slabs that leave
 * them, layers that are wiped or removed. Here it is decided and recorded; service/reclaim.ts gives the orders.
 *
 * Why a strip is safe: a victim has exactly one layer above it, so every chain that has the victim has all newer victims and the
 * head too. What the head or a newer victim has in a durable page answers for that block in every one of those chains, also for a
 * holder with an older chain in memory. Coverage of a layer with a parent never shrinks. So a victim's block that is covered
 * resolves for nobody, and a slab without other blocks may leave. Holders that were told of the slab have to forget it before it is
 * wiped; grants that are given later do not name it.
 */
import type { Snapshot } from '../store/store.ts';
import { audit, requirePool, type Decision } from './decision.ts';
import { compactionDue, type CompactionPolicy } from './compaction.ts';
import { isNameless, layerGone, requireLayer } from './layers.ts';
import { isSameGrant, leave, stillWaiting } from './leaving.ts';
import { mergeDue } from './merging.ts';
import {
  tables,
  type GrantRef,
  type HostLife,
  type LayerRecord,
  type PoolRecord,
  type SlabRun,
} from './records.ts';
import { countSlabs } from './runs.ts';
import { busyLayers, maxBackoff, segmentFrom, type View } from './segments.ts';
import { freeFromLayer, slabsOf } from './slabs.ts';

export type ReclaimWork =
  | { type: 'wipe'; layerId: bigint }
  | { type: 'tombstone'; layerId: bigint }
  | { type: 'forget'; layerId: bigint }
  | { type: 'remove'; layerId: bigint }
  | { type: 'strip'; layerId: bigint }
  | { type: 'compact'; layerId: bigint }
  | { type: 'merge'; layerId: bigint };

/** What can be done on a pool now. `nowUnixMs` decides which strips and compactions are due. */
export function reclaimable(
  view: View,
  poolUuid: string,
  nowUnixMs: number,
  policy: CompactionPolicy,
): ReclaimWork[] {
  const entries = tables.reclaim.entries(view.tx, [poolUuid]);
  if (entries.length === 0) return [];
  const busy = busyLayers(view.tx, poolUuid);
  return entries.flatMap(([parts]): ReclaimWork[] => {
    const layer = requireLayer(view.tx, poolUuid, BigInt(parts[1] as string));
    const work = workOn(view, poolUuid, layer, busy, nowUnixMs, policy);
    return work === undefined ? [] : [{ type: work, layerId: layer.layerId }];
  });
}

function workOn(
  view: View,
  poolUuid: string,
  layer: LayerRecord,
  busy: ReadonlySet<bigint>,
  nowUnixMs: number,
  policy: CompactionPolicy,
): ReclaimWork['type'] | undefined {
  const { layerId, removed } = layer;
  if (removed !== null) {
    if (removed.wiped) return undefined;
    return stillWaiting(view.tx, removed).length === 0 ? 'tombstone' : 'forget';
  }
  if (busy.has(layerId) || view.pinned(poolUuid, layerId) || !isNameless(layer)) return undefined;
  const leaving = tables.leaving.entries(view.tx, [poolUuid, layerId], { limit: 1 }).length > 0;
  if (layer.children === 0) return leaving ? undefined : 'wipe';
  if (layer.children > 1) return undefined;
  if (layer.slabCount === 0) return leaving ? undefined : 'remove';
  if (isDue(view, poolUuid, layer, busy, nowUnixMs)) return 'strip';
  if (compactionDue(view, poolUuid, layer, nowUnixMs, policy) !== undefined) return 'compact';
  return mergeDue(view, poolUuid, layer, nowUnixMs, policy) === undefined ? undefined : 'merge';
}

function isDue(
  view: View,
  poolUuid: string,
  newest: LayerRecord,
  busy: ReadonlySet<bigint>,
  nowUnixMs: number,
): boolean {
  const segment = segmentFrom(view, poolUuid, newest);
  if (segment === undefined || segment.victims.some((id) => busy.has(id))) return false;
  const last = tables.fold.get(view.tx, poolUuid, newest.layerId);
  if (last === undefined || last.headId !== segment.headId) return true;
  if (segment.victims.some((id) => !last.victims.includes(id))) return true;
  if (last.headFrozen) return false;
  const unchanged = last.headClosed && segment.headClosed && last.headEpoch === segment.headEpoch;
  return (!unchanged || (segment.headFrozen && !last.headFrozen)) && nowUnixMs >= last.dueUnixMs;
}

export interface StripOrder {
  victims: (LayerRecord & { slabs: SlabRun[] })[];
  /** Undefined: it is gone with its volume, and covers nothing. */
  head: (LayerRecord & { slabs: SlabRun[] }) | undefined;
}

/** Puts a strip on record, and says what to order. Undefined: there is none to begin now. */
export function beginStrip(d: Decision, poolUuid: string, newestId: bigint): StripOrder | undefined {
  const newest = tables.layer.get(d.tx, poolUuid, newestId);
  const segment = newest && segmentFrom(d, poolUuid, newest);
  const busy = busyLayers(d.tx, poolUuid);
  if (segment === undefined || segment.victims.some((id) => busy.has(id))) return undefined;
  tables.strip.put(d.tx, segment, poolUuid, newestId);
  return stripOrder(d.tx, poolUuid, newestId);
}

/** What a strip on record orders, with the slabs that the layers have now. */
export function stripOrder(tx: Snapshot, poolUuid: string, newestId: bigint): StripOrder | undefined {
  const strip = tables.strip.get(tx, poolUuid, newestId);
  const head = strip && tables.layer.get(tx, poolUuid, strip.headId);
  if (strip === undefined) return undefined;
  const withSlabs = (layer: LayerRecord): LayerRecord & { slabs: SlabRun[] } => ({
    ...layer,
    slabs: slabsOf(tx, poolUuid, layer.layerId),
  });
  const victims = strip.victims.map((id) => withSlabs(requireLayer(tx, poolUuid, id)));
  return { victims, head: head && withSlabs(head) };
}

export interface StripOutcome {
  emptied: readonly SlabRun[];
  clearedBlocks: bigint;
  uses: readonly { layerId: bigint; liveBlocks: bigint }[];
}

/** The strip ended, or failed (undefined) with nothing of it in flight. */
export function stripEnded(
  d: Decision,
  poolUuid: string,
  newestId: bigint,
  by: HostLife,
  outcome: StripOutcome | undefined,
  intervalMs: number,
): void {
  const strip = tables.strip.get(d.tx, poolUuid, newestId);
  if (strip === undefined) return;
  tables.strip.delete(d.tx, poolUuid, newestId);
  const last = tables.fold.get(d.tx, poolUuid, newestId);
  if (outcome === undefined) {
    // Failed: not again at once, and then as if it were the first time.
    const retry = { ...strip, headFrozen: false, headClosed: false, intervalMs };
    tables.fold.put(d.tx, { ...retry, dueUnixMs: d.nowUnixMs + intervalMs }, poolUuid, newestId);
    return;
  }
  let left = 0;
  for (const layerId of strip.victims) left += leave(d, poolUuid, layerId, outcome.emptied);
  for (const { layerId, liveBlocks } of outcome.uses) {
    const layer = tables.layer.get(d.tx, poolUuid, layerId);
    if (layer !== undefined && strip.victims.includes(layerId)) {
      tables.layer.put(d.tx, { ...layer, liveBlocks: Number(liveBlocks) }, poolUuid, layerId);
    }
  }
  const again = outcome.clearedBlocks > 0n || last === undefined ? intervalMs : 2 * last.intervalMs;
  const next = Math.min(Math.max(again, intervalMs), maxBackoff * intervalMs);
  tables.fold.put(d.tx, { ...strip, intervalMs: next, dueUnixMs: d.nowUnixMs + next }, poolUuid, newestId);
  if (outcome.clearedBlocks === 0n && left === 0) return;
  audit(d, 'strip', {
    poolUuid,
    nodeId: by.nodeId,
    generation: by.generation,
    proof: `covered by durable pages of layer ${strip.headId} or of newer victims`,
    detail: `layers ${strip.victims.join(', ')}: ${outcome.clearedBlocks} blocks cleared, ${left} slabs leave`,
  });
}

/** A holder says that a layer that was removed is in no chain of it any more. */
export function layerForgotten(d: Decision, poolUuid: string, layerId: bigint, by: GrantRef): void {
  const layer = tables.layer.get(d.tx, poolUuid, layerId);
  if (layer?.removed?.wiped !== false) return;
  const waiting = layer.removed.waiting.filter((ref) => !isSameGrant(ref, by));
  tables.layer.put(d.tx, { ...layer, removed: { ...layer.removed, waiting } }, poolUuid, layerId);
}

/** A layer that nothing needs, or that was removed from its chain, is gone from the disk. */
export function layerWiped(d: Decision, poolUuid: string, layerId: bigint, proof: string): void {
  const pool = requirePool(d, poolUuid);
  const layer = tables.layer.get(d.tx, poolUuid, layerId);
  if (layer === undefined || layer.removed?.wiped === true) return;
  const slabs = slabsOf(d.tx, poolUuid, layerId);
  freeFromLayer(d.tx, pool, layerId, slabs);
  tables.pool.put(d.tx, pool, poolUuid);
  layerGone(d, pool, layerId);
  audit(d, layer.removed === null ? 'wiped' : 'tombstone', {
    poolUuid,
    volumeUuid: layer.volumeUuid,
    proof,
    detail: `layer ${layerId}: ${countSlabs(slabs)} slabs free`,
  });
}

// ------------------------------------------------------------------------------------------------ jobs

/** A life that may still be at work: whoever had the job before is dead or has answered. */
export function isOver(tx: Snapshot, poolUuid: string, life: HostLife): boolean {
  const host = tables.host.get(tx, poolUuid, life.hostId);
  return host?.generation !== life.generation || host.nodeId !== life.nodeId || host.state === 'DEAD';
}

/** Who does a job that two must not do at once: whoever was told before, unless that life is dead. */
export function assignJob(d: Decision, pool: PoolRecord, what: string, candidate: HostLife): HostLife {
  const job = tables.job.get(d.tx, pool.uuid, what);
  if (job !== undefined && !isOver(d.tx, pool.uuid, job.life)) return job.life;
  tables.job.put(d.tx, { life: candidate, sinceUnixMs: d.nowUnixMs }, pool.uuid, what);
  return candidate;
}

/** Its answer is there: nothing of the job is in flight. */
export function jobEnded(d: Decision, poolUuid: string, what: string): void {
  tables.job.delete(d.tx, poolUuid, what);
}
