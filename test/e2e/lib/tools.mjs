// Where the cached tools are (tools/e2e-tools.sh fills the cache).
import { existsSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

export const top = resolve(dirname(fileURLToPath(import.meta.url)), '../../..');
export const cache = process.env.HOLDFAST_E2E_CACHE ?? join(homedir(), '.cache/holdfast-e2e');

/** A cached tool's path; throws with the command that makes it. */
export function tool(name) {
  const path = join(cache, 'bin', name);
  if (!existsSync(path)) throw new Error(`${path} is missing. Run: make e2e-tools`);
  return path;
}
