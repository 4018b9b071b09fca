/** Has an agent add to a pool the slabs that its device has gained, when every host sees them (model/growth.ts). */
import { HoldfastError, type CallContext } from '@holdfast/common';
import { requirePool } from '../model/decision.ts';
import { growthBegun, growthDue, growthEnded, growthNote } from '../model/growth.ts';
import { tables, type HostRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import { runJob } from './jobs.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import type { Operations } from './operations.ts';
import { waitUntil } from './waiting.ts';

/** 32 MiB of pages for every 64 GiB are written; the agent goes on even when nobody waits any more. */
const growTimeoutMs = 600_000;
const lookTimeoutMs = 10_000;
/** The one job of its kind on a pool. */
const what = 'growth';

export async function growPoolOnDisk(core: Core, sessions: Sessions, poolUuid: string): Promise<void> {
  const { pool, due } = core.read((tx) => {
    const found = tables.pool.get(tx, poolUuid);
    return { pool: found, due: found && growthDue(tx, found) };
  });
  if (pool === undefined) return;
  if (due === undefined) {
    // An order of before a restart was carried out, or somebody sees less than when it was given.
    const pending = core.read((tx) => tables.job.get(tx, poolUuid, what));
    if (pending === undefined) await core.decide((d) => growthEnded(d, poolUuid));
    if (pending === undefined || pool.growingBytes === undefined) return;
  }
  const deviceBytes = pool.growingBytes ?? due?.deviceBytes ?? 0n;
  if (pool.growingBytes === undefined && due !== undefined) {
    await core.decide((d) => growthBegun(d, requirePool(d, poolUuid), due.deviceBytes, due.slabCount));
  }
  const ended = (d: Parameters<typeof growthEnded>[0]): void => growthEnded(d, poolUuid);
  await runJob(core, sessions, {
    pool,
    what,
    timeoutMs: growTimeoutMs,
    order: (generation) => ({ grow_device: { device_bytes: deviceBytes.toString(), generation } }),
    done: ended,
    failed: ended,
  });
  // The others would find the new slabs at their next look; a failed order is no loss.
  await Promise.allSettled(
    connectedHosts(core, sessions, poolUuid).map((host) =>
      sessions.order(host.nodeId, poolUuid, { look_at_device: {} }, lookTimeoutMs),
    ),
  );
}

function connectedHosts(core: Core, sessions: Sessions, poolUuid: string): HostRecord[] {
  return core
    .read((tx) => tables.host.list(tx, [poolUuid]))
    .filter((host) => host.state !== 'DEAD' && sessions.isConnected(host.nodeId));
}

/** Every connected host looks now; answers when the books have what all of them can use. */
export async function growNow(
  core: Core,
  sessions: Sessions,
  operations: Operations,
  poolUuid: string,
  context: CallContext,
): Promise<{ added: number }> {
  const read = () => core.read((tx) => requirePool({ tx }, poolUuid));
  const before = read().slabCount;
  const lookers = connectedHosts(core, sessions, poolUuid);
  const looks = await Promise.allSettled(
    lookers.map((host) => sessions.order(host.nodeId, poolUuid, { look_at_device: {} }, lookTimeoutMs)),
  );
  const failed = looks.flatMap((look, index) =>
    look.status === 'rejected' && look.reason instanceof OrderFailed
      ? [`${lookers[index]?.nodeId}: ${look.reason.message}`]
      : [],
  );
  if (failed.length > 0) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Pool ${read().name} does not grow, because not every node could look at its device. ${failed.join(' ')}`,
    );
  }
  // What they saw came before their answers.
  await Promise.all(lookers.flatMap((host) => sessions.get(host.nodeId)?.settled() ?? []));
  return await waitUntil(
    core,
    context,
    () => {
      const { note, due, pool } = core.read((tx) => {
        const found = requirePool({ tx }, poolUuid);
        return { pool: found, note: growthNote(tx, found), due: growthDue(tx, found) };
      });
      const added = pool.slabCount - before;
      if (note === '') return { added };
      const last = operations.lastError('grow', poolUuid);
      if (due === undefined && pool.growingBytes === undefined && note.includes('It waits for')) {
        throw new HoldfastError('FAILED_PRECONDITION', `Pool ${pool.name} does not grow yet. ${note}`);
      }
      if (last !== '')
        throw new HoldfastError('FAILED_PRECONDITION', `Pool ${pool.name} does not grow: ${last}`);
      return undefined;
    },
    () => `pool ${read().name} is growing`,
  );
}
