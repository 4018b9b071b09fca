/**
 * The whole native surface, in one typed file. Everything that touches a pool's bytes goes through here; JavaScript is
 * never on the data path or the lease path. Bytes, ids, epochs and generations are bigint; offsets and sizes are bytes.
 *
 * Errors: every rejected promise carries an `Error` whose `code` is `HF_` + a name of native/src/core/status.h
 * (`HF_FOREIGN_DATA`, `HF_FENCED`, …) and whose message says what happened, to what, and what to do next.
 */
import { createRequire } from 'node:module';

export type FencingClass = 'reservations' | 'manual' | 'lease-only' | 'loop';
/** Lower-case hyphenated UUID text. */
export type Uuid = string;

export interface PoolInfo {
  uuid: Uuid;
  name: string;
  wwid: string;
  deviceBytes: bigint;
  slabSize: number;
  chunkSize: number;
  slabCount: bigint;
  volumeSlots: number;
  layerSlots: number;
  hostSlots: number;
  fencing: FencingClass;
  renewIntervalMs: number;
  leaseMs: number;
  drainMs: number;
  createdUnixMs: number;
  /** Sentences about what was repaired or noticed while reading ("superblock A fails its check; copy B was used"). */
  warnings: string[];
}

export interface FormatOptions {
  name: string;
  fencing: FencingClass;
  /** Format over another file system's or an old pool's signature. A mounted or open device is refused regardless. */
  force?: boolean;
  renewIntervalMs?: number;
  leaseMs?: number;
  drainMs?: number;
  /** Fixed UUID, for tests. */
  uuid?: Uuid;
  onProgress?: (done: number, total: number) => void;
}

/** What stands on a device, for refusing well. */
export interface DeviceInspection {
  sizeBytes: bigint;
  logicalSectorSize: number;
  kind: 'blank' | 'pool' | 'foreign';
  /** e.g. 'ext4', 'xfs', 'gpt', 'data' (neither zeros nor a known signature); empty for blank. */
  signature: string;
  mounted: boolean;
  wwid: string;
  pool?: PoolInfo;
}

export interface CheckFinding {
  severity: 'error' | 'warning' | 'info';
  /** Stable short name: 'slab-page-both-bad', 'chunk-mapped-twice', 'slab-owned-twice', … */
  kind: string;
  message: string;
  volumeId?: bigint;
  layerId?: bigint;
  slab?: bigint;
  offset?: bigint;
  length?: bigint;
}
export interface CheckReport {
  pool: PoolInfo;
  clean: boolean;
  findings: CheckFinding[];
  pagesRead: number;
  volumes: number;
  layers: number;
  slabsClaimed: bigint;
  slabsFree: bigint;
}

export interface SlabRun {
  first: bigint;
  count: number;
  generation: bigint;
}
export interface LayerSpec {
  layerId: bigint;
  slot: number;
  parentLayerId: bigint;
  birth: bigint;
  sizeBytes: bigint;
  frozen: boolean;
  slabs: SlabRun[];
}
/** A grant as the engine needs it; layers newest first. */
export interface VolumeSpec {
  volumeId: bigint;
  slot: number;
  uuid: Uuid;
  name: string;
  sizeBytes: bigint;
  epoch: bigint;
  readOnly: boolean;
  parametersJson: string;
  layers: LayerSpec[];
}

export interface VolumeRecord {
  slot: number;
  volumeId: bigint;
  uuid: Uuid;
  name: string;
  state: 'closed' | 'open' | 'deleted';
  sizeBytes: bigint;
  topLayerId: bigint;
  epoch: bigint;
  hostId: number;
  generation: bigint;
  fenced: boolean;
  parametersJson: string;
}
export interface LayerRecord {
  slot: number;
  layerId: bigint;
  parentLayerId: bigint;
  volumeId: bigint;
  sizeBytes: bigint;
  birth: bigint;
  state: 'writable' | 'frozen' | 'folded' | 'deleted';
  snapshotName: string;
}
/** A slab page's header as it stands on disk: the newer valid copy. */
export interface SlabOwner {
  slab: bigint;
  layerId: bigint;
  volumeId: bigint;
  generation: bigint;
  /** 'free': never claimed or given back; 'bad': both copies fail their check. */
  state: 'free' | 'claimed' | 'bad';
}
export interface Authority {
  store: Uuid;
  incarnation: bigint;
  term: bigint;
  /** True where no service ever claimed the pool. */
  unclaimed: boolean;
}
export interface Heartbeat {
  hostId: number;
  state: 'empty' | 'live' | 'stopped';
  generation: bigint;
  /** Grows with each renewal: two equal readings mean no renewal between them. */
  sequence: bigint;
  nonce: bigint;
  nodeName: string;
  machineId: Uuid;
  bootId: Uuid;
}
export interface FencePage {
  hostId: number;
  generation: bigint;
  fencerHostId: number;
  term: bigint;
}

/**
 * Raw access to a pool without being a host on it: for format, list, check, and a joining agent's first look.
 * Device handles are opened for the call and closed after it.
 */
export interface PoolTools {
  inspectDevice(devicePath: string): Promise<DeviceInspection>;
  formatPool(devicePath: string, options: FormatOptions): Promise<PoolInfo>;
  readPool(devicePath: string): Promise<PoolInfo>;
  readAuthority(devicePath: string): Promise<Authority>;
  /**
   * Pool.claimAuthority() for a pool that this node is not a host on yet: nobody joins a pool before a service's claim of
   * it stands. Needs no lease. Opens the device for the call.
   */
  claimAuthority(
    devicePath: string,
    claim: { store: Uuid; incarnation: bigint; term: bigint; force?: boolean },
    waitMs: number,
  ): Promise<void>;
  readHeartbeats(devicePath: string): Promise<Heartbeat[]>;
  readVolumeRecords(devicePath: string): Promise<VolumeRecord[]>;
  readLayerRecords(devicePath: string): Promise<LayerRecord[]>;
  /** Read-only fsck of every page and every invariant that the disk alone can show. Never writes. */
  checkPool(devicePath: string, onProgress?: (done: number, total: number) => void): Promise<CheckReport>;
  /** Whether somebody holds the flock of a pool device node (class L's proof). True: it is free, the I/O is dead. */
  lockIsFree(lockPath: string): Promise<boolean>;
}

export interface OpenPoolOptions {
  devicePath: string;
  uuid: Uuid;
  hostId: number;
  /** The host slot's generation that this engine lives under. */
  generation: bigint;
  nodeName: string;
  machineId: Uuid;
  bootId: Uuid;
  /** Where the engine makes its private device node; opening it and flock on it is class L's proof of death. */
  lockPath: string;
}

export type LeaseState = 'valid' | 'held' | 'fenced' | 'stopped';

export interface VolumeStats {
  sizeBytes: bigint;
  mappedBytes: bigint;
  allocatedBytes: bigint;
  reads: bigint;
  writes: bigint;
  flushes: bigint;
  discards: bigint;
  readBytes: bigint;
  writtenBytes: bigint;
  held: bigint;
  dirtyPages: bigint;
  inFlight: bigint;
  memoryBytes: bigint;
}

export type EngineEvent =
  | { type: 'slabs-low'; pool: Uuid; wanted: number }
  | { type: 'slab-claimed'; pool: Uuid; volumeId: bigint; layerId: bigint; slab: bigint; generation: bigint }
  | { type: 'slab-emptied'; pool: Uuid; volumeId: bigint; layerId: bigint; slab: bigint; generation: bigint }
  | { type: 'lease'; pool: Uuid; state: LeaseState; message: string }
  | { type: 'volume'; pool: Uuid; volumeId: bigint; code: string; message: string };

/** A frontend's device, ready for mkfs or a bind mount. */
export interface Export {
  frontend: 'fuse' | 'ublk' | 'kernel';
  /** e.g. /dev/loop7 */
  devicePath: string;
  /** Why this frontend: one sentence for people. */
  reason: string;
}

export interface OpenVolume {
  readonly spec: VolumeSpec;
  readonly export: Export;
  /** Record durable, device grown and announced to the kernel. */
  grow(sizeBytes: bigint): Promise<void>;
  /** Detach the device, flush, make page copies equal, write the record closed. Rejects HF_BUSY while mounted or open. */
  close(): Promise<void>;
  /**
   * Gate shut at once, EIO to everything, zero in flight, closed(epoch) on disk. Resolves when all of that is true;
   * the device stays (answering EIO) until detach().
   */
  revoke(): Promise<void>;
  /** Flushes, holds new writes, drains, flushes again; held until cut(), release() or `timeoutMs`. Rejects HF_BUSY while held. */
  hold(timeoutMs: number): Promise<void>;
  /** Lets held writes go on. Nothing held: no-op. */
  release(): Promise<void>;
  /**
   * Freezes the top layer under a new one. Durable when it resolves; the record naming `top` on disk is the commit. Holds by
   * itself unless hold() was called before, then rejects HF_HOLD_EXPIRED if that is over. A top that is the volume's already is
   * success (a repeat). A failed cut leaves the old top, and writes go on.
   */
  cut(top: LayerSpec, snapshot: { name: string; unixMs: number }, timeoutMs: number): Promise<CutReport>;
  /**
   * Drops slabs of frozen layers from the map, and layers that hold no other slab from the chain; resolves when no request that may know
   * a place in the slabs is left. Rejects HF_INVALID_ARGUMENT, and drops nothing, when a layer holds more, or is the top.
   */
  forget(slabs: SlabRun[], layers: bigint[]): Promise<void>;
  /**
   * Reads the pages of a frozen layer's slabs again, after mergeLayers(). Resolves when the volume would show the same without what was
   * merged into it, also in the hands of an engine that takes over. Rejects HF_CORRUPT when a page says less than it did.
   */
  learn(layer: LayerSpec): Promise<void>;
  /**
   * Copies, into the top, the blocks that still show from these slabs of frozen layers, so that stripLayers() can empty them;
   * durable when it resolves. Unknown slabs are skipped, and so are those for whose blocks the top would need chunks for more
   * than `skipAbovePermille` / 1000 of a slab's. Ends after about `maxBlocks` (0n: no limit). Gives way to requests. Ended early,
   * `complete` false, by hold(), cut() and close(); rejects HF_UNAVAILABLE when revoked meanwhile, HF_BUSY while one runs or writes
   * are held, HF_IO when blocks can't be copied: they stay where they are.
   */
  compact(
    sources: { layerId: bigint; slabs: SlabRun[] }[],
    skipAbovePermille: number,
    maxBlocks: bigint,
  ): Promise<CompactReport>;
  /** Takes the dead device of a revoked or fenced volume away. HF_BUSY while mounted. */
  detach(): Promise<void>;
  stats(): VolumeStats;
}

export interface CutReport {
  /** The frozen layer as it is now, with all its slabs. */
  frozen: LayerSpec;
  /** How long writes waited. */
  heldMicroseconds: number;
}

export interface CompactReport {
  /** Data and zeros. */
  movedBlocks: bigint;
  /** Nothing is left that the rule would move. */
  complete: boolean;
  /** The rule would move more, but there is no slab to spare. */
  noSpace: boolean;
}

export interface MergeReport extends CompactReport {
  /** Of the head's slabs, those that no page says are its own. */
  spare: SlabRun[];
}

export interface StripReport {
  /** Slabs of the victims that hold nothing any more; their pages still name the layer. */
  emptied: SlabRun[];
  clearedBlocks: bigint;
  uses: { layerId: bigint; liveBlocks: bigint; slabs: bigint }[];
}

export interface ByteRange {
  offset: bigint;
  length: bigint;
}

/** A pool, and how much of its device is not used yet. */
export interface PoolRoom {
  info: PoolInfo;
  /** Of the device, now, as this machine sees it. */
  deviceBytes: bigint;
  /** Slabs that the pool would have if it grew into all of it. */
  slabsPossible: bigint;
}

export interface Pool {
  readonly info: PoolInfo;
  readonly hostId: number;
  readonly generation: bigint;
  readonly lockPath: string;
  leaseState(): LeaseState;
  volumes(): OpenVolume[];
  /**
   * Opens and exports. The record on disk must be older than the grant (HF_STALE otherwise). `device: false`: opened without a
   * device, for maintenance; `export.devicePath` is empty.
   */
  openVolume(spec: VolumeSpec, options?: { device?: boolean }): Promise<OpenVolume>;
  /** Slabs ahead, for first writes. */
  addSlabs(runs: SlabRun[]): void;
  /** The service has none: held writes wait full-timeout, then get ENOSPC. Cleared by addSlabs. */
  declareFull(): void;
  /** Unclaimed slabs taken out of the stock to be returned (all of them without `count`). */
  takeBackSlabs(count?: number): SlabRun[];
  stock(): SlabRun[];

  /**
   * Measures the device and reads the superblock again: slabs that another host has added are usable here from then on, and in
   * `info`. Rejects HF_TOO_SMALL when the device is smaller than the pool.
   */
  look(): Promise<PoolRoom>;
  /**
   * Adds the slabs for which the first `deviceBytes` of the device have room; durable when it resolves, repeating is harmless. By one
   * host at a time. Rejects HF_TOO_SMALL when the device is smaller here, HF_LEASE_EXPIRED without a lease.
   */
  grow(deviceBytes: bigint): Promise<PoolRoom>;

  readAuthority(): Promise<Authority>;
  /** Write, wait `waitMs`, re-read. HF_STALE if somebody else's claim stands or one of a higher incarnation/term. */
  claimAuthority(
    claim: { store: Uuid; incarnation: bigint; term: bigint; force?: boolean },
    waitMs: number,
  ): Promise<void>;
  readHeartbeat(hostId: number): Promise<Heartbeat>;
  readFence(hostId: number, generation: bigint): Promise<FencePage>;
  /** Durable, re-read. Needs a live lease (HF_LEASE_EXPIRED). */
  writeFence(victim: {
    hostId: number;
    generation: bigint;
    term: bigint;
    incarnation: bigint;
  }): Promise<void>;
  readVolumeRecord(slot: number): Promise<VolumeRecord | undefined>;
  readVolumeRecords(): Promise<VolumeRecord[]>;
  readLayerRecord(slot: number): Promise<LayerRecord | undefined>;
  /** Which layer each slab belongs to, by its pages: for a dead host's slabs before its volumes are granted again. */
  scanSlabs(runs: SlabRun[]): Promise<SlabOwner[]>;
  /** Deletes a volume's records and discards its slabs. `closedEpoch`: refuse if the record's epoch is newer. */
  wipeVolume(volume: {
    volumeId: bigint;
    slot: number;
    closedEpoch: bigint;
    layers: { layerId: bigint; slot: number; slabs: SlabRun[] }[];
  }): Promise<void>;
  /** DESIGN section 4, deleting a snapshot: see StripLayers in metadata.proto. Frozen victims only. */
  stripLayers(victims: LayerSpec[], covers: LayerSpec[]): Promise<StripReport>;
  /**
   * Copies what still shows of `victims` (folded, newest first) into the frozen layer right above them. Durable when it resolves; may be
   * repeated. Every holder of `head` must learn() it before the victims are stripped of it.
   */
  mergeLayers(
    victims: LayerSpec[],
    head: LayerSpec,
    skipAbovePermille: number,
    maxBlocks: bigint,
  ): Promise<MergeReport>;
  /** Frees and discards slabs that still name layer and generation; `tombstone`: the layers' records are deleted too. */
  wipeLayers(
    layers: { layerId: bigint; slot: number; slabs: SlabRun[] }[],
    tombstone: boolean,
  ): Promise<void>;
  /** Ranges that any of `layers` (newest first) has data, zeros or holes for, merged, from `startingOffset` on. */
  readChanges(
    layers: LayerSpec[],
    sizeBytes: bigint,
    startingOffset: bigint,
    maxRanges: number,
  ): Promise<{ ranges: ByteRange[]; nextOffset: bigint }>;
  /** All volumes must be closed. Writes stopped(generation) and gives the lease up. */
  close(): Promise<void>;
  /** Fences itself: every volume's gate shut for good, zero in flight, stopped(generation) on disk (stop-ack). */
  stop(): Promise<void>;
}

export interface EngineOptions {
  /** Private directory of the node: sockets, device nodes, memfd bookkeeping. */
  stateDir: string;
  keeperSocket: string;
  /** Worker threads, each with its own ring. Default: the number of CPUs, at least 2, at most 8. */
  workers?: number;
  /**
   * The longest that a worker polls for what comes next before it sleeps, 0 (never) to 1000. It polls only with few
   * requests under way that are answered quickly. Default: 200. On a single CPU never.
   */
  pollMicroseconds?: number;
  /** Called on the JS thread, never re-entrantly. */
  onEvent: (event: EngineEvent) => void;
}

export interface Engine {
  /**
   * Takes over what the keeper has from a dead engine: waits until the old engine's I/O is dead (flock), renews the
   * lease under the same generation, opens each volume with its page images, and re-sends its requests. Call once,
   * before anything else. Works with every other service away.
   */
  adopt(): Promise<Pool[]>;
  openPool(options: OpenPoolOptions): Promise<Pool>;
  pools(): Pool[];
  /** Polite hand-over (upgrade): stop reading requests, drain, let go; the keeper keeps the devices. */
  handOver(): Promise<void>;
  /** After handOver(), or with no pool open. Threads joined. */
  destroy(): Promise<void>;
}

export interface NativeModule extends PoolTools {
  createEngine(options: EngineOptions): Promise<Engine>;
  /** The newest pool format this build writes. */
  formatVersion: number;
}

const require = createRequire(import.meta.url);

function load(): NativeModule {
  const candidates = [process.env['HOLDFAST_NATIVE'], '../build/Release/holdfast.node'].filter(
    (c) => c !== undefined,
  );
  return require(candidates[0] as string) as NativeModule;
}

let loaded: NativeModule | undefined;
/** Loads the addon on first use. Built by `make build`; HOLDFAST_NATIVE names another build (a sanitizer's, say). */
export function native(): NativeModule {
  loaded ??= load();
  return loaded;
}
