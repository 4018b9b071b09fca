/**
 * Merging: below a frozen layer that is kept (a snapshot, or what several volumes stand on), blocks of folded layers that nothing newer
 * covers are copied up into it, by any agent, so that the next strip empties their slabs. Here it is decided when that pays, and what
 * it needs; service/merge.ts gives the orders.
 *
 * Why it is safe: every chain that has a victim has the head right above the victims (isFolded), so a block is the same bytes at a place
 * that is asked earlier. But a holder that was granted the chain before does not know that place, nor would an engine that takes over
 * from it; and a strip clears the old place's page on the disk. So between the two every such grant has to learn the head's slabs, or
 * to be over. For that long head and victims are busy: nothing else is done to them.
 */
import { audit, requirePool, type Decision } from './decision.ts';
import { later, plenty, remember, useOf, worthMoving, type CompactionPolicy } from './compaction.ts';
import { grantsOver, requireLayer } from './layers.ts';
import { isSameGrant, leave } from './leaving.ts';
import {
  tables,
  type GrantRef,
  type HostLife,
  type LayerRecord,
  type MergingRecord,
  type SlabRun,
  type StripRecord,
} from './records.ts';
import type { View } from './segments.ts';
import { slabsOf, takeForLayer } from './slabs.ts';
import type { Snapshot } from '../store/store.ts';

/** That the head is given for one order when it has no room left. */
const slabsAtOnce = 4;

/** A segment that it pays to merge now into the frozen layer above it. */
export function mergeDue(
  view: View,
  poolUuid: string,
  newest: LayerRecord,
  nowUnixMs: number,
  policy: CompactionPolicy,
): StripRecord | undefined {
  const segment = worthMoving(view, poolUuid, newest, nowUnixMs, policy);
  if (segment?.headFrozen !== true) return undefined;
  const head = requireLayer(view.tx, poolUuid, segment.headId);
  const needed = head.snapshotUuid !== '' || head.children > 1; // else it goes itself
  // Of one that comes from the disk nobody knows whether it was ever stripped.
  return !needed || head.kept || view.pinned(poolUuid, segment.headId) ? undefined : segment;
}

/** Puts a merge on record, if it is still due. */
export function beginMerge(
  d: Decision,
  poolUuid: string,
  newestId: bigint,
  policy: CompactionPolicy,
): MergingRecord | undefined {
  const newest = tables.layer.get(d.tx, poolUuid, newestId);
  const segment = newest && mergeDue(d, poolUuid, newest, d.nowUnixMs, policy);
  if (segment === undefined) return undefined;
  const { victims, headId } = segment;
  const last = tables.compacted.get(d.tx, poolUuid, newestId);
  if (last?.headId === headId && last.needsSlabs === true) {
    const pool = requirePool(d, poolUuid);
    takeForLayer(d.tx, pool, headId, slabsAtOnce);
    tables.pool.put(d.tx, pool, poolUuid);
  }
  const sequence = (tables.counter.get(d.tx, 'merging') ?? 0n) + 1n;
  tables.counter.put(d.tx, sequence, 'merging');
  const record: MergingRecord = { sequence, victims, headId };
  tables.merging.put(d.tx, record, poolUuid, newestId);
  return record;
}

type WithSlabs = LayerRecord & { slabs: SlabRun[] };

/** What the record orders, with the slabs that the layers have now. */
export function mergeOrder(
  tx: Snapshot,
  poolUuid: string,
  record: MergingRecord,
): { sequence: bigint; victims: WithSlabs[]; head: WithSlabs } {
  const withSlabs = (id: bigint): WithSlabs => ({
    ...requireLayer(tx, poolUuid, id),
    slabs: slabsOf(tx, poolUuid, id),
  });
  return {
    sequence: record.sequence,
    victims: record.victims.map(withSlabs),
    head: withSlabs(record.headId),
  };
}

export interface MergeOutcome {
  movedBlocks: bigint;
  complete: boolean;
  noSpace: boolean;
  spare: readonly SlabRun[];
}

/** It was answered: what it moved is durable in the head. Undefined: it failed, with nothing of it in flight, and may have moved some. */
export function mergeEnded(
  d: Decision,
  poolUuid: string,
  newestId: bigint,
  by: HostLife,
  outcome: MergeOutcome | undefined,
  intervalMs: number,
): void {
  const record = tables.merging.get(d.tx, poolUuid, newestId);
  if (record === undefined) return;
  const last = tables.compacted.get(d.tx, poolUuid, newestId);
  const { movedBlocks, complete, noSpace, spare } = outcome ?? failed;
  const pool = requirePool(d, poolUuid);
  const full = noSpace && pool.slabsFree === 0;
  const goesOn = !complete && (movedBlocks > 0n || (noSpace && !full && last?.needsSlabs !== true));
  const interval = complete || goesOn ? intervalMs : later(last, intervalMs);
  const live = useOf(d.tx, poolUuid, record.victims)?.liveBlocks ?? 0;
  remember(d, poolUuid, newestId, record, {
    dueUnixMs: d.nowUnixMs + (goesOn ? 0 : interval),
    intervalMs: interval,
    complete,
    liveBlocks: Math.max(0, live - Number(movedBlocks)),
    moved: false,
    shortAt: full ? Math.min(pool.slabsFree, plenty) : -1,
    needsSlabs: noSpace,
  });
  if (complete) leave(d, poolUuid, record.headId, spare);
  const waiting = grantsOver(d.tx, poolUuid, record.headId);
  tables.merging.put(d.tx, { ...record, waiting }, poolUuid, newestId);
  if (movedBlocks === 0n) return;
  audit(d, 'merge', {
    poolUuid,
    volumeUuid: requireLayer(d.tx, poolUuid, record.headId).volumeUuid,
    nodeId: by.nodeId,
    generation: by.generation,
    proof: `its writer says that they are durable in layer ${record.headId}, which shows the same`,
    detail:
      `${movedBlocks} blocks of layers ${record.victims.join(', ')} moved up` +
      (complete ? '; nothing is left to move' : noSpace ? '; there is no room for more yet' : ''),
  });
}

const failed: MergeOutcome = { movedBlocks: 0n, complete: false, noSpace: false, spare: [] };

/** A holder shows the head's blocks where they are now, and so would an engine that takes over from it. */
export function layerLearned(d: Decision, poolUuid: string, newestId: bigint, by: GrantRef): void {
  const record = tables.merging.get(d.tx, poolUuid, newestId);
  if (record?.waiting === undefined) return;
  const waiting = record.waiting.filter((ref) => !isSameGrant(ref, by));
  tables.merging.put(d.tx, { ...record, waiting }, poolUuid, newestId);
}

/** Every grant has learned it or is over: the victims may be stripped of it. */
export function mergeLearned(d: Decision, poolUuid: string, newestId: bigint): void {
  tables.merging.delete(d.tx, poolUuid, newestId);
  const fold = tables.fold.get(d.tx, poolUuid, newestId);
  if (fold === undefined) return;
  const due = { ...fold, headFrozen: false, headClosed: false, dueUnixMs: d.nowUnixMs };
  tables.fold.put(d.tx, due, poolUuid, newestId);
}
