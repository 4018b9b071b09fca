// Snapshots, what is restored from them, and clones.
import assert from 'node:assert/strict';
import { sleep } from '../lib/shell.mjs';

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
  {
    name: 'a VolumeGroupSnapshot has two claims of one running pod at one moment',
    body: async ({ cluster, holdfast }) => {
      const names = ['pair-a', 'pair-b'];
      for (const name of names) await holdfast.claim(name, { labels: { group: 'pair' } });
      await holdfast.pod('pair', names, { node: 'node-2' });
      // The second file never gets ahead of the first, nor more than one behind.
      const step = (file) => `echo $i | dd of=/${file}/count conv=fsync 2>/dev/null`;
      await holdfast.sh('pair', `(i=0; while test ! -e /tmp/stop; do i=$((i + 1)); ${step('pair-a')}; ${step('pair-b')}; done) >/dev/null 2>&1 &`);
      await sleep(2000);
      const members = await holdfast.groupSnapshot('pair', { group: 'pair' });
      await sleep(1000);
      assert.deepEqual(members.map(({ claim }) => claim).toSorted(), names);
      for (const { claim, snapshot } of members) {
        await holdfast.claim(`${claim}-then`, { source: { apiGroup: 'snapshot.storage.k8s.io', kind: 'VolumeSnapshot', name: snapshot } });
      }
      await holdfast.pod('pair-then', names.map((name) => `${name}-then`), { node: 'node-3' });
      const [a, b] = (await holdfast.sh('pair-then', 'cat /pair-a-then/count /pair-b-then/count')).split('\n').map(Number);
      assert.ok(a > 0 && (a === b || a === b + 1), `the first is at ${a}, the second at ${b}`);
      assert.ok(Number(await holdfast.sh('pair', 'cat /pair-b/count')) > b, 'the pod did not go on');
      await holdfast.deletePod('pair', 'pair-then');
      await holdfast.deleteClaims(...names, ...names.map((name) => `${name}-then`));
      await cluster.waiting(['delete', 'volumegroupsnapshot', 'pair']);
    },
  },
];
