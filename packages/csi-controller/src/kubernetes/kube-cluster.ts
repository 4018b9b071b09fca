/** The API server by @kubernetes/client-node: the typed calls, with a time limit each, and errors as this project has them. */
import {
  ApiException,
  CoordinationV1Api,
  CoreV1Api,
  KubeConfig,
  ListWatch,
  Observable,
  PatchStrategy,
  StorageV1Api,
  V1MicroTime,
  Watch,
  type CoreV1Event,
  type KubernetesListObject,
  type KubernetesObject,
  type ObservableMiddleware,
  type RequestContext,
  type ResponseContext,
  type V1Lease,
  type V1Node,
  type V1PersistentVolume,
  type V1PersistentVolumeClaim,
  type V1Pod,
  type V1StorageClass,
} from '@kubernetes/client-node';
import { HoldfastError } from '@holdfast/common';
import { Conflict, type Cluster, type Versioned } from './cluster.ts';
import type { EventSink, EventText } from './events.ts';
import type { LeaseRecord, LeaseStore, StoredLease } from './leader.ts';
import { FENCE_MARK } from './settings.ts';
import type { ApiContact } from './silence.ts';
import type { FenceMark, PodView, Taint } from './view.ts';

export const NODE_LEASES = 'kube-node-lease';
const requestMs = 4000;
const watchSeconds = 240;

/** @throws HoldfastError INVALID_ARGUMENT when there is nothing to reach an API server by. */
export function kubeConfig(file: string | undefined): KubeConfig {
  const config = new KubeConfig();
  if (file === undefined && process.env['KUBERNETES_SERVICE_HOST'] === undefined) {
    throw new HoldfastError(
      'INVALID_ARGUMENT',
      '--kubernetes needs an API server, and this process does not run as a pod. Give --kubeconfig FILE.',
    );
  }
  if (file === undefined) config.loadFromCluster();
  else config.loadFromFile(file);
  return config;
}

export class KubeCluster implements Cluster, EventSink {
  readonly #config: KubeConfig;
  readonly #core: CoreV1Api;
  readonly #storage: StorageV1Api;
  readonly #coordination: CoordinationV1Api;
  readonly #answered: () => void;
  readonly #component: string;

  /** @param component the name under which Events are reported. */
  constructor(config: KubeConfig, contact: ApiContact, nowMs: () => number, component: string) {
    this.#config = config;
    this.#core = config.makeApiClient(CoreV1Api);
    this.#storage = config.makeApiClient(StorageV1Api);
    this.#coordination = config.makeApiClient(CoordinationV1Api);
    this.#answered = () => contact.answered(nowMs());
    this.#component = component;
  }

  // ---------------------------------------------------------------------------------------------- reads

  async node(name: string): Promise<V1Node | undefined> {
    return await this.#find('get node', (options) => this.#core.readNode({ name }, options));
  }

  async kubeletLease(name: string): Promise<string | undefined> {
    const lease = await this.#find('get lease', (options) =>
      this.#coordination.readNamespacedLease({ name, namespace: NODE_LEASES }, options),
    );
    return lease?.metadata?.resourceVersion;
  }

  async podsOn(node: string): Promise<V1Pod[]> {
    const fieldSelector = `spec.nodeName=${node}`;
    const list = await this.#call('list pods', (options) =>
      this.#core.listPodForAllNamespaces({ fieldSelector }, options),
    );
    return list.items;
  }

  async claim(namespace: string, name: string): Promise<V1PersistentVolumeClaim | undefined> {
    return await this.#find('get persistentvolumeclaim', (options) =>
      this.#core.readNamespacedPersistentVolumeClaim({ namespace, name }, options),
    );
  }

  async volume(name: string): Promise<V1PersistentVolume | undefined> {
    return await this.#find('get persistentvolume', (options) =>
      this.#core.readPersistentVolume({ name }, options),
    );
  }

  async storageClass(name: string): Promise<V1StorageClass | undefined> {
    return await this.#find('get storageclass', (options) =>
      this.#storage.readStorageClass({ name }, options),
    );
  }

  // ---------------------------------------------------------------------------------------------- writes

  async setTaints(
    { name, resourceVersion }: Versioned,
    taints: readonly Taint[],
    mark: FenceMark | null | undefined,
  ): Promise<void> {
    const annotations =
      mark === undefined
        ? {}
        : { annotations: { [FENCE_MARK]: mark === null ? null : JSON.stringify(mark) } };
    const body = { metadata: { resourceVersion, ...annotations }, spec: { taints } };
    await this.#call('patch node', (options) => this.#core.patchNode({ name, body }, options), merge);
  }

  async setVolumesInUse({ name, resourceVersion }: Versioned, names: readonly string[]): Promise<void> {
    const body = { metadata: { resourceVersion }, status: { volumesInUse: names } };
    await this.#call(
      'patch nodes/status',
      (options) => this.#core.patchNodeStatus({ name, body }, options),
      merge,
    );
  }

  async deletePod({ namespace, name, uid, resourceVersion }: PodView): Promise<void> {
    const body = { gracePeriodSeconds: 0, preconditions: { uid, resourceVersion } };
    await this.#find('delete pod', (options) =>
      this.#core.deleteNamespacedPod({ namespace, name, body }, options),
    );
  }

  // ---------------------------------------------------------------------------------------------- Events

  async create({ namespace, name, notice }: EventText): Promise<boolean> {
    const now = new Date();
    const { kind, name: about, uid, namespace: where } = notice.about;
    const apiVersion = 'v1';
    const body: CoreV1Event = {
      metadata: { name, namespace },
      involvedObject: { apiVersion, kind, name: about, uid, ...(where === '' ? {} : { namespace: where }) },
      reason: notice.reason,
      message: notice.message.slice(0, 1024),
      type: notice.warning ? 'Warning' : 'Normal',
      source: { component: this.#component },
      reportingComponent: this.#component,
      reportingInstance: this.#component,
      firstTimestamp: now,
      lastTimestamp: now,
      count: 1,
    };
    try {
      await this.#call('create event', (options) =>
        this.#core.createNamespacedEvent({ namespace, body }, options),
      );
      return true;
    } catch (error) {
      if (error instanceof Conflict) return false;
      throw error;
    }
  }

  async repeat({ namespace, name }: EventText, count: number): Promise<boolean> {
    const body = { lastTimestamp: new Date().toISOString(), ...(count > 1 ? { count } : {}) };
    const found = await this.#find(
      'patch event',
      (options) => this.#core.patchNamespacedEvent({ namespace, name, body }, options),
      merge,
    );
    return found !== undefined;
  }

  // ---------------------------------------------------------------------------------------------- Leases, informers

  leaseStore(namespace: string, name: string): LeaseStore {
    return {
      read: async (timeoutMs) => {
        const lease = await this.#find(
          'get lease',
          (options) => this.#coordination.readNamespacedLease({ namespace, name }, options),
          { timeoutMs },
        );
        return lease === undefined ? undefined : storedLease(lease);
      },
      write: async (record, version, timeoutMs) => {
        const body = leaseBody(namespace, name, record, version);
        const stored = await this.#call(
          version === undefined ? 'create lease' : 'update lease',
          (options) =>
            version === undefined
              ? this.#coordination.createNamespacedLease({ namespace, body }, options)
              : this.#coordination.replaceNamespacedLease({ namespace, name, body }, options),
          { timeoutMs },
        );
        return storedLease(stored);
      },
    };
  }

  nodeInformer(): ListWatch<V1Node> {
    return this.#informer('/api/v1/nodes', 'list nodes', (options) => this.#core.listNode({}, options));
  }

  leaseInformer(): ListWatch<V1Lease> {
    const namespace = NODE_LEASES;
    return this.#informer(
      `/apis/coordination.k8s.io/v1/namespaces/${namespace}/leases`,
      'list leases',
      (options) => this.#coordination.listNamespacedLease({ namespace }, options),
    );
  }

  /** Not started. A watch ends by itself after some minutes, so that one whose connection died unnoticed is not for ever. */
  #informer<T extends KubernetesObject>(
    path: string,
    what: string,
    list: (options: CallOptions) => Promise<KubernetesListObject<T>>,
  ): ListWatch<T> {
    const watch = new Watch(this.#config);
    const limited: Pick<Watch, 'watch'> = {
      watch: async (where, query, callback, done) => {
        const limit = { ...query, timeoutSeconds: watchSeconds };
        const request = await watch.watch(where, limit, callback, done);
        const timer = setTimeout(() => request.abort(), (watchSeconds + 10) * 1000).unref();
        request.signal.addEventListener('abort', () => clearTimeout(timer), { once: true });
        return request;
      },
    };
    return new ListWatch<T>(path, limited as Watch, () => this.#call(what, list), false);
  }

  // ---------------------------------------------------------------------------------------------- calls

  /** Undefined: 404. */
  async #find<T>(
    what: string,
    method: (options: CallOptions) => Promise<T>,
    how: CallSettings = {},
  ): Promise<T | undefined> {
    try {
      return await this.#call(what, method, how);
    } catch (error) {
      if (error instanceof HoldfastError && error.code === 'NOT_FOUND') return undefined;
      throw error;
    }
  }

  /** @throws Conflict, HoldfastError */
  async #call<T>(
    what: string,
    method: (options: CallOptions) => Promise<T>,
    how: CallSettings = {},
  ): Promise<T> {
    const signal = AbortSignal.timeout(how.timeoutMs ?? requestMs);
    try {
      const result = await method({
        middleware: [limits(signal, how.contentType)],
        middlewareMergeStrategy: 'append',
      });
      this.#answered();
      return result;
    } catch (error) {
      throw this.#explained(what, error);
    }
  }

  #explained(what: string, error: unknown): Error {
    if (!(error instanceof ApiException)) {
      const why = error instanceof Error ? error.message : String(error);
      return new HoldfastError(
        'KUBERNETES_UNAVAILABLE',
        `The Kubernetes API did not answer (${what}: ${why}). It is asked again; nobody is fenced for that.`,
        { cause: error },
      );
    }
    const why = `${what}: ${reasonOf(error)}`;
    if (error.code < 500 && error.code !== 429) this.#answered();
    switch (error.code) {
      case 404:
        return new HoldfastError('NOT_FOUND', `The Kubernetes API has no such object (${why}).`);
      case 409:
        return new Conflict(why);
      case 401:
      case 403:
        return new HoldfastError(
          'KUBERNETES_REFUSED',
          `The Kubernetes API refuses "${what}" (${reasonOf(error)}). Give the controller's service account the rights that docs/kubernetes-safety.md lists.`,
        );
      default:
        return new HoldfastError(
          'KUBERNETES_UNAVAILABLE',
          `The Kubernetes API answered ${error.code} (${why}). It is asked again.`,
        );
    }
  }
}

type CallOptions = { middleware: ObservableMiddleware[]; middlewareMergeStrategy: 'append' };
interface CallSettings {
  timeoutMs?: number;
  contentType?: string;
}
const merge: CallSettings = { contentType: PatchStrategy.MergePatch };

function limits(signal: AbortSignal, contentType: string | undefined): ObservableMiddleware {
  return {
    pre: (request: RequestContext) => {
      request.setSignal(signal);
      if (contentType !== undefined) request.setHeaderParam('Content-Type', contentType);
      return new Observable(Promise.resolve(request));
    },
    post: (response: ResponseContext) => new Observable(Promise.resolve(response)),
  };
}

/** The API server's sentence; the exception's own message has all headers in it. */
function reasonOf(error: ApiException<unknown>): string {
  const { body } = error;
  try {
    const status = (typeof body === 'string' ? JSON.parse(body) : body) as { message?: unknown } | undefined;
    if (typeof status?.message === 'string') return status.message;
  } catch {
    // not JSON: a proxy answered
  }
  return `status ${error.code}`;
}

function storedLease(lease: V1Lease): StoredLease {
  return {
    holder: lease.spec?.holderIdentity ?? '',
    durationMs: (lease.spec?.leaseDurationSeconds ?? 0) * 1000,
    transitions: lease.spec?.leaseTransitions ?? 0,
    version: lease.metadata?.resourceVersion ?? '',
  };
}

/** The times in it are for people; nobody decides by them. */
function leaseBody(
  namespace: string,
  name: string,
  record: LeaseRecord,
  version: string | undefined,
): V1Lease {
  const now = new V1MicroTime();
  return {
    apiVersion: 'coordination.k8s.io/v1',
    kind: 'Lease',
    metadata: { name, namespace, ...(version === undefined ? {} : { resourceVersion: version }) },
    spec: {
      holderIdentity: record.holder,
      leaseDurationSeconds: Math.ceil(record.durationMs / 1000),
      leaseTransitions: record.transitions,
      renewTime: now,
    },
  };
}
