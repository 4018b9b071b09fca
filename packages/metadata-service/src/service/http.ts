/** HTTP for machines that watch the service: /metrics for Prometheus, /healthz and /readyz for probes. */
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { Core } from './core.ts';
import type { Metrics } from './metrics.ts';

export interface HttpServer {
  /** host:port, with the real port where 0 was asked for. */
  readonly address: string;
  close(): Promise<void>;
}

export async function serveHttp(address: string, core: Core, metrics: Metrics): Promise<HttpServer> {
  const { host, port } = splitAddress(address);
  const server = createServer((request, response) => {
    const answer = (code: number, body: string, type = 'text/plain; charset=utf-8'): void => {
      response.writeHead(code, { 'content-type': type, 'cache-control': 'no-store' });
      response.end(body);
    };
    const path = new URL(request.url ?? '/', 'http://holdfast').pathname;
    if (request.method !== 'GET' && request.method !== 'HEAD')
      return answer(405, 'Only GET is served here.\n');
    switch (path) {
      case '/healthz':
        return answer(200, 'ok\n');
      case '/readyz': {
        const problem = unready(core);
        return problem === undefined ? answer(200, 'ok\n') : answer(503, `${problem}\n`);
      }
      case '/metrics':
        metrics.text().then(
          ({ type, body }) => answer(200, body, type),
          (error: unknown) => answer(500, `The metrics cannot be read: ${String(error)}\n`),
        );
        return undefined;
      default:
        return answer(404, 'Here are /metrics, /healthz and /readyz.\n');
    }
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, host, resolve);
  });
  const bound = server.address() as AddressInfo;
  return { address: `${host}:${bound.port}`, close: () => closeServer(server) };
}

/** Ready: the store answers and the service is not stopping. Agents may still be on their way. */
function unready(core: Core): string | undefined {
  if (core.stopped.signal.aborted) return 'The service is stopping.';
  try {
    core.read((tx) => tx.get('service/self'));
    return undefined;
  } catch (error) {
    return `The store does not answer: ${error instanceof Error ? error.message : String(error)}`;
  }
}

function splitAddress(address: string): { host: string; port: number } {
  const at = address.lastIndexOf(':');
  const port = Number(address.slice(at + 1));
  if (at < 0 || !Number.isInteger(port) || port < 0 || port > 65_535) {
    throw new Error(`--http takes host:port, not ${address}.`);
  }
  return { host: address.slice(0, at).replace(/^\[|\]$/g, '') || '0.0.0.0', port };
}

function closeServer(server: Server): Promise<void> {
  return new Promise((resolve) => {
    server.close(() => resolve());
    server.closeAllConnections();
  });
}
