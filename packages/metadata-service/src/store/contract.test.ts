/** What every store keeps, run against each of them. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { MemoryStore } from './memory.ts';
import { SqliteStore } from './sqlite.ts';
import { decode, encode, prefixEnd, StoreError, type Store, type Value } from './store.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-store-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

describe.each([
  { kind: 'memory', open: (): Store => new MemoryStore() },
  { kind: 'sqlite', open: (): Store => new SqliteStore(join(directory, `${randomUUID()}.db`)) },
])('the $kind store', ({ kind, open }) => {
  let store: Store;
  beforeEach(() => {
    store = open();
  });
  afterEach(() => store.close());

  const put = (key: string, value: Value): Promise<void> => store.transact((tx) => tx.put(key, value));
  const get = (key: string): unknown => store.read((tx) => tx.get(key));
  const keys = (prefix: string, options = {}): string[] =>
    store.read((tx) => tx.scan(prefix, options).map(([key]) => key));

  it('says what it is', () => {
    expect(store.kind).toBe(kind);
  });

  it('keeps every kind of value, bigint beyond 2^63 and texts that look like one included', async () => {
    const value = {
      text: '#12',
      plain: 'ä 🗝 \u0000',
      small: 1.5,
      big: (1n << 64n) - 1n,
      negative: -5n,
      list: [1n, '##', null, true],
      nested: { empty: {} },
    };
    await put('a', value);
    expect(get('a')).toEqual(value);
  });

  it('drops undefined properties and refuses values that JSON cannot keep', async () => {
    await put('a', { there: 1, not: undefined });
    expect(get('a')).toEqual({ there: 1 });
    await expect(put('b', Number.NaN)).rejects.toThrow('cannot keep');
    await expect(put('b', undefined as unknown as Value)).rejects.toThrow('undefined');
    await expect(put('b', [(() => 1) as unknown as Value])).rejects.toThrow('function');
    expect(get('b')).toBeUndefined();
  });

  it('refuses keys that are empty, too long, or not printable ASCII', async () => {
    for (const key of ['', 'a b', 'ä', 'x'.repeat(1025)]) {
      await expect(put(key, 1)).rejects.toThrow('store key');
    }
  });

  it('copies values on the way in and out', async () => {
    const list = [1];
    await put('a', list);
    list.push(2);
    (get('a') as number[]).push(3);
    expect(get('a')).toEqual([1]);
  });

  it('overwrites, deletes, and deletes what is not there without complaint', async () => {
    await put('a', 1);
    await put('a', 2);
    expect(get('a')).toBe(2);
    await store.transact((tx) => {
      tx.delete('a');
      tx.delete('never');
    });
    expect(get('a')).toBeUndefined();
    expect(keys('a')).toEqual([]);
  });

  it('scans a prefix in order, after a key, backwards, and no further than a limit', async () => {
    await store.transact((tx) => {
      for (const key of ['b/2', 'a/9', 'b/10', 'b', 'c/1', 'b/1', 'b0']) tx.put(key, key);
    });
    expect(keys('b/')).toEqual(['b/1', 'b/10', 'b/2']);
    expect(keys('b/', { limit: 2 })).toEqual(['b/1', 'b/10']);
    expect(keys('b/', { limit: 0 })).toEqual([]);
    expect(keys('b/', { after: 'b/1' })).toEqual(['b/10', 'b/2']);
    expect(keys('b/', { after: 'b/11' })).toEqual(['b/2']);
    expect(keys('b/', { after: 'a' })).toEqual(['b/1', 'b/10', 'b/2']);
    expect(keys('b/', { after: 'z' })).toEqual([]);
    expect(keys('b/', { reverse: true })).toEqual(['b/2', 'b/10', 'b/1']);
    expect(keys('b/', { reverse: true, after: 'b/2', limit: 1 })).toEqual(['b/10']);
    expect(keys('nothing/')).toEqual([]);
    expect(store.read((tx) => tx.scan('c/'))).toEqual([['c/1', 'c/1']]);
  });

  it('shows a transaction its own changes', async () => {
    await put('k/1', 1);
    const seen = await store.transact((tx) => {
      tx.put('k/2', 2);
      tx.delete('k/1');
      return [tx.get('k/1'), tx.get('k/2'), tx.scan('k/')];
    });
    expect(seen).toEqual([undefined, 2, [['k/2', 2]]]);
  });

  it('changes nothing when the body throws, and says what it threw', async () => {
    await put('a', 1);
    const failure = store.transact((tx) => {
      tx.put('a', 2);
      tx.put('a', 3);
      tx.put('b', 1);
      tx.delete('a');
      throw new Error('changed my mind');
    });
    await expect(failure).rejects.toThrow('changed my mind');
    expect([get('a'), get('b'), keys('b')]).toEqual([1, undefined, []]);
  });

  it('lets those that succeed commit when one of several at once throws', async () => {
    const results = await Promise.allSettled(
      Array.from({ length: 20 }, (_, n) =>
        store.transact((tx) => {
          tx.put(`n/${n}`, n);
          if (n % 3 === 0) throw new Error('no');
          return n;
        }),
      ),
    );
    const stored = store.read((tx) => tx.scan('n/')).map(([, value]) => value as number);
    const succeeded = results.filter((r) => r.status === 'fulfilled').map((r) => r.value);
    expect(stored.sort((a, b) => a - b)).toEqual(succeeded);
    expect(succeeded).toHaveLength(13);
  });

  it('runs transactions one after another: no increment is lost', async () => {
    await Promise.all(
      Array.from({ length: 200 }, () =>
        store.transact((tx) => tx.put('count', ((tx.get('count') as number | undefined) ?? 0) + 1)),
      ),
    );
    expect(get('count')).toBe(200);
  });

  it('has committed when transact() resolves, and not shown anything before', async () => {
    const pending = put('a', 1);
    const before = kind === 'sqlite' ? get('a') : undefined;
    await pending;
    expect([before, get('a')]).toEqual([undefined, 1]);
  });

  it('refuses a body that waits, and takes its changes back', async () => {
    const waiting = store.transact(async (tx) => {
      tx.put('a', 1);
      await Promise.resolve();
    });
    await expect(waiting).rejects.toThrow('synchronous');
    expect(get('a')).toBeUndefined();
    expect(() => store.read(async () => 1)).toThrow('synchronous');
  });

  it('refuses to be used inside a transaction except through what the body was handed', async () => {
    await expect(store.transact(() => store.read((tx) => tx.get('a')))).rejects.toThrow('handed');
    await put('a', 1);
    expect(get('a')).toBe(1);
  });

  it('refuses everything after close, and close may be repeated', async () => {
    await put('a', 1);
    await store.close();
    await store.close();
    await expect(put('a', 2)).rejects.toBeInstanceOf(StoreError);
    expect(() => get('a')).toThrow(StoreError);
  });

  it('finishes what was begun before close', async () => {
    const pending = put('a', 1);
    await store.close();
    await expect(pending).resolves.toBeUndefined();
  });
});

describe('store values and keys', () => {
  it('decode what they encode', () => {
    const odd = JSON.parse('{ "__proto__": "#1", "toString": ["#"], "#": "##" }') as Value;
    for (const value of ['#', '##1', '#1', 7n, [{ a: -1n }], [[1n], 'a', [null, [2n]]], odd] as Value[])
      expect(decode(encode(value))).toEqual(value);
  });

  it('end a prefix with the next character', () => {
    expect(prefixEnd('a/')).toBe('a0');
  });
});
