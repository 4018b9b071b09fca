import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { call } from '@holdfast/common';
import { waitFor } from '@holdfast/testing';
import { native } from '@holdfast/native';
import { compareFiles, writeFiles } from '../../src/harness/content.ts';
import { long, pause, withCluster } from './cluster.ts';

const rounds = long ? 20 : 5;

describe('the metadata service killed with -9 at random moments', () => {
  it(`repeated calls converge: ${rounds} kills, a volume's life at a time, nothing lost, nothing left`, {
    timeout: 1_200_000,
  }, async () => {
    await withCluster({ nodes: 2, size: '4G' }, async (up, cluster) => {
      const stop = new AbortController();
      let kills = 0;
      const killer = async (): Promise<void> => {
        while (!stop.signal.aborted) {
          await pause(500 + Math.random() * 2000);
          const [service] = up.processes({ role: 'metadata-service' });
          if (stop.signal.aborted || service === undefined) continue;
          process.kill(service.pid, 'SIGKILL');
          kills += 1;
          // One in four dies again while it starts; the others live for a while, however slow the machine is.
          if (Math.random() < 0.25) continue;
          await waitFor(
            'the service to answer again',
            async () =>
              stop.signal.aborted ||
              (await call(cluster.metadata, cluster.metadata.ListPools, {}, { timeoutMs: 5000 })),
            { timeoutMs: 120_000 },
          );
        }
      };
      const killing = killer();
      killing.catch(() => {}); // told below
      try {
        const enough = (round: number): boolean => round >= rounds && kills >= rounds;
        for (let round = 0; !enough(round); round++) {
          const volume = await cluster.create(`round-${round}`, 256n << 20n, 'ext4');
          const again = await cluster.create(`round-${round}`, 256n << 20n, 'ext4');
          expect(again.id).toBe(volume.id);
          const first = await cluster.attach(volume, 1 + (round % 2));
          const sums = writeFiles(join(first.targetPath, 'files'), 20, round * 100);
          await cluster.detach(first);
          const second = await cluster.attach(volume, 2 - (round % 2));
          expect(compareFiles(join(second.targetPath, 'files'), sums)).toEqual([]);
          await cluster.detach(second);
          await cluster.delete(volume);
          await cluster.delete(volume);
        }
      } finally {
        stop.abort();
        await killing;
      }
      await pause(1000);
      await cluster.untilEmpty(60_000);
      const { volumes } = await call(cluster.metadata, cluster.metadata.ListVolumes, {
        include_deleting: true,
      });
      expect(volumes.map((v) => v.name)).toEqual([]);
      const report = await native().checkPool(up.state.disk.device);
      expect(report.findings.filter((f) => f.severity === 'error')).toEqual([]);
      expect(report.clean).toBe(true);
    });
  });
});
