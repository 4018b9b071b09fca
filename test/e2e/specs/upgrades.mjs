// Replacing pods of Holdfast under I/O.
import assert from 'node:assert/strict';
import { namespace } from '../lib/holdfast.mjs';
import { sleep } from '../lib/shell.mjs';
import { takeAway, writing, writingStatefulSet } from '../lib/writer.mjs';

/** Writes numbered blocks with fsync, one line in a log of the pod's own disk for each, until it is told to stop or fails. */
const writer = `i=0; while test ! -e /tmp/stop; do
  echo block-$i | dd of=/data/writes bs=4096 seek=$((i % 1000)) conv=fsync,notrunc 2>/tmp/error || { echo failed $i >/tmp/result; exit 1; }
  i=$((i + 1)); echo $i >/tmp/count
done; echo done $i >/tmp/result`;

/** Of every node's pod: its agent had its devices before it counted as ready, which is what the next node's turn waited for. */
async function assertReadyLast(cluster) {
  const { items } = await cluster.get('pods', '--namespace', namespace, '--selector', 'app.kubernetes.io/component=node');
  assert.equal(items.length, cluster.nodes.length);
  for (const { metadata, status } of items) {
    const ready = Date.parse(status.conditions.find(({ type }) => type === 'Ready').lastTransitionTime);
    const log = await cluster.kubectl(['logs', metadata.name, '--namespace', namespace, '--container', 'agent', '--timestamps']);
    const up = log.split('\n').find((line) => line.includes('The agent is up'));
    assert.ok(up !== undefined, `${metadata.name} is ready, and its agent is not up`);
    // Kubernetes writes whole seconds, the earlier one.
    const upAt = Date.parse(up.split(' ')[0]);
    assert.ok(upAt < ready + 1000, `${metadata.name} was ready ${upAt - ready} ms before its agent was up`);
  }
}

export const upgradeSpecs = [
  {
    name: 'helm upgrade with the same values keeps the certificates and restarts nothing',
    body: async ({ cluster, holdfast }) => {
      const look = async () => {
        const secrets = await cluster.get('secrets', '--namespace', namespace, '--field-selector', 'type=kubernetes.io/tls');
        const pods = await cluster.get('pods', '--namespace', namespace);
        return { certificates: secrets.items.map(({ metadata, data }) => [metadata.name, data]), pods: pods.items.map(({ metadata }) => metadata.uid).toSorted() };
      };
      const before = await look();
      assert.equal(before.certificates.length, 4);
      await holdfast.helm('upgrade');
      assert.deepEqual(await look(), before);
    },
  },
  {
    name: 'a rollout of the node DaemonSet pauses the I/O of an open volume and fails none of it',
    body: async ({ cluster, holdfast }) => {
      await holdfast.claim('rollout');
      await holdfast.pod('rollout', 'rollout', { node: 'node-2' });
      await holdfast.sh('rollout', `(${writer}) >/dev/null 2>&1 &`);
      await sleep(2000);
      await cluster.kubectl(['rollout', 'restart', 'daemonset/holdfast-node', '--namespace', namespace]);
      await cluster.waiting(['rollout', 'status', 'daemonset/holdfast-node', '--namespace', namespace]);
      await assertReadyLast(cluster);
      const before = Number(await holdfast.sh('rollout', 'cat /tmp/count'));
      await sleep(2000);
      const after = Number(await holdfast.sh('rollout', 'cat /tmp/count'));
      assert.ok(after > before, `writes stand still at ${after}`);
      assert.match(await holdfast.sh('rollout', 'touch /tmp/stop; while test ! -e /tmp/result; do sleep 1; done; cat /tmp/result'), /^done \d+$/);
      await holdfast.deletePod('rollout');
      await holdfast.deleteClaims('rollout');
    },
  },
  {
    name: 'helm upgrade to other values of every component, and helm rollback, fail no write on any node',
    body: async ({ cluster, holdfast, figures }) => {
      const names = cluster.nodes.map(({ name }) => `upgrade-${name}`);
      await cluster.apply(...cluster.nodes.map(({ name }) => writingStatefulSet(`upgrade-${name}`, { prefer: name })));
      const writers = [];
      for (const name of names) writers.push(await writing({ cluster }, `${name}-0`));
      await holdfast.helm('upgrade', '--set', 'node.logLevel=debug,controller.logLevel=debug,metadataService.logLevel=debug');
      await holdfast.untilRolledOut();
      for (const writer of writers) await writer.assertGoesOn('after the upgrade');
      const began = performance.now();
      await holdfast.rollback();
      // Longer, and a container has let its pod's grace period pass.
      figures.record('rollback_s', (performance.now() - began) / 1000, { goal: 55 });
      for (const writer of writers) await writer.assertGoesOn('after the rollback');
      await takeAway({ cluster, holdfast }, ...names);
    },
  },
];
