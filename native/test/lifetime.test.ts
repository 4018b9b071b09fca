/** Lifetimes: close, garbage collection, worker threads, process exit; and that nothing is left of any of them. */
import { readdirSync, readFileSync } from 'node:fs';
import { waitFor } from '@holdfast/testing';
import { afterEach, describe, expect, it } from 'vitest';
import { native } from '../lib/index.ts';
import { fio, MiB, Rig, type AdoptedPool } from './support/rig.ts';

let rig: Rig | undefined;
afterEach(async () => {
  await rig?.dispose();
  rig = undefined;
});

async function fresh(name: string): Promise<Rig> {
  rig = await Rig.create({ name });
  return rig;
}

interface Footprint {
  fds: number;
  threads: number;
  keeperFds: number;
  rss: number;
}
function footprint(r: Rig, pid: number): Footprint {
  return {
    fds: readdirSync(`/proc/${pid}/fd`).length,
    threads: readdirSync(`/proc/${pid}/task`).length,
    keeperFds: readdirSync(`/proc/${r.keeper.pid}/fd`).length,
    rss: Number(/VmRSS:\s+(\d+)/u.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) * 1024,
  };
}

describe('closing', () => {
  it('leaves no descriptor, thread or memory behind, 50 times over', async () => {
    const r = await fresh('leak');
    const engine = await r.host();
    let spec = r.spec(1n, 128n * MiB);
    const cycle = async (): Promise<void> => {
      const { export: device } = await r.open(engine, spec);
      await fio(device.devicePath, ['--rw=randwrite', '--bs=64k', '--size=4M']);
      await r.close(engine, spec);
      expect(r.attached(device.devicePath)).toBe(false);
      spec = r.again(spec, [engine]);
    };
    for (let i = 0; i < 5; i += 1) await cycle();
    const before = footprint(r, engine.pid);
    for (let i = 0; i < 50; i += 1) await cycle();
    // Control threads may take a moment to end.
    await waitFor('threads to end', () => footprint(r, engine.pid).threads <= before.threads);
    const after = footprint(r, engine.pid);
    expect(after.fds).toBeLessThanOrEqual(before.fds);
    expect(after.keeperFds).toBeLessThanOrEqual(before.keeperFds);
    // A sanitizer keeps freed memory back to catch its use.
    const preloaded = `${process.env['LD_PRELOAD']} ${process.env['HOLDFAST_ENGINE_PRELOAD']}`;
    const limitMiB = preloaded.includes('san') ? 300 : 24;
    expect(after.rss - before.rss).toBeLessThan(limitMiB * 1024 * 1024);
    await engine.call('poolCall', r.pool.uuid, 'close');
    await engine.call('engineCall', 'destroy');
    await waitFor('workers to end', () => footprint(r, engine.pid).threads < before.threads);
  }, 180_000);

  it('of a pool waits for its volumes, of an engine for its pools', async () => {
    const r = await fresh('order');
    const engine = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    await r.open(engine, spec);
    await expect(engine.call('poolCall', r.pool.uuid, 'close')).rejects.toMatchObject({ code: 'HF_BUSY' });
    await expect(engine.call('engineCall', 'destroy')).rejects.toMatchObject({ code: 'HF_BUSY' });
    await r.close(engine, spec);
    expect(await native().lockIsFree(r.poolOptions().lockPath)).toBe(false);
    await engine.call('poolCall', r.pool.uuid, 'close');
    expect(await native().lockIsFree(r.poolOptions().lockPath)).toBe(true);
    expect(await engine.call('poolCount')).toBe(0);
    await engine.call('engineCall', 'destroy');
  });
});

describe('an engine that goes with its environment', () => {
  it.each([
    ['process.exit', 'exit'],
    ['the parent lets go', 'disconnect'],
  ])(
    'leaves its volumes to the keeper: %s',
    async (_, way) => {
      const r = await fresh('exit');
      const engine = await r.host();
      const spec = r.spec(1n, 128n * MiB);
      const { export: device } = await r.open(engine, spec);
      await fio(device.devicePath, [
        '--rw=write',
        '--bs=64k',
        '--size=8M',
        '--verify=crc32c',
        '--do_verify=0',
        '--randseed=3',
      ]);
      if (way === 'exit') void engine.call('exit', 3).catch(() => {});
      else engine.disconnect();
      expect(await engine.ended).toBe(way === 'exit' ? 3 : 0);
      expect(r.attached(device.devicePath)).toBe(true);
      const next = await r.engine();
      const pools = await next.call<AdoptedPool[]>('adopt');
      expect(pools[0]?.volumes[0]?.export.devicePath).toBe(device.devicePath);
      expect(pools[0]?.volumes[0]?.spec).toMatchObject({ volumeId: 1n, epoch: spec.epoch, uuid: spec.uuid });
      await fio(device.devicePath, [
        '--rw=write',
        '--bs=64k',
        '--size=8M',
        '--verify=crc32c',
        '--verify_only=1',
        '--randseed=3',
      ]);
      await r.close(next, spec);
      await next.call('poolCall', r.pool.uuid, 'close');
    },
    60_000,
  );

  it('lets a terminated worker thread take nothing with it but itself', async () => {
    const r = await fresh('worker');
    const host = await r.engine({}, 'worker-child.mjs');
    await host.call('openPool', r.poolOptions());
    await r.supply(host);
    const spec = r.spec(1n, 128n * MiB);
    const { export: device } = await r.open(host, spec);
    await fio(device.devicePath, [
      '--rw=write',
      '--bs=64k',
      '--size=8M',
      '--verify=crc32c',
      '--do_verify=0',
      '--randseed=4',
    ]);
    const load = fio(device.devicePath, [
      '--rw=randread',
      '--bs=4k',
      '--size=8M',
      '--iodepth=16',
      '--time_based',
      '--runtime=4',
    ]);
    load.catch(() => {});
    expect(await host.terminate()).toBe('terminated');
    // The process lives, the engine's lock is free, and a successor goes on.
    await waitFor('the lock', async () => native().lockIsFree(r.poolOptions().lockPath), {
      timeoutMs: 15_000,
    });
    const next = await r.engine();
    const pools = await next.call<AdoptedPool[]>('adopt');
    expect(pools[0]?.volumes).toHaveLength(1);
    await load;
    await fio(device.devicePath, [
      '--rw=write',
      '--bs=64k',
      '--size=8M',
      '--verify=crc32c',
      '--verify_only=1',
      '--randseed=4',
    ]);
    await r.close(next, spec);
  }, 60_000);

  it('does not close what is open when its JS objects are collected', async () => {
    const r = await fresh('gc');
    const engine = await r.engine({}, 'engine-child.mjs', ['--expose-gc']);
    await engine.call('openPool', r.poolOptions());
    await r.supply(engine);
    const spec = r.spec(1n, 64n * MiB);
    const { export: device } = await r.open(engine, spec);
    await engine.call('collect');
    await fio(device.devicePath, ['--rw=write', '--bs=64k', '--size=4M', '--verify=crc32c']);
    expect(await engine.call('poolCount')).toBe(1);
    expect(await engine.call('volumeCount', r.pool.uuid)).toBe(1);
    await r.close(engine, spec);
    await engine.call('collect');
    await engine.call('poolCall', r.pool.uuid, 'close');
    await engine.call('engineCall', 'destroy');
    await engine.call('collect');
  }, 60_000);
});
