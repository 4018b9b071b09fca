/**
 * Snapshots as the agent sees them: holding writes, cutting chains, letting go. An open volume is cut where it is open; one
 * that nobody has open is opened under a grant of its own, without a device, cut, and closed again (volumes.ts).
 *
 * A group is held by one order and cut by the next. Whatever becomes of the second one, the hold ends by itself: in the
 * engine after its time-out, and here, where file systems are thawed too.
 */
import { randomUUID } from 'node:crypto';
import { HoldfastError, type Logger } from '@holdfast/common';
import type {
  CutResult,
  CutVolumes__Output,
  HoldVolumes__Output,
  VolumeAtEpoch__Output,
} from '@holdfast/proto';
import { sleep } from './backoff.ts';
import { messageOf } from './convert.ts';
import type { FileSystemFreezer, Frozen } from './freeze.ts';
import type { HostedPool } from './hosted-pool.ts';
import type { LocalVolume, Volumes } from './volumes.ts';

/** How long a stopping agent waits for its file systems to be thawed; the next one thaws what is left. */
const stopThawMs = 2000;

/** The engine's own word for it (native/lib/index.ts). */
class HoldExpired extends Error {
  readonly code = 'HF_HOLD_EXPIRED';
  constructor(cutId: string) {
    super(`Writes are not held any more for cut ${cutId}; nothing was cut here. Hold them again, then cut.`);
  }
}

interface Hold {
  readonly cutId: string;
  readonly volumes: Map<string, LocalVolume>;
  readonly frozen: Frozen[];
  /** Settles when all are held, or not all could be. */
  held: Promise<void>;
  timer: NodeJS.Timeout | undefined;
  over: boolean;
}

/** All of them, then the first failure: nothing is left running when a caller goes on. */
async function every<T>(work: readonly Promise<T>[]): Promise<T[]> {
  const settled = await Promise.allSettled(work);
  const failed = settled.find((outcome) => outcome.status === 'rejected');
  if (failed !== undefined) throw failed.reason;
  return settled.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []));
}

export class Cuts {
  readonly #volumes: Volumes;
  readonly #freezer: FileSystemFreezer;
  readonly #logger: Logger;
  readonly #holds = new Map<string, Hold>();
  readonly #thawing = new Set<Promise<void>>();

  constructor(options: { volumes: Volumes; freezer: FileSystemFreezer; logger: Logger }) {
    this.#volumes = options.volumes;
    this.#freezer = options.freezer;
    this.#logger = options.logger;
  }

  // ------------------------------------------------------------------------------------------ holding

  /** Resolves when no write of these volumes goes on any more. A repeated order joins the first one. */
  async hold(order: HoldVolumes__Output): Promise<void> {
    if (order.cut_id === '') {
      throw new HoldfastError('INVALID_ARGUMENT', 'The order to hold has no cut_id. Name the cut.');
    }
    const before = this.#holds.get(order.cut_id);
    if (before !== undefined) {
      await before.held;
      if (order.volumes.every((at) => before.volumes.has(at.volume_uuid))) return;
      this.#end(before);
    }
    await this.#hold(order.cut_id, order.volumes, order.hold_timeout_ms, order.quiesce);
  }

  async #hold(
    cutId: string,
    volumes: readonly VolumeAtEpoch__Output[],
    timeoutMs: number,
    quiesce: boolean,
  ): Promise<Hold> {
    const hold: Hold = {
      cutId,
      volumes: new Map(),
      frozen: [],
      held: Promise.resolve(),
      timer: undefined,
      over: false,
    };
    this.#holds.set(cutId, hold);
    hold.timer = setTimeout(() => {
      this.#logger.warn({ cut: cutId }, 'Held writes go on: nobody has cut in time');
      this.#end(hold);
    }, timeoutMs);
    hold.held = this.#holdAll(hold, volumes, performance.now() + timeoutMs, quiesce);
    await hold.held;
    return hold;
  }

  async #holdAll(
    hold: Hold,
    volumes: readonly VolumeAtEpoch__Output[],
    until: number,
    quiesce: boolean,
  ): Promise<void> {
    const left = (): number => Math.max(1, Math.round(until - performance.now()));
    try {
      // Frozen first, all of them: a freeze writes back what its file system has, and a held device takes no write.
      if (quiesce) await every(volumes.map((at) => this.#freeze(hold, at, left())));
      await every(
        volumes.map((at) =>
          this.#volumes.withOpen(at.volume_uuid, BigInt(at.epoch), async (volume) => {
            await volume.native.hold(left());
            hold.volumes.set(at.volume_uuid, volume);
            if (hold.over) await volume.native.release();
          }),
        ),
      );
      this.#requireHeld(hold, hold.cutId);
    } catch (error) {
      this.#end(hold);
      throw error;
    }
  }

  /** Not in the volume's turn: a revocation must not wait for a file system's write-back. */
  async #freeze(hold: Hold, at: VolumeAtEpoch__Output, timeoutMs: number): Promise<void> {
    const { native } = this.#volumes.opened(at.volume_uuid, BigInt(at.epoch));
    const frozen = await this.#freezer.freeze(native.export.devicePath, timeoutMs);
    hold.frozen.push(frozen);
    if (hold.over) await frozen.thaw();
  }

  #requireHeld(hold: Hold | undefined, cutId: string): asserts hold is Hold {
    if (hold === undefined || hold.over || !hold.frozen.every((frozen) => frozen.holds)) {
      throw new HoldExpired(cutId);
    }
  }

  /** Writes go on, then file systems are thawed (a thaw writes). Idempotent; never throws. */
  #end(hold: Hold): void {
    hold.over = true;
    clearTimeout(hold.timer);
    if (this.#holds.get(hold.cutId) === hold) this.#holds.delete(hold.cutId);
    const letGo = async (): Promise<void> => {
      await Promise.all(
        [...hold.volumes.values()].map((volume) =>
          volume.native
            .release()
            .catch((error: unknown) =>
              this.#logger.warn(
                { volume: volume.uuid },
                `Held writes could not be released: ${messageOf(error)}`,
              ),
            ),
        ),
      );
      await Promise.all(hold.frozen.map((frozen) => frozen.thaw()));
    };
    const done = letGo().finally(() => this.#thawing.delete(done));
    this.#thawing.add(done);
  }

  /** Nothing held under this name is success. */
  release(cutId: string): void {
    const hold = this.#holds.get(cutId);
    if (hold !== undefined) this.#end(hold);
  }

  /** Before the agent stops. */
  async releaseAll(): Promise<void> {
    for (const hold of this.#holds.values()) this.#end(hold);
    await Promise.race([Promise.all(this.#thawing), sleep(stopThawMs)]);
  }

  // ------------------------------------------------------------------------------------------ cutting

  async cut(pool: HostedPool, order: CutVolumes__Output): Promise<CutResult> {
    const open = order.cuts.filter((cut) => !cut.grant);
    const pending = open.filter(
      (cut) => !this.#volumes.isCut(cut.volume_uuid, BigInt(cut.top?.layer_id ?? 0)),
    );
    let hold: Hold | undefined;
    if (order.cut_id !== '') {
      hold = this.#holds.get(order.cut_id);
      // What was cut before is cut, held or not. The rest is cut only under the one hold of the whole group.
      for (const cut of pending) {
        this.#requireHeld(hold, order.cut_id);
        if (!hold.volumes.has(cut.volume_uuid)) throw new HoldExpired(order.cut_id);
      }
    } else if (order.quiesce && pending.length > 0) {
      hold = await this.#hold(`own ${randomUUID()}`, pending, order.hold_timeout_ms, true);
    }
    // From here the engine ends the hold: by the cut, or by its own time-out.
    clearTimeout(hold?.timer);
    try {
      const volumes = await every(
        order.cuts.map((cut) =>
          cut.grant
            ? this.#volumes.cutClosed(pool, cut, cut.grant, order.hold_timeout_ms)
            : this.#volumes.cutOpen(cut, order.hold_timeout_ms),
        ),
      );
      return { volumes };
    } finally {
      if (hold !== undefined) this.#end(hold);
    }
  }
}
