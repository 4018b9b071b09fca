/**
 * The Kubernetes side of failover, as a part of the controller process: what happens to the pods of a node that died
 * (docs/kubernetes-safety.md). Every replica watches; the one that leads acts.
 */
import { randomUUID } from 'node:crypto';
import type { KubeConfig, KubernetesObject, ListWatch, V1Node } from '@kubernetes/client-node';
import type { Logger } from '@holdfast/common';
import type { MetadataApi } from '../metadata-client.ts';
import { backoffMs, systemClock, type Clock } from './clock.ts';
import { EventRecorder } from './events.ts';
import { MetadataFencing } from './fencing-client.ts';
import { KubeCluster } from './kube-cluster.ts';
import { Leader, leaderDefaults, type LeaderSettings } from './leader.ts';
import { kubeNode } from './observe.ts';
import { Runner } from './runner.ts';
import { defaultSettings, FENCED_TAINT, OUT_OF_SERVICE_VALUE, type SafetySettings } from './settings.ts';
import { ApiContact, KubeletLeases } from './silence.ts';

export interface SafetyOptions {
  readonly config: KubeConfig;
  readonly metadata: MetadataApi;
  /** Where the leader Lease is. */
  readonly namespace: string;
  readonly leaseName: string;
  /** Of this replica, for people; what makes it unique is added. */
  readonly identity: string;
  readonly logger: Logger;
  readonly settings?: Partial<SafetySettings>;
  readonly leader?: LeaderSettings;
}

export interface RunningSafety {
  /** Now; another replica may lead a moment later. */
  isLeader(): boolean;
  /** Ends what is under way, gives the leadership back. */
  close(): Promise<void>;
}

export function startSafety(options: SafetyOptions): RunningSafety {
  const { config, metadata, logger } = options;
  const clock = systemClock;
  const settings = { ...defaultSettings, ...options.settings };
  const contact = new ApiContact();
  const leases = new KubeletLeases(contact);
  const cluster = new KubeCluster(config, contact, () => clock.nowMs(), 'holdfast-csi-controller');
  const events = new EventRecorder(cluster, clock, logger);
  const leader = new Leader(
    cluster.leaseStore(options.namespace, options.leaseName),
    `${options.identity}_${randomUUID()}`,
    clock,
    logger,
    options.leader ?? leaderDefaults,
  );
  const nodes = cluster.nodeInformer();
  const kubelets = cluster.leaseInformer();
  kubelets.on('change', ({ metadata: lease }) =>
    leases.seen(lease?.name ?? '', lease?.resourceVersion ?? '', clock.nowMs()),
  );
  kubelets.on('delete', ({ metadata: lease }) => leases.gone(lease?.name ?? ''));
  const runner = new Runner({
    cluster,
    fencing: new MetadataFencing(metadata),
    leases,
    events,
    clock,
    logger,
    settings,
    mayActMs: () => leader.mayActMs(),
    notedNodes: () =>
      nodes
        .list()
        .filter(needsALook)
        .map((node) => node.metadata?.name ?? ''),
  });
  const acting = new AbortController();
  const leading = new AbortController();
  const informing = [
    keep(nodes, 'nodes', logger, clock, acting.signal),
    keep(kubelets, 'leases', logger, clock, acting.signal),
  ];
  const election = leader.run(leading.signal);
  const running = runner.run(acting.signal);
  return {
    isLeader: () => leader.mayActMs() > 0,
    close: async () => {
      acting.abort();
      await running;
      await Promise.all(informing);
      leading.abort();
      await election;
      await leader.release();
      await events.flush();
    },
  };
}

/** Not ready, or there is something of ours on it. Others are looked at when the metadata service calls them troubled. */
function needsALook(node: V1Node): boolean {
  const { ready, taints, mark } = kubeNode(node);
  return (
    !ready ||
    mark !== undefined ||
    taints.some(({ key, value }) => key === FENCED_TAINT || value === OUT_OF_SERVICE_VALUE)
  );
}

/** An informer stops at an error; it is started again, later each time, until one works. */
async function keep<T extends KubernetesObject>(
  informer: ListWatch<T>,
  what: string,
  logger: Logger,
  clock: Clock,
  signal: AbortSignal,
): Promise<void> {
  let failures = 0;
  let failed: unknown;
  let wake = new AbortController();
  informer.on('error', (error: unknown) => {
    failed = error ?? new Error('the watch ended');
    wake.abort();
  });
  informer.on('change', () => {
    failures = 0;
  });
  signal.addEventListener('abort', () => wake.abort(), { once: true });
  while (!signal.aborted) {
    wake = new AbortController();
    failed = undefined;
    await informer.start();
    if (failed === undefined) await clock.sleep(3_600_000, wake.signal);
    if (signal.aborted) break;
    if (failed === undefined) continue;
    const level = failures++ === 0 ? 'warn' : 'debug';
    logger[level]({ err: failed }, `Watching ${what} was interrupted; it begins again`);
    await clock.sleep(backoffMs(failures, 250, 10_000, clock.random), signal);
  }
  await informer.stop();
}
