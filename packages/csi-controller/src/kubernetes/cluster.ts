/**
 * What the safety side needs of the outside, as interfaces: the API server, and what the metadata service knows of nodes.
 * Reads are answered by the servers themselves, never from a cache: what is done because of them cannot be taken back. Writes
 * name the version or uid that they were decided on, so that one that arrives late changes nothing.
 */
import type {
  V1Node,
  V1PersistentVolume,
  V1PersistentVolumeClaim,
  V1Pod,
  V1StorageClass,
} from '@kubernetes/client-node';
import type { AgentView, FenceMark, Life, PodView, Taint } from './view.ts';

export interface Cluster {
  /** Undefined: there is none of this name; so are the others. */
  node(name: string): Promise<V1Node | undefined>;
  /** The version of the Lease that the node's kubelet renews. */
  kubeletLease(name: string): Promise<string | undefined>;
  podsOn(node: string): Promise<V1Pod[]>;
  claim(namespace: string, name: string): Promise<V1PersistentVolumeClaim | undefined>;
  volume(name: string): Promise<V1PersistentVolume | undefined>;
  storageClass(name: string): Promise<V1StorageClass | undefined>;

  /** All taints of the node; `mark`: null takes it away, undefined leaves it. @throws Conflict */
  setTaints(node: Versioned, taints: readonly Taint[], mark: FenceMark | null | undefined): Promise<void>;
  /** @throws Conflict */
  setVolumesInUse(node: Versioned, names: readonly string[]): Promise<void>;
  /** By force. One that is gone is success. @throws Conflict when it is another pod by now, or has changed. */
  deletePod(pod: PodView): Promise<void>;
}

export interface Versioned {
  readonly name: string;
  readonly resourceVersion: string;
}

/** What was decided on has changed: look again. */
export class Conflict extends Error {
  override name = 'Conflict';
}

export interface Fencing {
  /** Names of nodes whose agent is away, or that are fenced or being fenced. */
  troubled(): Promise<string[]>;
  agents(name: string): Promise<AgentView[]>;
  /** Node ids that hold a grant of the volume which is not free; undefined: no such volume. */
  holders(handle: string): Promise<string[] | undefined>;
  /** The volume's own word on whether its pods are moved off a dead node; undefined: it has none, or there is no such volume. */
  evict(handle: string): Promise<boolean | undefined>;
  /** Durable and idempotent: returns when the intent is stored. @throws Conflict when that life, or its silence, is over. */
  fence(life: Life, reason: string, unlessConnected: boolean): Promise<void>;
}
