import { closeSync, constants, openSync, writeSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { call } from '@holdfast/common';
import { native } from '@holdfast/native';
import type { CsiCluster, CsiSnapshot, CsiVolume } from '../../src/harness/csi.ts';
import { long, pause, withCluster } from './cluster.ts';

const snapshots = long ? 200 : 40;
const window = 3;
const chunk = 65_536;
const chunks = 64;
/** The window, the top, what is being merged or removed at the moment, and their tombstones. */
const mostSlots = 32;

const layerCount = async (cluster: CsiCluster, volume: CsiVolume): Promise<number> =>
  (await call(cluster.metadata, cluster.metadata.GetVolume, { uuid: volume.uuid })).layers.length;

async function untilShort(
  cluster: CsiCluster,
  volume: CsiVolume,
  most: number,
  timeoutMs: number,
): Promise<void> {
  const end = Date.now() + timeoutMs;
  for (;;) {
    const count = await layerCount(cluster, volume);
    if (count <= most) return;
    if (Date.now() > end) throw new Error(`the chain still has ${count} layers after ${timeoutMs / 1000} s`);
    await pause(200);
  }
}

describe('snapshots that come and go', () => {
  it(`${snapshots} of them with a window of ${window}, the volume open all the while, keep the chain, its slabs and its record slots few`, {
    timeout: 1_200_000,
  }, async () => {
    await withCluster({ nodes: 1, size: '2G', reclaimSeconds: 1 }, async (up, cluster) => {
      const volume = await cluster.create('rotated', BigInt(chunks * chunk));
      const at = await cluster.attach(volume, 1);
      const file = openSync(at.targetPath, constants.O_RDWR | constants.O_DIRECT);
      const data = Buffer.from(new WebAssembly.Memory({ initial: 1 }).buffer, 0, chunk);
      const taken: CsiSnapshot[] = [];
      let longest = 0;
      try {
        for (let n = 0; n < chunks; n++) writeSync(file, data.fill(1), 0, chunk, n * chunk);
        for (let number = 1; number <= snapshots; number++) {
          // A few chunks each time, so that each layer shows through the next ones for long.
          for (let n = 0; n < 4; n++) {
            writeSync(file, data.fill(1 + (number % 250)), 0, chunk, ((number * 4 + n) % chunks) * chunk);
          }
          taken.push(await cluster.snapshot(volume, `snap-${number}`));
          for (const gone of taken.splice(0, Math.max(0, taken.length - window)))
            await cluster.deleteSnapshot(gone);
          longest = Math.max(longest, await layerCount(cluster, volume));
          if (number % 5 === 0) await untilShort(cluster, volume, window + 3, 60_000);
        }
        await untilShort(cluster, volume, window + 2, 60_000);
      } finally {
        closeSync(file);
      }
      const { own_bytes, shared_bytes } = await call(cluster.metadata, cluster.metadata.GetVolume, {
        uuid: volume.uuid,
      });
      const slabs = (Number(own_bytes) + Number(shared_bytes)) / (16 << 20);
      const slots = (await native().readLayerRecords(up.state.disk.device)).length;
      console.log(
        `${snapshots} snapshots: at most ${longest} layers, ${slots} record slots ever used, ${slabs} slabs left`,
      );
      expect(slots).toBeLessThanOrEqual(mostSlots);
      expect(slabs).toBeLessThanOrEqual(window + 4);
      for (const snapshot of taken) await cluster.deleteSnapshot(snapshot);
      await cluster.detach(at);
      await cluster.delete(volume);
      await cluster.untilEmpty(120_000);
      const report = await native().checkPool(up.state.disk.device);
      expect(report.findings.filter((f) => f.severity === 'error')).toEqual([]);
    });
  });
});
