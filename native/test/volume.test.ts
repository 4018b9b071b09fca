/** Open volumes end to end: pool on a loop disk, engine, FUSE, loop device, file systems and fio on top. */
import { afterEach, describe, expect, it } from 'vitest';
import { native } from '../lib/index.ts';
import { attached, fio, MiB, Rig, run, sizeOf } from './support/rig.ts';

let rig: Rig | undefined;
afterEach(async () => {
  await rig?.dispose();
  rig = undefined;
});

async function fresh(name: string, options: Partial<Parameters<typeof Rig.create>[0]> = {}): Promise<Rig> {
  rig = await Rig.create({ name, ...options });
  return rig;
}

describe('an open volume', () => {
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
    expect(attached(first.export.devicePath)).toBe(false);

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
});
