/**
 * Reads what decide() needs to know of one node, in an order that errs on the safe side: what would speak for an action is
 * read before what would speak against it. Of a node that nothing is to be done about, pods and volumes are not read.
 */
import { DRIVER_NAME, EVICT, parseHandle } from '@holdfast/common';
import type {
  V1Node,
  V1PersistentVolume,
  V1PersistentVolumeClaim,
  V1Pod,
  V1StorageClass,
  V1Volume,
} from '@kubernetes/client-node';
import type { Clock } from './clock.ts';
import type { Cluster, Fencing } from './cluster.ts';
import { isBack, silenceOf } from './decide.ts';
import { FENCE_MARK, type SafetySettings } from './settings.ts';
import type { KubeletLeases } from './silence.ts';
import type { AgentView, FenceMark, KubeNode, NodeView, PodView, PodVolume } from './view.ts';

export interface Sources {
  readonly cluster: Cluster;
  readonly fencing: Fencing;
  readonly leases: KubeletLeases;
  readonly clock: Clock;
  readonly settings: SafetySettings;
}

/** When each pod that is being deleted was first seen so; by uid. */
export type DeletionsSeen = Map<string, number>;

const readsAtOnce = 16;

/** Undefined: the API server has no such node. */
export async function observe(
  name: string,
  sources: Sources,
  deletions: DeletionsSeen,
): Promise<NodeView | undefined> {
  const { cluster, fencing, leases, clock, settings } = sources;
  const raw = await cluster.node(name);
  if (raw === undefined) return undefined;
  const version = await cluster.kubeletLease(name);
  if (version === undefined) leases.gone(name);
  else leases.seen(name, version, clock.nowMs());
  const node = kubeNode(raw);
  const view: NodeView = {
    name,
    node,
    kubelet: {
      silentMs: leases.silentMs(name, clock.nowMs()),
      alive: leases.isAlive(name, settings.kubeletSilentMs, clock.nowMs()),
    },
    agents: knownAgents(raw, await fencing.agents(name)),
    pods: [],
  };
  if (isBack(view) || silenceOf(view, settings) === 'none') return view;
  const pods = await podsOn(name, sources, deletions);
  // Agents once more, after the pods: one that came back and started them again meanwhile is seen.
  return { ...view, pods, agents: knownAgents(raw, await fencing.agents(name)) };
}

/** None, where the kubelet knows the node under an id that the service does not have under this name: then nothing is proved by them. */
function knownAgents(node: V1Node, agents: readonly AgentView[]): readonly AgentView[] {
  const registered = registeredNodeId(node);
  if (registered === undefined || agents.some((agent) => agent.nodeId === registered)) return agents;
  return [];
}

/** What the kubelet noted when the driver registered. */
function registeredNodeId(node: V1Node): string | undefined {
  const noted = parseJson(node.metadata?.annotations?.['csi.volume.kubernetes.io/nodeid']);
  const id = (noted as Record<string, unknown> | undefined)?.[DRIVER_NAME];
  return typeof id === 'string' ? id : undefined;
}

export function kubeNode(node: V1Node): KubeNode {
  return {
    uid: node.metadata?.uid ?? '',
    resourceVersion: node.metadata?.resourceVersion ?? '',
    ready:
      node.status?.conditions?.some(({ type, status }) => type === 'Ready' && status === 'True') ?? false,
    bootId: (node.status?.nodeInfo?.bootID ?? '').toLowerCase(),
    taints: node.spec?.taints ?? [],
    volumesInUse: node.status?.volumesInUse ?? [],
    mark: readMark(node.metadata?.annotations?.[FENCE_MARK]),
  };
}

/** What somebody has edited by hand counts as there but empty, so that it is taken away in the end. */
function readMark(text: string | undefined): FenceMark | undefined {
  if (text === undefined) return undefined;
  const mark = parseJson(text) as Partial<FenceMark> | undefined;
  const lives = Array.isArray(mark?.lives) ? mark.lives : [];
  return {
    bootId: mark?.bootId ?? '',
    lives: lives.filter((life) => /^\d+$/.test(life.generation)),
  };
}

function parseJson(text: string | undefined): unknown {
  try {
    return text === undefined ? undefined : (JSON.parse(text) as unknown);
  } catch {
    return undefined;
  }
}

// ------------------------------------------------------------------------------------------------ pods

async function podsOn(name: string, sources: Sources, deletions: DeletionsSeen): Promise<PodView[]> {
  const pods = await sources.cluster.podsOn(name);
  const nowMs = sources.clock.nowMs();
  const deleted = new Set(pods.filter(isDeleted).map((pod) => pod.metadata?.uid ?? ''));
  for (const uid of deletions.keys()) if (!deleted.has(uid)) deletions.delete(uid);
  for (const uid of deleted) if (!deletions.has(uid)) deletions.set(uid, nowMs);
  const lookUp = new LookUp(sources);
  return await mapSome(pods, readsAtOnce, async (pod) => {
    const since = deletions.get(pod.metadata?.uid ?? '');
    const refs = volumeRefs(pod);
    const volumes: PodVolume[] = [];
    for (const ref of refs) volumes.push(ref.kind === 'claim' ? await lookUp.claim(pod, ref.name) : ref);
    return podView(pod, volumes, since === undefined ? undefined : nowMs - since);
  });
}

function isDeleted(pod: V1Pod): boolean {
  return pod.metadata?.deletionTimestamp !== undefined;
}

function podView(pod: V1Pod, volumes: PodVolume[], deletingMs: number | undefined): PodView {
  const grace = pod.metadata?.deletionGracePeriodSeconds ?? pod.spec?.terminationGracePeriodSeconds ?? 30;
  return {
    namespace: pod.metadata?.namespace ?? '',
    name: pod.metadata?.name ?? '',
    uid: pod.metadata?.uid ?? '',
    resourceVersion: pod.metadata?.resourceVersion ?? '',
    finished: pod.status?.phase === 'Succeeded' || pod.status?.phase === 'Failed',
    deletingMs,
    graceMs: grace * 1000,
    staysWithNode: staysWithNode(pod),
    volumes,
  };
}

export function staysWithNode(pod: V1Pod): boolean {
  const owned = pod.metadata?.ownerReferences?.some(
    ({ kind, controller }) => controller === true && (kind === 'DaemonSet' || kind === 'Node'),
  );
  const mirror = pod.metadata?.annotations?.['kubernetes.io/config.mirror'] !== undefined;
  const tolerates = pod.spec?.tolerations?.some(
    ({ key, operator, effect, tolerationSeconds }) =>
      tolerationSeconds === undefined &&
      (effect === undefined || effect === '' || effect === 'NoExecute') &&
      operator === 'Exists' &&
      (key === undefined || key === '' || key === 'node.kubernetes.io/unreachable'),
  );
  return owned === true || mirror || tolerates === true;
}

type VolumeRef =
  | { readonly kind: 'claim'; readonly name: string }
  | { readonly kind: 'foreign'; readonly what: string };

/** Volume sources of a pod that outlive it without a claim. Every other one ends with the pod or belongs to its node. */
const outliving = [
  'awsElasticBlockStore',
  'azureDisk',
  'azureFile',
  'cephfs',
  'cinder',
  'fc',
  'flexVolume',
  'flocker',
  'gcePersistentDisk',
  'glusterfs',
  'iscsi',
  'nfs',
  'photonPersistentDisk',
  'portworxVolume',
  'quobyte',
  'rbd',
  'scaleIO',
  'storageos',
  'vsphereVolume',
] as const satisfies readonly (keyof V1Volume)[];

export function volumeRefs(pod: V1Pod): VolumeRef[] {
  return (pod.spec?.volumes ?? []).flatMap((volume): VolumeRef[] => {
    if (volume.persistentVolumeClaim !== undefined) {
      return [{ kind: 'claim', name: volume.persistentVolumeClaim.claimName }];
    }
    if (volume.ephemeral !== undefined) {
      return [{ kind: 'claim', name: `${pod.metadata?.name}-${volume.name}` }];
    }
    const source = outliving.find((key) => volume[key] !== undefined);
    return source === undefined ? [] : [{ kind: 'foreign', what: `${source} volume ${volume.name}` }];
  });
}

/** Claims and what is behind them. What several pods share is read once for each look at the node. */
class LookUp {
  readonly #cluster: Cluster;
  readonly #fencing: Fencing;
  readonly #classes = new Map<string, Promise<V1StorageClass | undefined>>();
  readonly #evicts = new Map<string, Promise<boolean | undefined>>();
  readonly #holders = new Map<string, Promise<string[] | undefined>>();

  constructor({ cluster, fencing }: Sources) {
    this.#cluster = cluster;
    this.#fencing = fencing;
  }

  async claim(pod: V1Pod, name: string): Promise<PodVolume> {
    const namespace = pod.metadata?.namespace ?? '';
    const claim = await this.#cluster.claim(namespace, name);
    const volumeName = claim?.spec?.volumeName;
    if (claim === undefined || !volumeName) {
      return {
        kind: 'unknown',
        what: `claim ${name}, which is ${claim === undefined ? 'gone' : 'not bound'}`,
      };
    }
    const volume = await this.#cluster.volume(volumeName);
    if (volume === undefined)
      return { kind: 'unknown', what: `claim ${name}, whose volume ${volumeName} is gone` };
    const handle = volume.spec?.csi?.volumeHandle ?? '';
    const parsed = parseHandle(handle);
    if (volume.spec?.csi?.driver !== DRIVER_NAME || parsed === undefined) {
      const driver = volume.spec?.csi?.driver ?? 'another driver';
      return { kind: 'foreign', what: `claim ${name} (${driver})` };
    }
    return {
      kind: 'holdfast',
      handle,
      poolUuid: parsed.poolUuid,
      persistentVolume: objectName('PersistentVolume', volume),
      claim: objectName('PersistentVolumeClaim', claim),
      evict: await this.#evict(claim, volume, handle),
      holders: await once(this.#holders, handle, () => this.#fencing.holders(handle)),
    };
  }

  async #evict(claim: V1PersistentVolumeClaim, volume: V1PersistentVolume, handle: string): Promise<boolean> {
    const own = claim.metadata?.annotations?.[EVICT];
    if (own === 'true' || own === 'false') return own === 'true';
    const modified = await once(this.#evicts, handle, () => this.#fencing.evict(handle));
    if (modified !== undefined) return modified;
    const name = volume.spec?.storageClassName ?? '';
    if (name === '') return true;
    const found = await once(this.#classes, name, () => this.#cluster.storageClass(name));
    return found?.parameters?.[EVICT] !== 'false';
  }
}

function objectName<Kind extends 'PersistentVolume' | 'PersistentVolumeClaim'>(
  kind: Kind,
  object: V1PersistentVolume | V1PersistentVolumeClaim,
): { kind: Kind; namespace: string; name: string; uid: string } {
  const { namespace = '', name = '', uid = '' } = object.metadata ?? {};
  return { kind, namespace, name, uid };
}

async function once<T>(made: Map<string, Promise<T>>, key: string, make: () => Promise<T>): Promise<T> {
  const before = made.get(key);
  if (before !== undefined) return await before;
  const now = make();
  made.set(key, now);
  return await now;
}

async function mapSome<T, R>(
  items: readonly T[],
  atOnce: number,
  body: (item: T) => Promise<R>,
): Promise<R[]> {
  const results: R[] = [];
  for (let from = 0; from < items.length; from += atOnce) {
    results.push(...(await Promise.all(items.slice(from, from + atOnce).map(body))));
  }
  return results;
}
