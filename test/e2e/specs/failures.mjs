// What fails: machines, networks, agents, the metadata service. Writers tell what was flushed (lib/writer.mjs).
import assert from 'node:assert/strict';
import { mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { namespace } from '../lib/holdfast.mjs';
import { processesBelow, running } from '../lib/residue.mjs';
import { sleep, until } from '../lib/shell.mjs';
import { assertJournal, takeAway, writing, writingPod, writingStatefulSet } from '../lib/writer.mjs';

const seconds = (since) => (performance.now() - since) / 1000;

async function eventOn({ cluster }, name, reason, options) {
  let found;
  await until(
    `an event ${reason} on ${name}`,
    async () => {
      const { items } = await cluster.get('events', '--all-namespaces', '--field-selector', `involvedObject.name=${name},reason=${reason}`);
      [found] = items;
      return found !== undefined;
    },
    options,
  );
  return found.message;
}

/** Until a node that was fenced is as before. */
async function untilBack({ cluster }, node) {
  await until(
    `the taint of ${node.name} to go`,
    async () => {
      const { spec, metadata } = await cluster.get('node', node.name);
      return !(spec.taints ?? []).some(({ key }) => key.startsWith('holdfast.io/')) && metadata.annotations?.['holdfast.io/fence'] === undefined;
    },
    { everyMs: 500 },
  );
}

/** The journal as another node reads it, after the pod was replaced: from the disk, not from a page cache. */
async function journalElsewhere(lab, name, writer) {
  await lab.cluster.kubectl(['cordon', writer.node.name]);
  try {
    await lab.holdfast.deletePod(`${name}-0`);
    const next = await writing(lab, `${name}-0`, { not: writer.uid });
    assert.notEqual(next.node.name, writer.node.name);
    return { next, journal: await lab.cluster.kubectl(['exec', `${name}-0`, '--', 'cat', '/data/journal']) };
  } finally {
    await lab.cluster.kubectl(['uncordon', writer.node.name]);
  }
}

/**
 * A claim for a directory of a node: another driver's volume, that nobody can fence. A directory of its own, in which nothing is mounted:
 * mounts below that of the kubelet's would keep it busy.
 */
function foreignVolume(name, node) {
  const path = join(node.directory, name);
  mkdirSync(path, { recursive: true });
  const storage = '1Gi';
  const claimRef = { namespace: 'default', name };
  const matchExpressions = [{ key: 'kubernetes.io/hostname', operator: 'In', values: [node.name] }];
  return [
    {
      apiVersion: 'v1',
      kind: 'PersistentVolume',
      metadata: { name },
      spec: {
        capacity: { storage }, accessModes: ['ReadWriteOnce'], persistentVolumeReclaimPolicy: 'Retain', storageClassName: '', claimRef,
        local: { path }, nodeAffinity: { required: { nodeSelectorTerms: [{ matchExpressions }] } },
      },
    },
    {
      apiVersion: 'v1',
      kind: 'PersistentVolumeClaim',
      metadata: claimRef,
      spec: { accessModes: ['ReadWriteOnce'], storageClassName: '', volumeName: name, resources: { requests: { storage } } },
    },
  ];
}

export const failureSpecs = [
  {
    name: 'an agent that is killed under load is back by itself, and the I/O of its volumes pauses and fails nowhere',
    body: async (lab) => {
      const { cluster, figures } = lab;
      await cluster.apply(writingStatefulSet('agent', { prefer: 'node-2' }));
      const writer = await writing(lab, 'agent-0');
      const [agent] = running(processesBelow(writer.node.child.pid), '/opt/holdfast/agent.js');
      const container = async () => {
        const { items } = await cluster.get('pods', '--namespace', namespace, '--selector', 'app.kubernetes.io/component=node', '--field-selector', `spec.nodeName=${writer.node.name}`);
        return items[0].status.containerStatuses.find(({ name }) => name === 'agent');
      };
      const { restartCount } = await container();
      process.kill(agent, 'SIGKILL');
      const again = until('the agent to be started again', async () => {
        const now = await container();
        return now.restartCount > restartCount && now.ready;
      });
      figures.record('agent_kill_pause_s', await writer.longestPause(again.then(() => sleep(5000))));
      await writer.assertGoesOn('after the agent was killed');
      assertJournal(await cluster.kubectl(['exec', 'agent-0', '--', 'cat', '/data/journal']), [{ from: 0, node: writer.node.name }]);
      await takeAway(lab, 'agent');
    },
  },
  {
    name: 'a metadata service that is away for two minutes stops no pod that writes, and claims are served again when it is back',
    body: async (lab) => {
      const { cluster, holdfast } = lab;
      const scale = (replicas) => cluster.kubectl(['scale', 'statefulset/holdfast-metadata', '--namespace', namespace, '--replicas', String(replicas)]);
      await cluster.apply(writingStatefulSet('without-a', { prefer: 'node-2' }), writingStatefulSet('without-b', { prefer: 'node-3' }));
      const writers = [await writing(lab, 'without-a-0'), await writing(lab, 'without-b-0')];
      await scale(0);
      await cluster.waiting(['wait', '--for=delete', 'pod/holdfast-metadata-0', '--namespace', namespace]);
      for (const end = performance.now() + 120_000; performance.now() < end; await sleep(5000)) {
        await Promise.all(writers.map((writer) => writer.assertGoesOn('without the metadata service')));
      }
      await scale(1);
      await cluster.waiting(['rollout', 'status', 'statefulset/holdfast-metadata', '--namespace', namespace]);
      await holdfast.claim('afterwards');
      await holdfast.pod('afterwards', 'afterwards');
      await holdfast.deletePod('afterwards');
      await holdfast.deleteClaims('afterwards');
      for (const writer of writers) await writer.assertGoesOn('after the metadata service came back');
      await takeAway(lab, 'without-a', 'without-b');
    },
  },
  {
    name: 'the pod of a StatefulSet on a node that is killed runs elsewhere, with everything that it had flushed',
    body: async (lab) => {
      const { cluster, figures } = lab;
      await cluster.apply(writingStatefulSet('killed', { prefer: 'node-3' }));
      const before = await writing(lab, 'killed-0');
      assert.equal(before.node.name, 'node-3');
      await sleep(3000);
      const killed = performance.now();
      await cluster.killNode(before.node);
      const after = await writing(lab, 'killed-0', { not: before.uid });
      figures.record('failover_s', seconds(killed), { goal: 30 });
      assert.ok(after.first >= before.flushed, `${before.flushed} lines were flushed, ${after.first} came over`);
      const { next, journal } = await journalElsewhere(lab, 'killed', after).finally(() => cluster.bootNode(before.node));
      assertJournal(journal, [{ from: 0, node: 'node-3' }, { from: after.first, node: after.node.name }, { from: next.first, node: next.node.name }]);
      await eventOn(lab, 'node-3', 'HoldfastFenced');
      await eventOn(lab, 'killed-0', 'HoldfastEvicted');
      await untilBack(lab, before.node);
      await takeAway(lab, 'killed');
    },
  },
  {
    name: "a pod that has another driver's volume beside ours is left on its dead node, with an event that says why",
    body: async (lab) => {
      const { cluster, holdfast, figures } = lab;
      const [node] = cluster.nodes.filter(({ name }) => name === 'node-2');
      await holdfast.claim('mixed');
      await cluster.apply(...foreignVolume('foreign', node), writingStatefulSet('beside', { prefer: node.name }), {
        apiVersion: 'v1',
        kind: 'Pod',
        metadata: { name: 'mixed', namespace: 'default' },
        spec: writingPod({
          volumes: [{ name: 'data', persistentVolumeClaim: { claimName: 'mixed' } }, { name: 'foreign', persistentVolumeClaim: { claimName: 'foreign' } }],
          mounts: [{ name: 'foreign', mountPath: '/foreign' }],
        }),
      });
      const mixed = await writing(lab, 'mixed');
      const beside = await writing(lab, 'beside-0');
      assert.equal(beside.node.name, node.name);
      // Not a word from it: connections do not break, as without power.
      await cluster.cutNode(node);
      const killed = performance.now();
      await cluster.killNode(node);
      await writing(lab, 'beside-0', { not: beside.uid });
      figures.record('failover_silent_s', seconds(killed), { goal: 30 });
      assert.match(await eventOn(lab, 'mixed', 'HoldfastPodLeftAlone'), /claim foreign \(another driver\)/);
      const pod = await cluster.get('pod', 'mixed');
      assert.equal(pod.metadata.uid, mixed.uid);
      assert.equal(pod.metadata.deletionTimestamp, undefined, 'it was deleted');
      const { spec } = await cluster.get('node', node.name);
      assert.ok(!(spec.taints ?? []).some(({ key }) => key === 'node.kubernetes.io/out-of-service'), 'the out-of-service taint was set');
      const flushed = mixed.flushed;
      await cluster.bootNode(node);
      await untilBack(lab, node);
      await until('the pod that was left alone to go on', () => mixed.flushed > flushed);
      await holdfast.deletePod('mixed');
      await holdfast.deleteClaims('mixed');
      await cluster.waiting(['delete', 'pvc/foreign', 'pv/foreign']);
      await takeAway(lab, 'beside');
    },
  },
  {
    name: 'a node that is cut off and goes on writing loses its volume before another pod has it, and is clean again when it is back',
    body: async (lab) => {
      const { cluster, holdfast, figures } = lab;
      await cluster.apply(writingStatefulSet('cut', { prefer: 'node-2', tolerationSeconds: 5 }));
      const before = await writing(lab, 'cut-0');
      assert.equal(before.node.name, 'node-2');
      const cut = performance.now();
      await cluster.cutNode(before.node);
      await sleep(10_000);
      await before.assertGoesOn('cut off');
      const after = await writing(lab, 'cut-0', { not: before.uid });
      figures.record('cut_off_s', seconds(cut));
      assert.ok(before.failed, 'the old pod has not noticed');
      const flushed = before.flushed;
      assert.ok(after.first >= flushed, `${flushed} lines were flushed, ${after.first} came over`);
      await sleep(5000);
      assert.equal(before.flushed, flushed);
      await cluster.joinNode(before.node);
      await untilBack(lab, before.node);
      await until('the orphan to be gone', () => mountsOf(before.node).every((line) => !line.includes(before.uid)), { everyMs: 1000 });
      const { next, journal } = await journalElsewhere(lab, 'cut', after);
      assertJournal(journal, [{ from: 0, node: 'node-2' }, { from: after.first, node: after.node.name }, { from: next.first, node: next.node.name }]);
      await takeAway(lab, 'cut');
      await holdfast.claim('again');
      await holdfast.pod('again', 'again', { node: 'node-2' });
      await holdfast.sh('again', 'echo again > /data/file && sync');
      await holdfast.deletePod('again');
      await holdfast.deleteClaims('again');
    },
  },
];

function mountsOf(node) {
  const [first] = processesBelow(node.child.pid).filter((pid) => pid !== node.child.pid);
  return readFileSync(`/proc/${first}/mounts`, 'utf8').split('\n');
}
