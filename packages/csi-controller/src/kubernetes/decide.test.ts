import { describe, expect, it } from 'vitest';
import { decide, silenceOf, uniqueName, volumeIsSafe, type Decision } from './decide.ts';
import { defaultSettings, FENCED_TAINT, OUT_OF_SERVICE_TAINT, OUT_OF_SERVICE_VALUE } from './settings.ts';
import type { AgentView, HoldfastVolume, HostView, KubeNode, NodeView, PodView } from './view.ts';

const pool = '00000000-0000-4000-8000-000000000001';
const otherPool = '00000000-0000-4000-8000-000000000002';
const nodeId = 'n1.00000001';

const host = (change: Partial<HostView> = {}): HostView => ({
  poolUuid: pool,
  generation: '1',
  state: 'LIVE',
  bootId: 'boot-1',
  heldVolumes: 1,
  stillMs: 60_000,
  proof: '',
  machineOff: false,
  waitingFor: '',
  needsConfirmation: false,
  ...change,
});
const dead = (change: Partial<HostView> = {}): HostView =>
  host({ state: 'DEAD', heldVolumes: 0, stillMs: undefined, proof: 'lock-free: x', ...change });
const agent = (hosts: HostView[], change: Partial<AgentView> = {}): AgentView => ({
  nodeId,
  connected: false,
  silentMs: 60_000,
  hosts,
  ...change,
});
const volume = (name: string, change: Partial<HoldfastVolume> = {}): HoldfastVolume => ({
  kind: 'holdfast',
  handle: `${pool}/${name}`,
  poolUuid: pool,
  persistentVolume: { kind: 'PersistentVolume', namespace: '', name: `pv-${name}`, uid: `pv-${name}` },
  claim: { kind: 'PersistentVolumeClaim', namespace: 'default', name, uid: `claim-${name}` },
  evict: true,
  holders: [],
  ...change,
});
const foreign = { kind: 'foreign', what: 'claim disk (ebs.csi.aws.com)' } as const;
const pod = (name: string, change: Partial<PodView> = {}): PodView => ({
  namespace: 'default',
  name,
  uid: `uid-${name}`,
  resourceVersion: '7',
  finished: false,
  deletingMs: undefined,
  graceMs: 30_000,
  staysWithNode: false,
  volumes: [volume(name)],
  ...change,
});
const node = (change: Partial<KubeNode> = {}): KubeNode => ({
  uid: 'node-uid',
  resourceVersion: '5',
  ready: true,
  bootId: 'boot-1',
  taints: [],
  volumesInUse: [],
  mark: undefined,
  ...change,
});
/** A node that is dead in every way, with one pod that has one volume open. */
const view = (change: Partial<NodeView> = {}): NodeView => ({
  name: 'n1',
  node: node(),
  kubelet: { silentMs: 60_000, alive: false },
  agents: [agent([host()])],
  pods: [pod('a', { volumes: [volume('a', { holders: [nodeId] })] })],
  ...change,
});
const look = (change: Partial<NodeView> = {}): Decision => decide(view(change), defaultSettings);
const fencedTaint = { key: FENCED_TAINT, value: 'true', effect: 'NoSchedule' };
const offTaint = { key: OUT_OF_SERVICE_TAINT, value: OUT_OF_SERVICE_VALUE, effect: 'NoExecute' };
const mark = { bootId: 'boot-1', lives: [{ nodeId, poolUuid: pool, generation: '1' }] };
const fenced = (change: Partial<KubeNode> = {}): KubeNode => node({ taints: [fencedTaint], mark, ...change });

describe('how dead a node is', () => {
  const cases: [string, Partial<NodeView>, string][] = [
    ['silent in every way', {}, 'dead'],
    ['its kubelet renewed a moment ago', { kubelet: { silentMs: 11_900, alive: true } }, 'none'],
    ['nobody knows its kubelet', { kubelet: { silentMs: undefined, alive: false } }, 'none'],
    ['the service knows no agent of it', { agents: [] }, 'none'],
    ['its agent is connected', { agents: [agent([host()], { connected: true, silentMs: 0 })] }, 'kubelet'],
    ['its agent went away a moment ago', { agents: [agent([host()], { silentMs: 3000 })] }, 'kubelet'],
    ['its heartbeat goes on', { agents: [agent([host({ stillMs: 1000 })])] }, 'kubelet'],
    ['nobody could read its heartbeat', { agents: [agent([host({ stillMs: undefined })])] }, 'kubelet'],
    [
      'one heartbeat is unreadable, another one stands',
      { agents: [agent([host({ stillMs: undefined }), host({ poolUuid: otherPool })])] },
      'dead',
    ],
    [
      'one heartbeat stands, another one goes on',
      { agents: [agent([host(), host({ poolUuid: otherPool, stillMs: 0 })])] },
      'kubelet',
    ],
    ['it is being fenced', { agents: [agent([host({ state: 'CUTTING', stillMs: undefined })])] }, 'dead'],
    ['all its lives are dead', { agents: [agent([dead()])] }, 'dead'],
    ['it closed everything', { agents: [agent([host({ heldVolumes: 0, stillMs: undefined })])] }, 'dead'],
    [
      'a newer installation under its name is connected',
      { agents: [agent([dead()]), agent([host()], { nodeId: 'n1.2', connected: true, silentMs: 0 })] },
      'kubelet',
    ],
  ];
  it.each(cases)('%s', (_name, change, expected) => {
    expect(silenceOf(view(change), defaultSettings)).toBe(expected);
  });
});

describe('the order of a failover', () => {
  it('begins with a fence of exactly the life that has the volume, unless its agent is there again', () => {
    expect(look()).toMatchObject({
      situation: 'fencing',
      action: {
        type: 'fence',
        lives: [{ nodeId, poolUuid: pool, generation: '1' }],
        unlessConnected: true,
      },
      notices: [{ reason: 'HoldfastFencing', about: { kind: 'Node', name: 'n1' } }],
    });
  });

  it.each(['FENCING', 'CUTTING'] as const)('waits while the host is %s', (state) => {
    expect(look({ agents: [agent([host({ state })])] })).toMatchObject({
      situation: 'fencing',
      action: { type: 'nothing' },
    });
  });

  it('says on the node that a fence waits for a person', () => {
    const waiting = host({
      state: 'CUTTING',
      needsConfirmation: true,
      waitingFor: 'somebody: holdfast node confirm-off n1',
    });
    const decision = look({ agents: [agent([waiting])] });
    expect(decision).toMatchObject({ situation: 'needs-confirmation', action: { type: 'nothing' } });
    expect(decision.notices[0]?.message).toContain('confirm-off n1');
  });

  const over = { agents: [agent([dead()])], pods: [pod('a')] };
  it('goes on with a NoSchedule taint of ours and a mark of what was fenced, beside the taints of others', () => {
    expect(look(over).action).toEqual({ type: 'set-taint', taint: fencedTaint, mark });
  });

  it('then takes our volumes out of volumesInUse, and only those of pods that go', () => {
    const names = [uniqueName(`${pool}/a`), 'kubernetes.io/csi/ebs^vol-1', uniqueName(`${pool}/b`)];
    const mixed = pod('b', { volumes: [volume('b'), foreign] });
    expect(look({ ...over, node: fenced({ volumesInUse: names }), pods: [pod('a'), mixed] }).action).toEqual({
      type: 'release-volumes',
      volumesInUse: names.slice(1),
    });
  });

  it('keeps in volumesInUse what a pod that stays has too', () => {
    const shared = [volume('a')];
    const stays = pod('b', { volumes: [...shared, foreign] });
    const names = [uniqueName(`${pool}/a`)];
    expect(
      look({ ...over, node: fenced({ volumesInUse: names }), pods: [pod('a', { volumes: shared }), stays] })
        .action.type,
    ).toBe('delete-pods');
  });

  it('deletes the pods last, and says so on pod, claim and volume', () => {
    const decision = look({ ...over, node: fenced() });
    expect(decision.action).toMatchObject({ type: 'delete-pods', pods: [{ name: 'a' }] });
    expect(decision.notices.map((notice) => [notice.reason, notice.about.kind])).toEqual([
      ['HoldfastEvicted', 'Pod'],
      ['HoldfastVolumeFenced', 'PersistentVolumeClaim'],
      ['HoldfastVolumeFenced', 'PersistentVolume'],
    ]);
  });

  it('ends with nothing to do until the node is back', () => {
    expect(look({ ...over, node: fenced(), pods: [] })).toMatchObject({
      situation: 'evicted',
      action: { type: 'nothing' },
    });
  });

  it('marks the node again when another life of it was fenced since', () => {
    const decision = look({ ...over, agents: [agent([dead({ generation: '2' })])], node: fenced() });
    expect(decision.action).toMatchObject({ type: 'set-taint', mark: { lives: [{ generation: '2' }] } });
  });

  it('moves pods of a pool whose fence is complete while another pool waits', () => {
    const slow = pod('b', { volumes: [volume('b', { poolUuid: otherPool, holders: [nodeId] })] });
    const agents = [agent([dead(), host({ poolUuid: otherPool, state: 'CUTTING' })])];
    expect(look({ agents, node: fenced(), pods: [pod('a'), slow] }).action).toMatchObject({
      type: 'delete-pods',
      pods: [{ name: 'a' }],
    });
  });

  it('fences nobody after a shutdown that closed everything, and moves what is left', () => {
    const agents = [agent([host({ heldVolumes: 0 })])];
    expect(look({ agents, pods: [pod('a')] }).action.type).toBe('set-taint');
    expect(look({ agents, node: fenced(), pods: [pod('a')] }).action.type).toBe('delete-pods');
  });
});

describe('what is left alone', () => {
  const agents = [agent([dead()])];
  const nothingFor = (pods: PodView[], change: Partial<NodeView> = {}): Decision => {
    const decision = look({ agents, node: fenced(), pods, ...change });
    expect(decision.action).toEqual({ type: 'nothing' });
    return decision;
  };

  it('a pod with a volume of another driver beside ours, with an event that names it', () => {
    const decision = nothingFor([pod('a', { volumes: [volume('a'), foreign] })]);
    expect(decision.notices).toMatchObject([
      { reason: 'HoldfastPodLeftAlone', about: { kind: 'Pod', name: 'a' } },
    ]);
    expect(decision.notices[0]?.message).toContain('ebs.csi.aws.com');
  });

  it('a pod with a claim that cannot be followed', () => {
    const decision = nothingFor([
      pod('a', { volumes: [volume('a'), { kind: 'unknown', what: 'claim x, which is gone' }] }),
    ]);
    expect(decision.notices[0]?.message).toContain('claim x, which is gone');
  });

  it('pods without volumes of ours, without a word', () => {
    const decision = nothingFor([pod('a', { volumes: [] }), pod('b', { volumes: [foreign] })]);
    expect(decision.notices).toEqual([]);
  });

  it('a pod whose StorageClass opted out, with an event', () => {
    const decision = nothingFor([pod('a', { volumes: [volume('a', { evict: false })] })]);
    expect(decision.notices[0]?.message).toContain('holdfast.io/evict');
  });

  it('a pod whose class opted out is no reason to fence', () => {
    const pods = [pod('a', { volumes: [volume('a', { evict: false, holders: [nodeId] })] })];
    expect(nothingFor(pods, { agents: [agent([host()])] }).situation).toBe('evicted');
  });

  it('a pod that belongs to its node, until Kubernetes itself deletes it', () => {
    nothingFor([pod('a', { staysWithNode: true })]);
    nothingFor([pod('a', { staysWithNode: true, deletingMs: 34_000 })]);
    const overdue = [pod('a', { staysWithNode: true, deletingMs: 36_000 })];
    expect(look({ agents, node: fenced(), pods: overdue }).action.type).toBe('delete-pods');
  });

  it('a finished pod that nobody deletes', () => {
    nothingFor([pod('a', { finished: true })]);
    const deleted = [pod('a', { finished: true, deletingMs: 0 })];
    expect(look({ agents, node: fenced(), pods: deleted }).action.type).toBe('delete-pods');
  });

  it('a pod that was deleted by force and is kept by a finalizer', () => {
    expect(nothingFor([pod('a', { deletingMs: 99_000, graceMs: 0 })]).situation).toBe('evicted');
  });

  it('a node whose kubelet works, whatever its agent does', () => {
    expect(look({ kubelet: { silentMs: 1000, alive: true } }).action).toEqual({ type: 'nothing' });
  });
});

describe('a node whose kubelet alone is silent', () => {
  const alive = {
    agents: [agent([host({ stillMs: undefined })], { connected: true, silentMs: 0 })],
    node: node({ ready: false }),
  };
  const held = [volume('a', { holders: [nodeId] })];

  it('keeps its pods for as long as Kubernetes leaves them', () => {
    expect(look(alive)).toMatchObject({ situation: 'waiting', action: { type: 'nothing' } });
    const young = [pod('a', { volumes: held, deletingMs: 34_999 })];
    expect(look({ ...alive, pods: young }).action).toEqual({ type: 'nothing' });
  });

  it('is fenced, connected or not, for pods that Kubernetes deletes and cannot get rid of', () => {
    const overdue = [pod('a', { volumes: held, deletingMs: 35_000 }), pod('b')];
    expect(look({ ...alive, pods: overdue }).action).toMatchObject({ type: 'fence', unlessConnected: false });
  });

  it('then loses only those pods', () => {
    const pods = [pod('a', { deletingMs: 35_000 }), pod('b')];
    const agents = [agent([host({ generation: '2', heldVolumes: 0 })], { connected: true, silentMs: 0 })];
    expect(look({ ...alive, agents, node: fenced({ ready: false }), pods }).action).toMatchObject({
      type: 'delete-pods',
      pods: [{ name: 'a' }],
    });
  });
});

describe('what is safe', () => {
  const safe = (change: Partial<HoldfastVolume>, agents: AgentView[]): boolean =>
    volumeIsSafe(view({ agents }), volume('a', change));

  it('needs every life on the pool to be over and no grant of this node to be left', () => {
    expect(safe({}, [agent([dead()])])).toBe(true);
    expect(safe({ holders: [nodeId] }, [agent([dead()])])).toBe(false);
    expect(safe({}, [agent([host()])])).toBe(false);
    expect(safe({}, [agent([dead()]), agent([host()], { nodeId: 'n1.2' })])).toBe(false);
    expect(safe({ holders: ['n2.1'] }, [agent([dead()])])).toBe(true);
  });

  it('is not proved by a node that the service does not know as a host of the pool, while anybody holds the volume', () => {
    expect(safe({ holders: ['elsewhere.1'] }, [agent([])])).toBe(false);
    expect(safe({ holders: [] }, [agent([])])).toBe(true);
    expect(safe({ holders: undefined }, [agent([dead()])])).toBe(false);
  });
});

describe('the out-of-service taint', () => {
  const off = [agent([dead({ machineOff: true, proof: 'confirmed-off: ops says so' })])];
  const mixed = [pod('a', { volumes: [foreign] })];

  it('is set with proof that this boot of the machine is over, when another driver has volumes there', () => {
    expect(look({ agents: off, pods: mixed })).toMatchObject({
      action: { type: 'set-taint', taint: offTaint },
      notices: [{ reason: 'HoldfastMachineOff' }],
    });
  });

  const never: [string, Partial<NodeView>][] = [
    ['the fence was proved in another way', { agents: [agent([dead()])], pods: mixed }],
    ['the proof is about an earlier boot', { agents: off, pods: mixed, node: node({ bootId: 'boot-2' }) }],
    ['the kubelet is there', { agents: off, pods: mixed, kubelet: { silentMs: 0, alive: true } }],
    [
      'the agent is there',
      { agents: [agent(off[0]?.hosts as HostView[], { connected: true })], pods: mixed },
    ],
    ['no other driver has anything there', { agents: off, pods: [] }],
    [
      'a pod there opted out',
      { agents: off, pods: [...mixed, pod('b', { volumes: [volume('b', { evict: false })] })] },
    ],
    [
      'somebody else set it',
      { agents: off, pods: mixed, node: node({ taints: [{ ...offTaint, value: 'nodeshutdown' }] }) },
    ],
  ];
  it.each(never)('is not set when %s', (_name, change) => {
    expect(look(change).action).toEqual({ type: 'nothing' });
  });

  it('is not set where the controller was told not to', () => {
    const decision = decide(view({ agents: off, pods: mixed }), { ...defaultSettings, outOfService: false });
    expect(decision.action).toEqual({ type: 'nothing' });
  });

  const gone: [string, Partial<NodeView>][] = [
    ['the kubelet renews its Lease', { kubelet: { silentMs: 0, alive: true } }],
    ['an agent connects', { agents: [agent([dead()], { connected: true, silentMs: 0 })] }],
    ['the kubelet has reported another boot', { node: node({ taints: [offTaint], mark, bootId: 'boot-2' }) }],
  ];
  it.each(gone)('goes as soon as %s', (_name, change) => {
    expect(look({ agents: off, node: node({ taints: [offTaint], mark }), ...change }).action).toEqual({
      type: 'remove-taints',
      keys: [OUT_OF_SERVICE_TAINT],
      markToo: false,
    });
  });

  it('of somebody else is never removed', () => {
    const theirs = node({ taints: [{ ...offTaint, value: 'nodeshutdown' }] });
    const decision = look({ agents: off, node: theirs, kubelet: { silentMs: 0, alive: true }, pods: [] });
    expect(decision.action).toEqual({ type: 'nothing' });
  });
});

describe('a node that is back', () => {
  const back = (hosts: HostView[], change: Partial<KubeNode> = {}): Decision =>
    look({
      kubelet: { silentMs: 0, alive: true },
      agents: [agent(hosts, { connected: true, silentMs: 0 })],
      node: fenced(change),
    });

  it('loses our taint and mark once its agent has a new generation', () => {
    expect(back([host({ generation: '2' })])).toMatchObject({
      situation: 'back',
      action: { type: 'remove-taints', keys: [FENCED_TAINT], markToo: true },
    });
  });

  it('keeps the taint under the generation that was fenced, while it joins, is fenced again, or is not ready', () => {
    expect(back([host()]).action).toEqual({ type: 'nothing' });
    expect(back([dead()]).action).toEqual({ type: 'nothing' });
    expect(back([host({ generation: '2', state: 'JOINING' })]).action).toEqual({ type: 'nothing' });
    const again = [host({ generation: '2' }), host({ poolUuid: otherPool, state: 'FENCING' })];
    expect(back(again).action).toEqual({ type: 'nothing' });
    expect(back([host({ generation: '2' })], { ready: false }).action).toEqual({ type: 'nothing' });
  });

  it('need not have all its pools back', () => {
    const some = [host({ generation: '2' }), dead({ poolUuid: otherPool })];
    expect(back(some).action.type).toBe('remove-taints');
  });

  it('keeps its pods, whatever was decided about them before', () => {
    const decision = look({
      node: fenced(),
      agents: [agent([host({ generation: '2', heldVolumes: 0 })], { connected: true, silentMs: 0 })],
      pods: [pod('a', { deletingMs: 99_000 })],
    });
    expect(decision.action.type).toBe('remove-taints');
  });

  it('was made anew under its name: that is another node', () => {
    const decision = look({
      kubelet: { silentMs: 0, alive: true },
      agents: [agent([dead()]), agent([host()], { nodeId: 'n1.2', connected: true, silentMs: 0 })],
      node: fenced(),
    });
    expect(decision.action).toMatchObject({ type: 'remove-taints' });
  });

  it('and has nothing of ours on it needs nothing', () => {
    const decision = look({
      agents: [agent([host()], { connected: true, silentMs: 0 })],
      kubelet: { silentMs: 0, alive: true },
    });
    expect(decision).toMatchObject({ situation: 'well', action: { type: 'nothing' } });
  });
});

it('an agent that is away for long while its node works is told of, and nothing more', () => {
  const decision = look({ kubelet: { silentMs: 1000, alive: true } });
  expect(decision.action).toEqual({ type: 'nothing' });
  expect(decision.notices).toMatchObject([{ reason: 'HoldfastAgentAway' }]);
});
