/** Volumes: created, found, grown, deleted, known again. */
import { HoldfastError, type VolumeContext } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, mayDecide, requirePool, type Decision } from './decision.ts';
import { requireVolume } from './grants.ts';
import { markSlot, takeSlot } from './pools.ts';
import { tables, type LayerRecord, type PoolRecord, type SlabRun, type VolumeRecord } from './records.ts';
import { addToLayer, freeSlabs, reserveFree, slabsOf } from './slabs.ts';
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
}

export function createVolume(d: Decision, request: CreateRequest): VolumeRecord {
  checkName(request.name);
  checkSize(request.sizeBytes, request.limitBytes);
  checkParameters(request.parameters);
  const known = tables.volumeName.get(d.tx, request.name);
  if (known !== undefined) return compatible(requireVolume(d, known), request);
  const pool = choosePool(d, request.poolUuids);
  return insert(d, pool, d.newId(), request, 'create');
}

function insert(
  d: Decision,
  pool: PoolRecord,
  uuid: string,
  what: { name: string; sizeBytes: bigint; parameters: Record<string, string> },
  event: string,
): VolumeRecord {
  const layer: LayerRecord = {
    layerId: pool.nextLayerId,
    slot: takeSlot(d, pool, 'layer'),
    parentLayerId: 0n,
    birth: pool.nextLayerId,
    sizeBytes: what.sizeBytes,
    frozen: false,
    volumeUuid: uuid,
    slabCount: 0,
  };
  const volume: VolumeRecord = {
    uuid,
    volumeId: pool.nextVolumeId,
    name: what.name,
    poolUuid: pool.uuid,
    slot: takeSlot(d, pool, 'volume'),
    sizeBytes: what.sizeBytes,
    parameters: what.parameters,
    state: 'READY',
    topLayerId: layer.layerId,
    grant: { state: 'FREE', epoch: 0n, holder: null, publishId: '', readOnly: false },
    publication: null,
    createdUnixMs: d.nowUnixMs,
  };
  pool.nextLayerId += 1n;
  pool.nextVolumeId += 1n;
  pool.provisionedBytes += what.sizeBytes;
  tables.pool.put(d.tx, pool, pool.uuid);
  tables.layer.put(d.tx, layer, pool.uuid, layer.layerId);
  tables.volume.put(d.tx, volume, uuid);
  tables.volumeName.put(d.tx, uuid, what.name);
  audit(d, event, { poolUuid: pool.uuid, volumeUuid: uuid, detail: `${what.name}, ${what.sizeBytes} bytes` });
  return volume;
}

function compatible(volume: VolumeRecord, request: CreateRequest): VolumeRecord {
  const wrong =
    volume.sizeBytes < request.sizeBytes || (request.limitBytes > 0n && volume.sizeBytes > request.limitBytes)
      ? `with ${volume.sizeBytes} bytes`
      : !sameParameters(volume.parameters, request.parameters)
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

function sameParameters(a: Readonly<Record<string, string>>, b: Readonly<Record<string, string>>): boolean {
  const keys = Object.keys(a);
  return keys.length === Object.keys(b).length && keys.every((key) => a[key] === b[key]);
}

function checkName(name: string): void {
  const bytes = Buffer.byteLength(name);
  // eslint-disable-next-line no-control-regex -- control characters are what is refused
  if (bytes === 0 || bytes > maxNameLength || /[\u0000-\u001f\u007f]/.test(name)) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `A volume name has 1 to ${maxNameLength} bytes and no control characters; this one has ${bytes} bytes.`,
    );
  }
}

function checkParameters(parameters: Readonly<Record<string, string>>): void {
  const bytes = Buffer.byteLength(JSON.stringify(parameters));
  if (bytes > maxParametersLength) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The volume's parameters take ${bytes} bytes as JSON; its record has room for ${maxParametersLength}. Shorten them.`,
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
function choosePool(d: Decision, wanted: readonly string[]): PoolRecord {
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
  return usable.reduce((best, pool) => (isRoomier(pool, best) ? pool : best));
}

function isRoomier(a: PoolRecord, b: PoolRecord): boolean {
  const [freeA, freeB] = [a.slabsFree * a.slabSize, b.slabsFree * b.slabSize];
  return freeA !== freeB ? freeA > freeB : a.provisionedBytes < b.provisionedBytes;
}

/** A volume's layers, newest first. */
export function layersOf(tx: Snapshot, volume: VolumeRecord): LayerRecord[] {
  const chain: LayerRecord[] = [];
  for (let id = volume.topLayerId; id !== 0n; ) {
    const layer = tables.layer.get(tx, volume.poolUuid, id);
    if (layer === undefined) {
      throw new HoldfastError(
        'INTERNAL',
        `Layer ${id} of volume ${volume.name} is missing from the database.`,
      );
    }
    chain.push(layer);
    id = layer.parentLayerId;
  }
  return chain;
}

/** Deleting is durable when this commits. Returns true when slabs wait to be wiped. */
export function deleteVolume(d: Decision, uuid: string): boolean {
  const volume = tables.volume.get(d.tx, uuid);
  if (volume === undefined || volume.state === 'DELETING') return false;
  if (volume.publication !== null) {
    throw new HoldfastError(
      'IN_USE',
      `Volume ${volume.name} is published to ${volume.publication.nodeId}. Unpublish it first.`,
    );
  }
  if (volume.grant.state !== 'FREE') {
    throw new HoldfastError(
      'IN_USE',
      `Volume ${volume.name} is granted to ${volume.grant.holder?.nodeId} (${volume.grant.state}). Unpublish it first.`,
    );
  }
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

/** What a wipe has to remove from the pool; undefined: nothing is left to wipe. */
export function wipeOf(
  tx: Snapshot,
  uuid: string,
): { volume: VolumeRecord; layers: (LayerRecord & { slabs: SlabRun[] })[] } | undefined {
  const volume = tables.volume.get(tx, uuid);
  if (volume?.state !== 'DELETING') return undefined;
  return {
    volume,
    layers: layersOf(tx, volume).map((layer) => ({
      ...layer,
      slabs: slabsOf(tx, volume.poolUuid, layer.layerId),
    })),
  };
}

/** The volume is gone from the pool: its slabs and slots are free. */
export function volumeWiped(d: Decision, uuid: string, proof: string): void {
  const wipe = wipeOf(d.tx, uuid);
  if (wipe === undefined) return;
  const { volume, layers } = wipe;
  const pool = requirePool(d, volume.poolUuid);
  for (const layer of layers) {
    freeSlabs(d.tx, pool, layer.slabs);
    for (const [parts] of tables.slabs.entries(d.tx, [pool.uuid, layer.layerId])) {
      tables.slabs.delete(d.tx, pool.uuid, layer.layerId, Number(parts[2]));
    }
    tables.layer.delete(d.tx, pool.uuid, layer.layerId);
    markSlot(d, pool, 'layer', layer.slot, false);
  }
  markSlot(d, pool, 'volume', volume.slot, false);
  tables.volume.delete(d.tx, uuid);
  tables.deleting.delete(d.tx, pool.uuid, uuid);
  tables.pool.put(d.tx, pool, pool.uuid);
  audit(d, 'wiped', {
    poolUuid: pool.uuid,
    volumeUuid: uuid,
    epoch: volume.grant.epoch,
    proof,
    detail: `${volume.name}: ${countSlabs(layers.flatMap((layer) => layer.slabs))} slabs free`,
  });
}

/** Grows the size; a size that it has already is success. Volumes never shrink. */
export function expandVolume(d: Decision, uuid: string, sizeBytes: bigint, limitBytes: bigint): VolumeRecord {
  const volume = requireVolume(d, uuid);
  checkSize(sizeBytes, limitBytes);
  if (limitBytes > 0n && volume.sizeBytes > limitBytes) {
    throw new HoldfastError(
      'OUT_OF_RANGE',
      `Volume ${volume.name} has ${volume.sizeBytes} bytes already, more than the limit of ${limitBytes}; volumes never shrink.`,
    );
  }
  if (volume.sizeBytes >= sizeBytes) return volume;
  const pool = requirePool(d, volume.poolUuid);
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

export const maxListEntries = 1000;

/** One page, in the order of UUIDs: a token names the last one seen, so deletes between pages do not disturb it. */
export function listVolumes(
  tx: Snapshot,
  { maxEntries, token, includeDeleting }: { maxEntries: number; token: string; includeDeleting: boolean },
): { volumes: VolumeRecord[]; nextToken: string } {
  const wanted = maxEntries > 0 ? Math.min(maxEntries, maxListEntries) : maxListEntries;
  let after = token === '' ? undefined : uuidOfToken(token);
  const volumes: VolumeRecord[] = [];
  // One more than wanted tells whether there is a next page.
  while (volumes.length <= wanted) {
    const page = tables.volume.list(tx, [], {
      ...(after === undefined ? {} : { after: [after] }),
      limit: wanted + 1,
    });
    volumes.push(...page.filter((volume) => includeDeleting || volume.state === 'READY'));
    after = page.at(-1)?.uuid;
    if (page.length <= wanted) break;
  }
  const more = volumes.length > wanted;
  const shown = volumes.slice(0, wanted);
  return { volumes: shown, nextToken: more ? `v1.${shown.at(-1)?.uuid}` : '' };
}

function uuidOfToken(token: string): string {
  const uuid = /^v1\.([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$/.exec(token)?.[1];
  if (uuid === undefined) {
    throw new HoldfastError(
      'BAD_TOKEN',
      `The token ${token} was not made by ListVolumes. Start without a token.`,
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
  layers: Omit<LayerRecord, 'volumeUuid' | 'slabCount'>[];
  slabs: { layerId: bigint; runs: SlabRun[] }[];
}

/** Knows a volume again. Without a record on the pool it was never opened, holds nothing, and is made from its context. */
export function importVolume(
  d: Decision,
  uuid: string,
  context: VolumeContext,
  disk: VolumeOnDisk | undefined,
): VolumeRecord {
  const known = tables.volume.get(d.tx, uuid);
  if (known !== undefined) return requireVolume(d, uuid);
  const pool = requirePool(d, context.poolUuid);
  const name = disk?.name ?? context.name;
  const taken = tables.volumeName.get(d.tx, name);
  if (taken !== undefined) {
    throw new HoldfastError(
      'ALREADY_EXISTS',
      `Volume ${uuid} cannot be known again: another volume (${taken}) has its name ${name}.`,
    );
  }
  checkSize(disk?.sizeBytes ?? context.sizeBytes, 0n);
  if (disk === undefined) return insert(d, pool, uuid, context, 'import');
  requireHolderDead(d, pool, disk);
  return insertFromDisk(d, pool, uuid, disk);
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

function insertFromDisk(d: Decision, pool: PoolRecord, uuid: string, disk: VolumeOnDisk): VolumeRecord {
  const top = disk.layers[0];
  if (
    top === undefined ||
    disk.layers.some((layer) => tables.layer.get(d.tx, pool.uuid, layer.layerId) !== undefined)
  ) {
    throw new HoldfastError(
      'CORRUPT',
      `Volume ${disk.name} on pool ${pool.name} cannot be known again: its layers are incomplete, or their numbers are ` +
        'taken in the database. Run: holdfast pool check',
    );
  }
  markSlot(d, pool, 'volume', disk.slot, true);
  for (const layer of disk.layers) {
    markSlot(d, pool, 'layer', layer.slot, true);
    tables.layer.put(d.tx, { ...layer, volumeUuid: uuid, slabCount: 0 }, pool.uuid, layer.layerId);
    if (layer.layerId >= pool.nextLayerId) pool.nextLayerId = layer.layerId + 1n;
  }
  if (disk.volumeId >= pool.nextVolumeId) pool.nextVolumeId = disk.volumeId + 1n;
  for (const { layerId, runs } of disk.slabs) {
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
    grant: { state: 'FREE', epoch: disk.epoch, holder: null, publishId: '', readOnly: false },
    publication: null,
    createdUnixMs: d.nowUnixMs,
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
