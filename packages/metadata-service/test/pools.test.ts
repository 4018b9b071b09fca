/** Pools that grow, are drained and are removed, with agents of a test behind real gRPC. */
import { randomUUID } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { volumeContext } from '@holdfast/common';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { MetadataServiceOptions } from '../src/index.ts';
import { tables } from '../src/model/records.ts';
import { SqliteStore } from '../src/store/sqlite.ts';
import { Cluster } from './cluster.ts';
import { FakeDisk, until, type FakeAgent } from './fake-agent.ts';

const slab = 16 << 20;

let c: Cluster;
let disk: FakeDisk;
let dir: string;
const options: Partial<MetadataServiceOptions> = {};

beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), 'holdfast-pools-'));
  c = await Cluster.start({ store: `sqlite:${join(dir, 'metadata.db')}`, ...options });
  disk = new FakeDisk();
});
afterEach(async () => {
  await c.stop();
  await rm(dir, { recursive: true, force: true });
});

const orderCount = (agent: FakeAgent, kind: string): number =>
  agent.orders.filter((order) => order.order === kind).length;
const sees = (agent: FakeAgent, slabs: number): void => {
  agent.deviceBytes = slabs * slab;
  agent.reportPools();
};

describe('a device that grows', () => {
  it('is used when the last joined node sees it, and not before', async () => {
    const one = await c.node('node-1', [disk]);
    const two = await c.node('node-2', [disk]);
    sees(one, 2000);
    sees(two, 1024);
    await until(async () => (await c.pool(disk)).growth.includes(two.nodeId), 'named');
    await expect(c.rpc('GrowPool', { pool_uuid: disk.uuid })).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
      message: expect.stringContaining(two.nodeId) as string,
    });
    expect(disk.slabCount).toBe(1024);
    two.deviceBytes = 2000 * slab;
    await c.rpc('GrowPool', { pool_uuid: disk.uuid });
    expect(await c.pool(disk)).toMatchObject({ slab_count: '2000', slabs_free: '2000', growth: '' });
    const { available_bytes: free } = await c.rpc<{ available_bytes: string }>('GetCapacity');
    expect(free).toBe(String(2000 * slab));
  });

  it('gives no slab out that the engine of one node can not use yet', async () => {
    const one = await c.node('node-1', [disk]);
    const two = await c.node('node-2', [disk]);
    two.usable = 1024;
    sees(two, 1500);
    sees(one, 1500);
    await until(() => disk.slabCount === 1500, 'grown on the disk');
    await sleep(50);
    expect((await c.pool(disk)).slab_count).toBe('1024');
    two.usable = undefined;
    two.reportPools();
    await until(async () => (await c.pool(disk)).slabs_free === '1500', 'grown in the books');
  });

  it('is grown by one node only, which is asked again after a restart of the service', async () => {
    const one = await c.node('node-1', [disk]);
    const two = await c.node('node-2', [disk]);
    one.mute.add('grow_device');
    two.mute.add('grow_device');
    sees(one, 2000);
    sees(two, 2000);
    await until(() => orderCount(one, 'grow_device') + orderCount(two, 'grow_device') === 1, 'ordered');
    const asked = orderCount(one, 'grow_device') === 1 ? one : two;
    await c.restart();
    one.mute.clear();
    two.mute.clear();
    for (const agent of [one, two]) {
      agent.disconnect();
      await agent.connect();
    }
    await until(async () => (await c.pool(disk)).slab_count === '2000', 'grown', 20_000);
    expect(orderCount(asked === one ? two : one, 'grow_device')).toBe(0);
  }, 40_000);

  it('is not joined meanwhile by a node that sees less', async () => {
    const one = await c.node('node-1', [disk]);
    one.mute.add('grow_device');
    sees(one, 2000);
    await until(() => orderCount(one, 'grow_device') === 1, 'ordered');
    const late = c.agent('node-2', [disk]);
    late.deviceBytes = 1024 * slab;
    await late.connect();
    await expect(late.join(disk)).rejects.toMatchObject({
      message: expect.stringContaining('Rescan') as string,
    });
    late.deviceBytes = 2000 * slab;
    late.reportPools();
    await sleep(50);
    await late.join(disk);
  });

  it('that shrank gives that node no slab more, names it, and leaves the others alone', async () => {
    const one = await c.node('node-1', [disk]);
    const two = await c.node('node-2', [disk]);
    one.problem = 'the pool covers 100 bytes but /dev/x has only 50';
    one.reportPools();
    await until(async () => (await c.pool(disk)).growth.includes('only 50'), 'told');
    await expect(one.ask('AllocateSlabs', disk, { count: 1 })).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
      message: expect.stringContaining(one.nodeId) as string,
    });
    await two.ask('AllocateSlabs', disk, { count: 1 });
    one.problem = '';
    one.reportPools();
    await until(async () => (await c.pool(disk)).growth === '', 'well again');
    await one.ask('AllocateSlabs', disk, { count: 1 });
  });
});

describe('a pool that is drained', () => {
  it('takes no new volume, copy or restore; what is there goes on; and it can be taken back', async () => {
    const agent = await c.node('node-1', [disk]);
    const volume = await c.create('kept');
    const grant = await agent.openVolume(disk, volume.uuid, await c.publish(volume.uuid, agent));
    const snapshot = await c.snapshot('before', volume.uuid);
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    for (const source of [{}, { source_snapshot_uuid: snapshot.uuid }, { source_volume_uuid: volume.uuid }]) {
      await expect(c.create('new', source)).rejects.toMatchObject({
        code: 'POOL_DRAINING',
        message: expect.stringContaining('pool undrain pool') as string,
      });
    }
    expect((await c.create('kept')).uuid).toBe(volume.uuid);
    await c.rpc('ExpandVolume', { uuid: volume.uuid, size_bytes: String(2n << 30n) });
    await c.snapshot('while', volume.uuid);
    await agent.ask('AllocateSlabs', disk, { count: 1 });
    expect(grant.volume_uuid).toBe(volume.uuid);
    expect(await c.rpc('GetCapacity')).toMatchObject({ available_bytes: '0' });
    expect(await c.pool(disk)).toMatchObject({
      draining: true,
      contents: { volumes: '1', snapshots: '2', grants: '1', volume_names: ['kept'] },
    });
    await c.restart();
    expect(await c.pool(disk)).toMatchObject({ draining: true });
    await c.rpc('UndrainPool', { pool_uuid: disk.uuid });
    agent.disconnect();
    await agent.connect();
    await agent.accepted(disk);
    await c.create('new');
    const events = (await c.audit()).map((record) => record.event);
    expect(events.filter((event) => event === 'pool-draining')).toHaveLength(1);
    expect(events).toContain('pool-undrained');
  });

  it('leaves its volumes to another pool that is there', async () => {
    const other = Object.assign(new FakeDisk(), { name: 'other', wwid: 'w2', slabCount: 16 });
    await c.node('node-1', [disk, other]);
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    expect((await c.create('elsewhere')).pool_uuid).toBe(other.uuid);
  });
});

describe('a pool that is removed', () => {
  it('has to be drained and empty, and says what is left', async () => {
    await c.node('node-1', [disk]);
    await expect(c.rpc('RemovePool', { pool_uuid: disk.uuid })).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
      message: expect.stringContaining('pool drain') as string,
    });
    const volume = await c.create('left-over');
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    await expect(c.rpc('RemovePool', { pool_uuid: disk.uuid })).rejects.toMatchObject({
      code: 'IN_USE',
      message: expect.stringContaining('left-over') as string,
    });
    await c.rpc('DeleteVolume', { uuid: volume.uuid });
    await c.rpc('RemovePool', { pool_uuid: disk.uuid });
  });

  it('is let go by every node, goes on after a restart of the service, and leaves nothing but its audit and a note', async () => {
    const one = await c.node('node-1', [disk]);
    const two = await c.node('node-2', [disk]);
    const volume = await c.create('gone');
    await c.rpc('DeleteVolume', { uuid: volume.uuid });
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    one.mute.add('leave_pool');
    two.mute.add('leave_pool');
    await expect(c.rpc('RemovePool', { pool_uuid: disk.uuid }, 500)).rejects.toMatchObject({
      code: 'DEADLINE_EXCEEDED',
    });
    expect((await c.pool(disk)).state).toBe('REMOVING');
    await expect(c.rpc('UndrainPool', { pool_uuid: disk.uuid })).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
    });
    await c.restart();
    for (const agent of [one, two]) {
      agent.mute.clear();
      agent.disconnect();
      await agent.connect();
    }
    await c.rpc('RemovePool', { pool_uuid: disk.uuid });
    await c.rpc('RemovePool', { pool_uuid: disk.uuid });
    expect([one.hosts.size, two.hosts.size]).toEqual([0, 0]);
    expect(await c.rpc('ListPools')).toEqual({ pools: [] });
    one.reportPools();
    await sleep(50);
    expect(await c.rpc('ListPools')).toEqual({ pools: [] });
    const events = (await c.audit()).map((record) => record.event);
    for (const event of ['pool-draining', 'pool-removing', 'pool-removed', 'delete'])
      expect(events).toContain(event);
    await c.stop();
    const store = new SqliteStore(join(dir, 'metadata.db'));
    const left = store.read((tx) =>
      Object.entries(tables).filter(([, table]) =>
        table.entries(tx).some(([parts]) => parts.includes(disk.uuid)),
      ),
    );
    await store.close();
    expect(left.map(([name]) => name)).toEqual(['removedPool']);
    c = await Cluster.start();
  });

  it('keeps layers that only the disk names until somebody says that nobody needs them, and wipes nothing', async () => {
    const node = await c.node('node-1', [disk]);
    const uuid = randomUUID();
    const layer = (id: number, parent: number, frozen = true) => ({
      layer_id: String(id),
      slot: id,
      parent_layer_id: String(parent),
      birth: String(id),
      size_bytes: String(1 << 30),
      frozen,
    });
    disk.records.set(uuid, {
      volumeId: '70',
      uuid,
      name: 'lost',
      sizeBytes: String(1 << 30),
      state: 'closed',
      epoch: 5n,
      hostId: 9,
      generation: '1',
      slot: 5,
      layers: [layer(82, 81, false), layer(81, 80), layer(80, 0)],
    });
    for (const [slab, layerId] of [
      [700, 80n],
      [701, 81n],
      [702, 82n],
    ] as const)
      disk.pages.set(slab, { generation: 40n, layerId, bad: false, blocks: new Set([slab]) });
    const context = { poolUuid: disk.uuid, name: 'lost', sizeBytes: 1n << 30n, parameters: {} };
    await c.publish(uuid, node, { volume_context: volumeContext(context) });
    await c.unpublish(uuid, node);
    await c.rpc('DeleteVolume', { uuid });
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    await until(async () => (await c.pool(disk)).contents?.layers === '2', 'the top is wiped');
    expect((await c.pool(disk)).contents).toMatchObject({
      volumes: '0',
      volumes_deleting: '0',
      kept_layers: '2',
    });
    await expect(c.rpc('RemovePool', { pool_uuid: disk.uuid })).rejects.toMatchObject({
      code: 'IN_USE',
      message: expect.stringMatching(/2 layers\. .* pool remove pool --forget-kept-layers/) as string,
    });
    expect((await c.pool(disk)).state).not.toBe('REMOVING');
    await c.rpc('UndrainPool', { pool_uuid: disk.uuid });
    const other = await c.create('other');
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    const forget = { pool_uuid: disk.uuid, forget_kept_layers: true };
    await expect(c.rpc('RemovePool', forget)).rejects.toMatchObject({
      code: 'IN_USE',
      message: expect.stringContaining('1 volume (other)') as string,
    });
    await c.rpc('DeleteVolume', { uuid: other.uuid });
    await c.rpc('RemovePool', forget);
    expect(await c.rpc('ListPools')).toEqual({ pools: [] });
    expect([...disk.pages.keys()]).toEqual([700, 701]);
    const [begun] = (await c.audit()).filter((record) => record.event === 'pool-removing');
    expect(begun?.proof).toContain('2 layers that only the disk names');
  });

  it('waits for a node that is away, and says how to help', async () => {
    await c.node('node-1', [disk]);
    const away = await c.node('node-2', [disk]);
    away.kill();
    await c.rpc('DrainPool', { pool_uuid: disk.uuid });
    await expect(c.rpc('RemovePool', { pool_uuid: disk.uuid }, 700)).rejects.toMatchObject({
      code: 'DEADLINE_EXCEEDED',
      message: expect.stringContaining(`node fence ${away.nodeId}`) as string,
    });
    await c.rpc('FenceNode', { node_id: away.nodeId, pool_uuid: disk.uuid });
    await c.rpc('RemovePool', { pool_uuid: disk.uuid });
    expect(await c.rpc('ListPools')).toEqual({ pools: [] });
  });
});

describe('mutable parameters', () => {
  it('are set at creation, changed later, kept over a restart, and no part of what the name stands for', async () => {
    await c.node('node-1', [disk]);
    const evict = (value: string) => ({ mutable_parameters: { 'holdfast.io/evict': value } });
    const volume = await c.create('pvc', evict('false'));
    expect(volume.mutable_parameters).toEqual({ 'holdfast.io/evict': 'false' });
    expect((await c.create('pvc', evict('true'))).uuid).toBe(volume.uuid);
    expect((await c.volume(volume.uuid)).mutable_parameters).toEqual({ 'holdfast.io/evict': 'false' });
    await c.rpc('ModifyVolume', { uuid: volume.uuid, ...evict('true') });
    await c.rpc('ModifyVolume', { uuid: volume.uuid, ...evict('true') });
    await c.restart();
    expect((await c.volume(volume.uuid)).mutable_parameters).toEqual({ 'holdfast.io/evict': 'true' });
    const modified = (await c.audit({ volume_uuid: volume.uuid })).filter(({ event }) => event === 'modify');
    expect(modified).toHaveLength(1);
    await expect(
      c.rpc('ModifyVolume', { uuid: '00000000-0000-4000-8000-000000000000', ...evict('true') }),
    ).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });
});
