/**
 * Fences one life of a node on one pool (DESIGN 6.2): the page is written by a live agent, then the proof of the pool's class is
 * gathered. The states and what may follow what are model/host.ts; here are the orders, the polling and the waiting. The
 * intent is durable before this starts, and nothing that was measured outlives it: after a restart or the loss of the fencer
 * the page is written again and every wait starts from zero.
 */
import { applyConfirmation, applyHost } from '../model/hosts.ts';
import { LeaseWatch } from '../model/lease-watch.ts';
import type { HostEvent } from '../model/host.ts';
import { tables, type HostRecord, type PoolRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import { isLive, liveHosts, requireOurs } from './helpers.ts';
import { OrderFailed, type Sessions } from './sessions.ts';

const orderTimeoutMs = 8000;
const lockPollMs = 200;
/** While no agent can be asked; when another one can. */
const idleMs = 1000;
const nextFencerMs = 50;

export class FenceOperation {
  readonly #core: Core;
  readonly #sessions: Sessions;
  readonly #poolUuid: string;
  readonly #hostId: number;
  readonly #say: (waitingFor: string) => void;
  /** Fencers that failed lately are asked last. */
  readonly #failed = new Map<string, number>();
  #watch: { key: string; lease: LeaseWatch } | undefined;

  constructor(
    core: Core,
    sessions: Sessions,
    poolUuid: string,
    hostId: number,
    say: (waitingFor: string) => void,
  ) {
    this.#core = core;
    this.#sessions = sessions;
    this.#poolUuid = poolUuid;
    this.#hostId = hostId;
    this.#say = say;
  }

  /** Until the host is no longer being fenced, or the service stops. */
  async run(): Promise<void> {
    while (!this.#core.stopped.signal.aborted) {
      const { pool, host } = this.#core.read((tx) => ({
        pool: tables.pool.get(tx, this.#poolUuid),
        host: tables.host.get(tx, this.#poolUuid, this.#hostId),
      }));
      if (pool === undefined || host === undefined) return;
      if (host.state !== 'FENCING' && host.state !== 'CUTTING') return;
      let pauseMs: number;
      try {
        pauseMs =
          host.state === 'FENCING' ? await this.#writePage(pool, host) : await this.#gatherProof(pool, host);
      } catch (error) {
        if (!(error instanceof OrderFailed)) throw error;
        this.#say(`${error.message} It is tried again.`);
        const untried = liveHosts(this.#core, this.#sessions, this.#poolUuid, host.nodeId).some(
          (live) => !this.#failed.has(live.nodeId),
        );
        pauseMs = host.state === 'FENCING' && untried ? nextFencerMs : idleMs;
      }
      if (pauseMs > 0) await this.#pause(pauseMs, host);
    }
  }

  /** A change of anything else must not shorten the polling, a change of this host or of the agents does. */
  async #pause(ms: number, host: HostRecord): Promise<void> {
    const until = this.#core.clock.monotonicMs() + ms;
    const before = this.#situation(host);
    for (let left = ms; left > 0 && !this.#core.stopped.signal.aborted; ) {
      await this.#core.nextChange(left);
      const now = this.#core.read((tx) => tables.host.get(tx, this.#poolUuid, this.#hostId));
      if (now === undefined || this.#situation(now) !== before) return;
      left = until - this.#core.clock.monotonicMs();
    }
  }

  #situation(host: HostRecord): string {
    const agents = liveHosts(this.#core, this.#sessions, this.#poolUuid).map((live) => live.nodeId);
    return [host.state, host.generation, host.fence?.confirmedBy, ...agents].join(' ');
  }

  // ---------------------------------------------------------------------------------------------- page

  async #writePage(pool: PoolRecord, host: HostRecord): Promise<number> {
    requireOurs(this.#core, pool);
    const fencer = this.#pickFencer(pool, host);
    if (fencer === undefined) return idleMs;
    this.#say(`${fencer.nodeId} writes the fence page of generation ${host.generation}`);
    try {
      await this.#order(fencer, {
        write_fence: { host_id: host.hostId, generation: host.generation.toString() },
      });
    } catch (error) {
      this.#failed.set(fencer.nodeId, this.#core.clock.monotonicMs());
      throw error;
    }
    await this.#step(host, {
      type: 'page-durable',
      generation: host.generation,
      fencer: { hostId: fencer.hostId, generation: fencer.generation, nodeId: fencer.nodeId },
    });
    return 0;
  }

  #pickFencer(pool: PoolRecord, victim: HostRecord): HostRecord | undefined {
    const others = liveHosts(this.#core, this.#sessions, pool.uuid, victim.nodeId);
    const lastFailure = (host: HostRecord): number => this.#failed.get(host.nodeId) ?? 0;
    const fencer = others.sort((a, b) => lastFailure(a) - lastFailure(b))[0];
    if (fencer !== undefined) return fencer;
    if (this.#sessions.isConnected(victim.nodeId)) {
      // It is not LIVE for anything else any more, but it can still tell itself to stop: its engine reads the page.
      this.#say(
        `the only agent on pool ${pool.name} is ${victim.nodeId} itself: it is asked to write its own fence page. If its ` +
          'engine does not stop, connect another node to the pool, or restart this one',
      );
      return victim;
    }
    this.#say(
      `no other node is live on pool ${pool.name}, so nobody can write the fence page: start an agent on another node, or ` +
        `let ${victim.nodeId} come back`,
    );
    return undefined;
  }

  // ---------------------------------------------------------------------------------------------- proof

  async #gatherProof(pool: PoolRecord, host: HostRecord): Promise<number> {
    const fencer = host.fence?.fencer;
    const selfFenced = fencer?.nodeId === host.nodeId && this.#sessions.isConnected(host.nodeId);
    if (!fencer || !(selfFenced || isLive(this.#core, this.#sessions, pool.uuid, fencer))) {
      this.#say(`the agent that wrote the fence page is gone: another one writes it again`);
      await this.#step(host, { type: 'fencer-lost', generation: host.generation });
      return 0;
    }
    const confirmedBy = host.fence?.confirmedBy ?? '';
    if (confirmedBy !== '' && pool.fencing !== 'loop') {
      await this.#core.decide((d) => applyConfirmation(d, pool, host, confirmedBy));
      return 0;
    }
    if (pool.fencing === 'loop' && (await this.#lockIsFree(host, fencer.nodeId))) return 0;
    const asked = this.#core.clock.monotonicMs();
    const result = await this.#order(fencer, { read_heartbeat: { host_id: host.hostId } });
    const heartbeat = result.heartbeat;
    if (!heartbeat)
      throw new OrderFailed('INCOMPLETE', `The agent of ${fencer.nodeId} sent no heartbeat reading.`);
    if (heartbeat.state === 'stopped' && BigInt(heartbeat.generation) === host.generation) {
      await this.#step(host, { type: 'stopped-on-disk', generation: host.generation });
      return 0;
    }
    switch (pool.fencing) {
      case 'loop':
        this.#say(
          `the lock ${host.lockPath}: an engine of ${host.nodeId} still has I/O or still runs (a stopped process too). It is free ` +
            'when that process has ended',
        );
        return lockPollMs;
      case 'lease-only': {
        const reading = {
          generation: BigInt(heartbeat.generation),
          sequence: BigInt(heartbeat.sequence),
          askedMs: asked,
          answeredMs: this.#core.clock.monotonicMs(),
        };
        return await this.#watchLease(pool, host, reading);
      }
      case 'manual':
        this.#say(
          `somebody who knows that the machine of ${host.nodeId} is off. Make sure that it is, then run: holdfast node ` +
            `confirm-off ${host.nodeId}`,
        );
        return pool.renewIntervalMs;
      case 'reservations':
        throw new OrderFailed(
          'UNIMPLEMENTED',
          `Pool ${pool.name} is fenced by reservations, which this release does not do.`,
        );
    }
  }

  async #lockIsFree(host: HostRecord, fencerNode: string): Promise<boolean> {
    const result = await this.#sessions.order(
      fencerNode,
      this.#poolUuid,
      { test_lock: { lock_path: host.lockPath } },
      orderTimeoutMs,
    );
    if (result.lock_free !== true) return false;
    await this.#step(host, {
      type: 'proof',
      generation: host.generation,
      kind: 'lock-free',
      detail: `${fencerNode} found the lock ${host.lockPath} free: the I/O of that engine is dead`,
    });
    return true;
  }

  async #watchLease(
    pool: PoolRecord,
    host: HostRecord,
    reading: { generation: bigint; sequence: bigint; askedMs: number; answeredMs: number },
  ): Promise<number> {
    const fence = host.fence;
    // One watch for one page: another fencer, or a page written again, starts from zero.
    const key = [host.generation, host.sinceUnixMs, fence?.alarms, fence?.fencer?.nodeId].join(' ');
    if (this.#watch?.key !== key) this.#watch = { key, lease: new LeaseWatch(pool, host.generation) };
    const watch = this.#watch.lease;
    const verdict = watch.observe(reading);
    switch (verdict.type) {
      case 'wait':
        this.#say(
          `the lease of ${host.nodeId} to run out: its heartbeat has to stay unchanged for ${watch.needMs} ms, ` +
            `${Math.ceil(verdict.remainingMs)} ms are left`,
        );
        return Math.max(50, Math.min(pool.renewIntervalMs, verdict.remainingMs));
      case 'renewed-after-page':
        await this.#step(host, { type: 'heartbeat-after-page', generation: host.generation });
        return 0;
      case 'expired': {
        if (!(await this.#pageIntact(host))) return 0;
        await this.#step(host, {
          type: 'proof',
          generation: host.generation,
          kind: 'lease-expired',
          detail:
            `fence page read back intact, heartbeat ${verdict.sequence} unchanged for ${Math.round(verdict.waitedMs)} ms ` +
            `(lease x 1.05 + drain = ${watch.needMs} ms)`,
        });
        return 0;
      }
    }
  }

  async #pageIntact(host: HostRecord): Promise<boolean> {
    const fencer = host.fence?.fencer;
    if (!fencer) return false;
    const result = await this.#order(fencer, {
      read_fence: { host_id: host.hostId, generation: host.generation.toString() },
    });
    const page = result.fence;
    if (page?.host_id === host.hostId && BigInt(page.generation) === host.generation) return true;
    this.#core.logger.error(
      { node: host.nodeId, generation: host.generation.toString() },
      'The fence page was durable, but does not read back: it is written again',
    );
    await this.#step(host, { type: 'fencer-lost', generation: host.generation });
    return false;
  }

  // ---------------------------------------------------------------------------------------------- helpers

  #order(fencer: { nodeId: string }, body: Parameters<Sessions['order']>[2]): ReturnType<Sessions['order']> {
    return this.#sessions.order(fencer.nodeId, this.#poolUuid, body, orderTimeoutMs);
  }

  async #step(host: HostRecord, event: HostEvent): Promise<void> {
    const outcome = await this.#core.decide((d) => {
      const pool = tables.pool.get(d.tx, this.#poolUuid);
      return pool === undefined ? undefined : applyHost(d, pool, host.hostId, event);
    });
    if (outcome?.type !== 'changed') return;
    const about = { pool: this.#poolUuid, node: host.nodeId, generation: host.generation.toString() };
    if (outcome.alarm !== undefined) this.#core.logger.error(about, outcome.alarm);
    else
      this.#core.logger.info(
        { ...about, state: outcome.next.state, proof: outcome.next.proof },
        `Fence: ${event.type}`,
      );
  }
}
