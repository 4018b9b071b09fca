import { describe, expect, it } from 'vitest';
import { age, camelKeys, enumWord, formatBytes, parseBytes, table } from './output.ts';

describe('output', () => {
  it('aligns numbers and sizes to the right, words to the left', () => {
    expect(
      table(
        ['NAME', 'SIZE', 'N'],
        [
          ['a', '1.5 GiB', '7'],
          ['longer', '512 B', '12'],
        ],
      ),
    ).toBe(['NAME       SIZE   N', 'a       1.5 GiB   7', 'longer    512 B  12'].join('\n'));
  });

  it.each([
    ['10G', 10n << 30n],
    ['512MiB', 512n << 20n],
    ['1.5k', 1536n],
    ['4096', 4096n],
    ['12 TB', 12n << 40n],
  ])('reads the size %s', (text, bytes) => {
    expect(parseBytes(text)).toBe(bytes);
  });

  it.each(['', 'G', '10X', '-1G', '1e3'])('refuses the size "%s"', (text) => {
    expect(parseBytes(text)).toBeUndefined();
  });

  it('writes sizes for people', () => {
    expect(formatBytes(0n)).toBe('0 B');
    expect(formatBytes(1610612736n)).toBe('1.5 GiB');
    expect(formatBytes('1048576')).toBe('1 MiB');
  });

  it('turns messages into stable JSON shapes', () => {
    expect(camelKeys({ size_bytes: '1', hosts: [{ host_id: 2 }], parameters: { keep_me: 'x' } })).toEqual({
      sizeBytes: '1',
      hosts: [{ hostId: 2 }],
      parameters: { keep_me: 'x' },
    });
    expect(enumWord('FENCING_CLASS', 'FENCING_CLASS_LEASE_ONLY')).toBe('lease-only');
  });

  it('says how long ago', () => {
    expect(age('0')).toBe('-');
    expect(age('1000', 61_000)).toBe('60s');
    expect(age('1000', 601_000)).toBe('10m');
  });
});
