export * from './csi/index.ts';
export * from './error-help.ts';
export * from './errors.ts';
export * from './grpc.ts';
export * from './inflight.ts';
export * from './log.ts';
export * from './tls.ts';
export * from './volume-context.ts';
