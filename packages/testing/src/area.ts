/**
 * A test's own place on the machine: a fresh directory, loop devices over files in it, processes marked as its own. What it
 * made is taken away by dispose(), or, when the test process dies first, by a watchdog that notices its end. Something
 * that is still there when dispose() has undone everything it knows of is a leak, and dispose() throws.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { execa } from 'execa';

/** The environment variable that marks a process as belonging to an area. */
export const AREA_MARK = 'HOLDFAST_TEST_DIR';
const sweepScript = fileURLToPath(new URL('../sweep.sh', import.meta.url));

export interface LoopDevice {
  /** /dev/loopN */
  readonly path: string;
  /** The sparse file under it. */
  readonly file: string;
  /** Takes the file's new size. */
  refresh(): Promise<void>;
  /** Detaches; repeating is fine. */
  detach(): Promise<void>;
}

export interface SpawnOptions {
  cwd?: string;
  env?: Record<string, string>;
  /** Where its stdout and stderr go; default: a file `<name>.log` in the area. */
  logName?: string;
}

export interface Spawned {
  readonly pid: number;
  readonly child: ChildProcess;
  readonly logFile: string;
  /** Resolves with the exit code, or the negated signal number's name. */
  readonly ended: Promise<number | NodeJS.Signals>;
  /** Sends the signal and waits for the end. */
  stop(signal?: NodeJS.Signals): Promise<void>;
}

export class TestArea {
  readonly dir: string;
  readonly #watchdog: ChildProcess;
  readonly #undo: (() => Promise<unknown>)[] = [];
  #loops = 0;
  #disposed = false;

  private constructor(dir: string) {
    this.dir = dir;
    this.#watchdog = spawn('bash', [sweepScript, '--watch', dir], {
      stdio: ['pipe', 'ignore', 'ignore'],
      detached: true,
    });
    this.#watchdog.unref();
    (this.#watchdog.stdin as unknown as { unref(): void }).unref();
  }

  /** @param name a short word for the directory's name. */
  static async create(name: string): Promise<TestArea> {
    return new TestArea(await mkdtemp(join(tmpdir(), `holdfast-${name}-`)));
  }

  /** Environment for processes that are started by others and shall die with the area. */
  get mark(): Record<string, string> {
    return { [AREA_MARK]: this.dir };
  }

  path(...parts: string[]): string {
    return join(this.dir, ...parts);
  }

  /** Runs at dispose(), newest first. */
  onDispose(undo: () => Promise<unknown>): void {
    this.#undo.push(undo);
  }

  async loopDevice(sizeBytes: number | bigint, options: { sectorSize?: number } = {}): Promise<LoopDevice> {
    const file = this.path(`disk-${this.#loops++}.img`);
    const handle = await open(file, 'wx');
    await handle.truncate(Number(sizeBytes));
    await handle.close();
    return this.attach(file, options);
  }

  async attach(file: string, options: { sectorSize?: number } = {}): Promise<LoopDevice> {
    const sector = options.sectorSize === undefined ? [] : ['--sector-size', String(options.sectorSize)];
    const { stdout: path } = await execa('losetup', ['--find', '--show', '--direct-io=on', ...sector, file], {
      timeout: 20_000,
    });
    let attached = true;
    const detach = async (): Promise<void> => {
      if (!attached) return;
      attached = false;
      await execa('losetup', ['-d', path], { timeout: 20_000 });
    };
    const refresh = async (): Promise<void> => {
      await execa('losetup', ['-c', path], { timeout: 20_000 });
    };
    this.onDispose(detach);
    return { path, file, refresh, detach };
  }

  /** Starts a process that dies with the area. */
  async spawn(
    name: string,
    command: string,
    args: readonly string[],
    options: SpawnOptions = {},
  ): Promise<Spawned> {
    const logFile = this.path(`${options.logName ?? name}.log`);
    const log = await open(logFile, 'a');
    const child = spawn(command, args, {
      cwd: options.cwd,
      env: { ...process.env, ...options.env, ...this.mark },
      stdio: ['ignore', log.fd, log.fd],
    });
    const ended = new Promise<number | NodeJS.Signals>((resolve) => {
      child.once('exit', (code, signal) => resolve(code ?? signal ?? 1));
      child.once('error', () => resolve(127));
    });
    await log.close();
    const stop = async (signal: NodeJS.Signals = 'SIGTERM'): Promise<void> => {
      if (child.exitCode === null && child.signalCode === null) child.kill(signal);
      const timer = setTimeout(() => child.kill('SIGKILL'), 10_000);
      await ended;
      clearTimeout(timer);
    };
    this.onDispose(() => stop());
    if (child.pid === undefined) throw new Error(`${command} could not be started; see ${logFile}`);
    return { pid: child.pid, child, logFile, ended, stop };
  }

  /** It has nothing left to do; its own look around would only outlive the test. */
  async #dismissWatchdog(): Promise<void> {
    const gone = new Promise<void>((resolve) => this.#watchdog.once('exit', () => resolve()));
    const alive = this.#watchdog.exitCode === null && this.#watchdog.signalCode === null;
    this.#watchdog.kill('SIGKILL');
    this.#watchdog.stdin?.end();
    if (alive) await gone;
  }

  /** @throws an Error that lists what was left behind (it is taken away all the same), or the first failed undo. */
  async dispose(): Promise<void> {
    if (this.#disposed) return;
    this.#disposed = true;
    const failures: unknown[] = [];
    for (const undo of this.#undo.toReversed()) {
      try {
        await undo();
      } catch (error) {
        failures.push(error);
      }
    }
    const { stdout: left } = await execa('bash', [sweepScript, this.dir], { timeout: 60_000, reject: false });
    await rm(this.dir, { recursive: true, force: true });
    await this.#dismissWatchdog();
    if (failures.length > 0) throw failures[0];
    if (left !== '') throw new Error(`The test left behind (taken away now):\n${left}`);
  }
}
