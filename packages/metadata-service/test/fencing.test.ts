/** Taking volumes back from nodes that do not give them back: DESIGN 6.2 and 6.3, class by class. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { FencingClass } from '@holdfast/proto';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk, until, type FakeAgent } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-fencing-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));
let cluster: Cluster | undefined;
afterEach(async () => {
  await cluster?.stop();
  cluster = undefined;
});

interface Scene {
  c: Cluster;
  disk: FakeDisk;
  victim: FakeAgent;
  other: FakeAgent;
  uuid: string;
  epoch: bigint;
}

/** Two nodes on one pool; the first has a volume open. */
async function scene(fencing: FencingClass, change: Partial<FakeDisk> = {}): Promise<Scene> {
  const c = await Cluster.start({ store: `sqlite:${directory}/${randomUUID()}.db` });
  cluster = c;
  const disk = Object.assign(new FakeDisk(), { fencing }, change);
  const victim = await c.node('victim', [disk]);
  const other = await c.node('other', [disk], { machineId: 'machine-2', bootId: 'boot-2' });
  const { uuid } = await c.create('pvc-1');
  const grant = await victim.openVolume(disk, uuid, await c.publish(uuid, victim));
  return { c, disk, victim, other, uuid, epoch: BigInt(grant.epoch) };
}

async function moves({ c, disk, other, uuid, epoch }: Scene): Promise<void> {
  const grant = await other.openVolume(disk, uuid, await c.publish(uuid, other));
  expect(BigInt(grant.epoch)).toBeGreaterThan(epoch);
}

const eventsOf = async (c: Cluster, uuid: string): Promise<string[]> =>
  (await c.audit({ volume_uuid: uuid })).map((record) => record.event);

describe('unpublish', () => {
  it('of a volume that was never staged is done at once', async () => {
    const { c, victim } = await scene('FENCING_CLASS_LOOP');
    const { uuid } = await c.create('pvc-2');
    await c.publish(uuid, victim);
    await c.unpublish(uuid, victim);
    expect((await c.volume(uuid)).publications).toEqual([]);
    expect(victim.orders.some((order) => order.revoke)).toBe(false);
  });

  it('of a volume that is not published, or unknown, is success', async () => {
    const { c, victim, other, uuid } = await scene('FENCING_CLASS_LOOP');
    await c.unpublish(uuid, other);
    await c.unpublish(randomUUID(), other);
    expect(await c.volume(uuid)).toMatchObject({ grant: 'GRANT_STATE_OPEN', granted_node_id: victim.nodeId });
  });

  it('of an open volume revokes it, records the claims that come with the answer, and fences nobody', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    await s.victim.allocate(s.disk, 4);
    s.victim.claim(s.disk, s.victim.open.get(s.uuid)!);
    await s.c.unpublish(s.uuid, s.victim);
    expect((await s.c.volume(s.uuid)).layers[0]?.slabs).toEqual([{ first: '0', count: 1, generation: '1' }]);
    expect((await s.c.host(s.disk, s.victim)).state).toBe('HOST_STATE_LIVE');
    expect(await eventsOf(s.c, s.uuid)).toEqual([
      'create',
      'publish',
      'grant',
      'opened',
      'revoke',
      'revoked',
    ]);
    await moves(s);
  });

  it('accepts UNKNOWN_VOLUME of the holder as an answer', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.open.clear();
    await s.c.unpublish(s.uuid, s.victim);
    expect((await s.c.audit({ volume_uuid: s.uuid })).at(-1)?.proof).toContain(
      'will not open it under epoch',
    );
  });

  it('does not accept an answer about another epoch', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.override.set('revoke', () => ({ revoked: { epoch: '1', was_open: true } }));
    const unpublish = s.c.unpublish(s.uuid, s.victim, 250);
    await expect(unpublish).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    expect((await s.c.volume(s.uuid)).grant).toBe('GRANT_STATE_REVOKING');
  });

  it('says what it waits for when its deadline comes, goes on, and a repeat joins it', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.freeze();
    await expect(s.c.unpublish(s.uuid, s.victim, 1500)).rejects.toThrow(
      /being taken back.*lock \/run\/victim/,
    );
    s.disk.locks.delete(s.victim.lockPath);
    await s.c.unpublish(s.uuid, s.victim);
    await moves(s);
  });

  it('answers a late repeat of an old request without touching the newer publication', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    const request = { request_id: randomUUID(), uuid: s.uuid, node_id: s.victim.nodeId };
    await s.c.rpc('UnpublishVolume', request);
    const grant = await s.victim.openVolume(s.disk, s.uuid, await s.c.publish(s.uuid, s.victim));
    await s.c.rpc('UnpublishVolume', request);
    expect(await s.c.volume(s.uuid)).toMatchObject({ grant: 'GRANT_STATE_OPEN', epoch: grant.epoch });
  });
});

describe('class L', () => {
  it('a killed node is fenced: page first, then the lock, then its grants are void', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.kill();
    await s.c.unpublish(s.uuid, s.victim);
    expect(s.disk.fenced(0)).toBe(1n);
    const kinds = s.other.orders.map((order) => order.order).filter((kind) => kind !== 'claim_authority');
    expect(kinds).toEqual(['write_fence', 'test_lock']);
    expect((await s.c.host(s.disk, s.victim)).state).toBe('HOST_STATE_DEAD');
    const about = await s.c.audit({ node_id: s.victim.nodeId });
    expect(about.map((record) => record.event).slice(-5)).toEqual([
      'revoke-timeout',
      'fence-intent',
      'fence-page',
      'dead',
      'void',
    ]);
    expect(about.at(-1)?.proof).toContain('lock-free');
    await moves(s);
  });

  it('waits for as long as the lock is held: a process that is stopped is not dead', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.freeze();
    s.victim.disconnect();
    await expect(s.c.unpublish(s.uuid, s.victim, 2500)).rejects.toMatchObject({ code: 'DEADLINE_EXCEEDED' });
    const host = await s.c.host(s.disk, s.victim);
    expect(host.state).toBe('HOST_STATE_CUTTING');
    expect(host.waiting_for).toContain('still has I/O or still runs');
    await expect(s.c.publish(s.uuid, s.other)).rejects.toMatchObject({ code: 'PUBLISHED_ELSEWHERE' });
    s.disk.locks.delete(s.victim.lockPath);
    await s.c.unpublish(s.uuid, s.victim);
    await moves(s);
  });

  it('gives an agent that restarts a moment before it fences', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.disconnect();
    const unpublish = s.c.unpublish(s.uuid, s.victim);
    setTimeout(() => void s.victim.connect(), 150);
    await unpublish;
    expect((await s.c.host(s.disk, s.victim)).state).toBe('HOST_STATE_LIVE');
    expect(s.disk.fences.size).toBe(0);
  });

  it('other pools of the node go on', async () => {
    const c = await Cluster.start();
    cluster = c;
    const [first, second] = [new FakeDisk(), Object.assign(new FakeDisk(), { wwid: 'wwid-2' })];
    const victim = await c.node('victim', [first, second]);
    await c.node('other', [first, second]);
    const a = await c.create('a', { pool_uuids: [first.uuid] });
    const b = await c.create('b', { pool_uuids: [second.uuid] });
    await victim.openVolume(first, a.uuid, await c.publish(a.uuid, victim));
    await victim.openVolume(second, b.uuid, await c.publish(b.uuid, victim));
    victim.override.set('revoke', () => ({ error_code: 'HF_IO', error_message: 'the device is stuck' }));
    first.locks.delete(victim.lockPath);
    await c.unpublish(a.uuid, victim);
    expect((await c.host(first, victim)).state).toBe('HOST_STATE_DEAD');
    expect((await c.host(second, victim)).state).toBe('HOST_STATE_LIVE');
    expect(await c.volume(b.uuid)).toMatchObject({
      grant: 'GRANT_STATE_OPEN',
      granted_node_id: victim.nodeId,
    });
  });

  it('asks another fencer when the first one does not do it', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    const third = await s.c.node('third', [s.disk]);
    s.other.override.set('write_fence', () => ({
      error_code: 'HF_LEASE_EXPIRED',
      error_message: 'my lease is over',
    }));
    s.victim.kill();
    await s.c.unpublish(s.uuid, s.victim);
    expect(third.orders.some((order) => order.write_fence)).toBe(true);
  });

  it('has the page written again by somebody else when the fencer is lost', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    const third = await s.c.node('third', [s.disk]);
    s.victim.freeze();
    s.victim.disconnect();
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId, no_wait: true });
    await until(async () => (await s.c.host(s.disk, s.victim)).state === 'HOST_STATE_CUTTING', 'cutting');
    const fencer = s.other.orders.some((order) => order.write_fence) ? s.other : third;
    const spare = fencer === s.other ? third : s.other;
    fencer.kill();
    await until(() => spare.orders.some((order) => order.write_fence), 'the page is written again');
    s.disk.locks.delete(s.victim.lockPath);
    await until(async () => (await s.c.host(s.disk, s.victim)).state === 'HOST_STATE_DEAD', 'dead');
    const events = (await s.c.audit({ node_id: s.victim.nodeId })).map((record) => record.event);
    expect(events.filter((event) => event.startsWith('fence'))).toEqual([
      'fence-intent',
      'fence-page',
      'fence-again',
      'fence-page',
    ]);
  });

  it('says that nobody can fence when the victim was the only node, and goes on when one comes', async () => {
    const c = await Cluster.start();
    cluster = c;
    const disk = new FakeDisk();
    const victim = await c.node('victim', [disk]);
    const { uuid } = await c.create('pvc-1');
    await victim.openVolume(disk, uuid, await c.publish(uuid, victim));
    victim.kill();
    await expect(c.unpublish(uuid, victim, 2500)).rejects.toThrow('no other node is live on pool');
    await c.node('other', [disk]);
    await c.unpublish(uuid, victim);
  });

  it('a single node that is alone is asked to write its own page, and its stop completes the fence', async () => {
    const c = await Cluster.start();
    cluster = c;
    const disk = new FakeDisk();
    const victim = await c.node('victim', [disk]);
    const { uuid } = await c.create('pvc-1');
    await victim.openVolume(disk, uuid, await c.publish(uuid, victim));
    victim.override.set('revoke', () => ({ error_code: 'HF_IO', error_message: 'stuck' }));
    await c.unpublish(uuid, victim);
    expect((await c.host(disk, victim)).state).toBe('HOST_STATE_DEAD');
    const dead = (await c.audit({ node_id: victim.nodeId })).find((record) => record.event === 'dead');
    expect(dead?.proof).toMatch(/stop-ack\(1\)|stopped\(1\)/);
  });

  it('a reboot of the machine ends the lives of all nodes on it, also of those that never come back', async () => {
    const c = await Cluster.start();
    cluster = c;
    const disk = new FakeDisk();
    const first = await c.node('node-1', [disk]);
    const second = await c.node('node-2', [disk]);
    const { uuid } = await c.create('pvc-1');
    await first.openVolume(disk, uuid, await c.publish(uuid, first));
    first.kill();
    second.kill();
    second.bootId = 'boot-2';
    await second.connect();
    await second.join(disk);
    expect((await c.host(disk, first)).state).toBe('HOST_STATE_DEAD');
    await c.unpublish(uuid, first);
    await second.openVolume(disk, uuid, await c.publish(uuid, second));
  });

  it('a node that comes back with the old lock free joins as the next generation, and its old grants are void', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.kill();
    await s.victim.connect();
    await expect(s.victim.join(s.disk, false)).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    const host = await s.victim.join(s.disk, true);
    expect(host.generation).toBe('2');
    expect((await s.c.volume(s.uuid)).grant).toBe('GRANT_STATE_FREE');
    expect((await eventsOf(s.c, s.uuid)).at(-1)).toBe('void');
    await expect(
      s.victim.ask('ReturnVolume', s.disk, {
        volume_uuid: s.uuid,
        epoch: s.epoch.toString(),
        host: { ...host, generation: '1' },
      }),
    ).rejects.toMatchObject({ code: 'STALE' });
    // The same node may stage it again under the publication that it still has.
    const publishId = (await s.c.volume(s.uuid)).publications[0]?.publish_id ?? '';
    const grant = await s.victim.openVolume(s.disk, s.uuid, publishId);
    expect(BigInt(grant.epoch)).toBe(s.epoch + 1n);
  });
});

describe('class C by lease only', () => {
  it('a dead node is fenced after lease x 1.05 + drain without a heartbeat, not earlier, with the page read back', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY');
    s.victim.kill();
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId, no_wait: true });
    await until(() => s.disk.fences.size > 0, 'page');
    const started = performance.now();
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId });
    expect(performance.now() - started).toBeGreaterThan(400 * 1.05 + 50 - 10);
    expect(s.other.orders.at(-1)?.order).toBe('read_fence');
    const dead = (await s.c.audit({ node_id: s.victim.nodeId })).find((record) => record.event === 'dead');
    expect(dead?.proof).toMatch(
      /lease-expired: fence page read back intact, heartbeat \d+ unchanged for \d+ ms/,
    );
    await s.c.unpublish(s.uuid, s.victim);
    await moves(s);
  });

  it('a node whose engine lives finds its page and stops: that completes the fence at once', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY', { leaseMs: 60_000, drainMs: 60_000 });
    s.victim.disconnect();
    const { hosts } = await s.c.rpc<{ hosts: { state: string }[] }>('FenceNode', {
      node_id: s.victim.nodeId,
    });
    expect(hosts.map((host) => host.state)).toEqual(['HOST_STATE_DEAD']);
    const dead = (await s.c.audit({ node_id: s.victim.nodeId })).find((record) => record.event === 'dead');
    expect(dead?.proof).toBe('stopped(1) read in its heartbeat page');
  });

  it('a stop-ack by the stream completes the fence at once', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY', { leaseMs: 60_000 });
    s.victim.stopHeart();
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId, no_wait: true });
    const host = s.victim.hosts.get(s.disk.uuid)!;
    s.victim.send({ lease: { host: { ...host, generation: '2' }, state: 'stopped' } }); // not its generation
    s.victim.send({ lease: { host, state: 'fenced' } }); // not yet stopped
    await until(async () => (await s.c.host(s.disk, s.victim)).state === 'HOST_STATE_CUTTING', 'cutting');
    s.victim.send({ lease: { host, state: 'stopped' } });
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId });
    expect((await s.c.volume(s.uuid)).grant).toBe('GRANT_STATE_FREE');
  });

  it('a heartbeat begun after the page was durable raises an alarm and has the page written again', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY');
    s.disk.loseFencePages = true;
    s.victim.disconnect(); // its engine goes on renewing: the page never reaches it
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId, no_wait: true });
    await until(async () => {
      const records = await s.c.audit({ node_id: s.victim.nodeId });
      return records.some((record) => record.detail.includes('renewed its lease after its fence page'));
    }, 'alarm');
    expect((await s.c.volume(s.uuid)).grant).toBe('GRANT_STATE_OPEN');
    s.disk.loseFencePages = false;
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId });
    expect((await s.c.volume(s.uuid)).grant).toBe('GRANT_STATE_FREE');
  });

  it('a fence page that does not read back is written again before anything is granted', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY');
    s.disk.loseFencePages = true;
    s.victim.kill();
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId, no_wait: true });
    await until(() => s.other.orders.filter((order) => order.write_fence).length >= 2, 'written again');
    expect((await s.c.host(s.disk, s.victim)).state).not.toBe('HOST_STATE_DEAD');
    s.disk.loseFencePages = false;
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId });
  });

  it('a restart of the service begins the fence again: page, and the wait from zero', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY', { leaseMs: 1500 });
    s.victim.kill();
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId, no_wait: true });
    await until(async () => (await s.c.host(s.disk, s.victim)).state === 'HOST_STATE_CUTTING', 'cutting');
    await new Promise((resolve) => setTimeout(resolve, 800));
    await s.c.restart();
    await s.other.connect();
    const pages = s.other.orders.filter((order) => order.write_fence).length;
    const started = performance.now();
    await s.c.rpc('FenceNode', { node_id: s.victim.nodeId });
    expect(performance.now() - started).toBeGreaterThan(1500);
    expect(s.other.orders.filter((order) => order.write_fence).length).toBe(pages + 1);
    await s.c.unpublish(s.uuid, s.victim);
    await moves(s);
  });
});

describe('class C, waiting for a person', () => {
  it('unpublish says which command to run; the command completes it', async () => {
    const s = await scene('FENCING_CLASS_MANUAL');
    s.victim.kill();
    await expect(s.c.unpublish(s.uuid, s.victim)).rejects.toMatchObject({
      code: 'FENCE_NEEDS_CONFIRMATION',
      message: expect.stringContaining('holdfast node confirm-off victim.00000001'),
    });
    expect((await s.c.host(s.disk, s.victim)).waiting_for).toContain('confirm-off victim.00000001');
    await expect(s.c.rpc('ConfirmNodeOff', { node_id: s.victim.nodeId })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    await s.c.rpc('ConfirmNodeOff', { node_id: s.victim.nodeId, confirmed_by: 'ada' });
    await s.c.unpublish(s.uuid, s.victim);
    const dead = (await s.c.audit({ node_id: s.victim.nodeId })).find((record) => record.event === 'dead');
    expect(dead?.proof).toBe('confirmed-off: ada says that the machine is off');
    await moves(s);
  });

  it('the word of a person before the fence has begun fences the node, with its page', async () => {
    const s = await scene('FENCING_CLASS_MANUAL');
    s.victim.kill();
    await until(
      async () =>
        (await s.c.rpc<{ nodes: { node_id: string; connected: boolean }[] }>('ListNodes')).nodes.some(
          (node) => node.node_id === s.victim.nodeId && !node.connected,
        ),
      'disconnected',
    );
    await s.c.rpc('ConfirmNodeOff', { node_id: s.victim.nodeId, confirmed_by: 'ada' });
    await until(async () => (await s.c.host(s.disk, s.victim)).state === 'HOST_STATE_DEAD', 'dead');
    expect(s.disk.fenced(0)).toBe(1n);
    expect((await s.c.volume(s.uuid)).grant).toBe('GRANT_STATE_FREE');
  });

  it('is refused for a node whose agent is connected, and for one that nobody knows', async () => {
    const s = await scene('FENCING_CLASS_MANUAL');
    const confirm = (node: string): Promise<object> =>
      s.c.rpc('ConfirmNodeOff', { node_id: node, confirmed_by: 'ada' });
    await expect(confirm(s.victim.nodeId)).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    await expect(confirm('nobody.00000000')).rejects.toMatchObject({ code: 'NOT_FOUND' });
    expect((await s.c.host(s.disk, s.victim)).state).toBe('HOST_STATE_LIVE');
  });

  it('is no proof for a pool whose class is another', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    s.victim.freeze();
    s.victim.disconnect();
    await until(async () => {
      try {
        await s.c.rpc('ConfirmNodeOff', { node_id: s.victim.nodeId, confirmed_by: 'ada' });
        return true;
      } catch {
        return false;
      }
    }, 'disconnected');
    expect((await s.c.host(s.disk, s.victim)).state).toBe('HOST_STATE_LIVE');
  });

  it('a new boot of the same machine completes it, of another machine does not', async () => {
    const s = await scene('FENCING_CLASS_MANUAL');
    s.victim.kill();
    await expect(s.c.unpublish(s.uuid, s.victim)).rejects.toMatchObject({ code: 'FENCE_NEEDS_CONFIRMATION' });
    s.victim.machineId = 'machine-9';
    s.victim.bootId = 'boot-9';
    await s.victim.connect();
    expect((await s.c.host(s.disk, s.victim)).state).toBe('HOST_STATE_CUTTING');
    await expect(s.victim.join(s.disk, true)).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    s.victim.disconnect();
    s.victim.machineId = 'machine-1';
    await s.victim.connect();
    await until(async () => (await s.c.host(s.disk, s.victim)).state === 'HOST_STATE_DEAD', 'dead');
    await s.c.unpublish(s.uuid, s.victim);
    await moves(s);
  });
});

describe("a dead host's slabs", () => {
  it('go to their layers by their pages before the volume is granted again', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    await s.victim.allocate(s.disk, 8);
    const grant = s.victim.open.get(s.uuid)!;
    const reported = s.victim.claim(s.disk, grant);
    await s.victim.ask('ReportSlabs', s.disk, { claimed: [reported] });
    s.victim.claim(s.disk, grant);
    s.victim.claim(s.disk, grant); // claimed on disk, never reported
    s.victim.kill();
    s.other.mute.add('scan_slabs');
    await s.c.unpublish(s.uuid, s.victim);
    expect(await s.c.pool(s.disk)).toMatchObject({ slabs_free: '1016', slabs_ahead: '7' });
    const publishId = await s.c.publish(s.uuid, s.other);
    await expect(
      s.other.ask('StageVolume', s.disk, { volume_uuid: s.uuid, publish_id: publishId }, 800),
    ).rejects.toThrow('have been read from the pool');
    s.other.mute.clear();
    await s.c.restart();
    await s.other.connect();
    await s.other.accepted(s.disk);
    const next = await s.other.openVolume(s.disk, s.uuid, publishId);
    expect(next.layers[0]?.slabs).toEqual([{ first: '0', count: 3, generation: '1' }]);
    expect(await s.c.pool(s.disk)).toMatchObject({ slabs_free: '1021', slabs_ahead: '0' });
  });

  it('with two bad pages are never taken for empty: the volume is refused and the slab named', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    await s.victim.allocate(s.disk, 4);
    s.victim.claim(s.disk, s.victim.open.get(s.uuid)!);
    s.disk.pages.get(0)!.bad = true;
    s.victim.kill();
    await s.c.unpublish(s.uuid, s.victim);
    const publishId = await s.c.publish(s.uuid, s.other);
    await expect(s.other.stage(s.disk, s.uuid, publishId)).rejects.toMatchObject({
      code: 'CORRUPT',
      message: expect.stringMatching(/slabs 0 both copies/),
    });
    expect(await s.c.pool(s.disk)).toMatchObject({ slabs_free: '1023', slabs_ahead: '0' });
  });

  it('are stale in any later message of that host', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    const runs = await s.victim.allocate(s.disk, 4);
    const grant = s.victim.open.get(s.uuid)!;
    const claim = s.victim.claim(s.disk, grant);
    const host = s.victim.hosts.get(s.disk.uuid)!;
    s.victim.kill();
    await s.c.unpublish(s.uuid, s.victim);
    await until(async () => (await s.c.pool(s.disk)).slabs_ahead === '0', 'scanned');
    const before = await s.c.pool(s.disk);
    const late = [
      s.victim.ask('ReturnSlabs', s.disk, { host, unclaimed: runs }),
      s.victim.ask('ReturnSlabs', s.disk, { host, emptied: [claim] }),
      s.victim.ask('ReportSlabs', s.disk, { host, claimed: [{ ...claim, slab: '2' }] }),
      s.victim.ask('AllocateSlabs', s.disk, { host, count: 1 }),
      s.victim.ask('VolumeOpened', s.disk, { host, volume_uuid: s.uuid, epoch: grant.epoch }),
    ];
    for (const answer of await Promise.allSettled(late)) {
      expect(answer).toMatchObject({ status: 'rejected', reason: { code: 'STALE' } });
    }
    expect(await s.c.pool(s.disk)).toEqual(before);
  });

  it('wait for a deleted volume too: it is wiped after they have been read', async () => {
    const s = await scene('FENCING_CLASS_LOOP');
    await s.victim.allocate(s.disk, 4);
    s.victim.claim(s.disk, s.victim.open.get(s.uuid)!);
    s.victim.kill();
    await s.c.unpublish(s.uuid, s.victim);
    await s.c.rpc('DeleteVolume', { uuid: s.uuid });
    await until(async () => (await s.c.pool(s.disk)).slabs_free === '1024', 'all slabs free');
    expect([s.disk.pages.size, s.disk.records.size]).toEqual([0, 0]);
  });
});

describe('FenceNode', () => {
  it('fences a node that is well, on one pool or all, and is success for one that is dead', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY');
    const request = { node_id: s.victim.nodeId, pool_uuid: s.disk.uuid, reason: 'drill' };
    await s.c.rpc('FenceNode', request);
    await s.c.rpc('FenceNode', request);
    const records = await s.c.audit({ node_id: s.victim.nodeId });
    expect(
      records.filter((record) => record.event === 'fence-intent').map((record) => record.detail),
    ).toEqual(['drill']);
  });

  it('of an unknown node or pool is NOT_FOUND', async () => {
    const s = await scene('FENCING_CLASS_LEASE_ONLY');
    for (const request of [{ node_id: 'nobody' }, { node_id: s.victim.nodeId, pool_uuid: randomUUID() }]) {
      await expect(s.c.rpc('FenceNode', request)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    }
  });
});
