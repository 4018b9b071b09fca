/**
 * Segments of folded layers: what a strip or a compaction works on. A segment is every folded layer from one whose upper neighbour,
 * the head, is not folded, down to the first that is not folded either.
 */
import type { Snapshot } from '../store/store.ts';
import { childrenOf, isFolded, requireLayer, type Pins } from './layers.ts';
import {
  tables,
  type CompactingRecord,
  type LayerRecord,
  type StripRecord,
  type VolumeRecord,
} from './records.ts';

/** Work that came to nothing waits twice as long before the next try, up to this many times the interval. */
export const maxBackoff = 32;

export interface View extends Pins {
  readonly tx: Snapshot;
}

/** Victims and heads of strips, compactions and merges under way. */
export function busyLayers(tx: Snapshot, poolUuid: string): Set<bigint> {
  const underWay = [
    ...tables.strip.list(tx, [poolUuid]),
    ...tables.compacting.list(tx, [poolUuid]),
    ...tables.merging.list(tx, [poolUuid]),
  ];
  return new Set(underWay.flatMap(({ victims, headId }) => [...victims, headId]));
}

/** The segment that a layer is the newest victim of; undefined: the layer above it is folded too, or it is not folded itself. */
export function segmentFrom(view: View, poolUuid: string, newest: LayerRecord): StripRecord | undefined {
  if (!isFolded(view, poolUuid, newest)) return undefined;
  const [headId] = childrenOf(view.tx, poolUuid, newest.layerId, 1);
  if (headId === undefined) return undefined;
  const head = requireLayer(view.tx, poolUuid, headId);
  if (isFolded(view, poolUuid, head)) return undefined;
  const victims: bigint[] = [];
  for (let layer: LayerRecord | undefined = newest; layer && isFolded(view, poolUuid, layer); ) {
    victims.push(layer.layerId);
    layer = tables.layer.get(view.tx, poolUuid, layer.parentLayerId);
  }
  const grant = head.frozen ? undefined : tables.volume.get(view.tx, head.volumeUuid)?.grant;
  return {
    victims,
    headId,
    headFrozen: head.frozen,
    headClosed: grant === undefined || grant.state === 'FREE',
    headEpoch: grant?.epoch ?? 0n,
  };
}

/** The compaction that this volume's grant was given for, or that is under way under it. */
export function compactionOf(tx: Snapshot, volume: VolumeRecord): CompactingRecord | undefined {
  const { grant } = volume;
  if (grant.state === 'FREE') return undefined;
  return tables.compacting
    .list(tx, [volume.poolUuid])
    .find((one) => one.volumeUuid === volume.uuid && one.epoch === grant.epoch);
}
