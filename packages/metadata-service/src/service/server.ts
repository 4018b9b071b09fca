/** Puts the service together and starts it, as a process (main.ts) or inside another one (tests, `holdfast dev up`). */
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { mkdirSync } from 'node:fs';
import { dirname } from 'node:path';
import {
  ServerCredentials,
  status,
  type handleUnaryCall,
  type UntypedServiceImplementation,
} from '@grpc/grpc-js';
import { createLogger, HoldfastError, serve, type Logger } from '@holdfast/common';
import { holdfast } from '@holdfast/proto';
import { MemoryStore } from '../store/memory.ts';
import { SqliteStore } from '../store/sqlite.ts';
import type { Store } from '../store/store.ts';
import { AgentsApi } from './agents-service.ts';
import { systemClock } from './clock.ts';
import { Core } from './core.ts';
import { Heartbeats } from './heartbeats.ts';
import { serveHttp } from './http.ts';
import { MetadataApi } from './metadata-service.ts';
import { Metrics } from './metrics.ts';
import { Operations } from './operations.ts';
import { Sessions } from './sessions.ts';

export interface TlsFiles {
  /** Of the certificates that clients must show. */
  ca: string;
  cert: string;
  key: string;
}

export interface MetadataServiceOptions {
  /** host:port (port 0: any) or a unix socket's path. */
  listen: string;
  /** host:port for metrics and health; undefined: none. */
  http?: string;
  /** `sqlite:PATH`, `memory`, or a store that the caller has opened and closes itself. */
  store: string | Store;
  /** Mutual TLS. Without it the service trusts whoever reaches the socket. */
  tls?: TlsFiles;
  logger?: Logger;
  /** Most provisioned bytes as a multiple of a pool's size; 0 or absent: no limit. */
  overcommitLimit?: number;
  /** Folded layers below a volume's writable layer are stripped at most this often. */
  stripIntervalMs?: number;
  /** They are compacted into it at most this often, */
  compactIntervalMs?: number;
  /** when a smaller share of their slabs is live; 0: never. */
  compactBelow?: number;
}

export interface MetadataService {
  readonly address: string;
  readonly httpAddress: string | undefined;
  /** Writes a consistent copy of the database to a file, while the service works. False: the store has no file. */
  backup(path: string): Promise<boolean>;
  /** Ends sessions and calls, waits for the operations' current step, closes the store that it opened. */
  close(): Promise<void>;
}

export function openStore(spec: string): Store {
  if (spec === 'memory') return new MemoryStore();
  const path = /^sqlite:(.+)$/.exec(spec)?.[1];
  if (path === undefined) {
    throw new HoldfastError('INVALID_ARGUMENT', `--store takes sqlite:PATH or memory, not ${spec}.`);
  }
  mkdirSync(dirname(path), { recursive: true });
  return new SqliteStore(path);
}

export async function startMetadataService(options: MetadataServiceOptions): Promise<MetadataService> {
  const logger = options.logger ?? createLogger('metadata-service');
  const credentials =
    options.tls === undefined ? ServerCredentials.createInsecure() : tlsCredentials(options.tls);
  const store = typeof options.store === 'string' ? openStore(options.store) : options.store;
  const closeStore = async (): Promise<void> => {
    if (typeof options.store === 'string') await store.close();
  };
  const undo: (() => Promise<void>)[] = [closeStore];
  try {
    const core = await Core.open(store, {
      clock: systemClock,
      logger,
      newId: randomUUID,
      overcommitLimit: options.overcommitLimit ?? 0,
    });
    const sessions = new Sessions(core);
    const operations: Operations = new Operations(core, sessions, {
      ...(options.stripIntervalMs === undefined ? {} : { stripIntervalMs: options.stripIntervalMs }),
      ...(options.compactIntervalMs === undefined ? {} : { compactIntervalMs: options.compactIntervalMs }),
      ...(options.compactBelow === undefined ? {} : { compactBelow: options.compactBelow }),
      onCompact: (run) => metrics.compacted(run),
      onCut: (seconds) => metrics.cutHeld.observe(seconds),
    });
    const metrics: Metrics = new Metrics(core, sessions, operations);
    core.onAudit = ({ sequence, event, poolUuid, volumeUuid, nodeId, epoch, generation, proof, detail }) => {
      metrics.audited.inc({ event });
      logger.info(
        {
          audit: event,
          sequence: sequence.toString(),
          pool: poolUuid,
          volume: volumeUuid,
          node: nodeId,
          epoch: epoch.toString(),
          generation: generation.toString(),
          proof,
        },
        detail || event,
      );
    };
    const agents = new AgentsApi(core, sessions).handlers();
    const heartbeats = new Heartbeats(core, sessions);
    const metadata = new MetadataApi(core, sessions, operations, heartbeats).handlers();
    operations.start();
    const watching = heartbeats.run();
    undo.push(async () => {
      core.stop();
      await operations.stop();
      await watching;
    });
    const server = await serve(
      options.listen,
      (grpc) => {
        grpc.addService(holdfast.Metadata.service, timed(metrics, metadata));
        grpc.addService(holdfast.Agents.service, timed(metrics, agents));
      },
      credentials,
    );
    // Waiting calls are answered by the core's stop, which comes first.
    undo.push(async () => {
      core.stop();
      for (const session of sessions.all()) session.link.end('The metadata service stops.');
      await server.close(2000);
    });
    const http = options.http === undefined ? undefined : await serveHttp(options.http, core, metrics);
    if (http !== undefined) undo.push(() => http.close());
    logger.info(
      {
        address: server.address,
        http: http?.address,
        store: store.kind,
        storeId: core.service.storeId,
        incarnation: core.service.incarnation.toString(),
        term: core.service.term.toString(),
        tls: options.tls !== undefined,
      },
      'The metadata service is up',
    );
    return {
      address: server.address,
      httpAddress: http?.address,
      backup: (path) => core.backup(path),
      close: () => unwind(undo),
    };
  } catch (error) {
    await unwind(undo);
    throw error;
  }
}

async function unwind(undo: (() => Promise<void>)[]): Promise<void> {
  for (let step = undo.pop(); step !== undefined; step = undo.pop()) await step();
}

function tlsCredentials(files: TlsFiles): ServerCredentials {
  const read = (name: keyof TlsFiles): Buffer => {
    try {
      return readFileSync(files[name]);
    } catch (error) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `--tls-${name} ${files[name]} cannot be read: ${String(error)}`,
        {
          cause: error,
        },
      );
    }
  };
  return ServerCredentials.createSsl(
    read('ca'),
    [{ private_key: read('key'), cert_chain: read('cert') }],
    true,
  );
}

/** Measures every unary call; streams are not. */
function timed(metrics: Metrics, handlers: object): UntypedServiceImplementation {
  const measured: UntypedServiceImplementation = {};
  for (const [method, handler] of Object.entries(handlers) as [string, handleUnaryCall<unknown, unknown>][]) {
    if (method === 'Session' || method === 'ListChanges') {
      measured[method] = handler;
      continue;
    }
    measured[method] = ((call, callback) => {
      const end = metrics.calls.startTimer({ method });
      handler(call, (error, ...rest) => {
        const code = error && 'code' in error && error.code !== undefined ? error.code : status.OK;
        end({ code: status[code] });
        callback(error, ...rest);
      });
    }) satisfies handleUnaryCall<unknown, unknown>;
  }
  return measured;
}
