/** Fencing by the metadata service. */
import { EVICT, HoldfastError, parseHandle } from '@holdfast/common';
import type { Host__Output, Node__Output, Volume__Output } from '@holdfast/proto';
import type { MetadataApi } from '../metadata-client.ts';
import { Conflict, type Fencing } from './cluster.ts';
import type { AgentView, HostView, Life } from './view.ts';

const timeoutMs = 4000;
const hostStates = ['JOINING', 'LIVE', 'FENCING', 'CUTTING', 'DEAD'] as const;

export class MetadataFencing implements Fencing {
  readonly #metadata: MetadataApi;

  constructor(metadata: MetadataApi) {
    this.#metadata = metadata;
  }

  async troubled(): Promise<string[]> {
    const nodes = await this.#metadata.listNodes({ only_troubled: true }, caller());
    return [...new Set(nodes.map((node) => node.name))];
  }

  async agents(name: string): Promise<AgentView[]> {
    return (await this.#metadata.listNodes({ name }, caller())).map(agentView);
  }

  async holders(handle: string): Promise<string[] | undefined> {
    const volume = await this.#volume(handle);
    return volume === undefined ? undefined : holdersOf(volume);
  }

  async evict(handle: string): Promise<boolean | undefined> {
    const word = (await this.#volume(handle))?.mutable_parameters[EVICT];
    return word === undefined ? undefined : word !== 'false';
  }

  async #volume(handle: string): Promise<Volume__Output | undefined> {
    const parsed = parseHandle(handle);
    if (parsed === undefined) return undefined;
    try {
      const volume = await this.#metadata.getVolume(parsed.volumeUuid, {}, caller());
      return volume.pool_uuid === parsed.poolUuid ? volume : undefined;
    } catch (error) {
      if (error instanceof HoldfastError && error.code === 'NOT_FOUND') return undefined;
      throw error;
    }
  }

  async fence(life: Life, reason: string, unlessConnected: boolean): Promise<void> {
    try {
      await this.#metadata.fenceNode(
        {
          node_id: life.nodeId,
          pool_uuid: life.poolUuid,
          generation: life.generation,
          reason,
          no_wait: true,
          unless_connected: unlessConnected,
        },
        caller(),
      );
    } catch (error) {
      const over =
        error instanceof HoldfastError && (error.code === 'STALE' || error.code === 'FAILED_PRECONDITION');
      throw over ? new Conflict(error.message, { cause: error }) : error;
    }
  }
}

function caller(): { signal: AbortSignal; timeLeftMs: () => number } {
  return { signal: AbortSignal.timeout(timeoutMs), timeLeftMs: () => timeoutMs };
}

function holdersOf(volume: Volume__Output): string[] {
  const readers = volume.readers.filter((reader) => reader.grant !== 'GRANT_STATE_FREE');
  return [
    ...(volume.grant === 'GRANT_STATE_FREE' ? [] : [volume.granted_node_id]),
    ...readers.map((reader) => reader.node_id),
  ];
}

function agentView(node: Node__Output): AgentView {
  return {
    nodeId: node.node_id,
    connected: node.connected,
    silentMs: Number(node.silent_ms),
    hosts: node.hosts.flatMap((host) => hostView(host) ?? []),
  };
}

function hostView(host: Host__Output): HostView | undefined {
  const state = hostStates.find((name) => host.state === `HOST_STATE_${name}`);
  if (state === undefined) return undefined;
  return {
    poolUuid: host.pool_uuid,
    generation: host.generation,
    state,
    bootId: host.boot_id,
    heldVolumes: host.held_volumes,
    stillMs: host.heartbeat_read ? Number(host.heartbeat_still_ms) : undefined,
    proof: host.proof,
    machineOff: host.machine_off,
    waitingFor: host.waiting_for,
    needsConfirmation: host.needs_confirmation,
  };
}
