/** A development cluster for one fault test: made in a fresh directory, taken away at the end, leaks are failures. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { CsiCluster } from '../../src/harness/csi.ts';
import { DevUp, type DevUpOptions } from '../../src/harness/dev-process.ts';

/** HOLDFAST_LONG=1 (make faults) runs as many rounds as the product promises; otherwise a few. */
export const long = process.env['HOLDFAST_LONG'] === '1';

export async function withCluster(
  options: Omit<DevUpOptions, 'dir'>,
  body: (up: DevUp, cluster: CsiCluster) => Promise<void>,
): Promise<void> {
  const dir = mkdtempSync(join(tmpdir(), 'holdfast-fault-'));
  const up = await DevUp.start({ dir, ...options });
  const cluster = new CsiCluster(up.state);
  let failed: unknown;
  try {
    await body(up, cluster);
  } catch (error) {
    failed = error;
  }
  cluster.close();
  const left = await up.close();
  if (failed !== undefined) throw failed; // the logs stay for whoever looks
  if (left.length > 0) throw new Error(`Left behind: ${left.join(', ')}`);
  rmSync(dir, { recursive: true, force: true });
}

export const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
