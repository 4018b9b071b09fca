/**
 * The volumes that are open on this node: staging, exporting, closing, growing, revoking. One operation at a time for each.
 *
 * A volume's life here: a grant from the metadata service (StageVolume) → opened and exported by the engine → told
 * (VolumeOpened) → … → closed on disk → returned. A revoked one keeps its device, answering EIO, until whoever mounted it
 * has let go; then the device is detached and the volume can be opened again under a new grant.
 */
import { HoldfastError, type Logger } from '@holdfast/common';
import type { CompactReport, LayerSpec, OpenVolume, SlabRun, VolumeSpec } from '@holdfast/native';
import type {
  ClaimedSlab,
  CompactResult,
  CompactVolume__Output,
  Grant__Output,
  HeldVolume,
  OpenVolumeInfo,
  OpenVolumeResponse,
  RevokeResult,
  SlabRun__Output,
  VolumeCut__Output,
  VolumeCutResult,
} from '@holdfast/proto';
import { Backoff } from './backoff.ts';
import {
  fromNativeError,
  isTransient,
  layerFromWire,
  messageOf,
  nativeCode,
  runFromWire,
  slabsOf,
  specFromGrant,
} from './convert.ts';
import { claimedToWire, type HostedPool, type Slab } from './hosted-pool.ts';
import { KeyedLock } from './locks.ts';
import type { PendingReturn, PendingReturns } from './pending-returns.ts';
import type { MetadataConnection } from './service.ts';

/** How long a close waits for the service before it leaves the return for later. */
const returnWaitMs = 5000;
const awayWaitMs = 300;
/** How long the answer to a revocation waits until earlier claims are in the service's books. */
const reportWaitMs = 8000;
/**
 * How long one attempt at a grant waits in the volume's turn, and all of them. The service may first want the closed volume cut or
 * compacted, by an order to this very agent, which needs the turn.
 */
const grantTurnMs = 1000;
const grantWaitMs = 30_000;
/** Between attempts to tell the service that a volume is open. */
const tellFirstMs = 500;
const tellMostMs = 10_000;

export interface LocalVolume {
  uuid: string;
  pool: HostedPool;
  native: OpenVolume;
  /** These of its spec never change. Reading `native.spec` makes a new copy of all of it, with every slab. */
  volumeId: bigint;
  epoch: bigint;
  readOnly: boolean;
  /** Unknown for a volume that was taken over from a dead agent. */
  publishId: string | undefined;
  revoked: boolean;
  reason: string;
  /** The layer that takes writes: another one after each cut. */
  top: bigint;
  /** All slabs of the top layer, by number; while a cut is under way, those of the layer that freezes too. */
  claimed: Map<bigint, Slab>;
}

/** Open here, and the service could not be told so. */
interface Untold {
  volume: LocalVolume;
  backoff: Backoff;
  notBeforeMs: number;
  telling: boolean;
}

/** Something has to end before the service gives the grant. */
class NoGrantYet extends Error {
  readonly reason: HoldfastError;
  constructor(reason: HoldfastError) {
    super(reason.message);
    this.reason = reason;
  }
}

/** Not open here. In answer to a revocation: and never again under this epoch or an older one. */
export class UnknownVolume extends Error {
  readonly code = 'UNKNOWN_VOLUME';
}

export class Volumes {
  readonly #open = new Map<string, LocalVolume>();
  /** Granted, not open yet: part of what this node holds. */
  readonly #opening = new Map<string, { pool: HostedPool; epoch: bigint }>();
  readonly #untold = new Map<string, Untold>();
  /** Open without a device, for as long as it takes to compact them. */
  readonly #maintained = new Map<string, LocalVolume>();
  /** A grant at or below this epoch was revoked here: its late answer must not open the volume. */
  readonly #revokedEpochs = new Map<string, bigint>();
  readonly #locks = new KeyedLock();
  readonly #service: MetadataConnection;
  readonly #returns: PendingReturns;
  readonly #logger: Logger;
  readonly #maxVolumes: number;
  readonly #nodeId: string;
  readonly #onFreed: () => void;
  #sending: Promise<void> | undefined;

  constructor(options: {
    service: MetadataConnection;
    returns: PendingReturns;
    logger: Logger;
    maxVolumes: number;
    nodeId: string;
    /** A device was taken away: a fenced pool may be free to be joined again. */
    onFreed: () => void;
  }) {
    this.#service = options.service;
    this.#returns = options.returns;
    this.#logger = options.logger;
    this.#maxVolumes = options.maxVolumes;
    this.#nodeId = options.nodeId;
    this.#onFreed = options.onFreed;
  }

  /** Resolves when no operation is under way; what may take long is ended early. */
  idle(): Promise<void> {
    for (const uuid of this.#maintained.keys()) this.#endMaintenance(uuid);
    return this.#locks.idle();
  }

  /** Volumes of a pool that are open or being opened here, dead devices included. */
  countOf(pool: HostedPool): number {
    let count = 0;
    for (const volume of this.#open.values()) if (volume.pool === pool) count += 1;
    for (const opening of this.#opening.values()) if (opening.pool === pool) count += 1;
    return count;
  }

  // ------------------------------------------------------------------------------------------ take-over

  #remember(pool: HostedPool, native: OpenVolume, publishId: string | undefined): LocalVolume {
    const volume = this.#localVolume(pool, native, publishId);
    this.#open.set(volume.uuid, volume);
    return volume;
  }

  #localVolume(pool: HostedPool, native: OpenVolume, publishId: string | undefined): LocalVolume {
    const { uuid, volumeId, epoch, readOnly, layers } = native.spec;
    const top = layers[0];
    const claimed = new Map<bigint, Slab>();
    // A reader claims nothing, and what it still maps may be somebody else's by now.
    if (top !== undefined && !readOnly) {
      for (const { slab, generation } of slabsOf(top.slabs)) {
        claimed.set(slab, { volumeId, layerId: top.layerId, slab, generation });
      }
    }
    return {
      uuid,
      pool,
      native,
      volumeId,
      epoch,
      readOnly,
      publishId,
      revoked: false,
      reason: '',
      top: top?.layerId ?? 0n,
      claimed,
    };
  }

  /** What the engine took over from a dead agent. */
  adopt(pool: HostedPool): void {
    for (const native of pool.native.volumes()) {
      const volume = this.#remember(pool, native, undefined);
      this.#logger.info(
        { volume: volume.uuid, epoch: volume.epoch.toString(), device: native.export.devicePath },
        'Took over an open volume',
      );
    }
  }

  /** After the pools were adopted: half-done closes of the agent's earlier life. */
  async settleReturns(pools: readonly HostedPool[]): Promise<void> {
    for (const entry of this.#returns.list()) {
      if (entry.state === 'closed') continue;
      const pool = pools.find((p) => p.uuid === entry.poolUuid && p.host.generation === entry.generation);
      const open = this.#open.get(entry.volumeUuid);
      if (pool === undefined || open?.epoch.toString() === entry.epoch) {
        this.#returns.remove(entry); // still open here, or the generation it was open under is over
        continue;
      }
      if (entry.state === 'maintained') {
        await this.#settleMaintained(pool, entry).catch((error: unknown) =>
          this.#logger.warn(
            `The slabs that ${entry.volumeUuid} may have claimed cannot be read: ${messageOf(error)}`,
          ),
        );
        continue;
      }
      if (entry.readOnly === true) {
        // A reader leaves no mark on the disk; not taken over means not open, and its engine's I/O is dead.
        this.#returns.put({ ...entry, state: 'closed' });
        continue;
      }
      const record = await pool.native.readVolumeRecord(entry.slot).catch((error: unknown) => {
        this.#logger.warn(`The record of ${entry.volumeUuid} cannot be read: ${messageOf(error)}`);
        return undefined;
      });
      const closed = record?.state === 'closed' && record.uuid === entry.volumeUuid;
      if (closed && record.epoch.toString() === entry.epoch) this.#returns.put({ ...entry, state: 'closed' });
      else this.#returns.remove(entry);
    }
  }

  // ------------------------------------------------------------------------------------------ events of the engine

  #byVolumeId(pool: HostedPool, volumeId: bigint): LocalVolume | undefined {
    for (const volume of [...this.#open.values(), ...this.#maintained.values()]) {
      if (volume.pool === pool && volume.volumeId === volumeId) return volume;
    }
    return undefined;
  }

  slabClaimed(pool: HostedPool, slab: Slab): void {
    const volume = this.#byVolumeId(pool, slab.volumeId);
    // News of a layer that has frozen meanwhile: its slabs were in the cut's answer. Ids of layers only grow.
    if (volume !== undefined && slab.layerId >= volume.top) volume.claimed.set(slab.slab, slab);
    pool.slabClaimed(slab);
  }

  slabEmptied(pool: HostedPool, slab: Slab): void {
    this.#byVolumeId(pool, slab.volumeId)?.claimed.delete(slab.slab);
    pool.slabEmptied(slab);
  }

  volumeEvent(pool: HostedPool, volumeId: bigint, code: string, message: string): void {
    const volume = this.#byVolumeId(pool, volumeId);
    if (volume !== undefined) volume.reason = message;
    this.#logger.error({ volume: volume?.uuid ?? volumeId.toString(), code }, message);
    if (volume === undefined) return;
    this.#service.send({
      volume_event: { host: pool.host, volume_uuid: volume.uuid, code, message },
    });
  }

  // ------------------------------------------------------------------------------------------ what is held

  held(pool: HostedPool): HeldVolume[] {
    const held: HeldVolume[] = [];
    for (const volume of [...this.#open.values(), ...this.#maintained.values()]) {
      if (volume.pool !== pool || volume.revoked) continue;
      const claimed: ClaimedSlab[] = [...volume.claimed.values()].map(claimedToWire);
      held.push({ volume_uuid: volume.uuid, epoch: volume.epoch.toString(), claimed });
    }
    for (const [uuid, opening] of this.#opening) {
      if (opening.pool === pool && !this.#maintained.has(uuid))
        held.push({ volume_uuid: uuid, epoch: opening.epoch.toString(), claimed: [] });
    }
    return held;
  }

  #info(volume: LocalVolume): OpenVolumeInfo {
    const stats = volume.native.stats();
    const lease = volume.pool.lease;
    let state = 'open';
    let reason = volume.reason === '' ? volume.native.export.reason : volume.reason;
    if (volume.revoked) {
      state = 'revoked';
      reason = 'The grant was revoked: the device answers EIO until it is unmounted and taken away.';
    } else if (volume.pool.dead) {
      state = 'fenced';
      reason =
        lease.message === '' ? 'This node is fenced on the pool: the device answers EIO.' : lease.message;
    } else if (lease.state === 'held') {
      state = 'held';
      reason =
        lease.message === ''
          ? 'The lease could not be renewed: I/O waits until the disk is back.'
          : lease.message;
    }
    return {
      volume_uuid: volume.uuid,
      pool_uuid: volume.pool.uuid,
      device_path: volume.native.export.devicePath,
      size_bytes: stats.sizeBytes.toString(),
      epoch: volume.epoch.toString(),
      frontend: volume.native.export.frontend,
      state,
      reason,
      allocated_bytes: stats.allocatedBytes.toString(),
      mapped_bytes: stats.mappedBytes.toString(),
      memory_bytes: stats.memoryBytes.toString(),
    };
  }

  get(uuid: string): OpenVolumeInfo {
    const volume = this.#open.get(uuid);
    if (volume === undefined) {
      throw new HoldfastError('NOT_FOUND', `Volume ${uuid} is not open on this node. Stage it first.`);
    }
    return this.#info(volume);
  }

  list(): OpenVolumeInfo[] {
    return [...this.#open.values()].map((volume) => this.#info(volume));
  }

  // ------------------------------------------------------------------------------------------ opening

  async open(
    pool: HostedPool | undefined,
    request: { poolUuid: string; volumeUuid: string; publishId: string; readOnly: boolean },
  ): Promise<OpenVolumeResponse> {
    const key = `volume ${request.volumeUuid}`;
    const turn = (): Promise<OpenVolumeResponse> => this.#openLocked(pool, request);
    const until = performance.now() + grantWaitMs;
    try {
      for (let first = true; ; first = false) {
        try {
          return await (first ? this.#locks.tryRun(key, turn) : this.#locks.run(key, turn));
        } catch (error) {
          if (!(error instanceof NoGrantYet)) throw error;
          if (performance.now() >= until) throw error.reason;
        }
      }
    } catch (error) {
      throw fromNativeError(error);
    }
  }

  #answer(volume: LocalVolume): OpenVolumeResponse {
    return {
      device_path: volume.native.export.devicePath,
      size_bytes: volume.native.stats().sizeBytes.toString(),
      epoch: volume.epoch.toString(),
      frontend: volume.native.export.frontend,
    };
  }

  async #openLocked(
    pool: HostedPool | undefined,
    request: { poolUuid: string; volumeUuid: string; publishId: string; readOnly: boolean },
  ): Promise<OpenVolumeResponse> {
    const uuid = request.volumeUuid;
    let local = this.#open.get(uuid);
    if (local !== undefined && (local.revoked || local.pool.dead)) {
      await this.#detach(local);
      local = undefined;
    }
    if (local !== undefined && local.publishId === request.publishId) return this.#answer(local);

    const host = local?.pool ?? pool;
    if (host === undefined || !host.ready || host.dead) {
      throw new HoldfastError(
        'UNAVAILABLE',
        `This node is not a host on pool ${request.poolUuid}${host === undefined ? '' : `: ${host.lease.message || host.lease.state}`}. Check that the disk is attached here; it is joined by itself. \`holdfast node show\` tells more.`,
      );
    }
    if (local === undefined && this.#open.size + this.#opening.size >= this.#maxVolumes) {
      throw new HoldfastError(
        'TOO_MANY',
        `This node has ${this.#open.size} volumes open, and its limit is ${this.#maxVolumes}. Unstage one, or raise --max-volumes.`,
      );
    }
    let grant: Grant__Output;
    try {
      const asked = {
        host: host.host,
        volume_uuid: uuid,
        publish_id: request.publishId,
        read_only: request.readOnly,
      };
      grant = await this.#service.stageVolume(asked, local === undefined ? grantTurnMs : undefined);
    } catch (error) {
      if (local === undefined && error instanceof HoldfastError && error.code === 'DEADLINE_EXCEEDED') {
        throw new NoGrantYet(error);
      }
      // Taken over with the service away: the grant stands on disk and nothing has revoked it.
      if (local !== undefined && local.publishId === undefined && isTransient(error))
        return this.#answer(local);
      throw error;
    }
    const epoch = BigInt(grant.epoch);
    if (local !== undefined) {
      if (local.epoch === epoch) {
        local.publishId = request.publishId;
        return this.#answer(local);
      }
      throw new HoldfastError(
        'STALE',
        `Volume ${uuid} is open here under epoch ${local.epoch}, but its grant is ${epoch}. Unstage it, then stage it again.`,
      );
    }
    if (epoch <= (this.#revokedEpochs.get(uuid) ?? -1n)) {
      throw new HoldfastError(
        'STALE',
        `The grant of volume ${uuid} (epoch ${epoch}) was revoked. Publish it again.`,
      );
    }
    return this.#openGranted(host, grant, request.publishId);
  }

  async #openGranted(pool: HostedPool, grant: Grant__Output, publishId: string): Promise<OpenVolumeResponse> {
    const spec = specFromGrant(grant);
    const uuid = spec.uuid;
    const where = { volume: uuid, epoch: spec.epoch.toString() };
    this.#opening.set(uuid, { pool, epoch: spec.epoch });
    pool.warmUp();
    let volume: LocalVolume;
    try {
      const native = await pool.native.openVolume(spec);
      volume = this.#remember(pool, native, publishId);
    } catch (error) {
      this.#opening.delete(uuid);
      this.#logger.error({ ...where, err: error }, `Volume ${uuid} cannot be opened: ${messageOf(error)}`);
      // Nothing is open and nothing is in flight: the grant goes back, so that the next stage gets a newer epoch.
      this.#giveBack(pool, spec);
      throw error;
    }
    this.#opening.delete(uuid);
    this.#logger.info({ ...where, device: volume.native.export.devicePath }, 'Opened a volume');
    try {
      await this.#tellOpened(volume);
    } catch (error) {
      if (!isTransient(error)) {
        this.#logger.warn(where, `The metadata service refused the opening: ${messageOf(error)}`);
        await volume.native.revoke();
        volume.revoked = true;
        await this.#detach(volume);
        throw error;
      }
      // Offered or open is the same right. But until the service knows, it cuts no snapshot of it.
      const backoff = new Backoff(tellFirstMs, tellMostMs);
      const notBeforeMs = performance.now() + backoff.next();
      this.#untold.set(uuid, { volume, backoff, notBeforeMs, telling: false });
    }
    return this.#answer(volume);
  }

  #tellOpened({ pool, uuid, epoch }: LocalVolume): Promise<void> {
    return this.#service.volumeOpened({ host: pool.host, volume_uuid: uuid, epoch: epoch.toString() });
  }

  /** Tells again what is open and could not be told, in the background, when it is time. */
  tellOpened(): void {
    for (const [uuid, untold] of this.#untold) {
      const { volume } = untold;
      if (this.#open.get(uuid) !== volume || volume.revoked || volume.pool.dead) this.#untold.delete(uuid);
      else if (!untold.telling && performance.now() >= untold.notBeforeMs) void this.#tellAgain(untold);
    }
  }

  async #tellAgain(untold: Untold): Promise<void> {
    const { volume } = untold;
    const where = { volume: volume.uuid, epoch: volume.epoch.toString() };
    untold.telling = true;
    try {
      await this.#tellOpened(volume);
      this.#logger.info(where, 'The metadata service knows now that the volume is open');
    } catch (error) {
      if (isTransient(error)) {
        untold.notBeforeMs = performance.now() + untold.backoff.next();
        return;
      }
      // The grant is over, or being taken back: that it is has an order of its own, and by now the volume may be mounted.
      this.#logger.warn(where, `The metadata service refused the opening: ${messageOf(error)}`);
    } finally {
      untold.telling = false;
    }
    if (this.#untold.get(volume.uuid) === untold) this.#untold.delete(volume.uuid);
  }

  /** The service has heard a Hello, which names all that is open. */
  helloHeard(): void {
    this.#untold.clear();
  }

  // ------------------------------------------------------------------------------------------ closing

  close(uuid: string): Promise<void> {
    return this.#locks.tryRun(`volume ${uuid}`, async () => {
      const volume = this.#open.get(uuid);
      if (volume === undefined) {
        if (this.#returns.has(uuid)) await this.#flushReturns(returnWaitMs);
        return;
      }
      try {
        if (volume.revoked || volume.pool.dead) await this.#detach(volume);
        else await this.#closeAndReturn(volume);
      } catch (error) {
        if (nativeCode(error) === 'HF_BUSY') {
          throw new HoldfastError(
            'IN_USE',
            `Volume ${uuid} is still in use on this node (${volume.native.export.devicePath} is mounted or held open): ${messageOf(error)}`,
            { cause: error },
          );
        }
        throw fromNativeError(error);
      }
    });
  }

  #pendingReturn(
    pool: HostedPool,
    spec: VolumeSpec,
    claimed: readonly Slab[],
    state: PendingReturn['state'] = 'closing',
  ): PendingReturn {
    return {
      volumeUuid: spec.uuid,
      poolUuid: pool.uuid,
      hostId: pool.native.hostId,
      generation: pool.host.generation,
      epoch: spec.epoch.toString(),
      slot: spec.slot,
      state,
      claimed: claimed.map(claimedToWire),
      ...(spec.readOnly ? { readOnly: true } : {}),
    };
  }

  /** A grant under which nothing is open and nothing in flight. */
  #giveBack(pool: HostedPool, spec: VolumeSpec): void {
    this.#returns.put(this.#pendingReturn(pool, spec, [], 'closed'));
    this.sendReturns();
  }

  async #closeAndReturn(volume: LocalVolume): Promise<void> {
    const { pool, uuid, native, volumeId, epoch } = volume;
    const describe = (): PendingReturn => this.#pendingReturn(pool, native.spec, pool.unreported(volumeId));
    const closing = describe();
    this.#returns.put(closing);
    try {
      await native.close();
    } catch (error) {
      this.#returns.remove(closing);
      throw error;
    }
    this.#returns.put({ ...describe(), state: 'closed' });
    pool.forgetClaims(volumeId);
    this.#open.delete(uuid);
    this.#logger.info({ volume: uuid, epoch: epoch.toString() }, 'Closed a volume');
    // With the service away the return waits in its file: whoever unmounts is not kept.
    await this.#flushReturns(this.#service.connected ? returnWaitMs : awayWaitMs);
    this.#onFreed();
  }

  async #detach(volume: LocalVolume): Promise<void> {
    try {
      await volume.native.detach();
    } catch (error) {
      if (nativeCode(error) !== 'HF_BUSY') throw error;
      throw new HoldfastError(
        'IN_USE',
        `Volume ${volume.uuid} was fenced, and its dead device ${volume.native.export.devicePath} is still mounted or held open. Unmount it, then repeat: ${messageOf(error)}`,
        { cause: error },
      );
    }
    // A dead generation's slabs are read from their pages; nobody listens to its reports any more.
    if (volume.pool.dead) volume.pool.forgetClaims(volume.volumeId);
    this.#open.delete(volume.uuid);
    this.#logger.info({ volume: volume.uuid }, 'Took the device of a fenced volume away');
    this.#onFreed();
  }

  // ------------------------------------------------------------------------------------------ returns

  /** Sends what waits, in the background. */
  sendReturns(): void {
    if (this.#sending !== undefined || this.#returns.list().length === 0) return;
    this.#sending = this.#sendAll().finally(() => {
      this.#sending = undefined;
    });
  }

  async #flushReturns(timeoutMs: number): Promise<void> {
    if (this.#sending !== undefined) await this.#sending;
    this.sendReturns();
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, timeoutMs);
    });
    await Promise.race([this.#sending ?? Promise.resolve(), late]);
    clearTimeout(timer);
  }

  async #sendAll(): Promise<void> {
    for (const entry of this.#returns.list()) {
      if (entry.state !== 'closed') continue;
      const host = {
        pool_uuid: entry.poolUuid,
        node_id: this.#nodeId,
        host_id: entry.hostId,
        generation: entry.generation,
      };
      try {
        await this.#service.returnVolume({
          host,
          volume_uuid: entry.volumeUuid,
          epoch: entry.epoch,
          claimed: entry.claimed,
        });
      } catch (error) {
        if (isTransient(error)) {
          this.#logger.info(
            `The return of ${entry.volumeUuid} waits for the metadata service: ${messageOf(error)}`,
          );
          return;
        }
        this.#logger.warn(`The return of ${entry.volumeUuid} is not needed any more: ${messageOf(error)}`);
      }
      this.#returns.remove(entry);
    }
  }

  // ------------------------------------------------------------------------------------------ growing

  resize(uuid: string, atLeastBytes: bigint): Promise<bigint> {
    return this.#locks.tryRun(`volume ${uuid}`, async () => {
      const volume = this.#open.get(uuid);
      if (volume === undefined) {
        throw new HoldfastError('NOT_FOUND', `Volume ${uuid} is not open on this node. Stage it first.`);
      }
      const now = volume.native.stats().sizeBytes;
      if (atLeastBytes !== 0n && now >= atLeastBytes) return now;
      if (volume.readOnly) {
        throw new HoldfastError(
          'FAILED_PRECONDITION',
          `Volume ${uuid} is open read-only on this node and can't take a new size. It has it when it is staged again.`,
        );
      }
      const size = BigInt((await this.#service.getVolume(uuid)).size_bytes);
      if (size < atLeastBytes) {
        throw new HoldfastError(
          'OUT_OF_RANGE',
          `Volume ${uuid} has ${size} bytes, fewer than the ${atLeastBytes} asked for. Expand it at the controller first.`,
        );
      }
      await this.#grow(volume, size);
      return volume.native.stats().sizeBytes;
    });
  }

  /** The stream said that the volume is larger now. */
  resized(uuid: string, sizeBytes: bigint): void {
    const grown = this.#locks.run(`volume ${uuid}`, async () => {
      const volume = this.#open.get(uuid);
      if (volume === undefined || volume.revoked || volume.pool.dead) return;
      if (!volume.readOnly) await this.#grow(volume, sizeBytes);
    });
    grown.catch((error: unknown) =>
      this.#logger.warn(`Volume ${uuid} could not grow: ${messageOf(error)}. NodeExpandVolume tries again.`),
    );
  }

  async #grow(volume: LocalVolume, sizeBytes: bigint): Promise<void> {
    if (volume.native.stats().sizeBytes >= sizeBytes) return;
    try {
      await volume.native.grow(sizeBytes);
    } catch (error) {
      throw fromNativeError(error);
    }
    this.#logger.info({ volume: volume.uuid, sizeBytes: sizeBytes.toString() }, 'A volume grew');
  }

  // ------------------------------------------------------------------------------------------ revoking

  /** An order: after it this node issues no more I/O under `epoch`, and never opens under it. */
  revoke(pool: HostedPool | undefined, uuid: string, epoch: bigint): Promise<RevokeResult> {
    const already = this.#revokedEpochs.get(uuid) ?? -1n;
    if (epoch > already) this.#revokedEpochs.set(uuid, epoch);
    if ((this.#maintained.get(uuid)?.epoch ?? epoch + 1n) <= epoch) this.#endMaintenance(uuid);
    return this.#locks.run(`volume ${uuid}`, async () => {
      const volume = this.#open.get(uuid);
      if (volume === undefined) return await this.#revokeUnknown(pool, uuid, epoch);
      if (volume.epoch > epoch) {
        throw new HoldfastError(
          'STALE',
          `Volume ${uuid} is open here under epoch ${volume.epoch}, not ${epoch}.`,
        );
      }
      if (!volume.revoked) {
        await volume.native.revoke();
        volume.revoked = true;
        this.#logger.warn(
          { volume: uuid, epoch: epoch.toString(), device: volume.native.export.devicePath },
          'A volume was revoked: its device answers EIO from now on',
        );
      }
      const claimed = volume.pool.unreported(volume.volumeId).map(claimedToWire);
      return { epoch: epoch.toString(), was_open: true, claimed };
    });
  }

  /**
   * Not open here. The next holder is told only of slabs that the service knows, so whatever this volume claimed before it
   * was closed or detached must be known before the answer frees the grant.
   */
  async #revokeUnknown(pool: HostedPool | undefined, uuid: string, epoch: bigint): Promise<RevokeResult> {
    const find = (): PendingReturn | undefined =>
      this.#returns.list().find((e) => e.volumeUuid === uuid && e.epoch === epoch.toString());
    const unsettled = find();
    if (unsettled?.state === 'maintained' && pool !== undefined)
      await this.#settleMaintained(pool, unsettled);
    const entry = find();
    if (entry !== undefined) return { epoch: epoch.toString(), was_open: true, claimed: entry.claimed };
    if (pool !== undefined && !pool.dead && !(await pool.reported(reportWaitMs))) {
      throw new HoldfastError(
        'UNAVAILABLE',
        `Volume ${uuid} is not open here, but slabs of this pool are still being reported. Repeat the order.`,
      );
    }
    throw new UnknownVolume(
      `Volume ${uuid} is not open on this node, and will not be opened here under epoch ${epoch} or an older one.`,
    );
  }

  // ------------------------------------------------------------------------------------------ snapshots

  /** @throws UNKNOWN_VOLUME when it is not open here, STALE when it is open under another epoch or was taken away. */
  opened(uuid: string, epoch: bigint): LocalVolume {
    const volume = this.#open.get(uuid);
    if (volume === undefined) throw new UnknownVolume(`Volume ${uuid} is not open on this node.`);
    if (volume.epoch !== epoch || volume.revoked || volume.pool.dead) {
      throw new HoldfastError(
        'STALE',
        `Volume ${uuid} is open here under epoch ${volume.epoch}${volume.revoked || volume.pool.dead ? ', and was taken away' : ''}; the order is for epoch ${epoch}.`,
      );
    }
    return volume;
  }

  /** Runs in the volume's turn. */
  withOpen<T>(uuid: string, epoch: bigint, body: (volume: LocalVolume) => Promise<T>): Promise<T> {
    return this.#locks.run(`volume ${uuid}`, () => {
      const volume = this.opened(uuid, epoch);
      return body(volume);
    });
  }

  /** Whether an open volume has this layer on top already. */
  isCut(uuid: string, top: bigint): boolean {
    return this.#open.get(uuid)?.top === top;
  }

  cutOpen(cut: VolumeCut__Output, timeoutMs: number): Promise<VolumeCutResult> {
    return this.withOpen(cut.volume_uuid, BigInt(cut.epoch), async (volume) => {
      const top = topOf(cut);
      const report = await volume.native.cut(top, snapshotOf(cut), timeoutMs);
      volume.top = top.layerId;
      // What froze is in the answer; what is held from now on are the new top's slabs.
      for (const [number, slab] of volume.claimed) {
        if (slab.layerId !== top.layerId) volume.claimed.delete(number);
      }
      this.#logger.info(
        { volume: volume.uuid, top: cut.top?.layer_id, heldUs: report.heldMicroseconds },
        'Cut an open volume',
      );
      return cutResult(cut, volume.volumeId, report.frozen, report.heldMicroseconds);
    });
  }

  /**
   * Cuts a volume that nobody has open: opened under `grant` without a device, cut, closed. Nothing of it stays open here,
   * whatever happens. The answer returns the grant; where there is none, the agent returns it.
   */
  cutClosed(
    pool: HostedPool,
    cut: VolumeCut__Output,
    grant: Grant__Output,
    timeoutMs: number,
  ): Promise<VolumeCutResult> {
    const uuid = cut.volume_uuid;
    return this.#locks.run(`volume ${uuid}`, async () => {
      const granted = specFromGrant(grant);
      await this.#requireClosed(granted);
      const top = topOf(cut);
      const record = await pool.native.readVolumeRecord(granted.slot);
      const isCut = record?.uuid === uuid && record.topLayerId === top.layerId;
      const frozen = frozenOf(granted, top);
      if (isCut && record.epoch === granted.epoch && record.state === 'closed') {
        // Done under this very grant; only the answer was lost. Nothing was written in between.
        return { ...cutResult(cut, granted.volumeId, frozen, 0), epoch: granted.epoch.toString() };
      }
      // Cut before, and closed by nobody or under an older grant: the record is right, the grant's chain is a step behind.
      const behind = isCut && granted.layers[0]?.layerId !== top.layerId;
      const spec: VolumeSpec = behind
        ? { ...granted, layers: [top, { ...frozen, frozen: true }, ...granted.layers.slice(1)] }
        : granted;
      this.#opening.set(uuid, { pool, epoch: spec.epoch });
      try {
        const result = await this.#cutWithoutDevice(pool, spec, cut, top, timeoutMs);
        this.#logger.info({ volume: uuid, top: cut.top?.layer_id }, 'Cut a closed volume');
        return { ...result, epoch: spec.epoch.toString() };
      } catch (error) {
        if (this.#open.get(uuid) === undefined) this.#giveBack(pool, spec);
        throw error;
      } finally {
        this.#opening.delete(uuid);
        this.#onFreed();
      }
    });
  }

  /** What a maintenance grant is for. */
  async #requireClosed(granted: VolumeSpec): Promise<void> {
    const { uuid, epoch } = granted;
    const local = this.#open.get(uuid);
    if (local !== undefined && !local.revoked && !local.pool.dead) {
      throw new HoldfastError(
        'STALE',
        `Volume ${uuid} is open here under epoch ${local.epoch}; nothing can be done to it as a closed one under epoch ${epoch}.`,
      );
    }
    if (epoch <= (this.#revokedEpochs.get(uuid) ?? -1n)) {
      throw new HoldfastError('STALE', `The grant of volume ${uuid} (epoch ${epoch}) was revoked.`);
    }
    if (local !== undefined) await this.#detach(local);
  }

  async #cutWithoutDevice(
    pool: HostedPool,
    spec: VolumeSpec,
    cut: VolumeCut__Output,
    top: LayerSpec,
    timeoutMs: number,
  ): Promise<VolumeCutResult> {
    const native = await pool.native.openVolume(spec, { device: false });
    let result: VolumeCutResult;
    try {
      const report = await native.cut(top, snapshotOf(cut), timeoutMs);
      result = cutResult(cut, spec.volumeId, report.frozen, report.heldMicroseconds);
    } catch (error) {
      await this.#closeWithoutDevice(pool, native);
      throw error;
    }
    await this.#closeWithoutDevice(pool, native);
    return result;
  }

  /** Closed politely, or else by force: a volume without a device has no user that could be harmed. */
  async #closeWithoutDevice(pool: HostedPool, native: OpenVolume): Promise<void> {
    try {
      await native.close();
      return;
    } catch (error) {
      this.#logger.warn(
        { volume: native.spec.uuid },
        `A volume that was opened without a device could not be closed (${messageOf(error)}); it is revoked.`,
      );
    }
    // What can't be closed by force either stays listed as open, so that a fence finds it.
    const volume = this.#remember(pool, native, undefined);
    await native.revoke();
    volume.revoked = true;
    await native.detach();
    this.#open.delete(volume.uuid);
  }

  /** Not in the volume's turn: a cut, a close and a revocation end it, and must not wait for it. */
  async compactOpen(order: CompactVolume__Output): Promise<CompactResult> {
    const volume = this.opened(order.volume_uuid, BigInt(order.epoch));
    return compactResult(order, await compactNative(volume.native, order));
  }

  /**
   * Compacts a volume that nobody has open, as cutClosed() cuts it. The answer returns the grant, so the slabs that were claimed
   * are in the service's books before it is given.
   */
  compactClosed(
    pool: HostedPool,
    order: CompactVolume__Output,
    grant: Grant__Output,
  ): Promise<CompactResult> {
    const uuid = order.volume_uuid;
    return this.#locks.run(`volume ${uuid}`, async () => {
      const spec = specFromGrant(grant);
      await this.#requireClosed(spec);
      const epoch = spec.epoch.toString();
      if (this.#returns.list().some((entry) => entry.volumeUuid === uuid && entry.epoch === epoch)) {
        throw new HoldfastError('STALE', `The grant of volume ${uuid} (epoch ${epoch}) is on its way back.`);
      }
      const record = await pool.native.readVolumeRecord(spec.slot);
      if (record?.uuid === uuid && record.epoch === spec.epoch && record.state === 'closed') {
        // Done under this very grant; only the answer was lost.
        await this.#requireReported(pool, spec);
        return { ...compactResult(order, { movedBlocks: 0n, complete: false, noSpace: false }), epoch };
      }
      this.#opening.set(uuid, { pool, epoch: spec.epoch });
      const maintained = this.#watchAhead(pool, spec);
      try {
        const result = await this.#compactWithoutDevice(pool, spec, order);
        await this.#requireReported(pool, spec);
        this.#logger.info({ volume: uuid, moved: result.moved_blocks }, 'Compacted a closed volume');
        this.#returns.remove(maintained.entry);
        return { ...result, epoch };
      } catch (error) {
        if (this.#open.get(uuid) === undefined) {
          this.#returns.put(this.#pendingReturn(pool, spec, pool.unreported(spec.volumeId), 'closed'));
          pool.forgetClaims(spec.volumeId);
          this.sendReturns();
        } else {
          this.#returns.remove(maintained.entry); // open, answering EIO: its revocation tells
        }
        throw error;
      } finally {
        maintained.end();
        this.#opening.delete(uuid);
        this.#onFreed();
      }
    });
  }

  async #compactWithoutDevice(
    pool: HostedPool,
    spec: VolumeSpec,
    order: CompactVolume__Output,
  ): Promise<CompactResult> {
    pool.warmUp();
    const native = await pool.native.openVolume(spec, { device: false });
    this.#maintained.set(spec.uuid, this.#localVolume(pool, native, undefined));
    try {
      // Revoked, or the agent stops: nothing was begun that could be ended.
      if (spec.epoch <= (this.#revokedEpochs.get(spec.uuid) ?? -1n)) this.#endMaintenance(spec.uuid);
      return compactResult(order, await compactNative(native, order));
    } finally {
      // Closed first, then no longer listed.
      await this.#closeWithoutDevice(pool, native).finally(() => this.#maintained.delete(spec.uuid));
    }
  }

  /** Closing ends what is under way in the engine; whoever waits for that does the rest. */
  #endMaintenance(uuid: string): void {
    this.#maintained
      .get(uuid)
      ?.native.close()
      .catch((error: unknown) => this.#logger.warn({ volume: uuid }, `Not closed yet: ${messageOf(error)}`));
  }

  async #requireReported(pool: HostedPool, spec: VolumeSpec): Promise<void> {
    if (await pool.reported(reportWaitMs, spec.volumeId)) return;
    throw new HoldfastError(
      'UNAVAILABLE',
      `Volume ${spec.uuid} was compacted, but the slabs that it claimed are not reported yet. Its grant goes back with them.`,
    );
  }

  /** Notes durably which slabs it may claim from now on, for a next life of the agent. */
  #watchAhead(pool: HostedPool, spec: VolumeSpec): { entry: PendingReturn; end: () => void } {
    const kept = ({ first, count, generation }: SlabRun): SlabRun__Output => ({
      first: first.toString(),
      count,
      generation: generation.toString(),
    });
    const ahead = pool.native.stock().map(kept);
    const entry: PendingReturn = {
      ...this.#pendingReturn(pool, spec, [], 'maintained'),
      maintained: {
        volumeId: spec.volumeId.toString(),
        topLayerId: (spec.layers[0]?.layerId ?? 0n).toString(),
        ahead,
      },
    };
    const watch = (runs: readonly SlabRun[]): void => {
      ahead.push(...runs.map(kept));
      this.#returns.put(entry);
    };
    this.#returns.put(entry);
    pool.aheadWatchers.add(watch);
    return { entry, end: () => pool.aheadWatchers.delete(watch) };
  }

  /** It was open without a device when an earlier life of this agent died: what it claimed goes back with its grant. */
  async #settleMaintained(pool: HostedPool, entry: PendingReturn): Promise<void> {
    if (entry.maintained === undefined) return;
    const { volumeId, topLayerId, ahead } = entry.maintained;
    const owners = await pool.native.scanSlabs(ahead.map(runFromWire));
    const taken = new Map(
      [...slabsOf(ahead.map(runFromWire))].map(({ slab, generation }) => [slab, generation]),
    );
    const claimed = owners
      .filter(
        (owner) => owner.layerId.toString() === topLayerId && taken.get(owner.slab) === owner.generation,
      )
      .map(({ slab, generation, layerId }) =>
        claimedToWire({ volumeId: BigInt(volumeId), layerId, slab, generation }),
      );
    this.#returns.put({ ...entry, state: 'closed', claimed });
    this.sendReturns();
  }

  /**
   * Slabs of frozen layers that newer layers cover and that are about to be freed, and layers that have left the chain. Resolves when no
   * request on this node can know a place in the slabs any more: not open here, or answering EIO with nothing in flight, is as good.
   */
  forget(uuid: string, epoch: bigint, slabs: SlabRun[], layers: bigint[]): Promise<void> {
    return this.#locks.run(`volume ${uuid}`, async () => {
      const volume = this.#open.get(uuid);
      if (volume === undefined || volume.epoch !== epoch || volume.revoked || volume.pool.dead) return;
      await volume.native.forget(slabs, layers);
    });
  }

  /**
   * Blocks of older layers were copied into a frozen one. Resolves when this node would show the same without the older ones: not open
   * here, or answering EIO, is as good.
   */
  learn(uuid: string, epoch: bigint, layer: LayerSpec): Promise<void> {
    return this.#locks.run(`volume ${uuid}`, async () => {
      const volume = this.#open.get(uuid);
      if (volume === undefined || volume.epoch !== epoch || volume.revoked || volume.pool.dead) return;
      await volume.native.learn(layer);
    });
  }
}

function compactNative(native: OpenVolume, order: CompactVolume__Output): Promise<CompactReport> {
  return native.compact(
    order.sources.map(layerFromWire).map(({ layerId, slabs }) => ({ layerId, slabs })),
    order.skip_above_permille,
    BigInt(order.max_blocks),
  );
}

function compactResult(order: CompactVolume__Output, report: CompactReport): CompactResult {
  return {
    volume_uuid: order.volume_uuid,
    moved_blocks: report.movedBlocks.toString(),
    complete: report.complete,
    no_space: report.noSpace,
  };
}

function topOf(cut: VolumeCut__Output): LayerSpec {
  if (!cut.top) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The order to cut volume ${cut.volume_uuid} names no new top layer.`,
    );
  }
  return layerFromWire(cut.top);
}

const snapshotOf = (cut: VolumeCut__Output): { name: string; unixMs: number } => ({
  name: cut.snapshot_name,
  unixMs: Number(cut.snapshot_unix_ms),
});

/** The layer that freezes under `top`, as the grant tells it. */
function frozenOf(spec: VolumeSpec, top: LayerSpec): LayerSpec {
  const frozen = spec.layers.find((layer) => layer.layerId === top.parentLayerId);
  if (frozen === undefined) {
    throw new HoldfastError(
      'STALE',
      `The grant of volume ${spec.uuid} does not have layer ${top.parentLayerId}, on which layer ${top.layerId} shall stand.`,
    );
  }
  return frozen;
}

function cutResult(
  cut: VolumeCut__Output,
  volumeId: bigint,
  frozen: LayerSpec,
  heldMicroseconds: number,
): VolumeCutResult {
  const claimed = [...slabsOf(frozen.slabs)].map(({ slab, generation }) =>
    claimedToWire({ volumeId, layerId: frozen.layerId, slab, generation }),
  );
  return {
    volume_uuid: cut.volume_uuid,
    size_bytes: frozen.sizeBytes.toString(),
    claimed,
    held_us: Math.round(heldMicroseconds).toString(),
  };
}
