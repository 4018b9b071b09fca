/**
 * The wire contracts, loaded once: `grpcTypes` for message types, `services` for grpc-js service definitions and clients.
 * Messages use: 64-bit integers as decimal strings, enums by name, every field present (proto3 defaults), field names as
 * in the .proto (snake_case), a oneof's chosen field named by a property with the oneof's name.
 */
import * as grpc from '@grpc/grpc-js';
import * as protoLoader from '@grpc/proto-loader';
import { descriptor } from './gen/descriptor.ts';
import type { ProtoGrpcType as AgentTypes } from './gen/types/agent.ts';
import type { ProtoGrpcType as MetadataTypes } from './gen/types/metadata.ts';

const packageDefinition = protoLoader.fromJSON(descriptor as Parameters<typeof protoLoader.fromJSON>[0], {
  keepCase: true,
  longs: String,
  enums: String,
  bytes: Buffer,
  defaults: true,
  oneofs: true,
});

const loaded = grpc.loadPackageDefinition(packageDefinition) as unknown as MetadataTypes & AgentTypes;

/** Client constructors and service definitions of `holdfast.v1`. */
export const holdfast = loaded.holdfast.v1;

/**
 * Generated handler interfaces extend an index signature, so a misspelt method would compile. This strips it:
 * `const handlers: Known<AgentsHandlers> = {…}` names every method exactly.
 */
export type Known<T> = {
  [K in keyof T as string extends K ? never : number extends K ? never : K]: T[K];
};

export type * from './gen/types/holdfast/v1/index.ts';
