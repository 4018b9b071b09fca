// What Ginkgo's JSON reports say: a row for each suite, what was skipped and why, and each failure with its first sentence.
import { readFileSync } from 'node:fs';

const suiteOf = (names) => names.find((name) => name.startsWith('[Testpattern')) ?? names.at(-1);

/** @param files paths of reports */
export function summaryOf(files) {
  const suites = new Map();
  const failures = [];
  const reasons = new Map();
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
        const said = (spec.Failure?.Message ?? spec.State).split('\n')[0];
        if (how === 'skipped') reasons.set(said, (reasons.get(said) ?? 0) + 1);
        if (how === 'failed') failures.push({ spec: `${spec.ContainerHierarchyTexts.join(' ')} ${spec.LeafNodeText}`, said });
      }
    }
  }
  const rows = [...suites].toSorted(([a], [b]) => a.localeCompare(b)).map(([suite, row]) => ({ suite, ...row }));
  const skipped = [...reasons].toSorted(([, a], [, b]) => b - a).map(([reason, specs]) => ({ reason, specs }));
  return { ...counts, suites: rows, skips: skipped, failures };
}

/** The same for people. */
export function inWords({ suites, failures }) {
  const rows = suites.map((row) => `${row.passed} passed, ${row.failed} failed, ${row.skipped} skipped: ${row.suite}`);
  return [...rows, ...failures.map(({ spec, said }) => `FAIL  ${spec}\n      ${said}`)].join('\n');
}
