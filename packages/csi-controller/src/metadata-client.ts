/** The controller's one dependency: the metadata service, called within what is left of the CSI call's time. */
import { randomUUID } from 'node:crypto';
import { credentials, type ChannelCredentials } from '@grpc/grpc-js';
import {
  answeredByServer,
  call,
  clientOptions,
  grpcTarget,
  HoldfastError,
  stream,
  type CallContext,
  type SnapshotHandle,
} from '@holdfast/common';
import {
  holdfast,
  type CreateSnapshotGroupRequest,
  type CreateSnapshotRequest,
  type CreateVolumeRequest,
  type ExpandVolumeRequest,
  type GetCapacityResponse__Output,
  type ListChangesRequest,
  type FenceNodeRequest,
  type ListChangesResponse__Output,
  type ListNodesRequest,
  type ListSnapshotsRequest,
  type ListSnapshotsResponse__Output,
  type ListVolumesResponse__Output,
  type MetadataClient,
  type Node__Output,
  type Pool__Output,
  type PublishVolumeRequest,
  type Snapshot__Output,
  type SnapshotGroup__Output,
  type Volume__Output,
} from '@holdfast/proto';

/** Taken off the caller's deadline, so that our sentence arrives before the caller's own DEADLINE_EXCEEDED. */
const ANSWER_MARGIN_MS = 250;
/** For callers without a deadline. A fence may take as long as its class promises. */
const PATIENCE_MS = 120_000;

type Caller = Pick<CallContext, 'signal' | 'timeLeftMs'>;
type Method = (...args: never[]) => unknown;

export class MetadataApi {
  readonly #client: MetadataClient;
  readonly #address: string;

  constructor(address: string, channelCredentials: ChannelCredentials = credentials.createInsecure()) {
    this.#address = address;
    this.#client = new holdfast.Metadata(grpcTarget(address), channelCredentials, clientOptions);
  }

  close(): void {
    this.#client.close();
  }

  async #call<Res>(method: Method, request: object, caller: Caller): Promise<Res> {
    const left = caller.timeLeftMs();
    const timeoutMs = left === undefined ? PATIENCE_MS : Math.max(1, left - ANSWER_MARGIN_MS);
    try {
      return await call<Res>(this.#client, method, request, { timeoutMs, signal: caller.signal });
    } catch (error) {
      throw this.#explained(error);
    }
  }

  /** An unreachable service is said in a sentence with its address. */
  #explained(error: unknown): unknown {
    if (!(error instanceof HoldfastError) || error.code !== 'UNAVAILABLE' || answeredByServer(error)) {
      return error;
    }
    return new HoldfastError(
      'UNAVAILABLE',
      `The metadata service at ${this.#address} does not answer (${error.message}). Volumes that are open go on; repeat the call when it is back.`,
      { cause: error },
    );
  }

  /** One cheap call that shows whether the service answers. */
  async ping(timeoutMs: number): Promise<void> {
    await call(this.#client, this.#client.GetServiceInfo, {}, { timeoutMs });
  }

  createVolume(request: Omit<CreateVolumeRequest, 'request_id'>, caller: Caller): Promise<Volume__Output> {
    return this.#call(this.#client.CreateVolume, { ...request, request_id: randomUUID() }, caller);
  }
  async deleteVolume(uuid: string, caller: Caller): Promise<void> {
    await this.#call(this.#client.DeleteVolume, { uuid, request_id: randomUUID() }, caller);
  }
  getVolume(uuid: string, volumeContext: Record<string, string>, caller: Caller): Promise<Volume__Output> {
    return this.#call(this.#client.GetVolume, { uuid, volume_context: volumeContext }, caller);
  }
  listVolumes(
    maxEntries: number,
    startingToken: string,
    caller: Caller,
  ): Promise<ListVolumesResponse__Output> {
    return this.#call(
      this.#client.ListVolumes,
      { max_entries: maxEntries, starting_token: startingToken },
      caller,
    );
  }
  expandVolume(request: Omit<ExpandVolumeRequest, 'request_id'>, caller: Caller): Promise<Volume__Output> {
    return this.#call(this.#client.ExpandVolume, { ...request, request_id: randomUUID() }, caller);
  }
  async modifyVolume(uuid: string, mutable: Record<string, string>, caller: Caller): Promise<void> {
    await this.#call(
      this.#client.ModifyVolume,
      { uuid, mutable_parameters: mutable, request_id: randomUUID() },
      caller,
    );
  }
  async publishVolume(request: Omit<PublishVolumeRequest, 'request_id'>, caller: Caller): Promise<string> {
    const answer = await this.#call<{ publish_id: string }>(
      this.#client.PublishVolume,
      { ...request, request_id: randomUUID() },
      caller,
    );
    return answer.publish_id;
  }
  async unpublishVolume(uuid: string, nodeId: string, caller: Caller): Promise<void> {
    await this.#call(
      this.#client.UnpublishVolume,
      { uuid, node_id: nodeId, request_id: randomUUID() },
      caller,
    );
  }
  /** By the name that is stored; undefined: there is none. */
  async volumeNamed(name: string, caller: Caller): Promise<Volume__Output | undefined> {
    return unlessMissing(this.#call<Volume__Output>(this.#client.GetVolume, { name }, caller));
  }

  createSnapshot(
    request: Omit<CreateSnapshotRequest, 'request_id'>,
    caller: Caller,
  ): Promise<Snapshot__Output> {
    return this.#call(this.#client.CreateSnapshot, { ...request, request_id: randomUUID() }, caller);
  }
  async deleteSnapshot(uuid: string, caller: Caller): Promise<void> {
    await this.#call(this.#client.DeleteSnapshot, { uuid, request_id: randomUUID() }, caller);
  }
  /** Undefined: there is none, or it is in another pool than the handle says. */
  async findSnapshot(handle: SnapshotHandle, caller: Caller): Promise<Snapshot__Output | undefined> {
    const found = await unlessMissing(
      this.#call<Snapshot__Output>(this.#client.GetSnapshot, { uuid: handle.snapshotUuid }, caller),
    );
    return found?.pool_uuid === handle.poolUuid ? found : undefined;
  }
  /** @throws NOT_FOUND */
  async snapshot(handle: SnapshotHandle, caller: Caller): Promise<Snapshot__Output> {
    const found = await this.findSnapshot(handle, caller);
    if (found === undefined) {
      throw new HoldfastError(
        'NOT_FOUND',
        `There is no snapshot ${handle.poolUuid}/${handle.snapshotUuid}. It may have been deleted; \`holdfast snapshot list\` shows all.`,
      );
    }
    return found;
  }
  listSnapshots(request: ListSnapshotsRequest, caller: Caller): Promise<ListSnapshotsResponse__Output> {
    return this.#call(this.#client.ListSnapshots, request, caller);
  }
  createSnapshotGroup(
    request: Omit<CreateSnapshotGroupRequest, 'request_id'>,
    caller: Caller,
  ): Promise<SnapshotGroup__Output> {
    return this.#call(this.#client.CreateSnapshotGroup, { ...request, request_id: randomUUID() }, caller);
  }
  async deleteSnapshotGroup(uuid: string, caller: Caller): Promise<void> {
    await this.#call(this.#client.DeleteSnapshotGroup, { uuid, request_id: randomUUID() }, caller);
  }
  async findSnapshotGroup(
    handle: SnapshotHandle,
    caller: Caller,
  ): Promise<SnapshotGroup__Output | undefined> {
    const found = await unlessMissing(
      this.#call<SnapshotGroup__Output>(this.#client.GetSnapshotGroup, { uuid: handle.snapshotUuid }, caller),
    );
    return found?.snapshots.some((snapshot) => snapshot.pool_uuid === handle.poolUuid) ? found : undefined;
  }
  /** Lasts as long as there is something to tell: a caller without a deadline waits for ever. */
  async *listChanges(
    request: ListChangesRequest,
    caller: Caller,
  ): AsyncGenerator<ListChangesResponse__Output> {
    const left = caller.timeLeftMs();
    try {
      yield* stream<ListChangesRequest, ListChangesResponse__Output>(
        this.#client,
        this.#client.ListChanges,
        request,
        { signal: caller.signal, ...(left === undefined ? {} : { timeoutMs: left }) },
      );
    } catch (error) {
      throw this.#explained(error);
    }
  }

  getCapacity(poolUuids: string[], caller: Caller): Promise<GetCapacityResponse__Output> {
    return this.#call(this.#client.GetCapacity, { pool_uuids: poolUuids }, caller);
  }
  async listPools(caller: Caller): Promise<Pool__Output[]> {
    const answer = await this.#call<{ pools: Pool__Output[] }>(this.#client.ListPools, {}, caller);
    return answer.pools;
  }

  async listNodes(request: ListNodesRequest, caller: Caller): Promise<Node__Output[]> {
    const answer = await this.#call<{ nodes: Node__Output[] }>(this.#client.ListNodes, request, caller);
    return answer.nodes;
  }
  async fenceNode(request: Omit<FenceNodeRequest, 'request_id'>, caller: Caller): Promise<void> {
    await this.#call(this.#client.FenceNode, { ...request, request_id: randomUUID() }, caller);
  }
}

async function unlessMissing<T>(found: Promise<T>): Promise<T | undefined> {
  try {
    return await found;
  } catch (error) {
    if (error instanceof HoldfastError && error.code === 'NOT_FOUND') return undefined;
    throw error;
  }
}
