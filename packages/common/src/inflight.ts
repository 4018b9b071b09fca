/** One call at a time for one object: a second one is refused with ABORTED at once, as the CSI spec asks. */
import { HoldfastError } from './errors.ts';

export class InFlight {
  readonly #keys = new Set<string>();

  /** Runs `body` while holding all `keys`, or throws OPERATION_PENDING without running it. */
  async run<T>(keys: readonly string[], body: () => Promise<T>): Promise<T> {
    const held = [...new Set(keys)];
    const busy = held.find((key) => this.#keys.has(key));
    if (busy !== undefined) {
      throw new HoldfastError(
        'OPERATION_PENDING',
        `Another call for ${busy} is under way. Repeat this one when it has ended.`,
      );
    }
    for (const key of held) this.#keys.add(key);
    try {
      return await body();
    } finally {
      for (const key of held) this.#keys.delete(key);
    }
  }
}
