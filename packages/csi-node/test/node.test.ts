/** The node plugin over gRPC on a unix socket, with real loop devices, file systems and mounts, and a stand-in agent. */
import { closeSync, constants, existsSync, openSync, readFileSync, readSync, writeSync } from 'node:fs';
import { appendFile, mkdir, open, readFile, rm, stat, statfs, truncate, writeFile } from 'node:fs/promises';
import { fileSystems, volumeContext, type FileSystem } from '@holdfast/common';
import { TestArea, waitFor } from '@holdfast/testing';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startCsiNode, type RunningCsiNode } from '../src/csi/index.ts';
import { mountsAt, readMounts } from '../src/mount/mountinfo.ts';
import { blockCapability, mountCapability, NodeClient } from './node-client.ts';
import { StandInAgent } from './stand-in-agent.ts';

const MIB = 1 << 20;
const SIZE = 320 * MIB;

const code = (name: string, message?: RegExp): unknown =>
  expect.objectContaining({
    code: name,
    ...(message === undefined ? {} : { message: expect.stringMatching(message) as unknown }),
  });

describe('the CSI node plugin', () => {
  let area: TestArea;
  let agent: StandInAgent;
  let node: RunningCsiNode;
  let client: NodeClient;
  let staging: string;
  let target: string;

  const start = async (): Promise<void> => {
    const endpoint = `unix:${area.path('csi.sock')}`;
    node = await startCsiNode({ endpoint, agent: agent.endpoint, stateDir: area.path('state') });
    client = new NodeClient(endpoint);
  };
  const stop = async (): Promise<void> => {
    client.close();
    await node.close(0);
  };
  beforeEach(async () => {
    area = await TestArea.create('csi-node');
    agent = await StandInAgent.start(area);
    await start();
    // A space and a backslash: mountinfo shows them escaped.
    staging = area.path('staging dir\\x', 'globalmount');
    target = area.path('pods', 'one', 'mount');
    await mkdir(staging, { recursive: true });
    await mkdir(area.path('pods', 'one'), { recursive: true });
    await mkdir(area.path('pods', 'two'), { recursive: true });
  });
  afterEach(async () => {
    await stop();
    await area.dispose();
  });
  const topAt = async (path: string) => mountsAt(await readMounts(), path).at(-1);
  const takeDown = async (volume: string, ...targets: string[]): Promise<void> => {
    for (const path of targets) await client.unpublish(volume, path);
    await client.unstage(volume, staging);
    expect(await topAt(staging)).toBeUndefined();
    expect(agent.device(volume)).toBeUndefined();
  };

  describe.each(fileSystems)('%s', (fsType: FileSystem) => {
    it('carries a volume through its whole life, every call twice, with the data intact', async () => {
      const volume = await agent.addVolume(SIZE);
      const capability = mountCapability(fsType);
      for (let i = 0; i < 2; i++) await client.stage(volume, staging, capability);
      for (let i = 0; i < 2; i++) await client.publish(volume, staging, target, capability);
      expect(await topAt(target)).toMatchObject({ fsType });
      await writeFile(`${target}/data`, 'what was written stays');

      const usage = (await client.stats(volume, target)).usage;
      expect(usage.map((u) => u.unit)).toEqual(['BYTES', 'INODES']);
      const df = await statfs(target);
      expect(Number(usage[0]?.total)).toBe(df.blocks * df.bsize);
      expect(Number(usage[0]?.used) + Number(usage[0]?.available)).toBeLessThanOrEqual(df.blocks * df.bsize);

      for (let i = 0; i < 2; i++) await client.unpublish(volume, target);
      expect(existsSync(target)).toBe(false);
      for (let i = 0; i < 2; i++) await client.unstage(volume, staging);
      expect(agent.device(volume)).toBeUndefined();

      await client.stage(volume, staging, capability);
      await client.publish(volume, staging, target, capability);
      expect(await readFile(`${target}/data`, 'utf8')).toBe('what was written stays');
      await takeDown(volume, target);
    });

    it('grows online, and offline at the next stage', async () => {
      const volume = await agent.addVolume(SIZE);
      await client.stage(volume, staging, mountCapability(fsType));
      await client.publish(volume, staging, target, mountCapability(fsType));
      const sizeOf = async (): Promise<number> => {
        const { blocks, bsize } = await statfs(staging);
        return blocks * bsize;
      };
      const before = await sizeOf();
      await expect(client.expand(volume, target, 2 * SIZE)).rejects.toEqual(
        code('OUT_OF_RANGE', /controller first/),
      );
      await agent.growTo(volume, BigInt(2 * SIZE));
      for (let i = 0; i < 2; i++) {
        expect((await client.expand(volume, target, 2 * SIZE)).capacity_bytes).toBe(String(2 * SIZE));
      }
      const online = await sizeOf();
      expect(online - before).toBeGreaterThan(0.9 * SIZE);
      await expect(client.expand(volume, target, 1, SIZE)).rejects.toEqual(
        code('OUT_OF_RANGE', /never shrink/),
      );
      await takeDown(volume, target);

      await agent.growTo(volume, BigInt(3 * SIZE));
      await client.stage(volume, staging, mountCapability(fsType));
      expect((await sizeOf()) - online).toBeGreaterThan(0.9 * SIZE);
      await takeDown(volume);
    });

    it('mounts a clean volume read-only without one write to it, and refuses to make or repair anything', async () => {
      const volume = await agent.addVolume(SIZE);
      const capability = mountCapability(fsType);
      await expect(client.stage(volume, staging, capability, { readOnly: true })).rejects.toEqual(
        code('FAILED_PRECONDITION', /no file system yet/),
      );
      await client.stage(volume, staging, capability);
      await writeFile(`${staging}/data`, 'read me');
      await client.unstage(volume, staging);
      const sum = async (): Promise<string> => (await execa('sha256sum', [agent.file(volume)])).stdout;
      const before = await sum();
      await client.stage(volume, staging, capability, { readOnly: true });
      await client.publish(volume, staging, target, capability, { readonly: true });
      expect(await readFile(`${target}/data`, 'utf8')).toBe('read me');
      await expect(writeFile(`${staging}/more`, 'x')).rejects.toThrow(/EROFS/);
      await expect(client.expand(volume, target, SIZE)).rejects.toEqual(
        code('FAILED_PRECONDITION', /read-only/),
      );
      await takeDown(volume, target);
      expect(await sum()).toBe(before);
    });

    it('mounts a copy beside its source, and grows a larger copy at its first stage', async () => {
      const volume = await agent.addVolume(SIZE);
      const capability = mountCapability(fsType);
      await client.stage(volume, staging, capability);
      await writeFile(`${staging}/data`, 'of the source');
      await execa('sync', ['-f', staging]);
      const copy = await agent.addVolume(2 * SIZE);
      await execa('cp', ['--sparse=always', agent.file(volume), agent.file(copy)]);
      await truncate(agent.file(copy), 2 * SIZE);
      const beside = area.path('copy');
      await client.stage(copy, beside, capability);
      expect(await readFile(`${beside}/data`, 'utf8')).toBe('of the source');
      const { blocks, bsize } = await statfs(beside);
      expect(blocks * bsize).toBeGreaterThan(1.7 * SIZE);
      await writeFile(`${beside}/data`, 'of the copy');
      // The other way round: the source is mounted when the copy is there.
      await client.unstage(volume, staging);
      await client.stage(volume, staging, capability);
      expect(await readFile(`${staging}/data`, 'utf8')).toBe('of the source');
      await client.unstage(copy, beside);
      await takeDown(volume);
    });

    it('refuses a read-only mount where the journal has to be replayed, and replays it when writable', async () => {
      const volume = await agent.addVolume(SIZE);
      const capability = mountCapability(fsType);
      await client.stage(volume, staging, capability);
      const file = await open(`${staging}/data`, 'w');
      await file.writeFile('fsynced');
      await file.sync();
      await file.close();
      // The disk as a power cut leaves it.
      const crashed = await agent.addVolume(SIZE);
      await execa('cp', ['--sparse=always', agent.file(volume), agent.file(crashed)]);
      await client.unstage(volume, staging);
      await expect(client.stage(crashed, staging, capability, { readOnly: true })).rejects.toEqual(
        code('FAILED_PRECONDITION', /journal/),
      );
      // Many readers have no writer to do it: they see what was in its place, and write nothing.
      const readers = mountCapability(fsType, 'MULTI_NODE_READER_ONLY');
      const sum = async (): Promise<string> => (await execa('sha256sum', [agent.file(crashed)])).stdout;
      const before = await sum();
      await client.stage(crashed, staging, readers, { readOnly: true });
      const second = area.path('pods', 'two', 'mount');
      for (const path of [target, second, second]) await client.publish(crashed, staging, path, readers);
      for (const path of [target, second, staging]) {
        expect(await topAt(path)).toMatchObject({ options: expect.arrayContaining(['ro']) as unknown });
        await expect(writeFile(`${path}/x`, 'x')).rejects.toThrow(/EROFS/);
      }
      expect((await client.stats(crashed, target)).volume_condition).toMatchObject({ abnormal: false });
      await takeDown(crashed, target, second);
      expect(await sum()).toBe(before);
      await client.stage(crashed, staging, capability);
      expect(await readFile(`${staging}/data`, 'utf8')).toBe('fsynced');
      await takeDown(crashed);
      await client.unstage(crashed, staging);
    });
  });

  describe('a block volume', () => {
    it('is the device at the target, at its full size, and carries data', async () => {
      const volume = await agent.addVolume(SIZE);
      for (let i = 0; i < 2; i++) await client.stage(volume, staging, blockCapability());
      for (let i = 0; i < 2; i++) await client.publish(volume, staging, target, blockCapability());
      const device = agent.device(volume) as string;
      expect((await stat(target)).rdev).toBe((await stat(device)).rdev);
      const handle = openSync(target, constants.O_RDWR | constants.O_SYNC);
      writeSync(handle, Buffer.alloc(4096, 7), 0, 4096, 12 * MIB);
      closeSync(handle);
      expect((await client.stats(volume, target)).usage).toMatchObject([
        { unit: 'BYTES', total: String(SIZE) },
      ]);
      await agent.growTo(volume, BigInt(2 * SIZE));
      expect((await client.expand(volume, target, 2 * SIZE)).capacity_bytes).toBe(String(2 * SIZE));
      expect((await client.stats(volume, target)).usage[0]?.total).toBe(String(2 * SIZE));
      await takeDown(volume, target);
      const back = Buffer.alloc(4096);
      const file = openSync(agent.file(volume), 'r');
      readSync(file, back, 0, 4096, 12 * MIB);
      closeSync(file);
      expect(back.equals(Buffer.alloc(4096, 7))).toBe(true);
      expect(existsSync(target)).toBe(false);
    });

    it('is refused where a directory is in the way', async () => {
      const volume = await agent.addVolume(SIZE);
      await client.stage(volume, staging, blockCapability());
      await mkdir(target);
      await expect(client.publish(volume, staging, target, blockCapability())).rejects.toEqual(
        code('FAILED_PRECONDITION', /is a directory/),
      );
      await takeDown(volume, target);
    });
  });

  describe('what is on a volume is never overwritten', () => {
    const put = async (volume: string, at: number, bytes: Buffer): Promise<void> => {
      const file = await open(agent.file(volume), 'r+');
      await file.write(bytes, 0, bytes.length, at);
      await file.close();
    };
    const one = Buffer.from([1]);
    // An MBR with one Linux partition from sector 2048 on.
    const table = Buffer.alloc(512);
    table.writeUInt8(0x83, 446 + 4);
    table.writeUInt32LE(2048, 446 + 8);
    table.writeUInt32LE(20480, 446 + 12);
    table.writeUInt16LE(0xaa55, 510);

    it.each<[string, RegExp, (volume: string) => Promise<unknown>]>([
      ['one byte in the first MiB', /data without a known signature/, (v) => put(v, 777_777, one)],
      ['one byte in the last MiB', /data without a known signature/, (v) => put(v, SIZE - 1, one)],
      [
        'one byte in the middle, which only the engine knows of',
        /4096 bytes of data without a known signature/,
        (v) => put(v, SIZE / 2, one),
      ],
      ['a partition table', /partition table/, (v) => put(v, 0, table)],
      [
        'another file system than the one asked for',
        /holds xfs, and ext4 was asked for.*Set fsType to xfs/,
        async (v) => {
          await client.stage(v, staging, mountCapability('xfs'));
          await client.unstage(v, staging);
        },
      ],
      [
        'a file system that this driver does not mount',
        /holds ext2/,
        (v) => execa('mkfs.ext2', ['-q', '-F', agent.file(v)]),
      ],
    ])('%s', async (_, pattern, prepare) => {
      const volume = await agent.addVolume(SIZE);
      await prepare(volume);
      const sum = async (): Promise<string> => (await execa('sha256sum', [agent.file(volume)])).stdout;
      const before = await sum();
      await expect(client.stage(volume, staging, mountCapability())).rejects.toEqual(
        code('FAILED_PRECONDITION', pattern),
      );
      expect(await sum()).toBe(before);
      await takeDown(volume);
    });
  });

  it('repairs nothing by guess: a damaged ext4 is refused with what e2fsck says, and left as it is', async () => {
    const volume = await agent.addVolume(SIZE);
    await client.stage(volume, staging, mountCapability());
    await mkdir(`${staging}/dir`);
    await writeFile(`${staging}/dir/file`, 'x');
    await client.unstage(volume, staging);
    // A directory inode turned into nonsense, and the file system marked as having errors, so that it is checked.
    await execa('debugfs', ['-w', '-R', 'set_inode_field <2> mode 0', agent.file(volume)]);
    await execa('debugfs', ['-w', '-R', 'set_super_value state 2', agent.file(volume)]);
    await expect(client.stage(volume, staging, mountCapability())).rejects.toEqual(
      code('CORRUPT', /damaged and was left as it is.*e2fsck/s),
    );
    expect(await topAt(staging)).toBeUndefined();
    await takeDown(volume);
  });

  it('names what a check found when xfs cannot be mounted', async () => {
    const volume = await agent.addVolume(SIZE);
    await client.stage(volume, staging, mountCapability('xfs'));
    await client.unstage(volume, staging);
    const file = await open(agent.file(volume), 'r+');
    // The first allocation group's inode header and the root inode's blocks.
    await file.write(Buffer.alloc(4096, 0xee), 0, 4096, 8192);
    await file.write(Buffer.alloc(64 << 10, 0xee), 0, 64 << 10, 64 << 10);
    await file.close();
    await expect(client.stage(volume, staging, mountCapability('xfs'))).rejects.toEqual(
      code('CORRUPT', /xfs_repair -n/),
    );
    await takeDown(volume);
  });

  it('uses the mount options and mkfs options that it was given', async () => {
    const volume = await agent.addVolume(SIZE);
    const context = volumeContext({
      poolUuid: agent.poolUuid,
      name: 'pvc-1',
      sizeBytes: BigInt(SIZE),
      parameters: { fsType: 'ext4', mkfsOptions: '-L labelled -m 0' },
    });
    const capability = mountCapability('', 'SINGLE_NODE_WRITER', ['noatime', 'commit=30']);
    await client.stage(volume, staging, capability, { volume_context: context });
    const top = await topAt(staging);
    expect(top?.options).toContain('noatime');
    expect(top?.superOptions).toContain('commit=30');
    expect(
      (await execa('blkid', ['-p', '-o', 'value', '-s', 'LABEL', agent.device(volume) as string])).stdout,
    ).toBe('labelled');
    await expect(
      client.stage(volume, staging, mountCapability('xfs'), { volume_context: context }),
    ).rejects.toEqual(code('INVALID_ARGUMENT', /made for ext4/));
    await takeDown(volume);
    await expect(
      client.stage(
        await agent.addVolume(SIZE),
        staging,
        mountCapability('ext4', 'SINGLE_NODE_WRITER', ['ro', 'rw']),
      ),
    ).rejects.toEqual(code('INVALID_ARGUMENT', /contradict/));
  });

  it('says that the kernel refuses a mount option, not that the volume is damaged', async () => {
    const volume = await agent.addVolume(SIZE);
    await expect(
      client.stage(volume, staging, mountCapability('ext4', 'SINGLE_NODE_WRITER', ['no_such_option'])),
    ).rejects.toEqual(code('INVALID_ARGUMENT', /no_such_option.*found no damage/));
    await client.stage(volume, staging, mountCapability());
    await takeDown(volume);
  });

  it('says that a volume was fenced while it was staged, instead of what its dead device answers', async () => {
    const volume = await agent.addVolume(SIZE);
    await client.stage(volume, staging, mountCapability());
    await client.unstage(volume, staging);
    await stop();
    const endpoint = `unix:${area.path('csi.sock')}`;
    node = await startCsiNode({
      endpoint,
      agent: agent.endpoint,
      stateDir: area.path('state'),
      step: async (name) => {
        if (name === 'stage:recorded') await agent.kill(volume);
      },
    });
    client = new NodeClient(endpoint);
    await expect(client.stage(volume, staging, mountCapability())).rejects.toEqual(
      code('FENCED', /was fenced while it was staged.*Publish it to this node again/),
    );
    await client.unstage(volume, staging);
  });

  it('says which mkfs option is wrong, and the volume can be staged with better ones', async () => {
    const volume = await agent.addVolume(SIZE);
    const context = (mkfsOptions: string) => ({
      volume_context: volumeContext({
        poolUuid: agent.poolUuid,
        name: 'v',
        sizeBytes: 1n,
        parameters: { mkfsOptions },
      }),
    });
    await expect(client.stage(volume, staging, mountCapability(), context('--nonsense'))).rejects.toEqual(
      code('INVALID_ARGUMENT', /--nonsense/),
    );
    await client.stage(volume, staging, mountCapability(), context('-m 1'));
    await takeDown(volume);
  });

  describe('access modes', () => {
    const second = () => area.path('pods', 'two', 'mount');

    it.each(['SINGLE_NODE_WRITER', 'SINGLE_NODE_SINGLE_WRITER', 'SINGLE_NODE_READER_ONLY'] as const)(
      '%s has one target',
      async (mode) => {
        const volume = await agent.addVolume(SIZE);
        if (mode === 'SINGLE_NODE_READER_ONLY') {
          await client.stage(volume, staging, mountCapability());
          await client.unstage(volume, staging);
        }
        await client.stage(volume, staging, mountCapability('ext4', mode));
        await client.publish(volume, staging, target, mountCapability('ext4', mode));
        await expect(
          client.publish(volume, staging, second(), mountCapability('ext4', mode)),
        ).rejects.toEqual(code('FAILED_PRECONDITION', /unpublish the other first/));
        expect(existsSync(second())).toBe(false);
        await client.unpublish(volume, target);
        await client.publish(volume, staging, second(), mountCapability('ext4', mode));
        await takeDown(volume, second());
      },
    );

    it('SINGLE_NODE_MULTI_WRITER has several, one of them read-only', async () => {
      const volume = await agent.addVolume(SIZE);
      const capability = mountCapability('ext4', 'SINGLE_NODE_MULTI_WRITER');
      await client.stage(volume, staging, capability);
      await client.publish(volume, staging, target, capability);
      await client.publish(volume, staging, second(), capability, { readonly: true });
      await writeFile(`${target}/shared`, 'seen by both');
      expect(await readFile(`${second()}/shared`, 'utf8')).toBe('seen by both');
      await expect(writeFile(`${second()}/x`, 'x')).rejects.toThrow(/EROFS/);
      await expect(client.unstage(volume, staging)).rejects.toEqual(
        code('FAILED_PRECONDITION', /still published/),
      );
      await takeDown(volume, target, second());
    });

    it('a repeated publish with other arguments is ALREADY_EXISTS', async () => {
      const volume = await agent.addVolume(SIZE);
      await client.stage(volume, staging, mountCapability());
      await client.publish(volume, staging, target, mountCapability());
      await expect(
        client.publish(volume, staging, target, mountCapability(), { readonly: true }),
      ).rejects.toEqual(code('ALREADY_EXISTS'));
      await expect(client.publish(volume, staging, target, blockCapability())).rejects.toEqual(
        code('FAILED_PRECONDITION', /staged as ext4/),
      );
      await expect(
        client.stage(volume, staging, mountCapability('ext4', 'SINGLE_NODE_MULTI_WRITER')),
      ).rejects.toEqual(code('ALREADY_EXISTS'));
      await takeDown(volume, target);
    });

    it('several writing nodes are refused', async () => {
      const volume = await agent.addVolume(SIZE);
      for (const mode of ['MULTI_NODE_MULTI_WRITER', 'MULTI_NODE_SINGLE_WRITER'] as const) {
        await expect(client.stage(volume, staging, mountCapability('ext4', mode))).rejects.toEqual(
          code('FAILED_PRECONDITION', /ReadWriteOnce/),
        );
      }
    });
  });

  describe('a bad request', () => {
    it('gets the code of the specification', async () => {
      const volume = await agent.addVolume(SIZE);
      const unknown = `${agent.poolUuid}/${agent.poolUuid}`;
      const ext4 = mountCapability();
      await expect(client.stage('', staging, ext4)).rejects.toEqual(code('INVALID_ARGUMENT', /volume_id/));
      await expect(client.stage(volume, '', ext4)).rejects.toEqual(
        code('INVALID_ARGUMENT', /staging_target_path/),
      );
      await expect(client.stage(volume, 'relative', ext4)).rejects.toEqual(
        code('INVALID_ARGUMENT', /absolute/),
      );
      await expect(client.stage(volume, staging, {})).rejects.toEqual(code('INVALID_ARGUMENT'));
      await expect(client.stage(volume, staging, ext4, { publish_context: {} })).rejects.toEqual(
        code('INVALID_ARGUMENT', /publishId/),
      );
      await expect(client.stage('nonsense', staging, ext4)).rejects.toEqual(code('NOT_FOUND'));
      await expect(client.stage(unknown, staging, ext4)).rejects.toEqual(code('NOT_FOUND'));
      await expect(client.publish(volume, '', target, ext4)).rejects.toEqual(code('FAILED_PRECONDITION'));
      await expect(client.publish(volume, staging, target, ext4)).rejects.toEqual(
        code('FAILED_PRECONDITION', /not staged/),
      );
      await expect(client.stats(volume, staging)).rejects.toEqual(code('NOT_FOUND'));
      await expect(client.expand(volume, staging, 1)).rejects.toEqual(code('NOT_FOUND'));
      await client.unpublish(volume, target);
      await client.unstage(volume, staging);
      await client.unstage('nonsense', staging);
    });

    it('never takes away a mount or a file that is not the volume', async () => {
      const volume = await agent.addVolume(SIZE);
      await execa('mount', ['-t', 'tmpfs', 'other', staging]);
      area.onDispose(() => execa('umount', [staging]));
      await expect(client.stage(volume, staging, mountCapability())).rejects.toEqual(
        code('FAILED_PRECONDITION', /not volume/),
      );
      await expect(client.unstage(volume, staging)).rejects.toEqual(
        code('FAILED_PRECONDITION', /not volume/),
      );
      await expect(client.unpublish(volume, staging)).rejects.toEqual(
        code('FAILED_PRECONDITION', /not volume/),
      );
      expect(await topAt(staging)).toMatchObject({ source: 'other' });
      await writeFile(target, 'precious');
      await expect(client.unpublish(volume, target)).rejects.toEqual(
        code('FAILED_PRECONDITION', /precious|8 bytes/),
      );
      expect(readFileSync(target, 'utf8')).toBe('precious');
      await rm(target);
      await mkdir(`${target}/kept`, { recursive: true });
      await expect(client.unpublish(volume, target)).rejects.toEqual(code('FAILED_PRECONDITION', /kept/));
    });
  });

  it('answers ABORTED while another call for the volume is under way', async () => {
    const volume = await agent.addVolume(SIZE);
    const answers = await Promise.allSettled(
      Array.from({ length: 4 }, () => client.stage(volume, staging, mountCapability())),
    );
    const codes = answers.map((a) => (a.status === 'fulfilled' ? 'OK' : (a.reason as { code: string }).code));
    expect(codes.filter((c) => c === 'OK')).toHaveLength(1);
    expect(codes.filter((c) => c === 'OPERATION_PENDING')).toHaveLength(3);
    await takeDown(volume);
  });

  describe('stale mounts', () => {
    it.each(['ext4', 'xfs', 'btrfs'] as const)(
      'a %s whose device died makes way at the next stage, publishes included',
      async (fsType) => {
        const volume = await agent.addVolume(SIZE);
        const capability = mountCapability(fsType);
        await client.stage(volume, staging, capability);
        await client.publish(volume, staging, target, capability);
        await writeFile(`${target}/data`, 'flushed before');
        await execa('sync', ['-f', target]);
        const saved = area.path('saved.img');
        await execa('cp', ['--sparse=always', agent.file(volume), saved]);
        await agent.kill(volume);
        await appendFile(`${target}/data`, 'lost').catch(() => undefined);
        const condition = (await client.stats(volume, target)).volume_condition;
        expect(condition).toMatchObject({
          abnormal: true,
          message: expect.stringContaining('fenced') as unknown,
        });

        // The fence is over: the agent opens it again.
        await expect(client.stage(volume, staging, capability)).rejects.toEqual(code('FENCED'));
        expect(await topAt(target)).toBeUndefined();
        expect(await topAt(staging)).toBeUndefined();
        await truncate(agent.file(volume), 0);
        await execa('cp', ['--sparse=always', saved, agent.file(volume)]);
        agent.setState(volume, 'open');
        await client.stage(volume, staging, capability);
        await client.publish(volume, staging, target, capability);
        expect(await readFile(`${target}/data`, 'utf8')).toBe('flushed before');
        await takeDown(volume, target);
      },
    );

    it('a mount of a device that the agent no longer has is staged anew by the publish that finds it', async () => {
      const volume = await agent.addVolume(SIZE);
      const capability = mountCapability('ext4', 'SINGLE_NODE_MULTI_WRITER');
      await client.stage(volume, staging, capability);
      await client.publish(volume, staging, target, capability);
      await writeFile(`${target}/data`, 'kept');
      await execa('sync', ['-f', target]);
      const oldDevice = agent.device(volume);
      await agent.forget(volume);
      expect((await client.stats(volume, target)).volume_condition).toMatchObject({ abnormal: true });
      await client.publish(volume, staging, target, capability);
      expect(agent.device(volume)).toBeDefined();
      expect((await topAt(target))?.source).toBe(agent.device(volume));
      expect(await readFile(`${target}/data`, 'utf8')).toBe('kept');
      expect(oldDevice).toBeDefined();
      await takeDown(volume, target);
    });

    it('an unstage of a dead volume succeeds although it is still published', async () => {
      const volume = await agent.addVolume(SIZE);
      await client.stage(volume, staging, mountCapability());
      await client.publish(volume, staging, target, mountCapability());
      await agent.kill(volume);
      await client.unstage(volume, staging);
      expect(await topAt(target)).toBeUndefined();
      await client.unpublish(volume, target);
      expect(existsSync(target)).toBe(false);
    });

    it('a volume whose I/O waits for the disk is reported, and a stage answers UNAVAILABLE instead of hanging', async () => {
      const volume = await agent.addVolume(SIZE);
      await client.stage(volume, staging, mountCapability());
      agent.setState(volume, 'held');
      expect((await client.stats(volume, staging)).volume_condition).toMatchObject({
        abnormal: true,
        message: expect.stringContaining('I/O waits') as unknown,
      });
      await client.stage(volume, staging, mountCapability());
      agent.setState(volume, 'open');
      await client.unstage(volume, staging);
      agent.setState(volume, 'held');
      await expect(client.stage(volume, staging, mountCapability())).rejects.toEqual(
        code('UNAVAILABLE', /waits/),
      );
      agent.setState(volume, 'open');
      await takeDown(volume);
    });
  });

  it('keeps what is mounted over its own restart, even when its records are lost', async () => {
    const volume = await agent.addVolume(SIZE);
    await client.stage(volume, staging, mountCapability());
    await client.publish(volume, staging, target, mountCapability());
    await stop();
    await rm(area.path('state'), { recursive: true, force: true });
    await start();
    await client.stage(volume, staging, mountCapability());
    await client.publish(volume, staging, target, mountCapability());
    expect((await client.stats(volume, target)).volume_condition).toMatchObject({ abnormal: false });
    await takeDown(volume, target);
  });

  it('says that the agent is away, and is ready once it has been there', async () => {
    const volume = await agent.addVolume(SIZE);
    await agent.down();
    expect((await client.probe()).ready).toEqual({ value: false });
    await expect(client.stage(volume, staging, mountCapability())).rejects.toEqual(
      code('UNAVAILABLE', /agent/),
    );
    await agent.up();
    await waitFor('the plugin to be ready', async () => (await client.probe()).ready?.value);
    await agent.down();
    expect((await client.probe()).ready).toEqual({ value: true });
    await agent.up();
    await waitFor('the agent', async () => client.info());
    expect(await client.info()).toMatchObject({
      node_id: agent.nodeId,
      max_volumes_per_node: '32',
      accessible_topology: { segments: { [`pool.holdfast.io/${agent.poolUuid}`]: 'true' } },
    });
  });
});
