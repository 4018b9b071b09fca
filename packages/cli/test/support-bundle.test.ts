/** `holdfast support-bundle` as a person runs it, without a service and with secrets in everything that it reads. */
import { mkdir, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { buildProgram } from '../src/program.ts';
import { redact } from '../src/support/redact.ts';

const secrets = {
  json: 'hunter2-in-json',
  escaped: 'hunter2-escaped',
  flag: 'hunter2-on-a-command-line',
  environment: 'hunter2-in-the-environment',
  url: 'hunter2-in-a-url',
  bearer: 'hunter2.in-a-header',
  yaml: 'hunter2-in-yaml',
  key: 'aHVudGVyMi1rZXk',
};

describe('support-bundle', () => {
  let dir: string;
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), 'holdfast-bundle-'));
    await mkdir(join(dir, 'logs'));
  });
  afterEach(async () => {
    vi.unstubAllEnvs();
    vi.restoreAllMocks();
    await rm(dir, { recursive: true, force: true });
  });

  it('works without a service, says what is missing, and holds no secret that it met', async () => {
    await writeFile(
      join(dir, 'logs/agent.log'),
      [
        `{"msg":"opened","csi_secret_password":"${secrets.json}","volume":"pvc-1"}`,
        `{"msg":"{\\"token\\": \\"${secrets.escaped}\\"}"}`,
        `started with --reservation-token ${secrets.flag} --device /dev/sda`,
        `GET https://admin:${secrets.url}@array.example/api Authorization: Bearer ${secrets.bearer}`,
        `-----BEGIN EC PRIVATE KEY-----\n${secrets.key}\n-----END EC PRIVATE KEY-----`,
      ].join('\n'),
    );
    await writeFile(join(dir, 'values.yaml'), `array:\n  apiKey: ${secrets.yaml}\n  host: array.example\n`);
    vi.stubEnv('HOLDFAST_BACKUP_SECRET', secrets.environment);
    vi.stubEnv('HOLDFAST_METADATA', '127.0.0.1:1');
    const said = vi.spyOn(console, 'log').mockImplementation(() => undefined);
    const archive = join(dir, 'out.tar.gz');
    const words = ['support-bundle', '-o', archive, '--no-check', '--logs', join(dir, 'logs')];
    await buildProgram().parseAsync([...words, '--config', join(dir, 'values.yaml')], { from: 'user' });

    expect((await stat(archive)).mode & 0o777).toBe(0o600);
    await mkdir(join(dir, 'x'));
    await execa('tar', ['-xzf', archive, '-C', join(dir, 'x')]);
    const text = async (path: string): Promise<string> => readFile(join(dir, 'x', path), 'utf8');
    const readme = await text('README.txt');
    expect(readme).toContain('logs/agent.log: the end of agent.log');
    for (const part of ['info', 'pools', 'nodes', 'volumes', 'snapshots', 'audit']) {
      expect(readme).toMatch(new RegExp(`service/${part}.json: .*127.0.0.1:1 does not answer`));
    }
    expect(said.mock.calls.flat().join('\n')).toContain('Missing: service/pools.json');
    expect(await text('machine/facts.json')).toContain('"kernel": "Linux');
    const log = await text('logs/agent.log');
    expect(log).toContain('"volume":"pvc-1"');
    expect(log).toContain('--device /dev/sda');
    expect(await text('config/0-values.yaml')).toContain('host: array.example');
    const found = await execa('grep', ['-rEl', 'hunter2|aHVudGVyMi1rZXk', join(dir, 'x')], { reject: false });
    expect(found.stdout).toBe('');
    expect(found.exitCode).toBe(1);
  });
});

describe('redact', () => {
  it('leaves what is no secret as it is', () => {
    const line =
      '{"level":30,"msg":"Joined a pool","pool":"0b0e3c8e-5d5e-4a06-9f6f-0f2f3f6e2d11","epoch":"42"}';
    expect(redact(line)).toBe(line);
  });
});
