/** A metadata service with fake agents, for one test. */
import { randomUUID } from 'node:crypto';
import { credentials } from '@grpc/grpc-js';
import { call, createLogger, type Logger } from '@holdfast/common';
import {
  holdfast,
  type Host__Output,
  type Pool__Output,
  type Snapshot__Output,
  type Volume__Output,
} from '@holdfast/proto';
import { startMetadataService, type MetadataService, type MetadataServiceOptions } from '../src/index.ts';
import { FakeAgent, FakeDisk, type AgentOptions } from './fake-agent.ts';

type Method = Exclude<keyof InstanceType<typeof holdfast.Metadata> & `${Uppercase<string>}${string}`, symbol>;

/** Nothing is printed unless HOLDFAST_LOG_LEVEL asks for it. */
export function quietLogger(): Logger {
  const logger = createLogger('metadata-service');
  logger.level = process.env['HOLDFAST_LOG_LEVEL'] ?? 'silent';
  return logger;
}

export class Cluster {
  service: MetadataService;
  client: InstanceType<typeof holdfast.Metadata>;
  readonly agents: FakeAgent[] = [];
  readonly #options: MetadataServiceOptions;

  private constructor(service: MetadataService, options: MetadataServiceOptions) {
    this.service = service;
    this.#options = options;
    this.client = new holdfast.Metadata(service.address, credentials.createInsecure());
  }

  static async start(options: Partial<MetadataServiceOptions> = {}): Promise<Cluster> {
    const all: MetadataServiceOptions = {
      listen: '127.0.0.1:0',
      store: 'memory',
      logger: quietLogger(),
      ...options,
    };
    const cluster = new Cluster(await startMetadataService(all), all);
    return cluster;
  }

  /** The service stops and starts again on the same store; agents are told by the test. */
  async restart(options: Partial<MetadataServiceOptions> = {}): Promise<void> {
    this.client.close();
    await this.service.close();
    this.service = await startMetadataService({ ...this.#options, ...options, listen: this.service.address });
    this.client = new holdfast.Metadata(this.service.address, credentials.createInsecure());
  }

  async stop(): Promise<void> {
    for (const agent of this.agents) agent.close();
    this.client.close();
    await this.service.close();
  }

  agent(name: string, disks: FakeDisk[], options: Partial<AgentOptions> = {}): FakeAgent {
    const agent = new FakeAgent({
      nodeId: `${name}.00000001`,
      address: this.service.address,
      disks,
      ...options,
    });
    this.agents.push(agent);
    return agent;
  }

  /** An agent that is connected and LIVE on all of its pools. */
  async node(name: string, disks: FakeDisk[], options: Partial<AgentOptions> = {}): Promise<FakeAgent> {
    const agent = this.agent(name, disks, options);
    await agent.connect();
    for (const disk of disks) await agent.join(disk);
    return agent;
  }

  rpc<T = object>(method: Method, request: object = {}, timeoutMs = 10_000): Promise<T> {
    const withId = { request_id: randomUUID(), ...request };
    return call(this.client, this.client[method] as never, withId, { timeoutMs });
  }

  create(name: string, request: object = {}): Promise<Volume__Output> {
    return this.rpc('CreateVolume', { name, size_bytes: String(1 << 30), ...request });
  }

  async publish(uuid: string, agent: FakeAgent, request: object = {}): Promise<string> {
    const answer = await this.rpc<{ publish_id: string }>('PublishVolume', {
      uuid,
      node_id: agent.nodeId,
      access_mode: 'ACCESS_MODE_SINGLE_NODE_WRITER',
      ...request,
    });
    return answer.publish_id;
  }

  unpublish(uuid: string, agent: FakeAgent, timeoutMs = 10_000): Promise<object> {
    return this.rpc('UnpublishVolume', { uuid, node_id: agent.nodeId }, timeoutMs);
  }

  snapshot(
    name: string,
    source: string,
    request: object = {},
    timeoutMs = 10_000,
  ): Promise<Snapshot__Output> {
    return this.rpc('CreateSnapshot', { name, source_volume_uuid: source, ...request }, timeoutMs);
  }

  volume(uuid: string): Promise<Volume__Output> {
    return this.rpc('GetVolume', { uuid });
  }

  async pool(disk: FakeDisk): Promise<Pool__Output> {
    const { pools } = await this.rpc<{ pools: Pool__Output[] }>('ListPools');
    const found = pools.find((pool) => pool.uuid === disk.uuid);
    if (found === undefined) throw new Error(`pool ${disk.uuid} is not listed`);
    return found;
  }

  async host(disk: FakeDisk, agent: FakeAgent): Promise<Host__Output> {
    const found = (await this.pool(disk)).hosts.find((host) => host.node_id === agent.nodeId);
    if (found === undefined) throw new Error(`${agent.nodeId} is no host`);
    return found;
  }

  async audit(
    filter: object = {},
  ): Promise<{ event: string; proof: string; detail: string; epoch: string }[]> {
    const { records } = await this.rpc<{
      records: { event: string; proof: string; detail: string; epoch: string }[];
    }>('ListAudit', filter);
    return records;
  }
}
