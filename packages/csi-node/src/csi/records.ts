/**
 * What csi-node remembers of a staged volume, beyond what the kernel shows: with which arguments it was staged and
 * published, so that a repeated call with other arguments is recognised. One small file a volume. mountinfo and the agent
 * are the truth about what is mounted and open; a record that is missing costs only that recognition.
 */
import { mkdir, open, readdir, readFile, rename, unlink } from 'node:fs/promises';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Capability } from '@holdfast/common';

export interface PublishRecord {
  readonly capability: Capability;
  readonly readOnly: boolean;
  /** False from before the bind mount until after it. */
  readonly complete: boolean;
}

export interface VolumeRecord {
  readonly volumeId: string;
  readonly stagingPath: string;
  readonly capability: Capability;
  readonly publishId: string;
  readonly readOnly: boolean;
  /** Whether a stage has come to its end; until then the file system may have to grow. */
  readonly ready: boolean;
  /** Unmounted for a moment in order to grow (idle-growth.ts). */
  readonly growing?: boolean;
  readonly published: Readonly<Record<string, PublishRecord>>;
}

interface Stored extends VolumeRecord {
  readonly version: 1;
  readonly bootId: string;
}

export class VolumeRecords {
  readonly #dir: string;
  readonly #bootId: string;

  constructor(stateDir: string, bootId = readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim()) {
    this.#dir = join(stateDir, 'volumes');
    this.#bootId = bootId;
  }

  #file(volumeUuid: string): string {
    return join(this.#dir, `${volumeUuid}.json`);
  }

  /** Undefined also for one of an earlier boot (nothing of it is mounted any more) and for an unreadable one. */
  async get(volumeUuid: string): Promise<VolumeRecord | undefined> {
    try {
      const stored = JSON.parse(await readFile(this.#file(volumeUuid), 'utf8')) as Stored;
      return stored.version === 1 && stored.bootId === this.#bootId ? stored : undefined;
    } catch {
      return undefined;
    }
  }

  /** Written beside, flushed, then renamed: a reader sees the old or the new one, whole. */
  async put(volumeUuid: string, record: VolumeRecord): Promise<void> {
    await mkdir(this.#dir, { recursive: true, mode: 0o700 });
    const stored: Stored = { ...record, version: 1, bootId: this.#bootId };
    const file = this.#file(volumeUuid);
    const handle = await open(`${file}.new`, 'w', 0o600);
    try {
      await handle.writeFile(`${JSON.stringify(stored, null, 2)}\n`);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(`${file}.new`, file);
  }

  async remove(volumeUuid: string): Promise<void> {
    await unlink(this.#file(volumeUuid)).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOENT') throw error;
    });
  }

  async list(): Promise<string[]> {
    const names = await readdir(this.#dir).catch(() => []);
    return names.filter((name) => name.endsWith('.json')).map((name) => name.slice(0, -'.json'.length));
  }
}

const sorted = (values: readonly string[]): string => [...values].sort().join();

/** The same request as far as what it makes is concerned. */
export const sameCapability = (one: Capability, other: Capability): boolean =>
  one.accessType === other.accessType &&
  one.mode === other.mode &&
  one.fsType === other.fsType &&
  sorted(one.mountFlags) === sorted(other.mountFlags);
