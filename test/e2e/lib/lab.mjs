// The first process inside the lab's namespaces: brings the cluster up, runs the specs, writes the report. Whatever
// becomes of it, the processes of the cluster end with it.
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { Cluster } from './cluster.mjs';
import { Figures } from './figures.mjs';
import { Holdfast } from './holdfast.mjs';
import { loneSpecs, refusalSpecs, residueSpecs, sharedSpecs } from '../specs/index.mjs';

const { directory, device, images, report, only } = JSON.parse(process.argv[2]);

const figures = new Figures();
const state = { passed: 0, failed: 0, failures: [], unfinished: true, figures: figures.all };
function save() {
  writeFileSync(`${report}.new`, JSON.stringify(state));
  renameSync(`${report}.new`, report);
}

function tail(file, lines) {
  try {
    return readFileSync(file, 'utf8').trimEnd().split('\n').slice(-lines).join('\n');
  } catch {
    return '(no log)';
  }
}

async function attempt(name, body) {
  const started = performance.now();
  try {
    await body();
    state.passed += 1;
    console.log(`ok    ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)`);
    return true;
  } catch (error) {
    state.failed += 1;
    state.failures.push(`${name}: ${error.message.split('\n')[0]}`);
    console.log(`FAIL  ${name} (${((performance.now() - started) / 1000).toFixed(1)} s)\n${error.message.replace(/^/gm, '      ')}`);
    return false;
  } finally {
    save();
  }
}

execFileSync('mount', ['-t', 'tmpfs', 'tmpfs', '/run']);
mkdirSync('/run/lab');
const cluster = new Cluster(directory, images);
const holdfast = new Holdfast(cluster, device, directory);
process.once('SIGTERM', () => process.exit(143));
const isUp = await attempt('a cluster of three nodes comes up', () => cluster.up(3));
if (!isUp) for (const name of ['kube-apiserver', 'node-1']) console.log(tail(join(cluster.logDirectory, `${name}.log`), 20));
/** Those of a list whose names were asked for, so many at one time. */
async function attemptAll(list, explain, atOnce = 1) {
  const waiting = list.filter(({ name }) => new RegExp(only).test(name));
  const some = async () => {
    for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) {
      const { name, body } = next;
      if (!(await attempt(name, () => body({ cluster, holdfast, figures })))) await explain();
    }
  };
  await Promise.all(Array.from({ length: atOnce }, some));
}

const explain = async () => console.log(await holdfast.explain().catch((error) => error.message));
if (isUp) {
  state.kubernetes = JSON.parse(await cluster.kubectl(['version', '-o', 'json'])).serverVersion.gitVersion;
  await attemptAll(refusalSpecs, explain);
  if (await attempt('the lines of the README lead from a LUN to a running pod', async () => figures.record('readme_s', await holdfast.install(), { goal: 300 }))) {
    await attemptAll(sharedSpecs, explain, 3);
    // What a spec that failed has left must not fail those that follow; nothing runs beside these.
    const sweep = () => holdfast.sweep().catch((error) => console.log(`      ${error.message}`));
    if (state.failed > 0) await sweep();
    await attemptAll(loneSpecs, () => explain().then(sweep));
    await attempt('helm uninstalls the chart, and no volume is left open', () => holdfast.uninstall());
    await attemptAll(residueSpecs, explain);
  } else {
    await explain();
  }
}
state.unfinished = false;
save();
cluster.down();
// Not before everything is written: what fails has much to say.
process.stdout.write('', () => process.exit(0));
