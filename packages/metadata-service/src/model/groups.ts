/**
 * Groups of snapshots: the writes of all volumes are held, then all are cut. An attempt either names all or none: when one cut did
 * not happen while all were held, the names are taken off the others, and another attempt begins when their cuts have ended.
 */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot } from '../store/store.ts';
import { audit, requireAuthority, requirePool, type Decision } from './decision.ts';
import { requireReady } from './grants.ts';
import { layerGone } from './layers.ts';
import { tables, type CutRecord, type GroupRecord } from './records.ts';
import {
  beginCut,
  dropName,
  dropSnapshot,
  insertSnapshot,
  quiesceParameter,
  requireSnapshot,
  type IsConnected,
} from './snapshots.ts';
import { checkName, checkParameters, sameParameters } from './volumes.ts';

const maxAttempts = 5;
export const maxGroupVolumes = 64;

export interface GroupRequest {
  name: string;
  sourceVolumeUuids: readonly string[];
  parameters: Record<string, string>;
}

export function createGroup(d: Decision, request: GroupRequest, isConnected: IsConnected): GroupRecord {
  checkName(request.name, 'snapshot group');
  checkParameters(request.parameters, 'snapshot group');
  const sources = [...new Set(request.sourceVolumeUuids)].sort();
  const known = tables.groupName.get(d.tx, request.name);
  if (known !== undefined) return sameGroup(requireGroup(d, known), sources, request);
  if (sources.length === 0 || sources.length > maxGroupVolumes) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `A snapshot group has 1 to ${maxGroupVolumes} volumes; ${sources.length} were named.`,
    );
  }
  const volumes = sources.map((uuid) => requireReady(d, uuid));
  const poolUuid = volumes[0]?.poolUuid ?? '';
  const elsewhere = volumes.find((volume) => volume.poolUuid !== poolUuid);
  if (elsewhere !== undefined) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The volumes of a snapshot group are on one pool; ${elsewhere.name} is on ${elsewhere.poolUuid}, ${volumes[0]?.name} on ` +
        `${poolUuid}. Make a group for each pool.`,
    );
  }
  requireAuthority(d, requirePool(d, poolUuid));
  const uuid = d.newId();
  const snapshots = volumes.map((volume, index) => {
    const name = `${uuid}.${index + 1}`;
    return insertSnapshot(d, volume, { name, parameters: request.parameters }, uuid);
  });
  const group: GroupRecord = {
    uuid,
    name: request.name,
    poolUuid,
    state: 'WAITING',
    createdUnixMs: d.nowUnixMs,
    parameters: request.parameters,
    sourceVolumeUuids: sources,
    snapshotUuids: snapshots.map((snapshot) => snapshot.uuid),
    attempts: 0,
    cutId: '',
  };
  tables.group.put(d.tx, group, uuid);
  tables.groupName.put(d.tx, uuid, group.name);
  tables.grouping.put(d.tx, true, poolUuid, uuid);
  return beginAttempt(d, group, isConnected);
}

function sameGroup(group: GroupRecord, sources: readonly string[], request: GroupRequest): GroupRecord {
  const same =
    group.sourceVolumeUuids.length === sources.length &&
    sources.every((uuid, index) => group.sourceVolumeUuids[index] === uuid) &&
    sameParameters(group.parameters, request.parameters);
  if (same) return group;
  throw new HoldfastError(
    'ALREADY_EXISTS',
    `A snapshot group named ${group.name} exists of other volumes or with other parameters. Use another name, or delete that ` +
      'group first.',
  );
}

export function requireGroup(d: { readonly tx: Snapshot }, uuid: string): GroupRecord {
  const group = tables.group.get(d.tx, uuid);
  if (group === undefined) throw new HoldfastError('NOT_FOUND', `Snapshot group ${uuid} does not exist.`);
  return group;
}

/** Begins a cut of every member. @throws HoldfastError when one cannot be cut now, and nothing is changed */
export function beginAttempt(d: Decision, group: GroupRecord, isConnected: IsConnected): GroupRecord {
  const quiesce = group.parameters[quiesceParameter] === 'true';
  for (const snapshotUuid of group.snapshotUuids) {
    const snapshot = requireSnapshot(d.tx, snapshotUuid);
    tables.snapshot.put(d.tx, { ...snapshot, layerId: 0n }, snapshotUuid);
    const volume = requireReady(d, snapshot.sourceVolumeUuid);
    beginCut(d, volume, { snapshotUuid, cloneUuid: '', groupUuid: group.uuid, quiesce }, isConnected);
  }
  const begun: GroupRecord = {
    ...group,
    state: 'HOLDING',
    attempts: group.attempts + 1,
    cutId: d.newId(),
  };
  tables.group.put(d.tx, begun, group.uuid);
  return begun;
}

/** Its cuts that are not known to have happened. */
export function cutsOf(d: { readonly tx: Snapshot }, group: GroupRecord): CutRecord[] {
  return group.sourceVolumeUuids
    .map((uuid) => tables.cutting.get(d.tx, group.poolUuid, uuid))
    .filter((cut) => cut?.groupUuid === group.uuid) as CutRecord[];
}

/** Nothing is named. Cuts that were ordered go on for nobody, the others never were; then it is tried again, or given up. */
export function attemptFailed(d: Decision, uuid: string, cutId: string, why: string): void {
  const group = tables.group.get(d.tx, uuid);
  if (group === undefined || group.state === 'READY' || group.cutId !== cutId) return;
  const snapshots = group.snapshotUuids.map((member) => requireSnapshot(d.tx, member));
  for (const cut of cutsOf(d, group)) if (!cut.ordered) cancelCut(d, group.poolUuid, cut);
  for (const snapshot of snapshots) {
    dropName(d, snapshot);
    tables.snapshot.put(d.tx, { ...snapshot, layerId: 0n }, snapshot.uuid);
  }
  audit(d, 'group-failed', {
    poolUuid: group.poolUuid,
    detail: `${group.name}, attempt ${group.attempts}: ${why}`,
  });
  tables.group.put(d.tx, { ...group, state: 'WAITING', cutId: '' }, uuid);
  if (group.attempts >= maxAttempts) abandonGroup(d, uuid, why);
}

/** It was never ordered, so its layer is on no disk. */
function cancelCut(d: Decision, poolUuid: string, cut: CutRecord): void {
  tables.cutting.delete(d.tx, poolUuid, cut.volumeUuid);
  layerGone(d, requirePool(d, poolUuid), cut.topLayerId);
}

/** Gives a group up that is not READY: nothing of it is named. */
export function abandonGroup(d: Decision, uuid: string, why: string): void {
  const group = tables.group.get(d.tx, uuid);
  if (group === undefined || group.state === 'READY') return;
  removeGroup(d, group);
  audit(d, 'group-abandoned', { poolUuid: group.poolUuid, detail: `${group.name}: ${why}` });
}

export function deleteGroup(d: Decision, uuid: string): void {
  const group = tables.group.get(d.tx, uuid);
  if (group === undefined) return;
  removeGroup(d, group);
  audit(d, 'group-deleted', { poolUuid: group.poolUuid, detail: group.name });
}

function removeGroup(d: Decision, group: GroupRecord): void {
  for (const cut of cutsOf(d, group)) if (!cut.ordered) cancelCut(d, group.poolUuid, cut);
  for (const member of group.snapshotUuids) dropSnapshot(d, requireSnapshot(d.tx, member));
  tables.group.delete(d.tx, group.uuid);
  tables.groupName.delete(d.tx, group.name);
  tables.grouping.delete(d.tx, group.poolUuid, group.uuid);
}
