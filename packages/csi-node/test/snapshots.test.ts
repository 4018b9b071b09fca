/**
 * Snapshots, copies and readers on a real cluster: two nodes, one shared disk, the native engine, real file systems. What was
 * written is compared byte by byte, never by what somebody says about it.
 */
import { createHash } from 'node:crypto';
import { closeSync, constants, openSync, readSync, writeSync } from 'node:fs';
import { open, readdir, readFile, statfs, writeFile } from 'node:fs/promises';
import type { Csi } from '@holdfast/proto';
import { waitFor } from '@holdfast/testing';
import { execa } from 'execa';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { blockCapability, mountCapability } from './node-client.ts';
import { RealCluster, type Attached } from './real-cluster.ts';

const MIB = 1 << 20;
const BLOCK = 4096;
const SIZE = 256 * MIB;

const contentOf = (name: string): string => createHash('sha256').update(name).digest('hex').repeat(64);

/** Written through the page cache of nobody. */
function writeBlocks(device: string, offset: number, bytes: Buffer): void {
  const file = openSync(device, constants.O_RDWR | constants.O_SYNC);
  try {
    writeSync(file, bytes, 0, bytes.length, offset);
  } finally {
    closeSync(file);
  }
}
function readBlocks(device: string, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  const file = openSync(device, 'r');
  try {
    readSync(file, bytes, 0, length, offset);
  } finally {
    closeSync(file);
  }
  return bytes;
}
const filled = (length: number, value: number): Buffer => Buffer.alloc(length, value);

/** Of the whole device, read in MiB. */
async function digest(device: string): Promise<string> {
  const hash = createHash('sha256');
  const file = await open(device, 'r');
  try {
    const buffer = Buffer.alloc(MIB);
    for (let at = 0; at < SIZE; at += MIB) {
      const { bytesRead } = await file.read(buffer, 0, MIB, at);
      hash.update(buffer.subarray(0, bytesRead));
    }
  } finally {
    await file.close();
  }
  return hash.digest('hex');
}

describe('snapshots on a real disk', () => {
  let cluster: RealCluster;
  beforeAll(async () => {
    cluster = await RealCluster.start('csi-snapshots', 2);
  }, 90_000);
  afterAll(() => cluster.stop(), 60_000);

  /** Every test takes away what it made; nothing may stay on the pool. */
  const volumes: Csi.Volume__Output[] = [];
  const snapshots: Csi.Snapshot__Output[] = [];
  const attached: [Csi.Volume__Output, Attached][] = [];
  const attach = async (
    volume: Csi.Volume__Output,
    node: number,
    capability: Csi.VolumeCapability,
    readOnly = false,
  ): Promise<Attached> => {
    const at = await cluster.attach(volume, node, capability, readOnly);
    attached.push([volume, at]);
    return at;
  };
  const detach = async (at: Attached): Promise<void> => {
    const index = attached.findIndex(([, each]) => each === at);
    const [entry] = attached.splice(index, 1);
    if (entry !== undefined) await cluster.detach(...entry);
  };
  const kept = <T extends Csi.Volume__Output>(volume: T): T => {
    volumes.push(volume);
    return volume;
  };
  const snap = async (name: string, volume: Csi.Volume__Output, parameters: Record<string, string> = {}) => {
    const snapshot = await cluster.snapshot(name, volume, parameters);
    expect(snapshot.ready_to_use).toBe(true);
    snapshots.push(snapshot);
    return snapshot;
  };
  afterEach(async () => {
    for (const [, at] of attached.slice()) await detach(at);
    for (const volume of volumes.splice(0)) await cluster.remove(volume);
    for (const snapshot of snapshots.splice(0)) await cluster.removeSnapshot(snapshot);
    await cluster.emptied();
  }, 60_000);

  it('cuts a raw volume in one moment: the copy shows what was there, the source goes on, on any node', async () => {
    const capability = blockCapability();
    const volume = kept(await cluster.create('raw', SIZE, capability));
    const one = await attach(volume, 0, capability);
    for (let i = 0; i < 64; i++) writeBlocks(one.target, i * MIB, filled(3 * BLOCK, i + 1));
    const before = await digest(one.target);
    const snapshot = await snap('raw-1', volume);
    expect(await cluster.snapshot('raw-1', volume)).toEqual(snapshot);
    for (let i = 0; i < 64; i += 2) writeBlocks(one.target, i * MIB + BLOCK, filled(BLOCK, 0xee));
    await execa('blkdiscard', ['-z', '-o', String(33 * MIB), '-l', String(4 * MIB), one.target]);
    const after = await digest(one.target);
    expect(after).not.toBe(before);

    const copy = kept(await cluster.copy('raw-copy', snapshot, capability));
    const two = await attach(copy, 1, capability);
    expect(await digest(two.target)).toBe(before);
    writeBlocks(two.target, 0, filled(MIB, 0x77));
    expect(await digest(one.target)).toBe(after);
    await detach(one);
    const again = await attach(volume, 1, capability);
    expect(await digest(again.target)).toBe(after);
    expect(readBlocks(two.target, 0, MIB).equals(filled(MIB, 0x77))).toBe(true);
    expect(readBlocks(two.target, MIB, BLOCK).equals(filled(BLOCK, 2))).toBe(true);
  });

  it.each(['ext4', 'xfs'])(
    'cuts an %s that is being written: what was flushed before is in every copy, restored on another node',
    async (fsType) => {
      const capability = mountCapability(fsType);
      const volume = kept(
        await cluster.create(`busy-${fsType}`, fsType === 'xfs' ? 320 * MIB : SIZE, capability),
      );
      const one = await attach(volume, 0, capability);
      let flushed = -1;
      const end = new AbortController();
      const writing = (async (): Promise<void> => {
        for (let i = 0; !end.signal.aborted && i < 20_000; i++) {
          const file = await open(`${one.target}/f${i}`, 'w');
          await file.writeFile(contentOf(`f${i}`));
          await file.sync();
          await file.close();
          flushed = i;
        }
      })();
      await waitFor('some files', () => (flushed > 20 ? true : undefined), { timeoutMs: 20_000 });
      const cuts: { snapshot: Csi.Snapshot__Output; least: number }[] = [];
      for (let i = 0; i < 3; i++) {
        const least = flushed;
        cuts.push({ least, snapshot: await snap(`busy-${fsType}-${i}`, volume) });
        const now = flushed;
        await waitFor('writes to go on', () => (flushed > now + 5 ? true : undefined));
      }
      end.abort();
      await writing;
      for (const [i, { snapshot, least }] of cuts.entries()) {
        // Larger than the source: its file system grows at the first stage.
        const copy = kept(await cluster.copy(`busy-${fsType}-copy-${i}`, snapshot, capability, 2 * SIZE));
        const two = await attach(copy, 1, capability);
        const { blocks, bsize } = await statfs(two.target);
        expect(blocks * bsize).toBeGreaterThan(1.5 * SIZE);
        for (let n = 0; n <= least; n++) {
          expect(await readFile(`${two.target}/f${n}`, 'utf8')).toBe(contentOf(`f${n}`));
        }
        await detach(two);
      }
    },
    120_000,
  );

  it('makes copies of copies, and each shows its own whatever is deleted in whichever order', async () => {
    const capability = blockCapability();
    const family: { volume: Csi.Volume__Output; snapshot: Csi.Snapshot__Output; sum: string }[] = [];
    let volume = await cluster.create('family-0', SIZE, capability);
    for (let i = 0; i < 4; i++) {
      const at = await cluster.attach(volume, i % 2, capability);
      for (let n = 0; n < 8; n++)
        writeBlocks(at.target, (n * 4 + i) * MIB, filled(2 * BLOCK, 16 * i + n + 1));
      writeBlocks(at.target, 100 * MIB, filled(BLOCK, i + 1));
      const snapshot = await cluster.snapshot(`family-${i}`, volume);
      const sum = await digest(at.target);
      await cluster.detach(volume, at);
      family.push({ volume, snapshot, sum });
      volume = await cluster.copy(`family-${i + 1}`, i % 2 === 0 ? snapshot : volume, capability);
    }
    const left = new Map(family.map((member, i) => [i, member]));
    const check = async (): Promise<void> => {
      for (const { volume: each, sum } of left.values()) {
        const at = await cluster.attach(each, 1, capability);
        expect(await digest(at.target)).toBe(sum);
        await cluster.detach(each, at);
      }
      const at = await cluster.attach(volume, 0, capability);
      expect(await digest(at.target)).toBe(family[3]?.sum);
      await cluster.detach(volume, at);
    };
    await check();
    for (const i of [1, 3, 0, 2]) {
      const member = left.get(i);
      if (member === undefined) continue;
      await cluster.removeSnapshot(member.snapshot);
      await check();
      await cluster.remove(member.volume);
      left.delete(i);
      await check();
    }
    await cluster.remove(volume);
  }, 180_000);

  it('gives space back when a snapshot is deleted under an open writer, and the writer loses nothing', async () => {
    const capability = blockCapability();
    const volume = kept(await cluster.create('reclaim', SIZE, capability));
    const one = await attach(volume, 0, capability);
    const used = async (): Promise<number> => Number((await cluster.volume(volume)).allocated_bytes);
    for (let at = 0; at < 64 * MIB; at += MIB) writeBlocks(one.target, at, filled(MIB, 1));
    const first = await snap('reclaim-1', volume);
    for (let at = 0; at < 64 * MIB; at += MIB) writeBlocks(one.target, at, filled(MIB, 2));
    const second = await snap('reclaim-2', volume);
    writeBlocks(one.target, 0, filled(MIB, 3));
    const sum = await digest(one.target);
    const most = await used();
    await cluster.removeSnapshot(first);
    await waitFor(
      'the first layer to be freed',
      async () => (most - (await used()) >= 48 * MIB ? true : undefined),
      {
        timeoutMs: 45_000,
      },
    );
    expect(await digest(one.target)).toBe(sum);
    const copy = kept(await cluster.copy('reclaim-copy', second, capability));
    const two = await attach(copy, 1, capability);
    expect(readBlocks(two.target, 0, MIB).equals(filled(MIB, 2))).toBe(true);
    await detach(one);
    const again = await attach(volume, 0, capability);
    expect(await digest(again.target)).toBe(sum);
  }, 90_000);

  describe('of which many nodes read a copy', () => {
    const source = mountCapability('ext4');
    const shared = async (name: string, readers: Csi.VolumeCapability) => {
      const volume = kept(await cluster.create(name, SIZE, source));
      const one = await attach(volume, 0, source);
      await writeFile(`${one.target}/data`, 'not flushed by anybody');
      const snapshot = await snap(`${name}-1`, volume, { 'holdfast.io/quiesce': 'true' });
      await writeFile(`${one.target}/later`, 'goes on', { flush: true });
      const copy = kept(await cluster.copy(`${name}-copy`, snapshot, readers));
      const at = [await attach(copy, 0, readers), await attach(copy, 1, readers)];
      await expect(cluster.publish(copy, 1, source)).rejects.toThrow(/./);
      return { copy, at };
    };

    it('nobody can write it as a file system, and it has what was written before the freeze', async () => {
      const { copy, at } = await shared('readers', mountCapability('ext4', 'MULTI_NODE_READER_ONLY'));
      for (const { target, staging } of at) {
        expect(await readFile(`${target}/data`, 'utf8')).toBe('not flushed by anybody');
        expect(await readdir(target)).not.toContain('later');
        await expect(writeFile(`${staging}/x`, 'x')).rejects.toThrow(/EROFS/);
      }
      for (const each of at) await detach(each);
      const writable = await attach(copy, 1, source);
      expect(await readFile(`${writable.target}/data`, 'utf8')).toBe('not flushed by anybody');
      await writeFile(`${writable.target}/mine`, 'x', { flush: true });
    }, 60_000);

    it('nobody can write it as a device', async () => {
      const { at } = await shared('block-readers', blockCapability('MULTI_NODE_READER_ONLY'));
      for (const { target } of at) {
        const before = await digest(target);
        expect(() => writeBlocks(target, 0, filled(BLOCK, 1))).toThrow(/EPERM|EACCES|EROFS|EIO/);
        // ext4's magic number.
        expect(readBlocks(target, 1024, 64).readUInt16LE(56)).toBe(0xef53);
        expect(await digest(target)).toBe(before);
      }
    }, 60_000);
  });

  it('cuts a group over two nodes in one moment', async () => {
    const capability = blockCapability();
    const pair = [
      kept(await cluster.create('group-a', SIZE, capability)),
      kept(await cluster.create('group-b', SIZE, capability)),
    ] as const;
    const ends = [await attach(pair[0], 0, capability), await attach(pair[1], 1, capability)] as const;
    const closed = kept(await cluster.create('group-c', SIZE, capability));
    let round = 0;
    const end = new AbortController();
    const stamp = (n: number): Buffer => {
      const bytes = Buffer.alloc(BLOCK);
      bytes.writeUInt32LE(n, 0);
      return bytes;
    };
    // First here, then there: at no moment is the second one ahead, or more than one behind.
    const file = [await open(ends[0].target, 'r+'), await open(ends[1].target, 'r+')] as const;
    const writing = (async (): Promise<void> => {
      while (!end.signal.aborted) {
        round += 1;
        for (const each of file) {
          await each.write(stamp(round), 0, BLOCK, (round % 64) * BLOCK);
          await each.write(stamp(round), 0, BLOCK, 100 * MIB);
          await each.sync();
        }
      }
    })();
    await waitFor('the first rounds', () => (round > 10 ? true : undefined));
    for (let i = 0; i < 3; i++) {
      const least = round - 1;
      const group = await cluster.group(`group-${i}`, [...pair, closed]);
      expect(group).toMatchObject({ ready_to_use: true });
      expect(group.snapshots).toHaveLength(3);
      const shown: number[] = [];
      for (const [n, member] of pair.entries()) {
        const snapshot = group.snapshots.find((each) => each.source_volume_id === member.volume_id);
        if (snapshot === undefined) throw new Error('a member is missing');
        const copy = await cluster.copy(`group-${i}-${n}`, snapshot, capability);
        const at = await cluster.attach(copy, 1 - n, capability);
        shown.push(readBlocks(at.target, 100 * MIB, BLOCK).readUInt32LE(0));
        await cluster.detach(copy, at);
        await cluster.remove(copy);
      }
      const [a = 0, b = 0] = shown;
      expect(a).toBeGreaterThanOrEqual(least);
      expect([0, 1]).toContain(a - b);
      const now = round;
      await waitFor('writes to go on', () => (round > now + 3 ? true : undefined));
      await cluster.removeGroup(group);
    }
    end.abort();
    await writing;
    for (const each of file) await each.close();
  }, 120_000);

  it('tells which blocks changed between two snapshots, and which hold data', async () => {
    const capability = blockCapability();
    const volume = kept(await cluster.create('diff', SIZE, capability));
    const one = await attach(volume, 0, capability);
    writeBlocks(one.target, 0, filled(2 * BLOCK, 1));
    writeBlocks(one.target, 10 * MIB, filled(MIB, 2));
    const first = await snap('diff-1', volume);
    writeBlocks(one.target, BLOCK, filled(2 * BLOCK, 3));
    writeBlocks(one.target, 200 * MIB + BLOCK, filled(BLOCK, 4));
    await execa('blkdiscard', ['-z', '-o', String(10 * MIB), '-l', String(8 * BLOCK), one.target]);
    const second = await snap('diff-2', volume);
    expect(await cluster.changes(undefined, first)).toEqual([
      [0, 2 * BLOCK],
      [10 * MIB, MIB],
    ]);
    for (const maxResults of [0, 1]) {
      expect(await cluster.changes(first, second, maxResults)).toEqual([
        [BLOCK, 2 * BLOCK],
        [10 * MIB, 8 * BLOCK],
        [200 * MIB + BLOCK, BLOCK],
      ]);
    }
    const third = await snap('diff-3', volume);
    expect(await cluster.changes(second, third)).toEqual([]);
    await expect(cluster.changes(second, first)).rejects.toMatchObject({ code: 3 });
  });

  it('cuts a closed volume, and one that was cut goes on when its agent is killed', async () => {
    const capability = blockCapability();
    const volume = kept(await cluster.create('killed', SIZE, capability));
    const one = await attach(volume, 0, capability);
    writeBlocks(one.target, 0, filled(MIB, 1));
    const open1 = await snap('killed-open', volume);
    writeBlocks(one.target, 0, filled(BLOCK, 2));
    const sum = await digest(one.target);
    const [agent] = cluster.up.processes({ node: 1, role: 'agent' });
    process.kill(agent?.pid ?? 0, 'SIGKILL');
    expect(await digest(one.target)).toBe(sum);
    writeBlocks(one.target, 5 * MIB, filled(BLOCK, 3));
    const taken = await waitFor('a snapshot by the next agent', () => snap('killed-taken', volume), {
      timeoutMs: 30_000,
    });
    const sumTaken = await digest(one.target);
    await detach(one);
    const closed = await snap('killed-closed', volume);
    const sums: string[] = [];
    for (const [name, snapshot, first] of [
      ['open', open1, 1],
      ['taken', taken, 2],
      ['closed', closed, 2],
    ] as const) {
      const copy = kept(await cluster.copy(`killed-${name}`, snapshot, capability));
      const at = await attach(copy, 1, capability);
      expect(readBlocks(at.target, 0, BLOCK).equals(filled(BLOCK, first))).toBe(true);
      sums.push(await digest(at.target));
      await detach(at);
    }
    expect(sums.slice(1)).toEqual([sumTaken, sumTaken]);
    expect(sums[0]).not.toBe(sumTaken);
  }, 90_000);
});
