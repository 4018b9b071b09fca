#!/usr/bin/env node
/** The agent process: flags, signals, start. What it does is in agent.ts. */
import { clientCredentials, createLogger, type TlsFlags } from '@holdfast/common';
import { native } from '@holdfast/native';
import { Command, InvalidArgumentError } from 'commander';
import { agentVersion, startAgent } from './agent.ts';
import { loadIdentity } from './identity.ts';

interface Flags extends TlsFlags {
  stateDir: string;
  socket: string;
  keeper: string;
  metadata: string;
  nodeName: string;
  device: string[];
  lockDir: string;
  maxVolumes: number;
  rescanMs: number;
  workers?: number;
  pollUs: number;
  machineId?: string;
  bootId?: string;
}

const pollUsMax = 1000;

function pollUs(text: string): number {
  const value = Number(text);
  if (text.trim() === '' || !Number.isSafeInteger(value) || value < 0 || value > pollUsMax)
    throw new InvalidArgumentError(`Give a whole number from 0 to ${pollUsMax}.`);
  return value;
}

function positive(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1)
    throw new InvalidArgumentError('Give a whole number above 0.');
  return value;
}

const command = new Command('holdfast-agent')
  .description('Opens and exports Holdfast volumes on this node')
  .version(agentVersion)
  .requiredOption('--state-dir <dir>', 'private directory of this node')
  .requiredOption('--socket <endpoint>', "the agent's own socket, unix:/path/agent.sock")
  .requiredOption('--keeper <path>', "the keeper's socket")
  .requiredOption('--metadata <host:port>', 'the metadata service')
  .requiredOption('--node-name <name>', "this node's name")
  .requiredOption(
    '--device <path>',
    'a device that may hold a pool; repeatable, * and ? in its last part are expanded',
    (path: string, all: string[]) => [...all, path],
    [],
  )
  .requiredOption(
    '--lock-dir <dir>',
    'where device nodes with their locks are made, the same for all nodes of a machine',
  )
  .option('--max-volumes <n>', 'volumes open here at one time', positive, 128)
  .option('--rescan-ms <ms>', 'how often devices are looked at again', positive, 5000)
  .option('--workers <n>', 'threads of the engine (default: one a CPU, 2 to 8)', positive)
  .option(
    '--poll-us <n>',
    'the longest, in microseconds, that a thread of the engine polls for the next request or answer; 0: never',
    pollUs,
    200,
  )
  .option('--machine-id <uuid>', 'instead of /etc/machine-id (several nodes on one machine)')
  .option('--boot-id <uuid>', "instead of the kernel's boot id")
  .option('--tls-ca <file>', 'certificate authority of the metadata service')
  .option('--tls-cert <file>', "this node's certificate")
  .option('--tls-key <file>', "this node's private key");

async function main(): Promise<void> {
  const flags = command.parse().opts<Flags>();
  const logger = createLogger('agent');
  process.on('uncaughtException', (error) => {
    logger.fatal({ err: error }, 'The agent stops; the next one takes its volumes over');
    process.exit(1);
  });
  process.on('unhandledRejection', (reason) => {
    logger.fatal({ err: reason }, 'The agent stops; the next one takes its volumes over');
    process.exit(1);
  });
  const channelCredentials = clientCredentials(flags);
  const agent = await startAgent({
    stateDir: flags.stateDir,
    socket: flags.socket,
    keeperSocket: flags.keeper,
    metadata: flags.metadata,
    identity: loadIdentity(flags.stateDir, flags.nodeName, {
      ...(flags.machineId === undefined ? {} : { machineId: flags.machineId }),
      ...(flags.bootId === undefined ? {} : { bootId: flags.bootId }),
    }),
    devices: flags.device,
    lockDir: flags.lockDir,
    maxVolumes: flags.maxVolumes,
    rescanMs: flags.rescanMs,
    logger,
    native: native(),
    ...(flags.workers === undefined ? {} : { workers: flags.workers }),
    pollMicroseconds: flags.pollUs,
    ...(channelCredentials === undefined ? {} : { channelCredentials }),
  });
  let ending = false;
  const end = (signal: string, how: () => Promise<boolean>): void => {
    if (ending) return;
    ending = true;
    logger.info(`${signal}: stopping`);
    how().then(
      (ended) => {
        ending = false;
        if (ended) process.exit(0);
      },
      (error: unknown) => {
        logger.fatal({ err: error }, 'Stopping failed');
        process.exit(1);
      },
    );
  };
  const handOver = (): Promise<boolean> => agent.handOver().then(() => true);
  process.on('SIGTERM', () => end('SIGTERM', handOver));
  process.on('SIGINT', () => end('SIGINT', handOver));
  process.on('SIGUSR1', () => end('SIGUSR1', () => agent.leave()));
}

main().catch((error: unknown) => {
  process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
  process.exit(1);
});
