import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { long, pause, withCluster } from './cluster.ts';

const kills = long ? 20 : 3;

describe('an agent killed with -9 under a mounted volume', () => {
  it(`is a pause: ${kills} kills under fio verify give no I/O error and no mismatch`, {
    timeout: 600_000,
  }, async () => {
    await withCluster({ nodes: 1, size: '4G' }, async (up, cluster) => {
      const volume = await cluster.create('fio', 1n << 30n, 'ext4');
      const at = await cluster.attach(volume, 1);
      const fio = spawn(
        'fio',
        [
          '--name=verify',
          `--filename=${join(at.targetPath, 'data')}`,
          '--size=256M',
          '--rw=randwrite',
          '--bsrange=4k-128k',
          '--ioengine=libaio',
          '--direct=1',
          '--iodepth=16',
          '--fsync=64',
          '--verify=crc32c',
          '--verify_fatal=1',
          '--verify_state_save=0',
          '--do_verify=1',
          '--verify_backlog=512',
          '--time_based=1',
          `--runtime=${kills * 2 + 6}`,
          '--output-format=terse',
        ],
        { stdio: ['ignore', 'pipe', 'pipe'] },
      );
      let output = '';
      fio.stdout.on('data', (data: Buffer) => (output += data.toString()));
      fio.stderr.on('data', (data: Buffer) => (output += data.toString()));
      const ended = new Promise<number | null>((resolve) => fio.once('exit', (code) => resolve(code)));
      await pause(1500);
      const seen = new Set<number>();
      for (let kill = 0; kill < kills; kill++) {
        const [agent] = up.processes({ node: 1, role: 'agent' });
        expect(agent, `agent before kill ${kill + 1}`).toBeDefined();
        if (agent === undefined) return;
        expect(seen.has(agent.pid)).toBe(false);
        seen.add(agent.pid);
        process.kill(agent.pid, 'SIGKILL');
        // Long enough for the next one to have adopted, most of the time; a kill during adoption counts too.
        await pause(1200 + Math.random() * 1200);
        while (up.processes({ node: 1, role: 'agent' }).every((p) => seen.has(p.pid))) await pause(50);
      }
      const code = await ended;
      expect(output, 'fio says').not.toMatch(/error|verify:|bad header|Input\/output/i);
      expect(code).toBe(0);
      expect(seen.size).toBe(kills);
      await cluster.detach(at);
      await cluster.delete(volume);
      await cluster.untilEmpty(30_000);
    });
  });
});
