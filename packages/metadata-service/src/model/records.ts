/**
 * What the metadata service remembers, record by record, and under which key. Ids, epochs, generations and byte counts
 * are bigint; slab numbers are numbers (a pool has fewer than 2^53 slabs by far). Types, not interfaces: only those are
 * store values without an index signature, which would let a misspelt field compile.
 */
import type { Snapshot, Transaction, Value } from '../store/store.ts';

export type FencingClass = 'reservations' | 'manual' | 'lease-only' | 'loop';

/** One for the store. */
export type ServiceRecord = {
  /** Set in a backup: when it was made. What was decided since is not in it. */
  copiedUnixMs?: number;
  storeId: string;
  /** Grows with every restore or rebuild of the store; the upper part of every epoch. */
  incarnation: bigint;
  /** Grows with every start of the service. */
  term: bigint;
};

export type PoolGeometry = {
  uuid: string;
  name: string;
  /** Identity of the device: another device with the same UUID is a copy, and refused. */
  wwid: string;
  fencing: FencingClass;
  slabSize: number;
  slabCount: number;
  volumeSlots: number;
  layerSlots: number;
  hostSlots: number;
  renewIntervalMs: number;
  leaseMs: number;
  drainMs: number;
};

export type PoolRecord = PoolGeometry & {
  /** CLAIMING: the authority page was never ours yet. */
  state: 'CLAIMING' | 'ACTIVE';
  /** What we last wrote to the authority page and read back. Nothing is granted unless it is this service's term. */
  claimed: Authority | null;
  /** Claims that were ordered since, whose end is not known: the page may show any of them. */
  claiming: Authority[];
  nextVolumeId: bigint;
  nextLayerId: bigint;
  nextSlabGeneration: bigint;
  slabsFree: number;
  slabsAhead: number;
  provisionedBytes: bigint;
  /** The highest threshold of used slabs, in percent, that was warned about; absent: none. */
  warnedPercent?: number;
  /** Nothing new is placed on it. */
  draining?: boolean;
  /** It is being forgotten: nobody joins it any more. */
  removing?: boolean;
  /** An order to grow into so much of the device may be on its way: nobody who sees less joins. */
  growingBytes?: bigint;
};

/** How a host's machine sees the pool, by its newest report. */
export type RoomRecord = {
  /** Of the host's life that was reported for. */
  generation: bigint;
  /** That its engine can use. */
  slabCount: number;
  /** Of the device; 0: an agent that does not say. */
  deviceBytes: bigint;
  /** If the pool grew into that. */
  slabsPossible: number;
};

/** A pool that was removed: its device is not taken for one of a service that lost its database. */
export type RemovedPoolRecord = {
  name: string;
  atUnixMs: number;
};

export type Authority = {
  incarnation: bigint;
  term: bigint;
};

export type NodeRecord = {
  nodeId: string;
  name: string;
  machineId: string;
  bootId: string;
  version: string;
  maxVolumes: number;
  lastSeenUnixMs: number;
  /** Boots of before, the newest last: boot ids have no order, so a late message is known by being of one of these. */
  pastBootIds: string[];
};

/** One life of a node on a pool. */
export type HostLife = {
  hostId: number;
  generation: bigint;
  nodeId: string;
};

export type HostState = 'JOINING' | 'LIVE' | 'FENCING' | 'CUTTING' | 'DEAD';

/** A host slot. The fencing identity in it was recorded at join; nothing is looked up when fencing. */
export type HostRecord = {
  poolUuid: string;
  nodeId: string;
  hostId: number;
  generation: bigint;
  state: HostState;
  machineId: string;
  bootId: string;
  lockPath: string;
  sinceUnixMs: number;
  /** FENCING and CUTTING. */
  fence: FenceIntent | null;
  /** DEAD: what showed it. */
  proof: string;
};

export type FenceIntent = {
  reason: string;
  /** CUTTING: who made the page durable. */
  fencer: HostLife | null;
  /** A person's word that the machine is off, given before the page was durable; empty: none. */
  confirmedBy: string;
  /** How often a heartbeat was seen that began after the page was durable. */
  alarms: number;
};

/** A run of slabs of one generation. */
export type SlabRun = {
  first: number;
  count: number;
  generation: bigint;
};

/** Slabs that a host holds and that no layer has claimed. */
export type AheadRecord = {
  generation: bigint;
  runs: SlabRun[];
};

/** Slabs that a dead host held ahead: nobody knows yet which of them its volumes claimed. */
export type OrphanRecord = {
  nodeId: string;
  runs: SlabRun[];
  /** Both copies of the page fail their check: no volume of that life is granted while one is here. */
  bad: SlabRun[];
};

export type GrantState = 'FREE' | 'OFFERED' | 'OPEN' | 'REVOKING';

export type GrantRecord = {
  state: GrantState;
  /** Of the grant; FREE: of the last one. 0: never granted. */
  epoch: bigint;
  /** FREE: who held it last. */
  holder: HostLife | null;
  /** Empty while it is not FREE: for maintenance (a cut or compaction of a closed volume), under no publication. */
  publishId: string;
  readOnly: boolean;
};

export type AccessMode =
  | 'SINGLE_NODE_WRITER'
  | 'SINGLE_NODE_READER_ONLY'
  | 'MULTI_NODE_READER_ONLY'
  | 'SINGLE_NODE_SINGLE_WRITER'
  | 'SINGLE_NODE_MULTI_WRITER';

export type PublicationRecord = {
  publishId: string;
  nodeId: string;
  accessMode: AccessMode;
  readOnly: boolean;
  /** A grant was given under it. */
  staged: boolean;
  /** Unpublish was asked for: it goes when the grant is free. */
  ending: boolean;
  sinceUnixMs: number;
};

export type VolumeRecord = {
  uuid: string;
  volumeId: bigint;
  name: string;
  poolUuid: string;
  slot: number;
  sizeBytes: bigint;
  parameters: Record<string, string>;
  /** CREATING: a copy of a volume that is being cut for it; its top has no parent yet. */
  state: 'CREATING' | 'READY' | 'DELETING';
  topLayerId: bigint;
  /** The newest epoch given to anybody, writer or reader. */
  lastEpoch: bigint;
  /** The one writer's, or the one exclusive reader's. */
  grant: GrantRecord;
  /** Of nodes that read it beside others; only those that are not FREE. */
  readers: GrantRecord[];
  /** At most one per node; more than one only for readers beside others. */
  publications: PublicationRecord[];
  createdUnixMs: number;
  /** What it is a copy of; empty: none. */
  sourceSnapshotUuid: string;
  sourceVolumeUuid: string;
  /** May be changed at any time; no part of what the volume is. Absent: none. */
  mutableParameters?: Record<string, string>;
};

export type LayerRecord = {
  layerId: bigint;
  slot: number;
  parentLayerId: bigint;
  birth: bigint;
  sizeBytes: bigint;
  frozen: boolean;
  /** The volume it was born as the top of. */
  volumeUuid: string;
  slabCount: number;
  /** Layers right above it. */
  children: number;
  /** The snapshot that names it; empty: none. Being cut counts, so that nothing is stripped before it is decided. */
  snapshotUuid: string;
  /** Known again from the disk: snapshots or volumes that nobody knows may need it, so it is never stripped or wiped. */
  kept: boolean;
  /** What its record on the disk may name as its parent: not changed when that one is removed from the chain. */
  diskParentId: bigint;
  /** What it may name instead, since an order to change that was given; absent: none was. */
  diskParentNext?: bigint;
  /** Records on the disk, tombstones too, that may name it as their parent: its slot is kept for as long. */
  diskChildren: number;
  /** Of the last strip: blocks that still count; -1: nobody counted. */
  liveBlocks: number;
  /** Who wrote it when it froze: may still give back slabs that it had emptied before. */
  writer: HostLife | null;
  /** Not in any chain any more: its record waits to be deleted, or, deleted, for those that name it. */
  removed: RemovalRecord | null;
};

/** A grant that was out when something was decided, and that may still know what was before. */
export type GrantRef = {
  volumeUuid: string;
  epoch: bigint;
  holder: HostLife;
};

export type RemovalRecord = {
  /** The layer's tombstone is written when these are over. */
  waiting: GrantRef[];
  /** The tombstone is on the disk. */
  wiped: boolean;
  /** The layer that was right above it. */
  aboveId?: bigint;
};

/** A name for a frozen layer. */
export type SnapshotRecord = {
  uuid: string;
  name: string;
  poolUuid: string;
  sourceVolumeUuid: string;
  sizeBytes: bigint;
  /** 0: not cut yet. */
  layerId: bigint;
  state: 'CUTTING' | 'READY';
  groupUuid: string;
  createdUnixMs: number;
  parameters: Record<string, string>;
  /** Of the source volume: what is made from the snapshot has the same file system. */
  volumeParameters: Record<string, string>;
};

export type GroupRecord = {
  uuid: string;
  name: string;
  poolUuid: string;
  /** WAITING: an attempt failed, and its cuts end before the next one begins. HOLDING: nothing is ordered to be cut. */
  state: 'WAITING' | 'HOLDING' | 'CUTTING' | 'READY';
  createdUnixMs: number;
  parameters: Record<string, string>;
  sourceVolumeUuids: string[];
  snapshotUuids: string[];
  attempts: number;
  /** Of HoldVolumes, new with every attempt. */
  cutId: string;
};

/** A cut under way, one at most for a volume. It never ends but by being made: who is not interested any more drops its name. */
export type CutRecord = {
  volumeUuid: string;
  /** The top that freezes, and the one that takes its place. */
  frozenLayerId: bigint;
  topLayerId: bigint;
  /** What the frozen layer is for; both empty: for nobody any more. */
  snapshotUuid: string;
  cloneUuid: string;
  groupUuid: string;
  quiesce: boolean;
  /** An order may have been sent: the disk decides whether it happened. */
  ordered: boolean;
  /** Of a group's member that is open: the epoch under which its writes are held. 0: not held. */
  heldEpoch: bigint;
  sinceUnixMs: number;
};

/** One strip of a segment of folded layers, given to one host life until that has answered or is dead. */
export type StripRecord = {
  /** Newest first. */
  victims: bigint[];
  headId: bigint;
  /** The head could not change any more when the strip was planned, if it was frozen, or closed at this epoch. */
  headFrozen: boolean;
  headClosed: boolean;
  headEpoch: bigint;
};

/** What the last strip of a segment was; by its newest victim. */
export type FoldRecord = StripRecord & {
  dueUnixMs: number;
  intervalMs: number;
};

/** A compaction that was ordered under this grant, and is not known to have ended. */
export type CompactingRecord = {
  /** Newest first. */
  victims: bigint[];
  headId: bigint;
  volumeUuid: string;
  epoch: bigint;
  holder: HostLife;
};

/** A merge under way: blocks of folded layers go into the frozen layer above them. */
export type MergingRecord = {
  /** One for each merge, never used again. */
  sequence: bigint;
  /** Newest first. */
  victims: bigint[];
  headId: bigint;
  /** Absent: it was not answered yet. Grants that may not know what was merged: nothing is stripped before they have learned it. */
  waiting?: GrantRef[];
};

/** What the last compaction or merge of a segment came to; by its newest victim. */
export type CompactedRecord = {
  victims: bigint[];
  headId: bigint;
  dueUnixMs: number;
  intervalMs: number;
  /** Nothing was left that the rule would move, with so many live blocks in the victims. */
  complete: boolean;
  liveBlocks: number;
  /** It moved blocks, and no strip was asked for since. */
  moved: boolean;
  /** It had no room, and waits for the pool to have more free slabs than these; -1: it had room. */
  shortAt: number;
  /** A merge found no room in the slabs of the layer that it goes into: it is given more. */
  needsSlabs?: boolean;
};

/** Slabs taken out of a frozen layer. No grant names them from now on; those that did have to forget them before they are wiped. */
export type LeavingRecord = {
  layerId: bigint;
  runs: SlabRun[];
  waiting: GrantRef[];
};

/** Who was told to do something on the disk that must not be done by two. */
export type JobRecord = {
  life: HostLife;
  sinceUnixMs: number;
};

export type AuditEntry = {
  sequence: bigint;
  atUnixMs: number;
  event: string;
  poolUuid: string;
  volumeUuid: string;
  nodeId: string;
  epoch: bigint;
  generation: bigint;
  proof: string;
  detail: string;
};

/** The first answer to a request id. */
export type AnswerRecord = {
  method: string;
  /** Of the request: the same id for another request is a mistake of the caller. */
  digest: string;
  answer: Value;
  atUnixMs: number;
};

type Part = string | number | bigint;

/** Numbers are padded, so that keys stand in the order of their numbers; texts are escaped, so that no text has a slash. */
function part(value: Part): string {
  return typeof value === 'string' ? encodeURIComponent(value) : value.toString().padStart(20, '0');
}

/** All records of one kind: `<name>/<part>/<part>`. */
export class Table<T extends Value, K extends readonly Part[]> {
  readonly #name: string;
  constructor(name: string) {
    this.#name = name;
  }
  key(...parts: K): string {
    return `${this.#name}/${parts.map(part).join('/')}`;
  }
  /** Of a key's parts as entries() gives them, numbers padded already. */
  keyOf(parts: readonly string[]): string {
    return `${this.#name}/${parts.map(part).join('/')}`;
  }
  get(tx: Snapshot, ...parts: K): T | undefined {
    return tx.get(this.key(...parts)) as T | undefined;
  }
  put(tx: Transaction, value: T, ...parts: K): void {
    tx.put(this.key(...parts), value);
  }
  delete(tx: Transaction, ...parts: K): void {
    tx.delete(this.key(...parts));
  }
  /** Those whose first parts are `parts`. */
  list(
    tx: Snapshot,
    parts: readonly Part[] = [],
    options: { after?: readonly Part[]; limit?: number; reverse?: boolean } = {},
  ): T[] {
    return this.entries(tx, parts, options).map(([, value]) => value);
  }
  entries(
    tx: Snapshot,
    parts: readonly Part[] = [],
    { after, ...options }: { after?: readonly Part[] | undefined; limit?: number; reverse?: boolean } = {},
  ): [parts: string[], value: T][] {
    const prefix = `${[this.#name, ...parts.map(part)].join('/')}/`;
    return tx
      .scan(prefix, {
        ...options,
        ...(after === undefined ? {} : { after: `${this.#name}/${after.map(part).join('/')}` }),
      })
      .map(([key, value]) => [key.split('/').slice(1).map(decodeURIComponent), value as T]);
  }
}

export const tables = {
  service: new Table<Value, readonly [string]>('service'),
  counter: new Table<bigint, readonly [string]>('counter'),
  pool: new Table<PoolRecord, readonly [pool: string]>('pool'),
  node: new Table<NodeRecord, readonly [node: string]>('node'),
  host: new Table<HostRecord, readonly [pool: string, host: number]>('host'),
  volume: new Table<VolumeRecord, readonly [uuid: string]>('volume'),
  volumeName: new Table<string, readonly [name: string]>('volume-name'),
  /** Volumes that are not FREE, by their holder. */
  held: new Table<true, readonly [pool: string, host: number, volume: string]>('held'),
  /** Grants that are REVOKING, by volume and holder. */
  revoking: new Table<true, readonly [pool: string, volume: string, host: number]>('revoking'),
  /** Publications by node. */
  published: new Table<true, readonly [node: string, volume: string]>('published'),
  /** Volumes whose slabs wait to be wiped. */
  deleting: new Table<true, readonly [pool: string, volume: string]>('deleting'),
  layer: new Table<LayerRecord, readonly [pool: string, layer: bigint]>('layer'),
  /** Layers by the one below. */
  layerChild: new Table<true, readonly [pool: string, parent: bigint, child: bigint]>('layer-child'),
  /** Frozen layers without a name and with at most one layer above, and removed ones: what jobs look at. */
  reclaim: new Table<true, readonly [pool: string, layer: bigint]>('reclaim'),
  snapshot: new Table<SnapshotRecord, readonly [uuid: string]>('snapshot'),
  snapshotName: new Table<string, readonly [name: string]>('snapshot-name'),
  snapshotSource: new Table<true, readonly [volume: string, snapshot: string]>('snapshot-source'),
  group: new Table<GroupRecord, readonly [uuid: string]>('group'),
  groupName: new Table<string, readonly [name: string]>('group-name'),
  /** Groups that are not READY. */
  grouping: new Table<true, readonly [pool: string, group: string]>('grouping'),
  /** Cuts under way. */
  cutting: new Table<CutRecord, readonly [pool: string, volume: string]>('cutting'),
  /** Strips under way, by their newest victim. */
  strip: new Table<StripRecord, readonly [pool: string, victim: bigint]>('strip'),
  fold: new Table<FoldRecord, readonly [pool: string, victim: bigint]>('fold'),
  /** Compactions under way, by the newest victim. */
  compacting: new Table<CompactingRecord, readonly [pool: string, victim: bigint]>('compacting'),
  /** Merges under way, by the newest victim. */
  merging: new Table<MergingRecord, readonly [pool: string, victim: bigint]>('merging'),
  compacted: new Table<CompactedRecord, readonly [pool: string, victim: bigint]>('compacted'),
  leaving: new Table<LeavingRecord, readonly [pool: string, layer: bigint, sequence: bigint]>('leaving'),
  job: new Table<JobRecord, readonly [pool: string, what: string]>('job'),
  /** A layer's slabs, region by region. */
  slabs: new Table<SlabRun[], readonly [pool: string, layer: bigint, region: number]>('slabs'),
  /** A bit for each slab of a region, set: not free. Absent: all free. Base64. */
  region: new Table<string, readonly [pool: string, region: number]>('region'),
  /** Free slabs and longest free run of every region. Base64 of u16 pairs. */
  regions: new Table<string, readonly [pool: string]>('regions'),
  /** A bit for each slot, set: in use. Base64. */
  slots: new Table<string, readonly [pool: string, kind: 'volume' | 'layer']>('slots'),
  ahead: new Table<AheadRecord, readonly [pool: string, host: number]>('ahead'),
  orphan: new Table<OrphanRecord, readonly [pool: string, host: number, generation: bigint]>('orphan'),
  room: new Table<RoomRecord, readonly [pool: string, host: number]>('room'),
  removedPool: new Table<RemovedPoolRecord, readonly [pool: string]>('removed-pool'),
  /** Slabs that must not be used again: their pages are bad or name a layer that nobody knows. */
  quarantine: new Table<SlabRun[], readonly [pool: string]>('quarantine'),
  audit: new Table<AuditEntry, readonly [sequence: bigint]>('audit'),
  auditVolume: new Table<true, readonly [volume: string, sequence: bigint]>('audit-volume'),
  auditNode: new Table<true, readonly [node: string, sequence: bigint]>('audit-node'),
  answer: new Table<AnswerRecord, readonly [request: string]>('answer'),
  answerOrder: new Table<string, readonly [sequence: bigint]>('answer-order'),
} as const;
