import { createHash } from 'node:crypto';
import { closeSync, constants, openSync, readSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { call } from '@holdfast/common';
import { native } from '@holdfast/native';
import { repeated, type CsiCluster, type CsiSnapshot, type CsiVolume } from '../../src/harness/csi.ts';
import { long, pause, withCluster } from './cluster.ts';
import { fio, iops } from './fio.ts';

const snapshots = long ? 1000 : 40;
const bytes = long ? 2n << 30n : 256n << 20n;
const kept = 5;
/** While snapshots come faster than layers are merged, each that was written keeps some slabs. The file is sparse. */
const poolSize = long ? '64G' : '8G';
const chunk = 65_536;
/** Nothing was decided about the volume for so long, and the service looks every two seconds, or rarer where it found nothing. */
const stillMs = long ? 60_000 : 30_000;
const most = 1.3;

/** What the device holds, and how many of its chunks have any data. */
function look(device: string): { sum: string; liveBytes: number } {
  const file = openSync(device, constants.O_RDONLY | constants.O_DIRECT);
  const hash = createHash('sha256');
  // O_DIRECT wants memory that begins at a page, which WebAssembly's does.
  const data = Buffer.from(new WebAssembly.Memory({ initial: 16 }).buffer, 0, 16 * chunk);
  const nothing = Buffer.alloc(chunk);
  let live = 0;
  try {
    for (let at = 0; at < Number(bytes); at += data.length) {
      expect(readSync(file, data, 0, data.length, at)).toBe(data.length);
      hash.update(data);
      for (let from = 0; from < data.length; from += chunk) {
        if (!data.subarray(from, from + chunk).equals(nothing)) live += 1;
      }
    }
  } finally {
    closeSync(file);
  }
  return { sum: hash.digest('hex'), liveBytes: live * chunk };
}

const allocated = async (cluster: CsiCluster, volume: CsiVolume): Promise<number> => {
  const found = await repeated('GetVolume', 60_000, () =>
    call(cluster.metadata, cluster.metadata.GetVolume, { uuid: volume.uuid }),
  );
  return Number(found.own_bytes) + Number(found.shared_bytes);
};

/** Until nothing is decided about the volume any more. Returns the events that there were, counted. */
async function untilStill(
  cluster: CsiCluster,
  volume: CsiVolume,
  timeoutMs: number,
): Promise<Map<string, number>> {
  const counts = new Map<string, number>();
  const end = Date.now() + timeoutMs;
  let after = '0';
  let size = await allocated(cluster, volume);
  for (let since = Date.now(); Date.now() - since < stillMs; ) {
    if (Date.now() > end) throw new Error(`still busy after ${timeoutMs / 1000} s, with ${size} bytes`);
    await pause(500);
    // All of them: strips and wipes are about layers, not about a volume.
    const from = after;
    const { records } = await repeated('ListAudit', 60_000, () =>
      call(cluster.metadata, cluster.metadata.ListAudit, { after_sequence: from, max_entries: 1000 }),
    );
    for (const { event } of records) counts.set(event, (counts.get(event) ?? 0) + 1);
    const now = await allocated(cluster, volume);
    if (records.length > 0 || now !== size) since = Date.now();
    after = records.at(-1)?.sequence ?? after;
    size = now;
  }
  return counts;
}

describe('compaction', () => {
  it(`after ${snapshots} snapshots taken and removed under random writes, the pool holds at most ${most} times the live data`, {
    timeout: 2_400_000,
  }, async () => {
    await withCluster({ nodes: 1, size: poolSize, reclaimSeconds: 2 }, async (up, cluster) => {
      const volume = await cluster.create('snapped', bytes);
      const at = await cluster.attach(volume, 1);
      const fill = (device: string): Promise<string> =>
        fio('--name=fill', `--filename=${device}`, '--rw=write', '--bs=1m', '--iodepth=4', `--size=${bytes}`)
          .ended;
      await fill(at.targetPath);
      const writing = fio(
        '--name=random',
        `--filename=${at.targetPath}`,
        '--rw=randwrite',
        '--bs=4k',
        '--iodepth=8',
        '--rate_iops=2000',
        '--norandommap=1',
        '--time_based=1',
        '--runtime=7200',
      );
      const taken: CsiSnapshot[] = [];
      const began = Date.now();
      for (let number = 1; number <= snapshots; number++) {
        taken.push(await cluster.snapshot(volume, `snap-${number}`));
        while (taken.length > kept) {
          const [gone] = taken.splice(Math.floor(Math.random() * taken.length), 1);
          if (gone !== undefined) await cluster.deleteSnapshot(gone);
        }
        await pause(50);
      }
      writing.kill();
      await writing.ended;
      const tookSeconds = Math.round((Date.now() - began) / 1000);
      const before = look(at.targetPath);
      for (const snapshot of taken) await cluster.deleteSnapshot(snapshot);
      const full = await allocated(cluster, volume);
      const idleFrom = Date.now();
      const counts = await untilStill(cluster, volume, long ? 1_200_000 : 300_000);
      const idleSeconds = Math.round((Date.now() - idleFrom - stillMs) / 1000);
      const left = await allocated(cluster, volume);
      expect(look(at.targetPath)).toEqual(before);

      const fresh = await cluster.create('fresh', bytes);
      const freshAt = await cluster.attach(fresh, 1);
      await fill(freshAt.targetPath);
      const ratios: string[] = [];
      for (const rw of ['randread', 'randwrite'] as const) {
        const measured = { snapped: 0, fresh: 0 };
        for (let turn = 0; turn < 3; turn++) {
          measured.fresh += await iops(freshAt.targetPath, rw, long ? 10 : 2);
          measured.snapped += await iops(at.targetPath, rw, long ? 10 : 2);
        }
        ratios.push(`${rw} ${(measured.snapped / measured.fresh).toFixed(2)} of a fresh volume's`);
      }
      const mib = (size: number): string => `${Math.round(size / (1 << 20))} MiB`;
      console.log(
        `${snapshots} snapshots in ${tookSeconds} s; ${mib(full)} when the last was deleted, ${mib(left)} after ${idleSeconds} s, ` +
          `for ${mib(before.liveBytes)} of live data (${(left / before.liveBytes).toFixed(2)}); ${ratios.join(', ')}; ` +
          ['compact', 'strip', 'unchained'].map((event) => `${counts.get(event) ?? 0} ${event}`).join(', '),
      );
      expect(left / before.liveBytes).toBeLessThanOrEqual(most);

      for (const published of [at, freshAt]) {
        await cluster.detach(published);
        await cluster.delete(published.volume);
      }
      await cluster.untilEmpty(120_000);
      expect(await cluster.misfits()).toEqual([]);
      const report = await native().checkPool(up.state.disk.device);
      expect(report.findings.filter((f) => f.severity === 'error')).toEqual([]);
    });
  });
});
