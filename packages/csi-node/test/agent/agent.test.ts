/** The agent against the real metadata service, on an engine in memory that fails when it is told to. */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { call, createLogger } from '@holdfast/common';
import { startMetadataService, type MetadataService } from '@holdfast/metadata-service';
import { holdfast, type MetadataClient, type NodeAgentClient, type Volume__Output } from '@holdfast/proto';
import { credentials, type ChannelCredentials } from '@grpc/grpc-js';
import { loadIdentity, startAgent, type Agent } from '../../src/agent/index.ts';
import { FakeDisk, FakeNative } from './fake-native.ts';

const logger = createLogger('test');
if (process.env['HOLDFAST_LOG_LEVEL'] === undefined) logger.level = 'silent';

interface Node {
  native: FakeNative;
  agent: Agent;
  api: NodeAgentClient;
  start(): Promise<void>;
}

let directory: string;
let disk: FakeDisk;
let service: MetadataService | undefined;
let address = '127.0.0.1:0';
let metadata: MetadataClient;
let nodes: Node[];

async function startService(): Promise<void> {
  service = await startMetadataService({ listen: address, store: `sqlite:${join(directory, 'db')}`, logger });
  address = service.address;
}

async function stopService(): Promise<void> {
  await service?.close();
  service = undefined;
}

async function until<T>(what: string, test: () => Promise<T | undefined> | T | undefined): Promise<T> {
  const deadline = Date.now() + 10_000;
  let last: unknown;
  for (;;) {
    try {
      const value = await test();
      if (value !== undefined && value !== false) return value;
    } catch (error) {
      last = error;
    }
    if (Date.now() > deadline) throw new Error(`${what} did not come about`, { cause: last });
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** A certificate authority, and a certificate of it for `name` on this machine. */
function certificates(name: string): { ca: string; cert: string; key: string } {
  const file = (end: string): string => join(directory, end);
  const openssl = (...args: string[]): void => {
    execFileSync('openssl', args, { stdio: 'ignore' });
  };
  const ca = file('ca.pem');
  const curve = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '1'];
  if (!existsSync(ca)) {
    openssl('req', '-x509', ...curve, '-subj', '/CN=test ca', '-keyout', file('ca.key'), '-out', ca);
  }
  const [cert, key] = [file(`${name}.pem`), file(`${name}.key`)];
  const by = ['-CA', ca, '-CAkey', file('ca.key'), '-subj', `/CN=${name}`];
  const extensions = [
    '-addext',
    'subjectAltName=IP:127.0.0.1',
    '-addext',
    'basicConstraints=critical,CA:FALSE',
  ];
  openssl('req', '-x509', ...curve, ...by, ...extensions, '-keyout', key, '-out', cert);
  return { ca, cert, key };
}

async function startNode(name: string, channelCredentials?: ChannelCredentials): Promise<Node> {
  const native = new FakeNative(disk);
  const stateDir = join(directory, name);
  const socket = `unix:${join(stateDir, 'agent.sock')}`;
  const node: Node = {
    native,
    agent: undefined as unknown as Agent,
    api: new holdfast.NodeAgent(socket, credentials.createInsecure(), {
      'grpc.initial_reconnect_backoff_ms': 20,
      'grpc.max_reconnect_backoff_ms': 100,
    }),
    start: async () => {
      node.agent = await startAgent({
        stateDir,
        socket,
        keeperSocket: 'none',
        metadata: address,
        identity: loadIdentity(stateDir, name, { machineId: '1'.repeat(32), bootId: '2'.repeat(32) }),
        devices: [disk.path],
        lockDir: join(directory, 'locks'),
        maxVolumes: 8,
        logger,
        native,
        rescanMs: 200,
        ...(channelCredentials === undefined ? {} : { channelCredentials }),
      });
    },
  };
  await node.start();
  nodes.push(node);
  return node;
}

async function joined(node: Node): Promise<void> {
  await until('the pool is joined', async () => {
    const { pools } = await call(node.api, node.api.GetAgentInfo, {});
    return pools[0]?.lease === 'valid' ? true : undefined;
  });
}

async function create(name: string): Promise<Volume__Output> {
  return await call(metadata, metadata.CreateVolume, {
    request_id: name,
    name,
    size_bytes: String(1 << 30),
  });
}

async function publish(volume: Volume__Output, node: Node): Promise<string> {
  const { publish_id } = await call(metadata, metadata.PublishVolume, {
    request_id: `${volume.uuid} ${node.agent.nodeId} ${Math.random()}`,
    uuid: volume.uuid,
    node_id: node.agent.nodeId,
    access_mode: 'ACCESS_MODE_SINGLE_NODE_WRITER',
  });
  return publish_id;
}

function unpublish(volume: Volume__Output, node: Node): Promise<unknown> {
  return call(
    metadata,
    metadata.UnpublishVolume,
    { request_id: `${volume.uuid} ${Math.random()}`, uuid: volume.uuid, node_id: node.agent.nodeId },
    { timeoutMs: 15_000 },
  );
}

const open = (node: Node, volume: Volume__Output, publishId: string) =>
  call(node.api, node.api.OpenVolume, {
    pool_uuid: disk.info.uuid,
    volume_uuid: volume.uuid,
    publish_id: publishId,
  });

const close = (node: Node, volume: Volume__Output) =>
  call(node.api, node.api.CloseVolume, { volume_uuid: volume.uuid });

const get = (volume: Volume__Output) => call(metadata, metadata.GetVolume, { uuid: volume.uuid });

function slabCount(volume: Volume__Output): number {
  return volume.layers.flatMap((layer) => layer.slabs).reduce((sum, run) => sum + run.count, 0);
}

async function stocked(node: Node): Promise<void> {
  await until('slabs ahead are there', () => (node.native.pool.stock().length > 0 ? true : undefined));
}

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), 'holdfast-agent-'));
  disk = new FakeDisk();
  nodes = [];
  address = '127.0.0.1:0';
  await startService();
  metadata = new holdfast.Metadata(address, credentials.createInsecure(), {
    'grpc.initial_reconnect_backoff_ms': 20,
    'grpc.max_reconnect_backoff_ms': 100,
  });
});

afterEach(async () => {
  for (const node of nodes) {
    node.api.close();
    await node.agent.handOver();
  }
  metadata.close();
  await stopService();
  rmSync(directory, { recursive: true, force: true });
});

describe('agent', () => {
  it('claims an unclaimed pool for its service, joins it, and joins again after it left', async () => {
    const node = await startNode('node-1');
    await joined(node);
    expect(disk.authority.unclaimed).toBe(false);
    expect(node.native.pool.generation).toBe(1n);
    expect(await node.agent.leave()).toBe(true);
    await node.start();
    await joined(node);
    expect(node.native.pool.generation).toBe(2n);
  });

  it('speaks mutual TLS, and is refused without a certificate', async () => {
    await stopService();
    const files = certificates('metadata');
    service = await startMetadataService({ listen: '127.0.0.1:0', store: 'memory', logger, tls: files });
    address = service.address;
    const own = certificates('node-1');
    const stranger = await startNode('stranger', credentials.createSsl(readFileSync(own.ca)));
    const node = await startNode(
      'node-1',
      credentials.createSsl(readFileSync(own.ca), readFileSync(own.key), readFileSync(own.cert)),
    );
    await joined(node);
    const info = await call(stranger.api, stranger.api.GetAgentInfo, {});
    expect(info.service_connected).toBe(false);
  });

  it('opens a published volume once, and reports what it claims before it is returned', async () => {
    const [a, b] = [await startNode('node-1'), await startNode('node-2')];
    await Promise.all([joined(a), joined(b)]);
    const volume = await create('v');
    const publishId = await publish(volume, a);
    const first = await open(a, volume, publishId);
    const again = await open(a, volume, publishId);
    expect(again).toEqual(first);
    await stocked(a);
    const slabs = a.native.pool.volume(volume.uuid).claim(2);
    await close(a, volume);
    await close(a, volume);
    await unpublish(volume, a);
    await open(b, volume, await publish(volume, b));
    const granted = b.native.pool
      .volume(volume.uuid)
      .spec.layers.flatMap((layer) => layer.slabs)
      .flatMap((run) => Array.from({ length: run.count }, (_, i) => run.first + BigInt(i)));
    expect(granted.sort()).toEqual(slabs.sort());
  });

  it('asks for the whole spec of a volume once, however many slabs it has and claims', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    for (let i = 0; i < 10; i++) {
      await stocked(node);
      node.native.pool.volume(volume.uuid).claim(1);
    }
    await close(node, volume);
    await unpublish(volume, node);
    await open(node, volume, await publish(volume, node));
    await stocked(node);
    const opened = node.native.pool.volume(volume.uuid);
    opened.claim(1);
    expect(opened.described).toBe(1);
    expect(opened.spec.layers[0]?.slabs.reduce((sum, run) => sum + run.count, 0)).toBe(10);
  });

  it('refuses another publish id than the one that is current', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await publish(volume, node);
    await expect(open(node, volume, 'another')).rejects.toMatchObject({ code: expect.stringMatching(/./) });
    await expect(call(node.api, node.api.GetOpenVolume, { volume_uuid: volume.uuid })).rejects.toMatchObject({
      code: 'NOT_FOUND',
    });
  });

  it('says IN_USE for a volume that is mounted, and leaves it open', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    node.native.pool.volume(volume.uuid).busy = true;
    await expect(close(node, volume)).rejects.toMatchObject({ code: 'IN_USE' });
    node.native.pool.volume(volume.uuid).busy = false;
    await close(node, volume);
  });

  it('closes with the service away, and returns the volume with its claims when it is back', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    await stocked(node);
    await stopService();
    node.native.pool.volume(volume.uuid).claim(1);
    await close(node, volume);
    expect(disk.records.get(volume.slot)?.state).toBe('closed');
    await startService();
    const returned = await until('the return', async () => {
      const now = await get(volume);
      return now.grant === 'GRANT_STATE_FREE' ? now : undefined;
    });
    expect(slabCount(returned)).toBe(1);
  });

  it('takes open volumes over with the service away, and serves them', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    const publishId = await publish(volume, node);
    const first = await open(node, volume, publishId);
    await stopService();
    await node.agent.handOver();
    await node.start();
    const info = await call(node.api, node.api.GetOpenVolume, { volume_uuid: volume.uuid });
    expect(info).toMatchObject({ state: 'open', epoch: first.epoch });
    expect(await open(node, volume, publishId)).toEqual(first);
    await startService();
    await until('the session', async () =>
      (await call(node.api, node.api.GetAgentInfo, {})).service_connected ? true : undefined,
    );
    expect((await get(volume)).grant).toBe('GRANT_STATE_OPEN');
    await close(node, volume);
    expect((await get(volume)).grant).toBe('GRANT_STATE_FREE');
  });

  it('lets go of a volume that is revoked, with its claims, and opens it again under a newer epoch', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    const first = await open(node, volume, await publish(volume, node));
    await stocked(node);
    node.native.pool.volume(volume.uuid).claim(2);
    await unpublish(volume, node);
    expect(node.native.pool.volume(volume.uuid).state).toBe('revoked');
    const freed = await get(volume);
    expect(freed.grant).toBe('GRANT_STATE_FREE');
    expect(slabCount(freed)).toBe(2);
    const info = await call(node.api, node.api.GetOpenVolume, { volume_uuid: volume.uuid });
    expect(info.state).toBe('revoked');
    const publishId = await publish(volume, node);
    node.native.pool.volume(volume.uuid).busy = true;
    await expect(open(node, volume, publishId)).rejects.toMatchObject({ code: 'IN_USE' });
    node.native.pool.volume(volume.uuid).busy = false;
    const second = await open(node, volume, publishId);
    expect(BigInt(second.epoch)).toBeGreaterThan(BigInt(first.epoch));
  });

  it('gives the grant back when the engine cannot open, so that the next one is newer', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    const publishId = await publish(volume, node);
    node.native.pool.failNextOpen = true;
    await expect(open(node, volume, publishId)).rejects.toMatchObject({ code: 'CORRUPT' });
    const opened = await until('the second opening', () => open(node, volume, publishId));
    expect(opened.device_path).toContain('fake');
  });

  it('answers EIO on a pool that was lost, and joins it again when the last device is gone', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    node.native.pool.setLease('fenced', 'generation 1 is fenced');
    node.native.pool.setLease('stopped', 'nothing is in flight');
    const info = await call(node.api, node.api.GetOpenVolume, { volume_uuid: volume.uuid });
    expect(info.state).toBe('fenced');
    await close(node, volume);
    await joined(node);
    expect(node.native.pool.generation).toBe(2n);
    await unpublish(volume, node);
    await open(node, volume, await publish(volume, node));
  });

  it('keeps no slab when nothing is open, and asks for more the more it needs', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    await stocked(node);
    const { pool } = node.native;
    const count = (): number => pool.stock().reduce((sum, run) => sum + run.count, 0);
    expect(count()).toBe(2);
    pool.emit({ type: 'slabs-low', pool: pool.info.uuid, wanted: 1 });
    await until('four ahead', () => (count() === 4 ? true : undefined));
    pool.emit({ type: 'slabs-low', pool: pool.info.uuid, wanted: 30 });
    await until('thirty ahead', () => (count() === 30 ? true : undefined));
    await close(node, volume);
    await until('all given back', async () => {
      const { pools } = await call(metadata, metadata.ListPools, {});
      return pools[0]?.slabs_free === pools[0]?.slab_count ? true : undefined;
    });
    expect(count()).toBe(0);
  });

  it('tells the engine when the pool is full', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    await stocked(node);
    const { pool } = node.native;
    for (let i = 0; i < 40 && pool.full === 0; i++) {
      pool.volume(volume.uuid).claim(pool.stock().length);
      pool.emit({ type: 'slabs-low', pool: pool.info.uuid, wanted: 64 });
      await until('an answer', () => (pool.stock().length > 0 || pool.full > 0 ? true : undefined));
    }
    expect(pool.full).toBeGreaterThan(0);
    await until('every claim is reported', async () =>
      slabCount(await get(volume)) === 256 ? true : undefined,
    );
  });

  it('wipes a deleted volume and gives its slabs back', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    await stocked(node);
    node.native.pool.volume(volume.uuid).claim(2);
    await close(node, volume);
    await unpublish(volume, node);
    await call(metadata, metadata.DeleteVolume, { request_id: 'delete', uuid: volume.uuid });
    await until('the slabs are free', async () => {
      const { pools } = await call(metadata, metadata.ListPools, {});
      return pools[0]?.slabs_free === pools[0]?.slab_count ? true : undefined;
    });
    expect(disk.wiped).toEqual([BigInt(volume.volume_id)]);
  });
});

describe('snapshots, with the metadata service', () => {
  const snap = (volume: Volume__Output, name: string, parameters: Record<string, string> = {}) =>
    call(
      metadata,
      metadata.CreateSnapshot,
      { request_id: `${name} ${Math.random()}`, name, source_volume_uuid: volume.uuid, parameters },
      { timeoutMs: 15_000 },
    );
  const copy = (name: string, source: object) =>
    call(
      metadata,
      metadata.CreateVolume,
      { request_id: `${name} ${Math.random()}`, name, size_bytes: String(1 << 30), ...source },
      { timeoutMs: 15_000 },
    );
  const removeSnapshot = (uuid: string) =>
    call(metadata, metadata.DeleteSnapshot, { request_id: `${uuid} ${Math.random()}`, uuid });
  const removeVolume = (volume: Volume__Output) =>
    call(metadata, metadata.DeleteVolume, { request_id: `${volume.uuid} gone`, uuid: volume.uuid });
  const chainOf = async (volume: Volume__Output) => (await get(volume)).layers.map((layer) => layer.layer_id);
  const allFree = () =>
    until('every slab is free', async () => {
      const { pools } = await call(metadata, metadata.ListPools, {});
      return pools[0]?.slabs_free === pools[0]?.slab_count ? true : undefined;
    });
  const publishAs = async (volume: Volume__Output, node: Node, reader: boolean): Promise<string> => {
    const { publish_id } = await call(metadata, metadata.PublishVolume, {
      request_id: `${volume.uuid} ${node.agent.nodeId} ${Math.random()}`,
      uuid: volume.uuid,
      node_id: node.agent.nodeId,
      access_mode: reader ? 'ACCESS_MODE_MULTI_NODE_READER_ONLY' : 'ACCESS_MODE_SINGLE_NODE_WRITER',
      read_only: reader,
    });
    return publish_id;
  };
  const openAs = (node: Node, volume: Volume__Output, publishId: string, reader: boolean) =>
    call(node.api, node.api.OpenVolume, {
      pool_uuid: disk.info.uuid,
      volume_uuid: volume.uuid,
      publish_id: publishId,
      read_only: reader,
    });

  it('cuts an open volume, and every slab is in the books of the layer that has it', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    await stocked(node);
    const opened = node.native.pool.volume(volume.uuid);
    const old = opened.claim(2);
    const snapshot = await snap(volume, 's');
    expect(snapshot).toMatchObject({ state: 'READY', layer_bytes: String(2 * disk.info.slabSize) });
    expect(await snap(volume, 's')).toEqual(snapshot);
    await stocked(node);
    const fresh = opened.claim(1);
    const now = await until('the claim is reported', async () => {
      const found = await get(volume);
      return slabCount(found) === 3 ? found : undefined;
    });
    const numbers = (index: number): bigint[] =>
      (now.layers[index]?.slabs ?? [])
        .flatMap((run) => Array.from({ length: run.count }, (_, i) => BigInt(run.first) + BigInt(i)))
        .sort();
    expect([numbers(0), numbers(1)]).toEqual([fresh, old]);
    expect(disk.layers.get(BigInt(snapshot.layer_id))).toMatchObject({ state: 'frozen', snapshotName: 's' });
    await close(node, volume);
  });

  it('cuts a closed volume without a device, and one that was never opened', async () => {
    const node = await startNode('node-1');
    await joined(node);
    for (const used of [true, false]) {
      const volume = await create(`v ${used}`);
      if (used) {
        await open(node, volume, await publish(volume, node));
        await stocked(node);
        node.native.pool.volume(volume.uuid).claim(1);
        await close(node, volume);
      }
      expect(await snap(volume, `s ${used}`)).toMatchObject({ state: 'READY' });
      const now = await get(volume);
      expect(now).toMatchObject({ grant: 'GRANT_STATE_FREE' });
      expect(now.layers.map((layer) => layer.frozen)).toEqual([false, true]);
      expect(disk.records.get(volume.slot)).toMatchObject({ state: 'closed' });
      await unpublish(volume, node);
      await open(node, volume, await publish(volume, node));
      await close(node, volume);
    }
  });

  it('opens copies of a snapshot and of a volume over the frozen layers', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    const snapshot = await snap(volume, 's');
    const restored = await copy('restored', { source_snapshot_uuid: snapshot.uuid });
    const clone = await copy('clone', { source_volume_uuid: volume.uuid });
    expect((await chainOf(restored)).slice(1)).toEqual([snapshot.layer_id]);
    expect((await chainOf(clone)).slice(1)).toEqual((await chainOf(volume)).slice(1));
    for (const each of [restored, clone]) {
      await open(node, each, await publish(each, node));
      expect(
        node.native.pool
          .volume(each.uuid)
          .spec.layers.slice(1)
          .every((layer) => layer.frozen),
      ).toBe(true);
      await close(node, each);
    }
    await close(node, volume);
  });

  it('lets many nodes read a copy, and no one write it meanwhile', async () => {
    const [a, b] = [await startNode('node-1'), await startNode('node-2')];
    await Promise.all([joined(a), joined(b)]);
    const volume = await create('v');
    const shared = await copy('shared', { source_volume_uuid: volume.uuid });
    for (const node of [a, b]) await openAs(node, shared, await publishAs(shared, node, true), true);
    expect((await get(shared)).readers).toHaveLength(2);
    expect(disk.records.has(shared.slot)).toBe(false);
    await expect(publishAs(shared, a, false)).rejects.toMatchObject({ code: expect.any(String) as unknown });
    await close(a, shared);
    expect((await get(shared)).readers).toHaveLength(1);
    await unpublish(shared, b);
    expect(b.native.pool.volume(shared.uuid).state).toBe('revoked');
    await close(b, shared);
    await unpublish(shared, a);
    await openAs(a, shared, await publishAs(shared, a, false), false);
    await close(a, shared);
  });

  it('cuts a group over two nodes and a closed volume as one', async () => {
    const [a, b] = [await startNode('node-1'), await startNode('node-2')];
    await Promise.all([joined(a), joined(b)]);
    const volumes = [await create('one'), await create('two'), await create('three')];
    const [one, two, three] = volumes as [Volume__Output, Volume__Output, Volume__Output];
    await open(a, one, await publish(one, a));
    await open(b, two, await publish(two, b));
    const group = await call(
      metadata,
      metadata.CreateSnapshotGroup,
      { request_id: 'g', name: 'g', source_volume_uuids: volumes.map((volume) => volume.uuid) },
      { timeoutMs: 15_000 },
    );
    expect(group).toMatchObject({ state: 'READY' });
    expect(group.snapshots.map((snapshot) => snapshot.source_volume_uuid).sort()).toEqual(
      volumes.map((volume) => volume.uuid).sort(),
    );
    for (const volume of [a.native.pool.volume(one.uuid), b.native.pool.volume(two.uuid)]) {
      expect(volume.writes).toBe('go on');
      expect(volume.spec.layers).toHaveLength(2);
    }
    expect((await get(three)).grant).toBe('GRANT_STATE_FREE');
    await close(a, one);
    await close(b, two);
  });

  it('frees everything when all names and volumes are gone, in whichever order', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    const snapshots = [];
    for (const name of ['s1', 's2', 's3']) {
      await stocked(node);
      node.native.pool.volume(volume.uuid).claim(1);
      snapshots.push(await snap(volume, name));
    }
    const clone = await copy('clone', { source_snapshot_uuid: snapshots[1]?.uuid ?? '' });
    await open(node, clone, await publish(clone, node));
    for (const index of [1, 0, 2]) await removeSnapshot(snapshots[index]?.uuid ?? '');
    await close(node, volume);
    await unpublish(volume, node);
    await removeVolume(volume);
    // The copy stands on the first two layers still.
    await until('the rest is freed', async () =>
      slabCount(await get(clone)) === 2 && (await chainOf(clone)).length === 3 ? true : undefined,
    );
    await close(node, clone);
    await unpublish(clone, node);
    await removeVolume(clone);
    await allFree();
    expect([...disk.owners.values()].filter((owner) => owner.state === 'claimed')).toEqual([]);
  });

  it('settles a cut whose agent died before it could answer', async () => {
    const node = await startNode('node-1');
    await joined(node);
    const volume = await create('v');
    await open(node, volume, await publish(volume, node));
    node.native.pool.volume(volume.uuid).failNextCut = true;
    const cutting = snap(volume, 's').catch((error: unknown) => error);
    await until('the cut is asked for', () =>
      node.native.pool.volume(volume.uuid).failNextCut ? undefined : true,
    );
    await node.agent.handOver();
    await node.start();
    await cutting;
    const snapshot = await until('the snapshot', () => snap(volume, 's'));
    expect(snapshot.state).toBe('READY');
    expect(node.native.pool.volume(volume.uuid).spec.layers[1]?.layerId).toBe(BigInt(snapshot.layer_id));
    await close(node, volume);
  });
});
