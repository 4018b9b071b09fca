/** Names that both CSI plugins, the metadata service and people share: fixed for good, they stand in PersistentVolumes. */

/** The CSI driver's name, as in `StorageClass.provisioner` and `PersistentVolume.spec.csi.driver`. */
export const DRIVER_NAME = 'csi.holdfast.io';
export const DRIVER_VERSION = '0.1.0';

/** Prefix of the topology key that a node has for each pool it can reach; the value is always "true". */
const POOL_TOPOLOGY_PREFIX = 'pool.holdfast.io/';

export function poolTopology(poolUuids: readonly string[]): Record<string, string> {
  return Object.fromEntries(poolUuids.map((uuid) => [`${POOL_TOPOLOGY_PREFIX}${uuid}`, 'true']));
}

/** The pools that a topology term names. Other drivers' and other people's keys are none of ours. */
export function poolsOfTopology(segments: Readonly<Record<string, string>>): string[] {
  return Object.entries(segments)
    .filter(([key, value]) => key.startsWith(POOL_TOPOLOGY_PREFIX) && value === 'true')
    .map(([key]) => key.slice(POOL_TOPOLOGY_PREFIX.length));
}

/** Keys of `publish_context`: what ControllerPublish hands to NodeStage. */
export const PUBLISH_ID = 'publishId';
/** "true" where the volume was published read-only: NodeStage has no field for that. */
export const PUBLISH_READ_ONLY = 'readOnly';

/** Names of the volume parameters that the service keeps and `volume_context` carries. */
export const volumeParameterKeys = { fsType: 'fsType', mkfsOptions: 'mkfsOptions' } as const;
