import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { PendingReturns, type PendingReturn } from './pending-returns.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'holdfast-returns-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

const entry: PendingReturn = {
  volumeUuid: 'v',
  poolUuid: 'p',
  hostId: 3,
  generation: '2',
  epoch: '1099511627777',
  slot: 4,
  state: 'closed',
  claimed: [{ volume_id: '1', layer_id: '2', slab: '3', generation: '4' }],
};

describe('PendingReturns', () => {
  it('keeps what waits across a restart, and forgets what was sent', () => {
    const path = join(directory, 'pending.json');
    const first = new PendingReturns(path);
    first.put({ ...entry, state: 'closing' });
    first.put(entry);
    const second = new PendingReturns(path);
    expect(second.list()).toEqual([entry]);
    expect(second.has('v')).toBe(true);
    second.remove(entry);
    expect(new PendingReturns(path).list()).toEqual([]);
  });

  it('tells two epochs of one volume apart', () => {
    const returns = new PendingReturns(join(directory, 'pending.json'));
    returns.put(entry);
    returns.put({ ...entry, epoch: '1099511627778' });
    returns.remove(entry);
    expect(returns.list().map((e) => e.epoch)).toEqual(['1099511627778']);
  });
});
