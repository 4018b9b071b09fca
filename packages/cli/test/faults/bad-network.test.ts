import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { native } from '@holdfast/native';
import { compareFiles, writeFiles } from '../../src/harness/content.ts';
import { CsiCluster } from '../../src/harness/csi.ts';
import { DevUp } from '../../src/harness/dev-process.ts';
import { readState } from '../../src/dev/state.ts';
import { long } from './cluster.ts';
import { badNetwork } from './proxy.ts';

const rounds = long ? 20 : 5;

describe('messages between agents and the metadata service that come late, twice, or lose their answer', () => {
  it(`change nothing: ${rounds} lives of a volume with fences between, nothing lost, nothing left`, {
    timeout: 600_000,
  }, async () => {
    const dir = mkdtempSync(join(tmpdir(), 'holdfast-fault-'));
    const network = await badNetwork(() => readState(dir)?.metadata ?? '127.0.0.1:1', 60);
    const up = await DevUp.start({ dir, nodes: 3, size: '4G', agentMetadata: network.server.address });
    const cluster = new CsiCluster(up.state);
    try {
      for (let round = 0; round < rounds; round++) {
        const volume = await cluster.create(`round-${round}`, 256n << 20n, 'ext4');
        const node = 1 + (round % 3);
        const next = 1 + ((round + 1) % 3);
        const first = await cluster.attach(volume, node);
        const sums = writeFiles(join(first.targetPath, 'files'), 30, round * 100);
        if (round % 2 === 0) {
          await cluster.detach(first);
        } else {
          for (const { pid } of up.processes({ node })) process.kill(pid, 'SIGKILL');
          await cluster.unpublish(volume, node);
        }
        const second = await cluster.attach(volume, next);
        expect(compareFiles(join(second.targetPath, 'files'), sums)).toEqual([]);
        await cluster.detach(second);
        await cluster.delete(volume);
        if (round % 2 === 1) await up.startNode(node);
      }
      await cluster.untilEmpty(60_000);
      const report = await native().checkPool(up.state.disk.device);
      expect(report.findings.filter((f) => f.severity === 'error')).toEqual([]);
      expect(network.counts.repeatedOrders).toBeGreaterThan(0);
      expect(network.counts.repeatedCalls).toBeGreaterThan(0);
      expect(network.counts.lostAnswers).toBeGreaterThan(0);
    } finally {
      cluster.close();
      expect(await up.close()).toEqual([]);
      await network.server.close(0);
    }
    rmSync(dir, { recursive: true, force: true });
  });
});
