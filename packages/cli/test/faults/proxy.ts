/**
 * Stands between agents and the metadata service and makes the network bad: messages of the session are held back and
 * sent twice, unary calls are made twice, made late, or lose their answer. Nothing is invented and nothing is reordered
 * within a stream, as a network with retransmissions and a restarting proxy would have it.
 */
import { holdfast, type AgentMessage__Output, type ServiceMessage } from '@holdfast/proto';
import { GrpcStatus, isServiceError, serve, toGrpcStatus, type GrpcServer } from '@holdfast/common';
import {
  credentials,
  Metadata,
  type sendUnaryData,
  type ServerDuplexStream,
  type ServerUnaryCall,
} from '@grpc/grpc-js';
import { pause } from './cluster.ts';

const methods = [
  'JoinPool',
  'PoolReady',
  'StageVolume',
  'VolumeOpened',
  'ReturnVolume',
  'AllocateSlabs',
  'ReportSlabs',
  'ReturnSlabs',
] as const;

export interface BadNetwork {
  server: GrpcServer;
  counts: { repeatedOrders: number; repeatedResults: number; repeatedCalls: number; lostAnswers: number };
}

type Upstream = InstanceType<typeof holdfast.Agents>;
type Raw = (request: object, callback: (error: Error | null, response: object) => void) => void;

export async function badNetwork(upstreamAddress: () => string, maxDelayMs: number): Promise<BadNetwork> {
  const counts = { repeatedOrders: 0, repeatedResults: 0, repeatedCalls: 0, lostAnswers: 0 };
  let client: Upstream | undefined;
  const upstream = (): Upstream =>
    (client ??= new holdfast.Agents(upstreamAddress(), credentials.createInsecure(), {
      'grpc.initial_reconnect_backoff_ms': 50,
      'grpc.max_reconnect_backoff_ms': 500,
    }));
  const late = (): Promise<void> => pause(Math.random() * maxDelayMs);
  const chance = (part: number): boolean => Math.random() < part;

  const once = (method: (typeof methods)[number], request: object): Promise<object> =>
    new Promise((resolve, reject) => {
      const target = upstream();
      (target[method] as unknown as Raw).call(target, request, (error, response) =>
        error ? reject(error) : resolve(response),
      );
    });

  const unary =
    (method: (typeof methods)[number]) =>
    (call: ServerUnaryCall<object, object>, callback: sendUnaryData<object>): void => {
      const run = async (): Promise<object> => {
        await late();
        const first = await once(method, call.request);
        if (chance(0.15)) {
          counts.repeatedCalls += 1;
          await late();
          return await once(method, call.request);
        }
        if (chance(0.1)) {
          counts.lostAnswers += 1;
          throw Object.assign(new Error('the answer was lost'), {
            code: GrpcStatus.UNAVAILABLE,
            details: 'the answer was lost on the way',
            metadata: new Metadata(),
          });
        }
        return first;
      };
      run().then(
        (response) => callback(null, response),
        (error: unknown) => callback(isServiceError(error) ? error : toGrpcStatus(error)),
      );
    };

  const session = (down: ServerDuplexStream<AgentMessage__Output, ServiceMessage>): void => {
    const up = upstream().Session();
    let toService = Promise.resolve();
    let toAgent = Promise.resolve();
    down.on('data', (message: AgentMessage__Output) => {
      toService = toService.then(async () => {
        await late();
        up.write(message);
        if (message.order_result && chance(0.3)) {
          counts.repeatedResults += 1;
          up.write(message);
        }
      });
    });
    up.on('data', (message: ServiceMessage) => {
      toAgent = toAgent.then(async () => {
        await late();
        down.write(message);
        if (message.order && chance(0.3)) {
          counts.repeatedOrders += 1;
          await late();
          down.write(message);
        }
      });
    });
    up.on('error', () => down.end());
    up.on('end', () => void toAgent.then(() => down.end()));
    down.on('end', () => void toService.then(() => up.end()));
    down.on('cancelled', () => up.cancel());
  };

  const handlers = Object.fromEntries(methods.map((method) => [method, unary(method)]));
  const server = await serve('127.0.0.1:0', (s) =>
    s.addService(holdfast.Agents.service, { ...handlers, Session: session }),
  );
  return { server, counts };
}
