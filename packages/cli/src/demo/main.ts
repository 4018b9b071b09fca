#!/usr/bin/env node
/** make demo: starts a cluster in a fresh directory, runs life.ts on it, takes everything away. Exit code 1 on any mismatch. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Command, InvalidArgumentError, Option } from 'commander';
import { CsiCluster } from '../harness/csi.ts';
import { DevUp } from '../harness/dev-process.ts';
import type { Writer } from '../harness/writer-process.ts';
import { liveThrough, stepCount, type Outcome } from './life.ts';
import { Steps } from './steps.ts';

interface Flags {
  repeatKill: number;
  keep?: boolean;
  fencing: 'loop' | 'lease-only';
  size: string;
}

function count(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('Give a number above 0.');
  return value;
}

const flags = new Command('demo')
  .description("One volume's whole life on three nodes, with a node killed on the way")
  .option('--repeat-kill <n>', 'how many times a node is killed while it writes', count, 1)
  .addOption(
    new Option('--fencing <class>', "the pool's fencing class")
      .choices(['loop', 'lease-only'])
      .default('loop'),
  )
  .option('--size <size>', 'size of the (sparse) shared disk', '8G')
  .option('--keep', 'leave the directory with the logs and the disk')
  .parse()
  .opts<Flags>();

async function main(): Promise<number> {
  if (process.getuid?.() !== 0) {
    console.error('The demo uses loop devices, FUSE and mounts. Run it as root.');
    return 1;
  }
  const dir = mkdtempSync(join(tmpdir(), 'holdfast-demo-'));
  const steps = new Steps(stepCount(flags.repeatKill));
  const writers: Writer[] = [];
  let up: DevUp | undefined;
  let cluster: CsiCluster | undefined;

  const takeAway = async (keep: boolean): Promise<boolean> => {
    for (const writer of writers) await writer.end(0);
    cluster?.close();
    const left = (await up?.close()) ?? [];
    if (left.length > 0) console.error(`Left behind: ${left.join(', ')}`);
    if (left.length === 0 && !keep) rmSync(dir, { recursive: true, force: true });
    else console.log(`Logs: ${join(dir, 'logs')}`);
    return left.length === 0;
  };
  let interrupted = false;
  for (const name of ['SIGINT', 'SIGTERM'] as const) {
    process.on(name, () => {
      if (interrupted) return;
      interrupted = true;
      console.log('\nStopping, and removing everything');
      void takeAway(false).finally(() => process.exit(130));
    });
  }

  let outcome: Outcome | undefined;
  try {
    await steps.run('Start three nodes on one shared disk', async () => {
      up = await DevUp.start({ dir, nodes: 3, size: flags.size, fencing: flags.fencing });
      cluster = new CsiCluster(up.state);
      return `${up.state.disk.device}, fencing class ${flags.fencing}`;
    });
    if (up === undefined || cluster === undefined) throw new Error('The cluster did not start');
    outcome = await liveThrough(steps, up, cluster, flags.repeatKill, writers);
  } catch (error) {
    if (interrupted) return 130;
    console.error(`\n${error instanceof Error ? error.message : String(error)}`);
    if (up !== undefined) console.error(`\nWhat the cluster said:\n${up.output}`);
  }
  if (interrupted) return 130;
  const clean = await takeAway(flags.keep === true || outcome === undefined);
  if (outcome === undefined || !clean) return 1;
  steps.finish(
    `Nothing was lost: ${outcome.records} synced records survived ${outcome.kills} killed node${outcome.kills === 1 ? '' : 's'}; the slowest fence took ${(outcome.slowestFenceMs / 1000).toFixed(2)} s. All in`,
  );
  return 0;
}

process.exitCode = await main();
