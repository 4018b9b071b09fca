/** One seeded run: a storm of faults over volumes that move between nodes, then quiet, in which everything must work again. */
import { HoldfastError } from '@holdfast/common';
import type { Snapshot, Volume } from '@holdfast/proto';
import { Checks } from './checks.ts';
import { poolUuid, World, type SimClass, type SimNode } from './world.ts';

const stormMs = 8 * 60_000;
/** Orders that a frozen agent swallowed as the storm ended are waited for 300 s. What they kept from going on must have ended too. */
const quietMs = 8 * 60_000;
/** Nothing changes any more for as long as this. What failed before may be tried once more. */
const stillMs = 60_000;
const volumes = 5;

export interface Outcome {
  violations: string[];
  /** What happened, so that a run in which nothing does is noticed. */
  writes: number;
  granted: number;
  deaths: number;
  restarts: number;
  cuts: number;
  readers: number;
  stripped: number;
  forgotten: number;
  slabsWiped: number;
  reads: number;
  moved: number;
  merged: number;
  learned: number;
  maintained: number;
  snapshotsRead: number;
  groupsRead: number;
}

export async function simulate(seed: number, fencing: SimClass): Promise<Outcome> {
  const world = new World(seed, 3, fencing);
  const checks = new Checks(world);
  world.checkWrite = (engine, volume) => checks.checkWrite(engine, volume);
  world.checkWiped = (slab, page) => checks.checkWiped(slab, page);
  world.checkStripped = (slab, page, blocks) => checks.checkStripped(slab, page, blocks);
  await world.startService();
  for (const node of world.nodes) node.start();
  const faults = new Faults(world);
  faults.start();
  const snapshots = new SnapshotLife(world);
  const lives = Array.from({ length: volumes }, (_, n) => new VolumeLife(world, `pvc-${n}`, snapshots));
  for (const life of lives) life.start();
  snapshots.start(lives);
  every(world, 30, 60, () => world.rng.pick(world.nodes)?.write());
  every(world, 100, 200, () => world.rng.pick(world.nodes)?.read());
  every(world, 20_000, 0, () => {
    checks.checkSlabs();
    checks.checkSnapshots();
    checks.checkChains();
  });

  await world.clock.run(stormMs, () => checks.afterStep());
  world.stormy = false;
  await faults.end();
  for (const life of lives) life.wind();
  snapshots.wind();
  await world.clock.run(stormMs + quietMs, () => checks.afterStep());
  for (const life of lives) {
    if (!life.proved) world.violated(`${life.name} did not become usable again: ${life.doing}`);
  }
  if (!snapshots.done) world.violated(`the snapshots did not come to an end: ${snapshots.doing}`);
  checks.checkSlabs();
  checks.checkSnapshots();
  checks.checkChains();
  checks.checkSettled();
  const late = world.compactionsMs.filter((at) => at > stormMs + quietMs - stillMs).length;
  if (late > volumes) world.violated(`${late} compactions were ordered when nobody used a volume any more`);
  await world.stopService();
  return {
    violations: world.violations,
    writes: world.writes,
    granted: checks.granted,
    deaths: checks.deaths,
    restarts: faults.restarts,
    cuts: world.cuts,
    readers: checks.readers,
    stripped: world.stripped,
    forgotten: world.forgotten,
    slabsWiped: world.slabsWiped,
    reads: world.reads,
    moved: world.moved,
    merged: world.merged,
    learned: world.learned,
    maintained: world.maintained,
    snapshotsRead: checks.snapshotsRead,
    groupsRead: checks.groupsRead,
  };
}

function every(world: World, ms: number, jitterMs: number, body: () => void): void {
  const tick = (): void => {
    body();
    world.clock.after(ms + world.rng.below(jitterMs + 1), tick);
  };
  world.clock.after(ms, tick);
}

class Faults {
  readonly #world: World;
  #ended = false;
  #down = false;
  restarts = 0;

  constructor(world: World) {
    this.#world = world;
  }

  start(): void {
    const { rng, clock } = this.#world;
    const tick = (): void => {
      if (this.#ended) return;
      clock.after(500 + rng.below(12_000), tick);
      const node = rng.pick(this.#world.nodes) as SimNode;
      switch (rng.below(7)) {
        case 0:
          return node.killEngine('adopt');
        case 1:
          return node.killEngine('join');
        case 2:
          return node.reboot();
        case 3:
        case 4:
          return node.freeze(rng.below(45_000));
        case 5:
          return node.stream?.cut();
        default:
          void this.#restart(rng.below(8000));
      }
    };
    clock.after(5000, tick);
  }

  async #restart(downMs: number): Promise<void> {
    if (this.#down) return;
    this.#down = true;
    this.restarts += 1;
    await this.#world.stopService();
    await this.#world.clock.sleep(downMs);
    await this.#world.startService();
    this.#down = false;
  }

  async end(): Promise<void> {
    this.#ended = true;
  }
}

/** A volume as Kubernetes uses it: created, published here and there, staged, taken back gracefully or not, deleted, made again. */
class VolumeLife {
  readonly name: string;
  readonly #world: World;
  readonly #snapshots: SnapshotLife;
  doing = 'nothing';
  uuid = '';
  #made = 0;
  #winding = false;
  proved = false;

  constructor(world: World, name: string, snapshots: SnapshotLife) {
    this.#world = world;
    this.name = name;
    this.#snapshots = snapshots;
  }

  start(): void {
    this.#run().catch((error: unknown) => {
      this.#world.violated(
        `${this.name} while ${this.doing}: ${error instanceof Error ? error.stack : String(error)}`,
      );
    });
  }

  /** From now on: one whole round has to succeed. */
  wind(): void {
    this.#winding = true;
  }

  async #run(): Promise<void> {
    const { rng, clock } = this.#world;
    let uuid = await this.#create();
    while (!this.proved) {
      const winding = this.#winding;
      this.uuid = uuid;
      if (!winding && rng.chance(0.25)) {
        await this.#readTogether(uuid);
        continue;
      }
      const node = rng.pick(this.#world.nodes) as SimNode;
      const publishId = await this.#publish(uuid, node);
      node.wanted.set(uuid, publishId);
      this.doing = `waiting for ${node.nodeId} to open it`;
      // An unpublish of the storm may arrive late and end this publication: then the next round has to succeed.
      const opened = await this.#opened(uuid, node, winding ? 60_000 : 20_000);
      await clock.sleep(rng.below(30_000));
      if (winding && opened) this.proved = true;
      // Gracefully, or while it is in use; the kubelet of a dead node tells nobody.
      if (rng.chance(0.6)) {
        node.wanted.delete(uuid);
        await clock.sleep(rng.below(4000));
      }
      await this.#unpublish(uuid, node);
      node.wanted.delete(uuid);
      if (rng.chance(0.2)) {
        this.doing = 'deleting it';
        await this.#until('DeleteVolume', { uuid });
        uuid = await this.#create();
      }
    }
    this.doing = 'done';
  }

  /** Several nodes open it for reading, and let go of it gracefully or not. */
  async #readTogether(uuid: string): Promise<void> {
    const { rng, clock, nodes } = this.#world;
    const readers = nodes.filter(() => rng.chance(0.7));
    for (const node of readers) {
      this.doing = `publishing it for reading to ${node.nodeId}`;
      const answer = await this.#until<{ publish_id: string }>('PublishVolume', {
        uuid,
        node_id: node.nodeId,
        access_mode: 'ACCESS_MODE_MULTI_NODE_READER_ONLY',
      });
      node.wanted.set(uuid, answer.publish_id);
    }
    await clock.sleep(rng.below(20_000));
    for (const node of readers) {
      if (rng.chance(0.6)) node.wanted.delete(uuid);
      await this.#unpublish(uuid, node);
      node.wanted.delete(uuid);
    }
  }

  /** Empty, or from a snapshot or another volume, if that still exists and can be cut. */
  async #create(): Promise<string> {
    const { rng } = this.#world;
    const wanted = { size_bytes: String(1 << 30), pool_uuids: [poolUuid] };
    if (rng.chance(0.5)) {
      this.doing = 'copying it';
      const source = this.#snapshots.pickSource();
      const made =
        source &&
        (await this.#attempt<Volume>('CreateVolume', { ...wanted, ...source, name: this.#nextName() }));
      if (made?.uuid) return made.uuid;
    }
    this.doing = 'creating it';
    const volume = await this.#until<Volume>('CreateVolume', { ...wanted, name: this.#nextName() });
    return volume.uuid ?? '';
  }

  #nextName(): string {
    return `${this.name}-${++this.#made}`;
  }

  /** Undefined: it did not work soon. */
  async #attempt<T>(method: string, request: object): Promise<T | undefined> {
    for (let n = 0; n < 4; n++) {
      const request_id = this.#world.id();
      try {
        return await this.#world.rpc<T>(method, { ...request, request_id }, 15_000);
      } catch (error) {
        if (
          !(error instanceof HoldfastError) ||
          error.code === 'INTERNAL' ||
          error.code === 'INVALID_ARGUMENT'
        )
          throw error;
        await this.#world.clock.sleep(500);
      }
    }
    return undefined;
  }

  async #publish(uuid: string, node: SimNode): Promise<string> {
    this.doing = `publishing it to ${node.nodeId}`;
    const answer = await this.#until<{ publish_id: string }>('PublishVolume', {
      uuid,
      node_id: node.nodeId,
      access_mode: 'ACCESS_MODE_SINGLE_NODE_WRITER',
    });
    return answer.publish_id;
  }

  async #unpublish(uuid: string, node: SimNode): Promise<void> {
    this.doing = `unpublishing it from ${node.nodeId}`;
    await this.#until('UnpublishVolume', { uuid, node_id: node.nodeId });
  }

  /** A new request id each time, as a controller does that forgot the last one. */
  async #until<T>(method: string, request: object): Promise<T> {
    for (;;) {
      try {
        return await this.#world.rpc<T>(method, { ...request, request_id: this.#world.id() }, 15_000);
      } catch (error) {
        this.doing = `${this.doing.split(' (')[0]} (${error instanceof Error ? error.message : String(error)})`;
        if (
          !(error instanceof HoldfastError) ||
          error.code === 'INTERNAL' ||
          error.code === 'INVALID_ARGUMENT'
        )
          throw error;
        await this.#world.clock.sleep(500 + this.#world.rng.below(1000));
      }
    }
  }

  async #opened(uuid: string, node: SimNode, waitMs: number): Promise<boolean> {
    const { clock } = this.#world;
    const end = clock.monotonicMs() + waitMs;
    while (clock.monotonicMs() < end) {
      if (node.engine?.volumes.get(uuid)?.open === true) return true;
      await clock.sleep(200);
    }
    return false;
  }
}

/** Snapshots of whatever volumes there are, one by one and in groups, made and deleted at random; in the end all are deleted. */
class SnapshotLife {
  readonly #world: World;
  #lives: VolumeLife[] = [];
  readonly #known: string[] = [];
  #winding = false;
  #made = 0;
  doing = 'nothing';
  done = false;

  constructor(world: World) {
    this.#world = world;
  }

  start(lives: VolumeLife[]): void {
    this.#lives = lives;
    this.#run().catch((error: unknown) => {
      this.#world.violated(
        `snapshots while ${this.doing}: ${error instanceof Error ? error.stack : String(error)}`,
      );
    });
  }

  wind(): void {
    this.#winding = true;
  }

  pickSource(): object | undefined {
    const { rng } = this.#world;
    const snapshot = rng.pick(this.#known);
    if (snapshot !== undefined && rng.chance(0.7)) return { source_snapshot_uuid: snapshot };
    const volume = rng.pick(this.#lives)?.uuid ?? '';
    return volume === '' ? undefined : { source_volume_uuid: volume };
  }

  async #run(): Promise<void> {
    const { rng, clock } = this.#world;
    while (!this.#winding) {
      await clock.sleep(1000 + rng.below(10_000));
      const [a, b] = [rng.pick(this.#lives)?.uuid ?? '', rng.pick(this.#lives)?.uuid ?? ''];
      const name = `snap-${++this.#made}`;
      if (a !== '' && rng.chance(0.25)) {
        const made = await this.#try<{ snapshots?: Snapshot[] }>('CreateSnapshotGroup', {
          name,
          source_volume_uuids: [...new Set([a, b].filter((uuid) => uuid !== ''))],
        });
        this.#known.push(...(made?.snapshots ?? []).map((one) => one.uuid ?? ''));
      } else if (a !== '') {
        const made = await this.#try<Snapshot>('CreateSnapshot', { name, source_volume_uuid: a });
        if (made?.uuid) this.#known.push(made.uuid);
      }
      while (this.#known.length > 3 || (this.#known.length > 0 && rng.chance(0.3))) {
        const [uuid] = this.#known.splice(rng.below(this.#known.length), 1);
        await this.#try('DeleteSnapshot', { uuid });
      }
    }
    for (;;) {
      this.doing = 'deleting them';
      const list = await this.#try<{ snapshots: Snapshot[] }>('ListSnapshots', {});
      if (list?.snapshots.length === 0) break;
      for (const { uuid } of list?.snapshots ?? []) await this.#try('DeleteSnapshot', { uuid });
      await clock.sleep(2000);
    }
    this.done = true;
  }

  async #try<T>(method: string, request: object): Promise<T | undefined> {
    this.doing = method;
    for (let n = 0; n < 4; n++) {
      try {
        return await this.#world.rpc<T>(method, { ...request, request_id: this.#world.id() }, 15_000);
      } catch (error) {
        this.doing = `${method} (${error instanceof Error ? error.message : String(error)})`;
        if (
          !(error instanceof HoldfastError) ||
          error.code === 'INTERNAL' ||
          error.code === 'INVALID_ARGUMENT'
        )
          throw error;
        await this.#world.clock.sleep(500 + this.#world.rng.below(1000));
      }
    }
    return undefined;
  }
}
