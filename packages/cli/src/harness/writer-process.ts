/** Runs writer.js and keeps count of what it acknowledged. */
import { spawn, type ChildProcess } from 'node:child_process';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const program = fileURLToPath(new URL('../../dist/harness/writer.js', import.meta.url));

export class Writer {
  readonly run: number;
  readonly path: string;
  readonly #child: ChildProcess;
  /** Records 0 … acknowledged - 1 are synced. */
  acknowledged = 0;
  /** Why it ended by itself. */
  ended = '';

  constructor(path: string, run: number, limit = 1_000_000) {
    this.path = path;
    this.run = run;
    this.#child = spawn(process.execPath, [program, path, String(run), String(limit)], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    if (this.#child.stdout) {
      createInterface({ input: this.#child.stdout }).on('line', (line) => {
        if (line.startsWith('ended')) this.ended = line;
        else this.acknowledged = Number(line) + 1;
      });
    }
  }

  get running(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  async untilAcknowledged(count: number, timeoutMs: number): Promise<void> {
    const deadline = Date.now() + timeoutMs;
    while (this.acknowledged < count) {
      if (!this.running)
        throw new Error(`The writer ended after ${this.acknowledged} records: ${this.ended}`);
      if (Date.now() > deadline) {
        throw new Error(
          `The writer synced ${this.acknowledged} records in ${timeoutMs / 1000} s, not ${count}`,
        );
      }
      await sleep(10);
    }
  }

  /** Waits for its end, killing it after `graceMs`; then `acknowledged` is final. */
  async end(graceMs: number): Promise<void> {
    const closed = new Promise<void>((resolve) => {
      if (this.#child.stdout?.closed === true || !this.#child.stdout) resolve();
      else this.#child.stdout.once('close', () => resolve());
    });
    const deadline = Date.now() + graceMs;
    while (this.running && Date.now() < deadline) await sleep(10);
    if (this.running) this.#child.kill('SIGKILL');
    await Promise.race([closed, sleep(5000)]);
  }
}
