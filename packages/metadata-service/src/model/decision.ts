/**
 * What every decision is handed: the transaction it is part of, the time, a source of names, and what is known about pools
 * outside the store. Everything in model/ decides through this alone, so a simulation can drive it.
 */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot, Transaction } from '../store/store.ts';
import {
  tables,
  type AuditEntry,
  type HostLife,
  type HostRecord,
  type PoolRecord,
  type ServiceRecord,
} from './records.ts';

export interface Decision {
  readonly tx: Transaction;
  readonly service: ServiceRecord;
  readonly nowUnixMs: number;
  /** A new UUID. */
  newId(): string;
  /** The audit records of this transaction, for the log. */
  readonly audited: AuditEntry[];
  /** Why a pool's disk refuses this service now (another owner, a newer term); undefined: it does not. */
  refusal(poolUuid: string): string | undefined;
  /** A stream of changed blocks reads this layer now. */
  pinned(poolUuid: string, layerId: bigint): boolean;
  /** Most provisioned bytes as a multiple of the pool's size; 0: no limit. */
  readonly overcommitLimit: number;
}

/** Oldest audit records go when there are more than this. */
export const auditLimit = 1_000_000n;

/** An audit record, in the same transaction as what it is about. */
export function audit(
  d: Decision,
  event: string,
  about: Partial<Omit<AuditEntry, 'sequence' | 'atUnixMs' | 'event'>>,
): void {
  const sequence = (tables.counter.get(d.tx, 'audit') ?? 0n) + 1n;
  const entry: AuditEntry = {
    poolUuid: '',
    volumeUuid: '',
    nodeId: '',
    epoch: 0n,
    generation: 0n,
    proof: '',
    detail: '',
    ...about,
    sequence,
    atUnixMs: d.nowUnixMs,
    event,
  };
  tables.counter.put(d.tx, sequence, 'audit');
  tables.audit.put(d.tx, entry, sequence);
  d.audited.push(entry);
  if (entry.volumeUuid !== '') tables.auditVolume.put(d.tx, true, entry.volumeUuid, sequence);
  if (entry.nodeId !== '') tables.auditNode.put(d.tx, true, entry.nodeId, sequence);
  forget(d, sequence - auditLimit);
}

function forget(d: Decision, sequence: bigint): void {
  const old = sequence > 0n ? tables.audit.get(d.tx, sequence) : undefined;
  if (old === undefined) return;
  tables.audit.delete(d.tx, sequence);
  if (old.volumeUuid !== '') tables.auditVolume.delete(d.tx, old.volumeUuid, sequence);
  if (old.nodeId !== '') tables.auditNode.delete(d.tx, old.nodeId, sequence);
}

export function requirePool(d: { readonly tx: Snapshot }, poolUuid: string): PoolRecord {
  const pool = tables.pool.get(d.tx, poolUuid);
  if (pool === undefined) {
    throw new HoldfastError(
      'NOT_FOUND',
      `Pool ${poolUuid} is not known. A pool becomes known when an agent that sees its device connects.`,
    );
  }
  return pool;
}

/** Whether this service may grant anything on the pool: its authority page is ours, under this term. */
export function mayDecide(d: Pick<Decision, 'service' | 'refusal'>, pool: PoolRecord): boolean {
  return (
    pool.state === 'ACTIVE' &&
    pool.claimed?.incarnation === d.service.incarnation &&
    pool.claimed.term === d.service.term &&
    d.refusal(pool.uuid) === undefined
  );
}

/** @throws HoldfastError unless this service may grant on the pool. */
export function requireAuthority(d: Decision, pool: PoolRecord): void {
  const refusal = d.refusal(pool.uuid);
  if (refusal !== undefined) throw new HoldfastError('FAILED_PRECONDITION', refusal);
  if (!mayDecide(d, pool)) {
    throw new HoldfastError(
      'UNAVAILABLE',
      `Pool ${pool.name} waits for its authority page: the service has not yet claimed it for term ${d.service.term}. ` +
        'An agent that sees the pool does this when it connects; repeat the call.',
    );
  }
}

export function stale(why: string): HoldfastError {
  return new HoldfastError('STALE', `Stale, nothing was changed: ${why}.`);
}

/** The host slot of a message. @throws HoldfastError STALE when it names another life. */
export function requireLife(d: { readonly tx: Snapshot }, poolUuid: string, life: HostLife): HostRecord {
  const host = tables.host.get(d.tx, poolUuid, life.hostId);
  if (host === undefined || host.generation !== life.generation || host.nodeId !== life.nodeId) {
    throw stale(
      `host ${life.hostId} generation ${life.generation} (${life.nodeId}) is not known on pool ${poolUuid}` +
        (host === undefined ? '' : `, the slot is at generation ${host.generation} (${host.nodeId})`),
    );
  }
  return host;
}
