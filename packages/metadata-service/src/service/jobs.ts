/**
 * Orders that change pages on the disk and that two agents must not carry out at once (strips, wipes): each is given to one host
 * life and repeated to that one until it has answered. Only its death lets another do it: a wipe that goes on somewhere unseen would
 * meet the next owner's data.
 */
import type { OrderResult__Output } from '@holdfast/proto';
import type { Decision } from '../model/decision.ts';
import { fenceHost, lifeOf } from '../model/hosts.ts';
import { assignJob, isOver, jobEnded } from '../model/reclaim.ts';
import { tables, type HostLife, type PoolRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import { anyLiveHost, isLive, requireOurs } from './helpers.ts';
import { OrderFailed, type OrderBody, type Sessions } from './sessions.ts';

/** A node that is away for this long, has a job and holds no volume is fenced, so that another can do the job. */
const awayMs = 60_000;
/**
 * Answers of an engine that has ended its run of a job: another life may have it then. Every other error may come from an agent that
 * does not know what an engine before it, or another run, still has in flight.
 */
const ended = new Set([
  'HF_IO',
  'HF_LEASE_EXPIRED',
  'HF_CORRUPT',
  'HF_NO_SPACE',
  'HF_INVALID_ARGUMENT',
  'HF_NOT_FOUND',
  'HF_UNSUPPORTED',
  'HF_TOO_SMALL',
  'UNIMPLEMENTED',
]);

/** Orders at a time on a pool: each keeps an agent's disk busy. Those that cannot be given now do not count. */
const maxOrders = 8;
const orders = new WeakMap<Core, Map<string, number>>();

export interface Job {
  pool: PoolRecord;
  /** One of a kind on the pool. */
  what: string;
  /** Who has to do it, as part of a grant of its own; undefined: any live host. */
  life?: HostLife;
  timeoutMs: number;
  order: (generation: string) => OrderBody;
  /** Part of the transaction that ends the job. */
  done: (d: Decision, result: OrderResult__Output, by: HostLife) => void;
  /** The agent said that it did not do it; nothing of it is in flight. */
  failed?: (d: Decision, by: HostLife) => void;
}

/** @throws OrderFailed: it is to be tried again */
export async function runJob(core: Core, sessions: Sessions, job: Job): Promise<void> {
  const { pool, what } = job;
  requireOurs(core, pool);
  const life = await assigned(core, sessions, job);
  if (!isLive(core, sessions, pool.uuid, life)) {
    if (job.life === undefined) await fenceIfAway(core, sessions, pool, life, what);
    throw new OrderFailed('UNREACHABLE', `${life.nodeId} has to answer about ${what} first, and is away.`);
  }
  try {
    const body = job.order(life.generation.toString());
    const result = await inTurn(core, pool.uuid, () =>
      sessions.order(life.nodeId, pool.uuid, body, job.timeoutMs),
    );
    await core.decide((d) => {
      jobEnded(d, pool.uuid, what);
      job.done(d, result, life);
    });
  } catch (error) {
    if (!(error instanceof OrderFailed)) throw error;
    if (ended.has(error.code)) {
      await core.decide((d) => {
        jobEnded(d, pool.uuid, what);
        job.failed?.(d, life);
      });
    }
    throw error;
  }
}

async function inTurn<T>(core: Core, poolUuid: string, body: () => Promise<T>): Promise<T> {
  const counts = orders.get(core) ?? new Map<string, number>();
  orders.set(core, counts);
  const running = (): number => counts.get(poolUuid) ?? 0;
  while (running() >= maxOrders && !core.stopped.signal.aborted) await core.nextChange(1000);
  counts.set(poolUuid, running() + 1);
  try {
    return await body();
  } finally {
    counts.set(poolUuid, running() - 1);
  }
}

async function assigned(core: Core, sessions: Sessions, { pool, what, life }: Job): Promise<HostLife> {
  const known = core.read((tx) => {
    const job = tables.job.get(tx, pool.uuid, what);
    return job !== undefined && !isOver(tx, pool.uuid, job.life) ? job.life : undefined;
  });
  if (known !== undefined) return known;
  const candidate = life ?? lifeOf(anyLiveHost(core, sessions, pool));
  return await core.decide((d) => assignJob(d, pool, what, candidate));
}

async function fenceIfAway(
  core: Core,
  sessions: Sessions,
  pool: PoolRecord,
  life: HostLife,
  what: string,
): Promise<void> {
  if (sessions.isConnected(life.nodeId)) return;
  const away = core.read((tx) => {
    const node = tables.node.get(tx, life.nodeId);
    const job = tables.job.get(tx, pool.uuid, what);
    const holds = tables.held.entries(tx, [pool.uuid, life.hostId], { limit: 1 }).length > 0;
    const since = Math.max(node?.lastSeenUnixMs ?? 0, job?.sinceUnixMs ?? 0);
    return !holds && core.clock.unixMs() - since > awayMs;
  });
  if (!away) return;
  await core.decide((d) => {
    const host = tables.host.get(d.tx, pool.uuid, life.hostId);
    if (host?.generation !== life.generation || host.nodeId !== life.nodeId) return;
    fenceHost(d, pool, host, `its agent is away and has not answered about ${what}`);
  });
}
