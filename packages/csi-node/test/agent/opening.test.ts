/** What the agent tells of the volumes that it opens, when the service can't hear it at first. On an engine in memory. */
import { randomUUID } from 'node:crypto';
import { credentials } from '@grpc/grpc-js';
import { call, HoldfastError } from '@holdfast/common';
import { holdfast, type NodeAgentClient } from '@holdfast/proto';
import { TestArea, waitFor } from '@holdfast/testing';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Agent } from '../../src/agent/index.ts';
import { FakeDisk, FakeNative } from './fake-native.ts';
import { poolJoined, startOneNode } from './one-node.ts';
import { ScriptedService } from './scripted-service.ts';

/** The agent looks every second, and waits no longer than one after the second failure. */
const longMs = 2500;
const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

describe('the word that a volume is open', () => {
  let area: TestArea;
  let disk: FakeDisk;
  let service: ScriptedService;
  let native: FakeNative;
  let agent: Agent;
  let api: NodeAgentClient;

  beforeEach(async () => {
    area = await TestArea.create('agent-opening');
    disk = new FakeDisk();
    service = new ScriptedService(disk);
    await service.start();
    native = new FakeNative(disk);
    agent = await startOneNode(area, { disk, service, native });
    api = new holdfast.NodeAgent(`unix:${area.path('agent.sock')}`, credentials.createInsecure());
    await poolJoined(api);
  });
  afterEach(async () => {
    api.close();
    await agent.handOver();
    await service.stop();
    await area.dispose();
  });

  let volumes = 0;
  const open = async (): Promise<string> => {
    const id = ++volumes;
    const uuid = randomUUID();
    service.grants.set(uuid, {
      volume_uuid: uuid,
      volume_id: String(id),
      slot: id,
      name: `v${id}`,
      size_bytes: String(1 << 30),
      epoch: '5',
      layers: [
        {
          layer_id: String(id),
          slot: id,
          parent_layer_id: '0',
          birth: String(id),
          size_bytes: String(1 << 30),
          frozen: false,
          slabs: [],
        },
      ],
      parameters: {},
    });
    await call(api, api.OpenVolume, {
      pool_uuid: disk.info.uuid,
      volume_uuid: uuid,
      publish_id: 'p1',
      read_only: false,
    });
    return uuid;
  };
  const fails = (): void => {
    service.openedError = new HoldfastError('UNAVAILABLE', 'The store is busy.');
  };
  /** Told so often that the agent has given up for the moment, and then not any more. */
  const untold = async (): Promise<string> => {
    fails();
    const uuid = await open();
    expect(service.told.length).toBeGreaterThan(0);
    return uuid;
  };

  it('is in the Hello that waited for the answer to its grant', async () => {
    let answer = (): void => undefined;
    service.beforeGrant = new Promise((resolve) => {
      answer = resolve;
    });
    const opened = open();
    await waitFor('the question', () => service.asked === 1);
    service.breakSession();
    await pause(500); // the next session waits for the call by now
    expect(service.hellos).toBe(1);
    answer();
    const uuid = await opened;
    expect(service.hellos).toBe(2);
    expect(service.held).toMatchObject([{ volume_uuid: uuid, epoch: '5' }]);
  });

  it('is said again until the service has heard it, and then no more', async () => {
    const uuid = await untold();
    const before = service.told.length;
    await waitFor('another attempt', () => (service.told.length > before ? true : undefined));
    service.openedError = undefined;
    const failed = service.told.length;
    await waitFor('the word', () => (service.told.length > failed ? true : undefined));
    expect(service.told.at(-1)).toMatchObject({ volume_uuid: uuid, epoch: '5', host: { host_id: 1 } });
    const heard = service.told.length;
    await pause(longMs);
    expect(service.told.length).toBe(heard);
    expect(service.hellos).toBe(1);
    expect(native.pool.volume(uuid).state).toBe('open');
  });

  it('is dropped with the session, as the next Hello says it', async () => {
    const uuid = await untold();
    service.breakSession();
    await waitFor('the next hello', () => (service.hellos === 2 ? true : undefined));
    expect(service.held.map((held) => held.volume_uuid)).toEqual([uuid]);
    const before = service.told.length;
    await pause(longMs);
    expect(service.told.length).toBe(before);
  });

  it('is dropped when the volume is closed, or revoked', async () => {
    for (const end of ['close', 'revoke'] as const) {
      const uuid = await untold();
      if (end === 'close') await call(api, api.CloseVolume, { volume_uuid: uuid });
      else await service.order({ revoke: { volume_uuid: uuid, epoch: '5' } });
      const before = service.told.length;
      await pause(longMs);
      expect(service.told.length).toBe(before);
    }
  });

  it('is not said again when it was refused, and the volume stays for its orders to take away', async () => {
    const uuid = await untold();
    service.openedError = new HoldfastError('STALE', 'The grant is being taken back.');
    const before = service.told.length;
    await waitFor('another attempt', () => (service.told.length > before ? true : undefined));
    const refused = service.told.length;
    await pause(longMs);
    expect(service.told.length).toBe(refused);
    expect(native.pool.volume(uuid).state).toBe('open');
  });
});
