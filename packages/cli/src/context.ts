/** What every command shares: the global options and the metadata client. */
import type { Command } from 'commander';
import { resolve } from 'node:path';
import { clientCredentials } from '@holdfast/common';
import { MetadataApi, metadataEndpoint } from './metadata.ts';
import type { OutputFormat } from './output.ts';

export interface GlobalOptions {
  output: OutputFormat;
  metadata?: string;
}

/** The global options, wherever on the line they stood: the nearest to the command counts. */
export function globals(command: Command): GlobalOptions {
  const options: GlobalOptions = { output: 'table' };
  const chain: Command[] = [];
  for (let at: Command | null = command; at !== null; at = at.parent) chain.unshift(at);
  for (const at of chain) Object.assign(options, at.opts<Partial<GlobalOptions>>());
  return options;
}

export async function withMetadata<T>(command: Command, body: (api: MetadataApi) => Promise<T>): Promise<T> {
  const { metadata } = globals(command);
  const api = new MetadataApi(metadataEndpoint(metadata), credentialsOfEnvironment());
  try {
    return await body(api);
  } finally {
    api.close();
  }
}

/** Where the service wants mutual TLS, the certificates come by the environment: a pod has them already set. */
function credentialsOfEnvironment(): ReturnType<typeof clientCredentials> {
  return clientCredentials({
    tlsCa: process.env['HOLDFAST_TLS_CA'],
    tlsCert: process.env['HOLDFAST_TLS_CERT'],
    tlsKey: process.env['HOLDFAST_TLS_KEY'],
  });
}

/** A path as the person typed it: `pnpm holdfast` runs in the checkout, INIT_CWD is where the person stands. */
export function userPath(path: string): string {
  return resolve(process.env['INIT_CWD'] ?? process.cwd(), path);
}
