// Assembles the images of Holdfast from the sources, the built addon and keeper, and this machine's programs and libraries: as OCI archives
// for the end-to-end tests and for machines without Docker, or as the directories of their layers for the Dockerfile.
//
//   node tools/images.mjs --out DIR [--tag TAG] [--registry NAME] [--node PROGRAM]
//   node tools/images.mjs --roots DIR [--node PROGRAM]
//
// --node names the Node.js that goes in (default: the one that runs this): the addon of the metadata service's database is built for
// one version of it.
import { execFileSync } from 'node:child_process';
import { copyFileSync, cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { bundle } from './bundle.mjs';
import { copyFromHost, librariesOf, makeRoot, writeImage } from './oci.mjs';

const top = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const version = /^appVersion: (.+)$/m.exec(readFileSync(join(top, 'charts/holdfast/Chart.yaml'), 'utf8'))[1];
const { values } = parseArgs({
  options: {
    out: { type: 'string' },
    roots: { type: 'string' },
    tag: { type: 'string', default: version },
    registry: { type: 'string', default: 'ghcr.io/holdfast' },
    node: { type: 'string', default: process.execPath },
  },
});
if ((values.out === undefined) === (values.roots === undefined)) {
  console.error('Usage: node tools/images.mjs --out DIR [--tag TAG] [--registry NAME] [--node PROGRAM], or --roots DIR [--node PROGRAM]');
  process.exit(2);
}

const fileSystemTools = [
  'mke2fs', 'mkfs.ext4', 'e2fsck', 'fsck.ext4', 'resize2fs', 'tune2fs', 'dumpe2fs',
  'mkfs.xfs', 'xfs_repair', 'xfs_growfs', 'xfs_logprint', 'xfs_db', 'xfs_io',
  'mkfs.btrfs', 'btrfs', 'mount', 'umount', 'findmnt', 'blkid', 'blkdiscard', 'blockdev', 'fallocate', 'fsfreeze', 'fstrim', 'losetup', 'lsblk',
];

/** The path of a program on this machine. */
function which(name) {
  const found = ['/usr/sbin', '/usr/bin', '/sbin', '/bin'].map((d) => join(d, name)).find((path) => existsSync(path));
  if (found === undefined) throw new Error(`${name} is not installed here; make e2e-tools installs what the images need.`);
  return found;
}

function appDirectory(root) {
  const app = join(root, 'opt/holdfast');
  mkdirSync(app, { recursive: true });
  writeFileSync(join(app, 'package.json'), '{"type":"module"}\n');
  copyFileSync(join(top, 'LICENSE'), join(app, 'LICENSE'));
  return app;
}

/** better-sqlite3 is CommonJS with an addon: the three packages as they are, without sources. */
function copySqlite(app) {
  const from = createRequire(join(top, 'packages/metadata-service/package.json'));
  const sqlite = dirname(from.resolve('better-sqlite3/package.json'));
  const inside = createRequire(join(sqlite, 'package.json'));
  const modules = join(app, 'node_modules');
  for (const part of ['package.json', 'lib', 'LICENSE', 'build/Release/better_sqlite3.node']) {
    cpSync(join(sqlite, part), join(modules, 'better-sqlite3', part), { recursive: true, dereference: true });
  }
  const bindings = inside.resolve('bindings');
  for (const [name, main] of [['bindings', bindings], ['file-uri-to-path', createRequire(bindings).resolve('file-uri-to-path')]]) {
    cpSync(dirname(main), join(modules, name), { recursive: true, dereference: true });
  }
}

const work = values.roots === undefined ? mkdtempSync(join(tmpdir(), 'holdfast-images-')) : resolve(values.roots);
try {
  const layer = (name) => {
    const directory = join(work, name);
    mkdirSync(directory, { recursive: true });
    return directory;
  };

  const base = layer('base');
  makeRoot(base);
  copyFromHost(base, librariesOf(values.node));
  const nodeAt = join(base, 'usr/bin/node');
  copyFileSync(values.node, nodeAt);
  execFileSync('chmod', ['0755', nodeAt]);

  const metadata = layer('metadata-service');
  const metadataApp = appDirectory(metadata);
  await bundle(join(top, 'packages/metadata-service/src/main.ts'), join(metadataApp, 'metadata-service.js'));
  copySqlite(metadataApp);

  const controller = layer('csi-controller');
  await bundle(join(top, 'packages/csi-controller/src/main.ts'), join(appDirectory(controller), 'csi-controller.js'));

  const tools = layer('node-tools');
  copyFromHost(tools, [...fileSystemTools.map(which), '/etc/mke2fs.conf'], [base]);
  mkdirSync(join(tools, 'run/mount'), { recursive: true });

  const node = layer('node');
  const nodeApp = appDirectory(node);
  await bundle(join(top, 'packages/csi-node/src/agent/main.ts'), join(nodeApp, 'agent.js'));
  await bundle(join(top, 'packages/csi-node/src/csi/main.ts'), join(nodeApp, 'csi-node.js'));
  await bundle(join(top, 'packages/cli/src/main.ts'), join(nodeApp, 'holdfast.js'));
  writeFileSync(join(nodeApp, 'holdfast.js'), `#!/usr/bin/node\n${readFileSync(join(nodeApp, 'holdfast.js'), 'utf8')}`, { mode: 0o755 });
  const built = join(top, 'native/build/Release');
  copyFileSync(join(built, 'holdfast.node'), join(nodeApp, 'holdfast.node'));
  mkdirSync(join(node, 'usr/bin'), { recursive: true });
  copyFileSync(join(built, 'holdfast-keeper'), join(node, 'usr/bin/holdfast-keeper'));
  execFileSync('chmod', ['0755', join(node, 'usr/bin/holdfast-keeper'), join(nodeApp, 'holdfast.js')]);
  symlinkSync('/opt/holdfast/holdfast.js', join(node, 'usr/bin/holdfast'));
  copyFromHost(node, librariesOf(join(built, 'holdfast.node'), join(built, 'holdfast-keeper')), [base, tools]);

  if (values.roots === undefined) writeImages({ base, metadata, controller, tools, node });
} finally {
  if (values.roots === undefined) rmSync(work, { recursive: true, force: true });
}

function writeImages({ base, metadata, controller, tools, node }) {
  const path = 'PATH=/usr/sbin:/usr/bin:/sbin:/bin';
  const images = [
    { name: 'metadata-service', layers: [base, metadata], user: '65532:65532', entrypoint: ['node', '/opt/holdfast/metadata-service.js'], what: 'The authority of a Holdfast cluster' },
    { name: 'csi-controller', layers: [base, controller], user: '65532:65532', entrypoint: ['node', '/opt/holdfast/csi-controller.js'], what: 'CSI controller of Holdfast' },
    { name: 'node', layers: [base, tools, node], user: '0:0', entrypoint: ['node', '/opt/holdfast/agent.js'], env: ['HOLDFAST_NATIVE=/opt/holdfast/holdfast.node'], what: 'Keeper, agent, CSI node plugin and command line of Holdfast' },
  ];
  for (const { name, layers, user, entrypoint, env = [], what } of images) {
    const output = join(resolve(values.out), `${name}.tar`);
    const bytes = writeImage({
      reference: `${values.registry}/${name}:${values.tag}`,
      layers,
      config: {
        User: user,
        Env: [path, 'NODE_ENV=production', ...env],
        Entrypoint: entrypoint,
        WorkingDir: '/',
        Labels: {
          'org.opencontainers.image.title': `holdfast-${name}`,
          'org.opencontainers.image.description': what,
          'org.opencontainers.image.version': version,
          'org.opencontainers.image.licenses': 'Apache-2.0',
        },
      },
      output,
    });
    console.log(`${values.registry}/${name}:${values.tag}\t${(bytes / 1e6).toFixed(1)} MB\t${output}`);
  }
}
