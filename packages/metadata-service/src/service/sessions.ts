/**
 * Agents that are connected: one stream a node carries orders down and their results up. An order is repeated by whoever
 * gave it; here it is only sent, and its answer, or the reason why none will come, handed back.
 */
import type { Order, OrderResult__Output, ServiceMessage } from '@holdfast/proto';
import type { PoolSighting } from '../model/pools.ts';
import type { Core } from './core.ts';

export interface AgentLink {
  send(message: ServiceMessage): void;
  /** Ends the stream, telling the agent why. */
  end(reason: string): void;
}

/** An order that was not carried out. `code` is the agent's, or UNREACHABLE, or TIMEOUT. */
export class OrderFailed extends Error {
  override name = 'OrderFailed';
  readonly code: string;
  constructor(code: string, message: string) {
    super(message);
    this.code = code;
  }
}

export type OrderBody = Omit<Order, 'order_id' | 'term' | 'incarnation' | 'pool_uuid' | 'order'>;

interface Pending {
  resolve: (result: OrderResult__Output) => void;
  reject: (error: OrderFailed) => void;
}

export class Session {
  readonly id: string;
  readonly nodeId: string;
  readonly link: AgentLink;
  readonly sinceUnixMs: number;
  lastSeenUnixMs: number;
  /** When an order to it failed, in monotonic milliseconds: others are asked first. */
  lastFailureMs = 0;
  /** What it reported, without the devices that were refused. */
  readonly pools = new Map<string, PoolSighting>();
  /** Of pools that it is a host on, why their devices can not be used as they are now. */
  readonly problems = new Map<string, string>();
  readonly pending = new Map<string, Pending>();
  /** Resolves when every message that has come so far was dealt with. */
  settled: () => Promise<void> = () => Promise.resolve();
  #acceptedSent = '';
  #welcomed = false;

  constructor(id: string, nodeId: string, link: AgentLink, nowUnixMs: number) {
    this.id = id;
    this.nodeId = nodeId;
    this.link = link;
    this.sinceUnixMs = nowUnixMs;
    this.lastSeenUnixMs = nowUnixMs;
  }

  /** The first Welcome, and one more whenever the pools that the node may join have changed. */
  welcome(core: Core, accepted: string[], stock?: { pool_uuid: string; runs: object[] }[]): void {
    const text = accepted.toSorted().join(' ');
    if (stock === undefined && (!this.#welcomed || text === this.#acceptedSent)) return;
    this.#welcomed = true;
    this.#acceptedSent = text;
    this.link.send({
      welcome: {
        store_id: core.service.storeId,
        incarnation: core.service.incarnation.toString(),
        term: core.service.term.toString(),
        accepted_pools: accepted,
        stock: stock ?? [],
        session_id: this.id,
      },
    });
  }
}

export class Sessions {
  readonly #core: Core;
  readonly #sessions = new Map<string, Session>();
  readonly #startedMs: number;
  /** When the last session of a node ended, in monotonic milliseconds. */
  readonly #endedMs = new Map<string, number>();

  constructor(core: Core) {
    this.#core = core;
    this.#startedMs = core.clock.monotonicMs();
    core.stopped.signal.addEventListener('abort', () => {
      for (const session of this.#sessions.values()) this.#abandon(session, 'The metadata service stops.');
    });
  }

  all(): Session[] {
    return [...this.#sessions.values()];
  }

  get(nodeId: string): Session | undefined {
    return this.#sessions.get(nodeId);
  }

  isConnected(nodeId: string): boolean {
    return this.#sessions.has(nodeId);
  }

  /** For how long there has been none of this node. A service that has just started has missed nobody yet. */
  silentMs(nodeId: string): number {
    if (this.isConnected(nodeId)) return 0;
    return this.#core.clock.monotonicMs() - (this.#endedMs.get(nodeId) ?? this.#startedMs);
  }

  /** A node has one session: a newer one takes the place of an older. */
  attach(nodeId: string, link: AgentLink): Session {
    const older = this.#sessions.get(nodeId);
    if (older !== undefined) {
      this.detach(older);
      older.link.end('Another session of this node took its place.');
    }
    const session = new Session(this.#core.newId(), nodeId, link, this.#core.clock.unixMs());
    this.#sessions.set(nodeId, session);
    this.#core.changed();
    return session;
  }

  detach(session: Session): void {
    if (this.#sessions.get(session.nodeId) !== session) return;
    this.#sessions.delete(session.nodeId);
    this.#endedMs.set(session.nodeId, this.#core.clock.monotonicMs());
    this.#abandon(session, `The agent of ${session.nodeId} went away.`);
    this.#core.changed();
  }

  #abandon(session: Session, why: string): void {
    for (const pending of session.pending.values()) pending.reject(new OrderFailed('UNREACHABLE', why));
    session.pending.clear();
  }

  /** Sends an order under this service's term. @throws OrderFailed */
  async order(
    nodeId: string,
    poolUuid: string,
    body: OrderBody,
    timeoutMs: number,
  ): Promise<OrderResult__Output> {
    const session = this.#sessions.get(nodeId);
    if (session === undefined || this.#core.stopped.signal.aborted) {
      throw new OrderFailed('UNREACHABLE', `The agent of ${nodeId} is not connected.`);
    }
    const orderId = this.#core.newId();
    const timer = new AbortController();
    try {
      const result = await new Promise<OrderResult__Output>((resolve, reject) => {
        session.pending.set(orderId, { resolve, reject });
        session.link.send({
          order: {
            order_id: orderId,
            term: this.#core.service.term.toString(),
            incarnation: this.#core.service.incarnation.toString(),
            pool_uuid: poolUuid,
            ...body,
          },
        });
        void this.#core.clock.sleep(timeoutMs, timer.signal).then(() => {
          reject(new OrderFailed('TIMEOUT', `The agent of ${nodeId} did not answer within ${timeoutMs} ms.`));
        });
      });
      if (result.error_code !== '') throw new OrderFailed(result.error_code, result.error_message);
      return result;
    } catch (error) {
      session.lastFailureMs = this.#core.clock.monotonicMs();
      throw error;
    } finally {
      session.pending.delete(orderId);
      timer.abort();
    }
  }

  /** An answer to an order that nobody waits for any more is dropped. */
  answered(session: Session, result: OrderResult__Output): void {
    session.pending.get(result.order_id)?.resolve(result);
  }
}
