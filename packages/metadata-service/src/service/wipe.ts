/** Has an agent remove a deleted volume from its pool, then frees its slabs and slots. */
import { tables } from '../model/records.ts';
import { volumeWiped, wipeOf } from '../model/volumes.ts';
import type { Core } from './core.ts';
import { anyLiveHost, requireOurs } from './helpers.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { layerToWire } from './wire.ts';

/** Discarding a large volume takes its time; the agent goes on even when nobody waits any more. */
const timeoutMs = 300_000;

export async function wipeVolume(core: Core, sessions: Sessions, uuid: string): Promise<void> {
  const found = core.read((tx) => {
    const wipe = wipeOf(tx, uuid);
    if (wipe === undefined) return undefined;
    const holder = wipe.volume.grant.holder;
    return {
      ...wipe,
      pool: tables.pool.get(tx, wipe.volume.poolUuid),
      orphans:
        holder === null
          ? undefined
          : tables.orphan.get(tx, wipe.volume.poolUuid, holder.hostId, holder.generation),
    };
  });
  if (found?.pool === undefined) return;
  const { volume, layers, pool, orphans } = found;
  if (orphans !== undefined && orphans.runs.length > 0) {
    throw new OrderFailed(
      'UNREACHABLE',
      `Volume ${volume.name} is wiped when the slabs of its dead holder have been read.`,
    );
  }
  requireOurs(core, pool);
  const host = anyLiveHost(core, sessions, pool);
  await sessions.order(
    host.nodeId,
    pool.uuid,
    {
      wipe_volume: {
        volume_id: volume.volumeId.toString(),
        slot: volume.slot,
        closed_epoch: volume.grant.epoch.toString(),
        layers: layers.map((layer) => layerToWire(layer, layer.slabs)),
      },
    },
    timeoutMs,
  );
  await core.decide((d) => volumeWiped(d, uuid, `wiped by ${host.nodeId}`));
}
