/** holdfast pool: format, list, show, grow, drain, remove, check. */
import { randomUUID } from 'node:crypto';
import { userInfo } from 'node:os';
import { call } from '@holdfast/common';
import {
  native,
  type CheckFinding,
  type CheckReport,
  type FencingClass,
  type PoolInfo,
} from '@holdfast/native';
import type { Pool__Output } from '@holdfast/proto';
import { InvalidArgumentError, Option, type Command } from 'commander';
import { globals, userPath, withMetadata } from '../context.ts';
import { findPoolDevice } from '../devices.ts';
import {
  age,
  camelKeys,
  enumWord,
  formatBytes,
  green,
  printJson,
  properties,
  red,
  table,
} from '../output.ts';
import { ProgressBar } from '../progress.ts';

const fencingSentences: Record<FencingClass, string> = {
  loop: "a dead node's volumes move when its lock is free: loop devices on one machine only, for development",
  manual:
    "a dead node's volumes move when somebody says that it is off: `holdfast node confirm-off` (a person, or a power controller)",
  'lease-only':
    "a dead node's volumes move when its lease has run out. A machine that freezes and thaws later is NOT covered: read docs/fencing.md",
  reservations: 'the array refuses late writes (not available yet)',
};

function milliseconds(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('Give milliseconds above 0.');
  return value;
}

interface FormatFlags {
  name: string;
  fencing?: FencingClass;
  force?: boolean;
  renewMs?: number;
  leaseMs?: number;
  drainMs?: number;
}

async function format(device: string, flags: FormatFlags, command: Command): Promise<void> {
  const path = userPath(device);
  const fencing = flags.fencing ?? (/^\/dev\/loop\d+$/.test(path) ? 'loop' : 'manual');
  const bar = new ProgressBar(`Formatting ${path}`);
  const info = await native()
    .formatPool(path, {
      name: flags.name,
      fencing,
      force: flags.force ?? false,
      onProgress: bar.update,
      ...(flags.renewMs === undefined ? {} : { renewIntervalMs: flags.renewMs }),
      ...(flags.leaseMs === undefined ? {} : { leaseMs: flags.leaseMs }),
      ...(flags.drainMs === undefined ? {} : { drainMs: flags.drainMs }),
    })
    .catch((error: unknown) => {
      // The engine knows no flags.
      const forcible = ['HF_ALREADY_EXISTS', 'HF_FOREIGN_DATA'].includes(
        (error as { code?: string }).code ?? '',
      );
      if (!forcible || flags.force === true || !(error instanceof Error)) throw error;
      throw new Error(`${error.message.replace(/\.$/, '')}: --force.`, { cause: error });
    })
    .finally(bar.end);
  if (globals(command).output === 'json') {
    printJson({ device: path, ...info });
    return;
  }
  console.log(`Formatted ${path} as pool "${info.name}".`);
  console.log(describeInfo(path, info));
  console.log(`Fencing class ${info.fencing}: ${fencingSentences[info.fencing]}.`);
  if (flags.fencing === undefined) {
    console.log('(Chosen because of the device; --fencing chooses another one, at format only.)');
  }
}

function describeInfo(device: string, info: PoolInfo): string {
  return properties([
    ['UUID', info.uuid],
    ['Device', device],
    ['Device identity', info.wwid],
    ['Size', formatBytes(info.deviceBytes)],
    ['Usable', `${formatBytes(info.slabCount * BigInt(info.slabSize))} (${info.slabCount} slabs)`],
    ['Fencing', info.fencing],
    ['Lease', `${info.leaseMs} ms, renewed every ${info.renewIntervalMs} ms`],
    ['Room for', `${info.volumeSlots} volumes, ${info.layerSlots} layers, ${info.hostSlots} hosts`],
  ]);
}

/** The stable JSON shape of a pool. */
export function poolView(pool: Pool__Output): Record<string, unknown> {
  return {
    ...(camelKeys(pool) as Record<string, unknown>),
    fencing: enumWord('FENCING_CLASS', pool.fencing),
    state: pool.state.toLowerCase(),
    hosts: pool.hosts.map((host) => ({
      ...(camelKeys(host) as Record<string, unknown>),
      state: enumWord('HOST_STATE', host.state),
    })),
  };
}

function used(pool: Pool__Output): bigint {
  return (
    (BigInt(pool.slab_count) - BigInt(pool.slabs_free) - BigInt(pool.slabs_ahead)) * BigInt(pool.slab_size)
  );
}

async function list(_flags: unknown, command: Command): Promise<void> {
  const pools = await withMetadata(command, (api) => api.pools());
  if (globals(command).output === 'json') {
    printJson(pools.map(poolView));
    return;
  }
  if (pools.length === 0) {
    console.log('No pool is known. Format a disk (`holdfast pool format`) that a running agent sees.');
    return;
  }
  console.log(
    table(
      ['NAME', 'UUID', 'STATE', 'FENCING', 'SIZE', 'USED', 'FREE', 'PROVISIONED', 'HOSTS'],
      pools.map((pool) => [
        pool.name,
        pool.uuid,
        `${pool.state.toLowerCase()}${pool.draining && pool.state === 'ACTIVE' ? ', draining' : ''}`,
        enumWord('FENCING_CLASS', pool.fencing),
        formatBytes(BigInt(pool.slab_count) * BigInt(pool.slab_size)),
        formatBytes(used(pool)),
        formatBytes((BigInt(pool.slabs_free) + BigInt(pool.slabs_ahead)) * BigInt(pool.slab_size)),
        formatBytes(pool.provisioned_bytes),
        String(pool.hosts.filter((host) => host.state === 'HOST_STATE_LIVE').length),
      ]),
    ),
  );
}

async function show(word: string, _flags: unknown, command: Command): Promise<void> {
  const pool = await withMetadata(command, (api) => api.pool(word));
  if (globals(command).output === 'json') {
    printJson(poolView(pool));
    return;
  }
  const fencing = enumWord('FENCING_CLASS', pool.fencing) as FencingClass;
  console.log(
    properties([
      ['Name', pool.name],
      ['UUID', pool.uuid],
      [
        'State',
        pool.message === '' ? pool.state.toLowerCase() : `${pool.state.toLowerCase()}: ${pool.message}`,
      ],
      ['Device identity', pool.wwid],
      ['Fencing', `${fencing}: ${fencingSentences[fencing]}`],
      ['Lease', `${pool.lease_ms} ms, renewed every ${pool.renew_interval_ms} ms; drain ${pool.drain_ms} ms`],
      [
        'Slabs',
        `${pool.slab_count} of ${formatBytes(pool.slab_size)}: ${pool.slabs_free} free, ${pool.slabs_ahead} ahead at hosts`,
      ],
      ['Provisioned', formatBytes(pool.provisioned_bytes)],
      ['Incarnation', pool.incarnation],
      ...(pool.growth === '' ? [] : [['Device', pool.growth] as const]),
      ...(pool.draining
        ? [['Drained', `nothing new is placed on it; left: ${contentsText(pool)}`] as const]
        : []),
    ]),
  );
  if (pool.hosts.length > 0) {
    console.log();
    console.log(
      table(
        ['HOST', 'NODE', 'GENERATION', 'STATE', 'SINCE', 'WAITS FOR'],
        pool.hosts.map((host) => [
          String(host.host_id),
          host.node_id,
          host.generation,
          enumWord('HOST_STATE', host.state),
          age(host.since_unix_ms),
          host.waiting_for,
        ]),
      ),
    );
  }
}

/** What is left on a pool that is drained, a sentence. */
function contentsText(pool: Pool__Output): string {
  const { contents } = pool;
  if (contents === null) return '';
  const some = (count: string, what: string, names: readonly string[] = []): string[] =>
    count === '0'
      ? []
      : [`${count} ${what}${count === '1' ? '' : 's'}${names.length === 0 ? '' : ` (${names.join(', ')})`}`];
  const left = [
    ...some(contents.volumes, 'volume', contents.volume_names),
    ...some(contents.snapshots, 'snapshot', contents.snapshot_names),
    ...some(contents.volumes_deleting, 'deleted volume'),
    ...some(contents.grants, 'open grant'),
    ...some(contents.layers, 'layer'),
    ...some(contents.kept_layers, 'of them named by the disk alone'),
  ];
  return left.length === 0
    ? `nothing: \`holdfast pool remove ${pool.name}\` forgets the pool`
    : left.join(', ');
}

const waitMs = 120_000;

async function grow(word: string, _flags: unknown, command: Command): Promise<void> {
  const grown = await withMetadata(command, async (api) => {
    const { uuid } = await api.pool(word);
    return await api.run((c) => call(c, c.GrowPool, { pool_uuid: uuid }, { timeoutMs: waitMs }));
  });
  const pool = grown.pool as Pool__Output;
  if (globals(command).output === 'json') {
    printJson({ slabsAdded: grown.slabs_added, pool: poolView(pool) });
    return;
  }
  const size = formatBytes(BigInt(pool.slab_count) * BigInt(pool.slab_size));
  console.log(
    grown.slabs_added === '0'
      ? `Pool "${pool.name}" has ${size} and uses all that its nodes see of the device.`
      : `Pool "${pool.name}" has ${grown.slabs_added} slabs more: ${size}.`,
  );
}

function drainWith(method: 'DrainPool' | 'UndrainPool') {
  return async (word: string, _flags: unknown, command: Command): Promise<void> => {
    const pool = await withMetadata(command, async (api) => {
      const { uuid } = await api.pool(word);
      const request = { request_id: randomUUID(), pool_uuid: uuid, asked_by: userInfo().username };
      return await api.run((c, ms) => call(c, c[method], request, { timeoutMs: ms }));
    });
    if (globals(command).output === 'json') printJson(poolView(pool));
    else if (!pool.draining) console.log(`Pool "${pool.name}" takes new volumes again.`);
    else console.log(`Nothing new is placed on pool "${pool.name}". Left on it: ${contentsText(pool)}.`);
  };
}

async function remove(word: string, flags: { forgetKeptLayers?: boolean }, command: Command): Promise<void> {
  await withMetadata(command, async (api) => {
    // A UUID also names a pool that has gone since an earlier call, which is success.
    const uuid = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(word)
      ? word
      : (await api.pool(word)).uuid;
    const request = {
      request_id: randomUUID(),
      pool_uuid: uuid,
      asked_by: userInfo().username,
      forget_kept_layers: flags.forgetKeptLayers === true,
    };
    await api.run((c) => call(c, c.RemovePool, request, { timeoutMs: waitMs }));
  });
  if (globals(command).output === 'json') printJson({ removed: word });
  else {
    console.log(
      `Pool "${word}" is removed. Its device is let go; what is on it stays until it is formatted:`,
    );
    console.log('holdfast pool format DEVICE --name NAME --force');
  }
}

function findingLine(finding: CheckFinding): string {
  const where = [
    finding.volumeId === undefined ? undefined : `volume ${finding.volumeId}`,
    finding.layerId === undefined ? undefined : `layer ${finding.layerId}`,
    finding.slab === undefined ? undefined : `slab ${finding.slab}`,
    finding.offset === undefined ? undefined : `at ${finding.offset}+${finding.length ?? 0n}`,
  ].filter((part) => part !== undefined);
  const place = where.length > 0 ? ` (${where.join(', ')})` : '';
  return `${finding.severity}: ${finding.kind}: ${finding.message}${place}`;
}

export function printReport(device: string, report: CheckReport): void {
  for (const finding of report.findings) {
    console.log(finding.severity === 'error' ? red(findingLine(finding)) : findingLine(finding));
  }
  const counts = `${report.pagesRead} pages read, ${report.volumes} volumes, ${report.layers} layers, ${report.slabsClaimed} slabs in use, ${report.slabsFree} free`;
  const verdict = report.clean ? green('clean') : red('NOT CLEAN');
  console.log(`Pool "${report.pool.name}" on ${device}: ${verdict}. ${counts}.`);
}

async function check(word: string, _flags: unknown, command: Command): Promise<void> {
  const device = await findPoolDevice(word.includes('/') ? userPath(word) : word);
  const bar = new ProgressBar(`Checking ${device}`);
  const report = await native().checkPool(device, bar.update).finally(bar.end);
  if (globals(command).output === 'json') printJson({ device, ...report });
  else printReport(device, report);
  if (!report.clean) process.exitCode = 1;
}

export function addPoolCommands(program: Command): void {
  const pool = program.command('pool').description('shared disks formatted by Holdfast');
  pool
    .command('format <device>')
    .description('make a pool of a block device (everything on it is lost)')
    .requiredOption('--name <name>', "the pool's name")
    .addOption(
      new Option(
        '--fencing <class>',
        'how a dead node is fenced (default: loop for loop devices, else manual)',
      ).choices(['loop', 'manual', 'lease-only']),
    )
    .option('--force', 'also over another file system or an old pool; never over a mounted or live one')
    .option('--lease-ms <ms>', 'how long a node may write without renewing its lease (10000)', milliseconds)
    .option('--renew-ms <ms>', 'how often a node renews its lease (2000)', milliseconds)
    .option('--drain-ms <ms>', 'how long the device may hold back writes already sent', milliseconds)
    .action(format);
  pool.command('list').alias('ls').description('all pools').action(list);
  pool.command('show <pool>').description('one pool and its hosts, by name or UUID').action(show);
  pool
    .command('grow <pool>')
    .description('use what the device has gained, as soon as every node sees it')
    .action(grow);
  pool
    .command('drain <pool>')
    .description('place nothing new on a pool; what is there goes on')
    .action(drainWith('DrainPool'));
  pool.command('undrain <pool>').description('take a drain back').action(drainWith('UndrainPool'));
  pool
    .command('remove <pool>')
    .description('forget a drained pool on which nothing is left, and let its device go')
    .option('--forget-kept-layers', 'also with layers that only its disk names, if nobody needs them')
    .action(remove);
  pool
    .command('check <pool>')
    .description('read-only check of every page, by device, name or UUID; exit code 1 when not clean')
    .action(check);
}
