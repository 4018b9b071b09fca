// Snapshots, what is restored from them, and clones.
import assert from 'node:assert/strict';

const content = (holdfast, pod) => holdfast.sh(pod, 'cat /data/file');
const write = (holdfast, pod, text) => holdfast.sh(pod, `echo ${text} > /data/file && sync`);

export const snapshotSpecs = [
  {
    name: 'a claim from a VolumeSnapshot has what the volume had at that moment, on another node, while the source goes on',
    body: async ({ holdfast }) => {
      await holdfast.claim('source');
      await holdfast.pod('source', 'source', { node: 'node-1' });
      await write(holdfast, 'source', 'before');
      await holdfast.snapshot('then', 'source');
      await write(holdfast, 'source', 'after');
      await holdfast.claim('restored', { source: { apiGroup: 'snapshot.storage.k8s.io', kind: 'VolumeSnapshot', name: 'then' } });
      await holdfast.pod('restored', 'restored', { node: 'node-2' });
      assert.equal(await content(holdfast, 'restored'), 'before');
      assert.equal(await content(holdfast, 'source'), 'after');
      await holdfast.deleteSnapshot('then');
      assert.equal(await content(holdfast, 'restored'), 'before');
      await holdfast.deletePod('source', 'restored');
      await holdfast.deleteClaims('source', 'restored');
    },
  },
  {
    name: 'a clone of a claim, larger than it, has its data and lives on when its source is gone',
    body: async ({ holdfast }) => {
      await holdfast.claim('original');
      await holdfast.pod('original', 'original');
      await write(holdfast, 'original', 'shared');
      await holdfast.claim('clone', { size: '2Gi', source: { kind: 'PersistentVolumeClaim', name: 'original' } });
      await holdfast.pod('clone', 'clone', { node: 'node-3' });
      assert.equal(await content(holdfast, 'clone'), 'shared');
      await write(holdfast, 'clone', 'own');
      assert.equal(await content(holdfast, 'original'), 'shared');
      await holdfast.deletePod('original');
      await holdfast.deleteClaims('original');
      assert.equal(await content(holdfast, 'clone'), 'own');
      const size = Number(await holdfast.sh('clone', 'df -k /data | tail -n 1 | tr -s " " | cut -d " " -f 2'));
      assert.ok(size > 1.7 * 2 ** 20, `the clone's file system has ${size} KiB`);
      await holdfast.deletePod('clone');
      await holdfast.deleteClaims('clone');
    },
  },
];
