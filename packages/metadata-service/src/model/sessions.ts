/** What a connecting agent says it is and holds, set against what is on record. */
import { reconcileClaims, type Claim } from './allocation.ts';
import { audit, stale, type Decision } from './decision.ts';
import { sameLife } from './grant.ts';
import { applyGrant, grantOfHost } from './grants.ts';
import { applyHost, poolReady } from './hosts.ts';
import { tables, type HostLife, type NodeRecord, type SlabRun } from './records.ts';
import { common, normalized } from './runs.ts';
import { aheadOf } from './slabs.ts';

const rememberedBoots = 32;

/** A node is here. Its machine under a new boot id is proof that its older lives are dead. */
export function seeNode(d: Decision, node: NodeRecord): void {
  const before = tables.node.get(d.tx, node.nodeId);
  const past = before?.pastBootIds ?? [];
  if (past.includes(node.bootId)) {
    throw stale(`${node.nodeId} says hello from boot ${node.bootId}, but was seen under a later one`);
  }
  const newBoot = before !== undefined && before.bootId !== node.bootId;
  const pastBootIds = newBoot ? [...past, before.bootId].slice(-rememberedBoots) : past;
  tables.node.put(d.tx, { ...node, pastBootIds }, node.nodeId);
  if (before === undefined)
    audit(d, 'node-seen', { nodeId: node.nodeId, detail: `machine ${node.machineId}` });
  for (const pool of tables.pool.list(d.tx)) {
    for (const host of tables.host.list(d.tx, [pool.uuid])) {
      // All nodes of a loop pool are on one machine. Elsewhere only the node's own lives: machine ids may be cloned.
      if (host.nodeId !== node.nodeId && pool.fencing !== 'loop') continue;
      applyHost(d, pool, host.hostId, { type: 'new-boot', machineId: node.machineId, bootId: node.bootId });
    }
  }
}

export interface Holding {
  poolUuid: string;
  life: HostLife;
  volumes: { volumeUuid: string; epoch: bigint; claimed: Claim[] }[];
  stock: SlabRun[];
}

export interface Reconciled {
  /** Of the stock: what the host still owns. */
  stock: SlabRun[];
  /** Held without a right: the agent has to let go of them. */
  revoke: { volumeUuid: string; epoch: bigint }[];
  /** Claims that fit nothing on record. */
  misfits: number;
}

/** An agent came back (or took over from a dead one) under a generation that is still its own: grants stay as they are. */
export function reconcile(d: Decision, holding: Holding): Reconciled {
  const { life } = holding;
  const pool = tables.pool.get(d.tx, holding.poolUuid);
  const host = tables.host.get(d.tx, holding.poolUuid, life.hostId);
  const known = host?.generation === life.generation && host.nodeId === life.nodeId && host.state !== 'DEAD';
  if (pool === undefined || !known) {
    return { stock: [], revoke: [], misfits: 0 };
  }
  // Taken over between join and ready: whoever holds the pool is ready.
  if (host.state === 'JOINING') poolReady(d, pool.uuid, life);
  const revoke: Reconciled['revoke'] = [];
  let misfits = 0;
  for (const held of holding.volumes) {
    const volume = tables.volume.get(d.tx, held.volumeUuid);
    const granted = volume === undefined ? undefined : grantOfHost(volume, life.hostId);
    if (
      volume === undefined ||
      granted?.grant.epoch !== held.epoch ||
      !sameLife(granted.grant.holder, life)
    ) {
      revoke.push({ volumeUuid: held.volumeUuid, epoch: held.epoch });
      continue;
    }
    if (granted.grant.state === 'OFFERED')
      applyGrant(d, volume, { type: 'opened', holder: life, epoch: held.epoch }, granted.reader);
    misfits += reconcileClaims(d, pool, life, volume, held.claimed);
  }
  tables.pool.put(d.tx, pool, pool.uuid);
  return { stock: common(aheadOf(d.tx, pool, life), normalized(holding.stock)), revoke, misfits };
}
