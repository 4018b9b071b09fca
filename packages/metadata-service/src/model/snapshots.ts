/**
 * Snapshots: names for frozen layers, and the cuts that freeze them. A cut is on record before it is ordered, with everything that
 * is needed to repeat it, and it ends only by having happened: nobody can know that an order which was sent will not be carried
 * out. Who is not interested any more takes its name off; the layer is then frozen for nobody, and folded.
 */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { reportSlabs, type Claim } from './allocation.ts';
import { audit, requireAuthority, requirePool, type Decision } from './decision.ts';
import { isMaintenance } from './grant.ts';
import { requireReady, requireVolume } from './grants.ts';
import { attach, layersOf, makeLayer, maxChain, requireLayer, useChanged } from './layers.ts';
import { tables, type CutRecord, type HostLife, type SnapshotRecord, type VolumeRecord } from './records.ts';
import { checkName, checkParameters, maxListEntries, sameParameters, uuidOfToken } from './volumes.ts';

/** Freezes the mounted file system around the cut. */
export const quiesceParameter = 'holdfast.io/quiesce';

export interface CutPurpose {
  snapshotUuid: string;
  cloneUuid: string;
  groupUuid: string;
  quiesce: boolean;
}

/** Whether the agent of a node has a session. */
export type IsConnected = (nodeId: string) => boolean;

/** A cut of the volume's chain is on record from here on. @throws HoldfastError when it could not even begin */
export function beginCut(
  d: Decision,
  volume: VolumeRecord,
  purpose: CutPurpose,
  isConnected: IsConnected,
): CutRecord {
  const pool = requirePool(d, volume.poolUuid);
  requireAuthority(d, pool);
  if (tables.cutting.get(d.tx, pool.uuid, volume.uuid) !== undefined) {
    throw new HoldfastError(
      'OPERATION_PENDING',
      `Volume ${volume.name} is being cut for another snapshot or copy. Repeat the call when that has ended.`,
    );
  }
  requireCuttable(volume, isConnected);
  const depth = layersOf(d.tx, volume).length;
  if (depth >= maxChain) {
    throw new HoldfastError(
      'TOO_MANY',
      `Volume ${volume.name} has ${depth} layers, and at most ${maxChain} are possible. Delete snapshots of it; layers go as ` +
        'their blocks are written anew. Or copy its content to a new volume.',
    );
  }
  const top = makeLayer(d, pool, {
    parentLayerId: volume.topLayerId,
    sizeBytes: volume.sizeBytes,
    volumeUuid: volume.uuid,
  });
  const cut: CutRecord = {
    ...purpose,
    volumeUuid: volume.uuid,
    frozenLayerId: volume.topLayerId,
    topLayerId: top.layerId,
    ordered: false,
    heldEpoch: 0n,
    sinceUnixMs: d.nowUnixMs,
  };
  tables.cutting.put(d.tx, cut, pool.uuid, volume.uuid);
  audit(d, 'cut-begin', {
    poolUuid: pool.uuid,
    volumeUuid: volume.uuid,
    epoch: volume.grant.epoch,
    detail: `${volume.name}: layer ${cut.frozenLayerId} freezes under ${cut.topLayerId}`,
  });
  return cut;
}

/** An open volume is cut by its holder, a closed one by anybody; in between there is nobody to ask. */
export function requireCuttable(volume: VolumeRecord, isConnected: IsConnected): void {
  const [reader] = volume.readers;
  if (reader !== undefined) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Volume ${volume.name} is open for reading on ${reader.holder?.nodeId}, so nobody can cut it. Unpublish it there first.`,
    );
  }
  const { grant } = volume;
  if (grant.state === 'FREE' || isMaintenance(grant)) return;
  const node = grant.holder?.nodeId ?? '';
  if (grant.state !== 'OPEN') {
    throw new HoldfastError(
      'UNAVAILABLE',
      `Volume ${volume.name} is being ${grant.state === 'OFFERED' ? 'opened by' : 'taken back from'} ${node}. Repeat the call.`,
    );
  }
  if (!isConnected(node)) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `Volume ${volume.name} is open on ${node}, whose agent is not connected. Wait until it is back, or unpublish the volume ` +
        'there (which fences the node when it is lost), then repeat the call.',
    );
  }
}

/** From now on the disk decides whether it happened. */
export function cutOrdered(d: Decision, cut: CutRecord, poolUuid: string, heldEpoch = 0n): void {
  const now = tables.cutting.get(d.tx, poolUuid, cut.volumeUuid);
  if (now?.topLayerId === cut.topLayerId) {
    tables.cutting.put(d.tx, { ...now, ordered: true, heldEpoch }, poolUuid, cut.volumeUuid);
  }
}

export interface CutOutcome {
  topLayerId: bigint;
  /** Of the frozen layer. */
  sizeBytes: bigint;
  proof: string;
  /** Who cut it, with all slabs of the frozen layer. Undefined: read from the disk, by when the slabs are known. */
  by: { life: HostLife; claims: readonly Claim[] } | undefined;
}

/** The record on the disk names the new top. False: not a cut that is under way. */
export function cutHappened(d: Decision, volumeUuid: string, outcome: CutOutcome): boolean {
  const volume = tables.volume.get(d.tx, volumeUuid);
  const cut = volume && tables.cutting.get(d.tx, volume.poolUuid, volumeUuid);
  if (cut?.topLayerId !== outcome.topLayerId) return false;
  const pool = requirePool(d, requireVolume(d, volumeUuid).poolUuid);
  if (outcome.by !== undefined) reportSlabs(d, pool.uuid, outcome.by.life, outcome.by.claims);
  const current = requireVolume(d, volumeUuid);
  const frozen = requireLayer(d.tx, pool.uuid, cut.frozenLayerId);
  const writer = outcome.by?.life ?? current.grant.holder;
  tables.layer.put(
    d.tx,
    { ...frozen, frozen: true, sizeBytes: outcome.sizeBytes, writer, snapshotUuid: cut.snapshotUuid },
    pool.uuid,
    frozen.layerId,
  );
  const top = requireLayer(d.tx, pool.uuid, cut.topLayerId);
  tables.layer.put(d.tx, { ...top, sizeBytes: current.sizeBytes }, pool.uuid, top.layerId);
  tables.volume.put(d.tx, { ...current, topLayerId: cut.topLayerId }, volumeUuid);
  tables.cutting.delete(d.tx, pool.uuid, volumeUuid);
  audit(d, 'cut', {
    poolUuid: pool.uuid,
    volumeUuid,
    nodeId: writer?.nodeId ?? '',
    epoch: current.grant.epoch,
    generation: writer?.generation ?? 0n,
    proof: outcome.proof,
    detail: `${current.name}: layer ${cut.frozenLayerId} is frozen, ${cut.topLayerId} is the top`,
  });
  if (cut.cloneUuid !== '') makeClone(d, pool.uuid, cut);
  useChanged(d, pool.uuid, cut.frozenLayerId);
  if (cut.snapshotUuid !== '') nameLayer(d, cut, outcome.sizeBytes);
  return true;
}

function makeClone(d: Decision, poolUuid: string, cut: CutRecord): void {
  const clone = tables.volume.get(d.tx, cut.cloneUuid);
  if (clone?.state !== 'CREATING') return;
  attach(d, poolUuid, clone.topLayerId, cut.frozenLayerId);
  tables.volume.put(d.tx, { ...clone, state: 'READY' }, clone.uuid);
  audit(d, 'clone', {
    poolUuid,
    volumeUuid: clone.uuid,
    detail: `${clone.name} is a copy of layer ${cut.frozenLayerId}`,
  });
}

/** The members of a group get their names together, with the last one. */
function nameLayer(d: Decision, cut: CutRecord, sizeBytes: bigint): void {
  const snapshot = requireSnapshot(d.tx, cut.snapshotUuid);
  const made = { ...snapshot, layerId: cut.frozenLayerId, sizeBytes, createdUnixMs: d.nowUnixMs };
  tables.snapshot.put(d.tx, made, made.uuid);
  if (snapshot.groupUuid === '') return ready(d, made);
  const group = tables.group.get(d.tx, snapshot.groupUuid);
  if (group === undefined) return;
  const members = group.snapshotUuids.map((uuid) => requireSnapshot(d.tx, uuid));
  if (members.some((member) => member.layerId === 0n)) return;
  for (const member of members) ready(d, { ...member, createdUnixMs: d.nowUnixMs });
  tables.group.put(d.tx, { ...group, state: 'READY', createdUnixMs: d.nowUnixMs }, group.uuid);
  tables.grouping.delete(d.tx, group.poolUuid, group.uuid);
  audit(d, 'group', { poolUuid: group.poolUuid, detail: `${group.name}: ${members.length} snapshots` });
}

function ready(d: Decision, snapshot: SnapshotRecord): void {
  tables.snapshot.put(d.tx, { ...snapshot, state: 'READY' }, snapshot.uuid);
  audit(d, 'name', {
    poolUuid: snapshot.poolUuid,
    volumeUuid: snapshot.sourceVolumeUuid,
    detail: `${snapshot.name} is layer ${snapshot.layerId}`,
  });
}

// ------------------------------------------------------------------------------------------------ snapshots

export function requireSnapshot(tx: Snapshot, uuid: string): SnapshotRecord {
  const snapshot = tables.snapshot.get(tx, uuid);
  if (snapshot === undefined) throw new HoldfastError('NOT_FOUND', `Snapshot ${uuid} does not exist.`);
  return snapshot;
}

export interface SnapshotRequest {
  name: string;
  sourceVolumeUuid: string;
  parameters: Record<string, string>;
}

/** The snapshot of this name, or a new one whose cut begins. */
export function createSnapshot(
  d: Decision,
  request: SnapshotRequest,
  isConnected: IsConnected,
): SnapshotRecord {
  checkName(request.name, 'snapshot');
  checkParameters(request.parameters, 'snapshot');
  const known = tables.snapshotName.get(d.tx, request.name);
  if (known !== undefined) return sameSnapshot(requireSnapshot(d.tx, known), request);
  const volume = requireReady(d, request.sourceVolumeUuid);
  const snapshot = insertSnapshot(d, volume, request, '');
  const quiesce = request.parameters[quiesceParameter] === 'true';
  beginCut(d, volume, { snapshotUuid: snapshot.uuid, cloneUuid: '', groupUuid: '', quiesce }, isConnected);
  return snapshot;
}

function sameSnapshot(snapshot: SnapshotRecord, request: SnapshotRequest): SnapshotRecord {
  const wrong =
    snapshot.sourceVolumeUuid !== request.sourceVolumeUuid
      ? `of volume ${snapshot.sourceVolumeUuid}`
      : !sameParameters(snapshot.parameters, request.parameters)
        ? `with other parameters (${JSON.stringify(snapshot.parameters)})`
        : undefined;
  if (wrong === undefined) return snapshot;
  throw new HoldfastError(
    'ALREADY_EXISTS',
    `A snapshot named ${snapshot.name} exists ${wrong}. Use another name, or delete that snapshot first.`,
  );
}

export function insertSnapshot(
  d: Decision,
  volume: VolumeRecord,
  what: { name: string; parameters: Record<string, string> },
  groupUuid: string,
): SnapshotRecord {
  const snapshot: SnapshotRecord = {
    uuid: d.newId(),
    name: what.name,
    poolUuid: volume.poolUuid,
    sourceVolumeUuid: volume.uuid,
    sizeBytes: volume.sizeBytes,
    layerId: 0n,
    state: 'CUTTING',
    groupUuid,
    createdUnixMs: d.nowUnixMs,
    parameters: what.parameters,
    volumeParameters: volume.parameters,
  };
  tables.snapshot.put(d.tx, snapshot, snapshot.uuid);
  tables.snapshotName.put(d.tx, snapshot.uuid, snapshot.name);
  tables.snapshotSource.put(d.tx, true, volume.uuid, snapshot.uuid);
  return snapshot;
}

/** Drops the name. What it stood for goes when nothing else needs it. */
export function deleteSnapshot(d: Decision, uuid: string): void {
  const snapshot = tables.snapshot.get(d.tx, uuid);
  if (snapshot === undefined) return;
  const group = snapshot.groupUuid === '' ? undefined : tables.group.get(d.tx, snapshot.groupUuid);
  if (group !== undefined && group.state !== 'READY') {
    throw new HoldfastError(
      'OPERATION_PENDING',
      `Snapshot ${snapshot.name} is being cut together with others. Repeat the call when that has ended.`,
    );
  }
  if (group !== undefined) {
    const snapshotUuids = group.snapshotUuids.filter((member) => member !== uuid);
    tables.group.put(d.tx, { ...group, snapshotUuids }, group.uuid);
  }
  dropSnapshot(d, snapshot);
}

export function dropSnapshot(d: Decision, snapshot: SnapshotRecord): void {
  tables.snapshot.delete(d.tx, snapshot.uuid);
  tables.snapshotName.delete(d.tx, snapshot.name);
  tables.snapshotSource.delete(d.tx, snapshot.sourceVolumeUuid, snapshot.uuid);
  dropName(d, snapshot);
  audit(d, 'name-dropped', {
    poolUuid: snapshot.poolUuid,
    volumeUuid: snapshot.sourceVolumeUuid,
    detail: `${snapshot.name} was ${snapshot.layerId === 0n ? 'not cut yet' : `layer ${snapshot.layerId}`}`,
  });
}

/** From its layer, or from the cut under way. */
export function dropName(d: Decision, snapshot: SnapshotRecord): void {
  const cut = tables.cutting.get(d.tx, snapshot.poolUuid, snapshot.sourceVolumeUuid);
  if (cut?.snapshotUuid === snapshot.uuid) {
    // Nobody wants its file system to be frozen for it any more: one that never can be would keep the cut from ever ending.
    const forNobody = { ...cut, snapshotUuid: '', groupUuid: '', heldEpoch: 0n, quiesce: false };
    tables.cutting.put(d.tx, forNobody, snapshot.poolUuid, snapshot.sourceVolumeUuid);
  }
  if (snapshot.layerId === 0n) return;
  const layer = requireLayer(d.tx, snapshot.poolUuid, snapshot.layerId);
  if (layer.snapshotUuid !== snapshot.uuid) return;
  tables.layer.put(d.tx, { ...layer, snapshotUuid: '' }, snapshot.poolUuid, layer.layerId);
  useChanged(d, snapshot.poolUuid, layer.layerId);
}

export interface SnapshotFilter {
  maxEntries: number;
  token: string;
  sourceVolumeUuid: string;
  snapshotUuid: string;
}

/** One page, in the order of UUIDs, as listVolumes(). */
export function listSnapshots(
  tx: Snapshot,
  { maxEntries, token, sourceVolumeUuid, snapshotUuid }: SnapshotFilter,
): { snapshots: SnapshotRecord[]; nextToken: string } {
  const wanted = maxEntries > 0 ? Math.min(maxEntries, maxListEntries) : maxListEntries;
  const after = token === '' ? undefined : uuidOfToken(token, 'ListSnapshots');
  if (snapshotUuid !== '') {
    const one = tables.snapshot.get(tx, snapshotUuid);
    const fits = one !== undefined && (sourceVolumeUuid === '' || one.sourceVolumeUuid === sourceVolumeUuid);
    return { snapshots: fits && (after === undefined || snapshotUuid > after) ? [one] : [], nextToken: '' };
  }
  const found =
    sourceVolumeUuid === ''
      ? tables.snapshot.list(tx, [], {
          ...(after === undefined ? {} : { after: [after] }),
          limit: wanted + 1,
        })
      : tables.snapshotSource
          .entries(tx, [sourceVolumeUuid], {
            ...(after === undefined ? {} : { after: [sourceVolumeUuid, after] }),
            limit: wanted + 1,
          })
          .map(([parts]) => requireSnapshot(tx, parts[1] as string));
  const shown = found.slice(0, wanted);
  return { snapshots: shown, nextToken: found.length > wanted ? `v1.${shown.at(-1)?.uuid}` : '' };
}
