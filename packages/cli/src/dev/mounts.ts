/** Mounts and loop devices of this machine, read from the kernel, and how to take them away. */
import { execFile } from 'node:child_process';
import { readdirSync, readFileSync, realpathSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';

const run = promisify(execFile);

export interface Mount {
  mountPoint: string;
  /** Within its file system: for a bind mount of a device node in devtmpfs, "/loop5". */
  root: string;
  fsType: string;
  source: string;
}

const unescape = (text: string): string =>
  text.replace(/\\(\d{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)));

/** In the order they were made. */
export function mounts(): Mount[] {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => {
      const [before = '', after = ''] = line.split(' - ');
      const fields = before.split(' ');
      const [fsType = '', source = ''] = after.split(' ');
      return {
        mountPoint: unescape(fields[4] ?? ''),
        root: unescape(fields[3] ?? ''),
        fsType,
        source: unescape(source),
      };
    });
}

/** Whether a mount shows the device: a file system on it, or a bind mount of its node. */
export function mountShows(mount: Mount, device: string): boolean {
  if (mount.source === device) return true;
  return mount.fsType === 'devtmpfs' && `/dev${mount.root}` === device;
}

export async function unmount(mountPoint: string): Promise<boolean> {
  for (const args of [[mountPoint], ['-l', mountPoint]]) {
    try {
      await run('umount', args, { timeout: 20_000 });
      return true;
    } catch {
      // busy: the lazy way takes it out of sight and ends it with its last user
    }
  }
  return false;
}

/** Attached loop devices and the file behind each, "" where the kernel does not name one. */
export function loopDevices(): Map<string, string> {
  const found = new Map<string, string>();
  for (const name of readdirSync('/sys/block').filter((n) => /^loop\d+$/.test(n))) {
    try {
      const file = readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8').trim();
      found.set(`/dev/${name}`, file.replace(/ \(deleted\)$/, ''));
    } catch {
      // not attached
    }
  }
  return found;
}

/** The loop device over a file, if there is one. */
export function loopOver(file: string): string | undefined {
  let real: string;
  try {
    real = realpathSync(file);
  } catch {
    real = file;
  }
  for (const [device, backing] of loopDevices()) if (backing === real) return device;
  return undefined;
}

/** With direct I/O, as shared disks are used. */
export async function attachLoop(file: string): Promise<string> {
  const { stdout } = await run('losetup', ['--find', '--show', '--direct-io=on', file]);
  return stdout.trim();
}

/**
 * True when the device is not attached any more. While somebody has it open the kernel only marks it to go away: a killed
 * engine's last writes, for one, hold it for seconds.
 */
export async function detachLoop(device: string, timeoutMs = 20_000): Promise<boolean> {
  try {
    await run('losetup', ['--detach', device], { timeout: timeoutMs });
  } catch {
    // not attached, or busy: looked at below
  }
  const deadline = Date.now() + timeoutMs;
  while (loopDevices().has(device)) {
    if (Date.now() > deadline) return false;
    await sleep(50);
  }
  return true;
}

/** True when reading the device fails: whoever served it is gone. A device that hangs is not dead. */
export async function isDead(device: string): Promise<boolean> {
  try {
    await run('dd', [`if=${device}`, 'of=/dev/null', 'bs=4096', 'count=1', 'iflag=direct'], {
      timeout: 3000,
    });
    return false;
  } catch (error) {
    return (error as { killed?: boolean }).killed !== true;
  }
}
