import type { Host__Output, Pool__Output, Volume__Output } from '@holdfast/proto';
import { describe, expect, it } from 'vitest';
import { volumeCondition } from './condition.ts';

const host = (over: Partial<Host__Output> = {}) =>
  ({ node_id: 'a.1', state: 'HOST_STATE_LIVE', fence_reason: '', waiting_for: '', ...over }) as Host__Output;
const pool = (over: Partial<Pool__Output> = {}) =>
  ({
    uuid: 'p',
    name: 'fast',
    state: 'ACTIVE',
    slab_count: '10',
    slabs_free: '5',
    hosts: [host()],
    ...over,
  }) as Pool__Output;
const volume = (over: Partial<Volume__Output> = {}) =>
  ({ pool_uuid: 'p', granted_node_id: 'a.1', grant: 'GRANT_STATE_OPEN', ...over }) as Volume__Output;

describe('volumeCondition', () => {
  it('is normal for an open volume on a live node, and for one that nobody holds', () => {
    expect(volumeCondition(volume(), [pool()])).toMatchObject({ abnormal: false });
    expect(
      volumeCondition(volume({ granted_node_id: '', grant: 'GRANT_STATE_FREE' }), [pool()]),
    ).toMatchObject({
      abnormal: false,
    });
  });

  it.each<[string, RegExp, Partial<Volume__Output>, Pool__Output[]]>([
    ['no node sees the pool', /No node has reported pool p/, {}, []],
    [
      'the pool is refused',
      /refused: a cloned disk/,
      {},
      [pool({ state: 'REFUSED', message: 'a cloned disk' })],
    ],
    [
      'its holder is being fenced',
      /a\.1.*silent.*waiting for: the lock/,
      {},
      [
        pool({
          hosts: [host({ state: 'HOST_STATE_CUTTING', fence_reason: 'silent', waiting_for: 'the lock' })],
        }),
      ],
    ],
    ['its grant is being revoked', /taken back/, { grant: 'GRANT_STATE_REVOKING' }, [pool()]],
    ['the pool is full', /no free slab/, {}, [pool({ slabs_free: '0' })]],
  ])('is abnormal when %s', (_, message, over, pools) => {
    const condition = volumeCondition(volume(over), pools);
    expect(condition.abnormal).toBe(true);
    expect(condition.message).toMatch(message);
  });
});
