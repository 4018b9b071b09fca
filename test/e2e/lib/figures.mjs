// What was measured on the way, in seconds: in the report of a run, and of a whole one in results/latest.json.
import { existsSync, readFileSync, writeFileSync, mkdirSync } from 'node:fs';
import { cpus, release } from 'node:os';
import { dirname } from 'node:path';

export class Figures {
  all = {};

  /**
   * @param value one, or all of several tries
   * @param goal what it is to be under. A machine's bad minute fails no spec: a goal that is missed is said, and is to be looked into.
   */
  record(name, value, { goal } = {}) {
    const round = (seconds) => Math.round(seconds * 10) / 10;
    this.all[name] = Array.isArray(value) ? value.map(round) : round(value);
    if (goal === undefined) return;
    const tries = [value].flat();
    console.log(`      ${name}: ${tries.map(round).join(', ')} s, goal ${goal}${Math.max(...tries) < goal ? '' : ': MISSED'}`);
  }
}

/** Keeps the figures of a whole run, for bench/report.mjs. */
export function keepFigures(path, { passed, failed, kubernetes, figures }) {
  const result = {
    date: new Date().toISOString().slice(0, 10),
    machine: { cores: cpus().length, kernel: release().replace(/-.*/, ''), node: process.version },
    kubernetes,
    passed,
    failed,
    figures,
  };
  mkdirSync(dirname(path), { recursive: true });
  const text = `${JSON.stringify(result, undefined, 2)}\n`;
  if (!existsSync(path) || readFileSync(path, 'utf8') !== text) writeFileSync(path, text);
}
