/** Layers and what needs them, without a service: chains, uses, tombstones and their slots. */
import { beforeEach, describe, expect, it } from 'vitest';
import { MemoryStore } from '../store/memory.ts';
import { Bitmap } from './bitmap.ts';
import type { Decision } from './decision.ts';
import { stageVolume, publishVolume, volumeReturned } from './grants.ts';
import { layersOf, makeLayer, maxChain, removeFromChain, requireLayer, unused } from './layers.ts';
import { leavingWiped } from './leaving.ts';
import {
  layerWiped,
  reclaimable,
  beginStrip,
  layerForgotten,
  stripEnded,
  type ReclaimWork,
} from './reclaim.ts';
import { tables, type GrantRecord, type PoolRecord, type VolumeRecord } from './records.ts';
import { addToLayer, reserveFree } from './slabs.ts';
import { createSnapshot, cutHappened, deleteSnapshot } from './snapshots.ts';
import { upgradeRecords } from './upgrade.ts';
import { usageOf } from './usage.ts';
import { createVolume, deleteVolume } from './volumes.ts';

const pool = 'p';
const life = { hostId: 1, generation: 1n, nodeId: 'n' };
let store: MemoryStore;
let ids = 0;
let now = 1000;
const pins = new Set<bigint>();

beforeEach(async () => {
  store = new MemoryStore();
  pins.clear();
  await store.transact((tx) => {
    const record: PoolRecord = {
      uuid: pool,
      name: 'pool',
      wwid: '',
      fencing: 'loop',
      slabSize: 16 << 20,
      slabCount: 100,
      volumeSlots: 8,
      layerSlots: 1200,
      hostSlots: 8,
      renewIntervalMs: 1,
      leaseMs: 2,
      drainMs: 0,
      state: 'ACTIVE',
      claimed: { incarnation: 1n, term: 1n },
      claiming: [],
      nextVolumeId: 1n,
      nextLayerId: 1n,
      nextSlabGeneration: 1n,
      slabsFree: 100,
      slabsAhead: 0,
      provisionedBytes: 0n,
    };
    tables.pool.put(tx, record, pool);
    tables.host.put(
      tx,
      {
        ...life,
        poolUuid: pool,
        state: 'LIVE',
        machineId: 'm',
        bootId: 'b',
        lockPath: '',
        sinceUnixMs: 0,
        fence: null,
        proof: '',
      },
      pool,
      1,
    );
    tables.node.put(
      tx,
      {
        nodeId: 'n',
        name: 'n',
        machineId: 'm',
        bootId: 'b',
        version: '',
        maxVolumes: 0,
        lastSeenUnixMs: 0,
        pastBootIds: [],
      },
      'n',
    );
  });
});

function decide<T>(body: (d: Decision) => T): Promise<T> {
  return store.transact((tx) =>
    body({
      tx,
      service: { storeId: 's', incarnation: 1n, term: 1n },
      nowUnixMs: now,
      newId: () => `id-${++ids}`,
      audited: [],
      refusal: () => undefined,
      pinned: (_pool, layer) => pins.has(layer),
      overcommitLimit: 0,
    }),
  );
}

const none = { limitBytes: 0n, parameters: {}, poolUuids: [], sourceSnapshotUuid: '', sourceVolumeUuid: '' };
const create = (name: string, source: object = {}): Promise<VolumeRecord> =>
  decide((d) => createVolume(d, { ...none, name, sizeBytes: 1n << 30n, ...source }).volume);

/** Cut at once. Returns the snapshot's UUID and the layer that it names. */
async function snapshot(volumeUuid: string, name: string): Promise<{ uuid: string; layerId: bigint }> {
  return await decide((d) => {
    const request = { name, sourceVolumeUuid: volumeUuid, parameters: {} };
    const { uuid } = createSnapshot(d, request, () => true);
    const cut = tables.cutting.get(d.tx, pool, volumeUuid)!;
    cutHappened(d, volumeUuid, {
      topLayerId: cut.topLayerId,
      sizeBytes: 1n << 30n,
      proof: 'x',
      by: undefined,
    });
    return { uuid, layerId: cut.frozenLayerId };
  });
}

/** Published and staged on the one host there is. Returns the grant. */
async function staged(uuid: string): Promise<GrantRecord> {
  const { publishId } = await decide((d) =>
    publishVolume(d, { uuid, nodeId: 'n', accessMode: 'SINGLE_NODE_WRITER', readOnly: false }),
  );
  const stage = { poolUuid: pool, life, volumeUuid: uuid, publishId, readOnly: false };
  return (await decide((d) => stageVolume(d, stage))).grant;
}

const give = (layerId: bigint, slab: number): Promise<void> =>
  decide((d) => {
    const record = tables.pool.get(d.tx, pool)!;
    const runs = [{ first: slab, count: 1, generation: 1n }];
    expect(reserveFree(d.tx, record, runs)).toEqual(runs);
    addToLayer(d.tx, record, layerId, runs);
    tables.pool.put(d.tx, record, pool);
  });
const policy = { below: 0, intervalMs: 30_000, isConnected: () => true }; // compaction.test.ts has it on
const works = (): ReclaimWork[] =>
  store.read((tx) => reclaimable({ tx, pinned: (_pool, layer) => pins.has(layer) }, pool, now, policy));
const usedSlots = (): number[] => {
  const bits = new Bitmap(
    1200,
    store.read((tx) => tables.slots.get(tx, pool, 'layer')),
  );
  return Array.from({ length: 1200 }, (_, n) => n).filter((n) => bits.has(n));
};
const topOf = (uuid: string): bigint => store.read((tx) => tables.volume.get(tx, uuid)!.topLayerId);

describe('a chain', () => {
  it('has at most 1024 layers: the next cut is refused with what to do, and changes nothing', async () => {
    const { uuid } = await create('v');
    await decide((d) => {
      const record = tables.pool.get(d.tx, pool)!;
      const volume = tables.volume.get(d.tx, uuid)!;
      for (let n = 2; n < maxChain; n++) {
        const below = requireLayer(d.tx, pool, volume.topLayerId);
        tables.layer.put(d.tx, { ...below, frozen: true, kept: true }, pool, below.layerId);
        const what = { parentLayerId: below.layerId, sizeBytes: 1n << 30n, volumeUuid: uuid };
        volume.topLayerId = makeLayer(d, record, what).layerId;
      }
      tables.volume.put(d.tx, volume, uuid);
    });
    await snapshot(uuid, 'last');
    expect(store.read((tx) => layersOf(tx, tables.volume.get(tx, uuid)!)).length).toBe(1024);
    await expect(snapshot(uuid, 'more')).rejects.toMatchObject({
      code: 'TOO_MANY',
      message: expect.stringContaining('Delete snapshots'),
    });
    expect(store.read((tx) => tables.snapshotName.get(tx, 'more'))).toBeUndefined();
  });

  it('carries 4096 copies of one layer', async () => {
    await decide((d) => {
      const record = tables.pool.get(d.tx, pool)!;
      tables.pool.put(d.tx, { ...record, volumeSlots: 8192, layerSlots: 8192 }, pool);
    });
    const { uuid } = await create('v');
    const source = { sourceSnapshotUuid: (await snapshot(uuid, 's')).uuid };
    for (let n = 0; n < 4096; n++) await create(`c${n}`, source);
    const layer = store.read((tx) => requireLayer(tx, pool, 1n));
    expect(layer.children).toBe(4097);
    const started = performance.now();
    await decide((d) => deleteSnapshot(d, source.sourceSnapshotUuid));
    expect(works()).toEqual([]);
    expect(performance.now() - started).toBeLessThan(1000);
  }, 60_000);
});

describe('a frozen layer that nothing names', () => {
  it('is wiped without a layer above, folded with one, left alone with two or while somebody reads it', async () => {
    const { uuid } = await create('v');
    const s = await snapshot(uuid, 's');
    await give(s.layerId, 1);
    const copy = await create('c', { sourceSnapshotUuid: s.uuid });
    expect(works()).toEqual([]);
    await decide((d) => deleteSnapshot(d, s.uuid));
    expect(works()).toEqual([]);
    await decide((d) => deleteVolume(d, copy.uuid));
    expect(works()).toEqual([{ type: 'strip', layerId: s.layerId }]);
    pins.add(s.layerId);
    expect(works()).toEqual([]);
    pins.clear();
    await decide((d) => deleteVolume(d, uuid));
    expect(works()).toEqual([{ type: 'wipe', layerId: s.layerId }]);
    await decide((d) => layerWiped(d, pool, s.layerId, 'x'));
    expect([usedSlots(), store.read((tx) => tables.pool.get(tx, pool)?.slabsFree)]).toEqual([[], 100]);
  });

  it('is one segment with folded ones below; what it strips leaves, and does not come back into a grant', async () => {
    const { uuid } = await create('v');
    const [a, b] = [await snapshot(uuid, 'a'), await snapshot(uuid, 'b')];
    await give(a.layerId, 1);
    await give(b.layerId, 2);
    await give(topOf(uuid), 3);
    await decide((d) => deleteSnapshot(d, a.uuid));
    expect(works()).toEqual([{ type: 'strip', layerId: a.layerId }]);
    await decide((d) => deleteSnapshot(d, b.uuid));
    expect(works()).toEqual([{ type: 'strip', layerId: b.layerId }]);
    const grant = await staged(uuid);
    const order = await decide((d) => beginStrip(d, pool, b.layerId));
    expect(order?.victims.map((victim) => victim.layerId)).toEqual([b.layerId, a.layerId]);
    expect(order?.head?.layerId).toBe(topOf(uuid));
    expect(works()).toEqual([]); // under way
    const emptied = [
      { first: 1, count: 1, generation: 1n },
      { first: 3, count: 1, generation: 1n },
    ];
    const outcome = { emptied, clearedBlocks: 5n, uses: [{ layerId: b.layerId, liveBlocks: 1000n }] };
    await decide((d) => stripEnded(d, pool, b.layerId, life, outcome, 30_000));
    // Slab 3 is the head's: a strip cannot take it.
    const leaving = store.read((tx) => tables.leaving.entries(tx, [pool]));
    expect(leaving.map(([, record]) => [record.layerId, record.runs, record.waiting])).toEqual([
      [a.layerId, [emptied[0]], [{ volumeUuid: uuid, epoch: grant.epoch, holder: life }]],
    ]);
    const slabCount = (id: bigint): number => store.read((tx) => requireLayer(tx, pool, id).slabCount);
    expect([slabCount(a.layerId), slabCount(b.layerId), slabCount(topOf(uuid))]).toEqual([0, 1, 1]);
    const usage = store.read((tx) => usageOf(tx, tables.volume.get(tx, uuid)!));
    expect(usage).toEqual({
      ownBytes: 2n << 24n,
      sharedBytes: 0n,
      reclaimableBytes: (1n << 24n) - 4_096_000n,
    });
    await decide((d) => leavingWiped(d, pool, a.layerId, 1n, 'x'));
    expect(works()).toEqual([{ type: 'remove', layerId: a.layerId }]);
    // Throttled: the next strip is due later, and only because the head is open.
    now += 30_000;
    expect(works().map((work) => work.type)).toContain('strip');
    await decide((d) => volumeReturned(d, pool, life, uuid, grant.epoch));
  });

  it('that is empty leaves the chain; slots are free when no record on the disk can name them', async () => {
    const { uuid } = await create('v');
    const a = await snapshot(uuid, 'a');
    const b = await snapshot(uuid, 'b');
    await decide((d) => deleteSnapshot(d, a.uuid));
    expect(works()).toEqual([{ type: 'remove', layerId: a.layerId }]);
    await decide((d) => removeFromChain(d, pool, a.layerId));
    expect(
      store.read((tx) => layersOf(tx, tables.volume.get(tx, uuid)!)).map((layer) => layer.layerId),
    ).toEqual([3n, 2n]);
    expect(works()).toEqual([{ type: 'tombstone', layerId: a.layerId }]);
    await decide((d) => layerWiped(d, pool, a.layerId, 'x'));
    expect(works()).toEqual([]);
    expect(usedSlots()).toEqual([0, 1, 2]); // b's record names a
    await decide((d) => deleteVolume(d, uuid));
    await decide((d) => deleteSnapshot(d, b.uuid));
    expect(usedSlots()).toEqual([0, 1]);
    await decide((d) => layerWiped(d, pool, b.layerId, 'x'));
    expect(usedSlots()).toEqual([]);
    expect(
      store.read((tx) => [
        tables.layer.list(tx),
        tables.layerChild.entries(tx, [pool]),
        tables.reclaim.entries(tx, [pool]),
      ]),
    ).toEqual([[], [], []]);
  });
});

describe('a layer that has left its chain', () => {
  it('gets its tombstone when each holder has dropped it or is over, and not before', async () => {
    const { uuid } = await create('v');
    const a = await snapshot(uuid, 'a');
    const grant = await staged(uuid);
    await decide((d) => deleteSnapshot(d, a.uuid));
    await decide((d) => removeFromChain(d, pool, a.layerId));
    const asked = [{ type: 'forget', layerId: a.layerId }];
    expect(works()).toEqual(asked);
    const holder = { volumeUuid: uuid, epoch: grant.epoch, holder: life };
    await decide((d) => layerForgotten(d, pool, a.layerId, { ...holder, epoch: grant.epoch - 1n }));
    expect(works()).toEqual(asked);
    await decide((d) => layerForgotten(d, pool, a.layerId, holder));
    expect(works()).toEqual([{ type: 'tombstone', layerId: a.layerId }]);
    await decide((d) => layerWiped(d, pool, a.layerId, 'x'));
    await decide((d) => layerForgotten(d, pool, a.layerId, holder)); // an answer that comes late
    expect(works()).toEqual([]);
    await decide((d) => volumeReturned(d, pool, life, uuid, grant.epoch));
  });
});

describe('records of a database from before there were snapshots', () => {
  it('get what they lack, once', async () => {
    const { uuid } = await create('v');
    await decide((d) => {
      const { lastEpoch, readers, publications, ...old } = tables.volume.get(d.tx, uuid)!;
      const grant = { state: 'REVOKING', epoch: 7n, holder: life, publishId: 'x', readOnly: false } as const;
      const publication = {
        publishId: 'x',
        nodeId: 'n',
        accessMode: 'SINGLE_NODE_WRITER',
        readOnly: false,
        staged: true,
        ending: true,
        sinceUnixMs: 1,
      };
      expect([lastEpoch, readers, publications]).toEqual([0n, [], []]);
      d.tx.put(`volume/${uuid}`, { ...old, grant, publication });
      d.tx.put(`revoking/${pool}/${uuid}`, true);
      const { layerId, slot, parentLayerId, birth, sizeBytes, frozen, volumeUuid, slabCount } = requireLayer(
        d.tx,
        pool,
        1n,
      );
      tables.layer.put(
        d.tx,
        { layerId, slot, parentLayerId, birth, sizeBytes, frozen, volumeUuid, slabCount } as never,
        pool,
        1n,
      );
      tables.counter.delete(d.tx, 'record-version');
    });
    await store.transact((tx) => upgradeRecords(tx));
    await store.transact((tx) => upgradeRecords(tx));
    store.read((tx) => {
      expect(tables.volume.get(tx, uuid)).toMatchObject({
        lastEpoch: 7n,
        readers: [],
        publications: [{ publishId: 'x' }],
      });
      expect(tables.volume.get(tx, uuid)).not.toHaveProperty('publication');
      expect(tables.revoking.entries(tx).map(([parts]) => parts)).toEqual([
        [pool, uuid, '00000000000000000001'],
      ]);
      expect(requireLayer(tx, pool, 1n)).toMatchObject(unused);
    });
  });
});
