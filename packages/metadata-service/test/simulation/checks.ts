/** The invariants of DESIGN section 9 that the metadata service answers for, held against the simulated truth. */
import { tables, type AuditEntry, type GrantRecord } from '../../src/model/records.ts';
import { freeRuns, regionCount } from '../../src/model/slabs.ts';
import type { Engine, OpenVolume, World } from './world.ts';
import { drainMs, poolUuid, slabCount } from './world.ts';

interface GrantLife {
  epoch: bigint;
  /** Event and proof of what freed it; undefined: not free. */
  freedBy: string | undefined;
}

export class Checks {
  readonly #world: World;
  #auditSeen = 0n;
  readonly #grants = new Map<string, GrantLife>();
  readonly #generations = new Map<number, bigint>();
  readonly #dead = new Set<string>();
  granted = 0;
  deaths = 0;

  constructor(world: World) {
    this.#world = world;
  }

  /** After everything that happened at one instant. */
  afterStep(): void {
    const entries = this.#world.store.read((tx) => tables.audit.list(tx, [], { after: [this.#auditSeen] }));
    for (const entry of entries) {
      this.#auditSeen = entry.sequence;
      this.#audited(entry);
    }
  }

  #audited(entry: AuditEntry): void {
    switch (entry.event) {
      case 'grant':
        return this.#onGrant(entry);
      case 'returned':
      case 'closed':
      case 'revoked':
      case 'void': {
        const life = this.#grants.get(entry.volumeUuid);
        if (life === undefined || life.epoch !== entry.epoch || life.freedBy !== undefined) {
          this.#world.violated(
            `${entry.volumeUuid} is freed (${entry.event}) at epoch ${entry.epoch}, which was not granted`,
          );
          return;
        }
        if (entry.proof === '')
          this.#world.violated(`${entry.volumeUuid} is freed without a proof (${entry.event})`);
        life.freedBy = `${entry.event}: ${entry.proof}`;
        this.#mustBeHarmless(entry, life.freedBy);
        return;
      }
      case 'join': {
        const hostId = this.#world.store
          .read((tx) => tables.host.list(tx, [poolUuid]))
          .find((host) => host.nodeId === entry.nodeId)?.hostId;
        const last = this.#generations.get(hostId ?? -1) ?? 0n;
        if (entry.generation <= last)
          this.#world.violated(`generation ${entry.generation} of host ${hostId} after ${last}`);
        this.#generations.set(hostId ?? -1, entry.generation);
        return;
      }
      case 'dead': {
        this.deaths += 1;
        const life = `${entry.nodeId}/${entry.generation}`;
        if (this.#dead.has(life)) this.#world.violated(`${life} dies twice`);
        if (entry.proof === '') this.#world.violated(`${life} is dead without a proof`);
        this.#dead.add(life);
        return;
      }
      default:
    }
  }

  /** Invariants 1 and 9: the epoch grows, the last grant was freed with its proof. */
  #onGrant(entry: AuditEntry): void {
    this.granted += 1;
    const before = this.#grants.get(entry.volumeUuid);
    if (before !== undefined && (entry.epoch <= before.epoch || before.freedBy === undefined)) {
      this.#world.violated(
        `${entry.volumeUuid} is granted under ${entry.epoch} to ${entry.nodeId}; epoch ${before.epoch} ` +
          (before.freedBy === undefined ? 'was never freed' : 'is not older'),
      );
    }
    this.#grants.set(entry.volumeUuid, { epoch: entry.epoch, freedBy: undefined });
  }

  /** Nobody who has the volume open under that epoch can write any more. */
  #mustBeHarmless(entry: AuditEntry, how: string): void {
    for (const { engine, volume } of this.#holders(entry.volumeUuid)) {
      if (volume.epoch !== entry.epoch || !this.#canStillWrite(engine, volume)) continue;
      this.#world.violated(
        `${entry.volumeUuid} is freed at epoch ${entry.epoch} (${how}), but ${engine.node.nodeId} generation ` +
          `${engine.generation} can still write it`,
      );
    }
  }

  #holders(uuid: string): { engine: Engine; volume: OpenVolume }[] {
    const engines = new Set(this.#world.nodes.map((node) => node.engine));
    for (const engine of this.#world.disk.locks.values()) engines.add(engine);
    return [...engines].flatMap((engine) => {
      const volume = engine?.volumes.get(uuid);
      return engine === undefined || volume === undefined ? [] : [{ engine, volume }];
    });
  }

  #canStillWrite(engine: Engine, volume: OpenVolume): boolean {
    if (volume.inFlight > 0) return true;
    if (!volume.open || engine.stopped || !engine.alive) return false;
    if (this.#world.fencing === 'FENCING_CLASS_LOOP') return true;
    // Its lease can only be renewed after a look at its fence page.
    const fenced = this.#world.disk.fenced.has(`${engine.host.host_id}/${engine.generation}`);
    return !fenced || this.#world.clock.monotonicMs() < engine.leaseUntilMs + drainMs;
  }

  /** Invariant 1, at the disk: a write that lands carries the volume's newest epoch, and the grant is not free. */
  checkWrite(engine: Engine, volume: OpenVolume): void {
    const grant: GrantRecord | undefined = this.#world.store.read((tx) =>
      tables.volume.get(tx, volume.uuid),
    )?.grant;
    if (grant !== undefined && grant.epoch === volume.epoch && grant.state !== 'FREE') return;
    this.#world.violated(
      `${engine.node.nodeId} generation ${engine.generation} writes ${volume.uuid} under epoch ${volume.epoch}; the grant is ` +
        `${grant?.state} at ${grant?.epoch}`,
    );
  }

  /** Invariant 5: every slab is in exactly one place, and the counters say so. */
  checkSlabs(): void {
    const places = new Map<number, string>();
    const put = (what: string, runs: readonly { first: number; count: number }[]): number => {
      let count = 0;
      for (const run of runs) {
        for (let slab = run.first; slab < run.first + run.count; slab++, count++) {
          const other = places.get(slab);
          if (other !== undefined) this.#world.violated(`slab ${slab} is in ${what} and in ${other}`);
          places.set(slab, what);
        }
      }
      return count;
    };
    this.#world.store.read((tx) => {
      const pool = tables.pool.get(tx, poolUuid);
      if (pool === undefined) return;
      let free = 0;
      for (let region = 0; region < regionCount(pool); region++)
        free += put('free', freeRuns(tx, pool, region));
      let ahead = 0;
      for (const [[, host], record] of tables.ahead.entries(tx))
        ahead += put(`ahead of ${host}`, record.runs);
      for (const record of tables.orphan.list(tx)) ahead += put('orphans', record.runs);
      for (const [[, layer], runs] of tables.slabs.entries(tx)) put(`layer ${layer}`, runs);
      put('quarantine', tables.quarantine.get(tx, poolUuid) ?? []);
      if (places.size !== slabCount) this.#world.violated(`${slabCount - places.size} slabs are nowhere`);
      if (free !== pool.slabsFree || ahead !== pool.slabsAhead) {
        this.#world.violated(
          `the pool counts ${pool.slabsFree} free and ${pool.slabsAhead} ahead, there are ${free} and ${ahead}`,
        );
      }
    });
  }
}
