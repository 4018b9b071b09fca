import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { call } from '@holdfast/common';
import { native } from '@holdfast/native';
import { compareFiles, writeFiles } from '../../src/harness/content.ts';
import { long, pause, withCluster } from './cluster.ts';

const rounds = long ? 20 : 5;

describe('the metadata service killed with -9 at random moments', () => {
  it(`repeated calls converge: ${rounds} lives of a volume, nothing lost, nothing left`, {
    timeout: 1_200_000,
  }, async () => {
    await withCluster({ nodes: 2, size: '4G' }, async (up, cluster) => {
      const stop = new AbortController();
      let kills = 0;
      const killer = async (): Promise<void> => {
        while (!stop.signal.aborted) {
          await pause(1000 + Math.random() * 3000);
          const [service] = up.processes({ role: 'metadata-service' });
          if (stop.signal.aborted || service === undefined) continue;
          process.kill(service.pid, 'SIGKILL');
          kills += 1;
        }
      };
      const killing = killer();
      try {
        for (let round = 0; round < rounds; round++) {
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
      expect(kills).toBeGreaterThan(rounds / 2);
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
