/** An engine that dies, freezes or hands over: for whoever uses the device it is a pause, never an error (DESIGN 5.3). */
import { afterEach, describe, expect, it } from 'vitest';
import { sleep, waitFor } from '@holdfast/testing';
import { native } from '../lib/index.ts';
import { attached, fio, MiB, Rig, run, sizeOf, type AdoptedPool, type EngineProcess } from './support/rig.ts';

const long = process.env['HOLDFAST_LONG'] === '1';
const kills = long ? 20 : 3;

let rig: Rig | undefined;
afterEach(async () => {
  await rig?.dispose();
  rig = undefined;
});

async function fresh(name: string): Promise<Rig> {
  rig = await Rig.create({ name });
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

describe('an engine killed with SIGKILL', () => {
  it(
    `is a pause for fio with verify, ${kills} times in a row`,
    async () => {
      const r = await fresh('kill');
      const engines = [await r.host()];
      const spec = r.spec(1n, 512n * MiB);
      const { export: device } = await r.open(engines[0] as EngineProcess, spec);
      const seconds = 4 + kills * 2;
      const job = fio(
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
      );
      const discards = run(
        'bash',
        ['-c', discardLoop, 'discards', device.devicePath, String(seconds)],
        60_000 + seconds * 3000,
      );
      let over = false;
      const watched = Promise.all([job, discards]).finally(() => {
        over = true;
      });
      watched.catch(() => {});
      for (let i = 0; i < kills; i += 1) {
        await sleep(1000 + Math.random() * 500);
        expect(over).toBe(false);
        const last = engines.at(-1) as EngineProcess;
        last.signal('SIGKILL');
        const { engine, pools } = await successor(r);
        engines.push(engine);
        expect(pools).toHaveLength(1);
        expect(pools[0]?.generation).toBe(1n);
        expect(pools[0]?.volumes.map((v) => v.export.devicePath)).toEqual([device.devicePath]);
      }
      await watched;
      const last = engines.at(-1) as EngineProcess;
      await r.close(last, spec);
      expect(attached(device.devicePath)).toBe(false);
      await last.call('poolCall', r.pool.uuid, 'close');
      await expectCleanPool(r);
    },
    120_000 + kills * 10_000,
  );
});
void run;
void sizeOf;
void waitFor;
