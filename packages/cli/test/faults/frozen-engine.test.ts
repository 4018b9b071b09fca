import { closeSync, constants, openSync, readSync, writeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { call } from '@holdfast/common';
import { pseudoRandom } from '../../src/harness/content.ts';
import { Writer } from '../../src/harness/writer-process.ts';
import { withCluster } from './cluster.ts';

const bytes = 64 << 20;

function direct<T>(device: string, flags: number, body: (file: number) => T): T {
  const file = openSync(device, flags | constants.O_DIRECT);
  try {
    return body(file);
  } finally {
    closeSync(file);
  }
}

/** O_DIRECT wants memory that begins at a page, which WebAssembly's does. */
function aligned(size: number): Buffer {
  return Buffer.from(new WebAssembly.Memory({ initial: Math.ceil(size / 65536) }).buffer, 0, size);
}

function fill(device: string, seed: number): void {
  direct(device, constants.O_WRONLY, (file) => {
    const data = aligned(bytes);
    pseudoRandom(seed, bytes).copy(data);
    for (let done = 0; done < bytes; done += 1 << 20) writeSync(file, data, done, 1 << 20, done);
  });
}

function read(device: string): Buffer {
  return direct(device, constants.O_RDONLY, (file) => {
    const data = aligned(bytes);
    for (let done = 0; done < bytes; done += 1 << 20) readSync(file, data, done, 1 << 20, done);
    return data;
  });
}

describe('an engine that freezes and thaws after its volume was taken over', () => {
  it('changes nothing that the new owner wrote, and answers EIO (lease-only)', {
    timeout: 180_000,
  }, async () => {
    await withCluster(
      { nodes: 2, size: '4G', fencing: 'lease-only', leaseMs: 3000, renewMs: 500 },
      async (up, cluster) => {
        const volume = await cluster.create('frozen', 256n << 20n);
        const old = await cluster.attach(volume, 1);
        fill(old.targetPath, 1);
        const [agent] = up.processes({ node: 1, role: 'agent' });
        if (agent === undefined) throw new Error('node 1 has no agent');
        // Writes are on their way at the moment it freezes, and wait in the kernel until it thaws.
        const writer = new Writer(old.targetPath, 3, bytes / 4096);
        await writer.untilAcknowledged(50, 30_000);
        process.kill(agent.pid, 'SIGSTOP');
        try {
          const started = performance.now();
          await cluster.unpublish(volume, 1);
          const fenceMs = performance.now() - started;
          expect(fenceMs, 'a lease has to run out first').toBeGreaterThan(2000);
          expect(fenceMs).toBeLessThan(30_000);

          const now = await cluster.attach(volume, 2);
          fill(now.targetPath, 2);
          expect(read(now.targetPath).equals(pseudoRandom(2, bytes))).toBe(true);

          process.kill(agent.pid, 'SIGCONT');
          await writer.end(20_000);
          expect(writer.ended).toContain('EIO');
          expect(() => read(old.targetPath)).toThrow('EIO');
          expect(() => fill(old.targetPath, 4)).toThrow('EIO');
          await sleep(2000);
          expect(read(now.targetPath).equals(pseudoRandom(2, bytes)), 'what the new owner wrote').toBe(true);

          // The old node lets go and comes back under its next generation by itself.
          await cluster.detach(old);
          const api = cluster.agent(1);
          const deadline = Date.now() + 30_000;
          for (;;) {
            const info = await call(api, api.GetAgentInfo, {}, { timeoutMs: 5000 });
            const [pool] = info.pools;
            if (pool?.lease === 'valid' && pool.generation === '2') break;
            if (Date.now() > deadline) throw new Error(`node 1 did not come back: ${JSON.stringify(pool)}`);
            await sleep(200);
          }
          await cluster.detach(now);
          await cluster.delete(volume);
          await cluster.untilEmpty(30_000);
        } finally {
          process.kill(agent.pid, 'SIGCONT');
        }
      },
    );
  });
});
