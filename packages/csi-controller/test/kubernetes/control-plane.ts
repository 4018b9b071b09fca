/**
 * An API server for one test, without controllers, scheduler and kubelets: what happens to an object is what somebody did who
 * is in the test. Either the real one (kube-apiserver over etcd; the binary comes from the cache that `make e2e-tools` fills), or the
 * stand-in of api-server.ts.
 */
import { generateKeyPairSync } from 'node:crypto';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import {
  CoordinationV1Api,
  CoreV1Api,
  KubeConfig,
  RbacAuthorizationV1Api,
  StorageV1Api,
  type V1PolicyRule,
} from '@kubernetes/client-node';
import { StandInApiServer } from './api-server.ts';
import { freePort, waitFor, type Spawned, type TestArea } from '@holdfast/testing';

const cache = process.env['HOLDFAST_E2E_CACHE'] ?? join(homedir(), '.cache', 'holdfast-e2e');
const apiserver = join(cache, 'bin', 'kube-apiserver');
const etcd = ['/usr/bin/etcd', join(cache, 'bin', 'etcd')].find(existsSync);

/** Why there can be no control plane here; undefined: there can. */
export const missing = !existsSync(apiserver)
  ? `${apiserver} is not there: make e2e-tools builds it`
  : etcd === undefined
    ? 'etcd is not installed (Debian: etcd-server)'
    : undefined;

export const NAMESPACE = 'holdfast';

export class ControlPlane {
  readonly admin: KubeConfig;
  /** As the controller's service account: it has the rights that the documentation lists, and no others. */
  readonly controller: KubeConfig;
  readonly controllerKubeconfig: string;
  readonly core: CoreV1Api;
  readonly storage: StorageV1Api;
  readonly coordination: CoordinationV1Api;
  readonly #start: () => Promise<{ kill: () => Promise<void> }>;
  #running: { kill: () => Promise<void> } | undefined;

  private constructor(area: TestArea, server: string, start: () => Promise<{ kill: () => Promise<void> }>) {
    this.#start = start;
    this.admin = config(server, 'admin-token');
    this.controller = config(server, 'controller-token');
    this.controllerKubeconfig = area.path('controller.kubeconfig');
    writeFileSync(this.controllerKubeconfig, this.controller.exportConfig(), { mode: 0o600 });
    this.core = this.admin.makeApiClient(CoreV1Api);
    this.storage = this.admin.makeApiClient(StorageV1Api);
    this.coordination = this.admin.makeApiClient(CoordinationV1Api);
  }

  static async start(area: TestArea, kind: 'real' | 'stand-in'): Promise<ControlPlane> {
    const plane = kind === 'real' ? await ControlPlane.#real(area) : await ControlPlane.#standIn(area);
    area.onDispose(() => plane.kill());
    await plane.up();
    await plane.core.createNamespace({ body: { metadata: { name: NAMESPACE } } });
    if (kind === 'real') await plane.#allowController();
    return plane;
  }

  static async #standIn(area: TestArea): Promise<ControlPlane> {
    const port = await freePort();
    const server = new StandInApiServer(documentedRules(), NAMESPACE);
    return new ControlPlane(area, `http://127.0.0.1:${port}`, async () => {
      await server.listen(port);
      return server;
    });
  }

  static async #real(area: TestArea): Promise<ControlPlane> {
    const [client, peer, port] = await Promise.all([freePort(), freePort(), freePort()]);
    const store = `http://127.0.0.1:${client}`;
    const etcdFlags = {
      'data-dir': area.path('etcd'),
      'unsafe-no-fsync': 'true',
      'listen-client-urls': store,
      'advertise-client-urls': store,
      'listen-peer-urls': `http://127.0.0.1:${peer}`,
    };
    await area.spawn('etcd', etcd ?? 'etcd', flags(etcdFlags));
    const key = generateKeyPairSync('rsa', { modulusLength: 2048 });
    writeFileSync(area.path('sa.key'), key.privateKey.export({ type: 'pkcs1', format: 'pem' }), {
      mode: 0o600,
    });
    writeFileSync(
      area.path('tokens.csv'),
      'admin-token,admin,admin,system:masters\ncontroller-token,holdfast-controller,holdfast-controller\n',
      { mode: 0o600 },
    );
    const serverFlags = {
      'etcd-servers': store,
      'bind-address': '127.0.0.1',
      'secure-port': String(port),
      'cert-dir': area.path('certs'),
      'token-auth-file': area.path('tokens.csv'),
      'service-account-key-file': area.path('sa.key'),
      'service-account-signing-key-file': area.path('sa.key'),
      'service-account-issuer': 'https://kubernetes.default.svc',
      'service-cluster-ip-range': '10.0.0.0/24',
      'authorization-mode': 'RBAC',
      'disable-admission-plugins': 'ServiceAccount',
    };
    return new ControlPlane(area, `https://127.0.0.1:${port}`, async () => {
      const server: Spawned = await area.spawn('kube-apiserver', apiserver, flags(serverFlags));
      return { kill: () => server.stop('SIGKILL') };
    });
  }

  async up(): Promise<void> {
    this.#running = await this.#start();
    await waitFor('the API server', () => this.core.listNamespace(), { timeoutMs: 60_000, intervalMs: 200 });
  }

  /** As by a power cut. */
  async kill(): Promise<void> {
    await this.#running?.kill();
    this.#running = undefined;
  }

  async #allowController(): Promise<void> {
    const rbac = this.admin.makeApiClient(RbacAuthorizationV1Api);
    const name = 'holdfast-controller';
    const apiGroup = 'rbac.authorization.k8s.io';
    const subjects = [{ apiGroup, kind: 'User', name }];
    for (const [where, rules] of documentedRules()) {
      if (where === 'cluster') {
        await rbac.createClusterRole({ body: { metadata: { name }, rules } });
        const roleRef = { apiGroup, kind: 'ClusterRole', name };
        await rbac.createClusterRoleBinding({ body: { metadata: { name }, subjects, roleRef } });
        continue;
      }
      const namespace = where === 'own' ? NAMESPACE : where;
      await rbac.createNamespacedRole({ namespace, body: { metadata: { name }, rules } });
      const roleRef = { apiGroup, kind: 'Role', name };
      await rbac.createNamespacedRoleBinding({ namespace, body: { metadata: { name }, subjects, roleRef } });
    }
  }
}

/** The table of docs/kubernetes-safety.md, so that it is true: | where | API group | resource | verbs | why | */
export function documentedRules(): Map<string, V1PolicyRule[]> {
  const doc = readFileSync(new URL('../../../../docs/kubernetes-safety.md', import.meta.url), 'utf8');
  const rules = new Map<string, V1PolicyRule[]>();
  for (const line of doc.split('\n')) {
    const cells = line.split('|').map((cell) => cell.trim().replaceAll('`', ''));
    const [, where = '', group = '', resource = '', verbs = ''] = cells;
    if (cells.length !== 7 || !/^(cluster|own|kube-node-lease)$/.test(where)) continue;
    const apiGroups = [group === 'core' ? '' : group];
    const rule = { apiGroups, resources: [resource], verbs: verbs.split(', ') };
    rules.set(where, [...(rules.get(where) ?? []), rule]);
  }
  return rules;
}

function flags(values: Readonly<Record<string, string>>): string[] {
  return Object.entries(values).map(([name, value]) => `--${name}=${value}`);
}

function config(server: string, token: string): KubeConfig {
  const made = new KubeConfig();
  made.loadFromOptions({
    clusters: [{ name: 'test', server, skipTLSVerify: true }],
    users: [{ name: 'test', token }],
    contexts: [{ name: 'test', cluster: 'test', user: 'test' }],
    currentContext: 'test',
  });
  return made;
}
