/**
 * What goes into a support bundle, part by part. Every part stands for itself: one that can't be had is named with its reason, so
 * that a bundle of a broken site is still a bundle. Everything is redacted on its way in.
 */
import { readdirSync, readFileSync, statSync, openSync, readSync, closeSync } from 'node:fs';
import { release, totalmem, cpus, uptime, type } from 'node:os';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { printable } from '../output.ts';
import { redact } from './redact.ts';
import { tarOf, type TextFile } from './tar.ts';

export interface Part {
  /** Of the file in the archive. */
  path: string;
  /** For the README. */
  what: string;
  read: () => Promise<unknown>;
}

/** Of each log: its end. */
const logBytes = 512 << 10;

export interface Bundle {
  archive: Buffer;
  held: string[];
  missing: string[];
}

export async function makeBundle(parts: readonly Part[], now: Date): Promise<Bundle> {
  const files: TextFile[] = [];
  const held: string[] = [];
  const missing: string[] = [];
  for (const part of parts) {
    try {
      const value = await part.read();
      const text = typeof value === 'string' ? value : `${printable(value)}\n`;
      files.push({ path: part.path, text: redact(text) });
      held.push(`${part.path}: ${part.what}`);
    } catch (error) {
      missing.push(`${part.path}: ${redact(error instanceof Error ? error.message : String(error))}`);
    }
  }
  files.unshift({ path: 'README.txt', text: readme(held, missing, now) });
  return { archive: gzipSync(tarOf(files, now.getTime() / 1000)), held, missing };
}

function readme(held: readonly string[], missing: readonly string[], now: Date): string {
  return [
    `Holdfast support bundle, made at ${now.toISOString()}.`,
    '',
    'It holds no data of volumes. Names of volumes, nodes and devices are in it as they are; passwords, keys and tokens were',
    'replaced by [redacted]. Look through it before you send it on.',
    '',
    'Files:',
    ...held.map((line) => `  ${line}`),
    '',
    missing.length === 0 ? 'Nothing is missing.' : 'Missing:',
    ...missing.map((line) => `  ${line}`),
    '',
  ].join('\n');
}

/** Facts of this machine that explain most surprises: kernel, devices and their queues, mounts of ours. */
export function machineFacts(): unknown {
  const facts = (path: string): string => {
    try {
      return readFileSync(path, 'utf8').trim();
    } catch {
      return '';
    }
  };
  return {
    kernel: `${type()} ${release()}`,
    commandLine: facts('/proc/cmdline'),
    cpus: cpus().length,
    memoryBytes: totalmem(),
    uptimeSeconds: Math.floor(uptime()),
    modules: facts('/proc/modules')
      .split('\n')
      .map((line) => line.split(' ')[0])
      .filter((name) => /^(fuse|loop|ublk|dm_|nvme|scsi|iscsi|ext4|xfs|btrfs)/.test(name ?? '')),
    devices: readdirSync('/sys/block').map((name) => ({
      name,
      sectors: facts(`/sys/block/${name}/size`),
      backingFile: facts(`/sys/block/${name}/loop/backing_file`),
      scheduler: facts(`/sys/block/${name}/queue/scheduler`),
      writeCache: facts(`/sys/block/${name}/queue/write_cache`),
      logicalBlockBytes: facts(`/sys/block/${name}/queue/logical_block_size`),
      wwid: facts(`/sys/block/${name}/device/wwid`) || facts(`/sys/block/${name}/wwid`),
    })),
    mounts: facts('/proc/self/mountinfo')
      .split('\n')
      .filter((line) => /holdfast|fuse/.test(line)),
  };
}

/** Parts for the log files of a directory: the end of each. */
export function logParts(directory: string): Part[] {
  let names: string[];
  try {
    names = readdirSync(directory, { recursive: true }).map(String);
  } catch (error) {
    return [{ path: 'logs', what: 'logs', read: () => Promise.reject(error) }];
  }
  return names
    .filter((name) => name.endsWith('.log'))
    .map((name) => ({
      path: `logs/${name}`.slice(0, 100),
      what: `the end of ${name}`,
      read: async () => endOf(join(directory, name)),
    }));
}

function endOf(path: string): string {
  const { size } = statSync(path);
  const from = Math.max(0, size - logBytes);
  const buffer = Buffer.alloc(size - from);
  const fd = openSync(path, 'r');
  try {
    return buffer.subarray(0, readSync(fd, buffer, 0, buffer.length, from)).toString('utf8');
  } finally {
    closeSync(fd);
  }
}
