/**
 * Which fields of the wire contracts hold secrets, read from the contracts themselves (the `csi_secret` option of
 * csi.proto), and a copy of a message without them. Whatever logs a message logs `withoutSecrets(…)` of it.
 */
import protobuf from 'protobufjs';
import { descriptor } from './gen/descriptor.ts';

interface MessageShape {
  readonly secrets: ReadonlySet<string>;
  /** Field name -> full name of its message type. Map values included. */
  readonly children: ReadonlyMap<string, string>;
}

const shapes = new Map<string, MessageShape>();

function readShapes(namespace: protobuf.NamespaceBase): void {
  for (const object of namespace.nestedArray) {
    if (object instanceof protobuf.Type) {
      const secrets = new Set<string>();
      const children = new Map<string, string>();
      for (const field of object.fieldsArray) {
        if (field.getOption('(csi_secret)') === true) secrets.add(field.name);
        field.resolve();
        if (field.resolvedType instanceof protobuf.Type) {
          children.set(field.name, field.resolvedType.fullName.slice(1));
        }
      }
      shapes.set(object.fullName.slice(1), { secrets, children });
    }
    if (object instanceof protobuf.Namespace) readShapes(object);
  }
}
readShapes(protobuf.Root.fromJSON(descriptor as protobuf.INamespace).resolveAll());

/** Full message name (`csi.v1.CreateVolumeRequest`) -> names of its secret fields; only messages that have some. */
export const secretFields: ReadonlyMap<string, ReadonlySet<string>> = new Map(
  [...shapes].filter(([, shape]) => shape.secrets.size > 0).map(([name, shape]) => [name, shape.secrets]),
);

function redact(value: unknown, type: string): unknown {
  if (Array.isArray(value)) return value.map((item) => redact(item, type));
  const shape = shapes.get(type);
  if (shape === undefined || typeof value !== 'object' || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([name, field]): [string, unknown] => {
      if (shape.secrets.has(name)) return [name, maskValues(field)];
      const child = shape.children.get(name);
      return [name, child === undefined ? field : redact(field, child)];
    }),
  );
}

/** The keys of a secrets map say what was passed and may be logged; the values may not. */
function maskValues(field: unknown): unknown {
  if (typeof field !== 'object' || field === null || Array.isArray(field)) return '[secret]';
  return Object.fromEntries(Object.keys(field).map((key) => [key, '[secret]']));
}

/**
 * A copy of `message` in which every secret value is "[secret]".
 * @param type full name, for example `csi.v1.NodeStageVolumeRequest`. An unknown one throws: it would leak silently.
 */
export function withoutSecrets(type: string, message: unknown): unknown {
  if (!shapes.has(type)) throw new Error(`no message type ${type} in the wire contracts`);
  return redact(message, type);
}
