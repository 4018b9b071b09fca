/** How much of a pool volumes use, and by whom it is shared: for people. */
import type { Snapshot } from '../store/store.ts';
import { audit, type Decision } from './decision.ts';
import { layersOf } from './layers.ts';
import { tables, type PoolRecord, type VolumeRecord } from './records.ts';

const blockBytes = 4096n;

export interface Usage {
  /** Slabs of layers that nothing but this volume needs. */
  ownBytes: bigint;
  /** Of layers that snapshots or other volumes need too. */
  sharedBytes: bigint;
  /** Shadowed blocks in own layers, as far as strips have counted. */
  reclaimableBytes: bigint;
}

export function usageOf(tx: Snapshot, volume: VolumeRecord): Usage {
  const slabSize = BigInt(tables.pool.get(tx, volume.poolUuid)?.slabSize ?? 0);
  const usage: Usage = { ownBytes: 0n, sharedBytes: 0n, reclaimableBytes: 0n };
  let own = true;
  layersOf(tx, volume).forEach((layer, index) => {
    const isTop = index === 0;
    if (!isTop && (layer.children > 1 || layer.snapshotUuid !== '' || layer.kept)) own = false;
    const bytes = BigInt(layer.slabCount) * slabSize;
    if (!own) {
      usage.sharedBytes += bytes;
      return;
    }
    usage.ownBytes += bytes;
    const live = BigInt(layer.liveBlocks) * blockBytes;
    if (!isTop && layer.liveBlocks >= 0 && bytes > live) usage.reclaimableBytes += bytes - live;
  });
  return usage;
}

/** Percent of a pool's slabs in use that are warned about. */
export const thresholds = [80, 90, 95] as const;

export function usedPercent(pool: PoolRecord): number {
  return (100 * (pool.slabCount - pool.slabsFree)) / pool.slabCount;
}

/** The threshold that a pool is over; one that was reached counts until usage is 2 % below it. */
export function thresholdOf(pool: PoolRecord): number {
  const used = usedPercent(pool);
  return thresholds.findLast((at) => used >= at || (at <= (pool.warnedPercent ?? 0) && used >= at - 2)) ?? 0;
}

/** Notes when a pool crosses a threshold. Returns the sentence for the log when it is a higher one. */
export function noteUsage(d: Decision, poolUuid: string): string | undefined {
  const pool = tables.pool.get(d.tx, poolUuid);
  if (pool === undefined) return undefined;
  const before = pool.warnedPercent ?? 0;
  const now = thresholdOf(pool);
  if (now === before) return undefined;
  tables.pool.put(d.tx, { ...pool, warnedPercent: now }, poolUuid);
  const detail =
    `${pool.slabCount - pool.slabsFree} of ${pool.slabCount} slabs are in use (${usedPercent(pool).toFixed(1)} %), ` +
    `${pool.provisionedBytes} bytes are promised`;
  audit(d, now > before ? 'space-warning' : 'space-better', { poolUuid, detail: `${now} %: ${detail}` });
  if (now < before) return undefined;
  return (
    `Pool ${pool.name} is over ${now} %: ${detail}. Volumes are thin: when it is full, first writes are held and then fail. ` +
    'Delete volumes or snapshots, trim file systems (fstrim), or grow the device.'
  );
}
