/** holdfast dev: a whole cluster on this machine. */
import { setTimeout as sleep } from 'node:timers/promises';
import { HoldfastError } from '@holdfast/common';
import type { FencingClass } from '@holdfast/native';
import { InvalidArgumentError, Option, type Command } from 'commander';
import { globals, userPath } from '../context.ts';
import { cleanUp } from '../dev/cleanup.ts';
import { DevCluster } from '../dev/cluster.ts';
import { sendControl } from '../dev/control.ts';
import { isAlive, signal, waitGone } from '../dev/processes.ts';
import { forgetDevCluster, listDevClusters } from '../dev/registry.ts';
import { readState, type DevState } from '../dev/state.ts';
import { parseBytes, printJson, properties, table } from '../output.ts';

function count(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('Give a number above 0.');
  return value;
}

function size(text: string): bigint {
  const bytes = parseBytes(text);
  if (bytes === undefined || bytes <= 0n) throw new InvalidArgumentError('Give a size such as 10G.');
  return bytes;
}

interface UpFlags {
  dir: string;
  nodes: number;
  size: bigint;
  fencing: FencingClass;
  leaseMs?: number;
  renewMs?: number;
  maxVolumes: number;
  agentMetadata?: string;
  reclaimInterval?: number;
}

async function up(flags: UpFlags): Promise<void> {
  const started = performance.now();
  let ask = (): void => undefined;
  const asked = new Promise<void>((resolve) => {
    ask = resolve;
  });
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(name, () => ask());
  const starting = DevCluster.up({
    dir: userPath(flags.dir),
    nodes: flags.nodes,
    sizeBytes: flags.size,
    fencing: flags.fencing,
    maxVolumes: flags.maxVolumes,
    say: (line) => console.log(line),
    ...(flags.leaseMs === undefined ? {} : { leaseMs: flags.leaseMs }),
    ...(flags.renewMs === undefined ? {} : { renewMs: flags.renewMs }),
    ...(flags.agentMetadata === undefined ? {} : { agentMetadata: flags.agentMetadata }),
    ...(flags.reclaimInterval === undefined ? {} : { reclaimSeconds: flags.reclaimInterval }),
  });
  const cluster = await starting;
  const { state } = cluster;
  console.log(`Metadata service at ${state.metadata}; metrics at http://${state.metadataHttp}/metrics`);
  console.log(`CSI controller at ${state.controllerSocket}`);
  for (const node of state.nodes) console.log(`${node.name}: ${node.csiSocket}`);
  console.log(
    `ready (${((performance.now() - started) / 1000).toFixed(1)} s). Ctrl-C stops it and removes what it made.`,
  );
  await asked;
  console.log('Stopping');
  const left = await cluster.down();
  if (left.length > 0) {
    throw new HoldfastError('INTERNAL', `Not everything could be taken away: ${left.join(', ')}.`);
  }
  process.exit(0);
}

/** --dir, or the one cluster that runs here. */
function chosenDir(flag: string | undefined): string {
  if (flag !== undefined) return userPath(flag);
  const running = listDevClusters();
  const [first, second] = running;
  if (first !== undefined && second === undefined) return first.dir;
  throw new HoldfastError(
    'INVALID_ARGUMENT',
    first === undefined
      ? 'No development cluster runs here. Give its --dir.'
      : `${running.length} development clusters run here (${running.map((c) => c.dir).join(', ')}). Name one with --dir.`,
  );
}

function stateOf(flag: string | undefined): DevState {
  const dir = chosenDir(flag);
  const state = readState(dir);
  if (state === undefined) {
    throw new HoldfastError('NOT_FOUND', `There is no development cluster in ${dir} (no state.json).`);
  }
  return state;
}

async function down(flags: { dir?: string }): Promise<void> {
  const state = stateOf(flags.dir);
  if (signal(state.supervisor, 'SIGTERM')) {
    if (await waitGone([state.supervisor], 60_000)) {
      console.log(`Stopped the development cluster in ${state.dir}.`);
      return;
    }
    signal(state.supervisor, 'SIGKILL');
    await sleep(100);
  }
  forgetDevCluster(state.dir);
  const left = await cleanUp(readState(state.dir) ?? state);
  if (left.length > 0) {
    throw new HoldfastError('FAILED_PRECONDITION', `These could not be taken away: ${left.join(', ')}.`);
  }
  console.log(`Took away what the development cluster in ${state.dir} had left.`);
}

function status(flags: { dir?: string }, command: Command): void {
  const state = stateOf(flags.dir);
  const running = isAlive(state.supervisor);
  if (globals(command).output === 'json') {
    printJson({ running, ...state });
    return;
  }
  console.log(
    properties([
      ['Directory', state.dir],
      [
        'State',
        running ? (state.ready ? 'running' : 'starting') : 'not running; `holdfast dev down` cleans up',
      ],
      [
        'Disk',
        `${state.disk.device} over ${state.disk.image}, pool ${state.disk.poolUuid} (${state.disk.fencing})`,
      ],
      ['Metadata', state.metadata],
      ['Controller', state.controllerSocket],
    ]),
  );
  console.log();
  console.log(
    table(
      ['NODE', 'POWER', 'KEEPER', 'AGENT', 'CSI-NODE', 'CSI SOCKET'],
      state.nodes.map((node) => {
        const pid = (role: string): string => {
          const entry = state.processes.find((p) => p.node === node.index && p.role === role);
          return entry !== undefined && isAlive(entry) ? String(entry.pid) : '-';
        };
        return [node.name, node.power, pid('keeper'), pid('agent'), pid('csi-node'), node.csiSocket];
      }),
    ),
  );
}

async function control(command: string, node: number, flags: { dir?: string }): Promise<void> {
  const state = stateOf(flags.dir);
  if (!isAlive(state.supervisor)) {
    throw new HoldfastError('FAILED_PRECONDITION', `The development cluster in ${state.dir} does not run.`);
  }
  await sendControl(state.controlSocket, { command, node });
}

export function addDevCommands(program: Command): void {
  const dev = program.command('dev').description('a whole cluster on this machine, for development');
  dev
    .command('up')
    .description('shared disk, metadata service, CSI controller and nodes; runs until it is stopped')
    .requiredOption('--dir <dir>', 'where everything is kept; a disk that is there already is used again')
    .option('--nodes <n>', 'how many nodes', count, 3)
    .option('--size <size>', 'size of the (sparse) disk', size, 10n << 30n)
    .addOption(
      new Option('--fencing <class>', "the pool's fencing class")
        .choices(['loop', 'manual', 'lease-only'])
        .default('loop'),
    )
    .option('--lease-ms <ms>', 'lease of the pool', count)
    .option('--renew-ms <ms>', 'renew interval of the pool', count)
    .option('--max-volumes <n>', 'volumes open on a node at one time', count, 128)
    .option(
      '--reclaim-interval <seconds>',
      'how often the metadata service looks at what deleted snapshots leave behind (its own default: 30)',
      count,
    )
    .option(
      '--agent-metadata <host:port>',
      'what agents are told to connect to instead: a proxy that makes faults',
    )
    .action(up);
  dev
    .command('down')
    .description('stop a cluster and remove what it made, also after a crash; the disk and the database stay')
    .option('--dir <dir>', 'its directory (default: the one that runs)')
    .action(down);
  dev
    .command('status')
    .description('what runs')
    .option('--dir <dir>', 'its directory (default: the one that runs)')
    .action(status);
  dev
    .command('kill-node <n>')
    .description('cut the power of node n: SIGKILL to all of it at once')
    .option('--dir <dir>', 'the directory (default: the one that runs)')
    .action(async (n: string, flags: { dir?: string }) => {
      await control('kill-node', count(n), flags);
      console.log(`node-${n} is off.`);
    });
  dev
    .command('start-node <n>')
    .description('switch a node on again')
    .option('--dir <dir>', 'the directory (default: the one that runs)')
    .action(async (n: string, flags: { dir?: string }) => {
      await control('start-node', count(n), flags);
      console.log(`node-${n} is on.`);
    });
}
