/** Has an agent remove a deleted volume from its pool, then frees its slabs and slots. */
import { tables } from '../model/records.ts';
import { volumeWiped, wipeOf } from '../model/volumes.ts';
import type { Core } from './core.ts';
import { runJob } from './jobs.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { layerToWire } from './wire.ts';

/** Discarding a large volume takes its time; the agent goes on even when nobody waits any more. */
export const wipeTimeoutMs = 300_000;

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
  const { volume, top, slabs, pool, orphans } = found;
  if (orphans !== undefined && orphans.runs.length > 0) {
    throw new OrderFailed(
      'UNREACHABLE',
      `Volume ${volume.name} is wiped when the slabs of its dead holder have been read.`,
    );
  }
  await runJob(core, sessions, {
    pool,
    what: `wipe of volume ${uuid}`,
    timeoutMs: wipeTimeoutMs,
    order: (generation) => ({
      wipe_volume: {
        volume_id: volume.volumeId.toString(),
        slot: volume.slot,
        closed_epoch: volume.grant.epoch.toString(),
        layers: [layerToWire(top, slabs)],
        generation,
      },
    }),
    done: (d, _result, by) => volumeWiped(d, uuid, `wiped by ${by.nodeId}`),
  });
}
