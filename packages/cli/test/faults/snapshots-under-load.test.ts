import { execFile } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { native } from '@holdfast/native';
import { compareFiles, writeFiles } from '../../src/harness/content.ts';
import type { CsiCluster, CsiSnapshot, CsiVolume, Published } from '../../src/harness/csi.ts';
import { long, pause, withCluster } from './cluster.ts';
import { fio, type FioRun } from './fio.ts';

const seconds = long ? 120 : 15;
const kept = 6;
const filesInBatch = 5;
/** They change nothing, and complain of anything that they would have to. */
const checks: Record<string, string[]> = {
  ext4: ['e2fsck', '-f', '-n'],
  xfs: ['xfs_repair', '-n'],
};

interface Batch {
  name: string;
  sums: Map<string, string>;
}
interface Taken {
  snapshot: CsiSnapshot;
  /** Batches that were written and synced before it was asked for. */
  batches: Batch[];
}

/** A mounted volume that is written all the time: by fio, which knows its own blocks again, and batch by batch of files. */
class Load {
  readonly volume: CsiVolume;
  readonly at: Published;
  readonly batches: Batch[] = [];
  readonly taken: Taken[] = [];
  readonly #fio: FioRun;
  #number = 0;

  constructor(volume: CsiVolume, at: Published) {
    this.volume = volume;
    this.at = at;
    this.#fio = fio(
      '--name=verify',
      `--filename=${join(at.targetPath, 'fio')}`,
      '--size=192M',
      '--rw=randwrite',
      '--bsrange=4k-64k',
      '--iodepth=8',
      '--fsync=64',
      '--rate=24m',
      '--verify=crc32c',
      '--verify_fatal=1',
      '--verify_state_save=0',
      '--do_verify=1',
      '--verify_backlog=256',
      '--time_based=1',
      `--runtime=${seconds}`,
      '--output-format=terse',
    );
  }

  writeBatch(): void {
    const name = `batch-${this.batches.length}`;
    const directory = join(this.at.targetPath, 'files', name);
    mkdirSync(directory, { recursive: true });
    this.batches.push({ name, sums: writeFiles(directory, filesInBatch, this.batches.length * 1000) });
  }

  async snapshot(cluster: CsiCluster): Promise<void> {
    const batches = [...this.batches];
    const snapshot = await cluster.snapshot(this.volume, `${this.volume.name}-${++this.#number}`);
    this.taken.push({ snapshot, batches });
  }

  get snapshots(): number {
    return this.#number;
  }

  /** What fio printed, when it has ended without an error. */
  get fioEnded(): Promise<string> {
    return this.#fio.ended;
  }
}

const pick = (list: readonly unknown[]): number => Math.floor(Math.random() * list.length);

/** Sentences about what is not as it was when the snapshot was taken. */
function wrongIn(at: Published, batches: readonly Batch[]): string[] {
  return batches.flatMap(({ name, sums }) =>
    compareFiles(join(at.targetPath, 'files', name), sums).map((what) => `${name}: ${what}`),
  );
}

async function fsck(device: string, fsType: string): Promise<void> {
  const [command = 'false', ...args] = checks[fsType] ?? [];
  try {
    await promisify(execFile)(command, [...args, device], { maxBuffer: 16 << 20 });
  } catch (error) {
    const { stdout, stderr } = error as { stdout?: string; stderr?: string };
    throw new Error(`${command} of a copy is not content:\n${stdout}${stderr}`, { cause: error });
  }
}

/** Mounted on another node, which replays the journal; then looked at as a device that nobody has mounted. */
async function checkCopy(cluster: CsiCluster, load: Load, taken: Taken, name: string): Promise<void> {
  const fsType = load.volume.fsType ?? '';
  const copy = await cluster.create(name, 1n << 30n, fsType, { snapshot: taken.snapshot });
  const mounted = await cluster.attach(copy, 2);
  expect(wrongIn(mounted, taken.batches), `${name}, a copy of ${taken.snapshot.name}`).toEqual([]);
  await cluster.detach(mounted);
  const raw = await cluster.attach({ ...copy, name: `${name}-raw`, fsType: undefined }, 2);
  try {
    await fsck(raw.targetPath, fsType);
  } finally {
    await cluster.detach(raw);
  }
  await cluster.delete(copy);
}

describe('snapshots of mounted file systems, one a second, deleted in random order', () => {
  it(`hold what was synced before them, whole and clean, for ${seconds} s under fio verify`, {
    timeout: 900_000,
  }, async () => {
    await withCluster({ nodes: 2, size: '16G', reclaimSeconds: 2 }, async (up, cluster) => {
      const loads: Load[] = [];
      for (const fsType of ['ext4', 'xfs']) {
        const volume = await cluster.create(`load-${fsType}`, 1n << 30n, fsType);
        loads.push(new Load(volume, await cluster.attach(volume, 1)));
      }
      const until = Date.now() + seconds * 1000;
      let copies = 0;
      const copy = async (load: Load): Promise<void> => {
        const taken = load.taken[pick(load.taken)];
        if (taken !== undefined) await checkCopy(cluster, load, taken, `copy-${++copies}`);
      };
      let copying: Promise<void> = Promise.resolve();
      let nextCopy = Date.now() + 5000;
      while (Date.now() < until) {
        const began = Date.now();
        for (const load of loads) load.writeBatch();
        await Promise.all(loads.map((load) => load.snapshot(cluster)));
        for (const load of loads) load.writeBatch();
        if (Date.now() > nextCopy) {
          // Beside the next snapshots; what it is made from may be deleted as soon as it exists.
          await copying;
          const load = loads[copies % loads.length];
          if (load !== undefined) copying = copy(load);
          copying.catch(() => undefined);
          nextCopy = Date.now() + 8000;
          await pause(500);
        }
        for (const load of loads) {
          while (load.taken.length > kept) {
            const [gone] = load.taken.splice(pick(load.taken), 1);
            if (gone !== undefined) await cluster.deleteSnapshot(gone.snapshot);
          }
        }
        await pause(Math.max(0, 1000 - (Date.now() - began)));
      }
      await copying;
      for (const load of loads) {
        expect(await load.fioEnded, 'fio says').not.toMatch(/verify:|bad header|Input\/output/i);
      }
      for (const load of loads) await copy(load);
      for (const load of loads) {
        expect(load.snapshots).toBeGreaterThan(seconds / 4);
        expect(wrongIn(load.at, load.batches)).toEqual([]);
        for (const { snapshot } of load.taken.splice(0)) await cluster.deleteSnapshot(snapshot);
        await cluster.detach(load.at);
        await cluster.delete(load.volume);
      }
      expect(copies).toBeGreaterThan(2);
      await cluster.untilEmpty(120_000);
      expect(await cluster.misfits()).toEqual([]);
      const report = await native().checkPool(up.state.disk.device);
      expect(report.findings.filter((f) => f.severity === 'error')).toEqual([]);
    });
  });
});
