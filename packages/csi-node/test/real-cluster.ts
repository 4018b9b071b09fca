/** A whole cluster of built programs (`holdfast dev up`) for the tests of this folder, with a CSI client for each part. */
import { existsSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { credentials } from '@grpc/grpc-js';
import { call, clientOptions } from '@holdfast/common';
import {
  csi,
  holdfast,
  type Csi,
  type ListPoolsResponse__Output,
  type Volume__Output,
} from '@holdfast/proto';
import { TestArea, waitFor } from '@holdfast/testing';
import { DevUp } from '../../cli/src/harness/dev-process.ts';
import { NodeClient } from './node-client.ts';

const built = [
  '../../cli/dist/main.js',
  '../dist/csi/main.js',
  '../../../native/build/Release/holdfast.node',
];

export class RealCluster {
  readonly area: TestArea;
  readonly up: DevUp;
  readonly nodes: NodeClient[];
  readonly metadata: InstanceType<typeof holdfast.Metadata>;
  readonly #controller: InstanceType<typeof csi.Controller>;
  readonly #groups: InstanceType<typeof csi.GroupController>;
  readonly #changes: InstanceType<typeof csi.SnapshotMetadata>;
  readonly #nodeIds: string[] = [];

  private constructor(area: TestArea, up: DevUp) {
    this.area = area;
    this.up = up;
    const { state } = up;
    this.nodes = state.nodes.map((node) => new NodeClient(`unix:${node.csiSocket}`));
    this.metadata = new holdfast.Metadata(state.metadata, credentials.createInsecure(), clientOptions);
    const controller = `unix:${state.controllerSocket}`;
    this.#controller = new csi.Controller(controller, credentials.createInsecure(), clientOptions);
    this.#groups = new csi.GroupController(controller, credentials.createInsecure(), clientOptions);
    this.#changes = new csi.SnapshotMetadata(controller, credentials.createInsecure(), clientOptions);
  }

  static async start(name: string, nodes: number): Promise<RealCluster> {
    for (const file of built) {
      const path = fileURLToPath(new URL(file, import.meta.url));
      if (!existsSync(path)) throw new Error(`${path} is not built. Run: make build`);
    }
    const area = await TestArea.create(name);
    try {
      const up = await DevUp.start({ dir: area.path('dev'), nodes, size: '64G', env: area.mark });
      return new RealCluster(area, up);
    } catch (error) {
      await area.dispose().catch(() => undefined);
      throw error;
    }
  }

  /** @throws when something of the cluster is left. */
  async stop(): Promise<void> {
    for (const node of this.nodes) node.close();
    this.metadata.close();
    for (const client of [this.#controller, this.#groups, this.#changes]) client.close();
    const left = await this.up.close();
    await this.area.dispose();
    if (left.length > 0) throw new Error(`The cluster left behind: ${left.join(', ')}`);
  }

  get sockets(): { controllerSocket: string; nodeSocket: string } {
    return {
      controllerSocket: this.up.state.controllerSocket,
      nodeSocket: this.up.state.nodes[0]?.csiSocket ?? '',
    };
  }

  /** Node 1 is index 0. */
  node(index: number): NodeClient {
    const client = this.nodes[index];
    if (client === undefined) throw new Error(`there is no node ${index + 1}`);
    return client;
  }

  async nodeId(index: number): Promise<string> {
    this.#nodeIds[index] ??= (await this.node(index).info()).node_id;
    return this.#nodeIds[index] ?? '';
  }

  async create(
    name: string,
    sizeBytes: number,
    capability: Csi.VolumeCapability,
  ): Promise<Csi.Volume__Output> {
    const answer = await call<Csi.CreateVolumeResponse__Output>(
      this.#controller,
      this.#controller.CreateVolume,
      {
        name,
        capacity_range: { required_bytes: String(sizeBytes) },
        volume_capabilities: [capability],
      },
    );
    return answer.volume as Csi.Volume__Output;
  }

  async publish(
    volume: Csi.Volume__Output,
    node: number,
    capability: Csi.VolumeCapability,
    readOnly = false,
  ): Promise<Record<string, string>> {
    const answer = await call<Csi.ControllerPublishVolumeResponse__Output>(
      this.#controller,
      this.#controller.ControllerPublishVolume,
      {
        volume_id: volume.volume_id,
        node_id: await this.nodeId(node),
        volume_capability: capability,
        readonly: readOnly,
        volume_context: volume.volume_context,
      },
    );
    return answer.publish_context;
  }

  async unpublish(volume: Csi.Volume__Output, node: number): Promise<void> {
    await call(
      this.#controller,
      this.#controller.ControllerUnpublishVolume,
      { volume_id: volume.volume_id, node_id: await this.nodeId(node) },
      { timeoutMs: 60_000 },
    );
  }

  async expand(volume: Csi.Volume__Output, sizeBytes: number): Promise<void> {
    await call(this.#controller, this.#controller.ControllerExpandVolume, {
      volume_id: volume.volume_id,
      capacity_range: { required_bytes: String(sizeBytes) },
    });
  }

  async remove(volume: Csi.Volume__Output): Promise<void> {
    await call(this.#controller, this.#controller.DeleteVolume, { volume_id: volume.volume_id });
  }

  async snapshot(
    name: string,
    volume: Csi.Volume__Output,
    parameters: Record<string, string> = {},
  ): Promise<Csi.Snapshot__Output> {
    const answer = await call<Csi.CreateSnapshotResponse__Output>(
      this.#controller,
      this.#controller.CreateSnapshot,
      { name, source_volume_id: volume.volume_id, parameters },
      { timeoutMs: 60_000 },
    );
    return answer.snapshot as Csi.Snapshot__Output;
  }

  async removeSnapshot(snapshot: Csi.Snapshot__Output): Promise<void> {
    await call(this.#controller, this.#controller.DeleteSnapshot, { snapshot_id: snapshot.snapshot_id });
  }

  /** A new volume from a snapshot or another volume; as large as that, or as asked for. */
  async copy(
    name: string,
    of: Csi.Snapshot__Output | Csi.Volume__Output,
    capability: Csi.VolumeCapability,
    sizeBytes = 0,
  ): Promise<Csi.Volume__Output> {
    const answer = await call<Csi.CreateVolumeResponse__Output>(
      this.#controller,
      this.#controller.CreateVolume,
      {
        name,
        capacity_range: { required_bytes: String(sizeBytes) },
        volume_capabilities: [capability],
        volume_content_source:
          'snapshot_id' in of
            ? { snapshot: { snapshot_id: of.snapshot_id } }
            : { volume: { volume_id: of.volume_id } },
      },
      { timeoutMs: 60_000 },
    );
    return answer.volume as Csi.Volume__Output;
  }

  async group(
    name: string,
    volumes: readonly Csi.Volume__Output[],
  ): Promise<Csi.VolumeGroupSnapshot__Output> {
    const answer = await call<Csi.CreateVolumeGroupSnapshotResponse__Output>(
      this.#groups,
      this.#groups.CreateVolumeGroupSnapshot,
      { name, source_volume_ids: volumes.map((volume) => volume.volume_id) },
      { timeoutMs: 60_000 },
    );
    return answer.group_snapshot as Csi.VolumeGroupSnapshot__Output;
  }

  async removeGroup(group: Csi.VolumeGroupSnapshot__Output): Promise<void> {
    await call(this.#groups, this.#groups.DeleteVolumeGroupSnapshot, {
      group_snapshot_id: group.group_snapshot_id,
      snapshot_ids: group.snapshots.map((snapshot) => snapshot.snapshot_id),
    });
  }

  /** [offset, length] of what may differ; without `base`: of what holds data. */
  async changes(
    base: Csi.Snapshot__Output | undefined,
    target: Csi.Snapshot__Output,
    maxResults = 0,
  ): Promise<[number, number][]> {
    const stream =
      base === undefined
        ? this.#changes.GetMetadataAllocated({ snapshot_id: target.snapshot_id, max_results: maxResults })
        : this.#changes.GetMetadataDelta({
            base_snapshot_id: base.snapshot_id,
            target_snapshot_id: target.snapshot_id,
            max_results: maxResults,
          });
    const found: [number, number][] = [];
    for await (const message of stream) {
      const { block_metadata } = message as Csi.GetMetadataDeltaResponse__Output;
      if (maxResults > 0 && block_metadata.length > maxResults) throw new Error('a message is too long');
      found.push(
        ...block_metadata.map((block): [number, number] => [
          Number(block.byte_offset),
          Number(block.size_bytes),
        ]),
      );
    }
    return found;
  }

  /** As the metadata service has it. */
  volume(volume: Csi.Volume__Output): Promise<Volume__Output> {
    return call(this.metadata, this.metadata.GetVolume, { uuid: volume.volume_id.split('/')[1] ?? '' });
  }

  /** Waits until no slab belongs to anything. */
  async emptied(timeoutMs = 30_000): Promise<void> {
    await waitFor(
      'all slabs to come back',
      async () => {
        const { pools } = await call<ListPoolsResponse__Output>(this.metadata, this.metadata.ListPools, {});
        const [only] = pools;
        const free = Number(only?.slabs_free) + Number(only?.slabs_ahead);
        return free === Number(only?.slab_count) && only?.provisioned_bytes === '0' ? true : undefined;
      },
      { timeoutMs },
    );
  }

  /** Everything that the kubelet does to bring a volume to a pod on a node. */
  async attach(
    volume: Csi.Volume__Output,
    node: number,
    capability: Csi.VolumeCapability,
    readOnly = false,
  ): Promise<Attached> {
    const publish_context = await this.publish(volume, node, capability, readOnly);
    const short = volume.volume_id.slice(-12);
    const staging = this.area.path(`node-${node + 1}`, 'staging', short);
    const target = this.area.path(`node-${node + 1}`, 'pods', short, 'mount');
    await mkdir(staging, { recursive: true });
    await mkdir(this.area.path(`node-${node + 1}`, 'pods', short), { recursive: true });
    const context = { publish_context, volume_context: volume.volume_context };
    await this.node(node).stage(volume.volume_id, staging, capability, context);
    await this.node(node).publish(volume.volume_id, staging, target, capability, {
      ...context,
      readonly: readOnly,
    });
    return { node, staging, target, context };
  }

  async detach(volume: Csi.Volume__Output, attached: Attached): Promise<void> {
    await this.node(attached.node).unpublish(volume.volume_id, attached.target);
    await this.node(attached.node).unstage(volume.volume_id, attached.staging);
    await this.unpublish(volume, attached.node);
  }
}

export interface Attached {
  readonly node: number;
  readonly staging: string;
  readonly target: string;
  readonly context: {
    readonly publish_context: Record<string, string>;
    readonly volume_context: Record<string, string>;
  };
}
