/**
 * Takes away what a development cluster made: processes, FUSE connections, mounts, loop devices, sockets. Works from
 * state.json alone, so that it also serves after a crash of `dev up`. Touches nothing that is not named there.
 */
import { existsSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { detachLoop, loopDevices, loopOver, mounts, mountShows, unmount } from './mounts.ts';
import {
  abortFuseConnection,
  fuseConnections,
  isAlive,
  signal,
  waitGone,
  type ProcessIdentity,
} from './processes.ts';
import { removeState, type DevNode, type DevState } from './state.ts';

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

/** Detaches what is still a volume's; returns what could not be. */
export async function detachVolumeDevices(devices: Iterable<string>): Promise<string[]> {
  const left: string[] = [];
  for (const device of stillVolumes(devices)) {
    if (!(await detachLoop(device))) left.push(`loop device ${device}`);
  }
  return left;
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
  const devices = new Set(node.volumeDevices);
  await unmountAll([node.directory], devices);
  return await detachVolumeDevices(devices);
}

/** Takes everything away; returns what could not be. */
export async function cleanUp(state: DevState): Promise<string[]> {
  const left: string[] = [];
  const others = state.processes.filter((process) => process.role !== 'keeper' && process.role !== 'agent');
  const engines = state.processes.filter((process) => process.role === 'keeper' || process.role === 'agent');
  const devices = new Set(state.nodes.flatMap((node) => node.volumeDevices));
  for (const process of others) signal(process, 'SIGTERM');
  if (!(await waitGone(others, 5000))) await killHard(others);
  // While the engines still answer, file systems are unmounted in order; afterwards only by force.
  await unmountAll([state.dir], devices);
  if (!(await killHard(engines))) left.push('an agent or keeper that does not end');
  await unmountAll([state.dir], devices);
  left.push(...(await detachVolumeDevices(devices)));
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
