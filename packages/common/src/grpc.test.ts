import { connect, createServer, type AddressInfo, type Socket } from 'node:net';
import { Client, credentials, type ServiceDefinition } from '@grpc/grpc-js';
import { expect, test } from 'vitest';
import { clientOptions, serve, serverStream } from './grpc.ts';
import { createLogger } from './log.ts';

const asIs = (bytes: Buffer): Buffer => bytes;
const watch = {
  path: '/test.Watcher/Watch',
  requestStream: false,
  responseStream: true,
  requestSerialize: asIs,
  requestDeserialize: asIs,
  responseSerialize: asIs,
  responseDeserialize: asIs,
} as const;
const watcher: ServiceDefinition = { Watch: watch };

/** A network between a client and a port that can fall silent: nothing comes through any more, not even that an end has closed. */
async function network(port: number): Promise<{ port: number; fallSilent(): void; close(): void }> {
  const ends: Socket[] = [];
  let silent = false;
  const listener = createServer({ allowHalfOpen: true }, (near) => {
    const far = connect({ port, host: '127.0.0.1', allowHalfOpen: true });
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      ends.push(from);
      from.on('error', () => undefined);
      from.on('data', (bytes) => {
        if (!silent) to.write(bytes);
      });
    }
  });
  await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
  return {
    port: (listener.address() as AddressInfo).port,
    fallSilent: () => (silent = true),
    close: () => {
      listener.close();
      for (const end of ends) end.destroy();
    },
  };
}

test('a server misses a client whose connection says nothing and does not break', async () => {
  let missed: () => void = () => undefined;
  const isMissed = new Promise<void>((resolve) => (missed = resolve));
  const handler = serverStream<Buffer, Buffer>(
    createLogger('test'),
    'Watch',
    async function* (_, { signal }) {
      yield Buffer.from('welcome');
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
      missed();
    },
  );
  const server = await serve('127.0.0.1:0', (grpc) => grpc.addService(watcher, { Watch: handler }));
  const between = await network(Number(server.address.split(':').pop()));
  const client = new Client(`127.0.0.1:${between.port}`, credentials.createInsecure(), clientOptions);
  try {
    const call = client.makeServerStreamRequest(watch.path, asIs, asIs, Buffer.alloc(0));
    call.on('error', () => undefined);
    await new Promise((resolve) => call.once('data', resolve));
    between.fallSilent();
    // Long before the kernel would (15 minutes of retransmissions), or this test's own timeout ends it.
    await expect(isMissed).resolves.toBeUndefined();
  } finally {
    client.close();
    between.close();
    await server.close(0);
  }
}, 18_000);
