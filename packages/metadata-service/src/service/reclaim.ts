/** Carries out what model/reclaim.ts decides: strips, the forgetting and wiping of slabs, the wiping of layers. */
import { requirePool, type Decision } from '../model/decision.ts';
import type { CompactionPolicy } from '../model/compaction.ts';
import { leavingWiped, slabsForgotten, stillWaiting } from '../model/leaving.ts';
import {
  beginStrip,
  layerForgotten,
  layerWiped,
  reclaimable,
  stripEnded,
  stripOrder,
} from '../model/reclaim.ts';
import { beginRelink, relinkEnded, removeFromChain, stillOut } from '../model/layers.ts';
import { tables, type GrantRef, type LayerRecord, type PoolRecord, type SlabRun } from '../model/records.ts';
import { slabsOf } from '../model/slabs.ts';

import type { Core } from './core.ts';
import { anyLiveHost } from './helpers.ts';
import { runJob } from './jobs.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { layerToWire, runFromWire, runToWire } from './wire.ts';
import { wipeTimeoutMs } from './wipe.ts';

const forgetTimeoutMs = 30_000;
const stripTimeoutMs = 300_000;
const relinkTimeoutMs = 15_000;

/** One strip of the segment below a head. Goes on with the one on record. */
export async function strip(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  newestId: bigint,
  intervalMs: number,
): Promise<void> {
  const pool = core.read((tx) => tables.pool.get(tx, poolUuid));
  const order =
    core.read((tx) => stripOrder(tx, poolUuid, newestId)) ??
    (await core.decide((d) => beginStrip(d, poolUuid, newestId)));
  if (pool === undefined || order === undefined) return;
  const wire = (layer: LayerRecord & { slabs: SlabRun[] }): object => layerToWire(layer, layer.slabs);
  try {
    await runJob(core, sessions, {
      pool,
      what: `strip of layer ${newestId}`,
      timeoutMs: stripTimeoutMs,
      order: (generation) => ({
        strip_layers: {
          victims: order.victims.map(wire),
          covers: order.head === undefined ? [] : [wire(order.head)],
          generation,
        },
      }),
      done: (d, result, by) => {
        const { emptied = [], cleared_blocks = '0', uses = [] } = result.strip ?? {};
        const outcome = {
          emptied: emptied.map(runFromWire),
          clearedBlocks: BigInt(cleared_blocks),
          uses: uses.map((use) => ({
            layerId: BigInt(use.layer_id),
            liveBlocks: BigInt(use.live_blocks),
          })),
        };
        stripEnded(d, poolUuid, newestId, by, outcome, intervalMs);
      },
      failed: (d, by) => stripEnded(d, poolUuid, newestId, by, undefined, intervalMs),
    });
  } catch (error) {
    // Answered with an error: it is off the record, and planned anew when it is due again.
    const gone = core.read((tx) => tables.strip.get(tx, poolUuid, newestId)) === undefined;
    if (!(error instanceof OrderFailed) || !gone) throw error;
    core.logger.warn({ pool: poolUuid, layer: newestId.toString() }, `A strip failed: ${error.message}`);
  }
}

/** Slabs that left a layer: every holder that was told of them forgets them or ends, then they are wiped. */
export async function releaseSlabs(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  layerId: bigint,
  sequence: bigint,
): Promise<void> {
  for (;;) {
    const found = core.read((tx) => {
      const record = tables.leaving.get(tx, poolUuid, layerId, sequence);
      return {
        pool: tables.pool.get(tx, poolUuid),
        layer: tables.layer.get(tx, poolUuid, layerId),
        record,
        waiting: record === undefined ? [] : stillWaiting(tx, record),
      };
    });
    const { pool, layer, record, waiting } = found;
    if (pool === undefined || layer === undefined || record === undefined || core.stopped.signal.aborted)
      return;
    if (waiting.length === 0 && !core.pinned(poolUuid, layerId)) {
      return await wipe(core, sessions, pool, layer, record.runs, sequence);
    }
    await Promise.all(
      waiting.map((ref) =>
        forget(core, sessions, poolUuid, ref, { slabs: record.runs.map(runToWire), layers: [] }, (d) =>
          slabsForgotten(d, poolUuid, layerId, sequence, ref),
        ),
      ),
    );
    const left = core.read((tx) => {
      const now = tables.leaving.get(tx, poolUuid, layerId, sequence);
      return now === undefined ? [] : stillWaiting(tx, now);
    });
    if (left.length > 0 || core.pinned(poolUuid, layerId)) await core.clock.sleep(1000, core.stopped.signal);
  }
}

/** Asks one holder that has the volume open; others are over soon, or open it in a moment. */
async function forget(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  ref: GrantRef,
  what: { slabs: object[]; layers: string[] },
  forgotten: (d: Decision) => void,
): Promise<void> {
  const isOpen = core.read((tx) => stillOut(tx, ref))?.state === 'OPEN';
  if (!isOpen || !sessions.isConnected(ref.holder.nodeId)) return;
  try {
    await sessions.order(
      ref.holder.nodeId,
      poolUuid,
      {
        forget_slabs: {
          volume_uuid: ref.volumeUuid,
          epoch: ref.epoch.toString(),
          ...what,
        },
      },
      forgetTimeoutMs,
    );
  } catch (error) {
    if (!(error instanceof OrderFailed)) throw error;
    core.logger.info(
      { volume: ref.volumeUuid, node: ref.holder.nodeId },
      `Forgetting slabs or layers: ${error.message}`,
    );
    return;
  }
  await core.decide(forgotten);
}

/** A layer that was removed from its chain: holders that have it in theirs drop it, so that its slot comes back while they go on. */
export async function forgetLayer(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  layerId: bigint,
): Promise<void> {
  const removed = core.read((tx) => tables.layer.get(tx, poolUuid, layerId))?.removed;
  if (!removed) return;
  const waiting = core.read((tx) => stillWaiting(tx, removed));
  await Promise.all(
    waiting.map((ref) =>
      forget(core, sessions, poolUuid, ref, { slabs: [], layers: [layerId.toString()] }, (d) =>
        layerForgotten(d, poolUuid, layerId, ref),
      ),
    ),
  );
}

async function wipe(
  core: Core,
  sessions: Sessions,
  pool: PoolRecord,
  layer: LayerRecord,
  runs: readonly SlabRun[],
  sequence: bigint,
): Promise<void> {
  await runJob(core, sessions, {
    pool,
    what: `wipe of slabs ${sequence} of layer ${layer.layerId}`,
    timeoutMs: wipeTimeoutMs,
    order: (generation) => ({
      wipe_layers: { layers: [layerToWire(layer, runs)], tombstone: false, generation },
    }),
    done: (d, _result, by) =>
      leavingWiped(d, pool.uuid, layer.layerId, sequence, `nobody can map them; wiped by ${by.nodeId}`),
  });
}

/**
 * A strip without slabs writes the layer's record, with the parent that the order names. Whether it did is read from the disk: the
 * slots of what the record named before are free only then.
 */
async function relink(core: Core, sessions: Sessions, pool: PoolRecord, layerId: bigint): Promise<void> {
  const plan = await core.decide((d) => beginRelink(d, pool.uuid, layerId));
  if (plan === undefined) return;
  const what = `relink of layer ${layerId}`;
  const { layer, parentId, head, witness } = plan;
  try {
    await runJob(core, sessions, {
      pool,
      what,
      timeoutMs: relinkTimeoutMs,
      order: (generation) => ({
        strip_layers: {
          victims: [layerToWire({ ...layer, diskParentId: parentId }, [])],
          covers: [layerToWire(head, [])],
          generation,
        },
      }),
      done: () => undefined,
    });
  } catch (error) {
    const over = core.read((tx) => tables.job.get(tx, pool.uuid, what)) === undefined;
    if (!(error instanceof OrderFailed) || !over) throw error;
    core.logger.warn(
      { pool: pool.uuid, layer: layerId.toString() },
      `A layer keeps its parent: ${error.message}`,
    );
  }
  const host = anyLiveHost(core, sessions, pool);
  const order = { read_volume_record: { slot: witness.slot, volume_uuid: '' } };
  const { volume_record: record } = await sessions.order(host.nodeId, pool.uuid, order, relinkTimeoutMs);
  const ours = record?.found === true && record.volume_id === witness.volumeId.toString();
  const named = ours
    ? record.layers.find((one) => one.layer_id === layerId.toString())?.parent_layer_id
    : undefined;
  await core.decide((d) =>
    relinkEnded(d, requirePool(d, pool.uuid), layerId, named === undefined ? undefined : BigInt(named)),
  );
}

/** A layer that nothing needs, with all its slabs; or one that left its chain, without any: both leave a tombstone. */
export async function wipeLayer(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  layerId: bigint,
): Promise<void> {
  const before = core.read((tx) => ({
    pool: tables.pool.get(tx, poolUuid),
    layer: tables.layer.get(tx, poolUuid, layerId),
  }));
  if (before.pool !== undefined && before.layer?.removed?.wiped === false) {
    await relink(core, sessions, before.pool, layerId);
  }
  const found = core.read((tx) => ({
    pool: tables.pool.get(tx, poolUuid),
    layer: tables.layer.get(tx, poolUuid, layerId),
    slabs: slabsOf(tx, poolUuid, layerId),
  }));
  const { pool, layer, slabs } = found;
  if (pool === undefined || layer === undefined || layer.removed?.wiped === true) return;
  const why = layer.removed === null ? 'no chain has it' : 'no grant that knows it is out';
  await runJob(core, sessions, {
    pool,
    what: `wipe of layer ${layerId}`,
    timeoutMs: wipeTimeoutMs,
    order: (generation) => ({
      wipe_layers: {
        layers: [layerToWire(layer, slabs)],
        tombstone: true,
        generation,
      },
    }),
    done: (d, _result, by) => layerWiped(d, poolUuid, layerId, `${why}; wiped by ${by.nodeId}`),
  });
}

/** Layers without slabs leave their chains: that needs nobody's help. */
export async function removeLayers(core: Core, poolUuid: string, policy: CompactionPolicy): Promise<void> {
  await core.decide((d) => {
    for (const work of reclaimable(d, poolUuid, d.nowUnixMs, policy)) {
      if (work.type === 'remove') removeFromChain(d, poolUuid, work.layerId);
    }
  });
}
