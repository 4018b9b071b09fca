/** The agents' API: holdfast.v1.Agents. One stream a node for orders and what it sees; unary calls for what it asks for. */
import { HoldfastError, toGrpcStatus, unary, type CallContext } from '@holdfast/common';
import type {
  AgentMessage__Output,
  AgentsHandlers,
  Grant,
  Hello__Output,
  Known,
  PoolSeen__Output,
  ServiceMessage,
  SlabRun as WireRun,
  StageVolumeRequest__Output,
} from '@holdfast/proto';
import type { ServerDuplexStream } from '@grpc/grpc-js';
import { allocateSlabs, reportSlabs, returnSlabs, stillAhead } from '../model/allocation.ts';
import { once } from '../model/answers.ts';
import { audit, stale } from '../model/decision.ts';
import { stagedBefore, stageVolume, volumeOpened, volumeReturned } from '../model/grants.ts';
import { applyHost, joinPool, poolReady } from '../model/hosts.ts';
import { seePool, type PoolSighting } from '../model/pools.ts';
import { tables, type SlabRun } from '../model/records.ts';
import { reconcile, seeNode } from '../model/sessions.ts';
import { slabsOf } from '../model/slabs.ts';
import { layersOf } from '../model/layers.ts';
import { acceptedPools } from './claim.ts';
import type { Core } from './core.ts';
import type { AgentLink, Session, Sessions } from './sessions.ts';
import { afterWaiting } from './waiting.ts';
import {
  claimFromWire,
  grantToWire,
  layerToWire,
  lifeOfRef,
  refOf,
  runFromWire,
  runToWire,
  sightingFromWire,
} from './wire.ts';

export class AgentsApi {
  readonly #core: Core;
  readonly #sessions: Sessions;

  constructor(core: Core, sessions: Sessions) {
    this.#core = core;
    this.#sessions = sessions;
  }

  handlers(): Known<AgentsHandlers> {
    const log = this.#core.logger;
    return {
      Session: (stream) => this.#session(stream),
      JoinPool: unary(log, 'JoinPool', async (request) => {
        const room = this.#requireSession(request);
        const { answer } = await this.#core.decide((d) =>
          once(d, 'JoinPool', request, () =>
            refOf(
              joinPool(d, {
                poolUuid: request.pool_uuid,
                nodeId: request.node_id,
                machineId: request.machine_id,
                bootId: request.boot_id,
                lockPath: request.lock_path,
                previousIoDead: request.previous_io_dead,
                room,
              }),
            ),
          ),
        );
        return { host: answer };
      }),
      PoolReady: unary(log, 'PoolReady', async (request) => {
        const { poolUuid, life } = lifeOfRef(request.host);
        await this.#core.decide((d) =>
          once(d, 'PoolReady', request, () => {
            poolReady(d, poolUuid, life);
            return null;
          }),
        );
        return {};
      }),
      StageVolume: unary(log, 'StageVolume', (request, context) => this.#stageVolume(request, context)),
      VolumeOpened: unary(log, 'VolumeOpened', async (request) => {
        const { poolUuid, life } = lifeOfRef(request.host);
        await this.#core.decide((d) =>
          once(d, 'VolumeOpened', request, () => {
            volumeOpened(d, poolUuid, life, request.volume_uuid, BigInt(request.epoch));
            return null;
          }),
        );
        return {};
      }),
      ReturnVolume: unary(log, 'ReturnVolume', async (request) => {
        const { poolUuid, life } = lifeOfRef(request.host);
        await this.#core.decide((d) =>
          once(d, 'ReturnVolume', request, () => {
            if (request.claimed.length > 0)
              reportSlabs(d, poolUuid, life, request.claimed.map(claimFromWire));
            volumeReturned(d, poolUuid, life, request.volume_uuid, BigInt(request.epoch));
            return null;
          }),
        );
        return {};
      }),
      AllocateSlabs: unary(log, 'AllocateSlabs', async (request) => {
        const { poolUuid, life } = lifeOfRef(request.host);
        this.#refuseProblem(poolUuid, life.nodeId);
        const runs = await this.#core.decide((d): SlabRun[] => {
          const { answer, repeated } = once(d, 'AllocateSlabs', request, () =>
            allocateSlabs(d, poolUuid, life, request.count),
          );
          return repeated ? stillAhead(d, poolUuid, life, answer) : answer;
        });
        return { runs: runs.map(runToWire) };
      }),
      ReportSlabs: unary(log, 'ReportSlabs', async (request) => {
        const { poolUuid, life } = lifeOfRef(request.host);
        const { answer } = await this.#core.decide((d) =>
          once(d, 'ReportSlabs', request, () =>
            reportSlabs(d, poolUuid, life, request.claimed.map(claimFromWire)),
          ),
        );
        refuseMisfits(answer);
        return {};
      }),
      ReturnSlabs: unary(log, 'ReturnSlabs', async (request) => {
        const { poolUuid, life } = lifeOfRef(request.host);
        const { answer } = await this.#core.decide((d) =>
          once(d, 'ReturnSlabs', request, () =>
            returnSlabs(
              d,
              poolUuid,
              life,
              request.unclaimed.map(runFromWire),
              request.emptied.map(claimFromWire),
            ),
          ),
        );
        refuseMisfits(answer);
        return {};
      }),
    };
  }

  /** Only the node's newest session may join, and only a device that it was seen to have and that is no copy. */
  #requireSession(request: { node_id: string; pool_uuid: string; session_id: string }): PoolSighting {
    const session = this.#sessions.get(request.node_id);
    if (session === undefined) {
      throw new HoldfastError(
        'UNAVAILABLE',
        `The agent of ${request.node_id} has no session. Open one first, then repeat the call.`,
      );
    }
    if (session.id !== request.session_id) {
      throw stale(
        `the join belongs to session ${request.session_id || '(none)'} of ${request.node_id}, which is over`,
      );
    }
    const seen = session.pools.get(request.pool_uuid);
    if (seen === undefined) {
      throw new HoldfastError(
        'UNAVAILABLE',
        `Node ${request.node_id} has not reported pool ${request.pool_uuid}, or its device was refused. Wait until ` +
          'Welcome names the pool.',
      );
    }
    return seen;
  }

  /** A device that shrank under a host: what is open goes on as far as it can, and nothing more is given to that node. */
  #refuseProblem(poolUuid: string, nodeId: string): void {
    const problem = this.#sessions.get(nodeId)?.problems.get(poolUuid);
    if (problem !== undefined) throw new HoldfastError('FAILED_PRECONDITION', problem);
  }

  async #stageVolume(request: StageVolumeRequest__Output, context: CallContext): Promise<Grant> {
    const { poolUuid, life } = lifeOfRef(request.host);
    this.#refuseProblem(poolUuid, life.nodeId);
    const attempt = (): Promise<Grant> =>
      this.#core.decide((d) => {
        // The answer on record is the epoch. The layers are those of now: slabs that left since are named to nobody.
        const { answer: epoch } = once(d, 'StageVolume', request, () => {
          const staged = stageVolume(d, {
            poolUuid,
            life,
            volumeUuid: request.volume_uuid,
            publishId: request.publish_id,
            readOnly: request.read_only,
          });
          return staged.grant.epoch;
        });
        const { volume, grant } = stagedBefore(d, request.volume_uuid, life, epoch);
        const layers = layersOf(d.tx, volume).map((layer) =>
          layerToWire(layer, slabsOf(d.tx, poolUuid, layer.layerId)),
        );
        return grantToWire(volume, grant, layers);
      });
    return await afterWaiting(this.#core, context, attempt);
  }

  // ---------------------------------------------------------------------------------------------- session

  #session(stream: ServerDuplexStream<AgentMessage__Output, ServiceMessage>): void {
    const log = this.#core.logger;
    let session: Session | undefined;
    let ended = false;
    const link: AgentLink = {
      send: (message) => {
        if (!ended) stream.write(message);
      },
      end: (reason) => {
        if (ended) return;
        ended = true;
        stream.emit('error', toGrpcStatus(new HoldfastError('UNAVAILABLE', reason)));
      },
    };
    // Messages are dealt with one after another, in the order in which they came.
    let turn = Promise.resolve();
    stream.on('data', (message: AgentMessage__Output) => {
      if (session !== undefined) session.lastSeenUnixMs = this.#core.clock.unixMs();
      if (session !== undefined && message.order_result) {
        this.#sessions.answered(session, message.order_result);
        return;
      }
      turn = turn
        .then(async () => {
          if (ended) return;
          if (session === undefined) {
            session = await this.#hello(message, link);
            session.settled = () => turn;
          } else await this.#message(session, message);
        })
        .catch((error: unknown) => {
          log.warn({ node: session?.nodeId, err: error }, 'A session ends with an error');
          if (ended) return;
          ended = true;
          stream.emit('error', toGrpcStatus(error));
        });
    });
    const over = (): void => {
      ended = true;
      void turn.then(() => (session === undefined ? undefined : this.#goodbye(session)));
    };
    stream.on('end', () => {
      over();
      stream.end();
    });
    stream.on('cancelled', over);
    stream.on('close', over);
  }

  async #goodbye(session: Session): Promise<void> {
    if (this.#sessions.get(session.nodeId) !== session) return;
    this.#sessions.detach(session);
    this.#core.logger.info({ node: session.nodeId }, 'The agent went away');
    if (this.#core.stopped.signal.aborted) return;
    await this.#core.decide((d) => {
      const node = tables.node.get(d.tx, session.nodeId);
      if (node !== undefined) {
        tables.node.put(d.tx, { ...node, lastSeenUnixMs: session.lastSeenUnixMs }, node.nodeId);
      }
    });
  }

  async #hello(message: AgentMessage__Output, link: AgentLink): Promise<Session> {
    const hello = message.hello;
    if (!hello || hello.node_id === '' || hello.machine_id === '' || hello.boot_id === '') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        'A session begins with hello, which names the node, its machine id and its boot id.',
      );
    }
    const reconciled = await this.#reconcile(hello);
    const session = this.#sessions.attach(hello.node_id, link);
    session.welcome(
      this.#core,
      acceptedPools(this.#core, session),
      reconciled.map(({ poolUuid, stock }) => ({ pool_uuid: poolUuid, runs: stock })),
    );
    for (const { poolUuid, revoke } of reconciled) {
      for (const { volumeUuid, epoch } of revoke) this.#takeBack(session.nodeId, poolUuid, volumeUuid, epoch);
    }
    this.#core.logger.info(
      { node: hello.node_id, version: hello.version, holding: hello.holding.length },
      'An agent connected',
    );
    return session;
  }

  async #reconcile(
    hello: Hello__Output,
  ): Promise<{ poolUuid: string; stock: WireRun[]; revoke: { volumeUuid: string; epoch: bigint }[] }[]> {
    return await this.#core.decide((d) => {
      seeNode(d, {
        nodeId: hello.node_id,
        name: hello.name,
        machineId: hello.machine_id,
        bootId: hello.boot_id,
        version: hello.version,
        maxVolumes: hello.max_volumes,
        lastSeenUnixMs: d.nowUnixMs,
        pastBootIds: [],
      });
      return hello.holding.map((held) => {
        const { poolUuid, life } = lifeOfRef(held.host);
        if (life.nodeId !== hello.node_id) {
          throw new HoldfastError('INVALID_ARGUMENT', `${hello.node_id} says hello for ${life.nodeId}.`);
        }
        const result = reconcile(d, {
          poolUuid,
          life,
          volumes: held.volumes.map((volume) => ({
            volumeUuid: volume.volume_uuid,
            epoch: BigInt(volume.epoch),
            claimed: volume.claimed.map(claimFromWire),
          })),
          stock: held.stock.map(runFromWire),
        });
        if (result.misfits > 0) {
          this.#core.logger.error(
            { node: hello.node_id, pool: poolUuid, slabs: result.misfits },
            'An agent holds slabs that the database gives to nobody or to somebody else: run `holdfast pool check`',
          );
        }
        return { poolUuid, stock: result.stock.map(runToWire), revoke: result.revoke };
      });
    });
  }

  /** A volume that is held without a right. Its node's page or the newer epoch keeps it harmless; this lets it go sooner. */
  #takeBack(nodeId: string, poolUuid: string, volumeUuid: string, epoch: bigint): void {
    const log = this.#core.logger.child({ node: nodeId, volume: volumeUuid, epoch: epoch.toString() });
    log.warn('The agent holds a volume without a grant: it is told to let go');
    this.#sessions
      .order(nodeId, poolUuid, { revoke: { volume_uuid: volumeUuid, epoch: epoch.toString() } }, 30_000)
      .then(
        () => log.info('It let go'),
        (error: unknown) =>
          log.warn(`It did not let go: ${error instanceof Error ? error.message : String(error)}`),
      );
  }

  async #message(session: Session, message: AgentMessage__Output): Promise<void> {
    if (message.pools_seen) await this.#poolsSeen(session, message.pools_seen.pools);
    else if (message.lease) await this.#lease(session, message.lease);
    else if (message.volume_event) await this.#volumeEvent(session, message.volume_event);
    else if (message.hello)
      throw new HoldfastError('INVALID_ARGUMENT', 'A session has one hello, at its beginning.');
  }

  async #poolsSeen(session: Session, seen: readonly PoolSeen__Output[]): Promise<void> {
    const sightings = seen.flatMap((pool): PoolSighting[] => {
      try {
        return [sightingFromWire(pool)];
      } catch (error) {
        this.#core.logger.error(
          { node: session.nodeId, pool: pool.uuid, err: error },
          'A pool was reported wrongly',
        );
        return [];
      }
    });
    const verdicts = await this.#core.decide((d) =>
      sightings.map((sighting) => ({ sighting, verdict: seePool(d, session.nodeId, sighting) })),
    );
    session.pools.clear();
    session.problems.clear();
    for (const { sighting, verdict } of verdicts) {
      if (verdict.type === 'refuse-pool') this.#core.refusals.set(sighting.uuid, verdict.message);
      if (verdict.type === 'refuse-pool' || verdict.type === 'refuse-device') {
        if (sighting.problem !== '') session.problems.set(sighting.uuid, verdict.message);
        this.#core.logger.error({ node: session.nodeId, pool: sighting.uuid }, verdict.message);
      } else {
        session.pools.set(sighting.uuid, sighting);
      }
    }
    session.welcome(this.#core, acceptedPools(this.#core, session));
    this.#core.changed();
  }

  async #lease(session: Session, report: NonNullable<AgentMessage__Output['lease']>): Promise<void> {
    const { poolUuid, life } = lifeOfRef(report.host);
    this.#core.logger.info(
      { node: session.nodeId, pool: poolUuid, lease: report.state },
      report.message || 'Lease',
    );
    if (report.state !== 'stopped' || life.nodeId !== session.nodeId) return;
    await this.#core.decide((d) => {
      const pool = tables.pool.get(d.tx, poolUuid);
      const host = tables.host.get(d.tx, poolUuid, life.hostId);
      if (pool === undefined || host?.nodeId !== life.nodeId) return;
      applyHost(d, pool, life.hostId, { type: 'stop-acknowledged', generation: life.generation });
    });
  }

  async #volumeEvent(
    session: Session,
    event: NonNullable<AgentMessage__Output['volume_event']>,
  ): Promise<void> {
    const { poolUuid, life } = lifeOfRef(event.host);
    this.#core.logger.warn(
      { node: session.nodeId, pool: poolUuid, volume: event.volume_uuid, code: event.code },
      event.message,
    );
    await this.#core.decide((d) =>
      audit(d, 'volume-event', {
        poolUuid,
        volumeUuid: event.volume_uuid,
        nodeId: session.nodeId,
        generation: life.generation,
        detail: `${event.code}: ${event.message}`,
      }),
    );
  }
}

/** What fitted is recorded; the agent is told what did not. */
function refuseMisfits(misfits: readonly string[]): void {
  if (misfits.length === 0) return;
  throw new HoldfastError('STALE', `Stale, this part of the report was not recorded: ${misfits.join('; ')}.`);
}
