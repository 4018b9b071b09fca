/** The CSI node plugin as a process: `main.js --endpoint unix:/csi/csi.sock --agent unix:/run/holdfast/agent.sock --state-dir DIR`. */
import { endEarly } from './end-early.ts';
import { Command } from 'commander';
import { createLogger } from '@holdfast/common';
import { startCsiNode } from './server.ts';

const logger = createLogger('csi-node');
const options = new Command('holdfast-csi-node')
  .description('CSI Identity and Node over the agent of this node')
  .requiredOption(
    '--endpoint <endpoint>',
    'socket to serve, for example unix:/csi/csi.sock',
    process.env['CSI_ENDPOINT'],
  )
  .requiredOption('--agent <endpoint>', "the agent's socket, for example unix:/run/holdfast/agent.sock")
  .requiredOption('--state-dir <dir>', 'private directory for records of what is staged')
  .parse()
  .opts<{ endpoint: string; agent: string; stateDir: string }>();

try {
  const running = await startCsiNode({ ...options, logger });
  process.off('SIGTERM', endEarly);
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
