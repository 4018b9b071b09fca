/** The running service's centre: the store, who this service is, and the one way to decide something. */
import { setMaxListeners } from 'node:events';
import { HoldfastError, type Logger } from '@holdfast/common';
import type { Decision } from '../model/decision.ts';
import { applyHost } from '../model/hosts.ts';
import { tables, type AuditEntry, type ServiceRecord } from '../model/records.ts';
import { upgradeRecords } from '../model/upgrade.ts';
import { StoreError, type Snapshot, type Store, type Transaction } from '../store/store.ts';
import type { Clock } from './clock.ts';

export interface Surroundings {
  clock: Clock;
  logger: Logger;
  /** A new UUID. */
  newId: () => string;
  /** Most provisioned bytes as a multiple of a pool's size; 0 or absent: no limit. */
  overcommitLimit?: number;
}

export class Core implements Surroundings {
  readonly store: Store;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly newId: () => string;
  readonly overcommitLimit: number;
  readonly service: ServiceRecord;
  /** Aborted when the service stops. */
  readonly stopped = new AbortController();
  /**
   * Pools whose disk names another owner or a newer term. Never cleared: a service that was deposed once has to be started
   * again, with the right database.
   */
  readonly refusals = new Map<string, string>();
  /** Told of every audit record once it is durable. */
  onAudit: (entry: AuditEntry) => void = () => undefined;
  /** How many streams read a layer now. They end with the service, so nothing about them is in the store. */
  readonly #pins = new Map<string, number>();
  #waiting = new Set<() => void>();

  private constructor(store: Store, surroundings: Surroundings, service: ServiceRecord) {
    this.store = store;
    this.clock = surroundings.clock;
    this.logger = surroundings.logger;
    this.newId = surroundings.newId;
    this.overcommitLimit = surroundings.overcommitLimit ?? 0;
    this.service = service;
    // As many operations as there are may wait for it.
    setMaxListeners(0, this.stopped.signal);
  }

  /** Begins a term: it grows with every start, and every fence under way starts again from its page. */
  static async open(store: Store, surroundings: Surroundings): Promise<Core> {
    const service = await store.transact((tx): ServiceRecord => {
      const before = tables.service.get(tx, 'self') as ServiceRecord | undefined;
      const next =
        before === undefined
          ? { storeId: surroundings.newId(), incarnation: 1n, term: 1n }
          : { ...before, term: before.term + 1n };
      tables.service.put(tx, next, 'self');
      const d: Decision = {
        tx,
        service: next,
        nowUnixMs: surroundings.clock.unixMs(),
        newId: surroundings.newId,
        audited: [],
        refusal: () => undefined,
        pinned: () => false,
        overcommitLimit: 0,
      };
      upgradeRecords(tx);
      for (const pool of tables.pool.list(tx)) {
        for (const host of tables.host.list(tx, [pool.uuid])) {
          applyHost(d, pool, host.hostId, { type: 'leader-change' });
        }
      }
      return next;
    });
    const core = new Core(store, surroundings, service);
    if (service.copiedUnixMs !== undefined) core.#refuseAsCopy(service.copiedUnixMs);
    return core;
  }

  /** A backup does not know what was granted after it was made, so it must not grant anything on the pools that it knows. */
  #refuseAsCopy(copiedUnixMs: number): void {
    const message =
      `This database is a backup, made at ${new Date(copiedUnixMs).toISOString()}: what was decided since is not in it. ` +
      'It can be read, but nothing is granted. Start the service with its own database; if that is lost, rebuild it from ' +
      'the pools.';
    for (const pool of this.read((tx) => tables.pool.list(tx))) this.refusals.set(pool.uuid, message);
    this.logger.error({ copiedUnixMs }, message);
  }

  /** Writes a consistent copy of the database, marked as one. False where the store has no file. */
  async backup(path: string): Promise<boolean> {
    if (this.store.backup === undefined) return false;
    const copiedUnixMs = this.clock.unixMs();
    await this.store.backup(path, (tx) => {
      const service = tables.service.get(tx, 'self') as ServiceRecord;
      tables.service.put(tx, { ...service, copiedUnixMs }, 'self');
    });
    return true;
  }

  read<T>(body: (tx: Snapshot) => T): T {
    return this.store.read(body);
  }

  /** One transaction. Those who wait for a change look again when it is durable. */
  async decide<T>(body: (d: Decision) => T): Promise<T> {
    const audited: AuditEntry[] = [];
    const result = await this.#transact((tx) =>
      body({
        tx,
        audited,
        service: this.service,
        nowUnixMs: this.clock.unixMs(),
        newId: this.newId,
        refusal: (pool) => this.refusals.get(pool),
        pinned: (pool, layer) => this.pinned(pool, layer),
        overcommitLimit: this.overcommitLimit,
      }),
    );
    for (const entry of audited) this.onAudit(entry);
    this.changed();
    return result;
  }

  async #transact<T>(body: (tx: Transaction) => T): Promise<T> {
    try {
      return await this.store.transact(body);
    } catch (error) {
      if (!(error instanceof StoreError)) throw error;
      this.logger.error({ err: error }, 'The store did not take a change');
      throw new HoldfastError('UNAVAILABLE', error.message, { cause: error });
    }
  }

  /** Call it inside decide(), so that nothing is decided between a look at the layers and their pins. */
  pin(poolUuid: string, layerIds: readonly bigint[]): void {
    for (const id of layerIds) {
      const key = `${poolUuid}/${id}`;
      this.#pins.set(key, (this.#pins.get(key) ?? 0) + 1);
    }
  }

  unpin(poolUuid: string, layerIds: readonly bigint[]): void {
    for (const id of layerIds) {
      const key = `${poolUuid}/${id}`;
      const left = (this.#pins.get(key) ?? 1) - 1;
      if (left > 0) this.#pins.set(key, left);
      else this.#pins.delete(key);
    }
    this.changed();
  }

  pinned(poolUuid: string, layerId: bigint): boolean {
    return this.#pins.has(`${poolUuid}/${layerId}`);
  }

  /** Wakes everybody who waits: something was decided, or an agent came or went. */
  changed(): void {
    const waiting = this.#waiting;
    this.#waiting = new Set();
    for (const wake of waiting) wake();
  }

  /** Resolves at the next change, after `ms`, or when a signal is aborted; says nothing about which. */
  async nextChange(ms: number, signal?: AbortSignal): Promise<void> {
    if (this.stopped.signal.aborted || signal?.aborted) return;
    const done = new AbortController();
    const wake = (): void => done.abort();
    this.#waiting.add(wake);
    signal?.addEventListener('abort', wake, { once: true });
    await this.clock.sleep(ms, done.signal);
    signal?.removeEventListener('abort', wake);
    this.#waiting.delete(wake);
  }

  /** Everything that waits ends now. What is unfinished is in the store. */
  stop(): void {
    this.stopped.abort();
    this.changed();
  }
}
