/**
 * CSI SnapshotMetadata: which ranges of a snapshot hold data, or may differ from an older one of the same chain. They come from
 * the slab pages on the disk, so they are exact to the block (4096 bytes) and cost no reading of data. What was written with
 * the same content, or discarded, counts as changed.
 */
import {
  csiServerStream,
  HoldfastError,
  requireSnapshotHandle,
  type CallContext,
  type Logger,
} from '@holdfast/common';
import type { ByteRange__Output, Csi, Known, Snapshot__Output } from '@holdfast/proto';
import type { MetadataApi } from './metadata-client.ts';

/** Ranges have any length that is a multiple of the block size. */
const TYPE = 'VARIABLE_LENGTH' as const;

interface Asked {
  readonly starting_offset: string;
  readonly max_results: number;
}

export class SnapshotMetadataService {
  readonly #metadata: MetadataApi;

  constructor(metadata: MetadataApi) {
    this.#metadata = metadata;
  }

  handlers(log: Logger): Known<Csi.SnapshotMetadataHandlers> {
    return {
      GetMetadataAllocated: csiServerStream(log, 'GetMetadataAllocated', (r, c) => this.allocated(r, c)),
      GetMetadataDelta: csiServerStream(log, 'GetMetadataDelta', (r, c) => this.delta(r, c)),
    };
  }

  async *allocated(
    request: Csi.GetMetadataAllocatedRequest__Output,
    context: CallContext,
  ): AsyncGenerator<Csi.GetMetadataAllocatedResponse> {
    checkNumbers(request);
    const handle = requireSnapshotHandle(request.snapshot_id, 'snapshot_id');
    const target = await this.#metadata.snapshot(handle, context);
    yield* this.#ranges('', target, request, context);
  }

  async *delta(
    request: Csi.GetMetadataDeltaRequest__Output,
    context: CallContext,
  ): AsyncGenerator<Csi.GetMetadataDeltaResponse> {
    checkNumbers(request);
    const baseHandle = requireSnapshotHandle(request.base_snapshot_id, 'base_snapshot_id');
    const targetHandle = requireSnapshotHandle(request.target_snapshot_id, 'target_snapshot_id');
    const base = await this.#metadata.snapshot(baseHandle, context);
    const target = await this.#metadata.snapshot(targetHandle, context);
    yield* this.#ranges(base.uuid, target, request, context);
  }

  async *#ranges(
    baseUuid: string,
    target: Snapshot__Output,
    asked: Asked,
    context: CallContext,
  ): AsyncGenerator<Csi.GetMetadataAllocatedResponse> {
    const size = BigInt(target.size_bytes);
    const start = BigInt(asked.starting_offset);
    if (start > size) {
      throw new HoldfastError(
        'OUT_OF_RANGE',
        `starting_offset ${start} is behind the end of snapshot ${target.pool_uuid}/${target.uuid}, which has ${size} bytes. Start inside it.`,
      );
    }
    if (target.state !== 'READY') {
      throw new HoldfastError('UNAVAILABLE', `Snapshot ${target.name} is still being cut. Repeat the call.`);
    }
    const message = (ranges: readonly ByteRange__Output[]): Csi.GetMetadataAllocatedResponse => ({
      block_metadata_type: TYPE,
      volume_capacity_bytes: target.size_bytes,
      block_metadata: ranges.map(({ offset, length }) => ({ byte_offset: offset, size_bytes: length })),
    });
    let sent = false;
    const changes = this.#metadata.listChanges(
      {
        base_snapshot_uuid: baseUuid,
        target_snapshot_uuid: target.uuid,
        starting_offset: asked.starting_offset,
        max_ranges: asked.max_results,
      },
      context,
    );
    for await (const { ranges } of changes) {
      const wanted = ranges.filter(({ offset, length }) => BigInt(offset) + BigInt(length) > start);
      for (const part of inParts(wanted, asked.max_results)) {
        sent = true;
        yield message(part);
      }
    }
    // A snapshot without a change still tells its size.
    if (!sent) yield message([]);
  }
}

/** @throws OUT_OF_RANGE, INVALID_ARGUMENT for what is negative. */
function checkNumbers({ starting_offset, max_results }: Asked): void {
  if (BigInt(starting_offset) < 0n) {
    throw new HoldfastError('OUT_OF_RANGE', `starting_offset ${starting_offset} is negative. Give bytes.`);
  }
  if (max_results < 0) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      'max_results is negative. Give a number of ranges for one message, or 0 for any.',
    );
  }
}

/** At most `most` in each part; 0: all in one. Nothing gives no part. */
function* inParts<T>(items: readonly T[], most: number): Generator<readonly T[]> {
  const step = most === 0 ? items.length : most;
  for (let at = 0; at < items.length; at += step) yield items.slice(at, at + step);
}
