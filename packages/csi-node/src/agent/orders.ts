/**
 * Orders of the metadata service, carried out by the engine. An order may come twice: while it runs the second one joins
 * it, afterwards it gets the first one's result and nothing is done again (a repeated wipe could meet the next owner's
 * data). An order is checked against the newest authority that this agent has seen and, where it changes the pool,
 * against the authority page on the disk: a deposed leader's or a restored database's order is STALE and changes nothing.
 */
import { HoldfastError, type Logger } from '@holdfast/common';
import type { NativeModule } from '@holdfast/native';
import type { Layer, Order__Output, OrderResult, VolumeRecordReading } from '@holdfast/proto';
import { layerFromWire, messageOf, nativeCode, runFromWire, slabOwnerToWire } from './convert.ts';
import type { HostedPool } from './hosted-pool.ts';
import { UnknownVolume, type Volumes } from './volumes.ts';

/** Results kept for repeats. An order is forgotten long after the service has stopped asking for it. */
const keptResults = 4096;

/** Who gives orders: a store's life and its leader's term. */
export interface AuthorityTerm {
  storeId: string;
  incarnation: bigint;
  term: bigint;
}

function older(a: { incarnation: bigint; term: bigint }, b: { incarnation: bigint; term: bigint }): boolean {
  return a.incarnation < b.incarnation || (a.incarnation === b.incarnation && a.term < b.term);
}

function codeOf(error: unknown): string {
  if (error instanceof UnknownVolume || error instanceof HoldfastError) return error.code;
  return nativeCode(error) ?? 'INTERNAL';
}

export class OrderDesk {
  readonly #tools: NativeModule;
  readonly #pool: (uuid: string) => HostedPool | undefined;
  /** The path under which this node sees a pool. */
  readonly #device: (uuid: string) => string | undefined;
  readonly #volumes: Volumes;
  readonly #logger: Logger;
  readonly #results = new Map<string, Promise<OrderResult>>();
  #authority: AuthorityTerm = { storeId: '', incarnation: 0n, term: 0n };

  constructor(options: {
    tools: NativeModule;
    pool: (uuid: string) => HostedPool | undefined;
    device: (uuid: string) => string | undefined;
    volumes: Volumes;
    logger: Logger;
  }) {
    this.#tools = options.tools;
    this.#pool = options.pool;
    this.#device = options.device;
    this.#volumes = options.volumes;
    this.#logger = options.logger;
  }

  /** A Welcome's authority. @throws STALE when a newer one of the same store was seen before. */
  accept(authority: AuthorityTerm): void {
    if (authority.storeId === this.#authority.storeId && older(authority, this.#authority)) {
      throw new HoldfastError(
        'STALE',
        `The metadata service greets with incarnation ${authority.incarnation} term ${authority.term}, but ${this.#authority.incarnation}/${this.#authority.term} was seen before. It was deposed or restored from an old copy.`,
      );
    }
    this.#authority = authority;
  }

  /** Never rejects: what went wrong is in the result. */
  carryOut(order: Order__Output): Promise<OrderResult> {
    const known = this.#results.get(order.order_id);
    if (known !== undefined) return known;
    const result = this.#run(order).catch((error: unknown): OrderResult => {
      const code = codeOf(error);
      this.#logger.warn(
        { order: order.order, pool: order.pool_uuid, code },
        `An order failed: ${messageOf(error)}`,
      );
      // Only what succeeded is final: a failed order that comes again is tried again.
      this.#results.delete(order.order_id);
      return { error_code: code, error_message: messageOf(error) };
    });
    const named = result.then((outcome) => ({ ...outcome, order_id: order.order_id }));
    this.#results.set(order.order_id, named);
    if (this.#results.size > keptResults) {
      const oldest = this.#results.keys().next().value;
      if (oldest !== undefined) this.#results.delete(oldest);
    }
    return named;
  }

  #hosted(order: Order__Output): HostedPool {
    const pool = this.#pool(order.pool_uuid);
    if (pool === undefined || pool.dead) {
      throw new HoldfastError(
        'UNAVAILABLE',
        `This node is not a live host on pool ${order.pool_uuid}. Ask another one.`,
      );
    }
    return pool;
  }

  /** Before a claim stands nobody is a host on the pool; later it is renewed (a new term) by hosts. */
  async #claim(
    order: Order__Output,
    store: string,
    waitMs: number,
    term: { incarnation: bigint; term: bigint },
  ): Promise<void> {
    if (store !== this.#authority.storeId) {
      throw new HoldfastError(
        'STALE',
        `The claim is for store ${store}, but this session belongs to store ${this.#authority.storeId}.`,
      );
    }
    const pool = this.#pool(order.pool_uuid);
    if (pool !== undefined && !pool.dead) {
      await pool.native.claimAuthority({ store, ...term }, waitMs);
    } else {
      await this.#tools.claimAuthority(this.#deviceOf(order), { store, ...term }, waitMs);
    }
  }

  #deviceOf(order: Order__Output): string {
    const device = this.#device(order.pool_uuid);
    if (device === undefined) {
      throw new HoldfastError(
        'UNAVAILABLE',
        `This node does not see a device with pool ${order.pool_uuid}. Ask another one.`,
      );
    }
    return device;
  }

  /** A record by its slot, or by its volume's UUID wherever it stands, then with its layers. */
  async #readRecord(order: Order__Output, slot: number, uuid: string): Promise<VolumeRecordReading> {
    const { native } = this.#hosted(order);
    const record =
      uuid === ''
        ? await native.readVolumeRecord(slot)
        : (await native.readVolumeRecords()).find((r) => r.uuid === uuid);
    if (record === undefined) return { found: false };
    const reading: VolumeRecordReading = {
      found: true,
      volume_id: record.volumeId.toString(),
      state: record.state,
      epoch: record.epoch.toString(),
      host_id: record.hostId,
      generation: record.generation.toString(),
    };
    if (uuid === '') return reading;
    const layers = new Map(
      (await this.#tools.readLayerRecords(this.#deviceOf(order))).map((layer) => [layer.layerId, layer]),
    );
    const chain: Layer[] = [];
    for (let id = record.topLayerId; id !== 0n; ) {
      const layer = layers.get(id);
      if (layer === undefined || chain.length > layers.size) {
        throw new HoldfastError(
          'CORRUPT',
          `Volume ${uuid} names layer ${id}, which the layer table does not have. Run \`holdfast pool check\`.`,
        );
      }
      chain.push({
        layer_id: layer.layerId.toString(),
        slot: layer.slot,
        parent_layer_id: layer.parentLayerId.toString(),
        birth: layer.birth.toString(),
        size_bytes: layer.sizeBytes.toString(),
        frozen: layer.state === 'frozen',
      });
      id = layer.parentLayerId;
    }
    return {
      ...reading,
      slot: record.slot,
      uuid: record.uuid,
      name: record.name,
      size_bytes: record.sizeBytes.toString(),
      parameters_json: record.parametersJson,
      layers: chain,
    };
  }

  /** The disk decides who may order changes of the pool. */
  async #checkPage(pool: HostedPool, order: Order__Output): Promise<void> {
    const page = await pool.native.readAuthority();
    const mine = { incarnation: BigInt(order.incarnation), term: BigInt(order.term) };
    if (page.unclaimed || page.store !== this.#authority.storeId || older(mine, page)) {
      throw new HoldfastError(
        'STALE',
        `The authority page of pool ${pool.uuid} names store ${page.store}, incarnation ${page.incarnation}, term ${page.term}; the order came from ${this.#authority.storeId}, ${order.incarnation}, ${order.term}.`,
      );
    }
  }

  async #run(order: Order__Output): Promise<OrderResult> {
    const term = { incarnation: BigInt(order.incarnation), term: BigInt(order.term) };
    if (older(term, this.#authority)) {
      throw new HoldfastError(
        'STALE',
        `The order carries incarnation ${order.incarnation} term ${order.term}; ${this.#authority.incarnation}/${this.#authority.term} gives orders now.`,
      );
    }
    this.#logger.debug({ order: order.order, id: order.order_id, pool: order.pool_uuid }, 'An order');
    if (order.claim_authority) {
      await this.#claim(order, order.claim_authority.store_id, Number(order.claim_authority.wait_ms), term);
      return {};
    }
    if (order.write_fence) {
      const pool = this.#hosted(order);
      await this.#checkPage(pool, order);
      await pool.native.writeFence({
        hostId: order.write_fence.host_id,
        generation: BigInt(order.write_fence.generation),
        ...term,
      });
      return {};
    }
    if (order.read_fence) {
      const fence = await this.#hosted(order).native.readFence(
        order.read_fence.host_id,
        BigInt(order.read_fence.generation),
      );
      return { fence: { host_id: fence.hostId, generation: fence.generation.toString() } };
    }
    if (order.read_heartbeat) {
      const beat = await this.#hosted(order).native.readHeartbeat(order.read_heartbeat.host_id);
      return {
        heartbeat: {
          host_id: beat.hostId,
          state: beat.state,
          generation: beat.generation.toString(),
          sequence: beat.sequence.toString(),
          boot_id: beat.bootId,
          machine_id: beat.machineId,
        },
      };
    }
    if (order.test_lock) return { lock_free: await this.#tools.lockIsFree(order.test_lock.lock_path) };
    if (order.revoke) {
      const { volume_uuid, epoch } = order.revoke;
      return { revoked: await this.#volumes.revoke(this.#pool(order.pool_uuid), volume_uuid, BigInt(epoch)) };
    }
    if (order.read_volume_record) {
      const { slot, volume_uuid } = order.read_volume_record;
      return { volume_record: await this.#readRecord(order, slot, volume_uuid) };
    }
    if (order.scan_slabs) {
      const owners = await this.#hosted(order).native.scanSlabs(order.scan_slabs.runs.map(runFromWire));
      return { slab_owners: { owners: owners.map(slabOwnerToWire) } };
    }
    if (order.wipe_volume) {
      const pool = this.#hosted(order);
      await this.#checkPage(pool, order);
      const wipe = order.wipe_volume;
      await pool.native.wipeVolume({
        volumeId: BigInt(wipe.volume_id),
        slot: wipe.slot,
        closedEpoch: BigInt(wipe.closed_epoch),
        layers: wipe.layers.map(layerFromWire),
      });
      return {};
    }
    throw new HoldfastError(
      'UNIMPLEMENTED',
      `This agent does not know the order "${order.order ?? 'none'}". Upgrade it.`,
    );
  }
}
