// Makes a node image for kind without a container registry: Debian's packages, kind's own files (from its Go module), and Kubernetes' programs,
// which also become the images of the control plane and of the sidecars that a node finds in its containerd.
//
//   node deploy/kind/node-image/build.mjs [--tag NAME] [--work DIR]
//
// Needs root, docker, debootstrap, Go, and what `make e2e-tools` builds. README.md one directory up says what differs from kind's image.
import { execFileSync } from 'node:child_process';
import { appendFileSync, chmodSync, copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, realpathSync, rmdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { sidecars } from '../../../test/e2e/lib/images.mjs';
import { cache, tool, top } from '../../../test/e2e/lib/tools.mjs';
import { bundle } from '../../../tools/bundle.mjs';
import { addBusybox, addProgram, copyFromHost, makeRoot, writeImage } from '../../../tools/oci.mjs';

const { values } = parseArgs({
  options: { tag: { type: 'string', default: 'holdfast.test/kind-node:1' }, work: { type: 'string', default: join(cache, 'kind-node') } },
});
const here = dirname(fileURLToPath(import.meta.url));
const work = resolve(values.work);
const root = join(work, 'root');
const bin = join(work, 'bin');
const archives = join(work, 'images');

/** Debian 12: the last whose systemd runs on cgroup v1 too. The packages are those of kind's own base image, and its container runtime. */
const suite = 'bookworm';
const packages = [
  'systemd', 'systemd-sysv', 'dbus', 'containerd', 'runc', 'containernetworking-plugins', 'conntrack', 'iptables', 'nftables', 'iproute2', 'ethtool',
  'util-linux', 'mount', 'kmod', 'e2fsprogs', 'ca-certificates', 'curl', 'jq', 'procps', 'hostname',
];
const versions = { kind: 'v0.33.0', etcd: 'v3.6.8', coredns: 'v1.14.2' };
const kubernetes = /^\s+k8s.io\/kubernetes (v\S+)$/m.exec(readFileSync(join(top, 'test/e2e/tools/go.mod'), 'utf8'))[1];

const run = (command, args, options = {}) => execFileSync(command, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'], ...options });
/** With what it says on stderr only if it fails. */
const quietly = (command, args, options = {}) => run(command, args, { stdio: 'pipe', ...options });
const say = (what) => console.log(`node-image: ${what}`);

if (process.getuid() !== 0) throw new Error('debootstrap and containerd need root. Run it again with sudo.');
for (const directory of [bin, archives]) mkdirSync(directory, { recursive: true });
const kindFiles = join(JSON.parse(run('go', ['mod', 'download', '-json', `sigs.k8s.io/kind@${versions.kind}`])).Dir, 'images/base/files');
buildPrograms();
makeNodeRoot();
const pause = await makeImages();
fillNodeRoot(pause);
importImages();
say(`docker import ${values.tag}`);
run('sh', ['-c', 'tar --create --numeric-owner --directory="$1" . | docker import --change \'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]\' --change "ENV container=docker" --change "STOPSIGNAL SIGRTMIN+3" - "$2"', 'sh', root, values.tag]);
for (const made of [root, archives, join(work, 'go')]) rmSync(made, { recursive: true, force: true });
say(`made ${values.tag}. HOLDFAST_KIND_IMAGE=${values.tag} make kind-up`);

// ---------------------------------------------------------------------------------------------- programs

/** kubeadm is of the end-to-end tests' module; the other two have dependencies of their own. */
function buildPrograms() {
  const flags = `-s -w -X k8s.io/component-base/version.gitVersion=${kubernetes} -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=${kubernetes.split('.')[1]}`;
  build('kubeadm', kubernetes, (directory) => {
    for (const name of ['go.mod', 'go.sum']) copyFileSync(join(top, 'test/e2e/tools', name), join(directory, name));
    return 'k8s.io/kubernetes/cmd/kubeadm';
  }, flags);
  for (const [name, module] of [['etcd', 'go.etcd.io/etcd/server/v3'], ['coredns', 'github.com/coredns/coredns']]) {
    build(name, versions[name], (directory) => {
      quietly('go', ['mod', 'init', name], { cwd: directory });
      quietly('go', ['get', `${module}@${versions[name]}`], { cwd: directory });
      return module;
    });
  }
}

function build(name, version, prepare, flags = '-s -w') {
  const stamp = join(bin, `.${name}-${version}`);
  if (existsSync(stamp)) return;
  say(`building ${name} ${version}`);
  const directory = join(work, 'go', name);
  rmSync(directory, { recursive: true, force: true });
  mkdirSync(directory, { recursive: true });
  const from = prepare(directory);
  run('go', ['build', '-trimpath', '-buildvcs=false', '-ldflags', flags, '-o', join(bin, name), from], { cwd: directory, env: { ...process.env, CGO_ENABLED: '0', GOFLAGS: '-mod=mod' } });
  writeFileSync(stamp, '');
}

// ---------------------------------------------------------------------------------------------- the node's root

function makeNodeRoot() {
  const base = join(work, `${suite}.tar`);
  if (!existsSync(base)) {
    say(`debootstrap ${suite}`);
    rmSync(root, { recursive: true, force: true });
    run('debootstrap', ['--variant=minbase', `--include=${packages.join(',')}`, suite, root], { stdio: ['ignore', 'ignore', 'inherit'] });
    for (const name of ['var/cache/apt/archives', 'var/lib/apt/lists', 'usr/share/doc', 'usr/share/man', 'usr/share/locale']) emptyDirectory(join(root, name), /^copyright$/);
    run('tar', ['--create', '--numeric-owner', `--file=${base}.new`, `--directory=${root}`, '.']);
    run('mv', [`${base}.new`, base]);
  }
  rmSync(root, { recursive: true, force: true });
  mkdirSync(root, { recursive: true });
  run('tar', ['--extract', '--numeric-owner', `--file=${base}`, `--directory=${root}`]);
}

/** Takes away what is in a directory, but for files whose names match. */
function emptyDirectory(directory, but) {
  for (const entry of existsSync(directory) ? readdirSync(directory, { withFileTypes: true }) : []) {
    const path = join(directory, entry.name);
    if (entry.isDirectory()) emptyDirectory(path, but);
    else if (!but.test(entry.name)) rmSync(path);
  }
}

/** What kind's own Dockerfile does. */
function fillNodeRoot(pause) {
  say("kind's files");
  const inRoot = (...args) => quietly('chroot', [root, ...args]);
  run('cp', ['--recursive', '--no-preserve=mode,ownership', `${kindFiles}/.`, root]);
  for (const directory of ['usr/local/bin', 'kind/bin']) for (const name of readdirSync(join(root, directory))) chmodSync(join(root, directory, name), 0o755);
  for (const name of ['usr/bin/containerd', 'usr/bin/ctr']) symlinkSync(`/${name}`, join(root, 'usr/local/bin', basename(name)));
  for (const name of ['kubelet', 'kubectl']) addProgram(tool(name), join(root, 'usr/bin', name));
  addProgram(join(bin, 'kubeadm'), join(root, 'usr/bin/kubeadm'));
  mkdirSync(join(root, 'opt/cni/bin'), { recursive: true });
  for (const name of readdirSync(join(root, 'usr/lib/cni'))) symlinkSync(`/usr/lib/cni/${name}`, join(root, 'opt/cni/bin', name));
  for (const name of ['etc/kubernetes/manifests', 'etc/kubernetes/kubelet.d', 'etc/cni/net.d', 'kind/manifests', 'LICENSES']) mkdirSync(join(root, name), { recursive: true });

  inRoot('sh', '-euc', `
    rm -f /lib/systemd/system/multi-user.target.wants/* /etc/systemd/system/*.wants/* /lib/systemd/system/local-fs.target.wants/*
    rm -f /lib/systemd/system/sockets.target.wants/*udev* /lib/systemd/system/sockets.target.wants/*initctl* /lib/systemd/system/basic.target.wants/*
    rm -f /lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service
    echo ReadKMsg=no >>/etc/systemd/journald.conf
    systemctl enable kubelet.service containerd.service undo-mount-hacks.service
    systemctl mask systemd-binfmt.service
    ctr oci spec | jq '.hooks.createContainer[.hooks.createContainer | length] |= . + {"path": "/kind/bin/mount-product-files.sh"} | del(.process.rlimits)' >/etc/containerd/cri-base.json
  `);
  // Where this machine may not lower a process' score for the kernel's out-of-memory killer, containers start all the same.
  const config = readFileSync(join(root, 'etc/containerd/config.toml'), 'utf8');
  writeFileSync(
    join(root, 'etc/containerd/config.toml'),
    config.replace(/sandbox_image = ".*"/, `sandbox_image = "${pause}"`).replace('restrict_oom_score_adj = false', 'restrict_oom_score_adj = true'),
  );
  // Kubernetes 1.35 and later start on cgroup v1 only when told to.
  appendFileSync(join(root, 'etc/default/kubelet'), ' --config-dir=/etc/kubernetes/kubelet.d\n');
  writeFileSync(join(root, 'etc/kubernetes/kubelet.d/10-cgroup.conf'), 'apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\nfailCgroupV1: false\n');
  writeFileSync(join(root, 'kind/version'), kubernetes);
  copyFileSync(join(here, 'network.yaml'), join(root, 'kind/manifests/default-cni.yaml'));
  // kind applies something here; its own image has a provisioner of local directories.
  writeFileSync(join(root, 'kind/manifests/default-storage.yaml'), 'apiVersion: v1\nkind: Namespace\nmetadata: { name: local-path-storage }\n');
}

// ---------------------------------------------------------------------------------------------- images

/** The archives of all images that a cluster of this needs. Returns the name of the sandbox's. */
async function makeImages() {
  emptyDirectory(archives, /^$/);
  const wanted = quietly(join(bin, 'kubeadm'), ['config', 'images', 'list', '--kubernetes-version', kubernetes]).trim().split('\n');
  const named = (name) => wanted.find((image) => image.includes(`/${name}:`));
  const program = (path, name = basename(path)) => (directory) => {
    addProgram(path, join(directory, 'usr/local/bin', name));
    return { Entrypoint: [`/usr/local/bin/${name}`] };
  };
  for (const name of ['kube-apiserver', 'kube-controller-manager', 'kube-scheduler']) image(named(name), program(tool(name)));
  for (const name of ['etcd', 'coredns']) image(named(name), program(join(bin, name)));
  image(named('kube-proxy'), (directory) => {
    program(tool('kube-proxy'))(directory);
    const extensions = realpathSync(run('sh', ['-c', 'ls -d /usr/lib/*/xtables']).trim());
    copyFromHost(directory, ['/usr/sbin/xtables-nft-multi', ...readdirSync(extensions).filter((name) => name.endsWith('.so')).map((name) => join(extensions, name))]);
    for (const name of ['iptables', 'ip6tables'].flatMap((n) => [n, `${n}-save`, `${n}-restore`])) symlinkSync('xtables-nft-multi', join(directory, 'usr/sbin', name));
    return { Entrypoint: ['/usr/local/bin/kube-proxy'] };
  });
  image(named('pause'), (directory) => {
    addBusybox(directory, ['sleep']);
    return { Entrypoint: ['/usr/bin/sleep', '2147483647'] };
  });
  image('holdfast.test/kind-network:1', (directory) => {
    addBusybox(directory, ['sh', 'cat', 'ip', 'mv', 'sleep']);
    return program(tool('kubectl'))(directory);
  });

  // The sidecars, under the names that the chart gives them.
  const chart = readFileSync(join(top, 'charts/holdfast/values.yaml'), 'utf8');
  const sidecar = (name) => new RegExp(`image: "?(\\S+/${name}:[^"\\s]+)`).exec(chart)[1];
  for (const name of sidecars) image(sidecar(name), program(tool(name)));
  // These two are not to be had as Go modules.
  for (const [name, standIn] of [['csi-node-driver-registrar', 'registrar-stand-in'], ['livenessprobe', 'livenessprobe-stand-in']]) {
    const file = join(work, `${standIn}.mjs`);
    await bundle(join(top, `test/e2e/stand-ins/${standIn}.mjs`), file);
    image(sidecar(name), (directory) => {
      copyFromHost(directory, [process.execPath]);
      copyFileSync(file, join(directory, `${standIn}.mjs`));
      return { Entrypoint: [process.execPath, `/${standIn}.mjs`] };
    });
  }
  return named('pause');
}

function image(reference, fill) {
  say(reference);
  const directory = join(work, 'image');
  rmSync(directory, { recursive: true, force: true });
  makeRoot(directory);
  const config = fill(directory);
  const output = join(archives, `${basename(reference).replaceAll(':', '-')}.tar`);
  writeImage({ reference, layers: [directory], config: { Env: ['PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'], WorkingDir: '/', ...config }, output });
  rmSync(directory, { recursive: true });
}

/** Into the node's containerd; a node unpacks an image when it first uses it. */
function importImages() {
  say('images into containerd');
  mkdirSync(join(root, 'kind/images'));
  run('mount', ['--bind', archives, join(root, 'kind/images')]);
  try {
    run('unshare', ['--mount', '--pid', '--fork', '--kill-child', 'chroot', root, 'sh', '-euc', `
      mount -t proc proc /proc
      mount -t tmpfs tmpfs /run
      containerd --log-level fatal &
      until ctr --connect-timeout 1s version >/dev/null 2>&1; do sleep 0.2; done
      for archive in /kind/images/*.tar; do ctr --namespace k8s.io images import --no-unpack "$archive" >/dev/null; done
    `]);
  } finally {
    run('umount', [join(root, 'kind/images')]);
  }
  rmdirSync(join(root, 'kind/images'));
}
