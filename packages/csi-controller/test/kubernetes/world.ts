/**
 * A small cluster in simulated time: machines, kubelets, agents, the metadata service's fences, an API server that fails, and
 * the controllers of Kubernetes that matter here. It knows the truth (which engine can write which volume), and looks at every
 * call that the safety side makes: a call that the truth forbids throws SafetyBroken.
 */
import type { V1Node, V1PersistentVolume, V1Pod } from '@kubernetes/client-node';
import { DRIVER_NAME, EVICT } from '@holdfast/common';
import { Conflict, type Cluster, type Fencing, type Versioned } from '../../src/kubernetes/cluster.ts';
import { uniqueName } from '../../src/kubernetes/decide.ts';
import {
  FENCE_MARK,
  FENCED_TAINT,
  OUT_OF_SERVICE_TAINT,
  OUT_OF_SERVICE_VALUE,
} from '../../src/kubernetes/settings.ts';
import type { AgentView, FenceMark, HostView, Life, PodView, Taint } from '../../src/kubernetes/view.ts';

export class SafetyBroken extends Error {
  override name = 'SafetyBroken';
}

export const pools = [
  '00000000-0000-4000-8000-00000000000a',
  '00000000-0000-4000-8000-00000000000b',
] as const;
const foreignTaint: Taint = { key: 'example.com/theirs', effect: 'NoExecute' };

interface Machine {
  readonly name: string;
  readonly nodeId: string;
  on: boolean;
  bootId: string;
  kubelet: boolean;
  /** The agent's process; its engine lives with it. */
  agent: boolean;
  /** Cut off from the API server and the metadata service, not from the disk. */
  partitioned: boolean;
  /** When it last became what it is now, for "the node came back while that was decided". */
  backAtMs: number;
  /** Since when kubelet, agent and network were all well without a break; undefined: they are not. */
  wellSinceMs: number | undefined;
  leaseVersion: number;
  leaseAtMs: number;
  disconnectedAtMs: number | undefined;
  readonly hosts: Map<string, Host>;
  ready: boolean;
  taints: Taint[];
  mark: string | undefined;
  volumesInUse: string[];
  version: number;
}

interface Host {
  generation: bigint;
  state: HostView['state'];
  machineOff: boolean;
  bootId: string;
  fenceDoneMs: number;
  /** A person has to say so. */
  manual: boolean;
}

interface Pod {
  readonly name: string;
  uid: string;
  node: string;
  deletedAtMs: number | undefined;
  version: number;
  readonly volumes: readonly string[];
}

interface Volume {
  readonly name: string;
  readonly poolUuid: string;
  readonly handle: string;
  readonly foreign: boolean;
  readonly evict: boolean;
  /** Which life can write it. */
  holder: { nodeId: string; generation: bigint; sinceMs: number } | undefined;
}

export interface Faults {
  /** Of each call: fails before it had an effect, or after. */
  before: number;
  after: number;
}

export class World {
  ms = 0;
  readonly random: () => number;
  readonly machines = new Map<string, Machine>();
  readonly pods = new Map<string, Pod>();
  readonly volumes = new Map<string, Volume>();
  faults: Faults = { before: 0, after: 0 };
  apiDown = false;
  serviceDown = false;
  /** When the look under way began. */
  lookedAtMs = 0;
  /** Called before each write, with its name: a test ends the process there. */
  onWrite: (what: string) => void = () => undefined;
  readonly done = { fences: 0, deletions: 0, taints: 0, outOfService: 0 };
  #uid = 0;

  /** What volumes say themselves. */
  readonly evicts = new Map<string, boolean>();

  constructor(seed: number) {
    let state = seed >>> 0 || 1;
    this.random = () => {
      state ^= state << 13;
      state >>>= 0;
      state ^= state >>> 17;
      state ^= state << 5;
      state >>>= 0;
      return state / 2 ** 32;
    };
    for (const name of ['n1', 'n2', 'n3', 'n4']) this.machines.set(name, this.#machine(name));
    this.#app('plain', [{}]);
    this.#app('two', [{}, { poolUuid: pools[1] }]);
    this.#app('second', [{ poolUuid: pools[1] }]);
    this.#app('mixed', [{}, { foreign: true }]);
    this.#app('theirs', [{ foreign: true }]);
    this.#app('opted-out', [{ evict: false }]);
    this.#app('plain-2', [{}]);
  }

  chance(probability: number): boolean {
    return this.random() < probability;
  }
  pick<T>(items: readonly T[]): T {
    return items[Math.floor(this.random() * items.length)];
  }

  #machine(name: string): Machine {
    const hosts = new Map(
      pools.map((uuid, index): [string, Host] => [
        uuid,
        {
          generation: 1n,
          state: 'LIVE',
          machineOff: false,
          bootId: `${name}-boot-1`,
          fenceDoneMs: Infinity,
          manual: index === 1,
        },
      ]),
    );
    return {
      name,
      nodeId: `${name}.00000001`,
      on: true,
      bootId: `${name}-boot-1`,
      kubelet: true,
      agent: true,
      partitioned: false,
      backAtMs: 0,
      wellSinceMs: 0,
      leaseVersion: 1,
      leaseAtMs: 0,
      disconnectedAtMs: undefined,
      hosts,
      ready: true,
      taints: this.chance(0.3) ? [foreignTaint] : [],
      mark: undefined,
      volumesInUse: ['kubernetes.io/csi/other.example.com^disk'],
      version: 1,
    };
  }

  #app(name: string, volumes: Partial<Volume>[]): void {
    const names = volumes.map((change, index) => {
      const volume = `${name}-${index}`;
      const number = String(this.volumes.size + 1).padStart(12, '0');
      const poolUuid = change.poolUuid ?? pools[0];
      this.volumes.set(volume, {
        name: volume,
        poolUuid,
        handle: `${poolUuid}/00000000-0000-4000-8000-${number}`,
        foreign: change.foreign ?? false,
        evict: change.evict ?? true,
        holder: undefined,
      });
      return volume;
    });
    this.#schedule(name, names);
  }

  #schedule(name: string, volumes: readonly string[]): void {
    const free = [...this.machines.values()].filter(
      (machine) => machine.ready && !machine.taints.some((taint) => taint.key === FENCED_TAINT),
    );
    const node = this.pick(free.length > 0 ? free : [...this.machines.values()]).name;
    const uid = `uid-${++this.#uid}`;
    this.pods.set(name, { name, uid, node, deletedAtMs: undefined, version: 1, volumes });
  }

  // ---------------------------------------------------------------------------------------------- time goes on

  advance(ms: number): void {
    this.ms += ms;
    for (const machine of this.machines.values()) this.#live(machine);
    for (const pod of this.pods.values()) this.#run(pod);
  }

  #live(machine: Machine): void {
    const reaches = machine.on && !machine.partitioned;
    const kubelet = reaches && machine.kubelet && !this.apiDown;
    if (kubelet && this.ms - machine.leaseAtMs >= 10_000) {
      machine.leaseAtMs = this.ms;
      machine.leaseVersion++;
      if (!machine.ready) this.#change(machine, () => (machine.ready = true));
    }
    // The node lifecycle controller: after 50 s without a renewal, while the API server is there.
    if (this.apiDown) machine.leaseAtMs = Math.max(machine.leaseAtMs, this.ms - 10_000);
    if (machine.ready && this.ms - machine.leaseAtMs > 50_000)
      this.#change(machine, () => (machine.ready = false));
    const connected = this.#isConnected(machine);
    machine.disconnectedAtMs = connected ? undefined : (machine.disconnectedAtMs ?? this.ms);
    for (const host of machine.hosts.values()) this.#hostLives(machine, host, connected);
    const well = reaches && machine.kubelet && machine.agent;
    machine.wellSinceMs = well ? (machine.wellSinceMs ?? this.ms) : undefined;
  }

  #hostLives(machine: Machine, host: Host, connected: boolean): void {
    const heeds = machine.on && machine.agent;
    const fencing = host.state === 'FENCING' || host.state === 'CUTTING';
    // The engine finds its fence page and says that it stopped; else the time runs out, or a person speaks.
    const over = fencing && this.ms >= host.fenceDoneMs && (heeds || !host.manual || host.machineOff);
    if (over) this.#bury(machine, host);
    else if (fencing && this.ms >= host.fenceDoneMs - 3000) host.state = 'CUTTING';
    if (host.state === 'DEAD' && connected) {
      Object.assign(host, {
        generation: host.generation + 1n,
        state: 'LIVE',
        machineOff: false,
        bootId: machine.bootId,
        fenceDoneMs: Infinity,
      });
      machine.backAtMs = this.ms;
    }
  }

  #bury(machine: Machine, host: Host): void {
    host.state = 'DEAD';
    for (const volume of this.volumes.values()) {
      if (volume.holder?.nodeId === machine.nodeId && machine.hosts.get(volume.poolUuid) === host) {
        volume.holder = undefined;
      }
    }
  }

  #change(machine: Machine, change: () => void): void {
    change();
    machine.version++;
  }

  #isConnected(machine: Machine): boolean {
    return machine.on && machine.agent && !machine.partitioned && !this.serviceDown;
  }

  #run(pod: Pod): void {
    const machine = this.#machineOf(pod);
    const kubelet = machine.on && machine.kubelet && !machine.partitioned && !this.apiDown;
    // Taint eviction: a minute here, five in a real cluster.
    if (!machine.ready && pod.deletedAtMs === undefined && this.ms - machine.leaseAtMs > 110_000) {
      pod.deletedAtMs = this.ms;
      pod.version++;
    }
    if (!kubelet) return;
    if (pod.deletedAtMs !== undefined && this.ms - pod.deletedAtMs > 2000) {
      this.#release(pod, machine);
      this.#gone(pod);
      return;
    }
    if (pod.deletedAtMs === undefined && this.#isConnected(machine)) this.#stage(pod, machine);
  }

  #machineOf(pod: Pod): Machine {
    return this.machines.get(pod.node) as Machine;
  }

  /** The grant machine: free, and offered to a live host only. */
  #stage(pod: Pod, machine: Machine): void {
    for (const name of pod.volumes) {
      const volume = this.volumes.get(name) as Volume;
      const host = machine.hosts.get(volume.poolUuid);
      if (volume.foreign || host?.state !== 'LIVE' || volume.holder !== undefined) continue;
      volume.holder = { nodeId: machine.nodeId, generation: host.generation, sinceMs: this.ms };
      const inUse = uniqueName(volume.handle);
      if (!machine.volumesInUse.includes(inUse)) {
        this.#change(machine, () => machine.volumesInUse.push(inUse));
      }
      pod.version++;
    }
  }

  #release(pod: Pod, machine: Machine): void {
    for (const name of pod.volumes) {
      const volume = this.volumes.get(name) as Volume;
      if (volume.holder?.nodeId === machine.nodeId) volume.holder = undefined;
      const inUse = uniqueName(volume.handle);
      this.#change(
        machine,
        () => (machine.volumesInUse = machine.volumesInUse.filter((one) => one !== inUse)),
      );
    }
  }

  #gone(pod: Pod): void {
    this.pods.delete(pod.name);
    this.#schedule(pod.name, pod.volumes);
  }

  // ---------------------------------------------------------------------------------------------- what happens to machines

  powerOff(machine: Machine): void {
    machine.on = false;
    machine.wellSinceMs = undefined;
  }

  powerOn(machine: Machine): void {
    if (machine.on) return;
    Object.assign(machine, { on: true, kubelet: true, agent: true, partitioned: false, backAtMs: this.ms });
    this.#change(machine, () => (machine.bootId = `${machine.bootId}+`));
    // A new boot id of the same machine: its older lives are dead.
    for (const host of machine.hosts.values()) if (host.state !== 'DEAD') this.#bury(machine, host);
  }

  /** A person, truthfully. */
  confirmOff(machine: Machine): void {
    if (machine.on) return;
    for (const host of machine.hosts.values()) host.machineOff = true;
  }

  heal(machine: Machine): void {
    if (machine.partitioned || !machine.kubelet || !machine.agent) machine.backAtMs = this.ms;
    Object.assign(machine, { partitioned: false, kubelet: true, agent: true });
  }

  /** As the service would see it: nobody leaves a healthy node without its volumes. */
  unplacedPods(): Pod[] {
    return [...this.pods.values()].filter((pod) => {
      const machine = this.#machineOf(pod);
      const ours = pod.volumes.map((name) => this.volumes.get(name) as Volume);
      return !machine.on && ours.every((volume) => !volume.foreign && volume.evict);
    });
  }

  // ---------------------------------------------------------------------------------------------- the ports

  async #call<T>(what: string, down: () => boolean, write: boolean, body: () => T): Promise<T> {
    await Promise.resolve();
    if (write) this.onWrite(`before ${what}`);
    if (this.chance(0.02)) this.advance(300);
    if (down() || this.chance(this.faults.before)) throw new Error(`${what}: no answer`);
    const result = body();
    if (write) this.onWrite(`after ${what}`);
    if (this.chance(this.faults.after)) throw new Error(`${what}: the answer is lost`);
    return structuredClone(result);
  }

  api<T>(what: string, body: () => T, write = false): Promise<T> {
    return this.#call(what, () => this.apiDown, write, body);
  }
  service<T>(what: string, body: () => T, write = false): Promise<T> {
    return this.#call(what, () => this.serviceDown, write, body);
  }

  cluster(): Cluster {
    return {
      node: (name) => {
        this.lookedAtMs = this.ms;
        return this.api('get node', () => this.#node(this.machines.get(name)));
      },
      kubeletLease: (name) => this.api('get lease', () => this.machines.get(name)?.leaseVersion.toString()),
      podsOn: (node) =>
        this.api('list pods', () => [...this.pods.values()].filter((pod) => pod.node === node).map(rawPod)),
      claim: (_namespace, name) =>
        this.api('get claim', () => ({
          ...meta(`claim-${name}`, name),
          spec: { volumeName: `pv-${name}` },
        })),
      volume: (name) => this.api('get volume', () => this.#persistentVolume(name)),
      storageClass: (name) =>
        this.api('get class', () => ({
          ...meta(name, name),
          provisioner: DRIVER_NAME,
          parameters: { [EVICT]: name === 'stay' ? 'false' : 'true' },
        })),
      setTaints: (node, taints, mark) =>
        this.api('set taints', () => this.#setTaints(node, taints, mark), true),
      setVolumesInUse: (node, names) =>
        this.api('set volumesInUse', () => this.#setVolumesInUse(node, names), true),
      deletePod: (pod) => this.api('delete pod', () => this.#deletePod(pod), true),
    };
  }

  fencing(): Fencing {
    return {
      troubled: () =>
        this.service('troubled', () =>
          [...this.machines.values()]
            .filter(
              (machine) =>
                !this.#isConnected(machine) ||
                [...machine.hosts.values()].some((host) => host.state !== 'LIVE'),
            )
            .map((machine) => machine.name),
        ),
      agents: (name) => this.service('agents', () => this.#agents(name)),
      holders: (handle) =>
        this.service('holders', () => {
          const volume = [...this.volumes.values()].find((one) => one.handle === handle);
          return volume && (volume.holder === undefined ? [] : [volume.holder.nodeId]);
        }),
      evict: (handle) => this.service('evict', () => this.evicts.get(handle)),
      fence: (life, _reason, unlessConnected) =>
        this.service('fence', () => this.#fence(life, unlessConnected), true),
    };
  }

  #node(machine: Machine | undefined): V1Node | undefined {
    if (machine === undefined) return undefined;
    const annotations = machine.mark === undefined ? {} : { [FENCE_MARK]: machine.mark };
    return {
      metadata: {
        name: machine.name,
        uid: machine.name,
        resourceVersion: String(machine.version),
        annotations,
      },
      spec: { taints: machine.taints as NonNullable<V1Node['spec']>['taints'] },
      status: {
        conditions: [{ type: 'Ready', status: machine.ready ? 'True' : 'Unknown' }],
        volumesInUse: machine.volumesInUse,
        nodeInfo: { bootID: machine.bootId } as never,
      },
    } as V1Node;
  }

  #persistentVolume(name: string): V1PersistentVolume | undefined {
    const volume = this.volumes.get(name.replace(/^pv-/, ''));
    if (volume === undefined) return undefined;
    return {
      ...meta(name, name),
      spec: {
        storageClassName: volume.evict ? 'move' : 'stay',
        csi: { driver: volume.foreign ? 'other.example.com' : DRIVER_NAME, volumeHandle: volume.handle },
      },
    };
  }

  #agents(name: string): AgentView[] {
    const machine = this.machines.get(name) as Machine;
    const connected = this.#isConnected(machine);
    const hosts = [...machine.hosts].map(([poolUuid, host]): HostView => {
      const beats = machine.on && machine.agent;
      return {
        poolUuid,
        generation: host.generation.toString(),
        state: host.state,
        bootId: host.bootId,
        heldVolumes: [...this.volumes.values()].filter(
          (volume) => volume.poolUuid === poolUuid && volume.holder?.nodeId === machine.nodeId,
        ).length,
        stillMs:
          connected || host.state === 'DEAD'
            ? undefined
            : beats
              ? 0
              : this.ms - (machine.disconnectedAtMs ?? this.ms),
        proof: host.state === 'DEAD' ? 'simulated' : '',
        machineOff: host.state === 'DEAD' && host.machineOff,
        waitingFor: '',
        needsConfirmation: host.state === 'CUTTING' && host.manual,
      };
    });
    const silentMs = connected ? 0 : this.ms - (machine.disconnectedAtMs ?? this.ms);
    return [{ nodeId: machine.nodeId, connected, silentMs, hosts }];
  }

  // ---------------------------------------------------------------------------------------------- writes, judged

  #broken(what: string): never {
    throw new SafetyBroken(`${what} (at ${this.ms} ms)`);
  }

  #versioned({ name, resourceVersion }: Versioned): Machine {
    const machine = this.machines.get(name);
    if (machine === undefined || String(machine.version) !== resourceVersion) throw new Conflict('version');
    return machine;
  }

  #fence(life: Life, unlessConnected: boolean): void {
    const machine = [...this.machines.values()].find((one) => one.nodeId === life.nodeId) as Machine;
    const host = machine.hosts.get(life.poolUuid) as Host;
    if (unlessConnected && this.#isConnected(machine)) throw new Conflict('connected');
    if (host.generation.toString() !== life.generation) throw new Conflict('generation');
    if (host.state !== 'LIVE') return;
    // Well for longer than anybody may have needed to find out.
    if (machine.wellSinceMs !== undefined && this.ms - machine.wellSinceMs > 15_000) {
      this.#broken(`${machine.name} was well and is fenced`);
    }
    const overdue = [...this.pods.values()].some(
      (pod) => pod.node === machine.name && pod.deletedAtMs !== undefined,
    );
    if (machine.on && machine.agent && !overdue)
      this.#broken(`${machine.name} writes, nobody wants its pods gone, and it is fenced`);
    this.done.fences++;
    host.state = 'FENCING';
    host.fenceDoneMs = this.ms + 3000 + this.random() * 15_000;
  }

  #setTaints(node: Versioned, taints: readonly Taint[], mark: FenceMark | null | undefined): void {
    const machine = this.#versioned(node);
    const theirs = (all: readonly Taint[]): string =>
      JSON.stringify(all.filter(({ key, value }) => key !== FENCED_TAINT && value !== OUT_OF_SERVICE_VALUE));
    if (theirs(taints) !== theirs(machine.taints))
      this.#broken(`a taint of somebody else on ${machine.name} was changed`);
    const isOff = (all: readonly Taint[]): boolean => all.some((taint) => taint.key === OUT_OF_SERVICE_TAINT);
    if (isOff(taints) && !isOff(machine.taints)) {
      this.done.outOfService++;
      if (machine.on && machine.backAtMs <= this.lookedAtMs)
        this.#broken(`${machine.name} runs and is called out of service`);
    }
    this.done.taints++;
    this.#change(machine, () => {
      machine.taints = [...taints];
      if (mark !== undefined) machine.mark = mark === null ? undefined : JSON.stringify(mark);
    });
  }

  #setVolumesInUse(node: Versioned, names: readonly string[]): void {
    const machine = this.#versioned(node);
    const removed = machine.volumesInUse.filter((name) => !names.includes(name));
    if (names.some((name) => !machine.volumesInUse.includes(name)))
      this.#broken('a volume was added to volumesInUse');
    for (const name of removed) {
      const volume = [...this.volumes.values()].find((one) => uniqueName(one.handle) === name);
      if (volume === undefined || volume.foreign)
        this.#broken(`${name} is not ours and was taken out of volumesInUse`);
      this.#requireCut(machine, volume, 'taken out of volumesInUse');
    }
    this.#change(machine, () => (machine.volumesInUse = [...names]));
  }

  #deletePod(wanted: PodView): void {
    const pod = this.pods.get(wanted.name);
    if (pod === undefined) return;
    if (pod.uid !== wanted.uid || String(pod.version) !== wanted.resourceVersion) throw new Conflict('pod');
    const machine = this.#machineOf(pod);
    for (const name of pod.volumes) {
      const volume = this.volumes.get(name) as Volume;
      if (volume.foreign) this.#broken(`pod ${pod.name} has another driver's volume and was deleted`);
      if (!volume.evict) this.#broken(`pod ${pod.name} opted out and was deleted`);
      this.#requireCut(machine, volume, 'deleted with its pod');
    }
    if (
      machine.wellSinceMs !== undefined &&
      this.ms - machine.wellSinceMs > 15_000 &&
      machine.backAtMs <= this.lookedAtMs
    ) {
      this.#broken(`pod ${pod.name} was deleted on ${machine.name}, which is well`);
    }
    this.done.deletions++;
    this.#gone(pod);
  }

  /** Nothing of this node can write the volume, but a life that began after the node was looked at. */
  #requireCut(machine: Machine, volume: Volume, what: string): void {
    if (volume.holder?.nodeId === machine.nodeId && volume.holder.sinceMs <= this.lookedAtMs) {
      this.#broken(`${volume.name} is open on ${machine.name} and was ${what}`);
    }
  }
}

function meta(uid: string, name: string): { metadata: { uid: string; name: string; namespace: string } } {
  return { metadata: { uid, name, namespace: 'default' } };
}

function rawPod(pod: Pod): V1Pod {
  return {
    metadata: {
      name: pod.name,
      namespace: 'default',
      uid: pod.uid,
      resourceVersion: String(pod.version),
      ...(pod.deletedAtMs === undefined
        ? {}
        : { deletionTimestamp: new Date(0), deletionGracePeriodSeconds: 30 }),
    },
    spec: {
      containers: [],
      volumes: pod.volumes.map((name) => ({ name, persistentVolumeClaim: { claimName: name } })),
    },
    status: { phase: 'Running' },
  };
}
