/**
 * What tests write and how they know it again. Files with pseudo-random content and a checksum each; and numbered
 * records, each of which says for itself that it is whole and which one it is.
 */
import { createHash } from 'node:crypto';
import {
  closeSync,
  fstatSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  readdirSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';

/** xorshift32: the same seed gives the same bytes. */
export function pseudoRandom(seed: number, bytes: number): Buffer {
  const words = new Uint32Array(Math.ceil(bytes / 4));
  let state = (seed * 2654435761 + 1) >>> 0 || 1;
  for (let i = 0; i < words.length; i++) {
    state ^= state << 13;
    state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    words[i] = state;
  }
  return Buffer.from(words.buffer, 0, bytes);
}

const sha256 = (data: Buffer): string => createHash('sha256').update(data).digest('hex');

/** Writes `count` files, synced, and returns the checksum of each. */
export function writeFiles(directory: string, count: number, seed: number): Map<string, string> {
  const sums = new Map<string, string>();
  mkdirSync(directory, { recursive: true });
  for (let i = 0; i < count; i++) {
    const name = `file-${i}`;
    const data = pseudoRandom(seed + i, 1000 + ((i * 7919) % 500_000));
    const file = openSync(join(directory, name), 'w');
    writeSync(file, data);
    fsyncSync(file);
    closeSync(file);
    sums.set(name, sha256(data));
  }
  const handle = openSync(directory, 'r');
  fsyncSync(handle);
  closeSync(handle);
  return sums;
}

/** Sentences about every file that is missing, changed or too many. */
export function compareFiles(directory: string, sums: ReadonlyMap<string, string>): string[] {
  const wrong: string[] = [];
  const there = new Set(readdirSync(directory));
  for (const [name, sum] of sums) {
    if (!there.delete(name)) wrong.push(`${name} is missing`);
    else if (sha256(readFileSync(join(directory, name))) !== sum) wrong.push(`${name} has other content`);
  }
  for (const name of there) wrong.push(`${name} was never written`);
  return wrong;
}

export const recordBytes = 4096;

/** Record `number` of a run: a header, filling, and a checksum over both. */
export function record(run: number, number: number): Buffer {
  const data = pseudoRandom(run * 1_000_003 + number, recordBytes);
  data.write('HFRECORD', 0, 'latin1');
  data.writeUInt32LE(run, 8);
  data.writeUInt32LE(number, 12);
  createHash('sha256')
    .update(data.subarray(0, recordBytes - 32))
    .digest()
    .copy(data, recordBytes - 32);
  return data;
}

/** Which of the records 0 … `count` - 1 are not in the file or device at `path`, from byte `offset` on. */
export function missingRecords(path: string, run: number, count: number, offset = 0): number[] {
  const missing: number[] = [];
  const file = openSync(path, 'r');
  try {
    const found = Buffer.alloc(recordBytes);
    for (let number = 0; number < count; number++) {
      const read = readSync(file, found, 0, recordBytes, offset + number * recordBytes);
      if (read !== recordBytes || !found.equals(record(run, number))) missing.push(number);
    }
  } finally {
    closeSync(file);
  }
  return missing;
}

/** Size in bytes of a file, or of a block device (which has to be sought). */
export function sizeOf(path: string): bigint {
  const file = openSync(path, 'r');
  try {
    const stat = fstatSync(file);
    if (!stat.isBlockDevice()) return BigInt(stat.size);
    const major = (stat.rdev >> 8) & 0xfff;
    const minor = (stat.rdev & 0xff) | ((stat.rdev >> 12) & 0xfff00);
    const sectors = readFileSync(`/sys/dev/block/${major}:${minor}/size`, 'utf8').trim();
    return BigInt(sectors) * 512n;
  } finally {
    closeSync(file);
  }
}
