// A Kubernetes cluster on this machine, without virtual machines or a registry: etcd, the control plane and N nodes, each node in
// namespaces of its own over the kernel that all share. This code runs inside the lab (lib/lab.mjs), whose first process takes
// everything with it.
import { randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { Agent, get as httpsGet } from 'node:https';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { makePki, makeTokens } from './pki.mjs';
import { abortConnections, childrenOf, detach, fuseConnections, loopsOver, processesBelow } from './residue.mjs';
import { patienceMs, run, start, until } from './shell.mjs';
import { tool } from './tools.mjs';

const lab = '10.77.0.1';
const server = `https://${lab}:6443`;
const serviceRange = '10.96.0.0/16';
const nodeScript = join(dirname(fileURLToPath(import.meta.url)), 'node.sh');
export const sandboxImage = 'holdfast.test/busybox:1';
/** Images of pods that the chart's values keep on the first node. To import one takes a node seconds. */
const onFirstNode = ['metadata-service', 'csi-controller', 'csi-provisioner', 'csi-attacher', 'csi-resizer', 'csi-snapshotter'];
/** What specs look at again and again: where it is, without asking kubectl. */
const paths = {
  pod: '/api/v1/namespaces/default/pods',
  pvc: '/api/v1/namespaces/default/persistentvolumeclaims',
  pv: '/api/v1/persistentvolumes',
  node: '/api/v1/nodes',
  volumesnapshot: '/apis/snapshot.storage.k8s.io/v1/namespaces/default/volumesnapshots',
  volumegroupsnapshot: '/apis/groupsnapshot.storage.k8s.io/v1/namespaces/default/volumegroupsnapshots',
};

export class Cluster {
  nodes = [];
  #directory;
  #images;
  #tokens;
  #admin;
  #children = [];

  constructor(directory, images) {
    this.#directory = directory;
    this.#images = images;
  }

  get logDirectory() {
    return join(this.#directory, 'log');
  }

  async up(count) {
    mkdirSync(this.logDirectory, { recursive: true });
    await this.#makeNetwork(count);
    await this.#startControlPlane(count);
    for (let index = 1; index <= count; index += 1) this.nodes.push(this.#makeNode(index));
    for (const node of this.nodes) this.#startNode(node);
    await Promise.all(this.nodes.map((node) => this.untilReady(node)));
  }

  // ------------------------------------------------------------------------------------------ network

  /** A bridge for the nodes; each node routes a /24 of pods. */
  async #makeNetwork(count) {
    const ip = (...args) => run('ip', args);
    await ip('link', 'set', 'lo', 'up');
    await ip('link', 'add', 'lab0', 'type', 'bridge');
    await ip('address', 'add', `${lab}/24`, 'dev', 'lab0');
    await ip('link', 'set', 'lab0', 'up');
    await run('sysctl', ['-q', '-w', 'net.ipv4.ip_forward=1', 'net.ipv4.conf.all.rp_filter=0']);
    mkdirSync('/run/netns', { recursive: true });
    for (let index = 1; index <= count; index += 1) {
      await this.#plugIn(index);
      await ip('route', 'add', `10.78.${index}.0/24`, 'via', `10.77.0.${10 + index}`);
    }
  }

  /** A network namespace for a node, new each time it starts. */
  async #plugIn(index) {
    await run('ip', ['netns', 'add', `node-${index}`]);
    await run('ip', ['link', 'add', `veth${index}`, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', `node-${index}`]);
    await run('ip', ['link', 'set', `veth${index}`, 'master', 'lab0', 'up']);
  }

  // ------------------------------------------------------------------------------------------ control plane

  async #startControlPlane(count) {
    const pki = join(this.#directory, 'pki');
    mkdirSync(pki, { recursive: true });
    const keys = await makePki(pki, ['127.0.0.1', lab, '10.96.0.1']);
    this.#tokens = makeTokens(pki, server, keys.ca, [
      { name: 'admin', user: 'admin', groups: ['system:masters'] },
      { name: 'controller-manager', user: 'system:kube-controller-manager', groups: [] },
      { name: 'scheduler', user: 'system:kube-scheduler', groups: [] },
      { name: 'proxy', user: 'system:kube-proxy', groups: [] },
      ...Array.from({ length: count }, (_, i) => ({ name: `node-${i + 1}`, user: `system:node:node-${i + 1}`, groups: ['system:nodes'] })),
    ]);
    const { users } = JSON.parse(readFileSync(this.#tokens.paths.admin, 'utf8'));
    this.#admin = { headers: { authorization: `Bearer ${users[0].user.token}` }, agent: new Agent({ keepAlive: true, ca: readFileSync(keys.ca) }) };
    mkdirSync('/run/etcd', { recursive: true, mode: 0o700 });
    this.#service('etcd', 'etcd', ['--data-dir=/run/etcd', '--listen-client-urls=http://127.0.0.1:2379', '--advertise-client-urls=http://127.0.0.1:2379', '--listen-peer-urls=http://127.0.0.1:2380']);
    this.#service('kube-apiserver', tool('kube-apiserver'), [
      '--etcd-servers=http://127.0.0.1:2379', `--advertise-address=${lab}`, `--service-cluster-ip-range=${serviceRange}`,
      `--tls-cert-file=${keys.cert}`, `--tls-private-key-file=${keys.key}`, `--token-auth-file=${this.#tokens.file}`,
      '--service-account-issuer=https://kubernetes.default.svc', `--service-account-signing-key-file=${keys.serviceAccountKey}`,
      `--service-account-key-file=${keys.serviceAccountPublic}`, '--authorization-mode=Node,RBAC', '--enable-admission-plugins=NodeRestriction',
      '--allow-privileged=true', '--kubelet-preferred-address-types=InternalIP', '--kubelet-timeout=20s',
    ]);
    await until('The API server', async () => (await this.kubectl(['get', '--raw', '/readyz'])) === 'ok');
    this.#service('kube-controller-manager', tool('kube-controller-manager'), [
      `--kubeconfig=${this.#tokens.paths['controller-manager']}`, `--service-account-private-key-file=${keys.serviceAccountKey}`, `--root-ca-file=${keys.ca}`,
      '--node-monitor-grace-period=24s', '--use-service-account-credentials', '--leader-elect=false', '--controllers=*', '--kube-api-qps=100', '--kube-api-burst=200',
    ]);
    this.#service('kube-scheduler', tool('kube-scheduler'), [`--kubeconfig=${this.#tokens.paths.scheduler}`, '--leader-elect=false']);
  }

  #service(name, command, args) {
    const child = start(command, args, join(this.logDirectory, `${name}.log`));
    this.#children.push(child);
    return child;
  }

  // ------------------------------------------------------------------------------------------ nodes

  /** Its directory, with all that a node keeps over a restart. */
  #makeNode(index) {
    const name = `node-${index}`;
    const directory = join(this.#directory, name);
    mkdirSync(join(directory, 'cni'), { recursive: true });
    this.#makeCgroups(name);
    const write = (file, value) => writeFileSync(join(directory, file), typeof value === 'string' ? value : JSON.stringify(value));
    write('machine-id', `${randomUUID().replaceAll('-', '')}\n`);
    write('kubeconfig', readFileSync(this.#tokens.paths[name], 'utf8'));
    write('containerd.toml', containerdConfig(directory));
    write('cni/10-lab.conflist', cniConfig(index));
    write('kubelet.json', kubeletConfig(name));
    write('proxy.json', {
      apiVersion: 'kubeproxy.config.k8s.io/v1alpha1',
      kind: 'KubeProxyConfiguration',
      mode: 'iptables',
      clientConnection: { kubeconfig: this.#tokens.paths.proxy },
      conntrack: { maxPerCore: 0, min: 0, tcpEstablishedTimeout: '0s', tcpCloseWaitTimeout: '0s' },
      hostnameOverride: name,
    });
    return { index, name, directory, address: `10.77.0.${10 + index}` };
  }

  #startNode(node) {
    const { index, name, directory, address } = node;
    const images = index === 1 ? this.#images : this.#images.filter((path) => !onFirstNode.includes(basename(path, '.tar')));
    node.child = start(
      'nsenter',
      [`--net=/run/netns/${name}`, 'unshare', '--mount', '--pid', '--uts', '--fork', '--mount-proc', '--kill-child', 'bash', nodeScript,
        directory, name, address, lab, dirname(tool('kubelet')), ...images],
      join(this.logDirectory, `${name}.log`),
    );
  }

  /**
   * A power cut: every process of the node ends at once. What its own kernel would have taken with it, and this one keeps, is taken away: devices
   * whose engine is gone, and cgroups (a kubelet that boots spends 3 s on each of a container that is gone).
   */
  async killNode(node) {
    const connections = fuseConnections(processesBelow(node.child.pid));
    const ended = new Promise((done) => node.child.once('exit', done));
    for (const pid of childrenOf(node.child.pid)) process.kill(pid, 'SIGKILL');
    abortConnections(connections);
    await ended;
    await until(`the devices of ${node.name} to be gone`, () => {
      detach(loopsOver(connections));
      return loopsOver(connections).length === 0;
    });
    await until(`the cgroups of ${node.name} to be empty`, () => removeCgroups(node.name));
  }

  /** Starts a node that was killed, as a machine that boots: with its disk and its name, without anything that it had in memory. */
  async bootNode(node) {
    const began = Date.now();
    await run('ip', ['link', 'delete', `veth${node.index}`]);
    await run('ip', ['netns', 'delete', node.name]);
    await this.#plugIn(node.index);
    this.#makeCgroups(node.name);
    this.#startNode(node);
    await until(
      `the kubelet of ${node.name} to be back`,
      async () => Date.parse((await this.get('lease', node.name, '--namespace', 'kube-node-lease')).spec.renewTime) > began,
      { everyMs: 500 },
    );
    await this.untilReady(node);
  }

  /** Takes the node off the network: it runs on. */
  async cutNode(node) {
    await run('ip', ['link', 'set', `veth${node.index}`, 'down']);
  }

  async joinNode(node) {
    await run('ip', ['link', 'set', `veth${node.index}`, 'up']);
  }

  /** cgroup v1: a root for each kubelet in every hierarchy; in that of cpusets a new group has no CPU before it is given some. */
  #makeCgroups(name) {
    for (const hierarchy of cgroupHierarchies().filter((path) => existsSync(join(path, 'tasks')))) {
      let path = hierarchy;
      for (const part of ['holdfast-e2e', name]) {
        const parent = path;
        path = join(path, part);
        mkdirSync(path, { recursive: true });
        for (const file of ['cpuset.cpus', 'cpuset.mems']) {
          if (existsSync(join(path, file))) writeFileSync(join(path, file), readFileSync(join(parent, file)));
        }
      }
    }
  }

  async untilReady(node) {
    await until(
      `${node.name} to be ready (${join(node.directory, 'log')})`,
      async () => {
        const { status } = await this.get('node', node.name);
        return status.conditions.some(({ type, status: is }) => type === 'Ready' && is === 'True');
      },
      { everyMs: 500 },
    );
  }

  // ------------------------------------------------------------------------------------------ kubectl

  get #env() {
    return { KUBECONFIG: this.#tokens.paths.admin, HOME: this.#directory };
  }

  kubectl(args, options) {
    return run(tool('kubectl'), args, { ...options, env: this.#env });
  }

  helm(args, options) {
    return run(tool('helm'), args, { ...options, env: this.#env });
  }

  /** A script in which kubectl and helm are those of this cluster. It ends at the first line that fails. */
  shell(script, options) {
    const path = `${dirname(tool('kubectl'))}:${process.env.PATH}`;
    return run('bash', ['-ec', script], { ...options, env: { ...this.#env, PATH: path } });
  }

  /** kubectl or helm with a command that waits by itself, for as long as specs do. */
  waiting(args, tool = 'kubectl') {
    return this[tool]([...args, '--timeout', `${patienceMs / 1000}s`], { timeoutMs: patienceMs + 10_000 });
  }

  /** Objects, by the words that kubectl would be given. One of those in `paths` costs a request, not a process: specs wait side by side. */
  async get(...args) {
    const [kind, name, ...more] = args;
    if (more.length > 0 || paths[kind] === undefined) return JSON.parse(await this.kubectl(['get', ...args, '-o', 'json']));
    return await this.#read(name === undefined ? paths[kind] : `${paths[kind]}/${name}`);
  }

  #read(path) {
    return new Promise((done, failed) => {
      const request = httpsGet(`${server}${path}`, { ...this.#admin, timeout: 10_000 }, (response) => {
        let said = '';
        response.setEncoding('utf8').on('data', (part) => (said += part)).on('error', failed).on('end', () => {
          if (response.statusCode === 200) done(JSON.parse(said));
          else failed(new Error(`GET ${path}: ${response.statusCode} ${said.slice(0, 500)}`));
        });
      });
      request.on('timeout', () => request.destroy(new Error(`GET ${path}: no answer within 10 s`)));
      request.on('error', failed);
    });
  }

  async apply(...objects) {
    await this.kubectl(['apply', '-f', '-'], { input: JSON.stringify({ apiVersion: 'v1', kind: 'List', items: objects }) });
  }

  /** Ends the nodes and the control plane. */
  down() {
    for (const node of this.nodes) node.child.kill('SIGKILL');
    for (const child of this.#children) child.kill('SIGKILL');
  }
}

function cgroupHierarchies() {
  return readdirSync('/sys/fs/cgroup')
    .map((name) => join('/sys/fs/cgroup', name))
    .filter((path) => existsSync(join(path, 'cgroup.procs')));
}

function containerdConfig(directory) {
  return `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "${sandboxImage}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "${directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
`;
}

function cniConfig(index) {
  return {
    cniVersion: '0.4.0',
    name: 'lab',
    plugins: [{ type: 'ptp', ipam: { type: 'host-local', dataDir: '/run/cni', subnet: `10.78.${index}.0/24`, routes: [{ dst: '0.0.0.0/0' }] } }],
  };
}

function kubeletConfig(name) {
  return {
    apiVersion: 'kubelet.config.k8s.io/v1beta1',
    kind: 'KubeletConfiguration',
    failCgroupV1: false,
    cgroupDriver: 'cgroupfs',
    cgroupRoot: `/holdfast-e2e/${name}`,
    enforceNodeAllocatable: [],
    makeIPTablesUtilChains: false,
    failSwapOn: false,
    localStorageCapacityIsolation: false,
    containerRuntimeEndpoint: 'unix:///run/containerd/containerd.sock',
    // A lab on one machine: the API server is the only one that can reach the kubelets.
    authentication: { anonymous: { enabled: true }, webhook: { enabled: false } },
    authorization: { mode: 'AlwaysAllow' },
    resolvConf: '',
    evictionHard: { 'memory.available': '50Mi', 'nodefs.available': '1%', 'nodefs.inodesFree': '1%', 'imagefs.available': '1%' },
    imageGCHighThresholdPercent: 100,
    nodeStatusUpdateFrequency: '2s',
    // A grown claim is noticed when its pod is looked at again: every minute and a half otherwise.
    syncFrequency: '5s',
    volumePluginDir: '/var/lib/kubelet/volume-plugins',
  };
}

/** Of one node, or all. Whether they are gone. */
export function removeCgroups(node = '') {
  const roots = cgroupHierarchies().map((hierarchy) => join(hierarchy, 'holdfast-e2e', node));
  for (const root of roots) removeCgroup(root);
  return !roots.some((root) => existsSync(root));
}

function removeCgroup(path) {
  if (!existsSync(path)) return;
  for (const entry of readdirSync(path, { withFileTypes: true })) {
    if (entry.isDirectory()) removeCgroup(join(path, entry.name));
  }
  try {
    rmdirSync(path);
  } catch {
    // something still runs in it; the caller looks again
  }
}
