/** fio as a child process, in the few ways in which the fault tests use it. */
import { spawn, type ChildProcess } from 'node:child_process';

export interface FioRun {
  /** Everything that it printed; rejects when it ended with an error. */
  ended: Promise<string>;
  kill(): void;
}

export function fio(...args: string[]): FioRun {
  const child: ChildProcess = spawn('fio', ['--ioengine=libaio', '--direct=1', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let output = '';
  child.stdout?.on('data', (data: Buffer) => (output += data.toString()));
  child.stderr?.on('data', (data: Buffer) => (output += data.toString()));
  let killed = false;
  const ended = new Promise<string>((resolve, reject) => {
    child.once('error', reject);
    child.once('exit', (code, signal) => {
      if (code === 0 || killed) resolve(output);
      else reject(new Error(`fio ended with ${signal ?? code}: ${output}`));
    });
  });
  ended.catch(() => undefined); // whoever awaits it hears of it
  return {
    ended,
    kill: () => {
      killed = true;
      child.kill('SIGINT');
    },
  };
}

/** I/O operations in a second of a run of `seconds`. */
export async function iops(device: string, rw: 'randread' | 'randwrite', seconds: number): Promise<number> {
  const output = await fio(
    '--name=measure',
    `--filename=${device}`,
    `--rw=${rw}`,
    '--bs=4k',
    '--iodepth=16',
    '--time_based=1',
    `--runtime=${seconds}`,
    '--output-format=json',
  ).ended;
  const report = JSON.parse(output.slice(output.indexOf('{'))) as {
    jobs: { read: { iops: number }; write: { iops: number } }[];
  };
  const job = report.jobs[0];
  return (rw === 'randread' ? job?.read.iops : job?.write.iops) ?? 0;
}
