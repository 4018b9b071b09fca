/** Slabs that leave a frozen layer: no grant names them from now on, and those that did forget them before they are wiped. */
import type { Snapshot } from '../store/store.ts';
import { audit, requirePool, type Decision } from './decision.ts';
import { sameLife } from './grant.ts';
import { grantsOver, stillOut } from './layers.ts';
import { tables, type GrantRef, type LeavingRecord, type SlabRun } from './records.ts';
import { common, countSlabs, normalized } from './runs.ts';
import { freeSlabs, slabsOf, takeFromLayer } from './slabs.ts';

/** Takes what is emptied of a layer's slabs out of it. Returns how many. */
export function leave(d: Decision, poolUuid: string, layerId: bigint, emptied: readonly SlabRun[]): number {
  const pool = requirePool(d, poolUuid);
  const runs = common(slabsOf(d.tx, poolUuid, layerId), normalized(emptied));
  if (runs.length === 0 || !takeFromLayer(d.tx, pool, layerId, runs)) return 0;
  const sequence = (tables.counter.get(d.tx, 'leaving') ?? 0n) + 1n;
  tables.counter.put(d.tx, sequence, 'leaving');
  const waiting = grantsOver(d.tx, poolUuid, layerId);
  tables.leaving.put(d.tx, { layerId, runs, waiting }, poolUuid, layerId, sequence);
  return countSlabs(runs);
}

/** Those of the grants that were told of the slabs, or of the layer, or have to learn something, and are not over. */
export function stillWaiting(tx: Snapshot, record: Pick<LeavingRecord, 'waiting'>): GrantRef[] {
  return record.waiting.filter((ref) => stillOut(tx, ref) !== undefined);
}

export function isSameGrant(one: GrantRef, other: GrantRef): boolean {
  return (
    one.volumeUuid === other.volumeUuid && one.epoch === other.epoch && sameLife(one.holder, other.holder)
  );
}

/** A holder says that nothing of it can map the slabs any more. */
export function slabsForgotten(
  d: Decision,
  poolUuid: string,
  layerId: bigint,
  sequence: bigint,
  by: GrantRef,
): void {
  const record = tables.leaving.get(d.tx, poolUuid, layerId, sequence);
  if (record === undefined) return;
  const waiting = record.waiting.filter((ref) => !isSameGrant(ref, by));
  if (waiting.length === record.waiting.length) return;
  tables.leaving.put(d.tx, { ...record, waiting }, poolUuid, layerId, sequence);
  audit(d, 'forgot', {
    poolUuid,
    volumeUuid: by.volumeUuid,
    nodeId: by.holder.nodeId,
    epoch: by.epoch,
    generation: by.holder.generation,
    proof: 'acknowledged by its holder: nothing that may know a place in them is left',
    detail: `${countSlabs(record.runs)} slabs of layer ${layerId}`,
  });
}

/** Slabs that left a layer are wiped, and free. */
export function leavingWiped(
  d: Decision,
  poolUuid: string,
  layerId: bigint,
  sequence: bigint,
  proof: string,
): void {
  const record = tables.leaving.get(d.tx, poolUuid, layerId, sequence);
  if (record === undefined) return;
  const pool = requirePool(d, poolUuid);
  tables.leaving.delete(d.tx, poolUuid, layerId, sequence);
  freeSlabs(d.tx, pool, record.runs);
  tables.pool.put(d.tx, pool, poolUuid);
  audit(d, 'wiped', { poolUuid, proof, detail: `${countSlabs(record.runs)} slabs of layer ${layerId} free` });
}
