/**
 * A metadata service that does as the test says: it welcomes agents, lets them join, hands out the grants it was given, and
 * sends orders. For what the agent does with orders; that the real service sends the right ones is tested there.
 */
import { randomUUID } from 'node:crypto';
import type { ServerDuplexStream, ServerUnaryCall } from '@grpc/grpc-js';
import { createLogger, HoldfastError, serve, unary, type GrpcServer } from '@holdfast/common';
import {
  holdfast,
  type AgentMessage__Output,
  type ClaimedSlab__Output,
  type Grant,
  type HeldVolume__Output,
  type Order,
  type OrderResult__Output,
  type ReturnVolumeRequest__Output,
  type ServiceMessage,
  type VolumeOpenedRequest__Output,
} from '@holdfast/proto';
import { waitFor } from '@holdfast/testing';
import type { FakeDisk } from './fake-native.ts';

type Session = ServerDuplexStream<AgentMessage__Output, ServiceMessage>;

export class ScriptedService {
  readonly storeId = randomUUID();
  readonly disk: FakeDisk;
  /** What StageVolume answers. */
  readonly grants = new Map<string, Grant>();
  readonly returned: ReturnVolumeRequest__Output[] = [];
  readonly reported: ClaimedSlab__Output[] = [];
  /** Every VolumeOpened that arrived, and what it is answered with: undefined is success. */
  readonly told: VolumeOpenedRequest__Output[] = [];
  openedError: HoldfastError | undefined;
  /** StageVolume calls, which are answered when this has resolved. */
  asked = 0;
  beforeGrant: Promise<void> = Promise.resolve();
  hellos = 0;
  held: HeldVolume__Output[] = [];
  #server: GrpcServer | undefined;
  #session: Session | undefined;
  #generation = 0;
  #nextSlab = 0;
  readonly #waiting = new Map<string, (result: OrderResult__Output) => void>();

  constructor(disk: FakeDisk) {
    this.disk = disk;
    disk.authority = { store: this.storeId, incarnation: 1n, term: 1n, unclaimed: false };
  }

  get address(): string {
    return this.#server?.address ?? '';
  }

  async start(listen = '127.0.0.1:0'): Promise<void> {
    const logger = createLogger('scripted-service');
    logger.level = 'silent';
    const host = (nodeId: string) => ({
      pool_uuid: this.disk.info.uuid,
      node_id: nodeId,
      host_id: 1,
      generation: String(this.#generation),
    });
    this.#server = await serve(listen, (server) => {
      server.addService(holdfast.Agents.service, {
        Session: (session: Session) => this.#onSession(session),
        JoinPool: unary(logger, 'JoinPool', async (request: { node_id: string }) => {
          this.#generation += 1;
          return { host: host(request.node_id) };
        }),
        PoolReady: unary(logger, 'PoolReady', async () => ({})),
        StageVolume: unary(logger, 'StageVolume', async (request: { volume_uuid: string }) => {
          const grant = this.grants.get(request.volume_uuid);
          if (grant === undefined) throw new HoldfastError('FAILED_PRECONDITION', 'No grant is scripted.');
          this.asked += 1;
          await this.beforeGrant;
          return grant;
        }),
        VolumeOpened: unary(logger, 'VolumeOpened', async (request: VolumeOpenedRequest__Output) => {
          this.told.push(request);
          if (this.openedError !== undefined) throw this.openedError;
          return {};
        }),
        ReturnVolume: unary(logger, 'ReturnVolume', async (request: ReturnVolumeRequest__Output) => {
          this.returned.push(request);
          return {};
        }),
        AllocateSlabs: unary(logger, 'AllocateSlabs', async (request: { count: number }) => {
          const first = this.#nextSlab;
          this.#nextSlab += request.count;
          return { runs: [{ first: String(first), count: request.count, generation: '1' }] };
        }),
        ReportSlabs: unary(logger, 'ReportSlabs', async (request: { claimed: ClaimedSlab__Output[] }) => {
          this.reported.push(...request.claimed);
          return {};
        }),
        ReturnSlabs: unary(logger, 'ReturnSlabs', async () => ({})),
      });
      server.addService(holdfast.Metadata.service, {
        GetVolume: (
          call: ServerUnaryCall<{ uuid: string }, unknown>,
          callback: (e: null, v: object) => void,
        ) => callback(null, { uuid: call.request.uuid, size_bytes: String(2 << 30) }),
      });
    });
  }

  async stop(): Promise<void> {
    await this.#server?.close(0);
  }

  #onSession(session: Session): void {
    session.on('error', () => undefined);
    session.on('end', () => session.end());
    session.on('data', (message: AgentMessage__Output) => {
      if (message.hello) {
        this.#session = session;
        this.hellos += 1;
        this.held = message.hello.holding.flatMap((pool) => pool.volumes);
        const stock = message.hello.holding.map((pool) => ({
          pool_uuid: this.disk.info.uuid,
          runs: pool.stock,
        }));
        session.write({
          welcome: {
            store_id: this.storeId,
            incarnation: '1',
            term: '1',
            accepted_pools: [this.disk.info.uuid],
            stock,
            session_id: randomUUID(),
          },
        });
      } else if (message.order_result) {
        const { order_id } = message.order_result;
        this.#waiting.get(order_id)?.(message.order_result);
        this.#waiting.delete(order_id);
      }
    });
  }

  /** Ends the stream: the agent comes again and says what it holds. */
  breakSession(): void {
    this.#session?.end();
    this.#session = undefined;
  }

  async order(order: Order, orderId: string = randomUUID()): Promise<OrderResult__Output> {
    const session = await waitFor('a session', () => this.#session);
    const result = new Promise<OrderResult__Output>((resolve) => this.#waiting.set(orderId, resolve));
    session.write({
      order: {
        order_id: orderId,
        term: '1',
        incarnation: '1',
        pool_uuid: this.disk.info.uuid,
        ...order,
      },
    });
    return await result;
  }
}
