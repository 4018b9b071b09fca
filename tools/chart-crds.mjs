// The snapshot CRDs of the version that test/e2e/tools pins, brought into the chart: names, types and rules, which are the interface,
// without the prose around them.
//
//   node tools/chart-crds.mjs            writes charts/holdfast/crds
//   node tools/chart-crds.mjs --check    only says whether they are those of the pinned version
import { execFileSync } from 'node:child_process';
import { readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import yaml from 'js-yaml';

const top = resolve(fileURLToPath(import.meta.url), '../..');
const module = 'github.com/kubernetes-csi/external-snapshotter/client/v8';

/** Texts for people may be anything where the schema has a string of that name; as properties of objects they are fields. */
const prose = (key, value) => ['description', 'message', 'messageExpression', 'deprecationWarning'].includes(key) && typeof value === 'string';

function withoutProse(node) {
  if (Array.isArray(node)) return node.map(withoutProse);
  if (node === null || typeof node !== 'object') return node;
  return Object.fromEntries(
    Object.entries(node)
      .filter(([key, value]) => !prose(key, value))
      .map(([key, value]) => [key, withoutProse(value)]),
  );
}

const list = (what) =>
  execFileSync('go', ['list', '-m', '-f', `{{.${what}}}`, module], { cwd: join(top, 'test/e2e/tools'), encoding: 'utf8' }).trim();
execFileSync('go', ['mod', 'download', module], { cwd: join(top, 'test/e2e/tools') });
const source = join(list('Dir'), 'config/crd');
const stale = [];
for (const file of readdirSync(source).filter((name) => /storage\.k8s\.io_.*\.yaml$/.test(name))) {
  const text = `# Made by tools/chart-crds.mjs from ${module} ${list('Version')}.\n${yaml.dump(
    withoutProse(yaml.load(readFileSync(join(source, file), 'utf8'))),
    { noRefs: true, lineWidth: 120 },
  )}`;
  const target = join(top, 'charts/holdfast/crds', file);
  if (!process.argv.includes('--check')) writeFileSync(target, text);
  else if (readFileSync(target, 'utf8') !== text) stale.push(file);
}
if (stale.length > 0) {
  console.error(`Not those of ${module} ${list('Version')}: ${stale.join(', ')}. Run node tools/chart-crds.mjs.`);
  process.exit(1);
}
