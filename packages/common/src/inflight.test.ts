import { describe, expect, it } from 'vitest';
import { InFlight } from './inflight.ts';

describe('InFlight', () => {
  it('refuses a second call for the same key with ABORTED and lets it in once the first has ended', async () => {
    const inflight = new InFlight();
    let release = (): void => undefined;
    const first = inflight.run(['volume a'], () => new Promise<void>((resolve) => (release = resolve)));
    await expect(inflight.run(['volume b', 'volume a'], async () => 1)).rejects.toMatchObject({
      code: 'OPERATION_PENDING',
    });
    await expect(inflight.run(['volume b'], async () => 2)).resolves.toBe(2);
    release();
    await first;
    await expect(inflight.run(['volume a'], async () => 3)).resolves.toBe(3);
  });

  it('frees its keys when the body throws', async () => {
    const inflight = new InFlight();
    await expect(inflight.run(['a'], () => Promise.reject(new Error('no')))).rejects.toThrow('no');
    await expect(inflight.run(['a'], async () => 4)).resolves.toBe(4);
  });
});
