import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { asUuid, loadIdentity } from './identity.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'holdfast-identity-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

describe('identity', () => {
  it('draws a node id once and keeps it', () => {
    const first = loadIdentity(join(directory, 'state'), 'node-1');
    expect(first.nodeId).toMatch(/^node-1\.[0-9a-f]{8}$/);
    expect(loadIdentity(join(directory, 'state'), 'node-1').nodeId).toBe(first.nodeId);
    expect(readFileSync(join(directory, 'state', 'node-id'), 'utf8').trim()).toBe(first.nodeId);
  });

  it('gives another node of the same name another id', () => {
    const a = loadIdentity(join(directory, 'a'), 'node-1');
    const b = loadIdentity(join(directory, 'b'), 'node-1');
    expect(a.nodeId).not.toBe(b.nodeId);
  });

  it('refuses a state directory of a node with another name', () => {
    loadIdentity(directory, 'node-1');
    expect(() => loadIdentity(directory, 'node-2')).toThrow('node-id');
  });

  it('reads the machine id in systemd form and the boot id of the kernel', () => {
    const machine = join(directory, 'machine-id');
    const boot = join(directory, 'boot_id');
    writeFileSync(machine, '0123456789ABCDEF0123456789abcdef\n');
    writeFileSync(boot, '11111111-2222-3333-4444-555555555555\n');
    const found = loadIdentity(join(directory, 'state'), 'n', {}, machine, boot);
    expect(found.machineId).toBe('01234567-89ab-cdef-0123-456789abcdef');
    expect(found.bootId).toBe('11111111-2222-3333-4444-555555555555');
  });

  it('takes overrides, and refuses one that is no UUID', () => {
    const machineId = '99999999-2222-3333-4444-555555555555';
    expect(loadIdentity(directory, 'n', { machineId }).machineId).toBe(machineId);
    expect(() => loadIdentity(directory, 'n', { bootId: 'yesterday' })).toThrow('boot id');
  });

  it.each(['', 'a b', '-x', 'x'.repeat(101)])('refuses the node name "%s"', (name) => {
    expect(() => loadIdentity(directory, name)).toThrow('node name');
  });

  it('knows a UUID with and without hyphens', () => {
    expect(asUuid('nonsense')).toBeUndefined();
    expect(asUuid('0123456789abcdef0123456789abcdef')).toBe('01234567-89ab-cdef-0123-456789abcdef');
  });
});
