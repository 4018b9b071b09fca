/**
 * Events on the objects that people look at. They are told, never waited for: nothing that is done about a node depends on one. The
 * same sentence about the same object is one Event whose count grows, written at most once a minute; each object has a budget, so
 * that a node that comes and goes cannot fill the API server.
 */
import { createHash } from 'node:crypto';
import type { Logger } from '@holdfast/common';
import type { Clock } from './clock.ts';
import type { Notice } from './decide.ts';

export interface EventText {
  readonly namespace: string;
  readonly name: string;
  readonly notice: Notice;
}

export interface EventSink {
  /** False: one of this name is there already. */
  create(event: EventText): Promise<boolean>;
  /** Once more, the last time now. False: there is none of this name any more. */
  repeat(event: EventText, count: number): Promise<boolean>;
}

const quietMs = 60_000;
/** Different sentences about one object: so many at once, then one in so many milliseconds. */
const burst = 12;
const refillMs = 30_000;
const maxWaiting = 200;
/** An Event is forgotten here when it was quiet for so long; the API server forgets it after an hour. */
const forgetMs = 3_600_000;

interface Told {
  count: number;
  lastMs: number;
}
interface Budget {
  left: number;
  atMs: number;
}

export class EventRecorder {
  readonly #sink: EventSink;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #told = new Map<string, Told>();
  readonly #budgets = new Map<string, Budget>();
  readonly #waiting: { event: EventText; count: number }[] = [];
  #sending: Promise<void> | undefined;

  constructor(sink: EventSink, clock: Clock, logger: Logger) {
    this.#sink = sink;
    this.#clock = clock;
    this.#logger = logger;
  }

  tell(notice: Notice): void {
    const nowMs = this.#clock.nowMs();
    const event = eventText(notice);
    const key = `${event.namespace}/${event.name}`;
    const told = this.#told.get(key) ?? { count: 0, lastMs: Number.NEGATIVE_INFINITY };
    if (nowMs - told.lastMs < quietMs) return;
    if (!this.#spend(`${notice.about.kind}/${notice.about.uid}`, nowMs)) return;
    told.count++;
    told.lastMs = nowMs;
    this.#told.set(key, told);
    if (this.#waiting.length >= maxWaiting) return;
    this.#waiting.push({ event, count: told.count });
    this.#sending ??= this.#send().finally(() => {
      this.#sending = undefined;
    });
  }

  /** Resolves when everything that was told has been sent, or given up. */
  async flush(): Promise<void> {
    await this.#sending;
  }

  #spend(object: string, nowMs: number): boolean {
    const before = this.#budgets.get(object) ?? { left: burst, atMs: nowMs };
    const left = Math.min(burst, before.left + (nowMs - before.atMs) / refillMs);
    this.#budgets.set(object, { left: left >= 1 ? left - 1 : left, atMs: nowMs });
    return left >= 1;
  }

  async #send(): Promise<void> {
    for (let next = this.#waiting.shift(); next !== undefined; next = this.#waiting.shift()) {
      const { event, count } = next;
      try {
        // Another leader may have told it before, or the API server may have forgotten it.
        const known = count > 1 && (await this.#sink.repeat(event, count));
        if (!known && !(await this.#sink.create(event))) await this.#sink.repeat(event, count);
      } catch (error) {
        this.#logger.debug({ err: error, event: event.name }, 'An Event was not written');
      }
    }
    this.#forget();
  }

  #forget(): void {
    const nowMs = this.#clock.nowMs();
    for (const [key, { lastMs }] of this.#told) if (nowMs - lastMs > forgetMs) this.#told.delete(key);
    for (const [key, { atMs }] of this.#budgets) if (nowMs - atMs > forgetMs) this.#budgets.delete(key);
  }
}

/** Its name says what it is about and what it says, so that every replica finds the same one. */
function eventText(notice: Notice): EventText {
  const { kind, namespace, name, uid } = notice.about;
  const digest = createHash('sha256')
    .update(JSON.stringify([kind, namespace, name, uid, notice.reason, notice.message]))
    .digest('hex')
    .slice(0, 16);
  return {
    namespace: namespace === '' ? 'default' : namespace,
    name: `${name.slice(0, 200)}.${digest}`,
    notice,
  };
}
