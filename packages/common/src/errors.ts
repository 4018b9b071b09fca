/**
 * Errors that reach a person or another process: a stable code (docs/errors.md has a row for each), a sentence that says
 * what happened, to what, and what to do next, and the gRPC status it travels as.
 */
import { Metadata, status, type ServiceError, type StatusObject } from '@grpc/grpc-js';

/** Trailer that carries the stable code. */
export const CODE_TRAILER = 'holdfast-code';

/** Every stable code and the gRPC status it travels as. */
export const errorCodes = {
  INVALID_ARGUMENT: status.INVALID_ARGUMENT,
  OUT_OF_RANGE: status.OUT_OF_RANGE,
  NOT_FOUND: status.NOT_FOUND,
  ALREADY_EXISTS: status.ALREADY_EXISTS,
  FAILED_PRECONDITION: status.FAILED_PRECONDITION,
  /** A message with an old term, generation or epoch: nothing was changed. */
  STALE: status.FAILED_PRECONDITION,
  /** The volume is published to another node. */
  PUBLISHED_ELSEWHERE: status.FAILED_PRECONDITION,
  /** The volume is granted, mounted or held open. */
  IN_USE: status.FAILED_PRECONDITION,
  /** A fence waits for a person: the message names the command. */
  FENCE_NEEDS_CONFIRMATION: status.FAILED_PRECONDITION,
  /** This volume or this host generation is fenced. */
  FENCED: status.FAILED_PRECONDITION,
  NO_SPACE: status.RESOURCE_EXHAUSTED,
  /** Nothing new is placed on the pool. */
  POOL_DRAINING: status.RESOURCE_EXHAUSTED,
  TOO_MANY: status.RESOURCE_EXHAUSTED,
  /** Another call for the same object is under way. */
  OPERATION_PENDING: status.ABORTED,
  BAD_TOKEN: status.ABORTED,
  UNAVAILABLE: status.UNAVAILABLE,
  DEADLINE_EXCEEDED: status.DEADLINE_EXCEEDED,
  /** The Kubernetes API refused a call of the controller's account. */
  KUBERNETES_REFUSED: status.PERMISSION_DENIED,
  KUBERNETES_UNAVAILABLE: status.UNAVAILABLE,
  UNIMPLEMENTED: status.UNIMPLEMENTED,
  /** Metadata on disk fails its check. */
  CORRUPT: status.DATA_LOSS,
  INTERNAL: status.INTERNAL,
} as const;
export type ErrorCode = keyof typeof errorCodes;

export class HoldfastError extends Error {
  readonly code: ErrorCode;
  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'HoldfastError';
    this.code = code;
  }
}

/** What a gRPC handler gives to its callback. Anything that is not a HoldfastError is INTERNAL with its own message. */
export function toGrpcStatus(error: unknown): Partial<StatusObject> & { code: status; details: string } {
  if (error instanceof HoldfastError) {
    const metadata = new Metadata();
    metadata.set(CODE_TRAILER, error.code);
    return { code: errorCodes[error.code], details: error.message, metadata };
  }
  if (isServiceError(error)) return { code: error.code, details: error.details, metadata: error.metadata };
  return { code: status.INTERNAL, details: error instanceof Error ? error.message : String(error) };
}

export function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && 'code' in error && 'details' in error && 'metadata' in error;
}

/** A client's view: the HoldfastError that the server threw, or one made from the bare status. */
export function fromServiceError(error: unknown): unknown {
  if (!isServiceError(error)) return error;
  const named = error.metadata.get(CODE_TRAILER)[0]?.toString();
  if (named !== undefined && named in errorCodes) {
    return new HoldfastError(named as ErrorCode, error.details, { cause: error });
  }
  const name = status[error.code];
  return new HoldfastError(
    name !== undefined && name in errorCodes ? (name as ErrorCode) : 'INTERNAL',
    error.details,
    {
      cause: error,
    },
  );
}

/**
 * False for an error that the connection gave (nobody listens, it broke off), true for one that the server answered with.
 * Both may have the code UNAVAILABLE.
 */
export function answeredByServer(error: HoldfastError): boolean {
  return !isServiceError(error.cause) || error.cause.metadata.get(CODE_TRAILER).length > 0;
}

export { status as GrpcStatus };
