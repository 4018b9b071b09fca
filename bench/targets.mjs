// The devices that are measured side by side: the raw loop disk, a Holdfast volume on such a disk, the same path without a
// volume (native/bench/bare_path.cc), and qemu-storage-daemon (qcow2, FUSE export, loop on top) on such a disk.
import { execFileSync, spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync, readdirSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { closing } from './closing.mjs';

export const sh = (command, ...args) => execFileSync(command, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }).trim();

/** A file of zeros that the disk has: on a sparse one, the file system below would allocate blocks while something is measured. */
export function writtenFile(path, bytes) {
  sh('dd', 'if=/dev/zero', `of=${path}`, 'bs=4M', `count=${bytes / (4 << 20)}`, 'oflag=direct', 'conv=fsync', 'status=none');
}

/**
 * Gives every free loop device the queue settings that the kernel gives a new one. They belong to its number, so it has
 * those of whoever had it before, and a raw disk would be measured with a scheduler or without by chance.
 */
export function renewFreeLoops() {
  const renewed = { scheduler: 'none', nr_requests: '128', rq_affinity: '1', nomerges: '0' };
  for (const name of readdirSync('/sys/block')) {
    if (!/^loop\d+$/.test(name) || existsSync(`/sys/block/${name}/loop/backing_file`)) continue;
    for (const [setting, value] of Object.entries(renewed)) writeFileSync(`/sys/block/${name}/queue/${setting}`, value);
  }
}

/** A loop device with direct I/O over the file, until the bench ends. */
function attachLoop(path) {
  renewFreeLoops();
  const device = sh('losetup', '--find', '--show', '--direct-io=on', '--sector-size', '4096', path);
  closing(() => sh('losetup', '-d', device));
  return device;
}

/** The same over a new sparse file. */
export function loopDisk(path, bytes) {
  closeSync(openSync(path, 'w'));
  truncateSync(path, bytes);
  return attachLoop(path);
}

/** A loop disk behind the engine's own path, without a map or a fence: what a volume could reach at most. */
export async function barePath(directory, bytes) {
  mkdirSync(directory, { recursive: true });
  const disk = loopDisk(join(directory, 'bare.disk'), bytes);
  const build = fileURLToPath(new URL('../native/build', import.meta.url));
  sh('cmake', '--build', build, '--target', 'holdfast-bare-path');
  const program = spawn(join(build, 'holdfast-bare-path'), [disk], { stdio: ['pipe', 'pipe', 'inherit'], detached: true });
  const ended = new Promise((r) => program.once('exit', r));
  closing(async () => {
    program.stdin.end();
    await ended;
  });
  const line = await Promise.race([new Promise((r) => createInterface(program.stdout).once('line', r)), ended]);
  if (typeof line !== 'string') throw new Error('holdfast-bare-path ended before it had a device');
  return line;
}

export function haveQsd() {
  try {
    return sh('qemu-storage-daemon', '--version').split('\n')[0];
  } catch {
    return undefined;
  }
}

/** qemu-storage-daemon as its manual sets up a fast qcow2 export: metadata preallocated, direct, native AIO. */
export async function qsdVolume(directory, bytes) {
  mkdirSync(directory, { recursive: true });
  const disk = loopDisk(join(directory, 'qsd.disk'), bytes + (64 << 20) + bytes / 512);
  sh('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', disk, String(bytes));
  const mountpoint = join(directory, 'qsd.export');
  closeSync(openSync(mountpoint, 'w'));
  const daemon = spawn(
    'qemu-storage-daemon',
    [
      '--blockdev', `driver=host_device,node-name=disk,filename=${disk},cache.direct=on,aio=native,discard=unmap`,
      '--blockdev', 'driver=qcow2,node-name=image,file=disk,discard=unmap',
      '--export', `type=fuse,id=export,node-name=image,mountpoint=${mountpoint},writable=on,growable=off`,
    ],
    { stdio: ['ignore', 'ignore', 'inherit'], detached: true },
  );
  const ended = new Promise((r) => daemon.once('exit', r));
  const mounted = () => sh('cat', '/proc/self/mountinfo').includes(mountpoint);
  closing(async () => {
    daemon.kill('SIGTERM');
    await ended;
    if (mounted()) sh('umount', mountpoint);
  });
  for (let i = 0; i < 100 && !mounted(); i++) await new Promise((r) => setTimeout(r, 100));
  if (!mounted()) throw new Error('qemu-storage-daemon did not export its file within 10 seconds');
  return attachLoop(mountpoint);
}
