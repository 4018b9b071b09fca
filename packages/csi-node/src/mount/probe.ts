/** What stands on a block device: nothing at all, a file system, something else. Nothing here writes. */
import { open, type FileHandle } from 'node:fs/promises';
import { HoldfastError } from '@holdfast/common';
import { readMarker } from './format.ts';
import { run, said } from './run.ts';

export type Content =
  | { readonly kind: 'blank' }
  /** A format of ours was cut off: nothing but mkfs ever wrote here. */
  | { readonly kind: 'half-formatted' }
  | { readonly kind: 'file-system'; readonly fsType: string }
  /** Data that must not be overwritten; `what` says what is known about it. */
  | { readonly kind: 'foreign'; readonly what: string };

const PROBE_MS = 60_000;
const EDGE = 1 << 20;

export async function deviceSize(device: string): Promise<bigint> {
  const ran = await run('blockdev', ['--getsize64', device], PROBE_MS);
  if (ran.exitCode !== 0) {
    throw new HoldfastError('INTERNAL', `The size of ${device} could not be read (${said(ran)}).`);
  }
  return BigInt(ran.stdout.trim());
}

async function isZero(handle: FileHandle, position: number, length: number): Promise<boolean> {
  const buffer = Buffer.alloc(length);
  const { bytesRead } = await handle.read(buffer, 0, length, position);
  return bytesRead === length && buffer.equals(Buffer.alloc(length));
}

/**
 * @param writtenBytes how much of the volume the engine has ever mapped; undefined where that is not known. A volume
 * without a signature is blank only when its first and last MiB are zeros *and* the engine holds nothing for it.
 */
export async function probe(device: string, writtenBytes: bigint | undefined): Promise<Content> {
  const size = await deviceSize(device);
  const handle = await open(device, 'r');
  try {
    if (await readMarker(handle)) return { kind: 'half-formatted' };
    const signature = await run('blkid', ['-p', '-o', 'export', device], PROBE_MS);
    // blkid(8): 0 found, 2 nothing found, 8 several that contradict each other.
    if (signature.exitCode === 0) {
      const values = new Map(
        signature.stdout.split('\n').map((line) => line.split('=', 2) as [string, string]),
      );
      const fsType = values.get('TYPE');
      if (values.get('USAGE') === 'filesystem' && fsType !== undefined)
        return { kind: 'file-system', fsType };
      return { kind: 'foreign', what: fsType ?? `a ${values.get('PTTYPE') ?? 'unknown'} partition table` };
    }
    if (signature.exitCode === 8) {
      return { kind: 'foreign', what: `several signatures at once (${said(signature)})` };
    }
    if (signature.exitCode !== 2) {
      throw new HoldfastError(
        'INTERNAL',
        `${device} could not be probed (${said(signature)}). Repeat the call.`,
      );
    }
    const edge = Math.min(EDGE, Number(size));
    if (!(await isZero(handle, 0, edge)) || !(await isZero(handle, Number(size) - edge, edge))) {
      return { kind: 'foreign', what: 'data without a known signature' };
    }
    if (writtenBytes !== undefined && writtenBytes > 0n) {
      return { kind: 'foreign', what: `${writtenBytes} bytes of data without a known signature` };
    }
    return { kind: 'blank' };
  } finally {
    await handle.close();
  }
}
