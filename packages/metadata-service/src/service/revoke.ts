/**
 * Takes one volume back from its holder (DESIGN 6.3): asks the holder's agent; when it has not acknowledged within the lease,
 * the holder's node is fenced on that pool, and the grant becomes void with the proof of that fence.
 */
import type { OrderResult__Output } from '@holdfast/proto';
import { reportSlabs } from '../model/allocation.ts';
import { applyGrant, grantOfHost } from '../model/grants.ts';
import { fenceHost } from '../model/hosts.ts';
import { requirePool } from '../model/decision.ts';
import { tables, type GrantRecord, type HostLife, type VolumeRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { claimFromWire } from './wire.ts';

/** An agent that is not connected may be about to come back: it restarts in less than this. */
const reconnectGraceMs = 1500;
const pauseMs = 300;

export async function revoke(core: Core, sessions: Sessions, uuid: string, hostId: number): Promise<void> {
  const found = core.read((tx) => {
    const volume = tables.volume.get(tx, uuid);
    const grant = volume && grantOfHost(volume, hostId)?.grant;
    if (volume === undefined || grant?.state !== 'REVOKING' || grant.holder === null) return undefined;
    return { volume, grant, holder: grant.holder, pool: tables.pool.get(tx, volume.poolUuid) };
  });
  if (found?.pool === undefined) return;
  const { volume, grant, holder, pool } = found;
  const started = core.clock.monotonicMs();
  let silentSince: number | undefined;
  for (;;) {
    const now = core.clock.monotonicMs();
    const leftMs = started + pool.leaseMs - now;
    const connected = sessions.isConnected(holder.nodeId);
    silentSince = connected ? undefined : (silentSince ?? now);
    if (leftMs <= 0 || (silentSince !== undefined && now - silentSince >= reconnectGraceMs)) break;
    if (connected && (await ask(core, sessions, volume, grant, holder, leftMs))) return;
    await core.nextChange(Math.min(pauseMs, leftMs));
    if (core.stopped.signal.aborted || !isRevoking(core, uuid, hostId, grant.epoch)) return;
  }
  await escalate(core, uuid, hostId, grant.epoch);
  // From here on the fence frees the grant; until then this operation is not started again.
  while (isRevoking(core, uuid, hostId, grant.epoch) && !core.stopped.signal.aborted) {
    if (!isBeingFenced(core, pool.uuid, holder)) return;
    await core.nextChange(1000);
  }
}

/** True: the grant is free. */
async function ask(
  core: Core,
  sessions: Sessions,
  volume: VolumeRecord,
  { epoch }: GrantRecord,
  holder: HostLife,
  timeoutMs: number,
): Promise<boolean> {
  let result: OrderResult__Output | undefined;
  let proof: string;
  try {
    result = await sessions.order(
      holder.nodeId,
      volume.poolUuid,
      { revoke: { volume_uuid: volume.uuid, epoch: epoch.toString() } },
      timeoutMs,
    );
    if (result.revoked?.epoch !== epoch.toString()) {
      core.logger.warn(
        { volume: volume.uuid, node: holder.nodeId },
        'A revocation was answered for another epoch',
      );
      return false;
    }
    proof = `acknowledged by its holder: closed(${epoch}), nothing in flight`;
  } catch (error) {
    if (!(error instanceof OrderFailed)) throw error;
    if (error.code !== 'UNKNOWN_VOLUME') {
      core.logger.info(
        { volume: volume.uuid, node: holder.nodeId, code: error.code },
        `Revoking: ${error.message}`,
      );
      return false;
    }
    proof = `its holder's agent does not have it open and will not open it under epoch ${epoch}`;
  }
  const claims = result?.revoked?.claimed.map(claimFromWire) ?? [];
  return await core.decide((d) => {
    const now = tables.volume.get(d.tx, volume.uuid);
    if (now === undefined) return true;
    if (claims.length > 0) reportSlabs(d, volume.poolUuid, holder, claims);
    const current = tables.volume.get(d.tx, volume.uuid) ?? now;
    const { reader } = grantOfHost(current, holder.hostId) ?? {};
    const event = { type: 'revoke-acknowledged', holder, epoch, proof } as const;
    return applyGrant(d, current, event, reader).type !== 'stale';
  });
}

async function escalate(core: Core, uuid: string, hostId: number, epoch: bigint): Promise<void> {
  await core.decide((d) => {
    const volume = tables.volume.get(d.tx, uuid);
    if (volume === undefined) return;
    const { reader } = grantOfHost(volume, hostId) ?? {};
    const outcome = applyGrant(d, volume, { type: 'revoke-timeout', epoch }, reader);
    if (outcome.type !== 'changed' || outcome.action?.type !== 'fence-host') return;
    const { holder } = outcome.action;
    const host = tables.host.get(d.tx, volume.poolUuid, holder.hostId);
    if (host === undefined || host.generation !== holder.generation) return;
    const reason = `its agent did not give back volume ${volume.name} (epoch ${epoch}) within the lease`;
    fenceHost(d, requirePool(d, volume.poolUuid), host, reason);
    core.logger.warn(
      { volume: uuid, node: holder.nodeId, pool: volume.poolUuid },
      `Fencing ${holder.nodeId}: ${reason}`,
    );
  });
}

function isRevoking(core: Core, uuid: string, hostId: number, epoch: bigint): boolean {
  const volume = core.read((tx) => tables.volume.get(tx, uuid));
  const grant = volume && grantOfHost(volume, hostId)?.grant;
  return grant?.state === 'REVOKING' && grant.epoch === epoch;
}

function isBeingFenced(core: Core, poolUuid: string, holder: HostLife): boolean {
  const host = core.read((tx) => tables.host.get(tx, poolUuid, holder.hostId));
  return host?.generation === holder.generation && (host.state === 'FENCING' || host.state === 'CUTTING');
}
