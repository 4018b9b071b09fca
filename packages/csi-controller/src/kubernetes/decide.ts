/**
 * What to do next about one node: a pure function of what is known of it (DESIGN 6.5). It names one action; when that is
 * done, everything is read again. So it makes no difference where a run is cut off or which replica goes on.
 *
 * The order is the safety: fence -> verify (the service says dead, and no grant of it is left) -> own NoSchedule taint ->
 * our volumes out of volumesInUse -> pods deleted. A pod goes only if every persistent volume that it has is one of ours and is
 * safe. The out-of-service taint, which frees every driver's volumes, needs proof that this boot of the machine is over.
 */
import { DRIVER_NAME } from '@holdfast/common';
import { FENCED_TAINT, OUT_OF_SERVICE_TAINT, OUT_OF_SERVICE_VALUE, type SafetySettings } from './settings.ts';
import type {
  AgentView,
  FenceMark,
  HoldfastVolume,
  HostView,
  Life,
  NodeView,
  ObjectName,
  PodView,
  PodVolume,
  Taint,
} from './view.ts';

export type Action =
  | { readonly type: 'nothing' }
  | {
      readonly type: 'fence';
      readonly lives: readonly Life[];
      readonly unlessConnected: boolean;
      readonly reason: string;
    }
  | { readonly type: 'set-taint'; readonly taint: Taint; readonly mark: FenceMark }
  | { readonly type: 'release-volumes'; readonly volumesInUse: readonly string[] }
  | { readonly type: 'delete-pods'; readonly pods: readonly PodView[] }
  /** `markToo`: the node is back, and what we left on it goes altogether. */
  | { readonly type: 'remove-taints'; readonly keys: readonly string[]; readonly markToo: boolean };

export type Situation =
  | 'well'
  | 'back'
  | 'waiting'
  | 'fencing'
  | 'needs-confirmation'
  | 'evicting'
  | 'evicted';

export interface Notice {
  readonly about: ObjectName;
  readonly warning: boolean;
  readonly reason: string;
  readonly message: string;
}

export interface Decision {
  readonly situation: Situation;
  readonly action: Action;
  readonly notices: readonly Notice[];
}

export function decide(view: NodeView, settings: SafetySettings): Decision {
  const left = ourTaints(view);
  if (isBack(view)) {
    if (left.length === 0 && view.node.mark === undefined) return { ...nothing, situation: 'well' };
    return back(view, left);
  }
  if (left.includes(OUT_OF_SERVICE_TAINT) && showsLife(view)) return alive(view);
  const silence = silenceOf(view, settings);
  if (silence === 'none') {
    return { ...nothing, situation: left.length > 0 ? 'evicted' : 'well', notices: awayNotices(view) };
  }
  const plan = planFor(view, settings, silence);
  return (
    fence(view, plan, silence) ??
    evict(view, plan) ??
    outOfService(view, plan, settings, silence) ?? {
      action: { type: 'nothing' },
      situation: plan.fencing.some((host) => host.needsConfirmation)
        ? 'needs-confirmation'
        : plan.fencing.length > 0
          ? 'fencing'
          : left.length > 0
            ? 'evicted'
            : 'waiting',
      notices: [...waitingNotices(view, plan), ...plan.notices],
    }
  );
}

const nothing = { action: { type: 'nothing' }, notices: [] } as const;

// ------------------------------------------------------------------------------------------------ alive or dead

/** How dead the node looks: "dead" in every way; "kubelet": only its kubelet is silent; "none": it is not. */
export type Silence = 'none' | 'kubelet' | 'dead';

export function silenceOf(view: NodeView, settings: SafetySettings): Silence {
  const { silentMs } = view.kubelet;
  if (silentMs === undefined || silentMs < settings.kubeletSilentMs || view.agents.length === 0)
    return 'none';
  const agentsGone = view.agents.every(
    (agent) => !agent.connected && agent.silentMs >= settings.agentSilentMs,
  );
  return agentsGone && heartbeatsStand(view.agents, settings) ? 'dead' : 'kubelet';
}

/**
 * No heartbeat moves, and where volumes are open at least one is known to stand still. (One that nobody could read says
 * nothing; where nobody can read, nobody can fence either.) A life that is being fenced was judged before.
 */
function heartbeatsStand(agents: readonly AgentView[], settings: SafetySettings): boolean {
  const living = agents
    .flatMap((agent) => agent.hosts)
    .filter((host) => host.state === 'LIVE' || host.state === 'JOINING');
  const known = living.flatMap((host) => host.stillMs ?? []);
  if (known.some((stillMs) => stillMs < settings.heartbeatStillMs)) return false;
  return known.length > 0 || !living.some(isOpen);
}

/** Its agent is there with a life that is newer than what was fenced, nothing of it is being fenced, and its kubelet is ready. */
export function isBack(view: NodeView): boolean {
  if (!view.node.ready || !view.agents.some((agent) => agent.connected)) return false;
  const hosts = view.agents.flatMap((agent) => agent.hosts.map((host) => ({ agent, host })));
  if (hosts.some(({ host }) => host.state === 'FENCING' || host.state === 'CUTTING')) return false;
  return hosts.some(
    ({ agent, host }) =>
      agent.connected && host.state === 'LIVE' && isNewer(view.node.mark, agent.nodeId, host),
  );
}

function isNewer(mark: FenceMark | undefined, nodeId: string, host: HostView): boolean {
  const fenced = mark?.lives.find((life) => life.nodeId === nodeId && life.poolUuid === host.poolUuid);
  return fenced === undefined || BigInt(host.generation) > BigInt(fenced.generation);
}

/** Anything at all that runs there. Enough to take the out-of-service taint away, which is wrong on a machine that runs. */
function showsLife(view: NodeView): boolean {
  return (
    view.kubelet.alive ||
    view.agents.some((agent) => agent.connected) ||
    (view.node.mark !== undefined && view.node.mark.bootId !== view.node.bootId)
  );
}

function ourTaints(view: NodeView): string[] {
  return view.node.taints
    .filter(
      ({ key, value }) =>
        key === FENCED_TAINT || (key === OUT_OF_SERVICE_TAINT && value === OUT_OF_SERVICE_VALUE),
    )
    .map(({ key }) => key);
}

function back(view: NodeView, keys: readonly string[]): Decision {
  return {
    situation: 'back',
    action: { type: 'remove-taints', keys, markToo: true },
    notices: [
      {
        about: nodeName(view),
        warning: false,
        reason: 'HoldfastNodeBack',
        message: 'The agent is back under a new generation: the node may have Holdfast volumes again.',
      },
    ],
  };
}

function alive(view: NodeView): Decision {
  return {
    situation: 'evicted',
    action: { type: 'remove-taints', keys: [OUT_OF_SERVICE_TAINT], markToo: false },
    notices: [
      {
        about: nodeName(view),
        warning: true,
        reason: 'HoldfastMachineRuns',
        message: 'The machine runs again: the out-of-service taint that Holdfast had set is removed.',
      },
    ],
  };
}

// ------------------------------------------------------------------------------------------------ which pods, which lives

interface Plan {
  /** Lives that have to be fenced before the pods that shall go may go. */
  readonly fence: readonly (Life & { readonly host: HostView })[];
  /** Fences under way that pods wait for. */
  readonly fencing: readonly HostView[];
  /** Pods that may go now. */
  readonly ready: readonly PodView[];
  /** Pods that wait for a fence. */
  readonly waiting: readonly PodView[];
  /** Pods that have another driver's volumes beside ours. */
  readonly mixed: readonly PodView[];
  /** There is a pod that must stay, whatever is known about the machine. */
  readonly optedOut: boolean;
  readonly notices: readonly Notice[];
}

function planFor(view: NodeView, settings: SafetySettings, silence: Silence): Plan {
  const wanted: PodView[] = [];
  const mixed: PodView[] = [];
  const notices: Notice[] = [];
  let optedOut = false;
  for (const pod of view.pods) {
    const ours = pod.volumes.filter(isOurs);
    if (!wantsToGo(pod, settings, silence)) continue;
    if (ours.some((volume) => !volume.evict)) {
      optedOut = true;
      notices.push(leftAlone(pod, 'its StorageClass says holdfast.io/evict: "false"'));
    } else if (pod.volumes.every(isOurs)) {
      if (ours.length > 0) wanted.push(pod);
    } else {
      mixed.push(pod);
      if (ours.length > 0) notices.push(leftAlone(pod, otherVolumes(pod.volumes)));
    }
  }
  const isSafe = (pod: PodView): boolean =>
    pod.volumes.every((volume) => isOurs(volume) && volumeIsSafe(view, volume));
  const waiting = wanted.filter((pod) => !isSafe(pod));
  const pools = new Set(
    waiting.flatMap((pod) => pod.volumes.filter(isOurs).map((volume) => volume.poolUuid)),
  );
  const needed = livesOn(view, pools);
  return {
    fence: needed.filter(({ host }) => isOpen(host)),
    fencing: needed
      .map(({ host }) => host)
      .filter((host) => host.state === 'FENCING' || host.state === 'CUTTING'),
    ready: wanted.filter(isSafe),
    waiting,
    mixed,
    optedOut,
    notices,
  };
}

function isOurs(volume: PodVolume): volume is HoldfastVolume {
  return volume.kind === 'holdfast';
}

/**
 * Of a dead node every pod that does not belong to it. While only the kubelet is silent, and the node may well work, those
 * that Kubernetes itself has decided to delete and cannot get rid of.
 */
function wantsToGo(pod: PodView, settings: SafetySettings, silence: Silence): boolean {
  // Deleted by force already: only a finalizer keeps it, and that is somebody else's.
  if (pod.deletingMs !== undefined && pod.graceMs === 0) return false;
  const overdue = pod.deletingMs !== undefined && pod.deletingMs >= pod.graceMs + settings.overdueMs;
  if (overdue) return true;
  return silence === 'dead' && !pod.staysWithNode && !(pod.finished && pod.deletingMs === undefined);
}

function livesOn(view: NodeView, pools: ReadonlySet<string>): (Life & { readonly host: HostView })[] {
  return view.agents.flatMap(({ nodeId, hosts }) =>
    hosts
      .filter((host) => pools.has(host.poolUuid))
      .map((host) => ({ nodeId, poolUuid: host.poolUuid, generation: host.generation, host })),
  );
}

/** A life that has volumes open: it has to be fenced. One that closed them all (a node that was shut down) need not be. */
function isOpen(host: HostView): boolean {
  return (host.state === 'LIVE' || host.state === 'JOINING') && host.heldVolumes > 0;
}

/** Dead, or nothing of it is open. */
function isOver(host: HostView): boolean {
  return (
    host.state === 'DEAD' || ((host.state === 'LIVE' || host.state === 'JOINING') && host.heldVolumes === 0)
  );
}

/**
 * No life of this node can write it any more. A node that never was a host of the pool, or is known to the service under
 * another name, proves nothing: then nobody at all may hold the volume.
 */
export function volumeIsSafe(view: NodeView, volume: HoldfastVolume): boolean {
  if (volume.holders === undefined) return false;
  const lives = livesOn(view, new Set([volume.poolUuid]));
  if (lives.length === 0) return volume.holders.length === 0;
  const ids = new Set(view.agents.map((agent) => agent.nodeId));
  return lives.every(({ host }) => isOver(host)) && !volume.holders.some((holder) => ids.has(holder));
}

// ------------------------------------------------------------------------------------------------ actions

function fence(view: NodeView, plan: Plan, silence: Silence): Decision | undefined {
  if (plan.fence.length === 0) return undefined;
  const reason =
    silence === 'dead'
      ? `node ${view.name} is silent: no kubelet, no agent, no heartbeat on the disk`
      : `the kubelet of ${view.name} is silent, and Kubernetes deletes pods there`;
  return {
    situation: 'fencing',
    action: {
      type: 'fence',
      lives: plan.fence.map(({ nodeId, poolUuid, generation }) => ({ nodeId, poolUuid, generation })),
      unlessConnected: silence === 'dead',
      reason,
    },
    notices: [
      {
        about: nodeName(view),
        warning: true,
        reason: 'HoldfastFencing',
        message: `The node is being fenced from its Holdfast volumes: ${reason}.`,
      },
      ...plan.notices,
    ],
  };
}

function evict(view: NodeView, plan: Plan): Decision | undefined {
  if (plan.ready.length === 0) return undefined;
  const decision = (action: Action, notices: readonly Notice[] = []): Decision => ({
    situation: 'evicting',
    action,
    notices: [...notices, ...plan.notices],
  });
  if (!ourTaints(view).includes(FENCED_TAINT) || !isMarked(view)) {
    return decision(
      {
        type: 'set-taint',
        taint: { key: FENCED_TAINT, value: 'true', effect: 'NoSchedule' },
        mark: markOf(view),
      },
      [fencedNotice(view)],
    );
  }
  const kept = stillInUse(view, plan.ready);
  if (kept.length < view.node.volumesInUse.length) {
    return decision({ type: 'release-volumes', volumesInUse: kept });
  }
  return decision(
    { type: 'delete-pods', pods: plan.ready },
    plan.ready.flatMap((pod) => evictionNotices(view, pod)),
  );
}

/** The dead lives, so that a later one is known to be later. */
function markOf(view: NodeView): FenceMark {
  return {
    bootId: view.node.bootId,
    lives: view.agents.flatMap(({ nodeId, hosts }) =>
      hosts
        .filter((host) => host.state === 'DEAD')
        .map(({ poolUuid, generation }) => ({ nodeId, poolUuid, generation })),
    ),
  };
}

function isMarked(view: NodeView): boolean {
  const { mark } = view.node;
  return (
    mark !== undefined &&
    markOf(view).lives.every((life) =>
      mark.lives.some(
        (known) =>
          known.nodeId === life.nodeId &&
          known.poolUuid === life.poolUuid &&
          known.generation === life.generation,
      ),
    )
  );
}

/** Without the volumes of the pods that go, as far as no pod that stays has them too. */
function stillInUse(view: NodeView, going: readonly PodView[]): string[] {
  const namesOf = (pods: readonly PodView[]): Set<string> =>
    new Set(pods.flatMap((pod) => pod.volumes.filter(isOurs).map((volume) => uniqueName(volume.handle))));
  const leaving = namesOf(going);
  const staying = namesOf(view.pods.filter((pod) => !going.includes(pod) && !pod.finished));
  return view.node.volumesInUse.filter((name) => !leaving.has(name) || staying.has(name));
}

/** As the kubelet and the attach-detach controller name a CSI volume. */
export function uniqueName(handle: string): string {
  return `kubernetes.io/csi/${DRIVER_NAME}^${handle}`;
}

function outOfService(
  view: NodeView,
  plan: Plan,
  settings: SafetySettings,
  silence: Silence,
): Decision | undefined {
  if (!settings.outOfService || silence !== 'dead' || plan.optedOut || plan.waiting.length > 0)
    return undefined;
  if (view.node.taints.some((taint) => taint.key === OUT_OF_SERVICE_TAINT)) return undefined;
  // Without a pod that has other drivers' volumes there is nothing that only this taint would free.
  if (!plan.mixed.some((pod) => pod.volumes.some((volume) => volume.kind === 'foreign'))) return undefined;
  const proof = view.agents
    .flatMap((agent) => agent.hosts)
    .find((host) => host.machineOff && host.bootId !== '' && host.bootId === view.node.bootId);
  if (proof === undefined) return undefined;
  return {
    situation: 'evicting',
    action: {
      type: 'set-taint',
      taint: { key: OUT_OF_SERVICE_TAINT, value: OUT_OF_SERVICE_VALUE, effect: 'NoExecute' },
      mark: markOf(view),
    },
    notices: [
      {
        about: nodeName(view),
        warning: true,
        reason: 'HoldfastMachineOff',
        message: `The machine is off (${proof.proof}): the out-of-service taint frees the volumes of other drivers too.`,
      },
      ...plan.notices,
    ],
  };
}

// ------------------------------------------------------------------------------------------------ notices

function nodeName(view: NodeView): ObjectName {
  return { kind: 'Node', namespace: '', name: view.name, uid: view.node.uid };
}

function fencedNotice(view: NodeView): Notice {
  const proofs = view.agents
    .flatMap((agent) => agent.hosts)
    .flatMap((host) => (host.state === 'DEAD' ? [host.proof] : []));
  const why = proofs.length > 0 ? [...new Set(proofs)].join('; ') : 'nothing is open there';
  return {
    about: nodeName(view),
    warning: true,
    reason: 'HoldfastFenced',
    message: `The node can no longer write its Holdfast volumes (${why}). Its pods move to other nodes.`,
  };
}

/** Nothing is done about an agent that is away while its node works: the kubelet starts it again. */
function awayNotices(view: NodeView): Notice[] {
  const longMs = 60_000;
  const newest = Math.min(...view.agents.map((agent) => agent.silentMs));
  if (!view.kubelet.alive || view.agents.length === 0 || newest < longMs) return [];
  return [
    {
      about: nodeName(view),
      warning: true,
      reason: 'HoldfastAgentAway',
      message:
        'The node works, but its Holdfast agent has had no session with the metadata service for more than a minute: look at its pod. The node is not fenced.',
    },
  ];
}

function podName(pod: PodView): ObjectName {
  return { kind: 'Pod', namespace: pod.namespace, name: pod.name, uid: pod.uid };
}

function otherVolumes(volumes: readonly PodVolume[]): string {
  const others = volumes.flatMap((volume) => (isOurs(volume) ? [] : [volume.what]));
  return `it also has ${others.join(', ')}, which Holdfast cannot fence`;
}

function leftAlone(pod: PodView, why: string): Notice {
  return {
    about: podName(pod),
    warning: true,
    reason: 'HoldfastPodLeftAlone',
    message: `The node does not answer, and the pod is left there: ${why}.`,
  };
}

function evictionNotices(view: NodeView, pod: PodView): Notice[] {
  const about = pod.volumes.filter(isOurs).flatMap((volume) => [volume.claim, volume.persistentVolume]);
  return [
    {
      about: podName(pod),
      warning: true,
      reason: 'HoldfastEvicted',
      message: `Deleted by force: node ${view.name} does not answer, and can no longer write any of the pod's volumes.`,
    },
    ...about.map((object) => ({
      about: object,
      warning: true,
      reason: 'HoldfastVolumeFenced',
      message: `Node ${view.name} can no longer write the volume. Pod ${pod.namespace}/${pod.name} there was deleted, another node may use it.`,
    })),
  ];
}

function waitingNotices(view: NodeView, plan: Plan): Notice[] {
  return plan.fencing
    .filter((host) => host.needsConfirmation)
    .map((host) => ({
      about: nodeName(view),
      warning: true,
      reason: 'HoldfastFenceWaits',
      message: `The fence of pool ${host.poolUuid} waits for ${host.waitingFor}.`,
    }));
}
