/** Starts the node plugin: Identity and Node on one socket. For main.ts and for embedding. */
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { createLogger, identityHandlers, readyOnce, serve, type Logger } from '@holdfast/common';
import { csi } from '@holdfast/proto';
import { noStep, type Step } from '../mount/step.ts';
import { AgentApi } from './agent-client.ts';
import { NodeService } from './node.ts';
import { MKFS_DIR } from './staging.ts';

export interface CsiNodeOptions {
  /** `unix:/path/csi.sock` */
  endpoint: string;
  /** `unix:/path/agent.sock` */
  agent: string;
  /** Private directory for records of what is staged, and for images of new file systems. */
  stateDir: string;
  logger?: Logger;
  /** For tests that cut a call off; see mount/step.ts. */
  step?: Step;
}

export interface RunningCsiNode {
  /** The socket's path. */
  readonly address: string;
  close(graceMs?: number): Promise<void>;
}

const PROBE_MS = 2000;

export async function startCsiNode(options: CsiNodeOptions): Promise<RunningCsiNode> {
  const logger = options.logger ?? createLogger('csi-node');
  const agent = new AgentApi(options.agent);
  const node = new NodeService({ agent, logger, stateDir: options.stateDir, step: options.step ?? noStep });
  const probe = { signal: new AbortController().signal, timeLeftMs: () => PROBE_MS };
  try {
    const server = await serve(options.endpoint, (grpc) => {
      grpc.addService(
        csi.Identity.service,
        identityHandlers(
          logger,
          readyOnce(() => agent.info(probe)),
        ),
      );
      grpc.addService(csi.Node.service, node.handlers());
    });
    // The socket is ours, so no other process is making a file system here: what is left is a killed one's.
    await rm(join(options.stateDir, MKFS_DIR), { recursive: true, force: true });
    logger.info({ endpoint: server.address, agent: options.agent }, 'CSI node plugin serves');
    return {
      address: server.address,
      close: async (graceMs) => {
        await server.close(graceMs);
        agent.close();
      },
    };
  } catch (error) {
    agent.close();
    throw error;
  }
}
