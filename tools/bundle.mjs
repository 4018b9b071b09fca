// One process as one file, by esbuild; addons stay outside and lie beside it.
import { readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const top = resolve(dirname(fileURLToPath(import.meta.url)), '..');

/** CommonJS packages inside an ES module look for these. */
const banner = [
  "import{createRequire as __createRequire}from'node:module';",
  "import{dirname as __dirnameOf}from'node:path';",
  "import{fileURLToPath as __toPath}from'node:url';",
  'const require=__createRequire(import.meta.url);const __filename=__toPath(import.meta.url);const __dirname=__dirnameOf(__filename);',
].join('');

/** @param {string} entry @param {string} outfile */
export async function bundle(entry, outfile) {
  await build({
    entryPoints: [entry],
    outfile,
    bundle: true,
    platform: 'node',
    format: 'esm',
    target: 'node20',
    conditions: ['@holdfast/source'],
    external: ['better-sqlite3'],
    legalComments: 'none',
    minifySyntax: true,
    minifyWhitespace: true,
    keepNames: true,
    logLevel: 'error',
    banner: { js: banner },
    nodePaths: [join(top, 'packages/common/node_modules'), join(top, 'packages/proto/node_modules')],
  });
  // A shebang of an entry point would stand behind the banner.
  writeFileSync(outfile, readFileSync(outfile, 'utf8').replace(/^#!.*\n/m, ''));
}
