/** A CSI client for tests: promises, and the requests that every test needs. */
import { credentials } from '@grpc/grpc-js';
import { call, clientOptions, PUBLISH_ID, PUBLISH_READ_ONLY } from '@holdfast/common';
import { csi, type Csi } from '@holdfast/proto';

export type Mode = Csi._csi_v1_VolumeCapability_AccessMode_Mode__Output;

export const mountCapability = (
  fsType = 'ext4',
  mode: Mode = 'SINGLE_NODE_WRITER',
  flags: string[] = [],
): Csi.VolumeCapability => ({
  mount: { fs_type: fsType, mount_flags: flags },
  access_mode: { mode },
});
export const blockCapability = (mode: Mode = 'SINGLE_NODE_WRITER'): Csi.VolumeCapability => ({
  block: {},
  access_mode: { mode },
});

export class NodeClient {
  readonly #node: InstanceType<typeof csi.Node>;
  readonly #identity: InstanceType<typeof csi.Identity>;

  constructor(endpoint: string) {
    this.#node = new csi.Node(endpoint, credentials.createInsecure(), clientOptions);
    this.#identity = new csi.Identity(endpoint, credentials.createInsecure(), clientOptions);
  }
  close(): void {
    this.#node.close();
    this.#identity.close();
  }

  stage(
    volumeId: string,
    staging: string,
    capability: Csi.VolumeCapability,
    over: Csi.NodeStageVolumeRequest & { readOnly?: boolean } = {},
  ) {
    const { readOnly = false, ...request } = over;
    return call(this.#node, this.#node.NodeStageVolume, {
      volume_id: volumeId,
      staging_target_path: staging,
      volume_capability: capability,
      publish_context: { [PUBLISH_ID]: 'p1', [PUBLISH_READ_ONLY]: String(readOnly) },
      ...request,
    });
  }
  unstage(volumeId: string, staging: string) {
    return call(this.#node, this.#node.NodeUnstageVolume, {
      volume_id: volumeId,
      staging_target_path: staging,
    });
  }
  publish(
    volumeId: string,
    staging: string,
    target: string,
    capability: Csi.VolumeCapability,
    over: Csi.NodePublishVolumeRequest = {},
  ) {
    return call(this.#node, this.#node.NodePublishVolume, {
      volume_id: volumeId,
      staging_target_path: staging,
      target_path: target,
      volume_capability: capability,
      publish_context: { [PUBLISH_ID]: 'p1' },
      ...over,
    });
  }
  unpublish(volumeId: string, target: string) {
    return call(this.#node, this.#node.NodeUnpublishVolume, { volume_id: volumeId, target_path: target });
  }
  stats(volumeId: string, path: string) {
    return call<Csi.NodeGetVolumeStatsResponse__Output>(this.#node, this.#node.NodeGetVolumeStats, {
      volume_id: volumeId,
      volume_path: path,
    });
  }
  expand(volumeId: string, path: string, requiredBytes: bigint | number, limitBytes: bigint | number = 0) {
    return call<Csi.NodeExpandVolumeResponse__Output>(this.#node, this.#node.NodeExpandVolume, {
      volume_id: volumeId,
      volume_path: path,
      capacity_range: { required_bytes: String(requiredBytes), limit_bytes: String(limitBytes) },
    });
  }
  waitUntilServed(): Promise<void> {
    return new Promise((resolve, reject) =>
      this.#node.waitForReady(Date.now() + 20_000, (error) => (error ? reject(error) : resolve())),
    );
  }
  info() {
    return call<Csi.NodeGetInfoResponse__Output>(this.#node, this.#node.NodeGetInfo, {});
  }
  probe() {
    return call<Csi.ProbeResponse__Output>(this.#identity, this.#identity.Probe, {});
  }
}
