/** What differs between ext4, xfs and btrfs: checking before a mount, mounting read-only, growing, reading the size. */
import { open } from 'node:fs/promises';
import { HoldfastError, type FileSystem } from '@holdfast/common';
import { whileBusy } from './claim.ts';
import { run, said } from './run.ts';

/** A check that repairs is never cut short by a caller's deadline. */
const CHECK_MS = 1_800_000;
const GROW_MS = 600_000;

const damaged = (device: string, fsType: FileSystem, what: string, remedy: string): HoldfastError =>
  new HoldfastError(
    'CORRUPT',
    `The ${fsType} file system on ${device} is damaged and was left as it is: ${what}. ${remedy} Or restore a backup.`,
  );

async function read(device: string, offset: number, length: number): Promise<Buffer> {
  const handle = await open(device, 'r');
  try {
    const buffer = Buffer.alloc(length);
    await handle.read(buffer, 0, length, offset);
    return buffer;
  } finally {
    await handle.close();
  }
}

// Offsets of the on-disk superblocks (fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h, fs/btrfs/accessors.h).
const ext4Superblock = (device: string): Promise<Buffer> => read(device, 1024, 1024);
const xfsSuperblock = (device: string): Promise<Buffer> => read(device, 0, 512);
const btrfsSuperblock = (device: string): Promise<Buffer> => read(device, 64 << 10, 4096);

const sizeReaders: Record<FileSystem, (device: string) => Promise<bigint>> = {
  ext4: async (device) => {
    const sb = await ext4Superblock(device);
    const has64bit = (sb.readUInt32LE(0x60) & 0x80) !== 0;
    const blocks = BigInt(sb.readUInt32LE(0x4)) | (has64bit ? BigInt(sb.readUInt32LE(0x150)) << 32n : 0n);
    return blocks << BigInt(10 + sb.readUInt32LE(0x18));
  },
  xfs: async (device) => {
    const sb = await xfsSuperblock(device);
    return sb.readBigUInt64BE(8) * BigInt(sb.readUInt32BE(4));
  },
  btrfs: async (device) => (await btrfsSuperblock(device)).readBigUInt64LE(0x70),
};

/** Bytes that the file system believes its device has, from the superblock of an unmounted device. */
export const fileSystemSize = (device: string, fsType: FileSystem): Promise<bigint> =>
  sizeReaders[fsType](device);

const replayTests: Record<FileSystem, (device: string) => Promise<boolean>> = {
  ext4: async (device) => ((await ext4Superblock(device)).readUInt32LE(0x60) & 0x4) !== 0,
  xfs: async (device) => !(await run('xfs_logprint', ['-t', device], CHECK_MS)).stdout.includes('<CLEAN>'),
  btrfs: async (device) => (await btrfsSuperblock(device)).readBigUInt64LE(0x60) !== 0n,
};

/** Whether the journal holds what is not in its place yet, so that reading without a replay shows an old state. */
export const needsReplay = (device: string, fsType: FileSystem): Promise<boolean> =>
  replayTests[fsType](device);

/** Options that keep a read-only mount from writing a single byte. */
export const readOnlyOptions: Record<FileSystem, readonly string[]> = {
  ext4: ['ro', 'noload'],
  xfs: ['ro', 'norecovery'],
  btrfs: ['ro', 'rescue=nologreplay'],
};

/**
 * Options that let a volume and its copies, which have one UUID, be mounted on one node. xfs refuses the second otherwise, and
 * that may be the source as well as the copy, so every xfs volume has it; a new UUID would have to be written, which
 * readers can't. ext4 does not look, and btrfs gives copies a UUID of their own while they are mounted (Linux 6.7).
 */
export const besideCopies: Record<FileSystem, readonly string[]> = {
  ext4: [],
  xfs: ['nouuid'],
  btrfs: [],
};

/**
 * Before a writable mount. ext4: journal replay and what e2fsck calls safe repairs. xfs and btrfs replay when mounted and
 * are checked only when that fails (explainFailedMount).
 * @param fully even where the superblock says that it is clean.
 * @throws CORRUPT when a person has to decide; INTERNAL when the check itself failed.
 */
export async function checkBeforeMount(device: string, fsType: FileSystem, fully = false): Promise<void> {
  if (fsType !== 'ext4') return;
  const ran = await whileBusy(
    () => run('e2fsck', [...(fully ? ['-f'] : []), '-p', device], CHECK_MS),
    ({ exitCode }) => (exitCode & 8) !== 0,
  );
  // e2fsck(8): bits; 1 corrected, 2 corrected and the system should reboot (meant for a root file system),
  // 4 errors left, 8 operational error, 16 usage, 32 cancelled, 128 library error.
  if ((ran.exitCode & ~3) === 0) return;
  if ((ran.exitCode & 4) !== 0 && (ran.exitCode & ~7) === 0) {
    throw damaged(
      device,
      fsType,
      said(ran),
      `Publish the volume as raw block, look with "e2fsck -n", decide, and repair with "e2fsck".`,
    );
  }
  throw new HoldfastError('INTERNAL', `e2fsck on ${device} failed (${said(ran)}). Repeat the call.`);
}

/** After a failed mount: what a check that changes nothing says. Always gives an error to throw. */
export async function explainFailedMount(
  device: string,
  fsType: FileSystem,
  mountSaid: string,
  options: readonly string[],
): Promise<HoldfastError> {
  const [command, args, found] = (
    {
      ext4: ['e2fsck', ['-n', '-f', device], (code: number) => (code & 4) !== 0],
      xfs: ['xfs_repair', ['-n', device], (code: number) => code === 1],
      btrfs: ['btrfs', ['check', '--readonly', device], (code: number) => code !== 0],
    } as const
  )[fsType];
  const ran = await run(command, args, CHECK_MS);
  if (found(ran.exitCode)) {
    return damaged(
      device,
      fsType,
      `the mount failed (${mountSaid}), and "${command} ${args.slice(0, -1).join(' ')}" found damage (${said(ran)})`,
      'Publish the volume as raw block and repair it by hand.',
    );
  }
  if (options.length > 0) {
    return new HoldfastError(
      'INVALID_ARGUMENT',
      `${device} could not be mounted with the options ${options.join(',')} (${mountSaid}); a check found no damage. Take out what this kernel's ${fsType} does not know; its log names it.`,
    );
  }
  return new HoldfastError(
    'INTERNAL',
    `${device} could not be mounted (${mountSaid}); a check found no damage. See the kernel log, then repeat the call.`,
  );
}

const couldNotGrow = (device: string, fsType: FileSystem, what: string): HoldfastError =>
  new HoldfastError(
    'INTERNAL',
    `The ${fsType} file system on ${device} could not be grown (${what}). The volume itself has its new size; repeat the call.`,
  );

/**
 * Grows a mounted file system to its device's size. Repeating is fine.
 * @returns 'needs-unmount' when the kernel doesn't let this process grow it while it is mounted (ext4 without
 * CAP_SYS_RESOURCE).
 */
export async function grow(
  device: string,
  mountPoint: string,
  fsType: FileSystem,
): Promise<'grown' | 'needs-unmount'> {
  const [command, args] = (
    {
      ext4: ['resize2fs', [device]],
      xfs: ['xfs_growfs', ['-d', mountPoint]],
      btrfs: ['btrfs', ['filesystem', 'resize', 'max', mountPoint]],
    } as const
  )[fsType];
  const ran = await run(command, args, GROW_MS);
  if (ran.exitCode === 0) return 'grown';
  if (fsType === 'ext4' && /Permission denied to resize/.test(ran.stderr)) return 'needs-unmount';
  throw couldNotGrow(device, fsType, said(ran));
}

/** Grows an unmounted, freshly checked ext4 to its device's size. xfs and btrfs grow only when mounted. */
export async function growUnmounted(device: string): Promise<void> {
  const ran = await run('resize2fs', [device], GROW_MS);
  if (ran.exitCode !== 0) throw couldNotGrow(device, 'ext4', said(ran));
}
