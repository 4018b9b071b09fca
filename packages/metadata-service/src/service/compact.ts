/**
 * Carries out what model/compaction.ts decides. An order is given to whoever may write the volume: its holder, or, for a closed one, a
 * live host under a grant of its own. It is on record before it is sent, under the epoch of that grant; when the grant is over,
 * nothing of it is in flight, and the record goes. Doing it twice is harmless.
 */
import { HoldfastError } from '@holdfast/common';
import type { CompactVolume } from '@holdfast/proto';
import {
  beginCompaction,
  compactionEnded,
  compactionFailed,
  compactionOrder,
  type CompactionOutcome,
  type CompactionPolicy,
} from '../model/compaction.ts';
import type { Decision } from '../model/decision.ts';
import { isMaintenance } from '../model/grant.ts';
import { lifeOf } from '../model/hosts.ts';
import { layersOf } from '../model/layers.ts';
import { jobEnded } from '../model/reclaim.ts';
import { tables, type CompactingRecord, type PoolRecord } from '../model/records.ts';
import { slabsOf } from '../model/slabs.ts';
import type { Core } from './core.ts';
import { isLive, liveHosts, requireOurs } from './helpers.ts';
import { runJob } from './jobs.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { grantToWire, layerToWire } from './wire.ts';

/** 64 MiB: a cut, a stage or a delete that comes meanwhile waits for no more than that. */
export const maxBlocks = 16_384;
/** Slabs of whose chunks the top would need more than this share, in thousandths, stay as they are. */
export const skipAbovePermille = 700;
const timeoutMs = 300_000;

export type CompactionRun = CompactionOutcome | 'failed';

/** One order for the segment below a head. Goes on with the one on record. */
export async function compact(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  newestId: bigint,
  policy: CompactionPolicy,
  onRun: (run: CompactionRun) => void,
): Promise<void> {
  const pool = core.read((tx) => tables.pool.get(tx, poolUuid));
  const record =
    core.read((tx) => tables.compacting.get(tx, poolUuid, newestId)) ??
    (await begin(core, sessions, poolUuid, newestId, policy));
  if (pool === undefined || record === undefined) return;
  // After a restart agents come back before anybody is asked, or asked to let go.
  requireOurs(core, pool);
  const what = `compaction of layer ${newestId} under epoch ${record.epoch}`;
  const fail = async (why: string): Promise<void> => {
    core.logger.warn({ pool: poolUuid, volume: record.volumeUuid }, `A compaction failed: ${why}`);
    await core.decide((d) => failed(d, poolUuid, newestId, what, policy));
    onRun('failed');
  };
  const order = core.read((tx) => compactionOrder(tx, record));
  if (order === undefined) return await fail(`the grant of epoch ${record.epoch} is over.`);
  const maintained = isMaintenance(order.volume.grant);
  if (maintained && !isLive(core, sessions, poolUuid, record.holder)) {
    return await fail(`the agent of ${record.holder.nodeId} went away.`);
  }
  let run: CompactionOutcome | undefined;
  try {
    await runJob(core, sessions, {
      pool,
      what,
      life: record.holder,
      timeoutMs,
      order: (generation) => ({ compact_volume: toWire(core, pool, record, order, generation) }),
      done: (d, { compact: result }) => {
        run = {
          movedBlocks: BigInt(result?.moved_blocks ?? 0),
          complete: result?.complete === true,
          noSpace: result?.no_space === true,
        };
        compactionEnded(d, poolUuid, newestId, run, policy.intervalMs);
      },
    });
  } catch (error) {
    if (!(error instanceof OrderFailed) || core.stopped.signal.aborted) throw error;
    // A writer that is away, or slow, has it under its grant and is asked again; who answered has ended it.
    const silent = error.code === 'UNREACHABLE' || error.code === 'TIMEOUT';
    if (silent && !maintained) throw error;
    await fail(error.message);
  }
  if (run !== undefined) onRun(run);
}

async function begin(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  newestId: bigint,
  policy: CompactionPolicy,
): Promise<CompactingRecord | undefined> {
  const [host] = liveHosts(core, sessions, poolUuid);
  try {
    return await core.decide((d) =>
      beginCompaction(d, poolUuid, newestId, policy, host === undefined ? undefined : lifeOf(host)),
    );
  } catch (error) {
    // Something else came first: it is looked at again.
    if (error instanceof HoldfastError && error.code === 'UNAVAILABLE') return undefined;
    throw error;
  }
}

function failed(
  d: Decision,
  poolUuid: string,
  newestId: bigint,
  what: string,
  policy: CompactionPolicy,
): void {
  jobEnded(d, poolUuid, what);
  compactionFailed(d, poolUuid, newestId, policy.intervalMs);
}

function toWire(
  core: Core,
  pool: PoolRecord,
  record: CompactingRecord,
  { volume, sources }: NonNullable<ReturnType<typeof compactionOrder>>,
  generation: string,
): CompactVolume {
  const layers = (): object[] =>
    core.read((tx) =>
      layersOf(tx, volume).map((layer) => layerToWire(layer, slabsOf(tx, pool.uuid, layer.layerId))),
    );
  return {
    volume_uuid: volume.uuid,
    epoch: record.epoch.toString(),
    sources: sources.map((layer) => layerToWire(layer, layer.slabs)),
    skip_above_permille: skipAbovePermille,
    max_blocks: maxBlocks.toString(),
    generation,
    ...(isMaintenance(volume.grant) ? { grant: grantToWire(volume, volume.grant, layers()) } : {}),
  };
}
