// One fio run: a few seconds of one workload on one device, as IOPS, MB/s and latencies.
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { closing } from './closing.mjs';

const exec = promisify(execFile);

export const workloads = {
  'randread-4k-qd1': { rw: 'randread', bs: '4k', iodepth: 1 },
  'randread-4k-qd32': { rw: 'randread', bs: '4k', iodepth: 32 },
  'randwrite-4k-qd1': { rw: 'randwrite', bs: '4k', iodepth: 1 },
  'randwrite-4k-qd32': { rw: 'randwrite', bs: '4k', iodepth: 32 },
  'read-128k-qd8': { rw: 'read', bs: '128k', iodepth: 8 },
  'write-128k-qd8': { rw: 'write', bs: '128k', iodepth: 8 },
  'randwrite-4k-fsync': { rw: 'randwrite', bs: '4k', iodepth: 1, fsync: 1 },
};

/** Runs for `seconds`, or over `bytes` once when `seconds` is 0. Numbers are fio's own. */
export async function fio(device, workload, { seconds = 4, bytes, extra = [] }) {
  const args = [
    '--name=bench', `--filename=${device}`, '--direct=1', '--ioengine=libaio', '--group_reporting', '--output-format=json',
    `--rw=${workload.rw}`, `--bs=${workload.bs}`, `--iodepth=${workload.iodepth}`, `--size=${bytes}`, '--randrepeat=0', '--norandommap=1',
    ...(workload.fsync ? [`--fsync=${workload.fsync}`] : []),
    ...(seconds > 0 ? ['--time_based=1', `--runtime=${seconds}`] : []),
    ...extra,
  ];
  const running = exec('nice', ['-n', '-20', 'fio', ...args], { encoding: 'utf8', maxBuffer: 64 << 20 });
  const ended = running.then(() => undefined, () => undefined);
  // nice becomes fio. Its device can go only after it.
  const kill = closing(async () => {
    running.child.kill('SIGKILL');
    await ended;
  });
  let output;
  try {
    output = (await running).stdout;
  } finally {
    await kill();
  }
  const job = JSON.parse(output).jobs[0];
  if (job.error !== 0) throw new Error(`fio reports error ${job.error} on ${device}`);
  const side = workload.rw.includes('read') ? job.read : job.write;
  const p99 = (one) => (one.clat_ns.percentile?.['99.000000'] ?? 0) / 1000;
  return {
    iops: side.iops,
    mbps: side.bw_bytes / 1e6,
    p99_us: p99(side),
    read_p99_us: p99(job.read),
    write_p99_us: p99(job.write),
  };
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export function percentile(values, p) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil((p / 100) * sorted.length) - 1)];
}
