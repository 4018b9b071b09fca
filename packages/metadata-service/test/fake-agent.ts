/**
 * A scripted agent for tests of the metadata service: it speaks the real gRPC over a real socket, the disk is simulated in
 * memory and shared by the agents of a test. The real agent (packages/csi-node) is tested end to end elsewhere.
 */
import { randomUUID } from 'node:crypto';
import { credentials, type ClientDuplexStream } from '@grpc/grpc-js';
import { call } from '@holdfast/common';
import {
  holdfast,
  type AgentMessage,
  type CompactVolume__Output,
  type FencingClass,
  type Grant__Output,
  type HostRef__Output,
  type Layer__Output,
  type Order__Output,
  type OrderResult,
  type ServiceMessage__Output,
  type SlabRun__Output,
  type Welcome__Output,
} from '@holdfast/proto';

interface SlabPage {
  generation: bigint;
  layerId: bigint;
  bad: boolean;
  /** Logical blocks that it has; of a frozen layer a strip takes them away. */
  blocks?: Set<number>;
}
interface RecordPage {
  volumeId: string;
  uuid: string;
  name: string;
  sizeBytes: string;
  state: string;
  epoch: bigint;
  hostId: number;
  generation: string;
  slot: number;
  layers: {
    layer_id: string;
    slot: number;
    parent_layer_id: string;
    birth: string;
    size_bytes: string;
    frozen: boolean;
  }[];
}

/** The bytes of a pool, as far as the metadata service can see them through agents. */
export class FakeDisk {
  uuid = randomUUID();
  name = 'pool';
  wwid = 'wwid-1';
  fencing: FencingClass = 'FENCING_CLASS_LOOP';
  slabSize = 16 << 20;
  slabCount = 1024;
  volumeSlots = 64;
  layerSlots = 128;
  hostSlots = 16;
  renewIntervalMs = 50;
  leaseMs = 400;
  drainMs = 50;
  authority = { store_id: '', incarnation: '0', term: '0' };
  readonly fences = new Map<string, bigint>();
  readonly heartbeats = new Map<number, { state: string; generation: bigint; sequence: bigint }>();
  readonly records = new Map<string, RecordPage>();
  readonly pages = new Map<number, SlabPage>();
  /** Layers whose record says that they are deleted. */
  readonly tombstones = new Set<string>();
  /** Strips leave the parent in a layer's record as it is, whatever the order names. */
  keepsParents = false;
  /** Names in the records of frozen layers. */
  readonly names = new Map<string, string>();
  /** Lock paths that a process holds. */
  readonly locks = new Set<string>();
  /** Fence pages are acknowledged, but go nowhere. */
  loseFencePages = false;

  fenced(hostId: number): bigint {
    return this.fences.get(`${hostId}`) ?? 0n;
  }
}

export interface AgentOptions {
  nodeId: string;
  address: string;
  disks: FakeDisk[];
  machineId?: string;
  bootId?: string;
  maxVolumes?: number;
}

type Answer = Omit<OrderResult, 'order_id'>;

export class FakeAgent {
  readonly nodeId: string;
  machineId: string;
  bootId: string;
  readonly lockPath: string;
  readonly disks: Map<string, FakeDisk>;
  readonly hosts = new Map<string, HostRef__Output>();
  readonly stock = new Map<string, SlabRun__Output[]>();
  readonly open = new Map<string, Grant__Output>();
  readonly orders: Order__Output[] = [];
  readonly messages: ServiceMessage__Output[] = [];
  welcomed: Welcome__Output | undefined;
  /** What its machine says of the device, in bytes; 0: nothing. */
  deviceBytes = 0;
  /** Slabs that its engine can use; undefined: all that the disk has. */
  usable: number | undefined;
  /** What it finds wrong with the device. */
  problem = '';
  /** Orders by kind that get no answer (a hung engine). */
  readonly mute = new Set<string>();
  /** Orders by kind that are carried out, but whose answer is lost. */
  readonly loseAnswers = new Set<string>();
  /** Replaces the answer to an order. */
  readonly override = new Map<string, (order: Order__Output) => Answer>();
  /** What is held for a group, until it is cut or released. */
  held: { cutId: string; volumes: string[] } | undefined;
  /** Blocks that a compaction moves before it answers; 0: none, and says that it is complete. */
  moveAtMost = Infinity;
  /** When that is over. */
  compactionEnds: Promise<void> = Promise.resolve();
  /** Slabs that a holder here was told to forget. */
  readonly forgotten: number[] = [];
  /** The newest epoch of each volume that was revoked here: nothing older is opened any more. */
  readonly #revoked = new Map<string, bigint>();
  readonly client: InstanceType<typeof holdfast.Agents>;
  #stream: ClientDuplexStream<AgentMessage, ServiceMessage__Output> | undefined;
  readonly #options: AgentOptions;
  #renewing: NodeJS.Timeout | undefined;
  streamError: Error | undefined;

  constructor(options: AgentOptions) {
    this.#options = options;
    this.nodeId = options.nodeId;
    this.machineId = options.machineId ?? 'machine-1';
    this.bootId = options.bootId ?? 'boot-1';
    this.lockPath = `/run/${options.nodeId}/pool.lock`;
    this.disks = new Map(options.disks.map((disk) => [disk.uuid, disk]));
    this.client = new holdfast.Agents(options.address, credentials.createInsecure());
  }

  send(message: AgentMessage): void {
    this.#stream?.write(message);
  }

  /** Opens the session and waits for the first Welcome. */
  async connect(): Promise<Welcome__Output> {
    this.welcomed = undefined;
    const stream = this.client.Session();
    this.#stream = stream;
    const welcome = new Promise<Welcome__Output>((resolve, reject) => {
      stream.on('data', (message: ServiceMessage__Output) => {
        this.messages.push(message);
        if (message.welcome) {
          this.welcomed = message.welcome;
          resolve(message.welcome);
        }
        if (message.order) this.#carryOut(message.order);
      });
      stream.on('error', (error: Error) => {
        this.streamError = error;
        reject(error);
      });
    });
    this.send({
      hello: {
        node_id: this.nodeId,
        name: this.nodeId.split('.')[0] ?? '',
        machine_id: this.machineId,
        boot_id: this.bootId,
        version: 'test',
        max_volumes: this.#options.maxVolumes ?? 0,
        holding: [...this.hosts].map(([pool, host]) => ({
          host,
          volumes: [...this.open.values()].map((grant) => ({
            volume_uuid: grant.volume_uuid,
            epoch: grant.epoch,
            claimed: this.claimsOf(pool, grant),
          })),
          stock: this.stock.get(pool) ?? [],
        })),
      },
    });
    const answer = await welcome;
    this.reportPools();
    return answer;
  }

  reportPools(change: (disk: FakeDisk) => object = () => ({})): void {
    this.send({
      pools_seen: {
        pools: [...this.disks.values()].map((disk) => ({
          uuid: disk.uuid,
          name: disk.name,
          wwid: disk.wwid,
          device_path: '/dev/loop9',
          fencing: disk.fencing,
          slab_size: disk.slabSize,
          slab_count: this.usable ?? disk.slabCount,
          device_bytes: this.deviceBytes,
          slabs_possible: Math.floor(this.deviceBytes / disk.slabSize),
          problem: this.problem,
          volume_slots: disk.volumeSlots,
          layer_slots: disk.layerSlots,
          host_slots: disk.hostSlots,
          renew_interval_ms: disk.renewIntervalMs,
          lease_ms: disk.leaseMs,
          drain_ms: disk.drainMs,
          authority: { ...disk.authority },
          ...change(disk),
        })),
      },
    });
  }

  /** The agent process dies; its engine may live on. */
  disconnect(): void {
    this.#stream?.cancel();
    this.#stream?.on('error', () => undefined);
    this.#stream = undefined;
  }

  /** The whole node dies: engine, locks, heartbeat. */
  kill(): void {
    this.disconnect();
    this.stopHeart();
    for (const disk of this.disks.values()) disk.locks.delete(this.lockPath);
    this.open.clear();
    this.hosts.clear();
    this.stock.clear();
  }

  /** Frozen: connected or not, nothing is answered and no heartbeat is written, but the lock is held. */
  freeze(): void {
    for (const kind of orderKinds) this.mute.add(kind);
    this.stopHeart();
  }

  stopHeart(): void {
    clearInterval(this.#renewing);
    this.#renewing = undefined;
  }

  close(): void {
    this.kill();
    this.client.close();
  }

  async accepted(disk: FakeDisk): Promise<void> {
    await until(() => this.welcomed?.accepted_pools.includes(disk.uuid) === true, `${this.nodeId} accepted`);
  }

  async join(disk: FakeDisk, previousIoDead = false): Promise<HostRef__Output> {
    await this.accepted(disk);
    const { host } = await call<object, { host: HostRef__Output | null }>(this.client, this.client.JoinPool, {
      request_id: randomUUID(),
      pool_uuid: disk.uuid,
      node_id: this.nodeId,
      machine_id: this.machineId,
      boot_id: this.bootId,
      lock_path: this.lockPath,
      previous_io_dead: previousIoDead,
      session_id: this.welcomed?.session_id ?? '',
    });
    if (!host) throw new Error('JoinPool answered without a host');
    this.hosts.set(disk.uuid, host);
    disk.locks.add(this.lockPath);
    this.startHeart(disk);
    await this.ask('PoolReady', disk, {});
    return host;
  }

  startHeart(disk: FakeDisk): void {
    const renew = (): void => {
      const host = this.hosts.get(disk.uuid);
      if (host === undefined) return;
      const before = disk.heartbeats.get(host.host_id);
      const fenced = disk.fenced(host.host_id) >= BigInt(host.generation);
      disk.heartbeats.set(host.host_id, {
        state: fenced ? 'stopped' : 'live',
        generation: BigInt(host.generation),
        sequence: (before?.sequence ?? 0n) + 1n,
      });
      if (fenced) {
        this.open.clear();
        this.stopHeart();
        this.send({ lease: { host, state: 'stopped', message: 'found its fence page' } });
      }
    };
    renew();
    this.#renewing = setInterval(renew, disk.renewIntervalMs);
  }

  /** A unary call of this host. */
  ask<T = object>(
    method:
      | 'PoolReady'
      | 'StageVolume'
      | 'VolumeOpened'
      | 'ReturnVolume'
      | 'AllocateSlabs'
      | 'ReportSlabs'
      | 'ReturnSlabs',
    disk: FakeDisk,
    request: object,
    timeoutMs = 10_000,
  ): Promise<T> {
    const merged = { request_id: randomUUID(), host: this.hosts.get(disk.uuid) ?? null, ...request };
    return call(this.client, this.client[method], merged, { timeoutMs });
  }

  async stage(
    disk: FakeDisk,
    volumeUuid: string,
    publishId: string,
    readOnly = false,
  ): Promise<Grant__Output> {
    return await this.ask<Grant__Output>('StageVolume', disk, {
      volume_uuid: volumeUuid,
      publish_id: publishId,
      read_only: readOnly,
    });
  }

  /** Stages and opens: the record is written, as the engine does before anything else. */
  async openVolume(disk: FakeDisk, volumeUuid: string, publishId: string): Promise<Grant__Output> {
    const grant = await this.stage(disk, volumeUuid, publishId);
    // A reader beside others writes nothing.
    if (grant.read_only) {
      this.open.set(volumeUuid, grant);
      await this.ask('VolumeOpened', disk, { volume_uuid: volumeUuid, epoch: grant.epoch });
      return grant;
    }
    const host = this.hosts.get(disk.uuid);
    const before = disk.records.get(volumeUuid);
    if (before !== undefined && before.epoch >= BigInt(grant.epoch))
      throw new Error('the record is newer than the grant');
    if (before !== undefined && before.layers[0]?.layer_id !== grant.layers[0]?.layer_id)
      throw new Error('the record names another top than the grant');
    disk.records.set(volumeUuid, {
      volumeId: grant.volume_id,
      uuid: volumeUuid,
      name: grant.name,
      sizeBytes: grant.size_bytes,
      state: 'open',
      epoch: BigInt(grant.epoch),
      hostId: host?.host_id ?? 0,
      generation: host?.generation ?? '0',
      slot: grant.slot,
      layers: grant.layers.map((layer) => ({ ...layer, slabs: undefined })),
    });
    this.open.set(volumeUuid, grant);
    await this.ask('VolumeOpened', disk, { volume_uuid: volumeUuid, epoch: grant.epoch });
    return grant;
  }

  async returnVolume(disk: FakeDisk, volumeUuid: string): Promise<void> {
    const grant = this.open.get(volumeUuid);
    if (grant === undefined) throw new Error('not open');
    if (grant.read_only) this.open.delete(volumeUuid);
    else this.#closeOnDisk(disk, volumeUuid);
    await this.ask('ReturnVolume', disk, { volume_uuid: volumeUuid, epoch: grant.epoch });
  }

  #closeOnDisk(disk: FakeDisk, volumeUuid: string): void {
    this.open.delete(volumeUuid);
    const record = disk.records.get(volumeUuid);
    if (record !== undefined) record.state = 'closed';
  }

  async allocate(disk: FakeDisk, count: number): Promise<SlabRun__Output[]> {
    const { runs } = await this.ask<{ runs: SlabRun__Output[] }>('AllocateSlabs', disk, { count });
    this.stock.set(disk.uuid, [...(this.stock.get(disk.uuid) ?? []), ...runs]);
    return runs;
  }

  /** Writes the claim page; the report is the caller's business. */
  claim(
    disk: FakeDisk,
    grant: Grant__Output,
    blocks: readonly number[] = [],
  ): { volume_id: string; layer_id: string; slab: string; generation: string } {
    const stock = this.stock.get(disk.uuid) ?? [];
    const run = stock.find((candidate) => candidate.count > 0);
    if (run === undefined) throw new Error('no slabs ahead');
    const slab = Number(run.first);
    run.first = String(slab + 1);
    run.count -= 1;
    const layerId = grant.layers[0]?.layer_id ?? '0';
    disk.pages.set(slab, {
      generation: BigInt(run.generation),
      layerId: BigInt(layerId),
      bad: false,
      blocks: new Set(blocks),
    });
    return { volume_id: grant.volume_id, layer_id: layerId, slab: String(slab), generation: run.generation };
  }

  claimsOf(poolUuid: string, grant: Grant__Output): object[] {
    const layerId = grant.layers[0]?.layer_id ?? '0';
    const disk = this.disks.get(poolUuid);
    return disk === undefined ? [] : claimsOfLayer(disk, grant.volume_id, layerId);
  }

  #carryOut(order: Order__Output): void {
    this.orders.push(order);
    const kind = order.order ?? '';
    if (this.mute.has(kind)) return;
    const disk = this.disks.get(order.pool_uuid);
    const run = this.override.get(kind) ?? ((given: Order__Output) => this.answer(given, disk));
    const finish = (): void => {
      let answer: Answer;
      try {
        answer = run(order);
      } catch (error) {
        answer = { error_code: 'HF_TEST', error_message: String(error) };
      }
      if (this.loseAnswers.has(kind)) return;
      this.send({ order_result: { order_id: order.order_id, ...answer } });
    };
    if (order.claim_authority) setTimeout(finish, Number(order.claim_authority.wait_ms));
    else if (order.compact_volume && !this.override.has(kind)) {
      const { compact_volume } = order;
      void this.#compact(disk, compact_volume).then((answer) => {
        if (!this.loseAnswers.has(kind)) this.send({ order_result: { order_id: order.order_id, ...answer } });
      });
    } else finish();
  }

  /** Copies what no newer layer has into a new slab of the top, which is reported before the answer. */
  async #compact(disk: FakeDisk | undefined, order: CompactVolume__Output): Promise<Answer> {
    const { grant, volume_uuid: uuid } = order;
    if (disk === undefined) return { error_code: 'UNAVAILABLE', error_message: 'no such pool here' };
    const other = this.#ofThisLife(disk, order);
    if (other !== undefined) return other;
    const record = disk.records.get(uuid);
    if (grant) {
      const newer =
        (this.#revoked.get(uuid) ?? 0n) >= BigInt(grant.epoch) ||
        (record?.epoch ?? 0n) >= BigInt(grant.epoch);
      if (newer) return { error_code: 'STALE', error_message: 'a newer epoch is known' };
      const chain = grant.layers.map((layer) => ({ ...layer, slabs: undefined }));
      disk.records.set(uuid, recordOf(grant, this.hosts.get(disk.uuid), record?.layers ?? chain, 'closed'));
    }
    const open = grant ?? this.open.get(uuid);
    if (open?.epoch !== order.epoch) return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here' };
    const top = BigInt(open.layers[0]?.layer_id ?? 0);
    const covered = new Set(
      [...disk.pages.values()].flatMap((page) => (page.layerId === top ? [...(page.blocks ?? [])] : [])),
    );
    const movable: number[] = [];
    for (const block of order.sources.flatMap((layer) =>
      pagesOf(disk, layer).flatMap(([, page]) => [...(page.blocks ?? [])]),
    )) {
      if (!covered.has(block)) movable.push(block);
      covered.add(block);
    }
    const moved = movable.slice(0, this.moveAtMost);
    if (moved.length > 0) {
      const hasRoom = (this.stock.get(disk.uuid) ?? []).some((run) => run.count > 0);
      const runs = hasRoom ? [1] : await this.allocate(disk, 1);
      if (runs.length === 0) return { compact: compactResult(order, 0, false, true) };
      await this.ask('ReportSlabs', disk, { claimed: [this.claim(disk, open, moved)] });
    }
    await this.compactionEnds;
    const complete = moved.length === movable.length || this.moveAtMost === 0;
    return { compact: compactResult(order, moved.length, complete, false) };
  }

  /** Carries an order out; for overrides that only look at it first. */
  answer(order: Order__Output, disk: FakeDisk | undefined): Answer {
    if (disk === undefined) return { error_code: 'UNAVAILABLE', error_message: 'no such pool here' };
    if (order.look_at_device) {
      this.reportPools();
      return {};
    }
    if (order.grow_device) {
      const slabs = Math.floor(Number(order.grow_device.device_bytes) / disk.slabSize);
      disk.slabCount = Math.max(disk.slabCount, slabs);
      this.reportPools();
      return {};
    }
    if (order.leave_pool) {
      this.stopHeart();
      this.hosts.delete(disk.uuid);
      disk.locks.delete(this.lockPath);
      return {};
    }
    if (order.claim_authority) {
      const mine = {
        store_id: order.claim_authority.store_id,
        incarnation: order.incarnation,
        term: order.term,
      };
      const page = disk.authority;
      const newer =
        BigInt(page.incarnation) > BigInt(mine.incarnation) ||
        (page.incarnation === mine.incarnation && BigInt(page.term) > BigInt(mine.term));
      if ((page.store_id !== '' && page.store_id !== mine.store_id) || newer) {
        return {
          error_code: 'HF_STALE',
          error_message: `the page is of ${page.store_id}, term ${page.term}.`,
        };
      }
      disk.authority = mine;
      return {};
    }
    if (order.write_fence) {
      if (!disk.loseFencePages)
        disk.fences.set(String(order.write_fence.host_id), BigInt(order.write_fence.generation));
      return {};
    }
    if (order.read_fence) {
      const generation = disk.fenced(order.read_fence.host_id);
      return { fence: { host_id: order.read_fence.host_id, generation: generation.toString() } };
    }
    if (order.read_heartbeat) {
      const beat = disk.heartbeats.get(order.read_heartbeat.host_id);
      return {
        heartbeat: {
          host_id: order.read_heartbeat.host_id,
          state: beat?.state ?? 'empty',
          generation: (beat?.generation ?? 0n).toString(),
          sequence: (beat?.sequence ?? 0n).toString(),
        },
      };
    }
    if (order.test_lock) return { lock_free: !disk.locks.has(order.test_lock.lock_path) };
    if (order.revoke) return this.#revoke(disk, order.revoke.volume_uuid, order.revoke.epoch);
    if (order.scan_slabs) {
      const owners = order.scan_slabs.runs.flatMap((run) =>
        Array.from({ length: run.count }, (_, index) => {
          const slab = Number(run.first) + index;
          const page = disk.pages.get(slab);
          return {
            slab: String(slab),
            generation: (page?.generation ?? 0n).toString(),
            layer_id: (page?.layerId ?? 0n).toString(),
            state: page === undefined ? 'free' : page.bad ? 'bad' : 'claimed',
          };
        }),
      );
      return { slab_owners: { owners } };
    }
    if (order.wipe_volume) return wipe(disk, order.wipe_volume);
    if (order.read_volume_record) return { volume_record: readRecord(disk, order.read_volume_record) };
    if (order.hold_volumes) return this.#hold(order.hold_volumes);
    if (order.release_volumes) {
      if (this.held?.cutId === order.release_volumes.cut_id) this.held = undefined;
      return {};
    }
    if (order.cut_volumes) return this.#cut(disk, order.cut_volumes);
    if (order.forget_slabs) return this.#forget(order.forget_slabs);
    if (order.learn_layer) return this.#learn(order.learn_layer);
    if (order.merge_layers) {
      return this.#ofThisLife(disk, order.merge_layers) ?? merge(disk, order.merge_layers);
    }
    if (order.strip_layers)
      return this.#ofThisLife(disk, order.strip_layers) ?? strip(disk, order.strip_layers);
    if (order.wipe_layers) {
      return this.#ofThisLife(disk, order.wipe_layers) ?? wipeLayers(disk, order.wipe_layers);
    }
    if (order.read_changes) return readChanges(disk, order.read_changes);
    return { error_code: 'UNIMPLEMENTED', error_message: `order ${order.order}` };
  }

  #ofThisLife(disk: FakeDisk, order: { generation: string }): Answer | undefined {
    return this.hosts.get(disk.uuid)?.generation === order.generation
      ? undefined
      : { error_code: 'STALE', error_message: 'another generation' };
  }

  #hold(order: NonNullable<Order__Output['hold_volumes']>): Answer {
    const away = order.volumes.find(({ volume_uuid, epoch }) => this.open.get(volume_uuid)?.epoch !== epoch);
    if (away !== undefined) return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here' };
    this.held = { cutId: order.cut_id, volumes: order.volumes.map((one) => one.volume_uuid) };
    return {};
  }

  #cut(disk: FakeDisk, order: NonNullable<Order__Output['cut_volumes']>): Answer {
    const done = (cut: (typeof order.cuts)[number]): boolean =>
      disk.records.get(cut.volume_uuid)?.layers[0]?.layer_id === cut.top?.layer_id;
    const lost = order.cut_id !== '' && this.held?.cutId !== order.cut_id;
    if (lost && !order.cuts.every(done)) {
      return { error_code: 'HF_HOLD_EXPIRED', error_message: 'not held any more' };
    }
    const volumes = [];
    for (const cut of order.cuts) {
      const { grant, top, volume_uuid: uuid } = cut;
      if (!top) return { error_code: 'HF_INVALID_ARGUMENT', error_message: 'no top' };
      if (grant) {
        const before = disk.records.get(uuid);
        const stale =
          (this.#revoked.get(uuid) ?? 0n) >= BigInt(grant.epoch) ||
          (before?.epoch ?? 0n) >= BigInt(grant.epoch);
        if (stale) return { error_code: 'STALE', error_message: 'a newer epoch is known' };
        const chain = grant.layers.map((layer) => ({ ...layer, slabs: undefined }));
        disk.records.set(uuid, recordOf(grant, this.hosts.get(disk.uuid), before?.layers ?? chain, 'closed'));
      } else if (this.open.get(uuid)?.epoch !== cut.epoch) {
        return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here' };
      }
      const record = disk.records.get(uuid)!;
      if (!done(cut)) {
        const frozen = { ...record.layers[0], frozen: true } as RecordPage['layers'][number];
        record.layers = [
          { ...top, slabs: undefined } as (typeof record.layers)[number],
          frozen,
          ...record.layers.slice(1),
        ];
        disk.names.set(frozen.layer_id, cut.snapshot_name);
      }
      const old = record.layers.at(1);
      if (old === undefined) throw new Error('no layer was frozen');
      const open = this.open.get(uuid);
      const before = open?.layers.at(0);
      if (open !== undefined && before !== undefined && before.layer_id !== top.layer_id) {
        open.layers = [top, { ...before, frozen: true }, ...open.layers.slice(1)];
      }
      volumes.push({
        volume_uuid: uuid,
        size_bytes: old.size_bytes,
        claimed: claimsOfLayer(disk, record.volumeId, old.layer_id),
        held_us: '1500',
        epoch: grant?.epoch ?? cut.epoch,
      });
    }
    if (order.cut_id !== '') this.held = undefined;
    return { cut: { volumes } };
  }

  #learn(order: NonNullable<Order__Output['learn_layer']>): Answer {
    const grant = this.open.get(order.volume_uuid);
    if (grant?.epoch !== order.epoch) return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here' };
    const { layer } = order;
    grant.layers = grant.layers.map((one) => (one.layer_id === layer?.layer_id ? layer : one));
    return {};
  }

  #forget(order: NonNullable<Order__Output['forget_slabs']>): Answer {
    const grant = this.open.get(order.volume_uuid);
    if (grant?.epoch !== order.epoch) return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here' };
    for (const run of order.slabs) {
      for (let n = 0; n < run.count; n++) this.forgotten.push(Number(run.first) + n);
    }
    grant.layers = grant.layers.filter((layer) => !order.layers.includes(layer.layer_id));
    return {};
  }

  #revoke(disk: FakeDisk, uuid: string, epoch: string): Answer {
    if (BigInt(epoch) > (this.#revoked.get(uuid) ?? 0n)) this.#revoked.set(uuid, BigInt(epoch));
    const grant = this.open.get(uuid);
    if (grant?.epoch !== epoch) return { error_code: 'UNKNOWN_VOLUME', error_message: 'not open here' };
    const claimed = grant.read_only ? [] : this.claimsOf(disk.uuid, grant);
    if (grant.read_only) this.open.delete(uuid);
    else this.#closeOnDisk(disk, uuid);
    return { revoked: { epoch, was_open: true, claimed } };
  }
}

const orderKinds = [
  'revoke',
  'write_fence',
  'read_heartbeat',
  'test_lock',
  'scan_slabs',
  'wipe_volume',
  'read_volume_record',
  'hold_volumes',
  'cut_volumes',
  'forget_slabs',
  'strip_layers',
  'merge_layers',
  'learn_layer',
  'wipe_layers',
  'compact_volume',
  'grow_device',
  'leave_pool',
];

function recordOf(
  grant: Grant__Output,
  host: HostRef__Output | undefined,
  layers: RecordPage['layers'],
  state: string,
): RecordPage {
  return {
    volumeId: grant.volume_id,
    uuid: grant.volume_uuid,
    name: grant.name,
    sizeBytes: grant.size_bytes,
    state,
    epoch: BigInt(grant.epoch),
    hostId: host?.host_id ?? 0,
    generation: host?.generation ?? '0',
    slot: grant.slot,
    layers,
  };
}

function compactResult(
  { volume_uuid, epoch }: CompactVolume__Output,
  moved: number,
  complete: boolean,
  noSpace: boolean,
): NonNullable<OrderResult['compact']> {
  return { volume_uuid, epoch, moved_blocks: String(moved), complete, no_space: noSpace };
}

function claimsOfLayer(
  disk: FakeDisk,
  volumeId: string,
  layerId: string,
): { volume_id: string; layer_id: string; slab: string; generation: string }[] {
  return [...disk.pages]
    .filter(([, page]) => page.layerId === BigInt(layerId))
    .map(([slab, page]) => ({
      volume_id: volumeId,
      layer_id: layerId,
      slab: String(slab),
      generation: page.generation.toString(),
    }));
}

/** The pages of a layer's slabs that still name it. */
function pagesOf(disk: FakeDisk, layer: Layer__Output): [slab: number, page: SlabPage][] {
  return layer.slabs.flatMap((run) =>
    Array.from({ length: run.count }, (_, n) => Number(run.first) + n).flatMap((slab) => {
      const page = disk.pages.get(slab);
      const ours = page?.layerId === BigInt(layer.layer_id) && page.generation === BigInt(run.generation);
      return ours ? [[slab, page] as [number, SlabPage]] : [];
    }),
  );
}

function strip(disk: FakeDisk, order: NonNullable<Order__Output['strip_layers']>): Answer {
  const covered = new Set(
    order.covers.flatMap((layer) => pagesOf(disk, layer).flatMap(([, page]) => [...(page.blocks ?? [])])),
  );
  const emptied: SlabRun__Output[] = [];
  const uses: object[] = [];
  let cleared = 0;
  for (const victim of order.victims) {
    for (const { layers } of disk.keepsParents ? [] : disk.records.values()) {
      const record = layers.find((layer) => layer.layer_id === victim.layer_id);
      if (record !== undefined) record.parent_layer_id = victim.parent_layer_id;
    }
    const own: number[] = [];
    let live = 0;
    for (const [slab, page] of pagesOf(disk, victim)) {
      const blocks = page.blocks ?? new Set();
      own.push(...blocks);
      for (const block of blocks) if (covered.has(block) && blocks.delete(block)) cleared += 1;
      live += blocks.size;
      if (blocks.size === 0)
        emptied.push({ first: String(slab), count: 1, generation: page.generation.toString() });
    }
    for (const block of own) covered.add(block);
    uses.push({ layer_id: victim.layer_id, live_blocks: String(live), slabs: '0' });
  }
  return { strip: { emptied, cleared_blocks: String(cleared), uses } };
}

/** A slab has room for two blocks. */
function merge(disk: FakeDisk, order: NonNullable<Order__Output['merge_layers']>): Answer {
  const { head, victims } = order;
  if (head === null) return { error_code: 'HF_INVALID_ARGUMENT', error_message: 'no head' };
  const covered = new Set(pagesOf(disk, head).flatMap(([, page]) => [...(page.blocks ?? [])]));
  const slabs = head.slabs.flatMap((run) =>
    Array.from({ length: run.count }, (_, n) => ({
      slab: Number(run.first) + n,
      generation: BigInt(run.generation),
    })),
  );
  const roomy = (): { slab: number; generation: bigint } | undefined =>
    slabs.find(({ slab }) => (disk.pages.get(slab)?.blocks?.size ?? 0) < 2);
  let moved = 0;
  let noSpace = false;
  for (const victim of victims) {
    for (const [, page] of pagesOf(disk, victim)) {
      for (const block of [...(page.blocks ?? [])].filter((one) => !covered.has(one))) {
        const place = roomy();
        noSpace ||= place === undefined;
        if (place === undefined) continue;
        const layerId = BigInt(head.layer_id);
        const target = disk.pages.get(place.slab) ?? {
          ...page,
          layerId,
          generation: place.generation,
          blocks: new Set(),
        };
        target.blocks?.add(block);
        disk.pages.set(place.slab, target);
        moved += 1;
      }
    }
    for (const [, page] of pagesOf(disk, victim)) for (const block of page.blocks ?? []) covered.add(block);
  }
  const spare = slabs
    .filter(({ slab }) => !disk.pages.has(slab))
    .map(({ slab, generation }) => ({ first: String(slab), count: 1, generation: String(generation) }));
  return { merge: { moved_blocks: String(moved), complete: !noSpace, no_space: noSpace, spare } };
}

function wipeLayers(disk: FakeDisk, order: NonNullable<Order__Output['wipe_layers']>): Answer {
  for (const layer of order.layers) {
    for (const [slab] of pagesOf(disk, layer)) disk.pages.delete(slab);
    if (order.tombstone) disk.tombstones.add(layer.layer_id);
  }
  return {};
}

function readChanges(disk: FakeDisk, order: NonNullable<Order__Output['read_changes']>): Answer {
  const blocks = new Set(
    order.target.flatMap((layer) => pagesOf(disk, layer).flatMap(([, page]) => [...(page.blocks ?? [])])),
  );
  const sorted = [...blocks]
    .sort((a, b) => a - b)
    .filter((block) => block * 4096 >= Number(order.starting_offset));
  const shown = sorted.slice(0, order.max_ranges);
  const next = sorted[shown.length];
  return {
    changes: {
      ranges: shown.map((block) => ({ offset: String(block * 4096), length: '4096' })),
      next_offset: next === undefined ? '0' : String(next * 4096),
    },
  };
}

function wipe(disk: FakeDisk, order: NonNullable<Order__Output['wipe_volume']>): Answer {
  const record = [...disk.records.values()].find((candidate) => candidate.volumeId === order.volume_id);
  if (record !== undefined && record.epoch > BigInt(order.closed_epoch)) {
    return { error_code: 'HF_STALE', error_message: 'the record is newer' };
  }
  if (record !== undefined) disk.records.delete(record.uuid);
  for (const layer of order.layers) {
    for (const run of layer.slabs) {
      for (let index = 0; index < run.count; index++) disk.pages.delete(Number(run.first) + index);
    }
  }
  return {};
}

function readRecord(
  disk: FakeDisk,
  { volume_uuid, slot }: NonNullable<Order__Output['read_volume_record']>,
): NonNullable<OrderResult['volume_record']> {
  const record = [...disk.records.values()].find((one) =>
    volume_uuid === '' ? one.slot === slot : one.uuid === volume_uuid,
  );
  if (record === undefined) return { found: false };
  return {
    found: true,
    volume_id: record.volumeId,
    state: record.state,
    epoch: record.epoch.toString(),
    host_id: record.hostId,
    generation: record.generation,
    slot: record.slot,
    uuid: record.uuid,
    top_layer_id: record.layers[0]?.layer_id ?? '0',
    name: record.name,
    size_bytes: record.sizeBytes,
    parameters_json: '{}',
    layers: record.layers.filter((layer) => !disk.tombstones.has(layer.layer_id)),
  };
}

/** Waits until something is so. */
export async function until(
  condition: () => boolean | Promise<boolean>,
  what: string,
  timeoutMs = 10_000,
): Promise<void> {
  const end = performance.now() + timeoutMs;
  while (!(await condition())) {
    if (performance.now() > end) throw new Error(`never: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
