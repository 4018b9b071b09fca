import { createLogger } from '@holdfast/common';
import { describe, expect, it } from 'vitest';
import type { Clock } from './clock.ts';
import {
  electionStep,
  Leader,
  leaderDefaults,
  type LeaseRecord,
  type LeaseStore,
  type StoredLease,
} from './leader.ts';

const settings = leaderDefaults;
const lease = (change: Partial<StoredLease> = {}): StoredLease => ({
  holder: 'a',
  durationMs: 15_000,
  transitions: 3,
  version: '1',
  ...change,
});

describe('a step of the election', () => {
  const step = (stored: StoredLease | undefined, identity: string, sinceMs: number, nowMs: number) =>
    electionStep(stored, identity, stored && { version: stored.version, sinceMs }, nowMs, settings).step;

  it('creates the Lease where there is none', () => {
    expect(step(undefined, 'b', 0, 0)).toMatchObject({
      type: 'write',
      version: undefined,
      record: { holder: 'b' },
    });
  });
  it('renews what is its own', () => {
    expect(step(lease(), 'a', 0, 0)).toMatchObject({
      type: 'write',
      version: '1',
      record: { transitions: 3 },
    });
  });
  it('takes one that was given back at once', () => {
    expect(step(lease({ holder: '' }), 'b', 0, 0)).toMatchObject({
      type: 'write',
      record: { holder: 'b', transitions: 4 },
    });
  });
  it("waits until it has itself seen another's unchanged for the duration and 5 %", () => {
    expect(step(lease(), 'b', 0, 15_749)).toEqual({ type: 'wait' });
    expect(step(lease(), 'b', 0, 15_750)).toMatchObject({ type: 'write', record: { holder: 'b' } });
  });
  it("waits for another's longer duration", () => {
    expect(step(lease({ durationMs: 60_000 }), 'b', 0, 60_000)).toEqual({ type: 'wait' });
  });
  it('begins to wait anew with every renewal that it sees', () => {
    const before = { version: '1', sinceMs: 0 };
    const { step, memory } = electionStep(lease({ version: '2' }), 'b', before, 99_000, settings);
    expect(step).toEqual({ type: 'wait' });
    expect(memory).toEqual({ version: '2', sinceMs: 99_000 });
  });
});

/** An API server's Lease, with answers that are late, lost, or do not come. */
class FlakyStore {
  lease: StoredLease | undefined;
  #version = 0;

  write(record: LeaseRecord, version: string | undefined): StoredLease {
    if (this.lease?.version !== version) throw new Error('conflict');
    this.lease = { ...record, version: String(++this.#version) };
    return this.lease;
  }
}

class World {
  ms = 0;
  #seed: number;
  constructor(seed: number) {
    this.#seed = seed;
  }
  random = (): number => {
    this.#seed = (Math.imul(this.#seed, 1_664_525) + 1_013_904_223) >>> 0;
    return this.#seed / 2 ** 32;
  };
}

/** One replica. Its clock runs at its own speed from its own beginning; requests of it take time, and fail in every way. */
function replica(world: World, store: FlakyStore, name: string, faults: () => number) {
  const offset = world.random() * 1e9;
  const speed = 0.98 + 0.04 * world.random();
  const clock: Clock = {
    nowMs: () => offset + world.ms * speed,
    sleep: () => Promise.resolve(),
    random: world.random,
  };
  const pass = <T>(act: () => T): Promise<T> => {
    world.ms += world.random() * (world.random() < faults() ? 3900 : 100);
    if (world.random() < faults()) return Promise.reject(new Error('lost request'));
    const result = act();
    world.ms += world.random() * 100;
    return world.random() < faults() ? Promise.reject(new Error('lost answer')) : Promise.resolve(result);
  };
  const port: LeaseStore = {
    read: () => pass(() => store.lease),
    write: (record, version) => pass(() => store.write(record, version)),
  };
  const logger = createLogger('leader-test');
  logger.level = 'silent';
  return { leader: new Leader(port, name, clock, logger, settings), dueMs: 0 };
}

describe('leadership', () => {
  it('refuses times under which two could act at once', () => {
    const logger = createLogger('leader-test');
    const make = (): Leader =>
      new Leader({} as LeaseStore, 'a', {} as Clock, logger, { ...settings, renewDeadlineMs: 11_000 });
    expect(make).toThrow(RangeError);
  });

  it.each(Array.from({ length: 40 }, (_, seed) => seed + 1))(
    'never belongs to two, requests of the earlier one included, whatever their clocks and answers do (seed %i)',
    async (seed) => {
      const world = new World(seed);
      const store = new FlakyStore();
      let faulty = true;
      const faults = (): number => (faulty ? 0.3 : 0);
      const replicas = ['a', 'b', 'c'].map((name) => replica(world, store, name, faults));
      /** Until when each may still have a request under way, in the world's time. */
      const busyUntil = replicas.map(() => Number.NEGATIVE_INFINITY);
      let acted = 0;
      const check = (): void => {
        const acting = replicas.flatMap(({ leader }, index) => (leader.mayActMs() > 0 ? [index] : []));
        for (const index of acting) {
          acted++;
          const others = busyUntil.filter((until, other) => other !== index && until > world.ms);
          expect(others, `replica ${index} acts at ${world.ms}`).toEqual([]);
          busyUntil[index] = world.ms + settings.requestMs;
        }
      };
      for (let round = 0; round < 400; round++) {
        world.ms += world.random() * 600;
        // Now and then one is stopped for a while.
        if (world.random() < 0.02)
          replicas[Math.floor(world.random() * 3)].dueMs = world.ms + 40_000 * world.random();
        for (const one of replicas) {
          check();
          if (one.dueMs > world.ms) continue;
          await one.leader.round();
          one.dueMs = world.ms + 2000;
          check();
        }
      }
      expect(acted).toBeGreaterThan(0);
      faulty = false;
      const until = world.ms + 60_000;
      while (world.ms < until) {
        world.ms += 1000;
        for (const one of replicas) await one.leader.round();
      }
      expect(replicas.filter(({ leader }) => leader.mayActMs() > 0)).toHaveLength(1);
    },
  );

  it('is given back when the process ends, so that another need not wait', async () => {
    const world = new World(1);
    const store = new FlakyStore();
    const [a, b] = ['a', 'b'].map((name) => replica(world, store, name, () => 0));
    await a.leader.round();
    await b.leader.round();
    expect(b.leader.mayActMs()).toBe(0);
    await a.leader.release();
    expect(a.leader.mayActMs()).toBe(0);
    await b.leader.round();
    expect(b.leader.mayActMs()).toBeGreaterThan(0);
  });
});
