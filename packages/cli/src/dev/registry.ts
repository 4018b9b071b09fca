/**
 * Which development clusters run on this machine, so that commands in another terminal find theirs without being told.
 * One small file for each under /run/holdfast/dev; a file whose `dev up` is gone counts for nothing.
 */
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { isAlive, type ProcessIdentity } from './processes.ts';

export interface DevClusterEntry extends ProcessIdentity {
  dir: string;
  metadata: string;
}

function registryDir(): string {
  return process.env['HOLDFAST_DEV_REGISTRY'] ?? '/run/holdfast/dev';
}

function fileFor(dir: string): string {
  return join(registryDir(), `${createHash('sha256').update(dir).digest('hex').slice(0, 16)}.json`);
}

export function registerDevCluster(entry: DevClusterEntry): void {
  mkdirSync(registryDir(), { recursive: true, mode: 0o755 });
  writeFileSync(fileFor(entry.dir), JSON.stringify(entry));
}

export function forgetDevCluster(dir: string): void {
  rmSync(fileFor(dir), { force: true });
}

export function listDevClusters(): DevClusterEntry[] {
  let names: string[];
  try {
    names = readdirSync(registryDir());
  } catch {
    return [];
  }
  const found: DevClusterEntry[] = [];
  for (const name of names.sort()) {
    try {
      const entry = JSON.parse(readFileSync(join(registryDir(), name), 'utf8')) as DevClusterEntry;
      if (isAlive(entry)) found.push(entry);
    } catch {
      // being written or removed at this moment
    }
  }
  return found;
}
