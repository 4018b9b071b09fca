/** The invariants of DESIGN section 9 that the metadata service answers for, held against the simulated truth. */
import { tables, type AuditEntry, type GrantRecord, type SnapshotRecord } from '../../src/model/records.ts';
import { chainOf, isNameless } from '../../src/model/layers.ts';
import { freeRuns, regionCount, slabsOf } from '../../src/model/slabs.ts';
import { layerToWire } from '../../src/service/wire.ts';
import { chainOnDisk, contentOf, difference, mapOf, type OpenVolume, type Page } from './data.ts';
import type { Engine, World } from './world.ts';
import { drainMs, poolUuid, slabCount } from './world.ts';

interface GrantLife {
  epoch: bigint;
  forReading: boolean;
  /** Event and proof of what freed it; undefined: not free. */
  freedBy: string | undefined;
}

export class Checks {
  readonly #world: World;
  #auditSeen = 0n;
  /** By volume, in the order in which they were given. */
  readonly #grants = new Map<string, GrantLife[]>();
  readonly #generations = new Map<number, bigint>();
  readonly #dead = new Set<string>();
  granted = 0;
  readers = 0;
  snapshotsRead = 0;
  groupsRead = 0;
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
        const life = this.#grants.get(entry.volumeUuid)?.find((one) => one.epoch === entry.epoch);
        if (life === undefined || life.freedBy !== undefined) {
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

  /** Invariants 1 and 9: the epoch grows, the grants before were freed with their proofs; only readers are beside readers. */
  #onGrant(entry: AuditEntry): void {
    this.granted += 1;
    const forReading = entry.detail.endsWith(', for reading');
    if (forReading) this.readers += 1;
    const before = this.#grants.get(entry.volumeUuid) ?? [];
    for (const one of before) {
      const beside = one.freedBy === undefined && !(forReading && one.forReading);
      if (entry.epoch > one.epoch && !beside) continue;
      this.#world.violated(
        `${entry.volumeUuid} is granted under ${entry.epoch} to ${entry.nodeId}; epoch ${one.epoch} ` +
          (beside ? 'was never freed' : 'is not older'),
      );
    }
    this.#grants.set(entry.volumeUuid, [...before, { epoch: entry.epoch, forReading, freedBy: undefined }]);
  }

  /** Nobody who has the volume open under that epoch can write any more. */
  #mustBeHarmless(entry: AuditEntry, how: string): void {
    for (const { engine, volume } of this.#holders()) {
      if (
        volume.uuid !== entry.volumeUuid ||
        volume.epoch !== entry.epoch ||
        !this.#canStillWrite(engine, volume)
      )
        continue;
      this.#world.violated(
        `${entry.volumeUuid} is freed at epoch ${entry.epoch} (${how}), but ${engine.node.nodeId} generation ` +
          `${engine.generation} can still write it`,
      );
    }
  }

  #holders(): { engine: Engine; volume: OpenVolume }[] {
    const engines = new Set(this.#world.nodes.map((node) => node.engine));
    for (const engine of this.#world.disk.locks.values()) engines.add(engine);
    return [...engines].flatMap((engine) =>
      engine === undefined ? [] : [...engine.volumes.values()].map((volume) => ({ engine, volume })),
    );
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

  /** Invariant 5: no slab goes under a holder that was told of it and may still use it. */
  checkWiped(slab: number, page: Page): void {
    for (const { engine, volume } of this.#holders()) {
      if (volume.told.get(slab) !== page.generation || !this.#canStillWrite(engine, volume)) continue;
      this.#world.violated(
        `slab ${slab} of layer ${page.layerId} is wiped, and ${engine.node.nodeId} generation ${engine.generation} has not ` +
          `forgotten it for ${volume.uuid} under ${volume.epoch}`,
      );
    }
  }

  /** What a strip takes away answers for nobody: who can go on has the block elsewhere, and knows it. */
  checkStripped(slab: number, page: Page, blocks: readonly number[]): void {
    for (const { engine, volume } of this.#holders()) {
      if (!this.#canStillWrite(engine, volume)) continue;
      const missing = blocks.filter((block) => volume.map.get(block) === slab);
      if (missing.length === 0) continue;
      this.#world.violated(
        `blocks ${missing.join(', ')} of layer ${page.layerId} are stripped from slab ${slab}, where ${engine.node.nodeId} generation ` +
          `${engine.generation} reads them for ${volume.uuid} under ${volume.epoch}`,
      );
    }
  }

  /** Invariant 4: a snapshot shows what it showed when it was cut, by the slabs on record. */
  checkSnapshots(): void {
    const { disk, frozen } = this.#world;
    this.#world.store.read((tx) => {
      for (const snapshot of tables.snapshot.list(tx)) {
        if (snapshot.state !== 'READY') continue;
        const layers = chainOf(tx, poolUuid, snapshot.layerId).map((layer) =>
          layerToWire(layer, slabsOf(tx, poolUuid, layer.layerId)),
        );
        const wanted = frozen.get(snapshot.layerId);
        this.snapshotsRead += 1;
        const wrong =
          wanted === undefined ? 'it never froze' : difference(contentOf(disk, mapOf(disk, layers)), wanted);
        if (wrong !== '')
          this.#world.violated(`snapshot ${snapshot.name} (layer ${snapshot.layerId}): ${wrong}`);
      }
      for (const group of tables.group.list(tx)) {
        if (group.state !== 'READY') continue;
        this.#checkGroup(group.snapshotUuids.flatMap((uuid) => tables.snapshot.get(tx, uuid) ?? []));
      }
    });
  }

  /**
   * Invariants 6 and 8: from every volume record the chain can be followed on the disk, through tombstones, and it has every layer
   * that has slabs: no slot is used again while a record names the layer that had it.
   */
  checkChains(): void {
    const { disk } = this.#world;
    this.#world.store.read((tx) => {
      for (const [uuid, record] of disk.records) {
        try {
          const onDisk = new Set(chainOnDisk(disk.layers, record.top).map((layer) => layer.layerId));
          for (const { layerId, slabCount: slabs } of chainOf(tx, poolUuid, record.top)) {
            if (slabs > 0 && !onDisk.has(layerId)) throw new Error(`layer ${layerId} is not in the chain`);
          }
        } catch (error) {
          this.#world.violated(`the records of ${uuid}: ${String(error)}`);
        }
      }
    });
  }

  /** No member of a group has a write that began after one was acknowledged that another member does not have. */
  #checkGroup(members: readonly SnapshotRecord[]): void {
    const moments = members.map((one) => ({ name: one.name, ...this.#world.moments.get(one.layerId) }));
    if (members.length > 1) this.groupsRead += 1;
    for (const { name, lastIssuedMs = 0 } of moments) {
      const early = moments.find((other) => (other.firstAckAfterMs ?? Infinity) < lastIssuedMs);
      if (early === undefined) continue;
      this.#world.violated(
        `${name} has a write of ${lastIssuedMs} ms, and ${early.name} lacks one that was acknowledged at ${early.firstAckAfterMs} ms`,
      );
    }
  }

  /** Nothing is under way any more, and what is on record about layers agrees with itself. */
  checkSettled(): void {
    this.#world.store.read((tx) => {
      const rest = {
        cuts: tables.cutting.list(tx).length,
        groups: tables.grouping.entries(tx).length,
        compacting: tables.compacting.list(tx).length,
        merging: tables.merging.list(tx).length,
        leaving: tables.leaving.list(tx).length,
        deleting: tables.deleting.entries(tx).length,
        revoking: tables.revoking.entries(tx).length,
        creating: tables.volume.list(tx).filter((volume) => volume.state === 'CREATING').length,
        leaves: tables.layer.list(tx).filter((layer) => isNameless(layer) && layer.children === 0).length,
      };
      const left = Object.entries(rest).filter(([, count]) => count > 0);
      if (left.length > 0) this.#world.violated(`not over: ${JSON.stringify(Object.fromEntries(left))}`);
      const layers = tables.layer.list(tx, [poolUuid]);
      for (const layer of layers) {
        const children = layers.filter(
          (one) => one.removed === null && one.parentLayerId === layer.layerId,
        ).length;
        const onDisk = layers
          .flatMap((one) => [one.diskParentId, one.diskParentNext])
          .filter((parentId) => parentId === layer.layerId).length;
        if ((layer.removed === null && children !== layer.children) || onDisk !== layer.diskChildren) {
          this.#world.violated(
            `layer ${layer.layerId} counts ${layer.children} and ${layer.diskChildren} above it, there are ${children} and ${onDisk}`,
          );
        }
      }
    });
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
      for (const [[, layer], record] of tables.leaving.entries(tx))
        put(`leaving layer ${layer}`, record.runs);
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
