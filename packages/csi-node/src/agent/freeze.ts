/**
 * Quiescing: the file system on a volume's device is frozen around a cut (FIFREEZE, by fsfreeze(8)), so that the snapshot
 * holds a clean file system with everything that was written before. A frozen file system blocks whoever writes to it, so
 * nothing may leave it frozen: each freeze ends by itself after its time-out, whatever became of the cut, and what a killed
 * agent left frozen is in a file that the next one reads first.
 */
import { constants } from 'node:fs';
import { mkdirSync, readFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { dirname } from 'node:path';
import { execa } from 'execa';
import { HoldfastError, type Logger } from '@holdfast/common';
import { deviceNumber, deviceUnder, mountsAt, readMounts } from '../mount/mountinfo.ts';
import { run, said } from '../mount/run.ts';
import { sleep } from './backoff.ts';
import { messageOf } from './convert.ts';
import { writeFileDurably } from './durable.ts';

const THAW_MS = 30_000;
/** How often a thaw that failed is tried again; it never gives up while the file system is mounted. */
const THAW_AGAIN_MS = 500;

export interface Frozen {
  /** False once it was thawed, by us or because its time was over. */
  readonly holds: boolean;
  /** Idempotent. */
  thaw(): Promise<void>;
}

export interface FileSystemFreezer {
  /**
   * Freezes what is mounted from `device`. Resolves when all that was written before is on the device; nothing mounted: there
   * is nothing to freeze, and that is success.
   * @throws FAILED_PRECONDITION for a mount that this process can't see, DEADLINE_EXCEEDED when it is not frozen in time.
   */
  freeze(device: string, timeoutMs: number): Promise<Frozen>;
  /** Thaws what an earlier life of the agent left frozen. */
  thawLeftOver(): Promise<void>;
}

interface Entry {
  mountPoint: string;
  /** `major:minor`, so that another file system that is mounted there later is left alone. */
  device: string;
}

const nothing: Frozen = { holds: true, thaw: async () => undefined };

export class FsFreezer implements FileSystemFreezer {
  readonly #path: string;
  readonly #logger: Logger;
  #entries: Entry[] = [];

  constructor(path: string, logger: Logger) {
    this.#path = path;
    this.#logger = logger;
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    try {
      this.#entries = (JSON.parse(readFileSync(path, 'utf8')) as { frozen: Entry[] }).frozen;
    } catch {
      // none yet
    }
  }

  #write(): void {
    writeFileDurably(this.#path, `${JSON.stringify({ version: 1, frozen: this.#entries })}\n`);
  }

  async thawLeftOver(): Promise<void> {
    for (const entry of this.#entries) {
      this.#logger.warn(
        { mountPoint: entry.mountPoint },
        'An earlier agent may have left a file system frozen; it is thawed',
      );
      await this.#thaw(entry);
    }
  }

  async freeze(device: string, timeoutMs: number): Promise<Frozen> {
    const number = await deviceNumber(device);
    if (number === undefined) return nothing;
    const mountPoint = await mountOf(number);
    if (mountPoint === undefined) {
      await refuseHiddenMount(device);
      return nothing;
    }
    const entry: Entry = { mountPoint, device: number };
    this.#entries.push(entry);
    this.#write();
    const child = execa('fsfreeze', ['-f', mountPoint], { reject: false, stdin: 'ignore' });
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<'late'>((resolve) => {
      timer = setTimeout(() => resolve('late'), timeoutMs);
    });
    const started = performance.now();
    const result = await Promise.race([child, late]);
    clearTimeout(timer);
    if (result === 'late') {
      // It can't be called back: whenever it does freeze, it is thawed at once.
      void child.then(() => this.#thaw(entry));
      throw new HoldfastError(
        'DEADLINE_EXCEEDED',
        `The file system at ${mountPoint} could not be frozen within ${timeoutMs} ms: it still writes back what its users have written. Repeat the snapshot when it has less to write, or take it without holdfast.io/quiesce.`,
      );
    }
    if (result.exitCode !== 0) {
      this.#forget(entry);
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `The file system at ${mountPoint} could not be frozen (${result.stderr.trim() || result.shortMessage || `exit code ${result.exitCode}`}). Somebody else may have frozen it: fsfreeze -u ${mountPoint} thaws it.`,
      );
    }
    return this.#frozen(entry, Math.max(1, timeoutMs - (performance.now() - started)));
  }

  #frozen(entry: Entry, leftMs: number): Frozen {
    let thawed: Promise<void> | undefined;
    const thaw = (): Promise<void> => {
      clearTimeout(watchdog);
      thawed ??= this.#thaw(entry);
      return thawed;
    };
    const watchdog = setTimeout(() => {
      this.#logger.warn({ mountPoint: entry.mountPoint }, 'A frozen file system is thawed: its time is over');
      void thaw();
    }, leftMs);
    return {
      get holds() {
        return thawed === undefined;
      },
      thaw,
    };
  }

  /** Never rejects; comes back when the file system is not frozen by us any more, or not mounted there any more. */
  async #thaw(entry: Entry): Promise<void> {
    for (let complained = false; ; complained = true) {
      const why = await this.#tryThaw(entry);
      if (why === undefined) break;
      if (!complained) {
        this.#logger.error(
          { mountPoint: entry.mountPoint },
          `A frozen file system cannot be thawed (${why}); it is tried again until it is.`,
        );
      }
      await sleep(THAW_AGAIN_MS);
    }
    this.#forget(entry);
  }

  /** Why it did not work; undefined: it is not frozen any more. */
  async #tryThaw({ mountPoint, device }: Entry): Promise<string | undefined> {
    try {
      const top = mountsAt(await readMounts(), mountPoint).at(-1);
      if (top === undefined || (await deviceUnder(top)) !== device) return undefined;
      const ran = await run('fsfreeze', ['-u', mountPoint], THAW_MS);
      // EINVAL: it is not frozen.
      return ran.exitCode === 0 || /Invalid argument/.test(ran.stderr) ? undefined : said(ran);
    } catch (error) {
      return messageOf(error);
    }
  }

  #forget(entry: Entry): void {
    this.#entries = this.#entries.filter((other) => other !== entry);
    try {
      this.#write();
    } catch (error) {
      this.#logger.warn(`The list of frozen file systems cannot be written: ${messageOf(error)}`);
    }
  }
}

/** One place where the device's file system is mounted: freezing it there freezes it everywhere. */
async function mountOf(number: string): Promise<string | undefined> {
  for (const entry of await readMounts()) {
    if ((await deviceUnder(entry)) === number) return entry.mountPoint;
  }
  return undefined;
}

/** A mounted device can't be claimed. Not frozen although it was asked for would be a promise broken in silence. */
async function refuseHiddenMount(device: string): Promise<void> {
  try {
    await (await open(device, constants.O_RDONLY | constants.O_EXCL)).close();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EBUSY') return;
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${device} is in use, but the agent sees no mount of it, so it can't be quiesced. Give the agent the host's mounts (mountPropagation: HostToContainer), or, for a raw block volume, take the snapshot without holdfast.io/quiesce.`,
      { cause: error },
    );
  }
}
