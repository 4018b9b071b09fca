/**
 * Volumes of a real cluster (two nodes, one shared disk, the native engine) through the CSI calls that Kubernetes makes,
 * csi-sanity included.
 */
import { closeSync, constants, openSync, readSync, writeSync } from 'node:fs';
import { readFile, statfs, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { call, fileSystems } from '@holdfast/common';
import type { ListPoolsResponse__Output } from '@holdfast/proto';
import { waitFor } from '@holdfast/testing';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { runSanity } from './csi-sanity.ts';
import { blockCapability, mountCapability, NodeClient } from './node-client.ts';
import { RealCluster } from './real-cluster.ts';

const MIB = 1 << 20;
const SIZE = 512 * MIB;
const documentation = fileURLToPath(new URL('../../../docs/csi.md', import.meta.url));
const crashing = fileURLToPath(new URL('./crashing-node.ts', import.meta.url));

describe('a cluster on a real disk', () => {
  let cluster: RealCluster;
  beforeAll(async () => {
    cluster = await RealCluster.start('csi-cluster', 2);
  }, 90_000);
  afterAll(() => cluster.stop(), 60_000);

  const randomFile = async (path: string): Promise<string> => {
    await execa('dd', ['if=/dev/urandom', `of=${path}`, 'bs=1M', 'count=24', 'conv=fsync', 'status=none']);
    return sha256(path);
  };
  const sha256 = async (path: string): Promise<string> =>
    (await execa('sha256sum', [path])).stdout.split(' ')[0] ?? '';

  it.each(fileSystems)(
    'moves an %s volume between nodes, grows it online, and deletes it',
    async (fsType) => {
      const capability = mountCapability(fsType);
      const volume = await cluster.create(`life-${fsType}`, SIZE, capability);
      const one = await cluster.attach(volume, 0, capability);
      const sum = await randomFile(`${one.target}/data`);
      await expect(cluster.publish(volume, 1, capability)).rejects.toMatchObject({
        code: 'PUBLISHED_ELSEWHERE',
      });

      await cluster.expand(volume, 2 * SIZE);
      const grown = await cluster.node(0).expand(volume.volume_id, one.target, 2 * SIZE);
      expect(grown.capacity_bytes).toBe(String(2 * SIZE));
      const { blocks, bsize } = await statfs(one.target);
      expect(blocks * bsize).toBeGreaterThan(1.7 * SIZE);
      expect(await sha256(`${one.target}/data`)).toBe(sum);
      expect(await cluster.node(0).stats(volume.volume_id, one.target)).toMatchObject({
        volume_condition: { abnormal: false },
      });
      await cluster.detach(volume, one);

      const two = await cluster.attach(volume, 1, capability);
      expect(await sha256(`${two.target}/data`)).toBe(sum);
      await expect(cluster.remove(volume)).rejects.toMatchObject({ code: 'IN_USE' });
      await cluster.detach(volume, two);
      await cluster.remove(volume);
      await cluster.remove(volume);
    },
  );

  it('moves a raw block volume between nodes, and never makes a file system over what was written to it', async () => {
    const volume = await cluster.create('life-block', SIZE, blockCapability());
    const one = await cluster.attach(volume, 0, blockCapability());
    const bytes = Buffer.alloc(4096, 0x5a);
    const device = openSync(one.target, constants.O_RDWR | constants.O_SYNC);
    writeSync(device, bytes, 0, bytes.length, 200 * MIB);
    closeSync(device);
    await cluster.expand(volume, 2 * SIZE);
    expect((await cluster.node(0).expand(volume.volume_id, one.target, 2 * SIZE)).capacity_bytes).toBe(
      String(2 * SIZE),
    );
    expect((await cluster.node(0).stats(volume.volume_id, one.target)).usage[0]?.total).toBe(
      String(2 * SIZE),
    );
    await cluster.detach(volume, one);

    // Its first and last MiB are zeros and it has no signature; the engine knows better.
    await expect(cluster.attach(volume, 1, mountCapability())).rejects.toMatchObject({
      code: 'FAILED_PRECONDITION',
      message: expect.stringContaining('without a known signature') as unknown,
    });
    await cluster
      .node(1)
      .unstage(volume.volume_id, cluster.area.path('node-2', 'staging', volume.volume_id.slice(-12)));
    await cluster.unpublish(volume, 1);

    const two = await cluster.attach(volume, 1, blockCapability());
    const back = Buffer.alloc(4096);
    const again = openSync(two.target, 'r');
    readSync(again, back, 0, back.length, 200 * MIB);
    closeSync(again);
    expect(back.equals(bytes)).toBe(true);
    await cluster.detach(volume, two);
    await cluster.remove(volume);
  });

  it('takes a volume away from a node that still has it mounted; a later stage there repairs the dead mount', async () => {
    const capability = mountCapability();
    const volume = await cluster.create('revoked', SIZE, capability);
    const one = await cluster.attach(volume, 0, capability);
    const sum = await randomFile(`${one.target}/data`);
    await cluster.unpublish(volume, 0);
    await expect(writeFile(`${one.target}/late`, 'x', { flush: true })).rejects.toThrow(/EIO|EROFS/);
    expect((await cluster.node(0).stats(volume.volume_id, one.target)).volume_condition).toMatchObject({
      abnormal: true,
      message: expect.stringContaining('revoked') as unknown,
    });

    const two = await cluster.attach(volume, 1, capability);
    expect(await sha256(`${two.target}/data`)).toBe(sum);
    await writeFile(`${two.target}/more`, 'from node 2', { flush: true });
    await cluster.detach(volume, two);

    const back = await cluster.attach(volume, 0, capability);
    expect(await sha256(`${back.target}/data`)).toBe(sum);
    expect(await readFile(`${back.target}/more`, 'utf8')).toBe('from node 2');
    await cluster.detach(volume, back);
    await cluster.remove(volume);
  });

  it('publishes a volume read-only, and nothing can write to it then', async () => {
    const capability = mountCapability('xfs');
    const volume = await cluster.create('read-only', SIZE, capability);
    const one = await cluster.attach(volume, 0, capability);
    await writeFile(`${one.target}/data`, 'read me');
    await cluster.detach(volume, one);
    const two = await cluster.attach(volume, 1, capability, true);
    expect(await readFile(`${two.target}/data`, 'utf8')).toBe('read me');
    await expect(writeFile(`${two.staging}/x`, 'x')).rejects.toThrow(/EROFS/);
    await cluster.detach(volume, two);
    await cluster.remove(volume);
  });

  it('goes on when csi-node is killed, and the next one knows what is mounted', async () => {
    const capability = mountCapability('ext4', 'SINGLE_NODE_SINGLE_WRITER');
    const volume = await cluster.create('restart', SIZE, capability);
    const one = await cluster.attach(volume, 0, capability);
    const [plugin] = cluster.up.processes({ node: 1, role: 'csi-node' });
    process.kill(plugin?.pid ?? 0, 'SIGKILL');
    await writeFile(`${one.target}/data`, 'written without csi-node', { flush: true });
    await waitFor('the next csi-node', () => cluster.node(0).stats(volume.volume_id, one.target), {
      timeoutMs: 20_000,
    });
    await expect(
      cluster.node(0).publish(volume.volume_id, one.staging, `${one.target}-2`, capability, one.context),
    ).rejects.toMatchObject({ code: 'FAILED_PRECONDITION' });
    await cluster.node(0).publish(volume.volume_id, one.staging, one.target, capability, one.context);
    await cluster.detach(volume, one);
    await cluster.remove(volume);
  });

  it.each(fileSystems)('finishes an %s that one node began to make on another node', async (fsType) => {
    const capability = mountCapability(fsType);
    const volume = await cluster.create(`half-${fsType}`, SIZE, capability);
    const { area, up } = cluster;
    const agent = `unix:${up.state.nodes[0]?.agentSocket}`;
    const endpoint = `unix:${area.path(`crash-${fsType}.sock`)}`;
    const context = {
      publish_context: await cluster.publish(volume, 0, capability),
      volume_context: volume.volume_context,
    };
    const dying = await area.spawn('crashing-node', process.execPath, [
      '--conditions=@holdfast/source',
      '--import',
      'tsx',
      crashing,
      endpoint,
      agent,
      area.path(`crash-${fsType}`),
      'format:copied',
      '1',
    ]);
    const client = new NodeClient(endpoint);
    await client.waitUntilServed();
    await expect(
      client.stage(volume.volume_id, area.path('half-staging'), capability, context),
    ).rejects.toMatchObject({ code: 'UNAVAILABLE' });
    client.close();
    expect(await dying.ended).toBe('SIGKILL');
    // The kubelet's next plugin process unstages it, and the volume goes elsewhere.
    await cluster.node(0).unstage(volume.volume_id, area.path('half-staging'));
    await cluster.unpublish(volume, 0);
    const two = await cluster.attach(volume, 1, capability);
    const sum = await randomFile(`${two.target}/data`);
    await cluster.detach(volume, two);
    const three = await cluster.attach(volume, 0, capability);
    expect(await sha256(`${three.target}/data`)).toBe(sum);
    await cluster.detach(volume, three);
    await cluster.remove(volume);
  });

  it.each(['mount', 'block'] as const)(
    'satisfies csi-sanity with %s volumes, and every skip has its reason in docs/csi.md',
    { timeout: 600_000 },
    async (accessType) => {
      const result = await runSanity(cluster.area, cluster.sockets, accessType);
      process.stdout.write(
        `csi-sanity (${accessType}): ${result.passed.length} passed, ${result.failed.length} failed, ${result.skipped.length} skipped\n`,
      );
      expect(result.failed).toEqual([]);
      expect(result.passed.length).toBeGreaterThanOrEqual(87);
      const documented = await readFile(documentation, 'utf8');
      expect(result.skipped.filter(({ name }) => !documented.includes(`\`${name}\``))).toEqual([]);
    },
  );

  it('has an empty pool when every volume is deleted', async () => {
    const pool = await waitFor(
      'all slabs to come back',
      async () => {
        const { pools } = await call<ListPoolsResponse__Output>(
          cluster.metadata,
          cluster.metadata.ListPools,
          {},
        );
        const [only] = pools;
        const free = Number(only?.slabs_free) + Number(only?.slabs_ahead);
        return free === Number(only?.slab_count) ? only : undefined;
      },
      { timeoutMs: 20_000 },
    );
    expect(pool.provisioned_bytes).toBe('0');
  });
});
