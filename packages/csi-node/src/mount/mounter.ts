/** Mounting and unmounting, with errors that say what to do. Paths are as mountPath() gives them. */
import { mkdir, open, readdir, rmdir, stat, statfs, unlink } from 'node:fs/promises';
import { dirname } from 'node:path';
import { HoldfastError } from '@holdfast/common';
import { whileBusy } from './claim.ts';
import { mountsAt, readMounts } from './mountinfo.ts';
import { run, said, type Ran } from './run.ts';

const MOUNT_MS = 120_000;
const UNMOUNT_MS = 60_000;
/** A healthy file system answers statfs from memory. */
const LOOK_MS = 5000;

const errno = (error: unknown): string => (error as NodeJS.ErrnoException).code ?? '';

/** Mounts a device; the caller judges a failure (it may call for a check of the file system). */
export function mountDevice(
  device: string,
  target: string,
  fsType: string,
  options: readonly string[],
): Promise<Ran> {
  const flags = options.length > 0 ? ['-o', options.join(',')] : [];
  return whileBusy(
    () => run('mount', ['-t', fsType, ...flags, device, target], MOUNT_MS),
    (ran) => ran.exitCode !== 0 && /already mounted or mount point busy/.test(ran.stderr),
  );
}

export async function bindMount(source: string, target: string, readOnly: boolean): Promise<void> {
  const ran = await run('mount', ['--bind', '-o', readOnly ? 'ro' : 'rw', source, target], MOUNT_MS);
  if (ran.exitCode !== 0) {
    throw new HoldfastError(
      'INTERNAL',
      `${source} could not be bound to ${target} (${said(ran)}). Repeat the call.`,
    );
  }
}

/** Source of the mounts that cover a mount point while its file system is away. */
export const GUARD = 'holdfast-away';

/** Covers a mount point so that nothing can be written below it by mistake. */
export async function mountGuard(path: string): Promise<void> {
  const ran = await run('mount', ['-t', 'tmpfs', '-o', 'ro,size=4k,mode=0', GUARD, path], MOUNT_MS);
  if (ran.exitCode !== 0) {
    throw new HoldfastError('INTERNAL', `${path} could not be covered (${said(ran)}). Repeat the call.`);
  }
}

/**
 * Takes away every mount at `path`. `dead`: what is below gives errors, so a refused or failing unmount is done lazily.
 * @throws IN_USE when something healthy is still used.
 */
export async function unmountAll(path: string, dead = false): Promise<void> {
  for (let left = mountsAt(await readMounts(), path).length; left > 0; ) {
    let ran = await run('umount', ['-c', path], UNMOUNT_MS);
    if (ran.exitCode !== 0 && dead) ran = await run('umount', ['-c', '-l', path], UNMOUNT_MS);
    const now = mountsAt(await readMounts(), path).length;
    if (now >= left) {
      throw new HoldfastError(
        'IN_USE',
        `${path} could not be unmounted (${said(ran)}). Find who uses it (fuser -vm ${path}), end that, and repeat the call.`,
      );
    }
    left = now;
  }
}

export async function makeDirectory(path: string): Promise<void> {
  await mkdir(path, { recursive: true, mode: 0o750 });
}

/** A file to bind a device node onto. @throws FAILED_PRECONDITION when a directory is in the way. */
export async function makeTargetFile(path: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true, mode: 0o750 });
  try {
    await (await open(path, 'a', 0o600)).close();
  } catch (error) {
    if (errno(error) !== 'EISDIR') throw error;
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${path} is a directory, and a block volume is published as a file. Remove the directory, or give another target_path.`,
    );
  }
}

/** Removes the file or empty directory that a publish made. What is not there is fine. */
export async function removeTarget(path: string): Promise<void> {
  try {
    await rmdir(path);
  } catch (error) {
    if (errno(error) === 'ENOENT') return;
    if (errno(error) === 'ENOTDIR') {
      await removeTargetFile(path);
      return;
    }
    if (errno(error) === 'ENOTEMPTY') {
      const names = (await readdir(path)).slice(0, 3).join(', ');
      throw new HoldfastError(
        'FAILED_PRECONDITION',
        `${path} is not mounted and holds files of its own (${names}). They are no part of the volume; move them away and repeat the call.`,
      );
    }
    throw error;
  }
}

async function removeTargetFile(path: string): Promise<void> {
  const { size } = await stat(path);
  if (size > 0) {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${path} is a file with ${size} bytes, and the file that a publish makes is empty. It is no part of the volume; move it away and repeat the call.`,
    );
  }
  await unlink(path);
}

const within = <T>(work: Promise<T>, ms: number): Promise<T | 'late'> => {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<'late'>((resolve) => {
    timer = setTimeout(() => resolve('late'), ms);
  });
  return Promise.race([work, late]).finally(() => clearTimeout(timer));
};

/** 'dead': every access fails (EIO, ENOTCONN, ESHUTDOWN, ESTALE). 'hangs': no answer in time, which may pass. */
export async function lookAt(path: string): Promise<'fine' | 'dead' | 'hangs'> {
  try {
    const seen = await within(Promise.all([stat(path), statfs(path)]), LOOK_MS);
    return seen === 'late' ? 'hangs' : 'fine';
  } catch (error) {
    if (['EIO', 'ENOTCONN', 'ESHUTDOWN', 'ESTALE', 'ENXIO', 'ENODEV'].includes(errno(error))) return 'dead';
    throw error;
  }
}

export interface Usage {
  readonly total: bigint;
  readonly used: bigint;
  readonly available: bigint;
}

/** @throws UNAVAILABLE when the file system doesn't answer. */
export async function usageOf(path: string): Promise<{ bytes: Usage; inodes: Usage }> {
  const stats = await within(statfs(path, { bigint: true }), LOOK_MS);
  if (stats === 'late') {
    throw new HoldfastError('UNAVAILABLE', `The file system at ${path} does not answer. Repeat the call.`);
  }
  return {
    bytes: {
      total: stats.blocks * stats.bsize,
      used: (stats.blocks - stats.bfree) * stats.bsize,
      available: stats.bavail * stats.bsize,
    },
    inodes: { total: stats.files, used: stats.files - stats.ffree, available: stats.ffree },
  };
}
