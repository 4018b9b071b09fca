/** How long who has to be silent before a node counts as dead. All times are measured here, never compared with a clock elsewhere. */

export interface SafetySettings {
  /**
   * A kubelet renews its Lease every 10 s (4 % more at most). More than that plus a slow request: one renewal was missed. Only
   * time in which the API server answered counts.
   */
  readonly kubeletSilentMs: number;
  /** Without a session of the node's agent at the metadata service. An agent that restarts is back in less. */
  readonly agentSilentMs: number;
  /** Without a new heartbeat on the disk: three renewals of 2 s. */
  readonly heartbeatStillMs: number;
  /** Of a pod that Kubernetes has decided to delete, beyond its grace period, while its kubelet is silent. */
  readonly overdueMs: number;
  /** The out-of-service taint, where there is proof that the machine is off. */
  readonly outOfService: boolean;
}

export const defaultSettings: SafetySettings = {
  kubeletSilentMs: 12_000,
  agentSilentMs: 4000,
  heartbeatStillMs: 6000,
  overdueMs: 5000,
  outOfService: true,
};

/** On a node that is fenced: nothing new is scheduled there until its agent is back under a new generation. */
export const FENCED_TAINT = 'holdfast.io/fenced';
/** On the Node beside the taint: which lives were fenced, and which boot of the machine they belonged to. */
export const FENCE_MARK = 'holdfast.io/fence';
/** Kubernetes' own: frees the volumes of every driver. Ours is known by its value. */
export const OUT_OF_SERVICE_TAINT = 'node.kubernetes.io/out-of-service';
export const OUT_OF_SERVICE_VALUE = 'holdfast-machine-off';
