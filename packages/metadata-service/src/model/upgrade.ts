/** Records of databases that were written before there were snapshots: what they lack is added once, at the start of a term. */
import type { Transaction } from '../store/store.ts';
import { unused } from './layers.ts';
import { tables, type LayerRecord, type PublicationRecord, type VolumeRecord } from './records.ts';

const version = 2n;

type OldVolume = Omit<
  VolumeRecord,
  'lastEpoch' | 'readers' | 'publications' | 'sourceSnapshotUuid' | 'sourceVolumeUuid'
> & { publication?: PublicationRecord | null };

export function upgradeRecords(tx: Transaction): void {
  if ((tables.counter.get(tx, 'record-version') ?? 1n) >= version) return;
  tables.counter.put(tx, version, 'record-version');
  for (const [[pool, volume, host]] of tables.revoking.entries(tx)) {
    if (host === undefined) tx.delete(`revoking/${pool}/${volume}`);
  }
  for (const old of tables.volume.list(tx) as OldVolume[]) {
    const { publication, ...kept } = old;
    const volume: VolumeRecord = {
      lastEpoch: old.grant.epoch,
      readers: [],
      publications: publication ? [publication] : [],
      sourceSnapshotUuid: '',
      sourceVolumeUuid: '',
      ...kept,
    };
    tables.volume.put(tx, volume, volume.uuid);
    const { state, holder } = volume.grant;
    if (state === 'REVOKING' && holder !== null) {
      tables.revoking.put(tx, true, volume.poolUuid, volume.uuid, holder.hostId);
    }
  }
  for (const [[pool], layer] of tables.layer.entries(tx)) {
    const whole: LayerRecord = { ...unused, ...layer };
    tables.layer.put(tx, whole, pool as string, layer.layerId);
  }
}
