// Writes docs/conformance.md from the last whole run: node test/e2e/conformance/report.mjs
import { readFileSync, writeFileSync } from 'node:fs';

const at = (path) => new URL(path, import.meta.url);
const r = JSON.parse(readFileSync(at('../results/conformance.json'), 'utf8'));
const row = (cells) => `| ${cells.join(' | ')} |`;
const cell = (text) => text.replaceAll('|', String.raw`\|`);

/** What a skip's reason means for Holdfast, by a part of the sentence that the suite prints. */
const why = [
  ['"PreprovisionedPV"', 'the suite makes these volumes only for drivers that are compiled into it; a kept volume is used again by its handle, see [csi.md](csi.md)'],
  ['"InlineVolume"', 'a kind of volume of the drivers inside Kubernetes'],
  ['"CSIInlineVolume"', 'inline volumes without a claim: Holdfast has generic ephemeral volumes, which the suite tests too'],
  ['group snapshots', 'the suite asks for `v1beta2`, the chart installs `v1`; `test/e2e` takes group snapshots'],
  ['multi-topology environment', 'the suite wants more than one topology to choose from; a pool is one'],
  ['Not enough topologies', 'as above: every node of the lab reaches the same disk'],
  ['ext3', 'not offered: ext4, xfs, btrfs and raw block are'],
];
const meaning = (reason) => why.find(([part]) => reason.includes(part))?.[1] ?? 'says so itself';

const lines = [
  '# Conformance',
  '',
  `Kubernetes' own storage specs (\`External.Storage\`, ${r.kubernetes}) against Holdfast, run by \`make conformance\` on the three-node cluster of`,
  '[`make e2e`](../test/e2e/README.md) with the chart, the real sidecars and one shared disk. Made from `test/e2e/results/conformance.json` by',
  `\`node test/e2e/conformance/report.mjs\`. ${r.date}.`,
  '',
  `**${r.passed} passed, ${r.failed} failed, ${r.skipped} skipped.**`,
  '',
  'What the driver says of itself is [`driver.yaml`](../test/e2e/conformance/driver.yaml). Left out before the run: specs that are disruptive, serial or slow, and',
  'those of Windows, SELinux and VolumeAttributesClass (`test/e2e` has one of the last). Sidecars: provisioner, attacher, resizer and snapshotter are',
  'upstream\'s; the registrar and the liveness probe are stand-ins, see [the lab](../test/e2e/README.md).',
  '',
  row(['suite', 'passed', 'failed', 'skipped']),
  row(['---', '--:', '--:', '--:']),
  ...r.suites.map((s) => row([cell(s.suite.replace(/^\[Testpattern: *(.*?)\] ?/, '$1: ')), s.passed, s.failed, s.skipped])),
  '',
  '## Skipped, and why',
  '',
  row(['specs', 'the suite says', 'because']),
  row(['--:', '---', '---']),
  ...r.skips.map(({ reason, specs }) => row([specs, cell(reason), cell(meaning(reason))])),
  '',
  ...(r.failures.length > 0
    ? ['## Failed', '', row(['spec', 'it says']), row(['---', '---']), ...r.failures.map((f) => row([cell(f.spec), cell(f.said)])), '']
    : []),
];
writeFileSync(at('../../../docs/conformance.md'), `${lines.join('\n').trimEnd()}\n`);
