import type { V1Pod, V1Toleration } from '@kubernetes/client-node';
import { describe, expect, it } from 'vitest';
import { kubeNode, staysWithNode, volumeRefs } from './observe.ts';
import { FENCE_MARK } from './settings.ts';

const podWith = (volumes: object[]): V1Pod =>
  ({ metadata: { name: 'a', namespace: 'default' }, spec: { containers: [], volumes } }) as unknown as V1Pod;

describe('volumes of a pod that outlive it', () => {
  it('are its claims, its generic ephemeral volumes, and what it names without a claim', () => {
    const pod = podWith([
      { name: 'data', persistentVolumeClaim: { claimName: 'data-a' } },
      { name: 'scratch', ephemeral: {} },
      { name: 'share', nfs: { server: 's', path: '/' } },
      { name: 'old', awsElasticBlockStore: { volumeID: 'v' } },
    ]);
    expect(volumeRefs(pod)).toEqual([
      { kind: 'claim', name: 'data-a' },
      { kind: 'claim', name: 'a-scratch' },
      { kind: 'foreign', what: 'nfs volume share' },
      { kind: 'foreign', what: 'awsElasticBlockStore volume old' },
    ]);
  });

  it('are not those that end with it or belong to its node', () => {
    const pod = podWith([
      { name: 'a', emptyDir: {} },
      { name: 'b', configMap: {} },
      { name: 'c', secret: {} },
      { name: 'd', projected: {} },
      { name: 'e', hostPath: { path: '/x' } },
      { name: 'f', csi: { driver: 'secrets-store.csi.k8s.io' } },
    ]);
    expect(volumeRefs(pod)).toEqual([]);
  });
});

describe('a pod that stays with its node', () => {
  const pod = (change: Partial<V1Pod>, tolerations: V1Toleration[] = []): V1Pod => ({
    metadata: {},
    spec: { containers: [], tolerations },
    ...change,
  });
  const owner = (kind: string) => ({
    metadata: { ownerReferences: [{ apiVersion: 'v1', kind, name: 'x', uid: 'x', controller: true }] },
  });
  const key = 'node.kubernetes.io/unreachable';

  it('is one of a DaemonSet, a static one, or one that tolerates an unreachable node without limit', () => {
    expect(staysWithNode(pod(owner('DaemonSet')))).toBe(true);
    expect(staysWithNode(pod(owner('Node')))).toBe(true);
    expect(staysWithNode(pod({ metadata: { annotations: { 'kubernetes.io/config.mirror': 'x' } } }))).toBe(
      true,
    );
    expect(staysWithNode(pod({}, [{ key, operator: 'Exists', effect: 'NoExecute' }]))).toBe(true);
    expect(staysWithNode(pod({}, [{ operator: 'Exists' }]))).toBe(true);
  });

  it('is no other: a StatefulSet, a bare pod, the default tolerations', () => {
    expect(staysWithNode(pod(owner('StatefulSet')))).toBe(false);
    expect(staysWithNode(pod({}))).toBe(false);
    const limited = { key, operator: 'Exists', effect: 'NoExecute', tolerationSeconds: 300 };
    expect(staysWithNode(pod({}, [limited]))).toBe(false);
    expect(staysWithNode(pod({}, [{ key: 'gpu', operator: 'Exists' }]))).toBe(false);
    expect(staysWithNode(pod({}, [{ operator: 'Exists', effect: 'NoSchedule' }]))).toBe(false);
  });
});

describe('the mark on a node', () => {
  const marked = (text: string) => kubeNode({ metadata: { annotations: { [FENCE_MARK]: text } } }).mark;

  it('is read as it was written', () => {
    const mark = { bootId: 'b', lives: [{ nodeId: 'n1.1', poolUuid: 'p', generation: '3' }] };
    expect(marked(JSON.stringify(mark))).toEqual(mark);
  });

  it('that somebody has spoilt still counts as a mark, so that it goes when the node is back', () => {
    expect(marked('oops')).toEqual({ bootId: '', lives: [] });
    expect(marked('{"lives":[{"generation":"x"}]}')).toEqual({ bootId: '', lives: [] });
    expect(kubeNode({ metadata: {} }).mark).toBeUndefined();
  });
});
