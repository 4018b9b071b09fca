/** The node's agent, which opens and exports volumes, over its unix socket. */
import { setTimeout as sleep } from 'node:timers/promises';
import { credentials } from '@grpc/grpc-js';
import {
  answeredByServer,
  call,
  clientOptions,
  grpcTarget,
  HoldfastError,
  type CallContext,
} from '@holdfast/common';
import {
  holdfast,
  type AgentInfo__Output,
  type NodeAgentClient,
  type OpenVolumeInfo__Output,
  type OpenVolumeRequest,
  type OpenVolumeResponse__Output,
} from '@holdfast/proto';

/** Taken off the caller's deadline, so that our sentence arrives before the caller's own DEADLINE_EXCEEDED. */
const ANSWER_MARGIN_MS = 250;
const PATIENCE_MS = 120_000;
/** The agent may be busy with the volume by itself (a new size came by its stream): it is asked again for so long. */
const BUSY_MS = 5000;
const BUSY_PAUSE_MS = 50;

type Caller = Pick<CallContext, 'signal' | 'timeLeftMs'>;
type Method = (...args: never[]) => unknown;

export class AgentApi {
  readonly #client: NodeAgentClient;
  readonly #endpoint: string;

  constructor(endpoint: string) {
    this.#endpoint = endpoint;
    this.#client = new holdfast.NodeAgent(grpcTarget(endpoint), credentials.createInsecure(), clientOptions);
  }

  close(): void {
    this.#client.close();
  }

  async #call<Res>(method: Method, request: object, caller: Caller): Promise<Res> {
    const left = caller.timeLeftMs();
    const patience = left === undefined ? PATIENCE_MS : Math.max(1, left - ANSWER_MARGIN_MS);
    const started = performance.now();
    for (;;) {
      const spent = performance.now() - started;
      try {
        return await call<Res>(this.#client, method, request, {
          timeoutMs: Math.max(1, patience - spent),
          signal: caller.signal,
        });
      } catch (error) {
        if (!(error instanceof HoldfastError)) throw error;
        if (error.code === 'OPERATION_PENDING' && spent < Math.min(BUSY_MS, patience)) {
          await sleep(BUSY_PAUSE_MS);
          continue;
        }
        if (error.code !== 'UNAVAILABLE' || answeredByServer(error)) throw error;
        throw new HoldfastError(
          'UNAVAILABLE',
          `This node's agent does not answer on ${this.#endpoint} (${error.message}). I/O of open volumes pauses until it is back; repeat the call then.`,
          { cause: error },
        );
      }
    }
  }

  openVolume(request: OpenVolumeRequest, caller: Caller): Promise<OpenVolumeResponse__Output> {
    return this.#call(this.#client.OpenVolume, request, caller);
  }
  async closeVolume(volumeUuid: string, caller: Caller): Promise<void> {
    await this.#call(this.#client.CloseVolume, { volume_uuid: volumeUuid }, caller);
  }
  /** The volume's size after it. */
  async resizeVolume(volumeUuid: string, atLeastBytes: bigint, caller: Caller): Promise<bigint> {
    const answer = await this.#call<{ size_bytes: string }>(
      this.#client.ResizeVolume,
      { volume_uuid: volumeUuid, size_bytes: atLeastBytes.toString() },
      caller,
    );
    return BigInt(answer.size_bytes);
  }
  /** Undefined when the volume is not open on this node. */
  async openInfo(volumeUuid: string, caller: Caller): Promise<OpenVolumeInfo__Output | undefined> {
    try {
      return await this.#call(this.#client.GetOpenVolume, { volume_uuid: volumeUuid }, caller);
    } catch (error) {
      if (error instanceof HoldfastError && error.code === 'NOT_FOUND') return undefined;
      throw error;
    }
  }
  info(caller: Caller): Promise<AgentInfo__Output> {
    return this.#call(this.#client.GetAgentInfo, {}, caller);
  }
}
