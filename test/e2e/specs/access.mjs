// Who may use a volume: one pod alone, many readers; and claims that live and die with their pod.
import assert from 'node:assert/strict';
import { sleep, until } from '../lib/shell.mjs';

export const accessSpecs = [
  {
    name: 'a second pod of a ReadWriteOncePod claim stays pending, on the same node too, until the first is gone',
    body: async ({ cluster, holdfast }) => {
      await holdfast.claim('alone', { accessMode: 'ReadWriteOncePod' });
      await holdfast.pod('alone-a', 'alone', { node: 'node-2' });
      await holdfast.sh('alone-a', 'echo first > /data/file && sync');
      const second = holdfast.pod('alone-b', 'alone', { node: 'node-2' });
      second.catch(() => undefined);
      await until('the scheduler to refuse the second pod', async () => {
        const { status } = await cluster.get('pod', 'alone-b');
        return status.conditions?.some(({ type, status: is, message }) => type === 'PodScheduled' && is === 'False' && /ReadWriteOncePod/.test(message));
      });
      await sleep(3000);
      assert.equal((await cluster.get('pod', 'alone-b')).status.phase, 'Pending');
      await holdfast.deletePod('alone-a');
      await second;
      assert.equal(await holdfast.sh('alone-b', 'cat /data/file'), 'first');
      await holdfast.deletePod('alone-b');
      await holdfast.deleteClaims('alone');
    },
  },
  {
    name: 'a ReadOnlyMany claim from a snapshot is read on three nodes at once, written on none, and its source goes on',
    body: async ({ holdfast }) => {
      await holdfast.claim('book');
      await holdfast.pod('book', 'book', { node: 'node-1' });
      await holdfast.sh('book', 'echo printed > /data/file && sync');
      await holdfast.snapshot('edition', 'book', 'holdfast-quiesced');
      await holdfast.sh('book', 'echo changed > /data/file && sync');
      await holdfast.claim('readers', { accessMode: 'ReadOnlyMany', source: { apiGroup: 'snapshot.storage.k8s.io', kind: 'VolumeSnapshot', name: 'edition' } });
      const readers = ['node-1', 'node-2', 'node-3'].map((node) => [`reader-${node}`, node]);
      await Promise.all(readers.map(([name, node]) => holdfast.pod(name, 'readers', { node, readOnly: true })));
      for (const [name] of readers) {
        assert.equal(await holdfast.sh(name, 'cat /data/file'), 'printed');
        await assert.rejects(holdfast.sh(name, 'echo no > /data/file'), /Read-only file system/);
      }
      assert.equal(await holdfast.sh('book', 'cat /data/file'), 'changed');
      await holdfast.deletePod('book', ...readers.map(([name]) => name));
      await holdfast.deleteClaims('readers', 'book');
      await holdfast.deleteSnapshot('edition');
    },
  },
  {
    name: 'a generic ephemeral volume is made with its pod and goes with it',
    body: async ({ cluster, holdfast }) => {
      const spec = { accessModes: ['ReadWriteOnce'], storageClassName: 'holdfast-xfs', resources: { requests: { storage: '1Gi' } } };
      await holdfast.podWith('scratch', [{ name: 'data', ephemeral: { volumeClaimTemplate: { spec } } }]);
      await holdfast.sh('scratch', 'echo once > /data/file && sync');
      const { volumeName } = (await cluster.get('pvc', 'scratch-data')).spec;
      await holdfast.deletePod('scratch');
      await until('its claim and its volume to go', async () => {
        const { items } = await cluster.get('pvc,pv');
        return !items.some(({ metadata }) => metadata.name === 'scratch-data' || metadata.name === volumeName);
      });
    },
  },
];
