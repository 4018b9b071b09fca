export * from './agent/index.ts';
export * from './csi/index.ts';
