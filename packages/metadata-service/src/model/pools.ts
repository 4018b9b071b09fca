/** Pools: how one becomes known, whose it is, and its slots. */
import { HoldfastError } from '@holdfast/common';
import { Bitmap } from './bitmap.ts';
import { audit, requirePool, type Decision } from './decision.ts';
import { noteRoom } from './growth.ts';
import {
  tables,
  type Authority,
  type PoolGeometry,
  type PoolRecord,
  type RemovedPoolRecord,
} from './records.ts';

/** A pool as an agent found it on a device. */
export interface PoolSighting extends PoolGeometry {
  devicePath: string;
  /** Of the device as the node sees it now, and what the pool would have if it grew into that. 0: not known. */
  deviceBytes: bigint;
  slabsPossible: number;
  /** Why it can not be used as it is now; empty: it can. */
  problem: string;
  authority: { storeId: string; incarnation: bigint; term: bigint };
}

export type SightingVerdict =
  /** The agent may join. */
  | { type: 'accepted' }
  /** Ours, or nobody's: the authority page has to be written (again) for this term. */
  | { type: 'claim' }
  /** This device on this node only: a copy, or a wrong geometry. */
  | { type: 'refuse-device'; message: string }
  /** The pool itself: it has another owner. */
  | { type: 'refuse-pool'; message: string };

/** Judges a sighting and remembers a pool that is new. */
export function seePool(d: Decision, nodeId: string, seen: PoolSighting): SightingVerdict {
  const { authority } = seen;
  const pool = tables.pool.get(d.tx, seen.uuid);
  const removed = pool === undefined ? tables.removedPool.get(d.tx, seen.uuid) : undefined;
  if (removed !== undefined) return { type: 'refuse-device', message: wasRemoved(nodeId, seen, removed) };
  if (pool !== undefined && seen.problem !== '') {
    return { type: 'refuse-device', message: `Pool ${pool.name} on ${nodeId}: ${seen.problem}` };
  }
  if (pool !== undefined && pool.wwid !== seen.wwid) {
    return {
      type: 'refuse-device',
      message:
        `${seen.devicePath} on ${nodeId} has the UUID of pool ${pool.name} (${pool.uuid}), but is another device ` +
        `(${seen.wwid || 'no WWID'}, the pool is on ${pool.wwid || 'no WWID'}): a copy, such as an array clone. It is ` +
        'refused. Take the copy away from the node, or format it as a pool of its own.',
    };
  }
  if (authority.storeId !== '' && authority.storeId !== d.service.storeId) {
    return {
      type: 'refuse-pool',
      message:
        `Pool ${seen.name} (${seen.uuid}) belongs to the metadata service with store ${authority.storeId}; this one is ` +
        `store ${d.service.storeId}. Connect the node to that service, or rebuild this one from the pool.`,
    };
  }
  const owner = { incarnation: authority.incarnation, term: authority.term };
  if (authority.storeId !== '' && isNewer(owner, d.service)) {
    return {
      type: 'refuse-pool',
      message:
        `Pool ${seen.name} (${seen.uuid}) was claimed under incarnation ${owner.incarnation}, term ${owner.term}; this ` +
        `service is at incarnation ${d.service.incarnation}, term ${d.service.term}. Its database is older than the ` +
        'pool (a restored backup), or another service runs on a copy of it. Nothing is granted. Stop this service and ' +
        'start the one with the newest database.',
    };
  }
  const claimedNow = pool !== undefined && pool.claimed !== null && same(pool.claimed, d.service);
  // A look from before this service's own claim is no surprise; one without an owner at the start of a term is.
  if (authority.storeId === '' && pool?.claimed && !claimedNow) {
    return {
      type: 'refuse-pool',
      message:
        `Pool ${seen.name} (${seen.uuid}) has no owner in its authority page, but this service claimed it before: the ` +
        'device was formatted again, or restored from an old copy. Nothing is granted on it.',
    };
  }
  if (pool !== undefined && authority.storeId !== '' && !claimedNow && !isOurs(pool, owner)) {
    return {
      type: 'refuse-pool',
      message:
        `The authority page of pool ${seen.name} (${seen.uuid}) shows incarnation ${owner.incarnation}, term ${owner.term}, ` +
        `which this database did not write: it is a copy, and the original ran after it was made. Nothing is granted. ` +
        'Stop this service and start the one with the newest database.',
    };
  }
  if (pool === undefined && authority.storeId !== '') {
    return {
      type: 'refuse-pool',
      message:
        `Pool ${seen.name} (${seen.uuid}) names this service as its owner, but the database does not know it: the ` +
        'database is older than the pool (a restored backup). Nothing is granted. Put the newest database in its place.',
    };
  }
  if (pool === undefined) {
    const refusal = refuseGeometry(seen);
    if (refusal !== undefined) return { type: 'refuse-device', message: refusal };
    remember(d, nodeId, seen);
    return { type: 'claim' };
  }
  if (seen.slabCount < pool.slabCount || seen.slabSize !== pool.slabSize) {
    return {
      type: 'refuse-device',
      message:
        `${seen.devicePath} on ${nodeId} shows pool ${pool.name} with ${seen.slabCount} slabs of ${seen.slabSize} bytes; ` +
        `it has ${pool.slabCount} of ${pool.slabSize}. The device has shrunk or is an old copy. It is refused.`,
    };
  }
  noteRoom(d, pool, nodeId, seen);
  return claimedNow ? { type: 'accepted' } : { type: 'claim' };
}

function wasRemoved(nodeId: string, seen: PoolSighting, removed: RemovedPoolRecord): string {
  return (
    `${seen.devicePath} on ${nodeId} holds pool ${removed.name} (${seen.uuid}), which was removed from this service at ` +
    `${new Date(removed.atUnixMs).toISOString()}. It is not used. To make a new pool of it, run: holdfast pool format ` +
    `${seen.devicePath} --force`
  );
}

function isNewer(a: Authority, b: Authority): boolean {
  return a.incarnation > b.incarnation || (a.incarnation === b.incarnation && a.term > b.term);
}

function same(a: Authority, b: Authority): boolean {
  return a.incarnation === b.incarnation && a.term === b.term;
}

/** Whether this database wrote, or may have written, what the page shows. */
function isOurs(pool: PoolRecord, page: Authority): boolean {
  return (
    (pool.claimed !== null && same(pool.claimed, page)) || pool.claiming.some((claim) => same(claim, page))
  );
}

function refuseGeometry(seen: PoolSighting): string | undefined {
  if (seen.fencing === 'reservations') {
    return `Pool ${seen.name} asks for fencing by reservations, which this release does not do. Format it with another class.`;
  }
  const sane =
    seen.slabSize > 0 &&
    seen.slabCount > 0 &&
    seen.volumeSlots > 0 &&
    seen.layerSlots > 0 &&
    seen.hostSlots > 0;
  const timed = seen.leaseMs > seen.renewIntervalMs && seen.renewIntervalMs > 0;
  return sane && timed
    ? undefined
    : `Pool ${seen.name} (${seen.uuid}) on ${seen.devicePath} has an impossible geometry or lease: its superblock is damaged.`;
}

function remember(d: Decision, nodeId: string, seen: PoolSighting): void {
  const {
    devicePath,
    authority: _nobody,
    deviceBytes: _b,
    slabsPossible: _p,
    problem: _w,
    ...geometry
  } = seen;
  const pool: PoolRecord = {
    ...geometry,
    state: 'CLAIMING',
    claimed: null,
    claiming: [],
    nextVolumeId: 1n,
    nextLayerId: 1n,
    nextSlabGeneration: 1n,
    slabsFree: seen.slabCount,
    slabsAhead: 0,
    provisionedBytes: 0n,
  };
  tables.pool.put(d.tx, pool, pool.uuid);
  audit(d, 'pool-seen', { poolUuid: pool.uuid, nodeId, detail: `${pool.name} on ${devicePath}` });
}

/** Before the claim is ordered, so that the page is known again when the answer gets lost. */
export function poolClaiming(d: Decision, poolUuid: string): void {
  const pool = requirePool(d, poolUuid);
  const claim = { incarnation: d.service.incarnation, term: d.service.term };
  if (pool.claiming.some((before) => same(before, claim))) return;
  tables.pool.put(d.tx, { ...pool, claiming: [...pool.claiming, claim] }, poolUuid);
}

/** The authority page was written for this service's term, waited for and read back. */
export function poolClaimed(d: Decision, nodeId: string, poolUuid: string): void {
  const pool = tables.pool.get(d.tx, poolUuid);
  if (pool === undefined) return;
  const claimed = { incarnation: d.service.incarnation, term: d.service.term };
  tables.pool.put(d.tx, { ...pool, state: 'ACTIVE', claimed, claiming: [] }, poolUuid);
  audit(d, 'authority', {
    poolUuid,
    nodeId,
    proof: 'written, waited for, read back',
    detail: `store ${d.service.storeId}, incarnation ${claimed.incarnation}, term ${claimed.term}`,
  });
}

/** A free slot of a pool's volume or layer table. @throws HoldfastError TOO_MANY */
export function takeSlot(d: Decision, pool: PoolRecord, kind: 'volume' | 'layer'): number {
  const size = kind === 'volume' ? pool.volumeSlots : pool.layerSlots;
  const bits = new Bitmap(size, tables.slots.get(d.tx, pool.uuid, kind));
  const slot = bits.firstClear();
  if (slot < 0) {
    throw new HoldfastError(
      'TOO_MANY',
      `Pool ${pool.name} has ${size} ${kind} slots and all are in use. Delete volumes, or use another pool.`,
    );
  }
  bits.set(slot, true);
  tables.slots.put(d.tx, bits.toString(), pool.uuid, kind);
  return slot;
}

export function markSlot(
  d: Decision,
  pool: PoolRecord,
  kind: 'volume' | 'layer',
  slot: number,
  used: boolean,
): void {
  const size = kind === 'volume' ? pool.volumeSlots : pool.layerSlots;
  const bits = new Bitmap(size, tables.slots.get(d.tx, pool.uuid, kind));
  if (bits.has(slot) === used) {
    throw new HoldfastError(
      'INTERNAL',
      `${kind} slot ${slot} of pool ${pool.name} is ${used ? 'in use' : 'free'} already.`,
    );
  }
  bits.set(slot, used);
  tables.slots.put(d.tx, bits.toString(), pool.uuid, kind);
}
