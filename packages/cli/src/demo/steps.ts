/** The demo's face: each step with its number, its name, what came out and how long it took, as it goes. */
import { bold, dim, green, red } from '../output.ts';

export class Steps {
  readonly #total: number;
  #number = 0;
  readonly #started = performance.now();

  constructor(total: number) {
    this.#total = total;
  }

  /** Runs one step; what it returns is shown beside it. */
  async run(name: string, body: () => Promise<string>): Promise<void> {
    this.#number += 1;
    const digits = String(this.#total).length;
    const head = `[${String(this.#number).padStart(digits)}/${this.#total}] ${name}`;
    const tty = process.stdout.isTTY;
    if (tty) process.stdout.write(`${dim('…')} ${head}`);
    const started = performance.now();
    const line = (mark: string, detail: string): void => {
      const time = `${((performance.now() - started) / 1000).toFixed(2)} s`.padStart(8);
      if (tty) process.stdout.write('\r\x1b[K');
      console.log(`${mark} ${head.padEnd(60)} ${time}  ${dim(detail)}`.trimEnd());
    };
    try {
      line(green('✓'), await body());
    } catch (error) {
      line(red('✗'), '');
      throw error;
    }
  }

  finish(sentence: string): void {
    console.log(`\n${bold(sentence)} ${((performance.now() - this.#started) / 1000).toFixed(1)} s.`);
  }
}
