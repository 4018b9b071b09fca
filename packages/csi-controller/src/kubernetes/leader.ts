/**
 * One of the replicas acts: the one that holds a Lease (coordination.k8s.io). Safe whatever the clocks say, because nobody
 * compares a time in the Lease with a clock:
 *  - who wants to take over waits until it has itself watched the Lease unchanged for the holder's whole duration (and 5 % for
 *    clocks that run at different speeds);
 *  - the holder counts its leadership from *before* it asked for the renewal that succeeded, and only for the renew deadline, which is
 *    shorter than the duration by more than the longest time that a request of its may take. So it has stopped, and what it
 *    had sent has ended, before another may begin.
 * A process that is frozen in between is the case that no clock can exclude; every write that follows therefore names the
 * version or uid of what it was decided on (cluster.ts), and what it does is right whoever does it.
 */
import type { Logger } from '@holdfast/common';
import { backoffMs, type Clock } from './clock.ts';

export interface LeaseRecord {
  /** Empty: nobody. */
  readonly holder: string;
  readonly durationMs: number;
  readonly transitions: number;
}

/** The Lease as it is stored. */
export interface StoredLease extends LeaseRecord {
  readonly version: string;
}

/** Reads and writes it. Both throw when the API server does not answer within the time, and `write` when the version is not the newest. */
export interface LeaseStore {
  read(timeoutMs: number): Promise<StoredLease | undefined>;
  /** Undefined version: creates it. */
  write(record: LeaseRecord, version: string | undefined, timeoutMs: number): Promise<StoredLease>;
}

export interface LeaderSettings {
  readonly durationMs: number;
  /** Acts only for so long after the last renewal was asked for. */
  readonly renewDeadlineMs: number;
  readonly retryMs: number;
  /** Of every request that is made as leader: deadline + request < duration. */
  readonly requestMs: number;
}

export const leaderDefaults: LeaderSettings = {
  durationMs: 15_000,
  renewDeadlineMs: 9000,
  retryMs: 2000,
  requestMs: 4000,
};

/** What one replica remembers between two looks. */
export interface ElectionMemory {
  readonly version: string;
  /** When it first saw that version. */
  readonly sinceMs: number;
}

export type ElectionStep =
  | { readonly type: 'write'; readonly record: LeaseRecord; readonly version: string | undefined }
  | { readonly type: 'wait' };

/** Pure: what a replica does about the Lease that it has just read, and what it remembers. */
export function electionStep(
  lease: StoredLease | undefined,
  identity: string,
  memory: ElectionMemory | undefined,
  nowMs: number,
  settings: LeaderSettings,
): { step: ElectionStep; memory: ElectionMemory | undefined } {
  const record = (transitions: number): LeaseRecord => ({
    holder: identity,
    durationMs: settings.durationMs,
    transitions,
  });
  if (lease === undefined) {
    return { step: { type: 'write', record: record(0), version: undefined }, memory: undefined };
  }
  const next = memory?.version === lease.version ? memory : { version: lease.version, sinceMs: nowMs };
  const write = (transitions: number): { step: ElectionStep; memory: ElectionMemory } => ({
    step: { type: 'write', record: record(transitions), version: lease.version },
    memory: next,
  });
  if (lease.holder === identity) return write(lease.transitions);
  const overMs = Math.max(lease.durationMs, settings.durationMs) * 1.05;
  if (lease.holder === '' || nowMs - next.sinceMs >= overMs) return write(lease.transitions + 1);
  return { step: { type: 'wait' }, memory: next };
}

export class Leader {
  readonly #store: LeaseStore;
  readonly #identity: string;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #settings: LeaderSettings;
  #memory: ElectionMemory | undefined;
  #mine: StoredLease | undefined;
  #untilMs = Number.NEGATIVE_INFINITY;
  #leading = false;
  #failures = 0;

  /** @param identity of this process alone: a restarted one is another. */
  constructor(
    store: LeaseStore,
    identity: string,
    clock: Clock,
    logger: Logger,
    settings: LeaderSettings = leaderDefaults,
  ) {
    if (settings.renewDeadlineMs + settings.requestMs >= settings.durationMs) {
      throw new RangeError('renewDeadlineMs and requestMs together have to be less than durationMs');
    }
    this.#store = store;
    this.#identity = identity;
    this.#clock = clock;
    this.#logger = logger;
    this.#settings = settings;
  }

  /** How long a request that starts now may take; 0: this replica must not act. */
  mayActMs(): number {
    return this.#clock.nowMs() < this.#untilMs ? this.#settings.requestMs : 0;
  }

  /** Until aborted. Then the Lease is given back, so that another need not wait: whoever calls has stopped acting before. */
  async run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      await this.round();
      const { retryMs } = this.#settings;
      const pauseMs =
        this.#failures === 0
          ? retryMs * (0.8 + 0.2 * this.#clock.random())
          : backoffMs(this.#failures - 1, retryMs / 4, retryMs, this.#clock.random);
      await this.#clock.sleep(pauseMs, signal);
    }
  }

  /** One look, and a write where there is something to write. */
  async round(): Promise<void> {
    const { requestMs, renewDeadlineMs } = this.#settings;
    try {
      const lease = await this.#store.read(requestMs);
      const { step, memory } = electionStep(
        lease,
        this.#identity,
        this.#memory,
        this.#clock.nowMs(),
        this.#settings,
      );
      this.#memory = memory;
      if (step.type === 'write') {
        // From before the request: it may be stored at any moment from now on, and others count from when they see it.
        const askedMs = this.#clock.nowMs();
        this.#mine = await this.#store.write(step.record, step.version, requestMs);
        this.#untilMs = askedMs + renewDeadlineMs;
      }
      this.#failures = 0;
    } catch (error) {
      this.#failures++;
      this.#logger.debug({ err: error }, 'The leader Lease was not renewed this time');
    }
    this.#tell();
  }

  async release(): Promise<void> {
    const mine = this.#mine;
    const led = this.mayActMs() > 0;
    this.#untilMs = Number.NEGATIVE_INFINITY;
    if (!led || mine === undefined) return;
    try {
      await this.#store.write({ ...mine, holder: '' }, mine.version, this.#settings.requestMs);
    } catch (error) {
      this.#logger.debug({ err: error }, 'The leader Lease could not be given back: it runs out');
    }
  }

  #tell(): void {
    const leading = this.mayActMs() > 0;
    if (leading === this.#leading) return;
    this.#leading = leading;
    this.#logger.info(
      { identity: this.#identity },
      leading ? 'This replica looks after nodes now' : 'Another replica looks after nodes',
    );
  }
}
