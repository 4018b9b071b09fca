/** Parameters of storage and snapshot classes: which there are, what they may say, and what of them is kept. */
import { HoldfastError } from '../errors.ts';
import { fileSystemNamed, type FileSystem } from './capability.ts';

export interface VolumeParameters {
  /** Name or UUID of the pool; undefined: any. */
  readonly pool: string | undefined;
  readonly fsType: FileSystem | undefined;
  /** Extra arguments of mkfs. */
  readonly mkfsOptions: readonly string[];
}

/** Said by external-provisioner with --extra-create-metadata: accepted, and no part of what the volume is. */
const ignored = [
  'csi.storage.k8s.io/pv/name',
  'csi.storage.k8s.io/pvc/name',
  'csi.storage.k8s.io/pvc/namespace',
];
/**
 * "false": pods that use volumes of this class stay on a node that died, until a person or Kubernetes moves them. The same key as
 * an annotation of a PersistentVolumeClaim goes before everything, as a mutable parameter of the volume before the class. No part
 * of what the volume is.
 */
export const EVICT = 'holdfast.io/evict';
const fsTypeKeys = ['fsType', 'csi.storage.k8s.io/fstype'];
export const knownParameters = ['pool', ...fsTypeKeys, 'mkfsOptions', EVICT] as const;

/** @throws INVALID_ARGUMENT naming the known ones for an unknown, empty or contradictory parameter. */
export function readParameters(parameters: Readonly<Record<string, string>>): VolumeParameters {
  const known: readonly string[] = knownParameters;
  for (const [key, value] of Object.entries(parameters)) {
    if (ignored.includes(key)) continue;
    if (!known.includes(key)) {
      const alike = known.find((name) => name.toLowerCase() === key.toLowerCase());
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Unknown parameter "${key}"${alike ? ` (did you mean "${alike}"?)` : ''}. Known: ${known.join(', ')}. Correct the StorageClass.`,
      );
    }
    if (value.trim() === '' && key !== 'mkfsOptions') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Parameter "${key}" is empty. Give it a value or leave it out of the StorageClass.`,
      );
    }
  }
  const evict = parameters[EVICT] ?? 'true';
  if (evict !== 'true' && evict !== 'false') {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `Parameter "${EVICT}" is "${evict}". Give "true" or "false" in the StorageClass.`,
    );
  }
  const asked = fsTypeKeys.flatMap((key) => {
    const value = parameters[key];
    return value === undefined ? [] : [fileSystemNamed(value, `Parameter "${key}"`)];
  });
  if (new Set(asked).size > 1) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `Parameters "${fsTypeKeys[0]}" and "${fsTypeKeys[1]}" ask for different file systems (${asked.join(', ')}). Keep one.`,
    );
  }
  return {
    pool: parameters['pool']?.trim(),
    fsType: asked[0],
    mkfsOptions: readMkfsOptions(parameters['mkfsOptions'] ?? ''),
  };
}

/** What may change after creation (VolumeAttributesClass). */
export const mutableParameterKeys = [EVICT] as const;

/** @throws INVALID_ARGUMENT naming the known ones for one that is unknown, or not a value of it. */
export function readMutableParameters(parameters: Readonly<Record<string, string>>): Record<string, string> {
  for (const [key, value] of Object.entries(parameters)) {
    if (key !== EVICT) {
      const fixed = (knownParameters as readonly string[]).includes(key);
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `${fixed ? `Parameter "${key}" can not change after creation` : `Unknown mutable parameter "${key}"`}. Known: ` +
          `${mutableParameterKeys.join(', ')}. Correct the VolumeAttributesClass.`,
      );
    }
    if (value !== 'true' && value !== 'false') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Mutable parameter "${key}" is "${value}". Give "true" or "false" in the VolumeAttributesClass.`,
      );
    }
  }
  return { ...parameters };
}

/** Words of mkfs options. None may name a file or another device, so none has a slash. */
export function readMkfsOptions(text: string): string[] {
  const words = text.split(/\s+/).filter((word) => word !== '');
  for (const word of words) {
    if (!/^[A-Za-z0-9_.,:=^@%+-]+$/.test(word)) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `mkfsOptions has "${word}", which is not an option of mkfs: letters, digits and any of _.,:=^@%+- are. Correct the StorageClass.`,
      );
    }
  }
  const longest = 1024;
  if (text.length > longest) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `mkfsOptions is longer than ${longest} characters. Shorten it.`,
    );
  }
  return words;
}

/** Snapshot class: "true" freezes the mounted file system around the cut. */
export const QUIESCE = 'holdfast.io/quiesce';

/** Said by csi-snapshotter with --extra-create-metadata. */
const ignoredOfSnapshots = [
  'csi.storage.k8s.io/volumesnapshot/name',
  'csi.storage.k8s.io/volumesnapshot/namespace',
  'csi.storage.k8s.io/volumesnapshotcontent/name',
  'csi.storage.k8s.io/volumegroupsnapshot/name',
  'csi.storage.k8s.io/volumegroupsnapshot/namespace',
  'csi.storage.k8s.io/volumegroupsnapshotcontent/name',
];

/**
 * What of a snapshot class's parameters goes to the metadata service.
 * @throws INVALID_ARGUMENT naming the known ones.
 */
export function readSnapshotParameters(parameters: Readonly<Record<string, string>>): Record<string, string> {
  for (const [key, value] of Object.entries(parameters)) {
    if (ignoredOfSnapshots.includes(key)) continue;
    if (key !== QUIESCE) {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Unknown parameter "${key}". Known: ${QUIESCE}. Correct the VolumeSnapshotClass.`,
      );
    }
    if (value !== 'true' && value !== 'false') {
      throw new HoldfastError(
        'INVALID_ARGUMENT',
        `Parameter "${key}" is "${value}". Give "true" or "false" in the VolumeSnapshotClass.`,
      );
    }
  }
  return parameters[QUIESCE] === 'true' ? { [QUIESCE]: 'true' } : {};
}
