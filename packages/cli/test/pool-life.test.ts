/** A pool on a real disk that grows while it is written, is drained, and goes. */
import { execFileSync } from 'node:child_process';
import { truncateSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { call } from '@holdfast/common';
import { native } from '@holdfast/native';
import type { Pool__Output } from '@holdfast/proto';
import type { CsiCluster } from '../src/harness/csi.ts';
import { pause, withCluster } from './faults/cluster.ts';
import { fio } from './faults/fio.ts';

const pools = async (cluster: CsiCluster): Promise<Pool__Output[]> =>
  (await call(cluster.metadata, cluster.metadata.ListPools, {}, { timeoutMs: 5000 })).pools;

async function untilPools(
  cluster: CsiCluster,
  what: string,
  are: (pools: Pool__Output[]) => boolean,
): Promise<void> {
  const deadline = Date.now() + 30_000;
  while (!are(await pools(cluster))) {
    if (Date.now() > deadline) throw new Error(`${what} did not come about`);
    await pause(200);
  }
}

describe('a pool', () => {
  it('whose disk grows gives its room to volumes that are open and were waiting for it; drained and empty, it goes', {
    timeout: 180_000,
  }, async () => {
    await withCluster({ nodes: 2, size: '1G' }, async (up, cluster) => {
      const { device, image, poolUuid } = up.state.disk;
      const before = (await pools(cluster))[0]?.slab_count ?? 0;
      const volume = await cluster.create('larger-than-the-pool', 2n << 30n);
      const elsewhere = await cluster.create('elsewhere', 64n << 20n);
      const at = await cluster.attach(volume, 1);
      const other = await cluster.attach(elsewhere, 2);
      const writing = fio(
        '--name=fill',
        `--filename=${at.targetPath}`,
        '--rw=write',
        '--bs=1m',
        '--size=2G',
        '--iodepth=4',
        '--verify=crc32c',
        '--do_verify=1',
        '--verify_state_save=0',
      );
      // It stands still until there is room: a full pool holds writes before it fails them.
      await untilPools(cluster, 'a full pool', ([pool]) => Number(pool?.slabs_free) === 0);
      truncateSync(image, 4 * 2 ** 30);
      execFileSync('losetup', ['--set-capacity', device]);
      await untilPools(cluster, 'growth', ([pool]) => Number(pool?.slab_count) > 3 * Number(before));
      await writing.ended;

      await call(cluster.metadata, cluster.metadata.DrainPool, { request_id: 'drain', pool_uuid: poolUuid });
      await expect(cluster.create('too-late', 64n << 20n)).rejects.toThrow(/is being drained/);
      const remove = (): Promise<unknown> =>
        call(
          cluster.metadata,
          cluster.metadata.RemovePool,
          { request_id: String(Math.random()), pool_uuid: poolUuid },
          { timeoutMs: 30_000 },
        );
      await expect(remove()).rejects.toThrow(/still has 2 volumes/);
      for (const one of [at, other]) {
        await cluster.detach(one);
        await cluster.delete(one.volume);
      }
      await cluster.untilEmpty(60_000);
      const report = await native().checkPool(device);
      expect(report.findings.filter(({ severity }) => severity === 'error')).toEqual([]);
      await remove();
      expect(await pools(cluster)).toEqual([]);
    });
  });
});
