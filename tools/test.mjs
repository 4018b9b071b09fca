// Runs the test suites one after another and prints one count for all: the last line is "N passed, N failed".
//
//   node tools/test.mjs                         unit, native, crash (bounded), integration, csi-sanity
//   node tools/test.mjs crash --seeds 1..1000   the format crash test alone
//   node tools/test.mjs sanitize                native tests under ASan/UBSan and TSan, addon tests under ASan
//   node tools/test.mjs faults                  the long fault programs
//
// Every suite runs in its own process group with a time limit and a private TMPDIR. When one overruns, or leaves
// something behind, this process takes away what the suite made and nothing else: processes that carry the run's id in
// their environment, their FUSE connections, mounts below the TMPDIR, loop devices over files in it. What was left
// behind is a failure of its own.
import { spawn, execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const top = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const results = join(top, '.cache', 'test');
const jobs = String(availableParallelism());

if (process.getuid() !== 0) {
  console.error('The tests use real loop devices, FUSE and mounts and need root. Run them again with sudo.');
  console.log('0 passed, 1 failed');
  process.exit(1);
}

// ------------------------------------------------------------------------------------------------ residue

/** Pids whose environment carries this run's id. */
function processesOf(runId) {
  const marker = `HOLDFAST_TEST_RUN=${runId}\0`;
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name) && Number(name) !== process.pid)
    .filter((pid) => {
      try {
        return `${readFileSync(`/proc/${pid}/environ`, 'latin1')}\0`.includes(marker);
      } catch {
        return false;
      }
    })
    .map(Number);
}

function commandOf(pid) {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim();
  } catch {
    return '(ended)';
  }
}

/** FUSE connections that a process serves: /dev/fuse descriptors name theirs in fdinfo. */
function fuseConnectionsOf(pid) {
  const found = new Set();
  try {
    for (const fd of readdirSync(`/proc/${pid}/fdinfo`)) {
      const match = /^fuse_connection:\s*(\d+)$/m.exec(readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8'));
      if (match) found.add(match[1]);
    }
  } catch {
    // the process ended meanwhile
  }
  return [...found];
}

function mountsBelow(directory) {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => line.split(' ')[4]?.replace(/\\(\d{3})/g, (_, octal) => String.fromCharCode(parseInt(octal, 8))))
    .filter((path) => path !== undefined && `${path}/`.startsWith(`${directory}/`))
    .reverse();
}

function loops() {
  const found = new Map();
  for (const name of readdirSync('/sys/block').filter((n) => n.startsWith('loop'))) {
    try {
      found.set(name, readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8').trim());
    } catch {
      // not attached
    }
  }
  return found;
}

const quietly = (command, args) => {
  try {
    execFileSync(command, args, { stdio: 'ignore', timeout: 20_000 });
    return true;
  } catch {
    return false;
  }
};

/** Takes away what a suite left and says what it was. `before`: loop devices attached when the suite began. */
async function cleanUp(runId, directory, before) {
  const left = [];
  const pids = processesOf(runId);
  for (const pid of pids) {
    left.push(`process ${pid}: ${commandOf(pid).slice(0, 160)}`);
    for (const connection of fuseConnectionsOf(pid)) {
      try {
        writeFileSync(`/sys/fs/fuse/connections/${connection}/abort`, '1');
      } catch {
        // gone already
      }
    }
  }
  for (const pid of pids) {
    try {
      process.kill(pid, 'SIGKILL');
    } catch {
      // gone already
    }
  }
  if (pids.length > 0) await new Promise((done) => setTimeout(done, 1000));
  for (const mount of mountsBelow(directory)) {
    left.push(`mount ${mount}`);
    if (!quietly('umount', [mount])) quietly('umount', ['-l', mount]);
  }
  for (const [name, backing] of loops()) {
    const ours = backing.replace(/ \(deleted\)$/, '').startsWith(`${directory}/`) || backing.startsWith(`holdfast:${runId}`);
    if (ours && !before.has(name)) {
      left.push(`loop device /dev/${name} over ${backing}`);
      quietly('losetup', ['-d', `/dev/${name}`]);
    }
  }
  return left;
}

// ------------------------------------------------------------------------------------------------ running

let current;

/** Runs one command with its limit; resolves with {code, output, overrun}. Output goes to the terminal and a log. */
function run(name, command, args, { minutes, env = {}, cwd = top, show = true }) {
  return new Promise((done) => {
    const child = spawn(command, args, { cwd, env: { ...process.env, ...env }, detached: true, stdio: ['ignore', 'pipe', 'pipe'] });
    current = child;
    let output = '';
    let overrun = false;
    const take = (data) => {
      output += data;
      if (show) process.stdout.write(data);
    };
    child.stdout.on('data', take);
    child.stderr.on('data', take);
    const timer = setTimeout(() => {
      overrun = true;
      console.error(`\n${name}: still running after ${minutes} minutes; ending it`);
      try {
        process.kill(-child.pid, 'SIGKILL');
      } catch {
        // gone already
      }
    }, minutes * 60_000);
    const ended = (code) => {
      clearTimeout(timer);
      current = undefined;
      writeFileSync(join(results, `${name}.log`), output);
      done({ code: code ?? 1, output, overrun });
    };
    child.on('exit', (code) => setTimeout(() => ended(code), 100));
    child.on('error', (error) => {
      take(String(error));
      ended(1);
    });
  });
}

const total = { passed: 0, failed: 0, skipped: 0 };
const summary = [];

async function suite(name, minutes, body) {
  const runId = `${name}-${process.pid}-${Date.now()}`;
  const directory = mkdtempSync(join(tmpdir(), `holdfast-${name}-`));
  const before = loops();
  const started = Date.now();
  console.log(`\n=== ${name}`);
  let counts;
  try {
    counts = await body({ HOLDFAST_LOG_LEVEL: 'warn', TMPDIR: directory, HOLDFAST_TEST_RUN: runId }, minutes);
  } catch (error) {
    console.error(error);
    counts = { passed: 0, failed: 1, skipped: 0 };
  }
  const left = await cleanUp(runId, directory, before);
  if (left.length > 0) {
    console.error(`${name} left behind (taken away now):\n  ${left.join('\n  ')}`);
    counts.failed += 1;
  }
  rmSync(directory, { recursive: true, force: true });
  total.passed += counts.passed;
  total.failed += counts.failed;
  total.skipped += counts.skipped;
  summary.push({ name, ...counts, seconds: Math.round((Date.now() - started) / 1000) });
}

function vitestCounts(file, { code }) {
  let report;
  try {
    report = JSON.parse(readFileSync(file, 'utf8'));
  } catch {
    return { passed: 0, failed: 1, skipped: 0 };
  }
  // A file that fails to load has no failed test of its own, yet it failed.
  const brokenFiles = report.testResults.filter((r) => r.status === 'failed' && r.assertionResults.every((a) => a.status !== 'failed'));
  const failed = report.numFailedTests + brokenFiles.length;
  return {
    passed: report.numPassedTests,
    failed: failed === 0 && code !== 0 ? 1 : failed,
    skipped: report.numPendingTests + report.numTodoTests,
  };
}

const vitest = (name, args, extra = {}) =>
  async (env, minutes) => {
    const file = join(results, `${name}.json`);
    rmSync(file, { force: true });
    const outcome = await run(
      name,
      join(top, 'node_modules/.bin/vitest'),
      ['run', '--reporter=default', '--reporter=json', `--outputFile=${file}`, ...args],
      { minutes, env: { ...env, ...extra } },
    );
    return vitestCounts(file, outcome);
  };

/** Builds and runs the GoogleTest programs with plain cmake. */
function native(name, options, extra = {}, ctestArgs = []) {
  return async (env, minutes) => {
    const build = join(top, 'native', `build-${name}`);
    const configure = ['-S', join(top, 'native'), '-B', build, '-DHOLDFAST_TESTS=ON', '-DHOLDFAST_ADDON=OFF', ...options];
    for (const args of [configure, ['--build', build, '-j', jobs]]) {
      const built = await run(`${name}-build`, 'cmake', args, { minutes: 25, env, show: false });
      if (built.code !== 0) {
        console.error(built.output.slice(-8000));
        return { passed: 0, failed: 1, skipped: 0 };
      }
    }
    const outcome = await run(name, 'ctest', ['--test-dir', build, '--output-on-failure', '-j', jobs, '--progress', ...ctestArgs], {
      minutes,
      env: { ...env, ...extra },
      show: false,
    });
    const match = /(\d+) tests failed out of (\d+)/.exec(outcome.output);
    const skipped = (outcome.output.match(/\(Skipped\)|\*\*\*Skipped/g) ?? []).length;
    if (outcome.code !== 0 || !match) console.error(outcome.output.slice(-12_000));
    if (!match || Number(match[2]) === 0) return { passed: 0, failed: 1, skipped: 0 };
    const failed = Number(match[1]);
    return { passed: Number(match[2]) - failed - skipped, failed: failed === 0 && outcome.code !== 0 ? 1 : failed, skipped };
  };
}

/** The format crash test: a seed is a case. */
const crash = (seeds) => async (env, minutes) => {
  const program = join(top, 'native/build-native/holdfast-crash-test');
  const outcome = await run('crash', program, ['--seeds', seeds, '--keep-going'], { minutes, env });
  const match = /seeds (\d+)\.\.(\d+): (\d+) failed/.exec(outcome.output);
  if (!match) return { passed: 0, failed: 1, skipped: 0 };
  const failed = Number(match[3]);
  return {
    passed: Number(match[2]) - Number(match[1]) + 1 - failed,
    failed: failed === 0 && outcome.code !== 0 ? 1 : failed,
    skipped: 0,
  };
};

const library = (name) => execFileSync('gcc', [`-print-file-name=${name}`], { encoding: 'utf8' }).trim();

for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, () => {
    if (current) process.kill(-current.pid, 'SIGKILL');
    process.exitCode = 1;
  });
}

mkdirSync(results, { recursive: true });
const [what = 'all', ...rest] = process.argv.slice(2);
const seedsAt = rest.indexOf('--seeds');
const seeds = seedsAt >= 0 ? rest[seedsAt + 1] : '1..1000';
const release = ['-DCMAKE_BUILD_TYPE=Release'];

if (what === 'all') {
  await suite('native', 10, native('native', release));
  await suite('crash', 10, crash(seeds));
  await suite('typescript', 30, vitest('typescript', ['--exclude', '**/test/faults/**']));
} else if (what === 'crash') {
  await suite('native', 10, native('native', release, {}, ['-N']));
  total.passed = total.failed = 0;
  summary.length = 0;
  await suite('crash', 60, crash(seeds));
} else if (what === 'sanitize') {
  const asan = { ASAN_OPTIONS: 'detect_leaks=1:abort_on_error=1', UBSAN_OPTIONS: 'halt_on_error=1:print_stacktrace=1' };
  await suite('asan', 20, native('asan', ['-DCMAKE_BUILD_TYPE=RelWithDebInfo', '-DHOLDFAST_SANITIZE=address,undefined'], asan));
  await suite('tsan', 45, native('tsan', ['-DCMAKE_BUILD_TYPE=RelWithDebInfo', '-DHOLDFAST_SANITIZE=thread'], { TSAN_OPTIONS: 'halt_on_error=1' }));
  await suite('addon-asan', 20, async (env, minutes) => {
    const built = await run('addon-asan-build', join(top, 'native/node_modules/.bin/cmake-js'),
      ['build', '-O', 'build-addon-asan', '--CDHOLDFAST_SANITIZE=address,undefined'], { minutes: 20, env, cwd: join(top, 'native'), show: false });
    if (built.code !== 0) {
      console.error(built.output.slice(-8000));
      return { passed: 0, failed: 1, skipped: 0 };
    }
    return vitest('addon-asan', ['native/test'], {
      HOLDFAST_NATIVE: join(top, 'native/build-addon-asan/Release/holdfast.node'),
      HOLDFAST_PRELOAD: `${library('libasan.so')} ${library('libubsan.so')}`,
      LD_PRELOAD: `${library('libasan.so')} ${library('libubsan.so')}`,
      ASAN_OPTIONS: 'detect_leaks=0',
    })(env, minutes);
  });
} else if (what === 'faults') {
  await suite('faults', 60, vitest('faults', ['packages/cli/test/faults', 'native/test']));
} else {
  console.error(`Unknown suite ${what}. Known: (none), crash, sanitize, faults.`);
  process.exit(2);
}

console.log('');
for (const s of summary) {
  console.log(`${s.name.padEnd(14)} ${String(s.passed).padStart(6)} passed ${String(s.failed).padStart(4)} failed ${String(s.skipped).padStart(4)} skipped  ${s.seconds} s`);
}
if (total.passed === 0) total.failed = Math.max(total.failed, 1);
console.log(`${total.passed} passed, ${total.failed} failed${total.skipped > 0 ? `, ${total.skipped} skipped` : ''}`);
process.exit(total.failed === 0 ? 0 : 1);
