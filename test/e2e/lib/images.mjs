// All images of a run, as archives in the cache: Holdfast's own from tools/images.mjs, the sidecars around their cached programs, a busybox
// that is the pods' and the sandboxes', and stand-ins for the two sidecars that are not to be had as Go modules.
import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { bundle } from '../../../tools/bundle.mjs';
import { addBusybox, addProgram, copyFromHost, makeRoot, writeImage } from '../../../tools/oci.mjs';
import { run } from './shell.mjs';
import { cache, tool, top } from './tools.mjs';

const images = join(cache, 'images');
export const sidecars = ['csi-provisioner', 'csi-attacher', 'csi-resizer', 'csi-snapshotter', 'snapshot-controller'];
const standIns = ['registrar-stand-in', 'livenessprobe-stand-in'];
const applets = ['sh', 'sleep', 'cat', 'dd', 'sha256sum', 'sync', 'ls', 'df', 'id', 'stat', 'seq', 'head', 'touch', 'rm', 'mkdir', 'date', 'echo', 'test', 'wc', 'cmp', 'blockdev', 'mount', 'tr', 'cut', 'grep', 'printf', 'kill', 'ps', 'fstrim', 'tail'];

/** @returns {Promise<string[]>} paths of archives */
export async function buildTestImages() {
  mkdirSync(images, { recursive: true });
  const built = await run(process.execPath, [join(top, 'tools/images.mjs'), '--out', images, '--tag', 'e2e'], { timeoutMs: 300_000 });
  for (const line of built.trim().split('\n')) console.log(`      image ${line.split('\t').slice(0, 2).join(' ')}`);
  const own = ['metadata-service', 'csi-controller', 'node'].map((name) => join(images, `${name}.tar`));
  return [...own, ...sidecars.map(sidecarImage), busyboxImage(), ...(await standInImages())];
}

/** Makes the archive unless it is there, made from the same inputs. */
function cached(name, inputs, make) {
  const output = join(images, `${name}.tar`);
  const hash = createHash('sha256');
  for (const input of inputs) hash.update(`${input}:${existsSync(input) ? `${statSync(input).size}:${statSync(input).mtimeMs}` : ''}\n`);
  const stamp = hash.digest('hex');
  if (existsSync(output) && existsSync(`${output}.stamp`) && readFileSync(`${output}.stamp`, 'utf8') === stamp) return output;
  const root = mkdtempSync(join(tmpdir(), 'holdfast-image-'));
  try {
    const config = make(root);
    writeImage({ reference: `holdfast.test/${name}:1`, layers: [root], config: { Env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'], WorkingDir: '/', ...config }, output });
    writeFileSync(`${output}.stamp`, stamp);
    return output;
  } finally {
    rmSync(root, { recursive: true, force: true });
  }
}

function sidecarImage(name) {
  const program = tool(name);
  return cached(name, [program], (root) => {
    makeRoot(root);
    addProgram(program, join(root, name));
    return { Entrypoint: [`/${name}`] };
  });
}

function busyboxImage() {
  return cached('busybox', ['/bin/busybox'], (root) => {
    makeRoot(root);
    addBusybox(root, applets);
    return { Entrypoint: ['/bin/busybox'], Cmd: ['sleep', '2147483647'] };
  });
}

/** Both programs are in both: one layer, which a node unpacks once. */
async function standInImages() {
  const sources = standIns.map((name) => join(top, 'test/e2e/stand-ins', `${name}.mjs`));
  const work = mkdtempSync(join(tmpdir(), 'holdfast-stand-in-'));
  try {
    for (const [i, name] of standIns.entries()) await bundle(sources[i], join(work, `${name}.mjs`));
    return standIns.map((entry) =>
      cached(entry, [...sources, join(top, 'test/e2e/stand-ins/end.mjs'), process.execPath], (root) => {
        makeRoot(root);
        copyFromHost(root, [process.execPath]);
        for (const name of standIns) copyFileSync(join(work, `${name}.mjs`), join(root, `${name}.mjs`));
        return { Entrypoint: ['node', `/${entry}.mjs`] };
      }),
    );
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}
