/**
 * Durable background operations. What has to be done is in the store (a host that is FENCING, a grant that is REVOKING, a
 * volume that is DELETING, slabs of a dead host, a pool that is not yet ours in this term, a cut, a strip, a
 * compaction, a layer that nothing needs); this finds it, works on each thing once at a time, and tries again what failed. So a restart, a lost agent or a cut-off call loses no operation: they all
 * go on from what the store says, and callers that repeat a call join by waiting for the store to change.
 */
import type { CompactionPolicy } from '../model/compaction.ts';
import { tables } from '../model/records.ts';
import { reclaimable, type ReclaimWork } from '../model/reclaim.ts';
import { growthDue } from '../model/growth.ts';
import { noteUsage, thresholdOf } from '../model/usage.ts';
import { claimPool } from './claim.ts';
import { compact, type CompactionRun } from './compact.ts';
import { merge } from './merge.ts';
import type { Core } from './core.ts';
import { cutVolume } from './cut.ts';
import { FenceOperation } from './fence.ts';
import { cutGroup } from './group.ts';
import { growPoolOnDisk } from './grow.ts';
import { forgetLayer, releaseSlabs, removeLayers, strip, wipeLayer } from './reclaim.ts';
import { removePool } from './remove-pool.ts';
import { revoke } from './revoke.ts';
import type { Sessions } from './sessions.ts';
import { scanOrphans } from './scan.ts';
import { wipeVolume } from './wipe.ts';

/** How often the store is looked through for work that nobody announced. */
const sweepIntervalMs = 1000;
const settleMs = 5;
/** An operation that failed waits this long, doubling up to the maximum. */
const retryMs = { first: 200, most: 5000 };
/** Operations of one kind that are looked after at a time on a pool; jobs.ts says how many of them give orders. */
const maxWaiting = 256;
/** How often layers that nothing names are looked at: there may be many, and nobody waits for them. */
const reclaimIntervalMs = 500;
export const defaultStripIntervalMs = 30_000;
export const defaultCompactIntervalMs = 30_000;
export const defaultCompactBelow = 0.75;

export interface OperationsOptions {
  /** The volumes' folded layers are stripped at most this often while their writable layer changes. */
  stripIntervalMs?: number;
  /** They are compacted into it at most this often. */
  compactIntervalMs?: number;
  /** And only when a smaller share of their slabs is live; 0: never. */
  compactBelow?: number;
  /** Told how each compaction ended. */
  onCompact?: (run: CompactionRun) => void;
  /** Told for how long writes were held by each cut, in seconds. */
  onCut?: (seconds: number) => void;
}

export class Operations {
  readonly #core: Core;
  readonly #sessions: Sessions;
  readonly #running = new Map<string, Promise<void>>();
  /** What a fence waits for, for people; by pool and host. */
  readonly #waitingFor = new Map<string, string>();
  /** Why a cut is tried again, for people; by volume. */
  readonly #lastError = new Map<string, string>();
  readonly #stripIntervalMs: number;
  readonly #policy: CompactionPolicy;
  readonly #onCut: (seconds: number) => void;
  readonly #onCompact: (run: CompactionRun) => void;
  #nextReclaimMs = 0;
  /** A layer went since the last look, and what it stood on may go: the next look is as soon as the last one has been rested from. */
  #goesOn = false;
  /** Ten times as long as it took after the last look at what may be reclaimed. */
  #restedMs = 0;
  #sweeper: Promise<void> | undefined;

  constructor(core: Core, sessions: Sessions, options: OperationsOptions = {}) {
    this.#core = core;
    this.#sessions = sessions;
    this.#stripIntervalMs = options.stripIntervalMs ?? defaultStripIntervalMs;
    this.#policy = {
      below: options.compactBelow ?? defaultCompactBelow,
      intervalMs: options.compactIntervalMs ?? defaultCompactIntervalMs,
      isConnected: (nodeId) => sessions.isConnected(nodeId),
    };
    this.#onCut = options.onCut ?? (() => undefined);
    this.#onCompact = options.onCompact ?? (() => undefined);
  }

  start(): void {
    this.#sweeper = this.#sweepForEver();
  }

  /** After the core was stopped: waits until nothing runs. */
  async stop(): Promise<void> {
    await this.#sweeper;
    await Promise.all(this.#running.values());
  }

  waitingFor(poolUuid: string, hostId: number): string {
    return this.#waitingFor.get(`${poolUuid}/${hostId}`) ?? '';
  }

  /** Why an operation is being tried again; empty: it is at its first try. */
  lastError(kind: 'cut' | 'group' | 'grow' | 'remove-pool', uuid: string): string {
    return this.#lastError.get(`${kind} ${uuid}`) ?? '';
  }

  /** How many of each kind are under way. */
  counts(): Map<string, number> {
    const counts = new Map<string, number>();
    for (const key of this.#running.keys()) {
      const kind = key.slice(0, key.indexOf(' '));
      counts.set(kind, (counts.get(kind) ?? 0) + 1);
    }
    return counts;
  }

  async #sweepForEver(): Promise<void> {
    const { stopped } = this.#core;
    while (!stopped.signal.aborted) {
      try {
        this.sweep();
      } catch (error) {
        this.#core.logger.error({ err: error }, 'Looking for unfinished operations failed');
      }
      const restMs = Math.max(settleMs, this.#restedMs - this.#core.clock.monotonicMs());
      await this.#core.nextChange(this.#goesOn ? Math.min(sweepIntervalMs, restMs) : sweepIntervalMs);
      // Many changes at once are one look.
      await this.#core.clock.sleep(settleMs, stopped.signal);
    }
  }

  /** Starts whatever the store says is unfinished and is not under way. */
  sweep(): void {
    const core = this.#core;
    const sessions = this.#sessions;
    const pools = core.read((tx) => tables.pool.list(tx));
    const found = core.read((tx) => ({
      fencing: tables.host.list(tx).filter((host) => host.state === 'FENCING' || host.state === 'CUTTING'),
      revoking: tables.revoking
        .entries(tx)
        .map(([parts]) => ({ uuid: parts[1] as string, hostId: Number(parts[2]) })),
      cuts: tables.cutting.list(tx).filter((cut) => cut.groupUuid === ''),
      groups: tables.grouping.entries(tx).map(([parts]) => parts[1] as string),
      orphans: tables.orphan
        .entries(tx)
        .filter(([, orphan]) => orphan.runs.length > 0)
        .map(([parts, orphan]) => ({
          poolUuid: parts[0] as string,
          life: { hostId: Number(parts[1]), generation: BigInt(parts[2] as string), nodeId: orphan.nodeId },
        })),
      deleting: pools
        .flatMap((pool) => tables.deleting.entries(tx, [pool.uuid], { limit: maxWaiting }))
        .map(([parts]) => parts[1] as string),
    }));
    for (const pool of pools) {
      const current =
        pool.claimed?.term === core.service.term && pool.claimed.incarnation === core.service.incarnation;
      const seen = sessions.all().some((session) => session.pools.has(pool.uuid));
      if (current || !seen || core.refusals.has(pool.uuid)) continue;
      this.#ensure(`claim ${pool.uuid}`, () => claimPool(core, sessions, pool.uuid));
    }
    for (const { poolUuid, hostId } of found.fencing) {
      const key = `${poolUuid}/${hostId}`;
      this.#ensure(`fence ${key}`, async () => {
        try {
          await new FenceOperation(core, sessions, poolUuid, hostId, (sentence) =>
            this.#waitingFor.set(key, sentence),
          ).run();
        } finally {
          this.#waitingFor.delete(key);
        }
      });
    }
    for (const { uuid, hostId } of found.revoking) {
      this.#ensure(`revoke ${uuid}/${hostId}`, () => revoke(core, sessions, uuid, hostId));
    }
    for (const { volumeUuid } of found.cuts) {
      this.#ensure(`cut ${volumeUuid}`, () => cutVolume(core, sessions, volumeUuid, this.#onCut));
    }
    for (const uuid of found.groups) {
      this.#ensure(`group ${uuid}`, () => cutGroup(core, sessions, uuid, this.#onCut));
    }
    for (const pool of pools) {
      if (thresholdOf(pool) === (pool.warnedPercent ?? 0)) continue;
      this.#ensure(`usage ${pool.uuid}`, async () => {
        const warning = await core.decide((d) => noteUsage(d, pool.uuid));
        if (warning !== undefined) core.logger.warn({ pool: pool.uuid }, warning);
      });
    }
    for (const pool of pools) {
      if (pool.removing)
        this.#ensure(`remove-pool ${pool.uuid}`, () => removePool(core, sessions, pool.uuid));
      if (pool.growingBytes === undefined && core.read((tx) => growthDue(tx, pool)) === undefined) continue;
      this.#ensure(`grow ${pool.uuid}`, () => growPoolOnDisk(core, sessions, pool.uuid));
    }
    for (const { poolUuid, life } of found.orphans) {
      this.#ensure(`scan ${poolUuid}/${life.hostId}/${life.generation}`, () =>
        scanOrphans(core, sessions, poolUuid, life),
      );
    }
    for (const uuid of found.deleting) this.#ensure(`wipe ${uuid}`, () => wipeVolume(core, sessions, uuid));
    const nowMs = core.clock.monotonicMs();
    if (nowMs < (this.#goesOn ? Math.min(this.#restedMs, this.#nextReclaimMs) : this.#nextReclaimMs)) return;
    this.#goesOn = false;
    this.#nextReclaimMs = nowMs + reclaimIntervalMs;
    for (const pool of pools) this.#reclaim(pool.uuid);
    const endMs = core.clock.monotonicMs();
    this.#restedMs = endMs + 10 * (endMs - nowMs);
  }

  /** Layers that nothing names, and slabs that leave them. */
  #reclaim(poolUuid: string): void {
    const core = this.#core;
    const sessions = this.#sessions;
    const { leaving, strips, compacting, merging, works } = core.read((tx) => ({
      leaving: tables.leaving.entries(tx, [poolUuid], { limit: maxWaiting }),
      strips: tables.strip.entries(tx, [poolUuid]).map(([parts]) => BigInt(parts[1] as string)),
      compacting: tables.compacting.entries(tx, [poolUuid]).map(([parts]) => BigInt(parts[1] as string)),
      merging: tables.merging.entries(tx, [poolUuid]).map(([parts]) => BigInt(parts[1] as string)),
      works: reclaimable(
        { tx, pinned: (pool, id) => core.pinned(pool, id) },
        poolUuid,
        core.clock.unixMs(),
        this.#policy,
      ),
    }));
    for (const [[, layer, sequence]] of leaving) {
      const key = [BigInt(layer as string), BigInt(sequence as string)] as const;
      this.#ensure(`release ${poolUuid}/${key.join('/')}`, () =>
        releaseSlabs(core, sessions, poolUuid, ...key),
      );
    }
    const of = (type: ReclaimWork['type']): bigint[] =>
      works.filter((work) => work.type === type).map((work) => work.layerId);
    if (of('remove').length > 0)
      this.#ensure(`remove ${poolUuid}`, () => removeLayers(core, poolUuid, this.#policy));
    for (const id of of('forget').slice(0, maxWaiting)) {
      this.#ensure(`forget ${poolUuid}/${id}`, () => forgetLayer(core, sessions, poolUuid, id));
    }
    for (const id of [...of('wipe'), ...of('tombstone')].slice(0, maxWaiting)) {
      this.#ensure(`wipe ${poolUuid}/${id}`, async () => {
        await wipeLayer(core, sessions, poolUuid, id);
        this.#goesOn = true;
      });
    }
    for (const id of [...strips, ...of('strip')].slice(0, maxWaiting)) {
      this.#ensure(`strip ${poolUuid}/${id}`, () =>
        strip(core, sessions, poolUuid, id, this.#stripIntervalMs),
      );
    }
    for (const id of [...compacting, ...of('compact')].slice(0, maxWaiting)) {
      this.#ensure(`compact ${poolUuid}/${id}`, () =>
        compact(core, sessions, poolUuid, id, this.#policy, this.#onCompact),
      );
    }
    for (const id of [...merging, ...of('merge')].slice(0, maxWaiting)) {
      this.#ensure(`merge ${poolUuid}/${id}`, () => merge(core, sessions, poolUuid, id, this.#policy));
    }
  }

  /** Runs `body` until it succeeds, unless it runs already. */
  #ensure(key: string, body: () => Promise<void>): void {
    if (this.#running.has(key) || this.#core.stopped.signal.aborted) return;
    const run = async (): Promise<void> => {
      for (let waitMs = retryMs.first; ; waitMs = Math.min(2 * waitMs, retryMs.most)) {
        try {
          await body();
          this.#lastError.delete(key);
          return;
        } catch (error) {
          if (this.#core.stopped.signal.aborted) return;
          const message = error instanceof Error ? error.message : String(error);
          this.#lastError.set(key, message);
          this.#core.logger.warn({ operation: key, retryMs: waitMs }, `${message} It is tried again.`);
          await this.#core.clock.sleep(waitMs, this.#core.stopped.signal);
          if (this.#core.stopped.signal.aborted) return;
        }
      }
    };
    const running = run().finally(() => {
      this.#running.delete(key);
      this.#lastError.delete(key);
      this.#core.changed();
    });
    this.#running.set(key, running);
  }
}
