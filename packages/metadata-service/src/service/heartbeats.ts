/**
 * Whether nodes whose agents are away are alive all the same: other agents read their heartbeats on the disk. Nothing is
 * decided by it here, and no fence rests on it (a fence has its own proof); it tells whoever thinks of fencing a node
 * whether its engine goes on without its agent, or behind a network that is down. Kept in memory only.
 */
import { tables, type HostRecord } from '../model/records.ts';
import type { Core } from './core.ts';
import { liveHosts } from './helpers.ts';
import { OrderFailed, type Sessions } from './sessions.ts';

/** A heartbeat is read this many times in each renew interval, within these bounds, in milliseconds. */
const readsPerRenewal = 2;
const pauseMs = { least: 50, most: 1000 };
const orderTimeoutMs = 4000;
/** An agent that restarts is back before anybody has to be asked about it. */
const graceMs = 1000;
/** How many nodes are looked after at a time; of more, others are looked at in the next round. */
const maxAtOnce = 32;

interface Reading {
  generation: bigint;
  heartbeat: string;
  /** From the answer that first showed it to the newest question that still did, in monotonic milliseconds. */
  firstAnsweredMs: number;
  lastAskedMs: number;
}

export class Heartbeats {
  readonly #core: Core;
  readonly #sessions: Sessions;
  readonly #readings = new Map<string, Reading>();
  #from = 0;

  constructor(core: Core, sessions: Sessions) {
    this.#core = core;
    this.#sessions = sessions;
  }

  /** For how long this life's heartbeat is known to stand still; undefined: nobody could read it, or nobody had to. */
  stillMs(host: HostRecord): number | undefined {
    const reading = this.#readings.get(keyOf(host));
    if (reading?.generation !== host.generation) return undefined;
    return Math.max(0, reading.lastAskedMs - reading.firstAnsweredMs);
  }

  /** Until the service stops. */
  async run(): Promise<void> {
    const { stopped, clock } = this.#core;
    while (!stopped.signal.aborted) {
      const absent = this.#absent();
      const keys = new Set(absent.map(keyOf));
      for (const key of this.#readings.keys()) if (!keys.has(key)) this.#readings.delete(key);
      const turn = [...absent.slice(this.#from), ...absent.slice(0, this.#from)].slice(0, maxAtOnce);
      this.#from = absent.length > maxAtOnce ? (this.#from + maxAtOnce) % absent.length : 0;
      await Promise.all(turn.map((host) => this.#read(host)));
      if (turn.length === 0) await this.#core.nextChange(pauseMs.most);
      await clock.sleep(this.#pauseFor(turn), stopped.signal);
    }
  }

  #absent(): HostRecord[] {
    return this.#core
      .read((tx) => tables.host.list(tx))
      .filter((host) => host.state !== 'DEAD' && this.#sessions.silentMs(host.nodeId) >= graceMs);
  }

  #pauseFor(hosts: readonly HostRecord[]): number {
    const intervals = hosts.map(
      (host) => this.#core.read((tx) => tables.pool.get(tx, host.poolUuid))?.renewIntervalMs ?? pauseMs.most,
    );
    const wanted = Math.min(...intervals, pauseMs.most) / readsPerRenewal;
    return Math.max(pauseMs.least, wanted);
  }

  async #read(host: HostRecord): Promise<void> {
    const reader = liveHosts(this.#core, this.#sessions, host.poolUuid, host.nodeId)[0];
    if (reader === undefined) return;
    const askedMs = this.#core.clock.monotonicMs();
    try {
      const order = { read_heartbeat: { host_id: host.hostId } };
      const { heartbeat } = await this.#sessions.order(reader.nodeId, host.poolUuid, order, orderTimeoutMs);
      if (heartbeat) this.#note(host, `${heartbeat.generation} ${heartbeat.sequence}`, askedMs);
    } catch (error) {
      // Not read this time: the time for which it is known to stand still does not grow.
      if (!(error instanceof OrderFailed)) throw error;
    }
  }

  #note(host: HostRecord, heartbeat: string, askedMs: number): void {
    const before = this.#readings.get(keyOf(host));
    if (before?.generation === host.generation && before.heartbeat === heartbeat) {
      before.lastAskedMs = askedMs;
      return;
    }
    this.#readings.set(keyOf(host), {
      generation: host.generation,
      heartbeat,
      firstAnsweredMs: this.#core.clock.monotonicMs(),
      lastAskedMs: askedMs,
    });
  }
}

function keyOf(host: HostRecord): string {
  return `${host.poolUuid}/${host.hostId}`;
}
