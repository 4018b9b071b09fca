/** Volumes through the API: names, sizes, pools, pages, publications, deletion, and what is known again from its context. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { volumeContext } from '@holdfast/common';
import type { Volume__Output } from '@holdfast/proto';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk, until, type FakeAgent } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-volumes-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

let c: Cluster;
let disk: FakeDisk;
let node: FakeAgent;
beforeEach(async () => {
  c = await Cluster.start({ store: `sqlite:${directory}/${randomUUID()}.db` });
  disk = new FakeDisk();
  node = await c.node('node-1', [disk]);
});
afterEach(() => c.stop());

const gib = (n: number): string => String(BigInt(n) << 30n);

describe('CreateVolume', () => {
  it('gives the same volume for the same name, and for a size within the limits', async () => {
    const first = await c.create('pvc', { parameters: { fs: 'xfs' } });
    expect((await c.create('pvc', { parameters: { fs: 'xfs' } })).uuid).toBe(first.uuid);
    await c.rpc('ExpandVolume', { uuid: first.uuid, size_bytes: gib(2) });
    const again = await c.create('pvc', {
      parameters: { fs: 'xfs' },
      size_bytes: gib(1),
      limit_bytes: gib(3),
    });
    expect(again.uuid).toBe(first.uuid);
    expect((await c.pool(disk)).provisioned_bytes).toBe(gib(2));
  });

  it.each([
    ['a larger size', { size_bytes: gib(2) }],
    ['a lower limit', { size_bytes: '4096', limit_bytes: '8192' }],
    ['other parameters', { parameters: { fs: 'ext4' } }],
    ['more parameters', { parameters: { fs: 'xfs', more: '1' } }],
  ])('refuses the name with %s', async (_what, change) => {
    await c.create('pvc', { parameters: { fs: 'xfs' } });
    await expect(c.create('pvc', { parameters: { fs: 'xfs' }, ...change })).rejects.toMatchObject({
      code: 'ALREADY_EXISTS',
    });
  });

  it.each([
    ['no name', { name: '' }, 'INVALID_ARGUMENT'],
    ['a name that is too long', { name: 'ä'.repeat(64) }, 'INVALID_ARGUMENT'],
    ['a name with a control character', { name: 'a\nb' }, 'INVALID_ARGUMENT'],
    ['no size', { size_bytes: '0' }, 'OUT_OF_RANGE'],
    ['a size that is no multiple of 4096', { size_bytes: '5000' }, 'INVALID_ARGUMENT'],
    ['a size of 256 TiB', { size_bytes: String(1n << 48n) }, 'OUT_OF_RANGE'],
    ['a limit below the size', { limit_bytes: '4096' }, 'OUT_OF_RANGE'],
    [
      'parameters that do not fit into the record',
      { parameters: { a: 'x'.repeat(3000) } },
      'INVALID_ARGUMENT',
    ],
    ['a pool that nobody knows', { pool_uuids: [randomUUID()] }, 'NOT_FOUND'],
    ['no request id', { request_id: '' }, 'INVALID_ARGUMENT'],
  ])('refuses %s', async (_what, change, code) => {
    await expect(c.create('pvc', change)).rejects.toMatchObject({ code });
    const { volumes } = await c.rpc<{ volumes: unknown[] }>('ListVolumes', { include_deleting: true });
    expect(volumes).toEqual([]);
  });

  it('allows 256 TiB less a chunk on a small pool: volumes are thin', async () => {
    const volume = await c.create('big', { size_bytes: String((1n << 48n) - 65_536n) });
    expect(volume.size_bytes).toBe('281474976645120');
  });

  it('repeats its first answer for a repeated request id, and refuses the id for something else', async () => {
    const request = { request_id: randomUUID(), name: 'pvc', size_bytes: gib(1) };
    const first = await c.rpc<Volume__Output>('CreateVolume', request);
    await c.rpc('ExpandVolume', { uuid: first.uuid, size_bytes: gib(2) });
    expect(await c.rpc('CreateVolume', request)).toEqual(first);
    await expect(c.rpc('CreateVolume', { ...request, name: 'other' })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    await expect(
      c.rpc('DeleteVolume', { request_id: request.request_id, uuid: first.uuid }),
    ).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
  });

  it('makes one volume of many calls at once for one name', async () => {
    const volumes = await Promise.all(Array.from({ length: 20 }, () => c.create('pvc')));
    expect(new Set(volumes.map((volume) => volume.uuid)).size).toBe(1);
    expect((await c.pool(disk)).provisioned_bytes).toBe(gib(1));
  });

  it('takes the pool with the most free space of those that are asked for', async () => {
    const large = Object.assign(new FakeDisk(), { name: 'large', slabCount: 4096, wwid: 'w2' });
    const small = Object.assign(new FakeDisk(), { name: 'small', slabCount: 16, wwid: 'w3' });
    await c.node('node-2', [large, small]);
    expect((await c.create('a')).pool_uuid).toBe(large.uuid);
    expect((await c.create('b', { pool_uuids: [disk.uuid, small.uuid] })).pool_uuid).toBe(disk.uuid);
    await expect(c.create('b', { pool_uuids: [small.uuid] })).rejects.toMatchObject({
      code: 'ALREADY_EXISTS',
    });
  });

  it('says so when all slots are in use, and reuses the slot of a volume that is gone', async () => {
    const tiny = Object.assign(new FakeDisk(), { volumeSlots: 2, layerSlots: 2, wwid: 'w2' });
    await c.node('node-2', [tiny]);
    const only = { pool_uuids: [tiny.uuid] };
    const first = await c.create('a', only);
    const second = await c.create('b', only);
    expect([first.slot, second.slot]).toEqual([0, 1]);
    await expect(c.create('c', only)).rejects.toMatchObject({
      code: 'TOO_MANY',
      message: expect.stringContaining('2 layer slots'),
    });
    await c.rpc('DeleteVolume', { uuid: first.uuid });
    const third = await c.create('c', only);
    expect(third.slot).toBe(0);
    expect(BigInt(third.volume_id)).toBeGreaterThan(BigInt(second.volume_id));
  });
});

describe('ListVolumes', () => {
  const page = (request: object): Promise<{ volumes: Volume__Output[]; next_token: string }> =>
    c.rpc('ListVolumes', request);

  it('goes through all volumes page by page, also when the last one seen is deleted in between', async () => {
    const made = await Promise.all(Array.from({ length: 7 }, (_, n) => c.create(`pvc-${n}`)));
    const seen: string[] = [];
    let token = '';
    do {
      const { volumes, next_token } = await page({ max_entries: 2, starting_token: token });
      seen.push(...volumes.map((volume) => volume.uuid));
      await c.rpc('DeleteVolume', { uuid: seen.at(-1) });
      token = next_token;
    } while (token !== '');
    expect(seen.toSorted()).toEqual(made.map((volume) => volume.uuid).toSorted());
    expect((await page({})).volumes).toHaveLength(3);
  });

  it('has no token after the last page, and none when everything fits', async () => {
    await Promise.all([c.create('a'), c.create('b')]);
    const first = await page({ max_entries: 2 });
    expect([first.volumes.length, first.next_token]).toEqual([2, '']);
    expect((await page({})).volumes.every((volume) => volume.layers.length === 0)).toBe(true);
  });

  it.each(['garbage', 'v1.', 'v1.not-a-uuid', 'v2.5f0c0c0e-8f7e-4a52-9a87-3a4b2f1f0001'])(
    'refuses the token %s',
    async (token) => {
      await expect(page({ starting_token: token })).rejects.toMatchObject({ code: 'BAD_TOKEN' });
    },
  );

  it('leaves out what is being deleted unless asked', async () => {
    const volume = await c.create('pvc');
    await node.openVolume(disk, volume.uuid, await c.publish(volume.uuid, node));
    await node.returnVolume(disk, volume.uuid);
    await c.unpublish(volume.uuid, node);
    node.mute.add('wipe_volume');
    await c.rpc('DeleteVolume', { uuid: volume.uuid });
    expect((await page({})).volumes).toEqual([]);
    expect((await page({ include_deleting: true })).volumes).toMatchObject([
      { uuid: volume.uuid, state: 'DELETING' },
    ]);
    expect((await c.volume(volume.uuid)).state).toBe('DELETING');
    await expect(c.publish(volume.uuid, node)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await expect(c.rpc('ExpandVolume', { uuid: volume.uuid, size_bytes: gib(9) })).rejects.toMatchObject({
      code: 'NOT_FOUND',
    });
    // Its name is free at once, its slot is not.
    const next = await c.create('pvc');
    expect([next.uuid === volume.uuid, next.slot === volume.slot]).toEqual([false, false]);
  });
});

describe('ExpandVolume', () => {
  it('grows, never shrinks, and keeps to its limit', async () => {
    const { uuid } = await c.create('pvc');
    const expand = (size_bytes: string, limit_bytes = '0'): Promise<Volume__Output> =>
      c.rpc('ExpandVolume', { uuid, size_bytes, limit_bytes });
    expect((await expand(gib(2))).size_bytes).toBe(gib(2));
    expect((await expand(gib(1))).size_bytes).toBe(gib(2));
    await expect(expand('4096', '8192')).rejects.toMatchObject({ code: 'OUT_OF_RANGE' });
    await expect(expand('5000')).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    expect((await c.volume(uuid)).layers[0]?.size_bytes).toBe(gib(2));
    expect((await c.pool(disk)).provisioned_bytes).toBe(gib(2));
  });
});

describe('PublishVolume', () => {
  it('gives the same publish id to the same node, and refuses another mode', async () => {
    const { uuid } = await c.create('pvc');
    const id = await c.publish(uuid, node);
    expect(await c.publish(uuid, node)).toBe(id);
    await expect(c.publish(uuid, node, { read_only: true })).rejects.toMatchObject({
      code: 'ALREADY_EXISTS',
    });
    await expect(
      c.publish(uuid, node, { access_mode: 'ACCESS_MODE_SINGLE_NODE_MULTI_WRITER' }),
    ).rejects.toMatchObject({
      code: 'ALREADY_EXISTS',
    });
  });

  it('refuses no mode, unknown nodes and unknown volumes', async () => {
    const { uuid } = await c.create('pvc');
    const publish = (change: object): Promise<string> => c.publish(uuid, node, change);
    await expect(publish({ access_mode: 'ACCESS_MODE_UNSPECIFIED' })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    await expect(publish({ node_id: 'node-9.00000000' })).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await expect(publish({ uuid: randomUUID() })).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await expect(publish({ uuid: 'nonsense' })).rejects.toMatchObject({ code: 'NOT_FOUND' });
    expect((await c.volume(uuid)).publications).toEqual([]);
  });

  it('keeps to the volumes that a node takes', async () => {
    const full = await c.node('node-2', [disk], { maxVolumes: 1 });
    const [a, b] = [await c.create('a'), await c.create('b')];
    await c.publish(a.uuid, full);
    await expect(c.publish(b.uuid, full)).rejects.toMatchObject({ code: 'TOO_MANY' });
    await c.unpublish(a.uuid, full);
    await c.publish(b.uuid, full);
  });

  it.each([{ read_only: true }, { access_mode: 'ACCESS_MODE_SINGLE_NODE_READER_ONLY' }])(
    'a publication with %j is granted read-only, whatever stage asks for',
    async (change) => {
      const { uuid } = await c.create('pvc');
      const grant = await node.stage(disk, uuid, await c.publish(uuid, node, change));
      expect(grant.read_only).toBe(true);
    },
  );
});

describe('StageVolume', () => {
  it('is refused without the current publish id, repeats its reply for the same host, and refuses another host', async () => {
    const other = await c.node('node-2', [disk]);
    const { uuid } = await c.create('pvc');
    const id = await c.publish(uuid, node);
    await expect(node.stage(disk, uuid, randomUUID())).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    await expect(other.stage(disk, uuid, id)).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    const grant = await node.stage(disk, uuid, id);
    expect(await node.stage(disk, uuid, id)).toEqual(grant);
    await node.ask('VolumeOpened', disk, { volume_uuid: uuid, epoch: grant.epoch });
    await node.ask('VolumeOpened', disk, { volume_uuid: uuid, epoch: grant.epoch });
    expect(await node.stage(disk, uuid, id)).toEqual(grant);
    for (const epoch of [String(BigInt(grant.epoch) - 1n), String(BigInt(grant.epoch) + 1n)]) {
      await expect(node.ask('VolumeOpened', disk, { volume_uuid: uuid, epoch })).rejects.toMatchObject({
        code: 'STALE',
      });
      await expect(node.ask('ReturnVolume', disk, { volume_uuid: uuid, epoch })).rejects.toMatchObject({
        code: 'STALE',
      });
    }
    expect((await c.volume(uuid)).grant).toBe('GRANT_STATE_OPEN');
  });
});

describe('slabs', () => {
  it('the answer to a repeated AllocateSlabs names only what is still ahead', async () => {
    const request = { request_id: randomUUID(), count: 4 };
    const first = await node.ask<{ runs: object[] }>('AllocateSlabs', disk, request);
    expect(await node.ask('AllocateSlabs', disk, request)).toEqual(first);
    await node.ask('ReturnSlabs', disk, { unclaimed: [{ first: '1', count: 1, generation: '1' }] });
    expect(await node.ask('AllocateSlabs', disk, request)).toEqual({
      runs: [
        { first: '0', count: 1, generation: '1' },
        { first: '2', count: 2, generation: '1' },
      ],
    });
    expect((await c.pool(disk)).slabs_ahead).toBe('3');
  });

  it('of a full pool are an empty answer, and come back when they are returned', async () => {
    expect((await node.allocate(disk, 1024)).length).toBe(1);
    expect(await node.ask('AllocateSlabs', disk, { count: 8 })).toEqual({ runs: [] });
    await node.ask('ReturnSlabs', disk, { unclaimed: [{ first: '1000', count: 3, generation: '1' }] });
    expect(await node.ask('AllocateSlabs', disk, { count: 8 })).toEqual({
      runs: [{ first: '1000', count: 3, generation: '2' }],
    });
  });

  it('are never given in numbers that make no sense', async () => {
    for (const count of [0, 5000]) {
      await expect(node.ask('AllocateSlabs', disk, { count })).rejects.toMatchObject({
        code: 'INVALID_ARGUMENT',
      });
    }
  });

  it('of a report that fits only in part are recorded as far as they fit', async () => {
    const [a, b] = [await c.create('a'), await c.create('b')];
    const granted = await node.openVolume(disk, a.uuid, await c.publish(a.uuid, node));
    await node.allocate(disk, 4);
    const good = node.claim(disk, granted);
    const bad = { ...node.claim(disk, granted), layer_id: b.layers[0]?.layer_id };
    await expect(node.ask('ReportSlabs', disk, { claimed: [bad, good] })).rejects.toMatchObject({
      code: 'STALE',
    });
    expect((await c.volume(a.uuid)).layers[0]?.slabs).toEqual([{ first: '0', count: 1, generation: '1' }]);
    expect((await c.volume(b.uuid)).layers[0]?.slabs).toEqual([]);
    expect((await c.audit({ node_id: node.nodeId })).some((record) => record.event === 'misfit')).toBe(true);
  });
});

describe('DeleteVolume', () => {
  it('is success for a volume that is unknown or gone, and refused while it is published', async () => {
    const { uuid } = await c.create('pvc');
    await c.publish(uuid, node);
    await expect(c.rpc('DeleteVolume', { uuid })).rejects.toMatchObject({ code: 'IN_USE' });
    await c.unpublish(uuid, node);
    await c.rpc('DeleteVolume', { uuid });
    await c.rpc('DeleteVolume', { uuid });
    await c.rpc('DeleteVolume', { uuid: randomUUID() });
    expect((await c.pool(disk)).provisioned_bytes).toBe('0');
  });

  it('wipes what was ever granted, through a restart, and retries an agent that fails', async () => {
    const { uuid } = await c.create('pvc');
    const granted = await node.openVolume(disk, uuid, await c.publish(uuid, node));
    await node.allocate(disk, 2);
    await node.ask('ReportSlabs', disk, { claimed: [node.claim(disk, granted), node.claim(disk, granted)] });
    await node.returnVolume(disk, uuid);
    await c.unpublish(uuid, node);
    node.override.set('wipe_volume', () => ({
      error_code: 'HF_IO',
      error_message: 'the device does not answer',
    }));
    await c.rpc('DeleteVolume', { uuid });
    await until(() => node.orders.filter((order) => order.wipe_volume).length > 1, 'retried');
    expect(await c.pool(disk)).toMatchObject({ slabs_free: '1022' });
    await c.restart();
    node.override.clear();
    await node.connect();
    await until(async () => (await c.pool(disk)).slabs_free === '1024', 'wiped');
    expect(node.orders.at(-1)?.wipe_volume).toMatchObject({
      closed_epoch: granted.epoch,
      layers: [{ slabs: [{ first: '0', count: 2, generation: '1' }] }],
    });
    expect([disk.pages.size, disk.records.size]).toEqual([0, 0]);
  });

  it('of a volume that was never granted asks no agent', async () => {
    const { uuid } = await c.create('pvc');
    await c.rpc('DeleteVolume', { uuid });
    await expect(c.volume(uuid)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    expect(node.orders.some((order) => order.wipe_volume)).toBe(false);
  });
});

describe('a volume that the database does not know', () => {
  const context = (size = 1n << 30n): Record<string, string> =>
    volumeContext({ poolUuid: disk.uuid, name: 'retained', sizeBytes: size, parameters: { fs: 'xfs' } });

  it('is made again from its context when the pool has no record of it', async () => {
    const uuid = randomUUID();
    const publishId = await c.publish(uuid, node, { volume_context: context() });
    expect(await c.volume(uuid)).toMatchObject({
      name: 'retained',
      parameters: { fs: 'xfs' },
      size_bytes: gib(1),
      epoch: '0',
    });
    await node.openVolume(disk, uuid, publishId);
  });

  it('by GetVolume too', async () => {
    const uuid = randomUUID();
    expect(await c.rpc('GetVolume', { uuid, volume_context: context() })).toMatchObject({
      uuid,
      name: 'retained',
    });
  });

  it('comes back from its record with its epoch and its slabs, not empty', async () => {
    const uuid = randomUUID();
    disk.records.set(uuid, {
      volumeId: '77',
      uuid,
      name: 'renamed',
      sizeBytes: gib(3),
      state: 'closed',
      epoch: (1n << 40n) + 41n,
      hostId: 9,
      generation: '1',
      slot: 5,
      layers: [
        { layer_id: '88', slot: 6, parent_layer_id: '0', birth: '88', size_bytes: gib(3), frozen: false },
      ],
    });
    disk.pages.set(700, { generation: 400n, layerId: 88n, bad: false });
    disk.pages.set(701, { generation: 400n, layerId: 88n, bad: false });
    disk.pages.set(900, { generation: 12n, layerId: 99n, bad: false }); // somebody else's
    const publishId = await c.publish(uuid, node, { volume_context: context() });
    expect(await c.volume(uuid)).toMatchObject({
      name: 'renamed',
      size_bytes: gib(3),
      volume_id: '77',
      slot: 5,
    });
    const granted = await node.openVolume(disk, uuid, publishId);
    expect(granted.epoch).toBe(String((1n << 40n) + 42n));
    expect(granted.layers).toMatchObject([
      { layer_id: '88', slabs: [{ first: '700', count: 2, generation: '400' }] },
    ]);
    expect(await c.pool(disk)).toMatchObject({ slabs_free: '1022' });
    // What is made from now on is newer than all of it.
    const next = await c.create('next');
    expect([next.volume_id, next.layers[0]?.layer_id]).toEqual(['78', '89']);
    expect((await node.allocate(disk, 1))[0]?.generation).toBe('401');
  });

  it('is refused while the record says that a host has it open who is not dead', async () => {
    const uuid = randomUUID();
    const host = node.hosts.get(disk.uuid)!;
    disk.records.set(uuid, {
      volumeId: '77',
      uuid,
      name: 'x',
      sizeBytes: gib(1),
      state: 'open',
      epoch: 5n,
      hostId: host.host_id,
      generation: host.generation,
      slot: 5,
      layers: [
        { layer_id: '88', slot: 6, parent_layer_id: '0', birth: '88', size_bytes: gib(1), frozen: false },
      ],
    });
    await expect(c.publish(uuid, node, { volume_context: context() })).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
      message: expect.stringContaining('Fence that node first'),
    });
  });

  it('is not made empty while no agent can look at the pool', async () => {
    const uuid = randomUUID();
    node.disconnect();
    await until(
      async () =>
        (await c.rpc<{ nodes: { connected: boolean }[] }>('ListNodes')).nodes.every((one) => !one.connected),
      'away',
    );
    await expect(c.publish(uuid, node, { volume_context: context() })).rejects.toMatchObject({
      code: 'UNAVAILABLE',
    });
    await expect(c.volume(uuid)).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  it('does not take the name of another volume', async () => {
    await c.create('retained');
    await expect(c.publish(randomUUID(), node, { volume_context: context() })).rejects.toMatchObject({
      code: 'ALREADY_EXISTS',
    });
  });
});

describe('GetCapacity', () => {
  it('is what is free on the pools that are asked for and active', async () => {
    await node.allocate(disk, 24);
    const all = await c.rpc('GetCapacity');
    expect(all).toEqual({
      available_bytes: String(1000 * (16 << 20)),
      maximum_volume_bytes: '281474976645120',
      minimum_volume_bytes: '4096',
    });
    expect(await c.rpc('GetCapacity', { pool_uuids: [randomUUID()] })).toMatchObject({
      available_bytes: '0',
    });
  });
});
