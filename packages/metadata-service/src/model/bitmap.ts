/** A fixed number of bits, kept as base64 text in a record: slabs of a region, slots of a table. */

export class Bitmap {
  readonly size: number;
  readonly #bytes: Buffer;

  /** @param text what toString() made of a bitmap of this size or a smaller one; undefined: all clear. */
  constructor(size: number, text?: string) {
    this.size = size;
    this.#bytes = Buffer.alloc(Math.ceil(size / 8));
    if (text !== undefined) this.#bytes.write(text, 'base64');
  }

  has(bit: number): boolean {
    return ((this.#bytes[bit >>> 3] ?? 0xff) & (1 << (bit & 7))) !== 0;
  }

  set(bit: number, value: boolean): void {
    if (bit < 0 || bit >= this.size) throw new RangeError(`bit ${bit} of ${this.size}`);
    const byte = this.#bytes[bit >>> 3] as number;
    this.#bytes[bit >>> 3] = value ? byte | (1 << (bit & 7)) : byte & ~(1 << (bit & 7));
  }

  /** The first clear bit at or after `from`, then from the start; -1: none. */
  firstClear(from = 0): number {
    for (let bit = from; bit < this.size; bit++) if (!this.has(bit)) return bit;
    for (let bit = 0; bit < from; bit++) if (!this.has(bit)) return bit;
    return -1;
  }

  /** Runs of clear bits, in order. */
  clearRuns(): { first: number; count: number }[] {
    const runs: { first: number; count: number }[] = [];
    for (let bit = 0; bit < this.size; ) {
      if (this.#bytes[bit >>> 3] === 0xff && (bit & 7) === 0) {
        bit += 8;
        continue;
      }
      if (this.has(bit)) {
        bit++;
        continue;
      }
      const first = bit;
      while (bit < this.size && !this.has(bit)) bit++;
      runs.push({ first, count: bit - first });
    }
    return runs;
  }

  toString(): string {
    return this.#bytes.toString('base64');
  }
}
