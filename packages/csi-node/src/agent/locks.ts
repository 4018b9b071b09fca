/**
 * One operation at a time for one volume. Calls from the socket are refused with ABORTED while another is under way (the
 * CSI side repeats them); orders of the metadata service wait their turn instead, because nobody repeats an order at once.
 */
import { HoldfastError } from '@holdfast/common';

export class KeyedLock {
  readonly #tails = new Map<string, Promise<unknown>>();

  busy(key: string): boolean {
    return this.#tails.has(key);
  }

  /** Runs now or throws OPERATION_PENDING. */
  tryRun<T>(key: string, body: () => Promise<T>): Promise<T> {
    if (this.#tails.has(key)) {
      return Promise.reject(
        new HoldfastError(
          'OPERATION_PENDING',
          `Another call for ${key} is under way on this node. Repeat this one when it has ended.`,
        ),
      );
    }
    return this.run(key, body);
  }

  /** Runs after everything that was asked for this key before. */
  run<T>(key: string, body: () => Promise<T>): Promise<T> {
    const before = this.#tails.get(key) ?? Promise.resolve();
    const result = before.then(body, body);
    const tail = result
      .catch(() => undefined)
      .finally(() => {
        if (this.#tails.get(key) === tail) this.#tails.delete(key);
      });
    this.#tails.set(key, tail);
    return result;
  }

  /** Resolves when nothing is under way. */
  async idle(): Promise<void> {
    while (this.#tails.size > 0) await Promise.all(this.#tails.values());
  }
}
