// The first process inside the lab of `make conformance`: the cluster and the chart of the end-to-end tests, then Kubernetes' own storage
// specs against them. run.mjs of the end-to-end tests is the watchdog of this too.
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Cluster } from '../lib/cluster.mjs';
import { Holdfast } from '../lib/holdfast.mjs';
import { start } from '../lib/shell.mjs';
import { tool } from '../lib/tools.mjs';
import { buildConformanceImages } from './images.mjs';
import { inWords, summaryOf } from './summary.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const { directory, device, images, report, only } = JSON.parse(process.argv[2]);
/** Each is a process of its own with a part of the specs, by the name of their suite: so several run at one time. */
const parts = [
  'subPath|volumeMode|volumes |fsgroupchangepolicy|read-write-once-pod',
  'provisioning|snapshottable|volume-expand|topology|capacity|multiVolume|volumeIO|ephemeral|stress',
];
/** Tests that want hours, other clouds, or to break nodes in ways of their own. */
const leftOut = String.raw`\[Disruptive\]|\[Serial\]|\[Slow\]|\[Feature:Windows\]|\[Feature:VolumeAttributesClass\]|\[Feature:SELinux`;

function save(state) {
  writeFileSync(`${report}.new`, JSON.stringify(state));
  renameSync(`${report}.new`, report);
}

/** The definition with the key that this pool's nodes have. */
async function driverFile(cluster) {
  const { spec } = await cluster.get('csinode', 'node-1');
  const [key] = spec.drivers.find(({ name }) => name === 'csi.holdfast.io').topologyKeys;
  const file = join(directory, 'driver.yaml');
  writeFileSync(file, `${readFileSync(join(here, 'driver.yaml'), 'utf8').trimEnd()}\n  TopologyKeys: [${key}]\n`);
  return file;
}

function runPart(part, index, driver) {
  const json = join(directory, `specs-${index}.json`);
  const args = [
    `--storage.testdriver=${driver}`, `--kubeconfig=${join(directory, 'pki/admin.kubeconfig')}`, `--kubectl-path=${tool('kubectl')}`,
    '--provider=skeleton', '--dump-logs-on-failure=false', `--ginkgo.focus=External.Storage.*(${only || part})`, `--ginkgo.skip=${leftOut}`,
    `--ginkgo.json-report=${json}`, '--ginkgo.timeout=2h', '--ginkgo.no-color', '--ginkgo.v',
  ];
  const child = start(tool('storage-conformance'), args, join(directory, `log/conformance-${index}.log`), { env: { HOME: directory } });
  return new Promise((done) => child.once('exit', () => done(json)));
}

execFileSync('mount', ['-t', 'tmpfs', 'tmpfs', '/run']);
mkdirSync('/run/lab');
const cluster = new Cluster(directory, [...images, ...buildConformanceImages()]);
const holdfast = new Holdfast(cluster, device, directory);
process.once('SIGTERM', () => process.exit(143));
try {
  await cluster.up(3);
  await holdfast.install();
  const driver = await driverFile(cluster);
  const reports = await Promise.all((only === '' ? parts : [only]).map((part, index) => runPart(part, index, driver)));
  const summary = summaryOf(reports);
  console.log(inWords(summary));
  if (only === '') {
    const { gitVersion } = JSON.parse(await cluster.kubectl(['version', '-o', 'json'])).serverVersion;
    const about = { date: new Date().toISOString().slice(0, 10), kubernetes: gitVersion, left_out: leftOut };
    writeFileSync(join(here, '../results/conformance.json'), `${JSON.stringify({ ...about, ...summary }, null, 2)}\n`);
  }
  save({ passed: summary.passed, failed: summary.failed, unfinished: false });
} catch (error) {
  console.error(error.message);
  console.log(await holdfast.explain().catch((reason) => reason.message));
  save({ passed: 0, failed: 1, unfinished: false });
}
cluster.down();
process.exit(0);
