/**
 * A pool that this node is a host on: the native pool, the host's name in messages, the slabs kept ahead, and the queue
 * of what the engine claimed and emptied until the metadata service has acknowledged it.
 *
 * Slabs ahead: none while no volume is open, `idleAhead` while one is, and twice as many each time the engine runs low,
 * up to `mostAhead`; what is too much for a quiet pool goes back. When the service is away the engine holds writes to new
 * places until slabs come; when the service has none left, the engine is told (declareFull).
 */
import type { Logger } from '@holdfast/common';
import type { LeaseState, Pool, SlabRun, Uuid } from '@holdfast/native';
import type { ClaimedSlab, HostRef__Output } from '@holdfast/proto';
import { Backoff, sleep } from './backoff.ts';
import { countSlabs, isTransient, messageOf, runFromWire, runToWire, slabsOf } from './convert.ts';
import type { FoundPool } from './devices.ts';
import type { MetadataConnection } from './service.ts';

export interface Slab {
  volumeId: bigint;
  layerId: bigint;
  slab: bigint;
  generation: bigint;
}

const idleAhead = 2;
const mostAhead = 64;
/** A report carries at most this many slabs, so that one call stays small. */
const reportLimit = 2000;
/**
 * Claims come in bursts; waiting this long makes one report of them. Nothing hurries: what is not reported yet travels with
 * a volume's return or revocation, and with the next Hello.
 */
const reportDelayMs = 250;
/** As many slabs are kept ahead as were claimed in this time: several round trips to a busy service. */
const aheadMs = 1500;
/** No claim for this long: the pool is quiet. */
const quietMs = 10_000;
/** How soon a full pool is asked again. */
const fullRetryMs = 2000;

export function claimedToWire(slab: Slab): ClaimedSlab {
  return {
    volume_id: slab.volumeId.toString(),
    layer_id: slab.layerId.toString(),
    slab: slab.slab.toString(),
    generation: slab.generation.toString(),
  };
}

export class HostedPool {
  /** Told of slabs before any volume can claim one of them. */
  readonly aheadWatchers = new Set<(runs: readonly SlabRun[]) => void>();
  readonly native: Pool;
  readonly found: FoundPool | undefined;
  readonly host: HostRef__Output;
  lease: { state: LeaseState; message: string };
  /** Set once PoolReady was acknowledged; a pool taken over from the keeper is ready. */
  ready: boolean;

  readonly #service: MetadataConnection;
  readonly #logger: Logger;
  readonly #openVolumes: () => number;
  #claims: Slab[] = [];
  #emptied: Slab[] = [];
  #toReturn: SlabRun[] = [];
  #target = 0;
  #wanted = 0;
  #lastClaim = 0;
  /** When slabs were claimed, the last `mostAhead` of them. */
  #claimTimes: number[] = [];
  /** Ends the pause before a report. */
  #hurry = new AbortController();
  #refilling: Promise<void> | undefined;
  #reporting: Promise<void> | undefined;
  #reportWaiters: (() => void)[] = [];
  #fullTimer: NodeJS.Timeout | undefined;
  readonly #stop = new AbortController();

  constructor(
    native: Pool,
    nodeId: string,
    options: {
      found?: FoundPool | undefined;
      service: MetadataConnection;
      logger: Logger;
      ready: boolean;
      /** Volumes of this pool that are open or being opened. */
      openVolumes: () => number;
    },
  ) {
    this.native = native;
    this.found = options.found;
    this.host = {
      pool_uuid: native.info.uuid,
      node_id: nodeId,
      host_id: native.hostId,
      generation: native.generation.toString(),
    };
    this.lease = { state: native.leaseState(), message: '' };
    this.ready = options.ready;
    this.#service = options.service;
    this.#logger = options.logger.child({
      pool: native.info.uuid,
      host: native.hostId,
      generation: this.host.generation,
    });
    this.#openVolumes = options.openVolumes;
  }

  get uuid(): Uuid {
    return this.native.info.uuid;
  }

  /** This generation is over: it never issues I/O again. */
  get dead(): boolean {
    return this.lease.state === 'fenced' || this.lease.state === 'stopped';
  }

  // ------------------------------------------------------------------------------------------ slabs ahead

  /** A volume is being opened: have some slabs ready for its first writes. */
  warmUp(): void {
    if (this.#target < idleAhead) this.#target = idleAhead;
    this.#refill();
  }

  slabsLow(wanted: number): void {
    this.#lastClaim = Date.now();
    this.#wanted = Math.max(this.#wanted, wanted);
    this.#target = Math.min(mostAhead, Math.max(this.#target * 2, wanted, idleAhead));
    this.#refill();
  }

  #refill(): void {
    if (this.#refilling !== undefined || this.#stop.signal.aborted || this.dead) return;
    const need = Math.max(this.#target, this.#wanted) - countSlabs(this.native.stock());
    if (need <= 0 || !this.#service.connected) return;
    this.#refilling = this.#allocate(need).finally(() => {
      this.#refilling = undefined;
    });
  }

  async #allocate(count: number): Promise<void> {
    try {
      const { runs } = await this.#service.allocateSlabs({ host: this.host, count });
      const got = runs.map(runFromWire);
      if (this.dead || this.#stop.signal.aborted) return; // the service takes them back with the dead generation
      if (countSlabs(got) > 0) {
        for (const watch of this.aheadWatchers) watch(got);
        this.native.addSlabs(got);
        this.#wanted = 0;
        if (countSlabs(got) < count) this.#logger.info(`Asked for ${count} slabs, got ${countSlabs(got)}`);
        return;
      }
      this.native.declareFull();
      this.#logger.warn(
        'The pool is full: writes to new places wait, then fail with "no space". Delete volumes, or grow the pool.',
      );
      this.#retryLater();
    } catch (error) {
      const failed = error instanceof Error && 'code' in error && error.code === 'NO_SPACE';
      if (failed) this.native.declareFull();
      this.#logger.warn(`No slabs ahead were given: ${messageOf(error)}`);
      this.#retryLater();
    }
  }

  #retryLater(): void {
    if (this.#fullTimer !== undefined || this.#stop.signal.aborted) return;
    this.#fullTimer = setTimeout(() => {
      this.#fullTimer = undefined;
      if (this.#openVolumes() > 0) this.#refill();
    }, fullRetryMs);
  }

  /** Called about once a second: a quiet pool's surplus goes back, a short one asks again. */
  tick(now: number): void {
    if (this.dead || !this.#service.connected) return;
    if (this.#openVolumes() === 0) {
      this.#target = 0;
      this.#wanted = 0;
    } else if (now - this.#lastClaim > quietMs && this.#target > idleAhead) {
      this.#target = Math.max(idleAhead, Math.floor(this.#target / 2));
      this.#lastClaim = now;
    }
    const surplus = countSlabs(this.native.stock()) - this.#target;
    if (surplus > 0 && this.#wanted === 0 && (this.#target === 0 || this.#target === idleAhead)) {
      const taken = this.native.takeBackSlabs(surplus);
      this.#toReturn.push(...taken);
      this.#report();
    } else {
      this.#refill();
    }
  }

  /** The slabs ahead that the books of the service may still give to this host: for Hello. */
  stockForHello(): SlabRun[] {
    return [...this.native.stock(), ...this.#toReturn];
  }

  /** The Welcome's answer: what is not kept is somebody else's from now on. */
  keepStock(kept: readonly SlabRun[]): void {
    const keep = new Set([...slabsOf(kept)].map((s) => `${s.slab}/${s.generation}`));
    const isKept = (s: { slab: bigint; generation: bigint }): boolean =>
      keep.has(`${s.slab}/${s.generation}`);
    const split = (runs: readonly SlabRun[]): SlabRun[] =>
      [...slabsOf(runs)].filter(isKept).map((s) => ({ first: s.slab, count: 1, generation: s.generation }));
    this.#toReturn = split(this.#toReturn);
    const stock = this.native.stock();
    if ([...slabsOf(stock)].every(isKept)) return;
    const taken = this.native.takeBackSlabs();
    const still = split(taken);
    this.#logger.warn(
      `The metadata service took ${countSlabs(taken) - countSlabs(still)} slabs ahead back: it no longer had them as this host's.`,
    );
    if (still.length > 0) this.native.addSlabs(still);
  }

  // ------------------------------------------------------------------------------------------ reports

  slabClaimed(slab: Slab): void {
    const now = Date.now();
    this.#lastClaim = now;
    this.#claimTimes = this.#claimTimes.filter((at) => now - at < aheadMs).slice(-mostAhead + 1);
    this.#claimTimes.push(now);
    this.#target = Math.max(this.#target, this.#claimTimes.length);
    this.#claims.push(slab);
    this.#report();
    if (countSlabs(this.native.stock()) * 4 < this.#target * 3) this.#refill();
  }

  slabEmptied(slab: Slab): void {
    this.#emptied.push(slab);
    this.#report();
  }

  /** Claims of a volume that the service has not acknowledged. */
  unreported(volumeId: bigint): Slab[] {
    return this.#claims.filter((slab) => slab.volumeId === volumeId);
  }

  /** Drops queued claims: they travel with the volume's return instead. */
  forgetClaims(volumeId: bigint): void {
    this.#claims = this.#claims.filter((slab) => slab.volumeId !== volumeId);
    this.#wakeReported();
  }

  get reportsPending(): boolean {
    return this.#claims.length + this.#emptied.length + this.#toReturn.length > 0;
  }

  /** True when every report of the volume (of all, without one) was acknowledged within `timeoutMs`. */
  async reported(timeoutMs: number, volumeId?: bigint): Promise<boolean> {
    const pending = (): boolean =>
      volumeId === undefined
        ? this.reportsPending
        : this.#claims.some((s) => s.volumeId === volumeId) ||
          this.#emptied.some((s) => s.volumeId === volumeId);
    const deadline = Date.now() + timeoutMs;
    while (pending()) {
      const left = deadline - Date.now();
      if (left <= 0 || this.dead) return false;
      this.#report();
      this.#hurry.abort();
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, left);
        this.#reportWaiters.push(() => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
    return true;
  }

  #wakeReported(): void {
    for (const wake of this.#reportWaiters.splice(0)) wake();
  }

  /** The session is there again: what waits goes out. */
  resume(): void {
    this.#report();
    this.#refill();
  }

  #report(): void {
    if (this.#reporting !== undefined || this.#stop.signal.aborted || !this.#service.connected) return;
    if (!this.reportsPending) return;
    this.#reporting = this.#sendReports().finally(() => {
      this.#reporting = undefined;
      this.#wakeReported();
      if (!this.#stop.signal.aborted) this.#report();
    });
  }

  /** Claims first: a slab's emptying must not overtake the news that it was claimed. */
  async #sendReports(): Promise<void> {
    this.#hurry = new AbortController();
    await sleep(reportDelayMs, AbortSignal.any([this.#stop.signal, this.#hurry.signal]));
    const backoff = new Backoff(100, 2000);
    while (this.reportsPending && !this.#stop.signal.aborted) {
      const claims = this.#claims.slice(0, reportLimit);
      const emptied = claims.length > 0 ? [] : this.#emptied.slice(0, reportLimit);
      const unclaimed = claims.length > 0 ? [] : this.#toReturn.slice(0, reportLimit);
      try {
        if (claims.length > 0) {
          await this.#service.reportSlabs({ host: this.host, claimed: claims.map(claimedToWire) });
        } else {
          await this.#service.returnSlabs({
            host: this.host,
            unclaimed: unclaimed.map(runToWire),
            emptied: emptied.map(claimedToWire),
          });
        }
      } catch (error) {
        if (isTransient(error)) {
          if (!this.#service.connected) return; // resume() starts again
          await sleep(backoff.next(), this.#stop.signal);
          continue;
        }
        this.#logger.error(
          `The metadata service refused a report of ${claims.length} claimed, ${emptied.length} emptied slabs and ${unclaimed.length} runs: ${messageOf(error)}`,
        );
      }
      backoff.reset();
      const sent = new Set<unknown>([...claims, ...emptied, ...unclaimed]);
      this.#claims = this.#claims.filter((slab) => !sent.has(slab));
      this.#emptied = this.#emptied.filter((slab) => !sent.has(slab));
      this.#toReturn = this.#toReturn.filter((run) => !sent.has(run));
      this.#wakeReported();
    }
  }

  /** Gives every unclaimed slab back, before the pool is left. */
  async returnStock(timeoutMs: number): Promise<boolean> {
    this.#target = 0;
    this.#wanted = 0;
    await this.#refilling;
    this.#toReturn.push(...this.native.takeBackSlabs());
    return this.reported(timeoutMs);
  }

  /** No more timers, and no new calls. */
  stop(): void {
    this.#stop.abort();
    this.#hurry.abort();
    clearTimeout(this.#fullTimer);
    this.#wakeReported();
  }

  /** stop(), and no call under way any more. */
  async release(): Promise<void> {
    this.stop();
    await this.#refilling;
    await this.#reporting;
  }
}
