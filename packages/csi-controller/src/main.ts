/** The CSI controller as a process: `main.js --endpoint unix:/csi/controller.sock --metadata host:port`. */
import { hostname } from 'node:os';
import { Command } from 'commander';
import { clientCredentials, createLogger, type TlsFlags } from '@holdfast/common';
import { startController } from './server.ts';

const logger = createLogger('csi-controller');
const options = new Command('holdfast-csi-controller')
  .description('CSI Identity and Controller over the Holdfast metadata service')
  .requiredOption(
    '--endpoint <endpoint>',
    'socket to serve, for example unix:/csi/controller.sock',
    process.env['CSI_ENDPOINT'],
  )
  .requiredOption('--metadata <address>', 'host:port of the metadata service')
  .option('--tls-ca <file>', 'certificate authority of the metadata service')
  .option('--tls-cert <file>', "this controller's certificate")
  .option('--tls-key <file>', 'its private key')
  .option('--kubernetes', 'move pods off nodes that died, after fencing them (docs/kubernetes-safety.md)')
  .option('--kubeconfig <file>', 'how to reach the API server; without it: as a pod, by its service account')
  .option(
    '--namespace <name>',
    'where the leader Lease of the replicas is',
    process.env['POD_NAMESPACE'] ?? 'holdfast',
  )
  .option('--lease-name <name>', 'its name', 'holdfast-csi-controller')
  .option('--identity <name>', 'of this replica', process.env['POD_NAME'] ?? hostname())
  .option('--no-out-of-service', 'never set the out-of-service taint, also with proof that a machine is off')
  .parse()
  .opts<
    {
      endpoint: string;
      metadata: string;
      kubernetes?: true;
      kubeconfig?: string;
      namespace: string;
      leaseName: string;
      identity: string;
      outOfService: boolean;
    } & TlsFlags
  >();

try {
  const { endpoint, metadata, kubernetes, tlsCa, tlsCert, tlsKey, ...safety } = options;
  const metadataCredentials = clientCredentials({ tlsCa, tlsCert, tlsKey });
  const running = await startController({
    endpoint,
    metadata,
    logger,
    ...(metadataCredentials === undefined ? {} : { metadataCredentials }),
    ...(kubernetes === undefined ? {} : { kubernetes: safety }),
  });
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    process.once(signal, () => {
      logger.info({ signal }, 'stopping');
      void running.close().then(() => process.exit(0));
    });
  }
} catch (error) {
  logger.fatal({ err: error }, error instanceof Error ? error.message : String(error));
  process.exitCode = 1;
}
