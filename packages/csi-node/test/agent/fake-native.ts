/**
 * A native engine in memory, for forcing what the real one does seldom: a close that fails, an open that fails, a fence, a
 * death at a chosen moment. One FakeDisk is one shared device; each node has a FakeNative on it. The tests that need the
 * real engine use it (packages/cli/test).
 */
import { randomUUID } from 'node:crypto';
import { waitFor } from '@holdfast/testing';
import type {
  Authority,
  ByteRange,
  CompactReport,
  CutReport,
  Engine,
  EngineEvent,
  EngineOptions,
  Heartbeat,
  LayerRecord,
  LayerSpec,
  LeaseState,
  NativeModule,
  OpenPoolOptions,
  OpenVolume,
  Pool,
  PoolInfo,
  PoolRoom,
  SlabOwner,
  SlabRun,
  MergeReport,
  StripReport,
  VolumeRecord,
  VolumeSpec,
} from '@holdfast/native';

function failure(code: string, message: string): Error {
  return Object.assign(new Error(message), { code: `HF_${code}` });
}

export class FakeDisk {
  /** Something that exists: devices are told apart by their real paths. */
  readonly path = '/dev/null';
  /** Of the device; by default no more than the pool uses. */
  deviceBytes = 0n;
  /** The device is smaller than the pool. */
  shrunk = false;
  info: PoolInfo = {
    uuid: randomUUID(),
    name: 'fake',
    wwid: `fake:${randomUUID()}`,
    deviceBytes: 8n << 30n,
    slabSize: 16 << 20,
    chunkSize: 65536,
    slabCount: 256n,
    volumeSlots: 64,
    layerSlots: 64,
    hostSlots: 16,
    fencing: 'loop',
    renewIntervalMs: 200,
    leaseMs: 1000,
    drainMs: 0,
    createdUnixMs: 1,
    warnings: [],
  };
  authority: Authority = { store: '', incarnation: 0n, term: 0n, unclaimed: true };
  readonly heartbeats = new Map<number, Heartbeat>();
  readonly fences = new Set<string>();
  readonly records = new Map<number, VolumeRecord>();
  readonly locks = new Map<string, FakePool>();
  readonly owners = new Map<bigint, SlabOwner>();
  readonly wiped: bigint[] = [];
  readonly layers = new Map<bigint, LayerRecord>();
  /** What stripLayers() was asked for, and what it answers. */
  readonly stripped: { victims: bigint[]; covers: bigint[] }[] = [];
  stripReport: StripReport = { emptied: [], clearedBlocks: 0n, uses: [] };
  /** What mergeLayers() was asked for, and what it answers. */
  readonly merged: { victims: bigint[]; head: bigint }[] = [];
  mergeReport: MergeReport = { movedBlocks: 0n, complete: true, noSpace: false, spare: [] };
  readonly wipedLayers: { layerId: bigint; tombstone: boolean }[] = [];
  /** What readChanges() finds. */
  changes: ByteRange[] = [];

  slabsOf(layerId: bigint): SlabRun[] {
    return [...this.owners.values()]
      .filter((owner) => owner.layerId === layerId)
      .map(({ slab, generation }) => ({ first: slab, count: 1, generation }));
  }
}

export class FakeVolume implements OpenVolume {
  readonly uuid: string;
  #spec: VolumeSpec;
  /** How often anybody asked for the whole spec: of the real engine that is a copy with every slab. */
  described = 0;
  readonly export;
  readonly #pool: FakePool;
  size: bigint;
  busy = false;
  state: 'open' | 'revoked' | 'closed' = 'open';
  writes: 'go on' | 'held' | 'expired' = 'go on';
  #holding: NodeJS.Timeout | undefined;
  /** A cut that fails, and leaves the old top. */
  failNextCut = false;
  failNextClose = false;
  readonly forgotten: SlabRun[] = [];
  readonly learned: LayerSpec[] = [];
  readonly compactions: { layers: bigint[]; skipAbovePermille: number; maxBlocks: bigint }[] = [];
  #endCompaction: (() => void) | undefined;

  constructor(pool: FakePool, spec: VolumeSpec, device = true) {
    this.#pool = pool;
    this.uuid = spec.uuid;
    this.#spec = spec;
    this.size = spec.sizeBytes;
    this.export = {
      frontend: 'fuse' as const,
      devicePath: device ? `/dev/fake-${spec.volumeId}` : '',
      reason: 'fake',
    };
  }

  get spec(): VolumeSpec {
    this.described += 1;
    return this.#spec;
  }

  async hold(timeoutMs: number): Promise<void> {
    if (this.writes === 'held') throw failure('BUSY', 'held');
    this.writes = 'held';
    this.#holding = setTimeout(() => {
      this.writes = 'expired';
    }, timeoutMs);
  }
  async release(): Promise<void> {
    clearTimeout(this.#holding);
    this.writes = 'go on';
  }
  async cut(top: LayerSpec, snapshot: { name: string; unixMs: number }): Promise<CutReport> {
    const [now, below] = this.#spec.layers;
    if (now === undefined) throw new Error('no layer');
    if (now.layerId === top.layerId && below !== undefined) {
      return { frozen: { ...below, slabs: this.#pool.disk.slabsOf(below.layerId) }, heldMicroseconds: 0 };
    }
    if (this.writes === 'expired') throw failure('HOLD_EXPIRED', 'held for too long');
    if (this.failNextCut) {
      this.failNextCut = false;
      throw failure('IO', 'the layer record could not be written');
    }
    if (top.parentLayerId !== now.layerId) throw failure('INVALID_ARGUMENT', 'not on top of the top');
    const frozen = { ...now, frozen: true, sizeBytes: this.size };
    this.#spec = { ...this.#spec, layers: [top, frozen, ...this.#spec.layers.slice(1)] };
    this.writeLayer(frozen, 'frozen', snapshot.name);
    this.writeLayer(top, 'writable');
    this.#record(this.state === 'open' ? 'open' : 'closed');
    await this.release();
    return { frozen: { ...frozen, slabs: this.#pool.disk.slabsOf(frozen.layerId) }, heldMicroseconds: 1500 };
  }
  async learn(layer: LayerSpec): Promise<void> {
    this.learned.push(layer);
  }
  async forget(slabs: SlabRun[], layers: bigint[]): Promise<void> {
    this.forgotten.push(...slabs);
    this.#spec = {
      ...this.#spec,
      layers: this.#spec.layers.filter(({ layerId }) => !layers.includes(layerId)),
    };
  }
  /** Claims as many slabs as the pool's `compacting` says, and lasts until it is ended if that says so. */
  async compact(
    sources: { layerId: bigint; slabs: SlabRun[] }[],
    skipAbovePermille: number,
    maxBlocks: bigint,
  ): Promise<CompactReport> {
    const { claims, lasts, fails } = this.#pool.compacting;
    if (claims > 0) await waitFor('slabs ahead', () => (this.#pool.stock().length > 0 ? true : undefined));
    this.claim(claims);
    this.compactions.push({ layers: sources.map(({ layerId }) => layerId), skipAbovePermille, maxBlocks });
    if (lasts) await new Promise<void>((resolve) => (this.#endCompaction = resolve));
    if (fails) throw failure('IO', 'blocks can not be copied');
    if (this.state === 'revoked') throw failure('UNAVAILABLE', 'stopped');
    return { movedBlocks: 77n, complete: !lasts, noSpace: false };
  }

  writeLayer(layer: LayerSpec, state: LayerRecord['state'], snapshotName = ''): void {
    this.#pool.disk.layers.set(layer.layerId, {
      slot: layer.slot,
      layerId: layer.layerId,
      parentLayerId: layer.parentLayerId,
      volumeId: this.#spec.volumeId,
      sizeBytes: layer.sizeBytes,
      birth: layer.birth,
      state,
      snapshotName,
    });
  }

  /** The first writes to `count` slabs' worth of new places. */
  claim(count: number): bigint[] {
    const [top] = this.#spec.layers;
    if (top === undefined) throw new Error('no layer');
    const taken = this.#pool.takeStock(count);
    for (const { slab, generation } of taken) {
      const owner = { layerId: top.layerId, volumeId: this.#spec.volumeId, slab, generation };
      this.#pool.disk.owners.set(slab, { ...owner, state: 'claimed' });
      this.#pool.emit({ type: 'slab-claimed', pool: this.#pool.info.uuid, ...owner });
    }
    return taken.map((t) => t.slab);
  }

  #record(state: VolumeRecord['state']): void {
    this.#pool.disk.records.set(this.#spec.slot, {
      slot: this.#spec.slot,
      volumeId: this.#spec.volumeId,
      uuid: this.#spec.uuid,
      name: this.#spec.name,
      state,
      sizeBytes: this.size,
      topLayerId: this.#spec.layers[0]?.layerId ?? 0n,
      epoch: this.#spec.epoch,
      hostId: this.#pool.hostId,
      generation: this.#pool.generation,
      fenced: false,
      parametersJson: this.#spec.parametersJson,
    });
  }

  opened(): void {
    if (this.#spec.readOnly) return;
    const [top] = this.#spec.layers;
    if (top !== undefined) this.writeLayer(top, 'writable');
    this.#record('open');
  }

  async grow(sizeBytes: bigint): Promise<void> {
    this.size = sizeBytes;
  }
  async close(): Promise<void> {
    this.#endCompaction?.();
    if (this.busy) throw failure('BUSY', 'mounted');
    if (this.failNextClose) {
      this.failNextClose = false;
      throw failure('IO', 'the record could not be written');
    }
    if (!this.#spec.readOnly) this.#record('closed');
    this.state = 'closed';
    this.#pool.remove(this);
  }
  async revoke(): Promise<void> {
    if (this.state === 'open' && !this.#spec.readOnly) this.#record('closed');
    this.state = 'revoked';
    this.#endCompaction?.();
  }
  async detach(): Promise<void> {
    if (this.busy) throw failure('BUSY', 'mounted');
    this.#pool.remove(this);
  }
  stats(): ReturnType<OpenVolume['stats']> {
    return {
      sizeBytes: this.size,
      mappedBytes: 0n,
      allocatedBytes: 0n,
      reads: 0n,
      writes: 0n,
      flushes: 0n,
      discards: 0n,
      readBytes: 0n,
      writtenBytes: 0n,
      held: 0n,
      dirtyPages: 0n,
      inFlight: 0n,
      memoryBytes: 0n,
    };
  }
}

export class FakePool implements Pool {
  readonly disk: FakeDisk;
  readonly hostId: number;
  readonly generation: bigint;
  readonly lockPath: string;
  readonly emit: (event: EngineEvent) => void;
  lease: LeaseState = 'valid';
  failNextOpen = false;
  /** What compact() does. */
  compacting = { claims: 0, lasts: false, fails: false };
  /** Of the volume that is opened next. */
  failNextCut = false;
  failNextClose = false;
  #volumes: FakeVolume[] = [];
  #stock: SlabRun[] = [];
  full = 0;

  constructor(disk: FakeDisk, options: OpenPoolOptions, emit: (event: EngineEvent) => void) {
    this.disk = disk;
    this.hostId = options.hostId;
    this.generation = options.generation;
    this.lockPath = options.lockPath;
    this.emit = emit;
    disk.locks.set(options.lockPath, this);
    this.#beat('live', options);
  }

  #beat(state: Heartbeat['state'], options?: OpenPoolOptions): void {
    const before = this.disk.heartbeats.get(this.hostId);
    this.disk.heartbeats.set(this.hostId, {
      hostId: this.hostId,
      state,
      generation: this.generation,
      sequence: (before?.sequence ?? 0n) + 1n,
      nonce: 0n,
      nodeName: options?.nodeName ?? before?.nodeName ?? '',
      machineId: options?.machineId ?? before?.machineId ?? '',
      bootId: options?.bootId ?? before?.bootId ?? '',
    });
  }

  async look(): Promise<PoolRoom> {
    if (this.disk.shrunk) throw failure('TOO_SMALL', 'the device shrank');
    const possible = this.disk.deviceBytes / BigInt(this.info.slabSize);
    return {
      info: this.info,
      deviceBytes: this.disk.deviceBytes,
      slabsPossible: possible > this.info.slabCount ? possible : this.info.slabCount,
    };
  }
  async grow(deviceBytes: bigint): Promise<PoolRoom> {
    if (this.disk.deviceBytes < deviceBytes) throw failure('TOO_SMALL', 'smaller here');
    this.disk.info = { ...this.disk.info, slabCount: deviceBytes / BigInt(this.info.slabSize) };
    return await this.look();
  }
  get info(): PoolInfo {
    return this.disk.info;
  }
  leaseState(): LeaseState {
    return this.lease;
  }
  volumes(): FakeVolume[] {
    return this.#volumes;
  }
  volume(uuid: string): FakeVolume {
    const found = this.#volumes.find((v) => v.uuid === uuid);
    if (found === undefined) throw new Error(`volume ${uuid} is not open`);
    return found;
  }
  remove(volume: FakeVolume): void {
    this.#volumes = this.#volumes.filter((v) => v !== volume);
  }
  async openVolume(spec: VolumeSpec, options: { device?: boolean } = {}): Promise<OpenVolume> {
    const record = this.disk.records.get(spec.slot);
    if (record !== undefined && record.epoch >= spec.epoch) throw failure('STALE', 'the record is newer');
    if (record !== undefined && record.topLayerId !== spec.layers[0]?.layerId) {
      throw failure('STALE', `the record's top is layer ${record.topLayerId}`);
    }
    const volume = new FakeVolume(this, spec, options.device ?? true);
    volume.failNextCut = this.failNextCut;
    volume.failNextClose = this.failNextClose;
    this.failNextCut = false;
    this.failNextClose = false;
    volume.opened();
    if (this.failNextOpen) {
      this.failNextOpen = false;
      throw failure('CORRUPT', 'slab 7: both copies of the page are bad');
    }
    this.#volumes.push(volume);
    return volume;
  }

  addSlabs(runs: SlabRun[]): void {
    this.#stock.push(...runs);
  }
  declareFull(): void {
    this.full += 1;
  }
  takeBackSlabs(count = Number.MAX_SAFE_INTEGER): SlabRun[] {
    return this.takeStock(count).map(({ slab, generation }) => ({ first: slab, count: 1, generation }));
  }
  takeStock(count: number): { slab: bigint; generation: bigint }[] {
    const all = this.#stock.flatMap((run) =>
      Array.from({ length: run.count }, (_, i) => ({
        slab: run.first + BigInt(i),
        generation: run.generation,
      })),
    );
    const taken = all.splice(0, count);
    this.#stock = all.map(({ slab, generation }) => ({ first: slab, count: 1, generation }));
    return taken;
  }
  stock(): SlabRun[] {
    return this.#stock;
  }

  async readAuthority(): Promise<Authority> {
    return this.disk.authority;
  }
  async claimAuthority(claim: { store: string; incarnation: bigint; term: bigint }): Promise<void> {
    this.disk.authority = { ...claim, unclaimed: false };
  }
  async readHeartbeat(hostId: number): Promise<Heartbeat> {
    return (
      this.disk.heartbeats.get(hostId) ?? {
        hostId,
        state: 'empty',
        generation: 0n,
        sequence: 0n,
        nonce: 0n,
        nodeName: '',
        machineId: '',
        bootId: '',
      }
    );
  }
  async readFence(hostId: number, generation: bigint) {
    return {
      hostId,
      generation: this.disk.fences.has(`${hostId}/${generation}`) ? generation : 0n,
      fencerHostId: this.hostId,
      term: 1n,
    };
  }
  async writeFence(victim: { hostId: number; generation: bigint }): Promise<void> {
    this.disk.fences.add(`${victim.hostId}/${victim.generation}`);
  }
  async readVolumeRecord(slot: number): Promise<VolumeRecord | undefined> {
    return this.disk.records.get(slot);
  }
  async readVolumeRecords(): Promise<VolumeRecord[]> {
    return [...this.disk.records.values()];
  }
  async scanSlabs(runs: SlabRun[]): Promise<SlabOwner[]> {
    return runs.flatMap((run) =>
      Array.from({ length: run.count }, (_, i): SlabOwner => {
        const slab = run.first + BigInt(i);
        return (
          this.disk.owners.get(slab) ?? { slab, layerId: 0n, volumeId: 0n, generation: 0n, state: 'free' }
        );
      }),
    );
  }
  async wipeVolume(volume: {
    volumeId: bigint;
    slot: number;
    layers: { slabs: SlabRun[] }[];
  }): Promise<void> {
    this.disk.wiped.push(volume.volumeId);
    this.disk.records.delete(volume.slot);
    for (const [slab, owner] of this.disk.owners) {
      if (owner.volumeId === volume.volumeId) this.disk.owners.delete(slab);
    }
  }

  async mergeLayers(victims: LayerSpec[], head: LayerSpec): Promise<MergeReport> {
    this.disk.merged.push({ victims: victims.map((layer) => layer.layerId), head: head.layerId });
    return this.disk.mergeReport;
  }
  async stripLayers(victims: LayerSpec[], covers: LayerSpec[]): Promise<StripReport> {
    this.disk.stripped.push({
      victims: victims.map((layer) => layer.layerId),
      covers: covers.map((layer) => layer.layerId),
    });
    return this.disk.stripReport;
  }
  async wipeLayers(layers: { layerId: bigint; slabs: SlabRun[] }[], tombstone: boolean): Promise<void> {
    for (const { layerId, slabs } of layers) {
      this.disk.wipedLayers.push({ layerId, tombstone });
      for (const { first } of slabs) this.disk.owners.delete(first);
      const record = this.disk.layers.get(layerId);
      if (tombstone && record !== undefined) this.disk.layers.set(layerId, { ...record, state: 'deleted' });
    }
  }
  async readChanges(
    _layers: LayerSpec[],
    _sizeBytes: bigint,
    startingOffset: bigint,
    maxRanges: number,
  ): Promise<{ ranges: ByteRange[]; nextOffset: bigint }> {
    const left = this.disk.changes.filter((range) => range.offset >= startingOffset);
    const ranges = left.slice(0, maxRanges);
    return { ranges, nextOffset: left[ranges.length]?.offset ?? 0n };
  }

  setLease(state: LeaseState, message: string): void {
    this.lease = state;
    if (state === 'stopped') this.#beat('stopped');
    this.emit({ type: 'lease', pool: this.info.uuid, state, message });
  }
  async close(): Promise<void> {
    if (this.#volumes.length > 0) throw failure('BUSY', 'volumes are open');
    this.#beat('stopped');
    this.lease = 'stopped';
    this.disk.locks.delete(this.lockPath);
  }
  async stop(): Promise<void> {
    this.setLease('stopped', 'stopped');
  }
}

export class FakeNative implements NativeModule {
  readonly formatVersion = 1;
  readonly disk: FakeDisk;
  /** What the keeper has: given to the next adopt(). */
  readonly kept: FakePool[] = [];
  readonly pools: FakePool[] = [];
  #emit: (event: EngineEvent) => void = () => undefined;

  constructor(disk: FakeDisk) {
    this.disk = disk;
  }

  /** The process dies: its pools stay with the keeper. */
  die(): void {
    this.#emit = () => undefined;
    this.kept.push(...this.pools.splice(0));
  }

  get pool(): FakePool {
    const [pool] = this.pools;
    if (pool === undefined) throw new Error('no pool is open');
    return pool;
  }

  async createEngine(options: EngineOptions): Promise<Engine> {
    this.#emit = options.onEvent;
    const emit = (event: EngineEvent): void => this.#emit(event);
    return {
      adopt: async () => {
        this.pools.push(...this.kept.splice(0));
        return this.pools;
      },
      openPool: async (open) => {
        if (this.disk.locks.has(open.lockPath)) throw failure('BUSY', 'the lock is held');
        const pool = new FakePool(this.disk, open, emit);
        this.pools.splice(0, this.pools.length, pool);
        return pool;
      },
      pools: () => this.pools,
      handOver: async () => this.die(),
      destroy: async () => undefined,
    };
  }

  async inspectDevice() {
    return {
      sizeBytes: this.disk.info.deviceBytes,
      logicalSectorSize: 4096,
      kind: 'pool' as const,
      signature: 'holdfast',
      mounted: false,
      wwid: this.disk.info.wwid,
      pool: this.disk.info,
    };
  }
  async readPool(): Promise<PoolInfo> {
    return this.disk.info;
  }
  async readAuthority(): Promise<Authority> {
    return this.disk.authority;
  }
  async claimAuthority(
    _path: string,
    claim: { store: string; incarnation: bigint; term: bigint },
  ): Promise<void> {
    this.disk.authority = { ...claim, unclaimed: false };
  }
  async readHeartbeats(): Promise<Heartbeat[]> {
    return [...this.disk.heartbeats.values()];
  }
  async readVolumeRecords(): Promise<VolumeRecord[]> {
    return [...this.disk.records.values()];
  }
  async readLayerRecords(): Promise<LayerRecord[]> {
    return [...this.disk.layers.values()];
  }
  async lockIsFree(path: string): Promise<boolean> {
    return !this.disk.locks.has(path);
  }
  formatPool(): Promise<PoolInfo> {
    return Promise.reject(failure('UNSUPPORTED', 'the fake disk is formatted'));
  }
  checkPool(): Promise<never> {
    return Promise.reject(failure('UNSUPPORTED', 'the fake disk cannot be checked'));
  }
}
