/** gRPC over unix sockets and TCP: servers that refuse a live socket and replace a stale one, promise clients, handlers. */
import { existsSync, mkdirSync, unlinkSync } from 'node:fs';
import { connect } from 'node:net';
import { dirname } from 'node:path';
import {
  Server,
  ServerCredentials,
  Metadata,
  status,
  type ChannelOptions,
  type ClientReadableStream,
  type handleServerStreamingCall,
  type handleUnaryCall,
  type ServerOptions,
  type ServerUnaryCall,
  type ServiceError,
} from '@grpc/grpc-js';
import { fromServiceError, HoldfastError, isServiceError, toGrpcStatus } from './errors.ts';
import type { Logger } from './log.ts';

/** A peer that hangs or was cut off is noticed after 10 s at most, also where no message is under way but a stream is open. */
const connectionOptions: ChannelOptions & ServerOptions = {
  'grpc.max_receive_message_length': 64 << 20,
  'grpc.max_send_message_length': 64 << 20,
  'grpc.keepalive_time_ms': 5000,
  'grpc.keepalive_timeout_ms': 5000,
};

/** `unix:/path`, `/path` or `host:port`, as grpc-js wants it. */
export function grpcTarget(endpoint: string): string {
  if (endpoint.startsWith('unix:')) return `unix:${endpoint.replace(/^unix:(\/\/)?/, '')}`;
  return endpoint.startsWith('/') ? `unix:${endpoint}` : endpoint;
}

export const clientOptions: ChannelOptions = {
  ...connectionOptions,
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.min_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 2000,
};

function socketIsLive(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connect(path);
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', () => resolve(false));
  });
}

export interface GrpcServer {
  readonly server: Server;
  /** host:port for TCP (the real port where 0 was asked for), the path for a unix socket. */
  readonly address: string;
  /** Waits for calls in flight, at most `graceMs`. */
  close(graceMs?: number): Promise<void>;
}

/**
 * Binds and serves. A unix socket gets mode 0700 (only root may talk to it); a stale one is replaced, a live one refused.
 * @throws HoldfastError FAILED_PRECONDITION when another process serves the socket.
 */
export async function serve(
  endpoint: string,
  addServices: (server: Server) => void,
  credentials: ServerCredentials = ServerCredentials.createInsecure(),
): Promise<GrpcServer> {
  const target = grpcTarget(endpoint);
  const path = target.startsWith('unix:') ? target.slice('unix:'.length) : undefined;
  if (path !== undefined) {
    mkdirSync(dirname(path), { recursive: true });
    if (existsSync(path)) {
      if (await socketIsLive(path)) {
        throw new HoldfastError(
          'FAILED_PRECONDITION',
          `Another process already serves ${path}. Stop it, or give this one another socket.`,
        );
      }
      unlinkSync(path);
    }
  }
  const server = new Server(connectionOptions);
  addServices(server);
  const umask = process.umask(0o077);
  try {
    const port = await new Promise<number>((resolve, reject) =>
      server.bindAsync(target, credentials, (error, bound) => (error ? reject(error) : resolve(bound))),
    );
    return {
      server,
      address: path ?? target.replace(/:\d+$/, `:${port}`),
      close: (graceMs = 5000) =>
        new Promise((resolve) => {
          const timer = setTimeout(() => {
            server.forceShutdown();
            // tryShutdown says nothing where a connection was being broken off when it began.
            resolve();
          }, graceMs);
          server.tryShutdown(() => {
            clearTimeout(timer);
            resolve();
          });
        }),
    };
  } finally {
    process.umask(umask);
  }
}

/** What a unary handler gets besides the request. */
export interface CallContext {
  /** Aborted when the client went away or its deadline passed. */
  readonly signal: AbortSignal;
  readonly metadata: Metadata;
  /** Milliseconds until the client gives up; undefined: it waits for ever. */
  timeLeftMs(): number | undefined;
}

/** A unary handler from an async function; errors become statuses (toGrpcStatus) and are logged with the method's name. */
export function unary<Req, Res>(
  logger: Logger,
  method: string,
  body: (request: Req, context: CallContext) => Promise<Res>,
): handleUnaryCall<Req, Res> {
  return (call: ServerUnaryCall<Req, Res>, callback) => {
    const abort = new AbortController();
    call.on('cancelled', () => abort.abort());
    const started = performance.now();
    const deadline = Number(call.getDeadline());
    const timeLeftMs = (): number | undefined =>
      Number.isFinite(deadline) ? Math.max(0, deadline - Date.now()) : undefined;
    const answer = async (): Promise<Res> =>
      body(call.request, { signal: abort.signal, metadata: call.metadata, timeLeftMs });
    answer().then(
      (response) => {
        logger.debug({ method, ms: Math.round(performance.now() - started) }, 'call');
        callback(null, response);
      },
      (error: unknown) => {
        const failed = toGrpcStatus(error);
        const level = failed.code === status.INTERNAL || failed.code === status.UNKNOWN ? 'error' : 'info';
        logger[level](
          {
            method,
            code: status[failed.code],
            ms: Math.round(performance.now() - started),
            err: level === 'error' ? error : undefined,
          },
          failed.details,
        );
        callback(failed);
      },
    );
  };
}

/**
 * A handler that answers with a stream, from an async generator. It is read no faster than the client takes it, and it is
 * ended (its `finally` runs) when the client goes away.
 */
export function serverStream<Req, Res>(
  logger: Logger,
  method: string,
  body: (request: Req, context: CallContext) => AsyncIterable<Res>,
): handleServerStreamingCall<Req, Res> {
  return (call) => {
    const abort = new AbortController();
    let wake: () => void = () => undefined;
    call.on('cancelled', () => {
      abort.abort();
      wake();
    });
    call.on('drain', () => wake());
    const deadline = Number(call.getDeadline());
    const timeLeftMs = (): number | undefined =>
      Number.isFinite(deadline) ? Math.max(0, deadline - Date.now()) : undefined;
    const started = performance.now();
    const send = async (): Promise<void> => {
      const context = { signal: abort.signal, metadata: call.metadata, timeLeftMs };
      for await (const message of body(call.request, context)) {
        if (abort.signal.aborted) return;
        if (call.write(message)) continue;
        await new Promise<void>((resolve) => {
          wake = resolve;
          if (abort.signal.aborted) resolve();
        });
        if (abort.signal.aborted) return;
      }
    };
    send().then(
      () => {
        logger.debug({ method, ms: Math.round(performance.now() - started) }, 'call');
        call.end();
      },
      (error: unknown) => {
        if (abort.signal.aborted) return; // nobody listens any more
        const failed = toGrpcStatus(error);
        const level = failed.code === status.INTERNAL || failed.code === status.UNKNOWN ? 'error' : 'info';
        logger[level]({ method, code: status[failed.code] }, failed.details);
        call.emit('error', failed);
      },
    );
  };
}

type UnaryMethod<Req, Res> = (
  request: Req,
  metadata: Metadata,
  options: { deadline?: Date; signal?: AbortSignal },
  callback: (error: ServiceError | null, response?: Res) => void,
) => { cancel(): void };

export interface CallOptions {
  timeoutMs?: number;
  signal?: AbortSignal;
  metadata?: Metadata;
}

/**
 * One unary call as a promise: `await call(client, client.CreateVolume, request, { timeoutMs })`.
 * Rejects with the HoldfastError that the server threw. The answer's type comes from the generated client's method.
 */
export function call<Req, Res>(
  client: object,
  method: (request: Req, callback: (error: ServiceError | null, response?: Res) => void) => unknown,
  request: NoInfer<Req>,
  options?: CallOptions,
): Promise<Res>;
/** A method whose type is not known here: the answer's type is the caller's word. */
export function call<Res>(
  client: object,
  method: (...args: never[]) => unknown,
  request: object,
  options?: CallOptions,
): Promise<Res>;
export function call<Res>(
  client: object,
  method: (...args: never[]) => unknown,
  request: unknown,
  options: CallOptions = {},
): Promise<Res> {
  return new Promise((resolve, reject) => {
    const deadline =
      options.timeoutMs === undefined ? {} : { deadline: new Date(Date.now() + options.timeoutMs) };
    const active = (method as unknown as UnaryMethod<unknown, Res>).call(
      client,
      request,
      options.metadata ?? new Metadata(),
      deadline,
      (error, response) => {
        if (error) reject(isServiceError(error) ? (fromServiceError(error) as Error) : error);
        else resolve(response as Res);
      },
    );
    if (options.signal?.aborted === true) active.cancel();
    options.signal?.addEventListener('abort', () => active.cancel(), { once: true });
  });
}

/**
 * The messages of a server stream. Leaving the loop early cancels the call.
 * @throws the HoldfastError that the server threw.
 */
export async function* stream<Req, Res>(
  client: object,
  method: (request: Req, metadata: Metadata, options: object) => ClientReadableStream<Res>,
  request: NoInfer<Req>,
  options: CallOptions = {},
): AsyncGenerator<Res> {
  const deadline =
    options.timeoutMs === undefined ? {} : { deadline: new Date(Date.now() + options.timeoutMs) };
  const active = method.call(client, request, options.metadata ?? new Metadata(), deadline);
  const cancel = (): void => active.cancel();
  options.signal?.addEventListener('abort', cancel, { once: true });
  if (options.signal?.aborted === true) cancel();
  try {
    for await (const message of active) yield message as Res;
  } catch (error) {
    throw isServiceError(error) ? fromServiceError(error) : error;
  } finally {
    options.signal?.removeEventListener('abort', cancel);
    // What a cancelled call says afterwards is nobody's concern.
    active.on('error', () => undefined);
    cancel();
  }
}
