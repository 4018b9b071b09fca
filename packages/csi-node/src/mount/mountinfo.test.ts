import { mkdtemp, mkdir, rm, symlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { deviceNumber, mountPath, mountsAt, parseMountInfo, readMounts } from './mountinfo.ts';

const sample = String.raw`22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
87 22 0:45 / /mnt/a\040b\134c\011d\012e rw,nosuid - tmpfs tm\040pfs rw,size=64k
90 22 7:3 /sub /mnt/x ro,noatime shared:9 master:1 propagate_from:2 - xfs /dev/loop3 rw,attr2
91 90 0:50 / /mnt/x rw - btrfs /dev/loop4 rw,subvolid=5
92 22 0:51 / /mnt/gr\303\274n rw - tmpfs none rw
nonsense
`;

describe('parseMountInfo', () => {
  it('reads octal escapes, optional fields, and both kinds of options', () => {
    const entries = parseMountInfo(sample);
    expect(entries).toHaveLength(5);
    expect(entries[1]).toMatchObject({
      mountPoint: '/mnt/a b\\c\td\ne',
      source: 'tm pfs',
      options: ['rw', 'nosuid'],
    });
    expect(entries[2]).toEqual({
      id: 90,
      parentId: 22,
      device: '7:3',
      root: '/sub',
      mountPoint: '/mnt/x',
      options: ['ro', 'noatime'],
      fsType: 'xfs',
      source: '/dev/loop3',
      superOptions: ['rw', 'attr2'],
    });
    expect(entries[4]?.mountPoint).toBe('/mnt/grün');
  });

  it('gives all mounts of a path, the top one last', () => {
    expect(mountsAt(parseMountInfo(sample), '/mnt/x').map((entry) => entry.fsType)).toEqual(['xfs', 'btrfs']);
  });

  it('finds the root of this machine', async () => {
    expect(mountsAt(await readMounts(), '/').length).toBeGreaterThan(0);
  });
});

describe('mountPath', () => {
  it('resolves the links of the parent, not of the last part, and needs neither to exist', async () => {
    const dir = await mkdtemp(join(tmpdir(), 'mountpath-'));
    try {
      await mkdir(join(dir, 'real'));
      await symlink(join(dir, 'real'), join(dir, 'link'));
      expect(await mountPath(join(dir, 'link', 'last'))).toBe(join(dir, 'real', 'last'));
      expect(await mountPath(join(dir, 'link'))).toBe(join(dir, 'link'));
      expect(await mountPath(join(dir, 'none', 'last', '..', 'x'))).toBe(join(dir, 'none', 'x'));
    } finally {
      await rm(dir, { recursive: true });
    }
  });
});

describe('deviceNumber', () => {
  it('is undefined for what is no block device', async () => {
    expect(await deviceNumber('/dev/null')).toBeUndefined();
    expect(await deviceNumber('/nowhere')).toBeUndefined();
  });
});
