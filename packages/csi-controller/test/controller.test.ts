/** The controller over gRPC on a unix socket, with the real metadata service; the nodes behind it are scripted agents. */
import { credentials } from '@grpc/grpc-js';
import { call, clientOptions, poolTopology, PUBLISH_ID, PUBLISH_READ_ONLY } from '@holdfast/common';
import { csi, type Csi } from '@holdfast/proto';
import { TestArea, waitFor } from '@holdfast/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Cluster } from '../../metadata-service/test/cluster.ts';
import { FakeDisk, type FakeAgent } from '../../metadata-service/test/fake-agent.ts';
import { startController, type RunningController } from '../src/index.ts';

const MIB = 1 << 20;
const GIB = 1 << 30;

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
const block = (mode: Mode = 'SINGLE_NODE_WRITER'): Csi.VolumeCapability => ({
  block: {},
  access_mode: { mode },
});

describe('the CSI controller', () => {
  let area: TestArea;
  let cluster: Cluster;
  let controller: RunningController;
  let client: InstanceType<typeof csi.Controller>;
  let identity: InstanceType<typeof csi.Identity>;
  let fast: FakeDisk;
  let slow: FakeDisk;
  let a: FakeAgent;
  let b: FakeAgent;

  beforeEach(async () => {
    area = await TestArea.create('csi-controller');
    cluster = await Cluster.start();
    fast = Object.assign(new FakeDisk(), { name: 'fast', wwid: 'w1' });
    slow = Object.assign(new FakeDisk(), { name: 'slow', wwid: 'w2' });
    a = await cluster.node('a', [fast, slow]);
    b = await cluster.node('b', [fast]);
    const endpoint = `unix:${area.path('controller.sock')}`;
    controller = await startController({ endpoint, metadata: cluster.service.address });
    client = new csi.Controller(endpoint, credentials.createInsecure(), clientOptions);
    identity = new csi.Identity(endpoint, credentials.createInsecure(), clientOptions);
  });
  afterEach(async () => {
    client.close();
    identity.close();
    await controller.close(0);
    await cluster.stop();
    await area.dispose();
  });

  const create = async (request: Csi.CreateVolumeRequest = {}): Promise<Csi.Volume__Output> => {
    const answer = await call<Csi.CreateVolumeResponse__Output>(client, client.CreateVolume, {
      name: 'pvc-1',
      capacity_range: { required_bytes: String(GIB) },
      volume_capabilities: [mount('ext4')],
      ...request,
    });
    return answer.volume as Csi.Volume__Output;
  };
  const publish = (volumeId: string, nodeId: string, over: Csi.ControllerPublishVolumeRequest = {}) =>
    call<Csi.ControllerPublishVolumeResponse__Output>(client, client.ControllerPublishVolume, {
      volume_id: volumeId,
      node_id: nodeId,
      volume_capability: mount('ext4'),
      ...over,
    });
  const unpublish = (volumeId: string, nodeId: string, timeoutMs = 10_000) =>
    call(client, client.ControllerUnpublishVolume, { volume_id: volumeId, node_id: nodeId }, { timeoutMs });
  const remove = (volumeId: string) => call(client, client.DeleteVolume, { volume_id: volumeId });
  const list = (request: Csi.ListVolumesRequest = {}) =>
    call<Csi.ListVolumesResponse__Output>(client, client.ListVolumes, request);
  const get = (volumeId: string) =>
    call<Csi.ControllerGetVolumeResponse__Output>(client, client.ControllerGetVolume, {
      volume_id: volumeId,
    });

  it('names itself, and promises only what works', async () => {
    expect(await call(identity, identity.GetPluginInfo, {})).toMatchObject({ name: 'csi.holdfast.io' });
    const plugin = await call<Csi.GetPluginCapabilitiesResponse__Output>(
      identity,
      identity.GetPluginCapabilities,
      {},
    );
    expect(plugin.capabilities.map((c) => c.service?.type ?? c.volume_expansion?.type)).toEqual([
      'CONTROLLER_SERVICE',
      'VOLUME_ACCESSIBILITY_CONSTRAINTS',
      'GROUP_CONTROLLER_SERVICE',
      'SNAPSHOT_METADATA_SERVICE',
      'ONLINE',
    ]);
    expect((await call<Csi.ProbeResponse__Output>(identity, identity.Probe, {})).ready).toEqual({
      value: true,
    });
    const capabilities = await call<Csi.ControllerGetCapabilitiesResponse__Output>(
      client,
      client.ControllerGetCapabilities,
      {},
    );
    expect(capabilities.capabilities.map((c) => c.rpc?.type).sort()).toEqual([
      'CLONE_VOLUME',
      'CREATE_DELETE_SNAPSHOT',
      'CREATE_DELETE_VOLUME',
      'EXPAND_VOLUME',
      'GET_CAPACITY',
      'GET_SNAPSHOT',
      'GET_VOLUME',
      'LIST_SNAPSHOTS',
      'LIST_VOLUMES',
      'LIST_VOLUMES_PUBLISHED_NODES',
      'MODIFY_VOLUME',
      'PUBLISH_READONLY',
      'PUBLISH_UNPUBLISH_VOLUME',
      'SINGLE_NODE_MULTI_WRITER',
      'VOLUME_CONDITION',
    ]);
  });

  it('says the same of ReadWriteMany in CreateVolume, ValidateVolumeCapabilities and ControllerPublishVolume', async () => {
    const many = mount('', 'MULTI_NODE_MULTI_WRITER');
    const sentence =
      'Access mode MULTI_NODE_MULTI_WRITER (ReadWriteMany) is not offered. Two nodes that write one block device destroy its ' +
      'file system, so a Holdfast volume has one writing node. Use ReadWriteOnce or ReadWriteOncePod; for ReadWriteMany put a ' +
      'file server on top of a volume.';
    const refusal = { code: 'INVALID_ARGUMENT', message: sentence };
    await expect(create({ volume_capabilities: [many] })).rejects.toMatchObject(refusal);
    const volume = await create();
    const validated = await call<Csi.ValidateVolumeCapabilitiesResponse__Output>(
      client,
      client.ValidateVolumeCapabilities,
      { volume_id: volume.volume_id, volume_capabilities: [many], volume_context: volume.volume_context },
    );
    expect(validated).toMatchObject({ confirmed: null, message: sentence });
    const published = call(client, client.ControllerPublishVolume, {
      volume_id: volume.volume_id,
      node_id: 'node-1.00000001',
      volume_capability: many,
    });
    await expect(published).rejects.toMatchObject(refusal);
  });

  it('changes mutable parameters, once or again, and refuses all others by name', async () => {
    const volume = await create({ mutable_parameters: { 'holdfast.io/evict': 'false' } });
    const modify = (volumeId: string, mutable: Record<string, string>) =>
      call(client, client.ControllerModifyVolume, { volume_id: volumeId, mutable_parameters: mutable });
    await modify(volume.volume_id, { 'holdfast.io/evict': 'true' });
    await modify(volume.volume_id, { 'holdfast.io/evict': 'true' });
    await expect(modify(volume.volume_id, { iops: '5' })).rejects.toEqual(code('INVALID_ARGUMENT', /"iops"/));
    await expect(modify(volume.volume_id, { fsType: 'xfs' })).rejects.toEqual(
      code('INVALID_ARGUMENT', /"fsType" can not change/),
    );
    await expect(modify(volume.volume_id, { 'holdfast.io/evict': 'no' })).rejects.toEqual(
      code('INVALID_ARGUMENT', /"true" or "false"/),
    );
    await expect(modify('', {})).rejects.toEqual(code('INVALID_ARGUMENT'));
    const gone = volume.volume_id.replace(/[^/]*$/, '00000000-0000-4000-8000-000000000000');
    await expect(modify(gone, { 'holdfast.io/evict': 'true' })).rejects.toEqual(code('NOT_FOUND'));
  });

  describe('CreateVolume', () => {
    it('gives the same volume for the same request, and tells where it is', async () => {
      const volume = await create();
      expect(await create()).toEqual(volume);
      expect(volume.capacity_bytes).toBe(String(GIB));
      const [poolUuid = ''] = volume.volume_id.split('/');
      expect([fast.uuid, slow.uuid]).toContain(poolUuid);
      expect(volume.accessible_topology).toEqual([{ segments: poolTopology([poolUuid]) }]);
      expect(volume.volume_context).toEqual({
        'holdfast.io/pool': poolUuid,
        'holdfast.io/name': 'pvc-1',
        'holdfast.io/size-bytes': String(GIB),
        'holdfast.io/parameter.fsType': 'ext4',
      });
    });

    it('answers ALREADY_EXISTS for the same name with another size, file system, mode of access or place', async () => {
      const volume = await create({ parameters: { pool: 'fast' } });
      const same = { parameters: { pool: 'fast' } };
      await expect(create({ ...same, capacity_range: { required_bytes: String(2 * GIB) } })).rejects.toEqual(
        code('ALREADY_EXISTS'),
      );
      await expect(create({ ...same, volume_capabilities: [mount('xfs')] })).rejects.toEqual(
        code('ALREADY_EXISTS'),
      );
      await expect(create({ ...same, volume_capabilities: [block()] })).rejects.toEqual(
        code('ALREADY_EXISTS'),
      );
      await expect(create({ parameters: { pool: 'slow' } })).rejects.toEqual(code('ALREADY_EXISTS'));
      expect((await create(same)).volume_id).toBe(volume.volume_id);
    });

    it('puts the volume into the pool that the parameters name, or that the first preferred node reaches', async () => {
      for (const pool of ['slow', slow.uuid]) {
        const volume = await create({ name: `by ${pool}`, parameters: { pool } });
        expect(volume.volume_id.split('/')[0]).toBe(slow.uuid);
      }
      const onlyB = await create({
        name: 'b',
        accessibility_requirements: {
          requisite: [
            { segments: poolTopology([fast.uuid, slow.uuid]) },
            { segments: poolTopology([fast.uuid]) },
          ],
          preferred: [{ segments: poolTopology([fast.uuid]) }],
        },
      });
      expect(onlyB.volume_id.split('/')[0]).toBe(fast.uuid);
      await expect(
        create({
          name: 'nowhere',
          parameters: { pool: 'slow' },
          accessibility_requirements: { requisite: [{ segments: poolTopology([fast.uuid]) }] },
        }),
      ).rejects.toEqual(code('TOO_MANY', /slow/));
    });

    it('refuses what it cannot do, with the code of the specification', async () => {
      const cases: [Csi.CreateVolumeRequest, string, RegExp][] = [
        [{ name: '' }, 'INVALID_ARGUMENT', /name is missing/],
        [{ name: 'x'.repeat(129) }, 'INVALID_ARGUMENT', /129 bytes/],
        [{ volume_capabilities: [] }, 'INVALID_ARGUMENT', /volume_capabilities/],
        [{ volume_capabilities: [mount('', 'MULTI_NODE_MULTI_WRITER')] }, 'INVALID_ARGUMENT', /file server/],
        [
          { volume_capabilities: [mount('', 'MULTI_NODE_READER_ONLY')] },
          'INVALID_ARGUMENT',
          /content source/,
        ],
        [
          { volume_capabilities: [mount('xfs'), mount('ext4')] },
          'INVALID_ARGUMENT',
          /different file systems/,
        ],
        [{ parameters: { fsType: 'xfs' } }, 'INVALID_ARGUMENT', /different file systems/],
        [{ parameters: { colour: 'red' } }, 'INVALID_ARGUMENT', /Known: pool/],
        [{ parameters: { pool: 'none' } }, 'INVALID_ARGUMENT', /Known pools: /],
        [{ mutable_parameters: { iops: '5' } }, 'INVALID_ARGUMENT', /"iops".*Known: holdfast.io\/evict/],
        [{ volume_content_source: { snapshot: { snapshot_id: 's' } } }, 'NOT_FOUND', /snapshot/],
        [{ volume_content_source: { volume: { volume_id: 'v' } } }, 'NOT_FOUND', /volume/],
        [{ capacity_range: { required_bytes: '-1' } }, 'INVALID_ARGUMENT', /negative/],
        [{ capacity_range: { required_bytes: String(GIB), limit_bytes: '5' } }, 'OUT_OF_RANGE', /limit/],
        [{ capacity_range: { required_bytes: String(2 ** 60) } }, 'OUT_OF_RANGE', /./],
      ];
      for (const [request, status, message] of cases) {
        await expect(create(request)).rejects.toEqual(code(status, message));
      }
      expect((await list()).entries).toEqual([]);
    });
  });

  it('keeps names of 128 bytes apart, multi-byte characters included', async () => {
    const ids = new Set<string>();
    for (const name of ['x'.repeat(128), `${'x'.repeat(127)}y`, 'ü'.repeat(64)]) {
      const volume = await create({ name });
      expect((await create({ name })).volume_id).toBe(volume.volume_id);
      ids.add(volume.volume_id);
    }
    expect(ids.size).toBe(3);
  });

  it('deletes once and for all, and never what is published', async () => {
    const volume = await create();
    await publish(volume.volume_id, a.nodeId);
    await expect(remove(volume.volume_id)).rejects.toEqual(code('IN_USE'));
    await unpublish(volume.volume_id, a.nodeId);
    await remove(volume.volume_id);
    await remove(volume.volume_id);
    await remove('never-given-out');
    await expect(get(volume.volume_id)).rejects.toEqual(code('NOT_FOUND'));
    await expect(remove('')).rejects.toEqual(code('INVALID_ARGUMENT'));
  });

  describe('publishing', () => {
    it('hands out one publish id for a node, however often it is asked', async () => {
      const volume = await create({ parameters: { pool: 'fast' } });
      const first = await publish(volume.volume_id, a.nodeId);
      expect(first.publish_context[PUBLISH_ID]).toBeTruthy();
      expect(first.publish_context[PUBLISH_READ_ONLY]).toBe('false');
      expect(await publish(volume.volume_id, a.nodeId)).toEqual(first);
      await expect(publish(volume.volume_id, a.nodeId, { readonly: true })).rejects.toEqual(
        code('ALREADY_EXISTS'),
      );
      await expect(publish(volume.volume_id, b.nodeId)).rejects.toEqual(
        code('PUBLISHED_ELSEWHERE', new RegExp(a.nodeId)),
      );
      expect((await get(volume.volume_id)).status?.published_node_ids).toEqual([a.nodeId]);
      for (let i = 0; i < 2; i++) await unpublish(volume.volume_id, a.nodeId);
      const again = await publish(volume.volume_id, b.nodeId, { readonly: true });
      expect(again.publish_context[PUBLISH_ID]).not.toBe(first.publish_context[PUBLISH_ID]);
      expect(again.publish_context[PUBLISH_READ_ONLY]).toBe('true');
      await unpublish(volume.volume_id, '');
      expect((await get(volume.volume_id)).status?.published_node_ids).toEqual([]);
    });

    it('refuses unknown volumes, unknown nodes and modes of several nodes', async () => {
      const volume = await create();
      const unknown = `${fast.uuid}/${fast.uuid}`;
      await expect(publish(unknown, a.nodeId)).rejects.toEqual(code('NOT_FOUND'));
      await expect(publish('nonsense', a.nodeId)).rejects.toEqual(code('NOT_FOUND'));
      await expect(publish(volume.volume_id, 'z.00000000')).rejects.toEqual(code('NOT_FOUND'));
      await expect(publish('', a.nodeId)).rejects.toEqual(code('INVALID_ARGUMENT'));
      await expect(publish(volume.volume_id, '')).rejects.toEqual(code('INVALID_ARGUMENT'));
      await expect(
        publish(volume.volume_id, a.nodeId, { volume_capability: mount('', 'MULTI_NODE_MULTI_WRITER') }),
      ).rejects.toEqual(code('INVALID_ARGUMENT', /ReadWriteMany/));
      await unpublish('nonsense', a.nodeId);
      await unpublish(unknown, a.nodeId);
    });

    it('an unpublish from a dead node joins its fence: cut off by a deadline it goes on, and a repeated call ends it', async () => {
      const volume = await create({ parameters: { pool: 'fast' } });
      const { publish_context } = await publish(volume.volume_id, b.nodeId);
      await b.openVolume(fast, volume.volume_id.split('/')[1] ?? '', publish_context[PUBLISH_ID] ?? '');
      b.freeze();
      b.disconnect();
      await expect(unpublish(volume.volume_id, b.nodeId, 300)).rejects.toEqual(code('DEADLINE_EXCEEDED'));
      await expect(unpublish(volume.volume_id, b.nodeId, 1500)).rejects.toEqual(
        code('DEADLINE_EXCEEDED', /joins what is under way/),
      );
      const condition = await waitFor('the fence to show', async () => {
        const found = (await get(volume.volume_id)).status?.volume_condition;
        return found?.abnormal === true ? found : undefined;
      });
      expect(condition.message).toMatch(/fenced|taken back/);
      b.kill();
      await unpublish(volume.volume_id, b.nodeId);
      await publish(volume.volume_id, a.nodeId);
    });

    it('answers ABORTED while another call for the volume is under way', async () => {
      const volume = await create({ parameters: { pool: 'fast' } });
      const { publish_context } = await publish(volume.volume_id, b.nodeId);
      await b.openVolume(fast, volume.volume_id.split('/')[1] ?? '', publish_context[PUBLISH_ID] ?? '');
      b.freeze();
      b.disconnect();
      const first = unpublish(volume.volume_id, b.nodeId);
      const refused = await waitFor('the call to be refused', () =>
        publish(volume.volume_id, a.nodeId).then(
          () => undefined,
          (error: { code: string }) => (error.code === 'OPERATION_PENDING' ? error : undefined),
        ),
      );
      expect(refused).toEqual(code('OPERATION_PENDING', /under way/));
      b.kill();
      await first;
    });
  });

  it('validates capabilities by saying why not, instead of failing', async () => {
    const volume = await create();
    const validate = (
      capabilities: Csi.VolumeCapability[],
      over: Csi.ValidateVolumeCapabilitiesRequest = {},
    ) =>
      call<Csi.ValidateVolumeCapabilitiesResponse__Output>(client, client.ValidateVolumeCapabilities, {
        volume_id: volume.volume_id,
        volume_capabilities: capabilities,
        volume_context: volume.volume_context,
        ...over,
      });
    expect((await validate([mount('ext4'), block()])).confirmed?.volume_capabilities).toHaveLength(2);
    expect(await validate([mount('xfs')])).toMatchObject({
      confirmed: null,
      message: expect.stringMatching(/made for ext4/) as unknown,
    });
    expect(await validate([mount('', 'MULTI_NODE_MULTI_WRITER')])).toMatchObject({ confirmed: null });
    expect(await validate([mount()], { parameters: { x: 'y' } })).toMatchObject({ confirmed: null });
    await expect(validate([])).rejects.toEqual(code('INVALID_ARGUMENT'));
    await expect(
      validate([mount()], { volume_id: `${fast.uuid}/${fast.uuid}`, volume_context: {} }),
    ).rejects.toEqual(code('NOT_FOUND'));
  });

  it('lists in pages that cover every volume once, with where each is published', async () => {
    const made = new Set<string>();
    for (let i = 0; i < 7; i++) made.add((await create({ name: `v${i}` })).volume_id);
    const [published = ''] = made;
    await publish(published, a.nodeId);
    const seen: string[] = [];
    let token = '';
    do {
      const page = await list({ max_entries: 3, starting_token: token });
      expect(page.entries.length).toBeLessThanOrEqual(3);
      for (const { volume, status } of page.entries) {
        seen.push(volume?.volume_id ?? '');
        expect(status?.published_node_ids).toEqual(volume?.volume_id === published ? [a.nodeId] : []);
        expect(status?.volume_condition).toMatchObject({ abnormal: false });
      }
      token = page.next_token;
    } while (token !== '');
    expect(seen).toHaveLength(7);
    expect(new Set(seen)).toEqual(made);
    expect((await list()).entries).toHaveLength(7);
    await expect(list({ starting_token: 'nonsense' })).rejects.toEqual(code('BAD_TOKEN'));
    await expect(list({ max_entries: -1 })).rejects.toEqual(code('INVALID_ARGUMENT'));
  });

  it('tells the capacity of a pool, of a node, and of everything', async () => {
    const capacity = async (request: Csi.GetCapacityRequest = {}): Promise<number> => {
      const answer = await call<Csi.GetCapacityResponse__Output>(client, client.GetCapacity, request);
      return Number(answer.available_capacity);
    };
    const one = await capacity({ parameters: { pool: 'fast' } });
    expect(one).toBeGreaterThan(GIB);
    expect(await capacity()).toBe(one + (await capacity({ parameters: { pool: 'slow' } })));
    expect(await capacity({ accessible_topology: { segments: poolTopology([fast.uuid]) } })).toBe(one);
    expect(await capacity({ accessible_topology: { segments: { zone: 'x' } } })).toBe(0);
    expect(
      await capacity({
        parameters: { pool: 'slow' },
        accessible_topology: { segments: poolTopology([fast.uuid]) },
      }),
    ).toBe(0);
    await expect(capacity({ parameters: { pool: 'none' } })).rejects.toEqual(code('INVALID_ARGUMENT'));
    await expect(capacity({ volume_capabilities: [mount('', 'MULTI_NODE_MULTI_WRITER')] })).rejects.toEqual(
      code('INVALID_ARGUMENT'),
    );
  });

  it('expands, never shrinks, and always sends the node to grow what is on it', async () => {
    const volume = await create();
    const expand = (required: number, limit = 0, id = volume.volume_id) =>
      call<Csi.ControllerExpandVolumeResponse__Output>(client, client.ControllerExpandVolume, {
        volume_id: id,
        capacity_range: { required_bytes: String(required), limit_bytes: String(limit) },
      });
    for (let i = 0; i < 2; i++) {
      expect(await expand(2 * GIB - 5)).toEqual({
        capacity_bytes: String(2 * GIB),
        node_expansion_required: true,
      });
    }
    expect((await expand(GIB)).capacity_bytes).toBe(String(2 * GIB));
    await expect(expand(GIB, GIB)).rejects.toEqual(code('OUT_OF_RANGE'));
    await expect(expand(3 * GIB + 1, 3 * GIB + MIB - 1)).rejects.toEqual(code('OUT_OF_RANGE'));
    await expect(expand(0)).rejects.toEqual(code('INVALID_ARGUMENT'));
    await expect(expand(GIB, 0, `${fast.uuid}/${fast.uuid}`)).rejects.toEqual(code('NOT_FOUND'));
    expect((await get(volume.volume_id)).volume?.capacity_bytes).toBe(String(2 * GIB));
  });

  it('says that the metadata service is away, and goes on when it is back', async () => {
    const volume = await create();
    const address = cluster.service.address;
    await cluster.service.close();
    await expect(get(volume.volume_id)).rejects.toEqual(code('UNAVAILABLE', new RegExp(`${address}.*go on`)));
    expect((await call<Csi.ProbeResponse__Output>(identity, identity.Probe, {})).ready).toEqual({
      value: false,
    });
  });
});
