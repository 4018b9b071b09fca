/**
 * Finds pools on the devices this node was told to look at. A pool is known by the UUID in its superblock, never by the
 * path: paths change with every boot. A device whose own identity differs from the one recorded at format is a copy (an
 * array clone, a dd): it is refused, because two disks with one pool would mean two truths.
 */
import { readdirSync, realpathSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Logger } from '@holdfast/common';
import type { Authority, Pool, PoolInfo, PoolTools } from '@holdfast/native';
import { messageOf, nativeCode } from './convert.ts';

export interface FoundPool {
  devicePath: string;
  info: PoolInfo;
  authority: Authority;
  /** Of the device, now, and what the pool would have if it grew into that. */
  deviceBytes: bigint;
  slabsPossible: bigint;
  /** Of a pool that is open here: why its device can not be used as it is now. Empty: it can. */
  problem: string;
}

/** How an open pool looks at its own device: the engine has it open, and has to use what is found. */
export type LookAt = (uuid: string) => Pool | undefined;

/** Expands `*` and `?` in the last part of each pattern; a pattern without them stands for itself. */
export function expandDevices(patterns: readonly string[]): string[] {
  const paths = new Set<string>();
  for (const pattern of patterns) {
    const base = pattern.slice(pattern.lastIndexOf('/') + 1);
    if (!/[*?]/.test(base)) {
      paths.add(pattern);
      continue;
    }
    const matcher = new RegExp(
      `^${base
        .replace(/[.+^${}()|[\]\\]/g, '\\$&')
        .replaceAll('*', '.*')
        .replaceAll('?', '.')}$`,
    );
    const directory = dirname(pattern);
    let names: string[];
    try {
      names = readdirSync(directory);
    } catch {
      continue; // the directory may come later (udev)
    }
    for (const name of names.sort()) if (matcher.test(name)) paths.add(join(directory, name));
  }
  return [...paths];
}

export class DeviceScanner {
  readonly #patterns: readonly string[];
  readonly #tools: PoolTools;
  readonly #logger: Logger;
  /** One complaint for each device and reason, not one for each scan. */
  readonly #complained = new Map<string, string>();

  readonly #open: LookAt;

  constructor(patterns: readonly string[], tools: PoolTools, logger: Logger, open: LookAt) {
    this.#open = open;
    this.#patterns = patterns;
    this.#tools = tools;
    this.#logger = logger;
  }

  #complain(path: string, message: string): void {
    if (this.#complained.get(path) === message) return;
    this.#complained.set(path, message);
    this.#logger.warn({ device: path }, message);
  }

  /** `known`: pools that are open here. Only who owns them is read again, not the whole device. */
  async scan(known: ReadonlyMap<string, FoundPool>): Promise<FoundPool[]> {
    const found = new Map<string, FoundPool>();
    const byPath = new Map([...known.values()].map((pool) => [pool.devicePath, pool]));
    const devices = new Set<string>();
    for (const path of expandDevices(this.#patterns)) {
      let real: string;
      try {
        real = realpathSync(path);
      } catch {
        this.#complain(path, `${path} does not exist (yet); it is looked for again.`);
        continue;
      }
      if (devices.has(real)) continue;
      devices.add(real);
      const open = byPath.get(path);
      const pool = open === undefined ? await this.#inspect(path) : await this.#refresh(open);
      if (pool === undefined) continue;
      const other = found.get(pool.info.uuid);
      if (other === undefined) {
        found.set(pool.info.uuid, pool);
      } else if (other.info.wwid !== pool.info.wwid) {
        this.#complain(
          path,
          `${path} and ${other.devicePath} both say that they are pool ${pool.info.uuid}, but they are different devices; ${path} is not used. Detach the copy.`,
        );
      }
    }
    return [...found.values()];
  }

  async #refresh(pool: FoundPool): Promise<FoundPool | undefined> {
    try {
      return {
        ...pool,
        ...(await this.#look(pool)),
        authority: await this.#tools.readAuthority(pool.devicePath),
      };
    } catch (error) {
      this.#complain(pool.devicePath, `${pool.devicePath} cannot be read: ${messageOf(error)}`);
      return undefined;
    }
  }

  /** A device that has grown, or that another node has made more slabs of, is used by the engine from here on. */
  async #look(pool: FoundPool): Promise<Partial<FoundPool>> {
    const open = this.#open(pool.info.uuid);
    if (open === undefined) return {};
    try {
      const { info, deviceBytes, slabsPossible } = await open.look();
      if (info.slabCount > pool.info.slabCount) {
        this.#logger.info(
          { pool: info.uuid, device: pool.devicePath },
          `The pool has grown from ${pool.info.slabCount} to ${info.slabCount} slabs`,
        );
      }
      return { info, deviceBytes, slabsPossible, problem: '' };
    } catch (error) {
      if (nativeCode(error) !== 'HF_TOO_SMALL') throw error;
      this.#complain(pool.devicePath, messageOf(error));
      return { problem: messageOf(error) };
    }
  }

  async #inspect(path: string): Promise<FoundPool | undefined> {
    try {
      const device = await this.#tools.inspectDevice(path);
      if (device.kind !== 'pool' || device.pool === undefined) return undefined;
      if (device.wwid !== device.pool.wwid) {
        this.#complain(
          path,
          `${path} is a copy of pool ${device.pool.uuid}: the pool was formatted on ${device.pool.wwid}, this device is ${device.wwid}. It is not used.`,
        );
        return undefined;
      }
      for (const warning of device.pool.warnings) this.#complain(path, warning);
      const authority = await this.#tools.readAuthority(path);
      return {
        devicePath: path,
        info: device.pool,
        authority,
        deviceBytes: device.sizeBytes,
        // Not a host yet: what it would gain is worked out by those that are.
        slabsPossible: device.pool.slabCount,
        problem: '',
      };
    } catch (error) {
      this.#complain(path, `${path} cannot be used: ${messageOf(error)}`);
      return undefined;
    }
  }
}
