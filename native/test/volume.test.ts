/** Open volumes end to end: pool on a loop disk, engine, FUSE, loop device, file systems and fio on top. */
import { existsSync, mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { basename } from 'node:path';
import { waitFor, sleep } from '@holdfast/testing';
import { execa } from 'execa';
import { afterEach, describe, expect, it } from 'vitest';
import { native, type Heartbeat, type LeaseState, type VolumeRecord } from '../lib/index.ts';
import { fio, MiB, Rig, run, sizeOf, type EngineProcess } from './support/rig.ts';

let rig: Rig | undefined;
afterEach(async () => {
  await rig?.dispose();
  rig = undefined;
});

async function fresh(name: string, options: Partial<Parameters<typeof Rig.create>[0]> = {}): Promise<Rig> {
  rig = await Rig.create({ name, ...options });
  return rig;
}

async function expectCleanPool(r: Rig): Promise<void> {
  const report = await native().checkPool(r.disk.path);
  expect(report.findings.filter((finding) => finding.severity !== 'info')).toEqual([]);
}

const leaseState = (r: Rig, engine: EngineProcess): Promise<LeaseState> =>
  engine.call('poolCall', r.pool.uuid, 'leaseState');

async function record(r: Rig, slot: number): Promise<VolumeRecord | undefined> {
  const records = await native().readVolumeRecords(r.disk.path);
  return records.find((candidate) => candidate.slot === slot);
}

/** The settings of a loop device's queue that a volume changes; of the scheduler its name. */
function queueOf(name: string): Record<string, string> {
  const setting = (file: string): string => readFileSync(`/sys/block/${name}/queue/${file}`, 'utf8').trim();
  return {
    scheduler: /\[(.*)\]/.exec(setting('scheduler'))?.[1] ?? setting('scheduler'),
    ...Object.fromEntries(['nr_requests', 'rq_affinity', 'nomerges'].map((file) => [file, setting(file)])),
  };
}

describe('an open volume', () => {
  it('leaves the loop device to its next user as it found it', async () => {
    const r = await fresh('queue');
    const engine = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    const isFree = (name: string): boolean => !existsSync(`/sys/block/${name}/loop/backing_file`);
    // Other tests take and leave loop devices meanwhile: again until one comes that was seen free before.
    for (let next = spec; ; next = r.again(next, [engine])) {
      const found = new Map(
        readdirSync('/sys/block')
          .filter((name) => /^loop\d+$/.test(name) && isFree(name))
          .map((name) => [name, queueOf(name)]),
      );
      const name = basename((await r.open(engine, next)).export.devicePath);
      const during = queueOf(name);
      await r.close(engine, next);
      const after = queueOf(name);
      expect(during).toEqual({
        scheduler: 'mq-deadline',
        nr_requests: '128',
        rq_affinity: '1',
        nomerges: '1',
      });
      if (!found.has(name) || !isFree(name)) continue;
      expect(after).toEqual(found.get(name));
      return;
    }
  });

  it('keeps what was written over close and open, and reads zeros elsewhere', async () => {
    const r = await fresh('reopen');
    const engine = await r.host();
    const spec = r.spec(1n, 256n * MiB);
    const first = await r.open(engine, spec);
    expect(sizeOf(first.export.devicePath)).toBe(256n * MiB);
    expect(first.export.frontend).toBe('fuse');
    const write = [
      '--rw=randwrite',
      '--bs=4k',
      '--size=64M',
      '--iodepth=32',
      '--verify=crc32c',
      '--do_verify=0',
    ];
    await fio(first.export.devicePath, [...write, '--randseed=7']);
    await r.close(engine, spec);
    expect(r.attached(first.export.devicePath)).toBe(false);

    const again = r.again(spec, [engine]);
    expect(again.layers[0]?.slabs.length).toBeGreaterThanOrEqual(4);
    const second = await r.open(engine, again);
    await fio(second.export.devicePath, [
      '--rw=randwrite',
      '--bs=4k',
      '--size=64M',
      '--iodepth=32',
      '--verify=crc32c',
      '--verify_only=1',
      '--randseed=7',
    ]);
    await run('cmp', [
      '--bytes',
      String(64n * MiB),
      '--ignore-initial',
      `${128n * MiB}:0`,
      second.export.devicePath,
      '/dev/zero',
    ]);
    await r.close(engine, again);
    await engine.call('poolCall', r.pool.uuid, 'close');
    const report = await native().checkPool(r.disk.path);
    expect(report.findings.filter((finding) => finding.severity !== 'info')).toEqual([]);
    expect(report.volumes).toBe(1);
  }, 120_000);

  it.each(['ext4', 'xfs'])(
    'carries %s through mkfs, files, fstrim, unmount and fsck',
    async (type) => {
      const r = await fresh(`fs-${type}`);
      const engine = await r.host();
      const spec = r.spec(1n, 600n * MiB);
      const { export: device } = await r.open(engine, spec);
      const mountpoint = r.area.path('mnt');
      mkdirSync(mountpoint);
      r.area.onDispose(() => execa('umount', ['-l', mountpoint], { reject: false }));
      await run(`mkfs.${type}`, ['-q', device.devicePath]);
      await run('mount', [device.devicePath, mountpoint]);
      await expect(r.close(engine, spec)).rejects.toMatchObject({ code: 'HF_BUSY' });
      await run('bash', [
        '-c',
        `cd ${mountpoint} && for i in $(seq 40); do head -c $((i * 100000)) /dev/urandom > f$i; done &&
         sha256sum f* > ../sums && rm f1* && sync && fstrim . && cd .. && grep -v ' f1' sums > left`,
      ]);
      await run('umount', [mountpoint]);
      await run(type === 'ext4' ? 'e2fsck' : 'xfs_repair', [
        type === 'ext4' ? '-fn' : '-n',
        device.devicePath,
      ]);
      await r.close(engine, spec);
      const again = r.again(spec, [engine]);
      const second = await r.open(engine, again);
      await run('mount', [second.export.devicePath, mountpoint]);
      await run('bash', ['-c', `cd ${mountpoint} && sha256sum --check --quiet ../left`]);
      await run('umount', [mountpoint]);
      await r.close(engine, again);
      await engine.call('poolCall', r.pool.uuid, 'close');
      await expectCleanPool(r);
    },
    120_000,
  );

  it('is correct under fio verify at every size up to 2 MiB, with discards beside it', async () => {
    const r = await fresh('verify');
    const engine = await r.host();
    const spec = r.spec(1n, 512n * MiB);
    const { export: device } = await r.open(engine, spec);
    await fio(device.devicePath, [
      '--rw=randwrite',
      '--bsrange=4k-2m',
      '--size=384M',
      '--iodepth=24',
      '--verify=crc32c',
    ]);
    // fsync after each write, and single blocks.
    await fio(device.devicePath, ['--rw=randwrite', '--bs=4k', '--size=8M', '--fsync=1', '--verify=crc32c']);
    const before = await r.stats(engine, spec);
    expect(before.mappedBytes).toBeGreaterThanOrEqual(384n * MiB);
    await run('blkdiscard', [
      '--offset',
      String(4096n * 3n),
      '--length',
      String(300n * MiB),
      device.devicePath,
    ]);
    await run('blkdiscard', [
      '--zeroout',
      '--offset',
      String(320n * MiB + 8192n),
      '--length',
      '40960',
      device.devicePath,
    ]);
    await run('bash', [
      '-c',
      `cmp --bytes ${300n * MiB} --ignore-initial 12288:0 "$1" /dev/zero && cmp --bytes 40960 --ignore-initial ${320n * MiB + 8192n}:0 "$1" /dev/zero`,
      'zeros',
      device.devicePath,
    ]);
    const after = await r.stats(engine, spec);
    expect(after.mappedBytes).toBeLessThan(before.mappedBytes);
    await r.close(engine, spec);
    await engine.call('poolCall', r.pool.uuid, 'close');
    await expectCleanPool(r);
  }, 120_000);

  it('grows while it is in use, and the kernel is told', async () => {
    const r = await fresh('grow');
    const engine = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    const { export: device } = await r.open(engine, spec);
    const load = fio(device.devicePath, [
      '--rw=randrw',
      '--bs=4k',
      '--size=32M',
      '--time_based',
      '--runtime=3',
    ]);
    await sleep(500);
    await engine.call('volumeCall', r.pool.uuid, 1n, 'grow', 192n * MiB);
    expect(sizeOf(device.devicePath)).toBe(192n * MiB);
    expect((await record(r, 1))?.sizeBytes).toBe(192n * MiB);
    await load;
    await fio(device.devicePath, ['--rw=write', '--bs=1m', '--offset=96M', '--size=96M', '--verify=crc32c']);
    await expect(engine.call('volumeCall', r.pool.uuid, 1n, 'grow', 64n * MiB)).rejects.toMatchObject({
      code: 'HF_INVALID_ARGUMENT',
    });
    // Asking again for what is there already finishes what may have been cut off.
    await engine.call('volumeCall', r.pool.uuid, 1n, 'grow', 192n * MiB);
    await r.close(engine, spec);
  }, 60_000);

  it('takes slabs as it is written, not when it is made', async () => {
    const r = await fresh('thin');
    const engine = await r.host();
    const spec = r.spec(1n, 1024n * MiB);
    const { export: device } = await r.open(engine, spec);
    expect((await r.stats(engine, spec)).allocatedBytes).toBe(0n);
    await fio(device.devicePath, ['--rw=write', '--bs=128k', '--size=8M']);
    expect((await r.stats(engine, spec)).allocatedBytes).toBe(16n * MiB);
    await fio(device.devicePath, ['--rw=write', '--bs=128k', '--size=100M']);
    const stats = await r.stats(engine, spec);
    // Seven slabs, and by then one to four to spare for more of the stream.
    expect(stats.allocatedBytes).toBeGreaterThanOrEqual(128n * MiB);
    expect(stats.allocatedBytes).toBeLessThanOrEqual((112n + 64n) * MiB);
    expect(stats.mappedBytes).toBeGreaterThanOrEqual(100n * MiB);
    await r.close(engine, spec);
  }, 60_000);

  it('lets reads go on while writes wait for a slab', async () => {
    const r = await fresh('held');
    const engine = await r.engine();
    await engine.call('openPool', r.poolOptions());
    await r.supply(engine, { batch: 1, total: 1 });
    const spec = r.spec(1n, 512n * MiB);
    const { export: device } = await r.open(engine, spec);
    await fio(device.devicePath, ['--rw=write', '--bs=128k', '--size=8M']);
    // Nobody gives slabs any more: from here on writes to new places wait.
    await engine.call('supply', undefined);
    await engine.call('poolCall', r.pool.uuid, 'takeBackSlabs');
    const writer = run('fio', [
      '--name=w',
      `--filename=${device.devicePath}`,
      '--ioengine=libaio',
      '--direct=1',
      '--rw=write',
      '--bs=4k',
      '--offset=64M',
      '--size=16M',
      '--iodepth=128',
    ]);
    writer.catch(() => {});
    await waitFor('writes to be held', async () => (await r.stats(engine, spec)).held > 16n);
    await fio(
      device.devicePath,
      ['--rw=randread', '--bs=4k', '--size=8M', '--iodepth=8', '--time_based', '--runtime=1'],
      20_000,
    );
    expect((await r.stats(engine, spec)).held).toBeGreaterThan(16n);
    await r.supply(engine);
    await writer;
    expect((await r.stats(engine, spec)).held).toBe(0n);
    await r.close(engine, spec);
  }, 60_000);
});

describe('a volume that is closed', () => {
  it('is refused while its device is held open, and closes once it is not', async () => {
    const r = await fresh('busy');
    const engine = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    const { export: device } = await r.open(engine, spec);
    const queue = queueOf(basename(device.devicePath));
    const holder = await r.area.spawn('holder', 'bash', ['-c', `exec 3<${device.devicePath}; sleep 60`]);
    await sleep(300);
    await expect(r.close(engine, spec)).rejects.toMatchObject({ code: 'HF_BUSY' });
    expect(r.attached(device.devicePath)).toBe(true);
    expect(queueOf(basename(device.devicePath))).toEqual(queue);
    await fio(device.devicePath, ['--rw=write', '--bs=64k', '--size=4M', '--verify=crc32c']);
    await holder.stop('SIGKILL');
    await r.close(engine, spec);
    expect(r.attached(device.devicePath)).toBe(false);
    expect(await record(r, 1)).toMatchObject({ state: 'closed', epoch: spec.epoch });
  }, 60_000);

  it('refuses a grant that is not newer than its record', async () => {
    const r = await fresh('stale');
    const engine = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    await r.open(engine, spec);
    await expect(r.open(engine, spec)).rejects.toMatchObject({ code: 'HF_ALREADY_EXISTS' });
    await r.close(engine, spec);
    await expect(r.open(engine, spec)).rejects.toMatchObject({ code: 'HF_STALE' });
    await engine.call('poolCall', r.pool.uuid, 'close');
  });
});

describe('a revoked volume', () => {
  it('answers EIO under load, says closed on disk, and can be unmounted and detached', async () => {
    const r = await fresh('revoke');
    const engine = await r.host();
    const spec = r.spec(1n, 300n * MiB);
    const { export: device } = await r.open(engine, spec);
    const mountpoint = r.area.path('mnt');
    mkdirSync(mountpoint);
    r.area.onDispose(() => execa('umount', ['-l', mountpoint], { reject: false }));
    await run('mkfs.ext4', ['-q', device.devicePath]);
    await run('mount', [device.devicePath, mountpoint]);
    await run('bash', [
      '-c',
      `head -c 5000000 /dev/urandom > ${mountpoint}/kept && sync && sha256sum < ${mountpoint}/kept > ${r.area.path('sum')}`,
    ]);
    const load = execa(
      'fio',
      [
        '--name=t',
        `--directory=${mountpoint}`,
        '--rw=randwrite',
        '--bs=4k',
        '--size=32M',
        '--iodepth=16',
        '--ioengine=libaio',
        '--direct=1',
        '--fsync=8',
        '--time_based',
        '--runtime=30',
      ],
      { timeout: 60_000, reject: false },
    );
    await sleep(1500);
    await engine.call('volumeCall', r.pool.uuid, 1n, 'revoke');
    expect((await load).exitCode).not.toBe(0);
    expect(await record(r, 1)).toMatchObject({ state: 'closed', epoch: spec.epoch });
    await engine.call('volumeCall', r.pool.uuid, 1n, 'revoke'); // idempotent
    await expect(engine.call('volumeCall', r.pool.uuid, 1n, 'close')).rejects.toMatchObject({
      code: 'HF_FENCED',
    });
    await expect(engine.call('volumeCall', r.pool.uuid, 1n, 'detach')).rejects.toMatchObject({
      code: 'HF_BUSY',
    });
    await run('umount', [mountpoint]);
    await engine.call('volumeCall', r.pool.uuid, 1n, 'detach');
    expect(r.attached(device.devicePath)).toBe(false);
    expect(await engine.call('volumeCount', r.pool.uuid)).toBe(0);
    // What was flushed before is there for the next opener.
    const again = r.again(spec, [engine]);
    const second = await r.open(engine, again);
    await run('mount', [second.export.devicePath, mountpoint]);
    await run('bash', ['-c', `test "$(sha256sum < ${mountpoint}/kept)" = "$(cat ${r.area.path('sum')})"`]);
    await run('umount', [mountpoint]);
    await r.close(engine, again);
  }, 120_000);
});

describe('a fenced host', () => {
  it('stops for good when another host writes its fence page, and says so on disk', async () => {
    const r = await fresh('fence', { renewIntervalMs: 300, leaseMs: 2000 });
    const store = '33333333-3333-4333-8333-333333333333';
    await native().claimAuthority(r.disk.path, { store, incarnation: 1n, term: 1n }, 1000);
    const victim = await r.host();
    const spec = r.spec(1n, 128n * MiB);
    const { export: device } = await r.open(victim, spec);
    const fencer = await r.otherHost();
    const load = execa(
      'fio',
      [
        '--name=t',
        `--filename=${device.devicePath}`,
        '--rw=randwrite',
        '--bs=4k',
        '--ioengine=libaio',
        '--direct=1',
        '--iodepth=16',
        '--time_based',
        '--runtime=30',
      ],
      { timeout: 60_000, reject: false },
    );
    await sleep(500);
    await fencer.call('poolCall', r.pool.uuid, 'writeFence', {
      hostId: 1,
      generation: 1n,
      term: 1n,
      incarnation: 1n,
    });
    expect((await load).exitCode).not.toBe(0);
    await waitFor('the fence to be noticed', async () => (await leaseState(r, victim)) === 'fenced');
    const stopped = await waitFor('stopped(1) on disk', async () => {
      const heartbeat = await fencer.call<Heartbeat>('poolCall', r.pool.uuid, 'readHeartbeat', 1);
      return heartbeat.state === 'stopped' ? heartbeat : undefined;
    });
    expect(stopped.generation).toBe(1n);
    await waitFor('the event', () => victim.events.some((e) => e.type === 'lease' && e.state === 'fenced'));
    await expect(r.open(victim, r.spec(2n, 64n * MiB))).rejects.toMatchObject({ code: 'HF_FENCED' });
    await victim.call('volumeCall', r.pool.uuid, 1n, 'detach');
    await victim.call('poolCall', r.pool.uuid, 'close');
    // The same generation never comes back.
    await expect(victim.call('openPool', r.poolOptions())).rejects.toMatchObject({ code: 'HF_FENCED' });
    await fencer.call('poolCall', r.pool.uuid, 'close');
  }, 60_000);

  it('stop() answers every volume with EIO and writes stopped(generation)', async () => {
    const r = await fresh('stop');
    const engine = await r.host();
    const spec = r.spec(1n, 128n * MiB);
    const { export: device } = await r.open(engine, spec);
    await fio(device.devicePath, ['--rw=write', '--bs=64k', '--size=4M']);
    await engine.call('poolCall', r.pool.uuid, 'stop');
    expect(await leaseState(r, engine)).toBe('stopped');
    const beats = await native().readHeartbeats(r.disk.path);
    expect(beats.find((beat) => beat.hostId === 1)).toMatchObject({ state: 'stopped', generation: 1n });
    await expect(fio(device.devicePath, ['--rw=read', '--bs=4k', '--size=4k'], 20_000)).rejects.toThrow(
      /Input\/output error|exit code/u,
    );
    await engine.call('volumeCall', r.pool.uuid, 1n, 'detach');
    await engine.call('poolCall', r.pool.uuid, 'close');
  }, 60_000);
});

describe('the lease', () => {
  it('holds I/O while its engine cannot renew, and lets it go on after', async () => {
    const r = await fresh('lease', { renewIntervalMs: 200, leaseMs: 1000 });
    const engine = await r.host();
    const spec = r.spec(1n, 128n * MiB);
    const { export: device } = await r.open(engine, spec);
    const load = fio(device.devicePath, [
      '--rw=randwrite',
      '--bs=4k',
      '--size=16M',
      '--iodepth=8',
      '--time_based',
      '--runtime=6',
      '--verify=crc32c',
    ]);
    load.catch(() => {});
    await sleep(1000);
    engine.signal('SIGSTOP');
    await sleep(2500);
    engine.signal('SIGCONT');
    await load;
    await waitFor('a valid lease', async () => (await leaseState(r, engine)) === 'valid');
    expect(engine.events.filter((e) => e.type === 'lease' && e.state === 'fenced')).toEqual([]);
    await r.close(engine, spec);
    await engine.call('poolCall', r.pool.uuid, 'close');
  }, 60_000);

  it('is not renewed over a later life of the same slot', async () => {
    const r = await fresh('twice', { renewIntervalMs: 200, leaseMs: 1000 });
    const first = await r.host();
    await expect((await r.engine()).call('openPool', r.poolOptions())).rejects.toMatchObject({
      code: 'HF_BUSY',
    });
    // The same slot under a later generation, through another lock: what a re-created node does.
    const second = await r.otherHost({ hostId: 1, generation: 2n });
    await waitFor('the first to notice', async () => (await leaseState(r, first)) === 'fenced');
    expect(await leaseState(r, second)).toBe('valid');
  }, 60_000);
});
