/** Finding pools on this machine's block devices, for commands that read a pool without a service. */
import { readdirSync, readFileSync } from 'node:fs';
import { HoldfastError } from '@holdfast/common';
import { native, type PoolInfo } from '@holdfast/native';
import { loopDevices } from './dev/mounts.ts';

export interface LocalPool {
  devicePath: string;
  info: PoolInfo;
}

const readTimeoutMs = 5000;

/** Block devices that have a size; a volume of ours is a loop device without a file behind it and is passed over. */
export function blockDevices(): string[] {
  const loops = loopDevices();
  return readdirSync('/sys/block')
    .filter((name) => !/^(ram|zram|sr|fd)\d+$/.test(name))
    .filter((name) => {
      try {
        return readFileSync(`/sys/block/${name}/size`, 'utf8').trim() !== '0';
      } catch {
        return false;
      }
    })
    .map((name) => `/dev/${name.replaceAll('!', '/')}`)
    .filter((path) => !path.startsWith('/dev/loop') || (loops.get(path)?.length ?? 0) > 1);
}

/** Every pool that this machine sees. Devices that cannot be read, or hang, are passed over. */
export async function localPools(): Promise<LocalPool[]> {
  const found = await Promise.all(
    blockDevices().map(async (devicePath): Promise<LocalPool | undefined> => {
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise<undefined>((resolve) => {
        timer = setTimeout(() => resolve(undefined), readTimeoutMs);
      });
      const reading = native()
        .readPool(devicePath)
        .then((info) => ({ devicePath, info }))
        .catch(() => undefined);
      const pool = await Promise.race([reading, late]);
      clearTimeout(timer);
      return pool;
    }),
  );
  return found.filter((pool) => pool !== undefined);
}

/** A device path or image as it is; otherwise the device that holds the pool of this name or UUID. */
export async function findPoolDevice(word: string): Promise<string> {
  if (word.includes('/')) return word;
  const pools = (await localPools()).filter((pool) => pool.info.name === word || pool.info.uuid === word);
  const [first] = pools;
  if (first === undefined) {
    throw new HoldfastError(
      'NOT_FOUND',
      `No device here holds a pool "${word}". Give the device's path, or run this on a node that sees the disk.`,
    );
  }
  const others = pools.filter((pool) => pool.info.uuid !== first.info.uuid);
  if (others.length > 0) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `"${word}" names the pools on ${pools.map((p) => `${p.devicePath} (${p.info.uuid})`).join(' and ')}. Give the UUID or the path.`,
    );
  }
  return first.devicePath;
}
