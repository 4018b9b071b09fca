/**
 * The whole metadata service in virtual time, under faults, by seed. HOLDFAST_SIM_SEEDS=n runs n seeds of each class,
 * HOLDFAST_SIM_SEED=s replays one.
 */
import { describe, expect, it } from 'vitest';
import { simulate } from './simulation/run.ts';
import type { SimClass } from './simulation/world.ts';

const one = process.env['HOLDFAST_SIM_SEED'];
const count = Number(process.env['HOLDFAST_SIM_SEEDS'] ?? 3);
const seeds = one === undefined ? Array.from({ length: count }, (_, n) => n + 1) : [Number(one)];

describe.each<SimClass>(['FENCING_CLASS_LOOP', 'FENCING_CLASS_LEASE_ONLY'])('%s', (fencing) => {
  it.each(seeds)(
    'seed %i: one writer, no slab twice, a proof for every grant freed, all usable again',
    async (seed) => {
      const outcome = await simulate(seed, fencing);
      expect(outcome.violations.slice(0, 5)).toEqual([]);
      expect(outcome.writes).toBeGreaterThan(500);
      expect(outcome.granted).toBeGreaterThan(20);
      expect(outcome.deaths).toBeGreaterThan(3);
      expect(outcome.restarts).toBeGreaterThan(1);
      expect(outcome.cuts).toBeGreaterThan(5);
      expect(outcome.readers).toBeGreaterThan(3);
      expect(outcome.reads).toBeGreaterThan(100);
      expect(outcome.slabsWiped).toBeGreaterThan(5);
      expect(outcome.moved + outcome.merged).toBeGreaterThan(5);
    },
    120_000,
  );

  it('the same seed gives the same run', async () => {
    expect(await simulate(99, fencing)).toEqual(await simulate(99, fencing));
  }, 240_000);
});
