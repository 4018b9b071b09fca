/**
 * Pools that are drained and removed. Draining only keeps new things away, and can be taken back. A removal begins when nothing is
 * left that anybody could want, in the transaction that keeps everybody from joining; it ends when no host is left that could
 * issue I/O. Then the pool's records go, in one transaction. What stays is a note of its UUID, so that its device is known for
 * what it is, and the audit.
 */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, requirePool, type Decision } from './decision.ts';
import { requireLayer } from './layers.ts';
import { tables, type PoolRecord } from './records.ts';

/** Names in an answer to people. */
const maxNames = 20;

export interface PoolContents {
  volumes: number;
  deleting: number;
  snapshots: number;
  layers: number;
  /** Of the layers: those that only the disk names, and those below them. Nothing ever wipes them. */
  keptLayers: number;
  grants: number;
  volumeNames: string[];
  snapshotNames: string[];
}

export function contentsOf(tx: Snapshot, poolUuid: string): PoolContents {
  const volumes = tables.volume.list(tx).filter((volume) => volume.poolUuid === poolUuid);
  const living = volumes.filter((volume) => volume.state !== 'DELETING');
  const snapshots = tables.snapshot.list(tx).filter((snapshot) => snapshot.poolUuid === poolUuid);
  const layers = tables.layer.list(tx, [poolUuid]).filter((layer) => layer.removed?.wiped !== true);
  const kept = new Set<bigint>();
  for (const layer of layers) {
    let id = layer.kept ? layer.layerId : 0n;
    while (id !== 0n && !kept.has(id)) {
      kept.add(id);
      id = requireLayer(tx, poolUuid, id).parentLayerId;
    }
  }
  const grants = volumes.flatMap((volume) => [volume.grant, ...volume.readers]);
  return {
    volumes: living.length,
    deleting: volumes.length - living.length,
    snapshots: snapshots.length,
    layers: layers.length,
    keptLayers: kept.size,
    grants: grants.filter((grant) => grant.state !== 'FREE').length,
    volumeNames: living.slice(0, maxNames).map((volume) => volume.name),
    snapshotNames: snapshots.slice(0, maxNames).map((snapshot) => snapshot.name),
  };
}

/** @throws HoldfastError POOL_DRAINING: nothing new is placed on it */
export function refuseDraining(pools: readonly PoolRecord[]): void {
  const names = pools.map((pool) => pool.name);
  throw new HoldfastError(
    'POOL_DRAINING',
    `${names.length === 1 ? 'Pool' : 'Pools'} ${names.join(', ')} ${names.length === 1 ? 'is' : 'are'} being drained: no new ` +
      `volume or copy is placed there. Use another pool, or run: holdfast pool undrain ${names[0]}`,
  );
}

export function drainPool(d: Decision, poolUuid: string, by: string): void {
  const pool = requirePool(d, poolUuid);
  if (pool.draining) return;
  tables.pool.put(d.tx, { ...pool, draining: true }, poolUuid);
  audit(d, 'pool-draining', { poolUuid, detail: `${pool.name}, asked for by ${by}` });
}

export function undrainPool(d: Decision, poolUuid: string, by: string): void {
  const pool = requirePool(d, poolUuid);
  if (pool.removing) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Pool ${pool.name} is being removed; that is not taken back. Format its device as a new pool when that has ended.`,
    );
  }
  if (!pool.draining) return;
  const { draining: _over, ...rest } = pool;
  tables.pool.put(d.tx, rest, poolUuid);
  audit(d, 'pool-undrained', { poolUuid, detail: `${pool.name}, asked for by ${by}` });
}

/**
 * The removal begins; one under way goes on, one that has ended is success. Layers that only the disk names keep the pool until somebody says
 * that they may be forgotten: whether anybody could want them is for a person to know. Nothing is wiped for it.
 * @throws HoldfastError IN_USE, FAILED_PRECONDITION
 */
export function beginRemoval(d: Decision, poolUuid: string, by: string, forgetKept = false): void {
  if (tables.removedPool.get(d.tx, poolUuid) !== undefined) return;
  const pool = requirePool(d, poolUuid);
  if (pool.removing) return;
  if (!pool.draining) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Pool ${pool.name} is not drained, so something new may be placed on it at any time. First run: holdfast pool drain ${pool.name}`,
    );
  }
  const contents = contentsOf(d.tx, poolUuid);
  refuseContents(pool, contents, forgetKept);
  tables.pool.put(d.tx, { ...pool, removing: true }, poolUuid);
  audit(d, 'pool-removing', {
    poolUuid,
    proof:
      contents.keptLayers === 0
        ? 'no volume, snapshot, layer or grant is left'
        : `no volume, snapshot or grant is left, and ${by} says that nobody needs the ${contents.keptLayers} layers that only the disk names`,
    detail: `${pool.name}, asked for by ${by}`,
  });
}

function refuseContents(pool: PoolRecord, contents: PoolContents, forgetKept: boolean): void {
  const some = (count: number, what: string, names: readonly string[] = []): string[] => {
    if (count === 0) return [];
    const named = names.length === 0 ? '' : ` (${names.join(', ')}${count > names.length ? ', …' : ''})`;
    return [`${count} ${what}${count === 1 ? '' : 's'}${named}`];
  };
  const left = [
    ...some(contents.volumes, 'volume', contents.volumeNames),
    ...some(contents.snapshots, 'snapshot', contents.snapshotNames),
    ...some(contents.deleting, 'deleted volume'),
    ...some(contents.grants, 'open grant'),
  ];
  const layers = some(contents.layers, 'layer');
  const ends = contents.layers > contents.keptLayers; // by itself
  if (left.length === 0 && !ends && (contents.keptLayers === 0 || forgetKept)) return;
  throw new HoldfastError(
    'IN_USE',
    `Pool ${pool.name} still has ${[...left, ...layers].join(', ')}. ` +
      (contents.volumes + contents.snapshots > 0
        ? 'Delete or move what is left, then repeat the call.'
        : left.length > 0 || ends
          ? 'They are being wiped: repeat the call when that has ended.'
          : 'They were found on its disk, and snapshots or volumes that this database does not know may need them: nothing wipes them. ' +
            'A volume that still has a PersistentVolume is known again when it is published. When nobody needs what is left, ' +
            `run: holdfast pool remove ${pool.name} --forget-kept-layers`),
  );
}

/** Nobody is left who could issue I/O: everything that is known of the pool goes, but for its audit and a note of its name. */
export function endRemoval(d: Decision, poolUuid: string): void {
  const pool = tables.pool.get(d.tx, poolUuid);
  if (pool === undefined || !pool.removing) return;
  const alive = tables.host.list(d.tx, [poolUuid]).filter((host) => host.state !== 'DEAD');
  if (alive.length > 0) return;
  for (const table of ofPools) {
    for (const [parts] of table.entries(d.tx, [poolUuid])) d.tx.delete(table.keyOf(parts));
  }
  for (const table of [tables.regions, tables.quarantine, tables.pool]) table.delete(d.tx, poolUuid);
  tables.removedPool.put(d.tx, { name: pool.name, atUnixMs: d.nowUnixMs }, poolUuid);
  audit(d, 'pool-removed', { poolUuid, proof: 'every host of it is dead', detail: pool.name });
}

/** Records of a pool, whose keys begin with it. */
const ofPools = [
  tables.host,
  tables.held,
  tables.revoking,
  tables.deleting,
  tables.layer,
  tables.layerChild,
  tables.reclaim,
  tables.grouping,
  tables.cutting,
  tables.strip,
  tables.fold,
  tables.compacting,
  tables.merging,
  tables.compacted,
  tables.leaving,
  tables.job,
  tables.slabs,
  tables.region,
  tables.slots,
  tables.ahead,
  tables.orphan,
  tables.room,
] as const;
