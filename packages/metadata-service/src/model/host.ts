/**
 * A node's life on a pool, as a pure state machine: the second table of DESIGN 6.7, row by row. What the table does not name
 * is STALE and changes nothing. `undefined` is NONE: the slot was never used.
 */
import type { FencingClass, HostLife, HostRecord } from './records.ts';

export type HostEvent =
  | {
      type: 'join';
      nodeId: string;
      machineId: string;
      bootId: string;
      lockPath: string;
      /** The joining process holds the flock that the previous engine held. */
      previousIoDead: boolean;
    }
  | { type: 'ready'; generation: bigint; classProved: boolean }
  | { type: 'suspect'; generation: bigint; reason: string }
  | { type: 'page-durable'; generation: bigint; fencer: HostLife }
  | { type: 'fencer-lost'; generation: bigint }
  | { type: 'leader-change' }
  | { type: 'heartbeat-after-page'; generation: bigint }
  | { type: 'proof'; generation: bigint; kind: ProofKind; detail: string }
  | { type: 'stop-acknowledged'; generation: bigint }
  | { type: 'stopped-on-disk'; generation: bigint }
  /** The machine was seen under another boot id. */
  | { type: 'new-boot'; machineId: string; bootId: string };

/** What completes a fence of which class. */
export type ProofKind = 'lock-free' | 'lease-expired' | 'confirmed-off' | 'preempted';
export const proofsOf: Readonly<Record<FencingClass, readonly ProofKind[]>> = {
  reservations: ['preempted'],
  manual: ['confirmed-off'],
  'lease-only': ['lease-expired', 'confirmed-off'],
  loop: ['lock-free'],
};

/** A dead life whose proof says that the machine itself was off, or has rebooted since. */
export function machineWasOff(host: HostRecord): boolean {
  return host.state === 'DEAD' && /(^|; )(confirmed-off: |new boot id )/.test(host.proof);
}

/** Somebody knows more of a life that is dead already: that its machine is off. */
export function alsoOff(host: HostRecord, by: string): HostRecord {
  return machineWasOff(host)
    ? host
    : { ...host, proof: `${host.proof}; confirmed-off: ${by} says that the machine is off` };
}

/** What a new record needs that the machine does not invent. */
export interface HostSetting {
  poolUuid: string;
  hostId: number;
  fencing: FencingClass;
  nowUnixMs: number;
}

export interface Death {
  generation: bigint;
  nodeId: string;
  proof: string;
}

export type HostOutcome =
  | {
      type: 'changed';
      next: HostRecord;
      /** That generation is dead: void its grants in the same transaction. */
      died?: Death;
      audit: string;
      alarm?: string;
    }
  /** A repeat: the same reply, nothing changes. */
  | { type: 'same' }
  | { type: 'stale'; why: string };

export function stepHost(host: HostRecord | undefined, event: HostEvent, setting: HostSetting): HostOutcome {
  if (event.type === 'join') return join(host, event, setting);
  if (host === undefined) return { type: 'stale', why: `${event.type}: this host slot was never used` };
  if (event.type === 'leader-change') {
    return host.state === 'FENCING' || host.state === 'CUTTING'
      ? changed(refence(host, setting), 'fence-again')
      : stale(host, event.type);
  }
  if (event.type === 'new-boot') return newBoot(host, event, setting);
  if (event.generation !== host.generation) {
    return {
      type: 'stale',
      why: `${event.type}: generation ${event.generation} was meant, ${host.nodeId} is at generation ${host.generation}`,
    };
  }
  const fencing = host.state === 'FENCING' || host.state === 'CUTTING';
  switch (event.type) {
    case 'ready':
      if (host.state !== 'JOINING' || !event.classProved) return stale(host, event.type);
      return changed(moved(host, 'LIVE', setting), 'live');
    case 'suspect': {
      if (host.state !== 'JOINING' && host.state !== 'LIVE') return stale(host, event.type);
      const fence = { reason: event.reason, fencer: null, confirmedBy: '', alarms: 0 };
      return changed({ ...moved(host, 'FENCING', setting), fence }, 'fence-intent');
    }
    case 'page-durable':
      if (host.state !== 'FENCING' || host.fence === null) return stale(host, event.type);
      return changed(
        { ...moved(host, 'CUTTING', setting), fence: { ...host.fence, fencer: event.fencer } },
        'fence-page',
      );
    case 'fencer-lost':
      if (!fencing) return stale(host, event.type);
      return changed(refence(host, setting), 'fence-again');
    case 'heartbeat-after-page': {
      if (host.state !== 'CUTTING' || setting.fencing === 'reservations') return stale(host, event.type);
      const next = refence(host, setting);
      if (next.fence !== null) next.fence = { ...next.fence, alarms: next.fence.alarms + 1 };
      return {
        ...changed(next, 'fence-again'),
        alarm:
          `${host.nodeId} renewed its lease after its fence page (generation ${host.generation}) was durable: the page ` +
          'was lost, or another device was written. The page is written again.',
      };
    }
    case 'proof':
      if (host.state !== 'CUTTING' || !proofsOf[setting.fencing].includes(event.kind)) {
        return stale(host, `proof ${event.kind}`);
      }
      return dead(host, setting, `${event.kind}: ${event.detail}`);
    case 'stop-acknowledged':
      if (host.state === 'DEAD') return stale(host, event.type);
      return dead(
        host,
        setting,
        `stop-ack(${host.generation}): its own engine closed the gate with nothing in flight`,
      );
    case 'stopped-on-disk':
      if (host.state === 'DEAD') return stale(host, event.type);
      return dead(host, setting, `stopped(${host.generation}) read in its heartbeat page`);
  }
}

function join(
  host: HostRecord | undefined,
  event: HostEvent & { type: 'join' },
  setting: HostSetting,
): HostOutcome {
  const fresh = (generation: bigint): HostRecord => ({
    poolUuid: setting.poolUuid,
    nodeId: event.nodeId,
    hostId: setting.hostId,
    generation,
    state: 'JOINING',
    machineId: event.machineId,
    bootId: event.bootId,
    lockPath: event.lockPath,
    sinceUnixMs: setting.nowUnixMs,
    fence: null,
    proof: '',
  });
  if (host === undefined) return changed(fresh(1n), 'join');
  if (host.state === 'DEAD') return changed(fresh(host.generation + 1n), 'join');
  // A running generation ends here only with proof, and only its own node on its own machine can bring it.
  if (host.nodeId !== event.nodeId) return stale(host, 'join by another node');
  if (host.machineId !== event.machineId) {
    return {
      type: 'stale',
      why:
        `generation ${host.generation} of ${host.nodeId} runs on machine ${host.machineId}, the join came from machine ` +
        `${event.machineId}. Fence the node first (holdfast node fence ${host.nodeId})`,
    };
  }
  const proof = deathByJoin(host, event);
  // Nothing was ever granted to a life that is not ready, so a process that died before it may simply join again as the
  // same one; if the other process lives, only one of the two gets the lock.
  if (proof === undefined && host.state === 'JOINING' && host.lockPath === event.lockPath)
    return { type: 'same' };
  if (proof === undefined) {
    return {
      type: 'stale',
      why:
        `generation ${host.generation} of ${host.nodeId} is ${host.state} and nothing shows that its I/O has ended: ` +
        'the machine has not rebooted and the lock of its engine is not free. End the old engine, or take over from it',
    };
  }
  return {
    ...changed(fresh(host.generation + 1n), 'join'),
    died: { generation: host.generation, nodeId: host.nodeId, proof },
  };
}

function deathByJoin(host: HostRecord, event: HostEvent & { type: 'join' }): string | undefined {
  if (event.bootId !== host.bootId) return `new boot id ${event.bootId} of machine ${host.machineId}`;
  if (event.previousIoDead)
    return `the joining process holds the lock ${host.lockPath} of the old engine: its I/O is dead`;
  return undefined;
}

function newBoot(
  host: HostRecord,
  event: HostEvent & { type: 'new-boot' },
  setting: HostSetting,
): HostOutcome {
  if (host.state === 'DEAD' || host.machineId !== event.machineId || host.bootId === event.bootId) {
    return stale(host, event.type);
  }
  return dead(host, setting, `new boot id ${event.bootId} of machine ${host.machineId}`);
}

function moved(host: HostRecord, state: HostRecord['state'], setting: HostSetting): HostRecord {
  return { ...host, state, sinceUnixMs: setting.nowUnixMs };
}

/** Back to FENCING: the page is written again, and every wait starts from zero. */
function refence(host: HostRecord, setting: HostSetting): HostRecord {
  const next = moved(host, 'FENCING', setting);
  return { ...next, fence: host.fence === null ? null : { ...host.fence, fencer: null } };
}

function dead(host: HostRecord, setting: HostSetting, proof: string): HostOutcome {
  return {
    ...changed({ ...moved(host, 'DEAD', setting), fence: null, proof }, 'dead'),
    died: { generation: host.generation, nodeId: host.nodeId, proof },
  };
}

function changed(next: HostRecord, audit: string): HostOutcome & { type: 'changed' } {
  return { type: 'changed', next, audit };
}

function stale(host: HostRecord, what: string): HostOutcome {
  return { type: 'stale', why: `${what}: generation ${host.generation} of ${host.nodeId} is ${host.state}` };
}
