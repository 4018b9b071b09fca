/** Has an agent read the pages of the slabs that a dead host held, so that each goes to its layer or is free again. */
import { orphansScanned, type SlabReading } from '../model/allocation.ts';
import { tables, type HostLife, type SlabRun } from '../model/records.ts';
import type { Core } from './core.ts';
import { anyLiveHost, requireOurs } from './helpers.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { runToWire, slabNumber } from './wire.ts';

/** Slabs in one order: 32 MiB of pages. */
export const slabsPerScan = 4096;
const timeoutMs = 120_000;

export async function scanOrphans(
  core: Core,
  sessions: Sessions,
  poolUuid: string,
  life: HostLife,
): Promise<void> {
  for (;;) {
    const found = core.read((tx) => ({
      pool: tables.pool.get(tx, poolUuid),
      orphan: tables.orphan.get(tx, poolUuid, life.hostId, life.generation),
    }));
    if (found.pool === undefined || found.orphan === undefined || found.orphan.runs.length === 0) return;
    requireOurs(core, found.pool);
    const host = anyLiveHost(core, sessions, found.pool);
    const readings = await scanSlabs(sessions, host.nodeId, poolUuid, head(found.orphan.runs, slabsPerScan));
    await core.decide((d) => orphansScanned(d, poolUuid, life, readings));
  }
}

/** @throws OrderFailed also when the answer leaves slabs out: an unread page must not pass for a free one. */
export async function scanSlabs(
  sessions: Sessions,
  nodeId: string,
  poolUuid: string,
  runs: readonly SlabRun[],
): Promise<SlabReading[]> {
  const result = await sessions.order(
    nodeId,
    poolUuid,
    { scan_slabs: { runs: runs.map(runToWire) } },
    timeoutMs,
  );
  const readings = (result.slab_owners?.owners ?? []).map((owner) => ({
    slab: slabNumber(owner.slab),
    generation: BigInt(owner.generation),
    layerId: BigInt(owner.layer_id),
    state: owner.state,
  }));
  const read = new Set(readings.map((reading) => reading.slab));
  for (const run of runs) {
    for (let slab = run.first; slab < run.first + run.count; slab++) {
      if (!read.has(slab))
        throw new OrderFailed('INCOMPLETE', `The agent of ${nodeId} left out slab ${slab} of a scan.`);
    }
  }
  return readings;
}

/** The first `count` slabs of runs. */
function head(runs: readonly SlabRun[], count: number): SlabRun[] {
  const taken: SlabRun[] = [];
  let left = count;
  for (const run of runs) {
    if (left === 0) break;
    const take = Math.min(left, run.count);
    taken.push({ ...run, count: take });
    left -= take;
  }
  return taken;
}
