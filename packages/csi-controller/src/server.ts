/** Starts the controller plugin: Identity, Controller, GroupController and SnapshotMetadata on one socket. For main.ts and for embedding. */
import type { ChannelCredentials } from '@grpc/grpc-js';
import { createLogger, identityHandlers, readyOnce, serve, type Logger } from '@holdfast/common';
import { csi } from '@holdfast/proto';
import { ControllerService } from './controller.ts';
import { GroupService } from './groups.ts';
import { MetadataApi } from './metadata-client.ts';
import { SnapshotMetadataService } from './snapshot-metadata.ts';

/** For moving pods off dead nodes. */
export interface KubernetesOptions {
  /** Undefined: as a pod, with its service account. */
  kubeconfig?: string;
  /** Where the leader Lease is. */
  namespace: string;
  leaseName: string;
  /** Of this replica: its pod's name. */
  identity: string;
  outOfService: boolean;
}

export interface ControllerOptions {
  /** `unix:/path/controller.sock` */
  endpoint: string;
  /** `host:port` of the metadata service. */
  metadata: string;
  metadataCredentials?: ChannelCredentials;
  /** Undefined: this is no Kubernetes cluster, or another process does it. */
  kubernetes?: KubernetesOptions;
  logger?: Logger;
}

export interface RunningController {
  /** The socket's path. */
  readonly address: string;
  close(graceMs?: number): Promise<void>;
}

const PROBE_MS = 2000;

export async function startController(options: ControllerOptions): Promise<RunningController> {
  const logger = options.logger ?? createLogger('csi-controller');
  const metadata = new MetadataApi(options.metadata, options.metadataCredentials);
  const controller = new ControllerService(metadata, logger);
  let safety: { close(): Promise<void> } | undefined;
  try {
    if (options.kubernetes !== undefined) safety = await startSafety(options.kubernetes, metadata, logger);
    const server = await serve(options.endpoint, (grpc) => {
      grpc.addService(
        csi.Identity.service,
        identityHandlers(
          logger,
          readyOnce(() => metadata.ping(PROBE_MS)),
        ),
      );
      grpc.addService(csi.Controller.service, controller.handlers());
      grpc.addService(csi.GroupController.service, new GroupService(metadata).handlers(logger));
      grpc.addService(csi.SnapshotMetadata.service, new SnapshotMetadataService(metadata).handlers(logger));
    });
    logger.info({ endpoint: server.address, metadata: options.metadata }, 'CSI controller serves');
    return {
      address: server.address,
      close: async (graceMs) => {
        await safety?.close();
        await server.close(graceMs);
        metadata.close();
      },
    };
  } catch (error) {
    await safety?.close();
    metadata.close();
    throw error;
  }
}

/** Loaded only where it is wanted: the client library takes most of a second and 100 MB. */
async function startSafety(
  { kubeconfig, outOfService, ...options }: KubernetesOptions,
  metadata: MetadataApi,
  logger: Logger,
): Promise<{ close(): Promise<void> }> {
  const { kubeConfig } = await import('./kubernetes/kube-cluster.ts');
  const safety = await import('./kubernetes/index.ts');
  return safety.startSafety({
    ...options,
    config: kubeConfig(kubeconfig),
    metadata,
    logger,
    settings: { outOfService },
  });
}
