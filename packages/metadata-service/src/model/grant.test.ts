/** The grant machine, every pair of state and event: what the table of DESIGN 6.7 names happens, everything else is STALE. */
import { describe, expect, it } from 'vitest';
import { isMaintenance, stepGrant, type GrantEvent } from './grant.ts';
import type { GrantRecord, GrantState, HostLife } from './records.ts';

const holder: HostLife = { hostId: 3, generation: 7n, nodeId: 'node-a' };
const other: HostLife = { hostId: 4, generation: 2n, nodeId: 'node-b' };
const epoch = 10n;

function grantIn(state: GrantState): GrantRecord {
  return { state, epoch, holder, publishId: 'p1', readOnly: false };
}

const stage = {
  type: 'stage',
  holder,
  publishId: 'p1',
  publishCurrent: true,
  hostLive: true,
  readOnly: false,
  blockedBy: '',
  nextEpoch: 11n,
} as const;
const maintain = { type: 'maintain', holder, hostLive: true, blockedBy: '', nextEpoch: 11n } as const;

/** Every event as its right sender would send it. */
const events = {
  stage,
  maintain,
  opened: { type: 'opened', holder, epoch },
  returned: { type: 'returned', holder, epoch },
  'closed-on-disk': { type: 'closed-on-disk', epoch },
  unpublish: { type: 'unpublish' },
  'revoke-acknowledged': { type: 'revoke-acknowledged', holder, epoch, proof: 'said so' },
  'revoke-timeout': { type: 'revoke-timeout', epoch },
  'generation-dead': { type: 'generation-dead', hostId: 3, generation: 7n, proof: 'lock free' },
} satisfies Record<GrantEvent['type'], GrantEvent>;

const states: readonly GrantState[] = ['FREE', 'OFFERED', 'OPEN', 'REVOKING'];

/** The table. `same`: the reply is repeated. What is not here is stale. */
const table: Record<string, GrantState | 'same'> = {
  'FREE stage': 'OFFERED',
  'FREE maintain': 'OFFERED',
  'OFFERED opened': 'OPEN',
  'OFFERED stage': 'same',
  'OPEN stage': 'same',
  'OFFERED returned': 'FREE',
  'OPEN returned': 'FREE',
  'OFFERED closed-on-disk': 'FREE',
  'OPEN closed-on-disk': 'FREE',
  'OFFERED unpublish': 'REVOKING',
  'OPEN unpublish': 'REVOKING',
  'REVOKING revoke-acknowledged': 'FREE',
  'REVOKING returned': 'FREE',
  'REVOKING closed-on-disk': 'FREE',
  'REVOKING revoke-timeout': 'REVOKING',
  'OFFERED generation-dead': 'FREE',
  'OPEN generation-dead': 'FREE',
  'REVOKING generation-dead': 'FREE',
};

const pairs = states.flatMap((state) =>
  Object.values(events).map((event) => ({ state, event, name: `${state} ${event.type}` })),
);

/** What must come out. Whatever frees a grant leaves its proof, and keeps the epoch and the last holder. */
function wantedOutcome(name: string): object {
  const wanted = table[name];
  if (wanted === undefined) return { type: 'stale' };
  if (wanted === 'same') return { type: 'same' };
  if (wanted !== 'FREE') return { type: 'changed', next: { state: wanted } };
  return {
    type: 'changed',
    next: { state: 'FREE', epoch, holder },
    audit: { proof: expect.stringMatching(/./) },
  };
}

describe('every pair of state and event', () => {
  it.each(pairs)('$name', ({ state, event, name }) => {
    const before = grantIn(state);
    const copy = structuredClone(before);
    expect(stepGrant(before, event)).toMatchObject(wantedOutcome(name));
    expect(before).toEqual(copy); // the machine itself changes nothing
  });
});

describe('actions', () => {
  it('unpublish asks the holder to let go, a timeout fences its host', () => {
    expect(stepGrant(grantIn('OPEN'), events.unpublish)).toMatchObject({
      action: { type: 'revoke', holder, epoch },
    });
    expect(stepGrant(grantIn('REVOKING'), events['revoke-timeout'])).toMatchObject({
      action: { type: 'fence-host', holder },
    });
  });

  it('a maintenance grant is under no publication, for writing, and known as one until it is free', () => {
    const outcome = stepGrant(grantIn('FREE'), { ...maintain, holder: other });
    expect(outcome).toMatchObject({
      next: { state: 'OFFERED', epoch: 11n, holder: other, publishId: '', readOnly: false },
    });
    if (outcome.type !== 'changed') throw new Error('unchanged');
    expect([isMaintenance(outcome.next), isMaintenance(grantIn('OPEN'))]).toEqual([true, false]);
    expect(isMaintenance({ ...outcome.next, state: 'FREE' })).toBe(false);
  });

  it('stage gives the new epoch to the one who staged', () => {
    expect(
      stepGrant(grantIn('FREE'), { ...stage, holder: other, publishId: 'p2', readOnly: true }),
    ).toMatchObject({
      next: { state: 'OFFERED', epoch: 11n, holder: other, publishId: 'p2', readOnly: true },
    });
  });
});

describe('a message about another epoch, another holder or another generation is stale in every state', () => {
  const wrong: GrantEvent[] = [
    { type: 'opened', holder, epoch: 9n },
    { type: 'opened', holder: other, epoch },
    { type: 'opened', holder: { ...holder, generation: 6n }, epoch },
    { type: 'returned', holder, epoch: 9n },
    { type: 'returned', holder, epoch: 11n },
    { type: 'returned', holder: other, epoch },
    { type: 'returned', holder: { ...holder, generation: 6n }, epoch },
    { type: 'returned', holder: { ...holder, nodeId: 'node-c' }, epoch },
    { type: 'closed-on-disk', epoch: 9n },
    { type: 'revoke-acknowledged', holder: other, epoch, proof: 'x' },
    { type: 'revoke-acknowledged', holder, epoch: 9n, proof: 'x' },
    { type: 'revoke-timeout', epoch: 9n },
    { type: 'generation-dead', hostId: 3, generation: 6n, proof: 'x' },
    { type: 'generation-dead', hostId: 3, generation: 8n, proof: 'x' },
    { type: 'generation-dead', hostId: 4, generation: 7n, proof: 'x' },
  ];
  it.each(states)('%s', (state) => {
    for (const event of wrong) expect(stepGrant(grantIn(state), event)).toMatchObject({ type: 'stale' });
  });
});

describe('stage is refused', () => {
  it.each([
    ['when the publish id is not current', { publishCurrent: false }],
    ['when the host is not LIVE', { hostLive: false }],
    ['when the epoch would not grow', { nextEpoch: 10n }],
    ['when grants of the other kind are out', { blockedBy: 'node-b reads it' }],
  ])('%s', (_why, change) => {
    expect(stepGrant(grantIn('FREE'), { ...stage, ...change })).toMatchObject({ type: 'stale' });
    // The same guards stand before a maintenance grant, which has no publication.
    const other = 'publishCurrent' in change ? { hostLive: false } : change;
    expect(stepGrant(grantIn('FREE'), { ...maintain, ...other })).toMatchObject({ type: 'stale' });
  });

  it.each([
    ['to another host', { holder: other }],
    ['to the same node under another generation', { holder: { ...holder, generation: 8n } }],
    ['under another publish id', { publishId: 'p2' }],
    ['with another mode', { readOnly: true }],
  ])('of a granted volume %s', (_why, change) => {
    for (const state of ['OFFERED', 'OPEN'] as const) {
      expect(stepGrant(grantIn(state), { ...stage, ...change })).toMatchObject({ type: 'stale' });
    }
  });
});
