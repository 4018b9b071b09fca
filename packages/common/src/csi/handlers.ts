/** CSI handlers: the unary wrapper plus a debug line of each request, in which no secret is. */
import type { handleUnaryCall } from '@grpc/grpc-js';
import { withoutSecrets } from '@holdfast/proto';
import { HoldfastError } from '../errors.ts';
import { unary, type CallContext } from '../grpc.ts';
import type { Logger } from '../log.ts';

export type Handler<Req, Res> = (request: Req, context: CallContext) => Promise<Res>;

/** @param method short name, for example `NodeStageVolume`; its request message is `csi.v1.<method>Request`. */
export function csiUnary<Req, Res>(
  logger: Logger,
  method: string,
  body: Handler<Req, Res>,
): handleUnaryCall<Req, Res> {
  return unary<Req, Res>(logger, method, (request, context) => {
    if (logger.isLevelEnabled('debug')) {
      logger.debug({ method, request: withoutSecrets(`csi.v1.${method}Request`, request) }, 'request');
    }
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
