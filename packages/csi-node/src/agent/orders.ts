/**
 * Orders of the metadata service, carried out by the engine. An order may come twice: while it runs the second one joins
 * it, afterwards it gets the first one's result and nothing is done again (a repeated wipe could meet the next owner's
 * data). An order is checked against the newest authority that this agent has seen and, where it changes the pool,
 * against the authority page on the disk: a deposed leader's or a restored database's order is STALE and changes nothing.
 */
import { HoldfastError, type Logger } from '@holdfast/common';
import type { MergeReport, NativeModule, VolumeRecord } from '@holdfast/native';
import type {
  Layer,
  MergeLayers__Output,
  Order__Output,
  OrderResult,
  VolumeRecordReading,
} from '@holdfast/proto';
import { layerFromWire, messageOf, nativeCode, runFromWire, runToWire, slabOwnerToWire } from './convert.ts';
import type { Cuts } from './cuts.ts';
import type { HostedPool } from './hosted-pool.ts';
import { KeyedLock } from './locks.ts';
import { UnknownVolume, type Volumes } from './volumes.ts';

/** Results kept for repeats. An order is forgotten long after the service has stopped asking for it. */
const keptResults = 4096;

/** More than can ever be on their way. */
const mergesKept = 1024;
/** Errors after which the service asks for the same merge again: see StripLayers in metadata.proto. */
const askedAgain: readonly string[] = ['HF_UNAVAILABLE', 'HF_BUSY', 'HF_STALE'];

/** Long answers, and harmless to work out again. */
const notKept: readonly Order__Output['order'][] = ['cut_volumes', 'read_changes', 'look_at_device'];

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
  readonly #cuts: Cuts;
  readonly #logger: Logger;
  /** Looks at the devices, and reports what is seen. */
  readonly #look: () => Promise<void>;
  /** Ends a host life, because its pool is being removed. */
  readonly #leave: (poolUuid: string, generation: string) => Promise<void>;
  /** Wipes and strips of a pool, one after the other: an answer says that nothing of the order is in flight. */
  readonly #jobs = new KeyedLock();
  readonly #results = new Map<string, Promise<OrderResult>>();
  /** By pool and the service's number. */
  readonly #merges = new Map<string, Promise<MergeReport>>();
  #authority: AuthorityTerm = { storeId: '', incarnation: 0n, term: 0n };

  constructor(options: {
    tools: NativeModule;
    pool: (uuid: string) => HostedPool | undefined;
    device: (uuid: string) => string | undefined;
    volumes: Volumes;
    cuts: Cuts;
    logger: Logger;
    look: () => Promise<void>;
    leave: (poolUuid: string, generation: string) => Promise<void>;
  }) {
    this.#look = options.look;
    this.#leave = options.leave;
    this.#tools = options.tools;
    this.#pool = options.pool;
    this.#device = options.device;
    this.#volumes = options.volumes;
    this.#cuts = options.cuts;
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
    const named = result.then((outcome) => {
      if (notKept.includes(order.order)) this.#results.delete(order.order_id);
      return { ...outcome, order_id: order.order_id };
    });
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

  /** For work that is given to one life of this host: another one must not do it (0: any may). */
  #hostedAs(order: Order__Output, generation: string): HostedPool {
    const pool = this.#hosted(order);
    if (generation !== '0' && generation !== pool.host.generation) {
      throw new HoldfastError(
        'STALE',
        `The order is for generation ${generation} of this host on pool ${order.pool_uuid}, which lives under ${pool.host.generation}.`,
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

  /** A record by its slot, or by its volume's UUID wherever it stands, with its chain as the disk has it. */
  async #readRecord(order: Order__Output, slot: number, uuid: string): Promise<VolumeRecordReading> {
    const { native } = this.#hosted(order);
    const record =
      uuid === ''
        ? await native.readVolumeRecord(slot)
        : (await native.readVolumeRecords()).find((r) => r.uuid === uuid);
    if (record === undefined) return { found: false };
    return {
      found: true,
      volume_id: record.volumeId.toString(),
      state: record.state,
      epoch: record.epoch.toString(),
      host_id: record.hostId,
      generation: record.generation.toString(),
      slot: record.slot,
      uuid: record.uuid,
      name: record.name,
      size_bytes: record.sizeBytes.toString(),
      parameters_json: record.parametersJson,
      top_layer_id: record.topLayerId.toString(),
      layers: record.state === 'deleted' ? [] : await this.#chain(order, record),
    };
  }

  /**
   * Newest first. A deleted layer's tombstone keeps its parent, so that a chain whose middle was stripped away is followed
   * through it; it is no part of the answer.
   */
  async #chain(order: Order__Output, record: VolumeRecord): Promise<Layer[]> {
    const layers = new Map(
      (await this.#tools.readLayerRecords(this.#deviceOf(order))).map((layer) => [layer.layerId, layer]),
    );
    const chain: Layer[] = [];
    const seen = new Set<bigint>();
    for (let id = record.topLayerId; id !== 0n; ) {
      const layer = layers.get(id);
      if (layer === undefined || seen.has(id)) {
        throw new HoldfastError(
          'CORRUPT',
          `Volume ${record.uuid} names layer ${id}, which the layer table does not have. Run \`holdfast pool check\`.`,
        );
      }
      seen.add(id);
      if (layer.state !== 'deleted') {
        chain.push({
          layer_id: layer.layerId.toString(),
          slot: layer.slot,
          parent_layer_id: layer.parentLayerId.toString(),
          birth: layer.birth.toString(),
          size_bytes: layer.sizeBytes.toString(),
          frozen: layer.state !== 'writable',
        });
      }
      id = layer.parentLayerId;
    }
    return chain;
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
      const pool = this.#hostedAs(order, order.wipe_volume.generation);
      await this.#checkPage(pool, order);
      const wipe = order.wipe_volume;
      await this.#jobs.run(pool.uuid, () =>
        pool.native.wipeVolume({
          volumeId: BigInt(wipe.volume_id),
          slot: wipe.slot,
          closedEpoch: BigInt(wipe.closed_epoch),
          layers: wipe.layers.map(layerFromWire),
        }),
      );
      return {};
    }
    if (order.look_at_device) {
      await this.#look();
      return {};
    }
    if (order.grow_device) {
      const pool = this.#hostedAs(order, order.grow_device.generation);
      await this.#checkPage(pool, order);
      const deviceBytes = BigInt(order.grow_device.device_bytes);
      await this.#jobs.run(pool.uuid, () => pool.native.grow(deviceBytes));
      await this.#look();
      return {};
    }
    if (order.leave_pool) {
      const pool = this.#pool(order.pool_uuid);
      if (pool !== undefined && !pool.dead) await this.#checkPage(pool, order);
      await this.#leave(order.pool_uuid, order.leave_pool.generation);
      return {};
    }
    return this.#runSnapshots(order);
  }

  /**
   * Sent again, it is not done again: it names slabs that may have been given to others since it was answered. This process remembers;
   * what another had queued is gone with it.
   */
  async #merge(order: Order__Output, merge: MergeLayers__Output): Promise<OrderResult> {
    const { victims, head, skip_above_permille, max_blocks, generation, sequence } = merge;
    if (!head)
      throw new HoldfastError('INVALID_ARGUMENT', 'The order to merge names no layer to merge into.');
    const pool = this.#hostedAs(order, generation);
    await this.#checkPage(pool, order);
    const key = `${pool.uuid}/${sequence}`;
    const report = await this.#jobs.run(pool.uuid, () => {
      const known = this.#merges.get(key);
      if (known !== undefined) return known;
      const done = pool.native.mergeLayers(
        victims.map(layerFromWire),
        layerFromWire(head),
        skip_above_permille,
        BigInt(max_blocks),
      );
      this.#merges.set(key, done);
      done.catch((error: unknown) => {
        if (askedAgain.includes(nativeCode(error) ?? '')) this.#merges.delete(key);
      });
      const [oldest] = this.#merges.keys();
      if (this.#merges.size > mergesKept && oldest !== undefined) this.#merges.delete(oldest);
      return done;
    });
    return {
      merge: {
        moved_blocks: report.movedBlocks.toString(),
        complete: report.complete,
        no_space: report.noSpace,
        spare: report.spare.map(runToWire),
      },
    };
  }

  async #runSnapshots(order: Order__Output): Promise<OrderResult> {
    if (order.hold_volumes) {
      await this.#cuts.hold(order.hold_volumes);
      return {};
    }
    if (order.release_volumes) {
      this.#cuts.release(order.release_volumes.cut_id);
      return {};
    }
    if (order.cut_volumes) {
      const pool = this.#hosted(order);
      await this.#checkPage(pool, order);
      return { cut: await this.#cuts.cut(pool, order.cut_volumes) };
    }
    if (order.forget_slabs) {
      const { volume_uuid, epoch, slabs, layers } = order.forget_slabs;
      await this.#volumes.forget(volume_uuid, BigInt(epoch), slabs.map(runFromWire), layers.map(BigInt));
      return {};
    }
    if (order.learn_layer) {
      const { volume_uuid, epoch, layer } = order.learn_layer;
      if (!layer) throw new HoldfastError('INVALID_ARGUMENT', 'The order to learn a layer names none.');
      await this.#volumes.learn(volume_uuid, BigInt(epoch), layerFromWire(layer));
      return {};
    }
    if (order.merge_layers) return await this.#merge(order, order.merge_layers);
    if (order.strip_layers) {
      const pool = this.#hostedAs(order, order.strip_layers.generation);
      await this.#checkPage(pool, order);
      const { victims, covers } = order.strip_layers;
      const report = await this.#jobs.run(pool.uuid, () =>
        pool.native.stripLayers(victims.map(layerFromWire), covers.map(layerFromWire)),
      );
      return {
        strip: {
          emptied: report.emptied.map(runToWire),
          cleared_blocks: report.clearedBlocks.toString(),
          uses: report.uses.map((use) => ({
            layer_id: use.layerId.toString(),
            live_blocks: use.liveBlocks.toString(),
            slabs: use.slabs.toString(),
          })),
        },
      };
    }
    if (order.compact_volume) {
      const compact = order.compact_volume;
      const pool = this.#hostedAs(order, compact.generation);
      await this.#checkPage(pool, order);
      // Among the jobs, though it does not touch others' pages: one after the other leaves more of the disk to volumes.
      const result = await this.#jobs.run(pool.uuid, () =>
        compact.grant
          ? this.#volumes.compactClosed(pool, compact, compact.grant)
          : this.#volumes.compactOpen(compact),
      );
      return { compact: result };
    }
    if (order.wipe_layers) {
      const pool = this.#hostedAs(order, order.wipe_layers.generation);
      await this.#checkPage(pool, order);
      const { layers, tombstone } = order.wipe_layers;
      await this.#jobs.run(pool.uuid, () => pool.native.wipeLayers(layers.map(layerFromWire), tombstone));
      return {};
    }
    if (order.read_changes) {
      const { target, size_bytes, starting_offset, max_ranges } = order.read_changes;
      const { ranges, nextOffset } = await this.#hosted(order).native.readChanges(
        target.map(layerFromWire),
        BigInt(size_bytes),
        BigInt(starting_offset),
        max_ranges,
      );
      return {
        changes: {
          ranges: ranges.map(({ offset, length }) => ({
            offset: offset.toString(),
            length: length.toString(),
          })),
          next_offset: nextOffset.toString(),
        },
      };
    }
    throw new HoldfastError(
      'UNIMPLEMENTED',
      `This agent does not know the order "${order.order ?? 'none'}". Upgrade it.`,
    );
  }
}
