// Running programs, waiting, and the one place for logs of a run.
import { execFile, spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

export { sleep };

/** How long a spec waits for what it expects, and for a program that it runs: a machine's bad minute fails nothing, a hang does. */
export const patienceMs = 180_000;

/** Runs a program to its end; its stdout. Throws with what it said on stderr. */
export function run(command, args, { input, timeoutMs = patienceMs, env, cwd } = {}) {
  return new Promise((done, failed) => {
    const child = execFile(
      command,
      args,
      { timeout: timeoutMs, killSignal: 'SIGKILL', maxBuffer: 64 << 20, env: { ...process.env, ...env }, cwd },
      (error, stdout, stderr) => {
        if (error === null) return done(stdout);
        const how = error.killed ? `no end within ${timeoutMs / 1000} s` : `exit code ${error.code}`;
        failed(new Error(`${command} ${args.join(' ')}: ${how}\n${(stderr || stdout).trim().slice(-3000)}`));
      },
    );
    child.stdin.on('error', () => undefined);
    child.stdin.end(input ?? '');
  });
}

/** Starts a program that stays; its output goes to a file. */
export function start(command, args, log, { env } = {}) {
  const fd = openSync(log, 'a');
  const child = spawn(command, args, { stdio: ['ignore', fd, fd], env: { ...process.env, ...env } });
  closeSync(fd);
  return child;
}

/** Repeats `look` until it gives something that counts as true. What it throws last is part of the error. */
export async function until(what, look, { timeoutMs = patienceMs, everyMs = 250 } = {}) {
  const deadline = Date.now() + timeoutMs;
  let last = '';
  for (;;) {
    try {
      const found = await look();
      if (found) return found;
    } catch (error) {
      last = `: ${error.message}`;
    }
    if (Date.now() > deadline) throw new Error(`${what}: not within ${timeoutMs / 1000} s${last}`);
    await sleep(everyMs);
  }
}
