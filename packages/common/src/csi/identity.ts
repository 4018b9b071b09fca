/** CSI Identity, the same for both plugins. */
import type { Csi, Known } from '@holdfast/proto';
import type { Logger } from '../log.ts';
import { DRIVER_NAME, DRIVER_VERSION } from './driver.ts';
import { csiUnary } from './handlers.ts';

/**
 * `isReady` says whether the plugin has ever reached what it depends on. It stays true after that: a liveness probe that
 * restarts the plugin because something else is away would help nobody.
 */
export function identityHandlers(
  logger: Logger,
  isReady: () => Promise<boolean>,
): Known<Csi.IdentityHandlers> {
  return {
    GetPluginInfo: csiUnary<Csi.GetPluginInfoRequest__Output, Csi.GetPluginInfoResponse>(
      logger,
      'GetPluginInfo',
      async () => ({ name: DRIVER_NAME, vendor_version: DRIVER_VERSION, manifest: {} }),
    ),
    GetPluginCapabilities: csiUnary<
      Csi.GetPluginCapabilitiesRequest__Output,
      Csi.GetPluginCapabilitiesResponse
    >(logger, 'GetPluginCapabilities', async () => ({
      capabilities: [
        { service: { type: 'CONTROLLER_SERVICE' } },
        { service: { type: 'VOLUME_ACCESSIBILITY_CONSTRAINTS' } },
        { service: { type: 'GROUP_CONTROLLER_SERVICE' } },
        { service: { type: 'SNAPSHOT_METADATA_SERVICE' } },
        { volume_expansion: { type: 'ONLINE' } },
      ],
    })),
    Probe: csiUnary<Csi.ProbeRequest__Output, Csi.ProbeResponse>(logger, 'Probe', async () => ({
      ready: { value: await isReady() },
    })),
  };
}

/** True from the first success of `attempt` on. */
export function readyOnce(attempt: () => Promise<unknown>): () => Promise<boolean> {
  let reached = false;
  return async () => {
    if (!reached) {
      reached = await attempt().then(
        () => true,
        () => false,
      );
    }
    return reached;
  };
}
