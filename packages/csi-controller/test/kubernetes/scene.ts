/** Nodes, pods and volumes in a real API server, with a real metadata service whose agents are stand-ins. */
import { createLogger, DRIVER_NAME, EVICT, formatHandle, type Logger } from '@holdfast/common';
import type { V1Node, V1Pod, V1Taint } from '@kubernetes/client-node';
import { sleep, waitFor } from '@holdfast/testing';
import { Cluster } from '../../../metadata-service/test/cluster.ts';
import { FakeDisk, type FakeAgent } from '../../../metadata-service/test/fake-agent.ts';
import type { FencingClass } from '@holdfast/proto';
import { startSafety, type RunningSafety } from '../../src/kubernetes/index.ts';
import { uniqueName } from '../../src/kubernetes/decide.ts';
import type { LeaderSettings } from '../../src/kubernetes/leader.ts';
import { MetadataApi } from '../../src/metadata-client.ts';
import { NAMESPACE, type ControlPlane } from './control-plane.ts';

/** Times of a test: the stand-ins renew more often than real kubelets and engines. */
export const quick = { kubeletSilentMs: 2500, agentSilentMs: 1000, heartbeatStillMs: 500, overdueMs: 500 };
export const quickLeader: LeaderSettings = {
  durationMs: 4000,
  renewDeadlineMs: 2000,
  retryMs: 500,
  requestMs: 1500,
};
const OTHER_DRIVER = 'other.example.com';

export function quietLogger(): Logger {
  const logger = createLogger('safety-test');
  logger.level = process.env['HOLDFAST_LOG_LEVEL'] ?? 'silent';
  return logger;
}

export interface SceneOptions {
  /** Of the pool. */
  readonly disk?: Partial<FakeDisk>;
  readonly kubeletRenewsMs?: number;
}

export interface Machine {
  readonly name: string;
  agent: FakeAgent;
  bootId: string;
}

export class Scene {
  readonly plane: ControlPlane;
  readonly service: Cluster;
  readonly disk: FakeDisk;
  readonly machines = new Map<string, Machine>();
  readonly #kubeletRenewsMs: number;
  readonly #kubelets = new Map<string, NodeJS.Timeout>();
  readonly #controllers: { safety: RunningSafety; metadata: MetadataApi }[] = [];

  private constructor(plane: ControlPlane, service: Cluster, disk: FakeDisk, kubeletRenewsMs: number) {
    this.#kubeletRenewsMs = kubeletRenewsMs;
    this.plane = plane;
    this.service = service;
    this.disk = disk;
  }

  static async start(
    plane: ControlPlane,
    fencing: FencingClass,
    nodes: readonly string[],
    options: SceneOptions = {},
  ): Promise<Scene> {
    const disk = Object.assign(new FakeDisk(), { fencing, leaseMs: 600 }, options.disk);
    const scene = new Scene(plane, await Cluster.start(), disk, options.kubeletRenewsMs ?? 500);
    await scene.#classes();
    for (const name of nodes) await scene.#node(name);
    return scene;
  }

  async stop(): Promise<void> {
    for (const name of this.#kubelets.keys()) this.stopKubelet(name);
    for (const { safety, metadata } of this.#controllers) {
      await safety.close();
      metadata.close();
    }
    await this.service.stop();
  }

  // ---------------------------------------------------------------------------------------------- what there is

  async #classes(): Promise<void> {
    const classes = { move: 'true', stay: 'false' };
    for (const [name, evict] of Object.entries(classes)) {
      const body = { metadata: { name }, provisioner: DRIVER_NAME, parameters: { [EVICT]: evict } };
      await this.plane.storage.createStorageClass({ body }).catch(ignoreExisting);
    }
  }

  async #node(name: string): Promise<void> {
    const bootId = `${name}-boot-1`;
    const agent = await this.service.node(name, [this.disk], { machineId: `machine-${name}`, bootId });
    this.machines.set(name, { name, agent, bootId });
    const annotations = {
      'csi.volume.kubernetes.io/nodeid': JSON.stringify({ [DRIVER_NAME]: agent.nodeId }),
    };
    const taints = [{ key: 'example.com/theirs', effect: 'PreferNoSchedule' }];
    await this.plane.core.createNode({ body: { metadata: { name, annotations }, spec: { taints } } });
    await this.#status(name, (status) => {
      status.nodeInfo = { bootID: bootId } as NonNullable<V1Node['status']>['nodeInfo'];
    });
    await this.setReady(name, 'True');
    await this.plane.coordination.createNamespacedLease({
      namespace: 'kube-node-lease',
      body: { metadata: { name }, spec: { holderIdentity: name, leaseDurationSeconds: 40 } },
    });
    this.startKubelet(name);
  }

  /** Renews its Lease, as long as the API server takes it. */
  startKubelet(name: string): void {
    const renew = async (): Promise<void> => {
      const namespace = 'kube-node-lease';
      const lease = await this.plane.coordination.readNamespacedLease({ name, namespace });
      // A new number each time stands for the time that a kubelet writes.
      lease.spec ??= {};
      lease.spec.leaseTransitions = (lease.spec.leaseTransitions ?? 0) + 1;
      await this.plane.coordination.replaceNamespacedLease({ name, namespace, body: lease });
    };
    this.#kubelets.set(
      name,
      setInterval(() => void renew().catch(() => undefined), this.#kubeletRenewsMs),
    );
  }

  stopKubelet(name: string): void {
    clearInterval(this.#kubelets.get(name));
    this.#kubelets.delete(name);
  }

  async setReady(name: string, status: 'True' | 'Unknown'): Promise<void> {
    await this.#status(name, (now) => {
      now.conditions = [{ type: 'Ready', status }];
    });
  }

  async #status(name: string, change: (status: NonNullable<V1Node['status']>) => void): Promise<void> {
    for (let attempt = 0; ; attempt++) {
      const node = await this.plane.core.readNode({ name });
      node.status ??= {};
      change(node.status);
      try {
        await this.plane.core.replaceNodeStatus({ name, body: node });
        return;
      } catch (error) {
        if (attempt === 5) throw error;
        await sleep(50);
      }
    }
  }

  /** A pod that runs on a node; each of its volumes is of ours (open there), of a class that opted out, or of another driver. */
  async pod(name: string, node: string, volumes: readonly ('ours' | 'stay' | 'other')[]): Promise<V1Pod> {
    const claims: string[] = [];
    const inUse: string[] = [];
    for (const [index, kind] of volumes.entries()) {
      const claim = `${name}-${index}`;
      inUse.push(
        kind === 'other' ? await this.#otherVolume(claim, node) : await this.#ourVolume(claim, node, kind),
      );
      claims.push(claim);
    }
    await this.#status(node, (status) => {
      status.volumesInUse = [...(status.volumesInUse ?? []), ...inUse];
    });
    return await this.plane.core.createNamespacedPod({
      namespace: 'default',
      body: {
        metadata: { name },
        spec: {
          nodeName: node,
          containers: [{ name: 'main', image: 'none' }],
          volumes: claims.map((claimName) => ({ name: claimName, persistentVolumeClaim: { claimName } })),
        },
      },
    });
  }

  async #ourVolume(claim: string, node: string, kind: 'ours' | 'stay'): Promise<string> {
    const { agent } = this.machines.get(node) as Machine;
    const volume = await this.service.create(`pv-${claim}`);
    await agent.openVolume(this.disk, volume.uuid, await this.service.publish(volume.uuid, agent));
    const handle = formatHandle({ poolUuid: this.disk.uuid, volumeUuid: volume.uuid });
    await this.#persistentVolume(claim, node, DRIVER_NAME, handle, kind === 'stay' ? 'stay' : 'move');
    return uniqueName(handle);
  }

  async #otherVolume(claim: string, node: string): Promise<string> {
    await this.#persistentVolume(claim, node, OTHER_DRIVER, `disk-${claim}`, 'other');
    return `kubernetes.io/csi/${OTHER_DRIVER}^disk-${claim}`;
  }

  async #persistentVolume(
    claim: string,
    node: string,
    driver: string,
    volumeHandle: string,
    storageClassName: string,
  ): Promise<void> {
    const volume = `pv-${claim}`;
    const accessModes = ['ReadWriteOnce'];
    const storage = '1Gi';
    await this.plane.core.createPersistentVolume({
      body: {
        metadata: { name: volume },
        spec: { accessModes, capacity: { storage }, storageClassName, csi: { driver, volumeHandle } },
      },
    });
    await this.plane.core.createNamespacedPersistentVolumeClaim({
      namespace: 'default',
      body: {
        metadata: { name: claim },
        spec: { accessModes, resources: { requests: { storage } }, storageClassName, volumeName: volume },
      },
    });
    await this.plane.storage.createVolumeAttachment({
      body: {
        metadata: { name: `va-${claim}` },
        spec: { attacher: driver, nodeName: node, source: { persistentVolumeName: volume } },
      },
    });
  }

  // ---------------------------------------------------------------------------------------------- who acts, what happens

  controller(identity: string, settings: object = {}): RunningSafety {
    const metadata = new MetadataApi(this.service.service.address);
    const safety = startSafety({
      config: this.plane.controller,
      metadata,
      namespace: NAMESPACE,
      leaseName: 'holdfast-csi-controller',
      identity,
      logger: quietLogger(),
      settings: { ...quick, ...settings },
      leader: quickLeader,
    });
    this.#controllers.push({ safety, metadata });
    return safety;
  }

  /** The machine loses its power. */
  powerOff(name: string): void {
    this.stopKubelet(name);
    this.machines.get(name)?.agent.kill();
  }

  /** It comes back under a new boot: kubelet first, as it is. */
  async powerOn(name: string): Promise<void> {
    const machine = this.machines.get(name) as Machine;
    machine.bootId = `${name}-boot-2`;
    await this.#status(name, (status) => {
      status.nodeInfo = { bootID: machine.bootId } as NonNullable<V1Node['status']>['nodeInfo'];
    });
    await this.setReady(name, 'True');
    this.startKubelet(name);
    machine.agent = this.service.agent(name, [this.disk], {
      machineId: `machine-${name}`,
      bootId: machine.bootId,
    });
    await machine.agent.connect();
    await machine.agent.join(this.disk);
  }

  // ---------------------------------------------------------------------------------------------- what to expect

  async podExists(name: string): Promise<V1Pod | undefined> {
    const { items } = await this.plane.core.listNamespacedPod({ namespace: 'default' });
    return items.find((pod) => pod.metadata?.name === name);
  }

  async podGone(name: string, timeoutMs = 30_000): Promise<void> {
    await waitFor(`pod ${name} to go`, async () => (await this.podExists(name)) === undefined, { timeoutMs });
  }

  async taints(name: string): Promise<V1Taint[]> {
    return (await this.plane.core.readNode({ name })).spec?.taints ?? [];
  }

  async taintKeys(name: string): Promise<string[]> {
    return (await this.taints(name)).map((taint) => taint.key).sort();
  }

  async volumesInUse(name: string): Promise<string[]> {
    return (await this.plane.core.readNode({ name })).status?.volumesInUse ?? [];
  }

  async events(): Promise<{ reason: string; kind: string; name: string; message: string }[]> {
    const { items } = await this.plane.core.listEventForAllNamespaces();
    return items.map(({ reason = '', message = '', involvedObject: { kind = '', name = '' } }) => ({
      reason,
      kind,
      name,
      message,
    }));
  }

  async event(reason: string, kind: string, name: string): Promise<string> {
    const found = await waitFor(`event ${reason} on ${kind} ${name}`, async () =>
      (await this.events()).find((one) => one.reason === reason && one.kind === kind && one.name === name),
    );
    return found.message;
  }

  async attachments(): Promise<string[]> {
    const { items } = await this.plane.storage.listVolumeAttachment();
    return items.map((one) => one.metadata?.name ?? '').sort();
  }

  async hostState(name: string): Promise<string> {
    return (await this.service.host(this.disk, (this.machines.get(name) as Machine).agent)).state;
  }
}

function ignoreExisting(error: unknown): void {
  if ((error as { code?: number }).code !== 409) throw error;
}
