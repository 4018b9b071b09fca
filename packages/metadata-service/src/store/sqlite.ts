/**
 * The store on one SQLite file: WAL, synchronous=FULL (a commit is fsynced before transact() resolves), read back and
 * asserted, because the bundled SQLite is compiled to use NORMAL in WAL mode whatever the file says.
 *
 * Transactions that are waiting when the event loop comes round share one commit, and so one fsync; each runs in its own
 * savepoint, so one that throws takes back only its own changes. The file is held exclusively: a second service on the
 * same file is refused.
 *
 * What the log holds is put into the file (a checkpoint: two fsyncs, tens of milliseconds on a busy disk, while nothing else
 * is served) when nothing is asked for, and in between only when the log has grown large.
 */
import { renameSync, rmSync } from 'node:fs';
import Database from 'better-sqlite3';
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

/** "HFMD": tells our files from other SQLite databases. */
const applicationId = 0x48464d44n;

/**
 * Step n turns schema version n into n + 1. Steps are only ever added. A file with a higher version was written by a
 * newer release and is refused.
 */
const migrations: readonly string[] = [
  'CREATE TABLE entries (key TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL) WITHOUT ROWID, STRICT',
];
export const schemaVersion = migrations.length;

/** A log of 32 MiB is put into the file whatever is waiting. */
const mostLogPages = 8192;
/** One of so many commits is, when no other has come for so long. */
const restingCommits = 64;
const restingMs = 1000;

interface Waiting {
  run: () => void;
  settle: () => void;
  fail: (error: unknown) => void;
}

export class SqliteStore implements Store {
  readonly kind = 'sqlite';
  readonly #path: string;
  readonly #database: Database.Database;
  readonly #statements;
  #waiting: Waiting[] = [];
  #inTransaction = false;
  #closed = false;
  #commitsInLog = 0;
  readonly #rest: NodeJS.Timeout;

  /** @throws StoreError when the file is not ours, newer, damaged, or in use. */
  constructor(path: string) {
    this.#path = path;
    this.#database = open(path);
    const database = this.#database;
    this.#rest = setTimeout(() => this.#checkpoint(), restingMs).unref();
    this.#statements = {
      get: database.prepare<[string], { value: string }>('SELECT value FROM entries WHERE key = ?'),
      put: database.prepare<[string, string]>(
        'INSERT INTO entries (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value',
      ),
      delete: database.prepare<[string]>('DELETE FROM entries WHERE key = ?'),
      ascending: database.prepare<[string, string, bigint], { key: string; value: string }>(
        'SELECT key, value FROM entries WHERE key >= ? AND key < ? ORDER BY key LIMIT ?',
      ),
      descending: database.prepare<[string, string, bigint], { key: string; value: string }>(
        'SELECT key, value FROM entries WHERE key >= ? AND key < ? ORDER BY key DESC LIMIT ?',
      ),
    };
  }

  read<T>(body: (snapshot: Snapshot) => T): T {
    this.#assertIdle();
    const result = body(this.#snapshot());
    assertSynchronous(result);
    return result;
  }

  async transact<T>(body: (transaction: Transaction) => T): Promise<T> {
    this.#assertIdle();
    return await new Promise<T>((resolve, reject) => {
      let result: T;
      this.#waiting.push({
        run: () => {
          result = body(this.#transaction());
          assertSynchronous(result);
        },
        settle: () => resolve(result),
        fail: reject,
      });
      if (this.#waiting.length === 1) setImmediate(() => this.#commitWaiting());
    });
  }

  async backup(path: string, mark: (transaction: Transaction) => void): Promise<void> {
    this.#assertIdle();
    const unfinished = `${path}.unfinished`;
    rmSync(unfinished, { force: true });
    await this.#database.backup(unfinished);
    const copy = new SqliteStore(unfinished);
    await copy.transact(mark);
    await copy.close();
    renameSync(unfinished, path);
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#commitWaiting();
    this.#closed = true;
    clearTimeout(this.#rest);
    this.#database.close();
  }

  /** One commit for all that wait. Synchronous, so nobody sees a half-way state. */
  #commitWaiting(): void {
    const batch = this.#waiting;
    this.#waiting = [];
    if (batch.length === 0) return;
    const done: Waiting[] = [];
    const database = this.#database;
    try {
      database.exec('BEGIN IMMEDIATE');
      this.#inTransaction = true;
      for (const item of batch) {
        database.exec('SAVEPOINT item');
        try {
          item.run();
        } catch (error) {
          // SQLite has taken back the whole transaction already: what the disk said, not that there is no savepoint any more.
          if (!database.inTransaction) throw error;
          database.exec('ROLLBACK TO item');
          database.exec('RELEASE item');
          item.fail(error);
          continue;
        }
        database.exec('RELEASE item');
        done.push(item);
      }
      this.#inTransaction = false;
      database.exec('COMMIT');
    } catch (error) {
      this.#inTransaction = false;
      if (database.inTransaction) database.exec('ROLLBACK');
      const failure = new StoreError(
        `The database ${this.#path} did not take a change: ${describe(error)}. Nothing was changed. Check the disk's ` +
          'space and health, then repeat the call.',
        { cause: error },
      );
      for (const item of batch) item.fail(failure);
      return;
    }
    this.#commitsInLog += 1;
    if (this.#commitsInLog >= restingCommits) this.#rest.refresh();
    for (const item of done) item.settle();
  }

  #checkpoint(): void {
    if (this.#commitsInLog < restingCommits) return;
    this.#commitsInLog = 0;
    // Where it fails nothing is lost: the log stays as it is, and a commit says what is wrong with the disk.
    try {
      this.#database.pragma('wal_checkpoint(PASSIVE)');
    } catch {
      // the next time
    }
  }

  #assertIdle(): void {
    if (this.#closed) throw new StoreError(`The database ${this.#path} is closed.`);
    if (this.#inTransaction) {
      throw new StoreError('A transaction is running: its body must use what it was handed.');
    }
  }

  #snapshot(): Snapshot {
    return {
      get: (key) => {
        const row = this.#statements.get.get(key);
        return row === undefined ? undefined : decode(row.value);
      },
      scan: (prefix, options) => this.#scan(prefix, options),
    };
  }

  #transaction(): Transaction {
    return {
      ...this.#snapshot(),
      put: (key, value) => {
        assertKey(key);
        this.#statements.put.run(key, encode(value));
      },
      delete: (key) => void this.#statements.delete.run(key),
    };
  }

  #scan(prefix: string, { after, limit, reverse = false }: ScanOptions = {}): [string, unknown][] {
    let low = prefix;
    let high = prefixEnd(prefix);
    if (after !== undefined && !reverse && `${after}\0` > low) low = `${after}\0`;
    if (after !== undefined && reverse && after < high) high = after;
    const statement = reverse ? this.#statements.descending : this.#statements.ascending;
    // A negative LIMIT is none.
    return statement.all(low, high, BigInt(limit ?? -1)).map((row) => [row.key, decode(row.value)]);
  }
}

function open(path: string): Database.Database {
  let database: Database.Database | undefined;
  try {
    database = new Database(path, { timeout: 1000 });
    database.defaultSafeIntegers(true);
    // Before the first access to the file, so that it is never shared.
    database.pragma('locking_mode = EXCLUSIVE');
    refuseForeign(database, path);
    const version = refuseNewer(database, path);
    set(database, 'journal_mode', 'WAL', 'wal');
    set(database, 'synchronous', 'FULL', 2n);
    database.pragma(`wal_autocheckpoint = ${mostLogPages}`);
    // What a savepoint may have to take back is kept in memory: in a container there may be no directory for temporary files, and
    // then every larger change failed.
    database.pragma('temp_store = MEMORY');
    migrate(database, version);
    const damage = database.pragma('quick_check(1)', { simple: true });
    if (damage !== 'ok') {
      throw new StoreError(
        `The database ${path} is damaged (${String(damage)}). Nothing was changed. Put the newest backup in its place.`,
      );
    }
    return database;
  } catch (error) {
    database?.close();
    if (error instanceof StoreError) throw error;
    throw new StoreError(openFailure(path, error), { cause: error });
  }
}

function set(database: Database.Database, name: string, value: string, expected: unknown): void {
  database.pragma(`${name} = ${value}`);
  const actual = database.pragma(name, { simple: true });
  if (actual !== expected) {
    throw new StoreError(
      `SQLite did not take ${name} = ${value} (it says ${String(actual)}), so a commit would not be durable. ` +
        'Keep the database on a local file system that supports WAL and fsync.',
    );
  }
}

function refuseForeign(database: Database.Database, path: string): void {
  const id = database.pragma('application_id', { simple: true });
  if (id === applicationId) return;
  const tables = database.prepare('SELECT count(*) FROM sqlite_schema').pluck().get();
  if (id !== 0n || tables !== 0n) {
    throw new StoreError(
      `${path} is a SQLite database of another program. Give --store another path; it was left as it is.`,
    );
  }
}

function refuseNewer(database: Database.Database, path: string): number {
  const found = Number(database.pragma('user_version', { simple: true }));
  if (found > schemaVersion) {
    throw new StoreError(
      `The database ${path} has schema version ${found}, this release knows up to ${schemaVersion}. Start the release ` +
        'that wrote it, or put a backup from before the upgrade in its place. It was left as it is.',
    );
  }
  return found;
}

function migrate(database: Database.Database, found: number): void {
  if (found === schemaVersion) return;
  database
    .transaction(() => {
      for (const step of migrations.slice(found)) database.exec(step);
      database.pragma(`application_id = ${applicationId}`);
      database.pragma(`user_version = ${schemaVersion}`);
    })
    .immediate();
}

function openFailure(path: string, error: unknown): string {
  const code = error instanceof Database.SqliteError ? error.code : '';
  if (code.startsWith('SQLITE_BUSY') || code.startsWith('SQLITE_LOCKED')) {
    return `The database ${path} is in use by another process. Only one metadata service may run on it: stop the other one.`;
  }
  if (code.startsWith('SQLITE_NOTADB') || code.startsWith('SQLITE_CORRUPT')) {
    return (
      `${path} is not a sound SQLite database (${describe(error)}). It was left as it is. ` +
      'Put the newest backup in its place.'
    );
  }
  return `The database ${path} cannot be opened: ${describe(error)}. Check that its folder exists and is writable.`;
}

function describe(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
