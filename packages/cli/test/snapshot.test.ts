/** The snapshot commands, and what `volume show` says of chains, over a metadata service in memory. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { FakeMetadata } from '../../csi-controller/test/fake-metadata.ts';
import { buildProgram } from '../src/program.ts';

const MIB = 1 << 20;
const GIB = 1 << 30;

describe('holdfast snapshot', () => {
  let metadata: FakeMetadata;
  beforeEach(async () => {
    metadata = new FakeMetadata();
    await metadata.start();
    metadata.addVolume('db', GIB);
  });
  afterEach(async () => {
    vi.restoreAllMocks();
    await metadata.stop();
  });

  /** What the command prints. */
  const holdfast = async (...args: string[]): Promise<string> => {
    const lines: string[] = [];
    vi.spyOn(console, 'log').mockImplementation((line = '') => void lines.push(String(line)));
    vi.spyOn(process.stdout, 'write').mockImplementation((text) => {
      lines.push(String(text));
      return true;
    });
    try {
      await buildProgram().parseAsync(['node', 'holdfast', '--metadata', metadata.address, ...args]);
    } finally {
      vi.restoreAllMocks();
    }
    return lines.join('\n');
  };
  const json = async <T>(...args: string[]): Promise<T> =>
    JSON.parse(await holdfast(...args, '-o', 'json')) as T;

  it('creates, lists, shows and deletes', async () => {
    expect(await holdfast('snapshot', 'list')).toBe('There are no snapshots.');
    const made = await json<{ handle: string; uuid: string; readyToUse: boolean }>(
      'snapshot',
      'create',
      'db',
      'monday',
      '--quiesce',
    );
    expect(made).toMatchObject({ readyToUse: true, state: 'ready', name: 'monday', sizeBytes: String(GIB) });
    expect(metadata.cut[0]?.parameters).toEqual({ 'holdfast.io/quiesce': 'true' });
    await holdfast('snapshot', 'create', 'db', 'tuesday');
    expect(metadata.cut[1]?.parameters).toEqual({});
    for (let i = 0; i < 3; i++) {
      metadata.addVolume(`v${i}`, GIB);
      await holdfast('snapshot', 'create', `v${i}`, `of v${i}`);
    }
    const all = await holdfast('snapshot', 'list');
    expect(all.split('\n')).toHaveLength(6);
    expect(all).toMatch(/^monday .* db .* 1 GiB .* ready/m);
    const some = await json<{ name: string }[]>('snapshot', 'list', '--volume', 'db');
    expect(some.map((each) => each.name)).toEqual(['monday', 'tuesday']);
    for (const word of ['monday', made.uuid, made.handle]) {
      expect(await holdfast('snapshot', 'show', word)).toContain(`Handle:     ${made.handle}`);
    }
    expect(await holdfast('snapshot', 'delete', 'monday')).toMatch(/Deleted snapshot monday/);
    await expect(holdfast('snapshot', 'show', 'monday')).rejects.toMatchObject({ code: 'NOT_FOUND' });
    metadata.volumes.clear();
    expect(await holdfast('snapshot', 'show', 'tuesday')).toMatch(/Source: .*deleted/);
  });

  it('does not delete a member of a group', async () => {
    await holdfast('snapshot', 'create', 'db', 'member');
    for (const snapshot of metadata.snapshots.values()) snapshot.group_uuid = 'g';
    await expect(holdfast('snapshot', 'delete', 'member')).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    expect(metadata.snapshots.size).toBe(1);
  });

  it('tells what differs between two, joined over messages, and how much that is', async () => {
    await holdfast('snapshot', 'create', 'db', 'a');
    await holdfast('snapshot', 'create', 'db', 'b');
    const range = (offset: number, length: number) => ({ offset: String(offset), length: String(length) });
    metadata.changes = [
      { ranges: [range(0, 4096), range(MIB, MIB)] },
      { ranges: [range(2 * MIB, MIB), range(10 * MIB, 4096)] },
    ];
    const found = await json<object>('snapshot', 'diff', 'a', 'b');
    expect(found).toMatchObject({
      base: { name: 'a' },
      target: { name: 'b' },
      totalBytes: String(2 * MIB + 8192),
      ranges: [range(0, 4096), range(MIB, 2 * MIB), range(10 * MIB, 4096)],
    });
    const [a, b] = [...metadata.snapshots.values()];
    expect(metadata.asked[0]).toMatchObject({ base_snapshot_uuid: a?.uuid, target_snapshot_uuid: b?.uuid });
    const text = await holdfast('snapshot', 'diff', 'a', 'b');
    expect(text).toContain('Between a and b there may differ 2.0 MiB of 1 GiB, in 3 ranges.');
    expect(await holdfast('snapshot', 'diff', 'b')).toContain('Snapshot b holds');
    expect(metadata.asked[2]).toMatchObject({ base_snapshot_uuid: '', target_snapshot_uuid: b?.uuid });
    metadata.changes = [];
    expect(await holdfast('snapshot', 'diff', 'a', 'b')).toBe(
      'Between a and b there may differ 0 B of 1 GiB, in 0 ranges.',
    );
  });

  it('shows what a volume was made from, what its chain costs, and who reads it', async () => {
    metadata.addVolume('copy', GIB, 0, {
      source_snapshot_uuid: 'snap-uuid',
      own_bytes: String(16 * MIB),
      shared_bytes: String(64 * MIB),
      reclaimable_bytes: String(4 * MIB),
      layers: [
        { layer_id: '2', parent_layer_id: '1' },
        { layer_id: '1', frozen: true },
      ],
      readers: [{ node_id: 'node-1.00000001', epoch: String((1n << 40n) + 7n), grant: 'GRANT_STATE_OPEN' }],
    });
    expect(await holdfast('volume', 'show', 'copy')).toMatch(/Compacted: +never/);
    metadata.audit.push({
      sequence: '1',
      at_unix_ms: String(Date.now() - 60_000),
      event: 'compact',
      detail: '16 blocks moved',
    });
    const text = await holdfast('volume', 'show', 'copy');
    expect(text).toMatch(/Compacted: +6\ds ago, 16 blocks moved/);
    expect(text).toMatch(/Space: +16 MiB own, 64 MiB shared, 4 MiB reclaimable/);
    expect(text).toMatch(/Chain: +2 layers/);
    expect(text).toMatch(/Made from: +snapshot snap-uuid/);
    expect(text).toMatch(/node-1.00000001 +open +1\/7/);
    expect(await json('volume', 'show', 'copy')).toMatchObject({
      ownBytes: String(16 * MIB),
      readers: [{ nodeId: 'node-1.00000001', grant: 'open' }],
    });
  });
});
