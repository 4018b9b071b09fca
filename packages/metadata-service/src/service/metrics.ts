/** What Prometheus reads: read from the store when asked, so that the figures are the truth and cost nothing otherwise. */
import { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } from 'prom-client';
import { isNameless } from '../model/layers.ts';
import { tables, type HostState, type LayerRecord } from '../model/records.ts';
import { countSlabs } from '../model/runs.ts';
import { usedPercent } from '../model/usage.ts';
import type { CompactionRun } from './compact.ts';
import type { Core } from './core.ts';
import type { Operations } from './operations.ts';
import type { Sessions } from './sessions.ts';

const hostStates: readonly HostState[] = ['JOINING', 'LIVE', 'FENCING', 'CUTTING', 'DEAD'];

const operationKinds = [
  'claim',
  'grow',
  'remove-pool',
  'fence',
  'revoke',
  'scan',
  'wipe',
  'cut',
  'group',
  'strip',
  'compact',
  'merge',
  'forget',
  'release',
  'remove',
  'usage',
] as const;

function kindOf(layer: LayerRecord): 'writable' | 'frozen' | 'folded' | 'removed' {
  if (layer.removed !== null) return 'removed';
  if (!layer.frozen) return 'writable';
  return isNameless(layer) ? 'folded' : 'frozen';
}

export class Metrics {
  readonly #registry = new Registry();
  readonly calls: Histogram<'method' | 'code'>;
  readonly audited: Counter<'event'>;
  readonly cutHeld: Histogram;
  readonly #compactions: Counter<'outcome'>;
  readonly #movedBlocks: Counter;

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
    this.cutHeld = new Histogram({
      name: 'holdfast_metadata_cut_held_seconds',
      help: 'How long writes of a volume waited while it was cut for a snapshot or a copy',
      buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5],
      registers,
    });
    this.#compactions = new Counter({
      name: 'holdfast_metadata_compactions_total',
      help: 'Orders to compact a volume by outcome: more (is left to move), complete, no-space, failed',
      labelNames: ['outcome'],
      registers,
    });
    this.#movedBlocks = new Counter({
      name: 'holdfast_metadata_compaction_moved_blocks_total',
      help: 'Blocks of 4096 bytes that compactions copied up into the writable layers of volumes',
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
      for (const kind of operationKinds) set({ kind }, counts.get(kind) ?? 0);
    });
    gauge('pool_slabs', 'Slabs of a pool by use', ['pool', 'use'], (set) => {
      for (const pool of core.read((tx) => tables.pool.list(tx))) {
        set({ pool: pool.name, use: 'free' }, pool.slabsFree);
        set({ pool: pool.name, use: 'ahead' }, pool.slabsAhead);
        set({ pool: pool.name, use: 'layers' }, pool.slabCount - pool.slabsFree - pool.slabsAhead);
      }
    });
    gauge('pool_used_ratio', 'Slabs of a pool that are not free, 0 to 1', ['pool'], (set) => {
      for (const pool of core.read((tx) => tables.pool.list(tx))) {
        set({ pool: pool.name }, usedPercent(pool) / 100);
      }
    });
    gauge(
      'pool_space_warning',
      'Threshold of used slabs, in percent, that a pool is over; 0: none',
      ['pool'],
      (set) => {
        for (const pool of core.read((tx) => tables.pool.list(tx))) {
          set({ pool: pool.name }, pool.warnedPercent ?? 0);
        }
      },
    );
    gauge('snapshots', 'Snapshots of a pool by state', ['pool', 'state'], (set) => {
      core.read((tx) => {
        const snapshots = tables.snapshot.list(tx);
        for (const pool of tables.pool.list(tx)) {
          for (const state of ['CUTTING', 'READY'] as const) {
            const mine = snapshots.filter((one) => one.poolUuid === pool.uuid && one.state === state);
            set({ pool: pool.name, state }, mine.length);
          }
        }
      });
    });
    gauge('layers', 'Layers of a pool by what they are', ['pool', 'kind'], (set) => {
      core.read((tx) => {
        for (const pool of tables.pool.list(tx)) {
          const counts = { writable: 0, frozen: 0, folded: 0, removed: 0 };
          for (const layer of tables.layer.list(tx, [pool.uuid])) counts[kindOf(layer)] += 1;
          for (const [kind, count] of Object.entries(counts)) set({ pool: pool.name, kind }, count);
        }
      });
    });
    gauge(
      'leaving_slabs',
      'Slabs of folded layers that hold nothing any more: wiped when every holder has forgotten them',
      ['pool'],
      (set) => {
        core.read((tx) => {
          for (const pool of tables.pool.list(tx)) {
            const runs = tables.leaving.list(tx, [pool.uuid]).flatMap((record) => record.runs);
            set({ pool: pool.name }, countSlabs(runs));
          }
        });
      },
    );
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

  compacted(run: CompactionRun): void {
    if (run === 'failed') return this.#compactions.inc({ outcome: 'failed' });
    this.#compactions.inc({ outcome: run.complete ? 'complete' : run.noSpace ? 'no-space' : 'more' });
    this.#movedBlocks.inc(Number(run.movedBlocks));
  }

  async text(): Promise<{ type: string; body: string }> {
    return { type: this.#registry.contentType, body: await this.#registry.metrics() };
  }
}
