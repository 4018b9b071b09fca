/**
 * A `holdfast dev up` of one's own, as a child process: for the demo, the fault tests and whoever needs a whole cluster.
 * What it made is gone after close(), and close() says what is not.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { FencingClass } from '@holdfast/native';
import { sendControl } from '../dev/control.ts';
import { loopDevices, mounts } from '../dev/mounts.ts';
import { isAlive } from '../dev/processes.ts';
import { readState, type DevProcess, type DevState, type Role } from '../dev/state.ts';

export interface DevUpOptions {
  dir: string;
  nodes: number;
  size: string;
  fencing?: FencingClass;
  leaseMs?: number;
  renewMs?: number;
  /** Where the agents find the metadata service, when something stands in between. */
  agentMetadata?: string;
  /** Between two looks at what deleted snapshots leave behind. */
  reclaimSeconds?: number;
  timeoutMs?: number;
  env?: NodeJS.ProcessEnv;
}

/** The built command, also when this file runs from its source. */
const cli = fileURLToPath(new URL('../../dist/main.js', import.meta.url));

export class DevUp {
  readonly dir: string;
  readonly #child: ChildProcess;
  #output = '';

  private constructor(dir: string, child: ChildProcess) {
    this.dir = dir;
    this.#child = child;
    child.stdout?.on('data', (data: Buffer) => (this.#output += data.toString()));
    child.stderr?.on('data', (data: Buffer) => (this.#output += data.toString()));
  }

  /** Resolves when every node can take volumes. @throws with what `dev up` printed. */
  static async start(options: DevUpOptions): Promise<DevUp> {
    mkdirSync(options.dir, { recursive: true });
    const args = [
      cli,
      'dev',
      'up',
      '--dir',
      options.dir,
      '--nodes',
      String(options.nodes),
      '--size',
      options.size,
    ];
    if (options.fencing !== undefined) args.push('--fencing', options.fencing);
    if (options.leaseMs !== undefined) args.push('--lease-ms', String(options.leaseMs));
    if (options.renewMs !== undefined) args.push('--renew-ms', String(options.renewMs));
    if (options.reclaimSeconds !== undefined) args.push('--reclaim-interval', String(options.reclaimSeconds));
    if (options.agentMetadata !== undefined) args.push('--agent-metadata', options.agentMetadata);
    // A session of its own: a Ctrl-C reaches whoever started this, who then stops it in order.
    const child = spawn(process.execPath, args, {
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
      env: { ...process.env, ...options.env },
    });
    const up = new DevUp(options.dir, child);
    await up.#untilReady(options.timeoutMs ?? 60_000);
    return up;
  }

  #untilReady(timeoutMs: number): Promise<void> {
    return new Promise((resolve, reject) => {
      const finish = (error?: Error): void => {
        clearTimeout(timer);
        this.#child.off('exit', onExit);
        this.#child.stdout?.off('data', onData);
        if (error === undefined) resolve();
        else reject(error);
      };
      const onData = (): void => {
        if (/^ready\b/m.test(this.#output)) finish();
      };
      const onExit = (code: number | null): void =>
        finish(new Error(`dev up ended with code ${code}:\n${this.#output}`));
      const timer = setTimeout(() => {
        this.#child.kill('SIGTERM');
        finish(new Error(`dev up was not ready within ${timeoutMs / 1000} s:\n${this.#output}`));
      }, timeoutMs);
      this.#child.on('exit', onExit);
      this.#child.stdout?.on('data', onData);
    });
  }

  get output(): string {
    return this.#output;
  }

  get state(): DevState {
    const state = readState(this.dir);
    if (state === undefined) throw new Error(`${this.dir} has no state.json`);
    return state;
  }

  /** The processes of a node, or of one role; the ones that run right now. */
  processes(select: { node?: number; role?: Role } = {}): DevProcess[] {
    return this.state.processes.filter(
      (process) =>
        (select.node === undefined || process.node === select.node) &&
        (select.role === undefined || process.role === select.role) &&
        isAlive(process),
    );
  }

  startNode(node: number): Promise<void> {
    return sendControl(this.state.controlSocket, { command: 'start-node', node });
  }

  /** Stops it; returns what is still there of what it made. */
  async close(): Promise<string[]> {
    const last = readState(this.dir);
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      const ended = new Promise<void>((resolve) => this.#child.once('exit', () => resolve()));
      this.#child.kill('SIGTERM');
      await ended;
    }
    const left: string[] = [];
    if (this.#child.exitCode !== 0) left.push(`dev up ended with ${this.#child.exitCode}: ${this.#output}`);
    for (const mount of mounts()) {
      if (`${mount.mountPoint}/`.startsWith(`${this.dir}/`)) left.push(`mount ${mount.mountPoint}`);
    }
    for (const [device, file] of loopDevices()) {
      if (file.startsWith(`${this.dir}/`)) left.push(`loop device ${device} over ${file}`);
    }
    for (const process of last?.processes ?? []) {
      if (isAlive(process)) left.push(`process ${process.pid} (${process.role})`);
    }
    return left;
  }
}
