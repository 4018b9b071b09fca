/**
 * The agent: holds the node's session with the metadata service, joins pools, opens and exports volumes through the native
 * engine, and keeps the service's books true to what the engine does. No I/O and no heartbeat waits for this process.
 *
 * Start order matters: adopt() comes first and needs nothing but the keeper and the disk, so that volumes taken over from
 * a dead agent go on before anybody is asked.
 */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { HoldfastError, serve, unary, type GrpcServer, type Logger } from '@holdfast/common';
import type { Engine, EngineEvent, EngineOptions, NativeModule } from '@holdfast/native';
import {
  holdfast,
  type AgentInfo,
  type AgentPool,
  type CloseVolumeRequest__Output,
  type CloseVolumeResponse,
  type GetOpenVolumeRequest__Output,
  type HeldPool,
  type Hello,
  type Known,
  type ListOpenVolumesResponse,
  type NodeAgentHandlers,
  type OpenVolumeInfo,
  type OpenVolumeRequest__Output,
  type OpenVolumeResponse,
  type PoolSeen,
  type ResizeVolumeRequest__Output,
  type ResizeVolumeResponse,
  type ServiceMessage__Output,
  type Welcome__Output,
} from '@holdfast/proto';
import type { ChannelCredentials } from '@grpc/grpc-js';
import { Backoff } from './backoff.ts';
import { Cuts } from './cuts.ts';
import { fencingNames, isTransient, messageOf, nativeCode, runFromWire, runToWire } from './convert.ts';
import { DeviceScanner, type FoundPool } from './devices.ts';
import { FsFreezer, type FileSystemFreezer } from './freeze.ts';
import { HostedPool } from './hosted-pool.ts';
import type { Identity } from './identity.ts';
import { OrderDesk } from './orders.ts';
import { PendingReturns } from './pending-returns.ts';
import { MetadataConnection } from './service.ts';
import { Volumes } from './volumes.ts';

export const agentVersion = '0.1.0';

export interface AgentOptions {
  stateDir: string;
  /** agent.sock, as `unix:/path`. */
  socket: string;
  keeperSocket: string;
  /** host:port of the metadata service. */
  metadata: string;
  channelCredentials?: ChannelCredentials;
  identity: Identity;
  /** Device paths; `*` and `?` in the last part are expanded at every scan. */
  devices: readonly string[];
  /** Where the engine makes its private device nodes; the same for every node that shares a machine. */
  lockDir: string;
  maxVolumes: number;
  logger: Logger;
  native: NativeModule;
  /** Quiesces file systems around a cut; by default with fsfreeze(8). */
  freezer?: FileSystemFreezer;
  /** How often devices are looked at again. */
  rescanMs?: number;
  workers?: number;
  pollMicroseconds?: number;
}

export interface Agent {
  readonly nodeId: string;
  /** Lets the keeper take over: I/O pauses until the next agent adopts. */
  handOver(): Promise<void>;
  /**
   * Leaves every pool on which nothing is open, so that its host slot ends cleanly. True when all were left; then the
   * agent has stopped.
   */
  leave(): Promise<boolean>;
}

const tickMs = 1000;

class RunningAgent implements Agent {
  readonly #options: AgentOptions;
  readonly #logger: Logger;
  readonly #service: MetadataConnection;
  readonly #scanner: DeviceScanner;
  readonly #volumes: Volumes;
  readonly #freezer: FileSystemFreezer;
  readonly #cuts: Cuts;
  readonly #orders: OrderDesk;
  readonly #pools = new Map<string, HostedPool>();
  /** Events of a pool whose openPool() has not resolved yet. */
  readonly #early: EngineEvent[] = [];
  #seen = new Map<string, FoundPool>();
  #accepted = new Set<string>();
  #sessionId = '';
  readonly #joining = new Set<string>();
  readonly #joinBackoff = new Map<string, { backoff: Backoff; notBefore: number; message: string }>();
  readonly #leaving = new Set<string>();
  #engine!: Engine;
  #server: GrpcServer | undefined;
  #ticker: NodeJS.Timeout | undefined;
  #lastScan = 0;
  #scanning: Promise<void> | undefined;
  #scanAgain = false;
  #seenSent = '';
  #stopping = false;

  constructor(options: AgentOptions) {
    this.#options = options;
    this.#logger = options.logger.child({ node: options.identity.nodeId });
    this.#service = new MetadataConnection({
      address: options.metadata,
      logger: this.#logger,
      ...(options.channelCredentials === undefined ? {} : { channelCredentials: options.channelCredentials }),
    });
    this.#scanner = new DeviceScanner(options.devices, options.native, this.#logger, (uuid) => {
      const pool = this.#pools.get(uuid);
      return pool === undefined || pool.dead ? undefined : pool.native;
    });
    this.#volumes = new Volumes({
      service: this.#service,
      returns: new PendingReturns(join(options.stateDir, 'pending-returns.json')),
      logger: this.#logger,
      maxVolumes: options.maxVolumes,
      nodeId: options.identity.nodeId,
      onFreed: () => this.#reconcilePools(),
    });
    this.#freezer = options.freezer ?? new FsFreezer(join(options.stateDir, 'frozen.json'), this.#logger);
    this.#cuts = new Cuts({ volumes: this.#volumes, freezer: this.#freezer, logger: this.#logger });
    this.#orders = new OrderDesk({
      tools: options.native,
      pool: (uuid) => this.#pools.get(uuid),
      device: (uuid) => this.#pools.get(uuid)?.found?.devicePath ?? this.#seen.get(uuid)?.devicePath,
      volumes: this.#volumes,
      cuts: this.#cuts,
      logger: this.#logger,
      look: () => this.#scan(),
      leave: (uuid, generation) => this.#leaveForGood(uuid, generation),
    });
  }

  get nodeId(): string {
    return this.#options.identity.nodeId;
  }

  async start(): Promise<void> {
    const { native, stateDir, keeperSocket, lockDir, workers, pollMicroseconds } = this.#options;
    mkdirSync(lockDir, { recursive: true, mode: 0o700 });
    const engineOptions: EngineOptions = {
      stateDir,
      keeperSocket,
      onEvent: (event) => this.#onEvent(event),
      ...(workers === undefined ? {} : { workers }),
      ...(pollMicroseconds === undefined ? {} : { pollMicroseconds }),
    };
    this.#engine = await native.createEngine(engineOptions);
    const started = performance.now();
    for (const pool of await this.#engine.adopt()) this.#volumes.adopt(this.#host(pool, true));
    this.#logger.info(
      {
        pools: this.#pools.size,
        volumes: this.#volumes.list().length,
        ms: Math.round(performance.now() - started),
      },
      'Adopted what the keeper had',
    );
    // Their devices answer again: what a killed agent left frozen need not wait longer.
    void this.#freezer.thawLeftOver();
    await this.#volumes.settleReturns([...this.#pools.values()]);
    await this.#scan();
    this.#server = await serve(this.#options.socket, (server) =>
      server.addService(holdfast.NodeAgent.service, this.#handlers()),
    );
    this.#service.start({
      hello: () => this.#hello(),
      welcomed: (welcome) => this.#onWelcome(welcome),
      resumed: () => this.#onResumed(),
      message: (message) => this.#onMessage(message),
      disconnected: () => this.#logger.warn('The session with the metadata service ended'),
    });
    this.#ticker = setInterval(() => this.#tick(), tickMs);
    this.#logger.info({ socket: this.#options.socket }, 'The agent is up');
  }

  // ------------------------------------------------------------------------------------------ pools

  #host(native: HostedPool['native'], ready: boolean): HostedPool {
    const uuid = native.info.uuid;
    const pool: HostedPool = new HostedPool(native, this.nodeId, {
      found: this.#seen.get(uuid),
      service: this.#service,
      logger: this.#logger,
      ready,
      openVolumes: () => this.#volumes.countOf(pool),
    });
    this.#pools.set(uuid, pool);
    for (const event of this.#early.splice(0)) this.#onEvent(event);
    return pool;
  }

  /**
   * Looks at the devices and reports what stands there now. What was seen before the session began is never reported:
   * the service takes an owner that is missing from the authority page as a sign of a disk that was exchanged.
   */
  #scan(): Promise<void> {
    this.#scanAgain = true;
    this.#scanning ??= this.#scanLoop().finally(() => {
      this.#scanning = undefined;
    });
    return this.#scanning;
  }

  async #scanLoop(): Promise<void> {
    while (this.#scanAgain) {
      this.#scanAgain = false;
      this.#lastScan = Date.now();
      const hosted = new Map([...this.#seen].filter(([uuid]) => this.#pools.has(uuid)));
      const found = await this.#scanner.scan(hosted);
      this.#seen = new Map(found.map((pool) => [pool.info.uuid, pool]));
    }
    this.#sendPoolsSeen();
    this.#reconcilePools();
  }

  #rescan(): void {
    this.#scan().catch((error: unknown) => this.#logger.error({ err: error }, 'The device scan failed'));
  }

  #sendPoolsSeen(): void {
    const pools: PoolSeen[] = [...this.#seen.values()].map((seen) => {
      const { devicePath, info, authority, deviceBytes, slabsPossible, problem } = seen;
      return {
        uuid: info.uuid,
        name: info.name,
        wwid: info.wwid,
        device_path: devicePath,
        fencing: fencingNames[info.fencing],
        slab_size: info.slabSize.toString(),
        slab_count: info.slabCount.toString(),
        volume_slots: info.volumeSlots,
        layer_slots: info.layerSlots,
        host_slots: info.hostSlots,
        renew_interval_ms: info.renewIntervalMs,
        lease_ms: info.leaseMs,
        drain_ms: info.drainMs,
        device_bytes: deviceBytes.toString(),
        slabs_possible: slabsPossible.toString(),
        problem,
        authority: {
          store_id: authority.unclaimed ? '' : authority.store,
          incarnation: authority.incarnation.toString(),
          term: authority.term.toString(),
        },
      };
    });
    const text = JSON.stringify(pools);
    if (text !== this.#seenSent && this.#service.send({ pools_seen: { pools } })) this.#seenSent = text;
  }

  #lockPath(poolUuid: string): string {
    return join(this.#options.lockDir, `${poolUuid}.${this.nodeId}`);
  }

  /** Brings what is hosted in step with what may be: dead and unused ones are left, accepted ones are joined. */
  #reconcilePools(): void {
    if (this.#stopping) return;
    for (const pool of this.#pools.values()) {
      if (pool.dead && this.#volumes.countOf(pool) === 0) this.#letGo(pool);
    }
    if (!this.#service.connected) return;
    const now = Date.now();
    for (const uuid of this.#accepted) {
      const seen = this.#seen.get(uuid);
      if (seen === undefined || this.#pools.has(uuid) || this.#joining.has(uuid)) continue;
      if ((this.#joinBackoff.get(uuid)?.notBefore ?? 0) > now) continue;
      this.#joining.add(uuid);
      void this.#join(seen).finally(() => {
        this.#joining.delete(uuid);
      });
    }
  }

  async #join(seen: FoundPool): Promise<void> {
    const uuid = seen.info.uuid;
    const { identity } = this.#options;
    const lockPath = this.#lockPath(uuid);
    try {
      const { host } = await this.#service.joinPool({
        pool_uuid: uuid,
        node_id: identity.nodeId,
        machine_id: identity.machineId,
        boot_id: identity.bootId,
        lock_path: lockPath,
        previous_io_dead: await this.#previousIoDead(lockPath),
        session_id: this.#sessionId,
      });
      if (!host) throw new HoldfastError('INTERNAL', 'JoinPool answered without a host');
      const opened = await this.#engine.openPool({
        devicePath: seen.devicePath,
        uuid,
        hostId: host.host_id,
        generation: BigInt(host.generation),
        nodeName: identity.name,
        machineId: identity.machineId,
        bootId: identity.bootId,
        lockPath,
      });
      const pool = this.#host(opened, false);
      await this.#makeReady(pool);
      this.#joinBackoff.delete(uuid);
      this.#logger.info(
        { pool: uuid, device: seen.devicePath, host: host.host_id, generation: host.generation },
        'Joined a pool',
      );
    } catch (error) {
      const state = this.#joinBackoff.get(uuid) ?? {
        backoff: new Backoff(300, 5000),
        notBefore: 0,
        message: '',
      };
      const message = messageOf(error);
      if (message !== state.message) {
        this.#logger[isTransient(error) ? 'info' : 'warn'](
          { pool: uuid },
          `Pool ${uuid} is not joined yet: ${message}`,
        );
      }
      this.#joinBackoff.set(uuid, {
        backoff: state.backoff,
        notBefore: Date.now() + state.backoff.next(),
        message,
      });
    }
  }

  /** A free lock proves that this node's earlier engine is dead; a lock that is not there proves nothing. */
  async #previousIoDead(lockPath: string): Promise<boolean> {
    try {
      return await this.#options.native.lockIsFree(lockPath);
    } catch (error) {
      if (nativeCode(error) === 'HF_NOT_FOUND') return false;
      throw error;
    }
  }

  async #makeReady(pool: HostedPool): Promise<void> {
    await this.#service.poolReady({ host: pool.host });
    pool.ready = true;
  }

  /**
   * The pool is being removed: nothing may be open on it any more. Joining it again would need the service's word, which has
   * taken it back already.
   */
  async #leaveForGood(uuid: string, generation: string): Promise<void> {
    this.#accepted.delete(uuid);
    const pool = this.#pools.get(uuid);
    if (this.#joining.has(uuid) || this.#leaving.has(uuid)) {
      throw new HoldfastError('UNAVAILABLE', `This node is joining or leaving pool ${uuid} now. Ask again.`);
    }
    if (pool === undefined || pool.host.generation !== generation) return;
    if (this.#volumes.countOf(pool) > 0) {
      throw Object.assign(new Error(`Volumes of pool ${uuid} are open here.`), { code: 'HF_BUSY' });
    }
    this.#leaving.add(uuid);
    try {
      await pool.release();
      await pool.native.close();
      this.#pools.delete(uuid);
      this.#logger.info({ pool: uuid, generation }, 'Left a pool that is being removed');
    } finally {
      this.#leaving.delete(uuid);
    }
  }

  /** A dead generation with no device left: its handle and lock are released, then the pool may be joined again. */
  #letGo(pool: HostedPool): void {
    if (this.#leaving.has(pool.uuid)) return;
    this.#leaving.add(pool.uuid);
    const leave = async (): Promise<void> => {
      try {
        await pool.release();
        await pool.native.close();
        this.#pools.delete(pool.uuid);
        this.#logger.info({ pool: pool.uuid, generation: pool.host.generation }, 'Left a pool that was lost');
      } catch (error) {
        this.#logger.warn({ pool: pool.uuid }, `A lost pool cannot be left yet: ${messageOf(error)}`);
      } finally {
        this.#leaving.delete(pool.uuid);
      }
      this.#reconcilePools();
    };
    void leave();
  }

  #tick(): void {
    if (this.#stopping) return;
    const now = Date.now();
    if (now - this.#lastScan >= (this.#options.rescanMs ?? 5000)) {
      this.#rescan();
    }
    for (const pool of this.#pools.values()) {
      pool.tick(now);
      if (!pool.ready && !pool.dead && this.#service.connected && !this.#joining.has(pool.uuid)) {
        this.#makeReady(pool).catch((error: unknown) =>
          this.#logger.warn({ pool: pool.uuid }, `The pool is not ready yet: ${messageOf(error)}`),
        );
      }
    }
    if (this.#service.connected) {
      this.#volumes.sendReturns();
      this.#volumes.tellOpened();
    }
    this.#reconcilePools();
  }

  // ------------------------------------------------------------------------------------------ session

  #hello(): Hello {
    const { identity, maxVolumes } = this.#options;
    const holding: HeldPool[] = [];
    for (const pool of this.#pools.values()) {
      if (pool.dead) continue;
      holding.push({
        host: pool.host,
        volumes: this.#volumes.held(pool),
        stock: pool.stockForHello().map(runToWire),
      });
    }
    this.#seenSent = '';
    return {
      node_id: identity.nodeId,
      name: identity.name,
      machine_id: identity.machineId,
      boot_id: identity.bootId,
      version: agentVersion,
      max_volumes: maxVolumes,
      holding,
    };
  }

  #onWelcome(welcome: Welcome__Output): void {
    this.#orders.accept({
      storeId: welcome.store_id,
      incarnation: BigInt(welcome.incarnation),
      term: BigInt(welcome.term),
    });
    this.#accepted = new Set(welcome.accepted_pools);
    this.#sessionId = welcome.session_id;
    if (this.#service.connected) return; // a later Welcome only tells of newly accepted pools
    this.#volumes.helloHeard();
    const kept = new Map(welcome.stock.map((stock) => [stock.pool_uuid, stock.runs.map(runFromWire)]));
    for (const pool of this.#pools.values()) {
      if (!pool.dead) pool.keepStock(kept.get(pool.uuid) ?? []);
    }
  }

  #onResumed(): void {
    this.#logger.info({ metadata: this.#options.metadata }, 'The metadata service welcomed this node');
    this.#rescan();
    for (const pool of this.#pools.values()) {
      pool.resume();
      if (pool.lease.state !== 'valid') this.#reportLease(pool);
    }
    this.#volumes.sendReturns();
    this.#joinBackoff.clear();
    this.#reconcilePools();
  }

  #onMessage(message: ServiceMessage__Output): void {
    if (message.order) {
      const order = message.order;
      void this.#orders.carryOut(order).then((result) => this.#service.send({ order_result: result }));
    } else if (message.volume_resized) {
      this.#volumes.resized(message.volume_resized.volume_uuid, BigInt(message.volume_resized.size_bytes));
    }
  }

  #reportLease(pool: HostedPool): void {
    this.#service.send({ lease: { host: pool.host, state: pool.lease.state, message: pool.lease.message } });
  }

  // ------------------------------------------------------------------------------------------ engine

  #onEvent(event: EngineEvent): void {
    const pool = this.#pools.get(event.pool);
    if (pool === undefined) {
      if (this.#early.length < 10_000) this.#early.push(event);
      return;
    }
    switch (event.type) {
      case 'slabs-low':
        pool.slabsLow(event.wanted);
        break;
      case 'slab-claimed':
        this.#volumes.slabClaimed(pool, event);
        break;
      case 'slab-emptied':
        this.#volumes.slabEmptied(pool, event);
        break;
      case 'lease':
        pool.lease = { state: event.state, message: event.message };
        this.#logger[event.state === 'valid' ? 'info' : 'warn'](
          { pool: event.pool, lease: event.state },
          event.message === '' ? `The lease is ${event.state}` : event.message,
        );
        this.#reportLease(pool);
        this.#reconcilePools();
        break;
      case 'volume':
        this.#volumes.volumeEvent(pool, event.volumeId, event.code, event.message);
        break;
    }
  }

  // ------------------------------------------------------------------------------------------ agent.sock

  #handlers(): Known<NodeAgentHandlers> {
    const logger = this.#logger;
    const volumes = this.#volumes;
    return {
      OpenVolume: unary<OpenVolumeRequest__Output, OpenVolumeResponse>(
        logger,
        'OpenVolume',
        async (request) => {
          this.#refuseWhenStopping();
          return await volumes.open(this.#pools.get(request.pool_uuid), {
            poolUuid: request.pool_uuid,
            volumeUuid: request.volume_uuid,
            publishId: request.publish_id,
            readOnly: request.read_only,
          });
        },
      ),
      CloseVolume: unary<CloseVolumeRequest__Output, CloseVolumeResponse>(
        logger,
        'CloseVolume',
        async (request) => {
          this.#refuseWhenStopping();
          await volumes.close(request.volume_uuid);
          return {};
        },
      ),
      ResizeVolume: unary<ResizeVolumeRequest__Output, ResizeVolumeResponse>(
        logger,
        'ResizeVolume',
        async (request) => {
          this.#refuseWhenStopping();
          const size = await volumes.resize(request.volume_uuid, BigInt(request.size_bytes));
          return { size_bytes: size.toString() };
        },
      ),
      GetOpenVolume: unary<GetOpenVolumeRequest__Output, OpenVolumeInfo>(
        logger,
        'GetOpenVolume',
        async (request) => volumes.get(request.volume_uuid),
      ),
      ListOpenVolumes: unary<unknown, ListOpenVolumesResponse>(logger, 'ListOpenVolumes', async () => ({
        volumes: volumes.list(),
      })),
      GetAgentInfo: unary<unknown, AgentInfo>(logger, 'GetAgentInfo', async () => this.#info()),
    };
  }

  #refuseWhenStopping(): void {
    if (!this.#stopping) return;
    throw new HoldfastError(
      'UNAVAILABLE',
      'The agent is stopping. Repeat this call when the next one is up.',
    );
  }

  #info(): AgentInfo {
    const pools: AgentPool[] = [...this.#pools.values()].map((pool) => ({
      uuid: pool.uuid,
      name: pool.native.info.name,
      device_path: pool.found?.devicePath ?? this.#seen.get(pool.uuid)?.devicePath ?? '',
      host_id: pool.host.host_id,
      generation: pool.host.generation,
      lease: pool.ready ? pool.lease.state : 'not-joined',
      message: pool.lease.message,
    }));
    for (const seen of this.#seen.values()) {
      if (this.#pools.has(seen.info.uuid)) continue;
      pools.push({
        uuid: seen.info.uuid,
        name: seen.info.name,
        device_path: seen.devicePath,
        lease: 'not-joined',
        message: this.#joinBackoff.get(seen.info.uuid)?.message ?? '',
      });
    }
    return {
      node_id: this.nodeId,
      name: this.#options.identity.name,
      max_volumes: this.#options.maxVolumes,
      service_connected: this.#service.connected,
      pools,
    };
  }

  // ------------------------------------------------------------------------------------------ stopping

  async #quiesce(): Promise<void> {
    this.#stopping = true;
    clearInterval(this.#ticker);
    await this.#server?.close(2000);
    await this.#cuts.releaseAll();
    await this.#volumes.idle();
  }

  async handOver(): Promise<void> {
    await this.#quiesce();
    if (this.#service.connected) {
      await Promise.all([...this.#pools.values()].map((pool) => pool.reported(1000)));
    }
    for (const pool of this.#pools.values()) pool.stop();
    await this.#service.stop();
    // Last: from here until the next agent has adopted, I/O waits.
    await this.#engine.handOver();
    await this.#engine.destroy();
    this.#logger.info('Handed over to the keeper');
  }

  async leave(): Promise<boolean> {
    if (this.#volumes.list().length > 0) {
      this.#logger.warn('Volumes are open: the pools are not left');
      return false;
    }
    await this.#quiesce();
    for (const pool of this.#pools.values()) {
      if (!pool.dead) await pool.returnStock(2000);
      await pool.release();
      await pool.native.close();
      pool.lease = { state: 'stopped', message: 'The node left the pool' };
      this.#reportLease(pool);
    }
    this.#pools.clear();
    await this.#service.stop();
    await this.#engine.destroy();
    this.#logger.info('Left every pool');
    return true;
  }
}

/** Starts an agent; resolves when it serves its socket. Throws when another agent serves it or the keeper is away. */
export async function startAgent(options: AgentOptions): Promise<Agent> {
  const agent = new RunningAgent(options);
  await agent.start();
  return agent;
}
