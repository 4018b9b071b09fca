import { execFileSync } from 'node:child_process';
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { copyFromHost, makeRoot, writeImage } from './oci.mjs';

let work;
beforeEach(() => {
  work = mkdtempSync(join(tmpdir(), 'holdfast-oci-test-'));
});
afterEach(() => rmSync(work, { recursive: true, force: true }));

function image(name, layers) {
  const output = join(work, `${name}.tar`);
  writeImage({ reference: 'registry.example/thing:1', layers, config: { User: '1' }, output });
  return output;
}

test('the same files give the same archive, whenever and in whatever order they were written', () => {
  const [one, two] = ['one', 'two'].map((name) => join(work, name));
  for (const [root, names] of [[one, ['a', 'b']], [two, ['b', 'a']]]) {
    mkdirSync(root);
    for (const name of names) writeFileSync(join(root, name), name);
  }
  utimesSync(join(two, 'a'), 1, 1);
  expect(readFileSync(image('first', [one])).equals(readFileSync(image('second', [two])))).toBe(true);
});

test('the index and the list for docker load name the image, and every blob is what its digest says', () => {
  const root = join(work, 'root');
  mkdirSync(root);
  writeFileSync(join(root, 'file'), 'content');
  const archive = image('named', [root]);
  const layout = join(work, 'layout');
  mkdirSync(layout);
  execFileSync('tar', ['-xf', archive, '-C', layout]);
  const json = (path) => JSON.parse(readFileSync(path, 'utf8'));
  const blob = (digest) => join(layout, 'blobs/sha256', digest.slice('sha256:'.length));
  const [entry] = json(join(layout, 'index.json')).manifests;
  expect(entry.annotations['io.containerd.image.name']).toBe('registry.example/thing:1');
  const manifest = json(blob(entry.digest));
  const config = json(blob(manifest.config.digest));
  expect(config.config).toEqual({ User: '1' });
  expect(config.rootfs.diff_ids).toEqual(manifest.layers.map((layer) => layer.digest));
  for (const { digest, size } of [manifest.config, ...manifest.layers]) {
    expect(statSync(blob(digest)).size).toBe(size);
    expect(execFileSync('sha256sum', [blob(digest)], { encoding: 'utf8' }).split(' ')[0]).toBe(digest.slice(7));
  }
  expect(execFileSync('tar', ['-xOf', blob(manifest.layers[0].digest), './file'], { encoding: 'utf8' })).toBe('content');
  const place = ({ digest }) => `blobs/sha256/${digest.slice('sha256:'.length)}`;
  expect(json(join(layout, 'manifest.json'))).toEqual([{ Config: place(manifest.config), RepoTags: ['registry.example/thing:1'], Layers: manifest.layers.map(place) }]);
});

test('a copied program runs in its root, without setuid, and a layer leaves out what one below it has', () => {
  const base = join(work, 'base');
  makeRoot(base);
  copyFromHost(base, ['/bin/sleep']);
  expect(execFileSync('chroot', [base, '/bin/sleep', '--version'], { encoding: 'utf8' })).toContain('sleep');
  const more = join(work, 'more');
  mkdirSync(more);
  const own = join(work, 'tool');
  execFileSync('cp', ['/bin/sleep', own]);
  chmodSync(own, 0o4755);
  copyFromHost(more, [own, '/bin/sleep'], [base]);
  expect(existsSync(join(more, 'usr/bin/sleep'))).toBe(false);
  expect(statSync(join(more, own)).mode & 0o7777).toBe(0o755);
});

test('the images of the Dockerfile say the version of the chart, as those of images.mjs do', () => {
  const [, version] = /^appVersion: (.+)$/m.exec(readFileSync(new URL('../charts/holdfast/Chart.yaml', import.meta.url), 'utf8'));
  expect(readFileSync(new URL('../Dockerfile', import.meta.url), 'utf8')).toContain(`ARG VERSION=${version}\n`);
});
