/**
 * Carries out what model/merging.ts decides: the merge as a job of any agent, then every holder of the layer that it went into learns it.
 * Both go on after a restart from what is on record, and doing either twice is harmless.
 */
import type { CompactionPolicy } from '../model/compaction.ts';
import { beginMerge, layerLearned, mergeEnded, mergeLearned, mergeOrder } from '../model/merging.ts';
import { stillOut } from '../model/layers.ts';
import { stillWaiting } from '../model/leaving.ts';
import { tables, type GrantRef, type LayerRecord, type PoolRecord, type SlabRun } from '../model/records.ts';
import { maxBlocks, skipAbovePermille } from './compact.ts';
import type { Core } from './core.ts';
import { runJob } from './jobs.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { layerToWire, runFromWire } from './wire.ts';

const mergeTimeoutMs = 300_000;
const learnTimeoutMs = 60_000;

/** One merge of the segment below a head, and its learning. Goes on with the one on record. */
export async function merge(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  newestId: bigint,
  policy: CompactionPolicy,
): Promise<void> {
  const pool = core.read((tx) => tables.pool.get(tx, poolUuid));
  const record =
    core.read((tx) => tables.merging.get(tx, poolUuid, newestId)) ??
    (await core.decide((d) => beginMerge(d, poolUuid, newestId, policy)));
  if (pool === undefined || record === undefined) return;
  if (record.waiting === undefined) await moveUp(core, sessions, pool, newestId, policy.intervalMs);
  await learn(core, sessions, poolUuid, newestId);
}

async function moveUp(
  core: Core,
  sessions: Sessions,
  pool: PoolRecord,
  newestId: bigint,
  intervalMs: number,
): Promise<void> {
  const order = core.read((tx) => {
    const record = tables.merging.get(tx, pool.uuid, newestId);
    return record && mergeOrder(tx, pool.uuid, record);
  });
  if (order === undefined) return;
  const wire = (layer: LayerRecord & { slabs: SlabRun[] }): object => layerToWire(layer, layer.slabs);
  try {
    await runJob(core, sessions, {
      pool,
      what: `merge of layer ${newestId}`,
      timeoutMs: mergeTimeoutMs,
      order: (generation) => ({
        merge_layers: {
          victims: order.victims.map(wire),
          head: wire(order.head),
          skip_above_permille: skipAbovePermille,
          max_blocks: maxBlocks.toString(),
          generation,
          sequence: order.sequence.toString(),
        },
      }),
      done: (d, { merge: result }, by) => {
        const outcome = {
          movedBlocks: BigInt(result?.moved_blocks ?? 0),
          complete: result?.complete === true,
          noSpace: result?.no_space === true,
          spare: (result?.spare ?? []).map(runFromWire),
        };
        mergeEnded(d, pool.uuid, newestId, by, outcome, intervalMs);
      },
      failed: (d, by) => mergeEnded(d, pool.uuid, newestId, by, undefined, intervalMs),
    });
  } catch (error) {
    // Answered with an error: whatever it had moved is learned, and it is tried again later.
    const answered = core.read((tx) => tables.merging.get(tx, pool.uuid, newestId))?.waiting !== undefined;
    if (!(error instanceof OrderFailed) || !answered) throw error;
    core.logger.warn({ pool: pool.uuid, layer: newestId.toString() }, `A merge failed: ${error.message}`);
  }
}

/** Until every grant that may not know what was merged has learned it or is over. */
async function learn(core: Core, sessions: Sessions, poolUuid: string, newestId: bigint): Promise<void> {
  for (;;) {
    const found = core.read((tx) => {
      const record = tables.merging.get(tx, poolUuid, newestId);
      if (record?.waiting === undefined) return undefined;
      const { head } = mergeOrder(tx, poolUuid, record);
      return { head, waiting: stillWaiting(tx, { waiting: record.waiting }) };
    });
    if (found === undefined || core.stopped.signal.aborted) return;
    if (found.waiting.length === 0) return await core.decide((d) => mergeLearned(d, poolUuid, newestId));
    await Promise.all(
      found.waiting.map((ref) =>
        ask(core, sessions, poolUuid, newestId, layerToWire(found.head, found.head.slabs), ref),
      ),
    );
    const left = core.read((tx) => {
      const waiting = tables.merging.get(tx, poolUuid, newestId)?.waiting ?? [];
      return stillWaiting(tx, { waiting });
    });
    if (left.length > 0) await core.clock.sleep(1000, core.stopped.signal);
  }
}

/** Asks one holder that has the volume open; others are over soon, or open it in a moment. */
async function ask(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  newestId: bigint,
  layer: object,
  ref: GrantRef,
): Promise<void> {
  const isOpen = core.read((tx) => stillOut(tx, ref))?.state === 'OPEN';
  if (!isOpen || !sessions.isConnected(ref.holder.nodeId)) return;
  try {
    const order = { learn_layer: { volume_uuid: ref.volumeUuid, epoch: ref.epoch.toString(), layer } };
    await sessions.order(ref.holder.nodeId, poolUuid, order, learnTimeoutMs);
  } catch (error) {
    if (!(error instanceof OrderFailed)) throw error;
    core.logger.info(
      { volume: ref.volumeUuid, node: ref.holder.nodeId },
      `Learning what was merged: ${error.message}`,
    );
    return;
  }
  await core.decide((d) => layerLearned(d, poolUuid, newestId, ref));
}
