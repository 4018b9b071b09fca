/**
 * A pool whose device has grown. Machines see a larger device at different moments, so there are two steps, and each waits for
 * the last of them:
 *
 * 1. On the disk. When every host that is not dead has reported a device with room for more slabs, one of them is ordered to add
 *    the slabs to the superblock. Not before: an engine whose machine still sees the old size would find a pool that is larger
 *    than its device after a restart, and could not take over its own volumes.
 * 2. In the books. Slabs are given out when every host's engine has said that it can use them. Not before: what one node writes
 *    to, another may be granted.
 *
 * A host that is away counts by its last report. So a node that does not come back holds the growth up until it is fenced, and
 * growthNote() says so.
 */
import { audit, type Decision } from './decision.ts';
import { HoldfastError } from '@holdfast/common';
import { tables, type HostRecord, type PoolRecord, type RoomRecord } from './records.ts';
import type { Snapshot } from '../store/store.ts';
import { growPool } from './slabs.ts';

type Report = Omit<RoomRecord, 'generation'>;

interface HostRoom {
  host: HostRecord;
  /** Undefined: this life has not said. */
  room: RoomRecord | undefined;
}

function roomsOf(tx: Snapshot, poolUuid: string): HostRoom[] {
  return tables.host
    .list(tx, [poolUuid])
    .filter((host) => host.state !== 'DEAD')
    .map((host) => {
      const room = tables.room.get(tx, poolUuid, host.hostId);
      return { host, room: room?.generation === host.generation ? room : undefined };
    });
}

/** What a node reports of a pool: kept for its host, and the books grow when it was the last that had not the slabs. */
export function noteRoom(d: Decision, pool: PoolRecord, nodeId: string, report: Report): void {
  const host = tables.host
    .list(d.tx, [pool.uuid])
    .find((one) => one.nodeId === nodeId && one.state !== 'DEAD');
  if (host !== undefined) keepRoom(d, host, report);
  growBooks(d, pool, host === undefined ? report.slabCount : undefined);
}

/** Of a host that joins now. @throws HoldfastError while the pool grows into more than its machine sees */
export function joinWithRoom(d: Decision, pool: PoolRecord, host: HostRecord, report: Report): void {
  if (pool.growingBytes !== undefined && report.deviceBytes < pool.growingBytes) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Pool ${pool.name} is growing into ${pool.growingBytes} bytes, and its device has ${report.deviceBytes} on ` +
        `${host.nodeId}. Rescan the device on that node; it joins by itself then.`,
    );
  }
  keepRoom(d, host, report);
}

function keepRoom(d: Decision, host: HostRecord, { slabCount, deviceBytes, slabsPossible }: Report): void {
  const room = { generation: host.generation, slabCount, deviceBytes, slabsPossible };
  const known = tables.room.get(d.tx, host.poolUuid, host.hostId);
  const same =
    known?.generation === room.generation &&
    known.slabCount === slabCount &&
    known.deviceBytes === deviceBytes &&
    known.slabsPossible === slabsPossible;
  if (!same) tables.room.put(d.tx, room, host.poolUuid, host.hostId);
}

/** @param alone slabs that are seen by somebody who is no host: they count where there is none */
export function growBooks(d: Decision, pool: PoolRecord, alone?: number): void {
  const rooms = roomsOf(d.tx, pool.uuid);
  const usable =
    rooms.length === 0
      ? (alone ?? pool.slabCount)
      : Math.min(...rooms.map(({ room }) => room?.slabCount ?? pool.slabCount));
  if (usable <= pool.slabCount) return;
  audit(d, 'pool-grown', {
    poolUuid: pool.uuid,
    proof: `${rooms.length} hosts can use them`,
    detail: `${pool.slabCount} to ${usable} slabs`,
  });
  growPool(d.tx, pool, usable);
  tables.pool.put(d.tx, pool, pool.uuid);
}

/** How far the pool may grow on the disk now: as far as every host's machine sees its device. Undefined: it is that large. */
export function growthDue(
  tx: Snapshot,
  pool: PoolRecord,
): { deviceBytes: bigint; slabCount: number } | undefined {
  const rooms = roomsOf(tx, pool.uuid);
  if (pool.removing || rooms.length === 0) return undefined;
  let least: RoomRecord | undefined;
  let onDisk = pool.slabCount;
  for (const { room } of rooms) {
    if (room === undefined || room.deviceBytes === 0n) return undefined;
    onDisk = Math.max(onDisk, room.slabCount);
    if (least === undefined || room.deviceBytes < least.deviceBytes) least = room;
  }
  if (least === undefined || least.slabsPossible <= onDisk) return undefined;
  return { deviceBytes: least.deviceBytes, slabCount: least.slabsPossible };
}

/** Before the order: who joins meanwhile has to see as much. */
export function growthBegun(d: Decision, pool: PoolRecord, deviceBytes: bigint, slabCount: number): void {
  if (pool.growingBytes === deviceBytes) return;
  tables.pool.put(d.tx, { ...pool, growingBytes: deviceBytes }, pool.uuid);
  audit(d, 'pool-growing', {
    poolUuid: pool.uuid,
    proof: 'every host reports a device of that size',
    detail: `into ${deviceBytes} bytes, ${slabCount} slabs`,
  });
}

/** The order was carried out, or it is known that it was not. */
export function growthEnded(d: Decision, poolUuid: string): void {
  const pool = tables.pool.get(d.tx, poolUuid);
  if (pool?.growingBytes === undefined) return;
  const { growingBytes: _over, ...rest } = pool;
  tables.pool.put(d.tx, rest, poolUuid);
}

/** What keeps a device that has grown from being used in full, a sentence; empty: nothing. */
export function growthNote(tx: Snapshot, pool: PoolRecord): string {
  const rooms = roomsOf(tx, pool.uuid);
  const most = Math.max(
    pool.slabCount,
    ...rooms.map(({ room }) => Math.max(room?.slabCount ?? 0, room?.slabsPossible ?? 0)),
  );
  if (most === pool.slabCount) return '';
  const waitsFor = rooms.flatMap(({ host, room }) => {
    if (room === undefined) return [`${host.nodeId}, which has not said how large its device is`];
    if (room.slabsPossible < most && room.slabCount < most) {
      return [`${host.nodeId}, which sees ${room.deviceBytes} bytes (rescan the device there)`];
    }
    return [];
  });
  const more = `There is room for ${most - pool.slabCount} slabs more`;
  return waitsFor.length === 0
    ? `${more}; they are being added.`
    : `${more}. It waits for ${waitsFor.join('; ')}.`;
}
