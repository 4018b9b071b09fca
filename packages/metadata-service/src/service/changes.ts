/** ListChanges: what differs between two snapshots of one chain, read by an agent from the slab pages of the layers between. */
import { HoldfastError, toGrpcStatus } from '@holdfast/common';
import type { ListChangesRequest__Output, ListChangesResponse } from '@holdfast/proto';
import type { ServerWritableStream } from '@grpc/grpc-js';
import { requirePool } from '../model/decision.ts';
import { chainOf, requireLayer } from '../model/layers.ts';
import type { PoolRecord, SnapshotRecord } from '../model/records.ts';
import { slabsOf } from '../model/slabs.ts';
import { requireSnapshot } from '../model/snapshots.ts';
import type { Core } from './core.ts';
import { anyLiveHost } from './helpers.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { layerToWire } from './wire.ts';

const maxRanges = 4096;
const readTimeoutMs = 60_000;
const attempts = 5;

type Stream = ServerWritableStream<ListChangesRequest__Output, ListChangesResponse>;

interface Pinned {
  pool: PoolRecord;
  target: SnapshotRecord;
  /** The target's down to and without the base's, newest first. */
  layerIds: bigint[];
}

export function listChanges(core: Core, sessions: Sessions, stream: Stream): void {
  send(core, sessions, stream).then(
    () => stream.end(),
    (error: unknown) => {
      const status = toGrpcStatus(error);
      core.logger.warn({ err: error }, 'ListChanges failed');
      stream.emit('error', status);
    },
  );
}

async function send(core: Core, sessions: Sessions, stream: Stream): Promise<void> {
  const { request } = stream;
  const { pool, target, layerIds } = await pin(core, request);
  try {
    let offset = BigInt(request.starting_offset);
    const wanted = request.max_ranges > 0 ? Math.min(request.max_ranges, maxRanges) : maxRanges;
    for (let first = true; ; first = false) {
      if (stream.cancelled) return;
      const page =
        layerIds.length === 0 || offset >= target.sizeBytes
          ? { ranges: [], next_offset: '0' }
          : await readPage(core, sessions, pool, target, layerIds, offset, wanted);
      const response = { size_bytes: target.sizeBytes.toString(), ranges: page.ranges };
      if ((first || page.ranges.length > 0) && !stream.write(response)) await drained(stream);
      if (page.next_offset === '0') return;
      if (BigInt(page.next_offset) <= offset) {
        throw new HoldfastError(
          'INTERNAL',
          `An agent did not get beyond offset ${offset} of ${target.name}.`,
        );
      }
      offset = BigInt(page.next_offset);
    }
  } finally {
    core.unpin(pool.uuid, layerIds);
  }
}

/** As long as they are pinned, nothing is taken from these layers, also when their names are dropped. */
async function pin(core: Core, request: ListChangesRequest__Output): Promise<Pinned> {
  return await core.decide((d) => {
    const target = readySnapshot(d.tx, request.target_snapshot_uuid);
    const pool = requirePool(d, target.poolUuid);
    const base =
      request.base_snapshot_uuid === '' ? undefined : readySnapshot(d.tx, request.base_snapshot_uuid);
    const chain = chainOf(d.tx, pool.uuid, target.layerId).map((layer) => layer.layerId);
    const at = base === undefined ? chain.length : chain.indexOf(base.layerId);
    if (base !== undefined && (base.poolUuid !== pool.uuid || at < 0)) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Snapshot ${base.name} is not older than ${target.name} in the same chain, so there is nothing to compare. Name an ` +
          'older snapshot of the same volume, or none.',
      );
    }
    const layerIds = chain.slice(0, at);
    core.pin(pool.uuid, layerIds);
    return { pool, target, layerIds };
  });
}

function readySnapshot(tx: Parameters<typeof requireSnapshot>[0], uuid: string): SnapshotRecord {
  const snapshot = requireSnapshot(tx, uuid);
  if (snapshot.state === 'READY') return snapshot;
  throw new HoldfastError('UNAVAILABLE', `Snapshot ${snapshot.name} is still being cut. Repeat the call.`);
}

async function readPage(
  core: Core,
  sessions: Sessions,
  pool: PoolRecord,
  target: SnapshotRecord,
  layerIds: readonly bigint[],
  offset: bigint,
  wanted: number,
): Promise<{ ranges: { offset: string; length: string }[]; next_offset: string }> {
  let last: unknown;
  for (let attempt = 0; attempt < attempts; attempt++) {
    try {
      const host = anyLiveHost(core, sessions, pool, attempt);
      const layers = core.read((tx) =>
        layerIds.map((id) => layerToWire(requireLayer(tx, pool.uuid, id), slabsOf(tx, pool.uuid, id))),
      );
      const { changes } = await sessions.order(
        host.nodeId,
        pool.uuid,
        {
          read_changes: {
            target: layers,
            size_bytes: target.sizeBytes.toString(),
            starting_offset: offset.toString(),
            max_ranges: wanted,
          },
        },
        readTimeoutMs,
      );
      if (!changes) throw new OrderFailed('INCOMPLETE', `The agent of ${host.nodeId} sent no changes.`);
      return changes;
    } catch (error) {
      if (!(error instanceof OrderFailed)) throw error;
      last = error;
      await core.clock.sleep(200, core.stopped.signal);
    }
  }
  const why = last instanceof Error ? last.message : String(last);
  throw new HoldfastError(
    'UNAVAILABLE',
    `The changed blocks of ${target.name} cannot be read now: ${why} Repeat the call from offset ${offset}.`,
  );
}

async function drained(stream: Stream): Promise<void> {
  await new Promise<void>((resolve) => {
    stream.once('drain', resolve);
    stream.once('cancelled', resolve);
    stream.once('close', resolve);
  });
}
