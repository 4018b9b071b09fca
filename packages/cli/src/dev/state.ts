/**
 * state.json of a development cluster: every process, socket and device that it made, so that tools find them and the
 * next `dev up` or `dev down` can take away what a crash left. Always written whole and renamed into place.
 */
import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { FencingClass } from '@holdfast/native';
import type { ProcessIdentity } from './processes.ts';

export type Role = 'metadata-service' | 'csi-controller' | 'keeper' | 'agent' | 'csi-node';

export interface DevProcess extends ProcessIdentity {
  role: Role;
  /** The node's number; undefined for what stands beside the nodes. */
  node?: number;
  log: string;
}

export interface DevNode {
  index: number;
  name: string;
  /** off: it lost its keeper (as by a power cut) and stays down until `dev start-node`. */
  power: 'on' | 'off';
  directory: string;
  csiSocket: string;
  agentSocket: string;
  keeperSocket: string;
  /** Devices of volumes that were seen open on it, to be taken away with it. */
  volumeDevices: string[];
}

export interface DevState {
  version: 1;
  dir: string;
  /** The `dev up` itself. */
  supervisor: ProcessIdentity;
  ready: boolean;
  startedAt: string;
  /** host:port */
  metadata: string;
  /** host:port of metrics and health */
  metadataHttp: string;
  controllerSocket: string;
  controlSocket: string;
  disk: { image: string; device: string; poolUuid: string; poolName: string; fencing: FencingClass };
  nodes: DevNode[];
  processes: DevProcess[];
}

export function statePath(dir: string): string {
  return join(dir, 'state.json');
}

export function readState(dir: string): DevState | undefined {
  let text: string;
  try {
    text = readFileSync(statePath(dir), 'utf8');
  } catch {
    return undefined;
  }
  return JSON.parse(text) as DevState;
}

export function writeState(state: DevState): void {
  mkdirSync(state.dir, { recursive: true });
  const beside = `${statePath(state.dir)}.new`;
  writeFileSync(beside, `${JSON.stringify(state, undefined, 2)}\n`);
  renameSync(beside, statePath(state.dir));
}

export function removeState(dir: string): void {
  rmSync(statePath(dir), { force: true });
}
