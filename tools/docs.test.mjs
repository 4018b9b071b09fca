// The documents name files, headings, parameters, commands and events; these tests notice when one of them is renamed or goes.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { knownParameters, QUIESCE } from '../packages/common/src/csi/parameters.ts';

const top = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const read = (path) => readFileSync(join(top, path), 'utf8');
const pages = ['README.md', 'ARCHITECTURE.md', 'charts/README.md', 'deploy/kind/README.md', 'deploy/kubernetes/README.md', 'test/e2e/README.md']
  .concat(readdirSync(join(top, 'docs')).flatMap((name) => (name.endsWith('.md') ? [`docs/${name}`] : [])));
const withoutCode = (text) => text.replaceAll(/^```.*?^```/gms, '');

/** Anchors as GitHub makes them of headings. */
function anchorsOf(path) {
  const headings = withoutCode(read(path)).matchAll(/^#+ (.+)$/gm);
  return [...headings].map(([, text]) => text.toLowerCase().replaceAll(/[^\p{L}\p{N}\- _]/gu, '').trim().replaceAll(' ', '-'));
}

function brokenLinksOf(page) {
  const links = [...withoutCode(read(page)).matchAll(/\]\(([^)\s]+)\)/g)].map(([, to]) => to).filter((to) => !/^[a-z]+:/.test(to));
  return links.filter((to) => {
    const [path, anchor] = to.split('#');
    const target = path === '' ? page : relative(top, join(top, dirname(page), path));
    if (!existsSync(join(top, target))) return true;
    return anchor !== undefined && target.endsWith('.md') && !anchorsOf(target).includes(anchor);
  });
}

test.each(pages)('every link of %s leads to a file and, where it names one, to a heading', (page) => {
  expect(brokenLinksOf(page)).toEqual([]);
});

test('storageclass.md has a row for each parameter that a class may have', () => {
  const text = read('docs/storageclass.md');
  expect([...knownParameters, QUIESCE].filter((name) => !text.includes(`\`${name}\``))).toEqual([]);
});

test('every holdfast command that a document names is described in cli.md', () => {
  const described = read('docs/cli.md');
  const named = pages.flatMap((page) => [...read(page).matchAll(/\bholdfast ((?:pool|volume|snapshot|node) [a-z-]+)/g)].map(([, command]) => command));
  expect([...new Set(named)].filter((command) => !described.includes(command))).toEqual([]);
});

test('every event and alert that a document names is one that the code has', () => {
  const sources = ['packages/csi-controller/src/kubernetes/decide.ts', 'charts/holdfast/files/alerts.yaml'].map(read).join('\n');
  const named = pages.flatMap((page) => [...read(page).matchAll(/`(Holdfast[A-Z][A-Za-z]+)`/g)].map(([, name]) => name));
  expect([...new Set(named)].filter((name) => name !== 'HoldfastError' && !sources.includes(name))).toEqual([]);
});
