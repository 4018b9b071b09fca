// Turns proto/**/*.proto into src/gen: one JSON descriptor module (so that a bundle needs no .proto at run time) and the
// TypeScript types of every message and service. Run by `pnpm generate`; its output is not committed.
import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, isAbsolute, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import protobuf from 'protobufjs';

const require = createRequire(import.meta.url);
const here = dirname(fileURLToPath(import.meta.url));
const protoDir = join(here, 'proto');
const outDir = join(here, 'src', 'gen');
const protos = readdirSync(protoDir, { recursive: true })
  .filter((f) => f.endsWith('.proto'))
  .sort();

function packageDir(proto) {
  const match = /^package ([\w.]+);/m.exec(readFileSync(join(protoDir, proto), 'utf8'));
  if (!match) throw new Error(`${proto} names no package`);
  return match[1].replaceAll('.', '/');
}

const newest = Math.max(...protos.map((f) => statSync(join(protoDir, f)).mtimeMs), statSync(join(here, 'generate.mjs')).mtimeMs);
const stamp = join(outDir, 'stamp');
try {
  if (Number(readFileSync(stamp, 'utf8')) >= newest) process.exit(0);
} catch {
  // never generated
}
rmSync(outDir, { recursive: true, force: true });
mkdirSync(outDir, { recursive: true });

protobuf.common(
  'descriptor',
  require('protobufjs/google/protobuf/descriptor.json').nested.google.nested.protobuf.nested,
);
const root = new protobuf.Root();
root.resolvePath = (_origin, target) =>
  target.startsWith('google/protobuf/') ? target : isAbsolute(target) ? target : join(protoDir, target);
root.loadSync(protos, { keepCase: true });
root.resolveAll();
const json = JSON.stringify(root.toJSON({ keepComments: false }));
writeFileSync(
  join(outDir, 'descriptor.ts'),
  `// Made by generate.mjs.\nexport const descriptor: unknown = JSON.parse(${JSON.stringify(json)});\n`,
);

const loaderDir = dirname(require.resolve('@grpc/proto-loader/package.json'));
execFileSync(
  process.execPath,
  [
    join(loaderDir, 'build/bin/proto-loader-gen-types.js'),
    '--longs=String', '--enums=String', '--bytes=Buffer', '--defaults', '--oneofs', '--keepCase', '--importFileExtension=.js',
    '--grpcLib=@grpc/grpc-js', '-I', protoDir, '-O', join(outDir, 'types'), ...protos,
  ],
  { stdio: ['ignore', 'ignore', 'inherit'] },
);
// One barrel a package, so that callers import types by name.
for (const dir of new Set(protos.map((f) => packageDir(f)))) {
  const files = readdirSync(join(outDir, 'types', dir)).filter((f) => f.endsWith('.ts') && f !== 'index.ts');
  writeFileSync(
    join(outDir, 'types', dir, 'index.ts'),
    files.map((f) => `export type * from './${f}';\n`).join(''),
  );
}
writeFileSync(stamp, String(newest));
