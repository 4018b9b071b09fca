/** The `holdfast` command and the development cluster, for real: processes, a loop disk, mounts. */
import { execFile } from 'node:child_process';
import {
  closeSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { call } from '@holdfast/common';
import { loopDevices, mounts } from '../src/dev/mounts.ts';
import { isAlive } from '../src/dev/processes.ts';
import { readState, type Role } from '../src/dev/state.ts';
import { compareFiles, missingRecords, writeFiles } from '../src/harness/content.ts';
import { CsiCluster } from '../src/harness/csi.ts';
import { DevUp } from '../src/harness/dev-process.ts';
import { Writer } from '../src/harness/writer-process.ts';

const cli = fileURLToPath(new URL('../dist/main.js', import.meta.url));

interface Run {
  code: number;
  stdout: string;
  stderr: string;
}

function holdfast(args: string[], env: NodeJS.ProcessEnv = {}): Promise<Run> {
  return new Promise((resolve) => {
    execFile(
      process.execPath,
      [cli, ...args],
      { env: { ...process.env, ...env }, maxBuffer: 16 << 20 },
      (error, stdout, stderr) => {
        const code = error === null ? 0 : typeof error.code === 'number' ? error.code : 1;
        resolve({ code, stdout, stderr });
      },
    );
  });
}

/** The first four bytes of a (large, sparse) file. */
function readStart(path: string): string {
  const file = openSync(path, 'r');
  const bytes = Buffer.alloc(4);
  readSync(file, bytes, 0, 4, 0);
  closeSync(file);
  return bytes.toString('latin1');
}

/** Resolves when a process of `role` runs that is not `pid`. */
async function untilReplaced(up: DevUp, role: Role, pid: number): Promise<void> {
  const deadline = Date.now() + 20_000;
  while (up.processes({ role }).every((p) => p.pid === pid)) {
    if (Date.now() > deadline) throw new Error(`${role} did not come back`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'holdfast-cli-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

describe('pool format and pool check', () => {
  it('makes a pool of an image, refuses to overwrite it silently, and finds it clean', async () => {
    const image = join(directory, 'disk.img');
    writeFileSync(image, '');
    truncateSync(image, 2 ** 30);
    const made = await holdfast([
      'pool',
      'format',
      image,
      '--name',
      'p',
      '--fencing',
      'lease-only',
      '-o',
      'json',
    ]);
    expect(made.stderr).toBe('');
    const info = JSON.parse(made.stdout) as { uuid: string; fencing: string; slabCount: string };
    expect(info).toMatchObject({ name: 'p', fencing: 'lease-only', device: image });
    expect(Number(info.slabCount)).toBeGreaterThan(50);

    const again = await holdfast(['pool', 'format', image, '--name', 'q']);
    expect(again.code).toBe(1);
    expect(again.stderr).toContain('--force');

    const checked = await holdfast(['pool', 'check', image, '-o', 'json']);
    expect(checked.code).toBe(0);
    expect(JSON.parse(checked.stdout)).toMatchObject({ clean: true, slabsClaimed: '0' });
    expect((await holdfast(['pool', 'check', image])).stdout).toContain('clean');
  });

  it('refuses what is no pool with a sentence and exit code 1', async () => {
    const image = join(directory, 'disk.img');
    writeFileSync(image, Buffer.alloc(1 << 20, 7));
    const checked = await holdfast(['pool', 'check', image]);
    expect(checked.code).toBe(1);
    expect(checked.stderr.trim().split('\n')).toHaveLength(1);
    expect(checked.stderr).toContain(image);
  });
});

describe('dev up', () => {
  it('gives a whole cluster that the other commands find, and takes everything away again', async () => {
    const up = await DevUp.start({
      dir: join(directory, 'dev'),
      nodes: 2,
      size: '2G',
      env: { HOLDFAST_DEV_REGISTRY: join(directory, 'registry') },
    });
    const env = { HOLDFAST_DEV_REGISTRY: join(directory, 'registry'), HOLDFAST_METADATA: '' };
    try {
      const pools = JSON.parse((await holdfast(['pool', 'list', '-o', 'json'], env)).stdout) as object[];
      expect(pools).toMatchObject([{ uuid: up.state.disk.poolUuid, state: 'active', fencing: 'loop' }]);
      const nodes = JSON.parse((await holdfast(['-o', 'json', 'node', 'list'], env)).stdout) as object[];
      expect(nodes).toMatchObject([
        { name: 'node-1', connected: true, hosts: [{ state: 'live', generation: '1' }] },
        { name: 'node-2', connected: true, hosts: [{ state: 'live', generation: '1' }] },
      ]);
      expect((await holdfast(['volume', 'list'], env)).stdout).toContain('no volumes');
      expect((await holdfast(['node', 'show', 'node-9'], env)).stderr).toContain('no node "node-9"');
      expect((await holdfast(['pool', 'show', 'dev'], env)).stdout).toContain('live');
      expect((await holdfast(['dev', 'status'], env)).stdout).toContain('node-2');

      const wrong = await holdfast(['volume', 'show', 'nothing', '-o', 'json'], env);
      expect(wrong.code).toBe(1);
      expect(JSON.parse(wrong.stderr)).toMatchObject({ code: 'NOT_FOUND' });
      expect((await holdfast(['volume', 'show'], env)).code).toBe(2);

      // A power cut, a fence by hand, and the way back.
      expect((await holdfast(['dev', 'kill-node', '2'], env)).code).toBe(0);
      expect((await holdfast(['dev', 'status'], env)).stdout).toMatch(/node-2 +off/);
      const fenced = await holdfast(['node', 'fence', 'node-2', '-o', 'json'], env);
      expect(JSON.parse(fenced.stdout)).toMatchObject([{ state: 'dead', generation: '1' }]);
      const audit = await holdfast(['audit', '--node', 'node-2'], env);
      expect(audit.stdout).toContain('lock-free');
      expect((await holdfast(['dev', 'start-node', '2'], env)).code).toBe(0);
      const again = JSON.parse(
        (await holdfast(['node', 'show', 'node-2', '-o', 'json'], env)).stdout,
      ) as object;
      expect(again).toMatchObject({ connected: true, hosts: [{ state: 'live', generation: '2' }] });
    } finally {
      expect(await up.close()).toEqual([]);
    }
    expect(readState(up.dir)).toBeUndefined();
  }, 90_000);

  it('brings a killed agent, plugin, controller and metadata service back, and a volume works on', async () => {
    const up = await DevUp.start({ dir: join(directory, 'dev'), nodes: 1, size: '2G' });
    const cluster = new CsiCluster(up.state);
    try {
      const volume = await cluster.create('v', 256n << 20n, 'ext4');
      const at = await cluster.attach(volume, 1);
      const sums = writeFiles(join(at.targetPath, 'files'), 10, 1);
      for (const role of ['metadata-service', 'csi-controller', 'csi-node', 'agent'] as const) {
        const [process_] = up.processes({ role });
        if (process_ === undefined) throw new Error(`no ${role} runs`);
        process.kill(process_.pid, 'SIGKILL');
        await untilReplaced(up, role, process_.pid);
        expect(compareFiles(join(at.targetPath, 'files'), sums)).toEqual([]);
      }
      const more = writeFiles(join(at.targetPath, 'more'), 10, 50);
      expect(compareFiles(join(at.targetPath, 'more'), more)).toEqual([]);
      await cluster.detach(at);
      await cluster.delete(volume);
      await cluster.untilEmpty(20_000);
    } finally {
      cluster.close();
      expect(await up.close()).toEqual([]);
    }
  }, 90_000);

  it('hands a mounted volume over when its agent is stopped, and when the metadata service does not answer', async () => {
    const up = await DevUp.start({ dir: join(directory, 'dev'), nodes: 1, size: '2G' });
    const cluster = new CsiCluster(up.state);
    const one = (role: 'agent' | 'metadata-service'): number => up.processes({ role })[0]?.pid ?? 0;
    const frozen = one('metadata-service');
    try {
      const volume = await cluster.create('v', 256n << 20n, 'ext4');
      const at = await cluster.attach(volume, 1);
      process.kill(frozen, 'SIGSTOP');
      for (const signal of ['SIGTERM', 'SIGKILL'] as const) {
        const agent = one('agent');
        const writer = new Writer(join(at.targetPath, signal), 1);
        await writer.untilAcknowledged(20, 10_000);
        process.kill(agent, signal);
        // The old agent serves until it has handed over, which may take a moment: the new one must be seen first.
        await untilReplaced(up, 'agent', agent);
        await writer.untilAcknowledged(writer.acknowledged + 400, 30_000);
        await writer.end(0);
        expect(writer.ended).toBe('');
        expect(missingRecords(writer.path, 1, writer.acknowledged)).toEqual([]);
      }
      process.kill(frozen, 'SIGCONT');
      await cluster.detach(at);
      await cluster.delete(volume);
      await cluster.untilEmpty(20_000);
    } finally {
      process.kill(frozen, 'SIGCONT');
      cluster.close();
      expect(await up.close()).toEqual([]);
    }
  }, 90_000);

  it('uses its disk again, with the volumes on it', async () => {
    const dir = join(directory, 'dev');
    let up = await DevUp.start({ dir, nodes: 1, size: '2G' });
    let cluster = new CsiCluster(up.state);
    const { poolUuid } = up.state.disk;
    const volume = await cluster.create('v', 256n << 20n, 'ext4');
    const at = await cluster.attach(volume, 1);
    const sums = writeFiles(join(at.targetPath, 'files'), 10, 1);
    await cluster.detach(at);
    cluster.close();
    expect(await up.close()).toEqual([]);

    up = await DevUp.start({ dir, nodes: 1, size: '2G' });
    cluster = new CsiCluster(up.state);
    try {
      expect(up.state.disk.poolUuid).toBe(poolUuid);
      const again = await cluster.attach(volume, 1);
      expect(compareFiles(join(again.targetPath, 'files'), sums)).toEqual([]);
      await cluster.detach(again);
    } finally {
      cluster.close();
      expect(await up.close()).toEqual([]);
    }
  }, 90_000);

  it('leaves nothing behind after it was killed itself with a volume mounted: dev down removes it', async () => {
    const dir = join(directory, 'dev');
    const up = await DevUp.start({ dir, nodes: 2, size: '2G' });
    const cluster = new CsiCluster(up.state);
    const volume = await cluster.create('v', 256n << 20n, 'ext4');
    const at = await cluster.attach(volume, 1);
    writeFiles(join(at.targetPath, 'files'), 10, 1);
    const agent = cluster.agent(1);
    const { volumes } = await call(agent, agent.ListOpenVolumes, {});
    const devices = volumes.map((v) => v.device_path);
    expect(devices).toHaveLength(1);
    cluster.close();
    await new Promise((resolve) => setTimeout(resolve, 1500));
    const state = up.state;
    // A number may be somebody else's by the time it is looked at again; its attachment is named by diskseq.
    const attachment = (device: string): string => {
      const name = device.replace('/dev/', '');
      const file = loopDevices().get(device);
      return file === undefined ? '' : readFileSync(`/sys/block/${name}/diskseq`, 'utf8').trim();
    };
    const attached = [state.disk.device, ...devices].map((device) => [device, attachment(device)] as const);
    process.kill(state.supervisor.pid, 'SIGKILL');
    const down = await holdfast(['dev', 'down', '--dir', dir]);
    expect(down.stderr).toBe('');
    expect(down.code).toBe(0);
    expect(state.processes.filter(isAlive)).toEqual([]);
    expect(mounts().filter((m) => m.mountPoint.startsWith(`${dir}/`))).toEqual([]);
    expect(attached.filter(([device, was]) => was === '' || attachment(device) === was)).toEqual([]);
    expect(readStart(state.disk.image)).toBe('HFSB');
  }, 90_000);

  it('says what is wrong when a part does not start, and leaves nothing', async () => {
    const dir = join(directory, 'dev');
    const first = await holdfast(['dev', 'up', '--dir', dir, '--nodes', '1', '--size', '1M']);
    expect(first.code).toBe(1);
    expect(first.stderr).toContain('at least');
    expect([...loopDevices().values()].filter((file) => file.startsWith(dir))).toEqual([]);
  }, 60_000);
});
