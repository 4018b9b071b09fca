// Before anything is installed: values that name what is not there.
import assert from 'node:assert/strict';
import { namespace } from '../lib/holdfast.mjs';

export const refusalSpecs = [
  {
    name: 'helm stops with sentences where the Secrets and the claim that the values name are not there, or lack a key',
    body: async ({ cluster, holdfast }) => {
      await cluster.kubectl(['create', 'namespace', namespace]);
      await cluster.kubectl(['create', 'secret', 'generic', 'half', '--namespace', namespace, '--from-literal=tls.crt=x', '--from-literal=tls.key=x']);
      const values = ['tls.mode=existingSecrets', 'tls.existingSecrets.metadata=half', 'tls.existingSecrets.controller=absent', 'tls.existingSecrets.node=absent', 'metadataService.existingClaim=absent'];
      const said = await holdfast.helm('install', '--dry-run=server', ...values.flatMap((value) => ['--set', value])).then(() => 'nothing', (error) => error.message);
      await cluster.kubectl(['delete', 'secret', 'half', '--namespace', namespace]);
      await cluster.waiting(['delete', 'namespace', namespace]);
      assert.match(said, /Secret half \(tls\.existingSecrets\.metadata\) has no ca\.crt/);
      assert.match(said, /tls\.existingSecrets\.controller names Secret absent, which is not in namespace holdfast-system\. Create it first/);
      assert.match(said, /metadataService\.existingClaim names claim absent, which is not in namespace holdfast-system/);
    },
  },
];
