/** /proc/self/mountinfo: the truth about what is mounted (proc_pid_mountinfo(5)). */
import { readFile, realpath, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';

export interface MountEntry {
  readonly id: number;
  readonly parentId: number;
  /** `major:minor` of the file system; 0:N where it has no device of its own (btrfs, tmpfs). */
  readonly device: string;
  /** The path within the file system that is mounted here. */
  readonly root: string;
  readonly mountPoint: string;
  /** Options of this mount point. */
  readonly options: readonly string[];
  readonly fsType: string;
  readonly source: string;
  /** Options of the file system, shared by all its mount points. */
  readonly superOptions: readonly string[];
}

/** The kernel writes space, tab, newline and backslash as `\` and three octal digits. Bytes, so UTF-8 stays whole. */
function unescape(text: string): string {
  if (!text.includes('\\')) return text;
  const bytes = Buffer.from(text);
  const out: number[] = [];
  for (let i = 0; i < bytes.length; i++) {
    const octal = bytes.subarray(i + 1, i + 4).toString('latin1');
    if (bytes[i] === 0x5c && /^[0-7]{3}$/.test(octal)) {
      out.push(parseInt(octal, 8));
      i += 3;
    } else {
      out.push(bytes[i] as number);
    }
  }
  return Buffer.from(out).toString();
}

/** In the order of mounting: of two at one mount point the later one is on top. */
export function parseMountInfo(text: string): MountEntry[] {
  const entries: MountEntry[] = [];
  for (const line of text.split('\n')) {
    const fields = line.split(' ');
    // Optional fields stand between the sixth and a single hyphen.
    const hyphen = fields.indexOf('-', 6);
    if (hyphen < 0) continue;
    const at = (index: number): string => fields[index] ?? '';
    entries.push({
      id: Number(at(0)),
      parentId: Number(at(1)),
      device: at(2),
      root: unescape(at(3)),
      mountPoint: unescape(at(4)),
      options: at(5).split(','),
      fsType: at(hyphen + 1),
      source: unescape(at(hyphen + 2)),
      superOptions: at(hyphen + 3).split(','),
    });
  }
  return entries;
}

export async function readMounts(): Promise<MountEntry[]> {
  return parseMountInfo(await readFile('/proc/self/mountinfo', 'utf8'));
}

/** The path as mountinfo shows it: the parent's links resolved, the last part left alone (it may be a dead mount). */
export async function mountPath(path: string): Promise<string> {
  try {
    return join(await realpath(dirname(path)), basename(path));
  } catch {
    return join(dirname(path), basename(path));
  }
}

/** What is mounted at exactly this path (as mountPath() gives it), the top one last. */
export const mountsAt = (mounts: readonly MountEntry[], path: string): MountEntry[] =>
  mounts.filter((entry) => entry.mountPoint === path);

/** `major:minor` of a block device node; undefined when it is not there or not one. */
export async function deviceNumber(path: string): Promise<string | undefined> {
  try {
    const { rdev, mode } = await stat(path);
    // S_IFMT, S_IFBLK
    return (mode & 0o170000) === 0o060000 ? deviceText(rdev) : undefined;
  } catch {
    return undefined;
  }
}

/** Linux's 64-bit dev_t, split as glibc's major() and minor() do. */
function deviceText(rdev: number): string {
  const dev = BigInt(rdev);
  const major = ((dev >> 8n) & 0xfffn) | ((dev >> 32n) & ~0xfffn);
  const minor = (dev & 0xffn) | ((dev >> 12n) & ~0xffn & 0xffffffffn);
  return `${major}:${minor}`;
}

/** The block device under a mounted file system, as `major:minor`: btrfs shows an anonymous number, but names its source. */
export async function deviceUnder(entry: MountEntry): Promise<string | undefined> {
  return entry.device.startsWith('0:') ? deviceNumber(entry.source) : entry.device;
}
