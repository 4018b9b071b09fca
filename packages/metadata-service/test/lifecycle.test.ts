/** A volume's whole life through the service's API, with agents that are well. */
import { randomUUID } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { Cluster } from './cluster.ts';
import { FakeDisk } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-lifecycle-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));
let cluster: Cluster | undefined;
afterEach(async () => {
  await cluster?.stop();
  cluster = undefined;
});

describe.each(['memory', 'sqlite'] as const)('on the %s store', (kind) => {
  const start = async (): Promise<Cluster> => {
    cluster = await Cluster.start({
      store: kind === 'memory' ? 'memory' : `sqlite:${directory}/${randomUUID()}.db`,
    });
    return cluster;
  };

  it('a volume is created, published, staged, opened, written, returned, moved, grown and deleted', async () => {
    const c = await start();
    const disk = new FakeDisk();
    const first = await c.node('node-1', [disk]);
    const second = await c.node('node-2', [disk]);
    expect(disk.authority.store_id).not.toBe('');
    expect(await c.pool(disk)).toMatchObject({ state: 'ACTIVE', slabs_free: '1024' });

    const created = await c.create('pvc-1', { parameters: { fs: 'ext4' } });
    expect(created).toMatchObject({
      name: 'pvc-1',
      pool_uuid: disk.uuid,
      state: 'READY',
      epoch: '0',
      grant: 'GRANT_STATE_FREE',
    });
    expect(created.layers).toHaveLength(1);
    const publishId = await c.publish(created.uuid, first);
    expect(await c.publish(created.uuid, first)).toBe(publishId);

    const grant = await first.openVolume(disk, created.uuid, publishId);
    expect(grant).toMatchObject({
      volume_id: created.volume_id,
      slot: created.slot,
      parameters: { fs: 'ext4' },
      read_only: false,
    });
    expect(BigInt(grant.epoch)).toBe((1n << 40n) + 1n);
    expect(await c.volume(created.uuid)).toMatchObject({
      grant: 'GRANT_STATE_OPEN',
      granted_node_id: first.nodeId,
    });

    expect(await first.allocate(disk, 8)).toEqual([{ first: '0', count: 8, generation: '1' }]);
    const claims = [first.claim(disk, grant), first.claim(disk, grant), first.claim(disk, grant)];
    await first.ask('ReportSlabs', disk, { claimed: claims });
    expect(await c.volume(created.uuid)).toMatchObject({
      allocated_bytes: String(3 * disk.slabSize),
      layers: [{ slabs: [{ first: '0', count: 3, generation: '1' }] }],
    });
    expect(await c.pool(disk)).toMatchObject({ slabs_free: '1016', slabs_ahead: '5' });
    await first.ask('ReturnSlabs', disk, { emptied: [claims[1]], unclaimed: first.stock.get(disk.uuid) });
    expect(await c.pool(disk)).toMatchObject({ slabs_free: '1022', slabs_ahead: '0' });

    await expect(c.publish(created.uuid, second)).rejects.toMatchObject({ code: 'PUBLISHED_ELSEWHERE' });
    await first.returnVolume(disk, created.uuid);
    await c.unpublish(created.uuid, first);
    const again = await second.openVolume(disk, created.uuid, await c.publish(created.uuid, second));
    expect(BigInt(again.epoch)).toBe(BigInt(grant.epoch) + 1n);
    expect(again.layers[0]?.slabs).toEqual([
      { first: '0', count: 1, generation: '1' },
      { first: '2', count: 1, generation: '1' },
    ]);

    const grown = await c.rpc('ExpandVolume', { uuid: created.uuid, size_bytes: String(2 * 2 ** 30) });
    expect(grown).toMatchObject({ size_bytes: String(2 * 2 ** 30) });
    expect(
      second.messages.some((message) => message.volume_resized?.size_bytes === String(2 * 2 ** 30)),
    ).toBe(true);

    await expect(c.rpc('DeleteVolume', { uuid: created.uuid })).rejects.toMatchObject({ code: 'IN_USE' });
    await second.returnVolume(disk, created.uuid);
    await c.unpublish(created.uuid, second);
    await c.rpc('DeleteVolume', { uuid: created.uuid });
    await expect.poll(async () => (await c.pool(disk)).slabs_free).toBe('1024');
    await expect(c.volume(created.uuid)).rejects.toMatchObject({ code: 'NOT_FOUND' });
    expect(disk.records.size).toBe(0);
    const events = (await c.audit({ volume_uuid: created.uuid })).map((record) => record.event);
    expect(events).toEqual([
      'create',
      'publish',
      'grant',
      'opened',
      'returned',
      'unpublish',
      'publish',
      'grant',
      'opened',
      'expand',
      'returned',
      'unpublish',
      'delete',
      'wiped',
    ]);
  });
});
