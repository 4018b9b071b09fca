/** Volumes: created, found, grown, deleted, known again. */
import { HoldfastError, volumeParameterKeys, type VolumeContext } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, mayDecide, requireAuthority, requirePool, type Decision } from './decision.ts';
import { maintained, requireReady, requireVolume } from './grants.ts';
import { isMaintenance } from './grant.ts';
import { attach, layerGone, livingFrom, makeLayer, requireLayer, unused } from './layers.ts';
import { markSlot, takeSlot } from './pools.ts';
import { refuseDraining } from './removal.ts';
import { tables, type LayerRecord, type PoolRecord, type SlabRun, type VolumeRecord } from './records.ts';
import { compactionOf } from './segments.ts';
import { addToLayer, freeFromLayer, reserveFree, slabsOf } from './slabs.ts';
import { countSlabs } from './runs.ts';

/** As in the pool format (native/src/core/format.h, kMaxVolumeBytes): 256 TiB less one chunk. */
export const maxVolumeBytes = (1n << 48n) - 65536n;
export const minVolumeBytes = 4096n;
const sectorBytes = 4096n;
const maxNameLength = 127; // bytes of UTF-8: the volume record has room for 128 with the final zero
const maxParametersLength = 2048; // bytes of JSON in the volume record

export interface CreateRequest {
  name: string;
  poolUuids: readonly string[];
  sizeBytes: bigint;
  /** 0: none. */
  limitBytes: bigint;
  parameters: Record<string, string>;
  /** At most one of the two; empty: none. */
  sourceSnapshotUuid: string;
  sourceVolumeUuid: string;
  /** Of a new volume; one that exists keeps its own. */
  mutableParameters?: Record<string, string>;
}

/**
 * A new volume, or the one that has the name already. A copy of a volume is CREATING: who calls this begins the cut of its source
 * for it in the same transaction.
 */
export function createVolume(d: Decision, request: CreateRequest): { volume: VolumeRecord; isNew: boolean } {
  checkName(request.name, 'volume');
  checkSize(request.sizeBytes, request.limitBytes);
  checkParameters(request.parameters, 'volume');
  checkParameters(request.mutableParameters ?? {}, 'volume');
  const known = tables.volumeName.get(d.tx, request.name);
  if (known !== undefined) return { volume: compatible(requireVolume(d, known), request), isNew: false };
  const source = sourceOf(d, request);
  if (source === undefined) {
    const pool = choosePool(d, request.poolUuids, request.sizeBytes);
    return { volume: insert(d, pool, d.newId(), { ...request, parentLayerId: 0n }, 'create'), isNew: true };
  }
  const pool = requirePool(d, source.poolUuid);
  requireAuthority(d, pool);
  if (pool.draining) refuseDraining([pool]);
  requireRoomFor(d, [pool], request.sizeBytes);
  const what = {
    ...request,
    parameters: inherited(request.parameters, source.volumeParameters),
    parentLayerId: source.layerId,
    state: request.sourceVolumeUuid === '' ? 'READY' : 'CREATING',
  } as const;
  return { volume: insert(d, pool, d.newId(), what, 'create'), isNew: true };
}

interface Source {
  poolUuid: string;
  /** 0: not frozen yet. */
  layerId: bigint;
  volumeParameters: Readonly<Record<string, string>>;
}

function sourceOf(d: Decision, request: CreateRequest): Source | undefined {
  if (request.sourceSnapshotUuid !== '' && request.sourceVolumeUuid !== '') {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      'A volume is made from a snapshot or from a volume, not from both.',
    );
  }
  if (request.sourceSnapshotUuid !== '') {
    const snapshot = tables.snapshot.get(d.tx, request.sourceSnapshotUuid);
    if (snapshot === undefined) {
      throw new HoldfastError('NOT_FOUND', `Snapshot ${request.sourceSnapshotUuid} does not exist.`);
    }
    if (snapshot.state !== 'READY') {
      throw new HoldfastError(
        'UNAVAILABLE',
        `Snapshot ${snapshot.name} is still being cut. Repeat the call.`,
      );
    }
    checkSource(request, snapshot.poolUuid, snapshot.sizeBytes, `snapshot ${snapshot.name}`);
    return snapshot;
  }
  if (request.sourceVolumeUuid === '') return undefined;
  const volume = requireReady(d, request.sourceVolumeUuid);
  checkSource(request, volume.poolUuid, volume.sizeBytes, `volume ${volume.name}`);
  return { poolUuid: volume.poolUuid, layerId: 0n, volumeParameters: volume.parameters };
}

function checkSource(request: CreateRequest, poolUuid: string, sizeBytes: bigint, what: string): void {
  if (request.poolUuids.length > 0 && !request.poolUuids.includes(poolUuid)) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `A copy shares the data of its source, so it is on the same pool: ${what} is on ${poolUuid}. Use a storage class of ` +
        'that pool.',
    );
  }
  if (request.sizeBytes < sizeBytes) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `A copy of ${what} has at least its ${sizeBytes} bytes; ${request.sizeBytes} were asked for.`,
    );
  }
}

/** The file system comes with the data. */
function inherited(
  asked: Record<string, string>,
  source: Readonly<Record<string, string>>,
): Record<string, string> {
  const key = volumeParameterKeys.fsType;
  const made = source[key];
  if (made === undefined) return asked;
  if (asked[key] !== undefined && asked[key] !== made) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The source has the file system ${made}; a copy of it cannot have ${asked[key]}. Use a storage class with ${made}.`,
    );
  }
  return { ...asked, [key]: made };
}

function insert(
  d: Decision,
  pool: PoolRecord,
  uuid: string,
  what: {
    name: string;
    sizeBytes: bigint;
    parameters: Record<string, string>;
    parentLayerId: bigint;
    state?: 'CREATING' | 'READY';
    sourceSnapshotUuid?: string;
    sourceVolumeUuid?: string;
    mutableParameters?: Record<string, string>;
  },
  event: string,
): VolumeRecord {
  const layer = makeLayer(d, pool, { ...what, volumeUuid: uuid });
  const volume: VolumeRecord = {
    uuid,
    volumeId: pool.nextVolumeId,
    name: what.name,
    poolUuid: pool.uuid,
    slot: takeSlot(d, pool, 'volume'),
    sizeBytes: what.sizeBytes,
    parameters: what.parameters,
    state: what.state ?? 'READY',
    topLayerId: layer.layerId,
    lastEpoch: 0n,
    grant: { state: 'FREE', epoch: 0n, holder: null, publishId: '', readOnly: false },
    readers: [],
    publications: [],
    createdUnixMs: d.nowUnixMs,
    sourceSnapshotUuid: what.sourceSnapshotUuid ?? '',
    sourceVolumeUuid: what.sourceVolumeUuid ?? '',
    ...(Object.keys(what.mutableParameters ?? {}).length > 0
      ? { mutableParameters: { ...what.mutableParameters } }
      : {}),
  };
  pool.nextVolumeId += 1n;
  pool.provisionedBytes += what.sizeBytes;
  tables.pool.put(d.tx, pool, pool.uuid);
  tables.volume.put(d.tx, volume, uuid);
  tables.volumeName.put(d.tx, uuid, what.name);
  const source = volume.sourceSnapshotUuid || volume.sourceVolumeUuid;
  audit(d, event, {
    poolUuid: pool.uuid,
    volumeUuid: uuid,
    detail: `${what.name}, ${what.sizeBytes} bytes${source === '' ? '' : `, from ${source}`}`,
  });
  return volume;
}

function compatible(volume: VolumeRecord, request: CreateRequest): VolumeRecord {
  const wrong =
    volume.sizeBytes < request.sizeBytes || (request.limitBytes > 0n && volume.sizeBytes > request.limitBytes)
      ? `with ${volume.sizeBytes} bytes`
      : volume.sourceSnapshotUuid !== request.sourceSnapshotUuid ||
          volume.sourceVolumeUuid !== request.sourceVolumeUuid
        ? `${sourceName(volume)}, not ${sourceName(request)}`
        : !hasParameters(volume, request.parameters)
          ? `with other parameters (${JSON.stringify(volume.parameters)})`
          : request.poolUuids.length > 0 && !request.poolUuids.includes(volume.poolUuid)
            ? `on pool ${volume.poolUuid}`
            : undefined;
  if (wrong !== undefined) {
    throw new HoldfastError(
      'ALREADY_EXISTS',
      `A volume named ${volume.name} exists ${wrong}. Use another name, or delete that volume first.`,
    );
  }
  return volume;
}

function sourceName(of: { sourceSnapshotUuid: string; sourceVolumeUuid: string }): string {
  if (of.sourceSnapshotUuid !== '') return `made from snapshot ${of.sourceSnapshotUuid}`;
  return of.sourceVolumeUuid === '' ? 'made empty' : `made from volume ${of.sourceVolumeUuid}`;
}

/** A copy may have more than was asked for: what it has inherited. */
function hasParameters(volume: VolumeRecord, asked: Readonly<Record<string, string>>): boolean {
  const key = volumeParameterKeys.fsType;
  const isCopy = volume.sourceSnapshotUuid !== '' || volume.sourceVolumeUuid !== '';
  const made = volume.parameters[key];
  const full = isCopy && made !== undefined && asked[key] === undefined ? { ...asked, [key]: made } : asked;
  return sameParameters(volume.parameters, full);
}

export function sameParameters(
  a: Readonly<Record<string, string>>,
  b: Readonly<Record<string, string>>,
): boolean {
  const keys = Object.keys(a);
  return keys.length === Object.keys(b).length && keys.every((key) => a[key] === b[key]);
}

export function checkName(name: string, what: string): void {
  const bytes = Buffer.byteLength(name);
  // eslint-disable-next-line no-control-regex -- control characters are what is refused
  if (bytes === 0 || bytes > maxNameLength || /[\u0000-\u001f\u007f]/.test(name)) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The name of a ${what} has 1 to ${maxNameLength} bytes and no control characters; this one has ${bytes} bytes.`,
    );
  }
}

export function checkParameters(parameters: Readonly<Record<string, string>>, what: string): void {
  const bytes = Buffer.byteLength(JSON.stringify(parameters));
  if (bytes > maxParametersLength) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The ${what}'s parameters take ${bytes} bytes as JSON; its record has room for ${maxParametersLength}. Shorten them.`,
    );
  }
}

function checkSize(sizeBytes: bigint, limitBytes: bigint): void {
  if (sizeBytes < minVolumeBytes || sizeBytes > maxVolumeBytes) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `A volume has ${minVolumeBytes} to ${maxVolumeBytes} bytes; ${sizeBytes} were asked for.`,
    );
  }
  if (sizeBytes % sectorBytes !== 0n) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `A volume's size is a multiple of ${sectorBytes} bytes; ${sizeBytes} is not. Round it up.`,
    );
  }
  if (limitBytes > 0n && limitBytes < sizeBytes) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `The limit of ${limitBytes} bytes is below the size of ${sizeBytes} bytes.`,
    );
  }
}

/** The pool with the most free space; of equal ones, the one with the least promised. */
function choosePool(d: Decision, wanted: readonly string[], sizeBytes: bigint): PoolRecord {
  const pools = wanted.length > 0 ? wanted.map((uuid) => requirePool(d, uuid)) : tables.pool.list(d.tx);
  const usable = pools.filter((pool) => mayDecide(d, pool));
  if (usable.length === 0) {
    const why = pools.map((pool) => d.refusal(pool.uuid)).find((message) => message !== undefined);
    throw new HoldfastError(
      'UNAVAILABLE',
      why ??
        (pools.length === 0
          ? 'No pool is known. Format one (holdfast pool format) and connect an agent that sees it.'
          : `No agent has confirmed the authority over ${pools.map((pool) => pool.name).join(', ')} yet. Repeat the call.`),
    );
  }
  const open = usable.filter((pool) => !pool.draining);
  if (open.length === 0) refuseDraining(usable);
  return requireRoomFor(d, open, sizeBytes).reduce((best, pool) => (isRoomier(pool, best) ? pool : best));
}

/** Those that may promise as much more. @throws HoldfastError NO_SPACE when none may */
function requireRoomFor(d: Decision, pools: readonly PoolRecord[], sizeBytes: bigint): PoolRecord[] {
  const limitOf = (pool: PoolRecord): number => d.overcommitLimit * pool.slabCount * pool.slabSize;
  const roomy = pools.filter(
    (pool) => d.overcommitLimit === 0 || Number(pool.provisionedBytes + sizeBytes) <= limitOf(pool),
  );
  if (roomy.length === 0) {
    const full = pools.map(
      (pool) => `${pool.name} has promised ${pool.provisionedBytes} of ${Math.floor(limitOf(pool))} bytes`,
    );
    throw new HoldfastError(
      'NO_SPACE',
      `${sizeBytes} bytes more would exceed the overcommit limit (${d.overcommitLimit} times a pool's size): ${full.join(', ')}. ` +
        'Delete volumes, grow the device, or raise --overcommit-limit.',
    );
  }
  return roomy;
}

function isRoomier(a: PoolRecord, b: PoolRecord): boolean {
  const [freeA, freeB] = [a.slabsFree * a.slabSize, b.slabsFree * b.slabSize];
  return freeA !== freeB ? freeA > freeB : a.provisionedBytes < b.provisionedBytes;
}

/** Deleting is durable when this commits. Returns true when slabs wait to be wiped. @throws MustWait while it is being compacted */
export function deleteVolume(d: Decision, uuid: string): boolean {
  const volume = tables.volume.get(d.tx, uuid);
  if (volume === undefined || volume.state === 'DELETING') return false;
  const [publication] = volume.publications;
  if (publication !== undefined) {
    throw new HoldfastError(
      'IN_USE',
      `Volume ${volume.name} is published to ${publication.nodeId}. Unpublish it first.`,
    );
  }
  if (compactionOf(d.tx, volume) !== undefined && isMaintenance(volume.grant)) throw maintained(d.tx, volume);
  if (tables.cutting.get(d.tx, volume.poolUuid, uuid) !== undefined || isMaintenance(volume.grant)) {
    throw new HoldfastError(
      'OPERATION_PENDING',
      `Volume ${volume.name} is being cut for a snapshot or a copy. Repeat the call when that has ended.`,
    );
  }
  const held = [volume.grant, ...volume.readers].find((grant) => grant.state !== 'FREE');
  if (held !== undefined) {
    throw new HoldfastError(
      'IN_USE',
      `Volume ${volume.name} is granted to ${held.holder?.nodeId} (${held.state}). Unpublish it first.`,
    );
  }
  if (volume.state === 'CREATING') forgetClone(d, volume);
  const pool = requirePool(d, volume.poolUuid);
  tables.volumeName.delete(d.tx, volume.name);
  pool.provisionedBytes -= volume.sizeBytes;
  tables.pool.put(d.tx, pool, pool.uuid);
  audit(d, 'delete', {
    poolUuid: pool.uuid,
    volumeUuid: uuid,
    epoch: volume.grant.epoch,
    detail: volume.name,
  });
  tables.volume.put(d.tx, { ...volume, state: 'DELETING' }, uuid);
  tables.deleting.put(d.tx, true, pool.uuid, uuid);
  if (volume.grant.epoch === 0n) {
    volumeWiped(d, uuid, 'never granted: it has no data and no record on the pool');
    return false;
  }
  return true;
}

/** The cut for it goes on, for nobody. */
function forgetClone(d: Decision, volume: VolumeRecord): void {
  const cut = tables.cutting.get(d.tx, volume.poolUuid, volume.sourceVolumeUuid);
  if (cut?.cloneUuid !== volume.uuid) return;
  tables.cutting.put(d.tx, { ...cut, cloneUuid: '' }, volume.poolUuid, volume.sourceVolumeUuid);
}

/** What a wipe has to remove from the pool: its writable layer. What is below goes when nothing else needs it (reclaim.ts). */
export function wipeOf(
  tx: Snapshot,
  uuid: string,
): { volume: VolumeRecord; top: LayerRecord; slabs: SlabRun[] } | undefined {
  const volume = tables.volume.get(tx, uuid);
  if (volume?.state !== 'DELETING') return undefined;
  const top = requireLayer(tx, volume.poolUuid, volume.topLayerId);
  return { volume, top, slabs: slabsOf(tx, volume.poolUuid, top.layerId) };
}

/** The volume is gone from the pool: its slabs and slots are free. */
export function volumeWiped(d: Decision, uuid: string, proof: string): void {
  const wipe = wipeOf(d.tx, uuid);
  if (wipe === undefined) return;
  const { volume, top, slabs } = wipe;
  const pool = requirePool(d, volume.poolUuid);
  freeFromLayer(d.tx, pool, top.layerId, slabs);
  layerGone(d, pool, top.layerId);
  markSlot(d, pool, 'volume', volume.slot, false);
  tables.volume.delete(d.tx, uuid);
  tables.deleting.delete(d.tx, pool.uuid, uuid);
  tables.pool.put(d.tx, pool, pool.uuid);
  audit(d, 'wiped', {
    poolUuid: pool.uuid,
    volumeUuid: uuid,
    epoch: volume.grant.epoch,
    proof,
    detail: `${volume.name}: ${countSlabs(slabs)} slabs free`,
  });
}

/** Grows the size; a size that it has already is success. Volumes never shrink. */
export function expandVolume(d: Decision, uuid: string, sizeBytes: bigint, limitBytes: bigint): VolumeRecord {
  const volume = requireReady(d, uuid);
  checkSize(sizeBytes, limitBytes);
  if (limitBytes > 0n && volume.sizeBytes > limitBytes) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `Volume ${volume.name} has ${volume.sizeBytes} bytes already, more than the limit of ${limitBytes}; volumes never shrink.`,
    );
  }
  if (volume.sizeBytes >= sizeBytes) return volume;
  if (tables.cutting.get(d.tx, volume.poolUuid, uuid) !== undefined) {
    throw new HoldfastError(
      'OPERATION_PENDING',
      `Volume ${volume.name} is being cut for a snapshot or a copy. Repeat the call when that has ended.`,
    );
  }
  const pool = requirePool(d, volume.poolUuid);
  requireRoomFor(d, [pool], sizeBytes - volume.sizeBytes);
  pool.provisionedBytes += sizeBytes - volume.sizeBytes;
  tables.pool.put(d.tx, pool, pool.uuid);
  const top = tables.layer.get(d.tx, pool.uuid, volume.topLayerId);
  if (top !== undefined) tables.layer.put(d.tx, { ...top, sizeBytes }, pool.uuid, top.layerId);
  const grown: VolumeRecord = { ...volume, sizeBytes };
  tables.volume.put(d.tx, grown, uuid);
  audit(d, 'expand', {
    poolUuid: pool.uuid,
    volumeUuid: uuid,
    epoch: volume.grant.epoch,
    detail: `${volume.name}: ${volume.sizeBytes} to ${sizeBytes} bytes`,
  });
  return grown;
}

/** Sets mutable parameters; those that are not named stay as they are. */
export function modifyVolume(
  d: Decision,
  uuid: string,
  mutableParameters: Readonly<Record<string, string>>,
): VolumeRecord {
  const volume = requireReady(d, uuid);
  const before = volume.mutableParameters ?? {};
  const after = { ...before, ...mutableParameters };
  checkParameters(after, 'volume');
  if (sameParameters(before, after)) return volume;
  const modified: VolumeRecord = { ...volume, mutableParameters: after };
  tables.volume.put(d.tx, modified, uuid);
  audit(d, 'modify', {
    poolUuid: volume.poolUuid,
    volumeUuid: uuid,
    detail: `${volume.name}: ${JSON.stringify(before)} to ${JSON.stringify(after)}`,
  });
  return modified;
}

export const maxListEntries = 1000;

/** One page, in the order of UUIDs: a token names the last one seen, so deletes between pages do not disturb it. */
export function listVolumes(
  tx: Snapshot,
  { maxEntries, token, includeDeleting }: { maxEntries: number; token: string; includeDeleting: boolean },
): { volumes: VolumeRecord[]; nextToken: string } {
  const wanted = maxEntries > 0 ? Math.min(maxEntries, maxListEntries) : maxListEntries;
  let after = token === '' ? undefined : uuidOfToken(token, 'ListVolumes');
  const volumes: VolumeRecord[] = [];
  // One more than wanted tells whether there is a next page.
  while (volumes.length <= wanted) {
    const page = tables.volume.list(tx, [], {
      ...(after === undefined ? {} : { after: [after] }),
      limit: wanted + 1,
    });
    volumes.push(
      ...page.filter(({ state }) => state === 'READY' || (includeDeleting && state === 'DELETING')),
    );
    after = page.at(-1)?.uuid;
    if (page.length <= wanted) break;
  }
  const more = volumes.length > wanted;
  const shown = volumes.slice(0, wanted);
  return { volumes: shown, nextToken: more ? `v1.${shown.at(-1)?.uuid}` : '' };
}

export function uuidOfToken(token: string, method: string): string {
  const uuid = /^v1\.([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$/.exec(token)?.[1];
  if (uuid === undefined) {
    throw new HoldfastError(
      'BAD_TOKEN',
      `The token ${token} was not made by ${method}. Start without a token.`,
    );
  }
  return uuid;
}

/** A volume that this database does not know, as its record on the pool describes it. */
export interface VolumeOnDisk {
  volumeId: bigint;
  slot: number;
  name: string;
  sizeBytes: bigint;
  parameters: Record<string, string>;
  epoch: bigint;
  state: string;
  hostId: number;
  generation: bigint;
  /** Newest first. */
  layers: Pick<LayerRecord, 'layerId' | 'slot' | 'parentLayerId' | 'birth' | 'sizeBytes' | 'frozen'>[];
  slabs: { layerId: bigint; runs: SlabRun[] }[];
}

/**
 * Knows a volume again. Without a record on the pool it was never opened, holds nothing of its own, and is made from its context:
 * empty, or on top of what it is a copy of.
 */
export function importVolume(
  d: Decision,
  uuid: string,
  context: VolumeContext,
  disk: VolumeOnDisk | undefined,
): VolumeRecord {
  const known = tables.volume.get(d.tx, uuid);
  if (known !== undefined) return requireVolume(d, uuid);
  const pool = requirePool(d, context.poolUuid);
  if (pool.removing) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Volume ${uuid} cannot be known again: pool ${pool.name} is being removed.`,
    );
  }
  const name = disk?.name ?? context.name;
  const taken = tables.volumeName.get(d.tx, name);
  if (taken !== undefined) {
    throw new HoldfastError(
      'ALREADY_EXISTS',
      `Volume ${uuid} cannot be known again: another volume (${taken}) has its name ${name}.`,
    );
  }
  checkSize(disk?.sizeBytes ?? context.sizeBytes, 0n);
  if (disk === undefined) {
    return insert(d, pool, uuid, { ...context, parentLayerId: parentFrom(d, context) }, 'import');
  }
  requireHolderDead(d, pool, disk);
  return insertFromDisk(d, pool, uuid, disk, context);
}

/**
 * What a copy that was never opened stands on. A snapshot that is known shows what it showed then. What a copy of a volume froze has
 * no name, so nothing can find it again; and an empty volume in its place would be the loss of what the copy shows.
 */
function parentFrom(d: Decision, context: VolumeContext): bigint {
  const { sourceSnapshotUuid = '', sourceVolumeUuid = '' } = context;
  if (sourceSnapshotUuid === '' && sourceVolumeUuid === '') return 0n;
  const cannot = `Volume ${context.name} cannot be known again: it was never opened, so nothing of it is on the pool, and it is a copy of`;
  if (sourceSnapshotUuid === '') {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${cannot} volume ${sourceVolumeUuid} as that was at one moment, which has no name. Nothing was made in its place. Delete ` +
        'its PersistentVolumeClaim and PersistentVolume, and copy the source again.',
    );
  }
  const snapshot = tables.snapshot.get(d.tx, sourceSnapshotUuid);
  if (snapshot?.state !== 'READY' || snapshot.poolUuid !== context.poolUuid) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${cannot} snapshot ${sourceSnapshotUuid}, which ${snapshot === undefined ? 'is not known' : 'is not ready'}. Nothing was made ` +
        'in its place. Restore a database that knows the snapshot, or delete the PersistentVolumeClaim and PersistentVolume and ' +
        'make the copy again from a snapshot that exists.',
    );
  }
  if (context.sizeBytes < snapshot.sizeBytes) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${cannot} snapshot ${snapshot.name}, which has ${snapshot.sizeBytes} bytes, more than the ${context.sizeBytes} of its volume ` +
        'context. Put the size of the volume back into the PersistentVolume.',
    );
  }
  return snapshot.layerId;
}

function requireHolderDead(d: Decision, pool: PoolRecord, disk: VolumeOnDisk): void {
  if (disk.state !== 'open') return;
  const host = tables.host.get(d.tx, pool.uuid, disk.hostId);
  if (host !== undefined && (host.generation > disk.generation || host.state === 'DEAD')) return;
  throw new HoldfastError(
    'FAILED_PRECONDITION',
    `The record of volume ${disk.name} on pool ${pool.name} says that host ${disk.hostId} (generation ` +
      `${disk.generation}) has it open${host === undefined ? '' : `, and ${host.nodeId} is ${host.state}`}. Fence that node first.`,
  );
}

/**
 * A chain may go on in layers that are known already, with a volume or snapshot that shares them. New frozen ones are kept for
 * good: the same disk may have volumes and snapshots that need them and that nobody has asked for yet.
 */
function insertFromDisk(
  d: Decision,
  pool: PoolRecord,
  uuid: string,
  disk: VolumeOnDisk,
  context: VolumeContext,
): VolumeRecord {
  const [top] = disk.layers;
  const shared = disk.layers.findIndex(
    (layer) => tables.layer.get(d.tx, pool.uuid, layer.layerId) !== undefined,
  );
  const fresh = shared < 0 ? disk.layers : disk.layers.slice(0, shared);
  const below = shared < 0 ? undefined : disk.layers[shared];
  const sane = fresh.every((layer, index) => layer.frozen === index > 0);
  if (
    top === undefined ||
    fresh.length === 0 ||
    !sane ||
    (below !== undefined && !isSameLayer(d, pool, below))
  ) {
    throw new HoldfastError(
      'CORRUPT',
      `Volume ${disk.name} on pool ${pool.name} cannot be known again: its layers are incomplete, or their numbers are ` +
        'taken in the database. Run: holdfast pool check',
    );
  }
  markSlot(d, pool, 'volume', disk.slot, true);
  // A record may name a parent that was removed since: what comes next in the list is what the chain really has.
  let parentId = below === undefined ? 0n : livingFrom(d.tx, pool.uuid, below.layerId);
  for (const layer of fresh.toReversed()) {
    markSlot(d, pool, 'layer', layer.slot, true);
    const record = {
      ...unused,
      ...layer,
      parentLayerId: 0n,
      volumeUuid: uuid,
      slabCount: 0,
      kept: layer.frozen,
    };
    tables.layer.put(d.tx, record, pool.uuid, layer.layerId);
    if (parentId !== 0n) attach(d, pool.uuid, layer.layerId, parentId);
    parentId = layer.layerId;
    if (layer.layerId >= pool.nextLayerId) pool.nextLayerId = layer.layerId + 1n;
  }
  if (disk.volumeId >= pool.nextVolumeId) pool.nextVolumeId = disk.volumeId + 1n;
  for (const { layerId, runs } of disk.slabs) {
    if (!fresh.some((layer) => layer.layerId === layerId)) continue;
    if (countSlabs(reserveFree(d.tx, pool, runs)) !== countSlabs(runs)) {
      throw new HoldfastError(
        'OPERATION_PENDING',
        `The pool changed while volume ${disk.name} was read. Repeat the call.`,
      );
    }
    addToLayer(d.tx, pool, layerId, runs);
    for (const run of runs) {
      if (run.generation >= pool.nextSlabGeneration) pool.nextSlabGeneration = run.generation + 1n;
    }
  }
  pool.provisionedBytes += disk.sizeBytes;
  tables.pool.put(d.tx, pool, pool.uuid);
  const volume: VolumeRecord = {
    uuid,
    volumeId: disk.volumeId,
    name: disk.name,
    poolUuid: pool.uuid,
    slot: disk.slot,
    sizeBytes: disk.sizeBytes,
    parameters: disk.parameters,
    state: 'READY',
    topLayerId: top.layerId,
    lastEpoch: disk.epoch,
    grant: { state: 'FREE', epoch: disk.epoch, holder: null, publishId: '', readOnly: false },
    readers: [],
    publications: [],
    createdUnixMs: d.nowUnixMs,
    sourceSnapshotUuid: context.sourceSnapshotUuid ?? '',
    sourceVolumeUuid: context.sourceVolumeUuid ?? '',
  };
  tables.volume.put(d.tx, volume, uuid);
  tables.volumeName.put(d.tx, uuid, disk.name);
  audit(d, 'import', {
    poolUuid: pool.uuid,
    volumeUuid: uuid,
    epoch: disk.epoch,
    proof: `volume record in slot ${disk.slot}`,
    detail: `${disk.name}: ${countSlabs(disk.slabs.flatMap((layer) => layer.runs))} slabs found`,
  });
  return volume;
}

/** What the disk says of a layer is what the database knows. */
function isSameLayer(d: Decision, pool: PoolRecord, disk: VolumeOnDisk['layers'][number]): boolean {
  const known = tables.layer.get(d.tx, pool.uuid, disk.layerId);
  return known !== undefined && known.frozen && known.slot === disk.slot && known.birth === disk.birth;
}
