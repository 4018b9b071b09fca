/**
 * Takes away what a development cluster made: processes, FUSE connections, mounts, loop devices, sockets. Works from
 * state.json alone, so that it also serves after a crash of `dev up`. Touches nothing that is not named there.
 */
import { existsSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { call } from '@holdfast/common';
import { holdfast, type NodeAgentClient } from '@holdfast/proto';
import { credentials } from '@grpc/grpc-js';
import { detachLoop, isDead, loopDevices, loopOver, mounts, mountShows, unmount } from './mounts.ts';
import {
  abortFuseConnection,
  fuseConnections,
  isAlive,
  signal,
  waitGone,
  type ProcessIdentity,
} from './processes.ts';
import { removeState, type DevNode, type DevProcess, type DevState, type Role } from './state.ts';

function below(path: string, directory: string): boolean {
  return `${path}/`.startsWith(`${directory}/`);
}

/**
 * Unmounts everything below the directories and everything that shows one of the devices, newest first. Devices found on
 * the way (what a bind mount below the directory shows) are added to `devices`.
 */
export async function unmountAll(directories: readonly string[], devices: Set<string>): Promise<void> {
  for (let round = 0; round < 3; round++) {
    const all = mounts();
    const ours = all.filter((mount) => directories.some((directory) => below(mount.mountPoint, directory)));
    for (const mount of ours) {
      if (/^\/dev\/loop\d+$/.test(mount.source)) devices.add(mount.source);
      if (mount.fsType === 'devtmpfs' && /^\/loop\d+$/.test(mount.root)) devices.add(`/dev${mount.root}`);
    }
    const volumes = stillVolumes(devices);
    const wanted = all.filter(
      (mount) => ours.includes(mount) || volumes.some((device) => mountShows(mount, device)),
    );
    if (wanted.length === 0) return;
    for (const mount of wanted.toReversed()) await unmount(mount.mountPoint);
  }
}

/**
 * Those that are attached and still a volume's: its file is the root of a detached mount ("/"); a device that was given
 * to somebody else meanwhile has a file with a name.
 */
function stillVolumes(devices: Iterable<string>): string[] {
  const attached = loopDevices();
  return [...devices].filter((device) => (attached.get(device)?.length ?? 2) <= 1);
}

/**
 * Of recorded devices: those whose engine is gone. A number that was given back in time may be another volume's by now;
 * that one still answers.
 */
async function deadDevices(recorded: Iterable<string>): Promise<string[]> {
  const candidates = stillVolumes(recorded);
  const dead = await Promise.all(candidates.map(isDead));
  return candidates.filter((_, i) => dead[i] === true);
}

async function detachDead(devices: Iterable<string>): Promise<string[]> {
  const left: string[] = [];
  for (const device of await deadDevices(devices)) {
    if (!(await detachLoop(device))) left.push(`loop device ${device}`);
  }
  return left;
}

async function withAgent<T>(
  node: DevNode,
  body: (agent: NodeAgentClient) => Promise<T>,
): Promise<T | undefined> {
  const agent = new holdfast.NodeAgent(`unix:${node.agentSocket}`, credentials.createInsecure());
  try {
    return await body(agent);
  } catch {
    return undefined; // it does not answer: what is recorded has to do, and it is ended by force
  } finally {
    agent.close();
  }
}

/** The devices of a node's volumes: as its agent knows them now, or what is recorded of a node that is gone. */
async function devicesOf(node: DevNode, agentRuns: boolean): Promise<string[]> {
  const listed = agentRuns
    ? await withAgent(node, (agent) => call(agent, agent.ListOpenVolumes, {}, { timeoutMs: 2000 }))
    : undefined;
  return listed?.volumes.map((volume) => volume.device_path) ?? (await deadDevices(node.volumeDevices));
}

/** Asks a living agent to close what is open, so that it can leave its pool. What it cannot close is dealt with later. */
async function closeVolumes(node: DevNode): Promise<void> {
  await withAgent(node, async (agent) => {
    const { volumes } = await call(agent, agent.ListOpenVolumes, {}, { timeoutMs: 2000 });
    await Promise.allSettled(
      volumes.map(({ volume_uuid }) =>
        call(agent, agent.CloseVolume, { volume_uuid }, { timeoutMs: 10_000 }),
      ),
    );
  });
}

/** Kills without mercy: the connections first, so that nobody who waits on a device hangs. */
export async function killHard(processes: readonly ProcessIdentity[]): Promise<boolean> {
  for (const process of processes) {
    if (!isAlive(process)) continue;
    for (const connection of fuseConnections(process.pid)) abortFuseConnection(connection);
  }
  for (const process of processes) signal(process, 'SIGKILL');
  return await waitGone(processes, 10_000);
}

/** What a node that is off left on this machine. */
export async function cleanNode(node: DevNode): Promise<string[]> {
  const devices = new Set(await deadDevices(node.volumeDevices));
  await unmountAll([node.directory], devices);
  return await detachDead(devices);
}

/** Takes everything away; returns what could not be. */
export async function cleanUp(state: DevState): Promise<string[]> {
  const left: string[] = [];
  const ofRole = (role: Role): DevProcess[] => state.processes.filter((process) => process.role === role);
  const agents = ofRole('agent');
  const runs = (node: DevNode): boolean => agents.some((p) => p.node === node.index && isAlive(p));
  const devices = new Set((await Promise.all(state.nodes.map((node) => devicesOf(node, runs(node))))).flat());
  // While the engines still serve, file systems are unmounted in order and volumes closed; then the agents leave their
  // pools. Afterwards only force is left.
  const plugins = [...ofRole('csi-node'), ...ofRole('csi-controller')];
  for (const process of plugins) signal(process, 'SIGTERM');
  if (!(await waitGone(plugins, 5000))) await killHard(plugins);
  await unmountAll([state.dir], devices);
  await Promise.all(state.nodes.filter(runs).map(closeVolumes));
  for (const agent of agents) signal(agent, 'SIGUSR1');
  await waitGone(agents, 5000);
  const services = ofRole('metadata-service');
  for (const process of services) signal(process, 'SIGTERM');
  if (!(await waitGone(services, 5000))) await killHard(services);
  const engines = [...agents, ...ofRole('keeper')];
  if (!(await killHard(engines))) left.push('an agent or keeper that does not end');
  const dead = new Set(await deadDevices(devices));
  await unmountAll([state.dir], dead);
  left.push(...(await detachDead(dead)));
  const disk = loopOver(state.disk.image);
  if (disk !== undefined && !(await detachLoop(disk))) left.push(`loop device ${disk} of the disk`);
  for (const socket of [
    state.controllerSocket,
    state.controlSocket,
    ...state.nodes.flatMap((node) => [node.csiSocket, node.agentSocket, node.keeperSocket]),
  ]) {
    rmSync(socket, { force: true });
  }
  rmSync(join(state.dir, 'locks'), { recursive: true, force: true });
  for (const process of state.processes)
    if (isAlive(process)) left.push(`process ${process.pid} (${process.role})`);
  if (left.length === 0 && existsSync(state.dir)) removeState(state.dir);
  return left;
}
