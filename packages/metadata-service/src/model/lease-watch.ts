/**
 * The timed proof of the lease-only class: the victim's heartbeat has not changed since its fence page was durable, for the
 * lease plus 5 % plus the time for which the device may hold back I/O. Times are monotonic milliseconds, handed in.
 *
 * One heartbeat may still land after the page: its engine read the fence page before it was written. It starts the wait from
 * zero. A second one was begun after the page was durable, because an engine reads its fence page before every heartbeat:
 * that page, or the disk that it was written to, is not the one that the victim reads.
 */
export interface HeartbeatObservation {
  generation: bigint;
  sequence: bigint;
  /** When the reading was asked for, and when its answer was there. */
  askedMs: number;
  answeredMs: number;
}

export type LeaseVerdict =
  | { type: 'wait'; remainingMs: number }
  /** Unchanged for long enough; the fence page must still be read back intact. */
  | { type: 'expired'; waitedMs: number; sequence: bigint }
  | { type: 'renewed-after-page' };

export class LeaseWatch {
  readonly needMs: number;
  readonly #generation: bigint;
  #sequence: bigint | undefined;
  #unchangedSinceMs = 0;
  #late = 0;

  constructor(pool: { leaseMs: number; drainMs: number }, generation: bigint) {
    this.needMs = Math.ceil(pool.leaseMs * 1.05) + pool.drainMs;
    this.#generation = generation;
  }

  observe(reading: HeartbeatObservation): LeaseVerdict {
    // Another generation on the slot would be a heartbeat of a life that nobody granted.
    if (reading.generation > this.#generation) return { type: 'renewed-after-page' };
    if (this.#sequence === undefined || reading.sequence !== this.#sequence) {
      if (this.#sequence !== undefined) this.#late += Number(reading.sequence - this.#sequence);
      if (this.#late < 0 || this.#late > 1) return { type: 'renewed-after-page' };
      this.#sequence = reading.sequence;
      this.#unchangedSinceMs = reading.answeredMs;
      return { type: 'wait', remainingMs: this.needMs };
    }
    // From the answer that first showed this heartbeat to the question that still showed it.
    const waitedMs = reading.askedMs - this.#unchangedSinceMs;
    return waitedMs >= this.needMs
      ? { type: 'expired', waitedMs, sequence: reading.sequence }
      : { type: 'wait', remainingMs: this.needMs - waitedMs };
  }
}
