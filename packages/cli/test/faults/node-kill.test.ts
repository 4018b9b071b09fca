import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { long } from './cluster.ts';

const demo = fileURLToPath(new URL('../../dist/demo/main.js', import.meta.url));
const kills = long ? 20 : 2;

describe('a whole node killed with -9 while it writes and syncs', () => {
  it(`loses nothing that was synced, ${kills} times in a row`, { timeout: 1_200_000 }, async () => {
    const { stdout } = await promisify(execFile)(process.execPath, [demo, '--repeat-kill', String(kills)], {
      maxBuffer: 16 << 20,
    });
    expect(stdout).toContain(`survived ${kills} killed node`);
  });
});
