/**
 * Where the metadata service keeps what it decided: an ordered map from ASCII keys to JSON-like values, changed by
 * serializable transactions.
 *
 * Why no tables: the same few operations exist on SQLite and on etcd (range reads, and a transaction guarded by the
 * leader's key), so both can pass one contract test (contract.test.ts). Records, not rows, are the unit; what is large (slab
 * maps) is split over keys so that no record grows with the size of a pool.
 *
 * Rules that every implementation keeps:
 *  - The body of a transaction is synchronous and runs alone: it sees everything committed before it and its own
 *    changes, and nobody sees a part of them. It may run only once. When it throws, nothing was changed and transact()
 *    rejects with what it threw.
 *  - transact() resolves after the commit is durable (SQLite: fsynced), never earlier. When the commit itself fails it
 *    rejects with StoreError and nothing was changed.
 *  - read() sees committed data only.
 *  - Values are copied on the way in and out: changing one afterwards changes nothing stored.
 */

/** What a key may stand for. `undefined` properties are dropped. Bytes go in as base64 text. */
export type Value =
  | string
  | number
  | boolean
  | bigint
  | null
  | readonly Value[]
  | { readonly [key: string]: Value | undefined };

export interface ScanOptions {
  /** Only keys strictly after (with `reverse`: before) this one. */
  after?: string;
  limit?: number;
  reverse?: boolean;
}

export interface Snapshot {
  get(key: string): unknown;
  /** Keys that begin with `prefix`, in ascending order of their characters, with their values. */
  scan(prefix: string, options?: ScanOptions): [key: string, value: unknown][];
}

export interface Transaction extends Snapshot {
  put(key: string, value: Value): void;
  delete(key: string): void;
}

export interface Store {
  readonly kind: 'memory' | 'sqlite';
  read<T>(body: (snapshot: Snapshot) => T): T;
  transact<T>(body: (transaction: Transaction) => T): Promise<T>;
  /** A consistent copy, made while the store is in use, and marked as one by `mark`. Undefined where there is no file. */
  backup?(path: string, mark: (transaction: Transaction) => void): Promise<void>;
  /** Waits for transactions under way. Later calls are refused. */
  close(): Promise<void>;
}

/** The store itself failed (not the body of a transaction). The message says what to do. */
export class StoreError extends Error {
  override name = 'StoreError';
}

/** Longest key, in characters: etcd has no limit of its own, but one keeps mistakes small. */
export const maxKeyLength = 1024;

export function assertKey(key: string): void {
  if (key.length === 0 || key.length > maxKeyLength || !/^[\x21-\x7e]+$/.test(key)) {
    throw new TypeError(`A store key must be 1 to ${maxKeyLength} printable ASCII characters: ${key}`);
  }
}

/** The first key after every key that begins with `prefix`. Keys are ASCII, so the last character can always grow. */
export function prefixEnd(prefix: string): string {
  return prefix.slice(0, -1) + String.fromCharCode(prefix.charCodeAt(prefix.length - 1) + 1);
}

/**
 * JSON with bigint: `12n` is stored as "#12", and a text that begins with # gets one more. Numbers must be safe
 * integers or fractions that JSON keeps; NaN and infinities are refused.
 */
export function encode(value: Value): string {
  const text = JSON.stringify(value, (_key, item: unknown) => {
    if (typeof item === 'bigint') return `#${item}`;
    if (typeof item === 'string' && item.startsWith('#')) return `#${item}`;
    if (typeof item === 'number' && !Number.isFinite(item)) {
      throw new TypeError(`A store value has a number that JSON cannot keep: ${item}`);
    }
    if (typeof item === 'function' || typeof item === 'symbol') {
      throw new TypeError(`A store value has a ${typeof item} in it`);
    }
    return item;
  });
  if (text === undefined) throw new TypeError('A store value must not be undefined');
  return text;
}

export function decode(text: string): unknown {
  const value: unknown = JSON.parse(text);
  return text.includes('"#') ? revive(value) : value;
}

/** In place, for what JSON.parse() has just made: its own reviver takes three times as long. */
function revive(value: unknown): unknown {
  if (typeof value === 'string') {
    if (!value.startsWith('#')) return value;
    return value.startsWith('##') ? value.slice(1) : BigInt(value.slice(1));
  }
  if (typeof value !== 'object' || value === null) return value;
  const items = value as Record<string, unknown>;
  for (const key of Object.keys(items)) {
    const item = items[key];
    const revived = revive(item);
    if (revived !== item) items[key] = revived;
  }
  return value;
}

/** The body of a transaction must not wait: what it awaited would run outside of it. */
export function assertSynchronous(result: unknown): void {
  if (result instanceof Promise) {
    result.catch(() => undefined);
    throw new TypeError('The body of a store transaction must be synchronous, but it returned a promise');
  }
}
