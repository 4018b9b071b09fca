/** System programs: argument arrays, never a shell; a time limit that holds even when the program can't be killed. */
import { execa } from 'execa';
import { HoldfastError } from '@holdfast/common';

export interface Ran {
  readonly exitCode: number;
  readonly stdout: string;
  readonly stderr: string;
}

const packageOf: Record<string, string> = {
  'mkfs.ext4': 'e2fsprogs',
  e2fsck: 'e2fsprogs',
  resize2fs: 'e2fsprogs',
  'mkfs.xfs': 'xfsprogs',
  xfs_growfs: 'xfsprogs',
  xfs_repair: 'xfsprogs',
  xfs_logprint: 'xfsprogs',
  xfs_io: 'xfsprogs',
  'mkfs.btrfs': 'btrfs-progs',
  btrfs: 'btrfs-progs',
};

/** Time for the program to end after SIGTERM, and for a dead device's I/O to be noticed. */
const KILL_GRACE_MS = 2000;

/**
 * Runs a program to its end and gives its exit code, whatever that is.
 * @throws INTERNAL when it is not installed, ended by a signal, or is still running after `timeoutMs`. A program that hangs in
 * the kernel is left behind then (nothing can end it), but the call returns.
 */
export async function run(command: string, args: readonly string[], timeoutMs: number): Promise<Ran> {
  const child = execa(command, args, {
    reject: false,
    stdin: 'ignore',
    timeout: timeoutMs,
    forceKillAfterDelay: KILL_GRACE_MS,
    maxBuffer: 4 << 20,
    env: { LC_ALL: 'C' },
  });
  let timer: NodeJS.Timeout | undefined;
  const hangs = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => resolve(undefined), timeoutMs + 2 * KILL_GRACE_MS);
  });
  const line = [command, ...args].join(' ');
  try {
    const result = await Promise.race([child, hangs]);
    if (result === undefined || result.timedOut) {
      child.unref();
      throw new HoldfastError(
        'INTERNAL',
        `"${line}" was still running after ${timeoutMs / 1000} s. Look at the device's state (holdfast volume show) and the kernel log, then repeat the call.`,
      );
    }
    if (result.code === 'ENOENT') {
      throw new HoldfastError(
        'INTERNAL',
        `${command} is not installed on this node. Install it: apt-get install ${packageOf[command] ?? 'util-linux'}`,
      );
    }
    if (result.exitCode === undefined) {
      throw new HoldfastError(
        'INTERNAL',
        `"${line}" did not end by itself: ${result.shortMessage ?? result.signal}`,
      );
    }
    return { exitCode: result.exitCode, stdout: result.stdout, stderr: result.stderr };
  } finally {
    clearTimeout(timer);
  }
}

/** What a program said, in one line for an error message. */
export function said(ran: Ran): string {
  const text = (ran.stderr.trim() || ran.stdout.trim()).split('\n').slice(-4).join('; ');
  return text === '' ? `exit code ${ran.exitCode}` : `exit code ${ran.exitCode}: ${text}`;
}
