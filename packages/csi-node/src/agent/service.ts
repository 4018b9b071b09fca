/**
 * The agent's way to the metadata service: one Session stream that is reconnected for ever, and unary calls that only run
 * while a session is welcomed.
 *
 * Why the calls hang on the session: Hello says "this is all I hold", and the service makes its books agree with it. A
 * grant or a slab whose answer is still on its way would be missing from that list although the service has just given
 * it. So before each Hello the agent lets every call end, and starts none until the Welcome is there.
 */
import { randomUUID } from 'node:crypto';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { call, clientOptions, grpcTarget, HoldfastError, type Logger } from '@holdfast/common';
import {
  holdfast,
  type AgentMessage,
  type AgentsClient,
  type AllocateSlabsRequest,
  type AllocateSlabsResponse__Output,
  type Grant__Output,
  type Hello,
  type JoinPoolRequest,
  type JoinPoolResponse__Output,
  type MetadataClient,
  type PoolReadyRequest,
  type ReportSlabsRequest,
  type ReturnSlabsRequest,
  type ReturnVolumeRequest,
  type ServiceMessage__Output,
  type StageVolumeRequest,
  type Volume__Output,
  type VolumeOpenedRequest,
  type Welcome__Output,
} from '@holdfast/proto';
import { credentials, type ChannelCredentials, type ClientDuplexStream } from '@grpc/grpc-js';
import { Backoff, sleep } from './backoff.ts';
import { isTransient, messageOf } from './convert.ts';

export interface SessionHandlers {
  /** What the agent holds right now. Called with no unary call under way. */
  hello(): Hello;
  /** Runs before unary calls start again. */
  welcomed(welcome: Welcome__Output): void;
  /** Right after it: calls run again. */
  resumed(): void;
  message(message: ServiceMessage__Output): void;
  disconnected(): void;
}

export interface ServiceOptions {
  address: string;
  channelCredentials?: ChannelCredentials;
  logger: Logger;
  /** For one unary call. */
  callTimeoutMs?: number;
  /** How long a call waits for a session before it gives up. */
  waitForSessionMs?: number;
  reconnectFirstMs?: number;
  reconnectMostMs?: number;
}

/** No session came about in time: the call was not made. */
class ServiceAway extends HoldfastError {
  constructor(address: string) {
    super(
      'UNAVAILABLE',
      `The metadata service at ${address} is away. What is open goes on; repeat this call when it is back.`,
    );
  }
}

type AgentsMethod =
  | 'JoinPool'
  | 'PoolReady'
  | 'StageVolume'
  | 'VolumeOpened'
  | 'ReturnVolume'
  | 'AllocateSlabs'
  | 'ReportSlabs'
  | 'ReturnSlabs';
type Stream = ClientDuplexStream<AgentMessage, ServiceMessage__Output>;

export class MetadataConnection {
  readonly #agents: AgentsClient;
  readonly #metadata: MetadataClient;
  readonly #options: Required<Omit<ServiceOptions, 'channelCredentials'>>;
  readonly #stop = new AbortController();
  #stream: Stream | undefined;
  #welcomed = false;
  #underWay = 0;
  #idleWaiters: (() => void)[] = [];
  #readyWaiters: (() => void)[] = [];
  #loop: Promise<void> | undefined;

  constructor(options: ServiceOptions) {
    this.#options = {
      callTimeoutMs: 10_000,
      waitForSessionMs: 3000,
      reconnectFirstMs: 50,
      reconnectMostMs: 500,
      ...options,
    };
    const channel = {
      ...clientOptions,
      // One connection a node, and every revocation that waits for this agent ends in a fence: be there soon.
      'grpc.initial_reconnect_backoff_ms': 100,
      'grpc.max_reconnect_backoff_ms': 500,
      'grpc.keepalive_permit_without_calls': 1,
    };
    const chosen = options.channelCredentials ?? credentials.createInsecure();
    this.#agents = new holdfast.Agents(grpcTarget(options.address), chosen, channel);
    this.#metadata = new holdfast.Metadata(grpcTarget(options.address), chosen, channel);
  }

  /** True between Welcome and the stream's end. */
  get connected(): boolean {
    return this.#welcomed;
  }

  start(handlers: SessionHandlers): void {
    this.#loop ??= this.#run(handlers);
  }

  /** What was sent last still goes out. */
  async stop(): Promise<void> {
    this.#stop.abort();
    for (const wake of this.#idleWaiters.splice(0)) wake();
    this.#stream?.end();
    const timer = setTimeout(() => this.#stream?.cancel(), 500);
    await this.#loop;
    clearTimeout(timer);
    this.#agents.close();
    this.#metadata.close();
  }

  /** False when there is no session; the service asks again after the next Hello. */
  send(message: AgentMessage): boolean {
    if (this.#stream === undefined || !this.#welcomed) return false;
    this.#stream.write(message);
    return true;
  }

  async #run(handlers: SessionHandlers): Promise<void> {
    const backoff = new Backoff(this.#options.reconnectFirstMs, this.#options.reconnectMostMs);
    let complained = '';
    while (!this.#stop.signal.aborted) {
      const ended = await this.#session(handlers, () => {
        backoff.reset();
        complained = '';
      });
      if (this.#stop.signal.aborted) break;
      if (ended !== complained) {
        complained = ended;
        this.#options.logger.warn(
          { metadata: this.#options.address },
          `No session with the metadata service: ${ended}. Trying again for ever; open volumes go on.`,
        );
      }
      await sleep(backoff.next(), this.#stop.signal);
    }
  }

  /** One stream's life; resolves with why it ended. */
  async #session(handlers: SessionHandlers, onWelcome: () => void): Promise<string> {
    await this.#quiet();
    if (this.#stop.signal.aborted) return 'stopped';
    const stream = this.#agents.Session() as Stream;
    this.#stream = stream;
    const ended = new Promise<string>((resolve) => {
      stream.on('data', (message: ServiceMessage__Output) => {
        try {
          if (message.message === 'welcome' && message.welcome) {
            handlers.welcomed(message.welcome);
            this.#welcomed = true;
            onWelcome();
            for (const wake of this.#readyWaiters.splice(0)) wake();
            handlers.resumed();
          } else {
            handlers.message(message);
          }
        } catch (error) {
          this.#options.logger.error(
            { err: error },
            'A message of the metadata service could not be handled',
          );
          stream.cancel();
          resolve(messageOf(error));
        }
      });
      stream.on('error', (error) => resolve(messageOf(error)));
      stream.on('end', () => resolve('the service ended the stream'));
      stream.write({ hello: handlers.hello() });
    });
    const reason = await ended;
    stream.cancel();
    this.#stream = undefined;
    const was = this.#welcomed;
    this.#welcomed = false;
    if (was) handlers.disconnected();
    return reason;
  }

  /** Resolves when no unary call is under way, and whoever made the last ones has had a turn to note the answers. */
  async #quiet(): Promise<void> {
    do {
      if (this.#underWay > 0 && !this.#stop.signal.aborted)
        await new Promise<void>((resolve) => this.#idleWaiters.push(resolve));
      await nextTurn();
    } while (this.#underWay > 0 && !this.#stop.signal.aborted);
  }

  async #ready(): Promise<void> {
    if (this.#welcomed) return;
    if (!this.#stop.signal.aborted) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, this.#options.waitForSessionMs);
        this.#readyWaiters.push(() => {
          clearTimeout(timer);
          resolve();
        });
      });
    }
    if (this.#welcomed) return;
    throw new ServiceAway(this.#options.address);
  }

  async #unary<Res>(
    body: (options: { timeoutMs: number }) => Promise<Res>,
    timeoutMs = this.#options.callTimeoutMs,
  ): Promise<Res> {
    await this.#ready();
    this.#underWay += 1;
    try {
      return await body({ timeoutMs });
    } finally {
      this.#underWay -= 1;
      if (this.#underWay === 0) for (const wake of this.#idleWaiters.splice(0)) wake();
    }
  }

  /** Repeats a call whose outcome is unknown, under one request id, so that it is done once. At most `attempts` times. */
  async #repeated<Res>(name: AgentsMethod, request: object, attempts = 3, timeoutMs?: number): Promise<Res> {
    const named = { ...request, request_id: randomUUID() };
    const backoff = new Backoff(50, 500);
    for (let attempt = 1; ; attempt++) {
      try {
        const method: (...args: never[]) => unknown = this.#agents[name];
        return await this.#unary((options) => call<Res>(this.#agents, method, named, options), timeoutMs);
      } catch (error) {
        if (attempt >= attempts || !isTransient(error) || error instanceof ServiceAway) throw error;
        await sleep(backoff.next(), this.#stop.signal);
      }
    }
  }

  joinPool(request: JoinPoolRequest): Promise<JoinPoolResponse__Output> {
    return this.#repeated('JoinPool', request);
  }
  async poolReady(request: PoolReadyRequest): Promise<void> {
    await this.#repeated('PoolReady', request);
  }
  /** @param timeoutMs of each attempt, instead of the usual */
  stageVolume(request: StageVolumeRequest, timeoutMs?: number): Promise<Grant__Output> {
    return this.#repeated('StageVolume', request, undefined, timeoutMs);
  }
  async volumeOpened(request: VolumeOpenedRequest): Promise<void> {
    await this.#repeated('VolumeOpened', request);
  }
  async returnVolume(request: ReturnVolumeRequest): Promise<void> {
    await this.#repeated('ReturnVolume', request);
  }
  /** Never repeated by itself: after a new Hello the first answer's slabs may be somebody else's. */
  allocateSlabs(request: AllocateSlabsRequest): Promise<AllocateSlabsResponse__Output> {
    return this.#repeated('AllocateSlabs', request, 1);
  }
  async reportSlabs(request: ReportSlabsRequest): Promise<void> {
    await this.#repeated('ReportSlabs', request, 1);
  }
  async returnSlabs(request: ReturnSlabsRequest): Promise<void> {
    await this.#repeated('ReturnSlabs', request, 1);
  }
  getVolume(uuid: string): Promise<Volume__Output> {
    return this.#unary((options) => call(this.#metadata, this.#metadata.GetVolume, { uuid }, options));
  }
}
