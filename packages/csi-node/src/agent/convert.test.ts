import { describe, expect, it } from 'vitest';
import { HoldfastError } from '@holdfast/common';
import { countSlabs, fromNativeError, slabsOf } from './convert.ts';

describe('slab runs', () => {
  it('come apart into their slabs', () => {
    const runs = [
      { first: 5n, count: 3, generation: 1n },
      { first: 9n, count: 1, generation: 2n },
    ];
    expect(countSlabs(runs)).toBe(4);
    expect([...slabsOf(runs)].map((s) => [s.slab, s.generation])).toEqual([
      [5n, 1n],
      [6n, 1n],
      [7n, 1n],
      [9n, 2n],
    ]);
  });
});

describe('errors of the engine', () => {
  it.each([
    ['HF_BUSY', 'IN_USE'],
    ['HF_CORRUPT', 'CORRUPT'],
    ['HF_LEASE_EXPIRED', 'UNAVAILABLE'],
    ['HF_SOMETHING_NEW', 'INTERNAL'],
  ])('%s travels as %s with its sentence', (native, code) => {
    const made = fromNativeError(Object.assign(new Error('a sentence'), { code: native }));
    expect(made).toBeInstanceOf(HoldfastError);
    expect(made).toMatchObject({ code, message: 'a sentence' });
  });

  it('others stay as they are', () => {
    const error = new Error('x');
    expect(fromNativeError(error)).toBe(error);
  });
});
