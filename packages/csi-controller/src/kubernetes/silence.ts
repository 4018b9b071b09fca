/**
 * For how long kubelets have been silent. Their Leases name times of their own clocks; those are never read. What counts is when
 * a Lease was last *seen to change* here, and only time through which the API server answered: while it was away no kubelet
 * could renew anything, so nobody was silent.
 */

/** Answers further apart than this leave a gap in which nothing was known. The leader's own Lease asks every 2 s. */
const longestGapMs = 6000;

export class ApiContact {
  #sinceMs = Number.NEGATIVE_INFINITY;
  #lastMs = Number.NEGATIVE_INFINITY;

  /** The API server answered. */
  answered(nowMs: number): void {
    if (nowMs - this.#lastMs > longestGapMs) this.#sinceMs = nowMs;
    this.#lastMs = nowMs;
  }

  /** Since when it has answered without a gap; undefined: it does not. */
  sinceMs(nowMs: number): number | undefined {
    return nowMs - this.#lastMs > longestGapMs ? undefined : this.#sinceMs;
  }
}

interface Renewal {
  version: string;
  /** When this version was first seen, and whether that was a change: the first look at a Lease is none. */
  atMs: number;
  changed: boolean;
}

export class KubeletLeases {
  readonly #contact: ApiContact;
  readonly #renewals = new Map<string, Renewal>();

  constructor(contact: ApiContact) {
    this.#contact = contact;
  }

  /** A node's Lease was seen, by the informer or by a look of our own; an older version that arrives late changes nothing. */
  seen(node: string, version: string, nowMs: number): void {
    const before = this.#renewals.get(node);
    if (before?.version === version) return;
    if (before !== undefined && isOlder(version, before.version)) return;
    this.#renewals.set(node, { version, atMs: nowMs, changed: before !== undefined });
  }

  gone(node: string): void {
    this.#renewals.delete(node);
  }

  nodes(): string[] {
    return [...this.#renewals.keys()];
  }

  /** undefined: the node has no Lease. */
  silentMs(node: string, nowMs: number): number | undefined {
    const renewal = this.#renewals.get(node);
    if (renewal === undefined) return undefined;
    const contactMs = this.#contact.sinceMs(nowMs);
    return contactMs === undefined ? 0 : Math.max(0, nowMs - Math.max(renewal.atMs, contactMs));
  }

  /** It was seen to renew within the last `withinMs`. */
  isAlive(node: string, withinMs: number, nowMs: number): boolean {
    const renewal = this.#renewals.get(node);
    return renewal !== undefined && renewal.changed && nowMs - renewal.atMs < withinMs;
  }
}

/** Versions of one store are numbers that grow; of anything else it is not known, and what came last counts. */
function isOlder(version: string, than: string): boolean {
  return /^\d+$/.test(version) && /^\d+$/.test(than) && BigInt(version) < BigInt(than);
}
