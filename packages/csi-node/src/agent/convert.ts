/** Between the wire (decimal strings, snake_case) and the native engine (bigint, camelCase), and between their errors. */
import { HoldfastError, type ErrorCode } from '@holdfast/common';
import type { FencingClass, LayerSpec, SlabOwner, SlabRun, VolumeSpec } from '@holdfast/native';
import type {
  Grant__Output,
  Layer__Output,
  SlabOwner as WireSlabOwner,
  SlabRun as WireSlabRun,
  SlabRun__Output,
} from '@holdfast/proto';

export const fencingNames = {
  reservations: 'FENCING_CLASS_RESERVATIONS',
  manual: 'FENCING_CLASS_MANUAL',
  'lease-only': 'FENCING_CLASS_LEASE_ONLY',
  loop: 'FENCING_CLASS_LOOP',
} as const satisfies Record<FencingClass, string>;

export function runFromWire(run: SlabRun__Output): SlabRun {
  return { first: BigInt(run.first), count: run.count, generation: BigInt(run.generation) };
}

export function runToWire(run: SlabRun): WireSlabRun {
  return { first: run.first.toString(), count: run.count, generation: run.generation.toString() };
}

export function layerFromWire(layer: Layer__Output): LayerSpec {
  return {
    layerId: BigInt(layer.layer_id),
    slot: layer.slot,
    parentLayerId: BigInt(layer.parent_layer_id),
    birth: BigInt(layer.birth),
    sizeBytes: BigInt(layer.size_bytes),
    frozen: layer.frozen,
    slabs: layer.slabs.map(runFromWire),
  };
}

export function specFromGrant(grant: Grant__Output): VolumeSpec {
  return {
    volumeId: BigInt(grant.volume_id),
    slot: grant.slot,
    uuid: grant.volume_uuid,
    name: grant.name,
    sizeBytes: BigInt(grant.size_bytes),
    epoch: BigInt(grant.epoch),
    readOnly: grant.read_only,
    parametersJson: JSON.stringify(grant.parameters),
    layers: grant.layers.map(layerFromWire),
  };
}

export function slabOwnerToWire(owner: SlabOwner): WireSlabOwner {
  return {
    slab: owner.slab.toString(),
    generation: owner.generation.toString(),
    layer_id: owner.layerId.toString(),
    state: owner.state,
  };
}

export function* slabsOf(runs: Iterable<SlabRun>): Generator<{ slab: bigint; generation: bigint }> {
  for (const run of runs) {
    for (let i = 0n; i < BigInt(run.count); i++) yield { slab: run.first + i, generation: run.generation };
  }
}

export function countSlabs(runs: Iterable<SlabRun>): number {
  let count = 0;
  for (const run of runs) count += run.count;
  return count;
}

const nativeCodes: Record<string, ErrorCode> = {
  HF_INVALID_ARGUMENT: 'INVALID_ARGUMENT',
  HF_NOT_FOUND: 'NOT_FOUND',
  HF_ALREADY_EXISTS: 'ALREADY_EXISTS',
  HF_BUSY: 'IN_USE',
  HF_NOT_A_POOL: 'FAILED_PRECONDITION',
  HF_WRONG_POOL: 'FAILED_PRECONDITION',
  HF_UNSUPPORTED: 'FAILED_PRECONDITION',
  HF_CORRUPT: 'CORRUPT',
  HF_FOREIGN_DATA: 'FAILED_PRECONDITION',
  HF_TOO_SMALL: 'OUT_OF_RANGE',
  HF_NO_SPACE: 'NO_SPACE',
  HF_IO: 'INTERNAL',
  HF_FENCED: 'FENCED',
  HF_STALE: 'STALE',
  HF_LEASE_EXPIRED: 'UNAVAILABLE',
  HF_HOLD_EXPIRED: 'UNAVAILABLE',
  HF_UNAVAILABLE: 'UNAVAILABLE',
};

/** The native engine's stable code of an error ("HF_BUSY"), or undefined. */
export function nativeCode(error: unknown): string | undefined {
  if (!(error instanceof Error) || !('code' in error) || typeof error.code !== 'string') return undefined;
  return error.code.startsWith('HF_') ? error.code : undefined;
}

/** The engine's error as one that travels over gRPC; anything else comes back as it is. */
export function fromNativeError(error: unknown): unknown {
  const code = nativeCode(error);
  if (code === undefined) return error;
  return new HoldfastError(nativeCodes[code] ?? 'INTERNAL', (error as Error).message, { cause: error });
}

/** Worth repeating: the service did not answer, or said "later". */
export function isTransient(error: unknown): boolean {
  return (
    error instanceof HoldfastError &&
    ['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'OPERATION_PENDING', 'TOO_MANY'].includes(error.code)
  );
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
