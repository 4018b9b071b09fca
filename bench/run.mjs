// make bench: Holdfast beside the raw disk and qemu-storage-daemon, interleaved in one run; then the control plane, attach
// time, memory and space. Prints tables and writes bench/results/latest.json. BENCH_QUICK=1 makes a short, rough run.
import { cpus, totalmem, tmpdir } from 'node:os';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { call } from '../packages/common/dist/index.js';
import { attach, destroy, openVolumeInfo, stage, startCluster, unstage } from './cluster.mjs';
import { closing, untilInterrupted } from './closing.mjs';
import { fio, median, percentile, workloads } from './fio.mjs';
import { besideSection, snapshotSection } from './snapshots.mjs';
import { barePath, haveQsd, loopDisk, qsdVolume, sh, writtenFile } from './targets.mjs';

if (process.getuid() !== 0) {
  console.error('The bench uses loop devices and mounts and needs root. Run it again with sudo.');
  process.exit(1);
}
const quick = process.env.BENCH_QUICK === '1';
const only = process.env.BENCH_ONLY?.split(',');
const wants = (part) => only === undefined || only.includes(part);
const rounds = Number(process.env.BENCH_ROUNDS ?? (quick ? 1 : 5));
const seconds = quick ? 2 : 4;
const GiB = 2 ** 30;
/** Many short turns: what a shared disk gives changes within seconds, and those that are compared must have had the same. */
const turns = { count: rounds * 3, seconds: Math.max(1, Math.round(seconds / 3)) };
const volumeBytes = (quick ? 1 : 4) * GiB;
const directory = mkdtempSync(join(process.env.BENCH_DIR ?? tmpdir(), 'holdfast-bench-'));
closing(() => rmSync(directory, { recursive: true, force: true }));
const fmt = (n, digits = 0) => n.toLocaleString('en-US', { maximumFractionDigits: digits, minimumFractionDigits: digits });

function table(headers, rows) {
  const widths = headers.map((h, i) => Math.max(h.length, ...rows.map((r) => r[i].length)));
  const line = (cells) => cells.map((c, i) => (i === 0 ? c.padEnd(widths[i]) : c.padStart(widths[i]))).join('  ');
  console.log([line(headers), line(widths.map((w) => '-'.repeat(w))), ...rows.map(line)].join('\n'), '\n');
}

async function fioSection(cluster) {
  const raw = loopDisk(join(directory, 'raw.disk'), volumeBytes);
  const qsdVersion = haveQsd();
  const qsd = qsdVersion === undefined ? undefined : await qsdVolume(join(directory, 'qsd'), volumeBytes);
  const bare = await barePath(join(directory, 'bare'), volumeBytes);
  const volume = await attach(cluster, 1, directory, 'bench-written', volumeBytes);
  const targets = [['raw', raw], ['holdfast', volume.device], ['bare', bare], ...(qsd ? [['qsd', qsd]] : [])];
  console.log(`Filling ${targets.map(([n]) => n).join(', ')} (${volumeBytes / GiB} GiB each)…`);
  for (const [, device] of targets) await fio(device, { rw: 'write', bs: '1m', iodepth: 8 }, { seconds: 0, bytes: volumeBytes });

  const results = [];
  for (const [name, workload] of Object.entries(workloads)) {
    const runs = Object.fromEntries(targets.map(([n]) => [n, []]));
    if (workload.rw.endsWith('read')) {
      // So that whatever caches below the disks (a host's) has all of them or none.
      for (const [, device] of targets) await fio(device, { rw: 'read', bs: '1m', iodepth: 8 }, { seconds: 0, bytes: volumeBytes });
    }
    for (let turn = 0; turn < turns.count; turn++) {
      for (const [target, device] of targets) runs[target].push(await fio(device, workload, { seconds: turns.seconds, bytes: volumeBytes }));
    }
    const row = { workload: name };
    for (const [target] of targets) {
      row[target] = {
        iops: median(runs[target].map((r) => r.iops)),
        mbps: median(runs[target].map((r) => r.mbps)),
        p99_us: median(runs[target].map((r) => r.p99_us)),
        all_iops: runs[target].map((r) => Math.round(r.iops)),
      };
    }
    const of = (other) => median(runs.holdfast.map((r, turn) => r.iops / runs[other][turn].iops));
    row.ratio_raw = of('raw');
    row.ratio_bare = of('bare');
    if (row.qsd) row.ratio_qsd = of('qsd');
    results.push(row);
    console.log(`  ${name}: ${fmt(row.ratio_raw, 2)} of raw`);
  }
  table(
    ['workload', 'raw IOPS', 'holdfast', 'bare path', 'qsd', 'of raw', 'of bare', 'of qsd'],
    results.map((r) => [r.workload, fmt(r.raw.iops), fmt(r.holdfast.iops), fmt(r.bare.iops), r.qsd ? fmt(r.qsd.iops) : '-', fmt(r.ratio_raw, 2), fmt(r.ratio_bare, 2), r.ratio_qsd ? fmt(r.ratio_qsd, 2) : '-']),
  );
  await unstage(cluster, volume);
  await destroy(cluster, volume);
  return { rows: results, qsdVersion };
}

/**
 * First writes to a fresh thin volume against rewrites of the same blocks, A B A B. On a disk of its own that is written all
 * over beforehand, as a LUN is, and of which no slab is used twice: on a sparse file, or after a slab's discard, a first write
 * would also wait for the file system below to allocate the file's blocks.
 */
async function freshSection() {
  const bytes = (quick ? 0.5 : 1) * GiB;
  const cases = {
    'sequential-1m': { rw: 'write', bs: '1m', iodepth: 8 },
    'random-4k': { rw: 'randwrite', bs: '4k', iodepth: 32 },
  };
  const times = Math.max(3, rounds - 2);
  const home = join(directory, 'fresh');
  mkdirSync(home);
  console.log('Writing the disk for first writes all over…');
  writtenFile(join(home, 'disk.img'), bytes * (times * 2 + 1));
  const cluster = await startCluster(home, { nodes: 1, size: '1G' });
  try {
    return await firstWrites(cluster, bytes, cases, times);
  } finally {
    await cluster.close();
    rmSync(home, { recursive: true, force: true });
  }
}

async function firstWrites(cluster, bytes, cases, times) {
  const results = [];
  for (const [name, workload] of Object.entries(cases)) {
    const first = [];
    const again = [];
    for (let round = 0; round < times; round++) {
      const volume = await attach(cluster, 1, directory, `bench-fresh-${name}-${round}`, bytes);
      // The same number of 4 KiB writes in both: an eighth of the blocks, in random order, each once.
      // Both end with a flush: without it, what is still in the disk's own cache would count as written.
      const extra = ['--end_fsync=1', ...(name === 'random-4k' ? ['--norandommap=0', '--io_size=' + String(bytes / 8), '--randseed=7', '--allrandrepeat=1'] : [])];
      first.push(await fio(volume.device, workload, { seconds: 0, bytes, extra }));
      again.push(await fio(volume.device, workload, { seconds: 0, bytes, extra }));
      await unstage(cluster, volume);
    }
    const row = { workload: name, first: { iops: median(first.map((r) => r.iops)) }, rewrite: { iops: median(again.map((r) => r.iops)) } };
    row.ratio = median(first.map((r, i) => r.iops / again[i].iops));
    results.push(row);
  }
  table(['fresh thin volume', 'first write IOPS', 'rewrite IOPS', 'ratio'],
    results.map((r) => [r.workload, fmt(r.first.iops), fmt(r.rewrite.iops), fmt(r.ratio, 2)]));
  return results;
}

async function controlSection(cluster) {
  const { metadata } = cluster;
  const timed = async (body) => {
    const started = performance.now();
    await body();
    return performance.now() - started;
  };
  const count = quick ? 200 : 800;
  const ids = [];
  const inParallel = async (clients, jobs, body) => {
    const times = [];
    const started = performance.now();
    await Promise.all(Array.from({ length: clients }, async () => {
      for (let job = jobs.shift(); job !== undefined; job = jobs.shift()) {
        const mine = job;
        times.push(await timed(() => body(mine)));
      }
    }));
    return { rate: times.length / ((performance.now() - started) / 1000), p50_ms: percentile(times, 50), p99_ms: percentile(times, 99) };
  };
  // A client's connection is not part of a call's time.
  await call(metadata, metadata.ListVolumes, { max_entries: 1 });
  const create = await inParallel(8, Array.from({ length: count }, (_, i) => i), async (i) => {
    const volume = await call(metadata, metadata.CreateVolume, {
      request_id: crypto.randomUUID(), name: `control-${i}`, size_bytes: String(GiB), parameters: {},
    });
    ids.push(volume.uuid);
  });
  const listTimes = [];
  for (let i = 0; i < 30; i++) {
    listTimes.push(await timed(() => call(metadata, metadata.ListVolumes, { max_entries: 100 })));
  }
  const remove = await inParallel(8, ids, (uuid) => call(metadata, metadata.DeleteVolume, { request_id: crypto.randomUUID(), uuid }));
  const control = { clients: 8, volumes: count, create, delete: remove, list_100: { p50_ms: median(listTimes), p99_ms: percentile(listTimes, 99) } };

  const attachTimes = [];
  for (let i = 0; i < (quick ? 3 : 10); i++) {
    const volume = await attach(cluster, 1, directory, `bench-attach-${i}`, GiB);
    attachTimes.push(volume.attachMs);
    await unstage(cluster, volume);
    await destroy(cluster, volume);
  }
  control.attach_to_mounted = { p50_ms: median(attachTimes), max_ms: Math.max(...attachTimes) };
  table(['control plane', 'per s', 'p50 ms', 'p99 ms'], [
    ['CreateVolume, 8 clients', fmt(create.rate), fmt(create.p50_ms, 1), fmt(create.p99_ms, 1)],
    ['DeleteVolume, 8 clients', fmt(remove.rate), fmt(remove.p50_ms, 1), fmt(remove.p99_ms, 1)],
    ['ListVolumes, page of 100', '-', fmt(control.list_100.p50_ms, 1), fmt(control.list_100.p99_ms, 1)],
    ['stage and publish', '-', fmt(control.attach_to_mounted.p50_ms, 1), `${fmt(control.attach_to_mounted.max_ms, 1)} (max)`],
  ]);
  return control;
}

/** Engine memory for mapped data, and time to open, extrapolated to 1 TiB of mapped chunks. */
async function memorySection(cluster) {
  const TiB = 1024 * GiB;
  const sparse = (quick ? 8 : 32) * GiB;
  const sequential = (quick ? 2 : 8) * GiB;
  const results = {};
  const cases = [
    ['random', sparse, { rw: 'randwrite', bs: '4k', iodepth: 32 }, ['--blockalign=64k', '--norandommap=0', '--io_size=' + String(sparse / 16)]],
    ['sequential', sequential, { rw: 'write', bs: '1m', iodepth: 8 }, []],
  ];
  const empty = await attach(cluster, 1, directory, 'bench-empty', GiB);
  const base = Number((await openVolumeInfo(cluster, 1, empty)).memory_bytes);
  await unstage(cluster, empty);
  for (const [name, bytes, workload, extra] of cases) {
    const volume = await attach(cluster, 1, directory, `bench-memory-${name}`, bytes);
    await fio(volume.device, workload, { seconds: 0, bytes, extra });
    await unstage(cluster, volume);
    // Beside an empty one, in turn: most of a stage is the service's and the kernel's, and varies more than what is measured.
    const differences = [];
    for (let i = 0; i < 15; i++) {
      if (i > 0) await unstage(cluster, volume);
      await stage(cluster, empty, 1, directory);
      await unstage(cluster, empty);
      await stage(cluster, volume, 1, directory);
      differences.push(volume.stageMs - empty.stageMs);
    }
    const info = await openVolumeInfo(cluster, 1, volume);
    const mapped = Number(info.mapped_bytes);
    const memory = Math.max(0, Number(info.memory_bytes) - base);
    const openSeconds = Math.max(0, median(differences)) / 1000;
    const pageBytes = (Number(info.allocated_bytes) / (16 << 20)) * 8192;
    results[name] = {
      mapped_gib: mapped / GiB,
      memory_bytes: memory,
      mib_per_tib: (memory / 2 ** 20) * (TiB / mapped),
      bytes_per_mapped_gib: memory / (mapped / GiB),
      open_s_per_tib: openSeconds * (TiB / Number(info.allocated_bytes)),
      // Below a millisecond the difference is noise, and no rate follows from it.
      page_mib_per_s: openSeconds < 0.001 ? null : pageBytes / 2 ** 20 / openSeconds,
    };
    await unstage(cluster, volume);
    await destroy(cluster, volume);
  }
  await destroy(cluster, empty);
  table(['engine memory', 'mapped GiB', 'MiB per TiB', 'open s per TiB', 'page read MiB/s'],
    Object.entries(results).map(([n, r]) => [n, fmt(r.mapped_gib, 1), fmt(r.mib_per_tib, 1), fmt(r.open_s_per_tib, 2), r.page_mib_per_s === null ? '-' : fmt(r.page_mib_per_s)]));
  return results;
}

/** Resolves when no deleted volume waits for its slabs to be wiped. */
async function allDeleted(cluster) {
  for (;;) {
    const { volumes } = await call(cluster.metadata, cluster.metadata.ListVolumes, { include_deleting: true });
    if (volumes.every((v) => v.state !== 'DELETING')) return;
    await new Promise((r) => setTimeout(r, 200));
  }
}

/** What 200 small volumes (1 GiB, the first 8 MiB written) cost in the pool. */
async function smallSection(cluster) {
  const { metadata } = cluster;
  const used = async () => {
    const { pools } = await call(metadata, metadata.ListPools, {});
    return pools.reduce((sum, p) => sum + (Number(p.slab_count) - Number(p.slabs_free) - Number(p.slabs_ahead)) * Number(p.slab_size), 0);
  };
  const count = quick ? 20 : 200;
  await allDeleted(cluster);
  const before = await used();
  const volumes = [];
  for (let i = 0; i < count; i++) {
    const volume = await attach(cluster, 1, directory, `bench-small-${i}`, GiB);
    await fio(volume.device, { rw: 'write', bs: '1m', iodepth: 4 }, { seconds: 0, bytes: 8 << 20 });
    await unstage(cluster, volume);
    volumes.push(volume);
  }
  const each = ((await used()) - before) / count / 2 ** 20;
  for (const volume of volumes) await destroy(cluster, volume);
  table(['small volumes', 'count', 'MiB of pool each'], [['1 GiB, first 8 MiB written', String(count), fmt(each, 1)]]);
  return { count, mib_each: each };
}

const machine = {
  cpu: cpus()[0]?.model ?? 'unknown',
  cores: cpus().length,
  memory_gib: Math.round(totalmem() / GiB),
  kernel: sh('uname', '-r'),
  node: process.version,
  fio: sh('fio', '--version'),
};
const report = { date: new Date().toISOString().slice(0, 10), machine, settings: { rounds, seconds, turns, volume_gib: volumeBytes / GiB, quick } };
async function all() {
  console.log('Starting a one-node Holdfast on a sparse loop disk…');
  // What stands before the data is written beforehand: page by page, the file system below would scatter it over the disk, and
  // reading pages in runs would be as slow as reading them one by one.
  const image = join(directory, 'dev', 'disk.img');
  mkdirSync(dirname(image));
  writtenFile(image, GiB / 2);
  truncateSync(image, 200 * GiB);
  const cluster = await startCluster(dirname(image), { nodes: 1, size: '200G' });
  if (wants('fio')) {
    const { rows, qsdVersion } = await fioSection(cluster);
    report.fio = rows;
    report.machine.qsd = qsdVersion ?? 'not installed';
  }
  if (wants('fresh')) report.fresh = await freshSection();
  if (wants('control')) report.control = await controlSection(cluster);
  if (wants('memory')) report.memory = await memorySection(cluster);
  if (wants('small')) report.small_volumes = await smallSection(cluster);
  if (wants('snapshots')) {
    const r = await snapshotSection(cluster, directory, { quick, rounds, seconds });
    report.snapshots = r;
    table(['writes held for a snapshot', 'snapshots', 'p50 ms', 'p99 ms', 'first, p50', 'last, p50'],
      r.held.map((h) => [h.volume, String(h.snapshots), fmt(h.held.p50_ms, 1), fmt(h.held.p99_ms, 1), fmt(h.first.p50_ms, 1), fmt(h.last.p50_ms, 1)]));
    table(['after a snapshot', 'ratio'], [
      ['first 4k random writes, of rewrites', fmt(r.after.first_ratio, 2)],
      ['rewrites, of rewrites before', fmt(r.after.again_ratio, 2)],
      [`reads through ${r.layers.layers} layers, of one layer`, fmt(r.layers.ratio, 2)],
    ]);
    table(['clone of 100 GiB', 'ms'], [['CreateVolume', fmt(r.clone.create_ms)], ['DeleteVolume', fmt(r.clone.delete_ms)], ['space back', fmt(r.clone.space_back_s * 1000)]]);
  }
  if (wants('beside')) {
    const r = await besideSection(directory, { quick });
    report.beside = r;
    table(['p99 beside merging and compaction', 'alone us', 'beside us', 'ratio'],
      ['read', 'write'].map((k) => [`${k} 4k`, fmt(r[k].alone_us), fmt(r[k].busy_us), fmt(r[k].ratio, 2)]));
  }
  const out = join(dirname(fileURLToPath(import.meta.url)), 'results', 'latest.json');
  mkdirSync(dirname(out), { recursive: true });
  let previous = {};
  if (only !== undefined) {
    try {
      previous = JSON.parse(readFileSync(out, 'utf8'));
    } catch {
      // none yet
    }
  }
  // Of a part that was measured alone only its figures are new: how the others were measured stays.
  const settings = wants('fio') ? report.settings : (previous.settings ?? report.settings);
  const machine = { ...previous.machine, ...report.machine };
  writeFileSync(out, `${JSON.stringify({ ...previous, ...report, machine, settings }, null, 2)}\n`);
  console.log(`Written to bench/results/latest.json`);
}

try {
  await untilInterrupted(all);
} catch (error) {
  console.error(`bench: ${error instanceof Error ? error.message : error}`);
  process.exit(1); // the body may still wait for what is gone
}
