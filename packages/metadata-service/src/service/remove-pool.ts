/** A pool that is being removed: its hosts let the device go, then it is forgotten (model/removal.ts). */
import { applyHost } from '../model/hosts.ts';
import { endRemoval } from '../model/removal.ts';
import { tables, type HostRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { acceptedPools } from './claim.ts';

const leaveTimeoutMs = 30_000;

/** What it waits for, a sentence; empty: nothing that anybody could help with. */
export function removalProgress(core: Core, sessions: Sessions, poolUuid: string): string {
  return alive(core, poolUuid)
    .map((host) =>
      sessions.isConnected(host.nodeId) && host.state !== 'FENCING' && host.state !== 'CUTTING'
        ? `${host.nodeId} is letting the device go`
        : `${host.nodeId} is ${host.state} and its agent is ${sessions.isConnected(host.nodeId) ? 'connected' : 'away'}: bring ` +
          `it back, or run: holdfast node fence ${host.nodeId} --pool ${poolUuid}`,
    )
    .join('; ');
}

function alive(core: Core, poolUuid: string): HostRecord[] {
  return core.read((tx) => tables.host.list(tx, [poolUuid])).filter((host) => host.state !== 'DEAD');
}

/** @throws OrderFailed: it is to be tried again */
export async function removePool(core: Core, sessions: Sessions, poolUuid: string): Promise<void> {
  // Nobody may join any more: those that were told that they may are told so.
  for (const session of sessions.all()) session.welcome(core, acceptedPools(core, session));
  const hosts = alive(core, poolUuid);
  // Who is away may have to be fenced, and that takes somebody who is there.
  const away = hosts.filter(
    (host) => !['LIVE', 'JOINING'].includes(host.state) || !sessions.isConnected(host.nodeId),
  );
  if (away.length > 0)
    throw new OrderFailed('UNREACHABLE', `It waits: ${removalProgress(core, sessions, poolUuid)}.`);
  for (const host of hosts) {
    const generation = host.generation.toString();
    await sessions.order(host.nodeId, poolUuid, { leave_pool: { generation } }, leaveTimeoutMs);
    await core.decide((d) => {
      const pool = tables.pool.get(d.tx, poolUuid);
      if (pool === undefined) return;
      applyHost(d, pool, host.hostId, { type: 'stop-acknowledged', generation: host.generation });
    });
  }
  await core.decide((d) => endRemoval(d, poolUuid));
  core.refusals.delete(poolUuid);
}
