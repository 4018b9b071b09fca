/** All but the machines: an API server, a metadata service, agents that are stand-ins, and the controller with the rights it has. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { sleep, TestArea, waitFor } from '@holdfast/testing';
import { afterEach, describe, expect, it } from 'vitest';
import { defaultSettings, FENCED_TAINT, OUT_OF_SERVICE_TAINT } from '../../src/kubernetes/settings.ts';
import { ControlPlane, missing, NAMESPACE } from './control-plane.ts';
import { quick, Scene, type SceneOptions } from './scene.ts';

const undo: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
}, 60_000);

async function sceneOver(
  kind: 'real' | 'stand-in',
  fencing: 'LEASE_ONLY' | 'MANUAL' | 'LOOP',
  options: SceneOptions = {},
): Promise<Scene> {
  const area = await TestArea.create('kubernetes');
  undo.push(() => area.dispose());
  const plane = await ControlPlane.start(area, kind);
  const made = await Scene.start(plane, `FENCING_CLASS_${fencing}`, ['n1', 'n2', 'n3'], options);
  undo.push(() => made.stop());
  return made;
}

describe('over a stand-in for the API server', () => {
  failovers('stand-in');
});
describe.skipIf(missing !== undefined)(
  `over kube-apiserver${missing === undefined ? '' : ` (skipped: ${missing})`}`,
  () => {
    failovers('real');
  },
);

function failovers(kind: 'real' | 'stand-in'): void {
  const scene = (fencing: 'LEASE_ONLY' | 'MANUAL' | 'LOOP'): Promise<Scene> => sceneOver(kind, fencing);

  it('a node that dies is fenced, tainted, and loses exactly the pods whose volumes are all ours', async () => {
    const s = await scene('LEASE_ONLY');
    const leader = s.controller('a');
    await waitFor('a leader', () => leader.isLeader());
    await s.pod('plain', 'n1', ['ours', 'ours']);
    const mixed = await s.pod('mixed', 'n1', ['ours', 'other']);
    const other = await s.pod('other', 'n1', ['other']);
    const stays = await s.pod('stays', 'n1', ['stay']);
    const elsewhere = await s.pod('elsewhere', 'n2', ['ours']);
    const attachments = await s.attachments();
    const before = await s.volumesInUse('n1');
    const theirs = await s.taintKeys('n1');
    // So long that a kubelet which works would have been found silent.
    await sleep(2 * quick.kubeletSilentMs);
    expect(await s.hostState('n1')).toBe('HOST_STATE_LIVE');

    s.powerOff('n1');
    await s.podGone('plain');
    expect(await s.hostState('n1')).toBe('HOST_STATE_DEAD');
    expect(await s.taintKeys('n1')).toEqual([...theirs, FENCED_TAINT].sort());
    expect(await s.volumesInUse('n1')).toEqual(before.slice(2));
    for (const pod of [mixed, other, stays, elsewhere]) {
      const now = await s.podExists(pod.metadata?.name ?? '');
      expect([now?.metadata?.uid, now?.metadata?.deletionTimestamp]).toEqual([pod.metadata?.uid, undefined]);
    }
    expect(await s.attachments()).toEqual(attachments);
    expect(await s.event('HoldfastFenced', 'Node', 'n1')).toContain('lease-expired');
    expect(await s.event('HoldfastPodLeftAlone', 'Pod', 'mixed')).toContain('other.example.com');
    expect(await s.event('HoldfastPodLeftAlone', 'Pod', 'stays')).toContain('holdfast.io/evict');
    await s.event('HoldfastEvicted', 'Pod', 'plain');
    await s.event('HoldfastVolumeFenced', 'PersistentVolumeClaim', 'plain-0');
    await s.event('HoldfastVolumeFenced', 'PersistentVolume', 'pv-plain-1');
    expect(await s.hostState('n2')).toBe('HOST_STATE_LIVE');

    await s.powerOn('n1');
    await waitFor('our taint to go', async () => !(await s.taintKeys('n1')).includes(FENCED_TAINT), {
      timeoutMs: 15_000,
    });
    expect(await s.taintKeys('n1')).toEqual(theirs);
    expect((await s.plane.core.readNode({ name: 'n1' })).metadata?.annotations).not.toHaveProperty(
      'holdfast.io/fence',
    );
    await s.event('HoldfastNodeBack', 'Node', 'n1');
    expect(await s.podExists('mixed')).toBeDefined();
  }, 120_000);

  it('an API server that is killed in the middle fences nobody else, and the failover ends when it is back', async () => {
    const s = await scene('LEASE_ONLY');
    // Long enough to be killed in.
    s.disk.leaseMs = 3000;
    s.machines.get('n2')?.agent.reportPools();
    const leader = s.controller('a');
    await waitFor('a leader', () => leader.isLeader());
    await s.pod('plain', 'n1', ['ours']);
    await s.pod('elsewhere', 'n2', ['ours']);
    await sleep(1000);
    s.powerOff('n1');
    await waitFor('the fence', async () => /FENCING|CUTTING/.test(await s.hostState('n1')), {
      timeoutMs: 20_000,
    });
    await s.plane.kill();
    await sleep(4 * quick.kubeletSilentMs);
    expect(await s.hostState('n1')).toBe('HOST_STATE_DEAD');
    expect(await s.hostState('n2')).toBe('HOST_STATE_LIVE');
    await s.plane.up();
    await s.podGone('plain');
    expect(await s.hostState('n2')).toBe('HOST_STATE_LIVE');
    expect(await s.hostState('n3')).toBe('HOST_STATE_LIVE');
    expect(await s.podExists('elsewhere')).toBeDefined();
  }, 180_000);

  it('nobody is fenced while only the API server, or only an agent, is away', async () => {
    const s = await scene('LEASE_ONLY');
    const leader = s.controller('a');
    await waitFor('a leader', () => leader.isLeader());
    const pod = await s.pod('plain', 'n1', ['ours']);
    s.machines.get('n1')?.agent.disconnect();
    await sleep(3 * quick.kubeletSilentMs);
    await s.plane.kill();
    await sleep(3 * quick.kubeletSilentMs);
    await s.plane.up();
    await sleep(3 * quick.kubeletSilentMs);
    expect(await s.hostState('n1')).toBe('HOST_STATE_LIVE');
    expect((await s.podExists('plain'))?.metadata?.uid).toBe(pod.metadata?.uid);
  }, 180_000);

  it('a fence that waits for a person says so, and the word frees the volumes of other drivers too', async () => {
    const s = await scene('MANUAL');
    const leader = s.controller('a');
    await waitFor('a leader', () => leader.isLeader());
    await s.pod('plain', 'n1', ['ours']);
    await s.pod('other', 'n1', ['other']);
    const theirs = await s.taintKeys('n1');
    s.powerOff('n1');
    expect(await s.event('HoldfastFencing', 'Node', 'n1')).toContain('silent');
    const message = await waitFor(
      'the event',
      async () => (await s.events()).find((event) => event.reason === 'HoldfastFenceWaits'),
      { timeoutMs: 20_000 },
    );
    expect(message.message).toContain('holdfast node confirm-off n1.00000001');
    expect(await s.podExists('plain')).toBeDefined();
    expect(await s.taintKeys('n1')).toEqual(theirs);

    await s.service.rpc('ConfirmNodeOff', { node_id: 'n1.00000001', confirmed_by: 'a test' });
    await s.podGone('plain');
    await waitFor('out of service', async () => (await s.taintKeys('n1')).includes(OUT_OF_SERVICE_TAINT));
    expect(await s.event('HoldfastMachineOff', 'Node', 'n1')).toContain(
      'a test says that the machine is off',
    );

    await s.powerOn('n1');
    await waitFor('our taints to go', async () => (await s.taintKeys('n1')).length === theirs.length, {
      timeoutMs: 15_000,
    });
    expect(await s.taintKeys('n1')).toEqual(theirs);
  }, 120_000);

  it('a node that was shut down in order is not fenced, and its pods move', async () => {
    const s = await scene('LEASE_ONLY');
    const leader = s.controller('a');
    await waitFor('a leader', () => leader.isLeader());
    await s.pod('plain', 'n1', ['ours']);
    const { agent } = s.machines.get('n1')!;
    for (const [uuid, grant] of agent.open)
      await agent.ask('ReturnVolume', s.disk, { volume_uuid: uuid, epoch: grant.epoch });
    agent.open.clear();
    s.powerOff('n1');
    await s.podGone('plain');
    const events = (await s.service.audit({ node_id: agent.nodeId })).map((record) => record.event);
    expect(events).not.toContain('fence-intent');
  }, 120_000);

  it('a node whose kubelet alone died keeps its pods until Kubernetes deletes them', async () => {
    const s = await scene('LOOP');
    const leader = s.controller('a');
    await waitFor('a leader', () => leader.isLeader());
    await s.pod('plain', 'n1', ['ours']);
    await s.pod('second', 'n1', ['ours']);
    s.stopKubelet('n1');
    await s.setReady('n1', 'Unknown');
    await sleep(3 * quick.kubeletSilentMs);
    expect(await s.hostState('n1')).toBe('HOST_STATE_LIVE');
    await s.plane.core.deleteNamespacedPod({
      namespace: 'default',
      name: 'plain',
      body: { gracePeriodSeconds: 2 },
    });
    await s.podGone('plain');
    expect(await s.podExists('second')).toBeDefined();
    expect((await s.service.audit({ node_id: 'n1.00000001' })).map((record) => record.event)).toContain(
      'dead',
    );
  }, 120_000);

  it('a leader that is killed in the middle of a fence is succeeded, and the failover ends', async () => {
    const s = await scene('MANUAL');
    const main = fileURLToPath(new URL('../../src/main.ts', import.meta.url));
    const start = (name: string, socket: string) => {
      const child = spawn(
        process.execPath,
        [
          '--import',
          'tsx',
          '--conditions=@holdfast/source',
          main,
          `--endpoint=unix:${socket}`,
          `--metadata=${s.service.service.address}`,
          '--kubernetes',
          `--namespace=${NAMESPACE}`,
          `--kubeconfig=${s.plane.controllerKubeconfig}`,
          `--identity=${name}`,
        ],
        { stdio: process.env['HOLDFAST_LOG_LEVEL'] === undefined ? 'ignore' : 'inherit' },
      );
      undo.push(async () => {
        if (child.exitCode !== null || child.signalCode !== null) return;
        child.kill('SIGKILL');
        await once(child, 'exit');
      });
      return child;
    };
    const area = await TestArea.create('leader');
    undo.push(() => area.dispose());
    const holder = async (): Promise<string> => {
      const lease = { namespace: NAMESPACE, name: 'holdfast-csi-controller' };
      return (await s.plane.coordination.readNamespacedLease(lease)).spec?.holderIdentity ?? '';
    };
    const first = start('first', area.path('first.sock'));
    await waitFor('the first leader', async () => (await holder()).startsWith('first_'), {
      timeoutMs: 30_000,
    });
    start('second', area.path('second.sock'));
    await s.pod('plain', 'n1', ['ours']);
    const mixed = await s.pod('mixed', 'n1', ['ours', 'other']);
    s.powerOff('n1');
    await waitFor('the fence', async () => (await s.hostState('n1')) === 'HOST_STATE_CUTTING', {
      timeoutMs: 60_000,
    });
    first.kill('SIGKILL');
    await once(first, 'exit');
    const killedAt = performance.now();
    await s.service.rpc('ConfirmNodeOff', { node_id: 'n1.00000001', confirmed_by: 'a test' });
    await waitFor('the second leader', async () => (await holder()).startsWith('second_'), {
      timeoutMs: 40_000,
    });
    // Not before the first one's time is over, as it counts itself.
    expect(performance.now() - killedAt).toBeGreaterThan(9000);
    await s.podGone('plain', 60_000);
    expect((await s.podExists('mixed'))?.metadata?.uid).toBe(mixed.metadata?.uid);
  }, 240_000);

  it('with the times of a real cluster, a pod of a node that is killed is gone after half a minute', async () => {
    const disk = { leaseMs: 10_000, renewIntervalMs: 2000, drainMs: 5000 };
    const s = await sceneOver(kind, 'LEASE_ONLY', { disk, kubeletRenewsMs: 10_000 });
    const leader = s.controller('a', defaultSettings);
    await waitFor('a leader', () => leader.isLeader());
    await s.pod('plain', 'n1', ['ours']);
    // Two renewals of the kubelet, and a part of the next.
    await sleep(24_000);
    const killedAt = performance.now();
    const since = (): string => ((performance.now() - killedAt) / 1000).toFixed(1);
    s.powerOff('n1');
    await waitFor('the fence', async () => (await s.hostState('n1')) !== 'HOST_STATE_LIVE', {
      timeoutMs: 30_000,
    });
    const fenced = since();
    await waitFor('its end', async () => (await s.hostState('n1')) === 'HOST_STATE_DEAD', {
      timeoutMs: 30_000,
    });
    const over = since();
    await s.podGone('plain');
    const gone = since();
    process.stdout.write(
      `killed; fence asked for after ${fenced} s, over after ${over} s, pod gone after ${gone} s\n`,
    );
    expect(Number(over)).toBeGreaterThan(15.5);
    expect(Number(gone)).toBeLessThan(40);
  }, 180_000);

  it('two replicas: the one that ends hands over at once', async () => {
    const s = await scene('LEASE_ONLY');
    const a = s.controller('a');
    await waitFor('a leader', () => a.isLeader());
    const b = s.controller('b');
    await s.pod('plain', 'n1', ['ours']);
    await sleep(1000);
    expect(b.isLeader()).toBe(false);
    s.powerOff('n1');
    await waitFor('the fence', async () => (await s.hostState('n1')) !== 'HOST_STATE_LIVE', {
      timeoutMs: 20_000,
    });
    await a.close();
    expect(a.isLeader()).toBe(false);
    await waitFor('the other leader', () => b.isLeader(), { timeoutMs: 3000 });
    await s.podGone('plain');
  }, 120_000);
}
