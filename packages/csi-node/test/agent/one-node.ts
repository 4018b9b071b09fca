/** One agent on an engine in memory that talks to a scripted service, with its state and sockets in the test's own area. */
import { call, createLogger } from '@holdfast/common';
import type { NodeAgentClient } from '@holdfast/proto';
import { waitFor, type TestArea } from '@holdfast/testing';
import { loadIdentity, startAgent, type Agent, type AgentOptions } from '../../src/agent/index.ts';
import type { FakeDisk, FakeNative } from './fake-native.ts';
import type { ScriptedService } from './scripted-service.ts';

const logger = createLogger('test');
if (process.env['HOLDFAST_LOG_LEVEL'] === undefined) logger.level = 'silent';

export function startOneNode(
  area: TestArea,
  parts: { disk: FakeDisk; service: ScriptedService; native: FakeNative } & Pick<AgentOptions, 'freezer'>,
): Promise<Agent> {
  const { disk, service, ...own } = parts;
  return startAgent({
    stateDir: area.path('node'),
    socket: `unix:${area.path('agent.sock')}`,
    keeperSocket: 'none',
    metadata: service.address,
    identity: loadIdentity(area.path('node'), 'node-1', {
      machineId: '1'.repeat(32),
      bootId: '2'.repeat(32),
    }),
    devices: [disk.path],
    lockDir: area.path('locks'),
    maxVolumes: 8,
    logger,
    rescanMs: 100,
    ...own,
  });
}

/** Until the agent may write to its pool. */
export async function poolJoined(api: NodeAgentClient): Promise<void> {
  await waitFor('the pool', async () => {
    const { pools } = await call(api, api.GetAgentInfo, {});
    return pools[0]?.lease === 'valid' ? true : undefined;
  });
}
