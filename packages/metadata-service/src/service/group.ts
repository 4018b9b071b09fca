/**
 * Cuts of a group: every open member is held by its agent, then all are cut. What a cut needs when its agent is lost is cut.ts; here
 * is what makes them one. Closed members are opened for the cut before anything is held, so that nobody can write them meanwhile.
 */
import { attemptFailed, abandonGroup, beginAttempt, cutsOf } from '../model/groups.ts';
import { isMaintenance } from '../model/grant.ts';
import { tables, type GroupRecord, type HostLife } from '../model/records.ts';
import { compactionOf } from '../model/segments.ts';
import { cutOrdered, type IsConnected } from '../model/snapshots.ts';
import { HoldfastError } from '@holdfast/common';
import type { Core } from './core.ts';
import { cutScene, cutStep, openForCut, orderCuts, readWhetherCut, type CutScene } from './cut.ts';
import { OrderFailed, type Sessions } from './sessions.ts';

/** From the first hold until the last cut: an engine lets go of held writes after this, and refuses the cut. */
const holdTimeoutMs = 10_000;
const orderTimeoutMs = 15_000;
const pauseMs = 200;
const expired = ['HF_HOLD_EXPIRED', 'HOLD_EXPIRED'];

type Seconds = (held: number) => void;

export async function cutGroup(
  core: Core,
  sessions: Sessions,
  uuid: string,
  seconds: Seconds,
): Promise<void> {
  for (;;) {
    const group = core.read((tx) => tables.group.get(tx, uuid));
    if (group === undefined || group.state === 'READY' || core.stopped.signal.aborted) return;
    if (group.state === 'WAITING') await again(core, sessions, group);
    else if (group.state === 'HOLDING') await hold(core, sessions, group);
    else await cut(core, sessions, group, seconds);
  }
}

/** The cuts of the last attempt end first; then another one begins, if the volumes still allow it. */
async function again(core: Core, sessions: Sessions, group: GroupRecord): Promise<void> {
  const pending = core.read((tx) =>
    group.sourceVolumeUuids.some((uuid) => tables.cutting.get(tx, group.poolUuid, uuid) !== undefined),
  );
  if (pending) {
    await core.nextChange(1000);
    return;
  }
  if (group.attempts > 0) await core.clock.sleep(pauseMs * group.attempts, core.stopped.signal);
  const isConnected: IsConnected = (nodeId) => sessions.isConnected(nodeId);
  try {
    await core.decide((d) => {
      const now = tables.group.get(d.tx, group.uuid);
      if (now?.state === 'WAITING') beginAttempt(d, now, isConnected);
    });
  } catch (error) {
    if (!(error instanceof HoldfastError)) throw error;
    const isPassing = error.code === 'UNAVAILABLE' || error.code === 'OPERATION_PENDING';
    if (isPassing) throw error;
    await core.decide((d) => abandonGroup(d, group.uuid, error.message));
  }
}

function scenesOf(core: Core, group: GroupRecord): CutScene[] {
  return core.read((tx) =>
    cutsOf({ tx }, group).flatMap((one) => {
      const scene = cutScene(tx, one.volumeUuid);
      return scene === undefined ? [] : [scene];
    }),
  );
}

async function hold(core: Core, sessions: Sessions, group: GroupRecord): Promise<void> {
  for (const scene of scenesOf(core, group)) {
    const { volume } = scene;
    if (core.read((tx) => isMaintenance(volume.grant) && compactionOf(tx, volume) !== undefined)) {
      throw new OrderFailed(
        'UNREACHABLE',
        `Volume ${volume.name} is being compacted, and is cut right after.`,
      );
    }
    if (volume.grant.state === 'FREE') await openForCut(core, sessions, scene);
  }
  const scenes = scenesOf(core, group);
  const open = scenes.filter(({ volume }) => !isMaintenance(volume.grant));
  const away = open.find(
    ({ volume: { grant } }) => grant.state !== 'OPEN' || !sessions.isConnected(grant.holder?.nodeId ?? ''),
  );
  if (away !== undefined) {
    return await fail(
      core,
      group,
      `volume ${away.volume.name} is ${away.volume.grant.state}, or its agent is away`,
    );
  }
  const byHolder = groupByHolder(open);
  const held = await Promise.allSettled(
    [...byHolder.values()].map(({ life, scenes: mine }) =>
      sessions.order(
        life.nodeId,
        group.poolUuid,
        {
          hold_volumes: {
            cut_id: group.cutId,
            volumes: mine.map(({ volume }) => ({
              volume_uuid: volume.uuid,
              epoch: volume.grant.epoch.toString(),
            })),
            hold_timeout_ms: holdTimeoutMs,
            quiesce: mine.some((scene) => scene.cut.quiesce),
          },
        },
        orderTimeoutMs,
      ),
    ),
  );
  const refused = held.find((result) => result.status === 'rejected');
  if (refused !== undefined) {
    await release(core, sessions, group, byHolder);
    return await fail(core, group, `not all could be held: ${String(refused.reason)}`);
  }
  await core.decide((d) => {
    const now = tables.group.get(d.tx, group.uuid);
    if (now?.cutId !== group.cutId || now.state !== 'HOLDING') return;
    tables.group.put(d.tx, { ...now, state: 'CUTTING' }, now.uuid);
    for (const { cut: one, volume } of scenes) {
      cutOrdered(d, one, group.poolUuid, isMaintenance(volume.grant) ? 0n : volume.grant.epoch);
    }
  });
}

function groupByHolder(scenes: readonly CutScene[]): Map<string, { life: HostLife; scenes: CutScene[] }> {
  const holders = new Map<string, { life: HostLife; scenes: CutScene[] }>();
  for (const scene of scenes) {
    const life = scene.volume.grant.holder;
    if (life === null) continue;
    const known = holders.get(life.nodeId);
    if (known === undefined) holders.set(life.nodeId, { life, scenes: [scene] });
    else known.scenes.push(scene);
  }
  return holders;
}

/** A hint: what is not released is let go by its time-out. */
async function release(
  core: Core,
  sessions: Sessions,
  group: GroupRecord,
  holders: Map<string, { life: HostLife }>,
): Promise<void> {
  await Promise.allSettled(
    [...holders.values()].map(({ life }) =>
      sessions.order(
        life.nodeId,
        group.poolUuid,
        { release_volumes: { cut_id: group.cutId } },
        orderTimeoutMs,
      ),
    ),
  );
  core.changed();
}

/**
 * What was held is cut by whoever holds it; repeating that is harmless, because the agent refuses what is not held any more and was
 * not cut. A member whose holder is gone has its record read; when that still names the old top, writes may have gone on since.
 */
async function cut(core: Core, sessions: Sessions, group: GroupRecord, seconds: Seconds): Promise<void> {
  const scenes = scenesOf(core, group);
  const open = scenes.filter(({ volume }) => volume.grant.state === 'OPEN' && !isMaintenance(volume.grant));
  const rest = scenes.filter((scene) => !open.includes(scene));
  for (const scene of rest) {
    // Let go of while it was held: it was cut before that, or what was written since is not known.
    if (scene.cut.heldEpoch === 0n || scene.volume.grant.state !== 'FREE') continue;
    if (await readWhetherCut(core, sessions, scene)) return;
    return await fail(core, group, `volume ${scene.volume.name} was let go of before it was cut`);
  }
  const results = await Promise.allSettled([
    ...[...groupByHolder(open).values()].map(({ life, scenes: mine }) =>
      orderCuts(core, sessions, life, mine, seconds),
    ),
    ...rest.map((scene) => cutStep(core, sessions, scene, seconds)),
  ]);
  const errors = results
    .filter((result) => result.status === 'rejected')
    .map(({ reason }) => reason as unknown);
  const lost = errors.find(
    (error): error is OrderFailed => error instanceof OrderFailed && expired.includes(error.code),
  );
  if (lost !== undefined) {
    await release(core, sessions, group, groupByHolder(open));
    return await fail(core, group, `not all were cut while held: ${lost.message}`);
  }
  if (errors.length > 0) throw errors[0];
}

async function fail(core: Core, group: GroupRecord, why: string): Promise<void> {
  core.logger.warn({ group: group.uuid, attempt: group.attempts }, `A group of snapshots: ${why}`);
  await core.decide((d) => attemptFailed(d, group.uuid, group.cutId, why));
}
