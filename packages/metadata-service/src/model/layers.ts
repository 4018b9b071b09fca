/**
 * Layers and what needs them. A layer is needed by the layers above it (children), by a snapshot that names it, by the volume
 * whose writable top it is, and by streams that read it (pins). A frozen layer that nothing names is
 *  - wiped, when nothing is above it;
 *  - folded, when exactly one layer is above it: strips take away what newer layers cover, and when it has no slab left, it is
 *    removed from the chain;
 *  - left alone, when more are above it.
 *
 * A removed layer leaves a tombstone on the disk: the record above it still names it as its parent, so its slot is not used again
 * before that record is gone too, or names another (diskParentId, diskChildren). Before a removed layer becomes a tombstone itself, its
 * record is made to name the living layer below (reclaim.ts): else the snapshots of one volume, coming and going, would use up all slots.
 */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, type Decision } from './decision.ts';
import { sameLife } from './grant.ts';
import { markSlot, takeSlot } from './pools.ts';
import { tables, type GrantRef, type LayerRecord, type PoolRecord, type VolumeRecord } from './records.ts';

/** Layers of one chain: the index of a layer is a u16 in the engine, which leaves room for what is not yet removed. */
export const maxChain = 1024;

export function requireLayer(tx: Snapshot, poolUuid: string, layerId: bigint): LayerRecord {
  const layer = tables.layer.get(tx, poolUuid, layerId);
  if (layer === undefined) {
    throw new HoldfastError('INTERNAL', `Layer ${layerId} of pool ${poolUuid} is missing from the database.`);
  }
  return layer;
}

/** A chain from a layer down, newest first, as far as `base` (without it). */
export function chainOf(tx: Snapshot, poolUuid: string, topLayerId: bigint, base = 0n): LayerRecord[] {
  const chain: LayerRecord[] = [];
  for (let id = topLayerId; id !== 0n && id !== base; ) {
    const layer = requireLayer(tx, poolUuid, id);
    chain.push(layer);
    id = layer.parentLayerId;
  }
  return chain;
}

/** A volume's layers, newest first. */
export function layersOf(tx: Snapshot, volume: VolumeRecord): LayerRecord[] {
  return chainOf(tx, volume.poolUuid, volume.topLayerId);
}

/** A new writable layer, above `parentLayerId` unless that is 0. Stores the pool's counter too. */
export function makeLayer(
  d: Decision,
  pool: PoolRecord,
  what: { parentLayerId: bigint; sizeBytes: bigint; volumeUuid: string },
): LayerRecord {
  const layer: LayerRecord = {
    layerId: pool.nextLayerId,
    slot: takeSlot(d, pool, 'layer'),
    parentLayerId: 0n,
    birth: pool.nextLayerId,
    sizeBytes: what.sizeBytes,
    frozen: false,
    volumeUuid: what.volumeUuid,
    slabCount: 0,
    ...unused,
  };
  pool.nextLayerId += 1n;
  tables.pool.put(d.tx, pool, pool.uuid);
  tables.layer.put(d.tx, layer, pool.uuid, layer.layerId);
  if (what.parentLayerId !== 0n) attach(d, pool.uuid, layer.layerId, what.parentLayerId);
  return requireLayer(d.tx, pool.uuid, layer.layerId);
}

/** Of a layer that nothing needs or knows yet. */
export const unused = {
  children: 0,
  snapshotUuid: '',
  kept: false,
  diskParentId: 0n,
  diskChildren: 0,
  liveBlocks: -1,
  writer: null,
  removed: null,
} as const satisfies Partial<LayerRecord>;

/** Puts a layer that has no parent on top of one. */
export function attach(d: Decision, poolUuid: string, layerId: bigint, parentLayerId: bigint): void {
  const layer = requireLayer(d.tx, poolUuid, layerId);
  const parent = requireLayer(d.tx, poolUuid, parentLayerId);
  const placed = { ...layer, parentLayerId, diskParentId: parentLayerId };
  tables.layer.put(d.tx, placed, poolUuid, layerId);
  tables.layerChild.put(d.tx, true, poolUuid, parentLayerId, layerId);
  const more = { ...parent, children: parent.children + 1, diskChildren: parent.diskChildren + 1 };
  tables.layer.put(d.tx, more, poolUuid, parentLayerId);
  useChanged(d, poolUuid, parentLayerId);
}

/** What needs a layer has changed: jobs look at it, or do not any more. */
export function useChanged(d: Decision, poolUuid: string, layerId: bigint): void {
  const layer = tables.layer.get(d.tx, poolUuid, layerId);
  const idle =
    layer !== undefined &&
    (layer.removed === null ? isNameless(layer) && layer.children <= 1 : !layer.removed.wiped);
  if (idle) tables.reclaim.put(d.tx, true, poolUuid, layerId);
  else tables.reclaim.delete(d.tx, poolUuid, layerId);
}

/** Frozen, and nothing but layers above may need it. */
export function isNameless(layer: LayerRecord): boolean {
  return layer.frozen && layer.snapshotUuid === '' && !layer.kept && layer.removed === null;
}

export interface Pins {
  pinned(poolUuid: string, layerId: bigint): boolean;
}

/** Nameless, with exactly one layer above, and nobody reads it by itself. */
export function isFolded(pins: Pins, poolUuid: string, layer: LayerRecord): boolean {
  return isNameless(layer) && layer.children === 1 && !pins.pinned(poolUuid, layer.layerId);
}

export function childrenOf(tx: Snapshot, poolUuid: string, layerId: bigint, limit?: number): bigint[] {
  return tables.layerChild
    .entries(tx, [poolUuid, layerId], limit === undefined ? {} : { limit })
    .map(([parts]) => BigInt(parts[2] as string));
}

/** Every grant that is out on a volume whose chain has this layer. */
export function grantsOver(tx: Snapshot, poolUuid: string, layerId: bigint): GrantRef[] {
  const refs: GrantRef[] = [];
  for (const volume of volumesOver(tx, poolUuid, layerId)) {
    for (const { state, holder, epoch } of [volume.grant, ...volume.readers]) {
      if (state !== 'FREE' && holder !== null) refs.push({ volumeUuid: volume.uuid, epoch, holder });
    }
  }
  return refs;
}

/** The grant, unless it is over. */
export function stillOut(tx: Snapshot, ref: GrantRef): VolumeRecord['grant'] | undefined {
  const volume = tables.volume.get(tx, ref.volumeUuid);
  if (volume === undefined) return undefined;
  return [volume.grant, ...volume.readers].find(
    (grant) => grant.state !== 'FREE' && grant.epoch === ref.epoch && sameLife(grant.holder, ref.holder),
  );
}

/** A folded layer without slabs leaves its chain. Its record goes when no grant is out that was given with it in the chain. */
export function removeFromChain(d: Decision, poolUuid: string, layerId: bigint): void {
  const layer = requireLayer(d.tx, poolUuid, layerId);
  const [childId, ...others] = childrenOf(d.tx, poolUuid, layerId, 2);
  if (!isFolded(d, poolUuid, layer) || layer.slabCount > 0 || childId === undefined || others.length > 0) {
    throw new HoldfastError('INTERNAL', `Layer ${layerId} of pool ${poolUuid} is still needed.`);
  }
  const waiting = grantsOver(d.tx, poolUuid, layerId);
  const child = requireLayer(d.tx, poolUuid, childId);
  tables.layerChild.delete(d.tx, poolUuid, layerId, childId);
  if (layer.parentLayerId !== 0n) {
    tables.layerChild.delete(d.tx, poolUuid, layer.parentLayerId, layerId);
    tables.layerChild.put(d.tx, true, poolUuid, layer.parentLayerId, childId);
  }
  tables.layer.put(d.tx, { ...child, parentLayerId: layer.parentLayerId }, poolUuid, childId);
  const removed = { waiting, wiped: false, aboveId: childId };
  tables.layer.put(d.tx, { ...layer, children: 0, removed }, poolUuid, layerId);
  tables.fold.delete(d.tx, poolUuid, layerId);
  tables.compacted.delete(d.tx, poolUuid, layerId);
  useChanged(d, poolUuid, layerId);
  audit(d, 'unchained', {
    poolUuid,
    volumeUuid: layer.volumeUuid,
    proof: 'it has no slab',
    detail: `layer ${layerId}, below ${childId}; ${waiting.length} grants that know it are out`,
  });
}

/** The last slab of a layer that nothing needs is free: its record goes, and its parent loses a use. */
export function layerGone(d: Decision, pool: PoolRecord, layerId: bigint): void {
  const layer = requireLayer(d.tx, pool.uuid, layerId);
  if (layer.removed === null && layer.parentLayerId !== 0n) {
    tables.layerChild.delete(d.tx, pool.uuid, layer.parentLayerId, layerId);
    const parent = requireLayer(d.tx, pool.uuid, layer.parentLayerId);
    tables.layer.put(d.tx, { ...parent, children: parent.children - 1 }, pool.uuid, parent.layerId);
    useChanged(d, pool.uuid, parent.layerId);
  }
  tables.fold.delete(d.tx, pool.uuid, layerId);
  tables.compacted.delete(d.tx, pool.uuid, layerId);
  tables.layer.put(d.tx, { ...layer, removed: { waiting: [], wiped: true } }, pool.uuid, layerId);
  tables.reclaim.delete(d.tx, pool.uuid, layerId);
  forgetTombstone(d, pool, layerId);
}

/** No record on the disk names it any more: its slot is free, and perhaps those that it names itself. */
function forgetTombstone(d: Decision, pool: PoolRecord, layerId: bigint): void {
  const left = [layerId];
  for (let id = left.pop(); id !== undefined; id = left.pop()) {
    const layer = tables.layer.get(d.tx, pool.uuid, id);
    if (layer?.removed?.wiped !== true || layer.diskChildren > 0) continue;
    tables.layer.delete(d.tx, pool.uuid, id);
    markSlot(d, pool, 'layer', layer.slot, false);
    for (const parentId of [layer.diskParentId, layer.diskParentNext ?? 0n]) {
      const parent = tables.layer.get(d.tx, pool.uuid, parentId);
      if (parent === undefined) continue;
      tables.layer.put(d.tx, { ...parent, diskChildren: parent.diskChildren - 1 }, pool.uuid, parentId);
      left.push(parentId);
    }
  }
}

/** A record on the disk names the layer as its parent no longer. */
function unnameParent(d: Decision, pool: PoolRecord, layerId: bigint): void {
  const layer = tables.layer.get(d.tx, pool.uuid, layerId);
  if (layer === undefined) return;
  tables.layer.put(d.tx, { ...layer, diskChildren: layer.diskChildren - 1 }, pool.uuid, layerId);
  forgetTombstone(d, pool, layerId);
}

/** The layer itself, or the first one below that is in a chain, by what the disk says; 0: there is none. */
export function livingFrom(tx: Snapshot, poolUuid: string, layerId: bigint): bigint {
  for (let id = layerId; id !== 0n; ) {
    const layer = requireLayer(tx, poolUuid, id);
    if (layer.removed === null) return id;
    id = layer.diskParentId;
  }
  return 0n;
}

/** Volumes whose chain has a layer, as their tops. */
function volumesOver(tx: Snapshot, poolUuid: string, layerId: bigint): VolumeRecord[] {
  const volumes: VolumeRecord[] = [];
  const left = [layerId];
  for (let id = left.pop(); id !== undefined; id = left.pop()) {
    left.push(...childrenOf(tx, poolUuid, id));
    const volume = tables.volume.get(tx, requireLayer(tx, poolUuid, id).volumeUuid);
    if (volume?.topLayerId === id) volumes.push(volume);
  }
  return volumes;
}

export interface Relink {
  layer: LayerRecord;
  /** What its record is to name. */
  parentId: bigint;
  /** Goes into its record as what it is folded into. */
  head: LayerRecord;
  /** A volume whose chain on the disk goes through the layer: its record shows what became of it. */
  witness: VolumeRecord;
}

/**
 * The record of a removed layer is to name the living layer below, instead of tombstones. Both parents keep their slots from now on,
 * until the disk says which one it names. Undefined: it does already, or nobody could say.
 */
export function beginRelink(d: Decision, poolUuid: string, layerId: bigint): Relink | undefined {
  const layer = tables.layer.get(d.tx, poolUuid, layerId);
  if (layer?.removed?.wiped !== false || layer.diskChildren === 0) return undefined;
  const parentId = layer.diskParentNext ?? livingFrom(d.tx, poolUuid, layer.diskParentId);
  if (parentId === layer.diskParentId) return undefined;
  let above = tables.layer.get(d.tx, poolUuid, layer.removed.aboveId ?? 0n);
  while (above?.removed) above = tables.layer.get(d.tx, poolUuid, above.removed.aboveId ?? 0n);
  const witness =
    above &&
    volumesOver(d.tx, poolUuid, above.layerId).find((one) => one.state === 'READY' && one.lastEpoch > 0n);
  if (above === undefined || witness === undefined) return undefined;
  let head = above;
  while (isFolded(d, poolUuid, head)) {
    const [next] = childrenOf(d.tx, poolUuid, head.layerId, 1);
    head = requireLayer(d.tx, poolUuid, next ?? 0n);
  }
  const marked = { ...layer, diskParentNext: parentId };
  if (layer.diskParentNext === undefined) {
    tables.layer.put(d.tx, marked, poolUuid, layerId);
    const parent = parentId === 0n ? undefined : requireLayer(d.tx, poolUuid, parentId);
    if (parent !== undefined) {
      tables.layer.put(d.tx, { ...parent, diskChildren: parent.diskChildren + 1 }, poolUuid, parentId);
    }
  }
  return { layer: marked, parentId, head, witness };
}

/** @param named the parent in its record on the disk; undefined: nobody could say, and both keep their slots */
export function relinkEnded(d: Decision, pool: PoolRecord, layerId: bigint, named: bigint | undefined): void {
  const layer = tables.layer.get(d.tx, pool.uuid, layerId);
  if (layer?.diskParentNext === undefined) return;
  const { diskParentNext: next, ...rest } = layer;
  if (named !== next && named !== layer.diskParentId) return;
  tables.layer.put(d.tx, { ...rest, diskParentId: named }, pool.uuid, layerId);
  unnameParent(d, pool, named === next ? layer.diskParentId : next);
}
