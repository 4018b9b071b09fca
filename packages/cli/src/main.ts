#!/usr/bin/env node
/** The `holdfast` command. Exit codes: 0 done, 1 it failed (the sentence on stderr says what to do), 2 wrong usage. */
import { CommanderError } from 'commander';
import { buildProgram } from './program.ts';

/** The command may have failed before its options were read. */
function asksForJson(argv: readonly string[]): boolean {
  return argv.some(
    (word, i) =>
      word === '-ojson' ||
      word === '--output=json' ||
      (word === 'json' && /^(-o|--output)$/.test(argv[i - 1] ?? '')),
  );
}

try {
  await buildProgram().parseAsync();
} catch (error) {
  if (error instanceof CommanderError) {
    process.exitCode = error.exitCode === 0 ? 0 : 2; // commander has said what is wrong
  } else {
    const message = error instanceof Error ? error.message : String(error);
    const code = error instanceof Error && 'code' in error ? String(error.code) : 'INTERNAL';
    process.stderr.write(`${asksForJson(process.argv) ? JSON.stringify({ code, message }) : message}\n`);
    if (process.env['HOLDFAST_LOG_LEVEL'] === 'debug') console.error(error);
    process.exitCode = 1;
  }
}
