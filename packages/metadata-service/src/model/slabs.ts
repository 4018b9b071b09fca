/**
 * Which slabs of a pool are free, ahead, or a layer's. No row per slab: a bit per slab in regions of 4096, and runs. A
 * summary of each region's free slabs and longest free run finds room without reading the regions (100 TiB: 1,600 regions, a
 * summary of 6.4 KB).
 *
 * A slab is in exactly one place: free (bit clear), ahead of one host, an orphan of a dead one, a layer's, leaving one (wiped when
 * nobody can map it any more), or in quarantine.
 */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot, Transaction } from '../store/store.ts';
import { Bitmap } from './bitmap.ts';
import { tables, type PoolRecord, type SlabRun } from './records.ts';
import { byRegion, countSlabs, covers, findRun, normalized, overlaps, without } from './runs.ts';

/** As in the pool format (native/src/core/format.h, kSlabsPerRegion). */
export const slabsPerRegion = 4096;

/** Free slabs and longest free run, region by region. */
class Summary {
  readonly #numbers: Uint16Array;

  constructor(pool: PoolRecord, text: string | undefined) {
    const regions = regionCount(pool);
    this.#numbers = new Uint16Array(2 * regions);
    const known = text === undefined ? Buffer.alloc(0) : Buffer.from(text, 'base64');
    for (let region = 0; region < regions; region++) {
      const slabs = slabsIn(pool, region);
      const stored = known.length >= 4 * (region + 1);
      this.set(
        region,
        stored ? known.readUInt16LE(4 * region) : slabs,
        stored ? known.readUInt16LE(4 * region + 2) : slabs,
      );
    }
  }

  free(region: number): number {
    return this.#numbers[2 * region] as number;
  }
  longest(region: number): number {
    return this.#numbers[2 * region + 1] as number;
  }
  set(region: number, free: number, longest: number): void {
    this.#numbers[2 * region] = free;
    this.#numbers[2 * region + 1] = longest;
  }
  /** The first region with a free run of `count`, else the one with the longest; -1: all full. */
  find(count: number): number {
    let best = -1;
    for (let region = 0; region < this.#numbers.length / 2; region++) {
      const longest = this.longest(region);
      if (longest >= count) return region;
      if (longest > 0 && (best < 0 || longest > this.longest(best))) best = region;
    }
    return best;
  }
  toString(): string {
    const bytes = Buffer.alloc(2 * this.#numbers.length);
    this.#numbers.forEach((number, index) => bytes.writeUInt16LE(number, 2 * index));
    return bytes.toString('base64');
  }
}

export function regionCount(pool: PoolRecord): number {
  return Math.ceil(pool.slabCount / slabsPerRegion);
}

function slabsIn(pool: PoolRecord, region: number): number {
  return Math.min(slabsPerRegion, pool.slabCount - region * slabsPerRegion);
}

/** One transaction's view of a pool's free slabs. Call save() once at the end; the caller stores the pool record. */
class FreeSlabs {
  readonly #tx: Transaction;
  readonly #pool: PoolRecord;
  readonly #summary: Summary;
  readonly #regions = new Map<number, Bitmap>();

  constructor(tx: Transaction, pool: PoolRecord) {
    this.#tx = tx;
    this.#pool = pool;
    this.#summary = new Summary(pool, tables.regions.get(tx, pool.uuid));
  }

  /** Takes up to `count` free slabs, in runs as long as possible. */
  take(count: number, generation: bigint): SlabRun[] {
    const taken: SlabRun[] = [];
    for (let wanted = count; wanted > 0; ) {
      const region = this.#summary.find(wanted);
      if (region < 0) break;
      const bits = this.#bits(region);
      const runs = bits.clearRuns();
      const fit =
        runs.find((run) => run.count >= wanted) ?? runs.reduce((a, b) => (b.count > a.count ? b : a));
      const take = Math.min(fit.count, wanted);
      const run = { first: region * slabsPerRegion + fit.first, count: take, generation };
      this.#mark(region, [run], true);
      taken.push(run);
      wanted -= take;
    }
    return normalized(taken);
  }

  /** Takes those of `slabs` that are free. Returns them. */
  takeThese(slabs: readonly SlabRun[]): SlabRun[] {
    const taken: SlabRun[] = [];
    for (const [region, runs] of byRegion(slabs, slabsPerRegion)) {
      const bits = this.#bits(region);
      const free = runs.flatMap((run) => {
        const found: SlabRun[] = [];
        for (let slab = run.first; slab < run.first + run.count; slab++) {
          if (!bits.has(slab % slabsPerRegion)) found.push({ ...run, first: slab, count: 1 });
        }
        return found;
      });
      this.#mark(region, free, true);
      taken.push(...free);
    }
    return normalized(taken);
  }

  give(runs: readonly SlabRun[]): void {
    for (const [region, list] of byRegion(runs, slabsPerRegion)) this.#mark(region, list, false);
  }

  save(): void {
    for (const [region, bits] of this.#regions) {
      tables.region.put(this.#tx, bits.toString(), this.#pool.uuid, region);
    }
    if (this.#regions.size > 0) tables.regions.put(this.#tx, this.#summary.toString(), this.#pool.uuid);
  }

  #bits(region: number): Bitmap {
    let bits = this.#regions.get(region);
    if (bits === undefined) {
      bits = new Bitmap(slabsIn(this.#pool, region), tables.region.get(this.#tx, this.#pool.uuid, region));
      this.#regions.set(region, bits);
    }
    return bits;
  }

  #mark(region: number, runs: readonly SlabRun[], used: boolean): void {
    const bits = this.#bits(region);
    for (const run of runs) {
      for (let slab = run.first; slab < run.first + run.count; slab++) {
        const bit = slab % slabsPerRegion;
        if (bits.has(bit) === used) {
          throw new HoldfastError(
            'INTERNAL',
            `Slab ${slab} of pool ${this.#pool.name} is ${used ? 'in use' : 'free'} already: the slab map and the slab ` +
              'lists disagree. Nothing was changed. Keep the database and report this.',
          );
        }
        bits.set(bit, used);
      }
    }
    const delta = countSlabs(runs) * (used ? -1 : 1);
    const longest = bits.clearRuns().reduce((most, run) => Math.max(most, run.count), 0);
    this.#summary.set(region, this.#summary.free(region) + delta, longest);
    this.#pool.slabsFree += delta;
  }
}

/** Up to `count` slabs of a new generation, for a host to hold ahead. Fewer, or none: the pool is full. */
export function takeAhead(
  tx: Transaction,
  pool: PoolRecord,
  host: { hostId: number; generation: bigint },
  count: number,
): SlabRun[] {
  const generation = pool.nextSlabGeneration;
  const free = new FreeSlabs(tx, pool);
  const runs = free.take(count, generation);
  if (runs.length === 0) return [];
  free.save();
  pool.nextSlabGeneration = generation + 1n;
  pool.slabsAhead += countSlabs(runs);
  const held = aheadOf(tx, pool, host);
  putAhead(tx, pool, host, [...held, ...runs]);
  return runs;
}

/** Up to `count` free slabs of a new generation, for a layer. Fewer, or none: the pool is full. */
export function takeForLayer(tx: Transaction, pool: PoolRecord, layerId: bigint, count: number): SlabRun[] {
  const generation = pool.nextSlabGeneration;
  const free = new FreeSlabs(tx, pool);
  const runs = free.take(count, generation);
  if (runs.length === 0) return [];
  free.save();
  pool.nextSlabGeneration = generation + 1n;
  addToLayer(tx, pool, layerId, runs);
  return runs;
}

/** What a host holds ahead under this generation. */
export function aheadOf(
  tx: Snapshot,
  pool: PoolRecord,
  host: { hostId: number; generation: bigint },
): SlabRun[] {
  const record = tables.ahead.get(tx, pool.uuid, host.hostId);
  return record?.generation === host.generation ? record.runs : [];
}

function putAhead(
  tx: Transaction,
  pool: PoolRecord,
  host: { hostId: number; generation: bigint },
  runs: readonly SlabRun[],
): void {
  tables.ahead.put(tx, { generation: host.generation, runs: normalized(runs) }, pool.uuid, host.hostId);
}

/** Slabs ahead that the host gives back unclaimed. False: it does not hold all of them; nothing changed. */
export function returnAhead(
  tx: Transaction,
  pool: PoolRecord,
  host: { hostId: number; generation: bigint },
  runs: readonly SlabRun[],
): boolean {
  const held = aheadOf(tx, pool, host);
  if (overlaps(runs) || !covers(held, runs)) return false;
  putAhead(tx, pool, host, without(held, runs));
  pool.slabsAhead -= countSlabs(runs);
  freeSlabs(tx, pool, runs);
  return true;
}

/** Moves slabs from a host's stock to a layer. False: it does not hold all of them; nothing changed. */
export function claimAhead(
  tx: Transaction,
  pool: PoolRecord,
  host: { hostId: number; generation: bigint },
  layerId: bigint,
  runs: readonly SlabRun[],
): boolean {
  const held = aheadOf(tx, pool, host);
  if (overlaps(runs) || !covers(held, runs)) return false;
  putAhead(tx, pool, host, without(held, runs));
  pool.slabsAhead -= countSlabs(runs);
  addToLayer(tx, pool, layerId, runs);
  return true;
}

/** A host died: what it held ahead has to be read before its volumes are granted again. */
export function orphanAhead(
  tx: Transaction,
  pool: PoolRecord,
  host: { hostId: number; generation: bigint; nodeId: string },
): void {
  const runs = aheadOf(tx, pool, host);
  tables.ahead.delete(tx, pool.uuid, host.hostId);
  if (runs.length === 0) return;
  tables.orphan.put(tx, { nodeId: host.nodeId, runs, bad: [] }, pool.uuid, host.hostId, host.generation);
}

export function freeSlabs(tx: Transaction, pool: PoolRecord, runs: readonly SlabRun[]): void {
  const free = new FreeSlabs(tx, pool);
  free.give(runs);
  free.save();
}

/** Marks those of `slabs` as used that are free now (a scan found them claimed on disk). Returns which. */
export function reserveFree(tx: Transaction, pool: PoolRecord, slabs: readonly SlabRun[]): SlabRun[] {
  const free = new FreeSlabs(tx, pool);
  const taken = free.takeThese(slabs);
  free.save();
  return taken;
}

/** The free runs of one region, for a scan. */
export function freeRuns(tx: Snapshot, pool: PoolRecord, region: number): SlabRun[] {
  return new Bitmap(slabsIn(pool, region), tables.region.get(tx, pool.uuid, region))
    .clearRuns()
    .map((run) => ({ first: region * slabsPerRegion + run.first, count: run.count, generation: 0n }));
}

export function addToLayer(
  tx: Transaction,
  pool: PoolRecord,
  layerId: bigint,
  runs: readonly SlabRun[],
): void {
  const layer = tables.layer.get(tx, pool.uuid, layerId);
  if (layer === undefined) {
    throw new HoldfastError('INTERNAL', `Layer ${layerId} of pool ${pool.name} is not known.`);
  }
  for (const [region, list] of byRegion(runs, slabsPerRegion)) {
    const known = tables.slabs.get(tx, pool.uuid, layerId, region) ?? [];
    tables.slabs.put(tx, normalized([...known, ...list]), pool.uuid, layerId, region);
  }
  tables.layer.put(tx, { ...layer, slabCount: layer.slabCount + countSlabs(runs) }, pool.uuid, layerId);
}

/** Frees slabs of a layer. False: it does not have all of them in these generations; nothing changed. */
export function freeFromLayer(
  tx: Transaction,
  pool: PoolRecord,
  layerId: bigint,
  runs: readonly SlabRun[],
): boolean {
  if (!takeFromLayer(tx, pool, layerId, runs)) return false;
  freeSlabs(tx, pool, runs);
  return true;
}

/** Takes slabs out of a layer; where they go is the caller's business. False: it does not have all of them; nothing changed. */
export function takeFromLayer(
  tx: Transaction,
  pool: PoolRecord,
  layerId: bigint,
  runs: readonly SlabRun[],
): boolean {
  const layer = tables.layer.get(tx, pool.uuid, layerId);
  if (layer === undefined || overlaps(runs)) return false;
  const regions = byRegion(runs, slabsPerRegion);
  for (const [region, list] of regions) {
    if (!covers(tables.slabs.get(tx, pool.uuid, layerId, region) ?? [], list)) return false;
  }
  for (const [region, list] of regions) {
    const kept = without(tables.slabs.get(tx, pool.uuid, layerId, region) ?? [], list);
    if (kept.length === 0) tables.slabs.delete(tx, pool.uuid, layerId, region);
    else tables.slabs.put(tx, kept, pool.uuid, layerId, region);
  }
  tables.layer.put(tx, { ...layer, slabCount: layer.slabCount - countSlabs(runs) }, pool.uuid, layerId);
  return true;
}

/** Whether the layer has this slab in this generation. */
export function layerHas(
  tx: Snapshot,
  pool: PoolRecord,
  layerId: bigint,
  slab: number,
  generation: bigint,
): boolean {
  const runs = tables.slabs.get(tx, pool.uuid, layerId, Math.floor(slab / slabsPerRegion)) ?? [];
  return findRun(runs, slab)?.generation === generation;
}

export function slabsOf(tx: Snapshot, poolUuid: string, layerId: bigint): SlabRun[] {
  return normalized(tables.slabs.list(tx, [poolUuid, layerId]).flat());
}

/** The pool grew: the new slabs are free. */
export function growPool(tx: Transaction, pool: PoolRecord, slabCount: number): void {
  const before = pool.slabCount;
  const lastRegion = Math.floor(before / slabsPerRegion);
  const summary = tables.regions.get(tx, pool.uuid);
  pool.slabsFree += slabCount - before;
  pool.slabCount = slabCount;
  if (summary === undefined) return;
  // Only the last region of before may have gained slabs in place; whole new ones are free by being absent.
  const bits = new Bitmap(slabsIn(pool, lastRegion), tables.region.get(tx, pool.uuid, lastRegion));
  const runs = bits.clearRuns();
  const updated = new Summary(pool, summary);
  updated.set(
    lastRegion,
    countSlabs(runs.map((run) => ({ ...run, generation: 0n }))),
    runs.reduce((most, run) => Math.max(most, run.count), 0),
  );
  tables.regions.put(tx, updated.toString(), pool.uuid);
}
