// Holdfast in a test cluster: a pool on the shared disk, the chart by the real helm, and the objects that specs are made of.
import { join } from 'node:path';
import { readFileSync, writeFileSync } from 'node:fs';
import { until } from './shell.mjs';
import { top } from './tools.mjs';

export const namespace = 'holdfast-system';
export const testImage = 'holdfast.test/busybox:1';
const metadataAddress = '10.96.0.40';

export class Holdfast {
  #cluster;
  #device;
  #directory;

  constructor(cluster, device, directory) {
    this.#cluster = cluster;
    this.#device = device;
    this.#directory = directory;
  }

  // ------------------------------------------------------------------------------------------ chart

  /**
   * Runs the lines of the README that lead from a LUN to a running pod, as they stand there but for what only their reader knows (the LUN, a
   * node's name) and what this cluster has not (a registry; a fencing class that needs nobody). How long it took, in seconds.
   */
  async install() {
    const [, lines] = /\n## From a LUN to a running pod.*?\n```sh\n(.*?)```/s.exec(readFileSync(join(top, 'README.md'), 'utf8'));
    const mine = {
      '/dev/mapper/lun0': this.#device,
      'label node NODE': 'label node node-1',
      '--fencing manual': '--fencing loop',
      'charts/holdfast -n': `charts/holdfast --values ${this.#writeValues()} -n`,
      'image: busybox': `image: ${testImage}`,
    };
    const script = Object.entries(mine).reduce((text, [from, to]) => {
      if (!text.includes(from)) throw new Error(`The README's lines say nothing of ${from} any more`);
      return text.replaceAll(from, to);
    }, lines);
    const began = performance.now();
    await this.#cluster.shell(script, { cwd: top, timeoutMs: 600_000 });
    await this.untilRuns('hello');
    const took = (performance.now() - began) / 1000;
    await this.sh('hello', 'echo hello > /data/hello && sync');
    await this.deletePod('hello');
    await this.deleteClaims('hello');
    await this.untilRolledOut();
    await until(
      'every node to know the pool',
      async () => {
        const { items } = await this.#cluster.get('csinodes');
        const ready = items.filter((node) => node.spec.drivers?.some((driver) => driver.name === 'csi.holdfast.io' && (driver.topologyKeys ?? []).length > 0));
        return ready.length === this.#cluster.nodes.length;
      },
    );
    return took;
  }

  #writeValues() {
    const path = join(this.#directory, 'values.json');
    writeFileSync(path, JSON.stringify(this.values()));
    return path;
  }

  /** `helm install` or `helm upgrade`, with the values of these tests. */
  async helm(action, ...more) {
    await this.#cluster.waiting([action, 'holdfast', join(top, 'charts/holdfast'), '--namespace', namespace, '--values', this.#writeValues(), '--wait', ...more], 'helm');
  }

  /** Back to the values before the last upgrade. */
  async rollback() {
    await this.#cluster.waiting(['rollback', 'holdfast', '--namespace', namespace, '--wait'], 'helm');
    await this.untilRolledOut();
  }

  /** Until every pod is one of the newest revision and ready. */
  async untilRolledOut() {
    for (const workload of ['daemonset/holdfast-node', 'deployment/holdfast-controller', 'statefulset/holdfast-metadata']) {
      await this.#cluster.waiting(['rollout', 'status', workload, '--namespace', namespace]);
    }
  }

  values() {
    const sidecar = (name) => ({ image: `holdfast.test/${name}:1` });
    return {
      image: { registry: 'ghcr.io/holdfast', tag: 'e2e', pullPolicy: 'Never' },
      // No DNS in this cluster.
      metadataService: { address: `${metadataAddress}:7440`, service: { clusterIP: metadataAddress } },
      // Where no spec kills it.
      controller: { replicas: 1, nodeSelector: { 'kubernetes.io/hostname': 'node-1' } },
      sidecars: {
        provisioner: sidecar('csi-provisioner'),
        attacher: sidecar('csi-attacher'),
        resizer: sidecar('csi-resizer'),
        snapshotter: sidecar('csi-snapshotter'),
        registrar: sidecar('registrar-stand-in'),
        livenessprobe: sidecar('livenessprobe-stand-in'),
      },
      snapshotController: { enabled: true, replicas: 1, image: 'holdfast.test/snapshot-controller:1' },
      node: { devices: [this.#device], workers: 2 },
      storageClasses: [
        { name: 'holdfast', fsType: 'ext4' },
        { name: 'holdfast-xfs', fsType: 'xfs' },
        { name: 'holdfast-btrfs', fsType: 'btrfs' },
        { name: 'holdfast-now', fsType: 'ext4', volumeBindingMode: 'Immediate' },
      ],
      volumeSnapshotClasses: [{ name: 'holdfast' }, { name: 'holdfast-quiesced', parameters: { 'holdfast.io/quiesce': 'true' } }],
      volumeGroupSnapshotClasses: [{ name: 'holdfast' }],
      volumeAttributesClasses: [
        { name: 'holdfast-stays', parameters: { 'holdfast.io/evict': 'false' } },
        { name: 'holdfast-moves', parameters: { 'holdfast.io/evict': 'true' } },
        { name: 'holdfast-unknown', parameters: { iops: '5' } },
      ],
    };
  }

  async uninstall() {
    await until('all volumes to be gone', async () => (await this.cli('volume', 'list')).length === 0, { everyMs: 1000 });
    await this.#cluster.waiting(['uninstall', 'holdfast', '--namespace', namespace, '--wait'], 'helm');
  }

  /** `holdfast …` in an agent's pod; what it prints as JSON. */
  async cli(...words) {
    const said = await this.#cluster.kubectl(['exec', '--namespace', namespace, 'daemonset/holdfast-node', '--container', 'agent', '--', 'holdfast', ...words, '--output', 'json']);
    return JSON.parse(said);
  }

  /** Takes away all that specs make. */
  async sweep() {
    for (const kind of ['statefulset', 'pod', 'volumegroupsnapshot', 'volumesnapshot', 'pvc']) {
      await this.#cluster.waiting(['delete', kind, '--all']);
    }
    await this.#untilGone((pv) => pv.spec.csi !== undefined);
  }

  /** What a person would look at first, in one piece. */
  async explain() {
    const said = [];
    const look = async (...args) => said.push(await this.#cluster.kubectl(args).catch((error) => error.message));
    await look('get', 'pods', '--all-namespaces', '-o', 'wide');
    await look('get', 'pvc,pv,volumeattachments');
    await look('get', 'events', '--all-namespaces', '--field-selector', 'type=Warning', '--sort-by', '.lastTimestamp');
    for (const component of ['controller', 'metadata', 'node', 'keeper']) {
      await look('logs', '--namespace', namespace, '--selector', `app.kubernetes.io/component=${component}`, '--all-containers', '--prefix', '--tail', '15');
    }
    return said.join('\n').replace(/^/gm, '      ');
  }

  // ------------------------------------------------------------------------------------------ objects

  claimObject(name, { storageClass = 'holdfast', size = '1Gi', mode = 'Filesystem', accessMode = 'ReadWriteOnce', source, labels = {}, attributesClass } = {}) {
    return {
      apiVersion: 'v1',
      kind: 'PersistentVolumeClaim',
      metadata: { name, namespace: 'default', labels },
      spec: {
        accessModes: [accessMode],
        storageClassName: storageClass,
        volumeMode: mode,
        resources: { requests: { storage: size } },
        ...(source === undefined ? {} : { dataSource: source }),
        ...(attributesClass === undefined ? {} : { volumeAttributesClassName: attributesClass }),
      },
    };
  }

  async claim(name, options) {
    await this.#cluster.apply(this.claimObject(name, options));
  }

  /** A pod that sleeps with the claim at /data (or as /dev/data), running. With several claims each is at its name. */
  async pod(name, claims, { readOnly = false, ...options } = {}) {
    const claim = (claimName) => ({ persistentVolumeClaim: { claimName, readOnly } });
    const volumes = Array.isArray(claims) ? claims.map((claimName) => ({ name: claimName, ...claim(claimName) })) : [{ name: 'data', ...claim(claims) }];
    await this.podWith(name, volumes, options);
  }

  async podWith(name, volumes, { node, block = false, securityContext } = {}) {
    await this.#cluster.apply({
      apiVersion: 'v1',
      kind: 'Pod',
      metadata: { name, namespace: 'default' },
      spec: {
        ...(node === undefined ? {} : { nodeSelector: { 'kubernetes.io/hostname': node } }),
        ...(securityContext === undefined ? {} : { securityContext }),
        automountServiceAccountToken: false,
        terminationGracePeriodSeconds: 1,
        containers: [
          {
            name: 'main',
            image: testImage,
            imagePullPolicy: 'Never',
            command: ['sleep', '100000'],
            ...(block
              ? { volumeDevices: volumes.map((volume) => ({ name: volume.name, devicePath: `/dev/${volume.name}` })) }
              : { volumeMounts: volumes.map((volume) => ({ name: volume.name, mountPath: `/${volume.name}` })) }),
          },
        ],
        volumes,
      },
    });
    await this.untilRuns(name);
  }

  async untilRuns(pod) {
    await until(`pod ${pod} to run`, async () => {
      const { status } = await this.#cluster.get('pod', pod);
      return status.phase === 'Running' && status.containerStatuses?.every((container) => container.ready);
    });
  }

  /** Runs a shell command in a pod; its stdout, trimmed. */
  async sh(pod, script, options) {
    return (await this.#cluster.kubectl(['exec', pod, '--', 'sh', '-c', script], options)).trim();
  }

  async deletePod(...names) {
    await this.#cluster.waiting(['delete', 'pod', ...names]);
  }

  async deleteClaims(...names) {
    await this.#cluster.waiting(['delete', 'pvc', ...names]);
    await this.#untilGone((pv) => names.includes(pv.spec.claimRef?.name));
  }

  #untilGone(isOne) {
    return until('the volumes of deleted claims to go', async () => !(await this.#cluster.get('pv')).items.some(isOne));
  }

  async snapshot(name, claim, snapshotClass = 'holdfast') {
    await this.#cluster.apply({
      apiVersion: 'snapshot.storage.k8s.io/v1',
      kind: 'VolumeSnapshot',
      metadata: { name, namespace: 'default' },
      spec: { volumeSnapshotClassName: snapshotClass, source: { persistentVolumeClaimName: claim } },
    });
    await until(`snapshot ${name} to be ready`, async () => (await this.#cluster.get('volumesnapshot', name)).status?.readyToUse === true);
  }

  /** Of the claims with these labels; the snapshot of each. */
  async groupSnapshot(name, matchLabels) {
    await this.#cluster.apply({
      apiVersion: 'groupsnapshot.storage.k8s.io/v1',
      kind: 'VolumeGroupSnapshot',
      metadata: { name, namespace: 'default' },
      spec: { volumeGroupSnapshotClassName: 'holdfast', source: { selector: { matchLabels } } },
    });
    await until(`group snapshot ${name} to be ready`, async () => (await this.#cluster.get('volumegroupsnapshot', name)).status?.readyToUse === true);
    // The snapshot-controller writes into a member's status whose it is by itself, often after the group is ready.
    const selector = Object.entries(matchLabels).map(([key, value]) => `${key}=${value}`).join(',');
    const claims = (await this.#cluster.get('pvc', '--selector', selector)).items.length;
    return await until(`the ${claims} members of group snapshot ${name}`, async () => {
      const { items } = await this.#cluster.get('volumesnapshot');
      const members = items.filter(({ status }) => status?.volumeGroupSnapshotName === name);
      return members.length === claims && members.map(({ metadata, spec }) => ({ claim: spec.source.persistentVolumeClaimName, snapshot: metadata.name }));
    });
  }

  async deleteSnapshot(name) {
    await this.#cluster.waiting(['delete', 'volumesnapshot', name]);
  }
}

/** Writes 16 MiB of noise and gives its digest. */
export function writeNoise(holdfast, pod, path) {
  return holdfast.sh(pod, `dd if=/dev/urandom of=${path} bs=1M count=16 conv=fsync 2>/dev/null && sha256sum < ${path}`);
}

export function digest(holdfast, pod, path) {
  return holdfast.sh(pod, `sha256sum < ${path}`);
}
