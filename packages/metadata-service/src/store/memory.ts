/** The store for tests and throw-away set-ups: same rules as SQLite, nothing on disk. */
import {
  assertKey,
  assertSynchronous,
  decode,
  encode,
  prefixEnd,
  StoreError,
  type ScanOptions,
  type Snapshot,
  type Store,
  type Transaction,
} from './store.ts';

export class MemoryStore implements Store {
  readonly kind = 'memory';
  readonly #values = new Map<string, string>();
  /** All keys in order, for scans. */
  readonly #keys: string[] = [];
  #inTransaction = false;
  #closed = false;

  read<T>(body: (snapshot: Snapshot) => T): T {
    this.#assertIdle();
    const result = body(this.#snapshot());
    assertSynchronous(result);
    return result;
  }

  // Async so that a failure is always a rejection, as it is where the commit takes time.
  async transact<T>(body: (transaction: Transaction) => T): Promise<T> {
    this.#assertIdle();
    const undo: [key: string, before: string | undefined][] = [];
    const transaction: Transaction = {
      ...this.#snapshot(),
      put: (key, value) => {
        assertKey(key);
        const text = encode(value);
        undo.push([key, this.#values.get(key)]);
        this.#set(key, text);
      },
      delete: (key) => {
        undo.push([key, this.#values.get(key)]);
        this.#set(key, undefined);
      },
    };
    this.#inTransaction = true;
    try {
      const result = body(transaction);
      assertSynchronous(result);
      return result;
    } catch (error) {
      for (const [key, before] of undo.toReversed()) this.#set(key, before);
      throw error;
    } finally {
      this.#inTransaction = false;
    }
  }

  async close(): Promise<void> {
    this.#closed = true;
  }

  #assertIdle(): void {
    if (this.#closed) throw new StoreError('The store is closed.');
    if (this.#inTransaction)
      throw new StoreError('A transaction is running: its body must use what it was handed.');
  }

  #snapshot(): Snapshot {
    return {
      get: (key) => {
        const text = this.#values.get(key);
        return text === undefined ? undefined : decode(text);
      },
      scan: (prefix, options) => this.#scan(prefix, options),
    };
  }

  #scan(prefix: string, { after, limit, reverse = false }: ScanOptions = {}): [string, unknown][] {
    let low = this.#lowerBound(prefix);
    let high = this.#lowerBound(prefixEnd(prefix));
    if (after !== undefined && !reverse) low = Math.max(low, this.#lowerBound(`${after}\0`));
    if (after !== undefined && reverse) high = Math.min(high, this.#lowerBound(after));
    const found = this.#keys.slice(low, Math.max(low, high));
    const ordered = reverse ? found.toReversed() : found;
    return ordered.slice(0, limit).map((key) => [key, decode(this.#values.get(key) as string)]);
  }

  #set(key: string, text: string | undefined): void {
    const known = this.#values.has(key);
    if (text === undefined) {
      if (known) this.#keys.splice(this.#lowerBound(key), 1);
      this.#values.delete(key);
      return;
    }
    if (!known) this.#keys.splice(this.#lowerBound(key), 0, key);
    this.#values.set(key, text);
  }

  /** The index of the first key that is not before `key`. */
  #lowerBound(key: string): number {
    let low = 0;
    let high = this.#keys.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((this.#keys[middle] as string) < key) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}
