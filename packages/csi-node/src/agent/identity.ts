/**
 * Who this node is. The node id names one installation of one node, "<name>.<8 hex>": it is drawn once and kept in the
 * state directory, so that a re-created node of the same name is another node. Machine and boot id go into the host's
 * record at join, because a fence looks at what was recorded then, never at what is true later.
 */
import { randomBytes, randomUUID } from 'node:crypto';
import { mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { HoldfastError } from '@holdfast/common';
import { writeFileDurably } from './durable.ts';

export interface Identity {
  nodeId: string;
  name: string;
  machineId: string;
  bootId: string;
}

export interface IdentityOverrides {
  /** Several nodes on one machine (development) need a machine id each. */
  machineId?: string;
  bootId?: string;
}

const uuidPattern = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** 32 hex digits with or without hyphens, any case, as lower-case hyphenated text; undefined when it is neither. */
export function asUuid(text: string): string | undefined {
  const digits = text.trim().toLowerCase().replaceAll('-', '');
  if (!/^[0-9a-f]{32}$/.test(digits)) return undefined;
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return undefined;
  }
}

function requireUuid(text: string, what: string): string {
  const uuid = asUuid(text);
  if (uuid === undefined || !uuidPattern.test(uuid)) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `${what} is "${text}", which is not a UUID. Give 32 hex digits.`,
    );
  }
  return uuid;
}

function persisted(path: string, draw: () => string, valid: (text: string) => boolean): string {
  const found = readIfThere(path);
  if (found !== undefined && valid(found)) return found;
  if (found !== undefined && found !== '') {
    throw new HoldfastError(
      'FAILED_PRECONDITION',
      `${path} holds "${found}", which this node cannot use as its id. Restore the file, or remove it if the node was re-created under another name.`,
    );
  }
  const drawn = draw();
  writeFileDurably(path, `${drawn}\n`);
  return drawn;
}

/** Reads or draws the node's identity. `bootIdPath` and `machineIdPath` are the kernel's and systemd's files. */
export function loadIdentity(
  stateDir: string,
  name: string,
  overrides: IdentityOverrides = {},
  machineIdPath = '/etc/machine-id',
  bootIdPath = '/proc/sys/kernel/random/boot_id',
): Identity {
  if (name === '' || name.length > 100 || !/^[A-Za-z0-9][A-Za-z0-9._-]*$/.test(name)) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      `The node name "${name}" cannot be used: 1 to 100 letters, digits, dots, dashes and underscores, a letter or digit first.`,
    );
  }
  mkdirSync(stateDir, { recursive: true, mode: 0o700 });
  const nodeId = persisted(
    join(stateDir, 'node-id'),
    () => `${name}.${randomBytes(4).toString('hex')}`,
    (text) => text.slice(0, -9) === name && /^\.[0-9a-f]{8}$/.test(text.slice(-9)),
  );
  const machine =
    overrides.machineId ??
    readIfThere(machineIdPath) ??
    persisted(join(stateDir, 'machine-id'), randomUUID, (text) => asUuid(text) !== undefined);
  const boot = overrides.bootId ?? readIfThere(bootIdPath) ?? '';
  return {
    nodeId,
    name,
    machineId: requireUuid(machine, 'The machine id'),
    bootId: requireUuid(boot, 'The boot id'),
  };
}
