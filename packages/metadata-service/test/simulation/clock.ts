/** Virtual time: nothing waits for real, and the order of everything follows from the seed. */
import type { Clock } from '../../src/service/clock.ts';

interface Timer {
  atMs: number;
  order: number;
  fire: () => void;
}

export class VirtualClock implements Clock {
  #nowMs = 0;
  #order = 0;
  readonly #timers = new Set<Timer>();

  unixMs(): number {
    return 1_800_000_000_000 + Math.floor(this.#nowMs);
  }

  monotonicMs(): number {
    return this.#nowMs;
  }

  after(ms: number, fire: () => void): () => void {
    const timer = { atMs: this.#nowMs + Math.max(0, ms), order: this.#order++, fire };
    this.#timers.add(timer);
    return () => this.#timers.delete(timer);
  }

  sleep(ms: number, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      if (signal?.aborted) return resolve();
      const aborted = (): void => {
        cancel();
        resolve();
      };
      const cancel = this.after(ms, () => {
        signal?.removeEventListener('abort', aborted);
        resolve();
      });
      signal?.addEventListener('abort', aborted, { once: true });
    });
  }

  /** Fires what is due until `untilMs`; after each, everything that follows from it without waiting has happened. */
  async run(untilMs: number, each: () => void): Promise<void> {
    for (;;) {
      await new Promise((resolve) => setImmediate(resolve));
      each();
      let next: Timer | undefined;
      for (const timer of this.#timers) {
        if (
          next === undefined ||
          timer.atMs < next.atMs ||
          (timer.atMs === next.atMs && timer.order < next.order)
        ) {
          next = timer;
        }
      }
      if (next === undefined || next.atMs > untilMs) break;
      this.#timers.delete(next);
      this.#nowMs = next.atMs;
      next.fire();
    }
    this.#nowMs = Math.max(this.#nowMs, untilMs);
  }
}
