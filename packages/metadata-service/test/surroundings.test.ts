/** The process around the decisions: TLS, HTTP, flags, speed, what is left when it cannot start. */
import { execFileSync, spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { credentials } from '@grpc/grpc-js';
import { call } from '@holdfast/common';
import { holdfast, type ServiceInfo__Output } from '@holdfast/proto';
import { afterAll, afterEach, beforeAll, describe, expect, it, onTestFinished } from 'vitest';
import { startMetadataService } from '../src/index.ts';
import { Cluster, quietLogger } from './cluster.ts';
import { FakeDisk, until } from './fake-agent.ts';

const directory = mkdtempSync(join(tmpdir(), 'holdfast-surroundings-'));
afterAll(() => rmSync(directory, { recursive: true, force: true }));
const packageDirectory = join(dirname(fileURLToPath(import.meta.url)), '..');
let cluster: Cluster | undefined;
afterEach(async () => {
  await cluster?.stop();
  cluster = undefined;
});

const info = (client: InstanceType<typeof holdfast.Metadata>): Promise<ServiceInfo__Output> =>
  call(client, client.GetServiceInfo, {}, { timeoutMs: 5000 });

describe('HTTP', () => {
  it('serves metrics and health, and nothing else', async () => {
    const service = await startMetadataService({
      listen: '127.0.0.1:0',
      http: '127.0.0.1:0',
      store: 'memory',
      logger: quietLogger(),
    });
    const client = new holdfast.Metadata(service.address, credentials.createInsecure());
    await info(client);
    const get = async (path: string, method = 'GET'): Promise<{ status: number; text: string }> => {
      const response = await fetch(`http://${service.httpAddress}${path}`, { method });
      return { status: response.status, text: await response.text() };
    };
    expect(await get('/healthz')).toEqual({ status: 200, text: 'ok\n' });
    expect(await get('/readyz')).toEqual({ status: 200, text: 'ok\n' });
    const metrics = await get('/metrics');
    expect(metrics.text).toContain('holdfast_metadata_term 1');
    expect(metrics.text).toContain(
      'holdfast_metadata_call_seconds_count{method="GetServiceInfo",code="OK"} 1',
    );
    expect((await get('/else')).status).toBe(404);
    expect((await get('/metrics', 'POST')).status).toBe(405);
    client.close();
    await service.close();
    await expect(get('/healthz')).rejects.toThrow('fetch failed');
  });

  it('shows what the pools and hosts are', async () => {
    cluster = await Cluster.start({ http: '127.0.0.1:0' });
    const disk = new FakeDisk();
    const agent = await cluster.node('node-1', [disk]);
    await agent.allocate(disk, 24);
    const text = await (await fetch(`http://${cluster.service.httpAddress}/metrics`)).text();
    for (const line of [
      'holdfast_metadata_pool_slabs{pool="pool",use="free"} 1000',
      'holdfast_metadata_pool_slabs{pool="pool",use="ahead"} 24',
      'holdfast_metadata_hosts{pool="pool",state="LIVE"} 1',
      'holdfast_metadata_agents_connected 1',
      'holdfast_metadata_audit_records_total{event="authority"} 1',
    ]) {
      expect(text).toContain(line);
    }
  });
});

describe('mutual TLS', () => {
  const file = (name: string): string => join(directory, name);
  beforeAll(() => {
    const openssl = (...args: string[]): void => {
      execFileSync('openssl', args, { cwd: directory, stdio: 'ignore' });
    };
    writeFileSync(file('san'), 'subjectAltName=IP:127.0.0.1,DNS:localhost\n');
    for (const ca of ['ca', 'stranger']) {
      openssl(
        'req',
        '-x509',
        '-newkey',
        'ec',
        '-pkeyopt',
        'ec_paramgen_curve:P-256',
        '-nodes',
        '-keyout',
        `${ca}.key`,
        '-out',
        `${ca}.crt`,
        '-days',
        '1',
        '-subj',
        `/CN=${ca}`,
      );
    }
    for (const [name, ca] of [
      ['server', 'ca'],
      ['client', 'ca'],
      ['wrong', 'stranger'],
    ] as const) {
      openssl(
        'req',
        '-newkey',
        'ec',
        '-pkeyopt',
        'ec_paramgen_curve:P-256',
        '-nodes',
        '-keyout',
        `${name}.key`,
        '-out',
        `${name}.csr`,
        '-subj',
        `/CN=${name}`,
      );
      openssl(
        'x509',
        '-req',
        '-in',
        `${name}.csr`,
        '-CA',
        `${ca}.crt`,
        '-CAkey',
        `${ca}.key`,
        '-CAcreateserial',
        '-out',
        `${name}.crt`,
        '-days',
        '1',
        '-extfile',
        'san',
      );
    }
  });

  it('lets in who shows a certificate of the CA, and nobody else', async () => {
    const tls = { ca: file('ca.crt'), cert: file('server.crt'), key: file('server.key') };
    const service = await startMetadataService({
      listen: '127.0.0.1:0',
      store: 'memory',
      logger: quietLogger(),
      tls,
    });
    const ca = readFileSync(tls.ca);
    const pair = (name: string): [Buffer, Buffer] => [
      readFileSync(file(`${name}.key`)),
      readFileSync(file(`${name}.crt`)),
    ];
    const attempt = async (how: ReturnType<typeof credentials.createInsecure>): Promise<string> => {
      const client = new holdfast.Metadata(service.address, how);
      try {
        return (await info(client)).store_kind;
      } finally {
        client.close();
      }
    };
    expect(await attempt(credentials.createSsl(ca, ...pair('client')))).toBe('memory');
    await expect(attempt(credentials.createSsl(ca))).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    await expect(attempt(credentials.createSsl(ca, ...pair('wrong')))).rejects.toMatchObject({
      code: 'UNAVAILABLE',
    });
    await expect(attempt(credentials.createInsecure())).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    await service.close();
  });

  it('does not start without its files, and leaves nothing open', async () => {
    const tls = { ca: file('no.crt'), cert: file('server.crt'), key: file('server.key') };
    const store = `sqlite:${file('tls.db')}`;
    await expect(
      startMetadataService({ listen: '127.0.0.1:0', store, tls, logger: quietLogger() }),
    ).rejects.toThrow('--tls-ca');
    const service = await startMetadataService({ listen: '127.0.0.1:0', store, logger: quietLogger() });
    await service.close();
  });
});

describe('starting and stopping', () => {
  it('refuses a store that it does not know and an address in use, and gives the database back', async () => {
    await expect(
      startMetadataService({ listen: '127.0.0.1:0', store: 'etcd:x', logger: quietLogger() }),
    ).rejects.toThrow('sqlite:PATH or memory');
    const store = `sqlite:${directory}/busy.db`;
    cluster = await Cluster.start();
    await expect(
      startMetadataService({ listen: cluster.service.address, store, logger: quietLogger() }),
    ).rejects.toThrow('No address added');
    await (await startMetadataService({ listen: '127.0.0.1:0', store, logger: quietLogger() })).close();
  });

  it('answers waiting calls when it stops', async () => {
    cluster = await Cluster.start();
    const c = cluster;
    const disk = new FakeDisk();
    const agent = await c.node('node-1', [disk]);
    const { uuid } = await c.create('pvc');
    await agent.openVolume(disk, uuid, await c.publish(uuid, agent));
    agent.mute.add('revoke');
    const waiting = Promise.allSettled([c.unpublish(uuid, agent)]);
    await until(() => agent.orders.some((order) => order.revoke), 'revoking');
    const started = performance.now();
    await c.service.close();
    expect(performance.now() - started).toBeLessThan(3000);
    expect(await waiting).toMatchObject([{ status: 'rejected', reason: { code: 'UNAVAILABLE' } }]);
  });

  it('as a process: says what is wrong with its flags, serves, makes backups, and ends at SIGTERM', async () => {
    execFileSync(join(packageDirectory, '..', '..', 'node_modules', '.bin', 'tsc'), ['-b', packageDirectory]);
    const main = join(packageDirectory, 'dist', 'main.js');
    const run = (...flags: string[]): string => {
      try {
        execFileSync(process.execPath, [main, ...flags], { stdio: 'pipe', encoding: 'utf8' });
        return '';
      } catch (error) {
        return (error as { stderr: string }).stderr;
      }
    };
    expect(run('--store', 'memory')).toContain("required option '--listen <address>'");
    expect(run('--listen', 'x:1', '--store', 'memory', '--tls-ca', 'x')).toContain('belong together');
    const backup = join(directory, 'backup.db');
    const socket = join(directory, `${randomUUID()}.sock`);
    const child = spawn(
      process.execPath,
      [main, '--listen', socket, '--store', `sqlite:${directory}/process.db`, '--backup', backup],
      { stdio: 'ignore' },
    );
    const ended = new Promise((resolve) => child.once('exit', resolve));
    await until(() => existsSync(socket), 'socket');
    const client = new holdfast.Metadata(`unix:${socket}`, credentials.createInsecure());
    onTestFinished(() => void child.kill('SIGKILL'));
    // The file of a socket is there a moment before anybody listens.
    let answer: ServiceInfo__Output | undefined;
    for (let tries = 0; answer === undefined && tries < 50; tries += 1) {
      answer = await info(client).catch(() => undefined);
      if (answer === undefined) await new Promise((resolve) => setTimeout(resolve, 100));
    }
    expect(answer).toMatchObject({ store_kind: 'sqlite', incarnation: '1', term: '1' });
    await until(() => existsSync(backup), 'backup');
    client.close();
    child.kill('SIGTERM');
    expect(await ended).toBe(0);
    expect(existsSync(socket)).toBe(false);
    const copy = await startMetadataService({
      listen: '127.0.0.1:0',
      store: `sqlite:${backup}`,
      logger: quietLogger(),
    });
    await copy.close();
  }, 60_000);
});
