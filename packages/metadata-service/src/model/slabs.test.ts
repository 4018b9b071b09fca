/** Slabs, runs, bitmaps: on a pool of 100 TiB as on a small one, against a plain list of what every slab is. */
import { beforeEach, describe, expect, it } from 'vitest';
import { MemoryStore } from '../store/memory.ts';
import type { Transaction } from '../store/store.ts';
import { Bitmap } from './bitmap.ts';
import { nextEpoch } from './epoch.ts';
import { unused } from './layers.ts';
import { tables, type PoolRecord, type SlabRun } from './records.ts';
import { byRegion, common, countSlabs, covers, findRun, normalized, overlaps, without } from './runs.ts';
import {
  aheadOf,
  claimAhead,
  freeFromLayer,
  freeRuns,
  growPool,
  orphanAhead,
  regionCount,
  reserveFree,
  returnAhead,
  slabsOf,
  takeAhead,
} from './slabs.ts';
import { random } from '../../test/simulation/random.ts';

const host = { hostId: 1, generation: 1n, nodeId: 'n' };

function poolOf(slabCount: number): PoolRecord {
  return {
    uuid: 'p',
    name: 'p',
    wwid: '',
    fencing: 'loop',
    slabSize: 16 << 20,
    slabCount,
    volumeSlots: 8,
    layerSlots: 8,
    hostSlots: 8,
    renewIntervalMs: 1,
    leaseMs: 2,
    drainMs: 0,
    state: 'ACTIVE',
    claimed: null,
    claiming: [],
    nextVolumeId: 1n,
    nextLayerId: 1n,
    nextSlabGeneration: 1n,
    slabsFree: slabCount,
    slabsAhead: 0,
    provisionedBytes: 0n,
  };
}

let store: MemoryStore;
beforeEach(() => {
  store = new MemoryStore();
});

function layer(tx: Transaction, layerId: bigint): void {
  const record = {
    layerId,
    slot: 0,
    parentLayerId: 0n,
    birth: 1n,
    sizeBytes: 0n,
    frozen: false,
    volumeUuid: 'v',
    slabCount: 0,
    ...unused,
  };
  tables.layer.put(tx, record, 'p', layerId);
}

function must(condition: boolean): void {
  if (!condition) throw new Error('a step did what it must not');
}

describe('100 TiB', () => {
  const slabs = 6_553_600;

  it('is allocated in long runs across regions, fast, and takes no row per slab', async () => {
    const pool = poolOf(slabs);
    expect(regionCount(pool)).toBe(1600);
    const started = performance.now();
    let largest = 0;
    for (let taken = 0; taken < slabs; taken += 4096) {
      await store.transact((tx) => {
        layer(tx, 1n);
        const runs = takeAhead(tx, pool, host, 4096);
        largest = Math.max(largest, runs.length);
        expect(countSlabs(runs)).toBe(4096);
        claimAhead(tx, pool, host, 1n, runs);
      });
    }
    const perCall = (performance.now() - started) / 1600;
    expect(perCall).toBeLessThan(25);
    expect(largest).toBe(1);
    expect(pool).toMatchObject({ slabsFree: 0, slabsAhead: 0 });
    await store.transact((tx) => expect(takeAhead(tx, pool, host, 1)).toEqual([]));
    const rows = store.read((tx) => tx.scan('').length);
    expect(rows).toBeLessThan(2 * 1600 + 10);
    const largestValue = store.read((tx) =>
      Math.max(
        ...tx
          .scan('')
          .map(
            ([, value]) =>
              JSON.stringify(value, (_k, v: unknown) => (typeof v === 'bigint' ? `${v}` : v)).length,
          ),
      ),
    );
    expect(largestValue).toBeLessThan(16_384);
    expect(store.read((tx) => slabsOf(tx, 'p', 1n)).length).toBe(1600);
  }, 60_000);

  it('gives single slabs fast when it is nearly full', async () => {
    const pool = poolOf(slabs);
    await store.transact((tx) => {
      for (let region = 0; region < 1600; region++) takeAhead(tx, pool, { ...host, hostId: region }, 4096);
      returnAhead(tx, pool, { ...host, hostId: 1599 }, [{ first: slabs - 1, count: 1, generation: 1600n }]);
    });
    const started = performance.now();
    await store.transact((tx) =>
      expect(takeAhead(tx, pool, host, 8)).toEqual([{ first: slabs - 1, count: 1, generation: 1601n }]),
    );
    expect(performance.now() - started).toBeLessThan(100);
  }, 60_000);
});

describe('allocation', () => {
  it('gives each request a generation of its own, never one twice', async () => {
    const pool = poolOf(100);
    await store.transact((tx) => {
      const first = takeAhead(tx, pool, host, 2);
      returnAhead(tx, pool, host, first);
      expect(takeAhead(tx, pool, host, 2)).toEqual([{ first: 0, count: 2, generation: 2n }]);
    });
  });

  it('prefers one run that is long enough over pieces, and takes the longest pieces first', async () => {
    const pool = poolOf(40);
    await store.transact((tx) => {
      const all = takeAhead(tx, pool, host, 40);
      const generation = all[0]?.generation ?? 0n;
      const give = (first: number, count: number): boolean =>
        returnAhead(tx, pool, host, [{ first, count, generation }]);
      give(0, 3);
      give(10, 8);
      give(30, 5);
      expect(takeAhead(tx, pool, host, 5)).toMatchObject([{ first: 10, count: 5 }]);
      expect(takeAhead(tx, pool, host, 100).map(({ first, count }) => [first, count])).toEqual([
        [0, 3],
        [15, 3],
        [30, 5],
      ]);
    });
  });

  it('refuses slabs that the host does not hold, in another generation, twice, or past the end, and changes nothing', async () => {
    const pool = poolOf(40);
    await store.transact((tx) => {
      layer(tx, 1n);
      takeAhead(tx, pool, host, 10);
      const before = structuredClone(pool);
      const wrong: SlabRun[][] = [
        [{ first: 5, count: 6, generation: 1n }],
        [{ first: 5, count: 1, generation: 2n }],
        [
          { first: 5, count: 2, generation: 1n },
          { first: 6, count: 1, generation: 1n },
        ],
        [{ first: 4000, count: 1, generation: 1n }],
      ];
      for (const runs of wrong) {
        expect(returnAhead(tx, pool, host, runs)).toBe(false);
        expect(claimAhead(tx, pool, host, 1n, runs)).toBe(false);
        expect(freeFromLayer(tx, pool, 1n, runs)).toBe(false);
      }
      expect(
        returnAhead(tx, pool, { ...host, generation: 2n }, [{ first: 5, count: 1, generation: 1n }]),
      ).toBe(false);
      expect(pool).toEqual(before);
      expect(countSlabs(aheadOf(tx, pool, host))).toBe(10);
    });
  });

  it('makes what a dead host held ahead an orphan, used until it has been read', async () => {
    const pool = poolOf(40);
    await store.transact((tx) => {
      takeAhead(tx, pool, host, 10);
      orphanAhead(tx, pool, host);
      expect(aheadOf(tx, pool, host)).toEqual([]);
      expect(tables.orphan.get(tx, 'p', 1, 1n)?.runs).toEqual([{ first: 0, count: 10, generation: 1n }]);
      expect(pool).toMatchObject({ slabsFree: 30, slabsAhead: 10 });
      expect(takeAhead(tx, pool, { ...host, generation: 2n }, 100)).toMatchObject([{ first: 10, count: 30 }]);
    });
  });

  it('has the slabs of a pool that grew, inside a region and beyond', async () => {
    const pool = poolOf(4000);
    await store.transact((tx) => {
      takeAhead(tx, pool, host, 4000);
      growPool(tx, pool, 9000);
      expect(pool.slabsFree).toBe(5000);
      expect(takeAhead(tx, pool, host, 200).map(({ first, count }) => [first, count])).toEqual([[4096, 200]]);
      expect(takeAhead(tx, pool, host, 9000).reduce((sum, run) => sum + run.count, 0)).toBe(4800);
      expect(pool.slabsFree).toBe(0);
    });
  });

  it('reserves what a scan found, and only what is free', async () => {
    const pool = poolOf(40);
    await store.transact((tx) => {
      takeAhead(tx, pool, host, 4);
      expect(reserveFree(tx, pool, [{ first: 2, count: 4, generation: 9n }])).toEqual([
        { first: 4, count: 2, generation: 9n },
      ]);
      expect(freeRuns(tx, pool, 0)).toEqual([{ first: 6, count: 34, generation: 0n }]);
    });
  });

  it('agrees with a plain list after thousands of random steps', async () => {
    const pool = poolOf(9000);
    const rng = random(7);
    const owner = new Map<number, string>();
    await store.transact((tx) => {
      for (const id of [1n, 2n, 3n]) layer(tx, id);
      for (let step = 0; step < 1500; step++) {
        const held = aheadOf(tx, pool, host);
        const run = held[rng.below(Math.max(1, held.length))];
        const id = BigInt(1 + rng.below(3));
        const mine = slabsOf(tx, 'p', id);
        const claimed = mine[rng.below(Math.max(1, mine.length))];
        const piece = (of: SlabRun): SlabRun => {
          const from = rng.below(of.count);
          return { ...of, first: of.first + from, count: 1 + rng.below(of.count - from) };
        };
        const each = (of: SlabRun, what?: string): void => {
          for (let n = of.first; n < of.first + of.count; n++) {
            if (what === undefined) owner.delete(n);
            else owner.set(n, what);
          }
        };
        const action = rng.below(10);
        if (action < 4) {
          for (const taken of takeAhead(tx, pool, host, 1 + rng.below(300))) {
            for (let n = taken.first; n < taken.first + taken.count; n++) must(!owner.has(n));
            each(taken, 'ahead');
          }
        } else if (action < 7 && run !== undefined) {
          const part = piece(run);
          must(claimAhead(tx, pool, host, id, [part]));
          each(part, `layer ${id}`);
        } else if (action < 8 && run !== undefined) {
          const part = piece(run);
          must(returnAhead(tx, pool, host, [part]));
          each(part);
        } else if (claimed !== undefined) {
          const part = piece(claimed);
          must(freeFromLayer(tx, pool, id, [part]));
          each(part);
        }
      }
      const count = (what: string): number => [...owner.values()].filter((value) => value === what).length;
      expect(pool.slabsFree).toBe(9000 - owner.size);
      expect(pool.slabsAhead).toBe(count('ahead'));
      for (const id of [1n, 2n, 3n]) {
        expect(countSlabs(slabsOf(tx, 'p', id))).toBe(count(`layer ${id}`));
        expect(tables.layer.get(tx, 'p', id)?.slabCount).toBe(count(`layer ${id}`));
      }
      const free = [0, 1, 2].flatMap((region) => freeRuns(tx, pool, region));
      expect(countSlabs(free)).toBe(pool.slabsFree);
      for (const one of free)
        for (let n = one.first; n < one.first + one.count; n++) expect(owner.has(n)).toBe(false);
    });
  });
});

describe('runs', () => {
  const run = (first: number, count: number, generation = 1n): SlabRun => ({ first, count, generation });

  it('are merged when they touch in one generation', () => {
    expect(normalized([run(5, 2), run(0, 3), run(3, 2), run(7, 1, 2n), run(9, 0)])).toEqual([
      run(0, 7),
      run(7, 1, 2n),
    ]);
  });
  it('are found, covered, cut and intersected', () => {
    const whole = [run(0, 4), run(10, 5, 2n)];
    expect(findRun(whole, 3)).toEqual(run(0, 4));
    expect([4, 9, 15, -1].map((slab) => findRun(whole, slab))).toEqual([
      undefined,
      undefined,
      undefined,
      undefined,
    ]);
    expect(covers(whole, [run(1, 2), run(12, 3, 2n)])).toBe(true);
    expect(covers(whole, [run(3, 2)])).toBe(false);
    expect(covers(whole, [run(10, 1, 1n)])).toBe(false);
    expect(without(whole, [run(1, 1), run(14, 9)])).toEqual([run(0, 1), run(2, 2), run(10, 4, 2n)]);
    expect(common(whole, [run(2, 10), run(12, 9, 2n)])).toEqual([run(2, 2), run(12, 3, 2n)]);
    expect(overlaps([run(0, 2), run(1, 1)])).toBe(true);
    expect(overlaps([run(0, 2), run(2, 1)])).toBe(false);
    expect([...byRegion([run(2, 5)], 4)]).toEqual([
      [0, [run(2, 2)]],
      [1, [run(4, 3)]],
    ]);
  });
});

describe('a bitmap', () => {
  it('comes back from its text, also larger, and finds its clear runs', () => {
    const bits = new Bitmap(20);
    for (const bit of [0, 1, 5, 19]) bits.set(bit, true);
    const grown = new Bitmap(24, bits.toString());
    expect(grown.clearRuns()).toEqual([
      { first: 2, count: 3 },
      { first: 6, count: 13 },
      { first: 20, count: 4 },
    ]);
    expect([grown.firstClear(), grown.firstClear(5), new Bitmap(0).firstClear()]).toEqual([2, 6, -1]);
    expect(() => bits.set(20, true)).toThrow(RangeError);
  });
});

describe('epochs', () => {
  it('begin with the incarnation and grow by one', () => {
    expect(nextEpoch(0n, 1n)).toBe((1n << 40n) + 1n);
    expect(nextEpoch((1n << 40n) + 9n, 1n)).toBe((1n << 40n) + 10n);
    expect(nextEpoch((1n << 40n) + 9n, 2n)).toBe((2n << 40n) + 1n);
  });
  it('are refused to a service that is older than the volume', () => {
    expect(() => nextEpoch((2n << 40n) + 1n, 1n)).toThrow('database is older');
    expect(() => nextEpoch(0n, 0n)).toThrow('does not fit');
    expect(() => nextEpoch(0n, 1n << 24n)).toThrow('does not fit');
  });
});
