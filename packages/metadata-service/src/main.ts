#!/usr/bin/env node
/** The process `holdfast-metadata-service`. */
import { Command } from 'commander';
import { createLogger } from '@holdfast/common';
import { startMetadataService, type TlsFiles } from './service/server.ts';

interface Flags {
  listen: string;
  http?: string;
  store: string;
  tlsCa?: string;
  tlsCert?: string;
  tlsKey?: string;
  backup?: string;
  backupInterval: string;
  overcommitLimit: string;
  stripInterval: string;
  compactInterval: string;
  compactBelow: string;
}

const program = new Command('holdfast-metadata-service')
  .description('The one authority on pools, volumes, slabs, nodes, grants and fences of a Holdfast cluster')
  .requiredOption('--listen <address>', 'gRPC: host:port, or the path of a unix socket')
  .option('--http <address>', 'host:port for /metrics, /healthz and /readyz')
  .requiredOption('--store <store>', 'sqlite:PATH, or memory (forgets everything when it stops)')
  .option('--tls-ca <file>', 'CA of the client certificates; with --tls-cert and --tls-key: mutual TLS')
  .option('--tls-cert <file>', 'certificate of this service')
  .option('--tls-key <file>', 'its key')
  .option('--backup <file>', 'write a consistent copy of the SQLite database to this file again and again')
  .option('--backup-interval <seconds>', 'time between two copies', '300')
  .option(
    '--overcommit-limit <ratio>',
    'refuse volumes whose sizes would add up to more than this many times the pool; 0: no limit',
    '0',
  )
  .option(
    '--strip-interval <seconds>',
    'shortest time between two looks at what deleted snapshots of a volume in use leave behind',
    '30',
  )
  .option(
    '--compact-interval <seconds>',
    'shortest time between two compactions of what deleted snapshots of one volume leave behind',
    '30',
  )
  .option(
    '--compact-below <share>',
    'compact where less than this share of the space of deleted snapshots is still needed; 0: never',
    '0.75',
  );

function tlsFiles({ tlsCa, tlsCert, tlsKey }: Flags): TlsFiles | undefined {
  if (tlsCa === undefined && tlsCert === undefined && tlsKey === undefined) return undefined;
  if (tlsCa === undefined || tlsCert === undefined || tlsKey === undefined) {
    return program.error(
      'error: --tls-ca, --tls-cert and --tls-key belong together: give all three, or none',
    );
  }
  return { ca: tlsCa, cert: tlsCert, key: tlsKey };
}

async function main(): Promise<void> {
  const flags = program.parse().opts<Flags>();
  const tls = tlsFiles(flags);
  const intervalSeconds = Number(flags.backupInterval);
  if (!(intervalSeconds >= 1))
    program.error('error: --backup-interval takes a number of seconds, at least 1');
  const overcommitLimit = Number(flags.overcommitLimit);
  if (!(overcommitLimit >= 0) || !Number.isFinite(overcommitLimit))
    program.error('error: --overcommit-limit takes a ratio, such as 3, or 0 for no limit');
  const stripSeconds = Number(flags.stripInterval);
  if (!(stripSeconds >= 1) || !Number.isFinite(stripSeconds))
    program.error('error: --strip-interval takes a number of seconds, at least 1');
  const compactSeconds = Number(flags.compactInterval);
  if (!(compactSeconds >= 1) || !Number.isFinite(compactSeconds))
    program.error('error: --compact-interval takes a number of seconds, at least 1');
  const compactBelow = Number(flags.compactBelow);
  if (!(compactBelow >= 0 && compactBelow <= 1) || flags.compactBelow === '')
    program.error('error: --compact-below takes a share from 0 (never) to 1, such as 0.75');
  const logger = createLogger('metadata-service');
  const service = await startMetadataService({
    listen: flags.listen,
    store: flags.store,
    logger,
    overcommitLimit,
    stripIntervalMs: stripSeconds * 1000,
    compactIntervalMs: compactSeconds * 1000,
    compactBelow,
    ...(flags.http === undefined ? {} : { http: flags.http }),
    ...(tls === undefined ? {} : { tls }),
  });

  const { backup } = flags;
  let copying: Promise<void> = Promise.resolve();
  const copy = (): void => {
    if (backup === undefined) return;
    copying = service.backup(backup).then(
      (written) =>
        logger.info(
          { file: backup, written },
          written ? 'Wrote a backup of the database' : 'Nothing to back up',
        ),
      (error: unknown) => logger.error({ file: backup, err: error }, 'The backup of the database failed'),
    );
  };
  const timer = backup === undefined ? undefined : setInterval(copy, intervalSeconds * 1000);
  if (backup !== undefined) copy();

  let stopping = false;
  const stop = (signal: string): void => {
    if (stopping) return;
    stopping = true;
    logger.info({ signal }, 'Stopping');
    clearInterval(timer);
    copying
      .then(() => service.close())
      .then(
        () => process.exit(0),
        (error: unknown) => {
          logger.fatal({ err: error }, 'Stopping failed');
          process.exit(1);
        },
      );
  };
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
}

main().catch((error: unknown) => {
  createLogger('metadata-service').fatal(
    { err: error },
    error instanceof Error ? error.message : 'The metadata service cannot start',
  );
  process.exit(1);
});
