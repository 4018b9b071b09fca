/** holdfast support-bundle: one archive with what is needed to understand a site. */
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { call } from '@holdfast/common';
import { native } from '@holdfast/native';
import type { AuditRecord__Output } from '@holdfast/proto';
import type { Command } from 'commander';
import { globals, userPath, withMetadata } from '../context.ts';
import { localPools } from '../devices.ts';
import { listDevClusters } from '../dev/registry.ts';
import type { MetadataApi } from '../metadata.ts';
import { camelKeys, printJson } from '../output.ts';
import { logParts, machineFacts, makeBundle, type Part } from '../support/bundle.ts';
import { redact } from '../support/redact.ts';

const auditEntries = 1000;
const metricsTimeoutMs = 5000;

interface Flags {
  file?: string;
  logs: string[];
  config: string[];
  metrics?: string;
  check: boolean;
}

/** The newest records. Sequences have no gaps at the end, so that the end is found in a few looks. */
async function auditTail(api: MetadataApi): Promise<AuditRecord__Output[]> {
  const after = async (sequence: bigint, entries: number): Promise<AuditRecord__Output[]> =>
    (
      await api.run((c, timeoutMs) =>
        call(c, c.ListAudit, { after_sequence: sequence.toString(), max_entries: entries }, { timeoutMs }),
      )
    ).records;
  let low = 0n;
  let high = BigInt(auditEntries);
  while ((await after(high, 1)).length > 0) [low, high] = [high, 2n * high];
  while (high - low > BigInt(auditEntries) / 2n) {
    const middle = (low + high) / 2n;
    if ((await after(middle, 1)).length > 0) low = middle;
    else high = middle;
  }
  const from = low - BigInt(auditEntries) / 2n;
  return await after(from > 0n ? from : 0n, auditEntries);
}

/** Each by a call of its own: what one can't tell, another may. */
function serviceParts(command: Command): Part[] {
  const ask = (path: string, what: string, body: (api: MetadataApi) => Promise<unknown>): Part => ({
    path: `service/${path}.json`,
    what,
    read: () => withMetadata(command, async (api) => camelKeys(await body(api))),
  });
  return [
    ask('info', 'the metadata service: version, store, incarnation, term', (api) =>
      api.run((c, timeoutMs) => call(c, c.GetServiceInfo, {}, { timeoutMs })),
    ),
    ask('pools', 'pools, their hosts and fences', (api) => api.pools()),
    ask('nodes', 'nodes and their lives on pools', (api) => api.nodes()),
    ask('volumes', 'volumes, grants and publications', (api) => api.volumes()),
    ask('snapshots', 'snapshots', (api) => api.snapshots()),
    ask('audit', `the newest decisions about safety, about ${auditEntries}`, auditTail),
  ];
}

async function fetchText(url: string): Promise<string> {
  const answer = await fetch(url, { signal: AbortSignal.timeout(metricsTimeoutMs) });
  if (!answer.ok) throw new Error(`${url} answers ${answer.status}`);
  return await answer.text();
}

async function check(): Promise<unknown> {
  const pools = await localPools();
  return await Promise.all(
    pools.map(async ({ devicePath, info }) => {
      try {
        return { device: devicePath, ...(await native().checkPool(devicePath)) };
      } catch (error) {
        return {
          device: devicePath,
          pool: info,
          error: error instanceof Error ? error.message : String(error),
        };
      }
    }),
  );
}

/** What this process was told; the values of secrets go when it is written. */
function settings(): Record<string, string> {
  return Object.fromEntries(
    Object.entries(process.env).flatMap(([name, value]) =>
      name.startsWith('HOLDFAST_') && value !== undefined ? [[name, value] as const] : [],
    ),
  );
}

function partsOf(flags: Flags, version: string, command: Command): Part[] {
  const { metrics } = flags;
  const logs = [...flags.logs, ...listDevClusters().map((cluster) => join(cluster.dir, 'logs'))];
  return [
    {
      path: 'versions.json',
      what: 'versions of the command, of Node.js and of the pool format',
      read: async () => ({ holdfast: version, node: process.version, format: native().formatVersion }),
    },
    { path: 'settings.json', what: 'HOLDFAST_* of the environment', read: async () => settings() },
    ...serviceParts(command),
    ...(metrics === undefined
      ? []
      : [{ path: 'service/metrics.txt', what: `metrics from ${metrics}`, read: () => fetchText(metrics) }]),
    {
      path: 'machine/facts.json',
      what: 'kernel, devices and mounts of this machine',
      read: async () => machineFacts(),
    },
    { path: 'machine/pools.json', what: 'pools on devices of this machine', read: () => localPools() },
    ...(flags.check
      ? [{ path: 'machine/pool-check.json', what: '`pool check` of each of them', read: check }]
      : []),
    ...logs.flatMap((directory) => logParts(userPath(directory))),
    ...flags.config.map((path, index) => ({
      path: `config/${index}-${path.slice(path.lastIndexOf('/') + 1)}`.slice(0, 100),
      what: `configuration file ${path}`,
      read: async () => readFileSync(userPath(path), 'utf8'),
    })),
  ];
}

async function supportBundle(flags: Flags, command: Command): Promise<void> {
  const now = new Date();
  const version = command.parent?.version() ?? '';
  const bundle = await makeBundle(partsOf(flags, version, command), now);
  const name = `holdfast-support-${now.toISOString().replace(/[:.]/g, '-')}.tar.gz`;
  const path = userPath(flags.file ?? name);
  writeFileSync(path, bundle.archive, { mode: 0o600 });
  const bytes = statSync(path).size;
  if (globals(command).output === 'json') {
    printJson({ path, bytes, held: bundle.held, missing: bundle.missing });
    return;
  }
  console.log(
    `Wrote ${path} (${bytes} bytes): ${bundle.held.length} files. Look through it before you send it on.`,
  );
  for (const line of bundle.missing) console.log(redact(`Missing: ${line}`));
}

export function addSupportBundleCommand(program: Command): void {
  const list = (path: string, all: string[]): string[] => [...all, path];
  program
    .command('support-bundle')
    .description('one archive with what is needed to understand a site; secrets are taken out')
    .option('-o, --file <path>', 'the archive (default: holdfast-support-<time>.tar.gz here)')
    .option('--logs <dir>', 'a directory with *.log files; repeatable', list, [])
    .option('--config <file>', 'a configuration file; repeatable', list, [])
    .option('--metrics <url>', "the metadata service's metrics, such as http://HOST:7441/metrics")
    .option('--no-check', 'without `pool check`, which reads every page of the pools here')
    .action(supportBundle);
}
