/**
 * The wire contracts, loaded once: `holdfast` (holdfast.v1) and `csi` (csi.v1, CSI 1.12) hold grpc-js client constructors and
 * service definitions. Message types: holdfast's by name, CSI's under `Csi` (many names are in both).
 * Messages use: 64-bit integers as decimal strings, enums by name, every field present (proto3 defaults), field names as
 * in the .proto (snake_case), a oneof's chosen field named by a property with the oneof's name.
 */
import * as grpc from '@grpc/grpc-js';
import * as protoLoader from '@grpc/proto-loader';
import { descriptor } from './gen/descriptor.ts';
import type { ProtoGrpcType as AgentTypes } from './gen/types/agent.ts';
import type { ProtoGrpcType as CsiTypes } from './gen/types/csi.ts';
import type { ProtoGrpcType as MetadataTypes } from './gen/types/metadata.ts';

const packageDefinition = protoLoader.fromJSON(descriptor as Parameters<typeof protoLoader.fromJSON>[0], {
  keepCase: true,
  longs: String,
  enums: String,
  bytes: Buffer,
  defaults: true,
  oneofs: true,
});

const loaded = grpc.loadPackageDefinition(packageDefinition) as unknown as MetadataTypes &
  AgentTypes &
  CsiTypes;

/** Client constructors and service definitions of `holdfast.v1`. */
export const holdfast = loaded.holdfast.v1;

/** Client constructors and service definitions of `csi.v1`. */
export const csi = loaded.csi.v1;

/**
 * Generated handler interfaces extend an index signature, so a misspelt method would compile. This strips it:
 * `const handlers: Known<AgentsHandlers> = {…}` names every method exactly.
 */
export type Known<T> = {
  [K in keyof T as string extends K ? never : number extends K ? never : K]: T[K];
};

export * from './secrets.ts';
export type * from './gen/types/holdfast/v1/index.ts';
export type * as Csi from './gen/types/csi/v1/index.ts';
