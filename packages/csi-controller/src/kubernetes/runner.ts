/** Looks at the nodes that may need something, one decision at a time for each, and carries it out while this replica leads. */
import type { Logger } from '@holdfast/common';
import { backoffMs, type Clock } from './clock.ts';
import { Conflict, type Cluster, type Fencing } from './cluster.ts';
import { decide, type Action, type Decision, type Situation } from './decide.ts';
import type { EventRecorder } from './events.ts';
import { observe, type DeletionsSeen } from './observe.ts';
import type { SafetySettings } from './settings.ts';
import type { KubeletLeases } from './silence.ts';
import { FENCED_TAINT } from './settings.ts';
import type { NodeView, Taint } from './view.ts';

export interface RunnerParts {
  readonly cluster: Cluster;
  readonly fencing: Fencing;
  readonly leases: KubeletLeases;
  readonly events: EventRecorder;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly settings: SafetySettings;
  /** 0: another replica leads, and nothing may be done. */
  readonly mayActMs: () => number;
  /** Names of nodes that are not ready, or carry something of ours, as far as the informer knows: it may be late. */
  readonly notedNodes: () => readonly string[];
}

const tickMs = 250;
const nodesAtOnce = 8;
const stepsAtOnce = 5;
/** Until the next look, in milliseconds. */
const pause = { acted: 0, fencing: 250, waiting: 1000, conflict: 200, quiet: 1000, quietMost: 10_000 };
const retry = { firstMs: 500, mostMs: 30_000 };

/** What is kept of a node between two looks. Nothing that is decided depends on it but how long pods have been waiting. */
interface Watched {
  dueMs: number;
  failures: number;
  /** How often the same came out. */
  repeats: number;
  last: string;
  situation: Situation | undefined;
  readonly deletions: DeletionsSeen;
}

/** Another replica may act now. */
class NotLeading extends Error {
  override name = 'NotLeading';
}

export class Runner {
  readonly #parts: RunnerParts;
  readonly #watched = new Map<string, Watched>();
  #troubledFailures = 0;
  #troubledDueMs = 0;
  #troubled: readonly string[] = [];

  constructor(parts: RunnerParts) {
    this.#parts = parts;
  }

  async run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      await this.tick();
      await this.#parts.clock.sleep(tickMs, signal);
    }
  }

  async tick(): Promise<void> {
    const { clock, mayActMs, notedNodes } = this.#parts;
    if (mayActMs() === 0) {
      this.#watched.clear();
      return;
    }
    await this.#askForTroubled();
    const names = new Set([...this.#troubled, ...notedNodes()]);
    for (const name of this.#watched.keys()) if (!names.has(name)) this.#watched.delete(name);
    for (const name of names) if (!this.#watched.has(name)) this.#watched.set(name, newlyWatched());
    const due = [...this.#watched].filter(([, watched]) => watched.dueMs <= clock.nowMs());
    due.sort(([, a], [, b]) => a.dueMs - b.dueMs);
    for (let from = 0; from < due.length; from += nodesAtOnce) {
      const some = due.slice(from, from + nodesAtOnce);
      await Promise.all(some.map(([name, watched]) => this.#look(name, watched)));
    }
  }

  async #askForTroubled(): Promise<void> {
    const { clock, fencing, logger } = this.#parts;
    if (clock.nowMs() < this.#troubledDueMs) return;
    try {
      this.#troubled = await fencing.troubled();
      this.#troubledFailures = 0;
      this.#troubledDueMs = clock.nowMs() + pause.waiting;
    } catch (error) {
      const level = this.#troubledFailures++ === 0 ? 'warn' : 'debug';
      logger[level](
        { err: error },
        'The metadata service does not say how its nodes are: nobody is fenced meanwhile',
      );
      this.#troubledDueMs =
        clock.nowMs() + backoffMs(this.#troubledFailures, retry.firstMs, retry.mostMs / 6, clock.random);
    }
  }

  async #look(name: string, watched: Watched): Promise<void> {
    const { clock, logger } = this.#parts;
    try {
      // What follows from an action is done at once; more than there are steps would be a quarrel with somebody.
      let pauseMs = await this.step(name, watched);
      for (let more = 0; pauseMs === 0 && more < stepsAtOnce; more++)
        pauseMs = await this.step(name, watched);
      watched.dueMs = clock.nowMs() + pauseMs;
      watched.failures = 0;
    } catch (error) {
      watched.dueMs = clock.nowMs() + this.#afterFailure(watched, error);
      if (error instanceof NotLeading || error instanceof Conflict) return;
      const level = watched.failures <= 1 ? 'warn' : 'debug';
      logger[level]({ node: name, err: error }, 'Looking after a node failed; it is tried again');
    }
  }

  #afterFailure(watched: Watched, error: unknown): number {
    const { clock } = this.#parts;
    if (error instanceof NotLeading) return pause.waiting;
    if (error instanceof Conflict && watched.failures < 5) {
      watched.failures++;
      return pause.conflict;
    }
    return backoffMs(watched.failures++, retry.firstMs, retry.mostMs, clock.random);
  }

  /** One look, at most one action. Returns how long to wait before the next look. */
  async step(name: string, watched: Watched = newlyWatched()): Promise<number> {
    const { events, settings, logger } = this.#parts;
    const view = await observe(name, this.#parts, watched.deletions);
    if (view === undefined) return pause.quietMost;
    const decision = decide(view, settings);
    if (watched.situation !== decision.situation) {
      logger.info(
        { node: name, situation: decision.situation, action: decision.action.type },
        situations[decision.situation],
      );
      watched.situation = decision.situation;
    }
    for (const notice of decision.notices) events.tell(notice);
    await this.#act(view, decision.action);
    return this.#pauseAfter(decision, watched);
  }

  /** The same action twice had no effect (a finalizer holds a pod, say), and a node of which nothing is wanted changes rarely. */
  #pauseAfter(decision: Decision, watched: Watched): number {
    const key = JSON.stringify([decision.situation, signature(decision.action)]);
    watched.repeats = watched.last === key ? watched.repeats + 1 : 0;
    watched.last = key;
    if (decision.action.type !== 'nothing') {
      return watched.repeats === 0
        ? pause.acted
        : backoffMs(watched.repeats, pause.conflict, pause.quietMost, this.#parts.clock.random);
    }
    if (decision.situation === 'fencing') return pause.fencing;
    if (decision.situation === 'waiting') return pause.waiting;
    return Math.min(pause.quiet * (watched.repeats + 1), pause.quietMost);
  }

  async #act(view: NodeView, action: Action): Promise<void> {
    const { cluster, fencing, logger } = this.#parts;
    const node = { name: view.name, resourceVersion: view.node.resourceVersion };
    if (action.type === 'nothing') return;
    this.#requireLeading();
    logger.info({ node: view.name, ...said(action) }, `Node ${view.name}: ${action.type}`);
    switch (action.type) {
      case 'fence':
        for (const life of action.lives) {
          this.#requireLeading();
          await fencing.fence(life, action.reason, action.unlessConnected);
        }
        return;
      case 'set-taint':
        return await cluster.setTaints(node, withTaint(view.node.taints, action.taint), action.mark);
      case 'release-volumes':
        return await cluster.setVolumesInUse(node, action.volumesInUse);
      case 'delete-pods':
        for (const pod of action.pods) {
          this.#requireLeading();
          await cluster.deletePod(pod);
        }
        return;
      case 'remove-taints': {
        const kept = view.node.taints.filter((taint) => !action.keys.includes(taint.key));
        return await cluster.setTaints(node, kept, action.markToo ? null : undefined);
      }
    }
  }

  #requireLeading(): void {
    if (this.#parts.mayActMs() === 0) throw new NotLeading('Another replica leads.');
  }
}

const situations: Record<Situation, string> = {
  well: 'The node needs nothing',
  back: 'The node is back',
  waiting: 'The node is silent; no pod there is to be moved by Holdfast',
  fencing: 'The node is being fenced',
  'needs-confirmation': 'The fence waits for somebody who knows that the machine is off',
  evicting: 'The node is fenced: its pods are moved',
  evicted: 'The node is fenced and its pods were moved; it is waited for',
};

function newlyWatched(): Watched {
  return {
    dueMs: Number.NEGATIVE_INFINITY,
    failures: 0,
    repeats: 0,
    last: '',
    situation: undefined,
    deletions: new Map(),
  };
}

function withTaint(taints: readonly Taint[], taint: Taint): Taint[] {
  const others = taints.filter(({ key, effect }) => key !== taint.key || effect !== taint.effect);
  return [...others, taint];
}

function signature(action: Action): unknown {
  return action.type === 'delete-pods' ? action.pods.map((pod) => pod.uid) : action;
}

function said(action: Action): object {
  switch (action.type) {
    case 'delete-pods':
      return { pods: action.pods.map((pod) => `${pod.namespace}/${pod.name}`) };
    case 'fence':
      return { lives: action.lives, reason: action.reason };
    case 'set-taint':
      return { taint: action.taint.key === FENCED_TAINT ? FENCED_TAINT : action.taint };
    case 'release-volumes':
      return { left: action.volumesInUse };
    case 'remove-taints':
      return { keys: action.keys };
    case 'nothing':
      return {};
  }
}
