import { describe, expect, it } from 'vitest';
import { LeaseWatch } from './lease-watch.ts';

const pool = { leaseMs: 10_000, drainMs: 500 };
const at = (ms: number, sequence: bigint, generation = 4n) => ({
  generation,
  sequence,
  askedMs: ms,
  answeredMs: ms + 10,
});

describe('the timed proof', () => {
  it('needs the lease, 5 % more, and the drain', () => {
    expect(new LeaseWatch(pool, 4n).needMs).toBe(11_000);
    expect(new LeaseWatch({ leaseMs: 401, drainMs: 0 }, 4n).needMs).toBe(422);
  });

  it('counts from the answer that first showed the heartbeat to the question that still does', () => {
    const watch = new LeaseWatch(pool, 4n);
    expect(watch.observe(at(0, 9n))).toEqual({ type: 'wait', remainingMs: 11_000 });
    expect(watch.observe(at(5000, 9n))).toEqual({ type: 'wait', remainingMs: 6010 });
    expect(watch.observe(at(11_009, 9n))).toEqual({ type: 'wait', remainingMs: 1 });
    expect(watch.observe(at(11_010, 9n))).toEqual({ type: 'expired', waitedMs: 11_000, sequence: 9n });
  });

  it('starts from zero at the one heartbeat that may have been on its way', () => {
    const watch = new LeaseWatch(pool, 4n);
    watch.observe(at(0, 9n));
    expect(watch.observe(at(10_000, 10n))).toEqual({ type: 'wait', remainingMs: 11_000 });
    expect(watch.observe(at(20_000, 10n))).toMatchObject({ type: 'wait' });
    expect(watch.observe(at(21_010, 10n))).toMatchObject({ type: 'expired' });
  });

  it.each([
    ['two heartbeats, seen one by one', [9n, 10n, 11n]],
    ['two heartbeats, seen at once', [9n, 11n]],
    ['a sequence that goes back', [9n, 8n]],
  ])('knows a heartbeat begun after the page: %s', (_what, sequences) => {
    const watch = new LeaseWatch(pool, 4n);
    const verdicts = sequences.map((sequence, index) => watch.observe(at(index * 100, sequence)));
    expect(verdicts.map((verdict) => verdict.type).slice(0, -1)).not.toContain('renewed-after-page');
    expect(verdicts.at(-1)).toEqual({ type: 'renewed-after-page' });
  });

  it('takes a heartbeat of a later life for one after the page, and an empty slot for silence', () => {
    expect(new LeaseWatch(pool, 4n).observe(at(0, 1n, 5n))).toEqual({ type: 'renewed-after-page' });
    const silent = new LeaseWatch(pool, 4n);
    silent.observe(at(0, 0n, 0n));
    expect(silent.observe(at(11_010, 0n, 0n))).toMatchObject({ type: 'expired' });
  });
});
