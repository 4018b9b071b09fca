/** Time for the safety side, handed in so that it can be simulated. Nothing here reads the wall clock to decide. */
import { readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';

export interface Clock {
  /** Milliseconds since some fixed moment; goes on while the machine sleeps. */
  nowMs(): number;
  /** Resolves after `ms`, or at once when the signal is aborted. Never rejects. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
  /** From 0 up to and without 1. */
  random(): number;
}

export const systemClock: Clock = {
  nowMs: sinceBootMs,
  sleep: async (ms, signal) => {
    try {
      await delay(ms, undefined, signal === undefined ? {} : { signal });
    } catch (error) {
      if (signal?.aborted !== true) throw error;
    }
  },
  random: Math.random,
};

/**
 * CLOCK_BOOTTIME, which performance.now() is not: a machine that slept through the end of its leadership must know it when it
 * wakes. To 10 ms. Where there is no /proc the monotonic clock has to do.
 */
function sinceBootMs(): number {
  try {
    return Number(readFileSync('/proc/uptime', 'utf8').split(' ', 1)[0]) * 1000;
  } catch {
    return performance.now();
  }
}

/** Between half and all of a step that doubles with every failure, so that replicas do not come in step. */
export function backoffMs(failures: number, firstMs: number, mostMs: number, random: () => number): number {
  const step = Math.min(firstMs * 2 ** Math.min(failures, 30), mostMs);
  return step / 2 + random() * (step / 2);
}
