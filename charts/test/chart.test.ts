/**
 * The chart, rendered by the real helm. Where helm is not in the tools' cache (`make e2e-tools`) these are skipped.
 * `UPDATE_GOLDEN=1` writes the golden files anew: read the difference before committing it.
 */
import { execFile, execFileSync } from 'node:child_process';
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join, resolve } from 'node:path';
import { promisify } from 'node:util';
import { loadAll } from 'js-yaml';
import { describe, expect, test } from 'vitest';

const top = resolve(import.meta.dirname, '../..');
const chart = join(top, 'charts/holdfast');
const helm = join(process.env['HOLDFAST_E2E_CACHE'] ?? join(homedir(), '.cache/holdfast-e2e'), 'bin/helm');

interface KubeObject {
  kind: string;
  metadata: { name: string; namespace?: string; labels?: Record<string, string> };
  [field: string]: unknown;
}
interface Rule {
  apiGroups: string[];
  resources: string[];
  verbs: string[];
}
interface Probe {
  httpGet: { path: string; port: string };
  periodSeconds: number;
  failureThreshold: number;
}
interface Container {
  name: string;
  image: string;
  imagePullPolicy?: string;
  args?: string[];
  ports?: { name: string; containerPort: number }[];
  livenessProbe?: Probe;
  readinessProbe?: Probe;
  securityContext?: {
    privileged?: boolean;
    readOnlyRootFilesystem?: boolean;
    capabilities?: { add?: string[]; drop?: string[] };
  };
}
interface PodSpec {
  serviceAccountName: string;
  automountServiceAccountToken?: boolean;
  nodeSelector?: Record<string, string>;
  securityContext?: { runAsNonRoot?: boolean };
  initContainers?: Container[];
  containers: Container[];
}

const execFileAsync = promisify(execFile);

async function render(args: string[]): Promise<string> {
  const { stdout } = await execFileAsync(
    helm,
    ['template', 'holdfast', chart, '--namespace', 'holdfast-system', ...args],
    { maxBuffer: 64 << 20 },
  );
  return stdout;
}

const valuesOf = (name: string): string[] => ['--values', join(top, `charts/test/values/${name}.yaml`)];
const objects = (text: string): KubeObject[] =>
  (loadAll(text) as (KubeObject | null)[]).filter((object) => object !== null);

function podsOf(all: readonly KubeObject[]): Map<string, PodSpec> {
  const workloads = all.filter(({ kind }) => ['Deployment', 'DaemonSet', 'StatefulSet'].includes(kind));
  return new Map(
    workloads.map((workload) => [
      workload.metadata.name,
      (workload['spec'] as { template: { spec: PodSpec } }).template.spec,
    ]),
  );
}

const containersOf = (pod: PodSpec): Container[] => [...(pod.initContainers ?? []), ...pod.containers];

/** "group/resource verb" of every rule that the roles of a name grant. */
function granted(all: readonly KubeObject[], kind: string, name: string): Set<string> {
  const role = all.find((object) => object.kind === kind && object.metadata.name === name);
  return new Set(
    ((role?.['rules'] ?? []) as Rule[]).flatMap(({ apiGroups, resources, verbs }) =>
      apiGroups.flatMap((group) =>
        resources.flatMap((resource) => verbs.map((verb) => `${group}/${resource} ${verb}`)),
      ),
    ),
  );
}

/** What docs/kubernetes-safety.md says that the controller may do: | where | API group | resource | verbs | why | */
function documented(where: string): string[] {
  const doc = readFileSync(join(top, 'docs/kubernetes-safety.md'), 'utf8');
  const rows = doc.split('\n').map((line) => line.split('|').map((cell) => cell.trim().replaceAll('`', '')));
  return rows
    .filter((cells) => cells.length === 7 && cells[1] === where)
    .flatMap(([, , group = '', resource = '', verbs = '']) =>
      verbs.split(', ').map((verb) => `${group === 'core' ? '' : group}/${resource} ${verb}`),
    );
}

describe.skipIf(!existsSync(helm))('the chart', () => {
  test('helm lint finds nothing', () => {
    const said = execFileSync(helm, ['lint', '--strict', chart], { encoding: 'utf8' });
    expect(said).toContain('0 chart(s) failed');
  });

  test.each(['minimal', 'everything'])('renders the golden file of %s', async (name) => {
    const rendered = await render(valuesOf(name));
    const golden = join(top, `charts/test/golden/${name}.yaml`);
    if (process.env['UPDATE_GOLDEN'] === '1') writeFileSync(golden, rendered);
    expect(rendered).toBe(readFileSync(golden, 'utf8'));
  });

  test('deploy/kubernetes/holdfast.yaml is what make manifests would write', () => {
    const now = execFileSync(process.execPath, [join(top, 'tools/manifests.mjs'), '--stdout'], {
      encoding: 'utf8',
      maxBuffer: 64 << 20,
    });
    expect(readFileSync(join(top, 'deploy/kubernetes/holdfast.yaml'), 'utf8')).toBe(now);
  });

  test('every object has a name of its own', async () => {
    for (const name of ['minimal', 'everything']) {
      const names = objects(await render(valuesOf(name))).map((o) => `${o.kind}/${o.metadata.name}`);
      expect(names).toEqual([...new Set(names)]);
    }
  });

  test('a value that does not exist, or has the wrong type, is refused', async () => {
    await expect(render(['--set', 'node.devcies={/dev/x}'])).rejects.toThrow(/devcies/);
    await expect(render(['--set', 'tls.mode=sometimes'])).rejects.toThrow(/tls/);
    await expect(render(['--set', 'node.devices=/dev/x'])).rejects.toThrow(/devices/);
    await expect(render(['--set', 'controller.replicas=0'])).rejects.toThrow(/replicas/);
  });

  test('only the keeper, the agent and the CSI node plugin are privileged', async () => {
    const privileged = [...podsOf(objects(await render(valuesOf('everything')))).values()]
      .flatMap(containersOf)
      .filter((container) => container.securityContext?.privileged === true)
      .map((container) => container.name);
    expect(privileged.toSorted()).toEqual(['agent', 'csi-node', 'keeper']);
  });

  test('every root file system is read-only, and what is not privileged drops all capabilities', async () => {
    const containers = [...podsOf(objects(await render(valuesOf('everything')))).values()].flatMap(
      containersOf,
    );
    const writable = containers.filter((c) => c.securityContext?.readOnlyRootFilesystem !== true);
    expect(writable.map((c) => c.name)).toEqual([]);
    const capable = containers.filter(
      ({ securityContext: context }) =>
        context?.privileged !== true && context?.capabilities?.drop?.join() !== 'ALL',
    );
    expect(capable.map((c) => c.name)).toEqual([]);
  });

  test('nothing on a node has a token for the API server, and the controller is not root', async () => {
    const all = objects(await render(valuesOf('everything')));
    const pods = podsOf(all);
    for (const name of ['holdfast-node', 'holdfast-keeper', 'holdfast-metadata'])
      expect([name, pods.get(name)?.automountServiceAccountToken]).toEqual([name, false]);
    const bound = all
      .filter(({ kind }) => kind === 'ClusterRoleBinding' || kind === 'RoleBinding')
      .flatMap((binding) => binding['subjects'] as { name: string }[])
      .map(({ name }) => name);
    expect([...new Set(bound)].toSorted()).toEqual(['holdfast-controller', 'holdfast-snapshot-controller']);
    for (const name of ['holdfast-controller', 'holdfast-metadata', 'holdfast-snapshot-controller'])
      expect([name, pods.get(name)?.securityContext?.runAsNonRoot]).toEqual([name, true]);
  });

  test('no rule names a wildcard, and only the controller may touch pods and nodes', async () => {
    const roles = objects(await render(valuesOf('everything'))).filter(({ kind }) =>
      /^(Cluster)?Role$/.test(kind),
    );
    const rules = roles.flatMap((role) =>
      (role['rules'] as Rule[]).map((rule) => ({ ...rule, role: role.metadata.name })),
    );
    for (const rule of rules) {
      expect([...rule.apiGroups, ...rule.resources, ...rule.verbs]).not.toContain('*');
      expect(rule.resources).not.toContain('secrets');
    }
    const powerful = rules.filter((rule) => rule.resources.some((r) => /^(nodes|pods)/.test(r)));
    expect([...new Set(powerful.map((rule) => rule.role))]).toEqual(['holdfast-controller']);
  });

  test('the controller has the rights that docs/kubernetes-safety.md lists, and of pods and nodes no others', async () => {
    const all = objects(await render(valuesOf('minimal')));
    const cluster = granted(all, 'ClusterRole', 'holdfast-controller');
    expect(documented('cluster').length).toBeGreaterThan(8);
    expect(documented('cluster').filter((right) => !cluster.has(right))).toEqual([]);
    const strong = (rights: Iterable<string>): string[] =>
      [...rights].filter((right) => /^\/(nodes|pods)/.test(right)).toSorted();
    expect(strong(cluster)).toEqual(strong(documented('cluster')));
    const own = granted(all, 'Role', 'holdfast-controller');
    expect(documented('own').filter((right) => !own.has(right))).toEqual([]);
    const kubelets = all.find(({ kind, metadata }) => kind === 'Role' && metadata.namespace !== undefined);
    expect(kubelets?.metadata.namespace).toBe('kube-node-lease');
    expect([...granted(all, 'Role', 'holdfast-controller-kubelets')]).toEqual(documented('kube-node-lease'));
  });

  test('without failover the controller asks for no pods, changes no nodes, and reads no Leases of kubelets', async () => {
    const all = objects(await render(['--set', 'controller.failover.enabled=false']));
    const rights = [...granted(all, 'ClusterRole', 'holdfast-controller')];
    expect(rights.filter((right) => /^\/pods|^\/nodes.* (patch|update|delete)/.test(right))).toEqual([]);
    expect(all.filter(({ metadata }) => metadata.namespace === 'kube-node-lease')).toEqual([]);
    expect(podsOf(all).get('holdfast-controller')?.containers[0]?.args).not.toContain('--kubernetes');
  });

  test('the controller looks after dead nodes, and sets the out-of-service taint unless told not to', async () => {
    const argsOf = async (values: string): Promise<string[]> =>
      podsOf(objects(await render(valuesOf(values)))).get('holdfast-controller')?.containers[0]?.args ?? [];
    expect(await argsOf('minimal')).toContain('--kubernetes');
    expect(await argsOf('minimal')).not.toContain('--no-out-of-service');
    expect(await argsOf('everything')).toContain('--no-out-of-service');
  });

  test('no device stops with a sentence', async () => {
    await expect(render(['--set-json', 'node.devices=[]'])).rejects.toThrow(
      /node\.devices is empty.*Name the shared devices/,
    );
  });

  test.each([
    [
      'Secrets that the mode does not use',
      ['tls.existingSecrets.node=mine'],
      /tls\.existingSecrets\.node names a Secret, which tls\.mode selfSigned does not use/,
    ],
    [
      'an issuer that the mode does not use',
      ['tls.certManager.issuerRef.name=mine'],
      /tls\.certManager\.issuerRef is set/,
    ],
    [
      'a mode without its Secrets',
      ['tls.mode=existingSecrets', 'tls.existingSecrets.node=mine'],
      /tls\.existingSecrets\.metadata is empty[^]*tls\.existingSecrets\.controller is empty/,
    ],
    [
      'a snapshot controller without the snapshotter',
      ['snapshotController.enabled=true', 'sidecars.snapshotter.enabled=false'],
      /snapshots would be accepted and never taken/,
    ],
    [
      'snapshot metadata without its Secret',
      ['sidecars.snapshotMetadata.enabled=true'],
      /tlsSecret is empty[^]*caCert is empty/,
    ],
    [
      'a backup beside the database',
      ['metadataService.backupHostPath=/var/lib/holdfast/metadata/'],
      /a copy beside the database is none/,
    ],
    [
      'one class twice, and two defaults',
      [
        'storageClasses[0].name=a,storageClasses[0].default=true',
        'storageClasses[1].name=a,storageClasses[1].default=true',
      ],
      /storageClasses has a twice[^]*storageClasses has 2 defaults/,
    ],
  ])('%s stops with a sentence', async (_, values, sentence) => {
    await expect(render(values.flatMap((value) => ['--set', value]))).rejects.toThrow(sentence);
  });

  test('the self-made certificates belong to their authority, name the service, and pair with their keys', async () => {
    const all = objects(await render(['--set', 'metadataService.address=10.96.0.40:7440']));
    const secret = (name: string): Record<string, string> => {
      const found = all.find((o) => o.kind === 'Secret' && o.metadata.name === name);
      return found?.['data'] as Record<string, string>;
    };
    const pem = (name: string, field: string): string =>
      Buffer.from(secret(name)[field] ?? '', 'base64').toString();
    const ca = new X509Certificate(pem('holdfast-ca', 'tls.crt'));
    for (const component of ['metadata', 'controller', 'node']) {
      const leaf = new X509Certificate(pem(`holdfast-${component}-tls`, 'tls.crt'));
      expect(leaf.checkIssued(ca) && leaf.verify(ca.publicKey)).toBe(true);
      expect(leaf.checkPrivateKey(createPrivateKey(pem(`holdfast-${component}-tls`, 'tls.key')))).toBe(true);
      expect(pem(`holdfast-${component}-tls`, 'ca.crt')).toBe(pem('holdfast-ca', 'tls.crt'));
    }
    const service = new X509Certificate(pem('holdfast-metadata-tls', 'tls.crt'));
    expect(service.checkHost('holdfast-metadata.holdfast-system.svc')).toBeDefined();
    expect(service.checkIP('10.96.0.40')).toBeDefined();
  });

  test('without TLS no process gets a certificate', async () => {
    const rendered = await render(['--set', 'tls.mode=none']);
    expect(rendered).not.toMatch(/--tls|kind: Secret|mountPath: \/tls/);
  });

  test('the keeper is never updated by itself', async () => {
    const all = objects(await render(valuesOf('minimal')));
    const keeper = all.find((o) => o.kind === 'DaemonSet' && o.metadata.name === 'holdfast-keeper');
    expect(keeper?.['spec']).toMatchObject({ updateStrategy: { type: 'OnDelete' } });
  });

  test('a node is ready when its livenessprobe says so, which a rollout of nodes waits for one by one', async () => {
    const all = objects(await render(valuesOf('minimal')));
    const containers = podsOf(all).get('holdfast-node')?.containers ?? [];
    const plugin = containers.find(({ name }) => name === 'csi-node');
    expect(plugin?.readinessProbe?.httpGet).toEqual({ path: '/healthz', port: 'healthz' });
    const port = plugin?.ports?.find(({ name }) => name === 'healthz')?.containerPort;
    const sidecar = containers.find(({ name }) => name === 'livenessprobe');
    expect(sidecar?.args).toContain(`--http-endpoint=:${port}`);
    const nodes = all.find((o) => o.kind === 'DaemonSet' && o.metadata.name === 'holdfast-node');
    expect(nodes?.['spec']).toMatchObject({ updateStrategy: { rollingUpdate: { maxUnavailable: 1 } } });
  });

  test('a plugin that stops answering is unready before it is restarted', async () => {
    const plugin = podsOf(objects(await render(valuesOf('minimal'))))
      .get('holdfast-node')
      ?.containers.find(({ name }) => name === 'csi-node');
    const after = (probe?: Probe): number => (probe?.periodSeconds ?? 0) * (probe?.failureThreshold ?? 0);
    expect(after(plugin?.readinessProbe)).toBeGreaterThanOrEqual(10);
    expect(after(plugin?.readinessProbe)).toBeLessThan(after(plugin?.livenessProbe));
  });

  test('without the snapshotter nothing refers to the snapshot API', async () => {
    expect(await render(['--set', 'sidecars.snapshotter.enabled=false'])).not.toContain(
      'snapshot.storage.k8s.io',
    );
  });

  test('sidecars get raised API rates', async () => {
    const controller = podsOf(objects(await render(valuesOf('minimal')))).get('holdfast-controller');
    for (const name of ['provisioner', 'attacher', 'resizer', 'snapshotter']) {
      const { args } = controller?.containers.find((container) => container.name === name) ?? {};
      expect(args).toEqual(expect.arrayContaining(['--kube-api-qps=100', '--kube-api-burst=200']));
    }
  });

  test('the kind cluster pulls the images that up.sh does not load', async () => {
    const pods = podsOf(objects(await render(['--values', join(top, 'deploy/kind/values.yaml')])));
    const pulled = [...pods.values()]
      .flatMap(containersOf)
      .filter(({ image }) => !image.startsWith('ghcr.io/holdfast/'));
    expect(pulled.map(({ imagePullPolicy }) => imagePullPolicy)).not.toContain('Never');
    expect(pulled.length).toBeGreaterThan(0);
  });

  test('one node of the kind cluster may run the metadata service, and is not the control plane, which kind taints', async () => {
    const kind = loadAll(readFileSync(join(top, 'deploy/kind/kind.yaml'), 'utf8'))[0] as {
      nodes: { role: string; labels?: Record<string, string> }[];
    };
    const pods = podsOf(objects(await render(['--values', join(top, 'deploy/kind/values.yaml')])));
    const wanted = Object.entries(pods.get('holdfast-metadata')?.nodeSelector ?? {});
    expect(wanted.length).toBeGreaterThan(0);
    const fit = kind.nodes.filter(({ labels }) => wanted.every(([name, value]) => labels?.[name] === value));
    expect(fit.map(({ role }) => role)).toEqual(['worker']);
  });
});
