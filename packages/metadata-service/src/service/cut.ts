/**
 * Cuts (DESIGN section 4): the holder of an open volume does it, any live agent does it for a closed one under a grant of its own.
 * The cut is on record before it is ordered; this repeats the order until the disk has it. When whoever had the order is dead or
 * has let go of the volume, the volume record says whether it happened: nobody else is granted the volume before that is known.
 */
import type { OrderResult__Output, VolumeCut, VolumeCutResult__Output } from '@holdfast/proto';
import { applyGrant, maintain, requireNoOrphans } from '../model/grants.ts';
import { isMaintenance, sameLife } from '../model/grant.ts';
import { lifeOf } from '../model/hosts.ts';
import { layersOf, requireLayer } from '../model/layers.ts';
import {
  tables,
  type CutRecord,
  type GrantRecord,
  type GroupRecord,
  type HostLife,
  type PoolRecord,
  type VolumeRecord,
} from '../model/records.ts';
import { compactionOf } from '../model/segments.ts';
import { slabsOf } from '../model/slabs.ts';
import { cutHappened, cutOrdered } from '../model/snapshots.ts';
import type { Snapshot } from '../store/store.ts';
import type { Core } from './core.ts';
import { anyLiveHost, isLive, requireOurs } from './helpers.ts';
import { OrderFailed, type Sessions } from './sessions.ts';
import { claimFromWire, grantToWire, layerToWire } from './wire.ts';

/** How long an engine may hold writes for one cut: it needs some milliseconds. */
const holdTimeoutMs = 5000;
const orderTimeoutMs = 15_000;
const readTimeoutMs = 10_000;

export interface CutScene {
  pool: PoolRecord;
  volume: VolumeRecord;
  cut: CutRecord;
  group: GroupRecord | undefined;
}

export function cutScene(tx: Snapshot, volumeUuid: string): CutScene | undefined {
  const volume = tables.volume.get(tx, volumeUuid);
  const pool = volume && tables.pool.get(tx, volume.poolUuid);
  const cut = volume && tables.cutting.get(tx, volume.poolUuid, volumeUuid);
  if (volume === undefined || pool === undefined || cut === undefined) return undefined;
  return { pool, volume, cut, group: cut.groupUuid === '' ? undefined : tables.group.get(tx, cut.groupUuid) };
}

/** Until the cut has happened. A group's cuts are its own business until it is over for them. */
export async function cutVolume(
  core: Core,
  sessions: Sessions,
  volumeUuid: string,
  seconds: (held: number) => void,
): Promise<void> {
  for (;;) {
    const scene = core.read((tx) => cutScene(tx, volumeUuid));
    if (scene === undefined || scene.group !== undefined || core.stopped.signal.aborted) return;
    await cutStep(core, sessions, scene, seconds);
  }
}

/** One step of a cut: brings it nearer to its end, or throws why it has to be tried again. */
export async function cutStep(
  core: Core,
  sessions: Sessions,
  scene: CutScene,
  seconds: (held: number) => void,
): Promise<void> {
  const { pool, volume, cut } = scene;
  const { grant } = volume;
  requireOurs(core, pool);
  if (grant.state === 'FREE') {
    if (cut.ordered && (await readWhetherCut(core, sessions, scene))) return;
    return await openForCut(core, sessions, scene);
  }
  if (core.read((tx) => isMaintenance(grant) && compactionOf(tx, volume) !== undefined)) {
    throw new OrderFailed('UNREACHABLE', `Volume ${volume.name} is being compacted, and is cut right after.`);
  }
  if (isMaintenance(grant) && grant.state !== 'REVOKING') {
    return await orderMaintained(core, sessions, scene, seconds);
  }
  if (grant.state === 'OPEN' && grant.holder !== null) {
    if (!sessions.isConnected(grant.holder.nodeId)) {
      throw new OrderFailed(
        'UNREACHABLE',
        `Volume ${volume.name} is open on ${grant.holder.nodeId}, whose agent is not connected.`,
      );
    }
    if (!cut.ordered) await core.decide((d) => cutOrdered(d, cut, pool.uuid));
    return await orderCuts(core, sessions, grant.holder, [scene], seconds);
  }
  const node = grant.holder?.nodeId ?? '';
  const what = grant.state === 'OFFERED' ? 'opened by' : 'taken back from';
  throw new OrderFailed('UNREACHABLE', `Volume ${volume.name} is being ${what} ${node}.`);
}

/** A live host gets the volume for the cut alone. */
export async function openForCut(
  core: Core,
  sessions: Sessions,
  { pool, volume, cut }: CutScene,
): Promise<void> {
  const life = lifeOf(anyLiveHost(core, sessions, pool));
  await core.decide((d) => {
    const now = cutScene(d.tx, volume.uuid);
    if (now?.cut.topLayerId !== cut.topLayerId || now.volume.grant.state !== 'FREE') return;
    maintain(d, now.pool, now.volume, life);
    cutOrdered(d, cut, pool.uuid);
  });
}

async function orderMaintained(
  core: Core,
  sessions: Sessions,
  scene: CutScene,
  seconds: (held: number) => void,
): Promise<void> {
  const { grant, uuid } = scene.volume;
  const life = grant.holder as HostLife;
  try {
    if (!isLive(core, sessions, scene.pool.uuid, life)) {
      throw new OrderFailed('UNREACHABLE', `The agent of ${life.nodeId} went away.`);
    }
    await orderCuts(core, sessions, life, [scene], seconds);
  } catch (error) {
    // Whether it has the volume open now nobody knows: it is revoked like any other.
    await core.decide((d) => {
      const now = tables.volume.get(d.tx, uuid);
      if (now !== undefined && isMaintenance(now.grant) && now.grant.epoch === grant.epoch) {
        applyGrant(d, now, { type: 'unpublish' });
      }
    });
    throw error;
  }
}

/** Orders cuts from one agent. @throws OrderFailed */
export async function orderCuts(
  core: Core,
  sessions: Sessions,
  life: HostLife,
  scenes: readonly CutScene[],
  seconds: (held: number) => void,
): Promise<void> {
  const [first] = scenes;
  if (first === undefined) return;
  // What is open on the agent is held under the group's id; a closed volume needs no hold.
  const held = first.group !== undefined && !isMaintenance(first.volume.grant);
  const result = await sessions.order(
    life.nodeId,
    first.pool.uuid,
    {
      cut_volumes: {
        cut_id: held ? (first.group?.cutId ?? '') : '',
        cuts: core.read((tx) => scenes.map((scene) => cutToWire(tx, scene, core.clock.unixMs()))),
        hold_timeout_ms: holdTimeoutMs,
        quiesce: first.cut.quiesce,
      },
    },
    orderTimeoutMs,
  );
  await settle(core, life, scenes, result, seconds);
}

function cutToWire(tx: Snapshot, { pool, volume, cut }: CutScene, nowUnixMs: number): VolumeCut {
  const top = requireLayer(tx, pool.uuid, cut.topLayerId);
  const snapshot = cut.snapshotUuid === '' ? undefined : tables.snapshot.get(tx, cut.snapshotUuid);
  const layers = (): object[] =>
    layersOf(tx, volume).map((layer) => layerToWire(layer, slabsOf(tx, pool.uuid, layer.layerId)));
  return {
    volume_uuid: volume.uuid,
    epoch: volume.grant.epoch.toString(),
    top: layerToWire({ ...top, sizeBytes: volume.sizeBytes }, []),
    snapshot_name: snapshot?.name ?? '',
    snapshot_unix_ms: nowUnixMs.toString(),
    ...(isMaintenance(volume.grant) ? { grant: grantToWire(volume, volume.grant, layers()) } : {}),
  };
}

async function settle(
  core: Core,
  life: HostLife,
  scenes: readonly CutScene[],
  result: OrderResult__Output,
  seconds: (held: number) => void,
): Promise<void> {
  const answers = new Map(result.cut?.volumes.map((one) => [one.volume_uuid, one]));
  const missing = scenes.find(({ volume }) => !answers.has(volume.uuid));
  if (missing !== undefined) {
    throw new OrderFailed(
      'INCOMPLETE',
      `The agent of ${life.nodeId} left volume ${missing.volume.name} out of a cut.`,
    );
  }
  await core.decide((d) => {
    for (const { volume, cut } of scenes) {
      const now = tables.volume.get(d.tx, volume.uuid);
      const answer = answers.get(volume.uuid) as VolumeCutResult__Output;
      if (now === undefined || !isSameGrant(now.grant, volume.grant)) continue;
      const maintained = isMaintenance(now.grant);
      cutHappened(d, volume.uuid, {
        topLayerId: cut.topLayerId,
        sizeBytes: BigInt(answer.size_bytes),
        proof: `${life.nodeId} wrote the record that names layer ${cut.topLayerId} as the top`,
        by: { life, claims: answer.claimed.map(claimFromWire) },
      });
      const after = tables.volume.get(d.tx, volume.uuid);
      if (maintained && after !== undefined) {
        applyGrant(d, after, { type: 'returned', holder: life, epoch: after.grant.epoch });
      }
    }
  });
  for (const answer of answers.values()) seconds(Number(answer.held_us) / 1e6);
}

function isSameGrant(a: GrantRecord, b: GrantRecord): boolean {
  return a.state !== 'FREE' && a.epoch === b.epoch && sameLife(a.holder, b.holder);
}

/** Nobody has the volume: its record tells. True: it happened, and that is on record now. */
export async function readWhetherCut(core: Core, sessions: Sessions, scene: CutScene): Promise<boolean> {
  const { pool, volume, cut } = scene;
  // The slabs of its last holder, those of the frozen layer among them, must be known first.
  core.read((tx) => requireNoOrphans({ tx }, volume));
  const host = anyLiveHost(core, sessions, pool);
  const order = { read_volume_record: { slot: volume.slot, volume_uuid: '' } };
  const { volume_record: record } = await sessions.order(host.nodeId, pool.uuid, order, readTimeoutMs);
  if (!record) throw new OrderFailed('INCOMPLETE', `The agent of ${host.nodeId} sent no volume record.`);
  const ours = record.found && record.volume_id === volume.volumeId.toString();
  const top = ours ? BigInt(record.top_layer_id) : cut.frozenLayerId;
  if (top !== cut.topLayerId && top !== cut.frozenLayerId) {
    throw new OrderFailed(
      'CORRUPT',
      `The record of volume ${volume.name} names layer ${top} as its top; ${cut.frozenLayerId} or ${cut.topLayerId} was ` +
        'expected. Run: holdfast pool check',
    );
  }
  if (top === cut.frozenLayerId) return false;
  const frozen = record.layers.find((layer) => layer.layer_id === cut.frozenLayerId.toString());
  await core.decide((d) => {
    const now = cutScene(d.tx, volume.uuid);
    if (now === undefined || now.volume.grant.epoch !== volume.grant.epoch) return;
    cutHappened(d, volume.uuid, {
      topLayerId: cut.topLayerId,
      sizeBytes: frozen === undefined ? volume.sizeBytes : BigInt(frozen.size_bytes),
      proof: `the record in slot ${volume.slot} names layer ${cut.topLayerId} as the top`,
      by: undefined,
    });
  });
  return true;
}
