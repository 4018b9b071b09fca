/** An engine that dies, freezes or hands over: for whoever uses the device it is a pause, never an error (DESIGN 5.3). */
import { sleep, waitFor } from '@holdfast/testing';
import { execa } from 'execa';
import { afterEach, describe, expect, it } from 'vitest';
import { native, type Heartbeat, type SlabRun } from '../lib/index.ts';
import { fio, MiB, Rig, run, sizeOf, type AdoptedPool, type EngineProcess } from './support/rig.ts';

const long = process.env['HOLDFAST_LONG'] === '1';
const kills = long ? 20 : 3;

let rig: Rig | undefined;
afterEach(async () => {
  await rig?.dispose();
  rig = undefined;
});

async function fresh(name: string, options: { diskBytes?: bigint } = {}): Promise<Rig> {
  rig = await Rig.create({ name, ...options });
  return rig;
}

/** A new engine that has taken over what the keeper has. */
async function successor(r: Rig): Promise<{ engine: EngineProcess; pools: AdoptedPool[] }> {
  const engine = await r.engine();
  const pools = await engine.call<AdoptedPool[]>('adopt');
  await r.supply(engine);
  return { engine, pools };
}

async function expectCleanPool(r: Rig): Promise<void> {
  const report = await native().checkPool(r.disk.path);
  expect(report.findings.filter((finding) => finding.severity !== 'info')).toEqual([]);
}

/** Writes, discards and compares with zeros, in the second half of the device, until the time is over. */
const discardLoop = `
  set -e
  end=$((SECONDS + $2))
  while [ $SECONDS -lt $end ]; do
    at=$((256 + RANDOM % 240))
    dd if=/dev/urandom of="$1" bs=1M count=8 seek=$at oflag=direct conv=notrunc status=none
    blkdiscard --offset $((at << 20)) --length $((4 << 20)) "$1"
    cmp --bytes $((4 << 20)) --ignore-initial $((at << 20)):0 "$1" /dev/zero
  done
`;

/** Large writes, one after the other, until its input ends. */
const writeUntilEof = `
  until read -t 0; do
    dd if=/dev/zero of="$1" bs=1M count=64 oflag=direct conv=notrunc status=none || exit 1
  done
`;

describe('an engine killed with SIGKILL', () => {
  it(
    `is a pause for fio with verify, ${kills} times in a row`,
    async () => {
      const r = await fresh('kill', { diskBytes: 12288n * MiB }); // sparse; each successor brings slabs
      const engines = [await r.host()];
      const spec = r.spec(1n, 512n * MiB);
      const { export: device } = await r.open(engines[0] as EngineProcess, spec);
      const seconds = 4 + kills * 2;
      const load = () =>
        Promise.all([
          fio(
            device.devicePath,
            [
              '--rw=randwrite',
              '--bsrange=4k-256k',
              '--size=256M',
              '--iodepth=16',
              '--fsync=32',
              '--verify=crc32c',
              '--verify_backlog=256',
              '--time_based',
              `--runtime=${seconds}`,
            ],
            60_000 + seconds * 3000,
          ),
          run(
            'bash',
            ['-c', discardLoop, 'discards', device.devicePath, String(seconds)],
            60_000 + seconds * 3000,
          ),
        ]);
      // Once is enough, but for a machine on which the successors take longer than that.
      let killed = 0;
      let failure: unknown;
      const loadUntilKilled = async (): Promise<void> => {
        await load();
        if (killed < kills) await loadUntilKilled();
      };
      const loaded = loadUntilKilled();
      loaded.catch((error: unknown) => {
        failure = error;
      });
      for (; killed < kills; killed += 1) {
        await sleep(1000 + Math.random() * 500);
        expect(failure).toBeUndefined();
        const last = engines.at(-1) as EngineProcess;
        last.signal('SIGKILL');
        const { engine, pools } = await successor(r);
        engines.push(engine);
        expect(pools).toHaveLength(1);
        expect(pools[0]?.generation).toBe(1n);
        expect(pools[0]?.volumes.map((v) => v.export.devicePath)).toEqual([device.devicePath]);
      }
      await loaded;
      const last = engines.at(-1) as EngineProcess;
      await r.close(last, spec);
      expect(r.attached(device.devicePath)).toBe(false);
      await last.call('poolCall', r.pool.uuid, 'close');
      await expectCleanPool(r);
    },
    120_000 + kills * 10_000,
  );
});

describe('an engine killed as soon as it serves', () => {
  const times = long ? 60 : 12;
  it(
    `answers large writes all the same, ${times} times in a row`,
    async () => {
      // A request that the kernel could not copy to the dying engine would end with EIO.
      const r = await fresh('young', { diskBytes: 8192n * MiB });
      let engine = await r.host();
      const spec = r.spec(1n, 256n * MiB);
      const { export: device } = await r.open(engine, spec);
      const job = execa('bash', ['-c', writeUntilEof, 'load', device.devicePath], {
        stdin: 'pipe',
        reject: false,
      });
      let failed = false;
      void job.then((result) => {
        failed = result.exitCode !== 0;
      });
      for (let i = 0; i < times; i += 1) {
        await sleep(Math.random() * 60);
        expect(failed, 'a write failed').toBe(false);
        engine.signal('SIGKILL');
        ({ engine } = await successor(r));
      }
      job.stdin.end();
      await job;
      expect(failed, 'a write failed').toBe(false);
      await r.close(engine, spec);
      await engine.call('poolCall', r.pool.uuid, 'close');
      await expectCleanPool(r);
    },
    120_000 + times * 10_000,
  );
});

describe('a hand-over', () => {
  it('is a pause for fio with verify, and keeps what waits for a slab', async () => {
    const r = await fresh('handover');
    const first = await r.host();
    const spec = r.spec(1n, 256n * MiB);
    const { export: device } = await r.open(first, spec);
    const load = fio(device.devicePath, [
      '--rw=randwrite',
      '--bs=16k',
      '--size=64M',
      '--iodepth=16',
      '--verify=crc32c',
      '--verify_backlog=512',
      '--time_based',
      '--runtime=6',
    ]);
    load.catch(() => {});
    await sleep(1500);
    await first.call('engineCall', 'handOver');
    await first.call('engineCall', 'destroy');
    expect(await native().lockIsFree(r.poolOptions().lockPath)).toBe(true);
    const { engine: second } = await successor(r);
    await load;
    // Again, with a write in the kernel that nobody can place yet.
    await second.call('supply', undefined);
    await second.call('poolCall', r.pool.uuid, 'takeBackSlabs');
    const held = run('dd', [
      'if=/dev/urandom',
      `of=${device.devicePath}`,
      'bs=1M',
      'count=40',
      'seek=200',
      'oflag=direct',
      'conv=notrunc',
      'status=none',
    ]);
    await waitFor('the write to be held', async () => (await r.stats(second, spec)).held > 0n);
    const letGo = second.call('engineCall', 'handOver');
    await letGo;
    const { engine: third, pools } = await successor(r);
    expect(pools[0]?.volumes).toHaveLength(1);
    await held;
    await r.close(third, spec);
    await third.call('poolCall', r.pool.uuid, 'close');
    await expectCleanPool(r);
  }, 120_000);
});

describe('a successor', () => {
  it('gives a volume whose growth was cut off its new size', async () => {
    const r = await fresh('grown');
    const first = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    const { export: device } = await r.open(first, spec);
    await first.call('volumeCall', r.pool.uuid, 1n, 'grow', 128n * MiB);
    await first.kill();
    const { engine, pools } = await successor(r);
    expect(pools[0]?.volumes[0]?.spec.sizeBytes).toBe(128n * MiB);
    expect(sizeOf(device.devicePath)).toBe(128n * MiB);
    await fio(device.devicePath, ['--rw=write', '--bs=1m', '--offset=64M', '--size=64M', '--verify=crc32c']);
    await r.close(engine, spec);
  }, 60_000);

  it('has the slabs ahead, and not those that a volume took', async () => {
    const r = await fresh('stock');
    const first = await r.engine();
    await first.call('openPool', r.poolOptions());
    await first.call('poolCall', r.pool.uuid, 'addSlabs', [{ first: 10n, count: 4, generation: 1n }]);
    const spec = r.spec(1n, 64n * MiB);
    const { export: device } = await r.open(first, spec);
    await fio(device.devicePath, ['--rw=write', '--bs=64k', '--size=20M']);
    const claimedBy = (engine: EngineProcess): bigint[] =>
      engine.events.filter((event) => event.type === 'slab-claimed').map((event) => event.slab);
    // Two for what was written, and what the stream had claimed ahead when it ended.
    await waitFor('every claim to be over', async () => {
      const stock = await first.call<SlabRun[]>('poolCall', r.pool.uuid, 'stock');
      return stock.reduce((sum, run) => sum + run.count, 0) + claimedBy(first).length === 4;
    });
    const claimed = claimedBy(first);
    expect(claimed.length).toBeGreaterThanOrEqual(2);
    await first.kill();
    const second = await r.engine();
    const pools = await second.call<AdoptedPool[]>('adopt');
    const ahead = pools[0]?.stock.flatMap((run) =>
      Array.from({ length: run.count }, (_, i) => run.first + BigInt(i)),
    );
    expect([...(ahead ?? []), ...claimed].toSorted()).toEqual([10n, 11n, 12n, 13n]);
    // What the dead engine's agent may not have reported is told again.
    await waitFor('claims', () => claimedBy(second).length >= claimed.length);
    expect(claimedBy(second).toSorted()).toEqual(claimed.toSorted());
    await r.close(second, spec);
  }, 60_000);

  it('of a fenced generation answers EIO, writes stopped, and lets the device be detached', async () => {
    const r = await fresh('dead');
    const store = '33333333-3333-4333-8333-333333333333';
    await native().claimAuthority(r.disk.path, { store, incarnation: 1n, term: 1n }, 1000);
    const first = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    const { export: device } = await r.open(first, spec);
    await fio(device.devicePath, ['--rw=write', '--bs=64k', '--size=4M']);
    const fencer = await r.otherHost();
    // A reader that is in the kernel when the engine dies must get an answer too.
    await first.kill();
    const reader = execa(
      'dd',
      [`if=${device.devicePath}`, 'of=/dev/null', 'bs=4k', 'count=1', 'iflag=direct'],
      {
        timeout: 30_000,
        reject: false,
      },
    );
    await fencer.call('poolCall', r.pool.uuid, 'writeFence', {
      hostId: 1,
      generation: 1n,
      term: 1n,
      incarnation: 1n,
    });
    const second = await r.engine();
    const pools = await second.call<AdoptedPool[]>('adopt');
    expect(pools[0]?.volumes).toHaveLength(1);
    expect((await reader).stderr).toContain('Input/output error');
    expect(await second.call('poolCall', r.pool.uuid, 'leaseState')).toBe('fenced');
    const heartbeat = await fencer.call<Heartbeat>('poolCall', r.pool.uuid, 'readHeartbeat', 1);
    expect(heartbeat).toMatchObject({ state: 'stopped', generation: 1n });
    await second.call('volumeCall', r.pool.uuid, 1n, 'detach');
    expect(r.attached(device.devicePath)).toBe(false);
    await second.call('poolCall', r.pool.uuid, 'close');
    // A later generation opens the volume again and finds what was flushed.
    const next = await r.host({}, { generation: 2n });
    const again = r.again(spec, [first]);
    await r.open(next, again);
    await r.close(next, again);
    await next.call('poolCall', r.pool.uuid, 'close');
    await fencer.call('poolCall', r.pool.uuid, 'close');
    await expectCleanPool(r);
  }, 60_000);

  it('waits for a stopped engine, which changes nothing once it was fenced and goes on', async () => {
    const r = await fresh('frozen');
    const store = '33333333-3333-4333-8333-333333333333';
    await native().claimAuthority(r.disk.path, { store, incarnation: 1n, term: 1n }, 1000);
    const frozen = await r.host();
    const spec = r.spec(1n, 128n * MiB);
    const { export: device } = await r.open(frozen, spec);
    await fio(device.devicePath, ['--rw=write', '--bs=64k', '--size=32M']);
    const load = execa(
      'fio',
      [
        '--name=t',
        `--filename=${device.devicePath}`,
        '--rw=randwrite',
        '--bs=4k',
        '--size=32M',
        '--ioengine=libaio',
        '--direct=1',
        '--iodepth=32',
        '--time_based',
        '--runtime=20',
      ],
      { timeout: 90_000, reject: false },
    );
    await sleep(1000);
    frozen.signal('SIGSTOP');
    // flock is no proof of anything but I/O: the stopped engine still has it.
    expect(await native().lockIsFree(r.poolOptions().lockPath)).toBe(false);
    await sleep(200);
    const fencer = await r.otherHost();
    await fencer.call('poolCall', r.pool.uuid, 'writeFence', {
      hostId: 1,
      generation: 1n,
      term: 1n,
      incarnation: 1n,
    });
    // What the kernel had of the stopped engine is over by now; from here on the new owner writes.
    await sleep(r.pool.leaseMs + 500);
    const again = r.again(spec, [frozen]);
    const taken = await r.open(fencer, again);
    const pattern = ['--rw=write', '--bs=64k', '--size=32M', '--verify=crc32c', '--randseed=11'];
    await fio(taken.export.devicePath, [...pattern, '--do_verify=0']);
    frozen.signal('SIGCONT');
    expect((await load).exitCode).not.toBe(0);
    await fio(taken.export.devicePath, [...pattern, '--verify_only=1']);
    await waitFor(
      'the thawed engine to notice',
      async () => (await frozen.call('poolCall', r.pool.uuid, 'leaseState')) === 'fenced',
    );
    await frozen.call('volumeCall', r.pool.uuid, 1n, 'detach');
    await r.close(fencer, again);
    await fencer.call('poolCall', r.pool.uuid, 'close');
    await expectCleanPool(r);
  }, 120_000);
});

describe('the keeper', () => {
  it('gets everything again when it was restarted', async () => {
    const r = await fresh('keeper');
    const first = await r.host();
    const spec = r.spec(1n, 64n * MiB);
    const { export: device } = await r.open(first, spec);
    await r.keeper.stop('SIGTERM');
    await fio(device.devicePath, ['--rw=write', '--bs=64k', '--size=4M', '--verify=crc32c']);
    await Rig.startKeeper(r.area, 'keeper');
    await sleep(5000);
    await first.kill();
    const { engine, pools } = await successor(r);
    expect(pools[0]?.volumes[0]?.export.devicePath).toBe(device.devicePath);
    await fio(device.devicePath, ['--rw=read', '--bs=64k', '--size=4M']);
    await r.close(engine, spec);
  }, 60_000);
});
