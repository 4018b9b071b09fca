// What is measured: how long one claim takes, many at once, growth. Nothing else runs in the cluster meanwhile.
import assert from 'node:assert/strict';
import { digest, writeNoise } from '../lib/holdfast.mjs';
import { until } from '../lib/shell.mjs';

const claims = 50;
/** What the three small nodes hold beside Holdfast's own pods. */
const pods = 15;

export const scaleSpecs = [
  {
    name: 'a volume grows while its pod writes to it',
    body: async ({ cluster, holdfast, figures }) => {
      await holdfast.claim('grow', { storageClass: 'holdfast-xfs', size: '1Gi' });
      await holdfast.pod('grow', 'grow');
      const before = Number(await holdfast.sh('grow', 'df -k /data | tail -n 1 | tr -s " " | cut -d " " -f 2'));
      const written = await writeNoise(holdfast, 'grow', '/data/file');
      const began = performance.now();
      await cluster.kubectl(['patch', 'pvc', 'grow', '--patch', '{"spec":{"resources":{"requests":{"storage":"3Gi"}}}}']);
      await until('the file system to grow', async () => Number(await holdfast.sh('grow', 'df -k /data | tail -n 1 | tr -s " " | cut -d " " -f 2')) > before * 2.5, { everyMs: 500 });
      figures.record('expand_s', (performance.now() - began) / 1000);
      assert.equal((await cluster.get('pvc', 'grow')).status.capacity.storage, '3Gi');
      assert.equal(await digest(holdfast, 'grow', '/data/file'), written);
      await holdfast.deletePod('grow');
      await holdfast.deleteClaims('grow');
    },
  },
  {
    name: `${claims} claims at once are bound, and ${pods} pods at once run with their own`,
    body: async ({ cluster, holdfast, figures }) => {
      const names = Array.from({ length: claims }, (_, i) => `many-${i}`);
      const began = performance.now();
      await cluster.apply(...names.map((name) => holdfast.claimObject(name, { storageClass: 'holdfast-now' })));
      await until(
        'all claims to be bound',
        async () => {
          const { items } = await cluster.get('pvc');
          return items.filter(({ metadata, status }) => names.includes(metadata.name) && status.phase === 'Bound').length === claims;
        },
      );
      figures.record(`claims_${claims}_bound_s`, (performance.now() - began) / 1000);
      const started = performance.now();
      await Promise.all(names.slice(0, pods).map((name) => holdfast.pod(name, name)));
      figures.record(`pods_${pods}_running_s`, (performance.now() - started) / 1000);
      await Promise.all(names.slice(0, pods).map((name) => holdfast.sh(name, `echo ${name} > /data/file && sync`)));
      assert.equal(await holdfast.sh(names[7], 'cat /data/file'), names[7]);
      await holdfast.deletePod(...names.slice(0, pods));
      await holdfast.deleteClaims(...names);
      await until('their volumes to go', async () => (await holdfast.cli('volume', 'list')).length === 0, { everyMs: 1000 });
    },
  },
  {
    name: 'a claim and its pod, made together, run, each time',
    body: async ({ holdfast, figures }) => {
      const took = [];
      for (let i = 0; i < 3; i += 1) {
        const began = performance.now();
        await holdfast.claim('timed');
        await holdfast.pod('timed', 'timed');
        took.push((performance.now() - began) / 1000);
        await holdfast.deletePod('timed');
        await holdfast.deleteClaims('timed');
      }
      figures.record('claim_to_running_s', took, { goal: 20 });
    },
  },
];
