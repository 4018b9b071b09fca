/** What the service tells about nodes to somebody who thinks of fencing them, and fences that are asked for with conditions. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { FencingClass, Host__Output, Node__Output } from '@holdfast/proto';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk, until, type FakeAgent } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-standing-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));
let cluster: Cluster | undefined;
afterEach(async () => {
  await cluster?.stop();
  cluster = undefined;
});

async function scene(
  fencing: FencingClass = 'FENCING_CLASS_LEASE_ONLY',
): Promise<{ c: Cluster; disk: FakeDisk; victim: FakeAgent; other: FakeAgent }> {
  const c = await Cluster.start({ store: `sqlite:${directory}/${randomUUID()}.db` });
  cluster = c;
  const disk = Object.assign(new FakeDisk(), { fencing });
  const victim = await c.node('victim', [disk]);
  const other = await c.node('other', [disk], { machineId: 'machine-2', bootId: 'boot-2' });
  return { c, disk, victim, other };
}

async function nodes(c: Cluster, request: object = {}): Promise<Node__Output[]> {
  return (await c.rpc<{ nodes: Node__Output[] }>('ListNodes', request)).nodes;
}

async function victimHost(c: Cluster): Promise<Host__Output> {
  const [node] = await nodes(c, { name: 'victim' });
  if (node?.hosts[0] === undefined) throw new Error('the victim is no host');
  return node.hosts[0];
}

describe('the standing of a node', () => {
  it('tells for how long its agent is away, and lists only troubled ones when asked to', async () => {
    const { c, victim } = await scene();
    expect(await nodes(c, { only_troubled: true })).toEqual([]);
    victim.disconnect();
    await until(async () => Number((await nodes(c, { name: 'victim' }))[0]?.silent_ms) >= 300, 'silence');
    const troubled = await nodes(c, { only_troubled: true });
    expect(troubled.map((node) => [node.name, node.connected])).toEqual([['victim', false]]);
    await victim.connect();
    expect((await nodes(c, { name: 'victim' }))[0]).toMatchObject({ connected: true, silent_ms: '0' });
  });

  it('counts the silence of a node from its own start at most: it has missed nobody before', async () => {
    const { c, victim } = await scene();
    victim.disconnect();
    await until(async () => Number((await nodes(c, { name: 'victim' }))[0]?.silent_ms) >= 500, 'silence');
    await c.restart();
    expect(Number((await nodes(c, { name: 'victim' }))[0]?.silent_ms)).toBeLessThan(500);
  });

  it('has the number of volumes that this life has open', async () => {
    const { c, disk, victim } = await scene();
    expect((await victimHost(c)).held_volumes).toBe(0);
    const { uuid } = await c.create('pvc-1');
    await victim.openVolume(disk, uuid, await c.publish(uuid, victim));
    expect((await victimHost(c)).held_volumes).toBe(1);
    await c.unpublish(uuid, victim);
    expect((await victimHost(c)).held_volumes).toBe(0);
  });

  it('has the heartbeat as others read it: it goes on without an agent, and stands when the engine is dead', async () => {
    const { c, victim } = await scene();
    expect((await victimHost(c)).heartbeat_read).toBe(false);
    victim.disconnect();
    await until(async () => (await victimHost(c)).heartbeat_read, 'a reading');
    for (let look = 0; look < 10; look++) {
      expect(Number((await victimHost(c)).heartbeat_still_ms)).toBeLessThan(400);
      await new Promise((resolve) => setTimeout(resolve, 60));
    }
    victim.stopHeart();
    await until(
      async () => Number((await victimHost(c)).heartbeat_still_ms) >= 600,
      'a heartbeat that stands',
    );
    await victim.connect();
    await until(async () => !(await victimHost(c)).heartbeat_read, 'the reading to end');
  });

  it('says nothing about a heartbeat that nobody can read', async () => {
    const { c, victim, other } = await scene();
    victim.disconnect();
    await until(async () => (await victimHost(c)).heartbeat_read, 'a reading');
    other.mute.add('read_heartbeat');
    victim.stopHeart();
    await new Promise((resolve) => setTimeout(resolve, 700));
    expect(Number((await victimHost(c)).heartbeat_still_ms)).toBeLessThan(400);
  });

  it('tells the proof of a death, and that it means a machine that is off only where somebody said so', async () => {
    const { c, victim } = await scene();
    victim.kill();
    await c.rpc('FenceNode', { node_id: victim.nodeId });
    expect(await victimHost(c)).toMatchObject({ state: 'HOST_STATE_DEAD', machine_off: false });
    expect((await victimHost(c)).proof).toContain('lease-expired');
    await c.rpc('ConfirmNodeOff', { node_id: victim.nodeId, confirmed_by: 'ops' });
    expect(await victimHost(c)).toMatchObject({ state: 'HOST_STATE_DEAD', machine_off: true });
    expect((await victimHost(c)).proof).toMatch(/^lease-expired: .*; confirmed-off: ops says/);
    await c.rpc('ConfirmNodeOff', { node_id: victim.nodeId, confirmed_by: 'ops again' });
    expect((await victimHost(c)).proof).not.toContain('again');
  });

  it('tells that a fence waits for a person', async () => {
    const { c, victim } = await scene('FENCING_CLASS_MANUAL');
    victim.kill();
    await c.rpc('FenceNode', { node_id: victim.nodeId, no_wait: true });
    await until(async () => (await victimHost(c)).needs_confirmation, 'the need of a person');
    expect((await victimHost(c)).waiting_for).toContain('confirm-off');
    await c.rpc('ConfirmNodeOff', { node_id: victim.nodeId, confirmed_by: 'ops' });
    await until(async () => (await victimHost(c)).machine_off, 'the end of the fence');
    expect((await victimHost(c)).needs_confirmation).toBe(false);
  });
});

describe('a fence with conditions', () => {
  it('of one life does nothing to a later one', async () => {
    const { c, disk, victim } = await scene();
    const request = { node_id: victim.nodeId, pool_uuid: disk.uuid, no_wait: true };
    await expect(c.rpc('FenceNode', { ...request, generation: '2' })).rejects.toMatchObject({
      code: 'STALE',
    });
    expect((await victimHost(c)).state).toBe('HOST_STATE_LIVE');
    await c.rpc('FenceNode', { ...request, generation: '1' });
    await until(async () => (await victimHost(c)).state === 'HOST_STATE_DEAD', 'the death');
    // It joins, however often it is asked for.
    await c.rpc('FenceNode', { ...request, generation: '1' });
    await victim.join(disk);
    await expect(c.rpc('FenceNode', { ...request, generation: '1' })).rejects.toMatchObject({
      code: 'STALE',
    });
    expect(await victimHost(c)).toMatchObject({ state: 'HOST_STATE_LIVE', generation: '2' });
  });

  it('of a silent node is refused when its agent is there', async () => {
    const { c, victim } = await scene();
    const request = { node_id: victim.nodeId, unless_connected: true, no_wait: true };
    await expect(c.rpc('FenceNode', request)).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    expect((await victimHost(c)).state).toBe('HOST_STATE_LIVE');
    victim.kill();
    await until(async () => !(await nodes(c, { name: 'victim' }))[0]?.connected, 'the loss');
    await c.rpc('FenceNode', request);
    expect((await victimHost(c)).state).not.toBe('HOST_STATE_LIVE');
  });

  it('goes on through a restart of the service, and a call afterwards joins it', async () => {
    const { c, disk, victim, other } = await scene();
    victim.kill();
    await c.rpc('FenceNode', { node_id: victim.nodeId, no_wait: true });
    await c.restart();
    await other.connect();
    await c.rpc('FenceNode', { node_id: victim.nodeId, pool_uuid: disk.uuid, generation: '1' });
    expect((await victimHost(c)).state).toBe('HOST_STATE_DEAD');
  });

  it('needs a pool for a generation', async () => {
    const { c, victim } = await scene();
    await expect(c.rpc('FenceNode', { node_id: victim.nodeId, generation: '1' })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
  });
});
