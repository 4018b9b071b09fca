// Certificates and tokens of a test cluster: one authority, one server certificate, a token for each client.
import { randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { run } from './shell.mjs';

/** @returns {Promise<{ca: string, cert: string, key: string, serviceAccountKey: string, serviceAccountPublic: string}>} paths */
export async function makePki(directory, addresses) {
  const at = (name) => join(directory, name);
  const openssl = (...args) => run('openssl', args);
  await openssl('req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2', '-subj', '/CN=e2e-ca', '-keyout', at('ca.key'), '-out', at('ca.crt'));
  await openssl('req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-subj', '/CN=kube-apiserver', '-keyout', at('server.key'), '-out', at('server.csr'));
  writeFileSync(at('server.ext'), `subjectAltName=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default.svc,${addresses.map((a) => `IP:${a}`).join(',')}\n`);
  await openssl('x509', '-req', '-in', at('server.csr'), '-CA', at('ca.crt'), '-CAkey', at('ca.key'), '-CAcreateserial', '-days', '2', '-extfile', at('server.ext'), '-out', at('server.crt'));
  await openssl('genrsa', '-out', at('sa.key'), '2048');
  await openssl('rsa', '-in', at('sa.key'), '-pubout', '-out', at('sa.pub'));
  return { ca: at('ca.crt'), cert: at('server.crt'), key: at('server.key'), serviceAccountKey: at('sa.key'), serviceAccountPublic: at('sa.pub') };
}

/** Tokens for users with their groups; writes the API server's file and gives a kubeconfig's path for each name. */
export function makeTokens(directory, server, ca, users) {
  const lines = [];
  const paths = {};
  for (const { name, user, groups } of users) {
    const token = randomBytes(16).toString('hex');
    lines.push(`${token},${user},${name},"${groups.join(',')}"`);
    const config = {
      apiVersion: 'v1',
      kind: 'Config',
      clusters: [{ name: 'e2e', cluster: { server, 'certificate-authority': ca } }],
      users: [{ name, user: { token } }],
      contexts: [{ name: 'e2e', context: { cluster: 'e2e', user: name } }],
      'current-context': 'e2e',
    };
    paths[name] = join(directory, `${name}.kubeconfig`);
    writeFileSync(paths[name], JSON.stringify(config), { mode: 0o600 });
  }
  const file = join(directory, 'tokens.csv');
  writeFileSync(file, `${lines.join('\n')}\n`, { mode: 0o600 });
  return { file, paths };
}
