// End-to-end tests in a real Kubernetes: `make e2e`, or `node test/e2e/run.mjs [--only PATTERN] [--keep]`.
//
// This process is the watchdog. The cluster runs in a lab (lib/lab.mjs): namespaces whose first process takes everything with it.
// When the lab ends, overruns, or this process is interrupted, what it left in the kernel is taken away here and nothing else;
// what could not be taken away is a failure of its own. The last line is "N passed, N failed".
import { execFileSync, spawn } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { removeCgroups } from './lib/cluster.mjs';
import { keepFigures } from './lib/figures.mjs';
import { buildTestImages } from './lib/images.mjs';
import { abortConnections, childrenOf, detach, fuseConnections, loopsOf, processesBelow, readSettings, restoreSettings } from './lib/residue.mjs';
import { sleep, until } from './lib/shell.mjs';
import { tool } from './lib/tools.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const { values } = parseArgs({
  options: {
    only: { type: 'string', default: '' },
    keep: { type: 'boolean', default: false },
    minutes: { type: 'string', default: '15' },
    // What runs in the namespaces: the specs of this folder, or (conformance/lab.mjs) those of Kubernetes.
    lab: { type: 'string', default: 'lib/lab.mjs' },
  },
});

function end(passed, failed) {
  console.log(`${passed} passed, ${failed} failed`);
  process.exit(failed > 0 || passed === 0 ? 1 : 0);
}

if (process.getuid() !== 0) {
  console.error('The end-to-end tests make namespaces, loop devices and mounts and need root. Run them again with sudo.');
  end(0, 1);
}
for (const name of ['helm', 'kube-apiserver', 'kubelet', 'csi-provisioner']) {
  try {
    tool(name);
  } catch (error) {
    console.error(error.message);
    end(0, 1);
  }
}

const directory = mkdtempSync(join(tmpdir(), 'holdfast-e2e-'));
const settings = readSettings();
const connections = new Set();
// The standard paths, which each node covers with directories of its own.
const mountPoints = ['/var/lib/kubelet', '/var/lib/containerd', '/var/lib/holdfast'].filter((path) => !existsSync(path));
for (const path of mountPoints) mkdirSync(path, { recursive: true });

let lab;
const remember = () => {
  if (lab?.pid !== undefined) for (const connection of fuseConnections(processesBelow(lab.pid))) connections.add(connection);
};

/** Kills the first process inside; `unshare` ends when the kernel has ended all others of its namespace. */
async function endLab() {
  const ended = () => lab.exitCode !== null || lab.signalCode !== null;
  if (!ended()) {
    for (const pid of childrenOf(lab.pid)) process.kill(pid, 'SIGKILL');
  }
  await until('the processes of the lab to end', ended, { timeoutMs: 30_000 });
}

async function cleanUp() {
  const left = [];
  remember();
  abortConnections(connections);
  if (lab !== undefined) await endLab().catch((error) => left.push(error.message));
  await until(
    'loop devices to be free',
    () => {
      detach(loopsOf(connections, directory));
      return loopsOf(connections, directory).length === 0;
    },
    { timeoutMs: 20_000 },
  ).catch(() => left.push(`loop devices ${loopsOf(connections, directory).join(', ')}`));
  await until('cgroups to be empty', removeCgroups, { timeoutMs: 10_000 }).catch((error) => left.push(error.message));
  restoreSettings(settings);
  for (const path of mountPoints) {
    try {
      rmdirSync(path);
    } catch {
      // somebody else uses it by now
    }
  }
  if (values.keep) console.log(`Kept: ${directory}`);
  else rmSync(directory, { recursive: true, force: true });
  return left;
}

for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, () => {
    void cleanUp().then(() => process.exit(130));
  });
}

const report = join(directory, 'report.json');
let outcome = { passed: 0, failed: 1 };
try {
  const images = await buildTestImages();
  const disk = join(directory, 'disk.img');
  writeFileSync(disk, '');
  truncateSync(disk, 32 * 2 ** 30);
  const device = execFileSync('losetup', ['--find', '--show', '--direct-io=on', disk], { encoding: 'utf8' }).trim();
  lab = spawn(
    'unshare',
    ['--mount', '--net', '--pid', '--fork', '--mount-proc', '--kill-child', '--propagation', 'private', process.execPath, join(here, values.lab),
      JSON.stringify({ directory, device, images, report, only: values.only })],
    { stdio: 'inherit', detached: true },
  );
  const ended = new Promise((done) => lab.once('exit', done));
  const watch = setInterval(remember, 2000);
  const overrun = await Promise.race([ended.then(() => false), sleep(Number(values.minutes) * 60_000, true, { ref: false })]);
  clearInterval(watch);
  if (overrun) console.error(`The end-to-end tests took more than ${values.minutes} minutes and were ended.`);
  if (existsSync(report)) outcome = JSON.parse(readFileSync(report, 'utf8'));
  if (overrun || outcome.unfinished) outcome.failed += 1;
} catch (error) {
  console.error(error.message);
}
const left = await cleanUp();
if (values.only === '' && outcome.figures !== undefined && !outcome.unfinished) keepFigures(join(here, 'results/latest.json'), outcome);
for (const what of outcome.failures ?? []) console.error(`Failed: ${what}`);
for (const what of left) console.error(`Left behind: ${what}`);
end(outcome.passed, outcome.failed + left.length);
