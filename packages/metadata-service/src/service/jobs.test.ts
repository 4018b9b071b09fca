/** Who does a job on the disk: one life, until it has answered or is dead. */
import { createLogger } from '@holdfast/common';
import { beforeEach, describe, expect, it } from 'vitest';
import { VirtualClock } from '../../test/simulation/clock.ts';
import { tables, type HostRecord, type PoolRecord } from '../model/records.ts';
import { MemoryStore } from '../store/memory.ts';
import { Core } from './core.ts';
import { runJob, type Job } from './jobs.ts';
import { OrderFailed, Sessions, type OrderBody } from './sessions.ts';

let core: Core;
let sessions: Sessions;
let clock: VirtualClock;
let pool: PoolRecord;
/** Error codes of the next orders; empty: success. */
let answers: string[];
const asked: string[] = [];

beforeEach(async () => {
  clock = new VirtualClock();
  answers = [];
  asked.length = 0;
  const logger = createLogger('test');
  logger.level = 'silent';
  core = await Core.open(new MemoryStore(), { clock, logger, newId: () => 'id' });
  sessions = new Sessions(core);
  sessions.order = async (nodeId: string, _pool: string, _body: OrderBody) => {
    asked.push(nodeId);
    const code = answers.shift() ?? '';
    if (code !== '') throw new OrderFailed(code, 'no.');
    return {} as never;
  };
  pool = {
    uuid: 'p',
    name: 'pool',
    wwid: '',
    fencing: 'loop',
    slabSize: 1,
    slabCount: 1,
    volumeSlots: 1,
    layerSlots: 1,
    hostSlots: 8,
    renewIntervalMs: 1,
    leaseMs: 2,
    drainMs: 0,
    state: 'ACTIVE',
    claimed: { incarnation: 1n, term: 1n },
    claiming: [],
    nextVolumeId: 1n,
    nextLayerId: 1n,
    nextSlabGeneration: 1n,
    slabsFree: 1,
    slabsAhead: 0,
    provisionedBytes: 0n,
  };
  await core.decide((d) => tables.pool.put(d.tx, pool, 'p'));
  for (const hostId of [1, 2]) await put(hostId, {});
});

const host = (hostId: number): HostRecord | undefined => core.read((tx) => tables.host.get(tx, 'p', hostId));

async function put(hostId: number, change: Partial<HostRecord>): Promise<void> {
  const record: HostRecord = {
    poolUuid: 'p',
    nodeId: `n${hostId}`,
    hostId,
    generation: 1n,
    state: 'LIVE',
    machineId: 'm',
    bootId: 'b',
    lockPath: '',
    sinceUnixMs: 0,
    fence: null,
    proof: '',
    ...change,
  };
  await core.decide((d) => tables.host.put(d.tx, record, 'p', hostId));
}

const link = { send: () => undefined, end: () => undefined };
const done: string[] = [];
const job = (): Job => ({
  pool,
  what: 'job',
  timeoutMs: 1000,
  order: (generation) => ({ wipe_layers: { layers: [], tombstone: false, generation } }),
  done: (_d, _result, by) => void done.push(by.nodeId),
});

describe('a job', () => {
  it.each(['TIMEOUT', 'UNREACHABLE', 'UNAVAILABLE', 'STALE', 'HF_BUSY'])(
    'whose agent answers %s is asked of the same life again, and of nobody else',
    async (code) => {
      sessions.attach('n1', link);
      answers = [code];
      await expect(runJob(core, sessions, job())).rejects.toThrow(OrderFailed);
      sessions.attach('n2', link);
      answers = [code];
      await expect(runJob(core, sessions, job())).rejects.toThrow(OrderFailed);
      expect(asked).toEqual(['n1', 'n1']);
      // Its death frees the job.
      await put(1, { state: 'DEAD' });
      await runJob(core, sessions, job());
      expect(asked.at(-1)).toBe('n2');
      expect(core.read((tx) => tables.job.list(tx))).toEqual([]);
    },
  );

  it('that an engine has ended with an error may go to another', async () => {
    sessions.attach('n1', link);
    answers = ['HF_IO'];
    await expect(runJob(core, sessions, job())).rejects.toThrow(OrderFailed);
    expect(core.read((tx) => tables.job.list(tx))).toEqual([]);
  });

  it.each([
    ['holds a volume', true, 'LIVE'],
    ['holds none', false, 'FENCING'],
  ])('of a node that stays away and %s waits or has it fenced', async (_what, holds, state) => {
    const session = sessions.attach('n1', link);
    answers = ['TIMEOUT'];
    await expect(runJob(core, sessions, job())).rejects.toThrow(OrderFailed);
    sessions.detach(session);
    if (holds) await core.decide((d) => tables.held.put(d.tx, true, 'p', 1, 'v'));
    sessions.attach('n2', link);
    await expect(runJob(core, sessions, job())).rejects.toThrow('has to answer about job first');
    expect(host(1)?.state).toBe('LIVE');
    await clock.run(61_000, () => undefined);
    await expect(runJob(core, sessions, job())).rejects.toThrow(OrderFailed);
    expect([host(1)?.state, asked]).toEqual([state, ['n1']]);
  });
});
