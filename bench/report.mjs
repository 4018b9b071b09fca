// Writes docs/benchmarks.md from bench/results/latest.json: node bench/report.mjs
import { existsSync, readFileSync, writeFileSync } from 'node:fs';

const at = (path) => new URL(path, import.meta.url);
const r = JSON.parse(readFileSync(at('results/latest.json'), 'utf8'));
const n = (value, digits = 0) =>
  value.toLocaleString('en-US', { maximumFractionDigits: digits, minimumFractionDigits: digits });
const row = (cells) => `| ${cells.join(' | ')} |`;
// Of the raw disk's IOPS and of qemu-storage-daemon's.
const goals = {
  'randread-4k-qd1': { raw: 0.45 },
  'randread-4k-qd32': { raw: 0.65, qsd: 1.5 },
  'randwrite-4k-qd1': { raw: 0.45 },
  'randwrite-4k-qd32': { raw: 0.6, qsd: 1.5 },
  'read-128k-qd8': { raw: 0.7 },
  'write-128k-qd8': { raw: 0.7 },
  'randwrite-4k-fsync': { raw: 0.55 },
};
const freshGoals = { 'sequential-1m': 0.7, 'random-4k': 0.5 };
const verdict = (value, goal) => (goal === undefined ? '' : value >= goal ? `≥ ${goal}: met` : `≥ ${goal}: **missed**`);
const below = (value, goal, unit = '') => `< ${`${goal} ${unit}`.trim()}: ${value < goal ? 'met' : '**missed**'}`;

const lines = [
  '# Benchmarks',
  '',
  'Made from `bench/results/latest.json` by `node bench/report.mjs`; the figures by `make bench`. Each workload runs on the raw loop disk, on a written',
  'Holdfast volume, on the same path without a volume (FUSE, workers, io_uring and loop device as the engine has them, blocks where they are asked for:',
  'no map, no fence, native/bench/bare_path.cc) and on qemu-storage-daemon (qcow2 with preallocated metadata, FUSE export, loop on top), one after the',
  `other, turn by turn (${r.settings.turns.count} turns of ${r.settings.turns.seconds} s, volumes of ${r.settings.volume_gib} GiB); the table has medians, of the ratios within a turn too. Ratios count more than figures: the machine`,
  'is a small shared one, and its disk is noisy.',
  '',
  `Machine: ${r.machine.cores} cores (${r.machine.cpu}), ${r.machine.memory_gib} GiB, kernel ${r.machine.kernel.replace(/-.*/, '')}, Node ${r.machine.node}, ${r.machine.fio}; ` +
    `peer: ${r.machine.qsd ?? 'not measured'}. ${r.date}.`,
  '',
  ...(r.notes ?? []).flatMap((note) => [note, '']),
  ...(r.settings.quick
    ? ['**These figures are of a short run (`BENCH_QUICK=1`) while other programs were busy on both cores: a first look, no verdict.**', '']
    : []),
  '## Reading and writing',
  '',
  row(['workload', 'raw IOPS', 'Holdfast', 'bare path', 'qemu-storage-daemon', 'of raw', 'goal', 'of the bare path', 'of qsd', 'goal']),
  row(['---', '--:', '--:', '--:', '--:', '--:', '---', '--:', '--:', '---']),
  ...(r.fio ?? []).map((f) =>
    row([f.workload, n(f.raw.iops), n(f.holdfast.iops), n(f.bare.iops), f.qsd ? n(f.qsd.iops) : '-', n(f.ratio_raw, 2), verdict(f.ratio_raw, goals[f.workload]?.raw), n(f.ratio_bare, 2), f.ratio_qsd ? n(f.ratio_qsd, 2) : '-', f.ratio_qsd ? verdict(f.ratio_qsd, goals[f.workload]?.qsd) : '']),
  ),
  '',
];
if (r.fresh) {
  lines.push('## First writes to a fresh thin volume', '',
    'On a disk that was written all over beforehand, as a LUN is; both end with a flush, and count what is on the disk.', '', row(['workload', 'first write IOPS', 'rewrite IOPS', 'ratio', 'goal']),
    row(['---', '--:', '--:', '--:', '---']),
    ...r.fresh.map((f) => row([f.workload, n(f.first.iops), n(f.rewrite.iops), n(f.ratio, 2), verdict(f.ratio, freshGoals[f.workload])])), '');
}
if (r.control) {
  const c = r.control;
  lines.push('## Control plane', '', row(['call', 'per second', 'p50 ms', 'p99 ms', 'goal']), row(['---', '--:', '--:', '--:', '---']),
    row([`CreateVolume, ${c.clients} clients`, n(c.create.rate), n(c.create.p50_ms, 1), n(c.create.p99_ms, 1), below(c.create.p99_ms, 50, 'ms')]),
    row([`DeleteVolume, ${c.clients} clients`, n(c.delete.rate), n(c.delete.p50_ms, 1), n(c.delete.p99_ms, 1), '']),
    row(['ListVolumes, a page of 100 (goal for its p50)', '', n(c.list_100.p50_ms, 1), n(c.list_100.p99_ms, 1), below(c.list_100.p50_ms, 50, 'ms')]),
    row(['NodeStage and NodePublish (raw block)', '', n(c.attach_to_mounted.p50_ms, 1), `${n(c.attach_to_mounted.max_ms, 1)} (max)`, '']), '');
}
if (r.memory) {
  const goal = { random: 400, sequential: 8 };
  lines.push('## Memory and opening', '', 'Extrapolated to 1 TiB from a sparse volume; opening is the time of NodeStage beyond that of an empty volume.', '',
    row(['mapping', 'mapped GiB', 'MiB per TiB', 'goal', 'open s per TiB', 'pages read at MiB/s']), row(['---', '--:', '--:', '---', '--:', '--:']),
    ...Object.entries(r.memory).map(([name, m]) =>
      row([name, n(m.mapped_gib, 1), n(m.mib_per_tib, 1), below(m.mib_per_tib, goal[name], 'MiB'), n(m.open_s_per_tib, 2), m.page_mib_per_s === null ? '-' : n(m.page_mib_per_s)])), '');
}
if (r.snapshots) {
  const { held, after, layers, clone } = r.snapshots;
  lines.push('## Snapshots and clones', '', '500 writes a second go on while snapshots are taken one after another; held is how long the engine kept new writes waiting.', '',
    row(['volume', 'snapshots', 'held p50 ms', 'held p99 ms', 'goal', 'first 20, p50', 'last 20, p50', 'CreateSnapshot p50 ms']),
    row(['---', '--:', '--:', '--:', '---', '--:', '--:', '--:']),
    ...held.map((h) => row([h.volume, h.snapshots, n(h.held.p50_ms, 1), n(h.held.p99_ms, 1), below(h.held.p99_ms, 50, 'ms'), n(h.first.p50_ms, 1), n(h.last.p50_ms, 1), n(h.call.p50_ms)])),
    '', row(['after a snapshot', 'ratio', 'goal']), row(['---', '--:', '---']),
    row(['first 4k random writes, of rewrites', n(after.first_ratio, 2), verdict(after.first_ratio, 0.5)]),
    row(['rewrites, of rewrites before the snapshot', n(after.again_ratio, 2), verdict(after.again_ratio, 0.95)]),
    row([`random reads through ${layers.layers} layers, of one layer`, n(layers.ratio, 2), verdict(layers.ratio, 0.85)]),
    '', row([`clone of a ${clone.source_gib} GiB volume`, 'ms', 'goal']), row(['---', '--:', '---']),
    row(['CreateVolume', n(clone.create_ms), below(clone.create_ms, 200, 'ms')]),
    row(['DeleteVolume', n(clone.delete_ms), below(clone.delete_ms, 200, 'ms')]),
    row(['its space is back', n(clone.space_back_s * 1000), below(clone.space_back_s, 60, 's')]), '');
}
if (r.beside) {
  lines.push('## Beside background work', '',
    '1,000 reads and 1,000 writes a second of 4 KiB while the layers of eight deleted snapshots are merged and compacted, of the same before they were deleted.', '',
    row(['4 KiB', 'p99 alone µs', 'p99 beside it µs', 'ratio', 'goal']), row(['---', '--:', '--:', '--:', '---']),
    ...['read', 'write'].map((k) => row([k, n(r.beside[k].alone_us), n(r.beside[k].busy_us), n(r.beside[k].ratio, 2), below(r.beside[k].ratio, 1.5)])), '');
}
if (r.small_volumes) {
  lines.push('## Small volumes', '',
    `${r.small_volumes.count} volumes of 1 GiB with the first 8 MiB written cost ${n(r.small_volumes.mib_each, 1)} MiB of pool each (${below(r.small_volumes.mib_each, 24, 'MiB')}).`, '');
}
const e2e = at('../test/e2e/results/latest.json');
if (existsSync(e2e)) lines.push(...kubernetes(JSON.parse(readFileSync(e2e, 'utf8'))));
writeFileSync(at('../docs/benchmarks.md'), lines.join('\n'));

/** What `make e2e` measured on the way. */
function kubernetes({ date, machine, kubernetes: version, passed, failed, figures: f }) {
  const s = (value) => (value === undefined ? '-' : `${n(value, 1)} s`);
  const goal = (value, most) => (value === undefined ? '' : below(value, most, 's'));
  const claim = [...(f.claim_to_running_s ?? [])].sort((a, b) => a - b);
  const figures = [
    ['the README\'s lines from a LUN to a running pod, one after another', f.readme_s, 300],
    ['a claim and its pod, made together, to running (median)', claim[claim.length >> 1], undefined],
    ['50 claims at once, to bound', f.claims_50_bound_s, undefined],
    ['15 of them with pods at once, to running', f.pods_15_running_s, undefined],
    ['a claim grown from 1 to 3 GiB, to a grown file system', f.expand_s, undefined],
    ['an agent killed under load: the longest time without a flushed write', f.agent_kill_pause_s, undefined],
    ['a node killed: its StatefulSet\'s pod writes on another node', f.failover_s, 30],
    ['a node without power: not even its connections break', f.failover_silent_s, 30],
    ['a node cut off that goes on writing (Kubernetes has to give it up first)', f.cut_off_s, undefined],
  ];
  return [
    '## Kubernetes', '',
    `Made from \`test/e2e/results/latest.json\` by \`make e2e\`: Kubernetes ${version}, three nodes on one machine (${machine.cores} cores, kernel ${machine.kernel}, Node ${machine.node}), fencing class`,
    `\`loop\`, kubelets that report every 2 s. ${date}, ${passed} specs passed, ${failed} failed. One try each unless it says otherwise.`, '',
    row(['what', 'took', 'goal']), row(['---', '--:', '---']),
    ...figures.map(([what, value, most]) => row([what, s(value), most === undefined ? '' : goal(value, most)])), '',
  ];
}
