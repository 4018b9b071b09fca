/** Metadata service, controller and one node plugin, all real, over a stand-in for the agent and its engine. */
import type { TestArea } from '@holdfast/testing';
import { startController } from '@holdfast/csi-controller';
import { Cluster } from '../../metadata-service/test/cluster.ts';
import { FakeDisk } from '../../metadata-service/test/fake-agent.ts';
import { startCsiNode } from '../src/csi/index.ts';
import { StandInAgent } from './stand-in-agent.ts';

/** As the stand-in agent says. */
const MAX_VOLUMES = 32;

export interface Stack {
  readonly controllerSocket: string;
  readonly nodeSocket: string;
}

export async function startStandInStack(area: TestArea): Promise<Stack> {
  const cluster = await Cluster.start();
  area.onDispose(() => cluster.stop());
  const disk = new FakeDisk();
  disk.slabCount = 1 << 20;
  disk.volumeSlots = 1024;
  disk.layerSlots = 2048;
  const host = await cluster.node('node-a', [disk], { maxVolumes: MAX_VOLUMES });
  const agent = await StandInAgent.start(area, {
    poolUuid: disk.uuid,
    nodeId: host.nodeId,
    open: async (uuid, publishId) => {
      const open = host.open.get(uuid) ?? (await host.openVolume(disk, uuid, publishId));
      return BigInt(open.size_bytes);
    },
    sizeOf: async (uuid) => BigInt((await cluster.volume(uuid)).size_bytes),
    close: (uuid) => host.returnVolume(disk, uuid),
  });
  const controllerSocket = area.path('controller.sock');
  const nodeSocket = area.path('csi.sock');
  const controller = await startController({
    endpoint: `unix:${controllerSocket}`,
    metadata: cluster.service.address,
  });
  area.onDispose(() => controller.close(0));
  const node = await startCsiNode({
    endpoint: `unix:${nodeSocket}`,
    agent: agent.endpoint,
    stateDir: area.path('state'),
  });
  area.onDispose(() => node.close(0));
  return { controllerSocket, nodeSocket };
}
