/** What is known of one node, read just now from the API server and the metadata service. All that decide() looks at. */

export interface NodeView {
  readonly name: string;
  readonly node: KubeNode;
  readonly kubelet: KubeletView;
  /** Every installation of an agent under this name: a node that was made anew has another node id. */
  readonly agents: readonly AgentView[];
  /** The pods bound to it, the finished ones too. */
  readonly pods: readonly PodView[];
}

export interface KubeNode {
  readonly uid: string;
  readonly resourceVersion: string;
  readonly ready: boolean;
  /** The boot that the kubelet reported last. */
  readonly bootId: string;
  readonly taints: readonly Taint[];
  /** Unique volume names, as the kubelet reported them last. */
  readonly volumesInUse: readonly string[];
  /** What we left on it when it was fenced. */
  readonly mark: FenceMark | undefined;
}

export interface Taint {
  readonly key: string;
  readonly value?: string;
  readonly effect: string;
  readonly timeAdded?: unknown;
}

export interface FenceMark {
  readonly bootId: string;
  readonly lives: readonly Life[];
}

/** One life of a node on a pool. */
export interface Life {
  readonly nodeId: string;
  readonly poolUuid: string;
  readonly generation: string;
}

export interface KubeletView {
  /** For how long its Lease is known not to have been renewed, while the API server answered; undefined: it has none. */
  readonly silentMs: number | undefined;
  /** It was seen to renew it within the time after which it would count as silent. */
  readonly alive: boolean;
}

export interface AgentView {
  readonly nodeId: string;
  readonly connected: boolean;
  readonly silentMs: number;
  readonly hosts: readonly HostView[];
}

/** The newest life of an agent on one pool. */
export interface HostView {
  readonly poolUuid: string;
  readonly generation: string;
  readonly state: 'JOINING' | 'LIVE' | 'FENCING' | 'CUTTING' | 'DEAD';
  readonly bootId: string;
  readonly heldVolumes: number;
  /** For how long its heartbeat stands still on the disk; undefined: nobody could read it. */
  readonly stillMs: number | undefined;
  readonly proof: string;
  readonly machineOff: boolean;
  /** Of a fence under way. */
  readonly waitingFor: string;
  /** The fence waits for a person. */
  readonly needsConfirmation: boolean;
}

export interface PodView {
  readonly namespace: string;
  readonly name: string;
  readonly uid: string;
  readonly resourceVersion: string;
  /** Succeeded or Failed: its containers have ended. */
  readonly finished: boolean;
  /** For how long it was seen with a deletion timestamp; undefined: nobody deletes it. */
  readonly deletingMs: number | undefined;
  readonly graceMs: number;
  /** It belongs to its node (a DaemonSet's, a static pod), or tolerates without limit that the node cannot be reached. */
  readonly staysWithNode: boolean;
  readonly volumes: readonly PodVolume[];
}

/** A persistent volume of a pod. Others (emptyDir, configMap, an inline CSI volume, …) end with their node. */
export type PodVolume = HoldfastVolume | { readonly kind: 'foreign' | 'unknown'; readonly what: string };

export interface HoldfastVolume {
  readonly kind: 'holdfast';
  readonly handle: string;
  readonly poolUuid: string;
  readonly persistentVolume: ObjectName;
  readonly claim: ObjectName;
  /** False: its StorageClass says that its pods are left where they are. */
  readonly evict: boolean;
  /** Node ids with a grant that is not free; undefined: the metadata service does not know the volume. */
  readonly holders: readonly string[] | undefined;
}

export interface ObjectName {
  readonly kind: 'PersistentVolume' | 'PersistentVolumeClaim' | 'Pod' | 'Node';
  /** Empty for cluster-wide objects. */
  readonly namespace: string;
  readonly name: string;
  readonly uid: string;
}
