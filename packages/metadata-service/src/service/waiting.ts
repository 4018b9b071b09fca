/** Calls that answer when something durable has ended: they look at the store, wait for it to change, and look again. */
import { HoldfastError, type CallContext } from '@holdfast/common';
import { MustWait } from '../model/grants.ts';
import { tables, type HostRecord, type PoolRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import type { Operations } from './operations.ts';

/** Longest wait of a call that has no deadline of its own. */
const maxWaitMs = 120_000;
/** The client gets a sentence instead of its own timeout when we answer a tenth of the time earlier: at least, and at most, this. */
const answerEarlierMs = { least: 150, most: 2000 };

/**
 * @param done looks at the store; undefined: not yet. May throw what cannot get better.
 * @param why what it waits for, when the time is over.
 * @throws HoldfastError DEADLINE_EXCEEDED: still under way, and a repeat joins it.
 */
export async function waitUntil<T>(
  core: Core,
  context: CallContext,
  done: () => T | undefined,
  why: () => string,
): Promise<T> {
  const timeLeftMs = context.timeLeftMs() ?? Infinity;
  const earlierMs = Math.min(Math.max(timeLeftMs / 10, answerEarlierMs.least), answerEarlierMs.most);
  const budget = Math.min(maxWaitMs, Math.max(0, timeLeftMs - earlierMs));
  const until = core.clock.monotonicMs() + budget;
  for (;;) {
    const result = done();
    if (result !== undefined) return result;
    const left = until - core.clock.monotonicMs();
    if (left <= 0 || context.signal.aborted) {
      throw new HoldfastError(
        'DEADLINE_EXCEEDED',
        `Still under way: ${why()}. It goes on; repeat the call to join it.`,
      );
    }
    if (core.stopped.signal.aborted) {
      throw new HoldfastError(
        'UNAVAILABLE',
        'The metadata service stops. The operation goes on when it is back: repeat the call.',
      );
    }
    await core.nextChange(Math.min(left, 1000), context.signal);
  }
}

/** Repeats what has to wait for something that ends by itself, when that has ended. */
export async function afterWaiting<T>(
  core: Core,
  context: CallContext,
  attempt: () => Promise<T>,
): Promise<T> {
  for (;;) {
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof MustWait)) throw error;
      await waitUntil(
        core,
        context,
        () => (core.read(error.isOver) ? true : undefined),
        () => error.message.replace(/\.$/, ''),
      );
    }
  }
}

/** What a fence waits for, or empty. */
export function fenceProgress(operations: Operations, host: HostRecord | undefined): string {
  if (host?.state !== 'FENCING' && host?.state !== 'CUTTING') return '';
  const waitingFor = operations.waitingFor(host.poolUuid, host.hostId);
  return `${host.nodeId} is being fenced (${host.state})${waitingFor === '' ? '' : `, waiting for ${waitingFor}`}`;
}

/** The fence page is durable, and nothing but a person's word is left that could complete the fence. */
export function isUnconfirmed(pool: PoolRecord | undefined, host: HostRecord): boolean {
  return pool?.fencing === 'manual' && host.state === 'CUTTING' && host.fence?.confirmedBy === '';
}

/**
 * A class that waits for a person says so, once its own chances are used up: the victim had time to find its page and stop.
 * @throws HoldfastError FENCE_NEEDS_CONFIRMATION
 */
export function refuseUnconfirmed(core: Core, host: HostRecord | undefined): void {
  const pool = host && core.read((tx) => tables.pool.get(tx, host.poolUuid));
  if (host === undefined || pool === undefined || !isUnconfirmed(pool, host)) return;
  if (core.clock.unixMs() - host.sinceUnixMs < 2 * pool.renewIntervalMs) return;
  throw new HoldfastError(
    'FENCE_NEEDS_CONFIRMATION',
    `Node ${host.nodeId} does not answer, and pool ${pool.name} has no way to cut it off by itself. Make sure that the ` +
      `machine is off, then run: holdfast node confirm-off ${host.nodeId}`,
  );
}
