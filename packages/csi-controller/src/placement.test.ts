import { poolTopology } from '@holdfast/common';
import type { Pool__Output } from '@holdfast/proto';
import { describe, expect, it } from 'vitest';
import { isAccessible, placementGroups, poolNamed } from './placement.ts';

const a = '11111111-2222-3333-4444-55555555555a';
const b = '11111111-2222-3333-4444-55555555555b';
const pool = (uuid: string, name: string) => ({ uuid, name }) as Pool__Output;
const term = (...uuids: string[]) => ({ segments: poolTopology(uuids) });

describe('placementGroups', () => {
  it('is "any pool" where nothing is required', () => {
    expect(placementGroups(null, undefined)).toEqual([[]]);
  });

  it('tries the preferred node first and then every allowed pool', () => {
    const requirement = { requisite: [term(a), term(b)], preferred: [term(b), term(a)] };
    expect(placementGroups(requirement, undefined)).toEqual([[b], [a], [a, b]]);
  });

  it('takes any pool of a node that reaches several, and only the one that the parameters name', () => {
    const requirement = { requisite: [term(a, b)], preferred: [term(a, b)] };
    expect(placementGroups(requirement, undefined)).toEqual([[a, b]]);
    expect(placementGroups(requirement, pool(b, 'slow'))).toEqual([[b]]);
  });

  it('answers RESOURCE_EXHAUSTED where the requirement leaves no pool', () => {
    expect(() => placementGroups({ requisite: [term(a)], preferred: [] }, pool(b, 'slow'))).toThrow(
      expect.objectContaining({ code: 'TOO_MANY', message: expect.stringContaining('slow') }),
    );
    expect(() =>
      placementGroups({ requisite: [{ segments: { zone: 'x' } }], preferred: [] }, undefined),
    ).toThrow(expect.objectContaining({ code: 'TOO_MANY' }));
  });
});

describe('isAccessible', () => {
  it('asks for one matching requisite term, or none where there are none', () => {
    expect(isAccessible(null, a)).toBe(true);
    expect(isAccessible({ requisite: [term(b), term(a)], preferred: [] }, a)).toBe(true);
    expect(isAccessible({ requisite: [term(b)], preferred: [term(a)] }, a)).toBe(false);
  });
});

describe('poolNamed', () => {
  const pools = [pool(a, 'fast'), pool(b, 'slow'), pool('c', 'slow')];
  it('finds by name or UUID', () => {
    expect(poolNamed(pools, 'fast').uuid).toBe(a);
    expect(poolNamed(pools, b).name).toBe('slow');
  });
  it('refuses unknown and ambiguous names, naming the known pools', () => {
    expect(() => poolNamed(pools, 'none')).toThrow(/Known pools: fast/);
    expect(() => poolNamed(pools, 'slow')).toThrow(/2 pools/);
    expect(() => poolNamed([], 'x')).toThrow(/none yet/);
  });
});
