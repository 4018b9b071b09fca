#!/usr/bin/env node
/** The `holdfast` command. Exit codes: 0 done, 1 it failed (the sentence on stderr says what to do), 2 wrong usage. */
import { CommanderError } from 'commander';
import { buildProgram } from './program.ts';

try {
  await buildProgram().parseAsync();
} catch (error) {
  if (error instanceof CommanderError) {
    process.exitCode = error.exitCode === 0 ? 0 : 2; // commander has said what is wrong
  } else {
    process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
    if (process.env['HOLDFAST_LOG_LEVEL'] === 'debug') console.error(error);
    process.exitCode = 1;
  }
}
