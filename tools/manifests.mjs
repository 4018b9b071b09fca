// Renders the chart to deploy/kubernetes/holdfast.yaml, for clusters without Helm: `make manifests`. --stdout: prints it instead.
import { execFileSync } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const top = resolve(dirname(fileURLToPath(import.meta.url)), '..');
const cached = join(process.env.HOLDFAST_E2E_CACHE ?? join(homedir(), '.cache/holdfast-e2e'), 'bin/helm');
const helm = existsSync(cached) ? cached : 'helm';
const chart = join(top, 'charts/holdfast');

const header = `# Rendered from charts/holdfast with deploy/kubernetes/values.yaml by \`make manifests\`: do not edit. Needs cert-manager, and the snapshot CRDs
# (charts/holdfast/crds). kubectl apply --server-side -f charts/holdfast/crds -f deploy/kubernetes/holdfast.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: holdfast-system
  labels: { pod-security.kubernetes.io/enforce: privileged }
`;
const rendered = execFileSync(
  helm,
  ['template', 'holdfast', chart, '--namespace', 'holdfast-system', '--values', join(top, 'deploy/kubernetes/values.yaml')],
  { encoding: 'utf8', maxBuffer: 64 << 20 },
)
  // There is no Helm that manages these.
  .replaceAll(/^ *app\.kubernetes\.io\/managed-by: Helm\n/gm, '')
  .replaceAll(/^ *helm\.sh\/chart: .*\n/gm, '')
  .replaceAll(/^# Source: .*\n/gm, '')
  .replaceAll(/^ *\n/gm, '')
  .split(/^---\n/m)
  .filter((part) => part.trim() !== '');
// An object without a namespace would go to the user's current one.
const namespaced = rendered.map((part) => {
  const kind = /^kind: (\S+)$/m.exec(part)?.[1];
  const clusterWide = ['ClusterRole', 'ClusterRoleBinding', 'CSIDriver', 'StorageClass', 'VolumeSnapshotClass', 'VolumeGroupSnapshotClass', 'VolumeAttributesClass'];
  if (kind === undefined || clusterWide.includes(kind) || /^ {2}namespace: /m.test(part)) return part;
  return part.replace(/^metadata:\n/m, 'metadata:\n  namespace: holdfast-system\n');
});
const text = [header, ...namespaced].map((part) => part.trimEnd()).join('\n---\n');
if (process.argv.includes('--stdout')) process.stdout.write(`${text}\n`);
else writeFileSync(join(top, 'deploy/kubernetes/holdfast.yaml'), `${text}\n`);
