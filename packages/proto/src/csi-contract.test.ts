/**
 * csi.proto was transcribed by hand. This compares it, fact by fact, with the published one of the Go module, whose sum
 * tools/go.sum keeps: every service, method, message, field, enum value and option of either file is one line, and both
 * lists of lines must be the same.
 */
import { execFileSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import protobuf from 'protobufjs';
import { describe, expect, it } from 'vitest';

const require = createRequire(import.meta.url);
const here = dirname(fileURLToPath(import.meta.url));
const version = 'v1.12.0';
const spec = `github.com/container-storage-interface/spec@${version}`;

function publishedProto(): string {
  const answer = execFileSync('go', ['mod', 'download', '-json', spec], {
    cwd: join(here, '../../../tools'),
    encoding: 'utf8',
    timeout: 120_000,
  });
  const module = JSON.parse(answer) as { Version: string; Dir: string };
  expect(module.Version).toBe(version);
  return join(module.Dir, 'csi.proto');
}

function load(file: string): protobuf.Root {
  const google = require('protobufjs/google/protobuf/descriptor.json') as {
    nested: { google: { nested: { protobuf: { nested: Record<string, unknown> } } } };
  };
  protobuf.common('descriptor', google.nested.google.nested.protobuf.nested);
  const root = new protobuf.Root();
  root.resolvePath = (_origin, target) => target;
  root.loadSync(file, { keepCase: true });
  return root.resolveAll();
}

const options = (object: protobuf.ReflectionObject | undefined): string =>
  JSON.stringify(Object.entries(object?.options ?? {}).sort());

function fieldFact(field: protobuf.Field): string {
  const type = field.resolvedType?.fullName ?? field.type;
  const label = field.repeated
    ? 'repeated '
    : field.map
      ? `map from ${(field as protobuf.MapField).keyType} `
      : '';
  const oneof = field.partOf ? ` in oneof ${field.partOf.name}` : '';
  const extend = field.extend === undefined ? '' : ` extends ${field.extend}`;
  return `${label}${type} = ${field.id}${oneof}${extend} presence ${field.hasPresence}`;
}

/** One line for each fact of the csi.v1 package. An object of a kind that is not known here fails the test. */
function facts(namespace: protobuf.NamespaceBase): string[] {
  const lines: string[] = [];
  for (const object of namespace.nestedArray) {
    const head = `${object.constructor.name} ${object.fullName}`;
    if (object instanceof protobuf.Type) {
      lines.push(`${head} ${options(object)} oneofs ${object.oneofsArray.map((o) => o.name).join()}`);
      lines.push(`${head} reserved ${JSON.stringify(object.reserved ?? [])}`);
      for (const field of object.fieldsArray) {
        lines.push(`field ${field.fullName} ${fieldFact(field)} ${options(field)}`);
      }
      lines.push(...facts(object));
    } else if (object instanceof protobuf.Enum) {
      lines.push(`${head} ${options(object)}`);
      for (const [name, value] of Object.entries(object.values)) {
        const marks = JSON.stringify(object.valuesOptions?.[name] ?? {});
        lines.push(`value ${object.fullName}.${name} = ${value} ${marks}`);
      }
    } else if (object instanceof protobuf.Service) {
      lines.push(`${head} ${options(object)}`);
      for (const method of object.methodsArray) {
        lines.push(
          `method ${method.fullName} (${method.requestStream ? 'stream ' : ''}${method.resolvedRequestType?.fullName})` +
            ` returns (${method.responseStream ? 'stream ' : ''}${method.resolvedResponseType?.fullName}) ${options(method)}`,
        );
      }
    } else if (object instanceof protobuf.Field) {
      lines.push(`extension ${object.fullName} ${fieldFact(object)}`);
    } else if (object instanceof protobuf.Namespace) {
      lines.push(...facts(object));
    } else {
      throw new Error(`an object of an unknown kind: ${head}`);
    }
  }
  return lines;
}

const csiFacts = (file: string): string[] => {
  const root = load(file);
  return facts(root.lookup('csi.v1') as protobuf.Namespace).sort();
};

describe('csi.proto', () => {
  const ours = csiFacts(join(here, '../proto/csi/csi.proto'));
  const count = (kind: string): number => ours.filter((line) => line.startsWith(`${kind} `)).length;

  it('is the whole contract: five services with 32 methods, and more messages and fields than a truncated file has', () => {
    expect(count('Service')).toBe(5);
    expect(count('method')).toBe(32);
    expect(count('field')).toBeGreaterThan(190);
    expect(count('value')).toBeGreaterThan(45);
    expect(count('extension')).toBe(7);
    expect(ours.filter((line) => line.includes('csi_secret)'))).toHaveLength(19);
    expect(ours.filter((line) => line.includes('alpha_method)'))).toHaveLength(2);
  });

  it('says exactly what the published specification 1.12.0 says', () => {
    expect(ours).toEqual(csiFacts(publishedProto()));
  });

  it('would notice one changed field number', () => {
    const broken = ours.map((line) =>
      line.replace('.csi.v1.Volume.capacity_bytes int64 = 1', '.csi.v1.Volume.capacity_bytes int64 = 9'),
    );
    expect(broken).not.toEqual(csiFacts(publishedProto()));
  });
});
