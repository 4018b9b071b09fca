/**
 * A cluster in virtual time: the real metadata service (store, decisions, operations, handlers) without its sockets, and nodes
 * whose engines, disks and networks are simulated. Messages are delayed, reordered, duplicated and lost; engines are killed, frozen
 * and taken over, machines rebooted, the service restarted. The truth about who can write is here, so that it can be held
 * against what the service decides.
 */
import { EventEmitter } from 'node:events';
import { Metadata, type ServerDuplexStream, type handleUnaryCall } from '@grpc/grpc-js';
import { createLogger, fromServiceError, HoldfastError, type Logger } from '@holdfast/common';
import type {
  AgentMessage__Output,
  CompactVolume,
  CutVolumes,
  Grant,
  HostRef,
  Layer,
  Order,
  OrderResult,
  ServiceMessage,
} from '@holdfast/proto';
import { AgentsApi } from '../../src/service/agents-service.ts';
import { Core } from '../../src/service/core.ts';
import { MetadataApi } from '../../src/service/metadata-service.ts';
import { Operations } from '../../src/service/operations.ts';
import { Sessions } from '../../src/service/sessions.ts';
import { MemoryStore } from '../../src/store/memory.ts';
import { VirtualClock } from './clock.ts';
import {
  blocksPerSlab,
  blocksPerVolume,
  chainOnDisk,
  contentOf,
  difference,
  mapFromTold,
  openFrom,
  pagesOf,
  type Content,
  type LayerOnDisk,
  type OpenVolume,
  type Page,
  type RecordOnDisk,
} from './data.ts';
import { random, type Random } from './random.ts';

export const leaseMs = 10_000;
export const renewMs = 2000;
export const drainMs = 1000;
export const slabCount = 640;
export const stripIntervalMs = 5000;
export const compactIntervalMs = 5000;
/** For so long the same few blocks of volumes are written. */
const hotMs = 20_000;
const hotBlocks = 3;
export const poolUuid = '00000000-0000-4000-8000-00000000000a';

type SessionHandler = (stream: ServerDuplexStream<AgentMessage__Output, ServiceMessage>) => void;

export type SimClass = 'FENCING_CLASS_LOOP' | 'FENCING_CLASS_LEASE_ONLY';

export class SimDisk {
  authority = { store_id: '', incarnation: '0', term: '0' };
  readonly heartbeats = new Map<number, { state: string; generation: bigint; sequence: bigint }>();
  readonly fenced = new Set<string>();
  readonly records = new Map<string, RecordOnDisk>();
  readonly layers = new Map<number, LayerOnDisk>();
  readonly pages = new Map<number, Page>();
  readonly data = new Map<number, Map<number, number>>();
  /** Who holds a lock path: engines whose process or I/O lives. */
  readonly locks = new Map<string, Engine>();
}

/** One engine process under one generation. */
export class Engine {
  alive = true;
  frozen = false;
  /** It found its fence page: nothing is issued any more. */
  stopped = false;
  leaseUntilMs = 0;
  inFlight = 0;
  /** Its machine was reset: what was queued never reaches the disk. */
  reset = false;
  /** What merges came to, so that none is done twice. */
  readonly merges = new Map<string, Promise<object>>();
  readonly volumes = new Map<string, OpenVolume>();
  readonly stock: { slab: number; generation: bigint }[] = [];
  readonly node: SimNode;
  readonly host: Required<Pick<HostRef, 'host_id'>> & HostRef;
  constructor(node: SimNode, host: HostRef) {
    this.node = node;
    this.host = { ...host, host_id: host.host_id ?? 0 };
  }
  get generation(): bigint {
    return BigInt(String(this.host.generation));
  }
  canSubmit(nowMs: number): boolean {
    return this.alive && !this.frozen && !this.stopped && nowMs < this.leaseUntilMs;
  }
}

export class World {
  readonly rng: Random;
  readonly clock = new VirtualClock();
  readonly store = new MemoryStore();
  readonly disk = new SimDisk();
  readonly nodes: SimNode[] = [];
  readonly fencing: SimClass;
  readonly logger: Logger;
  /** Faults happen. */
  stormy = true;
  writes = 0;
  readonly violations: string[] = [];
  core: Core | undefined;
  /** Told of every write that reaches the disk. */
  checkWrite: (engine: Engine, volume: OpenVolume) => void = () => undefined;
  /** Told of every slab that is wiped. */
  checkWiped: (slab: number, page: Page) => void = () => undefined;
  /** Told of blocks that a strip took out of the page of a slab. */
  checkStripped: (slab: number, page: Page, blocks: readonly number[]) => void = () => undefined;
  versions = 0;
  /** What is in each volume, by the writes that landed; and in each layer when it froze. */
  readonly contents = new Map<string, Map<number, number>>();
  readonly frozen = new Map<bigint, Content>();
  /** By frozen layer, for groups: when the last write in it was issued, and the first one after it acknowledged. */
  readonly moments = new Map<bigint, { lastIssuedMs: number; firstAckAfterMs: number }>();
  /** By volume: when the newest write that landed was issued; and the newest frozen layer. */
  readonly lastIssuedMs = new Map<string, number>();
  readonly lastFrozen = new Map<string, bigint>();
  cuts = 0;
  stripped = 0;
  forgotten = 0;
  slabsWiped = 0;
  reads = 0;
  /** Blocks that compactions moved, orders to compact a closed volume, and when orders came. */
  moved = 0;
  maintained = 0;
  readonly compactionsMs: number[] = [];
  /** Blocks that merges moved, and times that a holder learned of them. */
  merged = 0;
  learned = 0;
  #handlers: Record<string, handleUnaryCall<object, object>> = {};
  #session: SessionHandler | undefined;
  #operations: Operations | undefined;
  readonly streams = new Set<SimStream>();
  #ids = 0;

  constructor(seed: number, nodes: number, fencing: SimClass) {
    this.rng = random(seed);
    this.fencing = fencing;
    this.logger = createLogger('simulation');
    this.logger.level = process.env['HOLDFAST_LOG_LEVEL'] ?? 'silent';
    for (let n = 1; n <= nodes; n++) this.nodes.push(new SimNode(this, `node-${n}`));
  }

  id(): string {
    return `00000000-0000-4000-9000-${(++this.#ids).toString(16).padStart(12, '0')}`;
  }

  violated(what: string): void {
    this.violations.push(`${Math.round(this.clock.monotonicMs())} ms: ${what}`);
  }

  async startService(): Promise<void> {
    const core = await Core.open(this.store, {
      clock: this.clock,
      logger: this.logger,
      newId: () => this.id(),
    });
    const sessions = new Sessions(core);
    const operations = new Operations(core, sessions, { stripIntervalMs, compactIntervalMs });
    const agents = new AgentsApi(core, sessions).handlers();
    this.#session = agents.Session;
    this.#handlers = { ...new MetadataApi(core, sessions, operations).handlers(), ...agents } as never;
    operations.start();
    this.core = core;
    this.#operations = operations;
  }

  async stopService(): Promise<void> {
    const core = this.core;
    this.core = undefined;
    core?.stop();
    for (const stream of this.streams) stream.cut();
    await this.#operations?.stop();
  }

  /** A message's way through the network. */
  latencyMs(): number {
    return this.rng.chance(this.stormy ? 0.03 : 0) ? this.rng.below(8000) : 1 + this.rng.below(20);
  }

  /** One attempt of a unary call. Requests and answers may be lost, and requests arrive twice. */
  rpc<T>(method: string, request: object, timeoutMs = 5000): Promise<T> {
    return new Promise((resolve, reject) => {
      const lost = (p: number): boolean => this.stormy && this.rng.chance(p);
      const late = this.clock.after(timeoutMs, () =>
        reject(new HoldfastError('DEADLINE_EXCEEDED', `${method} got no answer`)),
      );
      const deliver = (answered: boolean): void => {
        const handler = this.#handlers[method];
        if (this.core === undefined || handler === undefined) {
          if (answered) reject(new HoldfastError('UNAVAILABLE', 'the service is away'));
          return;
        }
        const call = Object.assign(new EventEmitter(), {
          request: complete(method, request),
          metadata: new Metadata(),
          getDeadline: () => Infinity, // real time; `cancelled` is the deadline here
        });
        const cancel = this.clock.after(timeoutMs, () => call.emit('cancelled'));
        handler(call as never, (error, value) => {
          cancel();
          if (!answered || lost(0.02)) return;
          this.clock.after(this.latencyMs(), () => {
            late();
            if (error) reject(thrown(error));
            else resolve(value as T);
          });
        });
      };
      if (!lost(0.02)) this.clock.after(this.latencyMs(), () => deliver(true));
      if (lost(0.05)) this.clock.after(this.latencyMs() + this.rng.below(20_000), () => deliver(false));
    });
  }

  /** Under one request id until there is an answer that repeating does not change. */
  async repeated<T>(method: string, request: object, alive: () => boolean = () => true): Promise<T> {
    const named = { ...request, request_id: this.id() };
    for (;;) {
      try {
        return await this.rpc<T>(method, named);
      } catch (error) {
        const code = error instanceof HoldfastError ? error.code : '';
        if (!['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'OPERATION_PENDING'].includes(code) || !alive())
          throw error;
        await this.clock.sleep(100 + this.rng.below(400));
      }
    }
  }

  openStream(onMessage: (message: ServiceMessage) => void, onEnd: () => void): SimStream | undefined {
    if (this.core === undefined || this.#session === undefined) return undefined;
    const stream = new SimStream(this, onMessage, onEnd);
    this.streams.add(stream);
    this.#session(stream.serverSide as never);
    return stream;
  }
}

function thrown(error: unknown): Error {
  const status = error as { code: number; details: string; metadata?: Metadata };
  const shaped = Object.assign(new Error(status.details), {
    ...status,
    metadata: status.metadata ?? new Metadata(),
  });
  return fromServiceError(shaped) as Error;
}

/** Every field present, as the wire gives it. */
function complete(method: string, request: object): object {
  const defaults: Record<string, object> = {
    CreateVolume: {
      pool_uuids: [],
      limit_bytes: '0',
      parameters: {},
      source_snapshot_uuid: '',
      source_volume_uuid: '',
    },
    CreateSnapshot: { parameters: {} },
    CreateSnapshotGroup: { parameters: {} },
    ListSnapshots: { max_entries: 0, starting_token: '', source_volume_uuid: '', snapshot_uuid: '' },
    PublishVolume: { read_only: false, volume_context: {} },
    GetVolume: { name: '', volume_context: {} },
    StageVolume: { read_only: false },
    ReturnVolume: { claimed: [] },
    ReturnSlabs: { unclaimed: [], emptied: [] },
    FenceNode: { pool_uuid: '', reason: '', no_wait: true },
  };
  return structuredClone({ request_id: '', ...defaults[method], ...request });
}

/** The session stream of one agent: messages keep their order, each way. */
export class SimStream {
  readonly serverSide = new EventEmitter() as EventEmitter & {
    write(message: ServiceMessage): void;
    end(): void;
  };
  readonly #world: World;
  #over = false;
  readonly #onEnd: () => void;
  #lastDown = 0;
  #lastUp = 0;

  constructor(world: World, onMessage: (message: ServiceMessage) => void, onEnd: () => void) {
    this.#world = world;
    this.#onEnd = onEnd;
    this.serverSide.write = (message) => {
      this.#lastDown = Math.max(this.#lastDown, world.clock.monotonicMs() + world.latencyMs());
      world.clock.after(this.#lastDown - world.clock.monotonicMs(), () => {
        if (!this.#over) onMessage(structuredClone(message));
      });
    };
    this.serverSide.end = () => this.cut();
    this.serverSide.on('error', () => this.cut());
  }

  send(message: object): void {
    const { clock } = this.#world;
    this.#lastUp = Math.max(this.#lastUp, clock.monotonicMs() + this.#world.latencyMs());
    const copy = structuredClone(message);
    clock.after(this.#lastUp - clock.monotonicMs(), () => {
      if (!this.#over) this.serverSide.emit('data', copy);
    });
  }

  cut(): void {
    if (this.#over) return;
    this.#over = true;
    this.#world.streams.delete(this);
    this.serverSide.emit('close');
    this.#onEnd();
  }
}

interface PendingReturn {
  host: HostRef;
  uuid: string;
  epoch: bigint;
  claimed: object[];
}

/** A machine with its agent. */
export class SimNode {
  readonly world: World;
  readonly nodeId: string;
  readonly machineId: string;
  readonly lockPath: string;
  boots = 1;
  engine: Engine | undefined;
  stream: SimStream | undefined;
  accepted = false;
  sessionId = '';
  /** What the kubelet wants here: publish ids by volume. */
  readonly wanted = new Map<string, string>();
  readonly #revoked = new Map<string, bigint>();
  readonly #returns: PendingReturn[] = [];
  /** Volumes held for a group, by its cut id. */
  readonly #holds = new Map<string, { volumes: OpenVolume[]; cancel: () => void }>();
  /** The end of the strips and wipes under way. */
  #jobs: Promise<void> = Promise.resolve();
  #busy = new Set<string>();
  #seenSent = '';

  constructor(world: World, nodeId: string) {
    this.world = world;
    this.nodeId = nodeId;
    this.machineId = `machine-of-${nodeId}`;
    this.lockPath = `/run/${nodeId}`;
  }

  get #up(): boolean {
    return this.engine === undefined || !this.engine.frozen;
  }

  /** The agent's own pulse: connect, join, open, close, report. */
  start(): void {
    const pulse = (): void => {
      this.world.clock.after(50 + this.world.rng.below(100), pulse);
      if (!this.#up) return;
      if (this.stream === undefined) this.#connect();
      else this.#work();
    };
    pulse();
  }

  #connect(): void {
    const engine = this.engine;
    const stream = this.world.openStream(
      (message) => this.#onMessage(message),
      () => {
        if (this.stream === stream) this.stream = undefined;
      },
    );
    if (stream === undefined) return;
    this.stream = stream;
    this.accepted = false;
    this.#seenSent = '';
    stream.send({
      hello: {
        node_id: this.nodeId,
        name: this.nodeId,
        machine_id: this.machineId,
        boot_id: `boot-${this.boots}-of-${this.nodeId}`,
        version: 'sim',
        max_volumes: 0,
        holding:
          engine === undefined || !engine.alive || engine.stopped
            ? []
            : [
                {
                  host: engine.host,
                  volumes: [...engine.volumes.values()]
                    .filter((volume) => volume.open)
                    .map((volume) => ({
                      volume_uuid: volume.uuid,
                      epoch: volume.epoch.toString(),
                      claimed: this.#claimsOf(volume),
                    })),
                  stock: engine.stock.map(({ slab, generation }) => ({
                    first: String(slab),
                    count: 1,
                    generation: generation.toString(),
                  })),
                },
              ],
      },
    });
    this.#sendSeen();
  }

  #sendSeen(): void {
    const seen = JSON.stringify(this.world.disk.authority);
    if (seen === this.#seenSent) return;
    this.#seenSent = seen;
    this.stream?.send({
      pools_seen: {
        pools: [
          {
            uuid: poolUuid,
            name: 'pool',
            wwid: 'w',
            device_path: '/dev/sim',
            fencing: this.world.fencing,
            slab_size: String(16 << 20),
            slab_count: String(slabCount),
            volume_slots: 256,
            layer_slots: 1024,
            host_slots: 8,
            renew_interval_ms: renewMs,
            lease_ms: leaseMs,
            drain_ms: drainMs,
            device_bytes: '0',
            slabs_possible: '0',
            problem: '',
            authority: { ...this.world.disk.authority },
          },
        ],
      },
    });
  }

  #claimsOf(volume: OpenVolume): object[] {
    return volume.readOnly ? [] : this.#claimsOfLayer(volume.volumeId, volume.layerId);
  }

  #claimsOfLayer(volumeId: string, layerId: bigint): object[] {
    return [...this.world.disk.pages]
      .filter(([, page]) => page.layerId === layerId)
      .map(([slab, { generation }]) => claim(volumeId, { slab, generation, layerId }));
  }

  #onMessage(message: ServiceMessage): void {
    if (message.welcome) {
      this.accepted = (message.welcome.accepted_pools ?? []).includes(poolUuid);
      this.sessionId = message.welcome.session_id ?? '';
    }
    const { order } = message;
    if (!order || this.engine?.frozen) return; // a frozen agent answers nothing, ever
    const stream = this.stream;
    void this.#carryOut(order).then((result) => {
      if (this.engine?.frozen !== true)
        stream?.send({ order_result: { ...emptyResult, ...result, order_id: order.order_id } });
    });
  }

  #work(): void {
    this.#sendSeen();
    this.#once('join', () => this.#join());
    this.#once('returns', () => this.#sendReturns());
    const engine = this.engine;
    if (engine === undefined || !engine.alive || engine.stopped) return;
    for (const [uuid, publishId] of this.wanted) {
      if (!engine.volumes.has(uuid)) this.#once(`volume ${uuid}`, () => this.#open(engine, uuid, publishId));
    }
    for (const uuid of engine.volumes.keys()) {
      if (!this.wanted.has(uuid)) this.#once(`volume ${uuid}`, () => this.#close(engine, uuid));
    }
    if (engine.stock.length < 3) this.#once('slabs', () => this.#allocate(engine));
    this.#once('reports', () => this.#report(engine));
  }

  #once(key: string, body: () => Promise<void>): void {
    if (this.#busy.has(key)) return;
    const busy = this.#busy;
    busy.add(key);
    body()
      .catch((error: unknown) => {
        if (!(error instanceof HoldfastError) || error.code === 'INTERNAL') {
          this.world.violated(
            `${this.nodeId} ${key}: ${error instanceof Error ? error.stack : String(error)}`,
          );
        }
      })
      .finally(() => busy.delete(key));
  }

  // ---------------------------------------------------------------------------------------------- joining

  async #join(): Promise<void> {
    const { world } = this;
    if (!this.accepted || (this.engine?.alive && !this.engine.stopped)) return;
    const boots = this.boots;
    const lockFree = !world.disk.locks.has(this.lockPath);
    const still = (): boolean => this.boots === boots && !(this.engine?.alive && !this.engine.stopped);
    const { host } = await world.repeated<{ host: HostRef }>(
      'JoinPool',
      {
        pool_uuid: poolUuid,
        node_id: this.nodeId,
        machine_id: this.machineId,
        boot_id: `boot-${boots}-of-${this.nodeId}`,
        lock_path: this.lockPath,
        previous_io_dead: lockFree,
        session_id: this.sessionId,
      },
      still,
    );
    if (!still() || world.disk.locks.has(this.lockPath)) return;
    const engine = new Engine(this, host);
    world.disk.locks.set(this.lockPath, engine);
    this.engine = engine;
    this.#beat(engine);
    await world.repeated('PoolReady', { host }, () => engine.alive && !engine.stopped);
  }

  /** Reads the fence page, then writes the heartbeat, then may issue I/O for a lease from when it began. */
  #beat(engine: Engine): void {
    const { world } = this;
    world.clock.after(renewMs * 0.9 + world.rng.below(renewMs * 0.2), () => {
      if (engine.alive && !engine.stopped) this.#beat(engine);
    });
    if (!engine.alive || engine.frozen || engine.stopped) return;
    const began = world.clock.monotonicMs();
    const page = `${engine.host.host_id}/${engine.generation}`;
    if (world.disk.fenced.has(page)) return this.#stop(engine);
    world.clock.after(world.rng.below(50), () => {
      // The write lands even when its engine froze or died meanwhile.
      const before = world.disk.heartbeats.get(engine.host.host_id);
      world.disk.heartbeats.set(engine.host.host_id, {
        state: 'live',
        generation: engine.generation,
        sequence: (before?.sequence ?? 0n) + 1n,
      });
      engine.leaseUntilMs = began + leaseMs;
    });
  }

  #stop(engine: Engine): void {
    engine.stopped = true;
    const { world } = this;
    const finish = (): void => {
      if (engine.inFlight > 0) return void world.clock.after(50, finish);
      const before = world.disk.heartbeats.get(engine.host.host_id);
      if (before?.generation !== undefined && before.generation > engine.generation) return;
      world.disk.heartbeats.set(engine.host.host_id, {
        state: 'stopped',
        generation: engine.generation,
        sequence: (before?.sequence ?? 0n) + 1n,
      });
      this.stream?.send({ lease: { host: engine.host, state: 'stopped', message: '' } });
      engine.volumes.clear();
      engine.alive = false;
      if (world.disk.locks.get(this.lockPath) === engine) world.disk.locks.delete(this.lockPath);
    };
    finish();
  }

  // ---------------------------------------------------------------------------------------------- volumes

  async #open(engine: Engine, uuid: string, publishId: string): Promise<void> {
    const { world } = this;
    const grant = await world.repeated<Grant>(
      'StageVolume',
      { host: engine.host, volume_uuid: uuid, publish_id: publishId },
      () => engine.alive && this.wanted.get(uuid) === publishId,
    );
    const epoch = BigInt(String(grant.epoch));
    if (!engine.alive || engine.stopped || (this.#revoked.get(uuid) ?? -1n) >= epoch) return;
    if (!engine.canSubmit(world.clock.monotonicMs())) return;
    if (grant.read_only !== true && !this.#claimRecord(grant)) return; // HF_STALE
    engine.volumes.set(uuid, this.#opened(grant, true));
    await world.repeated(
      'VolumeOpened',
      { host: engine.host, volume_uuid: uuid, epoch: epoch.toString() },
      () => engine.alive && engine.volumes.has(uuid),
    );
  }

  /** The record on the disk must be older than the grant, and name the same top. */
  #claimRecord(grant: Grant): boolean {
    const { world } = this;
    const uuid = grant.volume_uuid ?? '';
    const epoch = BigInt(String(grant.epoch));
    const top = BigInt(String(grant.layers?.[0]?.layer_id));
    const record = world.disk.records.get(uuid);
    if (record !== undefined && record.epoch >= epoch) return false;
    if (record !== undefined && record.top !== top) {
      world.violated(
        `${this.nodeId} opens ${uuid} under ${epoch}: the grant names layer ${top}, the record ${record.top}`,
      );
    }
    const { slot = 0, parent_layer_id } = grant.layers?.[0] ?? {};
    if (record === undefined) {
      world.disk.layers.set(slot, {
        layerId: top,
        parentId: BigInt(String(parent_layer_id)),
        deleted: false,
      });
    }
    world.disk.records.set(uuid, {
      volumeId: String(grant.volume_id),
      slot: grant.slot ?? 0,
      epoch,
      state: 'open',
      top,
    });
    return true;
  }

  /** The holder must be told of every slab that the volume has: what it does not know reads as zeros. */
  #opened(grant: Grant, hasDevice: boolean): OpenVolume {
    const { world } = this;
    const volume = openFrom(world.disk, grant, hasDevice);
    const parent = grant.layers?.[1]?.layer_id;
    let wanted = world.contents.get(volume.uuid);
    if (wanted === undefined) {
      const copied =
        parent === undefined ? new Map<number, number>() : world.frozen.get(BigInt(String(parent)));
      if (copied === undefined)
        world.violated(`${volume.uuid} is made from layer ${String(parent)}, which never froze`);
      wanted = new Map(copied);
      world.contents.set(volume.uuid, wanted);
    }
    const wrong = difference(contentOf(world.disk, volume.map), wanted);
    if (wrong !== '') world.violated(`${this.nodeId} opens ${volume.uuid} under ${volume.epoch}: ${wrong}`);
    for (const [slab, page] of world.disk.pages) {
      if (page.layerId === volume.layerId && !volume.own.has(slab)) {
        world.violated(
          `${this.nodeId} opens ${volume.uuid} and is not told of slab ${slab} of its layer ${page.layerId}`,
        );
      }
    }
    return volume;
  }

  async #close(engine: Engine, uuid: string): Promise<void> {
    const volume = engine.volumes.get(uuid);
    if (volume === undefined || !volume.open || !engine.canSubmit(this.world.clock.monotonicMs())) return;
    volume.open = false;
    while (volume.inFlight > 0) await this.world.clock.sleep(20);
    if (!engine.alive || engine.stopped || !engine.volumes.has(uuid)) return;
    this.#closeRecord(volume);
    engine.volumes.delete(uuid);
    this.#returns.push({
      host: engine.host,
      uuid,
      epoch: volume.epoch,
      claimed: volume.unreported.map((one) => claim(volume.volumeId, one)),
    });
  }

  #closeRecord(volume: OpenVolume): void {
    const record = this.world.disk.records.get(volume.uuid);
    if (volume.readOnly || record === undefined) return;
    this.world.disk.records.set(volume.uuid, { ...record, epoch: volume.epoch, state: 'closed' });
  }

  async #sendReturns(): Promise<void> {
    const next = this.#returns[0];
    if (next === undefined) return;
    try {
      await this.world.repeated('ReturnVolume', {
        host: next.host,
        volume_uuid: next.uuid,
        epoch: next.epoch.toString(),
        claimed: next.claimed,
      });
    } finally {
      const at = this.#returns.indexOf(next);
      if (at >= 0) this.#returns.splice(at, 1);
    }
  }

  async #allocate(engine: Engine): Promise<void> {
    const { runs } = await this.world.rpc<{ runs: { first: string; count: number; generation: string }[] }>(
      'AllocateSlabs',
      { host: engine.host, count: 4, request_id: this.world.id() },
    );
    if (!engine.alive || engine.stopped) return;
    for (const run of runs) {
      for (let n = 0; n < run.count; n++) {
        engine.stock.push({ slab: Number(run.first) + n, generation: BigInt(run.generation) });
      }
    }
  }

  async #report(engine: Engine): Promise<void> {
    for (const volume of engine.volumes.values()) {
      const sent = [...volume.unreported];
      if (sent.length === 0 || !volume.open) continue;
      await this.world.repeated(
        'ReportSlabs',
        { host: engine.host, claimed: sent.map((one) => claim(volume.volumeId, one)) },
        () => engine.alive,
      );
      volume.unreported = volume.unreported.filter((one) => !sent.includes(one));
    }
  }

  /** One write of one open volume, in place or to a new place. It lands later, whatever happens to the engine. */
  write(): void {
    const { world } = this;
    const engine = this.engine;
    if (engine === undefined || !engine.canSubmit(world.clock.monotonicMs())) return;
    const writable = [...engine.volumes.values()].filter(
      (one) => one.open && one.hasDevice && !one.readOnly && !one.held,
    );
    const volume = world.rng.pick(writable);
    const block = this.#blockToWrite();
    if (volume === undefined || volume.busy.has(block)) return;
    const slab = this.#place(engine, volume, block);
    if (slab === undefined) return;
    const { layerId } = volume;
    const { generation } = volume.own.get(slab) as { generation: bigint };
    const version = ++world.versions;
    const issuedMs = world.clock.monotonicMs();
    volume.busy.add(block);
    volume.inFlight += 1;
    void this.#land(engine, world.rng.chance(0.1) ? drainMs : 10, () => {
      world.writes += 1;
      world.checkWrite(engine, volume);
      const before = world.disk.pages.get(slab);
      const page = before ?? { layerId, generation, blocks: new Set<number>() };
      if (page.layerId !== layerId || page.generation !== generation) {
        world.violated(`slab ${slab} is written for layer ${layerId} while layer ${page.layerId} has it`);
        return;
      }
      if (before === undefined) {
        world.disk.pages.set(slab, page);
        world.disk.data.set(slab, new Map());
        volume.unreported.push({ slab, generation, layerId });
      }
      page.blocks.add(block);
      world.disk.data.get(slab)?.set(block, version);
      world.contents.get(volume.uuid)?.set(block, version);
      world.lastIssuedMs.set(volume.uuid, Math.max(issuedMs, world.lastIssuedMs.get(volume.uuid) ?? 0));
      const moment = world.moments.get(world.lastFrozen.get(volume.uuid) ?? 0n);
      if (moment !== undefined)
        moment.firstAckAfterMs = Math.min(moment.firstAckAfterMs, world.clock.monotonicMs());
      volume.map.set(block, slab);
    }).then(() => {
      volume.busy.delete(block);
      volume.inFlight -= 1;
    });
  }

  /** Nearly always one of a few that change with time: what was written before shows through layers, until it is moved. */
  #blockToWrite(): number {
    const { rng, clock } = this.world;
    const first = (Math.floor(clock.monotonicMs() / hotMs) * hotBlocks) % blocksPerVolume;
    return rng.chance(0.97) ? (first + rng.below(hotBlocks)) % blocksPerVolume : rng.below(blocksPerVolume);
  }

  /** Where the writable layer has the block, or can take it. */
  #place(engine: Engine, volume: OpenVolume, block: number): number | undefined {
    const own = [...volume.own];
    const known =
      own.find(([, { blocks }]) => blocks.has(block)) ??
      own.find(([, { blocks }]) => blocks.size < blocksPerSlab);
    if (known !== undefined) {
      known[1].blocks.add(block);
      return known[0];
    }
    const fresh = engine.stock.shift();
    if (fresh === undefined) return undefined;
    volume.own.set(fresh.slab, { generation: fresh.generation, blocks: new Set([block]) });
    return fresh.slab;
  }

  /** I/O of an engine that reaches the disk within `ms`, unless the machine is reset. */
  async #land(engine: Engine, ms: number, body: () => void): Promise<void> {
    engine.inFlight += 1;
    await this.world.clock.sleep(this.world.rng.below(ms));
    engine.inFlight -= 1;
    if (!engine.reset) body();
  }

  /** Reads one open volume through its own map. */
  read(): void {
    const { world } = this;
    const engine = this.engine;
    if (engine === undefined || !engine.canSubmit(world.clock.monotonicMs())) return;
    const volume = world.rng.pick([...engine.volumes.values()].filter((one) => one.open));
    if (volume === undefined) return;
    world.reads += 1;
    const wrong = difference(
      contentOf(world.disk, volume.map),
      world.contents.get(volume.uuid) ?? new Map(),
      volume.busy,
    );
    if (wrong !== '') world.violated(`${this.nodeId} reads ${volume.uuid} under ${volume.epoch}: ${wrong}`);
  }

  // ---------------------------------------------------------------------------------------------- faults

  /** SIGKILL of the engine. Its I/O, and with it the lock, may live a little longer. */
  killEngine(then: 'adopt' | 'join'): void {
    const { world } = this;
    const engine = this.engine;
    if (engine === undefined || !engine.alive) return;
    engine.alive = false;
    engine.frozen = false;
    this.stream?.cut();
    this.#busy = new Set();
    this.#forgetHolds();
    const release = (): void => {
      if (engine.inFlight > 0) return void world.clock.after(20, release);
      if (world.disk.locks.get(this.lockPath) === engine) world.disk.locks.delete(this.lockPath);
      if (then === 'join' || engine.stopped || this.engine !== engine) return;
      const next = new Engine(this, engine.host);
      // Half-way through a close or a revocation too: the keeper has every volume that is not closed.
      for (const [uuid, volume] of engine.volumes)
        next.volumes.set(
          uuid,
          Object.assign(volume, { open: true, held: false, map: mapFromTold(world.disk, volume) }),
        );
      next.stock.push(...engine.stock);
      world.disk.locks.set(this.lockPath, next);
      this.engine = next;
      this.#beat(next);
    };
    world.clock.after(world.rng.below(3000), release);
  }

  reboot(): void {
    const { world } = this;
    const engine = this.engine;
    this.stream?.cut();
    this.boots += 1;
    this.#busy = new Set();
    this.#forgetHolds();
    this.#jobs = Promise.resolve();
    this.#returns.length = 0;
    this.#revoked.clear();
    if (engine === undefined) return;
    // A machine that is reset takes its queued I/O with it.
    engine.alive = false;
    engine.reset = true;
    engine.volumes.clear();
    this.engine = undefined;
    world.disk.locks.delete(this.lockPath);
  }

  freeze(ms: number): void {
    const engine = this.engine;
    if (engine === undefined || !engine.alive) return;
    engine.frozen = true;
    if (this.world.rng.chance(0.5)) this.stream?.cut();
    this.world.clock.after(ms, () => {
      engine.frozen = false;
      // After a gap longer than the lease it looks at its fence page and every record before it goes on.
      if (this.world.disk.fenced.has(`${engine.host.host_id}/${engine.generation}`) && engine.alive)
        this.#stop(engine);
    });
  }

  // ---------------------------------------------------------------------------------------------- orders

  async #carryOut(order: Order): Promise<Partial<OrderResult>> {
    const { disk, clock } = this.world;
    const mine = { incarnation: BigInt(String(order.incarnation)), term: BigInt(String(order.term)) };
    const page = { incarnation: BigInt(disk.authority.incarnation), term: BigInt(disk.authority.term) };
    const older =
      mine.incarnation < page.incarnation || (mine.incarnation === page.incarnation && mine.term < page.term);
    if (older) return { error_code: 'HF_STALE', error_message: 'an older term.' };
    if (order.claim_authority) {
      const claimed = {
        store_id: order.claim_authority.store_id ?? '',
        incarnation: String(order.incarnation),
        term: String(order.term),
      };
      disk.authority = claimed;
      await clock.sleep(Number(order.claim_authority.wait_ms));
      return disk.authority === claimed
        ? {}
        : { error_code: 'HF_STALE', error_message: 'somebody else claimed it.' };
    }
    if (order.test_lock) return { lock_free: !disk.locks.has(order.test_lock.lock_path ?? '') };
    if (order.revoke)
      return await this.#revoke(order.revoke.volume_uuid ?? '', BigInt(String(order.revoke.epoch)));
    const engine = this.engine;
    const job =
      order.strip_layers ?? order.merge_layers ?? order.wipe_layers ?? order.wipe_volume ?? undefined;
    if (job !== undefined && engine !== undefined) return await this.#doJob(engine, order, job);
    if (engine === undefined || !engine.canSubmit(clock.monotonicMs())) {
      return { error_code: 'UNAVAILABLE', error_message: 'not a live host.' };
    }
    await clock.sleep(this.world.rng.below(30));
    if (order.write_fence) {
      if (!engine.canSubmit(clock.monotonicMs()))
        return { error_code: 'HF_LEASE_EXPIRED', error_message: 'too late.' };
      disk.fenced.add(`${order.write_fence.host_id}/${String(order.write_fence.generation)}`);
      return {};
    }
    if (order.read_fence) {
      const key = `${order.read_fence.host_id}/${String(order.read_fence.generation)}`;
      const generation = disk.fenced.has(key) ? String(order.read_fence.generation) : '0';
      return { fence: { host_id: order.read_fence.host_id ?? 0, generation } };
    }
    if (order.read_heartbeat) {
      const beat = disk.heartbeats.get(order.read_heartbeat.host_id ?? 0);
      return {
        heartbeat: {
          host_id: order.read_heartbeat.host_id ?? 0,
          state: beat?.state ?? 'empty',
          generation: String(beat?.generation ?? 0n),
          sequence: String(beat?.sequence ?? 0n),
        },
      };
    }
    if (order.scan_slabs) {
      const owners = (order.scan_slabs.runs ?? []).flatMap((run) =>
        Array.from({ length: run.count ?? 0 }, (_, n) => {
          const slab = Number(run.first) + n;
          const found = disk.pages.get(slab);
          return {
            slab: String(slab),
            generation: String(found?.generation ?? 0n),
            layer_id: String(found?.layerId ?? 0n),
            state: found === undefined ? 'free' : 'claimed',
          };
        }),
      );
      return { slab_owners: { owners } };
    }
    if (order.read_volume_record) {
      const { slot } = order.read_volume_record;
      const [uuid, record] = [...disk.records].find(([, one]) => one.slot === slot) ?? ['', undefined];
      if (record === undefined) return { volume_record: { found: false } };
      return {
        volume_record: {
          found: true,
          uuid,
          slot: record.slot,
          volume_id: record.volumeId,
          state: record.state,
          epoch: record.epoch.toString(),
          top_layer_id: record.top.toString(),
          layers: chainOnDisk(disk.layers, record.top).map(({ layerId, parentId }) => ({
            layer_id: layerId.toString(),
            parent_layer_id: parentId.toString(),
            size_bytes: String(1 << 30),
          })),
        },
      };
    }
    if (order.hold_volumes) return await this.#hold(engine, order.hold_volumes);
    if (order.release_volumes) {
      this.#letGo(order.release_volumes.cut_id ?? '');
      return {};
    }
    if (order.cut_volumes) return await this.#cut(engine, order.cut_volumes);
    if (order.compact_volume) return await this.#compact(engine, order.compact_volume);
    if (order.learn_layer) {
      const { volume_uuid = '', epoch, layer } = order.learn_layer;
      return this.#learn(engine, volume_uuid, String(epoch), layer ?? {});
    }
    if (order.forget_slabs) {
      const slabs = (order.forget_slabs.slabs ?? []).flatMap((run) =>
        Array.from({ length: run.count ?? 0 }, (_, n) => Number(run.first) + n),
      );
      return this.#forget(
        engine,
        order.forget_slabs.volume_uuid ?? '',
        String(order.forget_slabs.epoch),
        slabs,
      );
    }
    return { error_code: 'UNIMPLEMENTED', error_message: 'what?' };
  }

  /** One after another: a repeated order, which may name other slabs by now, does not meet its first run. */
  async #doJob(engine: Engine, order: Order, job: { generation?: unknown }): Promise<Partial<OrderResult>> {
    const begun = this.#jobs.then(async (): Promise<Partial<OrderResult>> => {
      if (String(job.generation) !== engine.generation.toString())
        return { error_code: 'STALE', error_message: 'another life was meant.' };
      if (!engine.canSubmit(this.world.clock.monotonicMs()))
        return { error_code: 'UNAVAILABLE', error_message: 'not a live host.' };
      return await this.#job(engine, order);
    });
    this.#jobs = begun.then(() => undefined);
    return await begun;
  }

  // ---------------------------------------------------------------------------------------------- cuts

  async #hold(engine: Engine, order: NonNullable<Order['hold_volumes']>): Promise<Partial<OrderResult>> {
    const cutId = order.cut_id ?? '';
    const volumes: OpenVolume[] = [];
    for (const { volume_uuid, epoch } of order.volumes ?? []) {
      const volume = engine.volumes.get(volume_uuid ?? '');
      if (volume?.epoch !== BigInt(String(epoch)) || !volume.open || volume.held) {
        for (const one of volumes) one.held = false;
        return { error_code: 'HF_BUSY', error_message: 'not open here, or held already.' };
      }
      volume.held = true;
      volumes.push(volume);
    }
    const cancel = this.world.clock.after(order.hold_timeout_ms ?? 0, () => this.#letGo(cutId));
    this.#holds.set(cutId, { volumes, cancel });
    while (volumes.some((volume) => volume.inFlight > 0)) await this.world.clock.sleep(20);
    return this.#holds.has(cutId) && engine.alive
      ? {}
      : { error_code: 'HF_HOLD_EXPIRED', error_message: 'too slow.' };
  }

  #letGo(cutId: string): void {
    const hold = this.#holds.get(cutId);
    hold?.cancel();
    for (const volume of hold?.volumes ?? []) volume.held = false;
    this.#holds.delete(cutId);
  }

  #forgetHolds(): void {
    for (const cutId of this.#holds.keys()) this.#letGo(cutId);
  }

  async #cut(engine: Engine, order: CutVolumes): Promise<Partial<OrderResult>> {
    const { disk, clock } = this.world;
    const cutId = order.cut_id ?? '';
    const cuts = order.cuts ?? [];
    const isDone = (one: (typeof cuts)[number]): boolean =>
      disk.records.get(one.volume_uuid ?? '')?.top === BigInt(String(one.top?.layer_id));
    const expired = (): boolean => cutId !== '' && !this.#holds.has(cutId) && !cuts.every(isDone);
    const volumes: object[] = [];
    for (const one of cuts) {
      if (expired()) return { error_code: 'HF_HOLD_EXPIRED', error_message: 'not held any more.' };
      const uuid = one.volume_uuid ?? '';
      const epoch = BigInt(String(one.epoch));
      if (one.grant && !engine.volumes.has(uuid)) {
        if ((this.#revoked.get(uuid) ?? -1n) >= epoch || !this.#claimRecord(one.grant))
          return { error_code: 'STALE', error_message: 'a newer epoch is known.' };
        engine.volumes.set(uuid, this.#opened(one.grant, false));
        await clock.sleep(this.world.rng.below(100));
      }
      const volume = engine.volumes.get(uuid);
      const usable = (): boolean =>
        volume?.epoch === epoch &&
        volume.open &&
        engine.volumes.get(uuid) === volume &&
        engine.canSubmit(clock.monotonicMs());
      if (volume === undefined || !usable())
        return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here.' };
      volume.held = true;
      while (volume.inFlight > 0) await clock.sleep(10);
      await clock.sleep(this.world.rng.below(50));
      const failed = !usable() || expired();
      if (!failed && !isDone(one)) this.#commit(volume, one.top ?? {});
      if (!this.#holds.has(cutId) || this.world.rng.chance(0.5)) volume.held = false;
      if (failed) return { error_code: 'HF_HOLD_EXPIRED', error_message: 'not any more.' };
      if (one.grant) {
        await clock.sleep(this.world.rng.below(100));
        if (!usable()) return { error_code: 'HF_IO', error_message: 'it cannot be closed.' };
        this.#closeRecord(volume);
        engine.volumes.delete(uuid);
      }
      volumes.push({
        volume_uuid: uuid,
        size_bytes: String(1 << 30),
        claimed: this.#claimsOfLayer(volume.volumeId, BigInt(String(one.top?.parent_layer_id))),
        held_us: '1000',
        epoch: epoch.toString(),
      });
    }
    this.#letGo(cutId);
    return { cut: { volumes } };
  }

  /** The volume record that names the new top: from now on the old one is frozen. */
  #commit(volume: OpenVolume, layer: Layer): void {
    const { world } = this;
    const top = BigInt(String(layer.layer_id));
    const { layerId, parentId, layerSlot } = volume;
    world.disk.layers.set(layerSlot, { layerId, parentId, deleted: false });
    world.disk.layers.set(layer.slot ?? 0, { layerId: top, parentId: layerId, deleted: false });
    Object.assign(volume, { parentId: layerId, layerSlot: layer.slot ?? 0 });
    const record = world.disk.records.get(volume.uuid) as RecordOnDisk;
    world.cuts += 1;
    world.frozen.set(volume.layerId, new Map(world.contents.get(volume.uuid)));
    world.lastFrozen.set(volume.uuid, volume.layerId);
    world.moments.set(volume.layerId, {
      lastIssuedMs: world.lastIssuedMs.get(volume.uuid) ?? 0,
      firstAckAfterMs: Infinity,
    });
    world.disk.records.set(volume.uuid, { ...record, top });
    for (const [slab, { generation }] of volume.own) {
      if (world.disk.pages.get(slab)?.layerId === volume.layerId) volume.told.set(slab, generation);
    }
    volume.own = new Map();
    volume.layerId = top;
  }

  // ---------------------------------------------------------------------------------------------- compaction

  /** Moves some of what the sources answer for; a slab in five is one that the rule leaves alone. */
  async #compact(engine: Engine, order: CompactVolume): Promise<Partial<OrderResult>> {
    const { world } = this;
    const { disk, clock, rng } = world;
    const uuid = order.volume_uuid ?? '';
    const epoch = BigInt(String(order.epoch));
    if (String(order.generation) !== engine.generation.toString())
      return { error_code: 'STALE', error_message: 'another life was meant.' };
    world.compactionsMs.push(clock.monotonicMs());
    if (order.grant && !engine.volumes.has(uuid)) {
      if ((this.#revoked.get(uuid) ?? -1n) >= epoch || !this.#claimRecord(order.grant))
        return { error_code: 'STALE', error_message: 'a newer epoch is known.' };
      engine.volumes.set(uuid, this.#opened(order.grant, false));
      world.maintained += 1;
    }
    const volume = engine.volumes.get(uuid);
    const usable = (): boolean =>
      volume?.epoch === epoch &&
      volume.open &&
      engine.volumes.get(uuid) === volume &&
      engine.canSubmit(clock.monotonicMs());
    if (volume === undefined || !usable())
      return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here.' };
    let complete = true;
    let noSpace = false;
    let moved = 0;
    const most = 1 + rng.below(6);
    for (const [slab, page] of (order.sources ?? []).flatMap((layer) => pagesOf(disk, layer))) {
      for (const block of slab % 5 === 0 ? [] : page.blocks) {
        if (volume.map.get(block) !== slab) continue;
        const place = moved < most && !volume.held && !volume.busy.has(block) && usable();
        if (!place) complete = false;
        else if (await this.#move(engine, volume, block, slab)) moved += 1;
        else noSpace = true;
      }
    }
    if (!usable()) return { error_code: 'HF_IO', error_message: 'not any more.' };
    if (order.grant) {
      const claimed = volume.unreported.map((one) => claim(volume.volumeId, one));
      try {
        if (claimed.length > 0) await world.repeated('ReportSlabs', { host: engine.host, claimed }, usable);
      } catch (error) {
        // It stays open, and what it claimed is told with its revocation.
        return { error_code: 'UNAVAILABLE', error_message: String(error) };
      }
      volume.unreported = [];
      if (!usable()) return { error_code: 'HF_IO', error_message: 'it cannot be closed.' };
      this.#closeRecord(volume);
      engine.volumes.delete(uuid);
    }
    return {
      compact: {
        volume_uuid: uuid,
        moved_blocks: String(moved),
        complete: complete && !noSpace,
        no_space: noSpace,
        epoch: epoch.toString(),
      },
    };
  }

  /** Reads a block and writes it to the top, as one I/O that cuts and revocations wait for. False: there is no room. */
  async #move(engine: Engine, volume: OpenVolume, block: number, slab: number): Promise<boolean> {
    const { world } = this;
    const { disk } = world;
    const target = this.#place(engine, volume, block);
    if (target === undefined) return false;
    const { layerId } = volume;
    const { generation } = volume.own.get(target) as { generation: bigint };
    volume.busy.add(block);
    volume.inFlight += 1;
    await this.#land(engine, 100, () => {
      const version = disk.data.get(slab)?.get(block);
      if (version === undefined) {
        world.violated(
          `${this.nodeId} compacts block ${block} of ${volume.uuid} out of slab ${slab}, which is wiped`,
        );
        return;
      }
      world.checkWrite(engine, volume);
      const before = disk.pages.get(target);
      const page = before ?? { layerId, generation, blocks: new Set<number>() };
      if (page.layerId !== layerId || page.generation !== generation) {
        world.violated(`slab ${target} is written for layer ${layerId} while layer ${page.layerId} has it`);
        return;
      }
      if (before === undefined) {
        disk.pages.set(target, page);
        disk.data.set(target, new Map());
        volume.unreported.push({ slab: target, generation, layerId });
      }
      page.blocks.add(block);
      disk.data.get(target)?.set(block, version);
      volume.map.set(block, target);
      world.moved += 1;
    });
    volume.busy.delete(block);
    volume.inFlight -= 1;
    return true;
  }

  #forget(engine: Engine, uuid: string, epoch: string, slabs: readonly number[]): Partial<OrderResult> {
    const volume = engine.volumes.get(uuid);
    if (volume?.epoch.toString() !== epoch || !volume.open)
      return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here.' };
    for (const slab of slabs) {
      const block = [...volume.map].find(([, place]) => place === slab)?.[0];
      if (block !== undefined) {
        this.world.violated(
          `${this.nodeId} forgets slab ${slab}, which answers for block ${block} of ${uuid}`,
        );
      }
      volume.told.delete(slab);
      this.world.forgotten += 1;
    }
    return {};
  }

  #learn(engine: Engine, uuid: string, epoch: string, layer: Layer): Partial<OrderResult> {
    const volume = engine.volumes.get(uuid);
    if (volume?.epoch.toString() !== epoch || !volume.open)
      return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here.' };
    for (const [slab, page] of pagesOf(this.world.disk, layer)) {
      const { generation, blocks } = page;
      if (page.layerId !== volume.layerId) volume.told.set(slab, generation);
      else volume.own.set(slab, { generation, blocks: new Set(blocks) });
    }
    volume.map = mapFromTold(this.world.disk, volume);
    this.world.learned += 1;
    return {};
  }

  // ---------------------------------------------------------------------------------------------- jobs

  async #job(engine: Engine, order: Order): Promise<Partial<OrderResult>> {
    try {
      if (order.merge_layers) {
        const { victims = [], head, sequence } = order.merge_layers;
        const known = engine.merges.get(String(sequence)) ?? this.#merge(engine, victims, head ?? {});
        engine.merges.set(String(sequence), known);
        return { merge: await known };
      }
      if (order.strip_layers) {
        return {
          strip: await this.#strip(engine, order.strip_layers.victims ?? [], order.strip_layers.covers ?? []),
        };
      }
      const layers = order.wipe_layers?.layers ?? order.wipe_volume?.layers ?? [];
      await this.#wipe(engine, layers);
      if (order.wipe_layers?.tombstone !== false)
        for (const layer of layers) this.#changeRecord(layer, { deleted: true });
      if (order.wipe_volume) this.#deleteRecord(order.wipe_volume);
      return {};
    } catch (error) {
      return { error_code: 'HF_IO', error_message: String(error) };
    }
  }

  /** @throws unless the engine may issue I/O now; waits while it is frozen */
  async #mayGoOn(engine: Engine): Promise<void> {
    while (engine.frozen && engine.alive) await this.world.clock.sleep(100);
    if (!engine.canSubmit(this.world.clock.monotonicMs())) throw new Error('its lease is over.');
  }

  /** Up into the frozen layer above, into a slab of which fits as much as a slab in five of the victims has, and no more. */
  async #merge(engine: Engine, victims: readonly Layer[], head: Layer): Promise<object> {
    const { world } = this;
    const { disk, clock, rng } = world;
    world.compactionsMs.push(clock.monotonicMs());
    const generations = new Map(
      (head.slabs ?? []).flatMap((run) =>
        Array.from(
          { length: run.count ?? 0 },
          (_, n) => [Number(run.first) + n, BigInt(String(run.generation))] as const,
        ),
      ),
    );
    const layerId = BigInt(String(head.layer_id));
    const isOwn = (slab: number): boolean =>
      disk.pages.get(slab)?.layerId === layerId && disk.pages.get(slab)?.generation === generations.get(slab);
    const spare = (): number[] => [...generations.keys()].filter((slab) => !disk.pages.has(slab));
    const covered = new Set(pagesOf(disk, head).flatMap(([, page]) => [...page.blocks]));
    const most = 1 + rng.below(8);
    let moved = 0;
    let complete = true;
    let noSpace = false;
    for (const victim of victims) {
      const mine = pagesOf(disk, victim);
      for (const [slab, page] of mine) {
        for (const block of slab % 5 === 0 ? [] : [...page.blocks].filter((one) => !covered.has(one))) {
          const target =
            [...generations.keys()].find(
              (one) => isOwn(one) && (disk.pages.get(one)?.blocks.size ?? 0) < blocksPerSlab,
            ) ?? spare()[0];
          if (target === undefined) noSpace = true;
          if (target === undefined || moved >= most) {
            complete = false;
            continue;
          }
          await this.#mayGoOn(engine);
          await this.#land(engine, 100, () => {
            const version = disk.data.get(slab)?.get(block);
            if (version === undefined || disk.pages.get(slab) !== page) {
              world.violated(`${this.nodeId} merges block ${block} out of slab ${slab}, which is wiped`);
              return;
            }
            if (!disk.pages.has(target)) {
              const generation = generations.get(target) as bigint;
              disk.pages.set(target, { layerId, generation, blocks: new Set() });
              disk.data.set(target, new Map());
            }
            if (!isOwn(target))
              world.violated(`${this.nodeId} merges into slab ${target}, which is another's`);
            disk.pages.get(target)?.blocks.add(block);
            disk.data.get(target)?.set(block, version);
            world.merged += 1;
          });
          moved += 1;
        }
      }
      for (const [, page] of mine) for (const block of page.blocks) covered.add(block);
    }
    return {
      moved_blocks: String(moved),
      complete,
      no_space: noSpace,
      spare: spare().map((slab) => ({
        first: String(slab),
        count: 1,
        generation: String(generations.get(slab)),
      })),
    };
  }

  async #strip(engine: Engine, victims: readonly Layer[], covers: readonly Layer[]): Promise<object> {
    const { disk, clock, rng } = this.world;
    const covered = new Set(
      covers.flatMap((layer) => pagesOf(disk, layer).flatMap(([, page]) => [...page.blocks])),
    );
    const emptied: object[] = [];
    const uses: object[] = [];
    let cleared = 0;
    await this.#mayGoOn(engine);
    for (const victim of victims) {
      this.#changeRecord(victim, { parentId: BigInt(String(victim.parent_layer_id)) });
      const mine = pagesOf(disk, victim);
      const blocks = mine.flatMap(([, page]) => [...page.blocks]);
      for (const [slab, page] of mine) {
        await clock.sleep(rng.below(300));
        await this.#mayGoOn(engine);
        const gone = [...page.blocks].filter((block) => covered.has(block));
        await this.#land(engine, 200, () => {
          if (disk.pages.get(slab) !== page) {
            this.world.violated(
              `${this.nodeId} strips slab ${slab}, which is not layer ${page.layerId}'s any more`,
            );
            return;
          }
          for (const block of gone) page.blocks.delete(block);
          cleared += gone.length;
          this.world.stripped += gone.length;
          this.world.checkStripped(slab, page, gone);
        });
        if (page.blocks.size === 0) {
          emptied.push({ first: String(slab), count: 1, generation: page.generation.toString() });
        }
      }
      for (const block of blocks) covered.add(block);
      const live = mine.reduce((sum, [, page]) => sum + page.blocks.size, 0);
      uses.push({ layer_id: String(victim.layer_id), live_blocks: String(live), slabs: '0' });
    }
    return { emptied, cleared_blocks: String(cleared), uses };
  }

  /** If the slot still has the record of this layer. */
  #changeRecord(layer: Layer, change: Partial<LayerOnDisk>): void {
    const record = this.world.disk.layers.get(layer.slot ?? 0);
    if (record?.layerId === BigInt(String(layer.layer_id))) Object.assign(record, change);
  }

  async #wipe(engine: Engine, layers: readonly Layer[]): Promise<void> {
    const { disk, clock, rng } = this.world;
    for (const layer of layers) {
      for (const [slab, page] of pagesOf(disk, layer)) {
        await clock.sleep(rng.below(100));
        await this.#mayGoOn(engine);
        await this.#land(engine, drainMs, () => {
          if (disk.pages.get(slab) !== page) {
            this.world.violated(
              `${this.nodeId} discards slab ${slab}, which is not layer ${page.layerId}'s any more`,
            );
            return;
          }
          this.world.checkWiped(slab, page);
          this.world.slabsWiped += 1;
          disk.pages.delete(slab);
          disk.data.delete(slab);
        });
      }
    }
  }

  #deleteRecord(order: NonNullable<Order['wipe_volume']>): void {
    const { records } = this.world.disk;
    for (const [uuid, record] of records) {
      if (record.volumeId === String(order.volume_id)) records.delete(uuid);
    }
  }

  async #revoke(uuid: string, epoch: bigint): Promise<Partial<OrderResult>> {
    if ((this.#revoked.get(uuid) ?? -1n) < epoch) this.#revoked.set(uuid, epoch);
    const engine = this.engine;
    const waiting = this.#returns.find((one) => one.uuid === uuid && one.epoch === epoch);
    if (waiting !== undefined) {
      return { revoked: { epoch: epoch.toString(), was_open: true, claimed: waiting.claimed } };
    }
    if (engine !== undefined && (!engine.alive || engine.stopped)) {
      return { error_code: 'UNAVAILABLE', error_message: 'not now.' };
    }
    const volume = engine?.volumes.get(uuid);
    if (engine === undefined || volume === undefined) {
      return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here.' };
    }
    if (volume.epoch !== epoch) return { error_code: 'STALE', error_message: 'another epoch.' };
    volume.open = false;
    while (volume.inFlight > 0) await this.world.clock.sleep(20);
    if (!engine.canSubmit(this.world.clock.monotonicMs()))
      return { error_code: 'HF_IO', error_message: 'no lease.' };
    engine.volumes.delete(uuid);
    this.#closeRecord(volume);
    const claimed = volume.unreported.map((one) => claim(volume.volumeId, one));
    // The answer may get lost; what it says must not.
    this.#returns.push({ host: engine.host, uuid, epoch, claimed });
    return { revoked: { epoch: epoch.toString(), was_open: true, claimed } };
  }
}

const emptyResult = { error_code: '', error_message: '' };

function claim(volumeId: string, one: { slab: number; generation: bigint; layerId: bigint }): object {
  return {
    volume_id: volumeId,
    layer_id: one.layerId.toString(),
    slab: String(one.slab),
    generation: one.generation.toString(),
  };
}
