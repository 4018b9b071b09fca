// Pods that write, and say outside of the volume what has been flushed: in an emptyDir, which is a directory of the test's own and outlives
// the node. So what a node's end took with it is known exactly, and every line of the journal says who wrote it.
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { testImage } from './holdfast.mjs';
import { sleep, until } from './shell.mjs';

const lineBytes = 16;

/** A line of 16 bytes, flushed, then counted. One failure ends it: a writer that goes on after an error would hide it. */
const script = `
i=0; test ! -e /data/journal || i=$(($(wc -c < /data/journal) / ${lineBytes}))
echo $i > /said/first
while test ! -e /said/stop; do
  printf '%08d %-6s\\n' $i $NODE | dd of=/data/journal bs=${lineBytes} seek=$i conv=fsync,notrunc 2>/said/error || { echo $i > /said/failed; break; }
  i=$((i + 1)); echo $i >> /said/flushed
done
echo $i > /said/ended
sleep 100000`;

/** The specification of a pod that writes to the volume `data` from its start. */
export function writingPod({ volumes = [], mounts = [], tolerationSeconds, prefer, node } = {}) {
  return {
    automountServiceAccountToken: false,
    terminationGracePeriodSeconds: 1,
    ...(node === undefined ? {} : { nodeSelector: { 'kubernetes.io/hostname': node } }),
    ...(prefer === undefined ? {} : { affinity: preference(prefer) }),
    ...(tolerationSeconds === undefined ? {} : { tolerations: tolerations(tolerationSeconds) }),
    containers: [
      {
        name: 'main',
        image: testImage,
        imagePullPolicy: 'Never',
        command: ['sh', '-c', script],
        env: [{ name: 'NODE', valueFrom: { fieldRef: { fieldPath: 'spec.nodeName' } } }],
        volumeMounts: [{ name: 'data', mountPath: '/data' }, { name: 'said', mountPath: '/said' }, ...mounts],
      },
    ],
    volumes: [{ name: 'said', emptyDir: {} }, ...volumes],
  };
}

function preference(hostname) {
  const matchExpressions = [{ key: 'kubernetes.io/hostname', operator: 'In', values: [hostname] }];
  return { nodeAffinity: { preferredDuringSchedulingIgnoredDuringExecution: [{ weight: 100, preference: { matchExpressions } }] } };
}

function tolerations(tolerationSeconds) {
  return ['not-ready', 'unreachable'].map((what) => ({ key: `node.kubernetes.io/${what}`, operator: 'Exists', effect: 'NoExecute', tolerationSeconds }));
}

/** A StatefulSet of one writing pod, NAME-0, with a claim data-NAME-0. */
export function writingStatefulSet(name, { storageClass = 'holdfast', ...pod } = {}) {
  return {
    apiVersion: 'apps/v1',
    kind: 'StatefulSet',
    metadata: { name, namespace: 'default' },
    spec: {
      serviceName: name,
      selector: { matchLabels: { app: name } },
      persistentVolumeClaimRetentionPolicy: { whenDeleted: 'Delete' },
      template: { metadata: { labels: { app: name } }, spec: writingPod(pod) },
      volumeClaimTemplates: [
        { metadata: { name: 'data' }, spec: { accessModes: ['ReadWriteOnce'], storageClassName: storageClass, resources: { requests: { storage: '1Gi' } } } },
      ],
    },
  };
}

/** What one pod said, read beside it: no API server, kubelet or network is asked. */
export class Writer {
  #directory;
  #first;

  /** @param pod as the API server has it; @param nodes of the cluster */
  constructor(pod, nodes) {
    const node = nodes.find(({ name }) => name === pod.spec.nodeName);
    this.#directory = join(node.directory, 'kubelet/pods', pod.metadata.uid, 'volumes/kubernetes.io~empty-dir/said');
    this.node = node;
    this.uid = pod.metadata.uid;
  }

  get flushed() {
    const said = this.#read('flushed');
    // A line that was cut off by a power cut says nothing.
    const last = said.slice(0, said.lastIndexOf('\n')).split('\n').at(-1);
    return last === undefined || last === '' ? this.first : Number(last);
  }

  /** Where it began; kept, because the directory goes with the pod. */
  get first() {
    const said = this.#read('first').trim();
    if (said !== '') this.#first = Number(said);
    return this.#first ?? 0;
  }

  get failed() {
    return existsSync(join(this.#directory, 'failed'));
  }

  #read(name) {
    const path = join(this.#directory, name);
    return existsSync(path) ? readFileSync(path, 'utf8') : '';
  }

  /** Watches it until `end` comes about; the longest time, in seconds, in which nothing was flushed. */
  async longestPause(end) {
    let last = this.flushed;
    let since = performance.now();
    let longest = 0;
    const endedOr = (ms) => Promise.race([end.then(() => true), sleep(ms, false)]);
    while (!(await endedOr(50))) {
      const now = performance.now();
      longest = Math.max(longest, now - since);
      if (this.flushed === last) continue;
      last = this.flushed;
      since = now;
    }
    return longest / 1000;
  }

  /** Throws unless it goes on and has never failed. */
  async assertGoesOn(what) {
    const before = this.flushed;
    for (let i = 0; i < 300 && this.flushed <= before && !this.failed; i += 1) await sleep(100);
    assert.equal(this.failed, false, `${what}: a write failed: ${this.#read('error')}`);
    assert.ok(this.flushed > before, `${what}: writes stand still at ${before}`);
  }
}

/**
 * Throws unless the journal is exactly what the writers wrote, one after another: each from its `from` on, without a hole, without a
 * line of an earlier one after the next began.
 * @param {string} journal
 * @param {{from: number, node: string}[]} writers
 */
export function assertJournal(journal, writers) {
  const lines = journal.split('\n').slice(0, -1);
  for (const [i, line] of lines.entries()) {
    const { node } = writers.findLast(({ from }) => from <= i);
    assert.equal(line, `${String(i).padStart(8, '0')} ${node.padEnd(6)}`, `line ${i} of ${lines.length}`);
  }
  return lines.length;
}

/** The writer of pod NAME, once it runs and writes; of another one than the pod with the uid `not`. */
export async function writing({ cluster }, name, { not } = {}) {
  let writer;
  await until(
    `${name} to write`,
    async () => {
      const pod = await cluster.get('pod', name);
      if (pod.metadata.uid === not || pod.status.phase !== 'Running') return false;
      writer = new Writer(pod, cluster.nodes);
      return writer.flushed > writer.first;
    },
    { everyMs: 100 },
  );
  return writer;
}

/** Takes a writing StatefulSet away, its volume too. */
export async function takeAway({ cluster, holdfast }, ...names) {
  await cluster.waiting(['delete', 'statefulset', ...names]);
  await holdfast.deleteClaims(...names.map((name) => `data-${name}-0`));
}
