/** CSI handlers: the wrappers of ../grpc.ts plus a debug line of each request, in which no secret is. */
import type { handleServerStreamingCall, handleUnaryCall } from '@grpc/grpc-js';
import { withoutSecrets } from '@holdfast/proto';
import { HoldfastError } from '../errors.ts';
import { serverStream, unary, type CallContext } from '../grpc.ts';
import type { Logger } from '../log.ts';

export type Handler<Req, Res> = (request: Req, context: CallContext) => Promise<Res>;

function logRequest(logger: Logger, method: string, request: unknown): void {
  if (!logger.isLevelEnabled('debug')) return;
  logger.debug({ method, request: withoutSecrets(`csi.v1.${method}Request`, request) }, 'request');
}

/** @param method short name, for example `NodeStageVolume`; its request message is `csi.v1.<method>Request`. */
export function csiUnary<Req, Res>(
  logger: Logger,
  method: string,
  body: Handler<Req, Res>,
): handleUnaryCall<Req, Res> {
  return unary<Req, Res>(logger, method, (request, context) => {
    logRequest(logger, method, request);
    return body(request, context);
  });
}

/** A call that answers with a stream: each message that `body` yields is one; its end is the stream's. */
export function csiServerStream<Req, Res>(
  logger: Logger,
  method: string,
  body: (request: Req, context: CallContext) => AsyncIterable<Res>,
): handleServerStreamingCall<Req, Res> {
  return serverStream<Req, Res>(logger, method, (request, context) => {
    logRequest(logger, method, request);
    return body(request, context);
  });
}

/** A call that this plugin does not offer says so in words. */
export function csiUnimplemented<Req, Res>(
  logger: Logger,
  method: string,
  why: string,
): handleUnaryCall<Req, Res> {
  return csiUnary<Req, Res>(logger, method, () => {
    throw new HoldfastError('UNIMPLEMENTED', `${method} is not offered: ${why}`);
  });
}
