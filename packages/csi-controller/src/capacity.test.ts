import { describe, expect, it } from 'vitest';
import { sizeForCopy, sizeForCreate, sizeForExpand } from './capacity.ts';

const MIB = 1n << 20n;
const range = (required: bigint, limit = 0n) => ({ required_bytes: `${required}`, limit_bytes: `${limit}` });

describe('sizeForCreate', () => {
  it('gives 1 GiB where nothing is asked for, and no more than a lower limit', () => {
    expect(sizeForCreate(null, 'ext4')).toEqual({ sizeBytes: 1024n * MIB, limitBytes: 0n });
    expect(sizeForCreate(range(0n, 100n * MIB + 5n), 'ext4').sizeBytes).toBe(100n * MIB);
    expect(sizeForCreate(range(0n, 2048n * MIB), 'ext4').sizeBytes).toBe(1024n * MIB);
  });

  it('rounds up to whole MiB, and to what the file system needs', () => {
    expect(sizeForCreate(range(100n * MIB + 1n), 'ext4').sizeBytes).toBe(101n * MIB);
    expect(sizeForCreate(range(1n), 'block').sizeBytes).toBe(MIB);
    expect(sizeForCreate(range(1n), 'xfs').sizeBytes).toBe(300n * MIB);
    expect(sizeForCreate(range(9007199254740993n), 'block').sizeBytes).toBe(9007199255789568n);
  });

  it('answers OUT_OF_RANGE where the limit leaves nothing', () => {
    for (const [low, high, use] of [
      [100n * MIB + 1n, 100n * MIB + 2n, 'ext4'],
      [2n * MIB, MIB, 'block'],
      [1n, 299n * MIB, 'xfs'],
      [0n, MIB - 1n, 'block'],
    ] as const) {
      expect(() => sizeForCreate(range(low, high), use)).toThrow(
        expect.objectContaining({ code: 'OUT_OF_RANGE' }),
      );
    }
  });

  it('refuses negative sizes', () => {
    expect(() => sizeForCreate(range(-1n), 'ext4')).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
    );
  });
});

describe('sizeForCopy', () => {
  it('is never smaller than the source, and larger where that is asked for', () => {
    expect(sizeForCopy(null, 5n * MIB)).toEqual({ sizeBytes: 5n * MIB, limitBytes: 0n });
    expect(sizeForCopy(range(MIB), 5n * MIB).sizeBytes).toBe(5n * MIB);
    expect(sizeForCopy(range(5n * MIB + 1n), 5n * MIB).sizeBytes).toBe(6n * MIB);
    expect(() => sizeForCopy(range(0n, 4n * MIB), 5n * MIB)).toThrow(
      expect.objectContaining({ code: 'OUT_OF_RANGE' }),
    );
  });
});

describe('sizeForExpand', () => {
  it('needs a size, rounds it up, and respects the limit', () => {
    expect(sizeForExpand(range(MIB + 1n)).sizeBytes).toBe(2n * MIB);
    expect(() => sizeForExpand(null)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    expect(() => sizeForExpand(range(MIB + 1n, MIB + 2n))).toThrow(
      expect.objectContaining({ code: 'OUT_OF_RANGE' }),
    );
  });
});
