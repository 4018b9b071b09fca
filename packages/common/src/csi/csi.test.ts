import type { Csi } from '@holdfast/proto';
import { describe, expect, it } from 'vitest';
import { checkMountFlags, readCapability, splitMountFlags } from './capability.ts';
import { poolsOfTopology, poolTopology } from './driver.ts';
import {
  formatHandle,
  formatSnapshotHandle,
  parseHandle,
  requireHandle,
  requireSnapshotHandle,
} from './handle.ts';
import { readMkfsOptions, readParameters, readSnapshotParameters } from './parameters.ts';

const a = '11111111-2222-3333-4444-555555555555';
const b = 'aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee';
type Mode = Csi._csi_v1_VolumeCapability_AccessMode_Mode__Output;
const mount = (mode: Mode, over: object = {}): Csi.VolumeCapability__Output => ({
  access_type: 'mount',
  mount: { fs_type: '', mount_flags: [], volume_mount_group: '', ...over },
  access_mode: { mode },
});

describe('volume handles', () => {
  it('come back as they were made, and nothing else is taken for one', () => {
    expect(parseHandle(formatHandle({ poolUuid: a, volumeUuid: b }))).toEqual({ poolUuid: a, volumeUuid: b });
    for (const other of [
      '',
      'x',
      a,
      `${a}/`,
      `${a}/${b}/`,
      `${a}/${b}\n`,
      `${a}/${b.toUpperCase()}`,
      `../${a}/${b}`,
    ]) {
      expect([other, parseHandle(other)]).toEqual([other, undefined]);
    }
    expect(() => requireHandle('')).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    expect(() => requireHandle('x')).toThrow(expect.objectContaining({ code: 'NOT_FOUND' }));
  });
});

describe('snapshot parameters', () => {
  it('are quiesce and what the sidecars add', () => {
    expect(
      readSnapshotParameters({
        'holdfast.io/quiesce': 'true',
        'csi.storage.k8s.io/volumesnapshot/name': 's',
        'csi.storage.k8s.io/volumegroupsnapshotcontent/name': 'g',
      }),
    ).toEqual({ 'holdfast.io/quiesce': 'true' });
    expect(readSnapshotParameters({ 'holdfast.io/quiesce': 'false' })).toEqual({});
    expect(readSnapshotParameters({})).toEqual({});
    expect(() => readSnapshotParameters({ 'holdfast.io/quiesce': 'yes' })).toThrow(/"true" or "false"/);
    expect(() => readSnapshotParameters({ quiesce: 'true' })).toThrow(/Known: holdfast.io\/quiesce/);
  });
});

describe('snapshot handles', () => {
  it('are NOT_FOUND when they can be none of ours', () => {
    const handle = formatSnapshotHandle({ poolUuid: a, snapshotUuid: b });
    expect(requireSnapshotHandle(handle, 'snapshot_id')).toEqual({ poolUuid: a, snapshotUuid: b });
    expect(() => requireSnapshotHandle('', 'snapshot_id')).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
    );
    expect(() => requireSnapshotHandle('x', 'snapshot_id')).toThrow(
      expect.objectContaining({ code: 'NOT_FOUND' }),
    );
  });
});

describe('pool topology', () => {
  it('ignores keys that are not ours and values that are not "true"', () => {
    const segments = {
      ...poolTopology([a]),
      'pool.holdfast.io/x': 'false',
      'topology.kubernetes.io/zone': 'true',
    };
    expect(poolsOfTopology(segments)).toEqual([a]);
  });
});

describe('readCapability', () => {
  it('takes every mode with one writing node or none', () => {
    const modes: Mode[] = [
      'SINGLE_NODE_WRITER',
      'SINGLE_NODE_READER_ONLY',
      'MULTI_NODE_READER_ONLY',
      'SINGLE_NODE_SINGLE_WRITER',
      'SINGLE_NODE_MULTI_WRITER',
    ];
    for (const mode of modes) expect(readCapability(mount(mode)).mode).toBe(mode);
  });

  it('refuses several writing nodes with a sentence and the code that the caller asks for', () => {
    for (const mode of ['MULTI_NODE_MULTI_WRITER', 'MULTI_NODE_SINGLE_WRITER'] as Mode[]) {
      expect(() => readCapability(mount(mode))).toThrow(
        expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
      );
      expect(() => readCapability(mount(mode), 'FAILED_PRECONDITION')).toThrow(
        expect.objectContaining({
          code: 'FAILED_PRECONDITION',
          message: expect.stringContaining('Use ReadWriteOnce') as unknown,
        }),
      );
    }
  });

  it('refuses what is missing or unknown', () => {
    const missing: [Csi.VolumeCapability__Output | null, RegExp][] = [
      [null, /volume_capability is missing/],
      [{ access_mode: { mode: 'SINGLE_NODE_WRITER' } }, /no access type/],
      [{ ...mount('SINGLE_NODE_WRITER'), access_mode: null }, /no access mode/],
      [mount('UNKNOWN'), /no access mode/],
      [mount('SINGLE_NODE_WRITER', { fs_type: 'zfs' }), /ext4, xfs, btrfs/],
      [mount('SINGLE_NODE_WRITER', { volume_mount_group: '1000' }), /fsGroup/],
      [mount('SINGLE_NODE_WRITER', { mount_flags: ['ro', 'rw'] }), /contradict/],
    ];
    for (const [capability, message] of missing) {
      expect(() => readCapability(capability)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
      expect(() => readCapability(capability)).toThrow(message);
    }
  });
});

describe('checkMountFlags', () => {
  it('lets ordinary options through', () => {
    expect(() =>
      checkMountFlags([
        'noatime',
        'nodiratime,discard',
        'commit=30',
        'data=ordered',
        'compress=zstd:3',
        'inode64',
      ]),
    ).not.toThrow();
  });

  it('takes the SELinux label that the kubelet passes in quotes as one option', () => {
    const label = 'context="system_u:object_r:container_file_t:s0:c10,c20"';
    expect(() => checkMountFlags(['noatime', label])).not.toThrow();
    expect(splitMountFlags(['noatime,ro', label])).toEqual(['noatime', 'ro', label]);
    expect(() => checkMountFlags(['context="a b"'])).toThrow(/empty or has characters/);
    expect(() => checkMountFlags(['context="a,nobarrier'])).toThrow(/empty or has characters/);
    expect(() => checkMountFlags(['subvol="a"'])).toThrow(/empty or has characters/);
    expect(() => checkMountFlags([label, 'context="other"'])).toThrow(/contradict/);
  });

  it('refuses contradictions, what would lose data, and what is no option', () => {
    const bad: [string[], RegExp][] = [
      [['discard', 'nodiscard'], /contradict/],
      [['commit=5', 'commit=30'], /contradict/],
      [['noatime', 'relatime'], /contradict/],
      [['nobarrier'], /barriers/],
      [['barrier=0'], /barriers/],
      [['errors=continue'], /errors/],
      [['remount,rw'], /not accepted/],
      [['logdev=/dev/sda'], /one device/],
      [[''], /empty/],
      [['a b'], /empty or has characters/],
      [['x;rm'], /empty or has characters/],
    ];
    for (const [flags, message] of bad) expect(() => checkMountFlags(flags)).toThrow(message);
  });
});

describe('readParameters', () => {
  it('reads all known ones and ignores the provisioner notes', () => {
    expect(
      readParameters({
        pool: 'fast',
        fsType: 'xfs',
        'csi.storage.k8s.io/fstype': 'xfs',
        mkfsOptions: ' -m  reflink=1 ',
        'csi.storage.k8s.io/pvc/name': 'data',
        'holdfast.io/evict': 'false',
      }),
    ).toEqual({ pool: 'fast', fsType: 'xfs', mkfsOptions: ['-m', 'reflink=1'] });
    expect(readParameters({})).toEqual({ pool: undefined, fsType: undefined, mkfsOptions: [] });
  });

  it('refuses unknown ones by naming the known, and contradictory or empty ones', () => {
    expect(() => readParameters({ pol: 'x' })).toThrow(/Unknown parameter "pol".*Known: pool, fsType/);
    expect(() => readParameters({ fstype: 'xfs' })).toThrow(/did you mean "fsType"/);
    expect(() => readParameters({ fsType: 'xfs', 'csi.storage.k8s.io/fstype': 'ext4' })).toThrow(
      /different file systems/,
    );
    expect(() => readParameters({ pool: ' ' })).toThrow(/empty/);
    expect(() => readParameters({ fsType: 'ntfs' })).toThrow(/ext4, xfs, btrfs/);
    expect(() => readParameters({ 'holdfast.io/evict': 'no' })).toThrow(/"true" or "false"/);
  });

  it('lets no mkfs option name a file or another device', () => {
    expect(() => readMkfsOptions('-d /etc')).toThrow(/\/etc/);
    expect(() => readMkfsOptions('-E $(id)')).toThrow(/not an option/);
    expect(readMkfsOptions('-E lazy_itable_init=0,^has_journal -L x')).toHaveLength(4);
  });
});
