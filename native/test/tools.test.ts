/** PoolTools: what the addon says of devices, and what it refuses. */
import { open } from 'node:fs/promises';
import { TestArea, type LoopDevice } from '@holdfast/testing';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { native, type FormatOptions } from '../lib/index.ts';

const MiB = 1024 * 1024;
let area: TestArea;
let disk: LoopDevice;

beforeEach(async () => {
  area = await TestArea.create('tools');
  disk = await area.loopDevice(256 * MiB);
});
afterEach(async () => {
  await area.dispose();
});

const options: FormatOptions = { name: 'tools', fencing: 'loop' };

async function overwrite(at: number, bytes: Uint8Array): Promise<void> {
  const file = await open(disk.path, 'r+');
  await file.write(bytes, 0, bytes.length, at);
  await file.sync();
  await file.close();
  await execa('blockdev', ['--flushbufs', disk.path]);
}

describe('a pool', () => {
  it('is formatted, read back and checked', async () => {
    expect(await native().inspectDevice(disk.path)).toMatchObject({ kind: 'blank', mounted: false });
    const progress: [number, number][] = [];
    const uuid = '0b0c0d0e-0000-4000-8000-00000000000f';
    const info = await native().formatPool(disk.path, {
      ...options,
      uuid,
      renewIntervalMs: 500,
      leaseMs: 3000,
      onProgress: (done, total) => progress.push([done, total]),
    });
    expect(info).toMatchObject({ uuid, name: 'tools', fencing: 'loop', renewIntervalMs: 500, leaseMs: 3000 });
    expect(info.slabCount).toBeGreaterThan(4n);
    expect(progress.at(-1)?.[0]).toBe(progress.at(-1)?.[1]);
    expect(await native().readPool(disk.path)).toEqual(info);
    expect(await native().inspectDevice(disk.path)).toMatchObject({ kind: 'pool', pool: { uuid } });
    expect(await native().readAuthority(disk.path)).toMatchObject({ unclaimed: true });
    expect(await native().readVolumeRecords(disk.path)).toEqual([]);
    expect(await native().readLayerRecords(disk.path)).toEqual([]);
    const beats = await native().readHeartbeats(disk.path);
    expect(beats.every((beat) => beat.state === 'empty')).toBe(true);
    const report = await native().checkPool(disk.path, () => {});
    expect(report).toMatchObject({
      clean: true,
      volumes: 0,
      layers: 0,
      slabsClaimed: 0n,
      slabsFree: info.slabCount,
    });
  });

  it('is claimed by one service, and not taken by another without force', async () => {
    await native().formatPool(disk.path, options);
    const mine = { store: '11111111-1111-4111-8111-111111111111', incarnation: 1n, term: 3n };
    await native().claimAuthority(disk.path, mine, 1000);
    expect(await native().readAuthority(disk.path)).toEqual({ ...mine, unclaimed: false });
    const theirs = { store: '22222222-2222-4222-8222-222222222222', incarnation: 9n, term: 9n };
    await expect(native().claimAuthority(disk.path, theirs, 1000)).rejects.toMatchObject({
      code: 'HF_STALE',
    });
    await native().claimAuthority(disk.path, { ...theirs, force: true }, 1000);
    expect(await native().readAuthority(disk.path)).toMatchObject({ store: theirs.store });
  });

  it('is never formatted over silently', async () => {
    const info = await native().formatPool(disk.path, options);
    await expect(native().formatPool(disk.path, options)).rejects.toMatchObject({
      code: expect.stringMatching(/^HF_(ALREADY_EXISTS|FOREIGN_DATA)$/u) as string,
    });
    expect((await native().readPool(disk.path)).uuid).toBe(info.uuid);
    const forced = await native().formatPool(disk.path, { ...options, force: true });
    expect(forced.uuid).not.toBe(info.uuid);
  });

  it('survives the loss of superblock A, and says so', async () => {
    await native().formatPool(disk.path, options);
    await overwrite(0, new Uint8Array(4096).fill(0x5a));
    const info = await native().readPool(disk.path);
    expect(info.warnings.join(' ')).toMatch(/copy B/u);
    expect((await native().checkPool(disk.path)).clean).toBe(false);
  });
});

describe('a device that is no pool', () => {
  it('is refused by name: blank, foreign, mounted, too small, missing', async () => {
    await expect(native().readPool(disk.path)).rejects.toMatchObject({ code: 'HF_NOT_A_POOL' });
    await execa('mkfs.ext4', ['-q', disk.path]);
    expect(await native().inspectDevice(disk.path)).toMatchObject({ kind: 'foreign', signature: 'ext4' });
    await expect(native().formatPool(disk.path, options)).rejects.toMatchObject({ code: 'HF_FOREIGN_DATA' });
    const mountpoint = area.path('mnt');
    await execa('mkdir', [mountpoint]);
    await execa('mount', [disk.path, mountpoint]);
    try {
      await expect(native().formatPool(disk.path, { ...options, force: true })).rejects.toMatchObject({
        code: 'HF_BUSY',
      });
    } finally {
      await execa('umount', [mountpoint]);
    }
    const small = await area.loopDevice(4 * MiB);
    await expect(native().formatPool(small.path, options)).rejects.toMatchObject({ code: 'HF_TOO_SMALL' });
    await expect(native().readPool(area.path('nothing'))).rejects.toMatchObject({
      code: expect.stringMatching(/^HF_/u) as string,
    });
  });
});

describe('words that are wrong', () => {
  it('reject with HF_INVALID_ARGUMENT and the name of the field, and never abort', async () => {
    const bad = native() as unknown as Record<string, (...args: unknown[]) => Promise<unknown>>;
    const cases: [string, unknown[], RegExp][] = [
      ['readPool', [], /devicePath/u],
      ['readPool', [7], /devicePath/u],
      ['readPool', ['a\0b'], /devicePath/u],
      ['formatPool', [disk.path], /options/u],
      ['formatPool', [disk.path, { name: 'x', fencing: 'prayer' }], /fencing/u],
      ['formatPool', [disk.path, { name: 'x', fencing: 'loop', leaseMs: -1 }], /leaseMs/u],
      ['formatPool', [disk.path, { name: 'x', fencing: 'loop', leaseMs: 1.5 }], /leaseMs/u],
      ['formatPool', [disk.path, { name: 'x', fencing: 'loop', uuid: 'no' }], /uuid/u],
      ['formatPool', [disk.path, { name: 'x', fencing: 'loop', force: 'yes' }], /force/u],
      ['claimAuthority', [disk.path, { store: 'x' }, 5], /store/u],
      [
        'claimAuthority',
        [disk.path, { store: '11111111-1111-4111-8111-111111111111', incarnation: 1 }, 5],
        /incarnation/u,
      ],
      [
        'claimAuthority',
        [disk.path, { store: '11111111-1111-4111-8111-111111111111', incarnation: -1n }, 5],
        /incarnation/u,
      ],
      ['lockIsFree', [], /lockPath/u],
      ['createEngine', [{}], /keeperSocket/u],
      ['createEngine', [{ keeperSocket: '/x' }], /onEvent/u],
    ];
    for (const [method, args, message] of cases) {
      await expect(bad[method]?.(...args), `${method} ${args.length}`).rejects.toMatchObject({
        code: 'HF_INVALID_ARGUMENT',
        message: expect.stringMatching(message) as string,
      });
    }
  });

  it('a keeper that is away is HF_UNAVAILABLE, with the command that starts it', async () => {
    await expect(
      native().createEngine({ stateDir: area.dir, keeperSocket: area.path('none.sock'), onEvent: () => {} }),
    ).rejects.toMatchObject({
      code: 'HF_UNAVAILABLE',
      message: expect.stringContaining('holdfast-keeper --socket') as string,
    });
  });

  it('polling for longer than a millisecond, or for less than nothing, is HF_INVALID_ARGUMENT', async () => {
    const options = { stateDir: area.dir, keeperSocket: area.path('none.sock'), onEvent: () => {} };
    for (const pollMicroseconds of [1001, -1, 0.5]) {
      await expect(native().createEngine({ ...options, pollMicroseconds })).rejects.toMatchObject({
        code: 'HF_INVALID_ARGUMENT',
        message: expect.stringContaining('pollMicroseconds') as string,
      });
    }
  });

  it('the lock of a node that is not there is HF_NOT_FOUND', async () => {
    await expect(native().lockIsFree(area.path('no.lock'))).rejects.toMatchObject({ code: 'HF_NOT_FOUND' });
  });
});
