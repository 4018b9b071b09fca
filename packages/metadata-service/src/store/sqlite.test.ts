/** What is true of SQLite alone: durability through a kill, and which files it refuses. */
import { execFileSync, spawn } from 'node:child_process';
import {
  copyFileSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { createInterface } from 'node:readline';
import Database from 'better-sqlite3';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { SqliteStore, schemaVersion } from './sqlite.ts';
import type { Transaction } from './store.ts';

const here = dirname(fileURLToPath(import.meta.url));
const packageDirectory = join(here, '..', '..');
const directory = mkdtempSync(join(tmpdir(), 'holdfast-sqlite-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

const path = (name: string): string => join(directory, name);

async function filled(name: string): Promise<string> {
  const store = new SqliteStore(path(name));
  await store.transact((tx) => tx.put('a', 1));
  await store.close();
  return path(name);
}

/** SQLite's, of this process: they have no name any more, and their descriptors say what it was. */
function temporaryFiles(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const file = readlinkSync(`/proc/self/fd/${fd}`);
      return file.includes('etilqs_') ? [file] : [];
    } catch {
      return [];
    }
  });
}

function pragmas(file: string, body: (database: Database.Database) => void): void {
  const database = new Database(file);
  body(database);
  database.close();
}

describe('the SQLite store', () => {
  it('keeps what it has over a restart', async () => {
    const file = await filled('restart.db');
    const store = new SqliteStore(file);
    expect(store.read((tx) => tx.get('a'))).toBe(1);
    await store.close();
  });

  it('puts its log into the file when nothing is asked for, not while much is', async () => {
    const file = path('rest.db');
    const store = new SqliteStore(file);
    const size = (): number => statSync(file).size;
    const before = size();
    for (let i = 0; i < 100; i += 1) await store.transact((tx) => tx.put(`key-${i}`, 'x'.repeat(10_000)));
    expect(size()).toBe(before);
    await vi.waitFor(() => expect(size()).toBeGreaterThan(before + 1_000_000), { timeout: 30_000 });
    const pages = size();
    await store.transact((tx) => tx.put('late', 'y'.repeat(100_000)));
    await store.close();
    expect(size()).toBeGreaterThan(pages);
    const again = new SqliteStore(file);
    expect(again.read((tx) => [tx.scan('key-').length, tx.get('late')])).toEqual([100, 'y'.repeat(100_000)]);
    await again.close();
  });

  it('refuses a second opener of the same file', async () => {
    const store = new SqliteStore(path('twice.db'));
    expect(() => new SqliteStore(path('twice.db'))).toThrow('in use by another process');
    await store.close();
    await new SqliteStore(path('twice.db')).close();
  });

  it('refuses a file with a newer schema and leaves it as it is', async () => {
    const file = await filled('newer.db');
    pragmas(file, (database) => database.pragma(`user_version = ${schemaVersion + 1}`));
    const before = readFileSync(file);
    expect(() => new SqliteStore(file)).toThrow(`schema version ${schemaVersion + 1}`);
    expect(readFileSync(file).equals(before)).toBe(true);
  });

  it("refuses another program's database and leaves it as it is", () => {
    const file = path('foreign.db');
    pragmas(file, (database) => database.exec('CREATE TABLE theirs (x)'));
    const before = readFileSync(file);
    expect(() => new SqliteStore(file)).toThrow('another program');
    expect(readFileSync(file).equals(before)).toBe(true);
  });

  it('refuses a file that is no database', () => {
    writeFileSync(path('text.db'), 'This is not a database, and it is longer than a header.'.repeat(100));
    expect(() => new SqliteStore(path('text.db'))).toThrow('not a sound SQLite database');
  });

  it('refuses a damaged database', async () => {
    const file = path('damaged.db');
    const store = new SqliteStore(file);
    await store.transact((tx) => {
      for (let n = 0; n < 2000; n++) tx.put(`key/${n}`, 'x'.repeat(100));
    });
    await store.close();
    const bytes = readFileSync(file);
    bytes.fill(0xa5, 8192, 16_384);
    writeFileSync(file, bytes);
    expect(() => new SqliteStore(file)).toThrow(/damaged|not a sound/);
  });

  it('says what to do when its folder is not there', () => {
    expect(() => new SqliteStore(path('no/such/folder/m.db'))).toThrow('Check that its folder exists');
  });

  it('makes backups that open as databases of their own, while it is in use', async () => {
    const store = new SqliteStore(path('source.db'));
    await store.transact((tx) => tx.put('a', 1));
    const backup = store.backup(path('copy.db'), (tx) => tx.put('copy', true));
    await store.transact((tx) => tx.put('b', 2));
    await backup;
    const copy = new SqliteStore(path('copy.db'));
    expect(copy.read((tx) => [tx.get('a'), tx.get('copy')])).toEqual([1, true]);
    expect(store.read((tx) => tx.get('copy'))).toBeUndefined();
    await copy.close();
    await store.close();
  });

  it('needs no temporary file to take a large change back', async () => {
    const store = new SqliteStore(path('large.db'));
    const fill = (value: string) => (tx: Transaction) => {
      for (let n = 0; n < 2000; n++) tx.put(`key/${n}`, value.repeat(500));
    };
    await store.transact(fill('a'));
    let open: string[] = [];
    const failed = store.transact((tx) => {
      fill('b')(tx);
      open = temporaryFiles();
      throw new Error('not this one');
    });
    await expect(failed).rejects.toThrow('not this one');
    expect(open).toEqual([]);
    expect(store.read((tx) => tx.get('key/1999'))).toBe('a'.repeat(500));
    await store.close();
  });

  it('undoes a commit that the disk refuses, and says why', async () => {
    const file = path('full.db');
    const store = new SqliteStore(file);
    await store.transact((tx) => tx.put('a', 1));
    await store.close();
    // A trigger that rolls the whole transaction back: what SQLite itself does when the disk is full.
    pragmas(file, (raw) =>
      raw.exec("CREATE TRIGGER full BEFORE INSERT ON entries BEGIN SELECT RAISE(ROLLBACK, 'disk full'); END"),
    );
    const limited = new SqliteStore(file);
    const both = await Promise.allSettled([
      limited.transact((tx) => tx.delete('a')),
      limited.transact((tx) => tx.put('b', 1)),
    ]);
    for (const result of both) {
      expect(result).toMatchObject({
        status: 'rejected',
        reason: { message: expect.stringMatching(/did not take a change: .*disk full/) },
      });
    }
    expect(limited.read((tx) => tx.get('a'))).toBe(1);
    await limited.close();
  });
});

describe('a commit survives kill -9', () => {
  // The child runs compiled code, so what it runs is compiled from the sources first.
  beforeAll(() => {
    execFileSync(join(packageDirectory, '..', '..', 'node_modules', '.bin', 'tsc'), ['-b', packageDirectory]);
  }, 120_000);

  it('for every transaction that was acknowledged, in ten kills', async () => {
    const file = path('killed.db');
    const module = pathToFileURL(join(packageDirectory, 'dist', 'store', 'sqlite.js')).href;
    let acknowledged = 0;
    for (let round = 0; round < 10; round++) {
      acknowledged = await runAndKill(file, module, 5 + 12 * round, acknowledged);
      // The file as the dead process left it, with its log, opens elsewhere too.
      for (const suffix of ['', '-wal']) copyFileSync(file + suffix, path(`copy-${round}.db${suffix}`));
      const store = new SqliteStore(path(`copy-${round}.db`));
      const [count, twin] = store.read((tx) => [tx.get('count'), tx.get('twin')]);
      await store.close();
      expect(Number(count ?? 0)).toBeGreaterThanOrEqual(acknowledged);
      expect(twin).toBe(count);
    }
    expect(acknowledged).toBeGreaterThan(10);
  }, 60_000);
});

/** A child commits and prints, commits and prints; it is killed after some lines. Returns the last number printed. */
async function runAndKill(file: string, module: string, lines: number, from: number): Promise<number> {
  const script = `
    import { SqliteStore } from ${JSON.stringify(module)};
    const store = new SqliteStore(${JSON.stringify(file)});
    for (;;) {
      const n = await store.transact((tx) => {
        const next = (tx.get('count') ?? 0) + 1;
        tx.put('count', next);
        tx.put('twin', next);
        return next;
      });
      process.stdout.write(n + '\\n');
    }`;
  const child = spawn(process.execPath, ['--input-type=module', '-e', script], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const ended = new Promise((resolve) => child.once('exit', resolve));
  let last = from;
  let seen = 0;
  for await (const line of createInterface({ input: child.stdout })) {
    last = Number(line);
    if (++seen === lines) child.kill('SIGKILL');
  }
  await ended;
  expect(seen).toBeGreaterThanOrEqual(lines);
  return last;
}
