/** The client's side of mutual TLS, from three files that every process takes by the same flags. */
import { readFileSync } from 'node:fs';
import { credentials, type ChannelCredentials } from '@grpc/grpc-js';
import { HoldfastError } from './errors.ts';

export interface TlsFlags {
  /** Authority of the server's certificate, */
  tlsCa?: string | undefined;
  /** our certificate, */
  tlsCert?: string | undefined;
  /** and its key. */
  tlsKey?: string | undefined;
}

/** An empty value counts as none, so that a variable of the environment can be emptied. */
function named(value: string | undefined): string | undefined {
  return value === '' ? undefined : value;
}

function read(flag: string, path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new HoldfastError('INVALID_ARGUMENT', `${flag} ${path} cannot be read: ${String(error)}`, {
      cause: error,
    });
  }
}

/**
 * Credentials for a channel; undefined when no file is named: the channel is not encrypted then. The files are read now and
 * not again.
 * @throws INVALID_ARGUMENT when some of the three are missing or cannot be read.
 */
export function clientCredentials(flags: TlsFlags): ChannelCredentials | undefined {
  const [ca, cert, key] = [named(flags.tlsCa), named(flags.tlsCert), named(flags.tlsKey)];
  if (ca === undefined && cert === undefined && key === undefined) return undefined;
  if (ca === undefined || cert === undefined || key === undefined) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      'TLS needs all of --tls-ca, --tls-cert and --tls-key. Give all three, or none.',
    );
  }
  return credentials.createSsl(read('--tls-ca', ca), read('--tls-key', key), read('--tls-cert', cert));
}
