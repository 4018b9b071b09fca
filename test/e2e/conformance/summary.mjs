// What Ginkgo's JSON reports say, as one table: a line for each suite, and each failure with its first sentence.
import { readFileSync } from 'node:fs';

const suiteOf = (names) => names.find((name) => name.startsWith('[Testpattern')) ?? names.at(-1);

/** @param files paths of reports */
export function summaryOf(files) {
  const suites = new Map();
  const failures = [];
  const counts = { passed: 0, failed: 0, skipped: 0 };
  for (const file of files) {
    for (const { SpecReports: specs } of JSON.parse(readFileSync(file, 'utf8'))) {
      for (const spec of specs ?? []) {
        if (spec.LeafNodeType !== 'It' || spec.RunTime === 0) continue;
        const how = spec.State === 'passed' || spec.State === 'skipped' ? spec.State : 'failed';
        counts[how] += 1;
        const suite = suiteOf(spec.ContainerHierarchyTexts);
        const row = suites.get(suite) ?? { passed: 0, failed: 0, skipped: 0 };
        row[how] += 1;
        suites.set(suite, row);
        if (how === 'failed') failures.push(`${spec.ContainerHierarchyTexts.join(' ')} ${spec.LeafNodeText}\n      ${(spec.Failure?.Message ?? spec.State).split('\n')[0]}`);
      }
    }
  }
  const rows = [...suites].toSorted(([a], [b]) => a.localeCompare(b)).map(([suite, row]) => `${row.passed} passed, ${row.failed} failed, ${row.skipped} skipped: ${suite}`);
  return { ...counts, text: [...rows, ...failures.map((failure) => `FAIL  ${failure}`)].join('\n') };
}
