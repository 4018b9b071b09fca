import { describe, expect, it } from 'vitest';
import { KeyedLock } from './locks.ts';

describe('KeyedLock', () => {
  it('refuses a call while another is under way, and lets an order wait for it', async () => {
    const locks = new KeyedLock();
    const seen: string[] = [];
    let release = (): void => undefined;
    const first = locks.tryRun('volume a', async () => {
      await new Promise<void>((resolve) => (release = resolve));
      seen.push('call');
    });
    await expect(locks.tryRun('volume a', async () => 1)).rejects.toMatchObject({
      code: 'OPERATION_PENDING',
    });
    const order = locks.run('volume a', async () => seen.push('order'));
    await expect(locks.tryRun('volume b', async () => 2)).resolves.toBe(2);
    release();
    await Promise.all([first, order]);
    expect(seen).toEqual(['call', 'order']);
    await expect(locks.tryRun('volume a', async () => 3)).resolves.toBe(3);
  });

  it('goes on after a body threw', async () => {
    const locks = new KeyedLock();
    const failed = locks.run('a', () => Promise.reject(new Error('no')));
    const next = locks.run('a', async () => 'yes');
    await expect(failed).rejects.toThrow('no');
    await expect(next).resolves.toBe('yes');
    await locks.idle();
    expect(locks.busy('a')).toBe(false);
  });
});
