/** Compaction: when it is ordered, from whom, what it leaves alone, and that it comes to an end. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Grant__Output, Order__Output, OrderResult } from '@holdfast/proto';
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk, until, type FakeAgent } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-compaction-'));
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
    http: '127.0.0.1:0',
  });
  disk = new FakeDisk();
  node = await c.node('node-1', [disk]);
  other = await c.node('node-2', [disk]);
});
afterEach(() => c.stop());
vi.setConfig({ testTimeout: 120_000 });

const nothingBelow = async (uuid: string, what: string): Promise<void> =>
  until(async () => (await layerCount(uuid)) === 1, what, 60_000);
const free = async (): Promise<string> => (await c.pool(disk)).slabs_free;
const orders = (): Order__Output[] =>
  [...node.orders, ...other.orders].filter((order) => order.compact_volume);
const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
const moves = async (uuid: string): Promise<string[]> =>
  (await c.audit({ volume_uuid: uuid }))
    .filter((record) => record.event === 'compact')
    .map((record) => record.detail.split(' of layers')[0] ?? '');
const layerCount = async (uuid: string): Promise<number> => (await c.volume(uuid)).layers.length;
/** The blocks that the top layer has. */
const topBlocks = async (uuid: string): Promise<number[]> => {
  const top = BigInt((await c.volume(uuid)).layers[0]?.layer_id ?? 0);
  return [...disk.pages.values()]
    .flatMap((page) => (page.layerId === top ? [...(page.blocks ?? [])] : []))
    .toSorted((a, b) => a - b);
};
const both = (change: (agent: FakeAgent) => void): void => [node, other].forEach(change);
const answers = (answer: OrderResult['compact']) => (): { compact: NonNullable<typeof answer> } => ({
  compact: answer ?? {},
});

async function write(uuid: string, ...slabs: number[][]): Promise<void> {
  await node.allocate(disk, slabs.length);
  const claimed = slabs.map((blocks) => node.claim(disk, node.open.get(uuid)!, blocks));
  await node.ask('ReportSlabs', disk, { claimed });
}

/** A volume on the first node, with blocks in three slabs below its top, one of which is written anew. */
async function folded(): Promise<{ uuid: string; grant: Grant__Output }> {
  const { uuid } = await c.create('pvc');
  const grant = await node.openVolume(disk, uuid, await c.publish(uuid, node));
  await write(uuid, [1], [2], [3]);
  const snapshot = await c.snapshot('snap', uuid);
  await write(uuid, [1]);
  await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
  return { uuid, grant };
}

/** The same, closed before the snapshot goes. */
async function closed(): Promise<string> {
  both((agent) => agent.mute.add('compact_volume'));
  const { uuid } = await folded();
  await node.returnVolume(disk, uuid);
  await c.unpublish(uuid, node);
  both((agent) => agent.mute.delete('compact_volume'));
  await until(async () => (await c.volume(uuid)).grant === 'GRANT_STATE_FREE', 'closed');
  return uuid;
}

describe('of an open volume', () => {
  it('is ordered from its holder after a strip; another strip empties the slabs, and then nothing is done any more', async () => {
    const { uuid, grant } = await folded();
    await nothingBelow(uuid, 'nothing is left below');
    await until(async () => (await free()) === '1022', 'two slabs of the top are all');
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
    expect(orders()[0]?.compact_volume).toMatchObject({
      volume_uuid: uuid,
      epoch: grant.epoch,
      skip_above_permille: 700,
      max_blocks: '16384',
      generation: node.hosts.get(disk.uuid)?.generation,
      grant: null,
    });
    expect(other.orders.some((order) => order.compact_volume)).toBe(false);
    expect(await moves(uuid)).toEqual(['2 blocks']);
    const metrics = await (await fetch(`http://${c.service.httpAddress}/metrics`)).text();
    expect(metrics).toContain('holdfast_metadata_compaction_moved_blocks_total 2');
    expect(metrics).toMatch(/compactions_total\{outcome="complete"\} 1/);
    const count = orders().length;
    await pause(1500);
    expect(orders()).toHaveLength(count);
  });

  it('is repeated until it is complete, through restarts of the service in the middle of an order', async () => {
    node.moveAtMost = 1;
    node.loseAnswers.add('compact_volume');
    const { uuid } = await folded();
    await until(() => orders().length > 0, 'ordered');
    await pause(100);
    expect(await topBlocks(uuid)).toEqual([1, 2]);
    node.disconnect();
    await c.restart();
    node.loseAnswers.clear();
    await node.connect();
    await other.connect();
    await nothingBelow(uuid, 'nothing is left below');
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
    // The order whose answer was lost was repeated, and found the next block.
    expect(await moves(uuid)).toEqual(['1 blocks']);
  });

  it('ends with the grant: a holder that dies keeps nobody from going on', async () => {
    node.mute.add('compact_volume');
    const { uuid } = await folded();
    await until(() => orders().length > 0, 'ordered');
    node.kill();
    await c.unpublish(uuid, node);
    await nothingBelow(uuid, 'done by the other one');
    expect(other.orders.find((order) => order.compact_volume)?.compact_volume?.grant).not.toBeNull();
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
  });

  it('is not begun while a snapshot is under way', async () => {
    both((agent) =>
      agent.override.set('strip_layers', () => ({ error_code: 'HF_IO', error_message: 'not yet' })),
    );
    const { uuid } = await folded();
    node.override.set('cut_volumes', () => ({ error_code: 'HF_IO', error_message: 'not yet' }));
    const cut = c.snapshot('next', uuid, {}, 60_000); // held up for longer than a call waits
    await until(() => node.orders.some((order) => order.cut_volumes), 'being cut');
    both((agent) => agent.override.delete('strip_layers'));
    await until(async () => (await c.volume(uuid)).layers[1]?.slabs[0]?.first === '1', 'stripped');
    await pause(1000);
    expect(orders()).toEqual([]);
    node.override.clear();
    const { uuid: snapshot } = await cut;
    await pause(1000);
    expect(orders()).toEqual([]); // what the snapshot stands on stays where it is
    await c.rpc('DeleteSnapshot', { uuid: snapshot });
    await nothingBelow(uuid, 'compacted then');
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
  });
});

describe('of a closed volume', () => {
  it('is done by a live agent under a grant of its own, which comes back with the answer', async () => {
    const uuid = await closed();
    const before = BigInt((await c.volume(uuid)).epoch);
    await nothingBelow(uuid, 'nothing is left below');
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
    const order = orders().findLast((one) => one.compact_volume?.grant)?.compact_volume;
    expect(BigInt(order?.epoch ?? 0)).toBeGreaterThan(before);
    expect(order?.grant).toMatchObject({ epoch: order?.epoch, volume_uuid: uuid, read_only: false });
    expect(await c.volume(uuid)).toMatchObject({ grant: 'GRANT_STATE_FREE', publications: [] });
    await other.openVolume(disk, uuid, await c.publish(uuid, other));
  });

  it('lets a stage and a delete wait for one order, and is not begun again when somebody wants the volume', async () => {
    both((agent) =>
      agent.override.set('strip_layers', () => ({ error_code: 'HF_IO', error_message: 'not yet' })),
    );
    const uuid = await closed();
    both((agent) => {
      agent.moveAtMost = 1;
      agent.override.clear();
      agent.loseAnswers.add('compact_volume');
    });
    await until(() => orders().some((order) => order.compact_volume?.grant), 'ordered');
    const publishId = await c.publish(uuid, node);
    const short = node.ask('StageVolume', disk, { volume_uuid: uuid, publish_id: publishId }, 4000);
    await expect(short).rejects.toMatchObject({
      code: 'DEADLINE_EXCEEDED',
      message: expect.stringContaining('being compacted'),
    });
    await c.unpublish(uuid, node);
    await expect(c.rpc('DeleteVolume', { uuid }, 4000)).rejects.toMatchObject({
      code: 'DEADLINE_EXCEEDED',
      message: expect.stringContaining('being compacted'),
    });
    const again = await c.publish(uuid, node);
    const opening = node.openVolume(disk, uuid, again);
    both((agent) => agent.loseAnswers.clear());
    // The service asks whoever had it to let go, as nobody knows what became of it.
    both((agent) => agent.disconnect());
    for (const agent of [node, other]) await agent.connect();
    const grant = await opening;
    const count = orders().filter((order) => order.compact_volume?.grant).length;
    await nothingBelow(uuid, 'the rest is done by the writer');
    expect(orders().filter((order) => order.compact_volume?.grant)).toHaveLength(count);
    const written = orders().filter((order) => order.compact_volume?.epoch === grant.epoch);
    expect(written.map((order) => order.compact_volume?.grant)).toContain(null);
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
  });

  it('lets a snapshot be cut right after the order that is under way, and moves nothing up past it', async () => {
    const uuid = await closed();
    let end = (): void => undefined;
    const ended = new Promise<void>((resolve) => (end = resolve));
    both((agent) => {
      agent.moveAtMost = 1;
      agent.compactionEnds = ended;
    });
    await until(() => orders().some((order) => order.compact_volume?.grant), 'ordered');
    const { epoch } = await c.volume(uuid);
    const cutting = c.snapshot('next', uuid, {}, 60_000);
    await pause(500);
    expect((await c.volume(uuid)).epoch).toBe(epoch);
    end();
    const snapshot = await cutting;
    expect(BigInt((await c.volume(uuid)).epoch)).toBe(BigInt(epoch) + 1n);
    expect(await moves(uuid)).toEqual(['1 blocks']);
    await pause(1500);
    expect(orders()).toHaveLength(1);
    await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
    await nothingBelow(uuid, 'all is moved up');
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
  });

  it('is given to another when the agent that has it dies', async () => {
    both((agent) => agent.mute.add('compact_volume'));
    const uuid = await closed();
    both((agent) => agent.mute.add('compact_volume'));
    await until(() => orders().some((order) => order.compact_volume?.grant), 'ordered');
    const doing = [node, other].find((agent) => agent.orders.some((order) => order.compact_volume?.grant))!;
    const idle = doing === node ? other : node;
    idle.mute.clear();
    doing.kill();
    await c.rpc('FenceNode', { node_id: doing.nodeId });
    await nothingBelow(uuid, 'done');
    expect(await topBlocks(uuid)).toEqual([1, 2, 3]);
  });

  it('is not begun while nodes read the volume', async () => {
    both((agent) =>
      agent.override.set('strip_layers', () => ({ error_code: 'HF_IO', error_message: 'not yet' })),
    );
    const uuid = await closed();
    const count = orders().length;
    const reading = { access_mode: 'ACCESS_MODE_MULTI_NODE_READER_ONLY' };
    await other.openVolume(disk, uuid, await c.publish(uuid, other, reading));
    both((agent) => agent.override.clear());
    await until(async () => (await c.volume(uuid)).layers[1]?.slabs[0]?.first === '1', 'stripped');
    await pause(1000);
    expect(orders()).toHaveLength(count);
    await other.returnVolume(disk, uuid);
    await c.unpublish(uuid, other);
    await nothingBelow(uuid, 'compacted then');
  });
});

describe('does not', () => {
  it('begin where most of what is below is still needed', async () => {
    both((agent) =>
      agent.override.set('strip_layers', (order) => {
        const answer = agent.answer(order, disk);
        for (const use of answer.strip?.uses ?? []) use.live_blocks = String(Math.round(0.8 * 2 * 4096));
        return answer;
      }),
    );
    const { uuid } = await folded();
    await until(
      async () => Number((await c.volume(uuid)).reclaimable_bytes) > 0 || orders().length > 0,
      'counted',
    );
    await pause(1000);
    expect([orders().length, await layerCount(uuid)]).toEqual([0, 2]);
  });

  it('begin when it is switched off', async () => {
    await c.restart({ compactBelow: 0 });
    for (const agent of [node, other]) {
      await agent.connect();
      await agent.accepted(disk);
    }
    const { uuid } = await folded();
    await until(async () => (await c.volume(uuid)).layers[1]?.slabs[0]?.first === '1', 'stripped');
    await pause(1000);
    expect(orders()).toEqual([]);
  });

  it('go on when nothing is left that the rule would move, until there is much less', async () => {
    node.moveAtMost = 0;
    const { uuid } = await folded();
    await until(() => orders().length === 1, 'ordered');
    await pause(1500);
    expect(orders()).toHaveLength(1);
    await write(uuid, [2]);
    await until(() => orders().length === 2, 'ordered again');
    await pause(1000);
    expect([orders().length, await moves(uuid)]).toEqual([2, []]);
  });

  it('hurry when an order moved nothing', async () => {
    node.override.set('compact_volume', answers({ moved_blocks: '0', complete: false }));
    await folded();
    await until(() => orders().length >= 2, 'twice');
    await pause(3000);
    // 200 ms, doubling each time.
    expect(orders().length).toBeLessThan(7);
  });

  it('try again on a full pool before that has room', async () => {
    const taken = await (async () => {
      both((agent) => agent.mute.add('strip_layers'));
      const { uuid } = await folded();
      const runs = [];
      for (let got = 1; got > 0; ) {
        const more = await other.allocate(disk, Number(await free()) || 1);
        runs.push(...more);
        got = more.length;
      }
      return { uuid, runs };
    })();
    expect(await free()).toBe('0');
    both((agent) => {
      agent.mute.clear();
      agent.override.set('strip_layers', (order) => {
        const answer = agent.answer(order, disk);
        return { ...answer, strip: { ...answer.strip, emptied: [] } };
      });
      agent.disconnect();
    });
    for (const agent of [node, other]) await agent.connect();
    await until(() => orders().length > 0, 'ordered');
    await pause(1500);
    expect(orders()).toHaveLength(1);
    both((agent) => agent.override.clear());
    await other.ask('ReturnSlabs', disk, { unclaimed: taken.runs });
    await nothingBelow(taken.uuid, 'compacted');
  });
});
