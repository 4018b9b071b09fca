/** What Prometheus reads: read from the store when asked, so that the figures are the truth and cost nothing otherwise. */
import { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } from 'prom-client';
import { tables, type HostState } from '../model/records.ts';
import type { Core } from './core.ts';
import type { Operations } from './operations.ts';
import type { Sessions } from './sessions.ts';

const hostStates: readonly HostState[] = ['JOINING', 'LIVE', 'FENCING', 'CUTTING', 'DEAD'];

export class Metrics {
  readonly #registry = new Registry();
  readonly calls: Histogram<'method' | 'code'>;
  readonly audited: Counter<'event'>;

  constructor(core: Core, sessions: Sessions, operations: Operations) {
    const registers = [this.#registry];
    collectDefaultMetrics({ register: this.#registry });
    this.calls = new Histogram({
      name: 'holdfast_metadata_call_seconds',
      help: 'Duration of gRPC calls by method and status code',
      labelNames: ['method', 'code'],
      buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 120],
      registers,
    });
    this.audited = new Counter({
      name: 'holdfast_metadata_audit_records_total',
      help: 'Decisions on record by event, since this process started',
      labelNames: ['event'],
      registers,
    });
    const gauge = <L extends string>(
      name: string,
      help: string,
      labelNames: readonly L[],
      collect: (set: (labels: Record<L, string>, value: number) => void) => void,
    ): void => {
      // It registers itself.
      void new Gauge({
        name: `holdfast_metadata_${name}`,
        help,
        labelNames,
        registers,
        collect() {
          this.reset();
          collect((labels, value) => this.set(labels, value));
        },
      });
    };
    gauge('term', 'The term of this service', [], (set) => set({}, Number(core.service.term)));
    gauge('agents_connected', 'Agents with a session', [], (set) => set({}, sessions.all().length));
    gauge('operations', 'Durable background operations under way', ['kind'], (set) => {
      const counts = operations.counts();
      for (const kind of ['claim', 'fence', 'revoke', 'scan', 'wipe']) set({ kind }, counts.get(kind) ?? 0);
    });
    gauge('pool_slabs', 'Slabs of a pool by use', ['pool', 'use'], (set) => {
      for (const pool of core.read((tx) => tables.pool.list(tx))) {
        set({ pool: pool.name, use: 'free' }, pool.slabsFree);
        set({ pool: pool.name, use: 'ahead' }, pool.slabsAhead);
        set({ pool: pool.name, use: 'layers' }, pool.slabCount - pool.slabsFree - pool.slabsAhead);
      }
    });
    gauge('pool_provisioned_bytes', 'Sum of the sizes of the volumes of a pool', ['pool'], (set) => {
      for (const pool of core.read((tx) => tables.pool.list(tx))) {
        set({ pool: pool.name }, Number(pool.provisionedBytes));
      }
    });
    gauge('pool_refused', '1 for a pool whose disk names another owner or a newer term', ['pool'], (set) => {
      for (const pool of core.refusals.keys()) set({ pool }, 1);
    });
    gauge('hosts', 'Hosts of a pool by state', ['pool', 'state'], (set) => {
      core.read((tx) => {
        for (const pool of tables.pool.list(tx)) {
          const hosts = tables.host.list(tx, [pool.uuid]);
          for (const state of hostStates) {
            set({ pool: pool.name, state }, hosts.filter((host) => host.state === state).length);
          }
        }
      });
    });
    gauge(
      'quarantined_slabs',
      'Slabs that are not used because their pages are bad or name no known layer',
      ['pool'],
      (set) => {
        core.read((tx) => {
          for (const pool of tables.pool.list(tx)) {
            const bad = tables.orphan.list(tx, [pool.uuid]).flatMap((orphan) => orphan.bad);
            const quarantined = [...(tables.quarantine.get(tx, pool.uuid) ?? []), ...bad];
            set(
              { pool: pool.name },
              quarantined.reduce((sum, run) => sum + run.count, 0),
            );
          }
        });
      },
    );
  }

  async text(): Promise<{ type: string; body: string }> {
    return { type: this.#registry.contentType, body: await this.#registry.metrics() };
  }
}
