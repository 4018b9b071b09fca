/** Agents and pools: who owns a pool, who may join, what a coming and going agent keeps, and what late messages do not change. */
import { randomUUID } from 'node:crypto';
import { copyFileSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { call } from '@holdfast/common';
import type { HostRef__Output } from '@holdfast/proto';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk, until } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-sessions-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));
let open: Cluster[] = [];
afterEach(async () => {
  for (const cluster of open) await cluster.stop();
  open = [];
});

async function start(store = 'memory'): Promise<Cluster> {
  const cluster = await Cluster.start({ store });
  open.push(cluster);
  return cluster;
}

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

describe('a pool', () => {
  it('that nobody owns is claimed by write, wait, re-read, and accepted on every node that sees it', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const [first, second] = [c.agent('node-1', [disk]), c.agent('node-2', [disk])];
    expect((await first.connect()).accepted_pools).toEqual([]);
    await second.connect(); // its look at the page may be from before the claim
    await first.accepted(disk);
    await second.accepted(disk);
    const info = await c.rpc<{ store_id: string; term: string }>('GetServiceInfo');
    expect(disk.authority).toEqual({ store_id: info.store_id, incarnation: '1', term: '1' });
    const claims = [...first.orders, ...second.orders].filter((order) => order.claim_authority);
    expect(claims).toHaveLength(1);
  });

  it('that another service owns is refused with a sentence', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const owner = randomUUID();
    disk.authority = { store_id: owner, incarnation: '1', term: '1' };
    const agent = c.agent('node-1', [disk]);
    await agent.connect();
    await until(async () => (await c.rpc<{ pools: unknown[] }>('ListPools')).pools.length === 1, 'listed');
    const pool = await c.pool(disk);
    expect(pool).toMatchObject({ state: 'REFUSED', message: expect.stringContaining(owner) });
    await expect(agent.join(disk)).rejects.toThrow('never');
    await expect(c.create('pvc')).rejects.toMatchObject({ code: 'UNAVAILABLE' });
  }, 15_000);

  it('whose claim is lost to somebody else is refused', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = c.agent('node-1', [disk]);
    agent.override.set('claim_authority', () => ({
      error_code: 'HF_STALE',
      error_message: 'another claim stands.',
    }));
    await agent.connect();
    await until(
      async () => (await c.rpc<{ pools: { state: string }[] }>('ListPools')).pools[0]?.state === 'REFUSED',
      'refused',
    );
    expect((await c.pool(disk)).message).toContain('another claim stands');
  });

  it('that is a copy (another WWID) is refused on that node, and the pool goes on', async () => {
    const c = await start();
    const disk = new FakeDisk();
    await c.node('node-1', [disk]);
    const clone = Object.assign(new FakeDisk(), { uuid: disk.uuid, wwid: 'the-clone' });
    clone.authority = { ...disk.authority };
    const other = c.agent('node-2', [clone]);
    await other.connect();
    await expect(
      call(other.client, other.client.JoinPool, {
        request_id: randomUUID(),
        pool_uuid: disk.uuid,
        node_id: other.nodeId,
        machine_id: 'm',
        boot_id: 'b',
        lock_path: 'l',
        session_id: other.welcomed?.session_id ?? '',
      }),
    ).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    expect((await c.pool(disk)).state).toBe('ACTIVE');
    await c.create('pvc');
  });

  it('is claimed again for every new term, and nothing is granted before', async () => {
    const c = await start(`sqlite:${directory}/terms.db`);
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    const publishId = await c.publish(uuid, agent);
    await c.restart();
    await expect(agent.stage(disk, uuid, publishId)).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    await expect(agent.ask('AllocateSlabs', disk, { count: 1 })).rejects.toMatchObject({
      code: 'UNAVAILABLE',
    });
    await agent.connect();
    await agent.accepted(disk);
    expect(disk.authority.term).toBe('2');
    await agent.openVolume(disk, uuid, publishId);
    expect((await c.pool(disk)).hosts).toMatchObject([{ state: 'HOST_STATE_LIVE', generation: '1' }]);
  });

  it('refuses a copy of its database when the original ran after the copy was made', async () => {
    const file = `${directory}/live.db`;
    const c = await start(`sqlite:${file}`);
    const disk = new FakeDisk();
    const first = await c.node('node-1', [disk]);
    // Copied by hand while the service was down: both would begin the same term.
    await c.service.close();
    copyFileSync(file, `${directory}/copy.db`);
    await c.restart();
    await first.connect();
    await first.accepted(disk);
    expect(disk.authority.term).toBe('2');
    const copy = await start(`sqlite:${directory}/copy.db`);
    const agent = copy.agent('node-1', [disk]);
    await agent.connect();
    await until(async () => (await copy.pool(disk)).state === 'REFUSED', 'refused');
    expect((await copy.pool(disk)).message).toContain('which this database did not write');
    await expect(copy.create('pvc')).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    expect(agent.orders).toEqual([]);
  });

  it('refuses a database that is older than the pool by its term', async () => {
    const file = `${directory}/live2.db`;
    const c = await start(`sqlite:${file}`);
    const disk = new FakeDisk();
    await c.node('node-1', [disk]);
    disk.authority.term = '7';
    await c.restart();
    await c.agent('node-2', [disk]).connect();
    await until(async () => (await c.pool(disk)).state === 'REFUSED', 'refused');
    expect((await c.pool(disk)).message).toContain('database is older than the pool');
  });

  it('is moved with its database: a copy made while the service is down, and the only one that runs, goes on', async () => {
    const file = `${directory}/old-place.db`;
    const c = await start(`sqlite:${file}`);
    const disk = new FakeDisk();
    const first = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    await c.service.close();
    copyFileSync(file, `${directory}/new-place.db`);
    await c.restart({ store: `sqlite:${directory}/new-place.db` });
    await first.connect();
    await first.accepted(disk);
    expect((await c.volume(uuid)).name).toBe('pvc');
  });

  it('is never granted on by a backup, which does not know what was decided since', async () => {
    const c = await start(`sqlite:${directory}/backed-up.db`);
    const disk = new FakeDisk();
    const first = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    const publishId = await c.publish(uuid, first);
    expect(await c.service.backup(`${directory}/backup.db`)).toBe(true);
    await c.restart({ store: `sqlite:${directory}/backup.db` });
    await first.connect();
    expect((await c.volume(uuid)).name).toBe('pvc');
    expect(await c.pool(disk)).toMatchObject({
      state: 'REFUSED',
      message: expect.stringContaining('is a backup'),
    });
    await expect(first.stage(disk, uuid, publishId)).rejects.toThrow('is a backup');
    await expect(first.ask('AllocateSlabs', disk, { count: 1 })).rejects.toThrow('is a backup');
    expect(disk.authority.term).toBe('1');
  });

  it('knows its own claim again when the service died before it heard of it', async () => {
    const c = await start(`sqlite:${directory}/claim.db`);
    const disk = new FakeDisk();
    const agent = c.agent('node-1', [disk]);
    agent.override.set('claim_authority', (order) => {
      disk.authority = {
        store_id: order.claim_authority?.store_id ?? '',
        incarnation: order.incarnation,
        term: order.term,
      };
      return { error_code: 'HF_IO', error_message: 'the answer is lost' };
    });
    await agent.connect();
    await until(() => disk.authority.term === '1', 'written');
    await c.restart();
    agent.override.clear();
    await agent.connect();
    await agent.join(disk);
    expect(disk.authority.term).toBe('2');
  });

  it('that names this service, but is not in its database, is refused too', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const { store_id } = await c.rpc<{ store_id: string }>('GetServiceInfo');
    disk.authority = { store_id, incarnation: '1', term: '1' };
    await c.agent('node-1', [disk]).connect();
    await until(async () => (await c.rpc<{ pools: unknown[] }>('ListPools')).pools.length === 1, 'listed');
    expect(await c.pool(disk)).toMatchObject({ state: 'REFUSED' });
  });

  it('that grew has the new slabs; one that shrank is refused on that node', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    agent.reportPools(() => ({ slab_count: '2000' }));
    await until(async () => (await c.pool(disk)).slabs_free === '2000', 'grown');
    agent.reportPools(() => ({ slab_count: '500' }));
    await sleep(50);
    expect(await c.pool(disk)).toMatchObject({ slab_count: '2000', state: 'ACTIVE' });
  });

  it('with an impossible superblock or a class that is not built yet is refused', async () => {
    const c = await start();
    const disks = [
      Object.assign(new FakeDisk(), { leaseMs: 10 }),
      Object.assign(new FakeDisk(), { fencing: 'FENCING_CLASS_RESERVATIONS' }),
      Object.assign(new FakeDisk(), { slabCount: 0 }),
    ];
    await c.agent('node-1', disks).connect();
    await sleep(100);
    expect((await c.rpc<{ pools: unknown[] }>('ListPools')).pools).toEqual([]);
  });
});

describe('a session', () => {
  it('begins with hello; one that does not is ended', async () => {
    const c = await start();
    const agent = c.agent('node-1', []);
    const stream = agent.client.Session();
    const failed = new Promise<Error>((resolve) => stream.on('error', resolve));
    stream.on('data', () => undefined);
    stream.write({ pools_seen: { pools: [] } });
    expect((await failed).message).toContain('begins with hello');
  });

  it('of a node takes the place of an older one', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const twin = c.agent('node-1', [disk]);
    await twin.connect();
    await until(() => agent.streamError !== undefined, 'the older one is ended');
    expect(agent.streamError?.message).toContain('took its place');
    expect(await c.rpc('ListNodes')).toMatchObject({ nodes: [{ node_id: agent.nodeId, connected: true }] });
  });

  it('of an agent that took over from a dead one keeps grants, records claims, and answers which stock is its own', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    const granted = await agent.openVolume(disk, uuid, await c.publish(uuid, agent));
    await agent.allocate(disk, 8);
    agent.claim(disk, granted);
    agent.claim(disk, granted); // neither reported
    agent.stock.get(disk.uuid)!.push({ first: '500', count: 2, generation: '9' }); // not its own
    agent.disconnect();
    const welcome = await agent.connect();
    expect(welcome.stock).toEqual([
      { pool_uuid: disk.uuid, runs: [{ first: '2', count: 6, generation: '1' }] },
    ]);
    expect(await c.volume(uuid)).toMatchObject({
      grant: 'GRANT_STATE_OPEN',
      epoch: granted.epoch,
      layers: [{ slabs: [{ first: '0', count: 2, generation: '1' }] }],
    });
    expect((await c.host(disk, agent)).generation).toBe('1');
  });

  it('that holds a volume which was only offered has it open', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    agent.open.set(uuid, await agent.stage(disk, uuid, await c.publish(uuid, agent)));
    agent.disconnect();
    await agent.connect();
    expect((await c.volume(uuid)).grant).toBe('GRANT_STATE_OPEN');
  });

  it('that holds a volume without a right is told to let go', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    const granted = await agent.openVolume(disk, uuid, await c.publish(uuid, agent));
    await agent.returnVolume(disk, uuid);
    agent.open.set(uuid, granted);
    agent.disconnect();
    await agent.connect();
    await until(() => !agent.open.has(uuid), 'let go');
    expect((await c.volume(uuid)).grant).toBe('GRANT_STATE_FREE');
  });

  it('from an earlier boot that comes late changes nothing', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    agent.kill();
    agent.bootId = 'boot-2';
    await agent.connect();
    await agent.join(disk);
    const { uuid } = await c.create('pvc');
    await agent.openVolume(disk, uuid, await c.publish(uuid, agent));
    const late = c.agent('node-1', [disk], { bootId: 'boot-1' });
    await expect(late.connect()).rejects.toThrow('seen under a later one');
    expect(await c.host(disk, agent)).toMatchObject({
      state: 'HOST_STATE_LIVE',
      generation: '2',
      boot_id: 'boot-2',
    });
    expect((await c.volume(uuid)).grant).toBe('GRANT_STATE_OPEN');
  });

  it('whose join comes late, when a newer one has joined, does not end the newer life', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const late = {
      request_id: randomUUID(),
      pool_uuid: disk.uuid,
      node_id: agent.nodeId,
      machine_id: agent.machineId,
      boot_id: agent.bootId,
      lock_path: agent.lockPath,
      previous_io_dead: true,
      session_id: agent.welcomed?.session_id ?? '',
    };
    agent.kill();
    await agent.connect();
    await agent.join(disk, true);
    await expect(call(agent.client, agent.client.JoinPool, late)).rejects.toMatchObject({ code: 'STALE' });
    expect(await c.host(disk, agent)).toMatchObject({ state: 'HOST_STATE_LIVE', generation: '2' });
  });

  it('whose process died between join and ready joins as the same life', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = c.agent('node-1', [disk]);
    await agent.connect();
    await agent.accepted(disk);
    const joining = (): Promise<{ host: { generation: string } | null }> =>
      call(agent.client, agent.client.JoinPool, {
        request_id: randomUUID(),
        pool_uuid: disk.uuid,
        node_id: agent.nodeId,
        machine_id: agent.machineId,
        boot_id: agent.bootId,
        lock_path: agent.lockPath,
        previous_io_dead: false,
        session_id: agent.welcomed?.session_id ?? '',
      });
    expect((await joining()).host?.generation).toBe('1');
    agent.disconnect();
    await agent.connect();
    await agent.accepted(disk);
    expect((await joining()).host?.generation).toBe('1');
    await agent.join(disk);
    expect((await c.host(disk, agent)).state).toBe('HOST_STATE_LIVE');
  });

  it('that took a pool over before it was reported ready has it ready', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = c.agent('node-1', [disk]);
    await agent.connect();
    await agent.accepted(disk);
    const { host } = await call<object, { host: HostRef__Output | null }>(
      agent.client,
      agent.client.JoinPool,
      {
        request_id: randomUUID(),
        pool_uuid: disk.uuid,
        node_id: agent.nodeId,
        machine_id: agent.machineId,
        boot_id: agent.bootId,
        lock_path: agent.lockPath,
        previous_io_dead: false,
        session_id: agent.welcomed?.session_id ?? '',
      },
    );
    agent.hosts.set(disk.uuid, host!);
    agent.disconnect();
    await agent.connect();
    expect(await c.host(disk, agent)).toMatchObject({ state: 'HOST_STATE_LIVE', generation: '1' });
  });

  it('reports what people should see: a volume event is on record', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    agent.send({
      volume_event: {
        host: agent.hosts.get(disk.uuid)!,
        volume_uuid: uuid,
        code: 'HF_CORRUPT',
        message: 'slab 3: copy A is bad',
      },
    });
    await expect
      .poll(async () => (await c.audit({ volume_uuid: uuid })).at(-1)?.detail)
      .toBe('HF_CORRUPT: slab 3: copy A is bad');
  });
});

describe('host slots', () => {
  it('are kept by their node, and those of dead nodes are used again with the next generation', async () => {
    const c = await start();
    const disk = Object.assign(new FakeDisk(), { hostSlots: 2 });
    const first = await c.node('node-1', [disk]);
    await c.node('node-2', [disk]);
    const third = c.agent('node-3', [disk]);
    await third.connect();
    await expect(third.join(disk)).rejects.toMatchObject({ code: 'TOO_MANY' });
    first.kill();
    await c.rpc('FenceNode', { node_id: first.nodeId });
    const host = await third.join(disk);
    expect(host).toMatchObject({ host_id: 0, generation: '2' });
    await first.connect();
    await expect(first.join(disk, true)).rejects.toMatchObject({ code: 'TOO_MANY' });
  });
});
