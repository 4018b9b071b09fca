/** Merging below a snapshot that is kept: what is ordered, from whom, and that nothing is stripped before its holders know. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Order__Output } from '@holdfast/proto';
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk, until, type FakeAgent } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-merging-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

let c: Cluster;
let disk: FakeDisk;
let node: FakeAgent;
let other: FakeAgent;
beforeEach(async () => {
  c = await Cluster.start({
    store: `sqlite:${directory}/${randomUUID()}.db`,
    stripIntervalMs: 200,
    compactIntervalMs: 200,
  });
  disk = new FakeDisk();
  node = await c.node('node-1', [disk]);
  other = await c.node('node-2', [disk]);
});
afterEach(() => c.stop());
vi.setConfig({ testTimeout: 120_000 });

const layers = async (uuid: string): Promise<string[]> =>
  (await c.volume(uuid)).layers.map((layer) => layer.layer_id);
const free = async (): Promise<string> => (await c.pool(disk)).slabs_free;
const blocksOf = (layerId: string): number[] =>
  [...disk.pages.values()]
    .flatMap((page) => (page.layerId === BigInt(layerId) ? [...(page.blocks ?? [])] : []))
    .toSorted((a, b) => a - b);
const orders = (kind: 'merge_layers' | 'learn_layer'): Order__Output[] =>
  [...node.orders, ...other.orders].filter((order) => order[kind]);
const both = (change: (agent: FakeAgent) => void): void => [node, other].forEach(change);

async function write(uuid: string, ...slabs: number[][]): Promise<void> {
  await node.allocate(disk, slabs.length);
  const claimed = slabs.map((blocks) => node.claim(disk, node.open.get(uuid)!, blocks));
  await node.ask('ReportSlabs', disk, { claimed });
}

/** Two snapshots, the older of which is deleted: blocks 2 to 5 of it show through the one that is kept. */
async function keptAbove(): Promise<{ uuid: string; kept: string; gone: string }> {
  const { uuid } = await c.create('pvc');
  await node.openVolume(disk, uuid, await c.publish(uuid, node));
  await write(uuid, [1], [2, 3], [4, 5]);
  const older = await c.snapshot('older', uuid);
  await write(uuid, [1]);
  const newer = await c.snapshot('newer', uuid);
  await c.rpc('DeleteSnapshot', { uuid: older.uuid });
  return { uuid, kept: newer.layer_id, gone: older.layer_id };
}

describe('below a snapshot that is kept', () => {
  it('what still shows goes up into it, first where it has room, then into slabs that it is given; the rest comes back', async () => {
    const { uuid, kept, gone } = await keptAbove();
    await until(async () => !(await layers(uuid)).includes(gone), 'the deleted layer leaves the chain');
    await until(() => disk.tombstones.has(gone), 'and its record goes, with its holder still there');
    expect(blocksOf(kept)).toEqual([1, 2, 3, 4, 5]);
    // One slab of the kept layer as it was, and of the four that it was given two; the others were never used.
    await until(async () => (await free()) === '1021', 'slabs are free');
    expect(orders('merge_layers')[0]?.merge_layers).toMatchObject({
      head: { layer_id: kept },
      skip_above_permille: 700,
      max_blocks: '16384',
    });
    const slabs = node.open.get(uuid)?.layers.find((layer) => layer.layer_id === kept)?.slabs ?? [];
    expect(slabs.reduce((sum, run) => sum + run.count, 0)).toBeGreaterThanOrEqual(3);
    const audit = await c.audit({ volume_uuid: uuid });
    expect(audit.filter((record) => record.event === 'merge').length).toBeGreaterThanOrEqual(2);
    const count = orders('merge_layers').length;
    await new Promise((resolve) => setTimeout(resolve, 1500));
    expect(orders('merge_layers')).toHaveLength(count);
  });

  it('nothing is stripped before each holder has learned it, through a restart in the middle', async () => {
    node.mute.add('learn_layer');
    const { uuid, kept, gone } = await keptAbove();
    await until(() => orders('learn_layer').length > 0, 'told to learn');
    expect(blocksOf(kept).length).toBeGreaterThan(1);
    await c.restart();
    await node.connect();
    await other.connect();
    await new Promise((resolve) => setTimeout(resolve, 1000));
    expect(blocksOf(gone)).toEqual([2, 3, 4, 5]);
    node.mute.clear();
    node.disconnect(); // what it was asked before is asked again
    await node.connect();
    await until(async () => !(await layers(uuid)).includes(gone), 'the deleted layer leaves the chain');
    expect(blocksOf(kept)).toEqual([1, 2, 3, 4, 5]);
  });

  it('a merge that fails is learned all the same, and tried again', async () => {
    both((agent) =>
      agent.override.set('merge_layers', () => ({
        error_code: 'HF_IO',
        error_message: 'the disk has failed',
      })),
    );
    const { uuid, kept, gone } = await keptAbove();
    await until(() => orders('learn_layer').length > 0, 'learned');
    both((agent) => agent.override.clear());
    await until(async () => !(await layers(uuid)).includes(gone), 'the deleted layer leaves the chain');
    expect(blocksOf(kept)).toEqual([1, 2, 3, 4, 5]);
  });

  it('nothing is merged where every layer has a name', async () => {
    const { uuid } = await c.create('pvc');
    await node.openVolume(disk, uuid, await c.publish(uuid, node));
    await write(uuid, [1]);
    const snapshot = await c.snapshot('only', uuid);
    await write(uuid, [2]);
    await c.snapshot('second', uuid);
    await new Promise((resolve) => setTimeout(resolve, 1500));
    expect(orders('merge_layers')).toEqual([]);
    expect((await layers(uuid)).includes(snapshot.layer_id)).toBe(true);
  });
});
