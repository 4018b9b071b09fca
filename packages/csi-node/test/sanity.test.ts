/**
 * csi-sanity against the whole of it, with volumes as file systems and as raw block. Nothing may fail, and what it skips
 * has to stand in docs/csi.md with a reason.
 */
import { readFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { TestArea } from '@holdfast/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { runSanity } from './csi-sanity.ts';
import { startStandInStack, type Stack } from './stand-in-stack.ts';

const documentation = fileURLToPath(new URL('../../../docs/csi.md', import.meta.url));

describe('csi-sanity', () => {
  let area: TestArea;
  let stack: Stack;
  beforeEach(async () => {
    area = await TestArea.create('sanity');
    stack = await startStandInStack(area);
  });
  afterEach(() => area.dispose());

  it.each(['mount', 'block'] as const)(
    'has nothing to object to (%s volumes)',
    { timeout: 600_000 },
    async (accessType) => {
      const result = await runSanity(area, stack, accessType);
      process.stdout.write(
        `csi-sanity (${accessType}): ${result.passed.length} passed, ${result.failed.length} failed, ${result.skipped.length} skipped\n`,
      );
      expect(result.failed).toEqual([]);
      expect(result.passed.length).toBeGreaterThanOrEqual(58);
      const documented = await readFile(documentation, 'utf8');
      const undocumented = result.skipped.filter(({ name }) => !documented.includes(`\`${name}\``));
      expect(undocumented).toEqual([]);
    },
  );
});
