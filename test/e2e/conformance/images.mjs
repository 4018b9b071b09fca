// The images that upstream's storage specs name, made here because there is no registry: agnhost around its program, built with the suite, and
// one set of applets for those of which the specs use a shell only.
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { addBusybox, addProgram, makeRoot, writeImage } from '../../../tools/oci.mjs';
import { cache, tool } from '../lib/tools.mjs';

const registry = 'registry.k8s.io/e2e-test-images';
/** Names and versions as test/utils/image/manifest.go of the suite's Kubernetes has them. */
const references = {
  agnhost: { reference: `${registry}/agnhost:2.63.0`, entrypoint: ['/agnhost'], command: ['pause'] },
  busybox: { reference: `${registry}/busybox:1.37.0-1`, command: ['sh'] },
  nginx: { reference: `${registry}/nginx:1.15-4`, command: ['sh'] },
  'glibc-dns-testing': { reference: `${registry}/glibc-dns-testing:2.0.0`, command: ['sh'] },
};

/** @returns {string[]} paths of archives */
export function buildConformanceImages() {
  const directory = join(cache, 'images/conformance');
  mkdirSync(directory, { recursive: true });
  return Object.entries(references).map(([name, { reference, entrypoint, command }]) => {
    const root = mkdtempSync(join(tmpdir(), 'holdfast-image-'));
    try {
      makeRoot(root);
      addBusybox(root);
      if (name === 'agnhost') addProgram(tool('agnhost'), join(root, 'agnhost'));
      const output = join(directory, `${name}.tar`);
      const config = { Env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'], WorkingDir: '/', Cmd: command, ...(entrypoint === undefined ? {} : { Entrypoint: entrypoint }) };
      writeImage({ reference, layers: [root], config, output });
      return output;
    } finally {
      rmSync(root, { recursive: true, force: true });
    }
  });
}
