/**
 * The CSI calls of Kubernetes, on the sockets of a development cluster: what the provisioner, the attacher and the kubelet
 * would say, in their order, with their repeats.
 */
import { mkdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { call, clientOptions, HoldfastError } from '@holdfast/common';
import { csi, holdfast, type Csi, type MetadataClient, type NodeAgentClient } from '@holdfast/proto';
import { credentials } from '@grpc/grpc-js';
import type { DevState } from '../dev/state.ts';

const insecure = credentials.createInsecure();
const callMs = 60_000;

/** `fsType` undefined: raw block. */
export interface CsiVolume {
  id: string;
  uuid: string;
  name: string;
  fsType: string | undefined;
  context: Record<string, string>;
}

export interface CsiSnapshot {
  id: string;
  name: string;
}

/** What a volume is made from. */
export type CsiSource = { snapshot: CsiSnapshot } | { volume: CsiVolume };

function contentSource(source: CsiSource): Csi.VolumeContentSource {
  return 'snapshot' in source
    ? { type: 'snapshot', snapshot: { snapshot_id: source.snapshot.id } }
    : { type: 'volume', volume: { volume_id: source.volume.id } };
}

export interface Published {
  volume: CsiVolume;
  node: number;
  stagingPath: string;
  /** A directory with the file system, or the device node of a raw block volume. */
  targetPath: string;
}

const passing: readonly string[] = ['UNAVAILABLE', 'DEADLINE_EXCEEDED', 'OPERATION_PENDING'];
/** The kubelet repeats a stage whatever the error: a node that was fenced joins again by itself meanwhile. */
const passingForStage: readonly string[] = [...passing, 'FAILED_PRECONDITION', 'STALE', 'FENCED'];

/** Repeats what a sidecar or the kubelet would repeat, until `timeoutMs` is over. */
export async function repeated<T>(
  what: string,
  timeoutMs: number,
  body: () => Promise<T>,
  again = passing,
): Promise<T> {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    try {
      return await body();
    } catch (error) {
      if (!(error instanceof HoldfastError) || !again.includes(error.code)) throw error;
      if (Date.now() > deadline) {
        throw new Error(`${what} did not succeed within ${timeoutMs / 1000} s: ${error.message}`, {
          cause: error,
        });
      }
      await sleep(200);
    }
  }
}

export class CsiCluster {
  readonly #state: DevState;
  readonly metadata: MetadataClient;
  readonly #controller: InstanceType<typeof csi.Controller>;
  readonly #nodes: InstanceType<typeof csi.Node>[];
  readonly agents: NodeAgentClient[];
  readonly #nodeIds = new Map<number, string>();

  constructor(state: DevState) {
    this.#state = state;
    this.metadata = new holdfast.Metadata(state.metadata, insecure, clientOptions);
    this.#controller = new csi.Controller(`unix:${state.controllerSocket}`, insecure, clientOptions);
    this.#nodes = state.nodes.map((n) => new csi.Node(`unix:${n.csiSocket}`, insecure, clientOptions));
    this.agents = state.nodes.map(
      (n) => new holdfast.NodeAgent(`unix:${n.agentSocket}`, insecure, clientOptions),
    );
  }

  close(): void {
    for (const client of [this.metadata, this.#controller, ...this.#nodes, ...this.agents]) client.close();
  }

  #node(index: number): InstanceType<typeof csi.Node> {
    const node = this.#nodes[index - 1];
    if (node === undefined) throw new Error(`There is no node ${index}`);
    return node;
  }

  agent(index: number): NodeAgentClient {
    const agent = this.agents[index - 1];
    if (agent === undefined) throw new Error(`There is no node ${index}`);
    return agent;
  }

  #directory(index: number): string {
    const node = this.#state.nodes[index - 1];
    if (node === undefined) throw new Error(`There is no node ${index}`);
    return node.directory;
  }

  async nodeId(index: number): Promise<string> {
    const known = this.#nodeIds.get(index);
    if (known !== undefined) return known;
    const node = this.#node(index);
    const { node_id } = await repeated('NodeGetInfo', callMs, () =>
      call(node, node.NodeGetInfo, {}, { timeoutMs: 5000 }),
    );
    this.#nodeIds.set(index, node_id);
    return node_id;
  }

  #capability(volume: { fsType: string | undefined }): Csi.VolumeCapability {
    const access_mode = { mode: 'SINGLE_NODE_WRITER' as const };
    return volume.fsType === undefined
      ? { access_mode, block: {}, access_type: 'block' }
      : { access_mode, mount: { fs_type: volume.fsType, mount_flags: [] }, access_type: 'mount' };
  }

  async create(name: string, bytes: bigint, fsType?: string, source?: CsiSource): Promise<CsiVolume> {
    const controller = this.#controller;
    const { volume } = await repeated('CreateVolume', callMs, () =>
      call(
        controller,
        controller.CreateVolume,
        {
          name,
          capacity_range: { required_bytes: bytes.toString() },
          volume_capabilities: [this.#capability({ fsType })],
          parameters: {},
          ...(source === undefined ? {} : { volume_content_source: contentSource(source) }),
        },
        { timeoutMs: callMs },
      ),
    );
    if (!volume) throw new Error('CreateVolume answered without a volume');
    return {
      id: volume.volume_id,
      uuid: volume.volume_id.split('/')[1] ?? '',
      name,
      fsType,
      context: volume.volume_context,
    };
  }

  /** ControllerPublish, NodeStage, NodePublish. */
  async attach(volume: CsiVolume, index: number): Promise<Published> {
    const controller = this.#controller;
    const capability = this.#capability(volume);
    const node_id = await this.nodeId(index);
    const { publish_context } = await repeated('ControllerPublishVolume', callMs, () =>
      call(
        controller,
        controller.ControllerPublishVolume,
        { volume_id: volume.id, node_id, volume_capability: capability, volume_context: volume.context },
        { timeoutMs: callMs },
      ),
    );
    const base = this.#directory(index);
    const stagingPath = join(base, 'staging', volume.name);
    const targetPath = join(base, 'pods', volume.name, volume.fsType === undefined ? 'device' : 'mount');
    mkdirSync(stagingPath, { recursive: true });
    mkdirSync(dirname(targetPath), { recursive: true });
    const node = this.#node(index);
    const common = {
      volume_id: volume.id,
      publish_context,
      volume_context: volume.context,
      volume_capability: capability,
      staging_target_path: stagingPath,
    };
    await repeated(
      'NodeStageVolume',
      callMs,
      () => call(node, node.NodeStageVolume, common, { timeoutMs: callMs }),
      passingForStage,
    );
    await repeated('NodePublishVolume', callMs, () =>
      call(node, node.NodePublishVolume, { ...common, target_path: targetPath }, { timeoutMs: callMs }),
    );
    return { volume, node: index, stagingPath, targetPath };
  }

  /** NodeUnpublish, NodeUnstage, ControllerUnpublish. */
  async detach(published: Published): Promise<void> {
    const node = this.#node(published.node);
    const volume_id = published.volume.id;
    await repeated('NodeUnpublishVolume', callMs, () =>
      call(
        node,
        node.NodeUnpublishVolume,
        { volume_id, target_path: published.targetPath },
        { timeoutMs: callMs },
      ),
    );
    await repeated('NodeUnstageVolume', callMs, () =>
      call(
        node,
        node.NodeUnstageVolume,
        { volume_id, staging_target_path: published.stagingPath },
        { timeoutMs: callMs },
      ),
    );
    await this.unpublish(published.volume, published.node);
  }

  /** ControllerUnpublish alone: what the attacher calls when a node is dead. Resolves when the fence is complete. */
  async unpublish(volume: CsiVolume, index: number): Promise<void> {
    const controller = this.#controller;
    const node_id = await this.nodeId(index);
    await repeated('ControllerUnpublishVolume', 120_000, () =>
      call(
        controller,
        controller.ControllerUnpublishVolume,
        { volume_id: volume.id, node_id },
        { timeoutMs: callMs },
      ),
    );
  }

  /** ControllerExpand and NodeExpand of a volume in use. */
  async expand(published: Published, bytes: bigint): Promise<void> {
    const controller = this.#controller;
    const capability = this.#capability(published.volume);
    const capacity_range = { required_bytes: bytes.toString() };
    await repeated('ControllerExpandVolume', callMs, () =>
      call(
        controller,
        controller.ControllerExpandVolume,
        { volume_id: published.volume.id, capacity_range, volume_capability: capability },
        { timeoutMs: callMs },
      ),
    );
    const node = this.#node(published.node);
    await repeated('NodeExpandVolume', callMs, () =>
      call(
        node,
        node.NodeExpandVolume,
        {
          volume_id: published.volume.id,
          volume_path: published.targetPath,
          staging_target_path: published.stagingPath,
          capacity_range,
          volume_capability: capability,
        },
        { timeoutMs: callMs },
      ),
    );
  }

  async delete(volume: CsiVolume): Promise<void> {
    const controller = this.#controller;
    await repeated('DeleteVolume', callMs, () =>
      call(controller, controller.DeleteVolume, { volume_id: volume.id }, { timeoutMs: callMs }),
    );
  }

  /** CreateSnapshot, repeated as the snapshotter repeats it until it is ready to use. */
  async snapshot(volume: CsiVolume, name: string): Promise<CsiSnapshot> {
    const controller = this.#controller;
    return await repeated('CreateSnapshot', callMs, async () => {
      const { snapshot } = await call(
        controller,
        controller.CreateSnapshot,
        { source_volume_id: volume.id, name },
        { timeoutMs: callMs },
      );
      if (!snapshot?.ready_to_use) throw new HoldfastError('OPERATION_PENDING', `${name} is not ready yet`);
      return { id: snapshot.snapshot_id, name };
    });
  }

  async deleteSnapshot(snapshot: CsiSnapshot): Promise<void> {
    const controller = this.#controller;
    await repeated('DeleteSnapshot', callMs, () =>
      call(controller, controller.DeleteSnapshot, { snapshot_id: snapshot.id }, { timeoutMs: callMs }),
    );
  }

  /** What agents reported and the service could not record: slabs that are lost to both until their host's life ends. */
  async misfits(): Promise<string[]> {
    const found: string[] = [];
    for (let after = '0'; ; ) {
      const { records } = await call(this.metadata, this.metadata.ListAudit, {
        after_sequence: after,
        max_entries: 1000,
      });
      found.push(...records.filter(({ event }) => event === 'misfit').map(({ detail }) => detail));
      const last = records.at(-1);
      if (last === undefined) return found;
      after = last.sequence;
    }
  }

  /** Waits until no slab of the pool is a volume's. Rejects when none has come back for `timeoutMs`. */
  async untilEmpty(timeoutMs: number): Promise<void> {
    let deadline = Date.now() + timeoutMs;
    let least: bigint | undefined;
    for (;;) {
      const { pools } = await call(this.metadata, this.metadata.ListPools, {}, { timeoutMs: 5000 });
      const pool = pools.find((p) => p.uuid === this.#state.disk.poolUuid);
      if (pool === undefined) throw new Error('The pool is not known any more');
      const taken = BigInt(pool.slab_count) - BigInt(pool.slabs_free) - BigInt(pool.slabs_ahead);
      if (taken === 0n) return;
      if (least === undefined || taken < least) {
        least = taken;
        deadline = Date.now() + timeoutMs;
      }
      if (Date.now() > deadline) {
        throw new Error(
          `${taken} of ${pool.slab_count} slabs are still in use, and none has come back for ${timeoutMs / 1000} s`,
        );
      }
      await sleep(100);
    }
  }
}
