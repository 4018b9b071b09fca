/** The host machine, every pair of state and event: what the table of DESIGN 6.7 names happens, everything else is STALE. */
import { describe, expect, it } from 'vitest';
import { proofsOf, stepHost, type HostEvent, type HostSetting, type ProofKind } from './host.ts';
import type { FencingClass, HostRecord, HostState } from './records.ts';

const fencer = { hostId: 1, generation: 2n, nodeId: 'node-b' };

function hostIn(state: HostState): HostRecord {
  return {
    poolUuid: 'pool',
    nodeId: 'node-a',
    hostId: 3,
    generation: 7n,
    state,
    machineId: 'm1',
    bootId: 'b1',
    lockPath: '/run/a/lock',
    sinceUnixMs: 1,
    fence:
      state === 'FENCING' || state === 'CUTTING'
        ? { reason: 'silent', fencer: state === 'CUTTING' ? fencer : null, confirmedBy: '', alarms: 0 }
        : null,
    proof: state === 'DEAD' ? 'lock-free' : '',
  };
}

const setting: HostSetting = { poolUuid: 'pool', hostId: 3, fencing: 'loop', nowUnixMs: 99 };
const join = {
  type: 'join',
  nodeId: 'node-a',
  machineId: 'm1',
  bootId: 'b1',
  lockPath: '/run/a/lock',
  previousIoDead: false,
} as const;

/** Every event as its right sender would send it. */
const events: Record<string, HostEvent> = {
  join,
  'join with the old lock free': { ...join, previousIoDead: true },
  'join after a reboot': { ...join, bootId: 'b2' },
  ready: { type: 'ready', generation: 7n, classProved: true },
  'ready, class not proved': { type: 'ready', generation: 7n, classProved: false },
  suspect: { type: 'suspect', generation: 7n, reason: 'silent' },
  'page durable': { type: 'page-durable', generation: 7n, fencer },
  'fencer lost': { type: 'fencer-lost', generation: 7n },
  'leader change': { type: 'leader-change' },
  'heartbeat after the page': { type: 'heartbeat-after-page', generation: 7n },
  proof: { type: 'proof', generation: 7n, kind: 'lock-free', detail: 'x' },
  'proof of another class': { type: 'proof', generation: 7n, kind: 'lease-expired', detail: 'x' },
  'stop-ack': { type: 'stop-acknowledged', generation: 7n },
  'stopped on disk': { type: 'stopped-on-disk', generation: 7n },
  'new boot': { type: 'new-boot', machineId: 'm1', bootId: 'b2' },
  'new boot of another machine': { type: 'new-boot', machineId: 'm2', bootId: 'b2' },
  'same boot': { type: 'new-boot', machineId: 'm1', bootId: 'b1' },
};

/** The table. `JOINING+`: the next generation joins; a death on the way is marked with a dagger. */
const table: Record<string, HostState | 'JOINING+' | 'JOINING+†' | 'DEAD†' | 'same'> = {
  'DEAD join': 'JOINING+',
  'DEAD join with the old lock free': 'JOINING+',
  'DEAD join after a reboot': 'JOINING+',
  'JOINING join with the old lock free': 'JOINING+†',
  'LIVE join with the old lock free': 'JOINING+†',
  'FENCING join with the old lock free': 'JOINING+†',
  'CUTTING join with the old lock free': 'JOINING+†',
  'JOINING join after a reboot': 'JOINING+†',
  'LIVE join after a reboot': 'JOINING+†',
  'FENCING join after a reboot': 'JOINING+†',
  'CUTTING join after a reboot': 'JOINING+†',
  'JOINING join': 'same',
  'JOINING ready': 'LIVE',
  'JOINING suspect': 'FENCING',
  'LIVE suspect': 'FENCING',
  'FENCING page durable': 'CUTTING',
  'FENCING fencer lost': 'FENCING',
  'CUTTING fencer lost': 'FENCING',
  'FENCING leader change': 'FENCING',
  'CUTTING leader change': 'FENCING',
  'CUTTING heartbeat after the page': 'FENCING',
  'CUTTING proof': 'DEAD†',
  ...Object.fromEntries(
    (['JOINING', 'LIVE', 'FENCING', 'CUTTING'] as const).flatMap((state) =>
      ['stop-ack', 'stopped on disk', 'new boot'].map((event) => [`${state} ${event}`, 'DEAD†' as const]),
    ),
  ),
};

const states: readonly HostState[] = ['JOINING', 'LIVE', 'FENCING', 'CUTTING', 'DEAD'];
const pairs = states.flatMap((state) =>
  Object.keys(events).map((event) => ({ state, event, name: `${state} ${event}` })),
);

function wantedOutcome(name: string): object {
  const wanted = table[name];
  if (wanted === undefined || wanted === 'same') return { type: wanted ?? 'stale' };
  const joins = wanted.startsWith('JOINING+');
  const next = { state: joins ? 'JOINING' : wanted.replace('†', ''), generation: joins ? 8n : 7n };
  if (!wanted.endsWith('†')) return { type: 'changed', next, died: undefined };
  return {
    type: 'changed',
    next,
    died: { generation: 7n, nodeId: 'node-a', proof: expect.stringMatching(/./) },
  };
}

function eventNamed(name: string): HostEvent {
  const event = events[name];
  if (event === undefined) throw new Error(`there is no event ${name}`);
  return event;
}

describe('every pair of state and event', () => {
  it.each(pairs)('$name', ({ state, event, name }) => {
    const before = hostIn(state);
    const copy = structuredClone(before);
    expect({ died: undefined, ...stepHost(before, eventNamed(event), setting) }).toMatchObject(
      wantedOutcome(name),
    );
    expect(before).toEqual(copy); // the machine itself changes nothing
  });

  it.each(Object.keys(events))('NONE %s', (event) => {
    const joined = { type: 'changed', next: { state: 'JOINING', generation: 1n, nodeId: 'node-a' } };
    expect(stepHost(undefined, eventNamed(event), setting)).toMatchObject(
      event.startsWith('join') ? joined : { type: 'stale' },
    );
  });
});

describe('a message about another generation is stale in every state', () => {
  const named = Object.values(events).filter((event) => 'generation' in event);
  it.each(states)('%s', (state) => {
    for (const event of named) {
      for (const generation of [6n, 8n]) {
        expect(stepHost(hostIn(state), { ...event, generation }, setting)).toMatchObject({
          type: 'stale',
        });
      }
    }
  });
});

describe('joining', () => {
  it('takes a dead slot over for another node, with the next generation', () => {
    expect(stepHost(hostIn('DEAD'), { ...join, nodeId: 'node-z', machineId: 'm9' }, setting)).toMatchObject({
      type: 'changed',
      next: { nodeId: 'node-z', machineId: 'm9', generation: 8n, lockPath: '/run/a/lock', proof: '' },
    });
  });

  it.each(['JOINING', 'LIVE', 'FENCING', 'CUTTING'] as const)(
    'never takes a %s slot from another node or machine',
    (state) => {
      const proved = { ...join, previousIoDead: true, bootId: 'b2' };
      expect(stepHost(hostIn(state), { ...proved, nodeId: 'node-z' }, setting)).toMatchObject({
        type: 'stale',
      });
      expect(stepHost(hostIn(state), { ...proved, machineId: 'm9' }, setting)).toMatchObject({
        type: 'stale',
      });
    },
  );
});

describe('a second join of a life that is not ready', () => {
  it('is not the same under another lock', () => {
    expect(stepHost(hostIn('JOINING'), { ...join, lockPath: '/run/a/lock2' }, setting)).toMatchObject({
      type: 'stale',
    });
  });
});

describe('proof', () => {
  const kinds: readonly ProofKind[] = ['lock-free', 'lease-expired', 'confirmed-off', 'preempted'];
  const classes: readonly FencingClass[] = ['reservations', 'manual', 'lease-only', 'loop'];
  it.each(classes)('of class %s is only what that class accepts', (fencing) => {
    for (const kind of kinds) {
      const outcome = stepHost(
        hostIn('CUTTING'),
        { type: 'proof', generation: 7n, kind, detail: 'd' },
        { ...setting, fencing },
      );
      expect(outcome.type).toBe(proofsOf[fencing].includes(kind) ? 'changed' : 'stale');
    }
  });

  it('by time is never proof for a class that waits for a person', () => {
    expect(proofsOf.manual).toEqual(['confirmed-off']);
    expect(proofsOf.loop).toEqual(['lock-free']);
  });
});

describe('a heartbeat after the page', () => {
  it('raises an alarm, counts it, and has the page written by anybody', () => {
    const outcome = stepHost(hostIn('CUTTING'), eventNamed('heartbeat after the page'), {
      ...setting,
      fencing: 'lease-only',
    });
    expect(outcome).toMatchObject({
      type: 'changed',
      alarm: expect.stringContaining('renewed its lease'),
      next: { state: 'FENCING', fence: { alarms: 1, fencer: null, reason: 'silent' } },
    });
  });

  it('means nothing where the array refuses the writes', () => {
    expect(
      stepHost(hostIn('CUTTING'), eventNamed('heartbeat after the page'), {
        ...setting,
        fencing: 'reservations',
      }),
    ).toMatchObject({ type: 'stale' });
  });
});
