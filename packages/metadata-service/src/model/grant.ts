/**
 * The right to open a volume, as a pure state machine: the first table of DESIGN 6.7, row by row. It decides; who calls
 * it stores the outcome and carries out the action. What the table does not name is STALE and changes nothing.
 */
import type { GrantRecord, HostLife } from './records.ts';

export type GrantEvent =
  | {
      type: 'stage';
      holder: HostLife;
      publishId: string;
      /** The publish id is the volume's current one, and names this holder's node. */
      publishCurrent: boolean;
      hostLive: boolean;
      readOnly: boolean;
      /** Grants of the other kind that are out (a writer for a reader, readers for a writer), a sentence; empty: none. */
      blockedBy: string;
      /** Newer than every epoch of this volume. */
      nextEpoch: bigint;
    }
  /** A live host opens a volume that nobody has, without a device, to cut or compact it. */
  | { type: 'maintain'; holder: HostLife; hostLive: boolean; blockedBy: string; nextEpoch: bigint }
  | { type: 'opened'; holder: HostLife; epoch: bigint }
  /** The holder says: closed on disk, nothing in flight. */
  | { type: 'returned'; holder: HostLife; epoch: bigint }
  /** An agent read closed(epoch) in the volume record. */
  | { type: 'closed-on-disk'; epoch: bigint }
  | { type: 'unpublish' }
  /** The holder's answer to a revocation: nothing in flight. */
  | { type: 'revoke-acknowledged'; holder: HostLife; epoch: bigint; proof: string }
  | { type: 'revoke-timeout'; epoch: bigint }
  | { type: 'generation-dead'; hostId: number; generation: bigint; proof: string };

export type GrantAction =
  | { type: 'revoke'; holder: HostLife; epoch: bigint }
  | { type: 'fence-host'; holder: HostLife };

export type GrantOutcome =
  | { type: 'changed'; next: GrantRecord; action?: GrantAction; audit: { event: string; proof: string } }
  /** A repeat: the same reply, nothing changes. */
  | { type: 'same' }
  | { type: 'stale'; why: string };

export function sameLife(a: HostLife | null, b: HostLife | null): boolean {
  return (
    a !== null &&
    b !== null &&
    a.hostId === b.hostId &&
    a.generation === b.generation &&
    a.nodeId === b.nodeId
  );
}

export function stepGrant(grant: GrantRecord, event: GrantEvent): GrantOutcome {
  switch (event.type) {
    case 'stage':
      return stage(grant, event);
    case 'maintain':
      if (grant.state !== 'FREE') return stale(grant, 'maintain');
      if (!event.hostLive) return { type: 'stale', why: 'this host is not LIVE on the pool' };
      return offered(grant, event, { publishId: '', readOnly: false });
    case 'opened':
      if (grant.state !== 'OFFERED') return stale(grant, 'opened');
      if (!isHeldBy(grant, event)) return stale(grant, 'opened', event);
      return changed({ ...grant, state: 'OPEN' }, 'opened');
    case 'returned':
      if (grant.state === 'FREE' || !isHeldBy(grant, event)) return stale(grant, 'returned', event);
      return freed(
        grant,
        'returned',
        `returned by its holder: closed(${grant.epoch}) on disk, nothing in flight`,
      );
    case 'closed-on-disk':
      if (grant.state === 'FREE' || grant.epoch !== event.epoch) return stale(grant, 'closed on disk', event);
      return freed(grant, 'closed', `closed(${grant.epoch}) read in the volume record`);
    case 'unpublish': {
      if ((grant.state !== 'OFFERED' && grant.state !== 'OPEN') || grant.holder === null) {
        return stale(grant, 'unpublish');
      }
      const action = { type: 'revoke', holder: grant.holder, epoch: grant.epoch } as const;
      return { ...changed({ ...grant, state: 'REVOKING' }, 'revoke'), action };
    }
    case 'revoke-acknowledged':
      if (grant.state !== 'REVOKING' || !isHeldBy(grant, event)) {
        return stale(grant, 'acknowledged a revocation', event);
      }
      return freed(grant, 'revoked', event.proof);
    case 'revoke-timeout':
      if (grant.state !== 'REVOKING' || grant.epoch !== event.epoch || grant.holder === null) {
        return stale(grant, 'a revocation ran out of time', event);
      }
      return {
        ...changed(grant, 'revoke-timeout'),
        action: { type: 'fence-host', holder: grant.holder },
      };
    case 'generation-dead':
      if (
        grant.state === 'FREE' ||
        grant.holder?.hostId !== event.hostId ||
        grant.holder.generation !== event.generation
      ) {
        return stale(grant, 'generation dead');
      }
      return freed(grant, 'void', event.proof);
  }
}

function stage(grant: GrantRecord, event: GrantEvent & { type: 'stage' }): GrantOutcome {
  if (!event.publishCurrent) {
    return { type: 'stale', why: 'the publish id is not the current one of this volume on this node' };
  }
  if (!event.hostLive) return { type: 'stale', why: 'this host is not LIVE on the pool' };
  switch (grant.state) {
    case 'FREE':
      return offered(grant, event, { publishId: event.publishId, readOnly: event.readOnly });
    case 'OFFERED':
    case 'OPEN':
      if (!sameLife(grant.holder, event.holder) || grant.publishId !== event.publishId) {
        return stale(grant, 'stage');
      }
      if (grant.readOnly !== event.readOnly) {
        return {
          type: 'stale',
          why: `it is granted ${grant.readOnly ? 'read-only' : 'for writing'} already`,
        };
      }
      return { type: 'same' };
    case 'REVOKING':
      return stale(grant, 'stage');
  }
}

function offered(
  grant: GrantRecord,
  event: { holder: HostLife; nextEpoch: bigint; blockedBy: string },
  how: { publishId: string; readOnly: boolean },
): GrantOutcome {
  if (event.blockedBy !== '') return { type: 'stale', why: event.blockedBy };
  if (event.nextEpoch <= grant.epoch) {
    return { type: 'stale', why: `epoch ${event.nextEpoch} is not newer than ${grant.epoch}` };
  }
  return changed({ ...how, state: 'OFFERED', epoch: event.nextEpoch, holder: event.holder }, 'grant');
}

/** Out for a cut or a compaction of a closed volume, not for anybody's use. */
export function isMaintenance(grant: GrantRecord): boolean {
  return grant.state !== 'FREE' && grant.publishId === '';
}

function isHeldBy(grant: GrantRecord, event: { holder: HostLife; epoch: bigint }): boolean {
  return grant.epoch === event.epoch && sameLife(grant.holder, event.holder);
}

function changed(next: GrantRecord, event: string): GrantOutcome & { type: 'changed' } {
  return { type: 'changed', next, audit: { event, proof: '' } };
}

function freed(grant: GrantRecord, event: string, proof: string): GrantOutcome {
  return { type: 'changed', next: { ...grant, state: 'FREE' }, audit: { event, proof } };
}

function stale(grant: GrantRecord, what: string, event?: { epoch: bigint }): GrantOutcome {
  const holder =
    grant.holder === null ? 'nobody' : `${grant.holder.nodeId} (generation ${grant.holder.generation})`;
  const sent = event === undefined ? '' : `, the message was about epoch ${event.epoch}`;
  const held = grant.state === 'FREE' ? 'held last by' : 'held by';
  return {
    type: 'stale',
    why: `${what}: the grant is ${grant.state}, epoch ${grant.epoch}, ${held} ${holder}${sent}`,
  };
}
