// Snapshots and clones: how long writes are held, what the first writes and the reads afterwards cost, how long a clone and its
// deletion take, and when the space is back.
import { mkdirSync, readFileSync, rmSync } from 'node:fs';
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { call } from '../packages/common/dist/index.js';
import { attach, destroy, stage, startCluster, unstage } from './cluster.mjs';
import { closing } from './closing.mjs';
import { fio, median, percentile } from './fio.mjs';
import { writtenFile } from './targets.mjs';

const GiB = 2 ** 30;
const minutes = (n) => ({ timeoutMs: n * 60_000 });

async function timed(body) {
  const started = performance.now();
  await body();
  return performance.now() - started;
}

export async function snapshot(cluster, volume, name) {
  const { controller } = cluster;
  for (;;) {
    const { snapshot } = await call(controller, controller.CreateSnapshot, { source_volume_id: volume.id, name }, minutes(2));
    if (snapshot.ready_to_use) return snapshot.snapshot_id;
    await new Promise((r) => setTimeout(r, 100));
  }
}

export async function deleteSnapshots(cluster, ids) {
  const { controller } = cluster;
  for (const snapshot_id of ids) await call(controller, controller.DeleteSnapshot, { snapshot_id }, minutes(2));
}

/** What the agent logged of each cut since `from` (bytes of its log): how long writes were held, ms. */
function heldSince(log, from) {
  return readFileSync(log)
    .subarray(from)
    .toString()
    .split('\n')
    .filter((line) => line.includes('"heldUs"'))
    .map((line) => JSON.parse(line).heldUs / 1000);
}

/** Writes 4 KiB blocks in the background, 500 a second, until stopped. */
function writeAlong(device, bytes) {
  const child = spawn(
    'fio',
    ['--name=along', `--filename=${device}`, '--direct=1', '--ioengine=libaio', '--rw=randwrite', '--bs=4k', '--iodepth=4', `--size=${bytes}`,
      '--norandommap=1', '--randrepeat=0', '--rate_iops=500', '--time_based=1', '--runtime=3600'],
    { stdio: 'ignore' },
  );
  const ended = new Promise((r) => child.once('exit', r));
  return closing(async () => {
    child.kill('SIGTERM');
    await ended;
  });
}

async function held(cluster, directory, name, bytes, count) {
  const volume = await attach(cluster, 1, directory, `bench-held-${name}`, bytes);
  const log = join(directory, 'dev', 'logs', 'node-1-agent.log');
  const from = readFileSync(log).length;
  const stop = writeAlong(volume.device, bytes);
  const ids = [];
  const calls = [];
  await new Promise((r) => setTimeout(r, 1000));
  for (let i = 0; i < count; i++) calls.push(await timed(async () => ids.push(await snapshot(cluster, volume, `${name}-${i}`))));
  await stop();
  const times = heldSince(log, from);
  if (times.length < count) throw new Error(`the agent logged ${times.length} of ${count} cuts`);
  await deleteSnapshots(cluster, ids);
  await unstage(cluster, volume);
  await destroy(cluster, volume);
  const part = (list) => ({ p50_ms: median(list), p99_ms: percentile(list, 99), max_ms: Math.max(...list) });
  const edge = Math.min(20, count >> 1);
  return { volume: name, snapshots: count, held: part(times), first: part(times.slice(0, edge)), last: part(times.slice(-edge)), call: part(calls) };
}

/** 4 KiB random writes after a snapshot: the first into the new layer, then again, against the same writes before it. */
async function after(cluster, directory, rounds) {
  const bytes = GiB;
  const volume = await attach(cluster, 1, directory, 'bench-after', bytes);
  await fio(volume.device, { rw: 'write', bs: '1m', iodepth: 8 }, { seconds: 0, bytes });
  const writes = async (seed) =>
    (await fio(volume.device, { rw: 'randwrite', bs: '4k', iodepth: 32 },
      { seconds: 0, bytes, extra: ['--norandommap=0', `--io_size=${bytes / 8}`, `--randseed=${seed}`, '--allrandrepeat=1'] })).iops;
  const result = { before: [], first: [], again: [] };
  const ids = [];
  for (let i = 0; i < rounds; i++) {
    result.before.push(await writes(i));
    ids.push(await snapshot(cluster, volume, `after-${i}`));
    result.first.push(await writes(i));
    result.again.push(await writes(i));
  }
  await unstage(cluster, volume);
  await deleteSnapshots(cluster, ids);
  await destroy(cluster, volume);
  return {
    before_iops: median(result.before), first_iops: median(result.first), again_iops: median(result.again),
    first_ratio: median(result.first.map((v, i) => v / result.again[i])), again_ratio: median(result.again.map((v, i) => v / result.before[i])),
  };
}

async function layers(cluster, directory, count, rounds, seconds) {
  const bytes = GiB;
  const flat = await attach(cluster, 1, directory, 'bench-flat', bytes);
  const deep = await attach(cluster, 1, directory, 'bench-deep', bytes);
  for (const { device } of [flat, deep]) await fio(device, { rw: 'write', bs: '1m', iodepth: 8 }, { seconds: 0, bytes });
  const ids = [];
  for (let i = 1; i < count; i++) {
    ids.push(await snapshot(cluster, deep, `deep-${i}`));
    await fio(deep.device, { rw: 'randwrite', bs: '4k', iodepth: 32 }, { seconds: 0, bytes, extra: ['--norandommap=0', `--io_size=${bytes / 64}`, `--randseed=${i}`] });
  }
  const one = [];
  const many = [];
  for (let i = 0; i < rounds; i++) {
    one.push((await fio(flat.device, { rw: 'randread', bs: '4k', iodepth: 32 }, { seconds, bytes })).iops);
    many.push((await fio(deep.device, { rw: 'randread', bs: '4k', iodepth: 32 }, { seconds, bytes })).iops);
  }
  for (const volume of [flat, deep]) await unstage(cluster, volume);
  await deleteSnapshots(cluster, ids);
  for (const volume of [flat, deep]) await destroy(cluster, volume);
  return { layers: count, one_iops: median(one), many_iops: median(many), ratio: median(many) / median(one) };
}

const usedSlabs = async ({ metadata }) => {
  const { pools } = await call(metadata, metadata.ListPools, {});
  return pools.reduce((sum, p) => sum + Number(p.slab_count) - Number(p.slabs_free) - Number(p.slabs_ahead), 0);
};

async function clones(cluster, directory, rounds) {
  const { controller } = cluster;
  const bytes = 100 * GiB;
  const source = await attach(cluster, 1, directory, 'bench-source', bytes);
  // A chunk in each 1 MiB: every part of the 100 GiB is written, 6.25 GiB in all.
  await fio(source.device, { rw: 'write:960k', bs: '64k', iodepth: 32 }, { seconds: 0, bytes, extra: [`--io_size=${bytes / 16}`] });
  const create = [];
  const remove = [];
  const back = [];
  for (let i = 0; i < rounds; i++) {
    const before = await usedSlabs(cluster);
    let clone;
    create.push(await timed(async () => {
      const { volume } = await call(controller, controller.CreateVolume, {
        name: `bench-clone-${i}`, capacity_range: { required_bytes: String(bytes) }, parameters: {},
        volume_capabilities: [{ access_mode: { mode: 'SINGLE_NODE_WRITER' }, block: {}, access_type: 'block' }],
        volume_content_source: { type: 'volume', volume: { volume_id: source.id } },
      }, minutes(2));
      clone = { id: volume.volume_id, context: volume.volume_context, name: `bench-clone-${i}` };
    }));
    await stage(cluster, clone, 1, directory);
    await fio(clone.device, { rw: 'randwrite', bs: '64k', iodepth: 8 }, { seconds: 0, bytes, extra: [`--io_size=${GiB / 4}`] });
    await unstage(cluster, clone);
    remove.push(await timed(() => destroy(cluster, clone)));
    back.push(await timed(async () => {
      for (let waited = 0; (await usedSlabs(cluster)) > before && waited < 1200; waited++) await new Promise((r) => setTimeout(r, 100));
    }));
  }
  await unstage(cluster, source);
  await destroy(cluster, source);
  return { source_gib: 100, create_ms: median(create), delete_ms: median(remove), space_back_s: Math.max(...back) / 1000 };
}

/** Strips, compactions and merges on record after audit record `after`, and the newest record's number. */
async function reclaimSteps({ metadata }, after) {
  let steps = 0;
  for (;;) {
    const { records } = await call(metadata, metadata.ListAudit, { after_sequence: after, max_entries: 1000 });
    if (records.length === 0) return { steps, after };
    steps += records.filter(({ event }) => ['strip', 'compact', 'merge', 'unchained'].includes(event)).length;
    after = records.at(-1).sequence;
  }
}

/**
 * What reads and writes at a steady rate take at p99 while deleted snapshots are merged and compacted, against the same volume
 * just before they were deleted. The writes go to what was written since the last snapshot: first writes into a
 * new layer cost more by themselves.
 */
export async function besideSection(directory, { quick }) {
  const seconds = quick ? 4 : 10;
  const times = 3;
  const home = join(directory, 'beside');
  mkdirSync(home);
  // Written beforehand, as a LUN is: to take space from a sparse file costs the file system below more than all that is measured.
  writtenFile(join(home, 'disk.img'), 8 * GiB);
  const cluster = await startCluster(home, { nodes: 1, size: '8G', reclaimSeconds: 1 });
  try {
    const bytes = GiB;
    const own = bytes / 8;
    const volume = await attach(cluster, 1, directory, 'bench-beside', bytes);
    await fio(volume.device, { rw: 'write', bs: '1m', iodepth: 8 }, { seconds: 0, bytes });
    const steady = () => fio(volume.device, { rw: 'randrw', bs: '4k', iodepth: 4 }, { seconds, bytes: own, extra: ['--rate_iops=1000,1000'] });
    const windows = [];
    let after = '0';
    for (let round = 0; round < times; round++) {
      const ids = [];
      for (let i = 0; i < 8; i++) {
        ids.push(await snapshot(cluster, volume, `beside-${round}-${i}`));
        await fio(volume.device, { rw: 'randwrite', bs: '4k', iodepth: 32 },
          { seconds: 0, bytes, extra: ['--norandommap=0', `--io_size=${bytes / 32}`, `--randseed=${round * 8 + i}`] });
      }
      await fio(volume.device, { rw: 'write', bs: '1m', iodepth: 8 }, { seconds: 0, bytes: own });
      const alone = await steady();
      await deleteSnapshots(cluster, ids);
      ({ after } = await reclaimSteps(cluster, after));
      await new Promise((r) => setTimeout(r, 2000));
      const busy = await steady();
      const during = await reclaimSteps(cluster, after);
      if (during.steps === 0) throw new Error('nothing was merged or compacted while it was to be measured');
      // Until nothing is left to do for ten seconds.
      let rest = 0;
      ({ after } = during);
      for (let still = 0; still < 10; still++) {
        await new Promise((r) => setTimeout(r, 1000));
        const more = await reclaimSteps(cluster, after);
        ({ after } = more);
        rest += more.steps;
        if (more.steps > 0) still = -1;
      }
      windows.push({ alone, busy, steps: during.steps, rest });
    }
    await unstage(cluster, volume);
    await destroy(cluster, volume);
    const side = (name) => ({
      alone_us: median(windows.map((w) => w.alone[name])), busy_us: median(windows.map((w) => w.busy[name])),
      ratio: median(windows.map((w) => w.busy[name] / w.alone[name])),
    });
    return { rounds: times, seconds, read: side('read_p99_us'), write: side('write_p99_us'), steps: windows.map((w) => w.steps), steps_after: windows.map((w) => w.rest) };
  } finally {
    await cluster.close();
    rmSync(home, { recursive: true, force: true });
  }
}

export async function snapshotSection(cluster, directory, { quick, rounds, seconds }) {
  const report = { held: [] };
  report.held.push(await held(cluster, directory, '1 GiB', GiB, quick ? 20 : 500));
  report.held.push(await held(cluster, directory, '1 TiB, sparse', 1024 * GiB, quick ? 20 : 100));
  report.after = await after(cluster, directory, Math.max(3, rounds));
  report.layers = await layers(cluster, directory, 50, Math.max(3, rounds), seconds);
  report.clone = await clones(cluster, directory, 3);
  return report;
}
