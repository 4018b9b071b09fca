/**
 * A process that writes numbered records to a file or device and syncs each one, for as long as it can:
 *
 *   writer.js PATH RUN LIMIT
 *
 * It prints a record's number only after fsync() returned for it: what it printed must be there after any crash.
 * On an I/O error it says so and ends with code 5.
 */
import { fsyncSync, openSync, writeSync } from 'node:fs';
import { record, recordBytes } from './content.ts';

const [path = '', run = '0', limit = '1000000'] = process.argv.slice(2);

/** Synchronous: the next record begins only when the parent can see this one. */
function say(line: string): void {
  writeSync(1, `${line}\n`);
}

try {
  const file = openSync(path, path.endsWith('/device') ? 'r+' : 'w');
  for (let number = 0; number < Number(limit); number++) {
    writeSync(file, record(Number(run), number), 0, recordBytes, number * recordBytes);
    fsyncSync(file);
    say(String(number));
  }
} catch (error) {
  say(`ended: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 5;
}
