// After the chart was uninstalled: what is left is what docs/uninstall.md says.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { namespace } from '../lib/holdfast.mjs';
import { fuseConnections, processesBelow } from '../lib/residue.mjs';
import { until } from '../lib/shell.mjs';

export const residueSpecs = [
  {
    name: 'an uninstalled chart leaves no object behind but its custom resource definitions, its namespace and the Leases in it',
    body: async ({ cluster }) => {
      const kinds = (await cluster.kubectl(['api-resources', '--verbs=list', '--output', 'name'])).trim().split('\n').filter((kind) => !/^events|metrics/.test(kind));
      const labelled = () => cluster.kubectl(['get', kinds.join(','), '--all-namespaces', '--selector', 'app.kubernetes.io/instance=holdfast', '--output', 'name']);
      await until('labelled objects to go', async () => (await labelled()).trim() === '', { everyMs: 1000 }).catch(async () => assert.equal((await labelled()).trim(), ''));
      const own = ['pods', 'secrets', 'configmaps', 'serviceaccounts', 'csistoragecapacities', 'replicasets', 'endpointslices'];
      const rest = (await cluster.kubectl(['get', own.join(','), '--namespace', namespace, '--output', 'name'])).trim().split('\n');
      assert.deepEqual(rest, ['configmap/kube-root-ca.crt', 'serviceaccount/default']);
      const { items } = await cluster.get('csinodes,volumeattachments,nodes');
      assert.doesNotMatch(JSON.stringify(items.map(({ kind, spec }) => [kind, spec])), /holdfast\.io/);
    },
  },
  {
    name: 'an uninstalled chart leaves no process, FUSE connection, loop device or mount on any node, and only the directories that docs/uninstall.md names',
    body: async ({ cluster }) => {
      const page = readFileSync(join(import.meta.dirname, '../../../docs/uninstall.md'), 'utf8');
      const table = page.slice(page.indexOf('## 3. What Helm leaves'), page.indexOf('## 4.'));
      const named = [...table.matchAll(/`(\/[^`]+)`/g)].map(([, path]) => path);
      assert.ok(named.length > 3, 'the page names no directories');
      for (const node of cluster.nodes) {
        const pids = processesBelow(node.child.pid);
        const holdfast = pids.filter((pid) => /holdfast-keeper|\/opt\/holdfast\//.test(commandOf(pid)));
        assert.deepEqual(holdfast.map(commandOf), [], node.name);
        assert.deepEqual([...fuseConnections(pids)], [], node.name);
        const [first] = pids.filter((pid) => pid !== node.child.pid);
        const mounts = readFileSync(`/proc/${first}/mounts`, 'utf8').split('\n').filter((line) => /csi\.holdfast\.io|fuse/.test(line));
        assert.deepEqual(mounts, [], node.name);
        const inside = (path) => existsSync(`/proc/${first}/root${path}`);
        const there = ['/var/lib/holdfast', '/run/holdfast', '/dev/holdfast', '/var/lib/kubelet/plugins/csi.holdfast.io', '/var/lib/kubelet/plugins_registry/csi.holdfast.io-reg.sock'].filter(inside);
        assert.deepEqual(there.filter((path) => !named.includes(path)), [], node.name);
      }
      const loops = execFileSync('losetup', ['--list', '--noheadings', '--output', 'BACK-FILE'], { encoding: 'utf8' }).split('\n').filter((line) => /holdfast:/.test(line));
      assert.deepEqual(loops, []);
    },
  },
];

function commandOf(pid) {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim();
  } catch {
    return '';
  }
}
