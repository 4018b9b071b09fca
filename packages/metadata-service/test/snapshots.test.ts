/** Snapshots, copies, groups, readers beside each other, and what becomes of layers that nothing names. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { volumeContext } from '@holdfast/common';
import type { Grant__Output, Snapshot__Output, SnapshotGroup__Output, Volume__Output } from '@holdfast/proto';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk, until, type FakeAgent } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-snapshots-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));

let c: Cluster;
let disk: FakeDisk;
let node: FakeAgent;
let other: FakeAgent;
beforeEach(async () => {
  c = await Cluster.start({
    store: `sqlite:${directory}/${randomUUID()}.db`,
    stripIntervalMs: 200,
    compactBelow: 0,
  });
  disk = new FakeDisk();
  node = await c.node('node-1', [disk]);
  other = await c.node('node-2', [disk]);
});
afterEach(() => c.stop());

const gib = (n: number): string => String(BigInt(n) << 30n);
const events = async (uuid: string): Promise<string[]> =>
  (await c.audit({ volume_uuid: uuid })).map((record) => record.event);
const ordersTo = (agent: FakeAgent, kind: string): number =>
  agent.orders.filter((order) => order.order === kind).length;
const waiting = { code: 'DEADLINE_EXCEEDED' };

/** A volume that is open on the first node, with slabs that hold these blocks. */
async function opened(name: string, ...slabs: number[][]): Promise<{ uuid: string; grant: Grant__Output }> {
  const { uuid } = await c.create(name, { parameters: { fsType: 'xfs' } });
  const grant = await node.openVolume(disk, uuid, await c.publish(uuid, node));
  await write(uuid, ...slabs);
  return { uuid, grant };
}

async function write(uuid: string, ...slabs: number[][]): Promise<void> {
  if (slabs.length === 0) return;
  await node.allocate(disk, slabs.length);
  const claimed = slabs.map((blocks) => node.claim(disk, node.open.get(uuid)!, blocks));
  await node.ask('ReportSlabs', disk, { claimed });
}

async function closed(name: string, ...slabs: number[][]): Promise<string> {
  const { uuid } = await opened(name, ...slabs);
  await node.returnVolume(disk, uuid);
  await c.unpublish(uuid, node);
  return uuid;
}

const layerIds = async (uuid: string): Promise<string[]> =>
  (await c.volume(uuid)).layers.map((layer) => layer.layer_id);
const clone = (name: string, source: object): Promise<Volume__Output> =>
  c.create(name, { parameters: { fsType: 'xfs' }, ...source });
const free = async (): Promise<string> => (await c.pool(disk)).slabs_free;

describe('CreateSnapshot of an open volume', () => {
  it('is cut by its holder, and named when the disk has it, with every slab of the frozen layer', async () => {
    const { uuid, grant } = await opened('pvc', [1, 2]);
    const before = grant.layers[0]?.layer_id;
    await node.allocate(disk, 1);
    node.claim(disk, node.open.get(uuid)!, [3]); // not reported: the cut does
    const snapshot = await c.snapshot('snap', uuid, { parameters: { 'holdfast.io/quiesce': 'true' } });
    expect(snapshot).toMatchObject({
      state: 'READY',
      source_volume_uuid: uuid,
      size_bytes: gib(1),
      layer_id: before,
      layer_bytes: String(2 * (16 << 20)),
    });
    const volume = await c.volume(uuid);
    expect(volume.layers).toMatchObject([
      { frozen: false, parent_layer_id: snapshot.layer_id, slabs: [] },
      {
        layer_id: snapshot.layer_id,
        frozen: true,
        slabs: [
          { first: '0', count: 1 },
          { first: '1', count: 1 },
        ],
      },
    ]);
    expect([volume.grant, volume.epoch]).toEqual(['GRANT_STATE_OPEN', grant.epoch]);
    expect(node.orders.at(-1)?.cut_volumes).toMatchObject({
      cut_id: '',
      quiesce: true,
      cuts: [{ snapshot_name: 'snap', grant: null }],
    });
    expect((await events(uuid)).slice(-3)).toEqual(['cut-begin', 'cut', 'name']);
  });

  it('gives the same answer for the same name and source, and refuses the name for anything else', async () => {
    const { uuid } = await opened('pvc');
    const second = await c.create('second');
    const first = await c.snapshot('snap', uuid, { parameters: { a: '1' } });
    expect(await c.snapshot('snap', uuid, { parameters: { a: '1' } })).toEqual(first);
    await expect(c.snapshot('snap', second.uuid, { parameters: { a: '1' } })).rejects.toMatchObject({
      code: 'ALREADY_EXISTS',
    });
    await expect(c.snapshot('snap', uuid)).rejects.toMatchObject({ code: 'ALREADY_EXISTS' });
    await expect(c.snapshot('', uuid)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    await expect(c.snapshot('x', randomUUID())).rejects.toMatchObject({ code: 'NOT_FOUND' });
    expect(await layerIds(uuid)).toHaveLength(2);
  });

  it('is refused while the holder is away, and nothing is stored', async () => {
    const { uuid } = await opened('pvc');
    node.disconnect();
    await until(async () => {
      const { nodes } = await c.rpc<{ nodes: { node_id: string; connected: boolean }[] }>('ListNodes');
      return nodes.some((one) => one.node_id === node.nodeId && !one.connected);
    }, 'away');
    await expect(c.snapshot('snap', uuid)).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
      message: expect.stringContaining('unpublish the volume'),
    });
    expect(await c.rpc('ListSnapshots')).toMatchObject({ snapshots: [] });
    expect(await events(uuid)).not.toContain('cut-begin');
    await node.connect();
    expect(await c.snapshot('snap', uuid)).toMatchObject({ state: 'READY' });
  });

  it('whose answer is lost is repeated, through restarts of the agent and of the service, and cut once', async () => {
    const { uuid } = await opened('pvc', [1]);
    node.loseAnswers.add('cut_volumes');
    const first = c.snapshot('snap', uuid, {}, 400);
    await expect(first).rejects.toMatchObject(waiting);
    expect(disk.records.get(uuid)?.layers).toHaveLength(2);
    // The new top is written to before the service knows of it.
    await node.allocate(disk, 1);
    await node.ask('ReportSlabs', disk, { claimed: [node.claim(disk, node.open.get(uuid)!, [9])] });
    node.disconnect();
    await c.restart();
    await node.connect();
    await other.connect();
    await until(() => ordersTo(node, 'cut_volumes') > 1, 'repeated');
    await expect(c.snapshot('snap', uuid, {}, 300)).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    node.loseAnswers.clear();
    node.disconnect();
    await node.connect();
    expect(await c.snapshot('snap', uuid)).toMatchObject({ state: 'READY' });
    const { layers } = await c.volume(uuid);
    expect(layers.map((layer) => layer.slabs.map((run) => run.first))).toEqual([['1'], ['0']]);
    expect(disk.records.get(uuid)?.layers).toHaveLength(2);
  });

  it.each([
    ['did happen', true],
    ['did not happen', false],
  ])(
    'whose holder is killed: the record says that it %s, and nobody opens the volume before that is known',
    async (_what, happened) => {
      const { uuid } = await opened('pvc', [1]);
      if (happened) node.loseAnswers.add('cut_volumes');
      else node.mute.add('cut_volumes');
      await expect(c.snapshot('snap', uuid, {}, 400)).rejects.toMatchObject(waiting);
      other.mute.add('read_volume_record');
      node.kill();
      await c.unpublish(uuid, node);
      const publishId = await c.publish(uuid, other);
      const staged = other.openVolume(disk, uuid, publishId).catch(() => undefined);
      await until(() => ordersTo(other, 'read_volume_record') > 0, 'asked for the record');
      expect(await c.volume(uuid)).toMatchObject({ grant: 'GRANT_STATE_FREE' });
      await c.restart();
      other.mute.clear();
      await other.connect();
      await staged;
      await other.accepted(disk);
      await other.openVolume(disk, uuid, publishId);
      const snapshot = await c.snapshot('snap', uuid);
      const { layers } = await c.volume(uuid);
      expect(layers.map((layer) => layer.slabs.length)).toEqual([0, 1]);
      expect(snapshot.layer_id).toBe(layers[1]?.layer_id);
      expect(ordersTo(other, 'cut_volumes')).toBe(happened ? 0 : 1);
    },
  );

  it('that fails at the holder is tried again, and says what it waits for', async () => {
    const { uuid } = await opened('pvc');
    node.override.set('cut_volumes', () => ({
      error_code: 'HF_IO',
      error_message: 'the device does not answer.',
    }));
    await expect(c.snapshot('snap', uuid, {}, 3000)).rejects.toThrow(
      /pvc is being cut \(the device does not answer\)/,
    );
    await expect(c.rpc('DeleteVolume', { uuid })).rejects.toMatchObject({ code: 'IN_USE' });
    await expect(c.rpc('ExpandVolume', { uuid, size_bytes: gib(2) })).rejects.toMatchObject({
      code: 'OPERATION_PENDING',
    });
    await expect(c.snapshot('snap-2', uuid)).rejects.toMatchObject({ code: 'OPERATION_PENDING' });
    node.override.clear();
    expect(await c.snapshot('snap', uuid)).toMatchObject({ state: 'READY' });
  });

  it('that is deleted because its file system can never be frozen is cut without that', async () => {
    const { uuid } = await opened('pvc', [1]);
    node.override.set('cut_volumes', (order) =>
      order.cut_volumes?.quiesce === false
        ? node.answer(order, disk)
        : { error_code: 'FAILED_PRECONDITION', error_message: 'its mount cannot be seen.' },
    );
    const parameters = { 'holdfast.io/quiesce': 'true' };
    await expect(c.snapshot('snap', uuid, { parameters }, 600)).rejects.toThrow(/its mount cannot be seen/);
    const { uuid: snapshot } = await c.rpc<Snapshot__Output>('GetSnapshot', { name: 'snap' });
    await c.rpc('DeleteSnapshot', { uuid: snapshot });
    await until(async () => (await events(uuid)).includes('cut'), 'cut');
    expect(await c.snapshot('next', uuid)).toMatchObject({ state: 'READY' });
  });

  it('that is deleted before it was cut leaves a folded layer, not a name', async () => {
    const { uuid } = await opened('pvc', [1]);
    node.override.set('cut_volumes', () => ({ error_code: 'HF_IO', error_message: 'no' }));
    await expect(c.snapshot('snap', uuid, {}, 300)).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    const { uuid: snapshot } = await c.rpc<Snapshot__Output>('GetSnapshot', { name: 'snap' });
    await c.rpc('DeleteSnapshot', { uuid: snapshot });
    await c.rpc('DeleteSnapshot', { uuid: snapshot });
    node.override.clear();
    await until(async () => (await layerIds(uuid)).length === 2, 'cut');
    await expect(c.rpc('GetSnapshot', { uuid: snapshot })).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  it('takes back slabs that the holder had emptied before, after the layer froze', async () => {
    const { uuid } = await opened('pvc', [1], [2]);
    const [, emptied] = node.claimsOf(disk.uuid, node.open.get(uuid)!);
    disk.pages.delete(1);
    await c.snapshot('snap', uuid);
    await node.ask('ReturnSlabs', disk, { emptied: [emptied] });
    expect((await c.volume(uuid)).layers[1]?.slabs).toMatchObject([{ first: '0', count: 1 }]);
    await expect(
      other.ask('ReturnSlabs', disk, { emptied: node.claimsOf(disk.uuid, (await c.volume(uuid)) as never) }),
    ).resolves.toEqual({});
  });
});

describe('a slab that was claimed and emptied around a cut, before its claim was reported', () => {
  it('is free again, and not the stock of its host for ever', async () => {
    const { uuid } = await opened('pvc', [1]);
    const before = await c.pool(disk);
    await node.allocate(disk, 1);
    const claim = node.claim(disk, node.open.get(uuid)!, [2]);
    // The cut finds it empty, and does not name it.
    disk.pages.delete(1);
    await c.snapshot('snap', uuid);
    await node.ask('ReportSlabs', disk, { claimed: [claim] });
    expect((await c.volume(uuid)).layers[1]?.slabs).toMatchObject([{ first: '0', count: 1 }]);
    await node.ask('ReturnSlabs', disk, { emptied: [claim] });
    const { slabs_free, slabs_ahead } = await c.pool(disk);
    expect({ slabs_free, slabs_ahead }).toEqual({
      slabs_free: before.slabs_free,
      slabs_ahead: before.slabs_ahead,
    });
    await expect(node.ask('ReturnSlabs', disk, { emptied: [claim] })).rejects.toMatchObject({
      code: 'STALE',
    });
    await expect(node.ask('ReportSlabs', disk, { claimed: [claim] })).rejects.toMatchObject({
      code: 'STALE',
    });
  });
});

describe('CreateSnapshot of a closed volume', () => {
  it('is cut by a live agent under a grant of its own, which comes back with the answer', async () => {
    const uuid = await closed('pvc', [1]);
    const before = BigInt((await c.volume(uuid)).epoch);
    const snapshot = await c.snapshot('snap', uuid);
    const volume = await c.volume(uuid);
    expect(volume).toMatchObject({ grant: 'GRANT_STATE_FREE', epoch: String(before + 1n), publications: [] });
    expect(volume.layers.map((layer) => layer.slabs.length)).toEqual([0, 1]);
    expect(snapshot.layer_id).toBe(volume.layers[1]?.layer_id);
    expect((await events(uuid)).slice(-5)).toEqual(['cut-begin', 'grant', 'cut', 'name', 'returned']);
    const grant = await other.openVolume(disk, uuid, await c.publish(uuid, other));
    expect(grant.layers.map((layer) => layer.layer_id)).toEqual(await layerIds(uuid));
  });

  it('that was never opened works the same way', async () => {
    const { uuid } = await c.create('pvc');
    expect(await c.snapshot('snap', uuid)).toMatchObject({ state: 'READY', layer_bytes: '0' });
    expect(disk.records.get(uuid)).toMatchObject({ state: 'closed' });
  });

  it('by an agent that falls silent is revoked like any other, and done by somebody else', async () => {
    const uuid = await closed('pvc', [1]);
    for (const agent of [node, other])
      agent.override.set('cut_volumes', () => ({ error_code: 'HF_IO', error_message: 'no' }));
    const cut = c.snapshot('snap', uuid);
    await until(async () => (await events(uuid)).includes('revoked'), 'revoked');
    node.kill();
    other.override.clear();
    expect(await cut).toMatchObject({ state: 'READY' });
    expect(await events(uuid)).toContain('revoke');
  });

  it('makes a stage wait, not fail, and a delete repeat', async () => {
    const uuid = await closed('pvc');
    for (const agent of [node, other]) agent.mute.add('cut_volumes');
    const cut = c.snapshot('snap', uuid, {}, 20_000);
    await until(() => ordersTo(node, 'cut_volumes') + ordersTo(other, 'cut_volumes') > 0, 'ordered');
    await expect(c.rpc('DeleteVolume', { uuid })).rejects.toMatchObject({ code: 'OPERATION_PENDING' });
    const publishId = await c.publish(uuid, node);
    const short = node.ask('StageVolume', disk, { volume_uuid: uuid, publish_id: publishId }, 2500);
    await expect(short).rejects.toMatchObject({
      code: 'DEADLINE_EXCEEDED',
      message: expect.stringContaining('being cut'),
    });
    const opening = node.openVolume(disk, uuid, publishId);
    for (const agent of [node, other]) agent.mute.clear();
    for (const agent of [node, other]) {
      agent.disconnect();
      await agent.connect();
    }
    expect((await opening).layers).toHaveLength(2);
    expect(await cut).toMatchObject({ state: 'READY' });
  });

  it('is refused while nodes read it beside each other', async () => {
    const uuid = await closed('pvc');
    await node.openVolume(
      disk,
      uuid,
      await c.publish(uuid, node, { access_mode: 'ACCESS_MODE_MULTI_NODE_READER_ONLY' }),
    );
    await expect(c.snapshot('snap', uuid)).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
  });
});

describe('copies', () => {
  it('of a snapshot share its layers, at its size or more, with its file system, on its pool', async () => {
    const { uuid } = await opened('pvc', [1]);
    const snapshot = await c.snapshot('snap', uuid);
    const source = { source_snapshot_uuid: snapshot.uuid };
    const copy = await c.create('copy', { ...source, size_bytes: gib(2) });
    expect(copy).toMatchObject({
      state: 'READY',
      parameters: { fsType: 'xfs' },
      size_bytes: gib(2),
      ...source,
    });
    expect(copy.layers).toMatchObject([
      { parent_layer_id: snapshot.layer_id, size_bytes: gib(2) },
      { layer_id: snapshot.layer_id, size_bytes: gib(1), slabs: [{ first: '0', count: 1 }] },
    ]);
    expect((await c.create('copy', { ...source, size_bytes: gib(2) })).uuid).toBe(copy.uuid);
    await expect(c.create('copy', { size_bytes: gib(2) })).rejects.toMatchObject({ code: 'ALREADY_EXISTS' });
    await expect(c.create('copy', { source_volume_uuid: uuid, size_bytes: gib(2) })).rejects.toMatchObject({
      code: 'ALREADY_EXISTS',
    });
    await expect(c.create('small', { ...source, size_bytes: '4096' })).rejects.toMatchObject({
      code: 'OUT_OF_RANGE',
    });
    await expect(c.create('ext4', { ...source, parameters: { fsType: 'ext4' } })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    await expect(c.create('away', { ...source, pool_uuids: [randomUUID()] })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    await expect(c.create('gone', { source_snapshot_uuid: randomUUID() })).rejects.toMatchObject({
      code: 'NOT_FOUND',
    });
    await expect(c.create('two', { ...source, source_volume_uuid: uuid })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    const grant = await other.openVolume(disk, copy.uuid, await c.publish(copy.uuid, other));
    expect(grant.layers.map((layer) => layer.layer_id)).toEqual(copy.layers.map((layer) => layer.layer_id));
    expect(await c.volume(uuid)).toMatchObject({ own_bytes: '0', shared_bytes: String(16 << 20) });
  });

  it('of a volume cut it first, and appear when that has happened, through a restart', async () => {
    const { uuid } = await opened('pvc', [1]);
    node.mute.add('cut_volumes');
    const request = { name: 'copy', size_bytes: gib(1), source_volume_uuid: uuid, request_id: randomUUID() };
    await expect(c.rpc('CreateVolume', request, 400)).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    expect(await c.rpc('ListVolumes')).toMatchObject({ volumes: [{ uuid }] });
    const { uuid: early } = await c.rpc<Volume__Output>('GetVolume', { name: 'copy' });
    await expect(c.publish(early, node)).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    node.disconnect();
    await c.restart();
    node.mute.clear();
    await node.connect();
    const copy = await c.rpc<Volume__Output>('CreateVolume', request);
    const source = await c.volume(uuid);
    expect(copy).toMatchObject({ uuid: early, state: 'READY', source_volume_uuid: uuid });
    expect(copy.layers[1]?.layer_id).toBe(source.layers[1]?.layer_id);
    expect((await c.rpc<{ snapshots: unknown[] }>('ListSnapshots')).snapshots).toEqual([]);
  });

  it('that are deleted before they exist leave the source as it is, cut', async () => {
    const { uuid } = await opened('pvc');
    node.override.set('cut_volumes', () => ({ error_code: 'HF_IO', error_message: 'no' }));
    await expect(
      c.rpc('CreateVolume', { name: 'copy', size_bytes: gib(1), source_volume_uuid: uuid }, 300),
    ).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    const { uuid: early } = await c.rpc<Volume__Output>('GetVolume', { name: 'copy' });
    await c.rpc('DeleteVolume', { uuid: early });
    node.override.clear();
    await until(async () => (await events(uuid)).includes('cut'), 'cut');
    await expect(c.volume(early)).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  it('outlive the snapshot and the volume that they were made from', async () => {
    const { uuid } = await opened('pvc', [1]);
    const snapshot = await c.snapshot('snap', uuid);
    const copy = await clone('copy', { source_snapshot_uuid: snapshot.uuid });
    await write(uuid, [2]);
    await node.returnVolume(disk, uuid);
    await c.unpublish(uuid, node);
    await c.rpc('DeleteVolume', { uuid });
    await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
    await until(async () => (await free()) === '1023', 'the source has gone, but for what the copy needs');
    expect((await c.volume(copy.uuid)).layers[1]?.slabs).toMatchObject([{ first: '0', count: 1 }]);
    expect(await c.volume(copy.uuid)).toMatchObject({ own_bytes: String(16 << 20), shared_bytes: '0' });
    await c.rpc('DeleteVolume', { uuid: copy.uuid });
    await until(async () => (await free()) === '1024', 'all free');
    expect(disk.pages.size).toBe(0);
  });
});

describe('deleting snapshots', () => {
  it('of a deleted volume wipes their layers, the newest first', async () => {
    const { uuid } = await opened('pvc', [1]);
    const first = await c.snapshot('a', uuid);
    await write(uuid, [2]);
    const second = await c.snapshot('b', uuid);
    await node.returnVolume(disk, uuid);
    await c.unpublish(uuid, node);
    await c.rpc('DeleteVolume', { uuid });
    await until(async () => (await events(uuid)).includes('wiped'), 'the top is wiped');
    expect(await free()).toBe('1022');
    await c.rpc('DeleteSnapshot', { uuid: first.uuid }); // still needed by the second
    await c.rpc('DeleteSnapshot', { uuid: second.uuid });
    await until(async () => (await free()) === '1024', 'free');
    // The folded one was tombstoned, the other one too; all slots are free again.
    await until(
      () => disk.tombstones.has(first.layer_id) && disk.tombstones.has(second.layer_id),
      'tombstones',
    );
    expect(disk.pages.size).toBe(0);
  });

  it('strips what newer layers cover, has every holder forget it, and only then wipes it', async () => {
    const { uuid } = await opened('pvc', [1, 2], [3, 4], [5]);
    const snapshot = await c.snapshot('snap', uuid);
    const copySource = await c.snapshot('copied', uuid);
    const copy = await clone('copy', { source_snapshot_uuid: copySource.uuid });
    await other.openVolume(disk, copy.uuid, await c.publish(copy.uuid, other));
    await write(uuid, [1, 2, 3]);
    node.mute.add('forget_slabs');
    await c.rpc('DeleteSnapshot', { uuid: copySource.uuid });
    await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
    // Two volumes are above it: their common layer is nobody's alone, and nothing is stripped.
    await new Promise((resolve) => setTimeout(resolve, 800));
    expect([0, 1, 2].map((slab) => [...(disk.pages.get(slab)?.blocks ?? [])])).toEqual([[1, 2], [3, 4], [5]]);
    await other.returnVolume(disk, copy.uuid);
    await c.unpublish(copy.uuid, other);
    await c.rpc('DeleteVolume', { uuid: copy.uuid });
    await until(() => ordersTo(node, 'forget_slabs') > 0, 'told to forget');
    expect(disk.pages.has(0)).toBe(true);
    expect(await free()).toBe('1020'); // 4 claimed, the empty layer was removed
    expect((await c.volume(uuid)).layers.at(-1)?.slabs).toMatchObject([{ first: '1', count: 2 }]);
    await c.restart();
    await node.connect();
    await other.connect();
    node.mute.clear();
    node.disconnect();
    await node.connect();
    await until(() => !disk.pages.has(0), 'wiped');
    await until(async () => (await free()) === '1021', 'free');
    expect(node.forgotten).toEqual([0]);
    const audit = await c.audit({ volume_uuid: uuid });
    expect(audit.find((record) => record.event === 'forgot')?.proof).toContain('acknowledged by its holder');
    expect(Number((await c.volume(uuid)).reclaimable_bytes)).toBeGreaterThan(0);
  });

  it('removes a layer that is all covered, and its record when every holder has dropped it or is gone', async () => {
    const { uuid } = await opened('pvc', [1]);
    const snapshot = await c.snapshot('snap', uuid);
    await write(uuid, [1]);
    await until(async () => (await free()) === '1022', 'reported');
    const drops = (order: (typeof node.orders)[number]): boolean =>
      (order.forget_slabs?.layers.length ?? 0) > 0;
    node.override.set('forget_slabs', (order) =>
      drops(order) ? { error_code: 'HF_INVALID_ARGUMENT', error_message: 'it holds a slab' } : {},
    );
    await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
    await until(async () => (await layerIds(uuid)).length === 1, 'removed from the chain');
    expect(await free()).toBe('1023');
    await until(() => node.orders.some(drops), 'the holder is asked');
    expect(disk.tombstones.size).toBe(0);
    await node.returnVolume(disk, uuid);
    await until(() => disk.tombstones.has(snapshot.layer_id), 'tombstone');
    const slots = (await c.create('next')).layers[0]?.slot;
    await c.unpublish(uuid, node);
    // The top's record on the disk still names it: its slot is not used again before that one is gone.
    expect(slots).toBe(2);
    await c.rpc('DeleteVolume', { uuid });
    await until(async () => (await free()) === '1024', 'free');
    expect((await c.create('after')).layers[0]?.slot).toBe(0);
  });

  it('strips again while the head goes on changing, and gives the job to another when its agent is dead', async () => {
    const { uuid } = await opened('pvc', [1, 2]);
    const snapshot = await c.snapshot('snap', uuid);
    await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
    const strips = (): number => ordersTo(node, 'strip_layers') + ordersTo(other, 'strip_layers');
    await until(() => strips() > 0, 'stripped');
    await write(uuid, [1]);
    const before = strips();
    await until(() => strips() > before, 'stripped again');
    for (const agent of [node, other]) agent.mute.add('strip_layers');
    await write(uuid, [2]);
    const count = strips();
    await until(() => strips() > count, 'ordered');
    const doing = [node, other].find((agent) => agent.orders.at(-1)?.strip_layers)!;
    const idle = doing === node ? other : node;
    const asked = ordersTo(idle, 'strip_layers');
    doing.disconnect();
    await new Promise((resolve) => setTimeout(resolve, 700));
    expect(ordersTo(idle, 'strip_layers')).toBe(asked);
    idle.mute.clear();
    doing.kill();
    await c.rpc('FenceNode', { node_id: doing.nodeId });
    await until(() => ordersTo(idle, 'strip_layers') > asked, 'given to the other');
  });

  it('waits for the node that wipes: two wipes at once are never ordered', async () => {
    const uuid = await closed('pvc', [1]);
    for (const agent of [node, other]) agent.mute.add('wipe_volume');
    await c.rpc('DeleteVolume', { uuid });
    await until(() => ordersTo(node, 'wipe_volume') + ordersTo(other, 'wipe_volume') > 0, 'ordered');
    const [doing, idle] = ordersTo(node, 'wipe_volume') > 0 ? [node, other] : [other, node];
    idle.mute.clear();
    doing.disconnect();
    await new Promise((resolve) => setTimeout(resolve, 700));
    expect(ordersTo(idle, 'wipe_volume')).toBe(0);
    doing.mute.clear();
    await doing.connect();
    await until(async () => (await free()) === '1024', 'wiped');
    expect(ordersTo(idle, 'wipe_volume')).toBe(0);
  });
});

describe('the record slots of removed layers', () => {
  /** A volume whose snapshots come and go until one is refused, or `times`. */
  async function rotate(keepsParents: boolean, times: number, staysOpen = false): Promise<number> {
    await c.restart({ compactBelow: 0 }); // the data stays in the layer that it is in
    const small = new FakeDisk();
    small.layerSlots = 5;
    small.keepsParents = keepsParents;
    const agent = await c.node('node-3', [small], { machineId: 'machine-3' });
    const { uuid } = await c.create('rotated', { pool_uuids: [small.uuid] });
    const grant = await agent.openVolume(small, uuid, await c.publish(uuid, agent));
    await agent.allocate(small, 1);
    await agent.ask('ReportSlabs', small, { claimed: [agent.claim(small, grant, [1])] });
    if (!staysOpen) {
      await agent.returnVolume(small, uuid);
      await c.unpublish(uuid, agent);
    }
    for (let n = 0; n < times; n++) {
      const snapshot = await c.snapshot(`snap-${n}`, uuid).catch((error: { code: string }) => {
        if (error.code !== 'TOO_MANY') throw error;
      });
      if (!snapshot) return n;
      await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
      // The first one holds the data; every other one is empty, and goes.
      if (n > 0) await until(() => small.tombstones.has(snapshot.layer_id), `tombstone ${n}`);
    }
    expect((await c.volume(uuid)).layers.map((layer) => layer.slabs.length)).toEqual([0, 1]);
    const parents = small.records.get(uuid)?.layers.map((layer) => layer.parent_layer_id);
    expect(parents?.slice(2, -1).every((parent) => parent === parents.at(-2))).toBe(true);
    return times;
  }

  it('come back: before a layer is deleted, its record names the living one below', async () => {
    expect(await rotate(false, 7)).toBe(7);
  }, 60_000);

  it('come back while the volume stays open: its holder drops the layer first', async () => {
    expect(await rotate(false, 7, true)).toBe(7);
  }, 60_000);

  it('are kept for as long as the disk says that a record names them', async () => {
    expect(await rotate(true, 7)).toBe(4);
  }, 60_000);
});

describe('ListSnapshots', () => {
  it('goes page by page, filters, and refuses tokens of others', async () => {
    const { uuid } = await opened('pvc');
    const second = await c.create('second');
    const made = [
      await c.snapshot('a', uuid),
      await c.snapshot('b', uuid),
      await c.snapshot('c', second.uuid),
    ];
    const list = (request: object): Promise<{ snapshots: Snapshot__Output[]; next_token: string }> =>
      c.rpc('ListSnapshots', request);
    const seen: string[] = [];
    let token = '';
    do {
      const page = await list({ max_entries: 1, starting_token: token });
      seen.push(...page.snapshots.map((one) => one.uuid));
      token = page.next_token;
    } while (token !== '');
    expect(seen.toSorted()).toEqual(made.map((one) => one.uuid).toSorted());
    expect((await list({ source_volume_uuid: uuid })).snapshots).toHaveLength(2);
    const first = await list({ source_volume_uuid: uuid, max_entries: 1 });
    expect(
      (await list({ source_volume_uuid: uuid, max_entries: 1, starting_token: first.next_token })).snapshots,
    ).toHaveLength(1);
    expect((await list({ snapshot_uuid: made[2]?.uuid })).snapshots).toMatchObject([{ name: 'c' }]);
    for (const nobody of [{ snapshot_uuid: randomUUID() }, { source_volume_uuid: 'nonsense' }]) {
      expect(await list(nobody)).toEqual({ snapshots: [], next_token: '' });
    }
    await expect(list({ starting_token: 'garbage' })).rejects.toMatchObject({ code: 'BAD_TOKEN' });
  });
});

describe('readers beside each other', () => {
  const reading = { access_mode: 'ACCESS_MODE_MULTI_NODE_READER_ONLY' };

  it('each have a grant of their own, and no writer beside them', async () => {
    const uuid = await closed('pvc', [1]);
    const writerEpoch = BigInt((await c.volume(uuid)).epoch);
    const grants = [
      await node.openVolume(disk, uuid, await c.publish(uuid, node, reading)),
      await other.openVolume(disk, uuid, await c.publish(uuid, other, reading)),
    ];
    expect(grants.map((grant) => [grant.read_only, BigInt(grant.epoch)])).toEqual([
      [true, writerEpoch + 1n],
      [true, writerEpoch + 2n],
    ]);
    expect(await c.volume(uuid)).toMatchObject({
      grant: 'GRANT_STATE_FREE',
      readers: [{ node_id: node.nodeId, grant: 'GRANT_STATE_OPEN' }, { node_id: other.nodeId }],
      publications: [{ node_id: node.nodeId }, { node_id: other.nodeId }],
    });
    await expect(c.publish(uuid, node)).rejects.toMatchObject({ code: 'ALREADY_EXISTS' });
    const third = await c.node('node-3', [disk]);
    await expect(c.publish(uuid, third)).rejects.toMatchObject({ code: 'PUBLISHED_ELSEWHERE' });
    await expect(c.rpc('DeleteVolume', { uuid })).rejects.toMatchObject({ code: 'IN_USE' });
    await node.returnVolume(disk, uuid);
    await c.unpublish(uuid, node);
    other.kill();
    await c.unpublish(uuid, other); // fenced
    expect(await c.volume(uuid)).toMatchObject({ readers: [], publications: [] });
    const writer = await third.openVolume(disk, uuid, await c.publish(uuid, third));
    expect(BigInt(writer.epoch)).toBe(writerEpoch + 3n);
    await expect(c.publish(uuid, node, reading)).rejects.toMatchObject({ code: 'PUBLISHED_ELSEWHERE' });
  });

  it('are taken back together when every node is meant, and one by one when one is', async () => {
    const uuid = await closed('pvc');
    for (const agent of [node, other])
      await agent.openVolume(disk, uuid, await c.publish(uuid, agent, reading));
    await c.unpublish(uuid, node);
    expect((await c.volume(uuid)).readers).toMatchObject([{ node_id: other.nodeId }]);
    await node.openVolume(disk, uuid, await c.publish(uuid, node, reading));
    await c.rpc('UnpublishVolume', { uuid, node_id: '' });
    expect(await c.volume(uuid)).toMatchObject({ readers: [], publications: [] });
  });

  it('are known again when their agents come back', async () => {
    const uuid = await closed('pvc');
    await node.openVolume(disk, uuid, await c.publish(uuid, node, reading));
    node.disconnect();
    await c.restart();
    await node.connect();
    expect((await c.volume(uuid)).readers).toMatchObject([
      { node_id: node.nodeId, grant: 'GRANT_STATE_OPEN' },
    ]);
    expect(node.orders.some((order) => order.revoke)).toBe(false);
  });

  it('keep slabs from being wiped until they have forgotten them or are dead', async () => {
    const { uuid } = await opened('pvc', [1]);
    await c.snapshot('a', uuid);
    await write(uuid, [1]);
    const b = await c.snapshot('b', uuid);
    const copy = await clone('copy', { source_snapshot_uuid: b.uuid });
    await other.openVolume(disk, copy.uuid, await c.publish(copy.uuid, other, reading));
    other.mute.add('forget_slabs');
    await c.rpc('DeleteSnapshot', {
      uuid: (await c.rpc<Snapshot__Output>('GetSnapshot', { name: 'a' })).uuid,
    });
    await until(() => node.forgotten.length > 0 && ordersTo(other, 'forget_slabs') > 0, 'both are told');
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect(disk.pages.has(0)).toBe(true);
    other.kill();
    await c.unpublish(copy.uuid, other);
    await until(() => !disk.pages.has(0), 'wiped');
  });

  it('are told of the slabs of now when a stage is repeated', async () => {
    const { uuid } = await opened('pvc', [1], [7]);
    await c.snapshot('a', uuid);
    await write(uuid, [1]);
    const b = await c.snapshot('b', uuid);
    const copy = await clone('copy', { source_snapshot_uuid: b.uuid });
    const request = {
      request_id: randomUUID(),
      volume_uuid: copy.uuid,
      publish_id: await c.publish(copy.uuid, other, reading),
    };
    const first = await other.ask<Grant__Output>('StageVolume', disk, request);
    expect(first.layers.at(-1)?.slabs).toMatchObject([{ first: '0', count: 2 }]);
    await c.rpc('DeleteSnapshot', {
      uuid: (await c.rpc<Snapshot__Output>('GetSnapshot', { name: 'a' })).uuid,
    });
    await until(() => node.forgotten.length > 0, 'stripped');
    // Its first answer may still be on its way: nothing is wiped before it has opened and forgotten.
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect([disk.pages.has(0), ordersTo(other, 'forget_slabs')]).toEqual([true, 0]);
    const again = await other.ask<Grant__Output>('StageVolume', disk, request);
    expect([again.epoch, again.layers.at(-1)?.slabs.length]).toEqual([first.epoch, 1]);
    other.open.set(copy.uuid, again);
    await other.ask('VolumeOpened', disk, { volume_uuid: copy.uuid, epoch: again.epoch });
    await until(() => !disk.pages.has(0), 'wiped');
    await other.returnVolume(disk, copy.uuid);
    await expect(other.ask('StageVolume', disk, request)).rejects.toMatchObject({ code: 'STALE' });
  });
});

describe('groups', () => {
  const group = (name: string, ...uuids: string[]): Promise<SnapshotGroup__Output> =>
    c.rpc('CreateSnapshotGroup', { name, source_volume_uuids: uuids }, 20_000);

  it('hold all open members, cut all, and name all together; closed ones are cut within the hold', async () => {
    const a = await opened('a', [1]);
    const b = await closed('b', [2]);
    const d = await c.create('d');
    await other.openVolume(disk, d.uuid, await c.publish(d.uuid, other));
    const made = await group('g', a.uuid, b, d.uuid);
    expect(made).toMatchObject({ state: 'READY', name: 'g' });
    expect(made.snapshots.map((one) => [one.state, one.group_uuid])).toEqual(
      [a.uuid, b, d.uuid].map(() => ['READY', made.uuid]),
    );
    expect(ordersTo(node, 'hold_volumes') + ordersTo(other, 'hold_volumes')).toBe(2);
    // What is open is cut under the hold, and refused when that is over.
    const cutId = node.orders.find((order) => order.hold_volumes)?.hold_volumes?.cut_id;
    const cut = node.orders.find((order) => order.cut_volumes?.cuts[0]?.volume_uuid === a.uuid);
    expect([cut?.cut_volumes?.cut_id, cutId]).toEqual([expect.stringMatching(/./), cut?.cut_volumes?.cut_id]);
    expect((await c.volume(b)).grant).toBe('GRANT_STATE_FREE');
    expect(await group('g', d.uuid, b, a.uuid)).toEqual(made);
    await expect(group('g', a.uuid)).rejects.toMatchObject({ code: 'ALREADY_EXISTS' });
    await expect(group('none')).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    expect(await c.rpc('GetSnapshotGroup', { uuid: made.uuid })).toEqual(made);
    await c.rpc('DeleteSnapshotGroup', { uuid: made.uuid });
    await c.rpc('DeleteSnapshotGroup', { uuid: made.uuid });
    expect((await c.rpc<{ snapshots: unknown[] }>('ListSnapshots')).snapshots).toEqual([]);
  });

  it('start again when one member is not held any more, and name nothing meanwhile', async () => {
    const a = await opened('a', [1]);
    const d = await c.create('d');
    await other.openVolume(disk, d.uuid, await c.publish(d.uuid, other));
    let refusals = 1;
    other.override.set('cut_volumes', () => {
      if (--refusals <= 0) other.override.clear();
      return { error_code: 'HF_HOLD_EXPIRED', error_message: 'too late' };
    });
    const made = await group('g', a.uuid, d.uuid);
    expect(made.state).toBe('READY');
    expect(ordersTo(node, 'hold_volumes')).toBe(2);
    const failed = (await c.audit()).filter((record) => record.event === 'group-failed');
    expect(failed).toMatchObject([{ detail: expect.stringContaining('not all were cut while held') }]);
    // What the failed attempt cut is frozen for nobody, and goes.
    const names = made.snapshots.map((one) => one.layer_id);
    await until(async () => (await layerIds(d.uuid)).length === 2, 'the empty layer is removed');
    expect(names).toHaveLength(2);
  });

  it('are given up when it never works: nothing is named, and the call says so', async () => {
    const a = await opened('a');
    node.override.set('hold_volumes', () => ({ error_code: 'HF_BUSY', error_message: 'held already' }));
    await expect(group('g', a.uuid)).rejects.toMatchObject({ code: 'OPERATION_PENDING' });
    expect((await c.rpc<{ snapshots: unknown[] }>('ListSnapshots')).snapshots).toEqual([]);
    expect(await layerIds(a.uuid)).toHaveLength(1);
    node.override.clear();
    expect(await group('g', a.uuid)).toMatchObject({ state: 'READY' });
  });

  it('go on after a restart in the middle, by repeating the cuts that were held', async () => {
    const a = await opened('a', [1]);
    node.loseAnswers.add('cut_volumes');
    const first = c.rpc('CreateSnapshotGroup', { name: 'g', source_volume_uuids: [a.uuid] }, 400);
    await expect(first).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    node.disconnect();
    await c.restart();
    node.loseAnswers.clear();
    await node.connect();
    expect(await group('g', a.uuid)).toMatchObject({ state: 'READY' });
    expect(disk.records.get(a.uuid)?.layers).toHaveLength(2);
  });

  it('fail as one when a holder dies before its cut', async () => {
    const a = await opened('a', [1]);
    const d = await c.create('d');
    await other.openVolume(disk, d.uuid, await c.publish(d.uuid, other));
    other.mute.add('cut_volumes');
    const third = await c.node('node-3', [disk]);
    const first = c.rpc('CreateSnapshotGroup', { name: 'g', source_volume_uuids: [a.uuid, d.uuid] }, 600);
    await expect(first).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    other.kill();
    await c.unpublish(d.uuid, other);
    const made = await group('g', a.uuid, d.uuid);
    expect(made.state).toBe('READY');
    expect((await c.audit()).some((record) => record.detail.includes('let go of before it was cut'))).toBe(
      true,
    );
    await third.openVolume(disk, d.uuid, await c.publish(d.uuid, third));
  });
});

describe('ListChanges', () => {
  const changes = (request: object): Promise<{ offset: string; length: string }[]> =>
    new Promise((resolve, reject) => {
      const ranges: { offset: string; length: string }[] = [];
      c.client
        .ListChanges({ max_ranges: 2, ...request })
        .on('data', (page: { ranges: typeof ranges }) => ranges.push(...page.ranges))
        .on('error', reject)
        .on('end', () => resolve(ranges));
    });
  const blocks = (ranges: { offset: string }[]): number[] => ranges.map((one) => Number(one.offset) / 4096);

  it('gives what the layers between have, page by page, and refuses snapshots of other chains', async () => {
    const { uuid } = await opened('pvc', [1, 2, 3]);
    const a = await c.snapshot('a', uuid);
    await write(uuid, [2, 9], [11]);
    const b = await c.snapshot('b', uuid);
    await write(uuid, [12]);
    expect(blocks(await changes({ base_snapshot_uuid: a.uuid, target_snapshot_uuid: b.uuid }))).toEqual([
      2, 9, 11,
    ]);
    expect(blocks(await changes({ target_snapshot_uuid: b.uuid }))).toEqual([1, 2, 3, 9, 11]);
    expect(
      blocks(await changes({ target_snapshot_uuid: b.uuid, starting_offset: String(3 * 4096) })),
    ).toEqual([3, 9, 11]);
    expect(await changes({ base_snapshot_uuid: b.uuid, target_snapshot_uuid: b.uuid })).toEqual([]);
    await expect(changes({ base_snapshot_uuid: b.uuid, target_snapshot_uuid: a.uuid })).rejects.toMatchObject(
      { code: 3 },
    );
    await expect(changes({ target_snapshot_uuid: randomUUID() })).rejects.toMatchObject({ code: 5 });
  });

  it('keeps its layers while it reads, also when their names are dropped', async () => {
    const { uuid } = await opened('pvc', [1, 2, 3]);
    const a = await c.snapshot('a', uuid);
    await write(uuid, [1, 2, 3]);
    for (const agent of [node, other]) agent.mute.add('read_changes');
    const reading = changes({ target_snapshot_uuid: a.uuid });
    await until(() => ordersTo(node, 'read_changes') + ordersTo(other, 'read_changes') > 0, 'reading');
    await c.rpc('DeleteSnapshot', { uuid: a.uuid });
    await new Promise((resolve) => setTimeout(resolve, 900));
    expect([ordersTo(node, 'strip_layers'), ordersTo(other, 'strip_layers')]).toEqual([0, 0]);
    for (const agent of [node, other]) agent.mute.clear();
    for (const agent of [node, other]) {
      agent.disconnect();
      await agent.connect();
    }
    expect(blocks(await reading)).toEqual([1, 2, 3]);
    await until(() => ordersTo(node, 'strip_layers') + ordersTo(other, 'strip_layers') > 0, 'stripped then');
  });
});

describe('space', () => {
  it('is promised up to the overcommit limit', async () => {
    await c.restart({ overcommitLimit: 0.5 });
    await node.connect();
    await node.accepted(disk);
    const { uuid } = await c.create('a', { size_bytes: gib(7) });
    await expect(c.create('b', { size_bytes: gib(2) })).rejects.toMatchObject({
      code: 'NO_SPACE',
      message: expect.stringContaining('--overcommit-limit'),
    });
    await expect(c.rpc('ExpandVolume', { uuid, size_bytes: gib(9) })).rejects.toMatchObject({
      code: 'NO_SPACE',
    });
    await c.rpc('ExpandVolume', { uuid, size_bytes: gib(8) });
    expect((await c.pool(disk)).provisioned_bytes).toBe(gib(8));
  });

  it('that runs out is warned about at 80, 90 and 95 percent, once each, until it is better', async () => {
    const warnings = async (): Promise<string[]> =>
      (await c.audit())
        .filter((one) => one.event.startsWith('space-'))
        .map((one) => `${one.event} ${one.detail.split(':')[0]}`);
    const runs = await node.allocate(disk, 820);
    await until(async () => (await warnings()).length === 1, '80 %');
    await node.allocate(disk, 160);
    await until(async () => (await warnings()).length === 2, '95 %');
    await node.ask('ReturnSlabs', disk, { unclaimed: runs });
    await until(async () => (await warnings()).length === 3, 'better');
    expect(await warnings()).toEqual(['space-warning 80 %', 'space-warning 95 %', 'space-better 0 %']);
  });
});

describe('a copy that the database does not know', () => {
  const record = (
    uuid: string,
    volumeId: string,
    slot: number,
    layers: [id: string, slot: number][],
  ): void => {
    disk.records.set(uuid, {
      volumeId,
      uuid,
      name: `pvc-${volumeId}`,
      sizeBytes: gib(1),
      state: 'closed',
      epoch: 5n,
      hostId: 9,
      generation: '1',
      slot,
      layers: layers.map(([id, at], index) => ({
        layer_id: id,
        slot: at,
        parent_layer_id: layers[index + 1]?.[0] ?? '0',
        birth: id,
        size_bytes: gib(1),
        frozen: index > 0,
      })),
    });
  };
  const context = volumeContext({ poolUuid: '', name: 'x', sizeBytes: 1n << 30n, parameters: {} });
  /** As its PersistentVolume keeps it. */
  const contextOf = (source: object, sizeBytes = 1n << 30n): { volume_context: Record<string, string> } => ({
    volume_context: volumeContext({
      poolUuid: disk.uuid,
      name: 'copy',
      sizeBytes,
      parameters: { fsType: 'xfs' },
      ...source,
    }),
  });

  it('and was never opened stands on its snapshot again, or is refused: it never comes back empty', async () => {
    const { uuid } = await opened('pvc', [1]);
    const snapshot = await c.snapshot('snap', uuid);
    const lost = randomUUID();
    const known = contextOf({ sourceSnapshotUuid: snapshot.uuid }, 2n << 30n);
    await c.publish(lost, other, known);
    const copy = await c.volume(lost);
    expect(copy).toMatchObject({ source_snapshot_uuid: snapshot.uuid, size_bytes: gib(2) });
    expect(copy.layers.map((layer) => layer.layer_id).slice(1)).toEqual([snapshot.layer_id]);
    await c.rpc('DeleteSnapshot', { uuid: snapshot.uuid });
    await write(uuid, [1]);
    await new Promise((resolve) => setTimeout(resolve, 800));
    const grant = await other.openVolume(disk, lost, await c.publish(lost, other));
    expect(grant.layers[1]?.slabs).toMatchObject([{ first: '0', count: 1 }]);
    for (const [source, says] of [
      [{ sourceSnapshotUuid: snapshot.uuid }, /copy of snapshot .* is not known\. Nothing was made/],
      [{ sourceVolumeUuid: uuid }, /at one moment, which has no name\. Nothing was made/],
    ] as const) {
      const unknown = randomUUID();
      const ask = contextOf({ ...source, name: `copy-${unknown}` });
      await expect(c.publish(unknown, node, ask)).rejects.toMatchObject({
        code: 'FAILED_PRECONDITION',
        message: expect.stringMatching(says),
      });
      await expect(c.rpc('GetVolume', { uuid: unknown, ...ask })).rejects.toMatchObject({
        code: 'FAILED_PRECONDITION',
      });
      await expect(c.volume(unknown)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    }
  });

  it('that has a record comes back from that, whatever became of its source', async () => {
    const lost = randomUUID();
    record(lost, '70', 5, [
      ['81', 6],
      ['80', 7],
    ]);
    const source = randomUUID();
    await c.publish(lost, node, contextOf({ sourceVolumeUuid: source }));
    const known = await c.volume(lost);
    expect(known.source_volume_uuid).toBe(source);
    expect(known.layers.map((layer) => layer.layer_id)).toEqual(['81', '80']);
  });

  it('does not come back when its record says that it was deleted', async () => {
    const gone = randomUUID();
    record(gone, '70', 5, [['81', 6]]);
    disk.records.get(gone)!.state = 'deleted';
    await expect(c.publish(gone, node, contextOf({}))).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  it('shares the layers of one that is known, and neither is stripped of what the other may need', async () => {
    const [first, second] = [randomUUID(), randomUUID()];
    const ask = { volume_context: { ...context, 'holdfast.io/pool': disk.uuid } };
    record(first, '70', 5, [
      ['81', 6],
      ['80', 7],
    ]);
    record(second, '71', 8, [
      ['82', 9],
      ['80', 7],
    ]);
    disk.pages.set(700, { generation: 40n, layerId: 80n, bad: false, blocks: new Set([1]) });
    disk.pages.set(701, { generation: 40n, layerId: 82n, bad: false, blocks: new Set([1]) });
    await c.publish(first, node, ask);
    expect((await c.volume(first)).layers.map((layer) => layer.slabs.length)).toEqual([0, 1]);
    await new Promise((resolve) => setTimeout(resolve, 800));
    expect([ordersTo(node, 'strip_layers'), ordersTo(other, 'strip_layers')]).toEqual([0, 0]);
    await c.publish(second, other, ask);
    expect((await c.volume(second)).layers).toMatchObject([
      { layer_id: '82', slabs: [{ first: '701' }] },
      { layer_id: '80', slabs: [{ first: '700' }] },
    ]);
    await node.openVolume(disk, first, await c.publish(first, node));
    await other.openVolume(disk, second, await c.publish(second, other));
    expect(await c.snapshot('snap', second)).toMatchObject({ state: 'READY' });
  });

  it('is refused when the shared layer is another one', async () => {
    const [first, second] = [randomUUID(), randomUUID()];
    const ask = { volume_context: { ...context, 'holdfast.io/pool': disk.uuid } };
    record(first, '70', 5, [
      ['81', 6],
      ['80', 7],
    ]);
    record(second, '71', 8, [
      ['82', 9],
      ['80', 10],
    ]);
    await c.publish(first, node, ask);
    await expect(c.publish(second, other, ask)).rejects.toMatchObject({ code: 'CORRUPT' });
  });
});
