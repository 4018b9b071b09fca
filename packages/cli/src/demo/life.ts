/**
 * One volume's whole life, step by step: what `make demo` shows. Everything goes over the CSI sockets, as Kubernetes
 * would; every byte is compared.
 */
import { closeSync, fsyncSync, openSync, readSync, rmSync, statfsSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { native } from '@holdfast/native';
import { printReport } from '../commands/pool.ts';
import {
  compareFiles,
  missingRecords,
  pseudoRandom,
  recordBytes,
  sizeOf,
  writeFiles,
} from '../harness/content.ts';
import type { CsiCluster, CsiSnapshot, CsiVolume, Published } from '../harness/csi.ts';
import type { DevUp } from '../harness/dev-process.ts';
import { Writer } from '../harness/writer-process.ts';
import { formatBytes } from '../output.ts';
import type { Steps } from './steps.ts';

const GiB = 1n << 30n;
const fileCount = 120;
const blockSeed = 77;
const blockBytes = 24 << 20;
/** The raw device: the writer's records from 0 on, the pattern behind them. */
const patternAt = 256 << 20;
/** Records that each writer has synced before the node is killed. */
const recordsBeforeKill = 200;

/** Steps of `liveThrough` for so many kills. */
export const stepCount = (kills: number): number => 14 + kills * 3 + (kills - 1);

export interface Outcome {
  kills: number;
  /** Records that were synced before a kill, all of them found again. */
  records: number;
  slowestFenceMs: number;
}

function check(ok: boolean, sentence: string): void {
  if (!ok) throw new Error(`Mismatch: ${sentence}`);
}

function checkFiles(published: Published, directory: string, sums: ReadonlyMap<string, string>): void {
  const wrong = compareFiles(join(published.targetPath, directory), sums);
  check(wrong.length === 0, wrong.slice(0, 5).join('; '));
}

function writePattern(device: string, offset: number, seed: number): void {
  const file = openSync(device, 'r+');
  try {
    writeSync(file, pseudoRandom(seed, blockBytes), 0, blockBytes, offset);
    fsyncSync(file);
  } finally {
    closeSync(file);
  }
}

function checkPattern(device: string, offset: number, seed: number): void {
  const data = Buffer.alloc(blockBytes);
  const file = openSync(device, 'r');
  try {
    for (let done = 0; done < blockBytes; ) {
      const part = readSync(file, data, done, blockBytes - done, offset + done);
      if (part === 0) break;
      done += part;
    }
  } finally {
    closeSync(file);
  }
  check(data.equals(pseudoRandom(seed, blockBytes)), `the pattern at ${offset} of ${device} changed`);
}

export async function liveThrough(
  steps: Steps,
  up: DevUp,
  cluster: CsiCluster,
  kills: number,
  writers: Writer[],
): Promise<Outcome> {
  const outcome: Outcome = { kills: 0, records: 0, slowestFenceMs: 0 };
  let files!: CsiVolume;
  let block!: CsiVolume;
  let filesAt!: Published;
  let blockAt!: Published;
  let sums!: Map<string, string>;

  await steps.run('Create an ext4 and a raw block volume', async () => {
    files = await cluster.create('demo-files', GiB, 'ext4');
    block = await cluster.create('demo-block', GiB / 2n);
    return `${formatBytes(GiB)} and ${formatBytes(GiB / 2n)}, thin`;
  });
  await steps.run('Stage and publish both on node 1', async () => {
    filesAt = await cluster.attach(files, 1);
    blockAt = await cluster.attach(block, 1);
    return [filesAt, blockAt].map((at) => at.targetPath.replace(`${up.dir}/`, '')).join(', ');
  });
  await steps.run('Write files and a pattern, with checksums', async () => {
    sums = writeFiles(join(filesAt.targetPath, 'files'), fileCount, 1);
    writePattern(blockAt.targetPath, patternAt, blockSeed);
    checkFiles(filesAt, 'files', sums);
    return `${fileCount} files, ${formatBytes(blockBytes)} on the block device`;
  });
  await steps.run('Move both volumes to node 2 and compare', async () => {
    await cluster.detach(filesAt);
    await cluster.detach(blockAt);
    filesAt = await cluster.attach(files, 2);
    blockAt = await cluster.attach(block, 2);
    checkFiles(filesAt, 'files', sums);
    checkPattern(blockAt.targetPath, patternAt, blockSeed);
    return 'every checksum is right';
  });

  for (let round = 1; round <= kills; round++) {
    const victim = filesAt.node;
    const next = victim === 2 ? 3 : 2;
    let log!: Writer;
    let raw!: Writer;
    await steps.run(`Write, fsync, and kill all of node ${victim} with SIGKILL`, async () => {
      log = new Writer(join(filesAt.targetPath, 'records'), round);
      raw = new Writer(blockAt.targetPath, round, patternAt / recordBytes);
      writers.push(log, raw);
      await Promise.all([log, raw].map((w) => w.untilAcknowledged(recordsBeforeKill + round * 7, 60_000)));
      const victims = up.processes({ node: victim });
      check(
        ['agent', 'csi-node', 'keeper'].every((role) => victims.some((p) => p.role === role)),
        `node ${victim} does not have all its processes`,
      );
      for (const { pid } of victims) process.kill(pid, 'SIGKILL');
      await Promise.all([log, raw].map((w) => w.end(15_000)));
      return `${log.acknowledged} + ${raw.acknowledged} records were synced`;
    });
    await steps.run(`ControllerUnpublish: fence node ${victim}`, async () => {
      const started = performance.now();
      await cluster.unpublish(files, victim);
      await cluster.unpublish(block, victim);
      outcome.slowestFenceMs = Math.max(outcome.slowestFenceMs, performance.now() - started);
      return 'its grants are void';
    });
    await steps.run(`Start on node ${next}: everything synced is there`, async () => {
      filesAt = await cluster.attach(files, next);
      blockAt = await cluster.attach(block, next);
      const lost = missingRecords(join(filesAt.targetPath, 'records'), round, log.acknowledged);
      check(lost.length === 0, `${lost.length} synced records of the file are lost, the first is ${lost[0]}`);
      const lostRaw = missingRecords(blockAt.targetPath, round, raw.acknowledged);
      check(
        lostRaw.length === 0,
        `${lostRaw.length} synced records of the device are lost, the first is ${lostRaw[0]}`,
      );
      checkFiles(filesAt, 'files', sums);
      checkPattern(blockAt.targetPath, patternAt, blockSeed);
      outcome.kills += 1;
      outcome.records += log.acknowledged + raw.acknowledged;
      return 'all files and the pattern too';
    });
    if (round < kills) {
      await steps.run(`Switch node ${victim} on again`, async () => {
        await up.startNode(victim);
        return 'it joined under a new generation';
      });
    }
  }

  // A node that is up and does not have the volumes: the first one never dies.
  const other = 1;
  let snapshot!: CsiSnapshot;
  let log!: Writer;
  let logged = 0;
  const logPath = 'snapshot-records';
  const logSeed = 4242;
  await steps.run('Snapshot while it is written and fsynced', async () => {
    log = new Writer(join(filesAt.targetPath, logPath), logSeed);
    writers.push(log);
    await log.untilAcknowledged(recordsBeforeKill, 60_000);
    logged = log.acknowledged;
    const started = performance.now();
    snapshot = await cluster.snapshot(files, 'demo-snapshot');
    const tookMs = performance.now() - started;
    const during = log.acknowledged - logged;
    await log.untilAcknowledged(log.acknowledged + 50, 60_000);
    await log.end(0);
    return `${tookMs.toFixed(0)} ms, ${during} records were synced meanwhile`;
  });
  let clone!: CsiVolume;
  let cloneAt!: Published;
  await steps.run(`Clone it on node ${other}, beside the volume`, async () => {
    clone = await cluster.create('demo-clone', GiB, 'ext4', { snapshot });
    cloneAt = await cluster.attach(clone, other);
    checkFiles(cloneAt, 'files', sums);
    const lost = missingRecords(join(cloneAt.targetPath, logPath), logSeed, logged);
    check(lost.length === 0, `${lost.length} records synced before the snapshot are not in it`);
    checkFiles(cloneAt, 'own', writeFiles(join(cloneAt.targetPath, 'own'), fileCount, 900));
    return `all files, ${logged} records; ${fileCount} files of its own`;
  });
  await steps.run('Delete all files of the volume, restore them from the snapshot', async () => {
    rmSync(join(filesAt.targetPath, 'files'), { recursive: true });
    const restored = await cluster.create('demo-restored', GiB, 'ext4', { snapshot });
    await cluster.detach(filesAt);
    await cluster.delete(files);
    files = restored;
    filesAt = await cluster.attach(files, filesAt.node);
    checkFiles(filesAt, 'files', sums);
    return 'every checksum is right, the first volume is deleted';
  });
  await steps.run('Delete the clone and the snapshot', async () => {
    await cluster.detach(cloneAt);
    await cluster.delete(clone);
    await cluster.deleteSnapshot(snapshot);
    checkFiles(filesAt, 'files', sums);
    return 'the restored volume is whole';
  });

  await steps.run('Expand both while they are in use', async () => {
    const before = statfsSync(filesAt.targetPath).blocks;
    await cluster.expand(filesAt, 2n * GiB);
    await cluster.expand(blockAt, GiB);
    const after = statfsSync(filesAt.targetPath);
    check(
      after.blocks > before * 1.8,
      `the file system has ${after.blocks} blocks after it grew, ${before} before`,
    );
    const device = sizeOf(blockAt.targetPath);
    check(device === GiB, `the block device has ${device} bytes, not ${GiB}`);
    checkFiles(filesAt, 'files', sums);
    return `${formatBytes(BigInt(after.blocks) * BigInt(after.bsize))} file system, ${formatBytes(device)} device`;
  });
  await steps.run('Write into the new space and read it back', async () => {
    checkFiles(filesAt, 'more', writeFiles(join(filesAt.targetPath, 'more'), fileCount, 5000));
    const end = Number(GiB) - blockBytes;
    writePattern(blockAt.targetPath, end, 9);
    checkPattern(blockAt.targetPath, end, 9);
    checkPattern(blockAt.targetPath, patternAt, blockSeed);
    return `${fileCount} more files, the last ${formatBytes(blockBytes)} of the device`;
  });
  await steps.run('Unpublish, unstage and delete both', async () => {
    await cluster.detach(filesAt);
    await cluster.detach(blockAt);
    await cluster.delete(files);
    await cluster.delete(block);
    return 'deleted';
  });
  await steps.run('The pool is empty again', async () => {
    await cluster.untilEmpty(30_000);
    return 'all slabs are free';
  });
  await steps.run('Check every page of the pool', async () => {
    const { device } = up.state.disk;
    const report = await native().checkPool(device);
    if (!report.clean) printReport(device, report);
    check(report.clean, 'the pool is not clean');
    check(report.slabsClaimed === 0n, `${report.slabsClaimed} slabs are claimed on disk`);
    return `clean: ${report.pagesRead} pages read`;
  });
  return outcome;
}
