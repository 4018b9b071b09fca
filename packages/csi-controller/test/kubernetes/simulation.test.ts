/** Decisions and runner in a world that goes wrong in every way, by seeds. SIM_SEEDS=n runs so many; SIM_SEED=n runs that one. */
import { createLogger } from '@holdfast/common';
import { describe, expect, it } from 'vitest';
import type { Clock } from '../../src/kubernetes/clock.ts';
import { EventRecorder } from '../../src/kubernetes/events.ts';
import { Runner } from '../../src/kubernetes/runner.ts';
import { defaultSettings, FENCED_TAINT, OUT_OF_SERVICE_VALUE } from '../../src/kubernetes/settings.ts';
import { ApiContact, KubeletLeases } from '../../src/kubernetes/silence.ts';
import { SafetyBroken, World } from './world.ts';

const logger = createLogger('simulation');
logger.level = process.env['HOLDFAST_LOG_LEVEL'] ?? 'silent';

/** The process ends here. */
class Killed extends Error {}

/** One life of a controller process: everything that it knows ends with it. */
class Process {
  readonly runner: Runner;
  readonly #contact = new ApiContact();
  readonly #leases = new KubeletLeases(this.#contact);
  readonly #world: World;
  leading = true;
  /** What its informers have seen: not always the newest. */
  #noted: string[] = [];

  constructor(world: World) {
    this.#world = world;
    const clock: Clock = { nowMs: () => world.ms, sleep: () => Promise.resolve(), random: world.random };
    const events = new EventRecorder(
      { create: () => Promise.resolve(true), repeat: () => Promise.resolve(true) },
      clock,
      logger,
    );
    this.runner = new Runner({
      cluster: world.cluster(),
      fencing: world.fencing(),
      leases: this.#leases,
      events,
      clock,
      logger,
      settings: defaultSettings,
      mayActMs: () => (this.leading ? 4000 : 0),
      notedNodes: () => this.#noted,
    });
  }

  /** Informers and the leader Lease, as far as they come through. */
  informed(lag: number): void {
    const world = this.#world;
    if (world.apiDown) return;
    this.#contact.answered(world.ms);
    for (const machine of world.machines.values()) {
      if (!world.chance(lag)) this.#leases.seen(machine.name, String(machine.leaseVersion), world.ms);
    }
    if (world.chance(lag)) return;
    this.#noted = [...world.machines.values()]
      .filter((machine) => !machine.ready || machine.mark !== undefined || hasOurTaint(machine))
      .map((machine) => machine.name);
  }
}

function hasOurTaint(machine: { taints: readonly { key: string; value?: string }[] }): boolean {
  return machine.taints.some(({ key, value }) => key === FENCED_TAINT || value === OUT_OF_SERVICE_VALUE);
}

/** Ticks two replicas of which one leads. What the truth forbids comes out as SafetyBroken. */
async function run(
  world: World,
  steps: number,
  trouble: (world: World) => void,
  kills: number,
): Promise<void> {
  let replicas = [new Process(world), new Process(world)];
  let broken: SafetyBroken | undefined;
  const guard = world.onWrite;
  world.onWrite = (what) => {
    guard(what);
    if (world.chance(kills)) throw new Killed(what);
  };
  for (let step = 0; step < steps && broken === undefined; step++) {
    world.advance(500);
    trouble(world);
    if (world.chance(0.005)) replicas = replicas.toReversed();
    for (const [index, replica] of replicas.entries()) {
      replica.leading = index === 0;
      replica.informed(0.2);
      try {
        await replica.runner.tick();
      } catch (error) {
        if (error instanceof SafetyBroken) broken = error;
        else throw error;
      }
    }
    if (world.chance(kills / 10)) replicas[0] = new Process(world);
  }
  world.onWrite = guard;
  if (broken !== undefined) throw broken;
}

/** The runner swallows errors of a look, so that one node does not stop another: what broke is kept here. */
function watchForBreaks(world: World): () => void {
  const broken: Error[] = [];
  const { api, service } = world;
  const watched = <T>(call: Promise<T>): Promise<T> =>
    call.catch((error: unknown) => {
      if (error instanceof SafetyBroken) broken.push(error);
      throw error;
    });
  world.api = (...args) => watched(api.apply(world, args as never)) as never;
  world.service = (...args) => watched(service.apply(world, args as never)) as never;
  return () => {
    if (broken[0] !== undefined) throw broken[0];
  };
}

function trouble(world: World): void {
  if (!world.chance(0.01)) return;
  const machine = world.pick([...world.machines.values()]);
  const off = [...world.machines.values()].filter((one) => !one.on).length;
  world.pick([
    () => off < 2 && world.powerOff(machine),
    () => off < 2 && world.powerOff(machine),
    () => world.powerOn(machine),
    () => world.confirmOff(machine),
    () => (machine.kubelet = false),
    () => (machine.agent = false),
    () => (machine.partitioned = true),
    () => world.heal(machine),
    () => world.heal(machine),
    () => (world.apiDown = !world.apiDown),
    () => (world.apiDown = false),
    () => (world.serviceDown = !world.serviceDown),
    () => (world.serviceDown = false),
  ])();
}

const one = process.env['SIM_SEED'];
const seeds =
  one === undefined
    ? Array.from({ length: Number(process.env['SIM_SEEDS'] ?? 60) }, (_, index) => index + 1)
    : [Number(one)];

describe('a cluster in which everything fails', () => {
  const total = { fences: 0, deletions: 0, taints: 0, outOfService: 0 };

  it.each(seeds)(
    'loses no pod that could still be written, and ends well when faults stop (seed %i)',
    async (seed) => {
      const world = new World(seed);
      const check = watchForBreaks(world);
      world.faults = { before: 0.05, after: 0.05 };
      await run(world, 1500, trouble, 0.05);
      check();
      world.faults = { before: 0, after: 0 };
      world.apiDown = false;
      world.serviceDown = false;
      for (const machine of world.machines.values()) {
        if (machine.on) world.heal(machine);
        else world.confirmOff(machine);
      }
      await run(world, 400, () => undefined, 0);
      check();
      expect(world.unplacedPods().map((pod) => `${pod.name} on ${pod.node}`)).toEqual([]);
      const marked = [...world.machines.values()].filter(
        (machine) => machine.on && (hasOurTaint(machine) || machine.mark !== undefined),
      );
      expect(marked.map((machine) => machine.name)).toEqual([]);
      for (const key of Object.keys(total) as (keyof typeof total)[]) total[key] += world.done[key];
    },
    60_000,
  );

  it.skipIf(one !== undefined)('has fenced, deleted, tainted and called machines off all the while', () => {
    expect(Math.min(...Object.values(total))).toBeGreaterThan(0);
  });
});

describe('an outage', () => {
  const few = seeds.slice(0, 20);

  it.each(few)('of the API server alone fences nobody, however long (seed %i)', async (seed) => {
    const world = new World(seed);
    const check = watchForBreaks(world);
    const away = (now: World): void => {
      now.apiDown = now.ms % 120_000 > 40_000;
    };
    await run(world, 1000, away, 0);
    check();
    expect(world.done).toEqual({ fences: 0, deletions: 0, taints: 0, outOfService: 0 });
  });

  it.each(few)('of the metadata service alone fences nobody (seed %i)', async (seed) => {
    const world = new World(seed);
    const check = watchForBreaks(world);
    const away = (now: World): void => {
      now.serviceDown = now.ms % 120_000 > 40_000;
    };
    await run(world, 1000, away, 0);
    check();
    expect(world.done).toEqual({ fences: 0, deletions: 0, taints: 0, outOfService: 0 });
  });

  it.each(few)('of all agents alone fences nobody (seed %i)', async (seed) => {
    const world = new World(seed);
    const check = watchForBreaks(world);
    const away = (now: World): void => {
      for (const machine of now.machines.values()) machine.agent = now.ms % 120_000 < 40_000;
    };
    await run(world, 1000, away, 0);
    check();
    expect(world.done.fences).toBe(0);
  });
});

describe('a failover that is cut off', () => {
  /** How many writes (each is counted before and after) a quiet failover takes; `killAt`: the process ends at that one. */
  async function failover(killAt: number): Promise<{ writes: number; world: World }> {
    const world = new World(7);
    const check = watchForBreaks(world);
    let writes = 0;
    world.onWrite = () => {
      if (++writes === killAt) throw new Killed();
    };
    const victim = world.machines.get([...world.pods.values()][0]?.node ?? '');
    let off = false;
    let killed = false;
    let process = new Process(world);
    for (let step = 0; step < 400; step++) {
      world.advance(500);
      if (!off && world.ms > 20_000 && victim !== undefined) {
        world.powerOff(victim);
        world.confirmOff(victim);
        off = true;
      }
      process.informed(0);
      await process.runner.tick();
      if (!killed && killAt > 0 && writes >= killAt) {
        killed = true;
        process = new Process(world);
      }
    }
    check();
    return { writes, world };
  }

  it('before or after any of its writes is brought to its end by the next process', async () => {
    const { writes } = await failover(0);
    expect(writes).toBeGreaterThan(6);
    for (let killAt = 1; killAt <= writes; killAt++) {
      const { world } = await failover(killAt);
      expect(world.unplacedPods(), `cut off at write ${killAt}`).toEqual([]);
    }
  }, 60_000);
});
