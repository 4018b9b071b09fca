/** The running service's centre: the store, who this service is, and the one way to decide something. */
import { setMaxListeners } from 'node:events';
import type { Logger } from '@holdfast/common';
import type { Decision } from '../model/decision.ts';
import { applyHost } from '../model/hosts.ts';
import { tables, type AuditEntry, type ServiceRecord } from '../model/records.ts';
import type { Snapshot, Store } from '../store/store.ts';
import type { Clock } from './clock.ts';

export interface Surroundings {
  clock: Clock;
  logger: Logger;
  /** A new UUID. */
  newId: () => string;
}

export class Core implements Surroundings {
  readonly store: Store;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly newId: () => string;
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
  #waiting = new Set<() => void>();

  private constructor(store: Store, surroundings: Surroundings, service: ServiceRecord) {
    this.store = store;
    this.clock = surroundings.clock;
    this.logger = surroundings.logger;
    this.newId = surroundings.newId;
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
      };
      for (const pool of tables.pool.list(tx)) {
        for (const host of tables.host.list(tx, [pool.uuid])) {
          applyHost(d, pool, host.hostId, { type: 'leader-change' });
        }
      }
      return next;
    });
    return new Core(store, surroundings, service);
  }

  read<T>(body: (tx: Snapshot) => T): T {
    return this.store.read(body);
  }

  /** One transaction. Those who wait for a change look again when it is durable. */
  async decide<T>(body: (d: Decision) => T): Promise<T> {
    const audited: AuditEntry[] = [];
    const result = await this.store.transact((tx) =>
      body({
        tx,
        audited,
        service: this.service,
        nowUnixMs: this.clock.unixMs(),
        newId: this.newId,
        refusal: (pool) => this.refusals.get(pool),
      }),
    );
    for (const entry of audited) this.onAudit(entry);
    this.changed();
    return result;
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
