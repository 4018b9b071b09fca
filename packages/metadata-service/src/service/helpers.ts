/** Which agent to ask. */
import { mayDecide } from '../model/decision.ts';
import { tables, type HostLife, type HostRecord, type PoolRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import { OrderFailed, type Sessions } from './sessions.ts';

/** Hosts with a live lease on the pool whose agents are connected, without `except`; those that failed lately come last. */
export function liveHosts(core: Core, sessions: Sessions, poolUuid: string, except = ''): HostRecord[] {
  const failure = (host: HostRecord): number => sessions.get(host.nodeId)?.lastFailureMs ?? 0;
  return core
    .read((tx) => tables.host.list(tx, [poolUuid]))
    .filter((host) => host.state === 'LIVE' && host.nodeId !== except && sessions.isConnected(host.nodeId))
    .sort((a, b) => failure(a) - failure(b));
}

/** One of them. @throws OrderFailed UNREACHABLE */
export function anyLiveHost(core: Core, sessions: Sessions, pool: PoolRecord, attempt = 0): HostRecord {
  const hosts = liveHosts(core, sessions, pool.uuid);
  const host = hosts[attempt % Math.max(1, hosts.length)];
  if (host === undefined) {
    throw new OrderFailed('UNREACHABLE', `No agent with a live lease on pool ${pool.name} is connected.`);
  }
  return host;
}

export function isLive(core: Core, sessions: Sessions, poolUuid: string, life: HostLife): boolean {
  const host = core.read((tx) => tables.host.get(tx, poolUuid, life.hostId));
  return (
    host?.state === 'LIVE' &&
    host.generation === life.generation &&
    host.nodeId === life.nodeId &&
    sessions.isConnected(life.nodeId)
  );
}

/** Orders that change a pool are given only while it is ours. @throws OrderFailed */
export function requireOurs(core: Core, pool: PoolRecord): void {
  const ours = core.read((tx) => {
    const now = tables.pool.get(tx, pool.uuid);
    return (
      now !== undefined &&
      mayDecide({ service: core.service, refusal: (uuid: string) => core.refusals.get(uuid) }, now)
    );
  });
  if (!ours) {
    throw new OrderFailed(
      'UNREACHABLE',
      `Pool ${pool.name} is not yet claimed for term ${core.service.term}.`,
    );
  }
}
