/** Snapshots, copies, groups and changed ranges: what the controller makes of CSI calls, over a metadata service in memory. */
import { credentials, type ClientReadableStream } from '@grpc/grpc-js';
import { call, clientOptions, HoldfastError, poolTopology, PUBLISH_READ_ONLY } from '@holdfast/common';
import { csi, type Csi, type Volume } from '@holdfast/proto';
import { TestArea, waitFor } from '@holdfast/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startController, type RunningController } from '../src/index.ts';
import { FakeMetadata } from './fake-metadata.ts';

const MIB = 1 << 20;
const GIB = 1 << 30;
const NOWHERE = '00000000-0000-4000-8000-000000000000';

const code = (name: string, message?: RegExp): unknown =>
  expect.objectContaining({
    code: name,
    ...(message === undefined ? {} : { message: expect.stringMatching(message) as unknown }),
  });

type Mode = Csi._csi_v1_VolumeCapability_AccessMode_Mode__Output;
const mount = (fsType = '', mode: Mode = 'SINGLE_NODE_WRITER'): Csi.VolumeCapability => ({
  mount: { fs_type: fsType },
  access_mode: { mode },
});

describe('the CSI controller, on snapshots', () => {
  let area: TestArea;
  let metadata: FakeMetadata;
  let controller: RunningController;
  let client: InstanceType<typeof csi.Controller>;
  let groups: InstanceType<typeof csi.GroupController>;
  let changes: InstanceType<typeof csi.SnapshotMetadata>;
  let source: Volume;

  beforeEach(async () => {
    area = await TestArea.create('csi-snapshots');
    metadata = new FakeMetadata();
    await metadata.start();
    const endpoint = `unix:${area.path('controller.sock')}`;
    controller = await startController({ endpoint, metadata: metadata.address });
    client = new csi.Controller(endpoint, credentials.createInsecure(), clientOptions);
    groups = new csi.GroupController(endpoint, credentials.createInsecure(), clientOptions);
    changes = new csi.SnapshotMetadata(endpoint, credentials.createInsecure(), clientOptions);
    source = metadata.addVolume('source', GIB, 0, { parameters: { fsType: 'xfs' } });
  });
  afterEach(async () => {
    for (const each of [client, groups, changes]) each.close();
    await controller.close(0);
    await metadata.stop();
    await area.dispose();
  });

  const id = (object: { pool_uuid?: string; uuid?: string } | undefined): string =>
    `${object?.pool_uuid}/${object?.uuid}`;
  const snap = async (name = 'snap-1', over: Csi.CreateSnapshotRequest = {}) => {
    const answer = await call<Csi.CreateSnapshotResponse__Output>(client, client.CreateSnapshot, {
      name,
      source_volume_id: id(source),
      ...over,
    });
    return answer.snapshot as Csi.Snapshot__Output;
  };
  const remove = (snapshotId: string) => call(client, client.DeleteSnapshot, { snapshot_id: snapshotId });
  const list = (request: Csi.ListSnapshotsRequest = {}) =>
    call<Csi.ListSnapshotsResponse__Output>(client, client.ListSnapshots, request);
  const get = (snapshotId: string) =>
    call<Csi.GetSnapshotResponse__Output>(client, client.GetSnapshot, { snapshot_id: snapshotId });
  const create = async (request: Csi.CreateVolumeRequest): Promise<Csi.Volume__Output> => {
    const answer = await call<Csi.CreateVolumeResponse__Output>(client, client.CreateVolume, {
      name: 'copy',
      volume_capabilities: [mount()],
      ...request,
    });
    return answer.volume as Csi.Volume__Output;
  };
  const from = (snapshotId: string): Csi.CreateVolumeRequest => ({
    volume_content_source: { snapshot: { snapshot_id: snapshotId } },
  });

  describe('CreateSnapshot', () => {
    it('gives the same snapshot for the same request', async () => {
      const snapshot = await snap();
      expect(snapshot).toEqual({
        snapshot_id: id([...metadata.snapshots.values()][0]),
        source_volume_id: id(source),
        size_bytes: String(GIB),
        creation_time: { seconds: '1700000000', nanos: 123_000_000 },
        ready_to_use: true,
        group_snapshot_id: '',
      });
      expect(await snap()).toEqual(snapshot);
      const other = metadata.addVolume('other', GIB);
      await expect(snap('snap-1', { source_volume_id: id(other) })).rejects.toEqual(code('ALREADY_EXISTS'));
    });

    it('is ready to use only when the disk has it', async () => {
      const snapshot = await snap();
      const [stored] = metadata.snapshots.values();
      if (stored !== undefined) stored.state = 'CUTTING';
      expect((await snap()).ready_to_use).toBe(false);
      expect((await get(snapshot.snapshot_id)).snapshot?.ready_to_use).toBe(false);
    });

    it('passes on quiesce, and nothing that a sidecar adds', async () => {
      await snap('q', {
        parameters: { 'holdfast.io/quiesce': 'true', 'csi.storage.k8s.io/volumesnapshot/name': 's' },
      });
      expect(metadata.cut[0]?.parameters).toEqual({ 'holdfast.io/quiesce': 'true' });
    });

    it('refuses what it can not do, with the code of the specification', async () => {
      const cases: [string, Csi.CreateSnapshotRequest, string, RegExp][] = [
        ['', {}, 'INVALID_ARGUMENT', /name is missing/],
        ['x'.repeat(129), {}, 'INVALID_ARGUMENT', /129 bytes/],
        ['a', { source_volume_id: '' }, 'INVALID_ARGUMENT', /source_volume_id is missing/],
        ['a', { source_volume_id: 'nonsense' }, 'NOT_FOUND', /nonsense/],
        ['a', { source_volume_id: `${NOWHERE}/${NOWHERE}` }, 'NOT_FOUND', /./],
        ['a', { parameters: { colour: 'red' } }, 'INVALID_ARGUMENT', /Known: holdfast.io\/quiesce/],
      ];
      for (const [name, request, status, message] of cases) {
        await expect(snap(name, request)).rejects.toEqual(code(status, message));
      }
      expect(metadata.snapshots.size).toBe(0);
    });

    it('answers ABORTED while the same snapshot is being cut, and cuts another one meanwhile', async () => {
      let open: () => void = () => undefined;
      metadata.gate = new Promise((resolve) => {
        open = resolve;
      });
      const first = snap();
      await waitFor('the first call', () => (metadata.cut.length === 1 ? true : undefined));
      await expect(snap()).rejects.toEqual(code('OPERATION_PENDING'));
      const second = snap('snap-2');
      await waitFor('the second call', () => (metadata.cut.length === 2 ? true : undefined));
      open();
      await Promise.all([first, second]);
    });
  });

  it('deletes once and for all, but no member of a group', async () => {
    const snapshot = await snap();
    for (let i = 0; i < 2; i++) await remove(snapshot.snapshot_id);
    expect(metadata.snapshots.size).toBe(0);
    await remove('nonsense');
    await expect(remove('')).rejects.toEqual(code('INVALID_ARGUMENT'));
    await expect(get(snapshot.snapshot_id)).rejects.toEqual(code('NOT_FOUND'));
    await expect(get('nonsense')).rejects.toEqual(code('NOT_FOUND'));
    await expect(get('')).rejects.toEqual(code('INVALID_ARGUMENT'));
    // Its UUID in another pool is another snapshot.
    const kept = await snap('kept');
    await remove(`${NOWHERE}/${kept.snapshot_id.split('/')[1]}`);
    expect(metadata.snapshots.size).toBe(1);
  });

  it('lists in pages that cover every snapshot once, and filters', async () => {
    const made: string[] = [];
    for (let i = 0; i < 5; i++) made.push((await snap(`s${i}`)).snapshot_id);
    const other = metadata.addVolume('other', GIB);
    const last = await snap('s5', { source_volume_id: id(other) });
    const seen: string[] = [];
    let token = '';
    do {
      const page = await list({ max_entries: 4, starting_token: token });
      expect(page.entries.length).toBeLessThanOrEqual(4);
      seen.push(...page.entries.map((entry) => entry.snapshot?.snapshot_id ?? ''));
      token = page.next_token;
    } while (token !== '');
    expect(seen).toEqual([...made, last.snapshot_id]);
    expect((await list()).entries).toHaveLength(6);
    const ids = async (request: Csi.ListSnapshotsRequest) =>
      (await list(request)).entries.map((entry) => entry.snapshot?.snapshot_id);
    expect(await ids({ source_volume_id: id(other) })).toEqual([last.snapshot_id]);
    expect(await ids({ snapshot_id: made[2] ?? '' })).toEqual([made[2]]);
    for (const request of [
      { snapshot_id: 'nonsense' },
      { source_volume_id: 'nonsense' },
      { snapshot_id: `${NOWHERE}/${made[2]?.split('/')[1]}` },
      { source_volume_id: `${NOWHERE}/${other.uuid}` },
    ]) {
      expect(await ids(request)).toEqual([]);
    }
    await expect(list({ starting_token: 'nonsense' })).rejects.toEqual(code('BAD_TOKEN'));
    await expect(list({ max_entries: -1 })).rejects.toEqual(code('INVALID_ARGUMENT'));
  });

  describe('CreateVolume from a source', () => {
    it('makes a copy on the pool of its source, of its size or larger, with the file system that was asked for', async () => {
      const snapshot = await snap();
      const copy = await create(from(snapshot.snapshot_id));
      expect(copy.capacity_bytes).toBe(String(GIB));
      expect(copy.volume_id.split('/')[0]).toBe(source.pool_uuid);
      expect(copy.content_source).toMatchObject({ snapshot: { snapshot_id: snapshot.snapshot_id } });
      expect(copy.volume_context).toMatchObject({
        'holdfast.io/source-snapshot': snapshot.snapshot_id.split('/')[1],
      });
      // Not asked for: the service takes the source's.
      expect(metadata.created[0]).toMatchObject({ parameters: {}, pool_uuids: [source.pool_uuid] });
      await create({
        ...from(snapshot.snapshot_id),
        name: 'asked',
        volume_capabilities: [mount('xfs')],
        capacity_range: { required_bytes: String(2 * GIB - 1) },
      });
      expect(metadata.created[1]).toMatchObject({
        parameters: { fsType: 'xfs' },
        size_bytes: String(2 * GIB),
      });
      const small = await create({
        ...from(snapshot.snapshot_id),
        name: 'small',
        capacity_range: { required_bytes: String(MIB) },
      });
      expect(small.capacity_bytes).toBe(String(GIB));
      const clone = await create({
        name: 'clone',
        volume_content_source: { volume: { volume_id: id(source) } },
      });
      expect(clone.content_source).toMatchObject({ volume: { volume_id: id(source) } });
      expect(clone.volume_context).toMatchObject({ 'holdfast.io/source-volume': source.uuid });
    });

    it('finds the copy again when the source has grown or is gone', async () => {
      const snapshot = await snap();
      const copy = await create(from(snapshot.snapshot_id));
      const request: Csi.CreateVolumeRequest = {
        name: 'clone',
        volume_content_source: { volume: { volume_id: id(source) } },
        capacity_range: { required_bytes: String(GIB) },
      };
      const clone = await create(request);
      source.size_bytes = String(3 * GIB);
      expect(await create(request)).toEqual(clone);
      await remove(snapshot.snapshot_id);
      metadata.volumes.delete(source.uuid ?? '');
      expect(await create(from(snapshot.snapshot_id))).toEqual(copy);
      expect(await create(request)).toEqual(clone);
    });

    it('takes readers only, which an empty volume does not', async () => {
      const snapshot = await snap();
      const readers = { volume_capabilities: [mount('', 'MULTI_NODE_READER_ONLY')] };
      const copy = await create({ ...from(snapshot.snapshot_id), ...readers });
      const published = await call<Csi.ControllerPublishVolumeResponse__Output>(
        client,
        client.ControllerPublishVolume,
        {
          volume_id: copy.volume_id,
          node_id: 'n',
          volume_capability: readers.volume_capabilities[0] ?? null,
        },
      );
      expect(published.publish_context[PUBLISH_READ_ONLY]).toBe('true');
      const confirmed = await call<Csi.ValidateVolumeCapabilitiesResponse__Output>(
        client,
        client.ValidateVolumeCapabilities,
        { volume_id: copy.volume_id, ...readers },
      );
      expect(confirmed.confirmed?.volume_capabilities).toHaveLength(1);
      await expect(create({ name: 'empty', ...readers })).rejects.toEqual(
        code('INVALID_ARGUMENT', /content source/),
      );
    });

    it('refuses what it can not do, with the code of the specification', async () => {
      const snapshot = await snap();
      const ours = from(snapshot.snapshot_id);
      const cases: [Csi.CreateVolumeRequest, string, RegExp][] = [
        [from('nonsense'), 'NOT_FOUND', /nonsense/],
        [from(`${NOWHERE}/${NOWHERE}`), 'NOT_FOUND', /./],
        [from(`${NOWHERE}/${snapshot.snapshot_id.split('/')[1]}`), 'NOT_FOUND', /./],
        [from(''), 'INVALID_ARGUMENT', /snapshot_id is missing/],
        [{ volume_content_source: { volume: { volume_id: 'nonsense' } } }, 'NOT_FOUND', /nonsense/],
        [{ volume_content_source: { volume: { volume_id: `${NOWHERE}/${NOWHERE}` } } }, 'NOT_FOUND', /./],
        [{ volume_content_source: {} }, 'INVALID_ARGUMENT', /no source/],
        [{ ...ours, capacity_range: { limit_bytes: String(MIB) } }, 'OUT_OF_RANGE', /limit/],
        [{ ...ours, parameters: { pool: 'slow' } }, 'INVALID_ARGUMENT', /StorageClass of that pool/],
        [
          {
            ...ours,
            accessibility_requirements: { requisite: [{ segments: poolTopology([metadata.pools[1].uuid]) }] },
          },
          'TOO_MANY',
          /no node/,
        ],
      ];
      for (const [request, status, message] of cases) {
        await expect(create(request)).rejects.toEqual(code(status, message));
      }
      expect(metadata.created).toEqual([]);
    });
  });

  describe('groups', () => {
    const group = async (name: string, volumes: readonly (Volume | string)[]) => {
      const answer = await call<Csi.CreateVolumeGroupSnapshotResponse__Output>(
        groups,
        groups.CreateVolumeGroupSnapshot,
        { name, source_volume_ids: volumes.map((each) => (typeof each === 'string' ? each : id(each))) },
      );
      return answer.group_snapshot as Csi.VolumeGroupSnapshot__Output;
    };
    const find = (groupId: string, snapshotIds: string[] = []) =>
      call<Csi.GetVolumeGroupSnapshotResponse__Output>(groups, groups.GetVolumeGroupSnapshot, {
        group_snapshot_id: groupId,
        snapshot_ids: snapshotIds,
      });
    const drop = (groupId: string, snapshotIds: string[] = []) =>
      call(groups, groups.DeleteVolumeGroupSnapshot, {
        group_snapshot_id: groupId,
        snapshot_ids: snapshotIds,
      });

    it('are cut as one, found, and deleted as one', async () => {
      const other = metadata.addVolume('other', GIB);
      const made = await group('g', [source, other]);
      expect(made).toMatchObject({ ready_to_use: true, creation_time: { seconds: '1700000000' } });
      expect(made.snapshots.map((each) => [each.source_volume_id, each.group_snapshot_id])).toEqual([
        [id(source), made.group_snapshot_id],
        [id(other), made.group_snapshot_id],
      ]);
      expect(await group('g', [source, other])).toEqual(made);
      const members = made.snapshots.map((each) => each.snapshot_id);
      expect((await find(made.group_snapshot_id, members)).group_snapshot).toEqual(made);
      await expect(remove(members[0] ?? '')).rejects.toEqual(code('INVALID_ARGUMENT', /Delete the group/));
      const stranger = (await snap()).snapshot_id;
      for (const wrong of [[stranger], members.slice(1), [...members, stranger]]) {
        await expect(find(made.group_snapshot_id, wrong)).rejects.toEqual(code('INVALID_ARGUMENT'));
        await expect(drop(made.group_snapshot_id, wrong)).rejects.toEqual(code('INVALID_ARGUMENT'));
      }
      for (let i = 0; i < 2; i++) await drop(made.group_snapshot_id, members);
      await expect(find(made.group_snapshot_id)).rejects.toEqual(code('NOT_FOUND'));
      expect([...metadata.snapshots.values()].map((each) => each.name)).toEqual(['snap-1']);
    });

    it('are refused across pools, without a name or a volume, and for unknown volumes', async () => {
      const slow = metadata.addVolume('slow', GIB, 1);
      await expect(group('g', [source, slow])).rejects.toEqual(code('FAILED_PRECONDITION', /2 pools/));
      await expect(group('', [source])).rejects.toEqual(code('INVALID_ARGUMENT'));
      await expect(group('g', [])).rejects.toEqual(code('INVALID_ARGUMENT'));
      await expect(group('g', ['nonsense'])).rejects.toEqual(code('NOT_FOUND'));
      await expect(find('')).rejects.toEqual(code('INVALID_ARGUMENT'));
      await expect(find('nonsense')).rejects.toEqual(code('NOT_FOUND'));
      await drop('nonsense');
      await expect(drop('')).rejects.toEqual(code('INVALID_ARGUMENT'));
      expect(metadata.groups.size).toBe(0);
    });

    it('are offered', async () => {
      const { capabilities } = await call<Csi.GroupControllerGetCapabilitiesResponse__Output>(
        groups,
        groups.GroupControllerGetCapabilities,
        {},
      );
      expect(capabilities.map((each) => each.rpc?.type)).toEqual(['CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT']);
    });
  });

  describe('SnapshotMetadata', () => {
    const all = async <T>(stream: ClientReadableStream<T>): Promise<T[]> => {
      const messages: T[] = [];
      for await (const message of stream) messages.push(message as T);
      return messages;
    };
    const range = (offset: number, length: number) => ({ offset: String(offset), length: String(length) });
    const pairs = (messages: Csi.GetMetadataDeltaResponse__Output[]) =>
      messages.map((message) =>
        message.block_metadata.map((block) => [Number(block.byte_offset), Number(block.size_bytes)]),
      );

    it('streams the ranges that hold data, in messages that are small enough', async () => {
      const { snapshot_id } = await snap();
      metadata.changes = [
        { ranges: [range(0, 4096), range(8192, 65536), range(MIB, 4096)] },
        { ranges: [range(2 * MIB, MIB)] },
      ];
      const messages = await all(changes.GetMetadataAllocated({ snapshot_id, max_results: 2 }));
      expect(pairs(messages)).toEqual([
        [
          [0, 4096],
          [8192, 65536],
        ],
        [[MIB, 4096]],
        [[2 * MIB, MIB]],
      ]);
      for (const message of messages) {
        expect(message).toMatchObject({
          block_metadata_type: 'VARIABLE_LENGTH',
          volume_capacity_bytes: String(GIB),
        });
      }
      expect(metadata.asked[0]).toMatchObject({ base_snapshot_uuid: '', max_ranges: 2 });
    });

    it('streams what may differ between two, from an offset on', async () => {
      const base = await snap('base');
      const target = await snap('target');
      metadata.changes = [{ ranges: [range(0, 4096), range(MIB, 2 * MIB)] }];
      const messages = await all(
        changes.GetMetadataDelta({
          base_snapshot_id: base.snapshot_id,
          target_snapshot_id: target.snapshot_id,
          starting_offset: String(2 * MIB),
        }),
      );
      expect(pairs(messages)).toEqual([[[MIB, 2 * MIB]]]);
      expect(metadata.asked[0]).toMatchObject({
        base_snapshot_uuid: base.snapshot_id.split('/')[1],
        target_snapshot_uuid: target.snapshot_id.split('/')[1],
        starting_offset: String(2 * MIB),
      });
    });

    it('tells the size of a snapshot in which nothing changed', async () => {
      const { snapshot_id } = await snap();
      expect(await all(changes.GetMetadataAllocated({ snapshot_id }))).toEqual([
        {
          block_metadata_type: 'VARIABLE_LENGTH',
          volume_capacity_bytes: String(GIB),
          block_metadata: [],
        },
      ]);
    });

    it('refuses what it can not do, with the code of the specification, and never ends a cut-off stream as if it were whole', async () => {
      const { snapshot_id } = await snap();
      const base_snapshot_id = snapshot_id;
      const fails = async (stream: ClientReadableStream<unknown>, status: number): Promise<void> => {
        await expect(all(stream)).rejects.toMatchObject({ code: status });
      };
      const [invalid, missing, outOfRange, failed] = [3, 5, 11, 9];
      await fails(changes.GetMetadataAllocated({}), invalid);
      await fails(changes.GetMetadataAllocated({ snapshot_id, max_results: -1 }), invalid);
      await fails(changes.GetMetadataAllocated({ snapshot_id: 'nonsense' }), missing);
      await fails(changes.GetMetadataAllocated({ snapshot_id: `${NOWHERE}/${NOWHERE}` }), missing);
      await fails(changes.GetMetadataAllocated({ snapshot_id, starting_offset: '-1' }), outOfRange);
      await fails(
        changes.GetMetadataAllocated({ snapshot_id, starting_offset: String(GIB + 1) }),
        outOfRange,
      );
      await fails(changes.GetMetadataDelta({ target_snapshot_id: snapshot_id }), invalid);
      await fails(changes.GetMetadataDelta({ base_snapshot_id }), invalid);
      await fails(
        changes.GetMetadataDelta({ base_snapshot_id: 'nonsense', target_snapshot_id: snapshot_id }),
        missing,
      );
      metadata.changes = [
        { ranges: [range(0, 4096)] },
        new HoldfastError('FAILED_PRECONDITION', 'The base is not below the target.'),
      ];
      await fails(changes.GetMetadataDelta({ base_snapshot_id, target_snapshot_id: snapshot_id }), failed);
    });

    it('stops asking when the reader goes away', async () => {
      const { snapshot_id } = await snap();
      const message = { ranges: Array.from({ length: 2000 }, (_, i) => range(i * 8192, 4096)) };
      metadata.changes = Array.from({ length: 300 }, () => message);
      const stream = changes.GetMetadataAllocated({ snapshot_id });
      stream.on('error', () => undefined);
      await new Promise((resolve) => stream.once('data', resolve));
      stream.pause();
      stream.cancel();
      await waitFor('the end of the upstream call', () => (metadata.cancelled > 0 ? true : undefined));
      expect(metadata.asked).toHaveLength(1);
    });
  });
});
