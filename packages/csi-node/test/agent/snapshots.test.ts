/** What the agent does with the orders that snapshots are made of, on an engine in memory. */
import { randomUUID } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { credentials } from '@grpc/grpc-js';
import { call } from '@holdfast/common';
import { holdfast, type Grant, type Layer, type NodeAgentClient, type VolumeCut } from '@holdfast/proto';
import { TestArea, waitFor } from '@holdfast/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { FileSystemFreezer, Frozen } from '../../src/agent/freeze.ts';
import type { Agent } from '../../src/agent/index.ts';
import { FakeDisk, FakeNative, type FakeVolume } from './fake-native.ts';
import { poolJoined, startOneNode } from './one-node.ts';
import { ScriptedService } from './scripted-service.ts';

const SIZE = 1 << 30;

/** Notes what is frozen, and thaws in time as the real one does. */
class FakeFreezer implements FileSystemFreezer {
  readonly frozen = new Set<string>();
  readonly log: string[] = [];
  failFor = '';
  async freeze(device: string, timeoutMs: number): Promise<Frozen> {
    if (device === this.failFor) throw new Error('busy writing back');
    this.frozen.add(device);
    this.log.push(`freeze ${device}`);
    const thaw = async (): Promise<void> => {
      clearTimeout(timer);
      if (this.frozen.delete(device)) this.log.push(`thaw ${device}`);
    };
    const timer = setTimeout(() => void thaw(), timeoutMs);
    const holds = (): boolean => this.frozen.has(device);
    return {
      get holds() {
        return holds();
      },
      thaw,
    };
  }
  async thawLeftOver(): Promise<void> {
    this.log.push('thaw left over');
  }
}

describe('snapshot orders', () => {
  let area: TestArea;
  let disk: FakeDisk;
  let service: ScriptedService;
  let native: FakeNative;
  let freezer: FakeFreezer;
  let agent: Agent;
  let api: NodeAgentClient;

  const startTheAgent = async (): Promise<void> => {
    agent = await startOneNode(area, { disk, service, native, freezer });
  };

  beforeEach(async () => {
    area = await TestArea.create('agent-snapshots');
    disk = new FakeDisk();
    service = new ScriptedService(disk);
    await service.start();
    native = new FakeNative(disk);
    freezer = new FakeFreezer();
    await startTheAgent();
    api = new holdfast.NodeAgent(`unix:${area.path('agent.sock')}`, credentials.createInsecure());
    await poolJoined(api);
  });
  afterEach(async () => {
    api.close();
    await agent.handOver();
    await service.stop();
    await area.dispose();
  });

  const layer = (id: number, parent = 0, over: Partial<Layer> = {}): Layer => ({
    layer_id: String(id),
    slot: id,
    parent_layer_id: String(parent),
    birth: String(id),
    size_bytes: String(SIZE),
    frozen: false,
    slabs: [],
    ...over,
  });
  let nextVolume = 1;
  const grantOf = (layers: Layer[], over: Partial<Grant> = {}): Grant => {
    const id = nextVolume++;
    return {
      volume_uuid: randomUUID(),
      volume_id: String(id),
      slot: id,
      name: `v${id}`,
      size_bytes: String(SIZE),
      epoch: '5',
      layers,
      parameters: {},
      ...over,
    };
  };
  const open = async (grant: Grant, publishId = 'p1'): Promise<FakeVolume> => {
    const uuid = grant.volume_uuid ?? '';
    service.grants.set(uuid, grant);
    await call(api, api.OpenVolume, {
      pool_uuid: disk.info.uuid,
      volume_uuid: uuid,
      publish_id: publishId,
      read_only: grant.read_only ?? false,
    });
    return native.pool.volume(uuid);
  };
  const claim = async (volume: FakeVolume, count: number): Promise<string[]> => {
    await waitFor('slabs ahead', () => (native.pool.stock().length > 0 ? true : undefined));
    return volume.claim(count).map(String);
  };
  const cutOf = (grant: Grant, top: Layer, over: Partial<VolumeCut> = {}): VolumeCut => ({
    volume_uuid: grant.volume_uuid ?? '',
    epoch: grant.epoch ?? '',
    top,
    snapshot_name: 'snap-1',
    snapshot_unix_ms: '1000',
    ...over,
  });
  const cut = (cuts: VolumeCut[], over: object = {}) =>
    service.order({ cut_volumes: { cuts, hold_timeout_ms: 2000, ...over } });
  const hold = (cutId: string, grants: Grant[], over: object = {}) =>
    service.order({
      hold_volumes: {
        cut_id: cutId,
        volumes: grants.map(({ volume_uuid, epoch }) => ({ volume_uuid, epoch })),
        hold_timeout_ms: 2000,
        ...over,
      },
    });
  const heldAfterReconnect = async () => {
    service.held = [];
    service.breakSession();
    return waitFor('the next hello', () => (service.held.length > 0 ? service.held : undefined));
  };

  it('cuts an open volume: all slabs of the frozen layer go into the answer, and the new top holds only its own', async () => {
    const grant = grantOf([layer(10)]);
    const volume = await open(grant);
    const old = await claim(volume, 2);
    const result = await cut([cutOf(grant, layer(11, 10))]);
    expect(result).toMatchObject({ error_code: '', result: 'cut' });
    const [answer] = result.cut?.volumes ?? [];
    expect(answer).toMatchObject({
      volume_uuid: grant.volume_uuid,
      size_bytes: String(SIZE),
      held_us: '1500',
    });
    expect(answer?.claimed.map((slab) => [slab.slab, slab.layer_id, slab.volume_id])).toEqual(
      old.map((slab) => [slab, '10', grant.volume_id]),
    );
    expect(disk.layers.get(10n)).toMatchObject({ state: 'frozen', snapshotName: 'snap-1' });
    const fresh = await claim(volume, 1);
    const [held] = await heldAfterReconnect();
    expect(held?.claimed.map((slab) => [slab.slab, slab.layer_id])).toEqual(
      fresh.map((slab) => [slab, '11']),
    );
    await waitFor('every claim is reported', () => (service.reported.length === 3 ? true : undefined));
    expect(new Set(service.reported.map((slab) => `${slab.slab}/${slab.layer_id}`))).toEqual(
      new Set([...old.map((slab) => `${slab}/10`), ...fresh.map((slab) => `${slab}/11`)]),
    );
  });

  it('takes a repeated cut, by the same or a new order, for done', async () => {
    const grant = grantOf([layer(10)]);
    const volume = await open(grant);
    const slabs = await claim(volume, 1);
    const request = { cut_volumes: { cuts: [cutOf(grant, layer(11, 10))], hold_timeout_ms: 2000 } };
    for (const id of ['one', 'one', 'two']) {
      const result = await service.order(request, id);
      expect(result.cut?.volumes[0]?.claimed.map((slab) => slab.slab)).toEqual(slabs);
    }
    expect(volume.spec.layers.map((each) => each.layerId)).toEqual([11n, 10n]);
  });

  it('says why a cut failed, and the volume goes on under its old top', async () => {
    const grant = grantOf([layer(10)]);
    const volume = await open(grant);
    volume.failNextCut = true;
    expect(await cut([cutOf(grant, layer(11, 10))])).toMatchObject({ error_code: 'HF_IO' });
    const slabs = await claim(volume, 1);
    expect((await heldAfterReconnect())[0]?.claimed.map((slab) => slab.layer_id)).toEqual(['10']);
    expect((await cut([cutOf(grant, layer(11, 10))])).cut?.volumes[0]?.claimed[0]?.slab).toBe(slabs[0]);
  });

  it('refuses another epoch than the one it is open under, and what is not open', async () => {
    const grant = grantOf([layer(10)]);
    await open(grant);
    expect(await cut([cutOf(grant, layer(11, 10), { epoch: '4' })])).toMatchObject({ error_code: 'STALE' });
    const other = grantOf([layer(20)]);
    expect(await cut([cutOf(other, layer(21, 20))])).toMatchObject({ error_code: 'UNKNOWN_VOLUME' });
    expect(disk.layers.has(11n)).toBe(false);
  });

  it('refuses a cut whose giver is not the one that the disk names', async () => {
    const grant = grantOf([layer(10)]);
    await open(grant);
    disk.authority = { store: service.storeId, incarnation: 1n, term: 2n, unclaimed: false };
    expect(await cut([cutOf(grant, layer(11, 10))])).toMatchObject({ error_code: 'STALE' });
    expect(disk.layers.has(11n)).toBe(false);
  });

  describe('of a closed volume', () => {
    const slabs = [{ first: '7', count: 2, generation: '3' }];

    it('opens it under the grant without a device, cuts, closes, and gives the grant back with the answer', async () => {
      const grant = grantOf([layer(10, 0, { slabs })]);
      disk.owners.set(7n, { slab: 7n, layerId: 10n, volumeId: 1n, generation: 3n, state: 'claimed' });
      disk.owners.set(8n, { slab: 8n, layerId: 10n, volumeId: 1n, generation: 3n, state: 'claimed' });
      const result = await cut([cutOf(grant, layer(11, 10), { epoch: '0', grant })]);
      expect(result.cut?.volumes[0]).toMatchObject({ epoch: '5', size_bytes: String(SIZE) });
      expect(result.cut?.volumes[0]?.claimed.map((slab) => slab.slab)).toEqual(['7', '8']);
      expect(disk.records.get(grant.slot ?? 0)).toMatchObject({
        state: 'closed',
        epoch: 5n,
        topLayerId: 11n,
      });
      expect(native.pool.volumes()).toEqual([]);
      expect((await call(api, api.ListOpenVolumes, {})).volumes).toEqual([]);
      expect(service.returned).toEqual([]);
      // The answer was lost, and the order comes again under the same grant.
      const again = await cut([cutOf(grant, layer(11, 10), { epoch: '0', grant })]);
      expect(again.cut?.volumes[0]).toMatchObject({ epoch: '5' });
      expect(again.cut?.volumes[0]?.claimed.map((slab) => slab.slab)).toEqual(['7', '8']);
      // Or under a newer one, whose chain does not know of the cut yet.
      const newer = { ...grant, epoch: '6' };
      expect((await cut([cutOf(newer, layer(11, 10), { grant: newer })])).cut?.volumes[0]).toMatchObject({
        epoch: '6',
      });
      expect(disk.records.get(grant.slot ?? 0)).toMatchObject({
        state: 'closed',
        epoch: 6n,
        topLayerId: 11n,
      });
    });

    it('that is being opened here too, whose grant waits for the cut', async () => {
      const grant = grantOf([layer(10, 0, { slabs })]);
      let cutIsDone = (): void => undefined;
      service.beforeGrant = new Promise((resolve) => {
        cutIsDone = resolve;
      });
      const opened = open({
        ...grant,
        epoch: '6',
        layers: [layer(11, 10), layer(10, 0, { frozen: true, slabs })],
      });
      await waitFor('the grant to be asked for', () => service.asked || undefined);
      const result = await cut([cutOf(grant, layer(11, 10), { epoch: '0', grant })]);
      expect(result).toMatchObject({ error_code: '', result: 'cut' });
      cutIsDone();
      await opened;
      expect(disk.records.get(grant.slot ?? 0)).toMatchObject({ state: 'open', epoch: 6n, topLayerId: 11n });
    }, 60_000);

    it('returns the grant by itself when it fails, and nothing stays open', async () => {
      const grant = grantOf([layer(10)]);
      native.pool.failNextCut = true;
      expect(await cut([cutOf(grant, layer(11, 10), { grant })])).toMatchObject({ error_code: 'HF_IO' });
      expect(disk.records.get(grant.slot ?? 0)).toMatchObject({
        state: 'closed',
        epoch: 5n,
        topLayerId: 10n,
      });
      await waitFor('the return', () => (service.returned.length === 1 ? true : undefined));
      expect(service.returned[0]).toMatchObject({ volume_uuid: grant.volume_uuid, epoch: '5' });
      expect(native.pool.volumes()).toEqual([]);
    });

    it('closes by force what can not be closed politely', async () => {
      const grant = grantOf([layer(10)]);
      native.pool.failNextClose = true;
      expect((await cut([cutOf(grant, layer(11, 10), { grant })])).cut?.volumes[0]?.epoch).toBe('5');
      expect(disk.records.get(grant.slot ?? 0)).toMatchObject({ state: 'closed', topLayerId: 11n });
      expect(native.pool.volumes()).toEqual([]);
    });

    it('never opens under a grant that was revoked, nor one that is open here', async () => {
      const grant = grantOf([layer(10)]);
      await service.order({ revoke: { volume_uuid: grant.volume_uuid ?? '', epoch: '5' } });
      expect(await cut([cutOf(grant, layer(11, 10), { grant })])).toMatchObject({ error_code: 'STALE' });
      const second = grantOf([layer(20)]);
      await open(second);
      const newer = { ...second, epoch: '6' };
      expect(await cut([cutOf(second, layer(21, 20), { grant: newer })])).toMatchObject({
        error_code: 'STALE',
      });
      expect([disk.layers.has(11n), disk.layers.has(21n)]).toEqual([false, false]);
    });
  });

  describe('of a group', () => {
    let one: Grant;
    let two: Grant;
    let volumes: FakeVolume[];
    beforeEach(async () => {
      [one, two] = [grantOf([layer(10)]), grantOf([layer(20)])];
      volumes = [await open(one), await open(two)];
    });
    const cuts = (): VolumeCut[] => [cutOf(one, layer(11, 10)), cutOf(two, layer(21, 20))];

    it('holds all, cuts all, and lets go', async () => {
      expect((await hold('g', [one, two])).error_code).toBe('');
      expect(volumes.map((volume) => volume.writes)).toEqual(['held', 'held']);
      const result = await cut(cuts(), { cut_id: 'g' });
      expect(result.cut?.volumes.map((volume) => volume.volume_uuid).sort()).toEqual(
        [one.volume_uuid, two.volume_uuid].sort(),
      );
      expect(volumes.map((volume) => volume.writes)).toEqual(['go on', 'go on']);
      // Another order for the same cut: what was cut is cut, also when nothing is held any more.
      expect((await cut(cuts(), { cut_id: 'g' })).cut?.volumes).toHaveLength(2);
    });

    it('cuts nothing when the hold is over, was released, or never was', async () => {
      for (const prepare of [
        async () => undefined,
        async () => {
          await hold('g', [one, two]);
          await service.order({ release_volumes: { cut_id: 'g' } });
          await service.order({ release_volumes: { cut_id: 'g' } });
        },
        async () => {
          await hold('g', [one, two], { hold_timeout_ms: 50 });
          await waitFor('the end of the hold', () =>
            volumes.every((volume) => volume.writes === 'go on') ? true : undefined,
          );
        },
        async () => void (await hold('g', [one])),
      ]) {
        await prepare();
        expect(await cut(cuts(), { cut_id: 'g' })).toMatchObject({ error_code: 'HF_HOLD_EXPIRED' });
        expect(disk.layers.has(11n) || disk.layers.has(21n)).toBe(false);
        await service.order({ release_volumes: { cut_id: 'g' } });
      }
    });

    it('is held once, however often and by however many orders it is asked for', async () => {
      const asked = [1, 2, 3].map(() => hold('g', [one, two], { quiesce: true }));
      expect((await Promise.all(asked)).map((result) => result.error_code)).toEqual(['', '', '']);
      expect((await hold('g', [one, two], { quiesce: true })).error_code).toBe('');
      expect(freezer.log.filter((line) => line.startsWith('freeze'))).toHaveLength(2);
      await service.order({ release_volumes: { cut_id: 'g' } });
      await waitFor('the release', () =>
        volumes.every((volume) => volume.writes === 'go on') && freezer.frozen.size === 0 ? true : undefined,
      );
      expect((await cut(cuts(), { cut_id: 'g' })).error_code).toBe('HF_HOLD_EXPIRED');
    });

    it('lets all go when one can not be held', async () => {
      await volumes[1]?.hold(5000);
      expect(await hold('g', [one, two])).toMatchObject({ error_code: 'HF_BUSY' });
      await waitFor('the first to go on', () => (volumes[0]?.writes === 'go on' ? true : undefined));
      await volumes[1]?.release();
    });

    it('lets go of what it holds when it stops', async () => {
      await hold('g', [one, two], { quiesce: true, hold_timeout_ms: 60_000 });
      expect(freezer.frozen.size).toBe(2);
      await agent.handOver();
      expect(volumes.map((volume) => volume.writes)).toEqual(['go on', 'go on']);
      expect(freezer.frozen.size).toBe(0);
      await startTheAgent();
      expect(freezer.log.at(-1)).toBe('thaw left over');
    });
  });

  describe('with quiesce', () => {
    it('freezes the file system before writes are held, and thaws it after the cut', async () => {
      const grant = grantOf([layer(10)]);
      const volume = await open(grant);
      const device = volume.export.devicePath;
      expect((await cut([cutOf(grant, layer(11, 10))], { quiesce: true })).error_code).toBe('');
      await waitFor('the thaw', () => (freezer.frozen.size === 0 ? true : undefined));
      expect(freezer.log.slice(1)).toEqual([`freeze ${device}`, `thaw ${device}`]);
    });

    it('thaws when the cut fails, when the freeze of another one fails, and when nobody cuts', async () => {
      const [one, two] = [grantOf([layer(10)]), grantOf([layer(20)])];
      const volume = await open(one);
      const other = await open(two);
      const thawed = () => waitFor('the thaw', () => (freezer.frozen.size === 0 ? true : undefined));
      volume.failNextCut = true;
      expect(await cut([cutOf(one, layer(11, 10))], { quiesce: true })).toMatchObject({
        error_code: 'HF_IO',
      });
      await thawed();
      freezer.failFor = other.export.devicePath;
      expect(await hold('g', [one, two], { quiesce: true })).toMatchObject({ error_code: 'INTERNAL' });
      await thawed();
      expect(volume.writes).toBe('go on');
      freezer.failFor = '';
      await hold('g', [one, two], { quiesce: true, hold_timeout_ms: 80 });
      expect(freezer.frozen.size).toBe(2);
      await thawed();
      expect(await cut([cutOf(one, layer(11, 10))], { cut_id: 'g', quiesce: true })).toMatchObject({
        error_code: 'HF_HOLD_EXPIRED',
      });
    });
  });

  it('knows the new top of a volume that was cut before the agent was taken over', async () => {
    const grant = grantOf([layer(10)]);
    const volume = await open(grant);
    await claim(volume, 1);
    await cut([cutOf(grant, layer(11, 10))]);
    await agent.handOver();
    service.held = [];
    await startTheAgent();
    const [held] = await waitFor('the hello', () => (service.held.length > 0 ? service.held : undefined));
    expect(held).toMatchObject({ volume_uuid: grant.volume_uuid, epoch: '5', claimed: [] });
    expect((await cut([cutOf(grant, layer(11, 10))])).cut?.volumes[0]?.claimed).toHaveLength(1);
  });

  it('opens a reader without a record, reports no slab for it, and returns it', async () => {
    const top = layer(10, 0, { slabs: [{ first: '7', count: 1, generation: '3' }] });
    const grant = grantOf([top], { read_only: true });
    await open(grant);
    expect(disk.records.size).toBe(0);
    expect((await heldAfterReconnect())[0]).toMatchObject({ epoch: '5', claimed: [] });
    await expect(
      call(api, api.ResizeVolume, { volume_uuid: grant.volume_uuid ?? '', size_bytes: String(2 * SIZE) }),
    ).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    await call(api, api.CloseVolume, { volume_uuid: grant.volume_uuid ?? '' });
    await waitFor('the return', () => (service.returned.length === 1 ? true : undefined));
    expect(service.returned[0]).toMatchObject({ epoch: '5', claimed: [] });
  });

  it('forgets slabs of frozen layers and layers that left the chain, and has nothing to forget where nothing is open', async () => {
    const grant = grantOf([layer(11, 10), layer(10)]);
    const volume = await open(grant);
    const forget = (epoch: string) =>
      service.order({
        forget_slabs: {
          volume_uuid: grant.volume_uuid ?? '',
          epoch,
          slabs: [{ first: '7', count: 2, generation: '3' }],
          layers: ['10'],
        },
      });
    expect((await forget('5')).error_code).toBe('');
    expect(volume.forgotten).toEqual([{ first: 7n, count: 2, generation: 3n }]);
    expect(volume.spec.layers.map(({ layerId }) => layerId)).toEqual([11n]);
    expect((await forget('4')).error_code).toBe('');
    await call(api, api.CloseVolume, { volume_uuid: grant.volume_uuid ?? '' });
    expect((await forget('5')).error_code).toBe('');
    expect(volume.forgotten).toHaveLength(1);
  });

  it('merges as the engine says, and a volume that is open here learns it; where nothing is open there is nothing to learn', async () => {
    const grant = grantOf([layer(11, 10), layer(10, 9, { frozen: true })]);
    const volume = await open(grant);
    disk.mergeReport = {
      movedBlocks: 5n,
      complete: false,
      noSpace: true,
      spare: [{ first: 8n, count: 1, generation: 3n }],
    };
    const head = layer(10, 9, { frozen: true, slabs: [{ first: '7', count: 2, generation: '3' }] });
    const merge = (sequence: string) =>
      service.order({
        merge_layers: {
          victims: [layer(9, 0, { frozen: true })],
          head,
          skip_above_permille: 700,
          max_blocks: '64',
          sequence,
        },
      });
    const merged = await merge('1');
    expect(merged.merge).toEqual({
      moved_blocks: '5',
      complete: false,
      no_space: true,
      spare: [{ first: '8', count: 1, generation: '3' }],
    });
    expect(disk.merged).toEqual([{ victims: [9n], head: 10n }]);
    // The same merge once more, as another order: its answer, and nothing is done.
    expect((await merge('1')).merge).toEqual(merged.merge);
    expect(disk.merged).toHaveLength(1);
    await merge('2');
    expect(disk.merged).toHaveLength(2);
    const learn = (epoch: string) =>
      service.order({ learn_layer: { volume_uuid: grant.volume_uuid ?? '', epoch, layer: head } });
    expect((await learn('5')).error_code).toBe('');
    expect(volume.learned).toMatchObject([
      { layerId: 10n, slabs: [{ first: 7n, count: 2, generation: 3n }] },
    ]);
    expect((await learn('4')).error_code).toBe('');
    await call(api, api.CloseVolume, { volume_uuid: grant.volume_uuid ?? '' });
    expect((await learn('5')).error_code).toBe('');
    expect(volume.learned).toHaveLength(1);
    expect((await service.order({ merge_layers: { victims: [], head, generation: '99' } })).error_code).toBe(
      'STALE',
    );
  });

  describe('to compact', () => {
    const compact = (grant: Grant, over: object = {}, id?: string) =>
      service.order(
        {
          compact_volume: {
            volume_uuid: grant.volume_uuid ?? '',
            epoch: grant.epoch ?? '',
            sources: [
              layer(10, 0, { frozen: true, slabs: [{ first: '7', count: 2, generation: '3' }] }),
              layer(9, 0, { frozen: true }),
            ],
            skip_above_permille: 500,
            max_blocks: '4096',
            ...over,
          },
        },
        id,
      );
    const chain = (): Layer[] => [
      layer(11, 10),
      layer(10, 9, { frozen: true }),
      layer(9, 0, { frozen: true }),
    ];
    const underWay = (uuid = '') =>
      waitFor('the compaction', () =>
        native.pool.volumes().some((v) => v.spec.uuid === uuid && v.compactions.length > 0)
          ? true
          : undefined,
      );

    it('an open volume: the engine is told what it is told, and its answer comes back', async () => {
      const grant = grantOf(chain());
      const volume = await open(grant);
      const result = await compact(grant);
      expect(result.compact).toEqual({
        volume_uuid: grant.volume_uuid,
        moved_blocks: '77',
        complete: true,
        no_space: false,
        epoch: '0',
      });
      expect(volume.compactions).toEqual([{ layers: [10n, 9n], skipAbovePermille: 500, maxBlocks: 4096n }]);
    });

    it('nothing that is open under another epoch, not open, or of another life of the host', async () => {
      const grant = grantOf(chain());
      const volume = await open(grant);
      expect(await compact(grant, { epoch: '4' })).toMatchObject({ error_code: 'STALE' });
      expect(await compact(grantOf(chain()))).toMatchObject({ error_code: 'UNKNOWN_VOLUME' });
      expect(await compact(grant, { generation: '7' })).toMatchObject({ error_code: 'STALE' });
      disk.authority = { store: service.storeId, incarnation: 1n, term: 2n, unclaimed: false };
      expect(await compact(grant)).toMatchObject({ error_code: 'STALE' });
      expect(volume.compactions).toEqual([]);
    });

    it('an open volume without keeping a cut, a revocation or a close waiting', async () => {
      native.pool.compacting.lasts = true;
      const one = grantOf([layer(20)]);
      const volume = await open(one);
      const running = compact(one);
      await underWay(one.volume_uuid);
      expect((await cut([cutOf(one, layer(21, 20))])).error_code).toBe('');
      expect(
        (await service.order({ revoke: { volume_uuid: one.volume_uuid ?? '', epoch: '5' } })).error_code,
      ).toBe('');
      expect(await running).toMatchObject({ error_code: 'HF_UNAVAILABLE' });
      expect(volume.state).toBe('revoked');
    });

    it('a closed volume: opened under the grant without a device, and given back with the answer when its claims are known', async () => {
      native.pool.compacting.claims = 2;
      const grant = grantOf(chain());
      const result = await compact(grant, { epoch: '0', grant });
      expect(result.compact).toMatchObject({ moved_blocks: '77', complete: true, epoch: '5' });
      expect(service.reported.map((slab) => slab.layer_id)).toEqual(['11', '11']);
      expect(disk.records.get(grant.slot ?? 0)).toMatchObject({
        state: 'closed',
        epoch: 5n,
        topLayerId: 11n,
      });
      expect(native.pool.volumes()).toEqual([]);
      expect(service.returned).toEqual([]);
      // The answer was lost: it is not done again, and nothing is opened under a grant that is over.
      const again = await compact(grant, { epoch: '0', grant });
      expect(again.compact).toMatchObject({ moved_blocks: '0', complete: false, epoch: '5' });
      expect(service.reported).toHaveLength(2);
    });

    it('a closed volume that fails: the grant goes back by itself, with what was claimed', async () => {
      native.pool.compacting = { claims: 1, lasts: false, fails: true };
      const grant = grantOf(chain());
      expect(await compact(grant, { grant })).toMatchObject({ error_code: 'HF_IO' });
      await waitFor('the return', () => (service.returned.length === 1 ? true : undefined));
      const told = [...service.reported, ...(service.returned[0]?.claimed ?? [])];
      expect(new Set(told.map((slab) => slab.layer_id))).toEqual(new Set(['11']));
      expect(service.returned[0]).toMatchObject({ volume_uuid: grant.volume_uuid, epoch: '5' });
      expect(native.pool.volumes()).toEqual([]);
      expect(disk.records.get(grant.slot ?? 0)).toMatchObject({ state: 'closed', epoch: 5n });
    });

    it('a closed volume until it is wanted back, which ends it early', async () => {
      native.pool.compacting = { claims: 1, lasts: true, fails: false };
      const grant = grantOf(chain());
      void compact(grant, { grant }, 'early');
      await underWay(grant.volume_uuid);
      expect((await heldAfterReconnect())[0]).toMatchObject({ epoch: '5', claimed: [{ layer_id: '11' }] });
      const revoked = await service.order({ revoke: { volume_uuid: grant.volume_uuid ?? '', epoch: '5' } });
      expect(revoked.error_code).toBe('UNKNOWN_VOLUME');
      expect((await compact(grant, { grant }, 'early')).compact).toMatchObject({
        complete: false,
        epoch: '5',
      });
      expect(service.reported.map((slab) => slab.layer_id)).toEqual(['11']);
      expect(await compact(grant, { grant })).toMatchObject({ error_code: 'STALE' });
    });

    it('never opens under a grant that was revoked, nor one that is open here', async () => {
      const grant = grantOf(chain());
      await service.order({ revoke: { volume_uuid: grant.volume_uuid ?? '', epoch: '5' } });
      expect(await compact(grant, { grant })).toMatchObject({ error_code: 'STALE' });
      const second = grantOf(chain());
      const volume = await open(second);
      expect(await compact(second, { grant: { ...second, epoch: '6' } })).toMatchObject({
        error_code: 'STALE',
      });
      expect(volume.compactions).toEqual([]);
      expect(native.pool.volumes()).toHaveLength(1);
    });

    it('a closed volume, and the next life of an agent that died meanwhile finds what it had claimed', async () => {
      native.pool.compacting = { claims: 2, lasts: true, fails: false };
      const grant = grantOf(chain());
      void compact(grant, { grant });
      await underWay(grant.volume_uuid);
      const file = area.path('node', 'pending-returns.json');
      const then = readFileSync(file, 'utf8');
      const claimed = [...disk.owners.values()].filter((owner) => owner.layerId === 11n);
      expect(claimed).toHaveLength(2);
      // As after a kill: what the dying agent would have done by itself is undone, but for its claims, which are on the disk.
      await agent.handOver();
      writeFileSync(file, then);
      service.returned.length = 0;
      await startTheAgent();
      await waitFor('the return', () => (service.returned.length === 1 ? true : undefined));
      expect(service.returned[0]).toMatchObject({ volume_uuid: grant.volume_uuid, epoch: '5' });
      expect(service.returned[0]?.claimed.map((slab) => [slab.slab, slab.layer_id]).sort()).toEqual(
        claimed.map(({ slab }) => [slab.toString(), '11']).sort(),
      );
    });
  });

  it('strips, wipes and reads changes as it is told, and answers with what the engine found', async () => {
    disk.stripReport = {
      emptied: [{ first: 3n, count: 2, generation: 9n }],
      clearedBlocks: 17n,
      uses: [{ layerId: 10n, liveBlocks: 5n, slabs: 1n }],
    };
    const strip = await service.order({
      strip_layers: { victims: [layer(10)], covers: [layer(12), layer(11)] },
    });
    expect(disk.stripped).toEqual([{ victims: [10n], covers: [12n, 11n] }]);
    expect(strip.strip).toEqual({
      emptied: [{ first: '3', count: 2, generation: '9' }],
      cleared_blocks: '17',
      uses: [{ layer_id: '10', live_blocks: '5', slabs: '1' }],
    });
    const wipe = { layers: [layer(10)], tombstone: true };
    for (let i = 0; i < 2; i++) await service.order({ wipe_layers: wipe }, 'wipe');
    expect(disk.wipedLayers).toEqual([{ layerId: 10n, tombstone: true }]);
    for (const order of [
      { strip_layers: { victims: [layer(9)], covers: [], generation: '7' } },
      { wipe_layers: { layers: [layer(9)], generation: '7' } },
      { wipe_volume: { volume_id: '9', layers: [layer(9)], generation: '7' } },
    ]) {
      expect(await service.order(order)).toMatchObject({ error_code: 'STALE' });
    }
    expect([disk.stripped.length, disk.wipedLayers.length, disk.wiped.length]).toEqual([1, 1, 0]);
    disk.changes = [0n, 1n, 2n].map((n) => ({ offset: n << 20n, length: 4096n }));
    const read = (from: bigint) =>
      service.order({
        read_changes: {
          target: [layer(11)],
          size_bytes: String(SIZE),
          starting_offset: String(from),
          max_ranges: 2,
        },
      });
    expect((await read(0n)).changes).toEqual({
      ranges: [
        { offset: '0', length: '4096' },
        { offset: String(1 << 20), length: '4096' },
      ],
      next_offset: String(2 << 20),
    });
    expect((await read(2n << 20n)).changes).toMatchObject({ next_offset: '0' });
  });

  it('reads a volume record with its chain, through the tombstones of stripped layers', async () => {
    const grant = grantOf([layer(10)]);
    const volume = await open(grant);
    for (const id of [11, 12]) await cut([cutOf(grant, layer(id, id - 1))]);
    const [, middle] = volume.spec.layers;
    if (middle !== undefined) volume.writeLayer(middle, 'deleted');
    for (const query of [{ slot: grant.slot ?? 0 }, { volume_uuid: grant.volume_uuid ?? '' }]) {
      const { volume_record } = await service.order({ read_volume_record: query });
      expect(volume_record).toMatchObject({
        found: true,
        state: 'open',
        epoch: '5',
        uuid: grant.volume_uuid,
        top_layer_id: '12',
      });
      expect(volume_record?.layers.map((each) => [each.layer_id, each.frozen])).toEqual([
        ['12', false],
        ['10', true],
      ]);
    }
  });
});
