/** What a workload may ask of a volume: access modes with one writer or none, file systems, and sane mount options. */
import type { Csi } from '@holdfast/proto';
import { HoldfastError } from '../errors.ts';

export const fileSystems = ['ext4', 'xfs', 'btrfs'] as const;
export type FileSystem = (typeof fileSystems)[number];
export const DEFAULT_FILE_SYSTEM: FileSystem = 'ext4';

export type AccessModeName =
  | 'SINGLE_NODE_WRITER'
  | 'SINGLE_NODE_READER_ONLY'
  | 'MULTI_NODE_READER_ONLY'
  | 'SINGLE_NODE_SINGLE_WRITER'
  | 'SINGLE_NODE_MULTI_WRITER';

export interface Capability {
  readonly accessType: 'block' | 'mount';
  readonly mode: AccessModeName;
  /** The file system that was asked for by name; undefined: whatever the volume was made for. */
  readonly fsType: FileSystem | undefined;
  readonly mountFlags: readonly string[];
}

const oneWriter =
  'Two nodes that write one block device destroy its file system, so a Holdfast volume has one writing node. ' +
  'Use ReadWriteOnce or ReadWriteOncePod; for ReadWriteMany put a file server on top of a volume.';

/** Nobody writes under these, whatever else the request says. */
export const isReaderMode = (mode: AccessModeName): boolean =>
  mode === 'SINGLE_NODE_READER_ONLY' || mode === 'MULTI_NODE_READER_ONLY';

const refusedModes: Record<string, string> = {
  MULTI_NODE_SINGLE_WRITER: `Access mode MULTI_NODE_SINGLE_WRITER is not offered. ${oneWriter}`,
  MULTI_NODE_MULTI_WRITER: `Access mode MULTI_NODE_MULTI_WRITER (ReadWriteMany) is not offered. ${oneWriter}`,
};

export function fileSystemNamed(name: string, where: string): FileSystem {
  const found = fileSystems.find((known) => known === name);
  if (found === undefined) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `${where} asks for the file system "${name}". Known: ${fileSystems.join(', ')}.`,
    );
  }
  return found;
}

/**
 * @throws INVALID_ARGUMENT naming what is missing, unknown or not offered. With `unsupportedCode` FAILED_PRECONDITION a mode that
 * is well-formed but not offered gets that code instead (the node calls' "exceeds capabilities").
 */
export function readCapability(
  capability: Csi.VolumeCapability__Output | null | undefined,
  unsupportedCode: 'INVALID_ARGUMENT' | 'FAILED_PRECONDITION' = 'INVALID_ARGUMENT',
): Capability {
  if (capability === null || capability === undefined) {
    throw new HoldfastError('INVALID_ARGUMENT', 'volume_capability is missing from the request. Set it.');
  }
  const accessType = capability.access_type;
  if (accessType === undefined) {
    throw new HoldfastError('INVALID_ARGUMENT', 'volume_capability has no access type. Set block or mount.');
  }
  const mode = capability.access_mode?.mode ?? 'UNKNOWN';
  if (mode === 'UNKNOWN') {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      'volume_capability has no access mode. Set access_mode.mode.',
    );
  }
  const refused = refusedModes[mode];
  if (refused !== undefined) throw new HoldfastError(unsupportedCode, refused);
  if (
    mode !== 'SINGLE_NODE_WRITER' &&
    mode !== 'SINGLE_NODE_READER_ONLY' &&
    mode !== 'MULTI_NODE_READER_ONLY' &&
    mode !== 'SINGLE_NODE_SINGLE_WRITER' &&
    mode !== 'SINGLE_NODE_MULTI_WRITER'
  ) {
    throw new HoldfastError('INVALID_ARGUMENT', `Access mode ${mode} is not one that this driver knows.`);
  }
  if (accessType === 'block') {
    return { accessType, mode, fsType: undefined, mountFlags: [] };
  }
  const mount = capability.mount;
  const fsType = mount?.fs_type
    ? fileSystemNamed(mount.fs_type, 'volume_capability.mount.fs_type')
    : undefined;
  const mountFlags = mount?.mount_flags ?? [];
  checkMountFlags(mountFlags);
  if (mount?.volume_mount_group) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      'volume_mount_group is not offered: ext4, xfs and btrfs have no mount option for it. Leave it to the fsGroup policy.',
    );
  }
  return { accessType, mode, fsType, mountFlags };
}

/** Pairs that say the opposite of each other; the kernel would silently take the last. */
const opposites: readonly (readonly [string, string])[] = [
  ['ro', 'rw'],
  ['atime', 'noatime'],
  ['diratime', 'nodiratime'],
  ['relatime', 'norelatime'],
  ['strictatime', 'nostrictatime'],
  ['noatime', 'strictatime'],
  ['noatime', 'relatime'],
  ['exec', 'noexec'],
  ['suid', 'nosuid'],
  ['dev', 'nodev'],
  ['sync', 'async'],
  ['discard', 'nodiscard'],
  ['barrier', 'nobarrier'],
  ['lazytime', 'nolazytime'],
];

/** What would take the mount out of our hands, or the data out of the journal's. */
const refusedFlags: Record<string, string> = {
  bind: 'publishing makes the bind mounts',
  rbind: 'publishing makes the bind mounts',
  move: 'publishing makes the bind mounts',
  remount: 'mounts are made, not changed',
  loop: 'the device is there already',
  offset: 'the device is there already',
  sizelimit: 'the device is there already',
  nobarrier: 'without barriers flushed data is lost in a power cut',
  device: 'a volume is one device',
  journal_path: 'a volume is one device',
  journal_dev: 'a volume is one device',
  logdev: 'a volume is one device',
  rtdev: 'a volume is one device',
  degraded: 'a volume is one device',
  nouuid: 'it is set where an xfs volume is mounted, so that clones can stand beside each other',
  noload: 'it is set where a volume is published read-only',
  norecovery: 'it is set where a volume is published read-only',
  'errors=continue': 'errors that are not reported become lost data',
};

/** An SELinux label has commas, so it comes in quotes: what the kubelet passes where the CSIDriver says seLinuxMount. */
const selinuxOption = /^(context|fscontext|defcontext|rootcontext)="[A-Za-z0-9_.:,-]+"$/;

/** At commas, but not at those in quotes. */
function optionsIn(flag: string): string[] {
  const options = [''];
  let quoted = false;
  for (const character of flag) {
    if (character === '"') quoted = !quoted;
    if (character === ',' && !quoted) options.push('');
    else options[options.length - 1] += character;
  }
  return options;
}

/** @throws INVALID_ARGUMENT for malformed, conflicting or refused options. */
export function checkMountFlags(flags: readonly string[]): void {
  const given = flags.flatMap(optionsIn);
  for (const flag of given) {
    if (!/^[A-Za-z0-9_.:=@%+/-]+$/.test(flag) && !selinuxOption.test(flag)) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Mount option "${flag}" is empty or has characters that no mount option has. Correct mountOptions in the StorageClass.`,
      );
    }
    const why = refusedFlags[flag] ?? refusedFlags[flag.replace(/=.*$/, '')];
    if (why !== undefined || flag === 'barrier=0') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Mount option "${flag}" is not accepted: ${why ?? refusedFlags['nobarrier']}. Take it out of mountOptions in the StorageClass.`,
      );
    }
  }
  const values = new Map<string, string>();
  for (const flag of given) {
    const [name = '', value] = flag.split('=', 2);
    const before = values.get(name);
    if (value !== undefined && before !== undefined && before !== value) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Mount options "${name}=${before}" and "${name}=${value}" contradict each other. Keep one.`,
      );
    }
    if (value !== undefined) values.set(name, value);
  }
  for (const [one, other] of opposites) {
    if (given.includes(one) && given.includes(other)) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Mount options "${one}" and "${other}" contradict each other. Keep one.`,
      );
    }
  }
}

/** Every option once, in order. */
export const splitMountFlags = (flags: readonly string[]): string[] => [...new Set(flags.flatMap(optionsIn))];
