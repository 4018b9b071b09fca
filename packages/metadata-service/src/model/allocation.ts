/** Slabs on their way: from the pool to a host's stock, from there to a layer, and back; and what a dead host left. */
import { HoldfastError } from '@holdfast/common';
import { audit, requireAuthority, requireLife, requirePool, stale, type Decision } from './decision.ts';
import { sameLife } from './grant.ts';
import { tables, type HostLife, type PoolRecord, type SlabRun, type VolumeRecord } from './records.ts';
import { countSlabs, findRun, normalized, without } from './runs.ts';
import {
  addToLayer,
  aheadOf,
  claimAhead,
  freeFromLayer,
  freeSlabs,
  layerHas,
  returnAhead,
  takeAhead,
} from './slabs.ts';

/** Slabs in one request: 64 GiB. */
export const maxSlabsPerRequest = 4096;
/** Slabs that one host may hold ahead: 256 GiB. Those whose answer got lost count until the host's life ends. */
export const maxSlabsAhead = 16_384;

export interface Claim {
  layerId: bigint;
  slab: number;
  generation: bigint;
}

export function allocateSlabs(d: Decision, poolUuid: string, life: HostLife, count: number): SlabRun[] {
  const pool = requirePool(d, poolUuid);
  requireAuthority(d, pool);
  const host = requireLife(d, poolUuid, life);
  if (host.state !== 'LIVE') throw stale(`${life.nodeId} is ${host.state} on pool ${pool.name}, not LIVE`);
  if (count < 1 || count > maxSlabsPerRequest) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `AllocateSlabs gives 1 to ${maxSlabsPerRequest} slabs; ${count} were asked for.`,
    );
  }
  const held = countSlabs(aheadOf(d.tx, pool, life));
  if (held + count > maxSlabsAhead) {
    throw new HoldfastError(
      'TOO_MANY',
      `${life.nodeId} holds ${held} slabs of pool ${pool.name} ahead; at most ${maxSlabsAhead} are given. Return some.`,
    );
  }
  const runs = takeAhead(d.tx, pool, life, count);
  tables.pool.put(d.tx, pool, pool.uuid);
  return runs;
}

/** Of an answer given before: what the host still holds ahead. The rest was claimed, returned, or voided since. */
export function stillAhead(
  d: Decision,
  poolUuid: string,
  life: HostLife,
  runs: readonly SlabRun[],
): SlabRun[] {
  requireLife(d, poolUuid, life);
  const held = aheadOf(d.tx, requirePool(d, poolUuid), life);
  const single = (run: SlabRun): SlabRun[] =>
    Array.from({ length: run.count }, (_, index) => ({ ...run, first: run.first + index, count: 1 }));
  return normalized(
    runs.flatMap(single).filter((one) => findRun(held, one.first)?.generation === one.generation),
  );
}

/**
 * Slabs that a host's volumes have claimed, layer by layer: what is recorded already is passed over, and a layer whose claims do
 * not fit is left as it is and named in the answer. The others are recorded: their next holder must know them.
 */
export function reportSlabs(
  d: Decision,
  poolUuid: string,
  life: HostLife,
  claims: readonly Claim[],
): string[] {
  requireLife(d, poolUuid, life);
  const pool = requirePool(d, poolUuid);
  const misfits: string[] = [];
  for (const [layerId, mine] of byLayer(claims)) {
    const fresh = mine.filter((claim) => !layerHas(d.tx, pool, layerId, claim.slab, claim.generation));
    if (fresh.length === 0) continue;
    // The cut named every slab of the layer that had anything: these were empty by then, and are given back soon.
    const held = aheadOf(d.tx, pool, life);
    if (froze(d, pool, life, layerId) && fresh.every((claim) => isAhead(held, claim))) continue;
    if (!isTop(d, pool, life, layerId)) misfits.push(notTop(pool, life, layerId));
    else if (!claimAhead(d.tx, pool, life, layerId, runsOf(fresh))) {
      misfits.push(`${life.nodeId} does not hold all of the slabs that it reports for layer ${layerId}`);
    }
  }
  tables.pool.put(d.tx, pool, pool.uuid);
  auditMisfits(d, poolUuid, life, misfits);
  return misfits;
}

function auditMisfits(d: Decision, poolUuid: string, life: HostLife, misfits: readonly string[]): void {
  for (const detail of misfits) {
    audit(d, 'misfit', { poolUuid, nodeId: life.nodeId, generation: life.generation, detail });
  }
}

/** The same for what a connecting agent holds: what does not fit is left out and counted, for the log. */
export function reconcileClaims(
  d: Decision,
  pool: PoolRecord,
  life: HostLife,
  volume: VolumeRecord,
  claims: readonly Claim[],
): number {
  let misfits = 0;
  for (const [layerId, mine] of byLayer(claims)) {
    const held = aheadOf(d.tx, pool, life);
    const fresh = mine.filter((claim) => !layerHas(d.tx, pool, layerId, claim.slab, claim.generation));
    const fitting = isTopOf(d, volume, layerId) ? fresh.filter((claim) => isAhead(held, claim)) : [];
    misfits += fresh.length - fitting.length;
    if (fitting.length > 0 && !claimAhead(d.tx, pool, life, layerId, runsOf(fitting)))
      misfits += fitting.length;
  }
  return misfits;
}

/** Whether the layer is the writable top of a volume that this life holds, or was the last to hold. */
function isTop(d: Decision, pool: PoolRecord, life: HostLife, layerId: bigint): boolean {
  const layer = tables.layer.get(d.tx, pool.uuid, layerId);
  const volume = layer === undefined ? undefined : tables.volume.get(d.tx, layer.volumeUuid);
  return volume !== undefined && isTopOf(d, volume, layerId) && sameLife(volume.grant.holder, life);
}

/** The top on record, or the one that a cut under way puts there: its writer may know earlier than we that it has happened. */
function isTopOf(d: Decision, volume: VolumeRecord, layerId: bigint): boolean {
  return (
    volume.topLayerId === layerId ||
    tables.cutting.get(d.tx, volume.poolUuid, volume.uuid)?.topLayerId === layerId
  );
}

/** Whether this life wrote the layer until it froze: what it had emptied before, it may give back after. */
function froze(d: Decision, pool: PoolRecord, life: HostLife, layerId: bigint): boolean {
  return sameLife(tables.layer.get(d.tx, pool.uuid, layerId)?.writer ?? null, life);
}

function notTop(pool: PoolRecord, life: HostLife, layerId: bigint): string {
  return (
    `layer ${layerId} of pool ${pool.name} is not the top of a volume that ${life.nodeId} (generation ` +
    `${life.generation}) holds`
  );
}

function isAhead(held: readonly SlabRun[], { slab, generation }: Claim): boolean {
  return findRun(held, slab)?.generation === generation;
}

function byLayer(claims: readonly Claim[]): Map<bigint, Claim[]> {
  const layers = new Map<bigint, Claim[]>();
  for (const claim of claims) {
    const list = layers.get(claim.layerId);
    if (list === undefined) layers.set(claim.layerId, [claim]);
    else list.push(claim);
  }
  return layers;
}

function runsOf(claims: readonly Claim[]): SlabRun[] {
  return normalized(claims.map(({ slab, generation }) => ({ first: slab, count: 1, generation })));
}

/**
 * Slabs given back: unclaimed ones of the stock, and emptied ones of layers, whether their claim was reported before or not. Each
 * part as a whole or not at all; those that do not fit are named in the answer.
 */
export function returnSlabs(
  d: Decision,
  poolUuid: string,
  life: HostLife,
  unclaimed: readonly SlabRun[],
  emptied: readonly Claim[],
): string[] {
  const host = requireLife(d, poolUuid, life);
  if (host.state === 'DEAD') throw stale(`generation ${life.generation} of ${life.nodeId} is dead`);
  const pool = requirePool(d, poolUuid);
  const misfits: string[] = [];
  if (!returnAhead(d.tx, pool, life, unclaimed)) {
    misfits.push(`${life.nodeId} does not hold all of the slabs that it returns`);
  }
  for (const [layerId, mine] of byLayer(emptied)) {
    if (!isTop(d, pool, life, layerId) && !froze(d, pool, life, layerId)) {
      misfits.push(notTop(pool, life, layerId));
    } else if (!freeEmptied(d, pool, life, layerId, mine)) {
      misfits.push(`layer ${layerId} does not have all of the slabs that ${life.nodeId} returns as emptied`);
    }
  }
  tables.pool.put(d.tx, pool, pool.uuid);
  auditMisfits(d, poolUuid, life, misfits);
  return misfits;
}

/** Claimed and emptied between two reports, a slab never was the layer's in the books: it still is the host's. */
function freeEmptied(
  d: Decision,
  pool: PoolRecord,
  life: HostLife,
  layerId: bigint,
  mine: readonly Claim[],
): boolean {
  const ofLayer = mine.filter((claim) => layerHas(d.tx, pool, layerId, claim.slab, claim.generation));
  const ahead = mine.filter((claim) => !ofLayer.includes(claim));
  return (
    returnAhead(d.tx, pool, life, runsOf(ahead)) &&
    (ofLayer.length === 0 || freeFromLayer(d.tx, pool, layerId, runsOf(ofLayer)))
  );
}

export interface SlabReading {
  slab: number;
  generation: bigint;
  layerId: bigint;
  state: string;
}

/** Assigns a dead host's slabs by what their pages say. Slabs without a reading wait for another scan. */
export function orphansScanned(
  d: Decision,
  poolUuid: string,
  life: HostLife,
  readings: readonly SlabReading[],
): void {
  const pool = requirePool(d, poolUuid);
  const orphan = tables.orphan.get(d.tx, poolUuid, life.hostId, life.generation);
  if (orphan === undefined) return;
  const free: SlabRun[] = [];
  const bad: SlabRun[] = [];
  const unknown: SlabRun[] = [];
  const claimed: Claim[] = [];
  for (const reading of readings) {
    const run = findRun(orphan.runs, reading.slab);
    if (run === undefined) continue;
    const one = { first: reading.slab, count: 1, generation: run.generation };
    if (reading.state === 'bad') bad.push(one);
    else if (reading.state === 'free' || reading.generation < run.generation) free.push(one);
    else if (reading.generation > run.generation) unknown.push(one);
    else if (tables.layer.get(d.tx, poolUuid, reading.layerId) === undefined) unknown.push(one);
    else claimed.push({ layerId: reading.layerId, slab: reading.slab, generation: run.generation });
  }
  for (const [layerId, mine] of byLayer(claimed)) addToLayer(d.tx, pool, layerId, runsOf(mine));
  freeSlabs(d.tx, pool, normalized(free));
  if (unknown.length > 0) {
    const known = tables.quarantine.get(d.tx, poolUuid) ?? [];
    tables.quarantine.put(d.tx, normalized([...known, ...unknown]), poolUuid);
  }
  const settled = normalized([...free, ...bad, ...unknown, ...runsOf(claimed)]);
  pool.slabsAhead -= countSlabs(settled);
  tables.pool.put(d.tx, pool, poolUuid);
  const rest = { ...orphan, runs: without(orphan.runs, settled), bad: normalized([...orphan.bad, ...bad]) };
  if (rest.runs.length === 0 && rest.bad.length === 0) {
    tables.orphan.delete(d.tx, poolUuid, life.hostId, life.generation);
  } else {
    tables.orphan.put(d.tx, rest, poolUuid, life.hostId, life.generation);
  }
  audit(d, 'scan', {
    poolUuid,
    nodeId: life.nodeId,
    generation: life.generation,
    proof: 'slab pages read',
    detail:
      `${claimed.length} slabs claimed by a layer, ${free.length} free, ${bad.length} with bad pages, ` +
      `${unknown.length} of layers that are not known`,
  });
}
