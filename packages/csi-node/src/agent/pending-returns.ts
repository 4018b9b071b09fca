/**
 * Volumes that were closed here but whose return the metadata service has not acknowledged. Kept in a file, so that a
 * return is sent later when the service was away, also by the agent's next life.
 *
 * An entry is written before the volume is closed ("closing") and again when it is ("closed"). A "closing" entry found at
 * start means that the agent died in between: it counts only if the record on disk says closed under that epoch.
 *
 * A volume that is opened without a device can't be taken over from, so what it has claimed must be found otherwise when
 * the agent dies: "maintained" entries name every slab that it may have taken. Their pages tell which it did.
 */
import { readFileSync } from 'node:fs';
import type { ClaimedSlab, SlabRun__Output } from '@holdfast/proto';
import { writeFileDurably } from './durable.ts';

export interface PendingReturn {
  volumeUuid: string;
  poolUuid: string;
  hostId: number;
  generation: string;
  epoch: string;
  slot: number;
  state: 'maintained' | 'closing' | 'closed';
  /** Slabs that the volume claimed and that were not acknowledged yet. */
  claimed: ClaimedSlab[];
  /** Opened without a record on the disk. */
  readOnly?: boolean;
  /** While maintained: the layer that takes writes, and all slabs ahead that there have been since. */
  maintained?: { volumeId: string; topLayerId: string; ahead: SlabRun__Output[] };
}

export class PendingReturns {
  readonly #path: string;
  readonly #entries = new Map<string, PendingReturn>();

  constructor(path: string) {
    this.#path = path;
    let text: string;
    try {
      text = readFileSync(path, 'utf8');
    } catch {
      return; // none yet
    }
    const stored = JSON.parse(text) as { version: number; returns: PendingReturn[] };
    for (const entry of stored.returns) this.#entries.set(PendingReturns.#key(entry), entry);
  }

  static #key(entry: { volumeUuid: string; epoch: string }): string {
    return `${entry.volumeUuid}/${entry.epoch}`;
  }

  list(): PendingReturn[] {
    return [...this.#entries.values()];
  }

  has(volumeUuid: string): boolean {
    return this.list().some((entry) => entry.volumeUuid === volumeUuid);
  }

  put(entry: PendingReturn): void {
    this.#entries.set(PendingReturns.#key(entry), entry);
    this.#write();
  }

  remove(entry: PendingReturn): void {
    if (this.#entries.delete(PendingReturns.#key(entry))) this.#write();
  }

  #write(): void {
    writeFileDurably(this.#path, `${JSON.stringify({ version: 1, returns: this.list() }, undefined, 1)}\n`);
  }
}
