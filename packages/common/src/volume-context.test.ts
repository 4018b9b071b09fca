import { describe, expect, it } from 'vitest';
import { parseVolumeContext, volumeContext } from './volume-context.ts';

const volume = {
  poolUuid: '5f0c0c0e-8f7e-4a52-9a87-3a4b2f1f0001',
  name: 'pvc-1',
  sizeBytes: 1n << 40n,
  parameters: { 'csi.storage.k8s.io/fstype': 'xfs', owner: 'a' },
};

describe('volume context', () => {
  it('comes back as it was made, whatever others added', () => {
    const context = { ...volumeContext(volume), 'storage.kubernetes.io/csiProvisionerIdentity': 'x' };
    expect(parseVolumeContext(context)).toEqual(volume);
  });

  it('names the source of a copy, and none for a volume that was made empty', () => {
    for (const source of [{ sourceSnapshotUuid: 's' }, { sourceVolumeUuid: 'v' }]) {
      expect(parseVolumeContext(volumeContext({ ...volume, ...source }))).toEqual({ ...volume, ...source });
    }
    const empty = { ...volume, sourceSnapshotUuid: '', sourceVolumeUuid: '' };
    expect(parseVolumeContext(volumeContext(empty))).toEqual(volume);
  });

  it('is undefined where there is none of ours', () => {
    expect(parseVolumeContext({ 'storage.kubernetes.io/csiProvisionerIdentity': 'x' })).toBeUndefined();
  });

  it.each(['holdfast.io/pool', 'holdfast.io/name', 'holdfast.io/size-bytes'])(
    'is refused without %s',
    (key) => {
      const context: Record<string, string> = volumeContext(volume);
      delete context[key];
      expect(() => parseVolumeContext(context)).toThrow(key);
    },
  );

  it('is refused with a size that is not a number', () => {
    expect(() => parseVolumeContext({ ...volumeContext(volume), 'holdfast.io/size-bytes': '1Gi' })).toThrow(
      'incomplete',
    );
  });
});
