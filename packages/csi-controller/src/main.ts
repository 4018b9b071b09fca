/** The CSI controller as a process: `main.js --endpoint unix:/csi/controller.sock --metadata host:port`. */
import { Command } from 'commander';
import { createLogger } from '@holdfast/common';
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
  .parse()
  .opts<{ endpoint: string; metadata: string }>();

try {
  const running = await startController({ ...options, logger });
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
