/**
 * A development cluster: one shared disk, the metadata service, one CSI controller and N complete nodes, as processes on
 * this machine. This file starts and watches them.
 *
 * A process that ends is started again after a moment, as systemd or the kubelet would. A node whose keeper is gone is
 * another matter: that is what a power cut looks like, so everything of it is killed and it stays off until it is asked
 * for. Every process has a session of its own: a Ctrl-C at the terminal reaches only `dev up`, and a keeper outlives
 * its agent.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { createServer } from 'node:net';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { call, HoldfastError } from '@holdfast/common';
import { native, type FencingClass } from '@holdfast/native';
import { holdfast, type NodeAgentClient } from '@holdfast/proto';
import { credentials } from '@grpc/grpc-js';
import { MetadataApi } from '../metadata.ts';
import { cleanNode, cleanUp } from './cleanup.ts';
import { ControlServer } from './control.ts';
import { attachLoop, loopOver } from './mounts.ts';
import { identify, isAlive, waitGone } from './processes.ts';
import { forgetDevCluster, registerDevCluster } from './registry.ts';
import { readState, writeState, type DevNode, type DevProcess, type DevState, type Role } from './state.ts';

export interface DevOptions {
  dir: string;
  nodes: number;
  sizeBytes: bigint;
  fencing: FencingClass;
  leaseMs?: number;
  renewMs?: number;
  maxVolumes: number;
  /** What agents connect to instead of the metadata service. */
  agentMetadata?: string;
  /** How often the service looks at what deleted snapshots leave behind; undefined: its own default. */
  reclaimSeconds?: number;
  /** Progress for people, a line each. */
  say: (line: string) => void;
}

const packagesDir = fileURLToPath(new URL('../../..', import.meta.url));
const programs = {
  metadataService: join(packagesDir, 'metadata-service/dist/main.js'),
  controller: join(packagesDir, 'csi-controller/dist/main.js'),
  agent: join(packagesDir, 'csi-node/dist/agent/main.js'),
  node: join(packagesDir, 'csi-node/dist/csi/main.js'),
  keeper: resolve(packagesDir, '../native/build/Release/holdfast-keeper'),
};

/** A process is started again after this pause. */
const restartMs = 300;
/** A process that fails sooner than this after its start is not started again at once. */
const shortLifeMs = 2000;
const restartMostMs = 5000;
const startTimeoutMs = 30_000;

interface Watched {
  role: Role;
  node: DevNode | undefined;
  command: string;
  args: string[];
  child: ChildProcess | undefined;
  entry: DevProcess | undefined;
  startedAt: number;
  pauseMs: number;
  endedAt: number;
}

async function freePorts(count: number): Promise<number[]> {
  const servers = await Promise.all(
    Array.from(
      { length: count },
      () =>
        new Promise<ReturnType<typeof createServer>>((done, failed) => {
          const server = createServer();
          server.once('error', failed);
          server.listen(0, '127.0.0.1', () => done(server));
        }),
    ),
  );
  return await Promise.all(
    servers.map(
      (server) =>
        new Promise<number>((done) => {
          const address = server.address();
          const port = typeof address === 'object' && address !== null ? address.port : 0;
          server.close(() => done(port));
        }),
    ),
  );
}

export function logTail(path: string, lines = 15): string {
  try {
    return readFileSync(path, 'utf8').trimEnd().split('\n').slice(-lines).join('\n');
  } catch {
    return '(no log)';
  }
}

/** The machine id of a dev node: drawn once, kept with the node. */
function persistedUuid(path: string): string {
  if (existsSync(path)) return readFileSync(path, 'utf8').trim();
  const uuid = randomUUID();
  writeFileSync(path, `${uuid}\n`);
  return uuid;
}

export class DevCluster {
  readonly #options: DevOptions;
  readonly #watched: Watched[] = [];
  readonly state: DevState;
  #control: ControlServer | undefined;
  #stopping = false;
  #poll: NodeJS.Timeout | undefined;
  #readying = true;
  readonly #agents = new Map<number, NodeAgentClient>();
  #failed: ((error: Error) => void) | undefined;

  private constructor(options: DevOptions, state: DevState) {
    this.#options = options;
    this.state = state;
  }

  /** Makes or reuses everything in `options.dir`, and resolves when every node can take volumes. */
  static async up(options: DevOptions): Promise<DevCluster> {
    if (process.getuid?.() !== 0) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        'A development cluster needs loop devices, FUSE and mounts: run it as root.',
      );
    }
    for (const program of Object.values(programs)) {
      if (existsSync(program)) continue;
      throw new HoldfastError('FAILED_PRECONDITION', `${program} is not built. Run \`make build\`.`);
    }
    const dir = resolve(options.dir);
    mkdirSync(join(dir, 'logs'), { recursive: true });
    const before = readState(dir);
    if (before !== undefined) {
      if (isAlive(before.supervisor)) {
        throw new HoldfastError(
          'FAILED_PRECONDITION',
          `A development cluster already runs in ${dir} (process ${before.supervisor.pid}). Stop it with \`holdfast dev down --dir ${dir}\`, or take another directory.`,
        );
      }
      options.say('Taking away what an earlier run left');
      const left = await cleanUp(before);
      if (left.length > 0) {
        throw new HoldfastError(
          'FAILED_PRECONDITION',
          `An earlier run in ${dir} left ${left.join(', ')}, which cannot be taken away. Look at them, then try again.`,
        );
      }
    }
    const [port = 0, httpPort = 0] = await freePorts(2);
    const self = identify(process.pid);
    if (self === undefined) throw new HoldfastError('INTERNAL', '/proc does not show this process.');
    const nodes: DevNode[] = Array.from({ length: options.nodes }, (_, i) => {
      const directory = join(dir, `node-${i + 1}`);
      mkdirSync(directory, { recursive: true });
      return {
        index: i + 1,
        name: `node-${i + 1}`,
        power: 'on',
        directory,
        csiSocket: join(directory, 'csi.sock'),
        agentSocket: join(directory, 'agent.sock'),
        keeperSocket: join(directory, 'keeper.sock'),
        volumeDevices: [],
      };
    });
    const cluster = new DevCluster(options, {
      version: 1,
      dir,
      supervisor: self,
      ready: false,
      startedAt: new Date().toISOString(),
      metadata: `127.0.0.1:${port}`,
      metadataHttp: `127.0.0.1:${httpPort}`,
      controllerSocket: join(dir, 'controller.sock'),
      controlSocket: join(dir, 'dev.sock'),
      disk: {
        image: join(dir, 'disk.img'),
        device: '',
        poolUuid: '',
        poolName: 'dev',
        fencing: options.fencing,
      },
      nodes,
      processes: [],
    });
    writeState(cluster.state);
    try {
      await cluster.#start();
    } catch (error) {
      await cluster.down();
      throw error;
    }
    return cluster;
  }

  #reclaimFlags(): string[] {
    const { reclaimSeconds } = this.#options;
    if (reclaimSeconds === undefined) return [];
    return ['--strip-interval', '--compact-interval'].flatMap((flag) => [flag, String(reclaimSeconds)]);
  }

  async #start(): Promise<void> {
    const { dir } = this.state;
    const failure = new Promise<never>((_, reject) => {
      this.#failed = reject;
    });
    failure.catch(() => undefined); // raced below; a later failure only shows in the logs
    await this.#makeDisk();
    this.#watch('metadata-service', undefined, process.execPath, [
      programs.metadataService,
      '--listen',
      this.state.metadata,
      '--http',
      this.state.metadataHttp,
      '--store',
      `sqlite:${join(dir, 'metadata.db')}`,
      ...this.#reclaimFlags(),
    ]);
    await Promise.race([this.#untilServiceAnswers(), failure]);
    this.#watch('csi-controller', undefined, process.execPath, [
      programs.controller,
      '--endpoint',
      `unix:${this.state.controllerSocket}`,
      '--metadata',
      this.state.metadata,
    ]);
    await Promise.race([Promise.all(this.state.nodes.map((node) => this.#startNode(node))), failure]);
    await Promise.race([this.#untilReady(), failure]);
    this.#readying = false;
    this.#control = await ControlServer.listen(this.state.controlSocket, (command) =>
      this.#onControl(command),
    );
    this.state.ready = true;
    this.#save();
    registerDevCluster({ ...this.state.supervisor, dir, metadata: this.state.metadata });
    this.#poll = setInterval(() => void this.#noteVolumes(), 1000);
  }

  #save(): void {
    this.state.processes = this.#watched.map((w) => w.entry).filter((entry) => entry !== undefined);
    writeState(this.state);
  }

  // ------------------------------------------------------------------------------------------ disk

  async #makeDisk(): Promise<void> {
    const { image } = this.state.disk;
    const fresh = !existsSync(image);
    if (fresh) {
      writeFileSync(image, '');
      truncateSync(image, Number(this.#options.sizeBytes));
    }
    const device = loopOver(image) ?? (await attachLoop(image));
    this.state.disk.device = device;
    this.#save();
    const inspection = await native().inspectDevice(device);
    if (inspection.kind === 'pool' && inspection.pool !== undefined) {
      this.state.disk.poolUuid = inspection.pool.uuid;
      this.state.disk.poolName = inspection.pool.name;
      this.state.disk.fencing = inspection.pool.fencing;
      this.#options.say(`Pool "${inspection.pool.name}" on ${device} (there already)`);
      return;
    }
    const info = await native().formatPool(device, {
      name: this.state.disk.poolName,
      fencing: this.#options.fencing,
      ...(this.#options.leaseMs === undefined ? {} : { leaseMs: this.#options.leaseMs }),
      ...(this.#options.renewMs === undefined ? {} : { renewIntervalMs: this.#options.renewMs }),
    });
    this.state.disk.poolUuid = info.uuid;
    this.#options.say(`Pool "${info.name}" on ${device}, fencing class ${info.fencing}`);
  }

  // ------------------------------------------------------------------------------------------ processes

  #watch(role: Role, node: DevNode | undefined, command: string, args: string[]): Watched {
    const watched: Watched = {
      role,
      node,
      command,
      args,
      child: undefined,
      entry: undefined,
      startedAt: 0,
      pauseMs: restartMs,
      endedAt: 0,
    };
    this.#watched.push(watched);
    this.#spawn(watched);
    return watched;
  }

  #spawn(watched: Watched): void {
    const where = watched.node === undefined ? watched.role : `${watched.node.name}-${watched.role}`;
    const log = join(this.state.dir, 'logs', `${where}.log`);
    const fd = openSync(log, 'a');
    const child = spawn(watched.command, watched.args, { stdio: ['ignore', fd, fd], detached: true });
    closeSync(fd);
    watched.child = child;
    watched.startedAt = Date.now();
    watched.endedAt = 0;
    const identity = child.pid === undefined ? undefined : identify(child.pid);
    watched.entry =
      identity === undefined
        ? undefined
        : {
            ...identity,
            role: watched.role,
            log,
            ...(watched.node === undefined ? {} : { node: watched.node.index }),
          };
    child.once('exit', (code, killedBy) => this.#ended(watched, child, log, code, killedBy));
    child.once('error', (error) => this.#failed?.(error));
    this.#save();
  }

  #ended(
    watched: Watched,
    child: ChildProcess,
    log: string,
    code: number | null,
    killedBy: NodeJS.Signals | null,
  ): void {
    if (watched.child !== child) return;
    watched.child = undefined;
    watched.entry = undefined;
    watched.endedAt = Date.now();
    if (this.#stopping) return;
    const who = watched.node === undefined ? watched.role : `${watched.role} of ${watched.node.name}`;
    const how = killedBy === null ? `exit code ${code}` : killedBy;
    this.#save();
    if (this.#readying && code !== 0) {
      this.#failed?.(
        new HoldfastError(
          'INTERNAL',
          `${who} ended while starting (${how}). The end of ${log}:\n${logTail(log)}`,
        ),
      );
      return;
    }
    // Killed from outside is no fault of its own: only what fails by itself is given time.
    const failing = killedBy !== 'SIGKILL' && watched.endedAt - watched.startedAt < shortLifeMs;
    watched.pauseMs = failing ? Math.min(watched.pauseMs * 2, restartMostMs) : restartMs;
    if (watched.node?.power === 'on') this.#options.say(`${who} ended (${how})`);
    setTimeout(() => this.#decide(watched), watched.pauseMs);
  }

  /** A moment after an end: start it again, or see that its whole node is off. */
  #decide(watched: Watched): void {
    if (this.#stopping || watched.child !== undefined) return;
    const { node } = watched;
    if (node !== undefined) {
      if (node.power === 'off') return;
      const mine = this.#watched.filter((w) => w.node === node);
      const keeper = mine.find((w) => w.role === 'keeper');
      if (keeper?.child === undefined || mine.every((w) => w.child === undefined)) {
        this.#powerOff(node);
        return;
      }
    }
    this.#spawn(watched);
  }

  #powerOff(node: DevNode): void {
    node.power = 'off';
    for (const watched of this.#watched) {
      if (watched.node === node) watched.child?.kill('SIGKILL');
    }
    this.#options.say(
      `${node.name} is off: its keeper is gone. \`holdfast dev start-node ${node.index}\` starts it again`,
    );
    this.#save();
  }

  #agentOf(node: DevNode): NodeAgentClient {
    let client = this.#agents.get(node.index);
    if (client === undefined) {
      client = new holdfast.NodeAgent(`unix:${node.agentSocket}`, credentials.createInsecure(), {
        'grpc.initial_reconnect_backoff_ms': 50,
        'grpc.max_reconnect_backoff_ms': 500,
      });
      this.#agents.set(node.index, client);
    }
    return client;
  }

  // ------------------------------------------------------------------------------------------ nodes

  async #startNode(node: DevNode): Promise<void> {
    const known = this.#watched.filter((w) => w.node === node);
    if (known.length > 0) {
      for (const watched of known.filter((w) => w.role === 'keeper')) this.#spawn(watched);
      await this.#untilSocket(node.keeperSocket, `the keeper of ${node.name}`);
      for (const watched of known.filter((w) => w.role !== 'keeper')) this.#spawn(watched);
      return;
    }
    const stateDir = join(node.directory, 'state');
    mkdirSync(stateDir, { recursive: true, mode: 0o700 });
    const machineId = persistedUuid(join(node.directory, 'machine-id'));
    this.#watch('keeper', node, programs.keeper, ['--socket', node.keeperSocket]);
    await this.#untilSocket(node.keeperSocket, `the keeper of ${node.name}`);
    this.#watch('agent', node, process.execPath, [
      programs.agent,
      '--state-dir',
      stateDir,
      '--socket',
      `unix:${node.agentSocket}`,
      '--keeper',
      node.keeperSocket,
      '--metadata',
      this.#options.agentMetadata ?? this.state.metadata,
      '--node-name',
      node.name,
      '--device',
      this.state.disk.device,
      '--lock-dir',
      join(this.state.dir, 'locks'),
      '--max-volumes',
      String(this.#options.maxVolumes),
      '--machine-id',
      machineId,
      '--rescan-ms',
      '2000',
      '--workers',
      '2',
    ]);
    this.#watch('csi-node', node, process.execPath, [
      programs.node,
      '--endpoint',
      `unix:${node.csiSocket}`,
      '--agent',
      `unix:${node.agentSocket}`,
      '--state-dir',
      join(node.directory, 'csi'),
    ]);
  }

  async #until(what: string, log: string | undefined, test: () => Promise<boolean>): Promise<void> {
    const deadline = Date.now() + startTimeoutMs;
    let last = '';
    for (;;) {
      try {
        if (await test()) return;
      } catch (error) {
        last = error instanceof Error ? `: ${error.message}` : '';
      }
      if (this.#stopping) throw new HoldfastError('UNAVAILABLE', 'The development cluster is stopping.');
      if (Date.now() > deadline) {
        const tail = log === undefined ? '' : `\nThe end of ${log}:\n${logTail(log)}`;
        throw new HoldfastError(
          'DEADLINE_EXCEEDED',
          `${what} was not ready within ${startTimeoutMs / 1000} s${last}${tail}`,
        );
      }
      await sleep(50);
    }
  }

  #log(name: string): string {
    return join(this.state.dir, 'logs', `${name}.log`);
  }

  async #untilSocket(path: string, what: string): Promise<void> {
    await this.#until(what, undefined, async () => existsSync(path));
  }

  async #untilServiceAnswers(): Promise<void> {
    const api = new MetadataApi(this.state.metadata);
    try {
      await this.#until('The metadata service', this.#log('metadata-service'), async () => {
        await api.pools();
        return true;
      });
    } finally {
      api.close();
    }
  }

  async #nodeIsReady(node: DevNode): Promise<boolean> {
    if (!existsSync(node.csiSocket) || !existsSync(node.agentSocket)) return false;
    const agent = this.#agentOf(node);
    const info = await call(agent, agent.GetAgentInfo, {}, { timeoutMs: 2000 });
    const pool = info.pools.find((p) => p.uuid === this.state.disk.poolUuid);
    if (info.service_connected && pool?.lease === 'valid') return true;
    const why = pool?.message || (info.service_connected ? 'the pool is not joined' : 'no session');
    throw new HoldfastError('UNAVAILABLE', why);
  }

  async #untilReady(): Promise<void> {
    await this.#until('The CSI controller', this.#log('csi-controller'), async () =>
      existsSync(this.state.controllerSocket),
    );
    for (const node of this.state.nodes) await this.#untilNodeReady(node);
  }

  async #untilNodeReady(node: DevNode): Promise<void> {
    await this.#until(node.name, this.#log(`${node.name}-agent`), () => this.#nodeIsReady(node));
  }

  /** Remembers the devices of open volumes: a node that dies cannot be asked any more. */
  async #noteVolumes(): Promise<void> {
    let changed = false;
    for (const node of this.state.nodes.filter((n) => n.power === 'on')) {
      const agent = this.#agentOf(node);
      try {
        const { volumes } = await call(agent, agent.ListOpenVolumes, {}, { timeoutMs: 500 });
        const now = volumes.map((volume) => volume.device_path).sort();
        if (node.power !== 'on' || now.join() === node.volumeDevices.join()) continue;
        node.volumeDevices = now;
        changed = true;
      } catch {
        // it restarts; what is known stands
      }
    }
    if (changed && !this.#stopping) this.#save();
  }

  /** Kills every process of a node at once, as a power cut would. */
  async killNode(index: number): Promise<void> {
    const node = this.#node(index);
    await this.#noteVolumes();
    this.#powerOff(node);
  }

  /** Switches a node on that is off. Resolves when it can take volumes again. */
  async startNode(index: number): Promise<void> {
    const node = this.#node(index);
    if (node.power === 'on') {
      throw new HoldfastError('FAILED_PRECONDITION', `${node.name} is on.`);
    }
    const mine = this.#watched.filter((w) => w.node === node);
    await waitGone(
      mine.map((w) => w.entry).filter((entry) => entry !== undefined),
      5000,
    );
    const left = await cleanNode(node);
    if (left.length > 0) {
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `${node.name} cannot start: ${left.join(', ')} of its earlier life is still in use. Close what uses it.`,
      );
    }
    for (const socket of [node.csiSocket, node.agentSocket, node.keeperSocket])
      rmSync(socket, { force: true });
    node.volumeDevices = [];
    node.power = 'on';
    await this.#startNode(node);
    await this.#untilNodeReady(node);
    this.#save();
  }

  #node(index: number): DevNode {
    const node = this.state.nodes.find((n) => n.index === index);
    if (node !== undefined) return node;
    throw new HoldfastError('NOT_FOUND', `There is no node ${index}; there are ${this.state.nodes.length}.`);
  }

  async #onControl(command: { command: string; node?: number }): Promise<unknown> {
    switch (command.command) {
      case 'start-node':
        await this.startNode(command.node ?? 0);
        return {};
      case 'kill-node':
        await this.killNode(command.node ?? 0);
        return {};
      default:
        throw new HoldfastError('INVALID_ARGUMENT', `Unknown control command "${command.command}".`);
    }
  }

  // ------------------------------------------------------------------------------------------ down

  /** Stops everything in order and takes it away; returns what could not be. */
  async down(): Promise<string[]> {
    await this.#noteVolumes().catch(() => undefined);
    this.#stopping = true;
    clearInterval(this.#poll);
    forgetDevCluster(this.state.dir);
    await this.#control?.close();
    for (const client of this.#agents.values()) client.close();
    return await cleanUp(this.state);
  }
}
