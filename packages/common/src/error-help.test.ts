import { readFileSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { nativeErrorHelp, renderErrorsDoc } from './error-help.ts';

const doc = new URL('../../../docs/errors.md', import.meta.url);
const header = new URL('../../../native/src/core/status.h', import.meta.url);

describe('docs/errors.md', () => {
  it('has a row for every code, as the table in the source says', () => {
    if (process.env['UPDATE_DOCS'] === '1') writeFileSync(doc, renderErrorsDoc());
    expect(readFileSync(doc, 'utf8')).toBe(renderErrorsDoc());
  });

  it('names every code of the native engine', () => {
    const body = /enum class Code \{([\s\S]*?)\};/.exec(readFileSync(header, 'utf8'))?.[1] ?? '';
    const names = [...body.matchAll(/^\s*k([A-Z]\w*)/gm)]
      .map((match) => match[1] ?? '')
      .filter((name) => name !== 'Ok')
      .map((name) => `HF_${name.replaceAll(/(?<!^)([A-Z])/g, '_$1').toUpperCase()}`);
    expect(names.length).toBeGreaterThan(10);
    expect(Object.keys(nativeErrorHelp).sort()).toEqual(names.sort());
  });
});
