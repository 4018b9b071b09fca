/**
 * Making a file system so that a cut-off at any moment, of this process or of the whole node, leaves either a whole file
 * system or something that any node recognises as half made.
 *
 * mkfs runs on a sparse file of the volume's size. Then, on the blank volume: a marker is written where the primary
 * superblock will be; everything else that mkfs produced is copied and flushed; last, the one 4 KiB block with the
 * superblock replaces the marker. That last write is the commit. A volume that shows the marker was blank before and
 * holds nothing but parts of that copy, so it may be zeroed and made anew.
 */
import { mkdir, mkdtemp, open, rm, truncate, type FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import { HoldfastError, type FileSystem } from '@holdfast/common';
import { claimDevice } from './claim.ts';
import { run, said } from './run.ts';
import type { Step } from './step.ts';

const BLOCK = 4096;
const COPY_CHUNK = 1 << 20;
const MKFS_MS = 300_000;
const ZERO_MS = 1_800_000;
const MAGIC = Buffer.from('HOLDFAST: file system being made\n');
const zeroBlock = Buffer.alloc(BLOCK);

/** Where the block with the primary superblock is. */
const commitOffset: Record<FileSystem, number> = { ext4: 0, xfs: 0, btrfs: 64 << 10 };

/** 4096 is the volume's logical sector: mkfs can't see that on a file. */
const mkfsOf: Record<FileSystem, readonly [string, ...string[]]> = {
  ext4: ['mkfs.ext4', '-q', '-F', '-b', '4096'],
  xfs: ['mkfs.xfs', '-q', '-f', '-s', 'size=4096'],
  btrfs: ['mkfs.btrfs', '-q', '-f'],
};

/** Whether a format was cut off here. */
export async function readMarker(device: FileHandle): Promise<boolean> {
  const head = Buffer.alloc(MAGIC.length);
  for (const offset of new Set(Object.values(commitOffset))) {
    await device.read(head, 0, head.length, offset);
    if (head.equals(MAGIC)) return true;
  }
  return false;
}

export interface FormatRequest {
  readonly device: string;
  readonly sizeBytes: bigint;
  readonly fsType: FileSystem;
  readonly mkfsOptions: readonly string[];
  /** For people who look at a half-made volume. */
  readonly volumeId: string;
  /** Where the sparse image is made; it needs a few MiB (for XFS up to the size of its journal). */
  readonly workDir: string;
  readonly step: Step;
}

/**
 * The device must be blank or half-formatted (see probe()): the caller has proved it.
 * @throws INVALID_ARGUMENT when mkfs refuses its options or the size.
 */
export async function format(request: FormatRequest, halfFormatted: boolean): Promise<void> {
  await mkdir(request.workDir, { recursive: true, mode: 0o700 });
  const directory = await mkdtemp(join(request.workDir, 'mkfs-'));
  try {
    const image = join(directory, 'image');
    await (await open(image, 'wx', 0o600)).close();
    await truncate(image, Number(request.sizeBytes));
    const [command, ...fixed] = mkfsOf[request.fsType];
    const args = [...fixed, ...request.mkfsOptions];
    const made = await run(command, [...args, image], MKFS_MS);
    if (made.exitCode !== 0) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `${command} ${args.join(' ')} on ${request.sizeBytes} bytes failed (${said(made)}). Correct mkfsOptions in the StorageClass, or the size.`,
      );
    }
    await request.step('format:image-made');
    const device = await claimDevice(request.device);
    const source = await open(image, 'r');
    try {
      await copy(request, source, device, await dataRanges(image), halfFormatted);
    } finally {
      await source.close();
      await device.close();
    }
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}

async function copy(
  request: FormatRequest,
  source: FileHandle,
  device: FileHandle,
  ranges: readonly Range[],
  halfFormatted: boolean,
): Promise<void> {
  const commit = commitOffset[request.fsType];
  const marker = Buffer.alloc(BLOCK);
  MAGIC.copy(marker);
  marker.write(`${request.fsType} for volume ${request.volumeId}\n`, MAGIC.length);
  await device.write(marker, 0, BLOCK, commit);
  await device.sync();
  await request.step('format:marked');
  if (halfFormatted) {
    // The new marker stands; whatever an earlier attempt copied goes.
    await zero(request.device, 0n, BigInt(commit));
    await zero(request.device, BigInt(commit + BLOCK), request.sizeBytes);
  }
  const buffer = Buffer.alloc(COPY_CHUNK);
  let superblock = zeroBlock;
  for (const { start, end } of ranges) {
    for (let at = start; at < end; at += COPY_CHUNK) {
      const length = Math.min(COPY_CHUNK, end - at);
      const { bytesRead } = await source.read(buffer, 0, length, at);
      if (bytesRead !== length) throw new Error(`short read of the image at ${at}`);
      for (let block = 0; block < length; block += BLOCK) {
        const bytes = buffer.subarray(block, block + BLOCK);
        if (at + block === commit) superblock = Buffer.from(bytes);
        else if (!bytes.equals(zeroBlock)) await device.write(bytes, 0, BLOCK, at + block);
      }
    }
    await request.step('format:copying');
  }
  await device.sync();
  await request.step('format:copied');
  if (superblock.equals(zeroBlock)) throw new Error(`mkfs left no superblock at ${commit}`);
  await device.write(superblock, 0, BLOCK, commit);
  await device.sync();
  await request.step('format:committed');
}

async function zero(device: string, start: bigint, end: bigint): Promise<void> {
  if (start >= end) return;
  const ran = await run(
    'blkdiscard',
    ['-f', '-z', '-o', `${start}`, '-l', `${end - start}`, device],
    ZERO_MS,
  );
  if (ran.exitCode !== 0) {
    throw new HoldfastError(
      'INTERNAL',
      `What a cut-off mkfs left on ${device} could not be zeroed (${said(ran)}). Repeat the call.`,
    );
  }
}

interface Range {
  readonly start: number;
  readonly end: number;
}

/** The parts of a sparse file that hold data, widened to whole blocks. */
async function dataRanges(file: string): Promise<Range[]> {
  const ran = await run('xfs_io', ['-r', '-c', 'seek -a -r 0', file], MKFS_MS);
  if (ran.exitCode !== 0) {
    throw new HoldfastError('INTERNAL', `The image of the new file system could not be read (${said(ran)}).`);
  }
  const ranges: Range[] = [];
  let start: number | undefined;
  for (const [, kind, offset] of ran.stdout.matchAll(/^(DATA|HOLE)\s+(\d+)$/gm)) {
    if (kind === 'DATA') start ??= Number(offset);
    else if (start !== undefined) {
      ranges.push({ start: start - (start % BLOCK), end: Math.ceil(Number(offset) / BLOCK) * BLOCK });
      start = undefined;
    }
  }
  if (start !== undefined || ranges.length === 0) {
    throw new HoldfastError('INTERNAL', `xfs_io gave no usable map of the new file system: ${ran.stdout}`);
  }
  return ranges;
}
