/** A progress bar on stderr: drawn in place on a terminal, a line each tenth elsewhere, nothing when it is over at once. */

const barWidth = 32;

export class ProgressBar {
  readonly #label: string;
  readonly #stream: NodeJS.WriteStream;
  readonly #started = Date.now();
  #drawn = 0;
  #tenth = 0;

  constructor(label: string, stream: NodeJS.WriteStream = process.stderr) {
    this.#label = label;
    this.#stream = stream;
  }

  /** May be called as often as one likes: it draws at most ten times a second. */
  readonly update = (done: number, total: number): void => {
    const part = total > 0 ? Math.min(1, done / total) : 1;
    const now = Date.now();
    if (!this.#stream.isTTY) {
      const tenth = Math.floor(part * 10);
      if (now - this.#started < 2000 || tenth <= this.#tenth) return;
      this.#tenth = tenth;
      this.#stream.write(`${this.#label} ${tenth * 10}%\n`);
      return;
    }
    if (now - this.#drawn < 100 && part < 1) return;
    this.#drawn = now;
    const full = Math.round(part * barWidth);
    const seconds = (now - this.#started) / 1000;
    const left = part > 0.02 && part < 1 ? `, ${Math.ceil((seconds / part) * (1 - part))} s left` : '';
    this.#stream.write(
      `\r${this.#label} [${'█'.repeat(full)}${'·'.repeat(barWidth - full)}] ${Math.floor(part * 100)}%${left}\x1b[K`,
    );
  };

  /** Takes the bar away. */
  readonly end = (): void => {
    if (this.#stream.isTTY && this.#drawn > 0) this.#stream.write('\r\x1b[K');
  };
}
