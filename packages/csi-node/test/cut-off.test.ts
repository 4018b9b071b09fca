/**
 * Every call of the node plugin is cut off by SIGKILL after each of its steps, and repeated by a new process. The end
 * state has to be the one of an undisturbed call. Formats are finished by a node that knows nothing of the first attempt.
 */
import { existsSync } from 'node:fs';
import { mkdir, readFile, statfs, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { fileSystems } from '@holdfast/common';
import type { Csi } from '@holdfast/proto';
import { TestArea } from '@holdfast/testing';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startCsiNode, type RunningCsiNode } from '../src/csi/index.ts';
import { mountsAt, readMounts } from '../src/mount/mountinfo.ts';
import { blockCapability, mountCapability, NodeClient } from './node-client.ts';
import { StandInAgent } from './stand-in-agent.ts';

const SIZE = 320 << 20;
const crashing = fileURLToPath(new URL('./crashing-node.ts', import.meta.url));
const canGrowMountedExt4 = async (): Promise<boolean> => {
  const status = await readFile('/proc/self/status', 'utf8');
  // CAP_SYS_RESOURCE is bit 24 (linux/capability.h).
  return ((BigInt(`0x${/^CapEff:\s*(\w+)$/m.exec(status)?.[1] ?? '0'}`) >> 24n) & 1n) === 1n;
};

describe('cut off after a step and repeated', () => {
  let area: TestArea;
  let agent: StandInAgent;
  let endpoint: string;
  let staging: string;
  let target: string;
  let node: RunningCsiNode | undefined;
  let client: NodeClient;

  beforeEach(async () => {
    area = await TestArea.create('cut-off');
    agent = await StandInAgent.start(area);
    endpoint = `unix:${area.path('csi.sock')}`;
    staging = area.path('staging');
    target = area.path('pod', 'mount');
    await mkdir(area.path('pod'));
    client = new NodeClient(endpoint);
  });
  afterEach(async () => {
    client.close();
    await stop();
    await area.dispose();
  });
  const start = async (stateDir = area.path('state')): Promise<void> => {
    node = await startCsiNode({ endpoint, agent: agent.endpoint, stateDir });
    client.close();
    client = new NodeClient(endpoint);
  };
  const stop = async (): Promise<void> => {
    await node?.close(0);
    node = undefined;
  };
  /** Runs a call in a process that dies at the step. */
  const cut = async (step: string, nth: number, body: () => Promise<unknown>): Promise<void> => {
    await stop();
    const process_ = await area.spawn(
      'crashing-node',
      process.execPath,
      [
        '--conditions=@holdfast/source',
        '--import',
        'tsx',
        crashing,
        endpoint,
        agent.endpoint,
        area.path('state'),
        step,
        String(nth),
      ],
      { env: { HOLDFAST_LOG_LEVEL: 'error' } },
    );
    client.close();
    client = new NodeClient(endpoint);
    await client.waitUntilServed();
    await expect(body()).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    expect(await process_.ended).toBe('SIGKILL');
  };
  const mountsOf = async (path: string): Promise<number> => mountsAt(await readMounts(), path).length;
  /** Takes the volume down and tells what is left of it. */
  const finish = async (volume: string) => {
    await client.unpublish(volume, target);
    await client.unstage(volume, staging);
    return {
      mounts: (await mountsOf(target)) + (await mountsOf(staging)),
      target: existsSync(target),
      device: agent.device(volume),
    };
  };
  const nothing = { mounts: 0, target: false, device: undefined };
  /** Everything that a workload needs of a volume that was just staged. */
  const use = async (volume: string, capability: Csi.VolumeCapability): Promise<void> => {
    await client.stage(volume, staging, capability);
    await client.publish(volume, staging, target, capability);
    expect(await mountsOf(target)).toBe(1);
    if (capability.mount !== undefined) {
      expect(await mountsOf(staging)).toBe(1);
      await writeFile(`${target}/data`, 'works');
      expect(await readFile(`${staging}/data`, 'utf8')).toBe('works');
    }
  };

  const stageSteps = ['stage:opened', 'stage:recorded', 'stage:checked', 'stage:mounted'];
  const formatSteps: [string, number][] = [
    ['format:image-made', 1],
    ['format:marked', 1],
    ['format:copying', 1],
    ['format:copying', 3],
    ['format:copied', 1],
    ['format:committed', 1],
  ];

  describe.each(fileSystems)('%s', (fsType) => {
    const capability = mountCapability(fsType);

    it.each(stageSteps)('stage, after %s', async (step) => {
      const volume = await agent.addVolume(SIZE);
      await cut(step, 1, () => client.stage(volume, staging, capability));
      await start();
      await use(volume, capability);
      expect(await finish(volume)).toEqual(nothing);
    });

    it.each(formatSteps)(
      'making the file system, after %s (%i), finished by another node',
      async (step, nth) => {
        const volume = await agent.addVolume(SIZE);
        await cut(step, nth, () => client.stage(volume, staging, capability));
        // The first node is gone, and the volume is opened on one that has no record of it.
        await agent.forget(volume);
        await start(area.path('other-node'));
        await use(volume, capability);
        expect(await finish(volume)).toEqual(nothing);
        const checks = {
          ext4: ['e2fsck', '-fn'],
          xfs: ['xfs_repair', '-n'],
          btrfs: ['btrfs', 'check', '--readonly'],
        } as const;
        const [program, ...args] = checks[fsType];
        const { exitCode } = await execa(program, [...args, agent.file(volume)], {
          reject: false,
        });
        expect(exitCode).toBe(0);
      },
    );

    it('making another file system than the cut-off attempt would have', async () => {
      const volume = await agent.addVolume(SIZE);
      await cut('format:copied', 1, () => client.stage(volume, staging, capability));
      await start();
      const other = mountCapability(fsType === 'btrfs' ? 'ext4' : 'btrfs');
      await use(volume, other);
      expect(await finish(volume)).toEqual(nothing);
    });
  });

  it.each(['stage:opened', 'stage:recorded'])('stage of a block volume, after %s', async (step) => {
    const volume = await agent.addVolume(SIZE);
    await cut(step, 1, () => client.stage(volume, staging, blockCapability()));
    await start();
    await use(volume, blockCapability());
    expect(await finish(volume)).toEqual(nothing);
  });

  const publishSteps = ['publish:recorded', 'publish:target-made', 'publish:bound'];
  it.each(publishSteps)('read-only publish of a file system, after %s', async (step) => {
    const volume = await agent.addVolume(SIZE);
    const capability = mountCapability();
    await start();
    await client.stage(volume, staging, capability);
    const publish = () => client.publish(volume, staging, target, capability, { readonly: true });
    await cut(step, 1, publish);
    await start();
    await publish();
    expect(await mountsOf(target)).toBe(1);
    await expect(writeFile(`${target}/x`, 'x')).rejects.toThrow(/EROFS/);
    expect(await finish(volume)).toEqual(nothing);
  });
  it.each(publishSteps)('publish of a block volume, after %s', async (step) => {
    const volume = await agent.addVolume(SIZE);
    await start();
    await client.stage(volume, staging, blockCapability());
    await cut(step, 1, () => client.publish(volume, staging, target, blockCapability()));
    await start();
    await use(volume, blockCapability());
    expect(await finish(volume)).toEqual(nothing);
  });

  it.each(['unpublish:unmounted', 'unpublish:removed'])('unpublish, after %s', async (step) => {
    const volume = await agent.addVolume(SIZE);
    await start();
    await use(volume, mountCapability());
    await cut(step, 1, () => client.unpublish(volume, target));
    await start();
    expect(await finish(volume)).toEqual(nothing);
  });
  it.each(['unstage:unmounted', 'unstage:closed'])('unstage, after %s', async (step) => {
    const volume = await agent.addVolume(SIZE);
    await start();
    await use(volume, mountCapability());
    await client.unpublish(volume, target);
    await cut(step, 1, () => client.unstage(volume, staging));
    await start();
    expect(await finish(volume)).toEqual(nothing);
    await use(volume, mountCapability());
    expect(await finish(volume)).toEqual(nothing);
  });

  it.each(['ext4', 'xfs'])('growth at the stage of an expanded %s', async (fsType) => {
    const volume = await agent.addVolume(SIZE);
    await start();
    await use(volume, mountCapability(fsType));
    expect(await finish(volume)).toEqual(nothing);
    await agent.growTo(volume, BigInt(2 * SIZE));
    await cut(fsType === 'xfs' ? 'stage:mounted' : 'stage:grown', 1, () =>
      client.stage(volume, staging, mountCapability(fsType)),
    );
    await start();
    await use(volume, mountCapability(fsType));
    const { blocks, bsize } = await statfs(target);
    expect(blocks * bsize).toBeGreaterThan(1.7 * SIZE);
    expect(await finish(volume)).toEqual(nothing);
  });

  it.each([
    ['grow:recorded', 1],
    ['grow:covered', 1],
    ['grow:covered', 2],
    ['grow:grown', 1],
    ['grow:mounted', 1],
    ['grow:bound', 1],
  ] as const)('growth of an idle ext4 without CAP_SYS_RESOURCE, after %s (%i)', async (step, nth) => {
    const volume = await agent.addVolume(SIZE);
    await start();
    await use(volume, mountCapability());
    await agent.growTo(volume, BigInt(2 * SIZE));
    const expand = () => client.expand(volume, target, 2 * SIZE);
    // With the right the kernel grows it mounted, and there are no such steps.
    if (!(await canGrowMountedExt4())) await cut(step, nth, expand);
    await start();
    await expand();
    const { blocks, bsize } = await statfs(target);
    expect(blocks * bsize).toBeGreaterThan(1.7 * SIZE);
    expect([await mountsOf(target), await mountsOf(staging)]).toEqual([1, 1]);
    expect(await readFile(`${target}/data`, 'utf8')).toBe('works');
    expect(await finish(volume)).toEqual(nothing);
  });

  it('an ext4 in use that has to be unmounted to grow is refused and stays as it is', async () => {
    const volume = await agent.addVolume(SIZE);
    await start();
    await use(volume, mountCapability());
    await agent.growTo(volume, BigInt(2 * SIZE));
    const user = await area.spawn('user', 'sleep', ['1000'], { cwd: target });
    const outcome = await client.expand(volume, target, 2 * SIZE).then(
      () => 'grown',
      (error: { code: string; message: string }) => `${error.code}: ${error.message}`,
    );
    expect(outcome).toMatch(
      (await canGrowMountedExt4()) ? /^grown$/ : /^FAILED_PRECONDITION: .*CAP_SYS_RESOURCE/,
    );
    expect([await mountsOf(target), await mountsOf(staging)]).toEqual([1, 1]);
    await writeFile(`${target}/more`, 'still writable');
    await user.stop('SIGKILL');
    expect(await finish(volume)).toEqual(nothing);
  });
});
