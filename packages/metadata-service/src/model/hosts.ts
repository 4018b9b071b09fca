/** Nodes on pools: joining, dying, and what both do to grants. Every step of the host machine goes through applyHost(). */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, requireAuthority, requireLife, requirePool, stale, type Decision } from './decision.ts';
import { alsoOff, stepHost, type Death, type HostEvent, type HostOutcome } from './host.ts';
import { tables, type HostLife, type HostRecord, type PoolRecord } from './records.ts';
import { orphanAhead } from './slabs.ts';
import { voidGrants } from './grants.ts';
import { joinWithRoom } from './growth.ts';
import type { PoolSighting } from './pools.ts';

export function lifeOf(host: HostRecord): HostLife {
  return { hostId: host.hostId, generation: host.generation, nodeId: host.nodeId };
}

/** A node's slot on a pool, whatever its state. */
export function hostOfNode(
  d: { readonly tx: Snapshot },
  poolUuid: string,
  nodeId: string,
): HostRecord | undefined {
  return tables.host.list(d.tx, [poolUuid]).find((host) => host.nodeId === nodeId);
}

/** Steps the machine and stores the outcome: the record, the audit, and for a death the void grants, in one transaction. */
export function applyHost(d: Decision, pool: PoolRecord, hostId: number, event: HostEvent): HostOutcome {
  const before = tables.host.get(d.tx, pool.uuid, hostId);
  const outcome = stepHost(before, event, {
    poolUuid: pool.uuid,
    hostId,
    fencing: pool.fencing,
    nowUnixMs: d.nowUnixMs,
  });
  if (outcome.type !== 'changed') return outcome;
  if (outcome.died !== undefined) bury(d, pool, hostId, outcome.died);
  tables.host.put(d.tx, outcome.next, pool.uuid, hostId);
  if (outcome.audit !== 'dead') {
    audit(d, outcome.audit, {
      poolUuid: pool.uuid,
      nodeId: outcome.next.nodeId,
      generation: outcome.next.generation,
      detail: outcome.alarm ?? outcome.next.fence?.reason ?? '',
    });
  }
  return outcome;
}

function bury(d: Decision, pool: PoolRecord, hostId: number, death: Death): void {
  audit(d, 'dead', {
    poolUuid: pool.uuid,
    nodeId: death.nodeId,
    generation: death.generation,
    proof: death.proof,
  });
  voidGrants(d, pool.uuid, hostId, death);
  orphanAhead(d.tx, pool, { hostId, ...death });
}

export interface JoinRequest {
  poolUuid: string;
  nodeId: string;
  machineId: string;
  bootId: string;
  lockPath: string;
  previousIoDead: boolean;
  /** How the node sees the pool's device. */
  room: Pick<PoolSighting, 'slabCount' | 'deviceBytes' | 'slabsPossible'>;
}

/** A node joins a pool: its old slot if it has one, else a slot never used, else one whose last owner is long dead. */
export function joinPool(d: Decision, request: JoinRequest): HostRecord {
  const pool = requirePool(d, request.poolUuid);
  requireAuthority(d, pool);
  if (pool.removing) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Pool ${pool.name} is being removed: nobody joins it any more.`,
    );
  }
  for (const [name, value] of Object.entries({ machine_id: request.machineId, boot_id: request.bootId })) {
    if (value === '')
      throw new HoldfastError('INVALID_ARGUMENT', `JoinPool needs ${name}: it identifies the machine.`);
  }
  const node = tables.node.get(d.tx, request.nodeId);
  if (node !== undefined && (node.bootId !== request.bootId || node.machineId !== request.machineId)) {
    throw stale(
      `the join is from boot ${request.bootId}, ${request.nodeId} was last seen under ${node.bootId}`,
    );
  }
  const hostId = slotFor(d, pool, request.nodeId);
  const { room, ...join } = request;
  const outcome = applyHost(d, pool, hostId, { type: 'join', ...join });
  if (outcome.type !== 'stale') joinWithRoom(d, pool, requireHost(d, pool, hostId), room);
  if (outcome.type === 'same') return requireHost(d, pool, hostId);
  if (outcome.type === 'stale') {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${request.nodeId} cannot join pool ${pool.name}: ${outcome.why}.`,
    );
  }
  return outcome.next;
}

function requireHost(d: Decision, pool: PoolRecord, hostId: number): HostRecord {
  const host = tables.host.get(d.tx, pool.uuid, hostId);
  if (host === undefined)
    throw new HoldfastError('INTERNAL', `Host ${hostId} of pool ${pool.name} is missing.`);
  return host;
}

function slotFor(d: Decision, pool: PoolRecord, nodeId: string): number {
  const hosts = tables.host.list(d.tx, [pool.uuid]);
  const own = hosts.find((host) => host.nodeId === nodeId);
  if (own !== undefined) return own.hostId;
  const used = new Set(hosts.map((host) => host.hostId));
  for (let hostId = 0; hostId < pool.hostSlots; hostId++) if (!used.has(hostId)) return hostId;
  const oldest = hosts
    .filter(
      (host) => host.state === 'DEAD' && tables.orphan.list(d.tx, [pool.uuid, host.hostId]).length === 0,
    )
    .sort((a, b) => a.sinceUnixMs - b.sinceUnixMs)[0];
  if (oldest === undefined) {
    throw new HoldfastError(
      'TOO_MANY',
      `All ${pool.hostSlots} host slots of pool ${pool.name} belong to living nodes. Fence or shut down one of them.`,
    );
  }
  return oldest.hostId;
}

export function poolReady(d: Decision, poolUuid: string, life: HostLife): void {
  const pool = requirePool(d, poolUuid);
  const host = requireLife(d, poolUuid, life);
  if (host.state === 'LIVE') return;
  const outcome = applyHost(d, pool, life.hostId, {
    type: 'ready',
    generation: life.generation,
    // Reservations, the one class that has something to prove here, are refused when the pool is first seen.
    classProved: pool.fencing !== 'reservations',
  });
  if (outcome.type === 'stale') throw stale(outcome.why);
}

/** Intent to fence: durable before anything is written to the disk. Returns the host as it is now. */
export function fenceHost(d: Decision, pool: PoolRecord, host: HostRecord, reason: string): HostRecord {
  const outcome = applyHost(d, pool, host.hostId, { type: 'suspect', generation: host.generation, reason });
  return outcome.type === 'changed' ? outcome.next : host;
}

/**
 * Somebody who knows says that a node's machine is off: the proof of class C. A life that is not being fenced yet is fenced
 * with it; the word counts when the fence page is durable, so that the machine finds it when it comes back. Of a life that is
 * dead for another reason it is kept beside that: not every proof says that the machine is off.
 */
export function confirmOff(d: Decision, nodeId: string, by: string): HostRecord[] {
  return hostsOfNode(d, nodeId).map(({ pool, host }) => {
    if (pool.fencing !== 'manual' && pool.fencing !== 'lease-only') return host;
    const dead = host.state === 'DEAD' ? alsoOff(host, by) : undefined;
    if (dead === host) return host;
    audit(d, 'confirm-off', {
      poolUuid: pool.uuid,
      nodeId,
      generation: host.generation,
      proof: `${by} says that the machine is off`,
    });
    if (dead !== undefined) {
      tables.host.put(d.tx, dead, pool.uuid, host.hostId);
      return dead;
    }
    const fenced = fenceHost(d, pool, host, `${by} says that the machine is off`);
    if (fenced.state === 'CUTTING') return applyConfirmation(d, pool, fenced, by);
    if (fenced.fence === null) return fenced;
    const confirmed = { ...fenced, fence: { ...fenced.fence, confirmedBy: by } };
    tables.host.put(d.tx, confirmed, pool.uuid, host.hostId);
    return confirmed;
  });
}

/** The page is durable: a word given before it now completes the fence. */
export function applyConfirmation(d: Decision, pool: PoolRecord, host: HostRecord, by: string): HostRecord {
  const outcome = applyHost(d, pool, host.hostId, {
    type: 'proof',
    generation: host.generation,
    kind: 'confirmed-off',
    detail: `${by} says that the machine is off`,
  });
  return outcome.type === 'changed' ? outcome.next : host;
}

export function hostsOfNode(
  d: { readonly tx: Snapshot },
  nodeId: string,
): { pool: PoolRecord; host: HostRecord }[] {
  return tables.pool.list(d.tx).flatMap((pool) =>
    tables.host
      .list(d.tx, [pool.uuid])
      .filter((host) => host.nodeId === nodeId)
      .map((host) => ({ pool, host })),
  );
}
