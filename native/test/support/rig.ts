/**
 * What an engine test needs: a formatted pool on a loop disk, a keeper, and engines in processes of their own (so that
 * they can be killed, and so that no test process ever waits in the kernel for an engine that is gone).
 */
import { fork, type ChildProcess } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { AREA_MARK, TestArea, waitFor, type LoopDevice, type Spawned } from '@holdfast/testing';
import { execa } from 'execa';
import {
  native,
  type EngineEvent,
  type EngineOptions,
  type Export,
  type FencingClass,
  type OpenPoolOptions,
  type PoolInfo,
  type SlabRun,
  type VolumeSpec,
  type VolumeStats,
} from '../../lib/index.ts';

export const MiB = 1024n * 1024n;
export const GiB = 1024n * MiB;

const buildDir = process.env['HOLDFAST_NATIVE']
  ? fileURLToPath(new URL('.', `file://${process.env['HOLDFAST_NATIVE']}`))
  : fileURLToPath(new URL('../../build/Release/', import.meta.url));
const keeperBinary = process.env['HOLDFAST_KEEPER'] ?? `${buildDir}holdfast-keeper`;
// Another build for the engine processes alone: ThreadSanitizer's runtime does not bear being preloaded everywhere.
const engineEnv: Record<string, string> = {};
if (process.env['HOLDFAST_ENGINE_NATIVE'] !== undefined) {
  engineEnv['HOLDFAST_NATIVE'] = process.env['HOLDFAST_ENGINE_NATIVE'];
  engineEnv['LD_PRELOAD'] = process.env['HOLDFAST_ENGINE_PRELOAD'] ?? '';
}
const script = (name: string): string => fileURLToPath(new URL(name, import.meta.url));

export interface Described {
  spec: VolumeSpec;
  export: Export;
}
export interface AdoptedPool {
  uuid: string;
  hostId: number;
  generation: bigint;
  stock: SlabRun[];
  volumes: Described[];
}
export class EngineError extends Error {
  readonly code: string;
  constructor(code: string, message: string) {
    super(message);
    this.code = code;
  }
}

/** An engine in a process of its own. */
export class EngineProcess {
  readonly events: EngineEvent[] = [];
  readonly #child: ChildProcess;
  readonly #ended: Promise<number | NodeJS.Signals>;
  readonly #waiting = new Map<
    number,
    { resolve: (value: unknown) => void; reject: (error: Error) => void }
  >();
  #next = 1;

  private constructor(area: TestArea, child: string, nodeArgs: string[]) {
    this.#child = fork(script(child), {
      serialization: 'advanced',
      env: { ...process.env, ...engineEnv, [AREA_MARK]: area.dir },
      execArgv: nodeArgs,
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    this.#ended = new Promise((resolve) => {
      this.#child.once('exit', (code, signal) => {
        for (const { reject } of this.#waiting.values()) {
          reject(new Error(`the engine process ended (${signal ?? code})`));
        }
        this.#waiting.clear();
        resolve(code ?? signal ?? 1);
      });
    });
  }

  static async start(
    area: TestArea,
    options: Partial<EngineOptions> & { keeperSocket: string },
    child = 'engine-child.mjs',
    nodeArgs: string[] = [],
  ): Promise<EngineProcess> {
    const engine = new EngineProcess(area, child, nodeArgs);
    await new Promise<void>((resolve) => {
      engine.#child.on('message', (message: Record<string, unknown>) => {
        if ('ready' in message) resolve();
        else if ('event' in message) engine.events.push(message['event'] as EngineEvent);
        else engine.#answer(message);
      });
    });
    area.onDispose(() => engine.kill());
    await engine.call('create', options);
    return engine;
  }

  #answer(message: Record<string, unknown>): void {
    const waiting = this.#waiting.get(message['id'] as number);
    if (waiting === undefined) return;
    this.#waiting.delete(message['id'] as number);
    const error = message['error'] as { code: string; message: string } | undefined;
    if (error === undefined) waiting.resolve(message['result']);
    else waiting.reject(new EngineError(error.code, error.message));
  }

  get pid(): number {
    return this.#child.pid as number;
  }
  get ended(): Promise<number | NodeJS.Signals> {
    return this.#ended;
  }

  call<T = unknown>(op: string, ...args: unknown[]): Promise<T> {
    const id = this.#next++;
    return new Promise<T>((resolve, reject) => {
      this.#waiting.set(id, { resolve: resolve as (value: unknown) => void, reject });
      this.#child.send({ id, op, args }, (error) => {
        if (error) reject(error);
      });
    });
  }

  /** Ends the worker thread that has the engine (worker-child.mjs). */
  terminate(): Promise<string> {
    return this.call<string>('terminate');
  }

  disconnect(): void {
    this.#child.disconnect();
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  async kill(): Promise<void> {
    if (this.#child.exitCode === null && this.#child.signalCode === null) this.#child.kill('SIGKILL');
    await this.#ended;
  }
}

export interface RigOptions {
  name: string;
  diskBytes?: bigint;
  fencing?: FencingClass;
  renewIntervalMs?: number;
  leaseMs?: number;
}

export class Rig {
  readonly area: TestArea;
  readonly disk: LoopDevice;
  readonly pool: PoolInfo;
  readonly keeper: Spawned;
  readonly keeperSocket: string;
  readonly machineId = randomUUID();
  readonly bootId = randomUUID();
  #nextSlab = 0n;
  #keepers = 2;
  readonly #devices = new Map<string, string>();

  private constructor(
    area: TestArea,
    disk: LoopDevice,
    pool: PoolInfo,
    keeper: Spawned,
    keeperSocket: string,
  ) {
    this.area = area;
    this.disk = disk;
    this.pool = pool;
    this.keeper = keeper;
    this.keeperSocket = keeperSocket;
  }

  static async create(options: RigOptions): Promise<Rig> {
    const area = await TestArea.create(options.name);
    try {
      const disk = await area.loopDevice(options.diskBytes ?? 4n * GiB, { sectorSize: 4096 });
      const pool = await native().formatPool(disk.path, {
        name: options.name,
        fencing: options.fencing ?? 'loop',
        ...(options.renewIntervalMs === undefined ? {} : { renewIntervalMs: options.renewIntervalMs }),
        ...(options.leaseMs === undefined ? {} : { leaseMs: options.leaseMs }),
      });
      const { keeper, socket } = await Rig.startKeeper(area, 'keeper');
      return new Rig(area, disk, pool, keeper, socket);
    } catch (error) {
      await area.dispose();
      throw error;
    }
  }

  static async startKeeper(area: TestArea, name: string): Promise<{ keeper: Spawned; socket: string }> {
    const socket = area.path(`${name}.sock`);
    // Not under a sanitizer's runtime: the keeper locks its memory, and that would lock all of the shadow memory too.
    const env = { LD_PRELOAD: '' };
    const keeper = await area.spawn(name, keeperBinary, ['--socket', socket], { env });
    await waitFor('the keeper', () => existsSync(socket));
    return { keeper, socket };
  }

  /** An engine without a pool; adopt() is the caller's. */
  async engine(
    options: Partial<EngineOptions> = {},
    child?: string,
    nodeArgs?: string[],
  ): Promise<EngineProcess> {
    return EngineProcess.start(this.area, { keeperSocket: this.keeperSocket, ...options }, child, nodeArgs);
  }

  poolOptions(overrides: Partial<OpenPoolOptions> = {}): OpenPoolOptions {
    return {
      devicePath: this.disk.path,
      uuid: this.pool.uuid,
      hostId: 1,
      generation: 1n,
      nodeName: 'node-1',
      machineId: this.machineId,
      bootId: this.bootId,
      lockPath: this.area.path('pool.lock'),
      ...overrides,
    };
  }

  /** An engine with the pool open and slabs to come. */
  async host(
    options: Partial<EngineOptions> = {},
    pool: Partial<OpenPoolOptions> = {},
  ): Promise<EngineProcess> {
    const engine = await this.engine(options);
    await engine.call('openPool', this.poolOptions(pool));
    await this.supply(engine);
    return engine;
  }

  /** Another node's engine on the same pool: its own keeper, lock, host id. */
  async otherHost(overrides: Partial<OpenPoolOptions> = {}): Promise<EngineProcess> {
    const { socket } = await Rig.startKeeper(this.area, `keeper-${this.#keepers++}`);
    return this.host(
      { keeperSocket: socket },
      { hostId: 2, nodeName: 'node-2', lockPath: this.area.path('second.lock'), ...overrides },
    );
  }

  /** Slabs that no engine has ahead. */
  take(count: number): SlabRun[] {
    const first = this.#nextSlab;
    this.#nextSlab += BigInt(count);
    return [{ first, count, generation: 1n }];
  }

  /** Lets the engine have slabs as it asks; each call hands out fresh ones. */
  async supply(engine: EngineProcess, { batch = 8, total = 24 } = {}): Promise<void> {
    const next = this.#nextSlab;
    this.#nextSlab += BigInt(total);
    const end = this.#nextSlab < this.pool.slabCount ? this.#nextSlab : this.pool.slabCount;
    await engine.call('supply', { next, end, generation: 1n, batch });
  }

  spec(volumeId: bigint, sizeBytes: bigint, overrides: Partial<VolumeSpec> = {}): VolumeSpec {
    return {
      volumeId,
      slot: Number(volumeId),
      uuid: randomUUID(),
      name: `volume-${volumeId}`,
      sizeBytes,
      epoch: (1n << 40n) | 1n,
      readOnly: false,
      parametersJson: '{}',
      layers: [
        {
          layerId: 100n + volumeId,
          slot: Number(volumeId),
          parentLayerId: 0n,
          birth: 1n,
          sizeBytes,
          frozen: false,
          slabs: [],
        },
      ],
      ...overrides,
    };
  }

  /** The same volume for its next opener: a later epoch, and the slabs that `engines` told of. */
  again(spec: VolumeSpec, engines: EngineProcess[]): VolumeSpec {
    const slabs = new Map<bigint, bigint>();
    for (const engine of engines) {
      for (const event of engine.events) {
        if (event.type === 'slab-claimed' && event.volumeId === spec.volumeId)
          slabs.set(event.slab, event.generation);
        if (event.type === 'slab-emptied' && event.volumeId === spec.volumeId) slabs.delete(event.slab);
      }
    }
    const runs = [...slabs]
      .toSorted(([a], [b]) => (a < b ? -1 : 1))
      .map(([first, generation]) => ({ first, count: 1, generation }));
    const [top, ...rest] = spec.layers;
    if (top === undefined) throw new Error('a spec without layers');
    return {
      ...spec,
      epoch: spec.epoch + 1n,
      layers: [{ ...top, sizeBytes: spec.sizeBytes, slabs: runs }, ...rest],
    };
  }

  async open(engine: EngineProcess, spec: VolumeSpec): Promise<Described> {
    const opened = await engine.call<Described>('openVolume', this.pool.uuid, spec);
    this.#devices.set(opened.export.devicePath, diskSequence(opened.export.devicePath));
    return opened;
  }

  close(engine: EngineProcess, spec: VolumeSpec): Promise<void> {
    return engine.call('volumeCall', this.pool.uuid, spec.volumeId, 'close');
  }

  /** Whether the loop device that open() gave is still bound. */
  attached(device: string): boolean {
    return (
      existsSync(block(device, 'loop/backing_file')) && diskSequence(device) === this.#devices.get(device)
    );
  }

  stats(engine: EngineProcess, spec: VolumeSpec): Promise<VolumeStats> {
    return engine.call('volumeCall', this.pool.uuid, spec.volumeId, 'stats');
  }

  /** Takes everything away; a loop device of ours that is left is a failure. */
  async dispose(): Promise<void> {
    let failure: unknown;
    try {
      await this.area.dispose();
    } catch (error) {
      failure = error;
    }
    // Over a FUSE file, so there is no directory of the area in its name; with engine and keeper gone it answers EIO.
    for (const device of this.#devices.keys()) {
      if (this.attached(device)) await execa('losetup', ['-d', device], { timeout: 20_000, reject: false });
    }
    if (failure !== undefined) throw failure;
  }
}

const block = (device: string, file: string): string => device.replace('/dev/', '/sys/block/') + `/${file}`;
/** Grows each time the device is attached: tells ours from the next one with the same number. */
const diskSequence = (device: string): string => readFileSync(block(device, 'diskseq'), 'utf8').trim();

export const sizeOf = (device: string): bigint =>
  BigInt(readFileSync(block(device, 'size'), 'utf8').trim()) * 512n;

/** Runs a command that may end up waiting for an engine; killed after the timeout. */
export async function run(command: string, args: string[], timeoutMs = 60_000): Promise<string> {
  const { stdout } = await execa(command, args, { timeout: timeoutMs, killSignal: 'SIGKILL', all: true });
  return stdout;
}

/** fio on a device; rejects on an I/O error or a verify mismatch. */
export function fio(device: string, args: string[], timeoutMs = 120_000): Promise<string> {
  return run(
    'fio',
    [
      '--name=t',
      `--filename=${device}`,
      '--ioengine=libaio',
      '--direct=1',
      '--verify_fatal=1',
      '--verify_state_save=0',
      ...args,
    ],
    timeoutMs,
  );
}
